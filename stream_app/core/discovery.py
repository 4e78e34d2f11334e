"""Who is in a discovery segment: the users whose best next categories are ones that they have never engaged.

Decides which recommendation meets which segment, who enters and leaves when a user has been scored, and how
long a membership lasts without another scoring. It must not know how scores come about (that is `model`), and
nothing that it does may be seen by the fold of base segments: its memberships are kept apart in the profile.

A membership is a lease: it ends at the last scoring plus a maximum age, and never after the profile's forget
instant, so no membership is older than that age. Each scoring that the user still passes renews it without a
transition. Ends and renewals are in the indexes like any other exit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from stream_app.core.decay import HOLD_MS, SLACK
from stream_app.core.event import Event
from stream_app.core.profile import Discovery, Profile
from stream_app.core.segment import Segment
from stream_app.core.segment_set import SegmentSet
from stream_app.core.transition import Cause, Prediction, Transition, exits_first, transition_id

__all__ = [
    "EXIT_SHARE",
    "DiscoveryRules",
    "Recommended",
    "convert",
    "discover",
    "end_leases",
    "exit_weight_of",
    "leave_undefined",
]

EXIT_SHARE = 0.5
"""Part of `min_weight` below which a member leaves if no `exit_weight` is given: scores are never still."""


class Recommended(Protocol):
    """What is read of a recommendation; see `model`."""

    @property
    def event_type(self) -> str:
        """The likeliest action."""
        ...

    @property
    def asset_id(self) -> str | None:
        """An asset that the user has not engaged."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The recommended label, then the asset's others; none that the user has engaged."""
        ...

    @property
    def growth_weight(self) -> float:
        """The probability of the label among those that the user has not engaged."""
        ...


@dataclass(frozen=True, slots=True)
class _Rule:
    segment: Segment
    version: str
    labels: frozenset[str]
    assets: frozenset[str]
    event_types: frozenset[str]
    enter_least: float
    exit_least: float

    def accepts(self, recommendation: Recommended) -> bool:
        """Tell whether a recommendation meets the criteria: ANY asset, ALL labels, ANY event type."""
        return (
            self.labels.issubset(recommendation.labels)
            and (not self.assets or recommendation.asset_id in self.assets)
            and (not self.event_types or recommendation.event_type in self.event_types)
        )


def exit_weight_of(segment: Segment) -> float:
    """Return the growth weight below which a member of a discovery segment leaves.

    Examples
    --------
    >>> exit_weight_of(Segment("swim-next", type="discovery", labels=("swimwear",), min_weight=0.2))
    0.1
    """
    return EXIT_SHARE * segment.min_weight if segment.exit_weight is None else segment.exit_weight


class DiscoveryRules:
    """The discovery segments of a set, ready to be met by recommendations. Never changes after it is built.

    Parameters
    ----------
    segments
        All definitions; base segments are left out.

    Examples
    --------
    >>> from stream_app.core.decay import Weights
    >>> swim = Segment("swim-next", type="discovery", labels=("swimwear",), min_weight=0.2)
    >>> rules = DiscoveryRules(SegmentSet([swim], Weights()))
    >>> len(rules)
    1
    """

    __slots__ = ("_by_asset", "_by_id", "_by_label", "_by_type")

    def __init__(self, segments: SegmentSet) -> None:
        self._by_id: dict[str, _Rule] = {}
        # A rule is found by one thing that every recommendation that meets it has.
        self._by_label: dict[str, list[_Rule]] = {}
        self._by_asset: dict[str, list[_Rule]] = {}
        self._by_type: dict[str, list[_Rule]] = {}
        for segment in segments.segments:
            if segment.type != "discovery":
                continue
            rule = _Rule(
                segment,
                segment.version,
                frozenset(segment.labels),
                frozenset(segment.asset_ids),
                frozenset(segment.event_types),
                segment.min_weight * (1.0 - SLACK),
                exit_weight_of(segment) * (1.0 - SLACK),
            )
            self._by_id[segment.id] = rule
            if segment.labels:
                self._by_label.setdefault(min(rule.labels), []).append(rule)
            elif segment.asset_ids:
                for asset_id in rule.assets:
                    self._by_asset.setdefault(asset_id, []).append(rule)
            else:
                for event_type in rule.event_types:
                    self._by_type.setdefault(event_type, []).append(rule)

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, segment_id: str) -> _Rule | None:
        """Return a rule, `None` if there is no such discovery segment."""
        return self._by_id.get(segment_id)

    def labels(self) -> dict[str, frozenset[str]]:
        """Map segment id to the labels that it names, may be empty."""
        return {segment_id: rule.labels for segment_id, rule in self._by_id.items()}

    def met(self, recommendations: Sequence[Recommended]) -> dict[str, Recommended]:
        """Map each segment that some recommendation meets, whatever its weight, to the best of them."""
        found: dict[str, Recommended] = {}
        for recommendation in recommendations:
            candidates: list[_Rule] = []
            for label in recommendation.labels:
                candidates += self._by_label.get(label, ())
            if recommendation.asset_id is not None:
                candidates += self._by_asset.get(recommendation.asset_id, ())
            candidates += self._by_type.get(recommendation.event_type, ())
            for rule in candidates:
                best = found.get(rule.segment.id)
                if (best is None or recommendation.growth_weight > best.growth_weight) and rule.accepts(
                    recommendation
                ):
                    found[rule.segment.id] = recommendation
        return found


