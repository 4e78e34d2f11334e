"""Definitions that change between two starts: everybody is looked at again, once, and told why.

Without hysteresis in what has changed, memberships under the new definitions are those of a fold of the whole
log under them; what must be said is the difference to the memberships before.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis

from stream_app.cli import main
from stream_app.core.segment import Segment
from tests.backends import Kind, Names, read_to_end
from tests.e2e.proof import Proof
from tests.faults import faulty
from tests.faults.faulty import Switch
from tests.faults.rows import Row
from tests.oracle import OracleProfile, judge, records_by_partition, transition_id, unix_ms
from tests.processes import Program, Programs

PARTITIONS = 2
FIRST_S = 1_600_000_000
DAY_S = 86_400
LABELS = ("tea", "juice", "cola", "milk", "bread", "jam", "salt", "pepper")
WEIGHTS = {"half_life_s": 3.0 * DAY_S, "history_floor": 0.001}

Definition = dict[str, Any]
KEPT: Definition = {"id": "kept", "labels": ["tea"], "min_weight": 0.9}
STICKY: Definition = {"id": "sticky", "name": "old", "labels": ["tea"], "min_weight": 1.5, "exit_weight": 0.5}
OLD: list[Definition] = [
    KEPT,
    STICKY,
    {"id": "removed", "labels": ["milk"], "min_weight": 0.6},
    {"id": "lowered", "labels": ["juice"], "min_weight": 1.5},
    {"id": "raised", "labels": ["cola"], "min_weight": 0.6},
    {"id": "newly-shy", "labels": ["bread"], "min_weight": 0.6},
    {"id": "no-longer-shy", "labels": ["jam"], "min_weight": 0.6, "exclude": ["kept"]},
    {"id": "wider", "labels": ["salt"], "min_weight": 0.6},
]
NEW: list[Definition] = [
    KEPT,
    {**STICKY, "name": "new"},
    {"id": "added", "event_types": ["buy"], "min_weight": 0.7},
    {"id": "lowered", "labels": ["juice"], "min_weight": 0.6},
    {"id": "raised", "labels": ["cola"], "min_weight": 1.5},
    {"id": "newly-shy", "labels": ["bread"], "min_weight": 0.6, "exclude": ["kept"]},
    {"id": "no-longer-shy", "labels": ["jam"], "min_weight": 0.6},
    {"id": "wider", "labels": ["salt", "pepper"], "min_weight": 0.6},
]

Profiles = dict[int, dict[str, OracleProfile]]
Messages = list[dict[str, Any]]


@dataclass(slots=True)
class Stage:
    """Four topics, a Redis, and workers under definitions that change."""

    programs: Programs
    names: Names
    kafka: str
    redis_url: str
    directory: Path
    session_timeout_s: str
    segments: list[Definition] = field(default_factory=lambda: OLD)

    def start(self, *arguments: str) -> Program:
        return self.programs.start(*arguments, *self._options(), environment=self._environment())

    def run(self, *arguments: str) -> str:
        return self.programs.run(*arguments, *self._options(), environment=self._environment(), timeout_s=90)

    def run_faulty(self, *arguments: str, without: Sequence[Switch]) -> None:
        """Run a command that lacks a protection: see `tests.faults.faulty`."""
        environment = {**self._environment(), **faulty.environment(without=without)}
        program = self.programs.start(
            *arguments, *self._options(), environment=environment, module=faulty.__name__
        )
        assert program.wait(90) == 0, program.log

    def here(self, *arguments: str) -> None:
        """Run a command in this process: starting one takes longer than it does."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._environment().items():
                patch.setenv(name, value)
            assert main([*arguments, *self._options()]) == 0

    def send(self, events: Sequence[Mapping[str, Any]]) -> None:
        path = self.directory / "events.jsonl"
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
        self.here("replay", str(path))

    def said(self) -> Messages:
        """All transitions so far, by topic and place."""
        records = asyncio.run(read_to_end(self.kafka, self.names.entered, self.names.exited))
        return [json.loads(record.value) for record in records]

    def judged(self, segments: Sequence[Definition]) -> tuple[Profiles, dict[int, int]]:
        """What a fold of the whole log under one set of definitions leads to, and the stream times."""
        log = records_by_partition(asyncio.run(read_to_end(self.kafka, self.names.events)))
        verdicts = {p: judge(records, segments, WEIGHTS, "event") for p, records in log.items()}
        times = {p: v.stream_time_ms for p, v in verdicts.items() if v.stream_time_ms is not None}
        return {p: v.profiles for p, v in verdicts.items()}, times

    def members(self) -> dict[str, dict[str, int]]:
        """Segment to its members and their exits, as the index has them; no empty ones."""
        found: dict[str, dict[str, int]] = defaultdict(dict)
        with redis.Redis.from_url(self.redis_url, decode_responses=True) as client:
            raw: Any = client
            for key in raw.scan_iter(match="sa:{*}:members:*", count=1000):
                for user, exits_at in raw.zrange(key, 0, -1, withscores=True):
                    found[key.split(":members:")[1]][user] = int(exits_at)
        return dict(found)

    def count(self, segment_id: str) -> int:
        """How many members a segment has."""
        with redis.Redis.from_url(self.redis_url) as client:
            raw: Any = client
            return sum(int(raw.zcard(f"sa:{{{p}}}:members:{segment_id}")) for p in range(PARTITIONS))

    def marks(self) -> set[tuple[str, tuple[str, ...]]]:
        """Per partition: the set that all profiles have, and the sets that some may still have."""
        with redis.Redis.from_url(self.redis_url, decode_responses=True) as client:
            raw: Any = client
            return {
                (
                    raw.hget(f"sa:{{{p}}}:wm", "definitions"),
                    tuple(sorted(raw.hkeys(f"sa:{{{p}}}:definitions"))),
                )
                for p in range(PARTITIONS)
            }

    def commits(self) -> list[str]:
        """How many commits each partition has seen."""
        with redis.Redis.from_url(self.redis_url, decode_responses=True) as client:
            raw: Any = client
            return [raw.hget(f"sa:{{{p}}}:wm", "commit") for p in range(PARTITIONS)]

    def _options(self) -> Sequence[str]:
        (self.directory / "app.toml").write_text(
            f'[worker]\nclock = "event"\n[weights]\nhalf_life_s = {WEIGHTS["half_life_s"]}\n'
        )
        (self.directory / "segments.toml").write_text(
            "".join(
                "[[segments]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
                for table in self.segments
            )
        )
        return (
            "--config", str(self.directory / "app.toml"), "--segments", str(self.directory / "segments.toml")
        )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        return {
            **self.names.environment(),
            "STREAM_APP__KAFKA__BOOTSTRAP_SERVERS": self.kafka,
            "STREAM_APP__KAFKA__SESSION_TIMEOUT_S": self.session_timeout_s,
            "STREAM_APP__REDIS__URL": self.redis_url,
            # With the model on, users are scored again in the background, which commits: whether a start
            # under known definitions has nothing to do could not be told. Base segments do not know of the
            # model.
            "STREAM_APP__MODEL__ENABLED": "false",
        }


