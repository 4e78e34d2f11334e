"""What valid definitions will do that their author probably does not expect.

Decides which definitions deserve a second thought, and what to propose instead. Nothing depends on it: a set
runs the same with or without advice. It must not know what makes a definition invalid, which is
`segment.problems`, or how segments are evaluated; it reads their criteria and thresholds as the rules do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stream_app.core.decay import HOLD_MS, SLACK, Weights
from stream_app.core.segment import Segment, shown
from stream_app.core.segment_set import criteria_of, thresholds_of

__all__ = ["Advice", "advice"]


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing that is allowed and probably not meant.

    Parameters
    ----------
    segment_id
        Whose definition.
    key
        The key of the definition to think about.
    text
        What will happen, and what to do about it.
    """

    segment_id: str
    key: str
    text: str

    def __str__(self) -> str:
        return f"segment {shown(self.segment_id)}, {self.key}: {self.text}"


def advice(segments: Sequence[Segment], weights: Weights) -> list[Advice]:
    """List what valid definitions will do that their author probably does not expect.

    Parameters
    ----------
    segments
        Definitions without `problems`.
    weights
        The settings that they will run under.

    Returns
    -------
    list of Advice
        In the order of the definitions; empty if there is nothing to say.

    Notes
    -----
    Nobody enters for less than 10 ms, so one event of weight a enters only if
    h·log2(a/exit_weight) is 10 ms or more: never where the two are equal. The proposed threshold is
    a·2^(-1/10), at which one event keeps a user in for a tenth of its half-life.

    Examples
    --------
    >>> for hint in advice([Segment("swim", labels=("swimwear",), min_weight=1)], Weights()):
    ...     print(hint)  # doctest: +NORMALIZE_WHITESPACE
    segment 'swim', min_weight: one event of the heaviest type counts 1 and is below 1 within 10 ms, so one
    alone never enters; with min_weight = 0.933 it enters, for 3.0 days
    """
    found: list[Advice] = []
    base = {segment.id: segment for segment in segments if segment.type == "base"}
    for segment in base.values():
        found.extend(_event_type_advice(segment, weights))
        found.extend(_threshold_advice(segment, weights))
        for other in segment.exclude:
            if other in base and _always_holds_with(base[other], segment, weights):
                text = f"who meets its criteria also meets those of {shown(other)}: nobody ever enters"
                found.append(Advice(segment.id, "exclude", text))
    for segment in segments:
        if segment.type == "discovery":
            found.extend(_discovery_advice(segment))
    return found


def _discovery_advice(segment: Segment) -> list[Advice]:
    """Say what a discovery segment does not know, or never reaches."""
    found = []
    if segment.min_weight > 1:
        text = (
            f"growth weights are probabilities, so {segment.min_weight:g} is never reached; "
            "see what `stream-app show USER` prints and begin with 0.05"
        )
        found.append(Advice(segment.id, "min_weight", text))
    for key, match in (("match_labels", segment.match_labels), ("match_assets", segment.match_assets)):
        if match == "any":
            continue
        text = "has no meaning for discovery: all labels and any asset of one recommendation count"
        found.append(Advice(segment.id, key, text))
    return found


def _event_type_advice(segment: Segment, weights: Weights) -> list[Advice]:
    """Say which of a segment's event types never count."""
    idle = [event_type for event_type in segment.event_types if weights.action_weight(event_type) == 0]
    if not idle:
        return []
    names = ", ".join(shown(event_type) for event_type in idle)
    if len(idle) == len(segment.event_types):
        text = f"the action weight of {names} is 0: nobody ever enters"
    else:
        text = f"the action weight of {names} is 0: it never counts"
    return [Advice(segment.id, "event_types", text)]


def _threshold_advice(segment: Segment, weights: Weights) -> list[Advice]:
    """Say when one event just reaches the threshold and yet never enters."""
    event_types = segment.event_types or (
        *weights.event_types,
        "",
    )  # "": any type that has no settings of its own
    amount, half_life_ms = max(
        (weights.action_weight(name), weights.half_life_ms(name)) for name in event_types
    )
    enter_weight, exit_weight = thresholds_of(segment, weights.history_floor)
    if amount < enter_weight * (1.0 - SLACK) or half_life_ms * math.log2(amount / exit_weight) >= HOLD_MS:
        return []
    proposed = float(f"{amount * 2.0 ** -max(0.1, 2 * HOLD_MS / half_life_ms):.3g}")
    duration = _duration(half_life_ms * math.log2(amount / proposed))
    key = "min_weight" if segment.exit_weight is None else "exit_weight"
    text = (
        f"one event of the heaviest type counts {amount:g} and is below {exit_weight:g} within {HOLD_MS} ms, "
        f"so one alone never enters; with {key} = {proposed:g} it enters, for {duration}"
    )
    return [Advice(segment.id, key, text)]


def _always_holds_with(other: Segment, segment: Segment, weights: Weights) -> bool:
    """Tell whether a segment counts the same as another one that is easier to be in."""

    def counted(one: Segment) -> tuple[object, ...]:
        return tuple(
            (item.kind, item.item_set, item.match_all, set(item.event_types or ()))
            for item in criteria_of(one)
        )

    if other.exclude or counted(other) != counted(segment):
        return False
    floor = weights.history_floor
    easier = zip(thresholds_of(other, floor), thresholds_of(segment, floor), strict=True)
    return all(theirs <= ours for theirs, ours in easier)


def _duration(duration_ms: float) -> str:
    """Return a duration in the largest unit of which it has at least one.

    Examples
    --------
    >>> _duration(259_200_000), _duration(90_000), _duration(3)
    ('3.0 days', '1.5 minutes', '0.003 seconds')
    """
    for unit_ms, unit in ((86_400_000, "days"), (3_600_000, "hours"), (60_000, "minutes")):
        if duration_ms >= unit_ms:
            return f"{duration_ms / unit_ms:.1f} {unit}"
    return f"{duration_ms / 1000:.3g} seconds"
