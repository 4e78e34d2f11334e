"""What the model knows of a pair of a user and a label, as numbers.

Decides the features, how they are computed from the counts, and in batches: all labels of up to 256 users at
once, in float32 and without a loop over labels. It must not know how features become scores.

Three kinds of features are kept apart, because most of the work is in what is not stored:

- of a label alone, one row for all users;
- of a user's engaged label, one number for each of those pairs only, 0 for all other labels;
- of any pair, a matrix.

A label stands for itself only by its counts, so whatever is learned of the features holds for labels that
appear tomorrow, and for a million users as for a thousand.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from stream_app.core.statistics import HOURS, Statistics, gap_of

__all__ = [
    "AFTER_LAST",
    "AFTER_LATEST",
    "ALIKE",
    "ENGAGED",
    "FIRST_TIMES",
    "HOUR",
    "LEADS_TO",
    "OWN_SHARE",
    "OWN_WEIGHT",
    "POPULARITY",
    "RECENCY",
    "RECENT_POPULARITY",
    "RETURNS",
    "Features",
    "Matrices",
    "Rows",
    "Workspace",
]

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

POPULARITY = "popularity"
RECENT_POPULARITY = "recent popularity"
FIRST_TIMES = "share of first times"
OWN_WEIGHT = "own weight"
OWN_SHARE = "own share"
ENGAGED = "engaged before"
RECENCY = "time since"
RETURNS = "usual time between"
HOUR = "hour of the day"
AFTER_LAST = "after the last label"
AFTER_LATEST = "after the latest labels"
LEADS_TO = "first time after the latest labels"
ALIKE = "like the latest labels"

LATEST = 5
"""How many of a user's latest labels say what comes next; each weighs `LATEST_FADE` of the one after it."""
LATEST_FADE = 0.7
PSEUDO_COUNTS = 50.0
HOUR_PSEUDO_COUNTS = 20.0
GAP_PSEUDO_COUNTS = 20.0
ALIKE_PSEUDO_COUNTS = 5.0
RECENT_HALF_LIFE = 4.0
"""In periods of half a week: 14 days."""
HOUR_MS = 3_600_000
SESSION_MS = 6 * HOUR_MS
"""Half-life of what the last label says: in the same basket much, a week later little."""

LABEL_NAMES = (POPULARITY, RECENT_POPULARITY, FIRST_TIMES)
NEXT_PAIRS = (HOUR, AFTER_LAST, AFTER_LATEST)
NEW_PAIRS = (LEADS_TO, ALIKE)
"""What is known of a pair; the second only where labels that are new to a user are ranked."""
ENGAGED_NAMES = (OWN_WEIGHT, OWN_SHARE, ENGAGED, RECENCY, RETURNS)


@dataclass(slots=True)
class Rows:
    """What is known of the users of a batch, one row each, by the positions of labels.

    Parameters
    ----------
    at_ms
        Array, shape (n_rows,), float64: the instant of each row.
    engaged
        Array, shape (n_rows, n_labels), bool.
    rows, labels
        Positions of the engaged pairs, by row.
    weights
        Of the engaged pairs at the row's instant, float64.
    ages_ms
        Of the engaged pairs, whole milliseconds since the last engagement, float64.
    latest
        Array, shape (n_rows, `LATEST`): the latest engaged labels, the last one first, -1 for none.
    """

    at_ms: NDArray[np.float64]
    engaged: NDArray[np.bool_]
    rows: Ints
    labels: Ints
    weights: NDArray[np.float64]
    ages_ms: NDArray[np.float64]
    latest: Ints

    @property
    def counts(self) -> Ints:
        """How many labels each row has engaged."""
        return np.bincount(self.rows, minlength=len(self.at_ms))

    def first_labels(self, size: int) -> "Rows":
        """Return the rows with the first labels only."""
        if size >= self.engaged.shape[1]:
            return self
        pairs = self.labels < size
        known = (self.latest >= 0) & (self.latest < size)
        # What is left moves up, so that the first one is still the last label.
        place = np.argsort(~known, axis=1, kind="stable")
        latest = np.where(
            np.take_along_axis(known, place, axis=1), np.take_along_axis(self.latest, place, axis=1), -1
        )
        return Rows(
            self.at_ms,
            self.engaged[:, :size],
            self.rows[pairs],
            self.labels[pairs],
            self.weights[pairs],
            self.ages_ms[pairs],
            latest,
        )

    def some(self, chosen: Ints) -> "Rows":
        """Return some of the rows, in increasing order."""
        place = np.full(len(self.at_ms), -1)
        place[chosen] = np.arange(len(chosen))
        pairs = np.flatnonzero(place[self.rows] >= 0)
        return Rows(
            self.at_ms[chosen],
            self.engaged[chosen],
            place[self.rows[pairs]],
            self.labels[pairs],
            self.weights[pairs],
            self.ages_ms[pairs],
            self.latest[chosen],
        )


