"""The naive judge of base segments: what a partition's log means, in plain lines.

It decides, from the log alone, which users enter and leave which base segments and when. A weight is the
sum over every event the user still has, an exit instant is found by bisection on that sum: no landmarks, no
stored sums, no logarithms. It must not know anything of ``stream_app``; the fold is compared with it, so
whatever both would share could be wrong in both.

Definitions and weights are the plain dicts of ``segments.toml`` and of ``[weights]`` in ``app.toml``.
Instants are integer milliseconds since the epoch, UTC.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol

NEVER_MS = 253_402_300_800_000  # 10000-01-01: an exit from here on is published as null
SLACK = 1e-9  # relative, in the member's favour
HOLD_MS = 10  # nobody enters for less
REMEMBERED_IDS = 32
FORGET_EVERY = 64
FORGET_SHARE = 1e-3  # of the floor
CAPS = {"label": 512, "asset": 256, "type": 64}

Clock = Literal["wall", "event"]
Item = tuple[str, str]  # ("label" | "asset", name), or ("type", "") for the event type itself
# Weights at one instant: criteria, each (max or min) over items, each a list of (half-life ms, weight).
Decaying = list[tuple[Callable[[Iterable[float]], float], list[list[tuple[float, float]]]]]


@dataclass(frozen=True, slots=True)
class OracleRecord:
    """One valid record of a partition; ``event_time_ms`` is clamped to the record's Kafka timestamp."""

    offset: int
    kafka_time_ms: int
    user_id: str
    event_type: str
    event_time_ms: int
    event_id: str
    labels: tuple[str, ...] = ()
    asset_id: str | None = None


@dataclass(frozen=True, slots=True)
class OracleTransition:
    """What the service must say, without the segment's version."""

    id: str
    user_id: str
    segment_id: str
    status: str
    cause: str
    seq: int
    time_ms: int
    weight: float
    min_weight: float
    exits_at_ms: int | None
    event_id: str | None
    offset: int | None


