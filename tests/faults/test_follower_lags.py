"""A follower that lags, while exits are due: what the leader has, and not all replicas, is not overtaken."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from tests.backends import Kind, Names
from tests.e2e.proof import Case, Proof, prove
from tests.faults.conftest import only_apache
from tests.faults.faulty import Switch
from tests.faults.kafka_cluster import KafkaCluster, kafka_cluster
from tests.faults.rows import Row
from tests.faults.stage import FaultStage
from tests.integration.stage import wait_until
from tests.processes import Programs

pytestmark = pytest.mark.faults

HALF_LIFE_S: Final = 8.0
#: How long before the exit the event comes that puts it off.
BEFORE_MS: Final = 1_000
#: How long after the exit the log must still hide that event, or nothing was tested.
HIDDEN_MS: Final = 1_500
USER: Final = "u1"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[KafkaCluster]:
    with kafka_cluster(tmp_path) as nodes:
        yield nodes


def test_an_event_that_the_followers_do_not_have_yet_still_puts_an_exit_off(
    request: pytest.FixtureRequest,
    kafka_kind: Kind,
    fresh_redis: str,
    programs: Programs,
    tmp_path: Path,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "a follower stands still while exits are due (three Kafka nodes)",
        "no exit overtakes an event that the leader has, though nobody can read it yet",
    )
    only_apache(kafka_kind, "the embedded broker has no followers")
    nodes: KafkaCluster = request.getfixturevalue("cluster")

    def run(name: str, without: Sequence[Switch] = ()) -> Proof:
        directory = tmp_path / name
        directory.mkdir()
        case = Case(
            nodes.bootstrap,
            fresh_redis,
            Names.unique(),
            [{"id": "buyers", "event_types": ["buy"], "min_weight": 1.0}],
            {"half_life_s": HALF_LIFE_S, "history_floor": 0.01},
            "wall",
        )
        stage = FaultStage.build(case, programs, directory, partitions=1)
        stage.flush()
        worker = stage.start_faulty("worker", without=without)
        worker.wait_until(lambda: ": claimed, epoch " in worker.log, 60, "at work")
        asyncio.run(hide_an_event(nodes, stage))
        worker.wait_until(lambda: stage.folded() == 4 and not due(stage), 60, "everybody out")
        until_ms = now_ms()
        worker.terminate()
        assert worker.wait(30) == 0, worker.log
        return prove(case, until_ms)

    proof = row.judge(run("judged"))
    assert proof.causes == {"entered event": 1, "exited decay": 1}
    row.control("what only the leader has not asked for", run("control", ["appended"]))


async def hide_an_event(nodes: KafkaCluster, stage: FaultStage) -> None:
    """Let a user enter, and act again shortly before the exit while a follower stands still."""
    log = TopicPartition(stage.case.names.events, 0)
    # Connected before the follower stops: who comes later may knock at its door first.
    async with (
        AIOKafkaProducer(bootstrap_servers=stage.case.kafka, acks="all") as everybody,
        AIOKafkaProducer(bootstrap_servers=stage.case.kafka, acks=1) as leader_only,
        AIOKafkaConsumer(bootstrap_servers=stage.case.kafka, auto_offset_reset="earliest") as consumer,
    ):
        consumer.assign([log])
        await send(everybody, log.topic, "e1")
        await send(everybody, log.topic, "e2")
        await send(leader_only, log.topic, "e3")
        while await consumer.position(log) < 3:
            await consumer.getmany(timeout_ms=100)
        await asyncio.to_thread(wait_until, lambda: stage.folded() == 3, 20, "all three folded")
        exit_ms = due(stage)[USER]
        follower = await asyncio.to_thread(idle_follower, nodes, stage)
        await asyncio.sleep((exit_ms - BEFORE_MS - now_ms()) / 1000)
        os.kill(follower, signal.SIGSTOP)
        try:
            appended_ms = await send(leader_only, log.topic, "e4")
            assert appended_ms < exit_ms, "the event came too late to put the exit off"
            while now_ms() < exit_ms + HIDDEN_MS:
                assert not await consumer.getmany(timeout_ms=100), "the event was not hidden long enough"
        finally:
            os.kill(follower, signal.SIGCONT)


def idle_follower(nodes: KafkaCluster, stage: FaultStage) -> int:
    """Process id of a node that leads neither the log nor the group."""
    busy = {nodes.leaders(stage.case.names.events)[0], nodes.coordinator(stage.case.names.group)}
    return nodes.pid(min(set(nodes.running) - busy))


def due(stage: FaultStage) -> dict[str, int]:
    with redis.Redis.from_url(stage.case.redis_url) as raw:
        client: Any = raw
        return {
            user.decode(): int(score) for user, score in client.zrange("sa:{0}:due", 0, -1, withscores=True)
        }


async def send(producer: AIOKafkaProducer, topic: str, event_id: str) -> int:
    """Append an event of the user; returns its Kafka timestamp."""
    event = {"event_id": event_id, "user_id": USER, "event_type": "buy", "timestamp": time.time()}
    appended = await producer.send_and_wait(topic, json.dumps(event).encode(), key=USER.encode())
    return int(appended.timestamp)


def now_ms() -> int:
    return time.time_ns() // 1_000_000
