"""The 25 published label weights of a product of this kind, reproduced by the oracle and by the core.

`golden_label_weights.json` names its source; its instants are fitted, its weights are as printed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stream_app.core.event import Event, Record
from tests.laws.running import run_records, stored_weights
from tests.oracle import Oracle, OracleRecord, unix_ms
from tests.random_logs import core_segments, core_weights

GOLDEN = json.loads(Path(__file__).with_name("golden_label_weights.json").read_text())
WEIGHTS = {"half_life_s": GOLDEN["half_life_days"] * 86400.0, "history_floor": 1e-3, "event_types": {}}
USERS: list[dict[str, Any]] = GOLDEN["users"]
by_name = pytest.mark.parametrize("user", USERS, ids=[user["user"] for user in USERS])


def records_of(user: dict[str, Any]) -> list[OracleRecord]:
    """Return the user's events in the order of the file (latest first: all but one come late)."""
    return [
        OracleRecord(
            n, unix_ms(user["as_of"]), "u", "rating", unix_ms(e["timestamp"]), f"e{n}", tuple(e["labels"])
        )
        for n, e in enumerate(user["events"])
    ]


def test_there_are_25() -> None:
    assert sum(len(user["label_weights"]) for user in USERS) == 25


@by_name
def test_the_oracle_reproduces_them(user: dict[str, Any]) -> None:
    oracle = Oracle([], WEIGHTS)
    for record in records_of(user):
        oracle.fold(record, "event")
    profile = oracle.users["u"]
    for label, weight in user["label_weights"].items():
        found = oracle.item_weight(profile, ("label", label), unix_ms(user["as_of"]))
        assert found == pytest.approx(weight, abs=GOLDEN["tolerance"]), label


@by_name
@pytest.mark.parametrize("clock", ["wall", "event"])
def test_the_core_reproduces_them(user: dict[str, Any], clock: Any) -> None:
    records = [
        Record(r.offset, r.kafka_time_ms, Event("u", r.event_type, r.event_time_ms, r.event_id, r.labels))
        for r in records_of(user)
    ]
    weights = core_weights(WEIGHTS)
    state = run_records(records, core_segments([], WEIGHTS), weights, clock)
    found = stored_weights(state.profiles["u"], weights, unix_ms(user["as_of"]))
    assert {label for _, kind, label in found if kind == "label"} == set(user["label_weights"])
    for label, weight in user["label_weights"].items():
        assert found["rating", "label", label] == pytest.approx(weight, abs=GOLDEN["tolerance"]), label
