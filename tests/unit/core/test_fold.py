"""Who enters and leaves, when and why; all numbers computed by hand.

Unless a test says otherwise, half-lives are 1,000 s and one event weighs 1.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

import pytest

from stream_app.core import fold
from stream_app.core.decay import NEVER_MS, EventTypeWeight, Weights
from stream_app.core.event import Event
from stream_app.core.fold import MAX_ASSETS, MAX_EVENT_TYPES, MAX_LABELS, Fold, event_digest
from stream_app.core.profile import Profile, weights_at
from stream_app.core.segment import Segment
from stream_app.core.segment_set import SegmentSet
from stream_app.core.transition import Cause, Transition, transition_id

H = 1_000_000
"""The half-life in milliseconds."""
WEIGHTS = Weights(
    half_life_s=1_000,
    event_types={
        "buy": EventTypeWeight(4.0),
        "idle": EventTypeWeight(0.0),
        "slow": EventTypeWeight(1.0, 2_000),
        "fast": EventTypeWeight(1.0, 1),
    },
)
SWIM = Segment("swim", labels=("swimwear",), min_weight=0.5)


def fold_of(*segments: Segment, weights: Weights = WEIGHTS, keeps_seen: bool = False) -> Fold:
    return Fold(SegmentSet(segments, weights), weights, keeps_seen)


class User:
    """One user whose records come in order; the stream time is the largest instant unless given."""

    def __init__(self, fold: Fold, stream_time_ms: int = 0) -> None:
        self.fold = fold
        self.profile: Profile | None = None
        self.stream_time_ms = stream_time_ms
        self.log: list[Transition] = []
        self.ids = count()

    def does(
        self,
        at_ms: int,
        *labels: str,
        event_type: str = "view",
        asset_id: str | None = None,
        event_id: str | None = None,
    ) -> list[Transition]:
        self.stream_time_ms = max(self.stream_time_ms, at_ms)
        name = f"e-{next(self.ids)}" if event_id is None else event_id
        event = Event("u1", event_type, at_ms, name, labels, asset_id)
        self.profile, found = self.fold.apply(self.profile, event, self.stream_time_ms, offset=next(self.ids))
        self.log += found
        return found

    @property
    def known(self) -> Profile:
        assert self.profile is not None
        return self.profile

    def waits(self, until_ms: int) -> list[Transition]:
        found = self.fold.expire(self.known, until_ms)
        self.log += found
        return found

    def weight(self, event_type: str, label: str, at_ms: int) -> float:
        return weights_at(self.known, self.fold.weights, at_ms)[event_type].labels[label]


def short(transitions: Iterable[Transition]) -> list[tuple[str, str, int, str]]:
    return [(t.segment_id, t.status, t.time_ms, t.cause.value) for t in transitions]


# Weight


def test_the_first_event_of_a_user_makes_a_profile() -> None:
    user = User(fold_of())
    assert user.does(5_000, "swimwear", asset_id="a-1") == []
    assert user.known.applied == 1
    assert user.weight("view", "swimwear", 5_000) == 1.0
    assert weights_at(user.known, WEIGHTS, 5_000)["view"].assets == {"a-1": 1.0}


def test_a_late_event_arrives_already_decayed() -> None:
    user = User(fold_of(), stream_time_ms=3 * H)
    user.does(0, "swimwear")
    assert user.weight("view", "swimwear", 3 * H) == 0.125


def test_keys_are_kept_per_event_type() -> None:
    user = User(fold_of())
    user.does(0, "swimwear")
    user.does(0, "swimwear", event_type="buy")
    assert (user.weight("view", "swimwear", 0), user.weight("buy", "swimwear", 0)) == (1.0, 4.0)


def test_an_event_without_action_weight_is_applied_and_leaves_no_key() -> None:
    user = User(fold_of(SWIM))
    assert user.does(0, "swimwear", event_type="idle") == []
    assert user.known.weights == {}
    assert (user.known.applied, user.known.recent_ids) == (1, event_digest("e-0"))


def test_the_order_of_events_does_not_change_the_weights() -> None:
    times = [7, 4_000_000, 12, 2_500_000, 2_499_999]
    users = [User(fold_of(), stream_time_ms=4_000_000) for _ in range(2)]
    for user, order in zip(users, (times, times[::-1]), strict=True):
        for at_ms in order:
            user.does(at_ms, "swimwear")
    first, second = (user.weight("view", "swimwear", 5_000_000) for user in users)
    assert first == pytest.approx(second, rel=1e-12)
    assert first == pytest.approx(sum(2 ** ((t - 5_000_000) / H) for t in times), rel=1e-12)


def test_the_landmark_moves_before_an_exponent_reaches_500_and_no_weight_changes() -> None:
    user = User(fold_of())
    for step in range(100):
        user.does(5 * step * H, "swimwear")
    assert user.known.landmark_ms == 0
    assert user.known.weights["view"].total > 2.0**495
    before = user.weight("view", "swimwear", 500 * H)
    user.does(500 * H, "swimwear")
    assert user.known.landmark_ms == 500 * H
    assert user.weight("view", "swimwear", 500 * H) == pytest.approx(before + 1, rel=1e-15)
    assert before == pytest.approx(1 / 31, rel=1e-15)  # 2^-5 + 2^-10 + …


def test_the_half_life_of_the_incoming_event_counts_for_the_landmark() -> None:
    user = User(fold_of())
    user.does(0, "swimwear")
    user.does(
        500_000, "swimwear", event_type="fast"
    )  # 500 half-lives of its own, half a half-life of the other
    assert user.known.landmark_ms == 500_000
    assert user.weight("fast", "swimwear", 500_000) == 1.0
    assert user.weight("view", "swimwear", 500_000) == pytest.approx(math.sqrt(0.5), rel=1e-15)


def test_sums_that_underflow_are_zero_and_stay_finite() -> None:
    user = User(fold_of(SWIM))
    user.does(0, "swimwear", event_type="fast")
    user.does(0, "swimwear", event_type="slow")
    user.does(2_000_000, "swimwear", event_type="fast")  # 2,000 half-lives later
    user.does(0, "swimwear", event_type="fast")  # as late
    assert user.weight("fast", "swimwear", 2_000_000) == 1.0
    assert user.known.weights["fast"].total == 1.0


# Membership


def test_an_enter_says_everything() -> None:
    user = User(fold_of(SWIM))
    (entered,) = user.does(5_000, "swimwear")
    assert entered == Transition(
        id=transition_id("u1", "swim", 5_000, 1),
        user_id="u1",
        segment_id="swim",
        segment_type="base",
        segment_version=SWIM.version,
        status="entered",
        cause=Cause.EVENT,
        seq=1,
        time_ms=5_000,
        weight=1.0,
        min_weight=0.5,
        exits_at_ms=5_000 + H,
        event_id="e-0",
        offset=1,
    )


def test_an_exit_by_decay_carries_its_own_instant_and_no_event() -> None:
    user = User(fold_of(SWIM))
    user.does(5_000, "swimwear")
    assert user.waits(5_000 + H - 1) == []
    (exited,) = user.waits(9 * H)
    assert (exited.status, exited.cause, exited.seq, exited.time_ms) == ("exited", Cause.DECAY, 2, 5_000 + H)
    assert (exited.weight, exited.exits_at_ms, exited.event_id, exited.offset) == (0.5, None, None, None)
    assert user.known.next_exit_ms is None
    assert user.waits(10 * H) == []


def test_an_event_moves_the_exit_later() -> None:
    user = User(fold_of(SWIM))
    user.does(0, "swimwear")
    assert user.does(0, "swimwear") == []
    assert user.known.exits_at_ms == {"swim": 2 * H}
    user.does(H, "other")
    assert user.known.exits_at_ms == {"swim": 2 * H}


def test_a_late_event_never_causes_a_false_enter() -> None:
    user = User(fold_of(SWIM), stream_time_ms=2 * H)
    assert user.does(0, "swimwear") == []
    assert not user.known.is_member("swim")


def test_a_late_event_that_still_counts_enters_at_stream_time() -> None:
    user = User(fold_of(SWIM), stream_time_ms=H // 2)
    (entered,) = user.does(0, "swimwear")
    assert (entered.time_ms, entered.exits_at_ms) == (H // 2, H)
    assert entered.weight == pytest.approx(math.sqrt(0.5), rel=1e-15)


def test_nobody_enters_for_less_than_ten_milliseconds() -> None:
    exactly = Segment("exactly", labels=("a",), min_weight=1.0)
    user = User(fold_of(exactly))
    assert user.does(0, "a") == []
    assert short(user.does(5, "a")) == [("exactly", "entered", 5, "event")]


@pytest.mark.parametrize(("held_ms", "enters"), [(9, False), (10, True)])
def test_holding_for_exactly_ten_milliseconds_is_enough(held_ms: int, enters: bool) -> None:
    user = User(fold_of(SWIM), stream_time_ms=H - held_ms)
    assert bool(user.does(0, "swimwear")) is enters


def test_an_any_criterion_is_its_largest_item_and_never_the_sum() -> None:
    user = User(fold_of(Segment("any", labels=("a", "b"), min_weight=1.5)))
    assert user.does(0, "a", "b") == []
    (entered,) = user.does(0, "b")
    assert (entered.weight, entered.exits_at_ms) == (2.0, round(H * math.log2(2 / 1.5)))


def test_an_any_criterion_ends_with_its_latest_item() -> None:
    user = User(fold_of(Segment("any", labels=("a", "b"), min_weight=0.5)))
    user.does(0, "a")
    user.does(H // 2, "b")
    assert user.known.exits_at_ms == {"any": H + H // 2}
    user.does(H // 2 + 1, "a")  # a is now 2^-0.5 + 1
    assert user.known.exits_at_ms["any"] > H + H // 2


def test_an_all_criterion_needs_every_item_and_ends_with_the_earliest() -> None:
    user = User(fold_of(Segment("all", labels=("a", "b"), match_labels="all", min_weight=0.5)))
    assert user.does(0, "a") == []
    (entered,) = user.does(H // 2, "b")
    assert entered.weight == pytest.approx(math.sqrt(0.5), rel=1e-15)
    assert entered.exits_at_ms == H
    user.does(H // 2, "a")
    assert user.known.exits_at_ms == {"all": H + H // 2}


def test_labels_and_assets_must_both_hold_and_the_smaller_is_published() -> None:
    user = User(fold_of(Segment("both", labels=("a",), asset_ids=("x", "y"), min_weight=0.5)))
    assert user.does(0, "a", event_type="buy") == []
    (entered,) = user.does(0, asset_id="y")
    assert (entered.weight, entered.exits_at_ms) == (1.0, H)


def test_event_types_restrict_what_is_summed() -> None:
    user = User(fold_of(Segment("bought", labels=("a",), event_types=("buy", "slow"), min_weight=0.5)))
    assert user.does(0, "a", event_type="view") == []
    (entered,) = user.does(0, "a", event_type="buy")
    assert (entered.weight, entered.exits_at_ms) == (4.0, 3 * H)


def test_without_event_types_an_item_sums_over_all_of_them() -> None:
    user = User(fold_of(Segment("any-type", labels=("a",), min_weight=5.0, exit_weight=2.5)))
    user.does(0, "a", event_type="buy")
    (entered,) = user.does(0, "a")
    assert (entered.weight, entered.exits_at_ms) == (5.0, H)


def test_event_types_alone_are_the_items() -> None:
    user = User(fold_of(Segment("active", event_types=("view", "buy"), min_weight=1.5)))
    assert user.does(0, "a") == []
    assert short(user.does(0, event_type="idle")) == []
    (entered,) = user.does(0, "b")
    assert (entered.weight, entered.exits_at_ms) == (2.0, round(H * math.log2(2 / 1.5)))


def test_several_half_lives_in_one_sum_leave_where_the_sum_crosses() -> None:
    # y = 2^(-t/2000 s): y² + y = 1 where y is the inverse of the golden ratio.
    user = User(fold_of(Segment("mixed", labels=("a",), min_weight=1.0)))
    user.does(0, "a")
    (entered,) = user.does(0, "a", event_type="slow")
    assert entered.exits_at_ms == round(-2 * H * math.log2((math.sqrt(5) - 1) / 2)) == 1_388_484


def test_a_minimum_of_zero_means_any_history_above_the_floor() -> None:
    user = User(fold_of(Segment("seen", labels=("a",))))
    (entered,) = user.does(0, "a")
    assert (entered.min_weight, entered.exits_at_ms) == (0.0, round(H * math.log2(1_000)))


def test_weights_are_compared_with_slack_in_the_members_favour() -> None:
    just_below = Segment("just", labels=("a",), min_weight=1.0 + 9e-10, exit_weight=0.5)
    clearly_below = Segment("clear", labels=("a",), min_weight=1.0 + 2e-9, exit_weight=0.5)
    assert short(User(fold_of(just_below, clearly_below)).does(0, "a")) == [("just", "entered", 0, "event")]


def test_hysteresis_enters_high_and_leaves_low() -> None:
    user = User(fold_of(Segment("h", labels=("a",), min_weight=1.5, exit_weight=0.5)))
    user.does(0, "a")
    (entered,) = user.does(0, "a")
    assert entered.exits_at_ms == 2 * H
    assert user.does(H, "b") == []
    assert short(user.waits(2 * H)) == [("h", "exited", 2 * H, "decay")]
    assert user.does(2 * H + 1, "a") == []  # just below 1.5: above the exit threshold is not enough


def test_what_never_ends_by_decay_says_so() -> None:
    weights = Weights(half_life_s=1e12)
    user = User(fold_of(SWIM, weights=weights))
    (entered,) = user.does(0, "swimwear")
    assert entered.exits_at_ms is None
    assert user.known.exits_at_ms == {"swim": NEVER_MS}
    assert user.known.next_exit_ms is None
    assert user.waits(NEVER_MS - 1) == []


# Exclusion

LOYAL = Segment("loyal", labels=("a",), min_weight=2.5)
FRESH = Segment("fresh", labels=("a",), min_weight=0.5, exclude=("loyal",))


def test_an_excluded_segment_suppresses_and_lets_go() -> None:
    user = User(fold_of(LOYAL, FRESH))
    user.does(0, "a")
    user.does(0, "a")
    assert short(user.does(0, "a")) == [("fresh", "exited", 0, "event"), ("loyal", "entered", 0, "event")]
    left_ms = round(H * math.log2(3 / 2.5))
    back = user.waits(left_ms)
    assert short(back) == [("loyal", "exited", left_ms, "decay"), ("fresh", "entered", left_ms, "decay")]
    assert back[1].exits_at_ms == round(H * math.log2(6))
    assert [t.seq for t in user.log] == [1, 2, 1, 2, 3]


def test_a_suppressed_segment_comes_back_at_min_weight_not_at_exit_weight() -> None:
    fresh = Segment("fresh", labels=("a",), min_weight=3.5, exit_weight=0.5, exclude=("loyal",))
    user = User(fold_of(LOYAL, fresh))
    user.does(0, "a", event_type="buy")  # 4.0 is enough for both: loyal is first in topological order
    assert short(user.log) == [("loyal", "entered", 0, "event")]
    assert short(user.waits(H)) == [("loyal", "exited", round(H * math.log2(4 / 2.5)), "decay")]


def test_a_chain_of_exclusion_is_settled_in_one_evaluation() -> None:
    chain = (
        Segment("c1", labels=("a",), min_weight=0.5),
        Segment("b2", labels=("b",), min_weight=0.1, exclude=("c1",)),
        Segment("a3", labels=("b",), min_weight=0.1, exclude=("b2",)),
    )
    user = User(fold_of(*chain))
    assert short(user.does(0, "b")) == [("b2", "entered", 0, "event")]
    assert short(user.does(0, "a")) == [
        ("b2", "exited", 0, "event"),
        ("a3", "entered", 0, "event"),
        ("c1", "entered", 0, "event"),
    ]
    assert short(user.waits(H)) == [
        ("a3", "exited", H, "decay"),
        ("c1", "exited", H, "decay"),
        ("b2", "entered", H, "decay"),
    ]


def test_who_is_let_in_by_an_exit_must_hold_for_ten_milliseconds_from_it() -> None:
    # Both labels begin at 0; loyal ends at H, the other 5 ms later.
    loyal = Segment("loyal", labels=("a",), min_weight=0.5)
    rest = Segment("rest", labels=("b",), min_weight=2 ** -(1 + 5 / H), exclude=("loyal",))
    user = User(fold_of(loyal, rest))
    user.does(0, "a", "b")
    assert short(user.waits(3 * H)) == [("loyal", "exited", H, "decay")]


def test_who_is_let_in_by_an_exit_may_leave_before_the_record_that_reveals_it() -> None:
    loyal = Segment("loyal", labels=("a",), min_weight=0.5)
    rest = Segment("rest", labels=("b",), min_weight=0.25, exclude=("loyal",))
    user = User(fold_of(loyal, rest))
    user.does(0, "a", "b")
    assert short(user.does(3 * H, "c")) == [
        ("loyal", "exited", H, "decay"),
        ("rest", "entered", H, "decay"),
        ("rest", "exited", 2 * H, "decay"),
    ]


# Time


def test_exits_due_happen_before_the_event_instant_by_instant_by_segment_id() -> None:
    segments = [
        Segment("z", labels=("a",), min_weight=0.5),
        Segment("y", labels=("a",), min_weight=0.5),
        Segment("x", labels=("a",), min_weight=0.25),
    ]
    user = User(fold_of(*segments))
    user.does(0, "a")
    assert short(user.does(5 * H, "a")) == [
        ("y", "exited", H, "decay"),
        ("z", "exited", H, "decay"),
        ("x", "exited", 2 * H, "decay"),
        ("x", "entered", 5 * H, "event"),
        ("y", "entered", 5 * H, "event"),
        ("z", "entered", 5 * H, "event"),
    ]


def test_a_user_may_leave_and_come_back_at_one_instant() -> None:
    user = User(fold_of(SWIM))
    user.does(0, "swimwear")
    assert short(user.does(H, "swimwear")) == [
        ("swim", "exited", H, "decay"),
        ("swim", "entered", H, "event"),
    ]
    assert [t.seq for t in user.log] == [1, 2, 3]


def test_transitions_are_never_before_the_users_last() -> None:
    user = User(fold_of(SWIM))
    user.does(0, "swimwear")
    user.waits(H)  # the timer, ahead of the stream time
    assert short(user.does(10, "swimwear")) == [("swim", "entered", H, "event")]


def test_the_event_time_decides_the_weight_and_the_stream_time_the_instant() -> None:
    user = User(fold_of(SWIM), stream_time_ms=100)
    (entered,) = user.does(60, "swimwear")
    assert (entered.time_ms, entered.exits_at_ms) == (100, 60 + H)


# Duplicates


def test_a_duplicate_among_the_last_32_adds_nothing() -> None:
    user = User(fold_of())
    user.does(0, "a", event_id="twice")
    for _ in range(31):
        user.does(0, "b")
    user.does(0, "a", event_id="twice")
    assert user.weight("view", "a", 0) == 1.0
    assert (user.known.applied, len(user.known.recent_ids)) == (32, 8 * 32)


def test_a_duplicate_after_32_others_counts_again() -> None:
    user = User(fold_of())
    user.does(0, "a", event_id="twice")
    for _ in range(32):
        user.does(0, "b")
    user.does(0, "a", event_id="twice")
    assert user.weight("view", "a", 0) == 2.0


def test_exits_happen_even_when_a_duplicate_reveals_them() -> None:
    user = User(fold_of(SWIM))
    user.does(0, "swimwear", event_id="twice")
    assert short(user.does(2 * H, "swimwear", event_id="twice")) == [("swim", "exited", H, "decay")]
    assert user.known.applied == 1


# Forgetting

FORGET_MS = round(H * math.log2(1_000))


def test_the_forget_instant_is_where_the_last_type_reaches_the_floor() -> None:
    user = User(fold_of())
    user.does(0, "a")
    assert user.known.forget_ms == FORGET_MS == 9_965_784
    user.does(0, "a", event_type="slow")
    assert user.known.forget_ms == round(2 * H * math.log2(1_000))


def test_the_forget_instant_is_at_least_a_half_life_after_the_last_event() -> None:
    user = User(fold_of(), stream_time_ms=20 * H)
    user.does(0, "a")
    assert user.known.forget_ms == 21 * H
    user.does(20 * H, event_type="idle")
    assert user.known.forget_ms == 21 * H


@pytest.mark.parametrize(("at_ms", "applied"), [(FORGET_MS, 2), (FORGET_MS + 1, 1)])
def test_a_record_past_the_forget_instant_begins_a_new_profile(at_ms: int, applied: int) -> None:
    user = User(fold_of(SWIM))
    user.does(0, "swimwear", event_id="first")
    user.does(at_ms, "other")
    assert user.known.applied == applied


def test_a_new_profile_numbers_from_one_and_forgets_ids() -> None:
    user = User(fold_of(SWIM))
    user.does(0, "swimwear", event_id="again")
    found = user.does(FORGET_MS + 1, "swimwear", event_id="again")
    assert [(t.status, t.seq, t.time_ms) for t in found] == [("exited", 2, H), ("entered", 1, FORGET_MS + 1)]
    assert len({t.id for t in user.log}) == 3


def test_a_member_past_the_forget_instant_is_not_forgotten() -> None:
    # Each type alone reaches the floor at the forget instant; together they are above it.
    user = User(fold_of(Segment("seen", labels=("a",))))
    user.does(0, "a")
    user.does(0, "a", event_type="more")
    assert (user.known.forget_ms, user.known.exits_at_ms["seen"]) == (FORGET_MS, FORGET_MS + H)
    user.does(FORGET_MS + 5, "b")
    assert user.known.applied == 3


def test_what_is_fainter_than_a_thousandth_of_the_floor_stays_until_the_64th_event() -> None:
    user = User(fold_of())
    user.does(0, "faint", asset_id="old", event_type="gone")
    user.does(0, "faint")
    user.does(100_000, "kept")
    for step in range(60):
        user.does((step + 1) * H // 3, "b")
    assert user.known.applied == 63
    assert user.known.weights["view"].labels.keys() == {"faint", "kept", "b"}
    user.does(20 * H, "b")  # the 64th: 2^-20 is below 1e-6, 2^-19.9 is above it
    assert user.known.weights.keys() == {"view"}
    assert user.known.weights["view"].labels.keys() == {"kept", "b"}


def test_dropping_a_key_leaves_memberships_and_their_exits_alone() -> None:
    weights = Weights(half_life_s=1_000, history_floor=0.5, event_types={"buy": EventTypeWeight(1e9)})
    user = User(fold_of(Segment("seen", labels=("a",), min_weight=0.5), weights=weights))
    for _ in range(63):
        user.does(0, "a", event_type="buy")
    exits = dict(user.known.exits_at_ms)
    assert user.does(exits["seen"] - 1, "b", event_type="buy") == []
    assert user.known.exits_at_ms == exits


@pytest.mark.parametrize("kind", ["label", "asset"])
def test_a_cap_drops_the_faintest_down_to_seven_eighths_but_nothing_named(kind: str) -> None:
    cap = MAX_LABELS if kind == "label" else MAX_ASSETS
    named = "item-0000"
    by_kind = {"label": Segment("s", labels=(named,)), "asset": Segment("s", asset_ids=(named,))}
    user = User(fold_of(by_kind[kind]))
    for i in range(cap):
        item = f"item-{i:04}"
        user.does(i, *((item,) if kind == "label" else ()), asset_id=item if kind == "asset" else None)
    items = user.known.weights["view"].labels if kind == "label" else user.known.weights["view"].assets
    assert len(items) == cap
    user.does(
        cap, *(("one-more",) if kind == "label" else ()), asset_id="one-more" if kind == "asset" else None
    )
    assert len(items) == cap * 7 // 8
    dropped = cap + 1 - cap * 7 // 8
    assert set(items) == {named, "one-more"} | {f"item-{i:04}" for i in range(dropped + 1, cap)}


def test_a_cap_counts_a_label_once_over_all_event_types() -> None:
    user = User(fold_of())
    for i in range(MAX_LABELS):
        user.does(0, f"label-{i}")
        user.does(0, f"label-{i}", event_type="buy")
    assert len(user.known.weights["view"].labels) == MAX_LABELS


def test_a_label_over_a_cap_is_dropped_from_every_event_type() -> None:
    user = User(fold_of())
    user.does(0, "faintest", event_type="slow")
    user.does(0, "faintest")
    for i in range(MAX_LABELS):
        user.does(30, f"label-{i}", event_type="buy")
    assert "faintest" not in user.known.weights["view"].labels
    assert "faintest" not in user.known.weights["slow"].labels


def test_what_is_named_may_exceed_a_cap() -> None:
    names = tuple(f"label-{i}" for i in range(MAX_LABELS + 9))
    user = User(fold_of(Segment("many", labels=names), weights=WEIGHTS))
    for name in names:
        user.does(0, name)
    user.does(0, "unnamed")
    assert user.known.weights["view"].labels.keys() == set(names)


def test_too_many_event_types_are_dropped_by_the_same_rule() -> None:
    segments = [
        Segment("by-type", event_types=("type-00",), min_weight=0.5),
        Segment("by-label", labels=("named",), min_weight=0.5),
        Segment("by-asset", asset_ids=("named",), min_weight=0.5),
    ]
    user = User(fold_of(*segments))
    user.does(0, event_type="type-00")
    user.does(1, "named", event_type="type-01")
    user.does(2, asset_id="named", event_type="type-02")
    for i in range(3, MAX_EVENT_TYPES + 1):
        user.does(i, "other", event_type=f"type-{i:02}")
    assert user.known.weights.keys() == {f"type-{i:02}" for i in (0, 1, 2, *range(12, MAX_EVENT_TYPES + 1))}
    assert len(user.known.weights) == 56


# Definitions


def test_a_profile_of_other_definitions_is_refused_until_it_is_redefined() -> None:
    user = User(fold_of(SWIM))
    user.does(0, "swimwear")
    other = fold_of(LOYAL)
    with pytest.raises(ValueError, match="redefine it first"):
        other.expire(user.known, 0)
    with pytest.raises(ValueError, match="redefine it first"):
        other.apply(user.known, Event("u1", "view", 0, "x"), 0)
    with pytest.raises(ValueError, match="redefine it first"):
        other.redefine(user.known, 0, SegmentSet([FRESH, LOYAL], WEIGHTS))


def redefined(
    before: Sequence[Segment], after: Sequence[Segment], at_ms: int, **changes: Any
) -> list[Transition]:
    user = User(fold_of(*before))
    user.does(0, "a", asset_id="x", **changes)
    found = fold_of(*after).redefine(user.known, at_ms, user.fold.segments)
    assert user.known.definitions == SegmentSet(after, WEIGHTS).fingerprint
    return found


def test_exits_due_under_the_old_definitions_come_first() -> None:
    old = Segment("old", labels=("a",), min_weight=0.5)
    new = Segment("new", labels=("a",), min_weight=0.2)
    found = redefined([old], [old, new], 2 * H)
    assert short(found) == [("old", "exited", H, "decay"), ("new", "entered", 2 * H, "definition")]


def test_members_of_a_removed_segment_leave_under_its_old_definition() -> None:
    old = Segment("old", labels=("a",), min_weight=0.5)
    (exited,) = redefined([old], [], H // 2)
    assert (exited.status, exited.cause, exited.seq) == ("exited", Cause.DEFINITION, 2)
    assert (exited.segment_version, exited.min_weight) == (old.version, 0.5)
    assert exited.weight == pytest.approx(math.sqrt(0.5), rel=1e-15)


def test_a_member_stays_without_a_transition_if_the_new_exit_threshold_allows() -> None:
    before = Segment("s", labels=("a",), min_weight=0.5)
    after = Segment("s", labels=("a",), min_weight=0.9, exit_weight=0.25)
    user = User(fold_of(before))
    user.does(0, "a")
    assert fold_of(after).redefine(user.known, H // 2, user.fold.segments) == []
    assert user.known.exits_at_ms == {"s": 2 * H}


def test_a_member_below_the_new_exit_threshold_leaves() -> None:
    before = Segment("s", labels=("a",), min_weight=0.5)
    after = Segment("s", labels=("a",), min_weight=0.9)
    (exited,) = redefined([before], [after], H // 2)
    assert (exited.status, exited.time_ms, exited.segment_version) == ("exited", H // 2, after.version)


def test_a_new_exclusion_puts_members_out() -> None:
    a = Segment("a", labels=("a",), min_weight=0.5)
    b = Segment("b", asset_ids=("x",), min_weight=0.5)
    suppressed = Segment("b", asset_ids=("x",), min_weight=0.5, exclude=("a",))
    assert short(redefined([a, b], [a, suppressed], 5)) == [("b", "exited", 5, "definition")]
    assert short(redefined([a, suppressed], [a, b], 5)) == [("b", "entered", 5, "definition")]


def test_changes_by_definition_are_exits_first_each_by_id() -> None:
    before = [Segment(name, labels=("a",), min_weight=0.5) for name in ("d", "b")]
    after = [Segment(name, labels=("a",), min_weight=0.5) for name in ("c", "a")]
    assert [(t.segment_id, t.status) for t in redefined(before, after, 5)] == [
        ("b", "exited"),
        ("d", "exited"),
        ("a", "entered"),
        ("c", "entered"),
    ]


def test_every_kind_of_item_lets_a_user_into_a_new_segment() -> None:
    after = [
        Segment("label", labels=("a",), min_weight=0.5),
        Segment("typed", labels=("a",), event_types=("buy",), min_weight=0.5),
        Segment("asset", asset_ids=("x",), min_weight=0.5),
        Segment("type", event_types=("buy",), min_weight=0.5),
        Segment("both", labels=("a",), asset_ids=("x",), min_weight=0.5),
        Segment("not", labels=("b",), min_weight=0.5),
    ]
    found = redefined([], after, 5, event_type="buy")
    assert [t.segment_id for t in found] == ["asset", "both", "label", "type", "typed"]


def test_redefining_is_never_before_the_users_last_transition() -> None:
    user = User(fold_of(SWIM))
    user.does(0, "swimwear")
    user.waits(H)
    low = Segment("low", labels=("swimwear",), min_weight=0.25)
    assert short(fold_of(low).redefine(user.known, 10, user.fold.segments)) == [
        ("low", "entered", H, "definition")
    ]


# What an event costs


@pytest.mark.skipif(
    not str(fold.__file__).endswith(".py"), reason="watches a method, which a compiled class does not allow"
)
def test_an_event_looks_only_at_segments_that_name_what_it_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [Segment(f"o-{i}", labels=(f"other-{i}",), asset_ids=(f"a-{i}",)) for i in range(200)]
    typed = [Segment(f"t-{i}", labels=("a",), asset_ids=("x",), event_types=("buy",)) for i in range(200)]
    user = User(fold_of(Segment("both", labels=("a",), asset_ids=("x",)), *others, *typed))
    looked_at = []
    standing = Fold._standing

    def spy(self: Fold, profile: Profile, rule: Any, at_ms: int) -> tuple[float, int]:
        looked_at.append(rule.id)
        return standing(self, profile, rule, at_ms)

    monkeypatch.setattr(Fold, "_standing", spy)
    user.does(0, "a", asset_id="x")
    assert set(looked_at) == {"both"}


def test_discovery_segments_are_not_decided_here() -> None:
    user = User(fold_of(Segment("next", type="discovery", labels=("a",), min_weight=0.1)))
    assert user.does(0, "a") == []


def test_an_item_above_the_exit_threshold_lets_in_what_would_have_left_at_once() -> None:
    weights = Weights(
        half_life_s=1_000,
        event_types={"fast": EventTypeWeight(1.0, 0.005), "slow": EventTypeWeight(0.9, 1_000)},
    )
    segment = Segment("either", labels=("x", "y"), min_weight=1.0, exit_weight=0.5)
    fold = Fold(SegmentSet([segment], weights), weights)
    profile, refused = fold.apply(None, Event("u", "fast", 1_000, "e-1", ("x",)), 1_000)
    assert refused == []  # x is high enough and would be gone after 5 ms
    _, entered = fold.apply(profile, Event("u", "slow", 1_000, "e-2", ("y",)), 1_000)
    assert [(t.status, t.weight) for t in entered] == [("entered", 1.0)]  # y is below 1 and stays above 0.5


# What the next-category model reads


def labels_of(user: User) -> set[str]:
    return {label for sums in user.known.weights.values() for label in sums.labels}


def test_without_the_model_no_engagement_is_noted() -> None:
    user = User(fold_of(SWIM))
    user.does(5, "swimwear")
    assert user.known.seen_ms == {}


def test_with_the_model_labels_are_noted_the_latest_engaged_last() -> None:
    user = User(fold_of(SWIM, keeps_seen=True))
    user.does(5, "swimwear", "beach")
    user.does(6, "tea", event_type="buy")
    user.does(7, asset_id="a-1")
    user.does(8, "beach", event_type="buy")
    assert list(user.known.seen_ms.items()) == [("swimwear", 5), ("tea", 6), ("beach", 8)]


def test_a_late_engagement_is_the_latest_to_come_and_does_not_take_the_instant_back() -> None:
    user = User(fold_of(keeps_seen=True), stream_time_ms=1_000)
    user.does(900, "a", "b")
    user.does(400, "a", "c")
    assert list(user.known.seen_ms.items()) == [("b", 900), ("a", 900), ("c", 400)]


def test_a_late_first_label_is_noted_at_its_own_instant() -> None:
    user = User(fold_of(keeps_seen=True))
    user.does(5_000)
    user.does(1_000, "a")
    assert user.known.seen_ms == {"a": 1_000}


def test_what_leaves_no_key_is_not_noted() -> None:
    user = User(fold_of(keeps_seen=True))
    user.does(5, "a")
    user.does(6, "a", "b", event_type="idle")
    user.does(7, "c", event_id="e-0")  # a duplicate
    assert user.known.seen_ms == {"a": 5}


def test_moving_the_landmark_moves_no_engagement() -> None:
    user = User(fold_of(keeps_seen=True))
    for step in range(57):
        user.does(9 * step * H, "a" if step else "first")
    assert user.known.landmark_ms == 504 * H
    assert user.known.seen_ms == {"first": 0, "a": 504 * H}


def test_a_new_profile_has_engaged_nothing() -> None:
    user = User(fold_of(keeps_seen=True))
    user.does(0, "a")
    user.does(FORGET_MS + 1, "b")
    assert user.known.seen_ms == {"b": FORGET_MS + 1}


def test_what_the_64th_event_drops_was_not_engaged() -> None:
    user = User(fold_of(keeps_seen=True))
    user.does(0, "faint", "both", event_type="gone")
    user.does(0, "faint")
    user.does(100_000, "kept", "both")
    for step in range(60):
        user.does((step + 1) * H // 3, "b")
    assert user.known.seen_ms.keys() == {"faint", "both", "kept", "b"}
    user.does(20 * H, "b")
    assert list(user.known.seen_ms.items()) == [("kept", 100_000), ("both", 100_000), ("b", 20 * H)]


def test_what_a_cap_of_labels_drops_was_not_engaged() -> None:
    named = "label-0000"
    user = User(fold_of(Segment("s", labels=(named,)), keeps_seen=True))
    for i in range(MAX_LABELS):
        user.does(i, f"label-{i:04}")
    assert len(user.known.seen_ms) == MAX_LABELS
    user.does(MAX_LABELS, "one-more")
    assert len(user.known.seen_ms) == MAX_LABELS * 7 // 8
    assert user.known.seen_ms.keys() == labels_of(user)
    assert (user.known.seen_ms[named], user.known.seen_ms["one-more"]) == (0, MAX_LABELS)
    assert "label-0001" not in user.known.seen_ms


def test_what_a_cap_of_event_types_drops_was_not_engaged() -> None:
    user = User(fold_of(keeps_seen=True))
    user.does(0, "only-there", "elsewhere-too", event_type="type-00")
    for i in range(1, MAX_EVENT_TYPES + 1):
        user.does(i, "elsewhere-too", event_type=f"type-{i:02}")
    assert "type-00" not in user.known.weights
    assert user.known.seen_ms == {"elsewhere-too": MAX_EVENT_TYPES}


def test_without_the_model_what_it_had_noted_goes() -> None:
    user = User(fold_of(SWIM, keeps_seen=True))
    user.does(5, "swimwear", "beach")
    user.fold = fold_of(SWIM)
    user.does(6, "tea")
    assert user.known.seen_ms == {}


@pytest.mark.parametrize("labels", [("tea",), ("beach",), ()])
def test_with_the_model_on_again_everything_that_was_engaged_is_taken_over(labels: tuple[str, ...]) -> None:
    user = User(fold_of(SWIM))
    user.does(5, "swimwear", "beach")
    user.does(6, "coffee", event_type="buy")
    user.fold = fold_of(SWIM, keeps_seen=True)
    user.does(70, *labels)
    assert user.known.seen_ms.keys() == labels_of(user) == {"swimwear", "beach", "coffee", *labels}
    # When, is not known better than the beginning of the profile.
    assert [user.known.seen_ms[label] for label in labels] == [70 for _ in labels]
    assert {user.known.seen_ms[label] for label in labels_of(user) - set(labels)} == {5}
    assert list(user.known.seen_ms)[-1] == (labels or ("coffee",))[0]


def test_noting_engagements_changes_nothing_else() -> None:
    users = [User(fold_of(SWIM, keeps_seen=keeps_seen)) for keeps_seen in (False, True)]
    for user in users:
        for step in range(200):
            user.does(step * H // 7, "swimwear" if step % 9 == 0 else f"label-{step % 5}")
        user.waits(300 * H)
    assert users[0].log == users[1].log
    users[1].known.seen_ms = {}
    assert users[0].known == users[1].known
