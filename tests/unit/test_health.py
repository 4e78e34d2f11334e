"""A worker whom the group gives nothing says so; what the probes answer is tested on real servers."""

from __future__ import annotations

from typing import Any, cast

import pytest

from stream_app.adapters.assignment import Assignment
from stream_app.adapters.health import UNASSIGNED_S, Health


def test_a_worker_without_any_assignment_says_so_each_time_that_it_has_waited(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = 0.0
    assignment = Assignment()
    nothing = cast("Any", None)
    health = Health(assignment, nothing, nothing, nothing, lambda: now_s)
    said = []
    for step in range(1, 5):
        now_s = step * (UNASSIGNED_S / 2 + 1)
        health.tell_if_unassigned()
        said.append(len(caplog.records))
    assert said == [0, 1, 1, 2]
    assert "start the services anew" in caplog.text
    assignment.assigned(frozenset())
    now_s *= 10
    health.tell_if_unassigned()
    assert len(caplog.records) == 2
