"""What the live measurements share: servers of their own, workers as real processes, events on a schedule.

Two kinds of servers: `apache` is Apache Kafka, with Java's full compiler and 1 GiB of heap, beside the
redis-server of the PATH; `embedded` is what `stream-app services` runs. All are this program's own and end
with it. The output topics are created so that the broker stamps them where it can (Apache Kafka): then a
message's timestamp is the instant at which it was in the log; the embedded broker keeps the producer's.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import redis
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from stream_app.adapters.event_sender import EventSender
from stream_app.adapters.profile_store import keys
from stream_app.commands.progress import bar, lines
from stream_app.commands.topics import create_missing_topics
from stream_app.core.partitioner import partition_of
from stream_app.embedded import Server, run_server
from stream_app.settings import KafkaSettings
from tests.backends import Names, ServiceMissing, apache_kafka, create_topic, local_kafka, local_redis
from tests.bench.measure import Broker, process_cpu_s, with_full_jit
from tests.processes import Program, Programs

PARTITIONS: Final = 4
#: The embedded broker lets a member wait for half of it before it joins; on Kafka the service's default.
SESSION_TIMEOUT_S: Final[Mapping[Broker, float]] = {"embedded": 6.0, "apache": 10.0}
SEND_AT_ONCE: Final = 2_000
POLL_S: Final = 0.02
START_DEADLINE_S: Final = 90.0
Move = Callable[[float | None, int], None]

# What matters is raised; the embedded broker has no idempotent producers, which aiokafka tells at each start.
logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


# --- servers and programs ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage:
    """Broker and store of one measurement, and where its programs find them."""

    broker: Broker
    kafka: Server
    store: Server
    directory: Path

    @property
    def redis_url(self) -> str:
        """Where the state is."""
        return f"redis://{self.store.address}/0"

    def redis(self) -> redis.Redis:
        """Connect to the store."""
        return redis.Redis.from_url(self.redis_url)

    def empty_store(self) -> None:
        """Forget everything that an earlier run has left in the store."""
        with self.redis() as client:
            client.flushall()
            client.function_flush()

    def create_topics(self, names: Names) -> None:
        """Create the events topic as the service does, the two output topics stamped by the broker."""

        async def create() -> None:
            for topic in (names.entered, names.exited):
                stamped = {"message.timestamp.type": "LogAppendTime"}
                await create_topic(self.kafka.address, topic, PARTITIONS, stamped)
            settings = KafkaSettings(
                bootstrap_servers=self.kafka.address,
                events_topic=names.events,
                entered_topic=names.entered,
                exited_topic=names.exited,
                dead_letter_topic=names.dead_letter,
            )
            await create_missing_topics(settings, PARTITIONS)

        asyncio.run(create())

    def environment(self, names: Names, **settings: object) -> dict[str, str]:
        """Settings of a worker; more of them as `WORKER__CLOCK="wall"`."""
        chosen = {
            **names.environment(),
            "STREAM_APP__KAFKA__BOOTSTRAP_SERVERS": self.kafka.address,
            "STREAM_APP__KAFKA__SESSION_TIMEOUT_S": str(SESSION_TIMEOUT_S[self.broker]),
            "STREAM_APP__REDIS__URL": self.redis_url,
            "STREAM_APP__WORKER__TRUST_CREATE_TIME": "true" if self.broker == "embedded" else "false",
            "STREAM_APP__WORKER__HTTP_PORT": "0",
        }
        return chosen | {f"STREAM_APP__{key}": _setting(value) for key, value in settings.items()}

    @contextmanager
    def programs(self, environment: Mapping[str, str]) -> Iterator[Programs]:
        """Start programs with these settings; they end with the block."""
        directory = Path(tempfile.mkdtemp(prefix="run-", dir=self.directory))
        started = Programs(directory, environment)
        try:
            yield started
        finally:
            started.stop()

    def cpu_s(self, programs: Sequence[Program]) -> dict[str, float]:
        """CPU seconds so far: of the programs, the broker and the store."""
        return {
            "worker": sum(process_cpu_s(program.pid) for program in programs),
            "broker": process_cpu_s(self.kafka.pid),
            "redis": process_cpu_s(self.store.pid),
        }


def _setting(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def stage(broker: Broker) -> Iterator[Stage]:
    """Run broker and store.

    Raises
    ------
    click.ClickException
        If this machine cannot have them.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stream-app-bench-")))
        try:
            if broker == "apache":
                kafka = stack.enter_context(run_server(with_full_jit(apache_kafka())))
            else:
                kafka = stack.enter_context(local_kafka("embedded"))
            store = stack.enter_context(local_redis(broker))
        except ServiceMissing as exc:
            raise click.ClickException(f"{exc}; or run with --broker embedded") from exc
        yield Stage(broker, kafka, store, directory)


