"""Seeded streams of examples for the model, what a plain reader knows of users, and a judge of the counts.

The judge counts in dictionaries and loops and imports nothing of what it judges but the example itself.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stream_app.core.model import Example, History, NextCategoryModel, Observed

START_MS = 1_700_000_000_000
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
HALF_LIFE_MS = 30.0 * DAY_MS
PERIOD_MS = 302_400_000

TYPES = {"view": 1.0, "buy": 3.0, "return": 0.0}


def new_model(seed: int = 0) -> NextCategoryModel:
    return NextCategoryModel(half_life_ms=HALF_LIFE_MS, seed=seed)


def example(
    user: str, minute: float, *labels: str, asset: str | None = None, weight: float = 1.0, fresh: bool = False
) -> Example:
    return Example(user, "view", START_MS + round(minute * 60_000), labels, asset, fresh, weight)


def history(
    user: str, *labels: str, at_ms: int = START_MS, assets: Sequence[str] = (), weight: float = 1.0
) -> History:
    """Who has engaged labels in this order, one an hour, the last one just now."""
    seen_ms = [at_ms - HOUR_MS * (len(labels) - 1 - number) for number in range(len(labels))]
    return History(user, at_ms, list(labels), [weight] * len(labels), seen_ms, frozenset(assets))


def random_examples(
    seed: int, count: int = 600, *, users: int = 14, labels: int = 11, step_ms: int = 3 * HOUR_MS
) -> list[Example]:
    """Return a messy stream: none or some labels, late events, types that engage nothing, new beginnings."""
    rng = random.Random(f"examples {seed}")
    now_ms = START_MS
    known: set[str] = set()
    made = []
    for _ in range(count):
        now_ms += round(rng.expovariate(1 / step_ms))
        at_ms = now_ms
        if rng.random() < 0.1:
            at_ms -= rng.choice([1, HOUR_MS, 40 * DAY_MS, 3 * 365 * DAY_MS])
        user = f"user-{min(int(rng.expovariate(0.3)), users - 1)}"
        # A few labels have the most; many of the others are equally frequent, so that there are ties.
        own = {min(int(rng.expovariate(0.35)), labels - 1) for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))}
        named = [f"label-{number}" for number in own]
        rng.shuffle(named)
        event_type = rng.choice(["view", "view", "view", "buy", "return"])
        asset = f"asset-{named[0]}-{rng.randrange(4)}" if named and rng.random() < 0.7 else None
        fresh = bool(named) and (user not in known or rng.random() < 0.02)
        if named:
            known.add(user)
        made.append(Example(user, event_type, at_ms, tuple(named), asset, fresh, TYPES[event_type]))
    return made


def some_histories(seed: int, labels: Sequence[str], count: int = 20) -> list[History]:
    """Return users who have engaged nothing, some, or all of the labels, and labels that nobody knows."""
    rng = random.Random(f"histories {seed}")
    made = []
    for number in range(count):
        own = rng.sample(list(labels), min(rng.choice([0, 1, 2, len(labels) // 2, len(labels)]), len(labels)))
        if rng.random() < 0.2:
            own.insert(0, f"nobody-{number}")
        assets = [f"asset-{label}-{rng.randrange(4)}" for label in own]
        made.append(
            history(
                f"reader-{number}",
                *own,
                at_ms=START_MS + rng.randrange(10**10),
                assets=assets,
                weight=rng.random(),
            )
        )
    return made


@dataclass(slots=True)
class Reader:
    """What is known of users: engagements in plain lists, decayed when asked."""

    engaged: dict[str, list[tuple[str, int, float]]] = field(default_factory=dict)
    assets: dict[str, set[str]] = field(default_factory=dict)

    def read(self, one: Example) -> None:
        if one.fresh:
            self.engaged[one.user_id], self.assets[one.user_id] = [], set()
        if one.weight > 0:
            events = self.engaged.setdefault(one.user_id, [])
            events += [(label, one.event_time_ms, one.weight) for label in one.labels]
            if one.asset_id is not None:
                self.assets.setdefault(one.user_id, set()).add(one.asset_id)

    def history(self, user: str, at_ms: int) -> History:
        order: dict[str, tuple[int, float]] = {}
        for label, seen_ms, weight in self.engaged.get(user, []):
            before_ms, before = order.pop(label, (seen_ms, 0.0))
            order[label] = (
                max(before_ms, seen_ms),
                before + weight * 2.0 ** ((seen_ms - at_ms) / HALF_LIFE_MS),
            )
        return History(
            user,
            at_ms,
            list(order),
            [weight for _, weight in order.values()],
            [seen_ms for seen_ms, _ in order.values()],
            frozenset(self.assets.get(user, ())),
        )

    def histories(self, examples: Sequence[Example]) -> dict[str, History]:
        """Return what is known of the users of a slice before it."""
        first: dict[str, int] = {}
        for one in examples:
            first.setdefault(one.user_id, one.event_time_ms)
        return {user: self.history(user, at_ms) for user, at_ms in first.items() if self.engaged.get(user)}


def observed_in_slices(
    model: NextCategoryModel, examples: Sequence[Example], cuts: Sequence[int]
) -> list[Observed]:
    """Let a model observe a stream in slices of these lengths in turn."""
    reader = Reader()
    found = []
    begin = number = 0
    while begin < len(examples):
        part = examples[begin : begin + cuts[number % len(cuts)]]
        found.append(model.observe(reader.histories(part), part))
        for one in part:
            reader.read(one)
        begin, number = begin + len(part), number + 1
    return found


def gap_bucket(age_ms: int) -> int:
    """Return two buckets per doubling, in whole numbers alone."""
    if age_ms <= 0:
        return 0
    octave = age_ms.bit_length() - 1
    return min(2 * octave + 1 + (2 * age_ms >= 3 << octave), 95)


def plainly_counted(examples: Sequence[Example]) -> Counter[tuple[Any, ...]]:
    """Return what there is to count in a stream: table and the names or numbers on its axes, to a count."""
    counts: Counter[tuple[Any, ...]] = Counter()
    users: dict[str, dict[str, int]] = {}  # label to its last engagement, the latest engaged last
    for one in examples:
        if not one.labels:
            continue
        seen = {} if one.fresh else users.get(one.user_id, {})
        period, hour = one.event_time_ms // PERIOD_MS, one.event_time_ms // HOUR_MS % 24
        order = list(seen)
        counts["examples",] += 1
        for label, seen_ms in seen.items():
            counts["gaps", gap_bucket(one.event_time_ms - seen_ms), 0] += 1
            counts["gaps", gap_bucket(one.event_time_ms - seen_ms), 1] += label in one.labels
        for number, label in enumerate(one.labels):
            counts["popularity", period, label] += 1
            counts["hours", hour, label] += 1
            counts["types", one.event_type, label] += 1
            if one.asset_id is not None:
                counts["assets", period, one.asset_id, label] += 1
            if order:
                counts["last", order[-1], label] += 1
            for latest in order[-3:]:
                counts["latest", latest, label] += 1
            if label not in seen:
                counts["first_times", label] += 1
                for engaged in [*order, *[other for other in one.labels[:number] if other not in seen]]:
                    counts["before", engaged, label] += 1
        if one.weight > 0:
            for label in one.labels:
                before_ms = seen.pop(label, one.event_time_ms)
                seen[label] = max(before_ms, one.event_time_ms)
        users[one.user_id] = seen
    return +counts
