"""Redis forgotten on purpose: the log is folded again, and what is said again says so."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import redis

from stream_app.adapters.profile_store import connect
from stream_app.adapters.rebuild import forget_everything
from stream_app.cli import main
from stream_app.core.decay import Weights
from stream_app.errors import StoreUnavailable
from tests.backends import Kind, Names, read_to_end
from tests.e2e.proof import Case, Proof, prove
from tests.faults.rows import Row
from tests.processes import Program, Programs

PARTITIONS = 2
FIRST_S = 1_600_000_000
USERS = 300
#: Legal ids that look like keys of the service.
ODD_USERS = ("{0}:wm", "x}:wm", "sa:{1}:wm", "}:profile:", "meta", "a b", "\N{GRINNING FACE}")
WEIGHTS: dict[str, Any] = {"half_life_s": 3600.0, "history_floor": 0.01}
SEGMENTS: list[dict[str, Any]] = [
    {"id": "fans", "labels": ["red"], "min_weight": 1.5, "exit_weight": 0.5},
    {"id": "any-colour", "labels": ["green", "blue"], "min_weight": 0.8, "exclude": ["fans"]},
    {"id": "buyers", "event_types": ["buy"], "min_weight": 0.0},
]


@dataclass(frozen=True, slots=True)
class Stage:
    """Four topics, a Redis, and commands to run on them."""

    programs: Programs
    case: Case
    directory: Path
    environment: Mapping[str, str]

    def options(self) -> Sequence[str]:
        settings = "".join(f"{key} = {value}\n" for key, value in self.case.weights.items())
        (self.directory / "app.toml").write_text(f'[worker]\nclock = "event"\n[weights]\n{settings}')
        (self.directory / "segments.toml").write_text(
            "".join(
                "[[segments]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
                for table in self.case.segments
            )
        )
        return (
            "--config", str(self.directory / "app.toml"), "--segments", str(self.directory / "segments.toml")
        )  # fmt: skip

    def start(self, *arguments: str) -> Program:
        return self.programs.start(*arguments, *self.options(), environment=self.environment)

    def run(self, *arguments: str, status: int = 0) -> str:
        return self.programs.run(*arguments, *self.options(), environment=self.environment, status=status)

    def here(self, *arguments: str) -> None:
        """Run a command in this process: starting one takes longer than it does."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            assert main([*arguments, *self.options()]) == 0

    def send(self, events: Sequence[Mapping[str, Any]]) -> None:
        path = self.directory / "events.jsonl"
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
        self.here("replay", str(path))

    def said(self) -> list[dict[str, Any]]:
        """All transitions so far, by topic and place."""
        names = self.case.names
        records = asyncio.run(read_to_end(self.case.kafka, names.entered, names.exited))
        return [json.loads(record.value) for record in records]


@pytest.fixture
def raw(fresh_redis: str) -> Any:
    """An ordinary client of the same Redis."""
    with redis.Redis.from_url(fresh_redis, decode_responses=True) as client:
        yield client


@pytest.fixture
def stage(
    kafka_bootstrap: str,
    kafka_kind: Kind,
    fresh_redis: str,
    names: Names,
    programs: Programs,
    tmp_path: Path,
) -> Stage:
    environment = {
        **names.environment(),
        "STREAM_APP__KAFKA__BOOTSTRAP_SERVERS": kafka_bootstrap,
        # The embedded broker makes a joining worker wait for it; Apache Kafka accepts no less than 6 s.
        "STREAM_APP__KAFKA__SESSION_TIMEOUT_S": "3" if kafka_kind == "embedded" else "6",
        "STREAM_APP__REDIS__URL": fresh_redis,
    }
    case = Case(kafka_bootstrap, fresh_redis, names, SEGMENTS, WEIGHTS, "event")
    made = Stage(programs, case, tmp_path, environment)
    made.here("topics", "--partitions", str(PARTITIONS))
    return made


