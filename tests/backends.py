"""Which Kafka and which Redis the tests run on, how those are started, and what tests ask of them.

In this order: what ``TEST_BACKEND`` names (``embedded``, ``apache``, ``docker``); else the servers that
``TEST_KAFKA_BOOTSTRAP`` and ``TEST_REDIS_URL`` (or the service's own variables) name; else Docker, if it
answers; else the embedded ones. ``apache`` is Apache Kafka on the machine's Java, its jars fetched by Maven,
with the redis-server of the PATH.

A server that this machine cannot have is a `ServiceMissing`; `tests/conftest.py` decides what that means.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import docker
import redis
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from docker.errors import DockerException
from testcontainers.community.redis import RedisContainer
from testcontainers.core.container import DockerContainer

from stream_app.embedded import Server, ServerProgram, embedded_kafka, embedded_redis, run_server
from stream_app.embedded.servers import free_port, kafka_cluster_id, redis_program

ROOT = Path(__file__).parents[1]
POM = ROOT / "tests" / "kafka" / "pom.xml"
KAFKA_IMAGE = "apache/kafka:4.1.1"
REDIS_IMAGE = "redis:7"
JVM = ("-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")

Kind = Literal["embedded", "apache", "docker", "environment"]
KINDS: Mapping[str, Kind] = {"embedded": "embedded", "apache": "apache", "docker": "docker"}


class ServiceMissing(Exception):  # noqa: N818 - read in a sentence
    """This machine cannot have a server that the tests want; the message says why."""


# --- which -------------------------------------------------------------------------------------------------


def kafka_from_environment(environment: Mapping[str, str]) -> str | None:
    """Bootstrap servers that the environment names for the tests, if any."""
    return environment.get("TEST_KAFKA_BOOTSTRAP") or environment.get("STREAM_APP__KAFKA__BOOTSTRAP_SERVERS")


def redis_from_environment(environment: Mapping[str, str]) -> str | None:
    """Redis URL that the environment names for the tests, if any."""
    return environment.get("TEST_REDIS_URL") or environment.get("STREAM_APP__REDIS__URL")


def kind_of(named: str | None, environment: Mapping[str, str]) -> Kind:
    """Decide where one server comes from; `named` is what the environment says about it."""
    if wanted := environment.get("TEST_BACKEND"):
        if wanted not in KINDS:
            raise ValueError(f"TEST_BACKEND: expected one of {', '.join(KINDS)}, got {wanted!r}")
        return KINDS[wanted]
    if named:
        return "environment"
    return "docker" if docker_answers() else "embedded"


@functools.cache
def docker_answers() -> bool:
    """Whether a Docker engine answers here; the client alone does not count."""
    try:
        client = docker.from_env(timeout=2)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except DockerException:
        return False


# --- starting ----------------------------------------------------------------------------------------------


@contextmanager
def open_kafka(kind: Kind, named: str | None) -> Iterator[str]:
    """Run, or find, a broker of this kind; yields its bootstrap servers."""
    if kind == "environment":
        assert named is not None
        yield named
    elif kind == "docker":
        with docker_kafka() as bootstrap:
            yield bootstrap
    else:
        with local_kafka(kind) as server:
            yield server.address


@contextmanager
def open_redis(kind: Kind, named: str | None) -> Iterator[str]:
    """Run, or find, a store of this kind; yields its URL."""
    if kind == "environment":
        assert named is not None
        yield named
    elif kind == "docker":
        with docker_redis() as url:
            yield url
    else:
        with local_redis(kind) as server:
            yield redis_url_of(server)


def local_kafka(kind: Kind, port: int = 0, advertised_port: int = 0) -> AbstractContextManager[Server]:
    """Run a broker as a process of this machine, the nearest there is to `kind`.

    With `advertised_port` it tells its clients to come there: where a proxy listens.
    """
    if kind == "apache":
        return run_server(apache_kafka(advertised_port=advertised_port), port)
    return embedded_kafka(port, advertised_port)


def local_redis(kind: Kind, port: int = 0, arguments: Sequence[str] = ()) -> AbstractContextManager[Server]:
    """Run a store as a process of this machine, the nearest there is to `kind`."""
    if kind != "apache":
        return embedded_redis(port, arguments)
    executable = shutil.which("redis-server")
    if executable is None:
        raise ServiceMissing("no redis-server on the PATH; Debian: `apt-get install redis-server`")
    return run_server(redis_program("Redis", executable, arguments), port)


def redis_url_of(server: Server, database: int = 0) -> str:
    """URL of a database of a local store."""
    return f"redis://{server.address}/{database}"


def apache_kafka(
    settings: Mapping[str, str] | None = None,
    *,
    data: Path | None = None,
    advertised_port: int = 0,
    formatting: Sequence[str] = (),
    cluster_id: str = "",
    controller_port: int = 0,
) -> ServerProgram:
    """How to start Apache Kafka in KRaft mode, one node, on this machine's Java.

    Two JVMs, one after the other: one formats the storage, one serves. Takes 3 to 4 seconds.

    Parameters
    ----------
    settings
        More of `server.properties`; wins over `broker_settings`.
    data
        Where the log is kept, to be found again by the same program's next start; default: nowhere.
    advertised_port
        Where clients are told to come, if not to the port itself.
    formatting
        More arguments of the command that formats the storage: users with SCRAM passwords are written there.
    cluster_id
        Which cluster the node belongs to; default: one of its own.
    controller_port
        Where the controllers talk to each other; default: any free port.
    """
    java = shutil.which("java")
    if java is None:
        raise ServiceMissing("no Java on the PATH: Apache Kafka 4 needs Java 17 or later")
    java_command = [java, *JVM, "-cp", f"{kafka_jars()}/*"]
    cluster_id = cluster_id or random_cluster_id()

    def command(port: int, directory: Path) -> Sequence[str]:
        log_directory = data or directory / "data"
        chosen = broker_settings(
            listen="127.0.0.1",
            port=port,
            controller_port=controller_port or free_port(),
            data=str(log_directory),
        )
        if advertised_port:
            chosen["advertised.listeners"] = f"PLAINTEXT://127.0.0.1:{advertised_port}"
        chosen |= settings or {}
        properties = directory / "server.properties"
        properties.write_text("".join(f"{key}={value}\n" for key, value in chosen.items()))
        if not (log_directory / "meta.properties").is_file():
            tool = [*java_command, "kafka.tools.StorageTool", "format", "-t", cluster_id]
            _run([*tool, "-c", str(properties), *formatting], timeout_s=60)
        return [*java_command, "kafka.Kafka", str(properties)]

    return ServerProgram(
        "Apache Kafka", command, lambda port, pid: kafka_cluster_id(port) == cluster_id, start_deadline_s=60.0
    )


def broker_settings(*, listen: str, port: int, controller_port: int, data: str) -> dict[str, str]:
    """Settings of a single Apache Kafka node for tests: quick groups, no topics by accident."""
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "listeners": f"PLAINTEXT://{listen}:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": data,
        "auto.create.topics.enable": "false",
        "group.initial.rebalance.delay.ms": "0",
        "group.min.session.timeout.ms": "1000",
        "message.max.bytes": str(
            16 * 1024 * 1024
        ),  # as Tansu, whose limit is higher: 10 MB records are tested
        "offsets.topic.num.partitions": "1",
        "offsets.topic.replication.factor": "1",
        "transaction.state.log.num.partitions": "1",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
    }


def kafka_jars() -> Path:
    """Folder with the jars that `tests/kafka/pom.xml` names, fetched by Maven when they are not there yet."""
    jars = ROOT / ".cache" / "kafka" / hashlib.sha256(POM.read_bytes()).hexdigest()[:16]
    if jars.is_dir():
        return jars
    maven = shutil.which("mvn")
    if maven is None:
        raise ServiceMissing("no mvn on the PATH to fetch the jars of Apache Kafka with")
    unfinished = jars.with_name(f"{jars.name}.{os.getpid()}")
    fetching = [
        maven,
        "-q",
        "-B",
        "-f",
        str(POM),
        "dependency:copy-dependencies",
        f"-DoutputDirectory={unfinished}",
    ]
    try:
        _run(fetching, timeout_s=540)
        unfinished.rename(jars)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return jars


def _run(command: Sequence[str], *, timeout_s: float) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode:
        said = (done.stdout + done.stderr)[-2000:]
        raise ServiceMissing(f"{' '.join(command[:4])} ... ended with {done.returncode}: {said}")


@contextmanager
def docker_kafka() -> Iterator[str]:
    """Run Apache Kafka in a container; clients must reach it by the name that it gives itself."""
    port = free_port()
    settings = broker_settings(listen="", port=port, controller_port=29093, data="/tmp/kraft-combined-logs")
    container = (
        DockerContainer(KAFKA_IMAGE).with_bind_ports(port, port).with_env("CLUSTER_ID", random_cluster_id())
    )
    for key, value in settings.items():
        container.with_env(f"KAFKA_{key.upper().replace('.', '_')}", value)
    with _running(container):
        deadline = time.monotonic() + 60
        while kafka_cluster_id(port) is None:
            if time.monotonic() > deadline:
                raise ServiceMissing(f"{KAFKA_IMAGE} did not answer within 60 s")
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"


@contextmanager
def docker_redis() -> Iterator[str]:
    """Run Redis in a container."""
    container = RedisContainer(REDIS_IMAGE)
    with _running(container):
        yield f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}/0"


@contextmanager
def _running(container: DockerContainer) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(container)
        except DockerException as exc:  # the engine answers, and yet has no such image or no room
            raise ServiceMissing(f"Docker could not run {container.image}: {exc}") from exc
        yield


def random_cluster_id() -> str:
    """Make up a name for a cluster, as Apache Kafka wants it."""
    while True:  # Kafka refuses an id that looks like an option
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not cluster_id.startswith("-"):
            return cluster_id


# --- what one test owns ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Names:
    """Topics and consumer group of one test; no two tests share any."""

    events: str
    entered: str
    exited: str
    dead_letter: str
    group: str

    @classmethod
    def unique(cls) -> Names:
        """Names that nobody has used before."""
        prefix = f"t{uuid.uuid4().hex[:10]}"
        return cls(
            f"{prefix}-events",
            f"{prefix}-entered",
            f"{prefix}-exited",
            f"{prefix}-dead-letter",
            f"{prefix}-group",
        )

    def environment(self) -> dict[str, str]:
        """The same, as the service's configuration."""
        return {
            "STREAM_APP__KAFKA__EVENTS_TOPIC": self.events,
            "STREAM_APP__KAFKA__ENTERED_TOPIC": self.entered,
            "STREAM_APP__KAFKA__EXITED_TOPIC": self.exited,
            "STREAM_APP__KAFKA__DEAD_LETTER_TOPIC": self.dead_letter,
            "STREAM_APP__KAFKA__GROUP_ID": self.group,
        }


