"""Examples for the tests of the next-category model, with the histories that belong to them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stream_app.core.model import Delta, Example, History, NextCategoryModel, Observed
from stream_app.core.statistics import TABLES

DAY_MS = 86_400_000
HALF_LIFE_MS = 30.0 * DAY_MS
START_MS = 1_700_000_000_000


def random_examples(
    seed: int, count: int, *, users: int = 20, labels: int = 12, most: int = 3, fresh: float = 0.01
) -> list[Example]:
    """Return examples with structure to learn: users like some labels, and labels follow each other."""
    rng = np.random.default_rng(seed)
    liked = rng.dirichlet(np.full(labels, 0.3), users)
    last = np.zeros(users, np.int64)
    at_ms = START_MS
    examples = []
    for _ in range(count):
        at_ms += int(rng.choice([0, 1_000, 3_600_000]))
        user = int(rng.integers(users))
        chances = liked[user] * 0.6 + 0.4 * (np.arange(labels) == (last[user] + 1) % labels)
        size = min(int(rng.integers(1, most + 1)), int(np.count_nonzero(chances)))
        chosen = rng.choice(labels, size, replace=False, p=chances / chances.sum())
        last[user] = chosen[-1]
        late_ms = int(rng.choice([0, 0, 0, 5_000]))
        examples.append(
            Example(
                f"user-{user}",
                str(rng.choice(["view", "purchase"])),
                at_ms - late_ms,
                tuple(f"label-{one}" for one in chosen.tolist()),
                f"asset-{chosen[0]}-{int(rng.integers(6))}" if rng.random() < 0.8 else None,
                bool(rng.random() < fresh),
            )
        )
    return examples


@dataclass
class Journal:
    """What a worker would know of all users, kept in the plainest way."""

    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    seen_ms: dict[str, dict[str, int]] = field(default_factory=dict)
    at_ms: dict[str, int] = field(default_factory=dict)
    assets: dict[str, set[str]] = field(default_factory=dict)

    def history(self, user_id: str, at_ms: int) -> History:
        left = 2.0 ** (-max(0, at_ms - self.at_ms[user_id]) / HALF_LIFE_MS)
        seen_ms = self.seen_ms[user_id]
        weights = [self.weights[user_id][label] * left for label in seen_ms]
        return History(user_id, at_ms, list(seen_ms), weights, list(seen_ms.values()), self.assets[user_id])

    def histories(self, examples: Sequence[Example]) -> dict[str, History]:
        users = {example.user_id for example in examples}
        return {user: self.history(user, examples[0].event_time_ms) for user in users if user in self.at_ms}

    def add(self, example: Example) -> None:
        user_id, at_ms = example.user_id, example.event_time_ms
        if example.fresh or user_id not in self.at_ms:
            self.weights[user_id], self.seen_ms[user_id], self.assets[user_id] = {}, {}, set()
            self.at_ms[user_id] = at_ms
        weights, seen_ms = self.weights[user_id], self.seen_ms[user_id]
        if at_ms > self.at_ms[user_id]:
            left = 2.0 ** (-(at_ms - self.at_ms[user_id]) / HALF_LIFE_MS)
            for label in weights:
                weights[label] *= left
            self.at_ms[user_id] = at_ms
        late = 2.0 ** (-(self.at_ms[user_id] - at_ms) / HALF_LIFE_MS)
        for label in example.labels:
            weights[label] = weights.get(label, 0.0) + late
            seen_ms[label] = max(seen_ms.pop(label, at_ms), at_ms)
        if example.asset_id is not None:
            self.assets[user_id].add(example.asset_id)


def observe_all(
    model: NextCategoryModel,
    examples: Sequence[Example],
    *,
    slice_size: int = 50,
    journal: Journal | None = None,
) -> list[Observed]:
    """Let a model observe examples slice by slice, as a worker does."""
    journal = Journal() if journal is None else journal
    found = []
    for begin in range(0, len(examples), slice_size):
        part = examples[begin : begin + slice_size]
        found.append(model.observe(journal.histories(part), part))
        for example in part:
            journal.add(example)
    return found


def trained(seed: int, count: int, **options: int) -> tuple[NextCategoryModel, Journal]:
    """Return a model that has observed random examples, and what is known of their users."""
    model, journal = NextCategoryModel(half_life_ms=HALF_LIFE_MS), Journal()
    observe_all(model, random_examples(seed, count, **options), journal=journal)
    return model, journal


def counts(delta: Delta) -> dict[str, Counter[tuple[object, ...]]]:
    """Return counts by name, so that deltas with other lists of names can be compared."""
    document = Delta.merged([delta]).as_document()
    found = {}
    for table, columns in document["tables"].items():
        *positions, number = [np.frombuffer(blob, kind).tolist() for kind, blob in columns]
        named = [
            [document["names"][axis][value] for value in values] if axis in document["names"] else values
            for axis, values in zip(TABLES[table], positions, strict=True)
        ]
        found[table] = Counter(dict(zip(zip(*named, strict=True), number, strict=True)))
    return found
