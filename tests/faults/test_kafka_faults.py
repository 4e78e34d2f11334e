"""Brokers that are killed, a coordinator that moves, topics that do not answer or are changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from stream_app.embedded import run_server
from tests.backends import Kind, Names, apache_kafka, create_topic
from tests.e2e.proof import prove
from tests.faults.conftest import Proxied, only_apache
from tests.faults.faulty import Switch
from tests.faults.kafka_cluster import kafka_cluster
from tests.faults.rows import Row, seed
from tests.faults.stage import FaultStage, fault_log
from tests.integration.stage import PARTITIONS, kill_server, probe
from tests.processes import Program

pytestmark = pytest.mark.faults

#: Enough that a worker is still at it when something is done to its broker.
EVENTS: Final = 12_000
AT_WORK: Final = 1_000
DONE_WITHIN_S: Final = 120.0
OUTAGE_S: Final = 60.0
#: Longer than a client waits for a partition without a leader before it gives its messages up.
LEADERLESS_S: Final = 30.0
#: What tells a request with messages of the worker's from all others.
IN_MESSAGES: Final = b"ce_id"
#: A message is then lost when its request is, and nothing but the outbox brings it back.
NOTHING_SENT_AGAIN: Final[Sequence[Switch]] = ("outbox", "retries")


def at_work(stage: FaultStage, worker: Program, records: int = AT_WORK) -> None:
    """Wait until a worker has folded so many records."""
    worker.wait_until(lambda: stage.folded() > records, 60, f"past {records} records")


def ended(worker: Program) -> None:
    """Wait until a worker with ``--until-end`` has reached it."""
    assert worker.wait(DONE_WITHIN_S) == 0, worker.log


# --- brokers -----------------------------------------------------------------------------------------------


def test_a_broker_that_is_killed_and_started_again(
    kafka_kind: Kind,
    fresh_redis: str,
    stage_on: Callable[..., FaultStage],
    tmp_path: Path,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row("Kafka broker SIGKILLed and started again in mid-run", "nothing lost, order kept")
    only_apache(
        kafka_kind, "the embedded broker keeps nothing; started again it is another cluster and is refused"
    )
    row.note(
        "acks=all on one node: acknowledged is in one machine's page cache, which outlives the process and "
        "not a power cut"
    )
    program = apache_kafka(data=tmp_path / "kafka")
    with ExitStack() as stack:
        broker = stack.enter_context(run_server(program))

        def killed(without: Sequence[Switch]) -> FaultStage:
            stage = stage_on(broker.address, fresh_redis)
            total = stage.fill(EVENTS)
            worker = stage.start_faulty("worker", "--until-end", without=without)
            at_work(stage, worker)
            kill_server(broker)
            assert stage.folded() < total, "the worker was done before"
            began_s = time.monotonic()
            stack.enter_context(run_server(program, broker.port))
            row.note(f"away for {time.monotonic() - began_s:.0f} s")
            ended(worker)
            return stage

        stage = killed([])
        row.judge(prove(stage.case))
        stage.flush()
        broker = stack.enter_context(run_server(program := apache_kafka(data=tmp_path / "another")))
        row.control(_off(NOTHING_SENT_AGAIN), prove(killed(NOTHING_SENT_AGAIN).case))


def _off(without: Sequence[Switch]) -> str:
    return f"{' and '.join(without)} off"


def test_the_groups_coordinator_is_killed(
    kafka_kind: Kind,
    fresh_redis: str,
    stage_on: Callable[..., FaultStage],
    tmp_path: Path,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "the node that is the group's coordinator SIGKILLed, of three",
        "nothing lost, order kept; the worker follows coordinator and leaders",
    )
    only_apache(kafka_kind, "the embedded broker is one node")
    with kafka_cluster(tmp_path / "cluster") as cluster:

        def killed(without: Sequence[Switch]) -> FaultStage:
            stage = stage_on(cluster.bootstrap, fresh_redis)
            group, entered = stage.case.names.group, stage.case.names.entered
            total = stage.fill(EVENTS)
            worker = stage.start_faulty("worker", "--until-end", without=without)
            at_work(stage, worker)
            node, led = cluster.coordinator(group), cluster.leaders(entered)
            cluster.kill(node)
            assert stage.folded() < total, "the worker was done before"
            ended(worker)
            assert cluster.coordinator(group) != node
            moved = [p for p, leader in cluster.leaders(entered).items() if leader != led[p]]
            assert moved, "no leader moved"
            cluster.start(node)
            return stage

        stage = killed([])
        row.judge(prove(stage.case))
        stage.flush()
        row.control(_off(NOTHING_SENT_AGAIN), prove(killed(NOTHING_SENT_AGAIN).case))


def test_the_leader_of_an_output_partition_is_away(
    kafka_kind: Kind,
    fresh_redis: str,
    stage_on: Callable[..., FaultStage],
    tmp_path: Path,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        f"output partitions without a leader for {LEADERLESS_S:.0f} s",
        "nothing lost, order kept; the worker goes on by itself",
    )
    only_apache(kafka_kind, "the embedded broker is one node")
    with kafka_cluster(tmp_path / "cluster") as cluster:

        def leaderless(seconds: float, without: Sequence[Switch]) -> FaultStage:
            names = Names.unique()
            for topic in (names.entered, names.exited):  # on one node each partition; the rest is on all
                asyncio.run(create_topic(cluster.bootstrap, topic, PARTITIONS))
            stage = stage_on(cluster.bootstrap, fresh_redis, names)
            stage.fill(EVENTS)
            worker = stage.start_faulty("worker", "--until-end", without=without, worker__hold_deadline_s=120)
            at_work(stage, worker)
            node = cluster.leaders(names.entered)[0]
            cluster.kill(node)
            worker.wait_until(lambda: cluster.leaders(names.entered)[0] == -1, 30, "without a leader")
            time.sleep(seconds)
            cluster.start(node)
            ended(worker)
            return stage

        stage = leaderless(LEADERLESS_S, [])
        row.judge(prove(stage.case))
        stage.flush()
        row.control(_off(NOTHING_SENT_AGAIN), prove(leaderless(0.0, NOTHING_SENT_AGAIN).case))


# --- topics ------------------------------------------------------------------------------------------------


def test_an_output_topic_that_is_unavailable_for_a_minute_is_waited_for(
    proxied_kafka: Proxied,
    fresh_redis: str,
    stage_on: Callable[..., FaultStage],
    port: int,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "output topic unavailable for a minute: nothing is answered",
        "nothing lost, order kept; unready meanwhile, alive, goes on by itself",
    )
    proxy = proxied_kafka.proxy

    def begun(without: Sequence[Switch], held: int) -> tuple[FaultStage, Program]:
        """Start a worker and let the topic be gone for it; returns when so many partitions are held."""
        stage = stage_on(proxy.address, fresh_redis, worker__http_port=port)
        stage.fill(EVENTS)
        worker = stage.start_faulty("worker", without=without, worker__hold_deadline_s=2 * OUTAGE_S)
        at_work(stage, worker)
        topic = stage.case.names.entered.encode()
        proxy.stick(lambda request: topic in request and IN_MESSAGES in request)
        worker.wait_until(lambda: probe(port, "readyz")[1].count("is held: Kafka") >= held, 30, "held")
        return stage, worker

    def done(stage: FaultStage, worker: Program) -> None:
        ends = stage.log_ends()
        worker.wait_until(lambda: stage.is_done(ends), DONE_WITHIN_S, "done")
        worker.terminate()
        assert worker.wait(DONE_WITHIN_S) == 0, worker.log

    stage, worker = begun([], held=PARTITIONS)
    began_s = time.monotonic()
    stood_at = stage.folded()
    while time.monotonic() < began_s + OUTAGE_S:
        assert probe(port, "livez") == (200, "ok\n"), worker.log
        assert probe(port, "readyz")[0] == 503, worker.log
        time.sleep(0.2)
    assert stage.folded() == stood_at, "a commit came after one that was not published"
    assert proxy.stuck, "what was to be published went another way"
    proxy.heal()
    over_s = time.monotonic()
    done(stage, worker)
    row.note(f"done {time.monotonic() - over_s:.0f} s after it was over")
    row.judge(prove(stage.case))
    stage.flush()
    stage, worker = begun(NOTHING_SENT_AGAIN, held=1)
    proxy.heal()
    done(stage, worker)
    row.control(_off(NOTHING_SENT_AGAIN), prove(stage.case))


def test_partitions_added_to_the_events_stop_the_worker(
    stage: FaultStage, kafka_kind: Kind, fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(
        "a partition added to the events topic under a running worker",
        "stops with a sentence, folds nothing of it; a rebuild folds the log as it is",
    )
    only_apache(kafka_kind, "the embedded broker adds no partitions to a topic")
    records = list(fault_log(seed(), EVENTS))
    stage.append(records[: EVENTS // 2])
    ends = stage.log_ends()
    worker = stage.start("worker")
    worker.wait_until(lambda: stage.is_done(ends), 60, "done with the first half")
    asyncio.run(_add_partition(stage))
    began_s = time.monotonic()
    stage.append(records[EVENTS // 2 :])
    assert stage.log_ends()[PARTITIONS] > 0, "nobody has moved"
    assert worker.wait(60) == 1, worker.log
    row.note(f"stopped after {time.monotonic() - began_s:.0f} s")
    last = worker.log.strip().splitlines()[-1]
    assert f"expected {PARTITIONS} partitions, as when the worker started" in last
    assert "Operator action: Users have moved to other partitions" in last
    assert stage.wm(PARTITIONS) == {}
    refused = stage.run("worker", "--until-end", status=1)
    assert f"expected state of partitions {PARTITIONS + 1}, got state of partitions {PARTITIONS}" in refused
    stage.run("rebuild", "--yes")
    stage.run("worker", "--until-end")
    proof = prove(stage.case)
    assert proof.missing == proof.extra == proof.wrong == proof.state == [], proof
    # What is in two partitions has no order: a user who has moved begins anew, his old history decays.
    row.note(f"{len(proof.out_of_order)} transitions of users who moved are not in the order of their times")


async def _add_partition(stage: FaultStage) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=stage.case.kafka)
    await admin.start()
    try:
        await admin.create_partitions({stage.case.names.events: NewPartitions(PARTITIONS + 1)})
    finally:
        await admin.close()
