"""The judge itself, on cases that are worked out by hand; the fold must agree on each of them.

Also the reading of raw records for the judge, and the generator: that a log is a function of its seed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pytest

from stream_app.core.fold import Fold
from tests.laws.running import Run, compare, compare_profiles
from tests.oracle import (
    Clock,
    Oracle,
    OracleRecord,
    OracleTransition,
    Verdict,
    judge,
    oracle_transitions,
    oracle_weights,
    records_by_partition,
    unix_ms,
)
from tests.random_logs import SHAPES, core_records, core_segments, core_weights, random_log

T = 1_700_000_000_000
TEN_SECONDS = {"half_life_s": 10.0}


def event(at_ms: int, *, user: str = "u", of: str = "view", labels: str = "a", **more: Any) -> OracleRecord:
    """Make a record `at_ms` after T; `labels` are single letters; `kafka` is its Kafka timestamp after T."""
    offset = more.get("offset", at_ms)
    return OracleRecord(
        offset=offset,
        kafka_time_ms=T + more.get("kafka", at_ms),
        user_id=user,
        event_type=of,
        event_time_ms=T + at_ms,
        event_id=more.get("event_id", f"{user}-{offset}-{of}"),
        labels=tuple(labels),
        asset_id=more.get("asset_id"),
    )


def short(transitions: list[OracleTransition]) -> list[tuple[str, str, str, int, int]]:
    """Show transitions as (segment, status, cause, seq, ms after T)."""
    return [(t.segment_id, t.status, t.cause, t.seq, t.time_ms - T) for t in transitions]


def judged(
    records: list[OracleRecord],
    segments: list[dict[str, Any]],
    weights: dict[str, Any],
    clock: Clock,
    until_ms: int | None = None,
) -> Verdict:
    """Return the oracle's verdict, having seen that the fold agrees."""
    verdict = judge(records, segments, weights, clock, until_ms)
    assert verdict.stream_time_ms is not None
    at_ms = verdict.stream_time_ms if until_ms is None else max(verdict.stream_time_ms, until_ms)
    state = Run(Fold(core_segments(segments, weights), core_weights(weights)), clock)
    state.slice(core_records(records))
    state.expire_due(at_ms)
    assert compare(verdict.transitions, state.transitions, "by hand").rounded_otherwise == 0
    compare_profiles(verdict.profiles, state, "by hand", at_ms)
    return verdict


def transitions_of(
    records: list[OracleRecord],
    segments: list[dict[str, Any]],
    weights: dict[str, Any],
    clock: Clock,
    until_ms: int | None = None,
) -> list[OracleTransition]:
    return judged(records, segments, weights, clock, until_ms).transitions


def test_one_event_enters_at_once_and_leaves_when_its_weight_has_halved() -> None:
    segments = [{"id": "s", "labels": ["a"], "min_weight": 0.5}]
    entered, exited = transitions_of([event(0)], segments, TEN_SECONDS, "event", until_ms=T + 10_000)
    assert short([entered, exited]) == [("s", "entered", "event", 1, 0), ("s", "exited", "decay", 2, 10_000)]
    assert entered.weight == 1.0
    assert entered.exits_at_ms == T + 10_000
    assert (entered.event_id, entered.offset) == ("u-0-view", 0)
    assert exited.weight == pytest.approx(0.5, rel=1e-12)
    assert (exited.exits_at_ms, exited.event_id, exited.offset) == (None, None, None)
    assert entered.id == hashlib.sha256(b"u\0s\0" + str(T).encode() + b"\x001").hexdigest()[:32]


def test_until_its_exit_instant_a_user_is_in() -> None:
    segments = [{"id": "s", "labels": ["a"], "min_weight": 0.5}]
    assert len(transitions_of([event(0)], segments, TEN_SECONDS, "event", until_ms=T + 9_999)) == 1


def test_without_an_instant_exits_follow_the_stream_time() -> None:
    segments = [{"id": "s", "labels": ["a"], "min_weight": 0.5}]
    log = [event(0), event(9_999, user="other", labels="")]
    assert len(transitions_of(log, segments, TEN_SECONDS, "event")) == 1
    log.append(event(10_000, user="other", labels=""))
    assert short(transitions_of(log, segments, TEN_SECONDS, "event"))[1:] == [
        ("s", "exited", "decay", 2, 10_000)
    ]


def test_one_event_of_weight_one_never_enters_at_one() -> None:
    segments = [{"id": "s", "labels": ["a"], "min_weight": 1.0}]
    assert transitions_of([event(0)], segments, TEN_SECONDS, "event") == []


