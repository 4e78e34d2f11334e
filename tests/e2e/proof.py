"""Compare what consumers and Redis got with what the naive oracle says of the same log.

Everything is read back from the broker by an ordinary client: the log as the service saw it, and its answers.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import redis

from stream_app.core.decay import NEVER_MS, Weights
from stream_app.core.profile import unpack, weights_at
from stream_app.lookup import Lookup
from tests.backends import Names, read_to_end
from tests.oracle import (
    Clock,
    OracleProfile,
    OracleRecord,
    OracleTransition,
    Verdict,
    judge,
    records_by_partition,
    unix_ms,
)

MISSING_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Case:
    """One run: which topics, which Redis, under which definitions and clock."""

    kafka: str
    redis_url: str
    names: Names
    segments: Sequence[Mapping[str, Any]]
    weights: Mapping[str, Any]
    clock: Clock
    #: Whether `redis_url` names a node of a Redis Cluster.
    cluster: bool = False

    def open_redis(self, **options: Any) -> Any:
        """Open an ordinary client of its Redis."""
        kind: Any = redis.RedisCluster if self.cluster else redis.Redis
        return kind.from_url(self.redis_url, **options)


@dataclass(slots=True)
class Proof:
    """What was found; the lists are empty when all is well."""

    events: int = 0
    transitions: int = 0
    dead_letters: int = 0
    repeats: int = 0
    replayed: int = 0
    #: Records that lie beyond the watermarks.
    unfolded: int = 0
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    out_of_order: list[str] = field(default_factory=list)
    state: list[str] = field(default_factory=list)
    causes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"events {self.events}, transitions {self.transitions} {dict(self.causes)}, dead letters "
            f"{self.dead_letters}, missing {len(self.missing)}, extra {len(self.extra)}, wrong "
            f"{len(self.wrong)}, out of order {len(self.out_of_order)}, wrong state {len(self.state)}, "
            f"repeats {self.repeats}, replayed {self.replayed}"
        )

    def holds(self) -> None:
        """Fail unless nothing is missing, extra, wrong or out of order."""
        problems = [
            f"{name}: {found[:MISSING_SHOWN]}"
            for name, found in (
                ("missing", self.missing),
                ("extra", self.extra),
                ("wrong", self.wrong),
                ("out of order", self.out_of_order),
                ("state", self.state),
            )
            if found
        ]
        assert not problems, f"{self}\n" + "\n".join(problems)


def prove(case: Case, until_ms: int | None = None) -> Proof:
    """Read everything back and compare it."""
    names = case.names
    log = asyncio.run(read_to_end(case.kafka, names.events))
    said = asyncio.run(read_to_end(case.kafka, names.entered, names.exited))
    partitions = records_by_partition(log)
    proof = Proof(events=len(log))
    valid = {(p, record.offset) for p, records in partitions.items() for record in records}
    bad = {(record.partition, record.offset) for record in log} - valid
    compare_dead_letters(proof, bad, asyncio.run(read_to_end(case.kafka, names.dead_letter)))
    expected: list[OracleTransition] = []
    profiles: dict[int, dict[str, OracleProfile]] = {}
    stream_times: dict[int, int] = {}
    for partition, verdict in _verdicts(case, partitions, until_ms).items():
        expected += verdict.transitions
        profiles[partition] = verdict.profiles
        assert verdict.stream_time_ms is not None
        stream_times[partition] = verdict.stream_time_ms
    compare_transitions(proof, names, expected, said, may_begin_replayed=case.clock == "wall")
    at_ms = {p: max(s, until_ms or s) for p, s in stream_times.items()}
    with case.open_redis() as client, Lookup(case.redis_url, cluster=case.cluster) as lookup:
        compare_state(proof, client, lookup.meta().weights, profiles, stream_times, at_ms)
        watermarks = {r.partition: client.hget(f"sa:{{{r.partition}}}:wm", "watermark") for r in log}
    proof.unfolded = sum(r.offset >= int(watermarks[r.partition] or 0) for r in log)
    if proof.unfolded:
        proof.state.append(f"{proof.unfolded} records lie beyond the watermarks")
    return proof


#: The oracle takes a third of a minute for 36,000 events; runs over the same log share its verdict.
_KNOWN: dict[bytes, Verdict] = {}


def _verdicts(
    case: Case, partitions: Mapping[int, Sequence[OracleRecord]], until_ms: int | None
) -> dict[int, Verdict]:
    """Judge each partition's log."""
    verdicts = {}
    for partition, records in partitions.items():
        said = [replace(r, kafka_time_ms=0) if case.clock == "event" else r for r in records]
        text = repr((said, case.segments, case.weights, case.clock, until_ms))
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in _KNOWN:
            _KNOWN[digest] = judge(records, case.segments, case.weights, case.clock, until_ms)
        verdicts[partition] = _KNOWN[digest]
    return verdicts


