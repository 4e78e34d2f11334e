"""Who enters and leaves discovery segments when he is scored, acts, or is left alone; numbers chosen by hand.

Half-lives are 1,000 s, so one view keeps a profile for 9,965 s; a membership lasts 10 s without a scoring.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from stream_app.core.decay import EventTypeWeight, Weights
from stream_app.core.discovery import EXIT_SHARE, DiscoveryRules, discover, end_leases
from stream_app.core.event import Event
from stream_app.core.fold import Fold
from stream_app.core.profile import Discovery, Profile, pack, unpack
from stream_app.core.scores import Recommendation
from stream_app.core.segment import Segment
from stream_app.core.segment_set import SegmentSet
from stream_app.core.transition import Cause, Transition, transition_id

H = 1_000_000
"""The half-life in milliseconds."""
AGE = 10_000
"""How long a membership lasts without another scoring, in milliseconds."""
FORGET_MS = 9_965_784
"""H·log2(1,000): where one view at 0 reaches the floor."""
WEIGHTS = Weights(half_life_s=1_000, event_types={"idle": EventTypeWeight(0.0)})


def discovery(segment_id: str = "next", **criteria: Any) -> Segment:
    return Segment(segment_id, type="discovery", **criteria)


def tip(
    *labels: str, weight: float = 0.5, event_type: str = "view", asset_id: str | None = None
) -> Recommendation:
    return Recommendation(event_type, asset_id, labels, weight, weight / 2)


SWIM = discovery("swim-next", labels=("swimwear",), min_weight=0.4)
SKI = discovery("ski-next", labels=("ski",), min_weight=0.4)
LOYAL = Segment("loyal", labels=("tea",), min_weight=0.5)
NEW_TO_SWIM = discovery("swim-next", labels=("swimwear",), min_weight=0.4, exclude=("loyal",))


class User:
    """A user of the fold who is scored when a test says so."""

    def __init__(self, *segments: Segment) -> None:
        self.segments = SegmentSet(segments, WEIGHTS)
        self.fold = Fold(self.segments, WEIGHTS, keeps_seen=True)
        self.rules = DiscoveryRules(self.segments)
        self.profile = Profile("u1", 0, definitions=self.segments.fingerprint, forget_ms=FORGET_MS)
        self.offset = 0
        self.log: list[Transition] = []

    def does(
        self, at_ms: int, *labels: str, event_type: str = "view", event_id: str | None = None
    ) -> list[Transition]:
        event = Event("u1", event_type, at_ms, event_id or f"e-{self.offset}", labels)
        self.profile, found = self.fold.apply(self.profile, event, at_ms, self.offset)
        self.offset += 1
        self.log += found
        return found

    def scored(
        self,
        at_ms: int,
        *tips: Recommendation,
        age_ms: int = AGE,
        accuracy: dict[str, dict[str, float]] | None = None,
    ) -> list[Transition]:
        found = discover(
            self.profile,
            tips,
            self.rules,
            at_ms,
            max_age_ms=age_ms,
            model_version="m-1",
            accuracy=accuracy,
        )
        self.log += found
        return found

    def waits(self, until_ms: int) -> list[Transition]:
        found = self.fold.expire(self.profile, until_ms)
        self.log += found
        return found

    def redefined(self, at_ms: int, *segments: Segment) -> list[Transition]:
        old = self.segments
        self.segments = SegmentSet(segments, WEIGHTS)
        self.fold = Fold(self.segments, WEIGHTS, keeps_seen=True)
        self.rules = DiscoveryRules(self.segments)
        found = self.fold.redefine(self.profile, at_ms, old)
        self.log += found
        return found

    def is_in(self, segment_id: str) -> bool:
        return segment_id in self.profile.memberships


def short(transitions: Iterable[Transition]) -> list[tuple[str, str, int, str]]:
    return [(t.segment_id, t.status, t.time_ms, t.cause.value) for t in transitions]


def lets_in(segment: Segment, tips: Sequence[Recommendation]) -> bool:
    return bool(User(segment).scored(0, *tips))


# Criteria


@pytest.mark.parametrize(
    ("labels", "holds"),
    [
        (("a", "b"), True),
        (("b", "a"), True),
        (("c", "a", "b"), True),
        (("a",), False),
        (("b",), False),
        (("c",), False),
    ],
)
def test_a_recommendation_must_have_all_the_labels(labels: tuple[str, ...], holds: bool) -> None:
    assert lets_in(discovery(labels=("a", "b")), [tip(*labels)]) is holds


def test_labels_of_different_recommendations_do_not_add_up() -> None:
    assert not lets_in(discovery(labels=("a", "b")), [tip("a"), tip("b")])


def test_match_labels_any_does_not_weaken_all() -> None:
    # In a discovery segment labels are ALL, as the page says; match_labels speaks of base segments.
    assert not lets_in(discovery(labels=("a", "b"), match_labels="any"), [tip("a")])


@pytest.mark.parametrize(("asset_id", "holds"), [("x", True), ("y", True), ("z", False), (None, False)])
def test_a_recommendation_must_have_one_of_the_assets(asset_id: str | None, holds: bool) -> None:
    assert lets_in(discovery(asset_ids=("x", "y")), [tip("a", asset_id=asset_id)]) is holds


@pytest.mark.parametrize(("event_type", "holds"), [("buy", True), ("view", True), ("like", False)])
def test_a_recommendation_must_have_one_of_the_event_types(event_type: str, holds: bool) -> None:
    assert lets_in(discovery(event_types=("buy", "view")), [tip("a", event_type=event_type)]) is holds


@pytest.mark.parametrize("given", range(1, 8))
@pytest.mark.parametrize("wrong", range(8))
def test_every_criterion_that_is_given_must_hold_and_no_other(given: int, wrong: int) -> None:
    criteria: dict[str, Any] = {}
    if given & 1:
        criteria["labels"] = ("a", "b")
    if given & 2:
        criteria["asset_ids"] = ("x", "y")
    if given & 4:
        criteria["event_types"] = ("buy", "order")
    recommendation = tip(
        *(("a", "c") if wrong & 1 else ("c", "b", "a")),
        asset_id="z" if wrong & 2 else "y",
        event_type="view" if wrong & 4 else "order",
    )
    assert lets_in(discovery(**criteria), [recommendation]) is (given & wrong == 0)


def test_one_recommendation_must_meet_all_criteria_by_itself() -> None:
    segment = discovery(labels=("a",), asset_ids=("x",), event_types=("buy",))
    halves = [tip("a", asset_id="y", event_type="buy"), tip("b", asset_id="x", event_type="buy")]
    assert not lets_in(segment, halves)
    assert lets_in(segment, [*halves, tip("a", asset_id="x", event_type="buy")])


def test_base_segments_are_not_let_in_by_scores() -> None:
    assert len(DiscoveryRules(SegmentSet([LOYAL, SWIM], WEIGHTS))) == 1
    assert User(LOYAL).scored(0, tip("tea")) == []


def test_the_rules_say_which_labels_a_segment_names() -> None:
    rules = DiscoveryRules(SegmentSet([LOYAL, SWIM, discovery("any-buy", event_types=("buy",))], WEIGHTS))
    assert rules.labels() == {"swim-next": {"swimwear"}, "any-buy": frozenset()}


# Weights


@pytest.mark.parametrize(("weight", "holds"), [(0.4, True), (0.41, True), (0.39999, False), (0.0, False)])
def test_a_user_enters_from_min_weight_on(weight: float, holds: bool) -> None:
    assert lets_in(SWIM, [tip("swimwear", weight=weight)]) is holds


def test_with_a_minimum_of_zero_being_recommended_is_enough() -> None:
    segment = discovery(labels=("a",))
    assert lets_in(segment, [tip("a", weight=0.0)])
    assert not lets_in(segment, [tip("b", weight=1.0)])


def test_a_member_of_a_segment_without_a_minimum_stays_while_recommended_at_all() -> None:
    user = User(discovery("any", labels=("a",)))
    user.scored(0, tip("a", weight=0.3))
    assert user.scored(1, tip("a", weight=0.0)) == []
    assert short(user.scored(2, tip("b"))) == [("any", "exited", 2, "model")]


@pytest.mark.parametrize("exit_weight", [None, 0.1, 0.4])
def test_a_member_leaves_below_exit_weight_and_comes_back_at_min_weight(exit_weight: float | None) -> None:
    segment = discovery("next", labels=("a",), min_weight=0.4, exit_weight=exit_weight)
    least = EXIT_SHARE * 0.4 if exit_weight is None else exit_weight
    user = User(segment)
    assert user.scored(0, tip("a", weight=0.399)) == []
    assert len(user.scored(1, tip("a", weight=0.4))) == 1
    assert user.scored(2, tip("a", weight=least)) == []
    found = user.scored(3, tip("a", weight=least - 0.001))
    assert short(found) == [("next", "exited", 3, "model")]
    if least < 0.4:
        assert user.scored(4, tip("a", weight=0.399)) == []
    assert short(user.scored(5, tip("a", weight=0.4))) == [("next", "entered", 5, "model")]


def test_with_an_exit_weight_of_zero_a_member_stays_while_recommended_at_all() -> None:
    user = User(discovery("next", labels=("a",), min_weight=0.4, exit_weight=0.0))
    user.scored(0, tip("a"))
    assert user.scored(1, tip("a", weight=0.0)) == []
    assert short(user.scored(2, tip("b"))) == [("next", "exited", 2, "model")]


def test_without_an_exit_weight_it_is_half_of_the_minimum() -> None:
    assert EXIT_SHARE == 0.5
    user = User(discovery(labels=("a",), min_weight=0.5))
    user.scored(0, tip("a", weight=0.5))
    assert user.scored(1, tip("a", weight=0.25)) == []
    assert len(user.scored(2, tip("a", weight=0.2499))) == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_best_of_several_recommendations_decides(order: tuple[int, ...]) -> None:
    tips = [
        tip("a", weight=0.3),
        tip("b", "a", weight=0.6, asset_id="x", event_type="buy"),
        tip("b", weight=0.9),
    ]
    user = User(discovery(labels=("a",), min_weight=0.5))
    (entered,) = user.scored(0, *(tips[place] for place in order))
    assert entered.weight == 0.6
    assert entered.prediction is not None
    assert (entered.prediction.labels, entered.prediction.asset_id) == (("b", "a"), "x")


def test_the_best_of_several_recommendations_keeps_a_member_in() -> None:
    user = User(SWIM)
    user.scored(0, tip("swimwear"))
    assert user.scored(1, tip("swimwear", weight=0.1), tip("beach", "swimwear", weight=0.35)) == []
    assert user.profile.discovery["swim-next"] == Discovery(1, 0, 1 + AGE, ("beach", "swimwear"), 0.35)


# What is said


def test_an_enter_says_everything() -> None:
    user = User(SWIM)
    figures = {"": {"hit@1": 0.2}, "swim-next": {"hit@1": 0.3, "mrr": 0.4}}
    recommendation = tip("beach", "swimwear", weight=0.45, event_type="buy", asset_id="a-1")
    (entered,) = user.scored(5, recommendation, accuracy=figures)
    assert entered.id == transition_id("u1", "swim-next", 5, 1)
    assert (entered.user_id, entered.segment_id, entered.segment_type) == ("u1", "swim-next", "discovery")
    assert (entered.segment_version, entered.min_weight) == (SWIM.version, 0.4)
    assert (entered.status, entered.cause, entered.seq, entered.time_ms) == ("entered", Cause.MODEL, 1, 5)
    assert (entered.weight, entered.exits_at_ms) == (0.45, 5 + AGE)
    assert (entered.event_id, entered.offset, entered.converted) == (None, None, None)
    prediction = entered.prediction
    assert prediction is not None
    assert (prediction.label, prediction.labels) == ("beach", ("beach", "swimwear"))
    assert (prediction.event_type, prediction.asset_id, prediction.score) == ("buy", "a-1", 0.45)
    assert (prediction.model_version, prediction.accuracy) == ("m-1", {"hit@1": 0.3, "mrr": 0.4})


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (None, {}),
        ({}, {}),
        ({"": {"mrr": 0.1}}, {"mrr": 0.1}),
        ({"other": {"mrr": 0.2}}, {}),
        ({"": {"mrr": 0.1}, "swim-next": {}}, {"mrr": 0.1}),
    ],
)
def test_without_figures_of_its_own_a_segment_shows_those_of_the_whole(
    figures: dict[str, dict[str, float]] | None, said: dict[str, float]
) -> None:
    (entered,) = User(SWIM).scored(0, tip("swimwear"), accuracy=figures)
    assert entered.prediction is not None
    assert entered.prediction.accuracy == said


def test_an_exit_because_of_the_scores_carries_the_score_that_was_too_low() -> None:
    user = User(SWIM)
    user.scored(0, tip("swimwear"))
    (exited,) = user.scored(7, tip("swimwear", weight=0.1))
    assert (exited.status, exited.cause, exited.seq, exited.time_ms) == ("exited", Cause.MODEL, 2, 7)
    assert (exited.weight, exited.min_weight, exited.exits_at_ms) == (0.1, 0.4, None)
    assert (exited.event_id, exited.offset, exited.prediction, exited.converted) == (None, None, None, False)
    assert user.profile.discovery["swim-next"] == Discovery(2, 7)


def test_exits_come_before_enters_and_each_is_by_segment_id() -> None:
    names = ["d", "b", "c", "a"]
    segments = [discovery(name, labels=(name,), min_weight=0.4) for name in names]
    user = User(*segments)
    assert short(user.scored(0, tip("d"), tip("b"))) == [
        ("b", "entered", 0, "model"),
        ("d", "entered", 0, "model"),
    ]
    assert short(user.scored(1, tip("c"), tip("a"))) == [
        ("b", "exited", 1, "model"),
        ("d", "exited", 1, "model"),
        ("a", "entered", 1, "model"),
        ("c", "entered", 1, "model"),
    ]


def test_no_change_no_transition() -> None:
    user = User(SWIM, SKI)
    assert user.scored(0, tip("tea")) == []
    assert user.profile.discovery == {}
    user.scored(1, tip("swimwear"))
    assert user.scored(2, tip("swimwear")) == []
    assert user.scored(2, tip("swimwear")) == []


# Conversion


def test_who_engages_what_was_recommended_leaves_at_that_record() -> None:
    user = User(SWIM)
    user.scored(0, tip("swimwear"))
    assert user.does(100, "tea") == []
    (exited,) = user.does(200, "beach", "swimwear")
    assert (exited.status, exited.cause, exited.converted) == ("exited", Cause.EVENT, True)
    assert (exited.time_ms, exited.event_id, exited.offset) == (200, "e-1", 1)
    assert (exited.seq, exited.weight, exited.exits_at_ms, exited.prediction) == (2, 0.5, None, None)
    assert (exited.segment_version, exited.min_weight) == (SWIM.version, 0.4)
    assert exited.id == transition_id("u1", "swim-next", 200, 2)
    assert user.profile.discovery["swim-next"] == Discovery(2, 200)
    assert user.does(300, "swimwear") == []
    assert user.scored(400) == []


def test_engaging_another_label_of_the_recommended_asset_is_a_conversion() -> None:
    user = User(SWIM)
    user.scored(0, tip("swimwear", "beach", asset_id="a-1"))
    assert [t.converted for t in user.does(100, "beach")] == [True]


def test_engaging_something_else_is_no_conversion() -> None:
    user = User(SWIM)
    user.scored(0, tip("swimwear"))
    assert user.does(100, "tea") == []
    assert user.scored(100, tip("swimwear")) == []
    user.does(200, "tea")
    assert [(t.cause, t.converted) for t in user.scored(200)] == [(Cause.MODEL, False)]


def test_an_event_that_leaves_no_key_converts_nobody() -> None:
    user = User(SWIM)
    user.scored(0, tip("swimwear"))
    assert user.does(5, "swimwear", event_type="idle") == []
    assert user.is_in("swim-next")


def test_a_duplicate_converts_nobody() -> None:
    user = User(SWIM)
    user.does(0, "swimwear", event_id="twice")
    user.scored(1, tip("swimwear"))
    assert user.does(2, "swimwear", event_id="twice") == []
    assert user.is_in("swim-next")


def test_what_kept_a_member_in_is_what_converts_him() -> None:
    user = User(discovery("sport", event_types=("view",), min_weight=0.4))
    user.scored(0, tip("swimwear"))
    user.scored(1, tip("ski"))
    assert user.does(2, "swimwear") == []
    assert short(user.does(3, "ski")) == [("sport", "exited", 3, "event")]


def test_one_event_converts_in_every_segment_that_recommended_it() -> None:
    user = User(SWIM, discovery("any-view", event_types=("view",)), SKI)
    user.scored(0, tip("swimwear"), tip("ski", weight=0.45))
    assert short(user.does(10, "swimwear")) == [
        ("any-view", "exited", 10, "event"),
        ("swim-next", "exited", 10, "event"),
    ]
    assert user.is_in("ski-next")


def test_the_record_that_enters_a_base_segment_may_convert_too() -> None:
    user = User(SWIM, Segment("swimmers", labels=("swimwear",), min_weight=0.5))
    user.scored(0, tip("swimwear"))
    assert sorted(short(user.does(5, "swimwear"))) == [
        ("swim-next", "exited", 5, "event"),
        ("swimmers", "entered", 5, "event"),
    ]


def test_another_recommendation_lets_a_converted_user_in_again() -> None:
    user = User(discovery("sport", event_types=("view",), min_weight=0.4))
    user.scored(0, tip("swimwear"))
    (exited,) = user.does(100, "swimwear")
    (entered,) = user.scored(400, tip("ski", weight=0.6))
    assert (exited.status, exited.time_ms, exited.seq, exited.converted) == ("exited", 100, 2, True)
    assert (entered.status, entered.time_ms, entered.seq, entered.weight) == ("entered", 400, 3, 0.6)
    assert entered.prediction is not None
    assert entered.prediction.label == "ski"
    assert user.profile.discovery["sport"] == Discovery(3, 400, 400 + AGE, ("ski",), 0.6)


def test_leaving_and_coming_back_at_one_instant_are_two_transitions() -> None:
    user = User(discovery("sport", event_types=("view",), min_weight=0.4))
    user.scored(0, tip("swimwear"))
    found = user.does(100, "swimwear") + user.scored(100, tip("ski"))
    assert [(t.status, t.time_ms, t.seq) for t in found] == [("exited", 100, 2), ("entered", 100, 3)]
    assert len({t.id for t in user.log}) == 3


def test_who_is_no_member_cannot_convert() -> None:
    user = User(SWIM)
    assert user.does(0, "swimwear") == []
    assert user.scored(1, tip("ski")) == []


def test_a_conversion_counts_whatever_comes_later_before_the_next_scoring() -> None:
    user = User(SWIM)
    user.scored(0, tip("swimwear"))
    user.does(5, "swimwear")
    user.does(3 * AGE, "tea")
    assert [(t.cause, t.time_ms) for t in user.log[1:]] == [(Cause.EVENT, 5)]


# Exclusion


def test_a_base_segment_keeps_its_members_out() -> None:
    user = User(LOYAL, NEW_TO_SWIM)
    user.does(0, "tea")
    assert user.scored(0, tip("swimwear")) == []
    user.waits(H)  # he is loyal no more
    assert short(user.scored(H, tip("swimwear"))) == [("swim-next", "entered", H, "model")]


def test_a_base_segment_throws_its_new_members_out() -> None:
    user = User(LOYAL, NEW_TO_SWIM)
    user.scored(0, tip("swimwear", weight=0.5))
    user.does(5, "tea")
    (exited,) = user.scored(6, tip("swimwear", weight=0.45))
    assert (exited.cause, exited.time_ms, exited.converted) == (Cause.MODEL, 6, False)
    assert exited.weight == 0.45
    assert user.scored(7, tip("swimwear")) == []


def test_who_was_excluded_comes_back_at_min_weight() -> None:
    user = User(LOYAL, NEW_TO_SWIM)
    user.scored(0, tip("swimwear"))
    user.does(5, "tea")
    user.scored(6, tip("swimwear"))
    user.waits(2 * H)
    assert user.scored(2 * H, tip("swimwear", weight=0.39)) == []
    assert len(user.scored(2 * H, tip("swimwear", weight=0.4))) == 1


def test_a_base_segment_that_is_not_named_excludes_nobody() -> None:
    user = User(LOYAL, SWIM)
    user.does(0, "tea")
    assert len(user.scored(0, tip("swimwear"))) == 1


def test_a_conversion_of_an_excluded_member_is_a_conversion() -> None:
    user = User(LOYAL, NEW_TO_SWIM)
    user.scored(0, tip("swimwear"))
    left = [t for t in user.does(5, "tea", "swimwear") if t.segment_type == "discovery"]
    assert [(t.cause, t.converted) for t in left] == [(Cause.EVENT, True)]


# Leases


def test_each_scoring_renews_the_lease_without_a_transition() -> None:
    user = User(SWIM)
    user.scored(0, tip("swimwear"))
    for at_ms in (5_000, 9_999, 12_345):
        assert user.scored(at_ms, tip("swimwear", weight=0.31)) == []
        assert user.profile.memberships == {"swim-next": at_ms + AGE}
        assert user.profile.next_exit_ms == at_ms + AGE
    assert user.profile.discovery["swim-next"] == Discovery(1, 0, 22_345, ("swimwear",), 0.31)


def test_the_last_scoring_decides_even_if_its_instant_is_earlier() -> None:
    # The background scores at the wall clock's now, which is ahead of the stream's time.
    user = User(SWIM)
    user.scored(500, tip("swimwear"))
    assert user.scored(100, tip("swimwear")) == []
    assert user.profile.memberships == {"swim-next": 100 + AGE}


def test_a_shorter_maximum_age_holds_from_the_next_scoring_on() -> None:
    user = User(SWIM)
    user.scored(0, tip("swimwear"), age_ms=500 * AGE)
    user.scored(1, tip("swimwear"))
    assert user.profile.memberships == {"swim-next": 1 + AGE}


def test_no_lease_outlasts_the_profile() -> None:
    user = User(SWIM)
    user.does(0, "tea")
    (entered,) = user.scored(FORGET_MS - 100, tip("swimwear"))
    assert entered.exits_at_ms == FORGET_MS == user.profile.forget_ms
    user.scored(FORGET_MS - 50, tip("swimwear"))
    assert user.profile.memberships == {"swim-next": FORGET_MS}


def test_a_lease_becomes_shorter_with_the_profile() -> None:
    # The forget instant falls when the last event is of a type with a shorter half-life.
    user = User(SWIM)
    user.scored(0, tip("swimwear"))
    user.profile.forget_ms = 6_000
    assert user.scored(5, tip("swimwear")) == []
    assert user.profile.memberships == {"swim-next": 6_000}


def test_an_event_that_keeps_the_profile_longer_makes_room_for_the_lease() -> None:
    user = User(SWIM)
    user.does(0, "tea")
    user.scored(FORGET_MS - 100, tip("swimwear"))
    user.does(FORGET_MS - 50, "tea")
    user.scored(FORGET_MS - 50, tip("swimwear"))
    assert user.profile.memberships == {"swim-next": FORGET_MS - 50 + AGE}


@pytest.mark.parametrize(("left_ms", "enters"), [(10, True), (9, False), (0, False), (-5, False)])
def test_nobody_enters_for_less_than_ten_milliseconds(left_ms: int, enters: bool) -> None:
    user = User(SWIM)
    assert bool(user.scored(FORGET_MS - left_ms, tip("swimwear"))) is enters
    assert user.profile.discovery.keys() == ({"swim-next"} if enters else set())


def test_time_ends_a_lease_at_its_exact_instant() -> None:
    user = User(SWIM)
    user.scored(7, tip("swimwear", weight=0.44))
    assert user.waits(6 + AGE) == []
    (exited,) = user.waits(7 + AGE)
    assert (exited.status, exited.cause, exited.time_ms, exited.seq) == ("exited", Cause.MODEL, 7 + AGE, 2)
    assert (exited.weight, exited.converted, exited.prediction) == (0.44, False, None)
    assert (exited.segment_type, exited.segment_version) == ("discovery", SWIM.version)
    assert (exited.event_id, exited.offset, exited.exits_at_ms) == (None, None, None)
    assert user.profile.discovery["swim-next"] == Discovery(2, 7 + AGE)
    assert user.waits(10 * AGE) == []


def test_a_timer_that_comes_late_says_the_exact_instant() -> None:
    user = User(SWIM)
    user.scored(7, tip("swimwear"))
    assert short(user.waits(99 * AGE)) == [("swim-next", "exited", 7 + AGE, "model")]


def test_an_event_that_comes_late_finds_the_lease_ended_at_its_exact_instant() -> None:
    user = User(SWIM)
    user.scored(7, tip("swimwear"))
    (exited,) = user.does(3 * AGE, "swimwear")
    assert (exited.cause, exited.time_ms, exited.converted) == (Cause.MODEL, 7 + AGE, False)
    assert exited.event_id is None
    assert user.scored(3 * AGE) == []


def test_leases_end_by_segment_id_after_the_exits_of_base_segments() -> None:
    a, b, c = (discovery(name, labels=(name,), min_weight=0.4) for name in "abc")
    user = User(c, LOYAL, b, a)
    user.does(0, "tea")
    user.scored(H - AGE, tip("c"), tip("b"), tip("a"))
    assert short(user.waits(2 * H)) == [
        ("loyal", "exited", H, "decay"),
        ("a", "exited", H, "model"),
        ("b", "exited", H, "model"),
        ("c", "exited", H, "model"),
    ]


def test_a_lease_ends_before_the_record_that_begins_a_new_profile() -> None:
    user = User(SWIM)
    user.does(0, "tea")
    user.scored(FORGET_MS - 100, tip("swimwear"))
    assert short(user.does(FORGET_MS + 1, "tea")) == [("swim-next", "exited", FORGET_MS, "model")]
    assert user.profile.discovery == {}
    (entered,) = user.scored(FORGET_MS + 1, tip("swimwear"))
    assert (entered.seq, entered.time_ms) == (1, FORGET_MS + 1)
    assert len({t.id for t in user.log}) == 3


def test_a_membership_does_not_keep_a_profile_from_being_forgotten() -> None:
    # His lease, of settings in which it could be longer, is beyond the forget instant.
    user = User(SWIM)
    user.does(0, "tea")
    user.scored(5, tip("swimwear"))
    user.profile.discovery["swim-next"].exits_at_ms = 2 * FORGET_MS
    assert short(user.does(FORGET_MS + 1, "tea")) == [("swim-next", "exited", FORGET_MS + 1, "model")]
    assert (user.profile.applied, user.profile.discovery) == (1, {})


def test_no_lease_ends_after_the_instant_that_is_asked_for() -> None:
    user = User(SWIM)
    user.scored(0, tip("swimwear"))
    assert short(end_leases(user.profile, user.segments, 300, AGE)) == [("swim-next", "exited", 300, "model")]


def test_instants_of_one_segment_never_go_back() -> None:
    user = User(discovery("sport", event_types=("view",), min_weight=0.4))
    user.scored(500, tip("swimwear"))
    user.does(100, "swimwear")
    user.scored(200, tip("ski"))
    user.scored(300)
    user.scored(400, tip("ski"))
    assert [t.status for t in user.log] == ["entered", "exited", "entered", "exited", "entered"]
    assert [t.id for t in user.log] == [transition_id("u1", "sport", 500, seq) for seq in range(1, 6)]


def test_a_lease_that_is_over_before_the_last_transition_ends_with_it() -> None:
    user = User(SWIM)
    user.scored(AGE, tip("swimwear"))
    user.scored(10, tip("swimwear"), age_ms=100)
    assert short(user.waits(AGE)) == [("swim-next", "exited", AGE, "model")]


def test_a_membership_survives_being_stored() -> None:
    user = User(SWIM)
    user.does(0, "tea")
    user.scored(1, tip("swimwear"))
    user.profile = unpack("u1", pack(user.profile))
    assert [(t.cause, t.seq, t.time_ms) for t in user.does(2, "swimwear")] == [(Cause.EVENT, 2, 2)]
    user.profile = unpack("u1", pack(user.profile))
    assert [t.seq for t in user.scored(4, tip("swimwear"))] == [3]


# Beside the fold of base segments


def test_memberships_are_of_both_kinds_and_only_base_ones_exclude() -> None:
    other = Segment("other", labels=("tea",), min_weight=0.25)
    user = User(LOYAL, SWIM, other)
    user.does(0, "tea")
    user.scored(0, tip("swimwear"))
    assert user.profile.memberships == {"loyal": H, "other": 2 * H, "swim-next": AGE}
    assert user.profile.exits_at_ms == {"loyal": H, "other": 2 * H}
    assert user.profile.next_exit_ms == AGE
    assert user.profile.is_member("loyal")
    assert not user.profile.is_member("swim-next")


def test_discovery_does_not_touch_the_last_transition_of_base_segments() -> None:
    user = User(LOYAL, SWIM)
    user.does(0, "tea")
    user.scored(5_000, tip("swimwear"))
    assert user.profile.last_transition_ms == 0
    assert user.profile.seqs == {"loyal": 1}
    user.waits(5_000 + AGE)
    assert user.profile.last_transition_ms == 0


# Definitions


def test_members_of_a_removed_segment_leave_under_its_old_definition() -> None:
    user = User(SWIM, SKI)
    user.scored(0, tip("swimwear", weight=0.46), tip("ski"))
    (exited,) = user.redefined(50, SKI)
    assert (exited.segment_id, exited.status, exited.cause) == ("swim-next", "exited", Cause.DEFINITION)
    assert (exited.time_ms, exited.seq, exited.weight, exited.converted) == (50, 2, 0.46, False)
    assert (exited.segment_version, exited.min_weight) == (SWIM.version, 0.4)
    assert user.profile.memberships == {"ski-next": AGE}


def test_a_segment_that_comes_back_goes_on_counting() -> None:
    user = User(SWIM)
    user.scored(0, tip("swimwear"))
    user.redefined(50)
    user.redefined(60, SWIM)
    assert user.profile.memberships == {}
    assert [(t.status, t.seq) for t in user.scored(70, tip("swimwear"))] == [("entered", 3)]


def test_leases_that_are_over_under_the_old_definitions_end_first() -> None:
    user = User(SWIM)
    user.scored(0, tip("swimwear"))
    assert short(user.redefined(2 * AGE)) == [("swim-next", "exited", AGE, "model")]


def test_a_changed_definition_has_its_say_at_the_next_scoring() -> None:
    user = User(SWIM)
    user.scored(0, tip("swimwear"))
    stricter = discovery("swim-next", labels=("swimwear",), min_weight=0.9, exit_weight=0.8)
    assert user.redefined(50, stricter) == []
    assert user.is_in("swim-next")
    (exited,) = user.scored(60, tip("swimwear"))
    assert (exited.cause, exited.segment_version, exited.min_weight) == (Cause.MODEL, stricter.version, 0.9)


def test_a_new_definition_lets_in_at_the_next_scoring() -> None:
    user = User()
    user.does(0, "tea")
    assert user.redefined(50, SWIM) == []
    assert len(user.scored(60, tip("swimwear"))) == 1


def test_a_changed_definition_that_nobody_is_scored_under_ends_with_the_lease() -> None:
    user = User(SWIM)
    user.scored(0, tip("swimwear"))
    user.redefined(50, discovery("swim-next", labels=("ski",), min_weight=0.4))
    assert short(user.waits(AGE)) == [("swim-next", "exited", AGE, "model")]


def test_changes_by_definition_are_exits_first_each_by_id_whatever_their_kind() -> None:
    b, d = discovery("b", labels=("b",)), discovery("d", labels=("d",))
    user = User(b, d, Segment("c", labels=("tea",)))
    user.does(0, "tea")
    user.scored(0, tip("b"), tip("d"))
    assert short(user.redefined(5, Segment("a", labels=("tea",)))) == [
        ("b", "exited", 5, "definition"),
        ("c", "exited", 5, "definition"),
        ("d", "exited", 5, "definition"),
        ("a", "entered", 5, "definition"),
    ]


@pytest.mark.parametrize("pause_ms", [0, 10])
def test_a_segment_that_changes_from_base_to_discovery_and_back_goes_on_counting(pause_ms: int) -> None:
    base = Segment("swim", event_types=("view",), min_weight=0.5)
    other = discovery("swim", event_types=("view",), min_weight=0.4)
    first, second, third = 7 + pause_ms, 7 + 2 * pause_ms, 7 + 3 * pause_ms
    user = User(base)
    user.does(7, "tea")
    assert short(user.redefined(first, other)) == [("swim", "exited", first, "definition")]
    assert user.profile.memberships == {}
    (entered,) = user.scored(second, tip("ski"))
    assert (entered.status, entered.segment_type, entered.time_ms) == ("entered", "discovery", second)
    assert user.profile.memberships == {"swim": second + AGE}
    assert user.profile.exits_at_ms == {}
    exited, again = user.redefined(third, base)
    assert (exited.status, exited.segment_type, exited.cause) == ("exited", "discovery", Cause.DEFINITION)
    assert (again.status, again.segment_type, again.cause) == ("entered", "base", Cause.DEFINITION)
    assert user.profile.memberships == {"swim": 7 + H}
    times = [7, first, second, third, third]
    assert [(t.seq, t.time_ms) for t in user.log] == list(enumerate(times, start=1))
    assert len({t.id for t in user.log}) == 5
    user.profile = unpack("u1", pack(user.profile))
    assert [t.seq for t in user.waits(2 * H)] == [6]


def test_a_discovery_segment_that_becomes_a_base_segment_goes_on_counting() -> None:
    user = User(SWIM)
    user.scored(0, tip("swimwear"))
    swim = Segment("swim-next", labels=("swimwear",), min_weight=0.5)
    assert short(user.redefined(5, swim)) == [("swim-next", "exited", 5, "definition")]
    assert [(t.seq, t.segment_type) for t in user.does(6, "swimwear")] == [(3, "base")]
    user.redefined(7, SWIM)
    assert [(t.seq, t.segment_type) for t in user.scored(8, tip("swimwear"))] == [(5, "discovery")]
