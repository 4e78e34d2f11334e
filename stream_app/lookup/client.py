"""Two clients for readers that ask the same questions, one blocking, one for asyncio.

They decide how to wait for Redis and what its failures are called; `questions` decides all else.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar

import redis
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException, RedisError
from redis.retry import Retry

from stream_app.adapters.redis_client import connect
from stream_app.adapters.redis_security import refusal
from stream_app.errors import StoreUnavailable
from stream_app.lookup import questions
from stream_app.lookup.answers import (
    Accuracy,
    Membership,
    Meta,
    NextCategories,
    Recommendations,
    UserView,
    UserWeights,
)
from stream_app.lookup.questions import Command, Cursor, Instant, Known, Talk, instant

__all__ = ["AsyncLookup", "Lookup"]

T = TypeVar("T")
P = ParamSpec("P")

#: Connections of one client at most; a question that finds none free waits for one, as long as for an answer.
CONNECTIONS: Final = 32
#: A question is repeated once when its connection breaks: an app that was idle finds it closed by Redis.
#: Unlike a worker's commits, questions may be repeated; not after a time-out, which was waited for already.
REPEATS: Final = 1
REPEATED_ON: Final = (RedisConnectionError,)


class Lookup:
    """A blocking client for readers; may be shared between threads.

    Parameters
    ----------
    url : str
        Redis or Valkey, as in ``redis.url``; a replica will do, and lags.
    timeout_s : float
        How long one answer of Redis may take, seconds.
    cluster : bool
        Whether `url` names a node of a Redis Cluster.

    Raises
    ------
    StoreUnavailable
        From every method, if Redis does not answer.
    StartRefused
        From every method, if no worker has ever written to this Redis, or one of another schema, if a stored
        value cannot be read, or if Redis does not let this user in or cannot be trusted.
    """

    def __init__(self, url: str, *, timeout_s: float = 5.0, cluster: bool = False) -> None:
        options: dict[str, Any] = {
            "max_connections": CONNECTIONS,
            "timeout": timeout_s,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), REPEATS, REPEATED_ON),
        }
        pool = redis.BlockingConnectionPool

        def opened() -> Any:
            # redis-py types every reply as a union of all that any client might return.
            if cluster:
                return redis.RedisCluster.from_url(url, connection_pool_class=pool, **options)
            return redis.Redis.from_pool(pool.from_url(url, **options))

        self._open = opened
        self._opening = threading.Lock()
        self._redis: Any = None
        self._known: Known | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if self._redis is not None:
            self._redis.close()

    def meta(self) -> Meta:
        """Return what the stored state belongs to; read once."""
        return self._ask(questions.meta)

    def weights(self, user_id: str, now: int | datetime | None = None) -> UserWeights | None:
        """Return a user's weights, decayed to `now`; ``None`` for an unknown user.

        Parameters
        ----------
        user_id : str
        now : int, datetime or None
            Unix milliseconds, or a datetime with a zone; ``None`` means now. Weights are known from the
            profile's landmark on: an earlier instant is read as it.
        """
        return self._ask(questions.weights, user_id, _when(now))

    def segments(self, user_id: str) -> tuple[Membership, ...] | None:
        """Return the segments that a user is in now, by segment id; ``None`` for an unknown user."""
        return self._ask(questions.segments, user_id, _when())

    def is_member(self, user_id: str, segment_id: str) -> bool:
        """Tell whether a user is in a segment now; ``False`` for an unknown user or segment."""
        return self._ask(questions.is_member, user_id, segment_id, _when())

    def next_categories(self, user_id: str) -> NextCategories | None:
        """Return a user's next categories, best first; ``None`` for an unknown user."""
        return self._ask(questions.next_categories, user_id, _when())

    def recommendations(self, user_id: str) -> Recommendations | None:
        """Return what to recommend to a user, best first; ``None`` for an unknown user."""
        return self._ask(questions.recommendations, user_id, _when())

    def user(self, user_id: str, now: int | datetime | None = None) -> UserView | None:
        """Return all of the above as of `now`, and the profile; ``None`` for an unknown user."""
        return self._ask(questions.user, user_id, _when(now))

    def members(self, segment_id: str) -> Iterator[Membership]:
        """Iterate over a segment's members, partition by partition, those who leave first first.

        Not a snapshot: a user who enters or leaves meanwhile may be missed or come twice.
        """
        cursor: Cursor | None = Cursor()
        while cursor is not None:
            page, cursor = self._ask(questions.members, segment_id, cursor, _when())
            yield from page

    def member_count(self, segment_id: str) -> int:
        """Count a segment's members."""
        return self._ask(questions.member_count, segment_id, _when())

    def accuracy(self) -> Accuracy:
        """Return how good the model's last predictions were; no figures with the model off."""
        return self._ask(questions.accuracy)

    def _ask(
        self, question: Callable[Concatenate[Known, P], Talk[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        talk = questions.answered(self._known, question, *args, **kwargs)
        try:
            commands = next(talk)
            while True:
                with _readable():
                    replies = _piped(self._client(), commands).execute(raise_on_error=False)
                    _raise_first(replies)
                commands = talk.send(replies)
        except StopIteration as done:
            answer: T
            self._known, answer = done.value
            return answer

    def _client(self) -> Any:
        with self._opening:  # a Cluster is asked for its slot map when its client is made
            if self._redis is None:
                self._redis = self._open()
            return self._redis


class AsyncLookup:
    """The same for asyncio; may be shared between the tasks of one event loop.

    Parameters, answers and errors are those of `Lookup`.
    """

    def __init__(self, url: str, *, timeout_s: float = 5.0, cluster: bool = False) -> None:
        self._redis: Any
        if cluster:
            self._redis = connect(url, cluster=True, timeout_s=timeout_s)
        else:
            self._redis = aioredis.Redis.from_pool(
                aioredis.BlockingConnectionPool.from_url(
                    url,
                    max_connections=CONNECTIONS,
                    timeout=timeout_s,
                    socket_timeout=timeout_s,
                    socket_connect_timeout=timeout_s,
                    retry=AsyncRetry(NoBackoff(), REPEATS, REPEATED_ON),
                )
            )
        #: What the pool of one server does by itself, a Cluster's client leaves to its caller.
        self._cluster = asyncio.Semaphore(CONNECTIONS) if cluster else None
        self._known: Known | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *details: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def meta(self) -> Meta:
        """Return what the stored state belongs to; read once."""
        return await self._ask(questions.meta)

    async def weights(self, user_id: str, now: int | datetime | None = None) -> UserWeights | None:
        """Return a user's weights, decayed to `now`; see `Lookup.weights`."""
        return await self._ask(questions.weights, user_id, _when(now))

    async def segments(self, user_id: str) -> tuple[Membership, ...] | None:
        """Return the segments that a user is in now; see `Lookup.segments`."""
        return await self._ask(questions.segments, user_id, _when())

    async def is_member(self, user_id: str, segment_id: str) -> bool:
        """Tell whether a user is in a segment now; see `Lookup.is_member`."""
        return await self._ask(questions.is_member, user_id, segment_id, _when())

    async def next_categories(self, user_id: str) -> NextCategories | None:
        """Return a user's next categories, best first; see `Lookup.next_categories`."""
        return await self._ask(questions.next_categories, user_id, _when())

    async def recommendations(self, user_id: str) -> Recommendations | None:
        """Return what to recommend to a user, best first; see `Lookup.recommendations`."""
        return await self._ask(questions.recommendations, user_id, _when())

    async def user(self, user_id: str, now: int | datetime | None = None) -> UserView | None:
        """Return all of the above as of `now`, and the profile; see `Lookup.user`."""
        return await self._ask(questions.user, user_id, _when(now))

    async def members(self, segment_id: str) -> AsyncIterator[Membership]:
        """Iterate over a segment's members; see `Lookup.members`."""
        cursor: Cursor | None = Cursor()
        while cursor is not None:
            page, cursor = await self._ask(questions.members, segment_id, cursor, _when())
            for member in page:
                yield member

    async def member_count(self, segment_id: str) -> int:
        """Count a segment's members."""
        return await self._ask(questions.member_count, segment_id, _when())

    async def accuracy(self) -> Accuracy:
        """As `Lookup.accuracy`."""
        return await self._ask(questions.accuracy)

    async def _ask(
        self, question: Callable[Concatenate[Known, P], Talk[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        talk = questions.answered(self._known, question, *args, **kwargs)
        try:
            commands = next(talk)
            while True:
                with _readable():
                    replies = await self._replies(commands)
                    _raise_first(replies)
                commands = talk.send(replies)
        except StopIteration as done:
            answer: T
            self._known, answer = done.value
            return answer

    async def _replies(self, commands: Sequence[Command]) -> list[Any]:
        replies: list[Any]
        if self._cluster is None:
            replies = await _piped(self._redis, commands).execute(raise_on_error=False)
            return replies
        async with self._cluster:
            for _ in range(REPEATS):
                with suppress(*REPEATED_ON):
                    replies = await _piped(self._redis, commands).execute(raise_on_error=False)
                    if not any(isinstance(reply, REPEATED_ON) for reply in replies):
                        return replies
            replies = await _piped(self._redis, commands).execute(raise_on_error=False)
            return replies


def _when(now: int | datetime | None = None) -> Instant:
    return instant(now, time.time_ns() // 1_000_000)


def _piped(client: Any, commands: Sequence[Command]) -> Any:
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        getattr(pipeline, command.name)(*command.args, **command.options)
    return pipeline


def _raise_first(replies: Sequence[Any]) -> None:
    # redis-py would put the command into the message, and with it the user.
    for reply in replies:
        if isinstance(reply, RedisError):
            raise reply


class _readable:  # noqa: N801 - reads as a phrase at its `with`
    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, RedisError | RedisClusterException | OSError):
            failure = StoreUnavailable("Redis, look-up", f"{type(exc).__name__}: {exc}")
            raise refusal(exc, "Redis, look-up") or failure from exc
