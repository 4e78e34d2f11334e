"""What a look-up answers, as facts: no I/O, and nothing that knows how it is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stream_app.core.decay import Weights
from stream_app.core.profile import Profile, TypeSums
from stream_app.core.scores import Recommendation, Scored

__all__ = [
    "Accuracy",
    "Membership",
    "Meta",
    "NextCategories",
    "NextCategory",
    "Prediction",
    "Recommendations",
    "UserView",
    "UserWeights",
]


@dataclass(frozen=True, slots=True)
class Meta:
    """What ``sa:meta`` says of the rest: which log was folded, by which clock, weights and model."""

    topic: str
    partitions: int
    group: str
    clock: str
    weights: Weights
    model: bool = False


@dataclass(frozen=True, slots=True)
class UserWeights:
    """A user's weights as of `now_ms`.

    Attributes
    ----------
    by_type : mapping of event type to TypeSums
        Weights (not sums): in total, by label and by asset; may be empty.

    Examples
    --------
    >>> found = UserWeights(
    ...     "u1",
    ...     0,
    ...     {"view": TypeSums(2.0, {"tea": 2.0}, {}), "buy": TypeSums(0.5, {"tea": 0.5}, {"a-1": 0.5})},
    ... )
    >>> found.labels, found.assets
    ({'tea': 2.5}, {'a-1': 0.5})
    """

    user_id: str
    now_ms: int
    by_type: Mapping[str, TypeSums]

    @property
    def labels(self) -> dict[str, float]:
        """Map label to its weight over all event types; built anew each time."""
        return _added(sums.labels for sums in self.by_type.values())

    @property
    def assets(self) -> dict[str, float]:
        """Map asset id to its weight over all event types; built anew each time."""
        return _added(sums.assets for sums in self.by_type.values())


@dataclass(frozen=True, slots=True)
class Prediction:
    """Why a user is in a discovery segment.

    Attributes
    ----------
    labels : tuple of str
        The recommended category, then the recommended asset's others; the user has engaged none of them.
    score : float
        The growth weight at the last scoring, from 0 to 1.
    """

    labels: tuple[str, ...]
    score: float


@dataclass(frozen=True, slots=True)
class Membership:
    """A user in a segment.

    Attributes
    ----------
    exits_at_ms : int or None
        When the user leaves if nothing happens, ``None`` for a membership that never ends by decay. Of a
        discovery segment: when the user leaves unless scored again before.
    prediction : Prediction or None
        ``None`` for a base segment, and from `members`, since the index of members does not hold it.
    """

    user_id: str
    segment_id: str
    exits_at_ms: int | None
    prediction: Prediction | None = None


@dataclass(frozen=True, slots=True)
class NextCategory:
    """A category that a user may turn to next, with its calibrated probability among all labels."""

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class NextCategories:
    """A user's next categories, best first, at most 20.

    Attributes
    ----------
    scored_at_ms, model_version : int, str or None
        When, and by which model; ``None``, with no categories, for a user who was never scored.
    """

    user_id: str
    scored_at_ms: int | None = None
    model_version: str | None = None
    categories: tuple[NextCategory, ...] = ()


@dataclass(frozen=True, slots=True)
class Recommendations:
    """What to recommend to a user, best first, at most 20; the fields are as in `NextCategories`."""

    user_id: str
    scored_at_ms: int | None = None
    model_version: str | None = None
    recommendations: tuple[Recommendation, ...] = ()


@dataclass(frozen=True, slots=True)
class UserView:
    """All that is known of a user, as of `now_ms`.

    Attributes
    ----------
    partition : int
        Where the user's state was found.
    weights : mapping of event type to TypeSums
        As in `UserWeights`.
    segments : tuple of Membership
        Base and discovery segments that the user is in at `now_ms`, by segment id.
    scores : Scored or None
        The last scoring, ``None`` for who was never scored.
    """

    user_id: str
    partition: int
    now_ms: int
    profile: Profile
    weights: Mapping[str, TypeSums]
    segments: tuple[Membership, ...]
    scores: Scored | None


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How good the model's last predictions were, each made before its event was learned from.

    Attributes
    ----------
    tasks : mapping
        "next" (all labels are candidates) and "discovery" (the labels that the user has not engaged) to
        figures by name: examples, hit@1, hit@5, hit@10, mrr, log_loss, ece, popularity_mrr,
        markov_mrr.
    segments : mapping
        Discovery segment id to the same figures of first engagements of its labels, made or predicted.
    """

    tasks: Mapping[str, Mapping[str, float]]
    segments: Mapping[str, Mapping[str, float]]


def _added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, weight in part.items():
            total[name] = total.get(name, 0.0) + weight
    return total