@dataclass(frozen=True, slots=True)
class OracleProfile:
    """A user's state at the end: weights by (type, kind, name), memberships with exits (None: never)."""

    weights: dict[tuple[str, str, str], float]
    exits_at_ms: dict[str, int | None]
    seqs: dict[str, int]
    applied: int
    forget_ms: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Everything that one log leads to; ``happened`` counts what the log made the rules do."""

    transitions: list[OracleTransition]
    profiles: dict[str, OracleProfile]
    stream_time_ms: int | None
    happened: Counter[str]


@dataclass(slots=True)
class _User:
    user_id: str
    # event type -> item -> [(event time ms, action weight)]
    events: dict[str, dict[Item, list[tuple[int, float]]]] = field(default_factory=dict)
    members: dict[str, int] = field(default_factory=dict)  # segment id -> exits_at
    seqs: dict[str, int] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    applied: int = 0
    forget_ms: int = 0
    last_transition_ms: int = 0


@dataclass(frozen=True, slots=True)
class _Rule:
    id: str
    labels: tuple[str, ...]
    asset_ids: tuple[str, ...]
    event_types: tuple[str, ...]
    match_labels: str
    match_assets: str
    min_weight: float
    enter_at: float
    exit_below: float
    exclude: frozenset[str]


def transition_id(user_id: str, segment_id: str, time_ms: int, seq: int) -> str:
    """Return the id that a transition must carry."""
    text = "\0".join([user_id, segment_id, str(time_ms), str(seq)])
    return hashlib.sha256(text.encode()).digest()[:16].hex()


def crossing_ms(falling: Callable[[float], float], threshold: float, guess_ms: int) -> int | None:
    """Return how many ms after 0 a falling function crosses `threshold`, rounded; None if it is below at 0.

    The rounded crossing is the first whole ms n with the function at n + 1/2 below the threshold. Where it
    takes longer than the calendar lasts, the answer is past ``NEVER_MS``.
    """
    if falling(0.0) < threshold:
        return None
    # At low + 1/2 the function is not below (before 0 it is higher still), at high + 1/2 it will be.
    low, high = -1, max(guess_ms, 1)
    while falling(high + 0.5) >= threshold:
        low, high = high, high * 2
        if low > NEVER_MS:
            return low
    while high - low > 1:
        middle = (low + high) // 2
        if falling(middle + 0.5) >= threshold:
            low = middle
        else:
            high = middle
    return high


class Oracle:
    """The rules for one set of definitions; the state of one partition's users."""

    def __init__(self, segments: Sequence[Mapping[str, Any]], weights: Mapping[str, Any]) -> None:
        self.default_half_life_s = float(weights.get("half_life_s", 2592000.0))
        self.floor = float(weights.get("history_floor", 1e-3))
        self.event_types: Mapping[str, Mapping[str, Any]] = weights.get("event_types", {})
        base = [segment for segment in segments if segment.get("type", "base") == "base"]
        self.rules = _excluded_first([_rule(segment, self.floor) for segment in base])
        self.named = {
            "label": {name for rule in self.rules for name in rule.labels},
            "asset": {name for rule in self.rules for name in rule.asset_ids},
            "type": {name for rule in self.rules for name in rule.event_types},
        }
        self.users: dict[str, _User] = {}
        self.stream_time_ms: int | None = None
        self.transitions: list[OracleTransition] = []
        self.happened: Counter[str] = Counter()

    # -- what an event adds, what is left of it ------------------------------------------------------------

    def half_life_ms(self, event_type: str) -> float:
        own = self.event_types.get(event_type, {}).get("half_life_s")
        return float(self.default_half_life_s if own is None else own) * 1000.0

    def action_weight(self, event_type: str) -> float:
        return float(self.event_types.get(event_type, {}).get("action_weight", 1.0))

    def key_weight(self, user: _User, event_type: str, item: Item, at_ms: int) -> float:
        """Return the sum over the user's events of this type that carry the item, each decayed to `at_ms`."""
        half_life_ms = self.half_life_ms(event_type)
        events = user.events.get(event_type, {}).get(item, ())
        return math.fsum(action * 2.0 ** ((time_ms - at_ms) / half_life_ms) for time_ms, action in events)

    def item_weight(self, user: _User, item: Item, at_ms: int) -> float:
        return math.fsum(self.key_weight(user, event_type, item, at_ms) for event_type in user.events)

    # -- one segment ---------------------------------------------------------------------------------------

    def decaying(self, user: _User, rule: _Rule, at_ms: int) -> Decaying:
        """Return what the segment's criteria look at, as it stands at `at_ms`."""

        def parts(item: Item, event_types: Iterable[str]) -> list[tuple[float, float]]:
            return [
                (self.half_life_ms(event_type), self.key_weight(user, event_type, item, at_ms))
                for event_type in event_types
                if item in user.events.get(event_type, {})
            ]

        summed_over = rule.event_types or tuple(user.events)
        criteria: Decaying = []
        if rule.labels:
            items = [parts(("label", name), summed_over) for name in rule.labels]
            criteria.append((min if rule.match_labels == "all" else max, items))
        if rule.asset_ids:
            items = [parts(("asset", name), summed_over) for name in rule.asset_ids]
            criteria.append((min if rule.match_assets == "all" else max, items))
        if not rule.labels and not rule.asset_ids:
            criteria.append((max, [parts(("type", ""), [name]) for name in rule.event_types]))
        return criteria

    def exit_instant(self, criteria: Decaying, rule: _Rule, at_ms: int) -> int:
        """Return the instant from which the segment is below its exit threshold (0 if it is already)."""
        longest = max((h for _, items in criteria for item in items for h, _ in item), default=1.0)
        after_ms = crossing_ms(lambda ms: segment_weight(criteria, ms), rule.exit_below, round(longest))
        return 0 if after_ms is None else min(at_ms + after_ms, NEVER_MS)

    def touches(self, rule: _Rule, record: OracleRecord) -> bool:
        if not rule.labels and not rule.asset_ids:
            return record.event_type in rule.event_types
        if rule.event_types and record.event_type not in rule.event_types:
            return False
        return record.asset_id in rule.asset_ids or any(label in rule.labels for label in record.labels)

    # -- one evaluation ------------------------------------------------------------------------------------

    def evaluate(
        self, user: _User, at_ms: int, cause: str, start: set[str], record: OracleRecord | None
    ) -> None:
        """Evaluate the segments of `start` at `at_ms`, and those that exclude one that changed.

        With a record, `start` are the segments that it touches; without, those that are due.
        """
        changed: set[str] = set()
        said: list[OracleTransition] = []
        for rule in self.rules:
            if rule.id not in start and not rule.exclude & changed:
                continue
            criteria = self.decaying(user, rule, at_ms)
            weight = segment_weight(criteria, 0.0)
            was_in = rule.id in user.members
            if was_in:
                exits_at = user.members[rule.id]
                if record is not None and rule.id in start:
                    exits_at = max(exits_at, self.exit_instant(criteria, rule, at_ms))
                holds = exits_at > at_ms
            else:
                holds = weight >= rule.enter_at * (1 - SLACK)
                exits_at = self.exit_instant(criteria, rule, at_ms) if holds else 0
                if holds and exits_at - at_ms < HOLD_MS:
                    self.happened["refused_by_hold"] += 1
                    holds = False
            suppressed = any(other in user.members for other in rule.exclude)
            if holds and suppressed:
                self.happened["suppressed"] += 1
            is_in = holds and not suppressed
            if is_in:
                user.members[rule.id] = exits_at
            elif was_in:
                del user.members[rule.id]
            if is_in == was_in:
                continue
            changed.add(rule.id)
            user.seqs[rule.id] = user.seqs.get(rule.id, 0) + 1
            user.last_transition_ms = at_ms
            said.append(
                OracleTransition(
                    id=transition_id(user.user_id, rule.id, at_ms, user.seqs[rule.id]),
                    user_id=user.user_id,
                    segment_id=rule.id,
                    status="entered" if is_in else "exited",
                    cause=cause,
                    seq=user.seqs[rule.id],
                    time_ms=at_ms,
                    weight=weight,
                    min_weight=rule.min_weight,
                    exits_at_ms=exits_at if is_in and exits_at < NEVER_MS else None,
                    event_id=None if record is None else record.event_id,
                    offset=None if record is None else record.offset,
                )
            )
        said.sort(key=lambda transition: (transition.status == "entered", transition.segment_id))
        self.transitions += said

    def expire(self, user: _User, until_ms: int) -> None:
        """Let the user's exits due by `until_ms` happen, instant by instant."""
        while user.members and min(user.members.values()) <= until_ms:
            at_ms = min(user.members.values())
            self.evaluate(user, at_ms, "decay", {s for s, t in user.members.items() if t == at_ms}, None)

    # -- one record ----------------------------------------------------------------------------------------

    def fold(self, record: OracleRecord, clock: Clock) -> None:
        instant = record.kafka_time_ms if clock == "wall" else record.event_time_ms
        self.stream_time_ms = instant if self.stream_time_ms is None else max(self.stream_time_ms, instant)
        user = self.users.setdefault(record.user_id, _User(record.user_id))
        now_ms = max(self.stream_time_ms, user.last_transition_ms)

        # 1. Exits due by now, each at its own instant.
        self.expire(user, now_ms)
        # 2. A profile past its forget instant, with no membership left, is a new one.
        if user.applied > 0 and now_ms > user.forget_ms and not user.members:
            self.happened["profile_forgotten"] += 1
            user = self.users[record.user_id] = _User(record.user_id)
        # 3. A duplicate stops here.
        if record.event_id in user.ids:
            self.happened["duplicate"] += 1
            return
        # 4. The event counts from its own timestamp on; segments are evaluated now.
        action = self.action_weight(record.event_type)
        if action > 0:
            keys: set[Item] = {("type", "")} | {("label", label) for label in record.labels}
            if record.asset_id is not None:
                keys.add(("asset", record.asset_id))
            lists = user.events.setdefault(record.event_type, {})
            for key in keys:
                lists.setdefault(key, []).append((record.event_time_ms, action))
        user.ids = [*user.ids, record.event_id][-REMEMBERED_IDS:]
        user.applied += 1
        touched = {rule.id for rule in self.rules if self.touches(rule, record)}
        self.evaluate(user, now_ms, "event", touched, record)
        if user.applied % FORGET_EVERY == 0:
            self.forget_keys(user, now_ms)
        self.keep_caps(user, now_ms)
        user.forget_ms = self.forget_instant(user, now_ms, record.event_type)

    def forget_keys(self, user: _User, now_ms: int) -> None:
        """Drop every key that is below a thousandth of the floor."""
        for event_type, lists in list(user.events.items()):
            for item in list(lists):
                if self.key_weight(user, event_type, item, now_ms) < self.floor * FORGET_SHARE:
                    del lists[item]
                    self.happened["key_forgotten"] += 1
            if not lists:
                del user.events[event_type]

    def keep_caps(self, user: _User, now_ms: int) -> None:
        """Drop the lightest items that no segment names, down to 7/8 of a cap that is exceeded."""
        for kind in ("label", "asset"):
            items = {item for lists in user.events.values() for item in lists if item[0] == kind}
            if len(items) <= CAPS[kind]:
                continue
            free = [item for item in items if item[1] not in self.named[kind]]
            free.sort(key=lambda item: (self.item_weight(user, item, now_ms), item[1]))
            for item in free[: len(items) - CAPS[kind] * 7 // 8]:
                for lists in user.events.values():
                    lists.pop(item, None)
            self.happened[f"{kind}_cap"] += 1
        if len(user.events) > CAPS["type"]:
            free_types = [
                event_type
                for event_type, lists in user.events.items()
                if event_type not in self.named["type"]
                and not any(kind != "type" and name in self.named[kind] for kind, name in lists)
            ]
            free_types.sort(key=lambda name: (self.key_weight(user, name, ("type", ""), now_ms), name))
            for event_type in free_types[: len(user.events) - CAPS["type"] * 7 // 8]:
                del user.events[event_type]
            self.happened["type_cap"] += 1

    def forget_instant(self, user: _User, now_ms: int, event_type: str) -> int:
        """Return when the last event type reaches the floor, at least a half-life from now."""
        totals = [
            (self.half_life_ms(name), self.key_weight(user, name, ("type", ""), now_ms))
            for name in user.events
        ]
        at_least = now_ms + round(self.half_life_ms(event_type))
        if not totals:
            return at_least
        alone: Decaying = [(max, [[total] for total in totals])]
        longest = max(half_life_ms for half_life_ms, _ in totals)
        after_ms = crossing_ms(lambda ms: segment_weight(alone, ms), self.floor, round(longest))
        return at_least if after_ms is None else max(at_least, min(now_ms + after_ms, NEVER_MS))


def segment_weight(criteria: Decaying, after_ms: float) -> float:
    """Return the smallest criterion `after_ms` later; each item decays by itself, part by part."""
    return min(
        [
            pick(
                [
                    sum([weight * 2.0 ** (-after_ms / half_life) for half_life, weight in item])
                    for item in items
                ]
            )
            for pick, items in criteria
        ]
    )


def _rule(segment: Mapping[str, Any], floor: float) -> _Rule:
    min_weight = float(segment.get("min_weight", 0.0))
    enter_at = floor if min_weight == 0 else min_weight
    exit_weight = segment.get("exit_weight")
    exit_below = enter_at if exit_weight is None else floor if exit_weight == 0 else float(exit_weight)
    return _Rule(
        id=segment["id"],
        labels=tuple(segment.get("labels", ())),
        asset_ids=tuple(segment.get("asset_ids", ())),
        event_types=tuple(segment.get("event_types", ())),
        match_labels=segment.get("match_labels", "any"),
        match_assets=segment.get("match_assets", "any"),
        min_weight=min_weight,
        enter_at=enter_at,
        exit_below=exit_below,
        exclude=frozenset(segment.get("exclude", ())),
    )


def _excluded_first(rules: Sequence[_Rule]) -> list[_Rule]:
    ordered: list[_Rule] = []
    left = list(rules)
    while left:
        ready = [rule for rule in left if not any(other.id in rule.exclude for other in left)]
        if not ready:
            raise ValueError(f"exclusions go round in a circle among {[rule.id for rule in left]}")
        ordered += ready
        left = [rule for rule in left if rule not in ready]
    return ordered


def judge(
    records: Iterable[OracleRecord],
    segments: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Any],
    clock: Clock,
    until_ms: int | None = None,
) -> Verdict:
    """Fold the records of ONE partition in log order, then let everybody's exits due by `until_ms` happen.

    Parameters
    ----------
    records
        All valid records of the partition, in log order.
    segments, weights
        The definitions and the ``[weights]`` section as plain dicts.
    clock
        Which instant a record has: ``wall`` its Kafka timestamp, ``event`` its event timestamp.
    until_ms
        By when users without a further record have left, ms since epoch; None means the final stream time.
        The profiles' weights are those at the greater of this and the stream time.
    """
    oracle = Oracle(segments, weights)
    for record in records:
        oracle.fold(record, clock)
    until_ms = oracle.stream_time_ms if until_ms is None else until_ms
    if until_ms is None or oracle.stream_time_ms is None:
        return Verdict([], {}, None, oracle.happened)
    for user in oracle.users.values():
        oracle.expire(user, until_ms)
    at_ms = max(until_ms, oracle.stream_time_ms)
    profiles = {
        user.user_id: OracleProfile(
            weights={
                (event_type, *item): oracle.key_weight(user, event_type, item, at_ms)
                for event_type, lists in user.events.items()
                for item in lists
            },
            exits_at_ms={
                s: exits_at if exits_at < NEVER_MS else None for s, exits_at in user.members.items()
            },
            seqs=dict(user.seqs),
            applied=user.applied,
            forget_ms=user.forget_ms,
        )
        for user in oracle.users.values()
    }
    return Verdict(oracle.transitions, profiles, oracle.stream_time_ms, oracle.happened)


def oracle_transitions(
    records: Iterable[OracleRecord],
    segments: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Any],
    clock: Clock,
    until_ms: int | None = None,
) -> list[OracleTransition]:
    """Return the transitions of one partition; each user's are in order, users are not in order of time."""
    return judge(records, segments, weights, clock, until_ms).transitions


