"""The whole protocol over one stream: model, baselines, lift and offline recommenders, as one report.

Decides which parts of a stream are summed up and what is beside what. It must not know how a report is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stream_app.core.decay import Weights
from stream_app.core.event import Event
from stream_app.evaluation.baselines import BASELINES, Baselines, Judged
from stream_app.evaluation.figures import Bin, Figures, figures, reliability
from stream_app.evaluation.lift import Lift, LiftMeter
from stream_app.evaluation.offline import Judge
from stream_app.evaluation.worker import MemoryWorker

__all__ = ["DECILES", "TASKS", "Judgement", "Report", "evaluate_stream"]

TASKS: Final = ("next", "discovery")
DECILES: Final = 10
#: Where there would be more (user, label) pairs to score at an instant, the lift is that of every n-th user.
MAX_LIFT_PAIRS: Final = 10_000_000

Floats = NDArray[np.float64]


@dataclass(slots=True)
class Judgement:
    """Of one ranking and one task: all of the stream, its tenths and its last 20 %.

    Parameters
    ----------
    whole
        All examples; `None` for a recommender that was trained on a part of them.
    last_20
        Those of the last fifth of the events.
    deciles
        Those of each tenth of the events, in order; empty where `whole` is `None`.
    """

    whole: Figures | None
    last_20: Figures
    deciles: list[Figures] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """What was found out about one stream.

    Parameters
    ----------
    events, duplicates, users, labels
        How many; duplicates are no events.
    forgotten
        Events that would be discoveries, had the service not forgotten their users before.
    model
        Maps task to how the model did.
    baselines
        Maps name to the same of each baseline.
    offline
        Maps name to the same of each offline recommender, for discovery alone; `None` without any.
    reliability
        Maps task to the calibration of the model's top score, bin by bin.
    lift
        Of the growth weight's top decile.
    model_us, fold_us
        Microseconds of processor time per event that scoring and learning took, and the fold; `None` without
        events.
    """

    events: int
    duplicates: int
    users: int
    labels: int
    forgotten: int
    model: dict[str, Judgement]
    baselines: dict[str, dict[str, Judgement]]
    offline: dict[str, Judgement] | None
    reliability: dict[str, list[Bin | None]]
    lift: Lift
    model_us: float | None
    fold_us: float | None

    def document(self) -> dict[str, Any]:
        """Return the report as it is written in JSON."""
        model = {task: _figures_document(self.model[task].whole) for task in TASKS}
        baselines: dict[str, Any] = {}
        for name, judgements in self.baselines.items():
            baselines[name] = {task: _figures_document(judgements[task].whole) for task in TASKS}
            baselines[name]["last_20"] = {task: judgements[task].last_20.document() for task in TASKS}
        for name, judgement in (self.offline or {}).items():
            last = judgement.last_20.document()
            baselines[name] = {
                "next": Figures(0).document(),
                "discovery": last,
                "last_20": {"next": Figures(0).document(), "discovery": last},
                "trained_on": "the first 80 %",
            }
        return {
            "events": self.events,
            "duplicates": self.duplicates,
            "users": self.users,
            "labels": self.labels,
            "forgotten_discoveries": self.forgotten,
            **model,
            "last_20": {task: self.model[task].last_20.document() for task in TASKS},
            "deciles": [
                {task: self.model[task].deciles[part].document() for task in TASKS}
                | {
                    "baselines": {
                        name: {task: judgements[task].deciles[part].document() for task in TASKS}
                        for name, judgements in self.baselines.items()
                    }
                }
                for part in range(DECILES)
            ],
            "baselines": baselines,
            "reliability": {
                task: [
                    None
                    if found is None
                    else {"examples": found.examples, "score": found.score, "hit_rate": found.hit_rate}
                    for found in self.reliability[task]
                ]
                for task in TASKS
            },
            "lift": {
                "value": self.lift.value,
                "instants": self.lift.instants,
                "pairs": self.lift.pairs,
                "found": self.lift.found,
                "expected": self.lift.expected,
            },
            "us_per_event": self.model_us,
            "fold_us_per_event": self.fold_us,
        }


def evaluate_stream(
    slices: Iterable[Sequence[Event]], weights: Weights, offline: Judge | None = None
) -> Report:
    """Predict every event of a stream, then learn from it.

    Parameters
    ----------
    slices
        The events in the order of time, cut as the worker's slices are.
    weights
        The settings of the profiles.
    offline
        Judges recommenders that are trained on the first 80 %; `None` without any.
    """
    worker = MemoryWorker(weights)
    baselines = Baselines(weights)
    meter = LiftMeter()
    sheets = {task: _Sheet() for task in TASKS}
    events = given = 0
    now_ms: int | None = None
    for part in slices:
        given += len(part)
        if now_ms is not None and meter.due(now_ms):
            users = meter.active(now_ms)
            users = users[:: 1 + len(users) * len(baselines.labels) // MAX_LIFT_PAIRS]
            meter.score(now_ms, users, worker.growth_weights(users, now_ms, baselines.labels))
        applied, observed = worker.go_through(part)
        seen: list[tuple[int, Judged]] = []
        for number, one in enumerate(applied, events):
            event = one.record.event
            now_ms = event.event_time_ms
            meter.close(now_ms)
            engaged = baselines.engaged(event.user_id)
            new = [label for label in event.labels if baselines.labels.get(label) not in engaged]
            judged = baselines.judge(event, fresh=one.fresh)
            if event.labels:  # what the model observes
                seen.append((number, judged))
            for label in new:
                meter.engage(event.user_id, baselines.labels[label])
            meter.see(event.user_id, now_ms)
        sheets["next"].add(
            [(number, judged.next) for number, judged in seen],
            observed.next_rank,
            observed.next_top,
            observed.next_top_hit,
        )
        sheets["discovery"].add(
            [(number, judged.discovery) for number, judged in seen],
            observed.discovery_rank,
            observed.discovery_top,
            observed.discovery_top_hit,
        )
        events += len(applied)
    for sheet in sheets.values():
        sheet.close(events)
    found = None
    if offline is not None:
        begin = events * 4 // 5
        ranks = offline(baselines.log, begin, sheets["discovery"].numbers, weights.default_half_life_ms)
        found = {name: Judgement(None, figures(one)) for name, one in ranks.items()}
    return Report(
        events,
        given - events,
        baselines.users,
        len(baselines.labels),
        baselines.forgotten,
        {task: sheet.model() for task, sheet in sheets.items()},
        {
            name: {task: sheet.baseline(place) for task, sheet in sheets.items()}
            for place, name in enumerate(BASELINES)
        },
        found,
        {task: reliability(sheet.top, sheet.hit) for task, sheet in sheets.items()},
        meter.lift,
        worker.model_s / events * 1e6 if events else None,
        worker.fold_s / events * 1e6 if events else None,
    )


class _Sheet:
    """The examples of one task: parallel arrays, collected slice by slice.

    Attributes
    ----------
    numbers
        Of each example the number of its event.
    top, hit
        Of each the model's top score and whether its label came true.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.top: Floats = np.empty(0)
        self.hit: NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        self._model: Floats = np.empty(0)
        self._baselines: Floats = np.empty((0, len(BASELINES)))
        self._parts: list[tuple[Floats, Floats, NDArray[np.bool_], Floats]] = []
        self._events = 0

    def add(
        self, judged: Sequence[tuple[int, Floats | None]], rank: Floats, top: Floats, hit: Floats
    ) -> None:
        """Take the examples of a slice; what the model has no rank for is a miss of it."""
        due = [place for place, (_, ranks) in enumerate(judged) if ranks is not None]
        if not due:
            return
        self.numbers += [judged[place][0] for place in due]
        ranks = np.array([judged[place][1] for place in due])
        own = np.nan_to_num(rank[due], nan=np.inf, posinf=np.inf)
        self._parts.append((own, top[due], hit[due] == 1, ranks))

    def close(self, events: int) -> None:
        """Join what was collected of a stream of so many events."""
        self._events = events
        if self._parts:
            own, top, hit, ranks = zip(*self._parts, strict=True)
            self._model, self.top, self.hit = np.concatenate(own), np.concatenate(top), np.concatenate(hit)
            self._baselines = np.concatenate(ranks)
        self._parts = []

    def model(self) -> Judgement:
        """Sum up the model."""
        return self._judgement(self._model, self.top, self.hit)

    def baseline(self, place: int) -> Judgement:
        """Sum up a baseline."""
        return self._judgement(self._baselines[:, place])

    def _judgement(
        self, ranks: Floats, top: Floats | None = None, hit: NDArray[np.bool_] | None = None
    ) -> Judgement:
        def part(begin: int, end: int) -> Figures:
            first, last = np.searchsorted(self.numbers, [begin, end])
            among = slice(first, last)
            if top is None or hit is None:
                return figures(ranks[among])
            return figures(ranks[among], top[among], hit[among])

        cuts = [self._events * tenth // DECILES for tenth in range(DECILES + 1)]
        return Judgement(
            part(0, self._events),
            part(self._events * 4 // 5, self._events),
            [part(begin, end) for begin, end in pairwise(cuts)],
        )


def _figures_document(found: Figures | None) -> dict[str, float | int | None]:
    return (Figures(0) if found is None else found).document()
