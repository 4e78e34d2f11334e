"""Exits that no event brings, in real time: half-lives of seconds, a live log, and the clock on the wall."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import redis
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from stream_app.adapters.partition import GRACE_MS
from tests.backends import Kind, Names, kafka_from_environment, kind_of, read_to_end
from tests.e2e.proof import Case, prove
from tests.faults.faulty import Switch
from tests.faults.rows import Row
from tests.integration.stage import (
    PARTITIONS,
    Stage,
    claims,
    event_clock_case,
    flush,
    synthetic_events,
    wait_until,
)
from tests.oracle import Oracle, OracleRecord, unix_ms
from tests.processes import Program, Programs

SEED = 20_261_122
LIVE_S = 6.0
USERS = 40
#: Where the broker does not stamp records, their producer does, and the worker trusts that such a record is
#: in the log `GRACE_MS` later. A busy machine may need longer, so nothing is sent this shortly before an exit
#: of the same user. With LogAppendTime nothing is kept off.
KEPT_OFF_MS = 500
BUY_HALF_LIFE_S = 1.5
#: For how long a worker stands still at least while exits become due.
FROZEN_S = 3.0
WEIGHTS: dict[str, Any] = {
    "half_life_s": 1.0,
    "history_floor": 0.05,
    "event_types": {
        "buy": {"action_weight": 2.0, "half_life_s": BUY_HALF_LIFE_S},
        "watch": {"half_life_s": 3.0},
    },
}
SEGMENTS: list[dict[str, Any]] = [
    {"id": "history", "event_types": ["view"], "min_weight": 0.0},
    {"id": "red", "labels": ["red"], "min_weight": 1.2, "exit_weight": 0.6},
    {"id": "green-not-red", "labels": ["green"], "min_weight": 0.5, "exclude": ["red"]},
    {"id": "both", "labels": ["red", "green"], "match_labels": "all", "min_weight": 0.4},
    {"id": "buyers", "event_types": ["buy"], "min_weight": 1.0},
    {"id": "owners", "asset_ids": ["p1", "p2"], "event_types": ["watch"], "min_weight": 0.7},
]


@dataclass(frozen=True, slots=True)
class Said:
    """One transition as a consumer got it, and when."""

    received_ms: int
    message: Mapping[str, Any]

    @property
    def time_ms(self) -> int:
        return unix_ms(self.message["time"])


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture
def stage(kafka_bootstrap: str, fresh_redis: str, names: Names, programs: Programs, tmp_path: Path) -> Stage:
    return wall_stage(
        Case(kafka_bootstrap, fresh_redis, names, SEGMENTS, WEIGHTS, "wall"), programs, tmp_path
    )


def wall_stage(case: Case, programs: Programs, directory: Path) -> Stage:
    """Build a stage on the wall clock."""
    # Apache Kafka stamps the records itself, as `stream-app topics` has asked; the embedded broker cannot.
    trusting = kind_of(kafka_from_environment(os.environ), os.environ) == "embedded"
    return Stage.build(case, programs, directory, worker__trust_create_time=trusting)


@pytest.fixture
def stage_again(stage: Stage, tmp_path: Path) -> Callable[[], Stage]:
    """End what runs on the stage and build another with nothing on it."""

    def again() -> Stage:
        stage.programs.stop()
        flush(stage)
        return wall_stage(replace(stage.case, names=Names.unique()), stage.programs, tmp_path)

    return again


def started(stage: Stage, **settings: object) -> Program:
    """Start a worker and wait until it has claimed all partitions."""
    worker = stage.start("worker", **settings)
    worker.wait_until(lambda: len(claims(worker)) == PARTITIONS, 60, "at work")
    return worker


def is_settled(stage: Stage, ends: Mapping[int, int]) -> bool:
    """Whether everything is folded, everybody has left and everything is published."""
    with redis.Redis.from_url(stage.case.redis_url) as raw:
        client: Any = raw
        waiting = sum(
            client.zcard(f"sa:{{{p}}}:due") + client.xlen(f"sa:{{{p}}}:outbox") for p in range(PARTITIONS)
        )
    return stage.watermarks() == ends and waiting == 0


def exits_due(stage: Stage) -> dict[str, int]:
    """The next exit of each user, by the due index."""
    with redis.Redis.from_url(stage.case.redis_url) as raw:
        client: Any = raw
        return {
            user.decode(): int(score)
            for p in range(PARTITIONS)
            for user, score in client.zrange(f"sa:{{{p}}}:due", 0, -1, withscores=True)
        }


def transitions(stage: Stage) -> list[dict[str, Any]]:
    """Everything said so far."""
    names = stage.case.names
    return [
        json.loads(record.value)
        for record in asyncio.run(read_to_end(stage.case.kafka, names.entered, names.exited))
    ]


def event(event_id: str, user_id: str, at_ms: int, event_type: str = "buy", **more: Any) -> dict[str, Any]:
    return {
        "event_id": event_id,
        "user_id": user_id,
        "event_type": event_type,
        "timestamp": at_ms / 1000,
        **more,
    }


# --- live --------------------------------------------------------------------------------------------------


def test_a_live_run_says_what_the_oracle_says_and_exits_come_at_their_instant(
    stage: Stage, kafka_kind: Kind, record_property: Callable[[str, object], None]
) -> None:
    print(f"seed {SEED}")
    worker = started(stage)
    said = asyncio.run(_live(stage, random.Random(SEED), keep_off=kafka_kind == "embedded"))
    proof = stage.proven(record_property, until_ms=now_ms())
    assert worker.is_running
    assert proof.causes["exited decay"] > 100
    assert proof.causes["entered decay"] > 0
    assert proof.repeats == 0
    assert proof.replayed == 0
    exits = [one for one in said if one.message["status"] == "exited" and one.message["cause"] == "decay"]
    assert len(exits) == proof.causes["exited decay"]
    assert all(one.message["event"] is None for one in exits)
    late_ms = sorted(one.received_ms - one.time_ms for one in exits)
    figures = {
        "exits": len(late_ms),
        "min": late_ms[0],
        "median": round(statistics.median(late_ms)),
        "p99": late_ms[int(0.99 * (len(late_ms) - 1))],
        "max": late_ms[-1],
    }
    record_property("lateness of decay exits, ms after t*", figures)
    print(f"lateness of decay exits, ms after t*: {figures}")
    assert late_ms[0] >= 0, "an exit was said before its instant"
    assert late_ms[-1] < 10_000
    assert _exits_foretold(said) > 30


async def _live(stage: Stage, rng: random.Random, *, keep_off: bool) -> list[Said]:
    """Produce for some seconds, then wait until everybody has left; returns what a consumer got meanwhile."""
    names, kafka = stage.case.names, stage.case.kafka
    said: list[Said] = []
    async with (
        AIOKafkaProducer(bootstrap_servers=kafka, acks="all") as producer,
        AIOKafkaConsumer(
            bootstrap_servers=kafka,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            fetch_max_wait_ms=50,
        ) as consumer,
    ):
        consumer.assign(
            [TopicPartition(t, p) for t in (names.entered, names.exited) for p in range(PARTITIONS)]
        )
        collecting = asyncio.create_task(_collect(consumer, said))
        try:
            await _produce(producer, names.events, rng, keep_off=keep_off)
            ends = await asyncio.to_thread(stage.log_ends)
            await asyncio.to_thread(wait_until, lambda: is_settled(stage, ends), 30, "settled")
            total = len(await read_to_end(kafka, names.entered, names.exited))
            await asyncio.to_thread(wait_until, lambda: len(said) >= total, 10, "everything received")
        finally:
            collecting.cancel()
    return said


async def _collect(consumer: AIOKafkaConsumer, said: list[Said]) -> None:
    while True:
        for records in (await consumer.getmany(timeout_ms=50)).values():
            received_ms = now_ms()
            said += [Said(received_ms, json.loads(record.value)) for record in records]


async def _produce(producer: AIOKafkaProducer, topic: str, rng: random.Random, *, keep_off: bool) -> None:
    """Send about 60 events a second, some of them late, early or twice."""
    foreseen = Oracle(SEGMENTS, WEIGHTS)
    earlier: list[dict[str, Any]] = []
    sent: list[asyncio.Future[Any]] = []
    end_ms = now_ms() + round(LIVE_S * 1000)
    while (instant_ms := now_ms()) < end_ms:
        user = f"u{rng.randrange(USERS)}"
        happened_ms = instant_ms + rng.choice([0, 0, 0, 0, -700, -3_000, 5_000])
        made = event(
            f"e{len(sent)}",
            user,
            happened_ms,
            rng.choice(["view", "view", "buy", "watch"]),
            labels=rng.sample(["red", "green", "blue"], rng.randint(0, 2)),
            asset_id=f"p{rng.randrange(4)}",
        )
        if earlier and rng.random() < 0.03:
            made = earlier[-1]
        if keep_off and _leaves_soon(foreseen, made["user_id"], instant_ms):
            await asyncio.sleep(0.002)
            continue
        earlier.append(made)
        foreseen.fold(_as_record(made, len(sent), instant_ms), "wall")
        sent.append(
            await producer.send(
                topic, json.dumps(made).encode(), key=made["user_id"].encode(), timestamp_ms=instant_ms
            )
        )
        # Not a wait for anything: events are spread over time because that is what is tested.
        await asyncio.sleep(rng.expovariate(60.0))
    await asyncio.gather(*sent)


def _leaves_soon(foreseen: Oracle, user_id: str, at_ms: int) -> bool:
    user = foreseen.users.get(user_id)
    if user is None:
        return False
    foreseen.expire(user, at_ms)
    return any(exits_at <= at_ms + KEPT_OFF_MS for exits_at in user.members.values())


def _as_record(made: Mapping[str, Any], offset: int, kafka_time_ms: int) -> OracleRecord:
    return OracleRecord(
        offset=offset,
        kafka_time_ms=kafka_time_ms,
        user_id=made["user_id"],
        event_type=made["event_type"],
        event_time_ms=min(unix_ms(made["timestamp"]), kafka_time_ms),
        event_id=made["event_id"],
        labels=tuple(made["labels"]),
        asset_id=made["asset_id"],
    )


def _exits_foretold(said: Iterable[Said]) -> int:
    """Count exits that happened at the very instant that their ENTER had announced; none happened before."""
    announced: dict[tuple[str, str], int] = {}
    exact = 0
    for one in sorted(said, key=lambda one: (one.time_ms, one.message["seq"])):
        message = one.message
        key = (message["user_id"], message["segment_id"])
        if message["status"] == "entered":
            announced[key] = unix_ms(message["exits_at"])
        elif message["cause"] == "decay" and not _is_suppressible(message["segment_id"]):
            assert one.time_ms >= announced[key]
            exact += one.time_ms == announced[key]
    return exact


def _is_suppressible(segment_id: str) -> bool:
    return any(segment["id"] == segment_id and segment.get("exclude") for segment in SEGMENTS)


# --- a backlog ---------------------------------------------------------------------------------------------

BURST = 8  # buy events at once weigh 16: they are gone from "buyers" four half-lives later


def burst(name: str, users: Iterable[str], count: int = BURST) -> list[dict[str, Any]]:
    at_ms = now_ms()
    return [event(f"{name}-{user}-{n}", user, at_ms) for user in users for n in range(count)]


def all_entered(stage: Stage, worker: Program, users: Iterable[str]) -> dict[str, int]:
    """Wait until these users are members; returns when they leave unless something comes."""
    wanted = set(users)
    worker.wait_until(lambda: exits_due(stage).keys() >= wanted, 10, "users entered")
    return exits_due(stage)


def the_clock_passes(instant_ms: int) -> None:
    wait_until(lambda: now_ms() > instant_ms + GRACE_MS + 200, 30, "the wall clock there")


def left_at(stage: Stage, users: Iterable[str]) -> dict[str, list[int]]:
    """When these users have left "buyers", as said so far."""
    found: dict[str, list[int]] = {user: [] for user in users}
    for message in transitions(stage):
        if message["status"] == "exited" and message["user_id"] in found:
            found[message["user_id"]].append(unix_ms(message["time"]))
    return found


def test_a_worker_back_from_an_outage_expires_nobody_whose_events_wait_in_the_log(
    stage: Stage, record_property: Callable[[str, object], None]
) -> None:
    stay, leave = [f"stay-{n}" for n in range(12)], [f"leave-{n}" for n in range(12)]
    worker = started(stage)
    stage.send(burst("first", stay + leave))
    exits = all_entered(stage, worker, stay + leave)
    worker.terminate()
    assert worker.wait(10) == 0, worker.log
    assert now_ms() < min(exits.values()) - KEPT_OFF_MS, "too slow for this test"
    stage.send(burst("second", stay))
    the_clock_passes(max(exits.values()))

    worker = started(stage)
    ends = stage.log_ends()
    worker.wait_until(lambda: is_settled(stage, ends), 30, "settled")
    said = left_at(stage, stay + leave)
    assert all(len(instants) == 1 for instants in said.values())
    assert {user: said[user] for user in leave} == {user: [exits[user]] for user in leave}
    assert all(said[user][0] > exits[user] + 1_000 for user in stay), "a false exit"
    proof = stage.proven(record_property, until_ms=now_ms())
    assert proof.transitions == 2 * len(stay + leave)
    assert proof.repeats == 0


STAY, LEAVE = [f"stay-{n}" for n in range(12)], [f"leave-{n}" for n in range(12)]


def freeze(stage: Stage, *without: Switch) -> tuple[dict[str, int], float]:
    """Stop a worker until exits are past due, with events for half the users waiting; let it end its work.

    The events are slow to come when it goes on: the timer is at it before they are there.
    Returns when the users would have left but for those events, and for how many seconds it stood still.
    """
    worker = stage.start_faulty("worker", without=("prompt", *without), kafka__session_timeout_s=10)
    worker.wait_until(lambda: len(claims(worker)) == PARTITIONS, 60, "at work")
    stage.send(burst("first", STAY + LEAVE, count=4))  # they weigh 8: gone three half-lives later
    exits = all_entered(stage, worker, STAY + LEAVE)
    worker.pause()
    began_s = time.monotonic()
    assert now_ms() < min(exits.values()) - KEPT_OFF_MS, "too slow for this test"
    stage.send(burst("second", STAY))
    the_clock_passes(max(exits.values()))
    wait_until(lambda: time.monotonic() - began_s > FROZEN_S, 10, "frozen for long enough")
    frozen_s = time.monotonic() - began_s
    ends = stage.log_ends()
    worker.resume()
    worker.wait_until(lambda: is_settled(stage, ends), 30, "settled")
    assert len(claims(worker)) == PARTITIONS, "it lost its partitions meanwhile: something else was tested"
    return exits, frozen_s


@pytest.mark.faults
def test_a_worker_stopped_for_seconds_expires_nobody_whose_events_wait_in_the_log(
    stage: Stage, stage_again: Callable[[], Stage], fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(
        "worker frozen for 3 s with exits due and events waiting (wall clock)",
        "who has events in the log stays; who has none leaves at the right instant",
    )
    exits, frozen_s = freeze(stage)
    said = left_at(stage, STAY + LEAVE)
    assert {user: said[user] for user in LEAVE} == {user: [exits[user]] for user in LEAVE}
    assert all(len(said[user]) == 1 and said[user][0] > exits[user] + 1_000 for user in STAY), "a false exit"
    row.judge(prove(stage.case, now_ms()))
    row.note(f"frozen for {frozen_s:.1f} s; no false exit among {len(STAY)} users with events waiting")

    control = stage_again()
    exits, _ = freeze(control, "ask")
    said = left_at(control, STAY)
    assert any(exits[user] in said[user] for user in STAY), "nobody was let go falsely"
    row.control("the log's end not asked", prove(control.case, now_ms()))


def set_clock(clock: Path, off_ms: int) -> None:
    """Let the clock of a worker that was started with this file be wrong by so much from now on."""
    new = clock.with_suffix(".new")
    new.write_text(str(off_ms))
    new.replace(clock)


@pytest.mark.faults
def test_a_worker_whose_clock_is_set_back_is_late_at_worst(
    stage: Stage,
    stage_again: Callable[[], Stage],
    tmp_path: Path,
    kafka_kind: Kind,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "the worker's clock set back and forth in a run (wall clock)",
        "while it is behind, exits without an event wait; none is lost, false or out of order",
    )
    # Where producers' times are trusted, one further ahead than `max_future_skew_s` makes a bad record.
    back_s = 240 if kafka_kind == "embedded" else 3_600
    clock = tmp_path / "clock"

    def at_work(stage: Stage) -> Program:
        set_clock(clock, 0)
        worker = stage.start_faulty("worker", clock=clock)
        worker.wait_until(lambda: len(claims(worker)) == PARTITIONS, 60, "at work")
        return worker

    worker = at_work(stage)
    for turn in ("first", "second"):
        users = [f"{turn}-{n}" for n in range(24)]
        stage.send(burst(turn, users, count=4))
        exits = all_entered(stage, worker, users)
        set_clock(clock, -back_s * 1000)
        assert now_ms() < min(exits.values()) - KEPT_OFF_MS, "too slow for this test"
        the_clock_passes(max(exits.values()))
        assert not any(left_at(stage, users).values()), "the worker does not go by the clock that was set"
        if turn == "second":
            # Stream time says what is due while the log goes on, whatever the worker's clock says.
            stage.send(burst("later", [f"later-{n}" for n in range(24)]))
            worker.wait_until(
                lambda: left_at(stage, users) == {user: [exits[user]] for user in users},  # noqa: B023
                30,
                "gone by stream time",
            )
        set_clock(clock, 0)
        worker.wait_until(
            lambda: left_at(stage, users) == {user: [exits[user]] for user in users},  # noqa: B023
            30,
            "gone",
        )
    ends = stage.log_ends()
    worker.wait_until(lambda: is_settled(stage, ends), 30, "settled")
    row.judge(prove(stage.case, now_ms()))
    row.note(f"set back by {back_s} s and right again, twice")

    control = stage_again()
    worker = at_work(control)
    users = [f"u{n}" for n in range(24)]
    control.send(burst("first", users, count=4))
    exits = all_entered(control, worker, users)
    set_clock(clock, 3_600_000)
    worker.wait_until(lambda: all(left_at(control, users).values()), 10, "gone")
    assert now_ms() < min(exits.values()), "too slow for this test"
    set_clock(clock, 0)
    control.send(burst("second", users))
    ends = control.log_ends()
    worker.wait_until(lambda: is_settled(control, ends), 30, "settled")
    row.control("a clock an hour ahead instead", prove(control.case, now_ms()))
    row.note(
        "no promise holds for a clock that is ahead: users without a record to come leave early by as much"
    )


def test_an_exit_still_comes_when_redis_is_flushed_before_it_is_due(
    stage: Stage, record_property: Callable[[str, object], None]
) -> None:
    users = [f"u{n}" for n in range(12)]
    worker = started(stage)
    stage.send(burst("first", users, count=4))
    exits = all_entered(stage, worker, users)
    flush(stage)
    ends = stage.log_ends()
    worker.wait_until(
        lambda: now_ms() > max(exits.values()) and is_settled(stage, ends), 30, "folded again and settled"
    )
    assert left_at(stage, users) == {user: [exits[user]] for user in users}
    proof = stage.proven(record_property, until_ms=now_ms())
    assert proof.repeats == len(users), "who entered was said again"
    assert proof.replayed == len(users), "who left was said for the first time"


# --- stream time -------------------------------------------------------------------------------------------


def test_stream_time_survives_a_restart_and_is_not_lowered_by_an_old_event(
    kafka_bootstrap: str,
    fresh_redis: str,
    names: Names,
    programs: Programs,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    stage = Stage.build(event_clock_case(kafka_bootstrap, fresh_redis, names), programs, tmp_path)
    events = synthetic_events(SEED, 2_000)
    newest_s = max(e["timestamp"] for e in events)
    stage.send(events)
    ends = stage.log_ends()
    worker = started(stage)
    worker.wait_until(lambda: stage.is_done(ends), 20, "done")
    worker.terminate()
    assert worker.wait(15) == 0, worker.log
    times = stream_times(stage)
    assert max(map(int, times)) == round(newest_s * 1000)

    started(stage)
    assert stream_times(stage) == times
    stage.send(
        {**e, "event_id": f"old-{n}", "timestamp": newest_s - 86_400, "labels": ["red", "green"]}
        for n, e in enumerate(events[-300:])
    )
    ends = stage.log_ends()
    wait_until(lambda: stage.is_done(ends), 20, "old events folded")
    assert stream_times(stage) == times
    stage.proven(record_property)


def stream_times(stage: Stage) -> list[str]:
    return [stage.wm(p)["stream_time_ms"] for p in range(PARTITIONS)]
