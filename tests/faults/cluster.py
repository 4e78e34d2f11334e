"""A Redis Cluster of this machine: masters that share the slots, and replicas of them if wanted."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from redis.crc import key_slot

from stream_app.embedded import Server
from stream_app.embedded.servers import HOST, free_port
from tests.backends import Kind, local_redis, redis_url_of

SLOTS = 16_384
MASTERS = 3
#: How long a node may be silent before the others give it up.
NODE_TIMEOUT_MS = 1_000
START_DEADLINE_S = 30.0
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class RedisCluster:
    """The nodes as they were started: no `replicas`, or one for each of `masters` in the same order."""

    masters: tuple[Server, ...]
    replicas: tuple[Server, ...]
    _start: Callable[[int, int], Server]

    @property
    def url(self) -> str:
        """Where a client begins."""
        return redis_url_of(self.masters[0])

    def master_of(self, partition: int) -> int:
        """Index of the master that a partition's keys were given to at the start."""
        slot = key_slot(str(partition).encode())
        return next(index for index in range(MASTERS) if slot <= _range(index)[1])

    def start_again(self, index: int) -> Server:
        """Start a master that has ended: with nothing in it, but as the node that it was."""
        return self._start(index, self.masters[index].port)


def ask(server: Server, command: str, *arguments: str | int) -> Any:
    """Send one node a command of its own, whatever its part in the Cluster; returns the reply as it is."""
    with redis.Redis.from_url(redis_url_of(server), socket_timeout=5.0) as client:
        return client.execute_command(*command.split(), *arguments)


def is_master(server: Server) -> bool:
    """Whether a node that is up takes itself for a master."""
    try:
        return bool(ask(server, "ROLE")[0] == b"master")
    except (redis.RedisError, OSError):
        return False


def follows(server: Server) -> bool:
    """Whether a node is a replica that has its master's state and hears of every change."""
    role = ask(server, "ROLE")
    return bool(role[0] == b"slave" and role[3] == b"connected")


@contextmanager
def redis_cluster(
    kind: Kind, *, replicas: bool = False, arguments: tuple[str, ...] = ()
) -> Iterator[RedisCluster]:
    """Run a Cluster whose nodes all agree on who holds what before the body starts.

    Parameters
    ----------
    kind
        Which Redis, as `tests.backends.local_redis` takes it.
    replicas
        Whether each master has a replica.
    arguments
        More of each server's command line.
    """
    with ExitStack() as stack:
        count = MASTERS * (2 if replicas else 1)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stream-app-cluster-")))
        bus_ports = [free_port() for _ in range(count)]

        def start(index: int, port: int = 0) -> Server:
            settings = {
                "cluster-enabled": "yes",
                "cluster-port": str(bus_ports[index]),
                "cluster-config-file": str(directory / f"node-{index}.conf"),
                "cluster-node-timeout": str(NODE_TIMEOUT_MS),
                # A replica may be promoted however long it has not heard of its master.
                "cluster-replica-validity-factor": "0",
                "repl-diskless-sync-delay": "0",
            }
            own = [part for key, value in settings.items() for part in (f"--{key}", value)]
            return stack.enter_context(local_redis(kind, port, (*own, *arguments)))

        servers = [start(index) for index in range(count)]
        masters, others = servers[:MASTERS], servers[MASTERS:]
        for index, master in enumerate(masters):
            ask(master, "CLUSTER SET-CONFIG-EPOCH", index + 1)
            ask(master, "CLUSTER ADDSLOTSRANGE", *_range(index))
        for server, bus_port in zip(servers[1:], bus_ports[1:], strict=True):
            ask(servers[0], "CLUSTER MEET", HOST, server.port, bus_port)
        _wait(lambda: all(_known(server) == count for server in servers), "all nodes know each other")
        for master, replica in zip(masters, others, strict=False):
            ask(replica, "CLUSTER REPLICATE", ask(master, "CLUSTER MYID"))
        _wait(lambda: all(_is_ready(server) for server in masters), "all slots are served")
        if replicas:
            _wait(lambda: all(follows(replica) for replica in others), "all replicas follow")
            _wait(
                lambda: all(_replicas_seen(server) == len(others) for server in servers),
                "all nodes tell who is whose replica",
            )
        yield RedisCluster(tuple(masters), tuple(others), start)


def _range(index: int) -> tuple[int, int]:
    return SLOTS * index // MASTERS, SLOTS * (index + 1) // MASTERS - 1


def _known(server: Server) -> int:
    nodes: str = ask(server, "CLUSTER NODES").decode()
    return sum("handshake" not in line for line in nodes.splitlines())


def _replicas_seen(server: Server) -> int:
    """Count the replicas that a node tells clients of: those whose progress it has heard of."""
    return sum(len(nodes) - 1 for _first, _last, *nodes in ask(server, "CLUSTER SLOTS"))


def _is_ready(server: Server) -> bool:
    return b"cluster_state:ok" in ask(server, "CLUSTER INFO")


def _wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"a Redis Cluster: not within {START_DEADLINE_S} s: {what}"
        time.sleep(0.02)
