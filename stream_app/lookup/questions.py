"""Which commands a question takes, and what their replies say: no I/O, no clock.

A question is a generator. It yields the commands of one round trip, is sent their replies, and returns its
answer, so that `Lookup` and `AsyncLookup` differ in nothing but how they wait. `answered` goes around every
question: it knows what ``sa:meta`` said, and asks again when a reply shows that this is no longer true.

The names of keys are the public API that the README documents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Concatenate, Final, Literal, ParamSpec, TypeAlias, TypeVar

from stream_app.core.decay import NEVER_MS, EventTypeWeight, Weights
from stream_app.core.partitioner import partition_of
from stream_app.core.profile import Profile, unpack, weights_at
from stream_app.core.scores import Scored, unpack_scores
from stream_app.errors import StartRefused, StoreUnavailable
from stream_app.lookup.answers import (
    Accuracy,
    Membership,
    Meta,
    NextCategories,
    NextCategory,
    Prediction,
    Recommendations,
    UserView,
    UserWeights,
)

__all__ = [
    "Command",
    "Cursor",
    "Instant",
    "Known",
    "Talk",
    "accuracy",
    "answered",
    "instant",
    "is_member",
    "member_count",
    "members",
    "meta",
    "next_categories",
    "recommendations",
    "segments",
    "user",
    "weights",
]

T = TypeVar("T")
P = ParamSpec("P")

META_KEY: Final = "sa:meta"
SCHEMA_VERSION: Final = "1"
PAGE: Final = 1000
#: Fields of ``wm`` that must be as ``sa:meta`` says, or else the profiles beside it would be read wrongly.
SETTINGS: Final = ("weights", "partitions", "clock")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Command:
    """One command: the name, arguments and options of redis-py's method."""

    name: str
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)


Talk: TypeAlias = Generator[Sequence[Command], Sequence[Any], T]
"""One round trip after the other; returns a `T`."""


@dataclass(frozen=True, slots=True)
class Known:
    """What ``sa:meta`` said, with `settings` as its text, to be compared with those of a partition."""

    meta: Meta
    settings: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Instant:
    """As of when a question is asked: what the caller said, if anything, and what the wall clock says."""

    given_ms: int | None
    wall_ms: int

    def at(self, known: Known, stream_time_ms: int) -> int:
        """Return "now" in a partition, Unix ms."""
        if self.given_ms is not None:
            return self.given_ms
        return stream_time_ms if known.meta.clock == "event" else self.wall_ms


class OtherSettings(Exception):  # noqa: N818 - never leaves this module
    """What is stored was folded under other settings than ``sa:meta`` said when it was read."""