@pytest.fixture
def new_stage(
    kafka_bootstrap: str, kafka_kind: Kind, fresh_redis: str, programs: Programs, tmp_path: Path
) -> Callable[[], Stage]:
    """Build a stage with topics of its own; of what an earlier one left in Redis nothing stays."""
    # The embedded broker makes a joining worker wait for it; Apache Kafka accepts no less than 6 s.
    timeout_s = "3" if kafka_kind == "embedded" else "6"

    def build() -> Stage:
        with redis.Redis.from_url(fresh_redis) as client:
            client.flushdb()
        made = Stage(programs, Names.unique(), kafka_bootstrap, fresh_redis, tmp_path, timeout_s)
        made.here("topics", "--partitions", str(PARTITIONS))
        return made

    return build


@pytest.fixture
def stage(new_stage: Callable[[], Stage]) -> Stage:
    return new_stage()


def made_up(seed: int, users: int, *, first_day: int = 0, days: int = 3) -> list[dict[str, Any]]:
    """Events of 1 to 4 a user in random order of users, a few of them late, by increasing time."""
    rng = random.Random(seed)
    events = []
    for user in range(users):
        for _ in range(rng.randint(1, 4)):
            at_s = FIRST_S + first_day * DAY_S + rng.randrange(days * DAY_S)
            late_s = rng.choice((0, 0, 0, 0, rng.randrange(DAY_S)))
            labels = rng.sample(LABELS, rng.randint(0, 4))
            events.append((at_s, f"user {user}", rng.choice(("view", "view", "buy")), at_s - late_s, labels))
    events.sort()
    return [
        {"event_id": f"e{seed}-{number}", "user_id": u, "event_type": t, "timestamp": at_s, "labels": labels}
        for number, (_, u, t, at_s, labels) in enumerate(events)
    ]


@dataclass(frozen=True, slots=True)
class Expected:
    """One transition that a change of definitions must lead to."""

    status: str
    cause: str
    seq: int
    time_ms: int
    min_weight: float
    version: str
    exits_at_ms: int | None