def compare_dead_letters(proof: Proof, bad: set[tuple[int, int]], said: Iterable[Any]) -> None:
    """Every bad record must be set aside, nothing else may be; the same one again is a repeat."""
    seen: set[tuple[int, int]] = set()
    for letter in said:
        headers = dict(letter.headers)
        place = (int(headers["sa_partition"]), int(headers["sa_offset"]))
        proof.repeats += place in seen
        seen.add(place)
    proof.dead_letters = len(bad)
    proof.missing += [f"dead letter of {place}" for place in sorted(bad - seen)]
    proof.extra += [f"dead letter of {place}" for place in sorted(seen - bad)]


def compare_transitions(
    proof: Proof,
    names: Names,
    expected: list[OracleTransition],
    said: Iterable[Any],
    *,
    may_begin_replayed: bool = True,
) -> None:
    """Compare what consumers of the two topics read with what the oracle says, and their order.

    With the wall clock what was in the topic before the first worker is called replayed at first sight; with
    the event clock nothing is: whoever may not act on the first may never act.
    """
    messages: dict[str, dict[str, Any]] = {}
    latest_of_user: dict[tuple[str, str], int] = {}
    latest: dict[tuple[str, str, str], tuple[int, int]] = {}
    for record in said:
        message = json.loads(record.value)
        proof.replayed += message["replayed"]
        where = f"{record.topic}/{record.partition}/{record.offset}"
        status = "entered" if record.topic == names.entered else "exited"
        headers = dict(record.headers)
        if (
            message["status"] != status
            or record.key.decode() != message["user_id"]
            or headers["ce_id"].decode() != message["id"]
            or headers["ce_time"].decode() != message["time"]
        ):
            proof.wrong.append(f"{where}: topic, key, headers and value disagree")
        first = messages.setdefault(message["id"], message)
        if first is not message:
            proof.repeats += 1
            if {**first, "replayed": False} != {**message, "replayed": False}:
                proof.wrong.append(f"{where}: the id {message['id']} was said with another content before")
            continue
        if message["replayed"] and not may_begin_replayed:
            proof.wrong.append(f"{where}: called replayed at first sight")
        place = (unix_ms(message["time"]), message["seq"])
        if place[0] < latest_of_user.get((message["user_id"], status), -1):
            proof.out_of_order.append(f"{where}: {place} after what the user did later")
        latest_of_user[(message["user_id"], status)] = place[0]
        owner = (message["user_id"], message["segment_id"], status)
        if place <= latest.get(owner, (-1, 0)):
            proof.out_of_order.append(f"{where}: {place} after {latest[owner]}")
        latest[owner] = place
    by_seq = {(m["user_id"], m["segment_id"], m["seq"], unix_ms(m["time"])): m for m in messages.values()}
    proof.transitions = len(expected)
    for transition in expected:
        proof.causes[f"{transition.status} {transition.cause}"] += 1
        key = (transition.user_id, transition.segment_id, transition.seq)
        for off_ms in (0, -1, 1):  # the oracle bisects: its last millisecond may differ
            found = by_seq.pop((*key, transition.time_ms + off_ms), None)
            if found is not None:
                break
        if found is None:
            proof.missing.append(str(transition))
        elif problem := _difference(transition, found, off_ms):
            proof.wrong.append(f"{transition}: {problem}, got {found}")
    proof.extra += [str(message) for message in by_seq.values()]


def _difference(expected: OracleTransition, got: Mapping[str, Any], off_ms: int) -> str:
    event = got["event"] or {}
    exits_at_ms = None if got["exits_at"] is None else unix_ms(got["exits_at"])
    if off_ms == 0 and got["id"] != expected.id:
        return "another id"
    if (got["status"], got["cause"]) != (expected.status, expected.cause):
        return "another status or cause"
    if not math.isclose(got["weight"], expected.weight, rel_tol=1e-9, abs_tol=1e-300) and off_ms == 0:
        return f"weight {expected.weight}"
    if (event.get("event_id"), event.get("offset")) != (expected.event_id, expected.offset):
        return f"event {expected.event_id} at {expected.offset}"
    if (exits_at_ms is None) != (expected.exits_at_ms is None) or (
        exits_at_ms is not None
        and expected.exits_at_ms is not None
        and abs(exits_at_ms - expected.exits_at_ms) > 1
    ):
        return f"exits_at {expected.exits_at_ms}"
    return ""


def _same_instant(got_ms: int | None, expected_ms: int | None) -> bool:
    """Tell whether two instants agree to the millisecond that bisection and logarithm may round apart."""
    if got_ms is None or expected_ms is None:
        return got_ms is expected_ms
    return abs(got_ms - expected_ms) <= 1