def instant(now: int | datetime | None, wall_ms: int) -> Instant:
    """Return as of when to answer.

    Raises
    ------
    TypeError
        For a number that is no integer: seconds, perhaps.
    ValueError
        For a datetime without a zone.

    Examples
    --------
    >>> from datetime import UTC
    >>> instant(datetime(2026, 1, 2, 3, 4, 5, 678_999, UTC), 0).given_ms
    1767323045678
    >>> instant(None, wall_ms=5)
    Instant(given_ms=None, wall_ms=5)
    """
    if isinstance(now, datetime):
        if now.tzinfo is None:
            raise ValueError(
                f"now: expected an instant, got a datetime without a time zone, {now.isoformat()}"
            )
        return Instant((now - _EPOCH) // timedelta(milliseconds=1), wall_ms)
    if now is not None and type(now) is not int:
        raise TypeError(f"now: expected Unix milliseconds as int or a datetime, got {type(now).__name__}")
    return Instant(now, wall_ms)


# --- around every question ---------------------------------------------------------------------------------


def answered(
    known: Known | None,
    question: Callable[Concatenate[Known, P], Talk[T]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> Talk[tuple[Known, T]]:
    """Ask a question, after ``sa:meta`` if it is not known yet, and once more if it has changed.

    Raises
    ------
    StartRefused
        No worker has ever written to this Redis, or one of another schema; or a value cannot be read.
    StoreUnavailable
        The settings of the stored state differ from what was just read: a worker is about to begin anew.
    """
    if known is not None:
        try:
            return known, (yield from question(known, *args, **kwargs))
        except OtherSettings:
            pass  # rebuilt since they were read
    known = yield from _read_meta()
    try:
        return known, (yield from question(known, *args, **kwargs))
    except OtherSettings as exc:
        raise StoreUnavailable("Redis, look-up", str(exc)) from exc


def _read_meta() -> Talk[Known]:
    (fields,) = yield [Command("hgetall", (META_KEY,))]
    stored = {name.decode(): value.decode() for name, value in fields.items()}
    if stored.get("schema") != SCHEMA_VERSION:
        raise StartRefused(
            f"state of schema {SCHEMA_VERSION}",
            stored.get("schema", "none"),
            f"key {META_KEY}",
            "Start `stream-app worker`, which writes it, or point redis.url at the service's Redis.",
        )
    found = Meta(
        topic=stored["topic"],
        partitions=int(stored["partitions"]),
        group=stored["group"],
        clock=stored["clock"],
        weights=_weights(stored["weights"]),
        model=stored.get("model") == "on",
    )
    return Known(found, tuple(stored[name].encode() for name in SETTINGS))


def _weights(text: str) -> Weights:
    stored = json.loads(text)
    types = {name: EventTypeWeight(**fields) for name, fields in stored.get("event_types", {}).items()}
    return Weights(stored["half_life_s"], stored["history_floor"], types)


def meta(known: Known) -> Talk[Meta]:
    """Ask for what the stored state belongs to: no round trip of its own."""
    yield from ()
    return known.meta


# --- of a user ---------------------------------------------------------------------------------------------


def weights(known: Known, user_id: str, when: Instant) -> Talk[UserWeights | None]:
    """Ask for a user's weights."""
    found = yield from _known_user(known, user_id, when)
    if found is None:
        return None
    return UserWeights(user_id, found.now_ms, weights_at(found.profile, known.meta.weights, found.now_ms))


def segments(known: Known, user_id: str, when: Instant) -> Talk[tuple[Membership, ...] | None]:
    """Ask for the segments that a user is in."""
    found = yield from _known_user(known, user_id, when)
    return None if found is None else _memberships(found)


def next_categories(known: Known, user_id: str, when: Instant) -> Talk[NextCategories | None]:
    """Ask for a user's next categories."""
    found = yield from _known_user(known, user_id, when, scores=True)
    if found is None:
        return None
    scored = found.scored()
    if scored is None:
        return NextCategories(user_id)
    categories = tuple(NextCategory(label, score) for label, score in scored.next_categories)
    return NextCategories(user_id, scored.at_ms, scored.model_version, categories)


def recommendations(known: Known, user_id: str, when: Instant) -> Talk[Recommendations | None]:
    """Ask for what to recommend to a user."""
    found = yield from _known_user(known, user_id, when, scores=True)
    if found is None:
        return None
    scored = found.scored()
    if scored is None:
        return Recommendations(user_id)
    return Recommendations(user_id, scored.at_ms, scored.model_version, tuple(scored.recommendations))


def user(known: Known, user_id: str, when: Instant) -> Talk[UserView | None]:
    """Ask for all that is known of a user."""
    found = yield from _known_user(known, user_id, when, scores=True)
    if found is None:
        return None
    return UserView(
        user_id=user_id,
        partition=found.partition,
        now_ms=found.now_ms,
        profile=found.profile,
        weights=weights_at(found.profile, known.meta.weights, found.now_ms),
        segments=_memberships(found),
        scores=found.scored(),
    )


def is_member(known: Known, user_id: str, segment_id: str, when: Instant) -> Talk[bool]:
    """Ask whether a user is in a segment."""

    def commands(partition: int) -> list[Command]:
        return [
            Command("exists", (_profile_key(partition, user_id),)),
            Command("zscore", (_members_key(partition, segment_id), user_id)),
        ]

    found = yield from _where(known, user_id, commands)
    if found is None:
        return False
    _, stream_time_ms, (_, exits_at) = found
    return exits_at is not None and exits_at > when.at(known, stream_time_ms)


@dataclass(frozen=True, slots=True)
class _Found:
    partition: int
    now_ms: int
    profile: Profile
    next_blob: bytes | None

    def scored(self) -> Scored | None:
        if self.next_blob is None:
            return None
        try:
            return unpack_scores(self.profile.user_id, self.next_blob)
        except ValueError as exc:
            raise _unreadable(self.partition, "next", exc) from exc


def _known_user(known: Known, user_id: str, when: Instant, *, scores: bool = False) -> Talk[_Found | None]:
    """Find a user's profile, with what is stored of the last scoring; ``None`` for who is unknown."""

    def commands(partition: int) -> list[Command]:
        asked = [Command("get", (_profile_key(partition, user_id),))]
        return [*asked, Command("get", (_next_key(partition, user_id),))] if scores else asked

    found = yield from _where(known, user_id, commands)
    if found is None:
        return None
    partition, stream_time_ms, replies = found
    try:
        profile = unpack(user_id, replies[0])
    except ValueError as exc:
        raise _unreadable(partition, "profile", exc) from exc
    now_ms = when.at(known, stream_time_ms)
    # The next record would start a new profile: `fold`, step 2.
    if now_ms > profile.forget_ms and not profile.exits_at_ms:
        return None
    return _Found(partition, now_ms, profile, replies[1] if scores else None)


def _where(
    known: Known, user_id: str, commands: Callable[[int], list[Command]]
) -> Talk[tuple[int, int, Sequence[Any]] | None]:
    """Ask the expected partition and, if the user is not there, all others in one more round trip.

    Returns
    -------
    tuple or None
        The partition, its stream time, and its replies to `commands`, of which the first says whether the
        user's profile is there.
    """
    expected = partition_of(user_id.encode(), known.meta.partitions)
    others = [partition for partition in range(known.meta.partitions) if partition != expected]
    claimed = False
    for partitions in ([expected], others):
        if not partitions:
            continue
        parts = [[_ask_settings(partition), *commands(partition)] for partition in partitions]
        replies = iter((yield [command for part in parts for command in part]))
        for partition, part in zip(partitions, parts, strict=True):
            settings, *rest = [next(replies) for _ in part]
            stream_time_ms = _stream_time_ms(known, partition, settings)
            claimed = claimed or stream_time_ms is not None
            if rest[0] is not None and rest[0] != 0:
                return partition, stream_time_ms or 0, rest
    if not claimed:
        raise OtherSettings("a sa:meta without the watermark of any partition")
    return None


def _ask_settings(partition: int) -> Command:
    """Return the command that goes before all others to a partition; `_stream_time_ms` reads its reply."""
    return Command("hmget", (f"sa:{{{partition}}}:wm", [*SETTINGS, "stream_time_ms"]))


def _stream_time_ms(known: Known, partition: int, reply: Sequence[bytes | None]) -> int | None:
    """Return a partition's stream time, 0 before its first record, ``None`` if no worker ever claimed it.

    Raises
    ------
    OtherSettings
        Its profiles are not to be read as ``sa:meta`` said.
    """
    *settings, stream_time = reply
    if tuple(settings) != known.settings:
        if any(setting is not None for setting in settings):
            raise OtherSettings(f"settings in sa:{{{partition}}}:wm that are not those of sa:meta")
        return None
    return int(stream_time or 0)


def _memberships(found: _Found) -> tuple[Membership, ...]:
    profile = found.profile
    predictions = {
        segment_id: Prediction(state.labels, state.score)
        for segment_id, state in profile.discovery.items()
        if state.exits_at_ms is not None
    }
    return tuple(
        Membership(profile.user_id, segment_id, _unless_never(exits_at), predictions.get(segment_id))
        for segment_id, exits_at in sorted(profile.memberships.items())
        if exits_at > found.now_ms
    )


# --- of a segment ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where the next page of members begins."""

    partition: int = 0
    start: int = 0


def members(
    known: Known, segment_id: str, cursor: Cursor, when: Instant
) -> Talk[tuple[list[Membership], Cursor | None]]:
    """Ask for a page of a segment's members; ``None`` instead of a cursor after the last one."""
    partition, start = cursor.partition, cursor.start
    settings, page = yield [
        _ask_settings(partition),
        Command(
            "zrange", (_members_key(partition, segment_id), start, start + PAGE - 1), {"withscores": True}
        ),
    ]
    now_ms = when.at(known, _stream_time_ms(known, partition, settings) or 0)
    found = [
        Membership(member.decode(), segment_id, _unless_never(exits_at))
        for member, exits_at in page
        if exits_at > now_ms
    ]
    if len(page) == PAGE:
        return found, Cursor(partition, start + PAGE)
    return found, Cursor(partition + 1) if partition + 1 < known.meta.partitions else None


def member_count(known: Known, segment_id: str, when: Instant) -> Talk[int]:
    """Ask how many members a segment has."""
    partitions = range(known.meta.partitions)
    replies = yield [_ask_settings(partition) for partition in partitions]
    counted = []
    for partition, reply in zip(partitions, replies, strict=True):
        now_ms = when.at(known, _stream_time_ms(known, partition, reply) or 0)
        counted.append(Command("zcount", (_members_key(partition, segment_id), f"({now_ms}", "+inf")))
    return sum((yield counted))


# --- of the model ------------------------------------------------------------------------------------------


def accuracy(known: Known) -> Talk[Accuracy]:
    """Ask how good the model's last predictions were, over all workers.

    Raises
    ------
    StartRefused
        What is stored cannot be read.
    """
    partitions = range(known.meta.partitions)
    replies = yield [Command("hget", (f"sa:{{{partition}}}:model", "accuracy")) for partition in partitions]
    latest: dict[str, dict[str, Any]] = {}
    for partition, reply in zip(partitions, replies, strict=True):
        if reply is None:
            continue
        try:
            said = json.loads(reply)
            # Every partition of a worker says the same of it, at different times.
            if said["examples"] >= latest.get(said["worker"], said)["examples"]:
                latest[said["worker"]] = said
        except (ValueError, TypeError, LookupError) as exc:
            raise StartRefused(
                "figures that the worker has written",
                "a value that cannot be read",
                f"key sa:{{{partition}}}:model, field accuracy",
                "Find out what else writes to this key, then run `stream-app rebuild --model`.",
            ) from exc
    found = latest.values()
    tasks = {task: _pooled([one["tasks"][task] for one in found]) for task in ("next", "discovery")}
    segments = {segment_id for one in found for segment_id in one["segments"]}
    return Accuracy(
        tasks if found else {},
        {
            segment_id: _pooled([one["segments"].get(segment_id, {}) for one in found])
            for segment_id in sorted(segments)
        },
    )


def _pooled(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the means of figures, weighted by how many predictions each stands for.

    Examples
    --------
    >>> _pooled([{"examples": 1, "mrr": 0.5}, {"examples": 3, "mrr": 0.25}, {}])
    {'examples': 4, 'mrr': 0.3125}
    """
    total = sum(part.get("examples", 0) for part in parts)
    pooled: dict[str, float] = {"examples": total}
    for part in parts:
        for name, value in part.items():
            if name != "examples" and total:
                pooled[name] = pooled.get(name, 0.0) + value * part["examples"] / total
    return pooled


def _unless_never(exits_at: float) -> int | None:
    return None if exits_at >= NEVER_MS else int(exits_at)


def _profile_key(partition: int, user_id: str) -> str:
    return f"sa:{{{partition}}}:profile:{user_id}"


def _next_key(partition: int, user_id: str) -> str:
    return f"sa:{{{partition}}}:next:{user_id}"


def _members_key(partition: int, segment_id: str) -> str:
    return f"sa:{{{partition}}}:members:{segment_id}"


def _unreadable(partition: int, kind: Literal["profile", "next"], exc: ValueError) -> StartRefused:
    return StartRefused(
        f"{'a profile' if kind == 'profile' else 'scores'} of schema {SCHEMA_VERSION}",
        f"a value that cannot be read ({exc})",
        f"partition {partition}, keys sa:{{{partition}}}:{kind}:*",
        "Find out what else writes to these keys, then run `stream-app rebuild`.",
    )