@contextmanager
def shown(name: str, unit: str = "events") -> Iterator[Move]:
    """Show progress on stderr: a bar on a terminal, else a line now and then."""
    with (bar if click.get_text_stream("stderr").isatty() else lines)(name, unit=unit) as move:
        yield move


def note(text: str) -> None:
    """Say on stderr what begins."""
    click.echo(text, err=True)


# --- events ------------------------------------------------------------------------------------------------


def send_all(
    stage: Stage, topic: str, users: Sequence[str], values: Sequence[bytes], *, silent: bool = False
) -> None:
    """Write events into a topic as fast as it takes them."""
    showing: AbstractContextManager[Move] = (
        nullcontext(lambda share, done: None) if silent else shown(f"sending to {topic}")
    )
    keyed = [user.encode() for user in users]

    async def send() -> None:
        async with EventSender(stage.kafka.address, topic, PARTITIONS) as sender:
            with showing as move:
                for first in range(0, len(keyed), SEND_AT_ONCE):
                    part = slice(first, first + SEND_AT_ONCE)
                    await sender.send(keyed[part], values[part])
                    move(sender.sent / len(keyed), sender.sent)
                await sender.finish()

    asyncio.run(send())


def user_of(value: bytes) -> str:
    """Read whose event this is."""
    return str(json.loads(value)["user_id"])


def watermarks(client: redis.Redis) -> list[int]:
    """Return how far each partition is folded; 0 before its first claim."""
    pipe = client.pipeline(transaction=False)
    for partition in range(PARTITIONS):
        pipe.hget(keys(partition).wm, "watermark")
    return [int(found or 0) for found in pipe.execute()]


def wait_folded(stage: Stage, program: Program, events: int, what: str, deadline_s: float) -> None:
    """Wait until the watermarks say that so many events are folded."""
    until = time.monotonic() + deadline_s
    with stage.redis() as client, shown(what) as move:
        while (done := sum(watermarks(client))) < events:
            move(done / events, done)
            if not program.is_running:
                raise click.ClickException(f"the worker ended early:\n{program.log[-4000:]}")
            if time.monotonic() > until:
                raise click.ClickException(
                    f"expected {events:,} events folded within {deadline_s:.0f} s, got {done:,}; is the "
                    f"machine busy? The worker's last words:\n{program.log[-4000:]}"
                )
            time.sleep(POLL_S)


