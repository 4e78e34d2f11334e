"""In which order definitions are evaluated, what they are compiled to, and how a set is kept."""

from typing import Any

import pytest

from stream_app.core.decay import Weights
from stream_app.core.segment import Segment
from stream_app.core.segment_set import SegmentSet

WEIGHTS = Weights()


def base(segment_id: str, **changes: Any) -> Segment:
    return Segment(segment_id, **({"labels": ("x",)} | changes))


def test_a_chain_of_ten_thousand_exclusions_is_ordered() -> None:
    chain = [base(f"s{i}", exclude=(f"s{i + 1}",) if i < 9_999 else ()) for i in range(10_000)]
    assert [segment.id for segment in SegmentSet(chain, WEIGHTS).segments[:2]] == ["s9999", "s9998"]


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