def differences(before: Profiles, after: Profiles, times: Mapping[int, int]) -> dict[str, Expected]:
    """What has to be said when all profiles are brought from the old definitions to the new, by id."""
    old = {table["id"]: table for table in OLD}
    new = {table["id"]: table for table in NEW}
    found: dict[str, Expected] = {}
    for partition, users in before.items():
        at_ms = times[partition]
        for user_id, was in users.items():
            now = after[partition][user_id]
            for segment_id in was.exits_at_ms.keys() ^ now.exits_at_ms.keys():
                entered = segment_id in now.exits_at_ms
                seq = was.seqs.get(segment_id, 0) + 1
                table = new.get(segment_id) or old[segment_id]
                found[transition_id(user_id, segment_id, at_ms, seq)] = Expected(
                    "entered" if entered else "exited",
                    "definition",
                    seq,
                    at_ms,
                    table["min_weight"],
                    version_of(table),
                    now.exits_at_ms.get(segment_id),
                )
    return found


def version_of(table: Definition) -> str:
    """The version that a segment's transitions carry."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    return Segment(**fields).version


def as_expected(message: Mapping[str, Any], exits_at_ms: int | None) -> Expected:
    """The same of a message; its exit may be one millisecond off, since the oracle bisects."""
    said_ms = None if message["exits_at"] is None else unix_ms(message["exits_at"])
    if said_ms is not None and exits_at_ms is not None and abs(said_ms - exits_at_ms) <= 1:
        said_ms = exits_at_ms
    return Expected(
        message["status"],
        message["cause"],
        message["seq"],
        unix_ms(message["time"]),
        message["min_weight"],
        message["segment_version"],
        said_ms,
    )


def compared(said: Messages, expected: Mapping[str, Expected]) -> Proof:
    """Compare what was said with what had to be; the same message may have been said again."""
    proof = Proof(transitions=len(expected))
    by_id: dict[str, Mapping[str, Any]] = {}
    for message in said:
        if by_id.setdefault(message["id"], message) is message:
            continue
        proof.repeats += 1
        if by_id[message["id"]] != message:
            proof.wrong.append(f"another content under the same id: {message}")
    proof.extra += [str(by_id[id_]) for id_ in by_id.keys() - expected.keys()]
    proof.missing += [str(expected[id_]) for id_ in expected.keys() - by_id.keys()]
    for id_ in by_id.keys() & expected.keys():
        found = by_id[id_]
        as_said = as_expected(found, expected[id_].exits_at_ms)
        if as_said != expected[id_] or found["event"] is not None or found["replayed"] is not False:
            proof.wrong.append(str(found))
    return proof


def check_members(stage: Stage, profiles: Profiles) -> None:
    """Fail unless the member index is that of a fold of the whole log."""
    expected: dict[str, dict[str, int | None]] = defaultdict(dict)
    for users in profiles.values():
        for user_id, profile in users.items():
            for segment_id, exits_at_ms in profile.exits_at_ms.items():
                expected[segment_id][user_id] = exits_at_ms
    found = stage.members()
    assert found.keys() == expected.keys()
    for segment_id, members in expected.items():
        assert found[segment_id].keys() == members.keys(), segment_id
        for user_id, exits_at_ms in members.items():
            assert exits_at_ms is not None
            assert abs(found[segment_id][user_id] - exits_at_ms) <= 1, (segment_id, user_id)


def check_alternating(said: Messages) -> None:
    """Fail unless each user's transitions in a segment are numbered from 1 and enter and leave in turn."""
    logs: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for message in said:
        log = logs[(message["user_id"], message["segment_id"])]
        assert log.setdefault(message["seq"], message) == message, "two transitions with one number"
    for log in logs.values():
        assert sorted(log) == list(range(1, len(log) + 1))
        assert all((m["status"] == "entered") == (seq % 2 == 1) for seq, m in log.items())
        times = [log[seq]["time"] for seq in sorted(log)]
        assert times == sorted(times)


