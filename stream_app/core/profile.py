"""What is stored of one user, and its form in Redis.

Decides the shape of a profile and its bytes, which are a public API with a schema version. It must not know
when a profile changes (that is `fold`) or where it is kept.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Literal

import msgspec

from stream_app.core import standings
from stream_app.core.decay import NEVER_MS, Weights

__all__ = [
    "REMEMBERED_IDS",
    "SCHEMA_VERSION",
    "Discovery",
    "Profile",
    "TypeSums",
    "earliest",
    "pack",
    "unpack",
    "weights_at",
]

SCHEMA_VERSION = 1
REMEMBERED_IDS = 32
"""How many applied events a profile remembers, to recognise a producer's duplicate."""

_ID_BYTES = 8


# Structs of msgspec, decoded and encoded in C: for a profile of 520 bytes 2.6 and 1.5 us, where msgpack and
# checks in Python took 7.6 and 4.5. `gc=False`: they are in no cycles, and there are many.
class TypeSums(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """What one event type has left behind: forward-decayed sums, or weights where a function says so.

    Parameters
    ----------
    total
        Of all events of the type.
    labels
        Maps label to that of the events that carry it, may be empty.
    assets
        Maps asset id to that of the events on it, may be empty.
    """

    total: float
    labels: dict[str, float]
    assets: dict[str, float]


class Discovery(msgspec.Struct, gc=False):
    """A user's standing in one discovery segment, now or once.

    Parameters
    ----------
    seq
        The number of the user's transitions in the segment: odd for a member.
    time_ms
        The instant of the last of them, milliseconds since the epoch.
    exits_at_ms
        The end of the lease: a member who is not scored again until then leaves. `None` for who is not in.
    labels
        What the recommendation promised that let the user in, or kept him in; empty for who is not in.
    score
        Its growth weight at the last scoring; 0 for who is not in.
    """

    seq: int
    time_ms: int
    exits_at_ms: int | None = None
    labels: tuple[str, ...] = ()
    score: float = 0.0


class Profile(msgspec.Struct, gc=False):
    """All state of one user. Mutable, owned by the caller, not safe to share between threads.

    Parameters
    ----------
    user_id
        Whose it is.
    landmark_ms
        The instant that all sums are relative to; see `decay`.
    weights
        Maps event type to its sums, all finite and not negative.
    seqs
        Maps segment id to the number of its transitions so far: odd for a member.
    exits_at_ms
        Maps the segments that the user is in to the instant of leaving; `NEVER_MS` for never.
    recent_ids
        8-byte hashes of the ids of the last events applied, one after the other, at most 32, oldest first.
    applied
        How many events were applied.
    forget_ms
        Past this instant, and without a membership, the next record starts a new profile.
    last_transition_ms
        The instant of the last transition, `None` before the first.
    definitions
        Fingerprint of the segment set that the memberships were last evaluated under.
    seen_ms
        Maps each label that has a sum to the instant of the last engagement, the latest engaged at the end.
        Kept with the next-category model only, else empty.
    discovery
        Maps segment id to the standing in a discovery segment. Apart from the other memberships, so that
        nothing about base segments can hang on the model.
    """

    user_id: str
    landmark_ms: int
    weights: dict[str, TypeSums] = {}
    seqs: dict[str, int] = {}
    exits_at_ms: dict[str, int] = {}
    recent_ids: bytes = b""
    applied: int = 0
    forget_ms: int = 0
    last_transition_ms: int | None = None
    definitions: str = ""
    seen_ms: dict[str, int] = {}
    discovery: dict[str, Discovery] = {}

    @property
    def memberships(self) -> dict[str, int]:
        """What the user is in, base and discovery, with the instant of leaving; not to be changed."""
        if not self.discovery:
            return self.exits_at_ms
        leases = {
            segment_id: state.exits_at_ms
            for segment_id, state in self.discovery.items()
            if state.exits_at_ms is not None
        }
        return {**self.exits_at_ms, **leases}

    @property
    def next_exit_ms(self) -> int | None:
        """The earliest instant at which the user leaves a segment, `None` if there is none."""
        return earliest(self.memberships)

    def is_member(self, segment_id: str) -> bool:
        """Tell whether the user is in a base segment."""
        return segment_id in self.exits_at_ms


def earliest(exits_at_ms: Mapping[str, int]) -> int | None:
    """Return the earliest of some instants of leaving, `None` if none ever comes.

    Examples
    --------
    >>> earliest({"a": 7, "b": 5, "c": NEVER_MS}), earliest({"c": NEVER_MS}), earliest({})
    (5, None, None)
    """
    first = min(exits_at_ms.values(), default=NEVER_MS)
    return first if first < NEVER_MS else None


def pack(profile: Profile) -> bytes:
    """Return the stored form of a profile.

    Parameters
    ----------
    profile
        With finite numbers.

    Returns
    -------
    bytes
        A msgpack map with these keys:

        ======  ===========================================================================================
        ``v``   int, the schema version, 1
        ``l``   int, the landmark L: milliseconds since the epoch
        ``w``   map of event type to [total, map of label to sum, map of asset id to sum]; a sum s is the
                weight s·2^(-(t - L)/h) at t, h being the half-life of the event type in milliseconds
        ``m``   map of segment id to [seq, instant of leaving]; the latter nil for a user who is not
                in it, 253402300800000 (the year 10000) for one who never leaves by decay
        ``i``   bytes, 8 for each of the last events applied: BLAKE2b-64 of its id, oldest first
        ``n``   int, events applied
        ``f``   int, the forget instant
        ``t``   int, the instant of the last transition, or nil
        ``d``   str, the fingerprint of the segment definitions
        ``s``   only with the next-category model: map of each label in ``w`` to the instant of its last
                engagement, the latest engaged last
        ``p``   only for who was ever in a discovery segment: map of segment id to [seq, end of the lease,
                labels, growth weight, instant of the last transition]; lease and labels nil and weight 0
                for a user who is not in it
        ======  ===========================================================================================

    Examples
    --------
    >>> blob = pack(Profile("u1", 1_000, {"view": TypeSums(1.5, {"swimwear": 1.5}, {})}, forget_ms=2_000))
    >>> len(blob)
    68
    >>> unpack("u1", blob).weights["view"].labels
    {'swimwear': 1.5}
    """
    discovery: dict[str, _StoredDiscovery] | msgspec.UnsetType = msgspec.UNSET
    if profile.discovery:
        discovery = {
            segment_id: (state.seq, state.exits_at_ms, state.labels or None, state.score, state.time_ms)
            for segment_id, state in profile.discovery.items()
        }
    return _encode(
        _Stored(
            1,
            profile.landmark_ms,
            profile.weights,
            standings.to_stored(profile.seqs, profile.exits_at_ms),
            profile.recent_ids,
            profile.applied,
            profile.forget_ms,
            profile.last_transition_ms,
            profile.definitions,
            profile.seen_ms or msgspec.UNSET,
            discovery,
        )
    )


def unpack(user_id: str, blob: bytes) -> Profile:
    r"""Return the profile that `pack` stored.

    Parameters
    ----------
    user_id
        Whose it is: the stored form does not repeat it.
    blob
        What `pack` returned.

    Raises
    ------
    ValueError
        If it is anything else: another schema version, a field missing or of another type, a sum that is
        not finite, a membership that contradicts its seq. A profile that is read wrongly would be
        written back wrongly, so nothing is guessed.

    Examples
    --------
    >>> unpack("u1", b"\x80")
    Traceback (most recent call last):
    ...
    ValueError: not a profile: Object missing required field `v`
    """
    try:
        stored = _decode(blob)
        for sums in stored.w.values():
            # One sum tells whether all are finite, since real ones are far from the largest float.
            if not isfinite(sums.total + sum(sums.labels.values()) + sum(sums.assets.values())):
                raise ValueError("expected finite sums in w, got others")
        seqs, exits_at_ms = standings.from_stored(stored.m)
        if len(stored.i) % _ID_BYTES or len(stored.i) > _ID_BYTES * REMEMBERED_IDS:
            raise ValueError(
                f"expected in i up to {REMEMBERED_IDS} times {_ID_BYTES} bytes, got {len(stored.i)}"
            )
        return Profile(
            user_id,
            stored.l,
            stored.w,
            seqs,
            exits_at_ms,
            stored.i,
            stored.n,
            stored.f,
            stored.t,
            stored.d,
            {} if stored.s is msgspec.UNSET else stored.s,
            {} if stored.p is msgspec.UNSET else _discovery(stored.p),
        )
    except (ValueError, msgspec.MsgspecError, RecursionError) as exc:
        # Without the user: the message may be logged.
        raise ValueError(f"not a profile: {exc}") from exc


_StoredDiscovery = tuple[int, int | None, tuple[str, ...] | None, float, int]


class _Stored(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The stored form, field by field as documented in `pack`."""

    v: Literal[1]
    l: int  # noqa: E741 - the name of the field
    w: dict[str, TypeSums]
    m: dict[str, tuple[int, int | None]]
    i: bytes
    n: int
    f: int
    t: int | None
    d: str
    s: dict[str, int] | msgspec.UnsetType = msgspec.UNSET
    p: dict[str, _StoredDiscovery] | msgspec.UnsetType = msgspec.UNSET


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Stored).decode


def _discovery(stored: dict[str, _StoredDiscovery]) -> dict[str, Discovery]:
    """Read the field `p`."""
    found = {}
    for segment_id, (seq, exits_at_ms, labels, score, time_ms) in stored.items():
        if seq & 1:
            known = seq > 0 and exits_at_ms is not None and bool(labels) and isfinite(score)
        else:
            known = seq > 0 and exits_at_ms is None and labels is None and score == 0.0
        if not known:
            raise ValueError(
                "expected in p an odd seq with a lease, labels and a finite weight, or an even one without, "
                f"got {(seq, exits_at_ms, score, time_ms)!r}"
            )
        found[segment_id] = Discovery(seq, time_ms, exits_at_ms, labels or (), score)
    return found


def weights_at(profile: Profile, weights: Weights, now_ms: int) -> dict[str, TypeSums]:
    """Return what a user's sums weigh at an instant, for readers.

    Parameters
    ----------
    profile
        Not changed.
    weights
        The settings that the profile is stored under.
    now_ms
        Milliseconds since the epoch. Weights are known from the landmark on: an earlier instant is read as
        it.

    Returns
    -------
    dict
        Maps event type to its weights (not sums): in total, by label and by asset.

    Notes
    -----
    A label's weight over several event types is the sum of its weights.

    Examples
    --------
    >>> user = Profile("u1", 0, {"view": TypeSums(3.0, {"swimwear": 2.0}, {"a-1": 1.0})})
    >>> weights_at(user, Weights(half_life_s=60), now_ms=120_000)
    {'view': TypeSums(total=0.75, labels={'swimwear': 0.5}, assets={'a-1': 0.25})}
    """
    elapsed_ms = max(0, now_ms - profile.landmark_ms)
    found = {}
    for event_type, sums in profile.weights.items():
        left = 2.0 ** (-elapsed_ms / weights.half_life_ms(event_type))
        found[event_type] = TypeSums(
            sums.total * left,
            {label: amount * left for label, amount in sums.labels.items()},
            {asset_id: amount * left for asset_id, amount in sums.assets.items()},
        )
    return found