@contextmanager
def empty_redis(url: str, *, ours: bool) -> Iterator[str]:
    """Yield the URL of an empty database; nothing that somebody else wrote is ever touched.

    A server of ours is emptied first. On any other the first empty database is used, never number 0, and what
    the test wrote is deleted key by key.
    """
    if ours:
        with redis.Redis.from_url(url) as client:
            client.flushall()
        yield url
        return
    for database in range(1, 16):
        own = urlsplit(url)._replace(path=f"/{database}").geturl()
        with redis.Redis.from_url(own) as client:
            if client.dbsize():
                continue
            try:
                yield own
            finally:
                for key in client.scan_iter(count=1000):
                    client.delete(key)
            return
    raise ServiceMissing("no empty database (1 to 15) on the Redis that the environment names")


# --- what tests ask of Kafka -------------------------------------------------------------------------------


async def create_topic(
    bootstrap: str,
    name: str,
    partitions: int = 1,
    config: Mapping[str, str] | None = None,
    *,
    deadline_s: float = 20,
) -> None:
    """Create a topic and wait until every partition has a leader."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        answer = await admin.create_topics([NewTopic(name, partitions, 1, topic_configs=dict(config or {}))])
        for topic, code, message in answer.topic_errors:
            assert code == 0, f"create {topic}: {code} {message}"
        deadline = time.monotonic() + deadline_s
        while True:
            (described,) = await admin.describe_topics([name])
            leaders = [partition["leader"] for partition in described["partitions"]]
            if len(leaders) == partitions and min(leaders) >= 0:
                return
            assert time.monotonic() < deadline, f"{name}: expected {partitions} leaders, got {leaders}"
            await asyncio.sleep(0.05)
    finally:
        await admin.close()


async def alter_topic(bootstrap: str, topic: str, settings: Mapping[str, str]) -> None:
    """Set a topic's settings to these, and all others to their defaults."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        resource = ConfigResource(ConfigResourceType.TOPIC, topic, configs=dict(settings))
        for answer in await admin.alter_configs([resource]):
            assert [code for code, *_ in answer.resources] == [0]
    finally:
        await admin.close()


