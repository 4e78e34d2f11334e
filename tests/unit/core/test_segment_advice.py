"""Which valid definitions get advice, and what it proposes."""

from typing import Any

from stream_app.core.decay import EventTypeWeight, Weights
from stream_app.core.segment import Segment
from stream_app.core.segment_advice import advice

WEIGHTS = Weights(half_life_s=86_400, event_types={"idle": EventTypeWeight(0.0), "buy": EventTypeWeight(5.0)})


def base(segment_id: str, **changes: Any) -> Segment:
    return Segment(segment_id, **({"labels": ("x",)} | changes))


def hints(*segments: Segment, weights: Weights = WEIGHTS) -> list[str]:
    return [str(hint) for hint in advice(segments, weights)]


def test_a_threshold_that_one_event_reaches_but_never_holds_is_pointed_out() -> None:
    # 5 · 2^-0.1 = 4.665; it holds for 86,400 s · log2(5 / 4.67) = 8,510 s.
    assert hints(base("a", min_weight=5.0)) == [
        "segment 'a', min_weight: one event of the heaviest type counts 5 and is below 5 within 10 ms, so "
        "one alone never enters; with min_weight = 4.67 it enters, for 2.4 hours"
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
