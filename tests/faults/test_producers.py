"""Producers that send again what they have sent, and late."""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Callable
from typing import Final

import pytest

from tests import oracle
from tests.e2e import proof as e2e_proof
from tests.e2e.proof import prove
from tests.faults.rows import Row, seed
from tests.faults.stage import FaultStage
from tests.integration.stage import synthetic_events

pytestmark = pytest.mark.faults

EVENTS: Final = 6_000
#: Events of all users among which a repeated one is chosen; far fewer than 32 of each user.
RECENT: Final = 2_000


def test_what_producers_send_again_and_late_counts_once_and_at_its_own_time(
    stage: FaultStage, monkeypatch: pytest.MonkeyPatch, fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(
        "producers send one event in five again, and one in four up to 5 h late",
        "an event counts once and at its own time; a late one lets nobody in falsely",
    )
    rng = random.Random(seed())
    recent: deque[tuple[bytes, bytes]] = deque(maxlen=RECENT)
    records, again, late = [], 0, 0
    for event in synthetic_events(seed(), EVENTS, users=200):
        if rng.random() < 0.25:
            event = {**event, "timestamp": event["timestamp"] - rng.uniform(1.0, 18_000.0)}
            late += 1
        recent.append((event["user_id"].encode(), json.dumps(event).encode()))
        records.append(recent[-1])
        if rng.random() < 0.2:
            records.append(rng.choice(recent))
            again += 1
    stage.append(records)
    stage.run("worker", "--until-end")
    row.judge(prove(stage.case))
    row.note(f"{again:,} events sent again, {late:,} late")

    monkeypatch.setattr(e2e_proof, "_KNOWN", {})
    monkeypatch.setattr(oracle, "REMEMBERED_IDS", -1)  # the list from its second place on: nothing
    row.control("an oracle that counts what was sent again", prove(stage.case))
