"""What the service does with a slice of records, without Kafka and Redis.

The profiles are in memory, the clock is the events', there are no segments; everything else is the worker's
own code: the fold decides what is applied, the model scores it and learns from it. It must not know what the
scores are compared with.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stream_app.core.event import Event, Record
from stream_app.core.examples import examples_of, histories_before
from stream_app.core.fold import Fold
from stream_app.core.model import Delta, History, NextCategoryModel
from stream_app.core.segment_set import SegmentSet
from stream_app.core.step import Applied, fold_slice

if TYPE_CHECKING:
    from stream_app.core.decay import Weights
    from stream_app.core.model import Observed
    from stream_app.core.profile import Profile

__all__ = ["MemoryWorker"]


class MemoryWorker:
    """One worker that owns one partition with everything in it.

    Parameters
    ----------
    weights
        The settings of the profiles.
    seed
        Of the model.

    Attributes
    ----------
    delta
        What the last slice has added to the counts, which a checkpoint would write down.
    model_s, fold_s
        Seconds of processor time, which other programs do not disturb, spent in the model (with making
        histories for it) and in the fold.
    """

    def __init__(self, weights: Weights, seed: int = 0) -> None:
        self.model = NextCategoryModel(half_life_ms=weights.default_half_life_ms, seed=seed)
        self.delta = Delta()
        self.model_s = 0.0
        self.fold_s = 0.0
        self._weights = weights
        self._fold = Fold(SegmentSet((), weights), weights, keeps_seen=True)
        self._profiles: dict[str, Profile] = {}
        self._stream_time_ms: int | None = None
        self._offset = 0

    def go_through(self, events: Sequence[Event]) -> tuple[list[Applied], Observed]:
        """Fold a slice, then score and learn from what was applied.

        Parameters
        ----------
        events
            The next of the stream, at least one.

        Returns
        -------
        applied
            The events that were no duplicates.
        observed
            What the model made of those with labels, in the same order.
        """
        begin = time.process_time()
        histories = histories_before(self._profiles, events, self._weights)
        between = time.process_time()
        records = [
            Record(offset, event.event_time_ms, event) for offset, event in enumerate(events, self._offset)
        ]
        result = fold_slice(self._fold, records, self._profiles, self._stream_time_ms, "event", {})
        self._stream_time_ms = result.stream_time_ms
        self._offset += len(records)
        folded = time.process_time()
        examples = examples_of(result.applied, self._weights)
        observed = self.model.observe(histories, examples)
        self.delta = self.model.take_delta()
        self.fold_s += folded - between
        self.model_s += time.process_time() - folded + between - begin
        return result.applied, observed

    def histories(self, users: Iterable[str], at_ms: int) -> dict[str, History]:
        """Return what is known at an instant of those users who have a profile."""
        return {
            user_id: History.of(profile, self._weights, at_ms)
            for user_id in users
            if (profile := self._profiles.get(user_id)) is not None
        }

    def growth_weights(self, users: Sequence[str], at_ms: int, labels: dict[str, int]) -> NDArray[np.float64]:
        """Return what users may turn to next.

        Parameters
        ----------
        users
            One a row.
        at_ms
            The instant of the scoring.
        labels
            Maps label to its column.

        Returns
        -------
        array, shape (n_users, n_labels)
            Growth weights, nan where a label is engaged, 0 where the model does not know it.
        """
        histories = self.histories(users, at_ms)
        found, weights = self.model.growth_weights([histories[user_id] for user_id in users])
        table = np.zeros((len(users), len(labels)))
        table[:, [labels[label] for label in found]] = weights
        return table