def made_up(seed: int, count: int, first_hour: int) -> list[dict[str, Any]]:
    """Events over ten hours, mostly in the order of time."""
    rng = random.Random(seed)
    users = [f"user {number}" for number in range(USERS)] + list(ODD_USERS)
    hours = sorted(rng.uniform(first_hour, first_hour + 10) for _ in range(count))
    return [
        {
            "event_id": f"e{seed}-{number}",
            "user_id": rng.choice(users),
            "event_type": rng.choice(("view", "view", "buy")),
            "timestamp": FIRST_S + hour * 3600 - rng.choice((0, 0, 0, rng.uniform(0, 7200))),
            "labels": rng.sample(["red", "green", "blue", "grey"], rng.randint(0, 3)),
        }
        for number, hour in enumerate(hours)
    ]


def state(raw: Any) -> dict[str, object]:
    """What readers see: the users' exits, by segment and by instant, and how far each partition is."""
    found: dict[str, object] = {
        key: raw.zrange(key, 0, -1, withscores=True)
        for pattern in ("sa:{*}:members:*", "sa:{*}:due")
        for key in raw.scan_iter(match=pattern, count=1000)
        if raw.type(key) == "zset"
    }
    for partition in range(PARTITIONS):
        wm = raw.hgetall(f"sa:{{{partition}}}:wm")
        found[f"wm {partition}"] = {
            name: wm[name] for name in ("watermark", "stream_time_ms", "definitions", "weights", "partitions")
        }
    return found


def profiles(url: str) -> dict[bytes, bytes]:
    """All stored profiles, bit by bit."""
    with redis.Redis.from_url(url) as client:
        binary: Any = client
        return {
            key: binary.get(key)
            for key in binary.scan_iter(match="sa:{*}:profile:*", count=1000)
            if re.match(rb"sa:\{\d+\}:profile:", key) and binary.type(key) == b"string"
        }


def content(raw: Any) -> dict[str, object]:
    """Which keys there are, and the hashes of text among them."""
    return {
        key: raw.hgetall(key) if raw.type(key) == "hash" and not key.endswith(":model") else None
        for key in raw.scan_iter(count=1000)
    }


def in_order(messages: Sequence[Mapping[str, Any]], *, last: bool = False) -> dict[str, list[str]]:
    """Ids by user and topic in the order of their first sightings, or of their last."""
    found: dict[str, list[str]] = {}
    for message in reversed(messages) if last else messages:
        ids = found.setdefault(f"{message['status']} {message['user_id']}", [])
        if message["id"] not in ids:
            ids.append(message["id"])
    return {place: ids[::-1] if last else ids for place, ids in found.items()}


def test_what_is_said_again_after_a_rebuild_is_called_replayed_and_what_is_new_is_not(
    stage: Stage, raw: Any, fresh_redis: str
) -> None:
    stage.send(made_up(1, 1_500, first_hour=0))
    stage.run("worker", "--until-end")
    first = stage.said()
    assert not any(message["replayed"] for message in first)
    raw.set("other:application", "not ours")

    log = stage.run("rebuild", "--yes")
    assert f"The log holds up to 1500 records in {PARTITIONS} partitions" in log.replace(",", "")
    assert raw.keys("*") == ["other:application"]
    raw.delete("other:application")

    # Part of the log is known to the group, part of it is new.
    stage.send(made_up(2, 1_000, first_hour=9))
    stage.run("worker", "--until-end")
    second = stage.said()
    proof = prove(stage.case)
    proof.holds()
    assert proof.transitions > len(first)
    assert proof.replayed == proof.repeats == len(first)
    known: set[str] = set()
    for message in second:
        assert message["replayed"] == (message["id"] in known)
        known.add(message["id"])
    ends = {p: int(raw.hget(f"sa:{{{p}}}:wm", "watermark")) for p in range(PARTITIONS)}
    below = {p: int(raw.hget(f"sa:{{{p}}}:wm", "replayed_below")) for p in range(PARTITIONS)}
    assert all(0 < below[p] < ends[p] for p in range(PARTITIONS))

    # Now all of it is known.
    state_before, profiles_before = state(raw), profiles(fresh_redis)
    stage.here("rebuild", "--yes")
    stage.run("worker", "--until-end")
    assert state(raw) == state_before
    assert profiles(fresh_redis) == profiles_before
    third = stage.said()
    assert len(third) == len(second) + len(known)
    assert sum(message["replayed"] for message in third) == len(first) + len(known)
    # On each topic and partition the last sightings come last, in the order of the first ones.
    new = [message for message in second if not message["replayed"]]
    assert in_order(third, last=True) == in_order(new)


