"""Seeded messy logs of one partition, with definitions and weights to judge them by.

Everything is made as plain data (the oracle's records, dicts as in the configuration files); the conversions
to the core's types are at the end. A log is a function of its seed and shape alone: failures print
``log.name``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stream_app.core.decay import EventTypeWeight, Weights
from stream_app.core.event import Event, Record
from stream_app.core.segment import Segment
from stream_app.core.segment_set import SegmentSet
from tests.oracle import Clock, OracleRecord

SECOND_MS = 1000
MINUTE_MS = 60 * SECOND_MS
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS
YEAR_S = 365.0 * 86400


@dataclass(frozen=True, slots=True)
class Shape:
    """What kind of mess: how fast time goes, how long weights last, how many names there are."""

    events: int
    users: int
    clock: Clock
    step_ms: int  # mean gap between two records of the partition
    half_lives_s: tuple[float, ...]  # of the event types, dealt out in turn; the first is the default
    floor: float = 1e-3
    labels: int = 8
    assets: int = 6
    event_types: int = 5
    labels_at_most: int = 4  # in one event
    skew: float = 1.0  # above 1: the first labels, which segments name, are more frequent
    first_ms: int = 1_600_000_000_123
    late_share: float = 0.15
    silence_share: float = 0.002  # of the records: the whole partition falls silent before it
    silence_ms: int = 30 * DAY_MS
    heavy_share: float = 0.2  # of the records: from one of the first three users


@dataclass(frozen=True, slots=True)
class RandomLog:
    """A log and what it is judged by; `name` says how to make it again."""

    name: str
    clock: Clock
    records: list[OracleRecord]
    segments: list[dict[str, Any]]
    weights: dict[str, Any]


SHAPES: Mapping[str, Shape] = {
    # Minutes to hours: memberships come and go, profiles are forgotten in every silence.
    "minutes-event": Shape(
        10_000, 120, "event", 20 * SECOND_MS, (600.0, 60.0, 7200.0, 30.0), silence_ms=DAY_MS
    ),
    "minutes-wall": Shape(10_000, 120, "wall", 20 * SECOND_MS, (600.0, 45.0, 3600.0, 1.5), silence_ms=DAY_MS),
    # Seconds: exits a few ms apart, the 10 ms hold, exponents that need many rebases.
    "seconds-event": Shape(
        10_000, 60, "event", 300, (3.0, 1.0, 0.25, 20.0), silence_ms=10 * MINUTE_MS, late_share=0.3
    ),
    "seconds-wall": Shape(10_000, 60, "wall", 300, (2.0, 5.0, 0.1), silence_ms=5 * MINUTE_MS, labels=4),
    # Seconds and a year in one sum: a convex fall over nine orders of magnitude.
    "mixed-event": Shape(8_000, 100, "event", 40 * MINUTE_MS, (86400.0, 10.0, YEAR_S, 3600.0, 7 * 86400.0)),
    "mixed-wall": Shape(8_000, 100, "wall", 40 * MINUTE_MS, (3 * 86400.0, YEAR_S, 5.0, 1800.0)),
    # Days to a year, the scale of real shops.
    "days-event": Shape(
        8_000, 150, "event", HOUR_MS, (30 * 86400.0, 7 * 86400.0, YEAR_S), silence_ms=60 * DAY_MS
    ),
    "days-wall": Shape(8_000, 150, "wall", HOUR_MS, (14 * 86400.0, 86400.0, YEAR_S), silence_ms=90 * DAY_MS),
    # A high floor: a lot is forgotten, by key and by profile.
    "high-floor-event": Shape(
        10_000, 80, "event", 5 * MINUTE_MS, (1800.0, 300.0, 7200.0), floor=0.05, silence_ms=DAY_MS, labels=12
    ),
    "high-floor-wall": Shape(
        10_000, 80, "wall", 5 * MINUTE_MS, (1200.0, 600.0, 86400.0), floor=0.05, silence_ms=DAY_MS, labels=12
    ),
    # More names than a profile may hold.
    "caps-event": Shape(
        4_200, 3, "event", 2 * HOUR_MS, (10 * 86400.0, 20 * 86400.0, 30 * 86400.0), labels=2000, assets=1500,
        event_types=90, labels_at_most=6, skew=2.0, silence_ms=9 * DAY_MS, heavy_share=0.3,
    ),
    # Weights that outlive the calendar: exits that are never published.
    "ages-wall": Shape(
        5_000, 60, "wall", 6 * HOUR_MS, (1e10, 86400.0, YEAR_S), floor=1e-9, silence_ms=3000 * DAY_MS
    ),
}  # fmt: skip


def random_log(shape_name: str, seed: int) -> RandomLog:
    """Make the log of one shape and seed."""
    shape = SHAPES[shape_name]
    rng = random.Random(f"{shape_name}/{seed}")
    weights = random_weights(rng, shape)
    return RandomLog(
        name=f"random_log({shape_name!r}, {seed})",
        clock=shape.clock,
        records=random_records(rng, shape),
        segments=random_segments(rng, shape),
        weights=weights,
    )


def random_weights(rng: random.Random, shape: Shape) -> dict[str, Any]:
    """Deal half-lives and action weights out to the event types; the last type has no entry of its own."""
    half_lives = list(shape.half_lives_s)
    actions = [1.0, 0.5, 5.0, 0.0] if shape.floor <= 0.05 else [1.0, 5.0]
    event_types: dict[str, dict[str, float]] = {}
    for n in range(shape.event_types - 1):
        own: dict[str, float] = {}
        if n > 0 or rng.random() < 0.5:
            own["half_life_s"] = half_lives[n % len(half_lives)]
        if n > 0:
            own["action_weight"] = actions[n % len(actions)] if n < 4 else rng.choice(actions)
        event_types[type_name(n)] = own
    return {"half_life_s": half_lives[0], "history_floor": shape.floor, "event_types": event_types}


def random_segments(rng: random.Random, shape: Shape) -> list[dict[str, Any]]:
    """Make one of every kind by hand, then a dozen at random; few names, so that they overlap."""
    types = [type_name(n) for n in range(min(shape.event_types, 6))]
    labels = [label_name(n) for n in range(min(shape.labels, 8))]
    assets = [asset_name(n) for n in range(min(shape.assets, 6))]
    segments: list[dict[str, Any]] = [
        {"id": "history", "event_types": types[:2]},
        {"id": "history-of-label", "labels": labels[:1], "min_weight": 0},
        {"id": "sticky", "labels": labels[:2], "min_weight": 2.0, "exit_weight": 0.5},
        {"id": "sticky-to-floor", "labels": labels[1:3], "min_weight": 1.5, "exit_weight": shape.floor},
        {"id": "floor-and-zero", "asset_ids": assets[:2], "min_weight": 0, "exit_weight": 0},
        {"id": "one", "event_types": types[:1], "min_weight": 1.0},
        {"id": "all-labels", "labels": labels[:2], "match_labels": "all", "min_weight": 0.7},
        {"id": "all-assets", "asset_ids": assets[1:3], "match_assets": "all", "min_weight": 0.2},
        {"id": "labels-and-assets", "labels": labels[:3], "asset_ids": assets[:3], "min_weight": 0.6},
        {"id": "some-types-only", "labels": labels[:2], "event_types": types[1:3], "min_weight": 0.4},
        # A excludes B excludes C, and D excludes A and C: each link seen from both ends.
        {"id": "a-chain", "labels": labels[:3], "min_weight": 0.5, "exclude": ["b-chain"]},
        {
            "id": "b-chain",
            "labels": labels[:2],
            "min_weight": 1.2,
            "exit_weight": 0.9,
            "exclude": ["z-chain"],
        },
        {"id": "z-chain", "event_types": types[:3], "min_weight": 2.5, "exit_weight": 2.0},
        {"id": "d-chain", "event_types": types, "exclude": ["a-chain", "z-chain"]},
    ]
    for n in range(9):
        segment: dict[str, Any] = {"id": f"random-{n}", "name": f"Random {n}", "type": "base"}
        criteria = rng.choice(["labels", "labels", "assets", "both", "types"])
        if criteria in ("labels", "both"):
            segment["labels"] = rng.sample(labels, rng.randint(1, min(4, len(labels))))
            segment["match_labels"] = rng.choice(["any", "all"])
        if criteria in ("assets", "both"):
            segment["asset_ids"] = rng.sample(assets, rng.randint(1, 3))
            segment["match_assets"] = rng.choice(["any", "any", "all"])
        if criteria == "types" or rng.random() < 0.4:
            segment["event_types"] = rng.sample(types, rng.randint(1, 3))
        segment["min_weight"] = rng.choice([0, shape.floor, 0.1, 0.5, 0.75, 1.0, 1.0, 2.0, 5.0, 7.5])
        if segment["min_weight"] >= 0.1 and rng.random() < 0.5:
            segment["exit_weight"] = max(
                shape.floor, segment["min_weight"] * rng.choice([0.1, 0.5, 0.9, 1.0])
            )
        elif segment["min_weight"] == 0 and rng.random() < 0.3:
            segment["exit_weight"] = 0
        if rng.random() < 0.35:  # only earlier ones: no circle
            segment["exclude"] = rng.sample([s["id"] for s in segments], rng.randint(1, 2))
        segments.append(segment)
    segments.append({"id": "next", "type": "discovery", "labels": labels[:2], "min_weight": 0.5})
    rng.shuffle(segments)
    return segments


def random_records(rng: random.Random, shape: Shape) -> list[OracleRecord]:
    """Make the records: bursts, silences, late and equal timestamps, duplicates near and far."""
    records: list[OracleRecord] = []
    of_user: dict[str, list[OracleRecord]] = {}
    now_ms = shape.first_ms
    active = [user_name(n) for n in range(shape.users)]
    favourites = {
        user: ([label_name(rng.randrange(shape.labels)) for _ in range(3)], rng.randrange(shape.assets))
        for user in active
    }
    for n in range(shape.events):
        if n % 200 == 0:  # only some are about at any time, so that the others fall silent
            active = [user_name(i) for i in rng.sample(range(shape.users), max(3, shape.users // 3))]
        if rng.random() < shape.silence_share:
            now_ms += rng.randint(shape.silence_ms // 10, shape.silence_ms)
        elif rng.random() < 0.8:  # else: the same instant again
            now_ms += round(rng.expovariate(1 / shape.step_ms))
        user = user_name(rng.randrange(3)) if rng.random() < shape.heavy_share else rng.choice(active)
        kafka_time_ms = now_ms
        if rng.random() < 0.05:  # another producer's clock, when producers stamp the records
            kafka_time_ms = max(0, now_ms - rng.randint(1, 3 * shape.step_ms))
        seen = of_user.setdefault(user, [])
        if seen and rng.random() < 0.04:
            record = redelivered(rng, seen, n, kafka_time_ms)
        else:
            labels, asset = favourites[user]
            names = [rng.choice(labels) for _ in range(rng.randint(0, 2))]
            others = rng.randint(0, shape.labels_at_most - 1)
            names += [label_name(int(shape.labels * rng.random() ** shape.skew)) for _ in range(others)]
            other_asset = asset_name(rng.randrange(shape.assets))
            record = OracleRecord(
                offset=n + n // 10,  # with gaps, as compaction and markers leave them
                kafka_time_ms=kafka_time_ms,
                user_id=user,
                event_type=type_name(
                    min(int(rng.expovariate(2.5 / shape.event_types)), shape.event_types - 1)
                ),
                event_time_ms=kafka_time_ms - random_lateness_ms(rng, shape),
                event_id=f"e{n}",
                labels=tuple(dict.fromkeys(names)),
                asset_id=rng.choice([None, asset_name(asset), other_asset, other_asset]),
            )
        seen.append(record)
        records.append(record)
    return records


def random_lateness_ms(rng: random.Random, shape: Shape) -> int:
    """Return how late an event comes: mostly not at all or a step or two, else minutes to weeks."""
    if rng.random() > shape.late_share:
        return rng.choice([0, 0, 0, 1, rng.randint(0, 2 * shape.step_ms)])
    return rng.choice(
        [
            rng.randint(MINUTE_MS, 10 * MINUTE_MS),
            rng.randint(HOUR_MS, 5 * HOUR_MS),
            rng.randint(DAY_MS, 3 * DAY_MS),
            rng.randint(7 * DAY_MS, 28 * DAY_MS),
            round(shape.half_lives_s[0] * 1000 * rng.choice([0.5, 1, 2, 10])),
        ]
    )


def redelivered(rng: random.Random, seen: Sequence[OracleRecord], n: int, kafka_time_ms: int) -> OracleRecord:
    """Return an earlier record of the user once more: from within the last 32, or from long before."""
    recent = rng.random() < 0.6 or len(seen) < 50
    earlier = rng.choice(seen[-20:] if recent else seen[:-40])
    return OracleRecord(
        offset=n + n // 10,
        kafka_time_ms=kafka_time_ms,
        user_id=earlier.user_id,
        event_type=earlier.event_type,
        event_time_ms=min(earlier.event_time_ms, kafka_time_ms),
        event_id=earlier.event_id,
        labels=earlier.labels,
        asset_id=earlier.asset_id,
    )


def user_name(n: int) -> str:
    """Return a legal user id; some hold what naive key schemes trip over."""
    return (f"u{n}", f"{{u}} {n}", f"ü-{n}-🛒")[n % 3]


def type_name(n: int) -> str:
    return f"type-{n}"


def label_name(n: int) -> str:
    return f"label-{n}"


def asset_name(n: int) -> str:
    return f"asset-{n}"


def core_records(records: Sequence[OracleRecord]) -> list[Record]:
    """Return the records as the codec would hand them to the core."""
    return [
        Record(
            offset=record.offset,
            kafka_time_ms=record.kafka_time_ms,
            event=Event(
                user_id=record.user_id,
                event_type=record.event_type,
                event_time_ms=record.event_time_ms,
                event_id=record.event_id,
                labels=record.labels,
                asset_id=record.asset_id,
            ),
        )
        for record in records
    ]


def core_weights(weights: Mapping[str, Any]) -> Weights:
    """Return the ``[weights]`` section as the core's type."""
    return Weights(
        half_life_s=weights.get("half_life_s", 2592000.0),
        history_floor=weights.get("history_floor", 1e-3),
        event_types={name: EventTypeWeight(**own) for name, own in weights.get("event_types", {}).items()},
    )


def core_segments(segments: Sequence[Mapping[str, Any]], weights: Mapping[str, Any]) -> SegmentSet:
    """Return the definitions as the core's type."""
    made = []
    for segment in segments:
        arguments: dict[str, Any] = dict(segment)
        for key in ("labels", "asset_ids", "event_types", "exclude"):
            arguments[key] = tuple(segment.get(key, ()))
        made.append(Segment(**arguments))
    return SegmentSet(made, core_weights(weights))