def discover(
    profile: Profile,
    recommendations: Sequence[Recommended],
    rules: DiscoveryRules,
    at_ms: int,
    *,
    max_age_ms: int,
    model_version: str = "",
    accuracy: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Transition]:
    """Let a user who has been scored into discovery segments, and out of them.

    1. A member who no longer passes `exit_weight`, or is in a base segment that excludes this one, leaves.
    2. The lease of all other members begins anew.
    3. Who passes `min_weight` enters, unless the lease would be over at once.

    Parameters
    ----------
    profile
        Changed in place: the user's as he was scored; what was due by `at_ms` has happened.
    recommendations
        What the scoring gave, of labels that the user has not engaged.
    rules
        The discovery segments.
    at_ms
        The instant of the scoring.
    max_age_ms
        How long a membership lasts without another scoring.
    model_version, accuracy
        For predictions; the latter maps segment id to figures, "" to those of the whole.

    Returns
    -------
    list of Transition
        Exits, then enters, each by segment id.

    Examples
    --------
    >>> from stream_app.core.decay import Weights
    >>> from stream_app.core.scores import Recommendation
    >>> swim = Segment("swim-next", type="discovery", labels=("swimwear",), min_weight=0.2)
    >>> rules = DiscoveryRules(SegmentSet([swim], Weights()))
    >>> user = Profile("u1", 0, forget_ms=10_000)
    >>> tip = Recommendation("view", "a-1", ("swimwear",), growth_weight=0.3, base_weight=0.1)
    >>> [entered] = discover(user, [tip], rules, 2_000, max_age_ms=5_000)
    >>> entered.status, entered.cause.value, entered.weight, entered.exits_at_ms, entered.prediction.label
    ('entered', 'model', 0.3, 7000, 'swimwear')
    >>> [exited] = discover(user, [], rules, 4_000, max_age_ms=5_000)
    >>> exited.cause.value, exited.converted, exited.time_ms
    ('model', False, 4000)
    """
    met = rules.met(recommendations) if recommendations else {}
    if not met and not profile.discovery:
        return []
    found: list[Transition] = []
    lease_ms = min(at_ms + max_age_ms, profile.forget_ms)
    for segment_id, state in profile.discovery.items():
        if state.exits_at_ms is None:
            continue
        rule = rules.get(segment_id)
        if rule is None:
            continue  # of other definitions: `leave_undefined` has its turn, or the lease ends
        best = met.get(segment_id)
        weight = 0.0 if best is None else best.growth_weight
        if best is None or weight < rule.exit_least or _suppressed(profile, rule):
            state.score = weight
            found.append(_leave(profile, rule.segment, rule.version, at_ms, Cause.MODEL))
        else:
            state.labels, state.score = best.labels, weight
            state.exits_at_ms = lease_ms
    for segment_id, best in met.items():
        rule = rules.get(segment_id)
        if rule is None or best.growth_weight < rule.enter_least or _suppressed(profile, rule):
            continue
        before = profile.discovery.get(segment_id)
        if before is not None and before.exits_at_ms is not None:
            continue
        enter_ms = max(at_ms, _last_ms(profile, segment_id))
        if lease_ms - enter_ms < HOLD_MS:
            continue
        prediction = Prediction(
            label=best.labels[0],
            labels=best.labels,
            event_type=best.event_type,
            asset_id=best.asset_id,
            score=best.growth_weight,
            model_version=model_version,
            accuracy={} if accuracy is None else accuracy.get(segment_id) or accuracy.get("", {}),
        )
        found.append(_enter(profile, rule, enter_ms, lease_ms, prediction))
    found.sort(key=exits_first)
    return found


def convert(
    profile: Profile, event: Event, segments: SegmentSet, at_ms: int, offset: int | None
) -> list[Transition]:
    """Let a user leave the discovery segments whose recommendation he has just engaged.

    Parameters
    ----------
    profile
        Changed in place; no lease in it ends at `at_ms` or before.
    event
        What was just added to the profile.
    segments
        The definitions that the profile was last evaluated under.
    at_ms, offset
        R of the event's record, and its place.

    Returns
    -------
    list of Transition
        With cause event and `converted`, by segment id; may be empty.
    """
    found = []
    for segment_id, state in profile.discovery.items():
        if state.exits_at_ms is not None and not set(event.labels).isdisjoint(state.labels):
            segment = segments.get(segment_id)
            if segment is not None:
                found.append(
                    _leave(profile, segment, segment.version, at_ms, Cause.EVENT, event.event_id, offset)
                )
    found.sort(key=exits_first)
    return found


