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
    "OWN_WEIGHT",
    "POPULARITY",
    "RECENCY",
    "RECENT_POPULARITY",
    "RETURNS",
    "Features",
    "Matrices",
    "Rows",
]

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

POPULARITY = "popularity"
RECENT_POPULARITY = "recent popularity"
FIRST_TIMES = "share of first times"
OWN_WEIGHT = "own weight"
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

LABEL_NAMES = (POPULARITY, RECENT_POPULARITY, FIRST_TIMES)
PAIR_NAMES = (HOUR, AFTER_LAST, AFTER_LATEST, LEADS_TO, ALIKE)
NEXT_PAIRS = 3
"""How many of these the ranking of all labels uses."""
ENGAGED_NAMES = (OWN_WEIGHT, ENGAGED, RECENCY, RETURNS)


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


class Matrices:
    """Counts as ratios and logarithms, a snapshot of when it was made.

    Making one costs a few passes over matrices of all pairs of labels, so one serves many batches; a label
    that has appeared since has no features until the next.

    Attributes
    ----------
    n_labels
        How many labels it knows.
    examples, changes
        Those of the statistics when it was made.
    """

    def __init__(self, statistics: Statistics, kind: type = np.float32) -> None:
        size = len(statistics.labels)
        self.n_labels = size
        self.examples = statistics.examples
        self.changes = statistics.changes
        self._kind = kind
        share = _shares(statistics.popularity.totals(size))
        self.after_last = np.log(self._ratios(statistics.last, share))
        self.after_latest = self._ratios(statistics.latest, share)
        before = statistics.before[:size, :size]
        self.leads_to = self._ratios(before, _shares(before.sum(axis=0)))
        scale = 1.0 / np.sqrt(statistics.first_times[:size] + ALIKE_PSEUDO_COUNTS)
        self.alike = (before + before.T).astype(kind)
        self.alike *= scale[:, None].astype(kind)
        self.alike *= scale.astype(kind)
        hours = statistics.hours[:, :size]
        total = hours.sum(axis=1, keepdims=True)
        expected = HOUR_PSEUDO_COUNTS * share
        self.hours = np.log((hours + expected) / ((total + HOUR_PSEUDO_COUNTS) * share)).astype(kind)
        self.returns = _evidence(statistics.gaps).astype(kind)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        arrays = (self.after_last, self.after_latest, self.leads_to, self.alike, self.hours)
        return sum(array.nbytes for array in arrays)

    def _ratios(self, counts: NDArray[np.int32], share: NDArray[np.float64]) -> Floats:
        """Return P(l | k) / P(l), drawn to 1 by pseudo-counts, for pairs (k, l)."""
        size = self.n_labels
        total = counts[:size, :size].sum(axis=1, dtype=np.int64, keepdims=True) + PSEUDO_COUNTS
        ratios: Floats = counts[:size, :size].astype(self._kind)
        ratios *= (1.0 / share).astype(self._kind)
        ratios += PSEUDO_COUNTS
        ratios *= (1.0 / total).astype(self._kind)
        return ratios

    def features(self, statistics: Statistics, rows: Rows, *, new: bool) -> Features:
        """Return the features of all labels for the rows of a batch.

        Parameters
        ----------
        statistics
            Popularity is read from here, as of now.
        rows
            With as many labels as the matrices.
        new
            Whether to add the two features of what is new to a user.
        """
        size = self.n_labels
        share = _shares(statistics.popularity.totals(size))
        recent = statistics.popularity.weights(size, RECENT_HALF_LIFE, old=0.0) + share
        popularity = np.log(share)
        of_labels = np.array(
            [
                popularity,
                np.log(recent / recent.sum()) - popularity,
                np.log(_shares(statistics.first_times[:size])) - popularity,
            ],
            self._kind,
        )
        names = PAIR_NAMES if new else PAIR_NAMES[:NEXT_PAIRS]
        of_pairs = np.empty((len(rows.at_ms), len(names), size), self._kind)
        of_pairs[:, 0] = self.hours[(rows.at_ms // HOUR_MS).astype(np.int64) % HOURS]
        last = rows.latest[:, 0]
        of_pairs[:, 1] = self.after_last[np.maximum(last, 0)]
        of_pairs[last < 0, 1] = 0.0
        weights = _latest_weights(rows.latest).astype(self._kind)
        places = np.maximum(rows.latest, 0)
        mixed = [self.after_latest, self.leads_to, self.alike] if new else [self.after_latest]
        for number, matrix in enumerate(mixed, 2):
            total = of_pairs[:, number]
            total[:] = weights[:, 0, None] * matrix[places[:, 0]]
            for turn in range(1, LATEST):
                part = matrix[places[:, turn]]
                part *= weights[:, turn, None]
                total += part
            total[last < 0] = 0.0 if matrix is self.alike else 1.0
            if matrix is not self.alike:
                np.log(total, out=total)
        of_engaged = np.array(
            [
                np.log1p(rows.weights),
                np.ones(len(rows.rows)),
                np.log2(1.0 + np.maximum(rows.ages_ms, 0.0) / HOUR_MS) / 10.0,
                self.returns[gap_of(rows.ages_ms)],
            ],
            self._kind,
        )
        return Features(
            LABEL_NAMES, names, ENGAGED_NAMES, of_labels, of_pairs, of_engaged, rows.rows, rows.labels
        )


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
    """Return how much more often than others a label comes next that was last engaged so long ago: a logarithm.

    Parameters
    ----------
    gaps
        Array, shape (GAPS, 2): how many there were, and how many came next.

    Examples
    --------
    >>> _evidence(np.array([[0, 0], [100, 50], [100, 0]])).round(2).tolist()
    [0.0, 0.76, -1.77]
    """
    seen, came = gaps[:, 0], gaps[:, 1]
    usual = (came.sum() + 1.0) / (seen.sum() + 100.0)
    evidence: NDArray[np.float64] = np.log(
        (came + GAP_PSEUDO_COUNTS * usual) / ((seen + GAP_PSEUDO_COUNTS) * usual)
    )
    return evidence
