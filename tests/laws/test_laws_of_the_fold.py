"""What must hold for any log, without the oracle: laws of weights, of forgetting, of time and of order."""

from __future__ import annotations

import dataclasses
import functools
import math
import random

import pytest
from msgspec import structs

from stream_app.core.decay import EventTypeWeight, Weights
from stream_app.core.event import Event, Record
from stream_app.core.fold import Fold
from stream_app.core.profile import Profile
from stream_app.core.segment import Segment
from stream_app.core.segment_set import SegmentSet
from stream_app.core.transition import transition_id
from tests.laws.running import Run, by_user, run, run_records, stored_weights
from tests.random_logs import (
    DAY_MS,
    SHAPES,
    YEAR_S,
    RandomLog,
    core_records,
    core_segments,
    core_weights,
    label_name,
    random_log,
)

SEED = 7
T = 1_700_000_000_000
# Logs in which everything happens, on both clocks: a fast one, one of long sums, two that forget a lot.
SOME = ["seconds-event", "mixed-wall", "high-floor-event", "minutes-wall"]


@functools.cache
def some_log(shape: str) -> RandomLog:
    log = random_log(shape, SEED)
    return dataclasses.replace(log, records=log.records[:4000])


@functools.cache
def as_it_is(shape: str) -> Run:
    """Return the run of the log in slices of 500, not to be changed."""
    return run(some_log(shape))


def run_core(log: RandomLog, records: list[Record], batch: int = 500) -> Run:
    segments = core_segments(log.segments, log.weights)
    return run_records(records, segments, core_weights(log.weights), log.clock, batch)


@pytest.mark.parametrize("seed", range(40))
def test_shuffled_events_leave_the_same_weights(seed: int) -> None:
    # The first event keeps the profile alive for years, and there are fewer than 64: nothing is forgotten.
    rng = random.Random(seed)
    half_lives = [0.2, 10.0, 3600.0, 86400.0, 30 * 86400.0, YEAR_S]
    weights = Weights(
        event_types={"anchor": EventTypeWeight(5.0, 10 * YEAR_S)}
        | {f"t{n}": EventTypeWeight(rng.choice([0.5, 1.0, 5.0]), h) for n, h in enumerate(half_lives)}
    )
    span_ms = rng.choice([1000, 60_000, DAY_MS, 300 * DAY_MS])
    anchor = Event("u", "anchor", T, "anchor")
    events = [
        Event(
            "u",
            f"t{rng.randrange(len(half_lives))}",
            T + rng.randrange(span_ms),
            f"e{n}",
            labels=tuple(sorted({label_name(rng.randrange(4)) for _ in range(3)})),
            asset_id=rng.choice([None, "x", "y"]),
        )
        for n in range(60)
    ]
    segments = SegmentSet([Segment("s", labels=(label_name(0),))], weights)
    found = []
    for _ in range(4):
        log = [Record(n, T + DAY_MS, event) for n, event in enumerate([anchor, *events])]
        state = run_records(log, segments, weights, "event", 7)
        assert state.stream_time_ms is not None
        found.append(stored_weights(state.profiles["u"], weights, state.stream_time_ms))
        rng.shuffle(events)
    for other in found[1:]:
        assert other.keys() == found[0].keys(), f"seed {seed}"
        for key, weight in found[0].items():
            assert math.isclose(other[key], weight, rel_tol=1e-9, abs_tol=1e-100), f"seed {seed}, {key}"


@pytest.mark.parametrize("shape", ["seconds-event", "seconds-wall", "mixed-event", "mixed-wall"])
def test_a_late_event_that_has_decayed_enters_nobody(shape: str) -> None:
    log = some_log(shape)
    weights = core_weights(log.weights)
    decayed: set[int] = set()
    stream_time_ms = 0
    for record in core_records(log.records):
        event = record.event
        instant = event.event_time_ms if log.clock == "event" else record.kafka_time_ms
        stream_time_ms = max(stream_time_ms, instant)
        left = 2.0 ** ((event.event_time_ms - stream_time_ms) / weights.half_life_ms(event.event_type))
        if left * weights.action_weight(event.event_type) < weights.history_floor * 1e-9:
            decayed.add(record.offset)
    assert len(decayed) > 100, f"{log.name} has too few to prove anything"
    enters = [t for t in as_it_is(shape).transitions if t.status == "entered" and t.offset in decayed]
    assert enters == [], log.name


@pytest.mark.parametrize("shape", SOME)
def test_what_is_forgotten_may_be_removed_at_any_time(shape: str) -> None:
    log = some_log(shape)
    rng = random.Random(SEED)
    removed = 0

    def remove_profiles(state: Run) -> None:
        nonlocal removed
        assert state.stream_time_ms is not None
        for user, profile in list(state.profiles.items()):
            past = state.stream_time_ms > profile.forget_ms and not profile.exits_at_ms
            if past and rng.random() < 0.3:
                del state.profiles[user]
                removed += 1

    got = run(log, 20, expire_every=1, after_slice=remove_profiles)
    assert by_user(got.transitions) == by_user(as_it_is(shape).transitions), log.name
    assert removed > 10, f"{log.name} has too few to prove anything"


