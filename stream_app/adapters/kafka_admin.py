"""Questions to Kafka about itself, and the one order that the service gives it: to create topics.

One object, `KafkaAdmin`, bounded in time, whose failures are sentences: which topics exist and how they
are configured, where the log of a partition ends, whether a group has members. It must not know settings,
segments or Redis; what a topic of this service has to look like is decided in `stream_app.adapters.topics`.

It stays with what both Apache Kafka and the embedded broker answer. Habits of the embedded broker shape it: a
metadata request that names a topic creates the topic, so topics are always listed as a whole; for the end of
a log see `KafkaAdmin.end_offsets`, for the members of a group `KafkaAdmin.group_member_count`.

Source: the calls of `aiokafka.admin.AIOKafkaAdminClient` and `aiokafka.AIOKafkaConsumer`, aiokafka 0.14.
"""

# Errors are named as in stream_app.errors, to be read in sentences.
# ruff: noqa: N818

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeVar

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import (
    GroupIdNotFound,
    KafkaConnectionError,
    KafkaError,
    LeaderNotAvailableError,
    NodeNotReadyError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.group import HeartbeatRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.structs import TopicPartition

from stream_app.adapters.kafka_security import NOT_ALLOWED, PLAINTEXT, Security, not_allowed, refusal
from stream_app.errors import StartRefused, StreamAppError

DEFAULT_TIMEOUT_S = 10.0

#: What aiokafka says of a broker to which it has no connection, for whatever reason.
NO_CONNECTION = (KafkaConnectionError, NodeNotReadyError)

_RETRY_PAUSE_S = 0.1
_FETCH_WAIT_MS = 20
_T = TypeVar("_T")


class KafkaUnavailable(StreamAppError):
    """Kafka did not answer within the deadline.

    Parameters
    ----------
    bootstrap_servers
        The addresses that were tried.
    timeout_s
        How long, seconds.
    got
        The last failure, in one line.
    """

    def __init__(self, bootstrap_servers: str, timeout_s: float, got: str) -> None:
        super().__init__(
            f"an answer within {timeout_s:g} s",
            got,
            f"Kafka at {bootstrap_servers}",
            "Check kafka.bootstrap_servers, that the broker is up, and kafka.security_protocol; `stream-app "
            "services` starts one for trying things out.",
        )


class KafkaRefused(StreamAppError):
    """Kafka answered, and the answer is an error that waiting does not cure."""

    def __init__(self, bootstrap_servers: str, doing: str, got: str) -> None:
        super().__init__(
            f"to {doing}",
            got,
            f"Kafka at {bootstrap_servers}",
            "Look the error up in Kafka's protocol errors; often it is a missing permission.",
        )


class TopicMissing(StreamAppError):
    """A topic that the configuration names does not exist."""

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        super().__init__(
            f"topic {topic!r} to exist",
            "no such topic, or not for this user",
            f"Kafka at {bootstrap_servers}",
            "Run `stream-app topics`, which creates what is missing.",
        )


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic to create.

    Parameters
    ----------
    name
        Its name.
    partitions
        How many, at least 1.
    config
        Topic settings by Kafka's own names and spellings; may be empty.
    """

    name: str
    partitions: int
    config: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Who answered: the cluster's id (None if it tells none) and its number of brokers."""

    cluster_id: str | None
    brokers: int


class KafkaAdmin:
    """A connection to Kafka for questions about topics, logs and groups.

    Use it with `async with`; every call, connecting included, answers or raises within `timeout_s`.

    Parameters
    ----------
    bootstrap_servers
        "host:port", several separated by commas.
    timeout_s
        Deadline of each call, seconds. Passing failures (no leader yet, coordinator moving) are tried again
        until then.
    security
        As made by `stream_app.adapters.kafka_security.security_of`.

    Raises
    ------
    StartRefused
        From any call: the broker does not let this user in or do this, or cannot be trusted.
    KafkaUnavailable
        From any call: no answer within the deadline.
    KafkaRefused
        From any call: an answer that is a permanent error.
    TopicMissing
        From the calls about one topic.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        security: Security = PLAINTEXT,
    ) -> None:
        self._bootstrap_servers = bootstrap_servers
        self._security = security
        self._timeout_s = timeout_s
        self._admin: AIOKafkaAdminClient | None = None

    async def __aenter__(self) -> Self:
        admin = AIOKafkaAdminClient(
            bootstrap_servers=self._bootstrap_servers,
            request_timeout_ms=round(self._timeout_s * 1000),
            **self._security,
        )
        try:
            self._admin = admin
            await self._call("connect", admin.start)
        except BaseException:
            self._admin = None
            await admin.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._admin is not None:
            await self._admin.close()
            self._admin = None

    async def cluster(self) -> Cluster:
        """Say which cluster this is.

        Returns
        -------
        Cluster
            Its id and its number of brokers.
        """
        described = await self._call("describe the cluster", self._client.describe_cluster)
        return Cluster(described.get("cluster_id"), len(described["brokers"]))

    async def partition_counts(self) -> dict[str, int]:
        """Count the partitions of every topic.

        Returns
        -------
        dict of str to int
            All topics that exist; one that does not is absent (and is not created by asking).
        """

        async def describe() -> dict[str, int]:
            counts = {}
            for topic in await self._client.describe_topics():
                kind = for_code(topic["error_code"])
                if kind is UnknownTopicOrPartitionError:
                    continue
                if topic["error_code"]:
                    raise kind(f"topic {topic['topic']!r}")
                counts[topic["topic"]] = len(topic["partitions"])
            return counts

        return await self._call("list the topics", describe)

    async def partition_count(self, topic: str) -> int:
        """Count the partitions of one topic that has to exist.

        Raises
        ------
        TopicMissing
            If it does not.
        """
        counts = await self.partition_counts()
        if topic not in counts:
            raise TopicMissing(self._bootstrap_servers, topic)
        return counts[topic]

    async def create_topics(self, specs: Sequence[TopicSpec]) -> list[str]:
        """Create topics and wait until every broker lists them.

        One that another creates meanwhile is no error. Each gets three replicas, or as many as there are
        brokers where there are fewer.

        Returns
        -------
        list of str
            The names that this call created.
        """
        if not specs:
            return []
        replicas = min(3, (await self.cluster()).brokers)
        topics = [NewTopic(s.name, s.partitions, replicas, topic_configs=dict(s.config)) for s in specs]

        async def create() -> list[str]:
            response = await self._client.create_topics(topics, timeout_ms=round(self._timeout_s * 1000))
            created = []
            for name, code, *message in response.topic_errors:
                kind = for_code(code)
                if code and kind is not TopicAlreadyExistsError:
                    raise kind(f"topic {name!r}: {message[0] if message else ''}")
                if not code:
                    created.append(name)
            return created

        names = [spec.name for spec in specs]
        created = await self._call(f"create the topics {', '.join(names)}", create)

        async def listed() -> None:
            # By every broker: each learns of a topic by itself, and the next question may go to any.
            brokers = (await self._client.describe_cluster())["brokers"]
            for broker in brokers:
                answer = await self._client._send_request(MetadataRequest(None), broker["node_id"])
                known = {topic["topic"] for topic in answer.to_object()["topics"] if not topic["error_code"]}
                if missing := set(names) - known:
                    raise LeaderNotAvailableError(f"not listed yet: {', '.join(sorted(missing))}")

        await self._call("see the new topics", listed)
        return created

    async def topic_configs(self, topics: Collection[str]) -> dict[str, dict[str, str]]:
        """Read the settings of topics.

        Returns
        -------
        dict of str to dict of str to str
            By topic, then by Kafka's name of the setting. Apache Kafka tells all, defaults included; the
            embedded broker only those that were given when the topic was created.
        """
        resources = [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in topics]
        if not resources:
            return {}
        responses = await self._call("describe the topics", lambda: self._client.describe_configs(resources))
        configs: dict[str, dict[str, str]] = {}
        for response in responses:
            for code, message, _kind, name, entries in response.resources:
                kind = for_code(code)
                if kind in NOT_ALLOWED:
                    raise not_allowed(kind(message), f"Kafka at {self._bootstrap_servers}, topic {name}")
                if code:
                    raise KafkaRefused(
                        self._bootstrap_servers, f"describe topic {name}", f"{kind.__name__}: {message}"
                    )
                configs[name] = {entry[0]: entry[1] for entry in entries if entry[1] is not None}
        return configs

    async def end_offsets(self, topic: str) -> dict[int, int]:
        """Tell where the log of each partition ends, for a consumer that reads only what is committed.

        Parameters
        ----------
        topic
            An existing topic.

        Returns
        -------
        dict of int to int
            Partition to the offset that its next record gets or, if a transaction is open, to the offset of
            its first record.

        Notes
        -----
        Asked for the end, the embedded broker answers with the offset after the *first* record of the last
        batch. The high watermark of a fetch is right everywhere, so one fetch at that offset corrects it.
        """
        partitions = [TopicPartition(topic, number) for number in range(await self.partition_count(topic))]

        async def ask() -> dict[int, int]:
            async with self._consumer() as consumer:
                offsets = await consumer.end_offsets(partitions)
                consumer.assign(partitions)
                for partition, offset in offsets.items():
                    consumer.seek(partition, offset)
                while any(consumer.highwater(partition) is None for partition in partitions):
                    await consumer.getmany(timeout_ms=_FETCH_WAIT_MS, max_records=1)
                return {
                    p.partition: max(offset, consumer.last_stable_offset(p)) for p, offset in offsets.items()
                }

        return await self._call(f"ask where {topic} ends", ask)

    async def group_member_count(self, group: str) -> int:
        """Count the members of a group; 0 for one that does not exist.

        A worker that was killed counts until its session times out.

        Notes
        -----
        The embedded broker looks for members that have timed out only when one of the group speaks, and
        aiokafka says no goodbye in generation 0, which is the embedded broker's first. So a heartbeat of
        nobody comes first; on every broker it is answered with an error and changes nothing else.
        """

        async def describe() -> int:
            coordinator = await self._client.find_coordinator(group)
            await self._client._send_request(HeartbeatRequest(group, 0, "nobody"), coordinator)
            members = 0
            for response in await self._client.describe_consumer_groups([group]):
                for code, _name, _state, _kind, _protocol, found, *_ in response.groups:
                    if code and for_code(code) is not GroupIdNotFound:
                        raise for_code(code)(f"group {group}")
                    members += len(found)
            return members

        return await self._call(f"describe group {group}", describe)

    @property
    def _client(self) -> AIOKafkaAdminClient:
        if self._admin is None:
            raise RuntimeError("KafkaAdmin is used outside of `async with`")
        return self._admin

    @asynccontextmanager
    async def _consumer(self) -> AsyncIterator[AIOKafkaConsumer]:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap_servers,
            group_id=None,
            isolation_level="read_committed",
            fetch_max_wait_ms=_FETCH_WAIT_MS,
            request_timeout_ms=round(self._timeout_s * 1000),
            **self._security,
        )
        try:
            await consumer.start()
            yield consumer
        finally:
            await consumer.stop()

    async def _call(self, doing: str, operation: Callable[[], Awaitable[_T]]) -> _T:
        """Run one request until it succeeds, fails for good, or the deadline passes."""
        last = "no answer"
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    try:
                        return await operation()
                    except NOT_ALLOWED as error:
                        raise not_allowed(error, f"Kafka at {self._bootstrap_servers}, {doing}") from error
                    except KafkaError as error:
                        if not error.retriable:
                            raise KafkaRefused(self._bootstrap_servers, doing, _one_line(error)) from error
                        if isinstance(error, NO_CONNECTION) and (locked := await self._refusal()):
                            raise locked from error
                        last = _one_line(error)
                    await asyncio.sleep(_RETRY_PAUSE_S)
        except TimeoutError as error:
            raise KafkaUnavailable(self._bootstrap_servers, self._timeout_s, last) from error

    async def _refusal(self) -> StartRefused | None:
        known = [] if self._admin is None else self._admin._client.cluster.brokers()
        advertised = [f"{_bracketed(broker.host)}:{broker.port}" for broker in known]
        return await refusal(self._bootstrap_servers, self._security, advertised)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _one_line(error: KafkaError) -> str:
    if isinstance(error, KafkaConnectionError) and "bootstrap" in str(error):
        return "no connection to any of the addresses"
    text = " ".join(str(error).split())
    name = type(error).__name__
    return text if name in text else f"{name}: {text}"
