"""A cluster of Apache Kafka nodes on this machine, whose nodes may be killed and started again.

Every node is broker and controller, and has all there is: topics (the service creates its own with three
replicas where there are three brokers), the groups' offsets, the cluster's metadata. A write is acknowledged
when two nodes have it, so that one may be killed without anything being lost or refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from stream_app.embedded import Server, ServerProgram, run_server
from stream_app.embedded.servers import free_port
from tests.backends import apache_kafka, random_cluster_id
from tests.integration.stage import kill_server

NODES: Final = 3
#: A node that says nothing for so long is taken for dead, and its leaders move.
NODE_TIMEOUT_MS: Final = 3_000
ANSWER_DEADLINE_S: Final = 30.0
ASK_AGAIN_S: Final = 0.1
SETTINGS: Final[Mapping[str, str]] = {
    "default.replication.factor": str(NODES),
    "offsets.topic.replication.factor": str(NODES),
    "min.insync.replicas": "2",
    "broker.session.timeout.ms": str(NODE_TIMEOUT_MS),
    "broker.heartbeat.interval.ms": "500",
}


class KafkaCluster:
    """The nodes of a cluster by their ids; made by `kafka_cluster`."""

    def __init__(self, programs: Mapping[int, ServerProgram], stack: ExitStack) -> None:
        self._programs, self._stack = programs, stack
        self._ports = {node: free_port() for node in programs}
        self._running: dict[int, Server] = {}

    @property
    def bootstrap(self) -> str:
        """All nodes, as clients want them."""
        return ",".join(f"127.0.0.1:{port}" for port in self._ports.values())

    def start(self, *nodes: int) -> None:
        """Start nodes, all at once: at first none answers before most of them are there."""
        with ThreadPoolExecutor(len(nodes)) as pool:
            starting = {
                node: pool.submit(
                    self._stack.enter_context, run_server(self._programs[node], self._ports[node])
                )
                for node in nodes
            }
        self._running |= {node: server.result() for node, server in starting.items()}

    @property
    def running(self) -> frozenset[int]:
        """Nodes that were started and not killed."""
        return frozenset(self._running)

    def pid(self, node: int) -> int:
        """Process id of a running node."""
        return self._running[node].pid

    def kill(self, node: int) -> None:
        """SIGKILL; returns when it is gone. The others find out by themselves."""
        kill_server(self._running.pop(node))

    def coordinator(self, group: str) -> int:
        """Node that coordinates a group now."""
        return int(asyncio.run(self._ask(lambda admin: admin.find_coordinator(group))))

    def leaders(self, topic: str) -> dict[int, int]:
        """Node that leads each partition of a topic now, -1 for none."""
        (described,) = asyncio.run(self._ask(lambda admin: admin.describe_topics([topic])))
        return {each["partition"]: each["leader"] for each in described["partitions"]}

    async def _ask(self, question: Callable[[AIOKafkaAdminClient], Awaitable[Any]]) -> Any:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                while True:
                    try:
                        return await question(admin)
                    except KafkaError as exc:  # asked of a node that is gone, or too early
                        if not exc.retriable:
                            raise
                    await asyncio.sleep(ASK_AGAIN_S)
        finally:
            await admin.close()


@contextmanager
def kafka_cluster(directory: Path, nodes: int = NODES) -> Iterator[KafkaCluster]:
    """Run a cluster, in about 10 seconds; `directory` keeps what its nodes write."""
    cluster_id = random_cluster_id()
    controllers = {node: free_port() for node in range(1, nodes + 1)}
    voters = ",".join(f"{node}@127.0.0.1:{port}" for node, port in controllers.items())
    programs = {
        node: apache_kafka(
            {**SETTINGS, "node.id": str(node), "controller.quorum.voters": voters},
            data=directory / f"node-{node}",
            cluster_id=cluster_id,
            controller_port=port,
        )
        for node, port in controllers.items()
    }
    with ExitStack() as stack:
        cluster = KafkaCluster(programs, stack)
        cluster.start(*programs)
        yield cluster