def test_two_half_lives_in_one_sum_cross_together() -> None:
    # After 2 s: 2**-2 + 2**-1 = 0.75.
    weights = {"event_types": {"view": {"half_life_s": 1.0}, "buy": {"half_life_s": 2.0}}}
    segments = [{"id": "s", "labels": ["a"], "min_weight": 0.75}]
    log = [event(0), event(0, of="buy", offset=1)]
    assert short(transitions_of(log, segments, weights, "event", until_ms=T + 9_999)) == [
        ("s", "entered", "event", 1, 0),
        ("s", "exited", "decay", 2, 2_000),
    ]


def test_event_types_restrict_the_sum_and_alone_are_the_items() -> None:
    weights = {"half_life_s": 10.0, "event_types": {"buy": {"action_weight": 4.0}}}
    segments = [
        {"id": "bought-a", "labels": ["a"], "event_types": ["buy"], "min_weight": 1.0},
        {"id": "some-type", "event_types": ["buy", "view"], "min_weight": 4.5},
    ]
    log = [event(0), event(0, offset=1, labels="b"), event(0, offset=2, of="buy")]
    # "some-type" stands at 4: the heavier of buy (4) and view (2), never their sum.
    assert short(transitions_of(log, segments, weights, "event")) == [("bought-a", "entered", "event", 1, 0)]


def test_any_leaves_with_its_latest_item_and_all_with_its_earliest() -> None:
    segments = [
        {"id": "all", "labels": ["a", "b"], "match_labels": "all", "min_weight": 0.5},
        {"id": "any", "labels": ["a", "b"], "match_labels": "any", "min_weight": 0.5},
    ]
    log = [event(0), event(0, offset=1, labels="ab")]  # a weighs 2, b weighs 1
    assert short(transitions_of(log, segments, TEN_SECONDS, "event", until_ms=T + 60_000)) == [
        ("any", "entered", "event", 1, 0),
        ("all", "entered", "event", 1, 0),
        ("all", "exited", "decay", 2, 10_000),
        ("any", "exited", "decay", 2, 20_000),
    ]


def test_labels_and_assets_must_both_hold() -> None:
    segments = [{"id": "s", "labels": ["a"], "asset_ids": ["x", "y"], "min_weight": 0.5}]
    log = [event(0), event(0, offset=1), event(1_000, labels="", asset_id="x")]
    entered, exited = transitions_of(log, segments, TEN_SECONDS, "event", until_ms=T + 60_000)
    assert entered.time_ms == T + 1_000
    assert entered.weight == 1.0  # the asset's, the smaller one
    assert exited.time_ms == T + 11_000


def test_hysteresis_enters_high_and_leaves_low() -> None:
    segments = [{"id": "s", "labels": ["a"], "min_weight": 1.5, "exit_weight": 0.25}]
    log = [event(0), event(0, offset=1), event(29_999, user="y")]  # 2 -> 0.25 takes three half-lives
    assert short(transitions_of(log, segments, TEN_SECONDS, "event")) == [("s", "entered", "event", 1, 0)]
    assert short(transitions_of([*log, event(30_000, user="z")], segments, TEN_SECONDS, "event"))[1:] == [
        ("s", "exited", "decay", 2, 30_000)
    ]


def test_min_weight_zero_means_history_above_the_floor() -> None:
    weights = {"half_life_s": 1.0, "history_floor": 2.0**-5}
    segments = [{"id": "s", "event_types": ["view"]}]
    entered, exited = transitions_of([event(0)], segments, weights, "event", until_ms=T + 10_000)
    assert (entered.min_weight, exited.time_ms) == (0.0, T + 5_000)


def test_an_exclusion_ends_when_the_excluded_segment_is_left() -> None:
    segments = [
        {"id": "a", "labels": ["a"], "min_weight": 0.25, "exclude": ["b"]},
        {"id": "b", "labels": ["b"], "min_weight": 0.5},
    ]
    log = [event(0), event(1_000, labels="b")]
    assert short(transitions_of(log, segments, TEN_SECONDS, "event", until_ms=T + 60_000)) == [
        ("a", "entered", "event", 1, 0),
        ("a", "exited", "event", 2, 1_000),
        ("b", "entered", "event", 1, 1_000),
        ("b", "exited", "decay", 2, 11_000),
        ("a", "entered", "decay", 3, 11_000),
        ("a", "exited", "decay", 4, 20_000),
    ]


