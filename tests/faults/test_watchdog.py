"""The probes of a worker: each fault turns the right one within 10 s, and nothing else does.

What is checked in place of a control: before and after the fault the probes are green, the other probe is
green all the while, and a worker that is well is never called ill.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from aiokafka import AIOKafkaProducer

from stream_app.embedded import Server
from tests.backends import Kind
from tests.e2e.proof import prove
from tests.faults import wedged
from tests.faults.conftest import Proxied
from tests.faults.rows import Row, seed
from tests.faults.stage import FaultStage
from tests.integration.stage import probe, synthetic_events
from tests.processes import Program

pytestmark = pytest.mark.faults

Rows = Callable[[str, str], Row]
Stages = Callable[..., FaultStage]

#: What README promises of the probes.
TURNED_WITHIN_S: Final = 10.0
#: Longer than the watchdog's patience and its looks together: what has not turned by then does not turn.
WATCHED_S: Final = 15.0
#: A group that was left without its coordinator has to be joined again.
WELL_AGAIN_S: Final = 60.0
EVENTS: Final = 2_000
RESTARTED = "a worker that Kafka's group does not reach is reported dead within 10 s"
UNREADY = "without Redis a worker is unready within 10 s, and not killed for it"


@dataclass(frozen=True, slots=True)
class Watched:
    """A worker at the end of its log, with its probes."""

    stage: FaultStage
    worker: Program
    port: int

    def answers(self) -> tuple[int, int]:
        """Status of livez and of readyz; 0 for no answer."""
        return probe(self.port, "livez")[0], probe(self.port, "readyz")[0]

    def wait_for(self, livez: int, readyz: int | None, within_s: float, what: str) -> float:
        """Wait until the probes say that, any `readyz` if None; returns after how many seconds."""
        began_s = time.monotonic()
        wanted = {(livez, readyz)} if readyz is not None else {(livez, 200), (livez, 503)}
        self.worker.wait_until(lambda: self.answers() in wanted, within_s, what)
        return time.monotonic() - began_s

    def stays(self, livez: int, readyz: int, for_s: float) -> int:
        """Fail unless the probes say that for some seconds; returns how often they were asked."""
        asked, until_s = 0, time.monotonic() + for_s
        while time.monotonic() < until_s:
            assert self.answers() == (livez, readyz), self.why()
            asked += 1
            time.sleep(0.1)
        return asked

    def why(self) -> str:
        """What the probes say in words."""
        return f"livez: {probe(self.port, 'livez')}, readyz: {probe(self.port, 'readyz')}"

    def goes_on(self, row: Row) -> None:
        """Fail unless the worker folds more events, and all is as it should be in the end."""
        self.stage.fill(EVENTS // 2, first_seed=seed() + 1)
        ends = self.stage.log_ends()
        self.worker.wait_until(lambda: self.stage.is_done(ends), 60, "done")
        # One that broke meanwhile may be found only now: a connection of the bad time, say.
        self.wait_for(200, 200, 10, "well in the end")
        self.worker.terminate()
        assert self.worker.wait(30) == 0, self.worker.log
        row.judge(prove(self.stage.case))


def watched(stage: FaultStage, port: int, module: str = "stream_app") -> Watched:
    """Let a worker fold a log, and wait until it is well."""
    stage.fill(EVENTS)
    ends = stage.log_ends()
    environment = {**stage.environment, "STREAM_APP__WORKER__HTTP_PORT": str(port)}
    worker = stage.programs.start("worker", *stage.options, environment=environment, module=module)
    found = Watched(stage, worker, port)
    worker.wait_until(lambda: probe(port, "livez")[0] != 0, 60, "answering")
    assert found.answers()[0] == 200, "it is alive while it joins the group"
    worker.wait_until(lambda: stage.is_done(ends), 60, "done")
    found.wait_for(200, 200, 10, "well")
    return found


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Let a server stand still; it does not know it."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# --- a coordinator that is dead ----------------------------------------------------------------------------


def test_a_broker_that_stands_still_turns_livez(
    kafka_server: Callable[..., Server], fresh_redis: str, stage_on: Stages, port: int, fault_row: Rows
) -> None:
    row = fault_row("Kafka's broker stands still (SIGSTOP)", RESTARTED)
    broker = kafka_server()
    seen = watched(stage_on(broker.address, fresh_redis), port)
    with stopped(broker.pid):
        turned_s = seen.wait_for(503, None, TURNED_WITHIN_S, "livez 503")
        assert "no group coordinator" in probe(port, "livez")[1]
    well_s = seen.wait_for(200, 200, WELL_AGAIN_S, "well again")
    row.note(f"livez 503 after {turned_s:.1f} s, 200 again {well_s:.1f} s after the broker went on")
    seen.goes_on(row)


def test_a_broker_behind_a_network_that_swallows_all_turns_livez(
    proxied_kafka: Proxied, fresh_redis: str, stage_on: Stages, port: int, fault_row: Rows
) -> None:
    row = fault_row("the network to Kafka swallows everything", RESTARTED)
    seen = watched(stage_on(proxied_kafka.proxy.address, fresh_redis), port)
    proxied_kafka.proxy.blackhole()
    turned_s = seen.wait_for(503, None, TURNED_WITHIN_S, "livez 503")
    assert "no group coordinator" in probe(port, "livez")[1]
    proxied_kafka.proxy.heal()
    well_s = seen.wait_for(200, 200, WELL_AGAIN_S, "well again")
    row.note(f"livez 503 after {turned_s:.1f} s, 200 again after {well_s:.1f} s")
    seen.goes_on(row)


def test_a_task_for_the_coordinator_that_has_ended_turns_livez(
    stage: FaultStage, port: int, fault_row: Rows
) -> None:
    row = fault_row("the client's own coordinator task has ended", RESTARTED)
    seen = watched(stage, port, "tests.faults.wedged")
    seen.worker.process.send_signal(wedged.END_COORDINATION)
    turned_s = seen.wait_for(503, None, TURNED_WITHIN_S, "livez 503")
    assert "no group coordinator" in probe(port, "livez")[1]
    row.note(f"livez 503 after {turned_s:.1f} s; a restart is the cure, and the next worker went on")
    seen.worker.kill()
    stage.run("worker", "--until-end")
    row.judge(prove(stage.case))


# --- a partition that is stuck -----------------------------------------------------------------------------


def test_a_partition_that_is_stuck_turns_livez(stage: FaultStage, port: int, fault_row: Rows) -> None:
    row = fault_row(
        "a partition's task waits for ever between two steps",
        "a partition with records to read that stands still is reported within 10 s",
    )
    seen = watched(stage, port, "tests.faults.wedged")
    seen.worker.process.send_signal(wedged.WEDGE)
    stage.fill(EVENTS // 4, first_seed=seed() + 2)
    before = stage.watermarks()
    turned_s = seen.wait_for(503, 200, TURNED_WITHIN_S, "livez 503")
    assert "has records to read and stands still" in probe(port, "livez")[1]
    assert stage.watermarks() == before
    seen.worker.process.send_signal(wedged.WEDGE)
    well_s = seen.wait_for(200, 200, 10, "well again")
    row.note(f"livez 503 after {turned_s:.1f} s, 200 again {well_s:.1f} s after it went on")
    seen.goes_on(row)


# --- a Redis that cannot be reached ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["blackhole", "refuse"])
def test_a_redis_that_cannot_be_reached_turns_readyz_and_only_that(
    how: str,
    proxied_redis: Proxied,
    kafka_bootstrap: str,
    stage_on: Stages,
    port: int,
    fault_row: Rows,
) -> None:
    said = {"blackhole": "the network to Redis swallows everything", "refuse": "Redis refuses connections"}
    row = fault_row(said[how], UNREADY)
    stage = stage_on(kafka_bootstrap, f"redis://{proxied_redis.proxy.address}/0")
    seen = watched(stage, port)
    {"blackhole": proxied_redis.proxy.blackhole, "refuse": proxied_redis.proxy.refuse}[how]()
    turned_s = seen.wait_for(200, 503, TURNED_WITHIN_S, "readyz 503")
    assert "is held: Redis" in probe(port, "readyz")[1]
    seen.stays(200, 503, WATCHED_S - turned_s)
    proxied_redis.proxy.heal()
    well_s = seen.wait_for(200, 200, WELL_AGAIN_S, "well again")
    row.note(f"readyz 503 after {turned_s:.1f} s, 200 again after {well_s:.1f} s; livez 200 all the while")
    seen.goes_on(row)


# --- a worker that does not answer -------------------------------------------------------------------------


def test_a_worker_that_stands_still_does_not_answer(stage: FaultStage, port: int, fault_row: Rows) -> None:
    row = fault_row(
        "the worker itself stands still (SIGSTOP)", "a worker that does not run does not say that it is well"
    )
    seen = watched(stage, port)
    seen.worker.pause()
    assert seen.answers() == (0, 0)
    seen.worker.resume()
    well_s = seen.wait_for(200, 200, WELL_AGAIN_S, "well again")
    row.note(f"no answer within 5 s; 200 again {well_s:.1f} s after it went on")
    seen.goes_on(row)


# --- no false alarm ----------------------------------------------------------------------------------------


def test_a_worker_that_is_well_is_never_called_ill(
    stage: FaultStage, port: int, tmp_path: Path, fault_row: Rows
) -> None:
    row = fault_row("a healthy worker under load for 15 s", "no false alarm: the probes stay green")
    seen = watched(stage, port)
    path = tmp_path / "load.jsonl"
    with path.open("w") as lines:
        for event in synthetic_events(seed() + 3, 30_000, users=400, step_s=0.1):
            lines.write(json.dumps(event) + "\n")
    before = stage.folded()
    feeder = stage.start("replay", str(path), "--rate", "1500")
    asked = seen.stays(200, 200, WATCHED_S)
    folded = stage.folded() - before
    assert folded > 5_000, "there was no load"
    feeder.kill()
    row.note(f"asked {asked} times while {folded:,} events were folded")
    seen.worker.terminate()
    assert seen.worker.wait(30) == 0, seen.worker.log


def test_a_transaction_that_a_producer_leaves_open_is_no_fault_of_the_worker(
    stage: FaultStage, port: int, kafka_kind: Kind, fault_row: Rows
) -> None:
    row = fault_row(
        "a producer leaves its transaction open for 15 s", "what cannot be read yet raises no alarm"
    )
    if kafka_kind == "embedded":
        pytest.skip("the embedded broker has no transactions")
    seen = watched(stage, port)

    async def hold_open() -> None:
        async with (
            AIOKafkaProducer(
                bootstrap_servers=stage.case.kafka, transactional_id=f"{stage.case.names.group}-open"
            ) as producer,
            producer.transaction(),
        ):
            for event in synthetic_events(seed() + 4, 50):
                key = event["user_id"].encode()
                await producer.send(stage.case.names.events, json.dumps(event).encode(), key=key)
            await producer.flush()
            await asyncio.to_thread(seen.stays, 200, 200, WATCHED_S)

    before = stage.folded()
    asyncio.run(hold_open())
    ends = stage.log_ends()
    seen.worker.wait_until(lambda: stage.is_done(ends), 30, "done")
    assert stage.folded() > before + 50, "the transaction was in the log"
    seen.goes_on(row)