def oracle_weights(
    records: Iterable[OracleRecord],
    segments: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Any],
    clock: Clock,
    until_ms: int | None = None,
) -> dict[str, OracleProfile]:
    """Return every user's weights, memberships and exits at the end (at `until_ms`, else the stream time)."""
    return judge(records, segments, weights, clock, until_ms).profiles


class RawRecord(Protocol):
    """A record as an ordinary Kafka client hands it out (aiokafka's ``ConsumerRecord`` is one)."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...


def records_by_partition(
    raw_records: Iterable[RawRecord], max_future_skew_s: float = 300.0
) -> dict[int, list[OracleRecord]]:
    """Return the records that count, by partition and in order of offset.

    What is left out must be a dead letter: no JSON object, a key that is not the user's, a timestamp before
    1970 or further ahead of its record's than the skew. One less far ahead is clamped to it. Everything else
    of an event is taken as well-formed.
    """
    partitions: dict[int, list[OracleRecord]] = {}
    for raw in raw_records:
        try:
            event = json.loads(raw.value or b"")
        except ValueError:
            continue
        if not isinstance(event, dict) or raw.key is None or raw.key.decode() != event.get("user_id"):
            continue
        event_time_ms = unix_ms(event["timestamp"])
        if event_time_ms < 0 or event_time_ms > raw.timestamp + max_future_skew_s * 1000:
            continue
        record = OracleRecord(
            offset=raw.offset,
            kafka_time_ms=raw.timestamp,
            user_id=event["user_id"],
            event_type=event["event_type"],
            event_time_ms=min(event_time_ms, raw.timestamp),
            event_id=event["event_id"],
            labels=tuple(dict.fromkeys(event.get("labels") or ())),
            asset_id=event.get("asset_id"),
        )
        partitions.setdefault(raw.partition, []).append(record)
    for records in partitions.values():
        records.sort(key=lambda record: record.offset)
    return partitions


def unix_ms(timestamp: str | float) -> int:
    """Return an event's timestamp as integer ms, cut: an RFC 3339 string, or Unix seconds."""
    if isinstance(timestamp, str):
        return (datetime.fromisoformat(timestamp) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(
            milliseconds=1
        )
    return round(timestamp * 1e6) // 1000
