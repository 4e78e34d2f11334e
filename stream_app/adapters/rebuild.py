"""Forget all that Redis holds for this service, so that the next worker folds the log from its beginning.

Decides the order in which keys go, so that a rebuild broken off anywhere is seen: every ``wm`` is marked
first, which workers refuse, and deleted last. What Kafka knows of the group stays: it says which transitions
are published for the second time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from redis.exceptions import RedisError

from stream_app.adapters.profile_store import META_KEY, keys
from stream_app.adapters.redis_client import Client, walk
from stream_app.adapters.redis_security import refusal, words_of
from stream_app.errors import StoreUnavailable

__all__ = ["forget_everything", "forget_model"]

PAGE_KEYS: Final = 1000
#: A glob's star takes braces and colons in, and user ids may hold both.
WATERMARK_KEY: Final = re.compile(r"sa:\{\d+\}:wm")


async def forget_everything(client: Client, partitions: int, progress: Callable[[int, int], None]) -> int:
    """Delete every key of this service.

    Parameters
    ----------
    client : redis.asyncio.Redis or Cluster
    partitions : int
        Partitions of the events topic; keys of others that are found go too.
    progress : callable
        Called with the keys looked at so far and about how many there are.

    Returns
    -------
    int
        Keys deleted.

    Raises
    ------
    StoreUnavailable
        If Redis did not answer; run again, what is gone is gone.
    """
    redis: Any = client
    try:
        marked = {keys(p).wm for p in range(partitions)}
        async for page in walk(client, "sa:{*}:wm", PAGE_KEYS):
            marked.update(key.decode() for key in page if WATERMARK_KEY.fullmatch(key.decode()))
        for wm in sorted(marked):
            await redis.hset(wm, "rebuilding", 1)
        total, looked_at, deleted = int(await redis.dbsize()), 0, 0
        async for page in walk(client, "sa:*", PAGE_KEYS):
            looked_at += PAGE_KEYS
            gone = [key for key in page if key.decode() not in marked and key.decode() != META_KEY]
            if gone:
                deleted += int(await redis.unlink(*gone))
            progress(min(looked_at, total), total)
        for key in [META_KEY, *sorted(marked)]:
            deleted += int(await redis.delete(key))
    except (RedisError, OSError) as exc:
        failure = StoreUnavailable("Redis, rebuild", words_of(exc))
        raise refusal(exc, "Redis, rebuild") or failure from exc
    return deleted


async def forget_model(client: Client, partitions: int) -> int:
    """Delete what the next-category model has learned; profiles, memberships and watermarks stay.

    Parameters
    ----------
    client : redis.asyncio.Redis or Cluster
    partitions : int
        Partitions of the events topic.

    Returns
    -------
    int
        Partitions that had learned anything.

    Raises
    ------
    StoreUnavailable
        If Redis did not answer; run again, what is gone is gone.
    """
    redis: Any = client
    forgotten = 0
    try:
        for partition in range(partitions):
            names = keys(partition)
            # The mark first: a worker refuses a partition that has learned and lost it.
            await redis.hdel(names.wm, "checkpoint")
            forgotten += int(await redis.delete(names.model, names.model_deltas)) > 0
    except (RedisError, OSError) as exc:
        failure = StoreUnavailable("Redis, rebuild", words_of(exc))
        raise refusal(exc, "Redis, rebuild") or failure from exc
    return forgotten