@pytest.mark.faults
def test_everybody_is_brought_under_new_definitions_once_and_told_why(
    stage: Stage, new_stage: Callable[[], Stage], fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(
        "segment definitions changed between two starts",
        "all users are re-evaluated, told once with cause `definition`, without a replay",
    )
    events = made_up(seed=1, users=1_500)
    stage.send(events)
    stage.run("worker", "--until-end")
    first = stage.said()
    old_marks = stage.marks()
    before, times = stage.judged(OLD)
    check_members(stage, before)

    # No record comes: whoever changes place is found by the walk over Redis.
    stage.segments = NEW
    stage.run("worker", "--until-end")
    second = stage.said()
    after, _ = stage.judged(NEW)
    expected = differences(before, after, times)
    known = {message["id"] for message in first}
    proof = compared([message for message in second if message["id"] not in known], expected)
    proof.events = len(events)
    row.judge(proof)
    assert len(second) == len(first) + len(expected), "nothing is said twice"
    changes = defaultdict(set)
    for message in second:
        if message["cause"] == "definition":
            changes[message["segment_id"]].add(message["status"])
    assert changes == {
        "added": {"entered"},
        "lowered": {"entered"},
        "no-longer-shy": {"entered"},
        "wider": {"entered"},
        "removed": {"exited"},
        "raised": {"exited"},
        "newly-shy": {"exited"},
    }
    check_alternating(second)
    check_members(stage, after)
    ((present, kept),) = stage.marks()
    assert kept == (present,), "old sets are dropped"
    assert {mark for mark, _ in old_marks} != {present}

    # A third start under the same definitions has nothing to do and nothing to say.
    commits = stage.commits()
    stage.run("worker", "--until-end")
    assert stage.commits() == commits
    assert stage.said() == second

    control = new_stage()
    control.send(made_up(seed=6, users=300))
    control.run("worker", "--until-end")
    known = {message["id"] for message in control.said()}
    before, times = control.judged(OLD)
    control.segments = NEW
    control.run_faulty("worker", "--until-end", without=["definitions"])
    after, _ = control.judged(NEW)
    said = [message for message in control.said() if message["id"] not in known]
    row.control("re-evaluation off", compared(said, differences(before, after, times)))


def test_a_user_with_a_record_is_brought_under_new_definitions_before_it(stage: Stage) -> None:
    stage.send(made_up(seed=2, users=600))
    stage.run("worker", "--until-end")
    known = {message["id"] for message in stage.said()}
    stage.segments = NEW
    later = made_up(seed=3, users=300, first_day=3)
    stage.send(later)
    stage.run("worker", "--until-end")
    said = stage.said()
    check_alternating(said)
    after, _ = stage.judged(NEW)
    check_members(stage, after)
    assert len({message["id"] for message in said}) == len(said)

    # Whoever had a record was re-evaluated before it, others by the walk: never after an event of their own.
    versions = {table["id"]: version_of(table) for table in NEW}
    events = {event["event_id"] for event in later}
    moved: set[tuple[str, str]] = set()
    for message in sorted(said, key=lambda m: (m["user_id"], m["segment_id"], m["seq"])):
        place = (message["user_id"], message["segment_id"])
        if message["cause"] == "definition":
            assert place not in moved, "an event under the new definitions came before them"
        if message["cause"] == "event" and message["event"]["event_id"] in events:
            moved.add(place)
            assert message["segment_version"] == versions[message["segment_id"]]
    assert {"definition", "event", "decay"} == {m["cause"] for m in said if m["id"] not in known}
    ((present, kept),) = stage.marks()
    assert kept == (present,)


@pytest.mark.faults
def test_a_change_that_was_broken_off_is_finished_and_nothing_is_said_with_another_id(
    stage: Stage, fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(
        "worker killed in the middle of a change of definitions",
        "the next worker finishes the change; nothing is said twice under another id",
    )
    events = made_up(seed=4, users=4_000)
    stage.send(events)
    stage.run("worker", "--until-end")
    known = {message["id"] for message in stage.said()}
    before, times = stage.judged(OLD)
    after, _ = stage.judged(NEW)
    expected = differences(before, after, times)
    stage.segments = NEW
    members = sum("added" in profile.exits_at_ms for users in after.values() for profile in users.values())
    worker = stage.start("worker")
    worker.wait_until(lambda: stage.count("added") > 0.2 * members, 40, "in the middle of the change")
    worker.kill()
    entered = stage.count("added")
    assert entered < 0.9 * members, "the change was all but done: nothing was tested"
    assert all(len(kept) == 2 for _, kept in stage.marks())
    stage.run("worker", "--until-end")
    said = stage.said()
    proof = compared([message for message in said if message["id"] not in known], expected)
    proof.events = len(events)
    row.judge(proof)
    row.note("control: that of the row before")
    row.note(f"killed when {entered:,} of {members:,} had been let into one new segment")
    check_alternating(said)
    check_members(stage, after)
    ((present, kept),) = stage.marks()
    assert kept == (present,)


def test_definitions_that_are_taken_back_half_way_leave_everybody_where_he_was(stage: Stage) -> None:
    stage.send(made_up(seed=5, users=3_000))
    stage.run("worker", "--until-end")
    before, _ = stage.judged(OLD)
    stage.segments = NEW
    worker = stage.start("worker")
    worker.wait_until(lambda: stage.count("added") > 0, 40, "in the middle of the change")
    worker.kill()
    assert all(len(kept) == 2 for _, kept in stage.marks()), "the change was done before the kill"
    stage.segments = OLD
    stage.run("worker", "--until-end")
    check_members(stage, before)
    check_alternating(stage.said())  # also in a segment that was removed and is back
    ((present, kept),) = stage.marks()
    assert kept == (present,)
