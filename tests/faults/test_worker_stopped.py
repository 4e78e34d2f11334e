"""Workers that stand still for longer than the group waits, or are asked to end while a server is away."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import pytest

from stream_app.app import PARTS, STOP_S
from tests.backends import read_to_end
from tests.e2e.proof import prove
from tests.faults.conftest import Proxied
from tests.faults.faulty import Point, Switch
from tests.faults.rows import Row
from tests.faults.stage import FaultStage
from tests.integration.stage import DRAIN_DEADLINE_S, EXIT_SLACK_S, claims
from tests.processes import Program

pytestmark = pytest.mark.faults

KILLED = -9
HALF = 3_000
IN_TIME = (
    f"the worker ends within worker.drain_deadline_s, {DRAIN_DEADLINE_S:g} s here, and at most 40 s for what "
    "hangs, says why, exits 1; the next one loses nothing"
)
SESSION_TIMEOUT_S = 2.0


def is_standing_still(program: Program) -> bool:
    """Whether a process is stopped by a signal."""
    # The name in brackets may hold anything, the state comes after it.
    return Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def said(stage: FaultStage) -> list[str]:
    """The ids of all that was published so far."""
    names = stage.case.names
    records = asyncio.run(read_to_end(stage.case.kafka, names.entered, names.exited))
    return [json.loads(record.value)["id"] for record in records]


# --- a zombie ----------------------------------------------------------------------------------------------


def taken_over(
    stage: FaultStage, point: Point, *, kill: tuple[Point, int] | None = None, without: Sequence[Switch] = ()
) -> tuple[Program, Program]:
    """Let a worker stand still at a point and another one do all that there is; returns both."""
    stage.fill(HALF, first_seed=1)
    zombie = stage.start_faulty("worker", stop=(point, 3), kill=kill, without=without)
    zombie.wait_until(lambda: is_standing_still(zombie), 60, "standing still")
    ends = stage.log_ends()
    assert stage.watermarks() != ends
    other = stage.start_faulty("worker", without=without)
    other.wait_until(lambda: stage.is_done(ends), 60, "in the zombie's place and done")
    assert is_standing_still(zombie)
    return zombie, other


def went_on(stage: FaultStage, worker: Program) -> None:
    """Let a worker fold the second half of the log, and end."""
    stage.fill(HALF, first_seed=2)
    ends = stage.log_ends()
    worker.wait_until(lambda: stage.is_done(ends), 60, "done with the second half")
    worker.terminate()
    assert worker.wait(DRAIN_DEADLINE_S + EXIT_SLACK_S) == 0, worker.log


@pytest.fixture
def one_partition(
    kafka_bootstrap: str, fresh_redis: str, stage_on: Callable[..., FaultStage]
) -> Callable[..., FaultStage]:
    """Build a stage whose workers have one thing to do at a time, over a Redis with nothing in it."""

    def build(**settings: float) -> FaultStage:
        stage = stage_on(
            kafka_bootstrap,
            fresh_redis,
            partitions=1,
            kafka__session_timeout_s=SESSION_TIMEOUT_S,
            worker__drain_deadline_s=DRAIN_DEADLINE_S,
            **settings,
        )
        stage.flush()
        return stage

    return build


def test_a_zombie_with_a_folded_slice_in_hand_is_fenced(
    one_partition: Callable[..., FaultStage], fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(
        "worker SIGSTOPped past its session, continued before its commit",
        "the zombie is fenced, says nothing, and goes on as a member; nothing lost",
    )
    stage = one_partition()
    zombie, other = taken_over(stage, "after fold")
    before = said(stage)
    zombie.resume()
    zombie.wait_until(lambda: "expected this worker to own the partition" in zombie.log, 30, "fenced")
    other.terminate()
    assert other.wait(DRAIN_DEADLINE_S + EXIT_SLACK_S) == 0, other.log
    zombie.wait_until(lambda: claims(zombie)[0] == 2, 60, "a member again")
    assert said(stage) == before
    went_on(stage, zombie)
    row.judge(prove(stage.case))

    # Nothing kept: a successor that goes by what it keeps may refuse what a zombie has made of Redis.
    control = one_partition(worker__cache_mb=0)
    # Killed at once after the commit that must not be, lest it folds again what it has overwritten.
    zombie, other = taken_over(control, "after fold", kill=("after commit", 1), without=("fence", "mismatch"))
    ahead = control.folded()
    zombie.resume()
    assert zombie.wait(30) == KILLED, zombie.log
    assert control.folded() < ahead, "the zombie's commit was refused"
    went_on(control, other)
    row.control("owner, epoch and commit number not checked", prove(control.case))


def test_a_zombie_with_a_commit_to_publish_only_repeats_what_was_said(
    one_partition: Callable[..., FaultStage], fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(
        "worker SIGSTOPped past its session, continued before its publication",
        "its successor has said it in order; the zombie only repeats ids; nothing lost",
    )
    stage = one_partition()
    zombie, other = taken_over(stage, "after commit")
    before = said(stage)
    zombie.resume()
    other.terminate()
    assert other.wait(DRAIN_DEADLINE_S + EXIT_SLACK_S) == 0, other.log
    zombie.wait_until(lambda: claims(zombie)[0] == 2, 60, "a member again")
    after = said(stage)
    assert set(after) == set(before)
    went_on(stage, zombie)
    row.judge(prove(stage.case))
    row.note(f"the zombie repeated {len(after) - len(before)} messages")

    control = one_partition()
    zombie, other = taken_over(control, "after commit", without=("outbox",))
    zombie.resume()
    other.terminate()
    assert other.wait(DRAIN_DEADLINE_S + EXIT_SLACK_S) == 0, other.log
    zombie.wait_until(lambda: claims(zombie)[0] == 2, 60, "a member again")
    went_on(control, zombie)
    row.control("outbox off", prove(control.case))


# --- asked to end ------------------------------------------------------------------------------------------

How = Literal["refuse", "blackhole"]
WORDS: Final[dict[How, str]] = {"refuse": "refuses", "blackhole": "does not answer"}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a worker ended: with which status, after how long, with which last words, and how much undone."""

    status: int
    seconds: float
    last: str
    left: int

    def in_time(self, row: Row) -> None:
        """Fail unless it said why and did not say that all was well."""
        assert self.left > 0, "it was done before the server was gone: nothing was tested"
        assert self.status == 1, self
        assert "Operator action: " in self.last
        row.note(f"exited 1 after {self.seconds:.1f} s: {self.last.partition(' Operator action')[0]}")