@pytest.mark.parametrize("shape", ["mixed-event", "high-floor-wall"])
def test_every_64th_event_leaves_no_key_that_may_be_forgotten(shape: str) -> None:
    log = some_log(shape)
    weights = core_weights(log.weights)
    looked_at = 0
    records = core_records(log.records)
    state = Run(Fold(core_segments(log.segments, log.weights), weights), log.clock)
    applied: dict[str, int] = {}
    for record in records:
        state.slice([record])
        profile = state.profiles[record.event.user_id]
        if profile.applied == applied.get(record.event.user_id):
            continue  # a duplicate
        applied[record.event.user_id] = profile.applied
        if profile.applied % 64 == 0:
            assert state.stream_time_ms is not None
            looked_at += 1
            left = stored_weights(profile, weights, state.stream_time_ms)
            assert min(left.values(), default=1.0) >= weights.history_floor * 1e-3 * (1 - 1e-9), log.name
    assert looked_at > 10


@pytest.mark.parametrize("shape", SOME)
def test_the_same_log_again_says_the_same(shape: str) -> None:
    log = some_log(shape)
    first, again = as_it_is(shape), run(log)
    assert again.transitions == first.transitions
    assert again.profiles == first.profiles


@pytest.mark.parametrize("shape", SOME)
def test_every_record_twice_is_every_record_once(shape: str) -> None:
    log = some_log(shape)
    records = core_records(log.records)
    twice = [structs.replace(record, offset=2 * record.offset + n) for record in records for n in (0, 1)]
    expected = [
        structs.replace(t, offset=None if t.offset is None else 2 * t.offset)
        for t in as_it_is(shape).transitions
    ]
    assert by_user(run_core(log, twice).transitions) == by_user(expected), log.name


@pytest.mark.parametrize("shape", SOME)
def test_entered_and_exited_alternate_and_ids_never_repeat(shape: str) -> None:
    log = some_log(shape)
    transitions = as_it_is(shape).transitions
    for user, said in by_user(transitions).items():
        last_ms = 0
        last_seq: dict[str, int] = {}
        for t in said:
            where = f"{log.name}, user {user!r}, {t}"
            # After forgetting, numbers begin again; a profile is never forgotten with a member in it.
            before = last_seq.get(t.segment_id, 0)
            assert t.seq == before + 1 or (t.seq == 1 and before % 2 == 0), where
            assert t.status == ("entered" if t.seq % 2 == 1 else "exited"), where
            assert t.time_ms >= last_ms, where
            assert t.id == transition_id(user, t.segment_id, t.time_ms, t.seq), where
            last_seq[t.segment_id], last_ms = t.seq, t.time_ms
            if t.exits_at_ms is not None:
                assert t.exits_at_ms - t.time_ms >= 10, where
    assert len({t.id for t in transitions}) == len(transitions), log.name


@pytest.mark.parametrize("shift_ms", [1, -987_654_321])
@pytest.mark.parametrize("shape", SOME)
def test_a_shifted_clock_shifts_every_time_and_nothing_else(shape: str, shift_ms: int) -> None:
    log = some_log(shape)
    records = core_records(log.records)
    shifted = [
        Record(
            record.offset,
            record.kafka_time_ms + shift_ms,
            structs.replace(record.event, event_time_ms=record.event.event_time_ms + shift_ms),
        )
        for record in records
    ]
    expected, got = as_it_is(shape).transitions, run_core(log, shifted).transitions
    assert len(got) == len(expected), log.name
    for want, have in zip(expected, got, strict=True):
        time_ms = want.time_ms + shift_ms
        moved = structs.replace(
            want,
            id=transition_id(want.user_id, want.segment_id, time_ms, want.seq),
            time_ms=time_ms,
            exits_at_ms=None if want.exits_at_ms is None else want.exits_at_ms + shift_ms,
        )
        assert have == moved, log.name


@pytest.mark.parametrize("shape", SHAPES)
def test_slices_may_be_cut_anywhere(shape: str) -> None:
    log = some_log(shape)
    rng = random.Random(SEED)
    records = core_records(log.records)
    whole = as_it_is(shape)
    cut = Run(whole.fold, log.clock)
    start = 0
    while start < len(records):
        end = start + rng.choice([0, 1, 2, 30, 200])
        cut.slice(records[start:end], stored=rng.random() < 0.5)
        if rng.random() < 0.5:
            cut.expire_due()
        start = end
    cut.expire_due()
    assert by_user(cut.transitions) == by_user(whole.transitions), log.name
    assert cut.profiles == whole.profiles, log.name
    assert cut.stream_time_ms == whole.stream_time_ms


def test_one_segments_log_does_not_depend_on_the_others() -> None:
    log = random_log("minutes-event", SEED)
    records, weights = core_records(log.records[:2000]), core_weights(log.weights)
    together = run_records(records, core_segments(log.segments, log.weights), weights, log.clock)
    for segment in log.segments:
        if segment.get("exclude") or segment.get("type") == "discovery":
            continue
        alone = run_records(records, core_segments([segment], log.weights), weights, log.clock)
        expected = [t for t in together.transitions if t.segment_id == segment["id"]]
        assert by_user(alone.transitions) == by_user(expected), f"{log.name}, {segment['id']}"


def test_an_empty_slice_changes_nothing() -> None:
    log = random_log("days-event", SEED)
    state = run(dataclasses.replace(log, records=log.records[:50]))
    before: dict[str, Profile] = dict(state.profiles)
    stream_time_ms, said = state.stream_time_ms, len(state.transitions)
    state.slice([])
    assert (state.profiles, state.stream_time_ms, len(state.transitions)) == (before, stream_time_ms, said)