def test_a_chain_of_exclusions_is_one_evaluation() -> None:
    segments = [
        {"id": "a", "labels": ["a"], "min_weight": 0.01, "exclude": ["b"]},
        {"id": "b", "labels": ["a"], "min_weight": 0.02, "exclude": ["c"]},
        {"id": "c", "labels": ["c"], "min_weight": 0.5},
    ]
    log = [event(0), event(1_000, labels="c")]
    assert short(transitions_of(log, segments, TEN_SECONDS, "event", until_ms=T + 12_000)) == [
        ("b", "entered", "event", 1, 0),  # and so a does not
        ("b", "exited", "event", 2, 1_000),
        ("a", "entered", "event", 1, 1_000),
        ("c", "entered", "event", 1, 1_000),
        ("a", "exited", "decay", 2, 11_000),
        ("c", "exited", "decay", 2, 11_000),
        ("b", "entered", "decay", 3, 11_000),
    ]


def test_who_is_let_in_comes_at_min_weight_and_for_ten_ms() -> None:
    # b leaves at 10 s. a1 stands at 1.0 then: enough to stay above 0.5, not to enter at 1.5.
    segments: list[dict[str, Any]] = [
        {"id": "b", "labels": ["b"], "min_weight": 0.5},
        {"id": "a1", "labels": ["a"], "min_weight": 1.5, "exit_weight": 0.5, "exclude": ["b"]},
        {"id": "a2", "labels": ["a"], "min_weight": 2.0 ** (-9 / 10_000), "exclude": ["b"]},  # 9 ms too few
        {"id": "a3", "labels": ["a"], "min_weight": 2.0 ** (-10 / 10_000), "exclude": ["b"]},
    ]
    log = [event(0, offset=0, labels="ab"), event(0, offset=1)]
    assert short(transitions_of(log, segments, TEN_SECONDS, "event", until_ms=T + 60_000)) == [
        ("b", "entered", "event", 1, 0),
        ("b", "exited", "decay", 2, 10_000),
        ("a3", "entered", "decay", 1, 10_000),
        ("a3", "exited", "decay", 2, 10_010),
    ]


def test_leaving_and_coming_back_at_one_instant_are_both_said() -> None:
    segments = [{"id": "s", "labels": ["a"], "min_weight": 0.5}]
    log = [event(0), event(10_000)]
    assert short(transitions_of(log, segments, TEN_SECONDS, "event")) == [
        ("s", "entered", "event", 1, 0),
        ("s", "exited", "decay", 2, 10_000),
        ("s", "entered", "event", 3, 10_000),
    ]


def test_a_late_event_is_judged_when_it_comes_and_with_what_is_left_of_it() -> None:
    segments = [{"id": "s", "labels": ["a"], "min_weight": 0.4}]
    log = [event(10_000, labels=""), event(0, offset=10_001)]  # arrives at 10 s, weighs 0.5
    entered, exited = transitions_of(log, segments, TEN_SECONDS, "event", until_ms=T + 60_000)
    assert (entered.time_ms, entered.weight) == (T + 10_000, 0.5)
    assert exited.time_ms == T + 13_219  # 10 s * log2(1 / 0.4)
    assert transitions_of([event(20_000, labels=""), event(0)], segments, TEN_SECONDS, "event") == []


def test_with_the_wall_clock_records_happen_at_their_kafka_timestamp() -> None:
    segments = [{"id": "s", "labels": ["a"], "min_weight": 0.5}]
    log = [event(0, kafka=5_000), event(3_000, kafka=4_000, user="other")]
    assert short(transitions_of(log, segments, TEN_SECONDS, "wall", until_ms=T + 60_000)) == [
        ("s", "entered", "event", 1, 5_000),
        ("s", "entered", "event", 1, 5_000),  # the other's record does not turn the stream's time back
        ("s", "exited", "decay", 2, 10_000),
        ("s", "exited", "decay", 2, 13_000),
    ]


def test_an_id_among_the_last_32_adds_nothing_and_an_older_one_does() -> None:
    first, again = event(0, event_id="same"), event(40, event_id="same")
    between = [event(n, labels="") for n in range(1, 32)]
    for others, weight in ((between, 1.0), ([*between, event(32, labels="")], 2.0)):
        profiles = judged([first, *others, again], [], {"half_life_s": 1e9}, "event").profiles
        assert profiles["u"].weights["view", "label", "a"] == pytest.approx(weight, abs=1e-6)


