"""Open Redis, one server or a Cluster, so that no command is ever executed twice unasked.

Decides how a lost master is looked for, which commands go to every master, and what a Cluster's failures are
called. Both kinds of client answer the same calls; what differs (a walk over all keys, what every master must
hold) has a function here. Must not know what the keys mean.

A redirection (MOVED, ASK, TRYAGAIN) is followed: the server that sends one has executed nothing. All else is
raised at once, and the next command asks for the slot map anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import redis.asyncio as aioredis
from redis.asyncio.cluster import ClusterPipeline, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.connection import HiredisRespSerializer
from redis.exceptions import (
    AuthenticationError,
    ClusterError,
    NoPermissionError,
    NoScriptError,
    RedisClusterException,
)
from redis.exceptions import ConnectionError as RedisConnectionError

__all__ = ["Client", "Cluster", "connect", "from_every_master", "info_of_nodes", "walk"]

MOST_CONNECTIONS: Final = 64
#: What ends the name of no key.
NEVER: Final = ":none"


class Cluster(RedisCluster):
    """A client of a Redis Cluster that repeats nothing, and fails as a client of one server does.

    redis-py has errors of a Cluster that are no `RedisError`, and does not look for a new master after a
    pipeline has met a dead one.
    """

    async def initialize(self, *args: Any, **kwargs: Any) -> Cluster:
        """Ask for the slot map, unless it is known."""
        try:
            await super().initialize(*args, **kwargs)
        except RedisClusterException as exc:
            raise _as_of_one_server(exc) from exc
        return self

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        """Ask the master of the command's keys once."""
        try:
            return await super().execute_command(*args, **kwargs)
        except RedisClusterException as exc:
            raise _as_of_one_server(exc) from exc
        except AttributeError as exc:
            if "NoneType" not in str(exc):
                raise
            # redis-py was asked to try at a node that its map does not have yet.
            self.forget_map()
            raise RedisConnectionError("sent on to a node that is not in the slot map yet") from exc

    def forget_map(self) -> None:
        """Ask for the slot map anew before the next command."""
        self._initialize = True

    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> ClusterPipeline:
        """Return a pipeline, for commands that only read: those that were redirected are sent again."""
        made: Any = _Pipeline  # abstract by redis-py's types only
        return made(self)  # type: ignore[no-any-return]

    def register_script(self, script: Any) -> Any:
        """Return a script to be called with ``keys`` and ``args``.

        redis-py's own loads a script into every master before it runs on one, so one dead master would stop
        the partitions of all.
        """
        return _Script(self, script)


class _Pipeline(ClusterPipeline):
    async def execute(self, raise_on_error: bool = True, allow_redirections: bool = True) -> list[Any]:
        cluster = self.cluster_client
        try:
            replies = await super().execute(raise_on_error, allow_redirections)
        except RedisClusterException as exc:
            raise _as_of_one_server(exc) from exc
        except RedisCluster.ERRORS_ALLOW_RETRY:
            cluster._initialize = True
            raise
        if any(isinstance(reply, RedisCluster.ERRORS_ALLOW_RETRY) for reply in replies):
            cluster._initialize = True
        return replies


class _Script:
    """A Lua script that each master learns when it first runs it, after a failover too.

    While a slot moves to another master, a key that is not at the old one may be at the new one, and a script
    that comes upon such a key is broken off in its middle, its writes so far left standing: also one that it
    has deleted itself. So each is told of a key that never exists, without which a master does not begin.
    """

    def __init__(self, cluster: Cluster, text: str) -> None:
        self._cluster: Any = cluster
        self._text = text
        self._sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, keys: Sequence[Any] = (), args: Sequence[Any] = ()) -> Any:
        told = [*keys, f"{keys[0]}{NEVER}"]
        try:
            return await self._cluster.evalsha(self._sha, len(told), *told, *args)
        except NoScriptError:  # nothing was executed
            return await self._cluster.eval(self._text, len(told), *told, *args)


Client: TypeAlias = aioredis.Redis | Cluster


