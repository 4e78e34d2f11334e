"""Which category a user turns to next: scored, then learned from, online and in batches.

Decides what is predicted before what is learned: no example is learned from before it was scored, at the
grain of a batch. It must not know Kafka, Redis or the clock.

An example goes through here like this:

    History (before the slice) + the user's earlier examples ─► rows (`history`) ─► features (`features`)
        ─► two heads (`ranker`): next, over all labels; discovery, over labels never engaged
        ─► probabilities (`calibration`) ─► judged (`accuracy`)
    then, for the whole batch: heads, calibration and counts (`statistics`) learn

What is learned is little, so that it is cheap to keep and to share: counts, which are integers and add up
over partitions, and about twenty weights, which are averaged.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_app.core import features as ft
from stream_app.core.accuracy import Judged, Window, mid_ranks
from stream_app.core.calibration import Calibration
from stream_app.core.features import Features, Floats, Ints, Matrices, Rows, Workspace
from stream_app.core.history import Batch, Example, History, Slice, rows_of
from stream_app.core.ranker import MAX_AFFINITIES, Ranker, affinity_inputs, softmax
from stream_app.core.ranker_state import STATE_VERSION, average_states, checked_state
from stream_app.core.recommend import Recommender
from stream_app.core.scores import MAX_SCORES, Scored
from stream_app.core.statistics import MAX_LABELS, PERIOD_MS, TABLES, Delta, Statistics, codes_of, gap_of

__all__ = ["BATCH", "Delta", "Example", "History", "NextCategoryModel", "Observed"]

BATCH = 256
"""Examples that are scored before they are learned from, at most."""
LEARNED_SHARE = 16
"""A batch is at most this part of what was learned before, so that a new model is not blind for long."""
REBUILD_EXAMPLES = 4_000
"""Examples between two snapshots of the counts, at most."""
GROWN_EXAMPLES = 1_000
"""The same where labels have appeared that the last one lacks."""
OFFERS_EXAMPLES = 50_000
"""Examples between two snapshots of assets and event types, at most: these change slowly."""
OFFERS_SHARE = 4
"""The same as a part of what was counted."""
COUNTED_LATEST = 3
"""How many of the latest labels are counted with what comes next."""
MODEL_SCHEMA = "1"

NEXT = (
    ft.POPULARITY,
    ft.RECENT_POPULARITY,
    ft.FIRST_TIMES,
    ft.HOUR,
    ft.AFTER_LAST,
    ft.AFTER_LATEST,
    ft.OWN_WEIGHT,
    ft.OWN_SHARE,
    ft.ENGAGED,
    ft.RECENCY,
    ft.RETURNS,
)
DISCOVERY = (
    ft.POPULARITY,
    ft.RECENT_POPULARITY,
    ft.FIRST_TIMES,
    ft.HOUR,
    ft.AFTER_LAST,
    ft.AFTER_LATEST,
    ft.LEADS_TO,
    ft.ALIKE,
)
START = 0.5
"""Weight that a new model gives to what speaks for a label everywhere; the others start at 0."""
STARTED = (ft.POPULARITY, ft.AFTER_LATEST, ft.OWN_WEIGHT, ft.ENGAGED, ft.LEADS_TO, ft.ALIKE)
"""Features of the two heads. A candidate of discovery is not engaged, so nothing is known of it itself."""


@dataclass(slots=True)
class Observed:
    """What the model made of examples before it learned from them, one place per example.

    Parameters
    ----------
    next_rank, discovery_rank
        Rank of the best-ranked label that came, from 1, ties in the middle; infinite if none was known. In
        discovery nan for an example that is none: no label is new to the user, or the user has no history.
    next_top, discovery_top
        Calibrated probability of the best candidate; nan without candidates.
    next_top_hit, discovery_top_hit
        1 where the best candidate came, else 0; nan as above.
    """

    next_rank: NDArray[np.float64]
    next_top: NDArray[np.float64]
    next_top_hit: NDArray[np.float64]
    discovery_rank: NDArray[np.float64]
    discovery_top: NDArray[np.float64]
    discovery_top_hit: NDArray[np.float64]


class NextCategoryModel:
    """The model of one worker. Not safe to share between threads.

    Parameters
    ----------
    half_life_ms
        Of the weights in profiles.
    seed
        For callers that seed everything. Nothing here is drawn at random: equal input gives equal bits.

    Examples
    --------
    >>> model = NextCategoryModel(half_life_ms=86_400_000.0)
    >>> def visit(minute, label):
    ...     return Example("u1", "view", 60_000 * minute, (label,), None)
    >>> observed = model.observe({}, [visit(m, "tea" if m % 2 else "milk") for m in range(40)])
    >>> observed.next_rank[-3:].tolist()
    [1.0, 1.0, 1.0]
    >>> model.take_delta().examples
    40
    """

    def __init__(self, *, half_life_ms: float, seed: int = 0) -> None:
        self._half_life_ms = half_life_ms
        self._seed = seed
        self.version = _version()
        self.statistics = Statistics()
        self.heads = {
            "next": Ranker({name: START if name in STARTED else 0.0 for name in NEXT}),
            "discovery": Ranker({name: START if name in STARTED else 0.0 for name in DISCOVERY}),
        }
        self.calibrations = {"next": Calibration(), "discovery": Calibration()}
        self.windows = {"next": Window(), "discovery": Window()}
        self._workspace = Workspace()
        self._matrices: Matrices | None = None  # of the last batch that was learned from
        self._scoring: Matrices | None = None  # made for scores alone, so that scoring changes nothing above
        self._recommender: Recommender | None = None

    # Learning.

    def observe(self, histories: Mapping[str, History], examples: Sequence[Example]) -> Observed:
        """Score examples, then learn from them, batch by batch.

        1. All examples of a batch are scored with counts and heads as they are; what is known of a user
           includes his earlier examples, also those of the same batch.
        2. The scores are judged.
        3. Heads and calibration learn.
        4. The examples are counted, here and for `take_delta`.

        Parameters
        ----------
        histories
            Maps user id to what is known of the user before the first example; absent for no history.
        examples
            In the order of the log. One without labels is ignored.

        Returns
        -------
        Observed
            One place per example, nan for one without labels.
        """
        observed = Observed(*(np.full(len(examples), np.nan) for _ in range(6)))
        due = [place for place, example in enumerate(examples) if example.labels]
        labels = {label for place in due for label in examples[place].labels}
        # Engaged before the model learned from them: they count as history however the log is cut.
        engaged = dict.fromkeys(label for history in histories.values() for label in history.labels)
        self._make_room(labels.union(engaged))
        self.statistics.place_labels(engaged)
        part = Slice(
            histories, [examples[place] for place in due], self.statistics.label_places, self._half_life_ms
        )
        places = np.array(due, np.int64)
        begin = 0
        while begin < len(due):
            end = min(begin + min(BATCH, max(1, self.statistics.examples // LEARNED_SHARE)), len(due))
            self._observe(part, begin, end, places, observed)
            begin = end
        return observed

    def _observe(self, part: Slice, begin: int, end: int, places: Ints, observed: Observed) -> None:
        statistics = self.statistics
        known = len(statistics.labels)
        matrices = self._matrices = self._snapshot()
        statistics.place_labels([label for example in part.examples[begin:end] for label in example.labels])
        batch = part.rows(begin, end, len(statistics.labels))
        rows = batch.rows
        new = ~rows.engaged[batch.came_rows, batch.came]
        discovers = np.zeros(end - begin, np.bool_)
        discovers[batch.came_rows[new]] = True
        discovers &= rows.counts > 0
        where = places[batch.order]
        if known:
            self._judge(matrices, batch, new, discovers, where, observed)
        else:
            observed.next_rank[where] = np.inf
            observed.discovery_rank[where[discovers]] = np.inf
        self._count(batch, new)

    def _judge(
        self,
        matrices: Matrices,
        batch: Batch,
        new: NDArray[np.bool_],
        discovers: NDArray[np.bool_],
        where: Ints,
        observed: Observed,
    ) -> None:
        """Score a batch, compare with what came, and let the heads learn."""
        size = matrices.n_labels
        seen = batch.came < size
        rows = batch.rows.first_labels(size)
        features = matrices.features(self.statistics, rows)
        inputs = affinity_inputs(rows)
        markov = matrices.markov(rows)
        judged = self._learn(
            "next", matrices.names, features, inputs, (batch.came_rows[seen], batch.came[seen]), None, markov
        )
        observed.next_rank[where] = judged.ranks
        observed.next_top[where] = judged.top
        observed.next_top_hit[where] = judged.top_came
        chosen = np.flatnonzero(discovers)
        if not len(chosen):
            return
        # Pairs of the chosen rows, renumbered: only labels that are new to the user are looked for.
        number = np.full(len(discovers), -1)
        number[chosen] = np.arange(len(chosen))
        wanted = seen & new & discovers[batch.came_rows]
        engaged = discovers[rows.rows]
        judged = self._learn(
            "discovery",
            matrices.names,
            matrices.discovery_features(features, rows, chosen),
            inputs[chosen],
            (number[batch.came_rows[wanted]], batch.came[wanted]),
            (number[rows.rows[engaged]], rows.labels[engaged]),
            markov[chosen],
        )
        observed.discovery_rank[where[chosen]] = judged.ranks
        observed.discovery_top[where[chosen]] = judged.top
        observed.discovery_top_hit[where[chosen]] = judged.top_came

    def _learn(
        self,
        task: str,
        names: NDArray[np.object_],
        features: Features,
        inputs: Floats,
        came: tuple[Ints, Ints],
        engaged: tuple[Ints, Ints] | None,
        markov: Floats,
    ) -> Judged:
        """Score the rows of one task, judge the scores, and only then let head and calibration learn.

        Parameters
        ----------
        names
            Of the labels.
        came
            Pairs of row and label.
        engaged
            Pairs that are no candidates; `None` for none.
        markov
            Scores of the baseline of that name.
        """
        head, calibration = self.heads[task], self.calibrations[task]
        logits = head.logits(features, inputs)
        popularity, _, first_times = features.of_labels
        if engaged is None:
            popularity_ranks = _ranks_of_all(popularity, came, len(logits))
        else:
            logits[engaged] = markov[engaged] = -np.inf
            firsts = np.tile(popularity + first_times, (len(logits), 1))
            firsts[engaged] = -np.inf
            popularity_ranks = mid_ranks(firsts, came)[0]
        shares = softmax(logits)
        best = shares.argmax(axis=1)
        top = shares[np.arange(len(shares)), best].astype(np.float64)
        none = top == 0.0
        top_came = np.zeros(len(shares), np.bool_)
        top_came[came[0][came[1] == best[came[0]]]] = True
        ranks, labels = mid_ranks(logits, came)
        judged = Judged(
            ranks,
            np.where(none, np.nan, calibration.probabilities(top)),
            top_came,
            np.bincount(came[0], shares[came], len(shares)).astype(np.float64),
            popularity_ranks,
            mid_ranks(markov, came)[0],
            np.where(labels >= 0, names[labels], ""),
            np.where(none, "", names[best]),
        )
        self.windows[task].add(judged)
        head.learn(features, inputs, shares, came)
        calibration.learn(top[~none], top_came[~none])
        return judged

    def _count(self, batch: Batch, new: NDArray[np.bool_]) -> None:
        """Add a batch to the counts."""
        statistics, rows = self.statistics, batch.rows
        row, label = batch.came_rows, batch.came
        examples = batch.examples
        at_ms = rows.at_ms.astype(np.int64)[row]
        tables: dict[str, Ints | tuple[Ints, Ints]] = {
            "popularity": codes_of("popularity", at_ms // PERIOD_MS, label),
            "hours": codes_of("hours", at_ms // ft.HOUR_MS % 24, label),
            "first_times": codes_of("first_times", label[new]),
        }
        of_type = np.array(statistics.places_of("type", [one.event_type for one in examples]), np.int64)[row]
        tables["types"] = codes_of("types", of_type[of_type >= 0], label[of_type >= 0])
        owned = [number for number, one in enumerate(examples) if one.asset_id is not None]
        asset = np.full(len(examples), -1)
        asset[owned] = statistics.places_of("asset", [examples[number].asset_id or "" for number in owned])
        asset = asset[row]
        held = asset >= 0
        tables["assets"] = codes_of("assets", at_ms[held] // PERIOD_MS, asset[held], label[held])
        latest = rows.latest[row, :COUNTED_LATEST]
        pairs = latest >= 0
        tables["last"] = codes_of("last", latest[pairs[:, 0], 0], label[pairs[:, 0]])
        tables["latest"] = codes_of(
            "latest", latest[pairs], np.broadcast_to(label[:, None], pairs.shape)[pairs]
        )
        tables["before"] = _before(rows, row[new], label[new])
        gaps = gap_of(rows.ages_ms)
        came = np.zeros(rows.engaged.shape, np.bool_)
        came[row, label] = True
        hits = gaps[came[rows.rows, rows.labels]]
        codes = np.concatenate([codes_of("gaps", gaps, 0), codes_of("gaps", hits, 1)])
        counts = np.bincount(codes) if len(codes) else np.zeros(0, np.int64)
        tables["gaps"] = (np.flatnonzero(counts), counts[counts > 0])
        statistics.count(len(examples), tables)

    # Scoring.

    def score(self, histories: Sequence[History]) -> list[Scored]:
        """Return what users may turn to next. Changes nothing that is learned.

        Returns
        -------
        list of Scored
            One per history. Without anything learned they are empty.
        """
        scored: list[Scored] = []
        for begin in range(0, len(histories), BATCH):
            scored += self._score(histories[begin : begin + BATCH])
        return scored

    def _score(self, histories: Sequence[History]) -> list[Scored]:
        if self.statistics.examples <= 0:
            return [Scored(history.user_id, history.at_ms, [], [], self.version) for history in histories]
        _, next_shares, growth_shares = self._shares(histories)
        labels = np.array(self.statistics.labels, np.object_)
        base, growth = self.calibrations["next"], self.calibrations["discovery"]
        best = _best(next_shares)
        found = labels[best].tolist()
        found_weights = base.probabilities(np.take_along_axis(next_shares, best, axis=1)).tolist()
        new = _best(growth_shares)
        new_shares = np.take_along_axis(growth_shares, new, axis=1)
        candidates = np.count_nonzero(new_shares, axis=1).tolist()
        growth_weights = growth.probabilities(new_shares).tolist()
        base_weights = base.probabilities(np.take_along_axis(next_shares, new, axis=1)).tolist()
        offers = self._offers().offers
        scored = []
        for number, (history, places) in enumerate(zip(histories, new.tolist(), strict=True)):
            del places[candidates[number] :]  # engaged ones, where fewer are not
            tips = offers(
                places, growth_weights[number], base_weights[number], history.assets, history.labels
            )
            next_categories = list(zip(found[number], found_weights[number], strict=True))
            scored.append(Scored(history.user_id, history.at_ms, next_categories, tips, self.version))
        return scored

    def growth_weights(self, histories: Sequence[History]) -> tuple[list[str], NDArray[np.float64]]:
        """Return the growth weights of all labels.

        Returns
        -------
        labels
            One a column.
        weights
            Array, shape (n_histories, n_labels): nan where a label is engaged.
        """
        labels = self.statistics.labels
        if not labels or not histories:
            return [], np.zeros((len(histories), 0))
        parts = []
        for begin in range(0, len(histories), BATCH):
            rows, _, shares = self._shares(histories[begin : begin + BATCH])
            weights = self.calibrations["discovery"].probabilities(shares)
            weights[rows.engaged] = np.nan
            parts.append(weights)
        found = np.concatenate(parts)
        return labels[: found.shape[1]], found

    def why(self, history: History, label: str) -> dict[str, float]:
        """Return what each feature contributes to the score of a label.

        Parameters
        ----------
        history
            Of the user.
        label
            Judged as a discovery if the user has not engaged it, else as a next category.

        Returns
        -------
        dict
            Maps feature to its part of the label's logit, less the same of the average candidate: positive
            speaks for the label. Empty for a label that the model does not know.
        """
        matrices = self._snapshot()
        place = self.statistics.label_places.get(label)
        if place is None or place >= matrices.n_labels:
            return {}
        rows = rows_of([history], self.statistics.label_places, len(self.statistics.labels)).first_labels(
            matrices.n_labels
        )
        discovery = not rows.engaged[0, place]
        head = self.heads["discovery" if discovery else "next"]
        candidates = ~rows.engaged[0] if discovery else np.ones(matrices.n_labels, np.bool_)
        features = matrices.features(self.statistics, rows)
        if discovery:
            features = matrices.discovery_features(features, rows)
        return head.contributions(features, affinity_inputs(rows), place, candidates)

    def _shares(self, histories: Sequence[History]) -> tuple[Rows, Floats, Floats]:
        """Return the softmax over all labels, and over those that are not engaged."""
        matrices = self._snapshot()
        rows = rows_of(histories, self.statistics.label_places, len(self.statistics.labels))
        rows = rows.first_labels(matrices.n_labels)
        features = matrices.features(self.statistics, rows)
        inputs = affinity_inputs(rows)
        next_logits = self.heads["next"].logits(features, inputs)
        growth_logits = self.heads["discovery"].logits(matrices.discovery_features(features, rows), inputs)
        growth_logits[rows.rows, rows.labels] = -np.inf
        return rows, softmax(next_logits), softmax(growth_logits)

    def _snapshot(self) -> Matrices:
        """Return the snapshot of the counts that is due now: a function of the counts, not of who asks."""
        statistics = self.statistics
        for kept in (self._matrices, self._scoring):
            if kept is None:
                continue
            since = statistics.moved - kept.moved
            most = min(REBUILD_EXAMPLES, statistics.examples // LEARNED_SHARE)
            if len(statistics.labels) != kept.n_labels:
                most = min(most, GROWN_EXAMPLES)
            if kept.changes == statistics.changes or (kept is self._matrices and since <= most):
                return kept
        self._scoring = Matrices(statistics, self._workspace)
        return self._scoring

    def _offers(self) -> Recommender:
        statistics, kept = self.statistics, self._recommender
        if kept is None or abs(statistics.examples - kept.examples) > min(
            OFFERS_EXAMPLES, statistics.examples // OFFERS_SHARE
        ):
            kept = self._recommender = Recommender(statistics)
        return kept

    # Counts.

    def take_delta(self) -> Delta:
        """Return what was counted since the last call."""
        return self.statistics.take_delta()

    def add(self, delta: Delta, sign: int = 1) -> None:
        """Add counts of other partitions, of workers or a checkpoint; with sign -1 take them away again."""
        self._make_room(delta.names["label"])
        self.statistics.add(delta, sign)

    def clear_counts(self) -> None:
        """Forget all counts, also what was not taken; heads and calibration stay."""
        self.statistics = Statistics()
        self._matrices = self._scoring = self._recommender = None

    def _make_room(self, labels: Iterable[str]) -> None:
        kept = self.statistics.make_room(labels)
        if kept is not None:
            for head in self.heads.values():
                head.affinities.keep(kept)
            self._matrices = self._scoring = self._recommender = None

    # Accuracy.

    def accuracy(self, labels: Collection[str] | None = None) -> dict[str, dict[str, float]]:
        """Return how good the last predictions were, by task.

        Parameters
        ----------
        labels
            Only where one of these came or was the best candidate; `None` for everything.

        Returns
        -------
        dict
            Maps "next" and "discovery" to the figures of `accuracy.Window`.
        """
        return {task: window.figures(labels) for task, window in self.windows.items()}

    def discovery_accuracy(self, groups: Mapping[str, Collection[str]]) -> dict[str, dict[str, float]]:
        """Return how good the last predictions of discoveries were, for many groups of labels at once.

        Parameters
        ----------
        groups
            Maps a name to labels: only where one of these came or was the best candidate.
        """
        return self.windows["discovery"].figures_by(groups)

    # State of what is not counted.

    def ranker_state(self) -> dict[str, Any]:
        """Return heads and calibration as plain data; see `ranker_state`."""
        labels = self.statistics.labels[:MAX_AFFINITIES]
        return {
            "v": STATE_VERSION,
            "labels": list(labels),
            "heads": {task: head.state(len(labels)) for task, head in self.heads.items()},
            "calibrations": {task: one.state() for task, one in self.calibrations.items()},
        }

    def set_ranker_state(self, state: object) -> None:
        """Go on from what `ranker_state` or `average` returned.

        Raises
        ------
        ValueError
            If it is anything else; then nothing has changed.
        """
        checked = self.checked_ranker_state(state)
        self.statistics.place_labels(checked["labels"])
        of_label = self.statistics.label_places
        places = np.array([of_label.get(label, MAX_LABELS) for label in checked["labels"]], np.int64)
        for task, head in self.heads.items():
            head.set_state(checked["heads"][task], places)
            self.calibrations[task].set_state(checked["calibrations"][task])

    @staticmethod
    def checked_ranker_state(state: object) -> dict[str, Any]:
        """Return a state after a look at all of it.

        Raises
        ------
        ValueError
            If it is not one of this version, or a number is missing or not finite.
        """
        return checked_state(state, {"next": NEXT, "discovery": DISCOVERY})

    @staticmethod
    def average(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the mean of states, at least one: weights, squared gradients, steps."""
        return average_states(states)