def end_leases(profile: Profile, segments: SegmentSet, at_ms: int, until_ms: int) -> list[Transition]:
    """Let a user leave the discovery segments whose lease has run out, with cause model.

    Parameters
    ----------
    profile
        Changed in place; last evaluated under these definitions.
    segments
        The definitions.
    at_ms
        No transition carries a later instant.
    until_ms
        Leases that end at this instant or before it end.

    Returns
    -------
    list of Transition
        Each at the end of its lease, in that order; may be empty.
    """
    found = []
    for segment_id, state in profile.discovery.items():
        if state.exits_at_ms is not None and state.exits_at_ms <= until_ms:
            segment = segments.get(segment_id)
            if segment is not None:
                time_ms = min(state.exits_at_ms, at_ms)
                found.append(_leave(profile, segment, segment.version, time_ms, Cause.MODEL))
    found.sort(key=lambda transition: (transition.time_ms, transition.segment_id))
    return found


def leave_undefined(profile: Profile, segments: SegmentSet, old: SegmentSet, at_ms: int) -> list[Transition]:
    """Let a user leave the discovery segments that are not defined any more, with cause definition.

    Parameters
    ----------
    profile
        Changed in place; last evaluated under `old`.
    segments, old
        The definitions of now and of then.
    at_ms
        The instant.
    """
    found = []
    for segment_id, state in list(profile.discovery.items()):
        now, then = segments.get(segment_id), old.get(segment_id)
        if now is not None and now.type == "discovery":
            continue
        left = then or now
        if state.exits_at_ms is not None and left is not None:
            found.append(_leave(profile, left, left.version, at_ms, Cause.DEFINITION))
        if now is not None:
            # A base segment from here on: its numbers go on.
            profile.seqs[segment_id] = state.seq
            del profile.discovery[segment_id]
    return found


def _last_ms(profile: Profile, segment_id: str) -> int:
    """Return an instant that no transition of a user in a segment is later than."""
    before = profile.discovery.get(segment_id)
    if before is not None:
        return before.time_ms
    # A base segment once, if it has a number.
    return (profile.last_transition_ms or 0) if segment_id in profile.seqs else 0


def _suppressed(profile: Profile, rule: _Rule) -> bool:
    excluded: Collection[str] = rule.segment.exclude
    return any(profile.is_member(segment_id) for segment_id in excluded)


def _enter(profile: Profile, rule: _Rule, at_ms: int, lease_ms: int, prediction: Prediction) -> Transition:
    """Let a user in."""
    before = profile.discovery.get(rule.segment.id)
    state = Discovery(
        seq=1 + (profile.seqs.get(rule.segment.id, 0) if before is None else before.seq),
        time_ms=at_ms,
        exits_at_ms=lease_ms,
        labels=prediction.labels,
        score=prediction.score,
    )
    profile.discovery[rule.segment.id] = state
    return _transition(
        profile,
        rule.segment,
        rule.version,
        state,
        "entered",
        prediction.score,
        Cause.MODEL,
        prediction=prediction,
    )


def _leave(
    profile: Profile,
    segment: Segment,
    version: str,
    at_ms: int,
    cause: Cause,
    event_id: str | None = None,
    offset: int | None = None,
) -> Transition:
    """Let a user out."""
    state = profile.discovery[segment.id]
    weight = state.score
    state.seq += 1
    state.time_ms = max(at_ms, state.time_ms)
    state.exits_at_ms, state.labels, state.score = None, (), 0.0
    return _transition(
        profile, segment, version, state, "exited", weight, cause, event_id=event_id, offset=offset
    )


def _transition(
    profile: Profile,
    segment: Segment,
    version: str,
    state: Discovery,
    status: Literal["entered", "exited"],
    weight: float,
    cause: Cause,
    *,
    event_id: str | None = None,
    offset: int | None = None,
    prediction: Prediction | None = None,
) -> Transition:
    return Transition(
        id=transition_id(profile.user_id, segment.id, state.time_ms, state.seq),
        user_id=profile.user_id,
        segment_id=segment.id,
        segment_type="discovery",
        segment_version=version,
        status=status,
        cause=cause,
        seq=state.seq,
        time_ms=state.time_ms,
        weight=weight,
        min_weight=segment.min_weight,
        exits_at_ms=state.exits_at_ms,
        event_id=event_id,
        offset=offset,
        prediction=prediction,
        converted=None if status == "entered" else cause is Cause.EVENT,
    )
