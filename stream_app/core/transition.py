"""The change of a membership: what is published when a user enters or leaves a segment.

Decides what a transition says, its id and the order of those that share an instant. It must not know who
decides that there is one (`fold` for base segments, `discovery` for the others) or how it is written down.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import msgspec

__all__ = ["Cause", "Prediction", "Transition", "exits_first", "transition_id"]


class Cause(StrEnum):
    """Why a membership changed."""

    EVENT = "event"
    DECAY = "decay"
    MODEL = "model"
    DEFINITION = "definition"
    ERASURE = "erasure"


@dataclass(frozen=True, slots=True)
class Prediction:
    """The recommendation that let a user into a discovery segment, and how good such predictions have been.

    Parameters
    ----------
    label
        The category that he is expected to turn to.
    labels
        It and the other categories of the recommended asset that he has never engaged.
    event_type
        The likeliest action.
    asset_id
        What to recommend, `None` where the label has no asset that is new to him.
    score
        The growth weight, from 0 to 1.
    model_version
        Which kind of model said so; see `model`.
    accuracy
        Figures of the model over its last predictions, by name, may be empty.
    """

    label: str
    labels: tuple[str, ...]
    event_type: str
    asset_id: str | None
    score: float
    model_version: str
    accuracy: Mapping[str, float]


class Transition(msgspec.Struct, frozen=True, gc=False):
    """A user entered or left a segment.

    Parameters
    ----------
    id
        Of this transition; the same whenever the same log is folded again.
    user_id, segment_id
        Who, and what.
    segment_type, segment_version
        Of the definition that decided.
    status
        What happened.
    cause
        Why.
    seq
        The number of the user's transitions in this segment, from 1: odd enters, even leaves.
    time_ms
        When, milliseconds since the epoch; for an exit by decay the exact instant of it.
    weight
        The segment's weight at that instant.
    min_weight
        As defined.
    exits_at_ms
        When the user will leave if nothing happens; `None` for an exit, and for what lasts past the year
        9999.
    event_id, offset
        The record that caused it, `None` unless the cause is an event.
    prediction
        What let the user in; `None` unless he entered a discovery segment.
    converted
        Whether a member left a discovery segment because he engaged what was recommended; `None` unless he
        left one.
    """

    id: str
    user_id: str
    segment_id: str
    segment_type: str
    segment_version: str
    status: Literal["entered", "exited"]
    cause: Cause
    seq: int
    time_ms: int
    weight: float
    min_weight: float
    exits_at_ms: int | None
    event_id: str | None
    offset: int | None
    prediction: Prediction | None = None
    converted: bool | None = None


def transition_id(user_id: str, segment_id: str, time_ms: int, seq: int) -> str:
    """Return the id of a transition: 16 bytes of SHA-256, in hex, over what makes it unique.

    Zero bytes join the parts, and none of them can hold one, so different transitions are different texts.

    Examples
    --------
    >>> transition_id("u1", "swim", 1_767_323_045_678, 1)
    '3dcaf06fb9f41f7f8fa990bb523322b7'
    """
    text = f"{user_id}\0{segment_id}\0{time_ms}\0{seq}"
    return hashlib.sha256(text.encode()).digest()[:16].hex()


def exits_first(transition: Transition) -> tuple[bool, str]:
    """Return the sort key of transitions of one instant: exits before enters, each by segment id."""
    return transition.status == "entered", transition.segment_id