def _before(rows: Rows, new_rows: Ints, new_labels: Ints) -> Ints:
    """Return the codes of pairs of an engaged label and a new one, and of new ones of one event in order."""
    begins = np.searchsorted(rows.rows, new_rows)
    counts = np.searchsorted(rows.rows, new_rows, side="right") - begins
    pairs = np.repeat(begins - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    codes = [codes_of("before", rows.labels[pairs], np.repeat(new_labels, counts))]
    for apart in range(1, len(new_rows)):
        together = new_rows[apart:] == new_rows[:-apart]
        if not together.any():
            break
        codes.append(codes_of("before", new_labels[:-apart][together], new_labels[apart:][together]))
    return np.concatenate(codes)


def _best(shares: Floats) -> Ints:
    """Return the labels with the largest shares, best first, of equals the one that appeared first.

    Examples
    --------
    >>> _best(np.array([[0.2, 0.5, 0.2, 0.1]])).tolist()
    [[1, 0, 2, 3]]
    """
    size = shares.shape[1]
    count = min(MAX_SCORES, size)
    # The bits of a float that is not negative are in its order; positions below them make ties distinct.
    keys = (
        shares.astype(np.float32).view(np.int32).astype(np.int64) << 12
        | np.arange(MAX_LABELS, MAX_LABELS - size, -1) - 1
    )
    best = np.argpartition(keys, size - count, axis=1)[:, size - count :]
    order = np.argsort(-np.take_along_axis(keys, best, axis=1), axis=1)
    return np.take_along_axis(best, order, axis=1)


def _ranks_of_all(scores: Floats, came: tuple[Ints, Ints], count: int) -> NDArray[np.float64]:
    """Return `mid_ranks` for rows that all have the same scores.

    Examples
    --------
    >>> _ranks_of_all(np.array([1.0, 3.0, 1.0]), (np.array([0, 0]), np.array([0, 1])), 2).tolist()
    [1.0, inf]
    """
    ascending = np.sort(scores)
    above = len(scores) - np.searchsorted(ascending, scores, side="right")
    ranks = (above + len(scores) - np.searchsorted(ascending, scores) + 1) / 2
    found = np.full(count, np.inf)
    np.minimum.at(found, came[0], ranks[came[1]])
    return found


def _version() -> str:
    """Return 16 hex digits that tell models apart whose counts or weights mean different things."""
    settings = (
        MODEL_SCHEMA,
        NEXT,
        DISCOVERY,
        sorted(TABLES.items()),
        (BATCH, LEARNED_SHARE, REBUILD_EXAMPLES, PERIOD_MS),
        (ft.LATEST, ft.LATEST_FADE, ft.PSEUDO_COUNTS, MAX_LABELS, MAX_AFFINITIES),
    )
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
