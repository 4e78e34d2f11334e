"""Which definitions are refused, and what is part of a version."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from stream_app.core.decay import Weights
from stream_app.core.segment import Segment, problems

WEIGHTS = Weights()


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


def test_more_than_ten_thousand_definitions_are_refused() -> None:
    assert said([base("a")] * 10_001) == ["segments: expected at most 10000 definitions, got 10001"]


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