def end_without(proxied: Proxied, stage: FaultStage, how: How, without: Sequence[Switch] = ()) -> Ended:
    """SIGTERM for a worker in the middle of the log with a server away; afterwards the server is back."""
    total = stage.fill()
    worker = stage.start_faulty("worker", without=without)
    worker.wait_until(lambda: stage.folded() > 500, 60, "at work")
    if how == "refuse":
        proxied.proxy.refuse()
        worker.wait_until(lambda: "held, " in worker.log, 60, "held")
    else:
        # Not waited for: it is told to end with its question in the air.
        proxied.proxy.blackhole()
    asked_s = time.monotonic()
    worker.terminate()
    status = worker.wait(DRAIN_DEADLINE_S + PARTS * STOP_S + EXIT_SLACK_S)
    seconds = time.monotonic() - asked_s
    proxied.proxy.heal()
    return Ended(status, seconds, worker.log.strip().splitlines()[-1], total - stage.folded())


@pytest.mark.parametrize("how", WORDS)
def test_sigterm_while_redis_is_away_ends_the_worker_and_the_next_one_loses_nothing(
    how: How,
    kafka_bootstrap: str,
    proxied_redis: Proxied,
    stage_on: Callable[..., FaultStage],
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        f"SIGTERM while Redis {WORDS[how]}",
        IN_TIME,
    )
    stage = stage_on(
        kafka_bootstrap,
        f"redis://{proxied_redis.proxy.address}/0",
        worker__drain_deadline_s=DRAIN_DEADLINE_S,
    )
    end_without(proxied_redis, stage, how).in_time(row)
    stage.run("worker", "--until-end")
    row.judge(prove(stage.case))
    row.note("no control: nothing is published that Redis has not taken, so nothing can be lost here")


@pytest.mark.parametrize("how", WORDS)
def test_sigterm_while_kafka_is_away_ends_the_worker_and_the_next_one_loses_nothing(
    how: How,
    fresh_redis: str,
    proxied_kafka: Proxied,
    stage_on: Callable[..., FaultStage],
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        f"SIGTERM while Kafka {WORDS[how]}",
        IN_TIME,
    )

    def build() -> FaultStage:
        return stage_on(proxied_kafka.proxy.address, fresh_redis, worker__drain_deadline_s=DRAIN_DEADLINE_S)

    stage = build()
    end_without(proxied_kafka, stage, how).in_time(row)
    stage.run("worker", "--until-end")
    row.judge(prove(stage.case))

    if how == "blackhole":
        row.note("control: as where Kafka refuses")
        return
    control = build()
    control.flush()
    end_without(proxied_kafka, control, how, without=("retries", "hold"))
    control.run("worker", "--until-end")
    row.control("a message that failed counts as published", prove(control.case))


def test_sigterm_ends_a_worker_of_which_a_part_hangs(
    kafka_bootstrap: str,
    fresh_redis: str,
    stage_on: Callable[..., FaultStage],
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "SIGTERM while Faust hangs, and the event loop with it",
        IN_TIME,
    )
    stage = stage_on(kafka_bootstrap, fresh_redis, worker__drain_deadline_s=DRAIN_DEADLINE_S)
    total = stage.fill()
    worker = stage.start_faulty("worker", without=("stop",))
    worker.wait_until(lambda: stage.folded() > 500, 60, "at work")
    asked_s = time.monotonic()
    worker.terminate()
    status = worker.wait(DRAIN_DEADLINE_S + PARTS * STOP_S + EXIT_SLACK_S)
    last = worker.log.strip().splitlines()[-1]
    Ended(status, time.monotonic() - asked_s, last, total - stage.folded()).in_time(row)
    assert "a part of the worker that hangs" in last
    stage.run("worker", "--until-end")
    row.judge(prove(stage.case))
    row.note("no control: what is checked is that it ends")
