"""A slice of a partition's log, applied to the profiles of its users.

Decides the two things that are not a user's own: the partition's stream time, and that a profile from other
definitions is brought up to date before its next record. It must not know how records were read, where
profiles are kept or how results are committed.

Stream time S is the largest instant of the partition's valid records so far, so it is a function of the log,
and so are the results: cutting the same log into other slices gives the same transitions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from stream_app.core.event import Record
from stream_app.core.fold import Fold
from stream_app.core.patch import LEFT, Patcher, Stored
from stream_app.core.profile import Profile, TypeSums
from stream_app.core.segment_set import SegmentSet
from stream_app.core.transition import Transition

__all__ = ["Applied", "Packed", "StepResult", "fold_slice"]


class Applied(NamedTuple):
    """A record that was no duplicate; a tuple, since there is one for every event.

    Parameters
    ----------
    record
        As read.
    at_ms
        R, the instant at which it took effect.
    fresh
        Whether the user's profile began with it, for the first time or anew.
    left
        What the profile says of labels after it, where it has forgotten some; else `None`.
    """

    record: Record
    at_ms: int
    fresh: bool
    left: Profile | None = None


@dataclass(slots=True)
class StepResult:
    """What a slice changed.

    Parameters
    ----------
    profiles
        Maps user id to the profile after the slice, for those that differ from what was given and are not
        in `Packed.stored`.
    transitions
        In the order of the log.
    stream_time_ms
        S after the slice, `None` while no valid record has been seen.
    applied
        The records that were no duplicates, in the order of the log; not those of users in `Packed.stored`.
    """

    profiles: dict[str, Profile]
    transitions: list[Transition]
    stream_time_ms: int | None
    applied: list[Applied]


class Packed:
    """The stored profiles of a slice's users, unpacked only where an event asks for it.

    Parameters
    ----------
    patcher
        For the definitions and settings of today.
    blobs
        Maps user id to the packed profile of every user of the slice who has one.
    unpack
        Returns the profile of a user from these bytes, or raises.

    Attributes
    ----------
    stored : dict
        Maps user id to what became of the packed profile, for those who were met and not unpacked.
    before : dict
        Maps user id to the memberships of before the slice, for those who were unpacked.
    """

    __slots__ = ("_blobs", "_patcher", "_unpack", "before", "stored")

    def __init__(
        self, patcher: Patcher, blobs: Mapping[str, bytes], unpack: Callable[[str, bytes], Profile]
    ) -> None:
        self._patcher = patcher
        self._blobs = blobs
        self._unpack = unpack
        self.stored: dict[str, Stored] = {}
        self.before: dict[str, Mapping[str, int]] = {}

    def apply(
        self,
        record: Record,
        stream_time_ms: int,
        profiles: dict[str, Profile],
        changed: dict[str, Profile],
        transitions: list[Transition],
    ) -> bool:
        """Apply a record to a packed profile; `False` leaves it to the fold, with the profile unpacked."""
        event = record.event
        user_id = event.user_id
        if user_id in profiles:
            return False
        stored = self.stored.get(user_id)
        if stored is None:
            blob = self._blobs.get(user_id)
            if blob is None:
                return False
            stored = self.stored[user_id] = Stored(user_id, blob)
        if self._patcher.apply(stored, event, stream_time_ms, record.offset, transitions) != LEFT:
            return True
        del self.stored[user_id]
        profile = before = self._unpack(user_id, stored.blob)
        if stored.is_changed:
            before = self._unpack(user_id, self._blobs[user_id])
            changed[user_id] = profile
        self.before[user_id] = dict(before.memberships)
        profiles[user_id] = profile
        return False


def fold_slice(
    fold: Fold,
    records: Sequence[Record],
    profiles: dict[str, Profile],
    stream_time_ms: int | None,
    clock: Literal["wall", "event"],
    old: Mapping[str, SegmentSet],
    packed: Packed | None = None,
) -> StepResult:
    """Apply the valid records of a slice in order.

    Parameters
    ----------
    fold
        The definitions and settings of today.
    records
        Valid records of one partition, by offset; may be empty.
    profiles
        Maps user id to the stored profile of every user of the slice who has one. Changed in place, the
        profiles too: after an error it must be thrown away.
    stream_time_ms
        S before the slice, `None` if no valid record came before it.
    clock
        "wall" takes a record's Kafka timestamp for its instant, "event" its event's timestamp.
    old
        Maps fingerprint to the definitions that stored profiles may have been evaluated under, may be empty.
    packed
        Stored profiles that are not in `profiles`. Common events are applied to them as they are; others
        move them to `profiles`. Who is applied to so is neither in the result's `profiles` nor `applied`.

    Returns
    -------
    StepResult

    Raises
    ------
    ValueError
        If a profile was evaluated under definitions that are not in `old`, or exists without a stream time.

    Examples
    --------
    >>> from stream_app.core.decay import Weights
    >>> from stream_app.core.event import Event
    >>> from stream_app.core.segment import Segment
    >>> weights = Weights(half_life_s=1_000)
    >>> fold = Fold(SegmentSet([Segment("swim", labels=("swimwear",), min_weight=0.5)], weights), weights)
    >>> seen = Record(7, 9_000, Event("u1", "view", 5_000, "e-1", ("swimwear",)))
    >>> result = fold_slice(fold, [seen], {}, None, "event", {})
    >>> [(t.segment_id, t.status, t.time_ms, t.offset) for t in result.transitions], result.stream_time_ms
    ([('swim', 'entered', 5000, 7)], 5000)
    """
    changed: dict[str, Profile] = {}
    transitions: list[Transition] = []
    applied: list[Applied] = []
    fingerprint = fold.segments.fingerprint
    for record in records:
        event = record.event
        instant_ms = event.event_time_ms if clock == "event" else record.kafka_time_ms
        before_ms = stream_time_ms
        if stream_time_ms is None or instant_ms > stream_time_ms:
            stream_time_ms = instant_ms
        if packed is not None and packed.apply(record, stream_time_ms, profiles, changed, transitions):
            continue
        profile = profiles.get(event.user_id)
        if profile is not None and profile.definitions != fingerprint:
            if before_ms is None or profile.definitions not in old:
                raise ValueError(
                    f"expected a stream time and a profile under definitions {fingerprint} or "
                    f"one of {sorted(old)}, got {before_ms} and {profile.definitions!r}"
                )
            transitions += fold.redefine(profile, before_ms, old[profile.definitions])
            changed[event.user_id] = profile
        applied_before = None if profile is None else profile.applied
        engaged = 0
        if profile is not None and fold.keeps_seen:
            seen_ms = profile.seen_ms
            engaged = len(seen_ms) + sum([label not in seen_ms for label in event.labels])
        after, caused = fold.apply(profile, event, stream_time_ms, record.offset)
        fresh = after is not profile
        if fresh or after.applied != applied_before:
            at_ms = max(stream_time_ms, after.last_transition_ms or stream_time_ms)
            left = None
            if not fresh and len(after.seen_ms) < engaged:
                left = _labels_of(after)
            applied.append(Applied(record, at_ms, fresh, left))
        elif not caused:
            continue
        profiles[event.user_id] = changed[event.user_id] = after
        transitions += caused
    return StepResult(changed, transitions, stream_time_ms, applied)


def _labels_of(profile: Profile) -> Profile:
    """Return what a profile says of labels, to be kept while the profile changes."""
    return Profile(
        profile.user_id,
        profile.landmark_ms,
        {name: TypeSums(sums.total, dict(sums.labels), {}) for name, sums in profile.weights.items()},
        seen_ms=dict(profile.seen_ms),
    )
