"""Workers that are killed, at every point between reading a record and acknowledging it, or in a replay."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor

from tests.backends import read_to_end
from tests.e2e.proof import prove
from tests.faults.faulty import LIFE, POINTS, Point, Switch, environment
from tests.faults.rows import Row, seed
from tests.faults.stage import FaultStage, fault_log
from tests.processes import Program

pytestmark = pytest.mark.faults

KILLED = -9
KILLS = 50
REBALANCE: Point = "during rebalance"
CLAIMED = ": claimed, epoch "
#: How long the group waits for a member that was killed, which is what these runs mostly do.
SESSION_TIMEOUT_S = 1.0
#: Far more than it takes; what counts is that it ends.
DEADLINE_S = 500.0
#: Records that are appended when a worker has nothing left to do, and how many there are for all of them.
PORTION, RECORDS = 90, 9_000


def portions(stage: FaultStage) -> Iterator[int]:
    """Append the log bit by bit; yields how many records there are by now."""
    log, sent = list(fault_log(seed(), RECORDS)), 0
    while sent < len(log):
        sent += stage.append(log[sent : sent + PORTION])
        yield sent


def lives_begun(worker: Program) -> list[str]:
    """What each life so far has printed."""
    return worker.log.split(LIFE)[1:]


async def join_and_leave(stage: FaultStage) -> None:
    """Be a member of the group for one rebalance: whoever has partitions has to give them up."""
    async with AIOKafkaConsumer(
        stage.case.names.events,
        bootstrap_servers=stage.case.kafka,
        group_id=stage.case.names.group,
        enable_auto_commit=False,
        partition_assignment_strategy=[RoundRobinPartitionAssignor],
    ):
        pass  # entering waits for the assignment


@pytest.mark.usefixtures("patience")
def test_a_worker_killed_fifty_times_over_a_run_loses_nothing(
    kafka_bootstrap: str,
    fresh_redis: str,
    stage_on: Callable[..., FaultStage],
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        f"worker SIGKILLed {KILLS} times over a run, at six points",
        "nothing lost, nothing twice, first sightings in order",
    )
    began_s = time.monotonic()
    rng = random.Random(seed())
    points = [POINTS[n % len(POINTS)] for n in range(KILLS)]
    rng.shuffle(points)

    stage = stage_on(kafka_bootstrap, fresh_redis, kafka__session_timeout_s=SESSION_TIMEOUT_S)
    # A rebalance is over before the worker has anything of the next one.
    counts = [1 if point == REBALANCE else rng.randint(1, 4) for point in points]
    lives = [environment(kill=kill) for kill in zip(points, counts, strict=True)]
    worker = stage.start_faulty("worker", lives=lives)
    feed = portions(stage)
    sent = next(feed)
    deadline_s = time.monotonic() + DEADLINE_S
    while worker.is_running:
        assert time.monotonic() < deadline_s, worker.log[-4000:]
        begun = lives_begun(worker)
        if begun and points[len(begun) - 1] == REBALANCE:
            if CLAIMED in begun[-1]:
                asyncio.run(join_and_leave(stage))
        elif stage.folded() == sent:
            sent = next(feed)
        time.sleep(0.01)
    assert worker.wait(1) == 0, worker.log[-4000:]
    seconds = time.monotonic() - began_s
    stage.append(list(fault_log(seed(), RECORDS))[sent:])
    stage.run("worker", "--until-end")
    row.judge(prove(stage.case))
    row.note(f"{KILLS} kills in {seconds:.0f} s: {dict(Counter(points))}")

    control = stage_on(kafka_bootstrap, fresh_redis)
    control.flush()
    control.fill(2_000)
    control.lose_what_a_worker_publishes()
    row.control("outbox off, killed after a commit", prove(control.case))


def test_a_crash_in_the_middle_of_a_replay_does_not_forget_that_it_is_one(
    kafka_bootstrap: str,
    fresh_redis: str,
    stage_on: Callable[..., FaultStage],
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "worker SIGKILLed in the middle of a replay, and Redis lost again",
        "all that was said before comes again as `replayed`, nothing new does",
    )

    def replay(without: Sequence[Switch] = ()) -> tuple[FaultStage, int]:
        """Let a log be replayed with two interruptions; tell how often something was said as if new."""
        stage = stage_on(kafka_bootstrap, fresh_redis)
        stage.flush()
        total = stage.fill()
        stage.run("worker", "--until-end")
        stage.flush()
        worker = stage.start_faulty("worker", kill=("after publish", 4), without=without)
        assert worker.wait(60) == KILLED, worker.log
        assert 0 < stage.folded() < total
        # One that has the time to tell Kafka how far it is.
        worker = stage.start_faulty("worker", term=("before ack", 3), without=without)
        assert worker.wait(60) == 0, worker.log
        assert 0 < stage.folded() < total
        stage.flush()
        stage.run("worker", "--until-end")
        names = stage.case.names
        said = asyncio.run(read_to_end(stage.case.kafka, names.entered, names.exited))
        return stage, sum(not json.loads(record.value)["replayed"] for record in said)

    stage, new = replay()
    proof = row.judge(prove(stage.case))
    assert new == proof.transitions
    assert proof.replayed > proof.transitions

    stage, new = replay(without=("replay",))
    assert new > proof.transitions
    row.controls.append(f"Kafka told of every watermark: {new - proof.transitions} repeats as if new")