@dataclass(slots=True)
class Features:
    """Features of all labels for the rows of a batch, by kind.

    Parameters
    ----------
    label_names, pair_names, engaged_names
        What the features of each kind are called.
    of_labels
        Array, shape (n_label_names, n_labels).
    of_pairs
        Array, shape (n_rows, n_pair_names, n_labels).
    of_engaged
        Array, shape (n_engaged_names, n_engaged): of the engaged pairs; it is 0 for all others.
    rows, labels
        The engaged pairs, by row.
    """

    label_names: tuple[str, ...]
    pair_names: tuple[str, ...]
    engaged_names: tuple[str, ...]
    of_labels: Floats
    of_pairs: Floats
    of_engaged: Floats
    rows: Ints
    labels: Ints

    def one(self, row: int, label: int) -> dict[str, float]:
        """Return the features of one pair."""
        found = dict(zip(self.label_names, self.of_labels[:, label].tolist(), strict=True))
        found.update(zip(self.pair_names, self.of_pairs[row, :, label].tolist(), strict=True))
        place = np.flatnonzero((self.rows == row) & (self.labels == label))
        for name, values in zip(self.engaged_names, self.of_engaged, strict=True):
            found[name] = float(values[place[0]]) if len(place) else 0.0
        return found


class Workspace:
    """Memory that batches use in turn: to get large arrays from the system costs more than to fill them.

    What is written into an array of a name is gone when the same name is asked for again.
    """

    def __init__(self, kind: type = np.float32) -> None:
        self.kind = kind
        self._arrays: dict[str, Floats] = {}

    def array(self, name: str, *shape: int) -> Floats:
        """Return an array of a shape, with anything in it."""
        size = prod(shape)
        flat = self._arrays.get(name)
        if flat is None or len(flat) < size:
            flat = self._arrays[name] = np.empty(size, self.kind)
        return flat[:size].reshape(shape)