async def log_ends(bootstrap: str, topic: str, *, deadline_s: float = 20) -> dict[int, int]:
    """Map each partition to the offset after its last readable record.

    Taken from the answer to a fetch: Tansu's answer to ListOffsets is the *first* offset of the last batch,
    plus one.
    """
    async with _reader(bootstrap, [topic]) as (consumer, partitions):
        ends = await _ends(consumer, partitions, deadline_s)
    return {tp.partition: end for tp, end in ends.items()}


async def read_to_end(bootstrap: str, *topics: str, deadline_s: float = 60) -> list[ConsumerRecord]:
    """Read all committed records that the topics hold now, by topic, partition and offset."""
    records: list[ConsumerRecord] = []
    async with _reader(bootstrap, topics) as (consumer, partitions):
        ends = await _ends(consumer, partitions, deadline_s)
        await consumer.seek_to_beginning(*partitions)
        deadline = time.monotonic() + deadline_s
        while behind := [tp for tp in partitions if await consumer.position(tp) < ends[tp]]:
            assert time.monotonic() < deadline, f"not read within {deadline_s} s: {behind}"
            for batch in (await consumer.getmany(*behind, timeout_ms=200)).values():
                records.extend(batch)
    wanted = [
        record for record in records if record.offset < ends[TopicPartition(record.topic, record.partition)]
    ]
    return sorted(wanted, key=lambda record: (record.topic, record.partition, record.offset))