def test_after_its_forget_instant_a_profile_begins_anew() -> None:
    # Weight 1 reaches the floor of 2**-5 after 50 s; until then, and at that instant, it is remembered.
    weights = {"half_life_s": 10.0, "history_floor": 2.0**-5}
    segments = [{"id": "s", "labels": ["a"], "min_weight": 0.5}]
    for gap_ms, seq in ((50_000, 3), (50_001, 1)):
        transitions = transitions_of([event(0), event(gap_ms)], segments, weights, "event")
        assert [t.seq for t in transitions] == [1, 2, seq]


def test_a_membership_keeps_a_profile_past_its_forget_instant() -> None:
    # Each type reaches the floor after 43.219 s, the two together, which the segment sums, after 53.219 s.
    weights = {"half_life_s": 10.0, "history_floor": 0.05}
    segments = [{"id": "s", "labels": ["a"]}]
    both = [event(0), event(0, of="buy", offset=1)]
    for gap_ms, applied in ((50_000, 3), (53_218, 3), (53_219, 1)):
        profile = judged([*both, event(gap_ms, labels="")], segments, weights, "event").profiles["u"]
        assert profile.applied == applied


def test_a_profile_without_weight_lives_one_half_life() -> None:
    weights = {"half_life_s": 10.0, "event_types": {"nothing": {"action_weight": 0}}}
    for gap_ms, applied in ((10_000, 2), (10_001, 1)):
        log = [event(0, of="nothing"), event(gap_ms, of="nothing")]
        profile = judged(log, [], weights, "event").profiles["u"]
        assert (profile.applied, profile.weights) == (applied, {})


def test_every_64th_event_drops_what_weighs_less_than_a_thousandth_of_the_floor() -> None:
    weights = {"half_life_s": 1.0, "history_floor": 0.1, "event_types": {"slow": {"half_life_s": 1e6}}}
    log = [event(0, of="slow", labels=""), event(0, offset=1, labels="z")]
    log += [event(14_000, offset=n, of="slow", labels="") for n in range(2, 64)]
    keys = judged(log[:63], [], weights, "event").profiles["u"].weights
    assert keys["view", "label", "z"] == 2.0**-14  # below 1e-4
    assert list(judged(log, [], weights, "event").profiles["u"].weights) == [("slow", "type", "")]


def test_a_cap_drops_the_lightest_labels_that_no_segment_names() -> None:
    segments = [{"id": "s", "labels": ["l-0"], "min_weight": 9}]
    log = [
        OracleRecord(n, T + n, "u", "view", T + n, f"e{n}", tuple(f"l-{n * 64 + i}" for i in range(64)))
        for n in range(9)
    ]
    assert len(judged(log[:8], segments, TEN_SECONDS, "event").profiles["u"].weights) == 1 + 512
    kept = {
        name
        for _, kind, name in judged(log, segments, TEN_SECONDS, "event").profiles["u"].weights
        if kind == "label"
    }
    assert len(kept) == 448
    assert "l-0" in kept  # the oldest, but named
    assert not {f"l-{n}" for n in range(1, 64)} & kept
    # 128 must go: the first event's but one, the second's, and of the third's equals the first by name.
    assert not {f"l-{n}" for n in range(64, 128)} & kept
    assert {f"l-{n}" for n in range(128, 192)} - kept == {"l-128"}


def test_a_type_cap_drops_no_type_with_something_that_a_segment_names() -> None:
    segments = [
        {"id": "s", "labels": ["a"], "min_weight": 9},
        {"id": "t", "event_types": ["t1"], "min_weight": 9},
    ]
    log = [event(n, of=f"t{n}", labels="a" if n == 0 else "") for n in range(65)]
    kept = {
        event_type for event_type, _, _ in judged(log, segments, TEN_SECONDS, "event").profiles["u"].weights
    }
    assert kept == {f"t{n}" for n in (0, 1, *range(11, 65))}


def test_what_is_forgotten_does_not_count_towards_a_cap() -> None:
    # At the 64th event 64 old labels are dropped first; the 449 that stay exceed nothing.
    weights = {"half_life_s": 1.0, "history_floor": 0.1, "event_types": {"slow": {"half_life_s": 1e6}}}

    def many(at_ms: int, n: int, of: str) -> OracleRecord:
        labels = tuple(f"l-{n * 64 + i}" for i in range(64))
        return OracleRecord(n, T + at_ms, "u", of, T + at_ms, f"e{n}", labels)

    log = [many(0, 0, "slow"), many(0, 1, "view"), *(many(0, n, "slow") for n in range(2, 8))]
    log += [event(20_000, offset=n, of="slow", labels="") for n in range(8, 63)]
    before = judged(log, [], weights, "event").profiles["u"].weights
    assert sum(kind == "label" for _, kind, _ in before) == 512
    after = judged([*log, event(20_000, offset=63, of="slow")], [], weights, "event").profiles["u"].weights
    assert sum(kind == "label" for _, kind, _ in after) == 449