def test_a_replay_that_is_interrupted_and_begun_anew_still_knows_what_was_said(
    stage: Stage, raw: Any
) -> None:
    events = 8_000
    stage.send(made_up(4, events, first_hour=0))
    stage.run("worker", "--until-end")
    known = {message["id"] for message in stage.said()}
    stage.here("rebuild", "--yes")

    def folded() -> int:
        return sum(int(raw.hget(f"sa:{{{p}}}:wm", "watermark") or 0) for p in range(PARTITIONS))

    worker = stage.start("worker")
    worker.wait_until(lambda: folded() > 1_000, 40, "in the middle of the log")
    worker.terminate()  # the worker tells Kafka how far it is before it ends
    assert worker.wait(30) == 0, worker.log
    assert folded() < events, "all was folded before the end: nothing was tested"
    raw.flushdb()
    stage.run("worker", "--until-end")
    proof = prove(stage.case)
    proof.holds()
    said = stage.said()
    assert {message["id"] for message in said} == known
    assert sum(not message["replayed"] for message in said) == len(known)
    assert proof.replayed > len(known)


class Unplugged:
    """A Redis client that loses its connection at the n-th call of one command."""

    def __init__(self, client: Any, command: str, number: int) -> None:
        self._client = client
        self._command = command
        self._left = number

    def __getattr__(self, name: str) -> Any:
        if name == self._command:
            self._left -= 1
            if self._left == 0:
                return self._break
        return getattr(self._client, name)

    async def _break(self, *args: object, **options: object) -> None:
        raise redis.ConnectionError("unplugged")


async def forget(url: str, command: str, number: int) -> None:
    client = connect(url)
    try:
        unplugged: Any = Unplugged(client, command, number)
        await forget_everything(unplugged, PARTITIONS, lambda done, total: None)
    finally:
        await client.aclose()


def is_left(raw: Any) -> set[str]:
    """What a rebuild that was broken off has left; each watermark must be marked."""
    found = {f"wm {p}" for p in range(PARTITIONS) if raw.exists(f"sa:{{{p}}}:wm")}
    assert all(raw.hexists(f"sa:{{{key[-1]}}}:wm", "rebuilding") for key in found)
    found |= {"profiles"} if raw.keys("sa:{*}:profile:*") else set()
    return found | ({"meta"} if raw.exists("sa:meta") else set())


