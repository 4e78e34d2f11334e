"""Thousands of broken records among good ones, through the real worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.backends import Names, create_topic
from tests.e2e.proof import prove
from tests.faults.rows import Row, seed
from tests.faults.stage import FaultStage, fault_log
from tests.integration.bad_records import LIMITS, Sent, bad_records, check_set_aside
from tests.integration.stage import Stage, event_clock_case
from tests.poison import mutated_records
from tests.processes import Programs

pytestmark = pytest.mark.faults

MUTATED: Final = 12_000


def test_every_one_of_thousands_of_mutated_records_is_set_aside_once(
    kafka_bootstrap: str,
    fresh_redis: str,
    names: Names,
    programs: Programs,
    tmp_path: Path,
    stage_on: Callable[..., FaultStage],
    monkeypatch: pytest.MonkeyPatch,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        f"{MUTATED:,} mutated records from a seeded fuzzer among good ones",
        "each bad record is set aside once, no crash, all else as if it were not there",
    )
    control = stage_on(kafka_bootstrap, fresh_redis)
    control.append([(key, value[:-1]) for key, value in fault_log(seed(), 500)])
    control.lose_what_a_worker_publishes(1)
    proof = prove(control.case)
    assert any("dead letter" in missing for missing in proof.missing)
    row.control("outbox off, killed after a commit", proof)
    control.flush()

    asyncio.run(create_topic(kafka_bootstrap, names.events, partitions=3, config=LIMITS))
    stage = Stage.build(event_clock_case(kafka_bootstrap, fresh_redis, names), programs, tmp_path)
    bad = [*bad_records(seed()), *(Sent(*poison, "") for poison in mutated_records(seed(), MUTATED))]
    proof = row.judge(check_set_aside(stage, seed(), bad, monkeypatch))
    assert proof.dead_letters == len(bad)
    assert proof.repeats == 0