def test_after_a_timer_that_ran_ahead_a_user_goes_on_from_the_exit() -> None:
    # The worker's clock said 10 s when the broker's next record is still of 9.5 s.
    segments = [{"id": "s", "labels": ["a"], "min_weight": 0.5}]
    log = [event(0), event(9_500)]
    oracle = Oracle(segments, TEN_SECONDS)
    oracle.fold(log[0], "wall")
    oracle.expire(oracle.users["u"], T + 10_000)
    oracle.fold(log[1], "wall")
    assert short(oracle.transitions)[1:] == [
        ("s", "exited", "decay", 2, 10_000),
        ("s", "entered", "event", 3, 10_000),
    ]
    state = Run(Fold(core_segments(segments, TEN_SECONDS), core_weights(TEN_SECONDS)), "wall")
    state.slice(core_records(log[:1]))
    state.expire_due(T + 10_000)
    state.slice(core_records(log[1:]))
    compare(oracle.transitions, state.transitions, "by hand")


def test_the_two_short_ways_of_asking_are_parts_of_the_verdict() -> None:
    segments = [{"id": "s", "labels": ["a"], "min_weight": 0.5}]
    verdict = judge([event(0)], segments, TEN_SECONDS, "event", T + 10_000)
    assert oracle_transitions([event(0)], segments, TEN_SECONDS, "event", T + 10_000) == verdict.transitions
    assert oracle_weights([event(0)], segments, TEN_SECONDS, "event", T + 10_000) == verdict.profiles
    assert judge([], segments, TEN_SECONDS, "event").transitions == []


def test_exits_beyond_the_calendar_are_never() -> None:
    segments = [{"id": "s", "labels": ["a"], "min_weight": 0.5}]
    verdict = judged([event(0)], segments, {"half_life_s": 1e12}, "event")
    assert verdict.transitions[0].exits_at_ms is None
    assert verdict.profiles["u"].exits_at_ms == {"s": None}


def test_a_circle_of_exclusions_is_refused() -> None:
    segments = [
        {"id": "a", "labels": ["a"], "exclude": ["b"]},
        {"id": "b", "labels": ["a"], "exclude": ["a"]},
    ]
    with pytest.raises(ValueError, match="circle"):
        Oracle(segments, {})


@dataclass(frozen=True)
class Raw:
    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


def test_raw_records_become_records_by_partition() -> None:
    def raw(partition: int, offset: int, kafka_time_ms: int, **fields: Any) -> Raw:
        value = {"event_id": "e", "user_id": "ü", "event_type": "view", **fields}
        return Raw("events", partition, offset, kafka_time_ms, "ü".encode(), json.dumps(value).encode())

    raws = [
        raw(1, 7, T, timestamp=T / 1000, labels=["b", "a", "b"], asset_id="x"),
        raw(0, 4, T, timestamp="2023-11-14T22:13:20.0009Z"),
        raw(1, 3, T, timestamp=T // 1000 + 300),  # ahead, but not too far: clamped
        raw(1, 4, T, timestamp=T // 1000 + 301),  # too far: a dead letter
        raw(1, 5, T, timestamp="1969-12-31T23:59:59.999+00:00"),  # before 1970: a dead letter
    ]
    assert records_by_partition(raws) == {
        1: [
            OracleRecord(3, T, "ü", "view", T, "e"),
            OracleRecord(7, T, "ü", "view", T, "e", ("b", "a"), "x"),
        ],
        0: [OracleRecord(4, T, "ü", "view", T, "e")],
    }


def test_timestamps_are_cut_to_the_millisecond() -> None:
    assert unix_ms(1.0009) == 1000
    assert unix_ms(1_600_000_000.001) == 1_600_000_000_001  # not one less for a float's sake
    assert unix_ms("2020-01-01T00:00:00.0019+01:00") == 1_577_833_200_001
    assert unix_ms(-0.0001) == -1


@pytest.mark.parametrize("shape", SHAPES)
def test_random_logs_are_functions_of_their_seed(shape: str) -> None:
    assert random_log(shape, 1) == random_log(shape, 1)
    assert random_log(shape, 1) != random_log(shape, 2)