def connect(url: str, *, cluster: bool = False, timeout_s: float = 5.0) -> Client:
    """Open a client that never repeats a command by itself.

    redis-py repeats a command up to ten times when its connection breaks; a commit whose reply was lost would
    then be answered with a mismatch of its own making.

    Parameters
    ----------
    url : str
        The server; of a Cluster any node, which tells of the others.
    cluster : bool
        Whether it is a node of a Redis Cluster.
    timeout_s : float
        How long one answer may take, seconds.
    """
    if cluster:
        client: Client = Cluster.from_url(  # type: ignore[assignment]  # redis-py's types forget the subclass
            url,
            decode_responses=False,
            retry=Retry(NoBackoff(), 0),
            # Patch the map as redirections tell; asking anew by count would cut the connections of all.
            reinitialize_steps=0,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            health_check_interval=0,
            max_connections=MOST_CONNECTIONS,
        )
        return client
    client = aioredis.Redis.from_url(
        url,
        decode_responses=False,
        retry=Retry(NoBackoff(), 0),
        retry_on_error=[],
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        health_check_interval=0,
        max_connections=MOST_CONNECTIONS,
    )
    pool = client.connection_pool
    pool.connection_class = _PACKED.get(pool.connection_class, pool.connection_class)
    return client


class _PacksInC:
    """Writes a command down with hiredis, as redis-py's own client without asyncio does.

    A commit of 500 profiles has 1,700 arguments: a third of what redis-py's Python takes. Not for a Cluster,
    whose nodes make their connections themselves.
    """

    def pack_command(self, *args: Any) -> list[bytes]:
        packed: list[bytes] = _SERIALIZER.pack(*args)
        return packed


_SERIALIZER: Any = HiredisRespSerializer()


class _Connection(_PacksInC, aioredis.Connection):
    pass


class _SSLConnection(_PacksInC, aioredis.SSLConnection):
    pass


_PACKED: Mapping[type, type] = {aioredis.Connection: _Connection, aioredis.SSLConnection: _SSLConnection}


async def walk(client: Client, match: str, count: int) -> AsyncIterator[list[bytes]]:
    """Yield the names of all keys that match, in pages, a key perhaps twice; in a Cluster from all masters.

    Raises
    ------
    ClusterError
        At the end, if slots have changed hands meanwhile: keys may then have been passed over.
    """
    redis: Any = client
    if not isinstance(client, Cluster):
        cursor = 0
        while True:
            cursor, page = await redis.scan(cursor, match=match, count=count)
            yield page
            if cursor == 0:
                return
    before = await _holdings(client)
    for node in client.get_primaries():
        cursor = 0
        while True:
            cursors, page = await redis.scan(cursor, match=match, count=count, target_nodes=node)
            yield page
            cursor = cursors[node.name]
            if cursor == 0:
                break
    if await _holdings(client) != before:
        raise ClusterError("slots have changed hands while all keys were looked at")


async def from_every_master(client: Client, *command: str | int) -> list[Any]:
    """Ask the server, or each master of a Cluster, the same; return their replies."""
    if not isinstance(client, Cluster):
        return [await client.execute_command(*command)]  # type: ignore[no-untyped-call]
    await client.initialize()
    return [await client.execute_command(*command, target_nodes=node) for node in client.get_primaries()]


async def info_of_nodes(client: Client) -> dict[str, dict[str, Any]]:
    """Return what INFO says of the server (named ""), or of each node of a Cluster that answers.

    Raises
    ------
    RedisError
        From a server or a master; a replica that does not answer is left out.
    """
    redis: Any = client
    if not isinstance(client, Cluster):
        return {"": await redis.info("everything")}
    await client.initialize()
    found = {}
    masters = client.get_primaries()
    for node in client.get_nodes():
        try:
            found[node.name] = await redis.info("everything", target_nodes=node)
        except RedisConnectionError:
            if node in masters:
                raise
    return found


async def _holdings(client: Cluster) -> dict[str, tuple[str, Any]]:
    """Return which slots each master holds by its own word, and since when.

    Raises
    ------
    ClusterError
        If a slot is on its way from one to another: its keys are in neither or both.
    """
    await client.initialize()
    found: dict[str, tuple[str, Any]] = {}
    for node in client.get_primaries():
        nodes = await client.execute_command("CLUSTER NODES", target_nodes=node)
        (own,) = [one for one in nodes.values() if "myself" in one["flags"]]
        if own["migrations"]:
            raise ClusterError("a slot is on its way to another master")
        found[node.name] = (own["epoch"], own["slots"])
    return found


def _as_of_one_server(exc: RedisClusterException) -> Exception:
    """Return what a client of one server would have raised, as new: no chain of causes may be a ring."""
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, AuthenticationError | NoPermissionError):
            return type(cause)(str(cause))
        cause = cause.__cause__ or cause.__context__
    return ClusterError(str(exc))