@pytest.mark.faults
def test_a_rebuild_that_is_broken_off_stops_workers_until_it_was_run_again(
    stage: Stage, raw: Any, fresh_redis: str, fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(
        "a rebuild broken off at three places and run again",
        "no worker starts on half of the state; after the rebuild all is as before",
    )
    stage.send(made_up(5, 1_000, first_hour=0))
    stage.run("worker", "--until-end")
    first, state_before, profiles_before = stage.said(), state(raw), profiles(fresh_redis)

    for command, number, left in (
        ("dbsize", 1, {"wm 0", "wm 1", "profiles", "meta"}),  # all is marked, nothing deleted
        ("delete", 1, {"wm 0", "wm 1", "meta"}),
        ("delete", 3, {"wm 1"}),  # all is deleted but one mark
    ):
        with pytest.raises(StoreUnavailable, match="Redis, rebuild: expected an answer, got ConnectionError"):
            asyncio.run(forget(fresh_redis, command, number))
        assert is_left(raw) == left
        if number == 1 and command == "delete":
            continue
        before = content(raw)
        log = stage.run("worker", "--until-end", status=1)
        assert "a rebuild that was broken off" in log
        assert "Run `stream-app rebuild` again, then start the worker." in log
        assert content(raw) == before or left == {"wm 1"}  # the worker may claim what is not marked

    stage.here("rebuild", "--yes")
    assert raw.keys("*") == []
    stage.run("worker", "--until-end")
    assert state(raw) == state_before
    assert profiles(fresh_redis) == profiles_before
    said = stage.said()
    assert {message["id"] for message in said} == {message["id"] for message in first}
    assert sum(not message["replayed"] for message in said) == len(first)
    row.judge(prove(stage.case))

    # The control: half of the state is gone, and nothing says so.
    with pytest.raises(StoreUnavailable):
        asyncio.run(forget(fresh_redis, "delete", 1))
    assert is_left(raw) == {"wm 0", "wm 1", "meta"}
    for p in range(PARTITIONS):
        raw.hdel(f"sa:{{{p}}}:wm", "rebuilding", "checkpoint")  # the model would miss its own state
    stage.run("worker", "--until-end")
    row.control("mark of a rebuild off", prove(stage.case))


def test_a_rebuild_is_refused_while_the_group_has_members_and_when_nobody_agrees(
    stage: Stage, raw: Any
) -> None:
    stage.send(made_up(6, 200, first_hour=0))
    worker = stage.start("worker")
    worker.wait_until(
        lambda: all(raw.hget(f"sa:{{{p}}}:wm", "watermark") not in (None, "0") for p in range(PARTITIONS)),
        40,
        "folding",
    )
    log = stage.run("rebuild", "--yes", status=1)
    assert "expected no members in the group while its state is deleted, got 1" in log
    assert "Stop the workers" in log
    worker.terminate()
    assert worker.wait(30) == 0, worker.log

    before = content(raw)
    stage.run("rebuild", status=1)  # nobody is there to answer the question
    assert content(raw) == before
    assert not raw.hexists("sa:{0}:wm", "rebuilding")


@pytest.mark.faults
def test_other_weights_are_refused_until_all_is_folded_again_under_them(
    stage: Stage, raw: Any, fresh_redis: str, fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(
        "half-life changed between two starts",
        "refused with what to do; after a rebuild the state is that of the new half-life",
    )
    stage.send(made_up(7, 800, first_hour=0))
    stage.run("worker", "--until-end")
    before = state(raw), profiles(fresh_redis)
    weights = {**WEIGHTS, "half_life_s": 1800.0}
    other = replace(stage, case=replace(stage.case, weights=weights))
    log = other.run("worker", "--until-end", status=1)
    last = log.strip().splitlines()[-1]
    assert "expected state of weights {" in last
    assert "restore the old [weights], or run `stream-app rebuild`" in last
    assert (state(raw), profiles(fresh_redis)) == before
    row.note("exit 1 with one sentence, nothing changed in Redis")

    # The control: nothing says under which half-life the sums were stored.
    for p in range(PARTITIONS):
        raw.hset(f"sa:{{{p}}}:wm", "weights", Weights(**weights).fingerprint())
    raw.delete("sa:meta")
    other.run("worker", "--until-end")
    row.control("check of the half-life off", of_state(prove(other.case)))

    other.here("rebuild", "--yes")
    other.run("worker", "--until-end")
    row.judge(of_state(prove(other.case)))
    row.note("what was said under the old half-life stays on the topics: state is compared, not they")


def of_state(proof: Proof) -> Proof:
    """What a proof found in Redis, and which transitions are nowhere; not what else is on the topics."""
    return replace(proof, extra=[], wrong=[], out_of_order=[])


def test_keys_of_a_topic_with_more_partitions_go_too(stage: Stage, raw: Any, fresh_redis: str) -> None:
    raw.hset("sa:{7}:wm", mapping={"epoch": 3, "partitions": 8})
    raw.set("sa:{7}:profile:u1", "left over")

    async def clear() -> int:
        client = connect(fresh_redis)
        try:
            return await forget_everything(client, PARTITIONS, lambda done, total: None)
        finally:
            await client.aclose()

    assert asyncio.run(clear()) == 4  # the two, and the marks of this topic's partitions
    assert raw.keys("*") == []
