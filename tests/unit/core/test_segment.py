"""Which definitions are refused, which get advice, and whom an event concerns."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from stream_app.core.decay import EventTypeWeight, Weights
from stream_app.core.segment import Segment, SegmentSet, advice, problems

WEIGHTS = Weights(half_life_s=86_400, event_types={"idle": EventTypeWeight(0.0), "buy": EventTypeWeight(5.0)})


def said(segments: Sequence[Segment]) -> list[str]:
    return [str(problem) for problem in problems(segments, WEIGHTS)]


def base(segment_id: str, **changes: Any) -> Segment:
    return Segment(segment_id, **({"labels": ("x",)} | changes))


def test_sound_definitions_have_no_problems() -> None:
    assert (
        said([base("a", min_weight=2.0, exit_weight=1.0), base("b.1_c-d", exclude=("a",)), base("0")]) == []
    )
    assert said([]) == []


@pytest.mark.parametrize("segment_id", ["", "A", "-a", ".a", "a b", "a/b", "é", "a" * 65, "a\n", "a{b}"])
def test_an_id_that_would_need_quoting_is_refused(segment_id: str) -> None:
    assert len(said([base(segment_id)])) == 1
    assert said([base(segment_id)])[0].startswith("segment 1, id: expected 1 to 64 characters of a-z")


def test_an_id_given_twice_is_refused_with_both_places() -> None:
    assert said([base("a"), base("b"), base("a")]) == [
        "segment 'a', id: expected an id that no other definition has, "
        "got the id of definition 1 again in definition 3"
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"type": "lookalike"}, "type: expected 'base' or 'discovery', got 'lookalike'"),
        (
            {"labels": ()},
            "labels: expected one of labels, asset_ids, event_types, got none (an empty list is none)",
        ),
        ({"match_labels": "some"}, "match_labels: expected 'any' or 'all', got 'some'"),
        ({"match_assets": ""}, "match_assets: expected 'any' or 'all', got ''"),
        (
            {"min_weight": 1e-4},
            "min_weight: expected 0 (any history) or at least history_floor (0.001), got 0.0001",
        ),
        ({"min_weight": -1.0}, "min_weight: expected a finite number, not negative, got -1.0"),
        ({"min_weight": math.nan}, "min_weight: expected a finite number, not negative, got nan"),
        ({"min_weight": math.inf}, "min_weight: expected a finite number, not negative, got inf"),
        ({"exit_weight": math.nan}, "exit_weight: expected a finite number, not negative, got nan"),
        ({"min_weight": 1.0, "exit_weight": 1.5}, "exit_weight: expected at most min_weight (1), got 1.5"),
        (
            {"min_weight": 1.0, "exit_weight": 1e-4},
            "exit_weight: expected 0 (any history) or at least history_floor (0.001), got 0.0001",
        ),
        (
            {"min_weight": 1.0, "exit_weight": 0.0},
            "exit_weight: expected at least history_floor (0.001) where min_weight is not 0, got 0.0",
        ),
        ({"exclude": ("a",)}, "exclude: expected other segments, got itself"),
        ({"exclude": ("b",)}, "exclude: expected ids of defined segments, got 'b'"),
        ({"exclude": ("new",)}, "exclude: expected ids of base segments, got 'new', of type 'discovery'"),
        (
            {"labels": ("",)},
            "labels: expected items of 1 to 64 characters, none of them a control character, got ''",
        ),
        (
            {"event_types": ("a\nb",)},
            "event_types: expected items of 1 to 64 characters, none of them a control character, "
            "got 'a\\nb'",
        ),
        (
            {"asset_ids": ("y" * 129,)},
            "asset_ids: expected items of 1 to 128 characters, none of them a control character, "
            f"got '{'y' * 77}'… (129 characters)",
        ),
        ({"labels": tuple(map(str, range(1_001)))}, "labels: expected at most 1000 items, got 1001"),
        ({"exclude": tuple(map(str, range(1_001)))}, "exclude: expected at most 1000 items, got 1001"),
    ],
    ids=str,
)
def test_a_definition_that_cannot_be_meant_is_refused(changes: dict[str, Any], sentence: str) -> None:
    assert said([base("a", **changes), base("new", type="discovery")]) == [f"segment 'a', {sentence}"]


def test_all_problems_are_listed_together() -> None:
    found = problems(
        [base("a", min_weight=-1.0, exclude=("zz",)), base("B", labels=()), base("c", exit_weight=7.0)],
        WEIGHTS,
    )
    assert [(problem.segment_id, problem.key.split()[-1]) for problem in found] == [
        ("a", "min_weight"),
        ("", "id"),
        ("B", "labels"),
        ("c", "exit_weight"),
        ("a", "exclude"),
    ]


def test_a_cycle_of_exclusion_is_named_once_from_its_first_id() -> None:
    cycle = [
        base("c", exclude=("a",)),
        base("b", exclude=("c",)),
        base("a", exclude=("b",)),
        base("d", exclude=("a",)),
    ]
    assert said(cycle) == ["segment 'a', exclude: expected no cycle, got a → b → c → a"]


def test_two_cycles_are_both_named() -> None:
    assert said(
        [
            base("a", exclude=("b",)),
            base("b", exclude=("a",)),
            base("c", exclude=("d",)),
            base("d", exclude=("c",)),
        ]
    ) == [
        "segment 'a', exclude: expected no cycle, got a → b → a",
        "segment 'c', exclude: expected no cycle, got c → d → c",
    ]


def test_exclusion_without_a_cycle_may_meet_again() -> None:
    diamond = [base("a"), base("b", exclude=("a",)), base("c", exclude=("a",)), base("d", exclude=("b", "c"))]
    assert said(diamond) == []


def test_a_chain_of_ten_thousand_exclusions_is_ordered() -> None:
    chain = [base(f"s{i}", exclude=(f"s{i + 1}",) if i < 9_999 else ()) for i in range(10_000)]
    assert [segment.id for segment in SegmentSet(chain, WEIGHTS).segments[:2]] == ["s9999", "s9998"]


def test_more_than_ten_thousand_definitions_are_refused() -> None:
    assert said([base("a")] * 10_001) == ["segments: expected at most 10000 definitions, got 10001"]


def test_a_set_with_problems_is_not_built() -> None:
    with pytest.raises(ValueError, match=r"segment 'a', min_weight: .*; segment 'b', labels: "):
        SegmentSet([base("a", min_weight=-1.0), base("b", labels=())], WEIGHTS)


def test_excluded_segments_come_before_those_that_exclude_them_and_otherwise_by_id() -> None:
    segments = [base("b", exclude=("d",)), base("d"), base("c"), base("a", exclude=("b",))]
    assert [segment.id for segment in SegmentSet(segments, WEIGHTS).segments] == ["c", "d", "b", "a"]


def test_the_order_and_repetition_of_definitions_and_items_have_no_meaning() -> None:
    one = SegmentSet([base("a", labels=("x", "y")), base("b", min_weight=1)], WEIGHTS)
    two = SegmentSet([base("b", min_weight=1.0), base("a", labels=("y", "x", "y"))], WEIGHTS)
    assert one.fingerprint == two.fingerprint
    assert one.canonical_json() == two.canonical_json()
    assert len(one.fingerprint) == 16


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "A"},
        {"type": "discovery"},
        {"labels": ("y",)},
        {"asset_ids": ("x",)},
        {"event_types": ("x",)},
        {"min_weight": 1.0},
        {"exit_weight": 0.0},
        {"match_labels": "all"},
        {"match_assets": "all"},
        {"exclude": ("b",)},
    ],
    ids=str,
)
def test_every_field_is_part_of_the_version(changes: dict[str, Any]) -> None:
    assert base("a", **changes).version != base("a").version


def test_a_set_comes_back_from_its_canonical_json() -> None:
    segments = SegmentSet(
        [
            base("a", name="Été", labels=("y", "x"), exit_weight=0.5, min_weight=2, match_labels="all"),
            base("b", asset_ids=("1",), event_types=("buy",), exclude=("a",)),
            base("n", type="discovery", min_weight=0.1),
        ],
        WEIGHTS,
    )
    again = SegmentSet.from_canonical_json(segments.canonical_json(), WEIGHTS)
    assert again.fingerprint == segments.fingerprint
    assert [segment.version for segment in again.segments] == [
        segment.version for segment in segments.segments
    ]


@pytest.mark.parametrize(
    "text", ["", "{}x", "7", '["a"]', '[{"name": "a"}]', '[{"id": "a"}]', '[{"id": "a", "z": 1}]']
)
def test_json_that_is_no_set_of_definitions_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        SegmentSet.from_canonical_json(text, WEIGHTS)


def test_get_finds_a_definition_or_nothing() -> None:
    segments = SegmentSet([base("a")], WEIGHTS)
    assert segments.get("a") == base("a")
    assert segments.get("b") is None


def test_event_types_beside_labels_restrict_and_alone_are_counted() -> None:
    segments = SegmentSet(
        [base("a", event_types=("buy",)), base("b", labels=(), event_types=("buy",))], WEIGHTS
    )
    beside, alone = segments.rules
    assert [(c.kind, c.items, c.event_types) for c in beside.criteria] == [("label", ("x",), ("buy",))]
    assert [(c.kind, c.items, c.event_types) for c in alone.criteria] == [("type", ("buy",), None)]


def test_a_weight_of_zero_is_the_floor_at_both_thresholds() -> None:
    (rule,) = SegmentSet([base("a", exit_weight=0.0)], WEIGHTS).rules
    assert rule.enter_least == pytest.approx(1e-3, rel=2e-9)
    assert rule.exit_weight == 1e-3


def test_discovery_segments_are_no_rules() -> None:
    segments = SegmentSet([base("a", type="discovery", min_weight=1e-5)], WEIGHTS)
    assert [segment.id for segment in segments.segments] == ["a"]
    assert segments.rules == ()
    assert segments.named_labels == frozenset()


def hints(*segments: Segment, weights: Weights = WEIGHTS) -> list[str]:
    return [str(hint) for hint in advice(segments, weights)]


def test_a_threshold_that_one_event_reaches_but_never_holds_is_pointed_out() -> None:
    # 5 · 2^-0.1 = 4.665; it holds for 86,400 s · log2(5 / 4.67) = 8,510 s.
    assert hints(base("a", min_weight=5.0)) == [
        "segment 'a', min_weight: one event of the heaviest type counts 5 and is below 5 within 10 ms, so it "
        "never enters; with min_weight = 4.67 it enters, for 2.4 hours"
    ]
    assert hints(base("a", min_weight=4.67)) == []
    assert hints(base("a", min_weight=5.1)) == []


def test_the_heaviest_type_is_sought_among_those_that_a_segment_counts() -> None:
    assert hints(base("a", min_weight=1.0, event_types=("view", "idle")))[-1].startswith(
        "segment 'a', min_weight: one event of the heaviest type counts 1 "
    )
    assert hints(base("a", min_weight=1.0, event_types=("view", "buy"))) == []


def test_hysteresis_keeps_one_event_in() -> None:
    assert hints(base("a", min_weight=5.0, exit_weight=4.0)) == []
    assert "exit_weight = 4.67" in hints(base("a", min_weight=5.0, exit_weight=5.0))[0]


def test_following_the_advice_takes_it_away() -> None:
    weights = Weights(half_life_s=0.02)
    (hint,) = hints(base("a", min_weight=0.9), weights=weights)
    proposed = float(hint.split(" = ")[1].split()[0])
    assert hints(base("a", min_weight=proposed), weights=weights) == []


def test_event_types_that_never_count_are_pointed_out() -> None:
    assert hints(base("a", labels=(), event_types=("idle",))) == [
        "segment 'a', event_types: the action weight of 'idle' is 0: nobody ever enters"
    ]
    assert hints(base("a", event_types=("idle", "buy"))) == [
        "segment 'a', event_types: the action weight of 'idle' is 0: it never counts"
    ]


def test_a_segment_that_what_it_excludes_always_suppresses_is_pointed_out() -> None:
    assert hints(base("any"), base("loyal", min_weight=3.0, exclude=("any",))) == [
        "segment 'loyal', exclude: who meets its criteria also meets those of 'any': nobody ever enters"
    ]
    assert hints(base("any", exclude=("loyal",)), base("loyal", min_weight=3.0)) == []
    assert hints(base("any", match_labels="all"), base("loyal", min_weight=3.0, exclude=("any",))) == []
