"""`stream-app worker --processes`: several workers under one command, with one end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.backends import Names
from tests.e2e.proof import Case
from tests.integration.stage import (
    DRAIN_DEADLINE_S,
    EVENTS,
    EXIT_SLACK_S,
    PARTITIONS,
    SEED,
    Stage,
    event_clock_case,
    synthetic_events,
)
from tests.processes import Program, Programs


@pytest.fixture
def case(kafka_bootstrap: str, fresh_redis: str, names: Names) -> Case:
    return event_clock_case(kafka_bootstrap, fresh_redis, names)


@pytest.fixture
def stage(case: Case, programs: Programs, tmp_path: Path) -> Stage:
    return Stage.build(case, programs, tmp_path, worker__drain_deadline_s=DRAIN_DEADLINE_S)


def owners(stage: Stage) -> set[str]:
    """Who holds the partitions."""
    return {stage.wm(p).get("owner", "") for p in range(PARTITIONS)} - {""}


def state_and_parent(pid: int) -> tuple[str, int]:
    """What the kernel says of a process; of one that is gone, that it is dead."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "X", 0
    return state, int(parent)


def children(program: Program) -> list[int]:
    """Process ids of what a program has started."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if state_and_parent(pid)[1] == program.pid]


def is_running(pid: int) -> bool:
    return state_and_parent(pid)[0] not in "XZ"


def test_two_processes_share_a_log_and_end_at_its_end_as_the_oracle_has_it(
    stage: Stage, record_property: Callable[[str, object], None]
) -> None:
    stage.send(synthetic_events(SEED, EVENTS))
    stage.run("worker", "--processes", "2", "--until-end", timeout_s=120)
    stage.proven(record_property)


def test_sigterm_ends_all_of_them_well(stage: Stage) -> None:
    worker = stage.start("worker", "--processes", "2")
    worker.wait_until(lambda: len(owners(stage)) == 2, 60, "shared by two")
    pids = children(worker)
    assert len(pids) == 2
    worker.terminate()
    assert worker.wait(DRAIN_DEADLINE_S + EXIT_SLACK_S) == 0, worker.log
    assert not any(map(is_running, pids))


def test_when_one_is_killed_the_others_are_ended_and_the_command_fails(stage: Stage) -> None:
    worker = stage.start("worker", "--processes", "2")
    worker.wait_until(lambda: len(owners(stage)) == 2, 60, "shared by two")
    first, second = children(worker)
    os.kill(first, signal.SIGKILL)
    assert worker.wait(DRAIN_DEADLINE_S + EXIT_SLACK_S) == 1, worker.log
    assert not is_running(second)


def test_what_a_worker_refuses_is_the_exit_code_of_all(stage: Stage) -> None:
    said = stage.run("worker", "--processes", "2", status=1, redis__url="redis://127.0.0.1:1/0")
    assert "Redis" in said
