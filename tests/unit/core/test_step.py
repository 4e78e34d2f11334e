"""Slices of a partition: stream time, clocks, what has changed, and profiles of other definitions."""

from typing import Literal

import pytest

from stream_app.core.decay import Weights
from stream_app.core.event import Event, Record
from stream_app.core.fold import Fold
from stream_app.core.profile import Profile
from stream_app.core.segment import Segment
from stream_app.core.segment_set import SegmentSet
from stream_app.core.step import StepResult, fold_slice

WEIGHTS = Weights(half_life_s=1_000)
SEGMENTS = SegmentSet([Segment("swim", labels=("swimwear",), min_weight=0.5)], WEIGHTS)
FOLD = Fold(SEGMENTS, WEIGHTS)


def record(
    offset: int, event_time_ms: int, kafka_time_ms: int, user_id: str = "u1", name: str = ""
) -> Record:
    event = Event(user_id, "view", event_time_ms, name or f"e-{offset}", ("swimwear",))
    return Record(offset, kafka_time_ms, event)


def folded(
    records: list[Record],
    profiles: dict[str, Profile] | None = None,
    stream_time_ms: int | None = None,
    clock: Literal["wall", "event"] = "event",
) -> StepResult:
    return fold_slice(FOLD, records, {} if profiles is None else profiles, stream_time_ms, clock, {})


def test_an_empty_slice_changes_nothing() -> None:
    assert folded([]) == StepResult({}, [], None, [])
    assert folded([], stream_time_ms=7) == StepResult({}, [], 7, [])


@pytest.mark.parametrize(("clock", "stream_time_ms"), [("event", 100), ("wall", 900)])
def test_the_clock_says_which_of_the_two_instants_is_a_records(
    clock: Literal["wall", "event"], stream_time_ms: int
) -> None:
    result = folded([record(0, 100, 900), record(1, 50, 800)], clock=clock)
    assert result.stream_time_ms == stream_time_ms
    assert [t.time_ms for t in result.transitions] == [stream_time_ms]


def test_stream_time_never_goes_back() -> None:
    result = folded([record(0, 100, 0)], stream_time_ms=500)
    assert result.stream_time_ms == 500
    assert result.transitions[0].time_ms == 500


def test_stream_time_is_the_partitions_and_not_the_users() -> None:
    result = folded([record(0, 700, 0, "u1"), record(1, 100, 0, "u2")])
    assert [(t.user_id, t.time_ms, t.offset) for t in result.transitions] == [("u1", 700, 0), ("u2", 700, 1)]


def test_transitions_are_in_the_order_of_the_log() -> None:
    result = folded([record(i, i * 2_000_000, 0, f"u{i % 2}") for i in range(4)])
    assert [(t.user_id, t.status, t.time_ms) for t in result.transitions] == [
        ("u0", "entered", 0),
        ("u1", "entered", 2_000_000),
        ("u0", "exited", 1_000_000),
        ("u0", "entered", 4_000_000),
        ("u1", "exited", 3_000_000),
        ("u1", "entered", 6_000_000),
    ]


def test_a_profile_that_only_met_a_duplicate_has_not_changed() -> None:
    first = folded([record(0, 100, 0, "u1", "same"), record(1, 100, 0, "u2")])
    assert first.profiles.keys() == {"u1", "u2"}
    again = folded([record(2, 100, 0, "u1", "same")], first.profiles, first.stream_time_ms)
    assert again.profiles == {}


def test_a_duplicate_that_reveals_an_exit_changes_the_profile() -> None:
    first = folded([record(0, 100, 0, name="same")])
    again = folded([record(2, 2_000_000, 0, name="same")], first.profiles, first.stream_time_ms)
    assert [t.status for t in again.transitions] == ["exited"]
    assert again.profiles.keys() == {"u1"}


def test_other_slices_give_the_same_transitions() -> None:
    records = [record(i, i * 37 % 90 * 90_000, 0, f"u{i % 3}") for i in range(200)]
    whole = folded(records)
    for size in (1, 7):
        profiles: dict[str, Profile] = {}
        transitions = []
        stream_time_ms = None
        for start in range(0, len(records), size):
            result = folded(records[start : start + size], profiles, stream_time_ms)
            transitions += result.transitions
            stream_time_ms = result.stream_time_ms
        assert transitions == whole.transitions
        assert profiles == whole.profiles


def test_a_profile_of_older_definitions_is_redefined_at_the_stream_time_before_its_record() -> None:
    old = SegmentSet([Segment("old", labels=("swimwear",), min_weight=0.5)], WEIGHTS)
    before = fold_slice(Fold(old, WEIGHTS), [record(0, 100, 0)], {}, None, "event", {})
    result = fold_slice(FOLD, [record(1, 900, 0)], before.profiles, 400, "event", {old.fingerprint: old})
    assert [(t.segment_id, t.status, t.time_ms, t.cause.value) for t in result.transitions] == [
        ("old", "exited", 400, "definition"),
        ("swim", "entered", 400, "definition"),
    ]
    assert result.profiles["u1"].definitions == SEGMENTS.fingerprint


def test_a_profile_redefined_by_a_duplicate_has_changed() -> None:
    old = SegmentSet([], WEIGHTS)
    before = fold_slice(Fold(old, WEIGHTS), [record(0, 100, 0, name="same")], {}, None, "event", {})
    result = fold_slice(
        FOLD, [record(1, 100, 0, name="same")], before.profiles, 100, "event", {old.fingerprint: old}
    )
    assert result.profiles.keys() == {"u1"}


def test_a_profile_of_unknown_definitions_stops_the_slice() -> None:
    stranger = {"u1": Profile("u1", 0, definitions="feedfeedfeedfeed")}
    with pytest.raises(
        ValueError, match=r"expected a stream time and a profile .* got 5 and 'feedfeedfeedfeed'"
    ):
        folded([record(0, 100, 0)], stranger, 5)