class Matrices:
    """Counts as ratios and logarithms, a snapshot of when it was made.

    Making one costs a few passes over matrices of all pairs of labels, so one serves many batches; a label
    that has appeared since has no features until the next.

    Attributes
    ----------
    n_labels, names
        How many labels it knows, and which.
    moved, changes
        Those of the statistics when it was made.
    """

    def __init__(self, statistics: Statistics, workspace: Workspace) -> None:
        kind = workspace.kind
        size = len(statistics.labels)
        self.n_labels = size
        self.names = np.array(statistics.labels, np.object_)
        self.moved = statistics.moved
        self.changes = statistics.changes
        self._kind = kind
        self._workspace = workspace
        share = _shares(statistics.popularity.totals(size))
        self.after_last = np.log(self._ratios(statistics.last, share))
        self.after_latest = self._ratios(statistics.latest, share)
        # The baseline: what came after the last label, popularity where that says nothing.
        last = statistics.last[:size, :size]
        follows = last / np.maximum(1, last.sum(axis=1, dtype=np.int64, keepdims=True))
        self._follows: Floats = np.vstack([follows + 1e-6 * share, share]).astype(kind)
        before = statistics.before[:size, :size]
        self.leads_to = self._ratios(before, _shares(before.sum(axis=0)))
        scale = 1.0 / np.sqrt(statistics.first_times[:size] + ALIKE_PSEUDO_COUNTS)
        self.alike: Floats = (before + before.T).astype(kind)
        self.alike *= scale[:, None].astype(kind)
        self.alike *= scale.astype(kind)
        hours = statistics.hours[:, :size]
        total = hours.sum(axis=1, keepdims=True)
        expected = HOUR_PSEUDO_COUNTS * share
        self.hours: Floats = np.log((hours + expected) / ((total + HOUR_PSEUDO_COUNTS) * share)).astype(kind)
        self.returns: Floats = _evidence(statistics.gaps).astype(kind)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        arrays = (self.after_last, self.after_latest, self.leads_to, self.alike, self.hours)
        return sum(array.nbytes for array in arrays)

    def markov(self, rows: Rows) -> Floats:
        """Return the share of each label among what came after the last label of each row."""
        return self._follows[rows.latest[:, 0]]

    def _ratios(self, counts: NDArray[np.int32], share: NDArray[np.float64]) -> Floats:
        """Return P(l | k) / P(l), drawn to 1 by pseudo-counts, for pairs (k, l)."""
        size = self.n_labels
        total = counts[:size, :size].sum(axis=1, dtype=np.int64, keepdims=True) + PSEUDO_COUNTS
        ratios: Floats = counts[:size, :size].astype(self._kind)
        ratios *= (1.0 / share).astype(self._kind)
        ratios += PSEUDO_COUNTS
        ratios *= (1.0 / total).astype(self._kind)
        return ratios

    def features(self, statistics: Statistics, rows: Rows) -> Features:
        """Return the features of all labels for the rows of a batch, as far as all labels are ranked.

        Parameters
        ----------
        statistics
            Popularity is read from here, as of now.
        rows
            With as many labels as the matrices.
        """
        size = self.n_labels
        share = _shares(statistics.popularity.totals(size))
        recent = statistics.popularity.weights(size, RECENT_HALF_LIFE, old=0.0) + share
        popularity = np.log(share)
        of_labels: Floats = np.array(
            [
                popularity,
                np.log(recent / recent.sum()) - popularity,
                np.log(_shares(statistics.first_times[:size])) - popularity,
            ],
            self._kind,
        )
        of_pairs = self._workspace.array("next", len(rows.at_ms), len(NEXT_PAIRS), size)
        of_pairs[:, 0] = self.hours[(rows.at_ms // HOUR_MS).astype(np.int64) % HOURS]
        last = rows.latest[:, 0]
        of_pairs[:, 1] = self.after_last[np.maximum(last, 0)]
        of_pairs[last < 0, 1] = 0.0
        of_pairs[:, 1] *= _same_session(rows)[:, None].astype(self._kind)
        of_pairs[:, 2] = self._mean(self.after_latest, rows.latest, log=True)
        total = np.bincount(rows.rows, rows.weights, len(rows.at_ms))
        of_engaged: Floats = np.array(
            [
                np.log1p(rows.weights),
                # A fully decayed profile has no shares.
                np.log(rows.weights / np.maximum(total, 1e-9)[rows.rows] + 0.01) / 2.0 + 1.0,
                np.ones(len(rows.rows)),
                np.log2(1.0 + np.maximum(rows.ages_ms, 0.0) / HOUR_MS) / 10.0,
                self.returns[gap_of(rows.ages_ms)],
            ],
            self._kind,
        )
        return Features(
            LABEL_NAMES, NEXT_PAIRS, ENGAGED_NAMES, of_labels, of_pairs, of_engaged, rows.rows, rows.labels
        )

    def discovery_features(self, features: Features, rows: Rows, chosen: Ints | None = None) -> Features:
        """Return the features of labels that are new to the users.

        Parameters
        ----------
        features, rows
            Of all rows.
        chosen
            Which of them, in increasing order; `None` for all.
        """
        every = np.arange(len(rows.at_ms)) if chosen is None else chosen
        latest = rows.latest[every]
        known = len(NEXT_PAIRS)
        of_pairs = self._workspace.array("discovery", len(every), known + len(NEW_PAIRS), self.n_labels)
        of_pairs[:, :known] = features.of_pairs[every]
        of_pairs[:, known] = self._mean(self.leads_to, latest, log=True)
        of_pairs[:, known + 1] = self._mean(self.alike, latest)
        return Features(
            LABEL_NAMES,
            NEXT_PAIRS + NEW_PAIRS,
            (),
            features.of_labels,
            of_pairs,
            np.zeros((0, 0), self._kind),
            np.zeros(0, np.int64),
            np.zeros(0, np.int64),
        )

    def _mean(self, matrix: Floats, latest: Ints, *, log: bool = False) -> Floats:
        """Return the mean row of a matrix over the latest labels, the later ones weighing more.

        Or the logarithm of it; 0 for a user without labels in both cases.
        """
        weights: Floats = _latest_weights(latest).astype(self._kind)
        parts = self._workspace.array("parts", *latest.shape, self.n_labels)
        np.take(matrix, np.maximum(latest, 0), axis=0, out=parts, mode="clip")
        mean = self._workspace.array("mean", len(latest), 1, self.n_labels)
        np.matmul(weights[:, None, :], parts, out=mean)
        mean = mean[:, 0]
        if log:
            mean[latest[:, 0] < 0] = 1.0
            np.log(mean, out=mean)
        return mean


def _same_session(rows: Rows) -> NDArray[np.float64]:
    """Return how much of each user's session is left: half after `SESSION_MS` without an engagement."""
    ages_ms = np.full(len(rows.at_ms), np.inf)
    np.minimum.at(ages_ms, rows.rows, rows.ages_ms)
    left: NDArray[np.float64] = 2.0 ** (-np.maximum(ages_ms, 0.0) / SESSION_MS)
    return left


def _latest_weights(latest: Ints) -> NDArray[np.float64]:
    """Return how much each of the latest labels weighs, together 1; the later ones weigh more.

    Examples
    --------
    >>> _latest_weights(np.array([[7, 3, -1], [-1, -1, -1]])).round(3).tolist()
    [[0.588, 0.412, 0.0], [0.0, 0.0, 0.0]]
    """
    weights = np.where(latest >= 0, LATEST_FADE ** np.arange(latest.shape[1]), 0.0)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
    return weights


def _shares(counts: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return counts as shares of their sum, each label one more.

    Examples
    --------
    >>> _shares(np.array([0, 2])).tolist()
    [0.25, 0.75]
    """
    shares: NDArray[np.float64] = (counts + 1.0) / (counts.sum() + float(len(counts)))
    return shares


def _evidence(gaps: Ints) -> NDArray[np.float64]:
    """Return how much more often a label comes next that was last engaged so long ago, as a logarithm.

    Parameters
    ----------
    gaps
        Array, shape (GAPS, 2): how many there were, and how many came next.

    Examples
    --------
    >>> _evidence(np.array([[0, 0], [100, 50], [100, 0]])).round(2).tolist()
    [0.0, 0.96, -1.79]
    """
    seen, came = gaps[:, 0], gaps[:, 1]
    usual = (came.sum() + 1.0) / (seen.sum() + 100.0)
    evidence: NDArray[np.float64] = np.log(
        (came + GAP_PSEUDO_COUNTS * usual) / ((seen + GAP_PSEUDO_COUNTS) * usual)
    )
    return evidence
