"""A worker that is killed at every point between reading a record and acknowledging it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e.proof import prove
from tests.faults.faulty import POINTS, Point
from tests.faults.rows import Row
from tests.faults.stage import FaultStage

pytestmark = pytest.mark.faults

KILLED = -9


@pytest.mark.parametrize("point", [point for point in POINTS if point != "during rebalance"])
def test_a_worker_killed_at_a_point_loses_nothing(
    point: Point, stage: FaultStage, fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(f"worker killed {point}", "nothing lost, nothing twice, in order")
    total = stage.fill()
    for count in (1, 3):
        worker = stage.start_faulty("worker", kill=(point, count))
        assert worker.wait(60) == KILLED, worker.log
    assert stage.folded() < total
    stage.run("worker", "--until-end")
    row.judge(prove(stage.case))