# --- events on a schedule ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Schedule:
    """Events that are due at fixed instants, whatever becomes of those before: an open loop.

    Attributes
    ----------
    heads
        Each event's JSON without timestamp and closing brace; the timestamp is the instant that it is due.
    start_ns, step_ns
        Unix time of the first, and from one to the next.
    """

    bootstrap: str
    topic: str
    users: Sequence[str]
    heads: Sequence[bytes]
    start_ns: int
    step_ns: int

    def due_ns(self, number: int) -> int:
        """Return when event `number` is due, Unix nanoseconds."""
        return self.start_ns + number * self.step_ns

    def value(self, number: int) -> bytes:
        """Return the event as it is sent.

        The timestamp ends in 4 tenths of a millisecond: read as a float, cut or rounded, it is the same
        millisecond to everybody.
        """
        ms = self.due_ns(number) // 1_000_000
        return b'%s"timestamp":%d.%03d4}' % (self.heads[number], ms // 1000, ms % 1000)


def head_of(**fields: object) -> bytes:
    """Write an event without its timestamp, for `Schedule.heads`.

    Examples
    --------
    >>> head_of(user_id="u1")
    b'{"user_id":"u1",'
    """
    return json.dumps(fields, separators=(",", ":")).encode()[:-1] + b","


@dataclass(frozen=True, slots=True)
class Sender:
    """A process that sends on schedule.

    Attributes
    ----------
    pid
        Of the process.
    wait
        Waits until all is acknowledged; returns how late each event was handed to the producer, in ms: the
        sender's own share of what is measured from the instant that an event was due.
    """

    pid: int
    wait: Callable[[], list[float]]


@contextmanager
def sending(schedule: Schedule) -> Iterator[Sender]:
    """Send on schedule in a process of its own, which ends with the block."""
    context = multiprocessing.get_context("spawn")
    receiving, sending_end = context.Pipe(duplex=False)
    process = context.Process(target=_send_on_schedule, args=(schedule, sending_end), daemon=True)
    process.start()
    sending_end.close()

    def wait() -> list[float]:
        try:
            lags: list[float] = receiving.recv()
        except EOFError:
            raise click.ClickException("the sender has died; its own words are above") from None
        process.join()
        return lags

    try:
        assert process.pid is not None
        yield Sender(process.pid, wait)
    finally:
        if process.is_alive():
            process.terminate()
        process.join()


def _send_on_schedule(schedule: Schedule, done: Connection) -> None:
    done.send(asyncio.run(_sent(schedule)))


async def _sent(schedule: Schedule) -> list[float]:
    users = [user.encode() for user in schedule.users]
    values = [schedule.value(number) for number in range(len(users))]
    partitions = [partition_of(user, PARTITIONS) for user in users]
    producer = AIOKafkaProducer(bootstrap_servers=schedule.bootstrap, acks="all", linger_ms=0)
    await producer.start()
    try:
        lags, futures = [], []
        # A collection would hold events up for which the service is not to blame.
        gc.disable()
        for number, (user, value, partition) in enumerate(zip(users, values, partitions, strict=True)):
            due_ns = schedule.due_ns(number)
            # Also when behind: the producer's own task runs in this loop.
            await asyncio.sleep(max(0.0, (due_ns - time.time_ns()) / 1e9))
            lags.append((time.time_ns() - due_ns) / 1e6)
            futures.append(await producer.send(schedule.topic, value, key=user, partition=partition))
        await asyncio.gather(*futures)
    finally:
        await producer.stop()
    return lags


# --- what comes out ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Received:
    """A message of an output topic: when a consumer had it, and the timestamp that its log gives it."""

    received_ns: int
    stamped_ms: int
    topic: str
    value: bytes


@contextmanager
def receiving(stage: Stage, topics: Sequence[str]) -> Iterator[tuple[list[Received], Callable[[], None]]]:
    """Read topics in a thread of their own; yields what has come so far, and what raises if reading ended."""
    found: list[Received] = []
    failures: list[BaseException] = []
    begun, ended = threading.Event(), threading.Event()

    async def read() -> None:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=stage.kafka.address,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=50,
        )
        await consumer.start()
        try:
            consumer.assign([TopicPartition(topic, p) for topic in topics for p in range(PARTITIONS)])
            begun.set()
            while not ended.is_set():
                batches = await consumer.getmany(timeout_ms=100)
                now_ns = time.time_ns()
                for tp, records in batches.items():
                    found.extend(Received(now_ns, r.timestamp, tp.topic, r.value) for r in records)
        finally:
            await consumer.stop()

    def run() -> None:
        try:
            asyncio.run(read())
        except BaseException as exc:
            failures.append(exc)
        finally:
            begun.set()

    def check() -> None:
        if failures:
            raise click.ClickException(f"the reader of {', '.join(topics)} ended: {failures[0]!r}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    begun.wait(START_DEADLINE_S)
    check()
    try:
        yield found, check
    finally:
        ended.set()
        thread.join()


def settled(found: Sequence[Received], check: Callable[[], None], quiet_s: float, deadline_s: float) -> None:
    """Wait until nothing has come for a while."""
    until = time.monotonic() + deadline_s
    count, since = len(found), time.monotonic()
    while time.monotonic() < until and time.monotonic() - since < quiet_s:
        time.sleep(POLL_S)
        check()
        if len(found) != count:
            count, since = len(found), time.monotonic()


# --- figures -----------------------------------------------------------------------------------------------


def quantiles(values: Sequence[float], unit: str = "ms") -> dict[str, float]:
    """Return count, quantiles and the extremes of all raw values: nothing is put into buckets.

    Examples
    --------
    >>> quantiles([3.0, 1.0, 2.0])["p50_ms"]
    2.0
    """
    if not values:
        return {"count": 0}
    at = {"min": 0.0, "p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9, "max": 100.0}
    # What was measured, never something between two measurements.
    found = np.percentile(np.asarray(values), list(at.values()), method="higher")
    return {"count": len(values)} | {
        f"{name}_{unit}": float(value) for name, value in zip(at, found, strict=True)
    }


def machine_cpu_s() -> float:
    """CPU seconds that the whole machine has been busy so far, whoever with."""
    # user, nice, system, idle, iowait, irq, softirq, steal (proc(5)).
    fields = [int(n) for n in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, Any]:
    """Say what else ran: the load of the last minute, and the cores there are."""
    return {"cores": os.cpu_count(), "load_1m": os.getloadavg()[0]}


def table(rows: Sequence[Sequence[object]]) -> str:
    """Align rows, the first column to the left, numbers to the right."""
    texts = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in texts
    )


def _cell(cell: object) -> str:
    if isinstance(cell, bool) or cell is None:
        return {True: "yes", False: "no", None: "-"}[cell]
    if isinstance(cell, float):
        return f"{cell:,.1f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)
