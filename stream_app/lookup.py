"""Read what the service knows: a user's weights and segments, and a segment's members.

Decides how the keys that the README documents are read by somebody who is not the worker. Must not write, and
imports neither Faust nor Kafka's client beyond the partitioner, so that an app may depend on it.

All answers are as of the last commit that Redis holds. Weights are decayed to `now_ms`; with the event clock
that is the partition's stream time, since "now" means nothing to a replay.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from stream_app.adapters.partitioner import partition_of
from stream_app.core.decay import NEVER_MS, EventTypeWeight, Weights
from stream_app.core.profile import Profile, TypeSums, unpack, weights_at
from stream_app.errors import StartRefused, StoreUnavailable

__all__ = ["Lookup", "Membership", "Meta", "UserView"]

META_KEY: Final = "sa:meta"
SCHEMA_VERSION: Final = "1"
PAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class Meta:
    """What ``sa:meta`` says of the rest: which log was folded, by which clock and weights."""

    topic: str
    partitions: int
    group: str
    clock: str
    weights: Weights


@dataclass(frozen=True, slots=True)
class Membership:
    """A user in a segment; `exits_at_ms` is ``None`` if the membership never ends by decay."""

    user_id: str
    segment_id: str
    exits_at_ms: int | None


@dataclass(frozen=True, slots=True)
class UserView:
    """All that is known of a user, as of `now_ms`.

    Attributes
    ----------
    partition : int
        Where the user's state was found.
    weights : mapping of event type to TypeSums
        Decayed weights: total, by label and by asset.
    segments : list of Membership
        Base segments that the user is in at `now_ms`, by segment id.
    """

    user_id: str
    partition: int
    now_ms: int
    profile: Profile
    weights: Mapping[str, TypeSums]
    segments: list[Membership]


class Lookup:
    """A client for readers; not safe to share between threads.

    Parameters
    ----------
    url : str
        Redis, as in ``redis.url``.
    timeout_s : float
        How long one answer may take, seconds.

    Raises
    ------
    StoreUnavailable
        From every method, if Redis does not answer.
    StartRefused
        From every method, if no worker has ever written to this Redis, or one of another schema.
    """

    def __init__(self, url: str, *, timeout_s: float = 5.0) -> None:
        # redis-py types every reply as a union of all that any client might return.
        self._redis: Any = redis.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )
        self._meta: Meta | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def meta(self) -> Meta:
        """Return what the stored state belongs to; read once."""
        if self._meta is None:
            fields = self._ask("hgetall", META_KEY)
            stored = {name.decode(): value.decode() for name, value in fields.items()}
            if stored.get("schema") != SCHEMA_VERSION:
                raise StartRefused(
                    f"state of schema {SCHEMA_VERSION}",
                    stored.get("schema", "none"),
                    f"key {META_KEY}",
                    "Start `stream-app worker`, which writes it, or point redis.url at the service's Redis.",
                )
            self._meta = Meta(
                topic=stored["topic"],
                partitions=int(stored["partitions"]),
                group=stored["group"],
                clock=stored["clock"],
                weights=_weights(stored["weights"]),
            )
        return self._meta

    def user(self, user_id: str, now_ms: int | None = None) -> UserView | None:
        """Return what is known of a user, ``None`` for one who is unknown or forgotten.

        Looks where Kafka's default partitioner puts the user; a miss there is looked for in all other
        partitions, since another producer may partition differently.
        """
        meta = self.meta()
        expected = partition_of(user_id.encode(), meta.partitions)
        found = self._profile(expected, user_id)
        if found is None:
            for partition in range(meta.partitions):
                found = self._profile(partition, user_id) if partition != expected else None
                if found is not None:
                    expected = partition
                    break
        if found is None:
            return None
        profile, stream_time_ms = found
        if now_ms is None:
            now_ms = stream_time_ms if meta.clock == "event" else time.time_ns() // 1_000_000
        if now_ms > profile.forget_ms and not profile.exits_at_ms:
            return None
        segments = [
            Membership(user_id, segment_id, None if exits_at >= NEVER_MS else exits_at)
            for segment_id, exits_at in sorted(profile.exits_at_ms.items())
            if exits_at > now_ms
        ]
        weights = weights_at(profile, meta.weights, now_ms)
        return UserView(user_id, expected, now_ms, profile, weights, segments)

    def members(self, segment_id: str) -> Iterator[Membership]:
        """Iterate over a segment's members, partition by partition, those who leave first first.

        Not a snapshot: a user who enters or leaves meanwhile may be missed or come twice.
        """
        for partition in range(self.meta().partitions):
            start = 0
            while True:
                page = self._ask(
                    "zrange", _members(partition, segment_id), start, start + PAGE - 1, withscores=True
                )
                for user, score in page:
                    yield Membership(user.decode(), segment_id, None if score >= NEVER_MS else int(score))
                if len(page) < PAGE:
                    break
                start += PAGE

    def member_count(self, segment_id: str) -> int:
        """Count a segment's members."""
        return sum(int(self._ask("zcard", _members(p, segment_id))) for p in range(self.meta().partitions))

    def _profile(self, partition: int, user_id: str) -> tuple[Profile, int] | None:
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.get(f"sa:{{{partition}}}:profile:{user_id}")
        pipeline.hget(f"sa:{{{partition}}}:wm", "stream_time_ms")
        with _readable():
            blob, stream_time = pipeline.execute()
        if blob is None:
            return None
        try:
            return unpack(user_id, blob), int(stream_time or 0)
        except ValueError as exc:
            raise StartRefused(
                f"a profile of schema {SCHEMA_VERSION}",
                f"a value that cannot be read ({exc})",
                f"partition {partition}, keys sa:{{{partition}}}:profile:*",
                "Find out what else writes to these keys, then run `stream-app rebuild`.",
            ) from exc

    def _ask(self, command: str, *args: object, **options: object) -> Any:
        with _readable():
            return getattr(self._redis, command)(*args, **options)


class _readable:  # noqa: N801 - reads as a phrase at its `with`
    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, RedisError | OSError):
            raise StoreUnavailable("Redis, look-up", f"{type(exc).__name__}: {exc}") from exc


def _members(partition: int, segment_id: str) -> str:
    return f"sa:{{{partition}}}:members:{segment_id}"


def _weights(text: str) -> Weights:
    stored = json.loads(text)
    types = {name: EventTypeWeight(**fields) for name, fields in stored.get("event_types", {}).items()}
    return Weights(stored["half_life_s"], stored["history_floor"], types)