@asynccontextmanager
async def _reader(
    bootstrap: str, topics: Sequence[str]
) -> AsyncIterator[tuple[AIOKafkaConsumer, list[TopicPartition]]]:
    """Yield a consumer of no group that has all partitions of the topics, and these."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        absent = set(topics) - set(await admin.list_topics())
        assert not absent, (
            f"no such topic: {', '.join(sorted(absent))}"
        )  # Tansu would create it when described
        described = await admin.describe_topics(list(topics))
    finally:
        await admin.close()
    partitions = [
        TopicPartition(topic["topic"], partition["partition"])
        for topic in described
        for partition in topic["partitions"]
    ]
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        fetch_max_wait_ms=50,
    )
    await consumer.start()
    try:
        consumer.assign(partitions)
        yield consumer, partitions
    finally:
        await consumer.stop()


async def _ends(
    consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition], deadline_s: float
) -> dict[TopicPartition, int]:
    deadline = time.monotonic() + deadline_s
    for tp, offset in (await consumer.end_offsets(partitions)).items():
        consumer.seek(tp, offset)
    while unknown := [tp for tp in partitions if consumer.last_stable_offset(tp) is None]:
        assert time.monotonic() < deadline, f"no answer to a fetch within {deadline_s} s: {unknown}"
        await consumer.getmany(timeout_ms=20)
    return {tp: consumer.last_stable_offset(tp) for tp in partitions}
