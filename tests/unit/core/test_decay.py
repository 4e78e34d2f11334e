"""Half-lives, landmarks and crossings, with numbers computed by hand."""

import math

import pytest

from stream_app.core.decay import (
    NEVER_MS,
    NO_WEIGHT_MS,
    EventTypeWeight,
    Weights,
    crossing_ms,
    weight_at,
    weights_problems,
)


def test_a_weight_halves_once_per_half_life() -> None:
    assert weight_at(1_000, {500.0: 8.0}, 1_000) == 8.0
    assert weight_at(1_000, {500.0: 8.0}, 1_500) == 4.0
    assert weight_at(1_000, {500.0: 8.0}, 2_500) == 1.0


def test_no_sums_weigh_nothing() -> None:
    assert weight_at(0, {}, 10) == 0.0


def test_a_weight_of_long_ago_is_zero_and_not_an_error() -> None:
    assert weight_at(0, {1.0: 2.0**500}, NEVER_MS) == 0.0


def test_one_half_life_crosses_where_the_logarithm_says() -> None:
    assert crossing_ms(1_000, {500.0: 8.0}, math.log2(1.0)) == 2_500
    assert crossing_ms(1_000, {500.0: 8.0}, math.log2(16.0)) == 500


def test_a_crossing_is_rounded_to_the_nearest_millisecond() -> None:
    assert crossing_ms(0, {1_000.0: 3.0}, math.log2(1.0)) == round(1_000 * math.log2(3)) == 1_585


def test_two_half_lives_cross_where_their_sum_does() -> None:
    # 4 · 2^-2 = 1 and 2 · 2^-1 = 1: at 2,000 ms each is 1, together 2.
    assert crossing_ms(0, {1_000.0: 4.0, 2_000.0: 2.0}, math.log2(2.0)) == 2_000


def test_equal_crossings_of_two_half_lives_move_each_other_later() -> None:
    # With y = 2^(-t/2000), y² · 1 + y · 1 = 1 gives y = (√5 - 1)/2, the golden ratio's inverse.
    golden_ms = -2_000 * math.log2((math.sqrt(5) - 1) / 2)
    assert crossing_ms(0, {1_000.0: 1.0, 2_000.0: 1.0}, math.log2(1.0)) == round(golden_ms) == 1_388


@pytest.mark.parametrize("threshold", [1e-9, 1e-3, 1.0, 7.5, 1e6])
@pytest.mark.parametrize("ratio", [1.0001, 3.0, 1_000.0, 1e9])
def test_several_half_lives_cross_within_a_millisecond_of_the_root(threshold: float, ratio: float) -> None:
    sums = {1_000.0: 3.0, 1_000.0 * ratio: 0.7, 5_000.0 * ratio: 1e-5}
    crossing = crossing_ms(0, sums, math.log2(threshold))
    assert weight_at(0, sums, crossing - 1) >= threshold >= weight_at(0, sums, crossing + 1)


def test_a_sum_of_zero_has_crossed_before_every_instant() -> None:
    assert crossing_ms(0, {}, math.log2(1.0)) == NO_WEIGHT_MS
    assert crossing_ms(0, {1_000.0: 0.0, 2_000.0: 0.0}, math.log2(1.0)) == NO_WEIGHT_MS


def test_the_smallest_sum_crosses_as_any_other() -> None:
    assert crossing_ms(0, {1_000.0: 5e-324}, math.log2(1.0)) == -1_074_000


def test_a_sum_of_zero_beside_another_changes_nothing() -> None:
    assert crossing_ms(0, {1_000.0: 4.0, 2_000.0: 0.0}, math.log2(1.0)) == 2_000


def test_what_lasts_past_the_year_9999_never_crosses() -> None:
    assert crossing_ms(0, {1e15: 1e9}, math.log2(1e-9)) == NEVER_MS
    assert crossing_ms(0, {1e15: 1e9, 2e15: 1.0}, math.log2(1e-9)) == NEVER_MS


def test_an_event_type_without_settings_has_the_defaults() -> None:
    weights = Weights(
        half_life_s=60, event_types={"buy": EventTypeWeight(3.0, 30), "view": EventTypeWeight(0.5)}
    )
    assert [weights.action_weight(name) for name in ("buy", "view", "other")] == [3.0, 0.5, 1.0]
    assert [weights.half_life_ms(name) for name in ("buy", "view", "other")] == [30_000.0, 60_000.0, 60_000.0]
    assert weights.shortest_half_life_ms == 30_000.0


def test_the_default_half_life_is_thirty_days() -> None:
    assert Weights().half_life_ms("any") == 30 * 86_400_000


def test_settings_that_read_sums_alike_have_one_fingerprint() -> None:
    assert Weights(60, event_types={"a": EventTypeWeight(1, 60)}).fingerprint() == Weights(60.0).fingerprint()
    assert Weights(60, event_types={"a": EventTypeWeight(2)}).fingerprint() != Weights(60).fingerprint()
    assert Weights(60).fingerprint() != Weights(61).fingerprint() != Weights(61, 0.01).fingerprint()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_half_life_that_is_no_duration_is_refused(value: float) -> None:
    with pytest.raises(
        ValueError, match=r"half_life_s: expected a number of seconds from 0\.001 to 1e\+12, got"
    ):
        Weights(half_life_s=value)


@pytest.mark.parametrize("value", [0.0, -1e-3, math.nan, 2.0])
def test_a_floor_that_is_no_small_weight_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"history_floor: expected a number from 1e-09 to 1, got"):
        Weights(history_floor=value)


def test_an_action_weight_between_nothing_and_ten_floors_is_refused() -> None:
    Weights(event_types={"a": EventTypeWeight(0.0), "b": EventTypeWeight(0.01)})
    with pytest.raises(
        ValueError, match=r"event_types\.c\.action_weight: expected 0 or a number from 0\.01 "
    ):
        Weights(event_types={"c": EventTypeWeight(0.0099)})


def test_all_wrong_settings_are_listed_together() -> None:
    found = weights_problems(
        0.0, 1e-3, {"a": EventTypeWeight(-1.0, math.nan), "b": EventTypeWeight(1.0, 5.0)}
    )
    assert [line.split(":")[0] for line in found] == [
        "half_life_s",
        "event_types.a.half_life_s",
        "event_types.a.action_weight",
    ]