def compare_state(
    proof: Proof,
    client: Any,
    weights: Weights,
    profiles: Mapping[int, Mapping[str, OracleProfile]],
    stream_times: Mapping[int, int],
    at_ms: Mapping[int, int],
) -> None:
    """Compare profiles, member index, due index, stream time and outbox with the oracle's, by partition."""
    for partition, users in profiles.items():
        prefix = f"sa:{{{partition}}}:"
        if int(client.hget(f"{prefix}wm", "stream_time_ms")) != stream_times[partition]:
            proof.state.append(f"{prefix}wm: stream time is not {stream_times[partition]}")
        if client.xlen(f"{prefix}outbox"):
            proof.state.append(f"{prefix}outbox is not empty")
        due = {
            user.decode(): int(score) for user, score in client.zrange(f"{prefix}due", 0, -1, withscores=True)
        }
        members: dict[str, dict[str, int | None]] = {}
        for key in client.scan_iter(match=f"{prefix}members:*"):
            segment = key.decode().removeprefix(f"{prefix}members:")
            for user, score in client.zrange(key, 0, -1, withscores=True):
                exits_at = None if score >= NEVER_MS else int(score)
                members.setdefault(user.decode(), {})[segment] = exits_at
        profile_keys = {key.decode() for key in client.scan_iter(match=f"{prefix}profile:*", count=1000)}
        ghosts = profile_keys - {f"{prefix}profile:{user_id}" for user_id in users}
        proof.state += [f"{key} is unknown to the oracle" for key in sorted(ghosts)]
        for user_id, expected in users.items():
            blob = client.get(f"{prefix}profile:{user_id}")
            held = members.pop(user_id, {})
            proof.state += _profile_differences(
                f"{prefix}profile:{user_id}",
                expected,
                blob,
                held,
                due.pop(user_id, None),
                weights,
                at_ms[partition],
            )
        proof.state += [f"{prefix}members: {user_id} is unknown to the oracle" for user_id in members]
        proof.state += [f"{prefix}due: {user_id} is unknown to the oracle" for user_id in due]


def _profile_differences(
    where: str,
    expected: OracleProfile,
    blob: bytes | None,
    held: Mapping[str, int | None],
    due_ms: int | None,
    weights: Weights,
    at_ms: int,
) -> list[str]:
    if blob is None:
        return [f"{where} is missing"]
    profile = unpack(where.partition(":profile:")[2], blob)
    found: dict[tuple[str, str, str], float] = {}
    for event_type, sums in weights_at(profile, weights, at_ms).items():
        found[(event_type, "type", "")] = sums.total
        found.update({(event_type, "label", label): weight for label, weight in sums.labels.items()})
        found.update({(event_type, "asset", asset): weight for asset, weight in sums.assets.items()})
    problems = []
    if found.keys() != expected.weights.keys():
        problems.append(f"{where}: other keys {sorted(found.keys() ^ expected.weights.keys())[:3]}")
    for key, weight in expected.weights.items():
        # Far below every floor, a sum carried from one landmark to the next may have become zero.
        if not math.isclose(found.get(key, -1.0), weight, rel_tol=1e-9, abs_tol=1e-150):
            problems.append(f"{where}: {key} weighs {found.get(key)}, expected {weight}")
            break
    if profile.seqs != expected.seqs:
        problems.append(f"{where}: seqs {profile.seqs}, expected {expected.seqs}")
    if held.keys() != expected.exits_at_ms.keys() or not all(
        _same_instant(held[segment], expected.exits_at_ms[segment]) for segment in held
    ):
        problems.append(f"{where}: member index {held}, expected {expected.exits_at_ms}")
    exits = [exits_at for exits_at in held.values() if exits_at is not None]
    if due_ms != min(exits, default=None):
        problems.append(f"{where}: due {due_ms}, expected {min(exits, default=None)}")
    return problems


def definitions_for(events: Path) -> str:
    """Write definitions of every kind over the commonest labels, assets and types of a file, as TOML."""
    labels: Counter[str] = Counter()
    assets: Counter[str] = Counter()
    types: Counter[str] = Counter()
    with gzip.open(events, "rt", encoding="utf-8") as lines:
        for line in lines:
            event = json.loads(line)
            labels.update(event["labels"])
            assets[event["asset_id"]] += 1
            types[event["event_type"]] += 1
    label = [name for name, _ in labels.most_common(12)]
    asset = [name for name, _ in assets.most_common(40)]
    kind = [name for name, _ in types.most_common()]
    tables = [
        {"id": "history", "labels": label[:1], "min_weight": 0.0},
        {"id": "any-label", "labels": label[1:4], "min_weight": 2.0},
        {"id": "all-labels", "labels": label[:3], "match_labels": "all", "min_weight": 1.5},
        {"id": "sticky", "labels": label[3:5], "min_weight": 3.0, "exit_weight": 0.5},
        {"id": "assets", "asset_ids": asset, "min_weight": 0.25},
        {
            "id": "both",
            "asset_ids": asset[:20],
            "labels": label[:6],
            "min_weight": 0.2,
            "match_labels": "any",
        },
        {"id": "active", "event_types": kind, "min_weight": 8.0, "exit_weight": 4.0},
        {"id": "of-type", "labels": label[2:5], "event_types": kind[:1], "min_weight": 1.2},
        {"id": "not-sticky", "labels": label[3:5], "min_weight": 0.4, "exclude": ["sticky"]},
        {"id": "neither", "labels": label[:5], "min_weight": 0.7, "exclude": ["not-sticky", "active"]},
    ]
    return "\n".join(
        "[[segments]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + "\n"
        for table in tables
    )
