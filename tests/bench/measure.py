"""Servers of the benchmark, and what a run of a program over a topic used.

What counts as CPU and as progress is decided here: CPU is user and system time of whole process trees from
/proc, progress is what the program itself says. Both are sampled ten times a second. A figure is what was
used between two of these samples, over the events that were done between them; start, imports, joining the
group and the end lie outside. Throughput on shared cores varies with what else runs; CPU per event hardly.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Final, Literal

import redis

from stream_app.commands.replay import send_blocks
from stream_app.commands.topics import create_missing_topics
from stream_app.embedded import Server, ServerProgram, embedded_kafka, run_server
from stream_app.settings import KafkaSettings
from tests.backends import JVM, ROOT, Names, apache_kafka, local_redis, redis_url_of
from tests.bench.workload import blocks
from tests.processes import DYING_WITH_US, Program

Broker = Literal["apache", "embedded"]
BROKERS: Final[tuple[Broker, ...]] = ("apache", "embedded")

PARTITIONS: Final = 4
#: The embedded broker lets a worker wait for half of it before it joins.
SESSION_TIMEOUT_S: Final = 6
SAMPLE_EVERY_S: Final = 0.1
#: How often it is looked whether a program has started others.
LOOK_FOR_CHILDREN_S: Final = 1.0
#: A run may stand still for so long before it is given up.
STANDSTILL_S: Final = 60.0
END_DEADLINE_S: Final = 60.0
LOG_TAIL_CHARS: Final = 3000
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
#: What Apache Kafka's own start script gives its JVM, and nothing that keeps its compiler from its best.
BENCH_JVM: Final = (
    "-server",
    "-Xms1g",
    "-Xmx1g",
    "-XX:+UseG1GC",
    "-XX:MaxGCPauseMillis=20",
    "-XX:InitiatingHeapOccupancyPercent=35",
    "-XX:+ExplicitGCInvokesConcurrent",
    "-Djava.awt.headless=true",
)


class BenchmarkError(Exception):
    """A run that gives no figure; the message says what was expected, what came and what to do."""


# --- servers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Servers:
    """A broker and its stores, and where the programs of this benchmark leave their files.

    Attributes
    ----------
    broker
        Which kind of broker, and with it of Redis.
    kafka
        The broker.
    stores
        One Redis by how it keeps its data: "memory", and "appendonly" where it was asked for.
    directory
        For logs and state; removed at the end.
    """

    broker: Broker
    kafka: Server
    stores: Mapping[str, Server]
    directory: Path

    def redis_url(self, store: str = "memory") -> str:
        """URL of one of the stores."""
        return redis_url_of(self.stores[store])


@contextmanager
def open_servers(broker: Broker, directory: Path, *, appendonly: bool = False) -> Iterator[Servers]:
    """Run the servers of one kind; they end with the body, and with this process.

    Raises
    ------
    ServiceMissing, EmbeddedServerError
        If this machine cannot have them; the message says what to install.
    """
    with ExitStack() as stack:
        kafka = run_server(with_full_jit(apache_kafka())) if broker == "apache" else embedded_kafka()
        kind: Literal["apache", "embedded"] = broker
        stores = {"memory": stack.enter_context(local_redis(kind))}
        if appendonly:
            arguments = ("--appendonly", "yes", "--appendfsync", "everysec")
            stores["appendonly"] = stack.enter_context(local_redis(kind, arguments=arguments))
        yield Servers(broker, stack.enter_context(kafka), stores, directory)


def with_full_jit(program: ServerProgram) -> ServerProgram:
    """Return the tests' Apache Kafka as one that is to be quick for minutes, not to start in seconds."""

    def command(port: int, directory: Path) -> Sequence[str]:
        java, *rest = program.command(port, directory)
        if tuple(rest[: len(JVM)]) != JVM:
            raise BenchmarkError(f"expected java with {JVM}, got {rest}: adapt tests.bench.measure")
        return [java, *BENCH_JVM, *rest[len(JVM) :]]

    return replace(program, command=command)


def kafka_settings(servers: Servers, events_topic: str) -> KafkaSettings:
    """Settings of one run: a given events topic, everything else its own."""
    names = Names.unique()
    return KafkaSettings(
        bootstrap_servers=servers.kafka.address,
        group_id=names.group,
        events_topic=events_topic,
        entered_topic=names.entered,
        exited_topic=names.exited,
        dead_letter_topic=names.dead_letter,
        session_timeout_s=SESSION_TIMEOUT_S,
    )


def names_of(kafka: KafkaSettings) -> Names:
    """Return the same as the tests call it."""
    return Names(
        kafka.events_topic, kafka.entered_topic, kafka.exited_topic, kafka.dead_letter_topic, kafka.group_id
    )


def send(servers: Servers, topic: str, lines: Sequence[bytes]) -> None:
    """Create a topic with these events, keyed by user.

    Raises
    ------
    BenchmarkError
        If Kafka did not take all of them.
    """

    async def run() -> None:
        kafka = kafka_settings(servers, topic)
        await create_missing_topics(kafka, PARTITIONS)
        outcome = await send_blocks(kafka, blocks(topic, lines), len(lines), on_progress=lambda *_: None)
        if outcome.failure is not None:
            raise BenchmarkError(str(outcome.failure))
        if outcome.acknowledged != len(lines):
            raise BenchmarkError(
                f"{topic}: expected {len(lines)} events to be taken, got {outcome.acknowledged}"
            )

    # The embedded broker has no idempotent producers, which aiokafka says at length.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    asyncio.run(run())


def empty(url: str) -> None:
    """Empty a Redis of this benchmark."""
    with redis.Redis.from_url(url) as client:
        client.flushall()
        client.function_flush()


# --- CPU ---------------------------------------------------------------------------------------------------


def process_cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a running process, user and system."""
    user, system, *_ = _cpu_fields(pid)
    return (user + system) / TICKS_PER_S


def machine_cpu_s() -> float:
    """CPU seconds of everything that ran on this machine, or was taken from it by its host."""
    # User, nice, system, idle, waiting, interrupts (2), stolen (proc(5)).
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICKS_PER_S


def _cpu_fields(pid: int) -> list[int]:
    """Return user and system ticks of a process, and those of its children that have ended."""
    # The name, in parentheses, may hold anything; these are fields 14 to 17 (proc(5)).
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return [int(field) for field in fields[11:15]]


class Tree:
    """CPU time of a process and all that it has started, also of what has ended since.

    Parameters
    ----------
    pid
        The process at the root.
    """

    def __init__(self, pid: int) -> None:
        self._pids = [pid]
        self._looked_s = 0.0
        self._last_s = 0.0

    def cpu_s(self) -> float:
        """CPU seconds so far; after its end, those of the last look."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_FOR_CHILDREN_S:
            self._looked_s = now_s
            self._pids = descendants(self._pids[0])
        ticks = 0
        for pid in self._pids:
            try:
                ticks += sum(_cpu_fields(pid))
            except (FileNotFoundError, ProcessLookupError):
                continue
        # What has ended is missing until its parent, which then counts it, has waited for it.
        self._last_s = max(self._last_s, ticks / TICKS_PER_S)
        return self._last_s


def descendants(pid: int) -> list[int]:
    """Return a process and all its running descendants."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


# --- one run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """What was done and used so far, at one instant; CPU in seconds, `others` that of all else that ran."""

    at_s: float
    events: int
    worker: float
    broker: float
    redis: float
    others: float = 0.0

    @property
    def total(self) -> float:
        return self.worker + self.broker + self.redis


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run's programs say of how far they are: events done, and whether all of them take part."""

    events: int
    all_take_part: bool = True


@dataclass(slots=True)
class Run:
    """One run of one contestant.

    Attributes
    ----------
    samples
        One each time that more events were done.
    ready_events
        How many events were done when all its processes took part.
    wall_s
        From the start of the first program to the end of the last.
    log
        What the programs printed.
    """

    samples: list[Sample] = field(default_factory=list)
    ready_events: int | None = None
    wall_s: float = 0.0
    log: str = ""


PARTS: Final = ("worker", "broker", "redis")


def start_program(
    servers: Servers, name: str, command: Sequence[str], environment: Mapping[str, str]
) -> Program:
    """Start a program of the benchmark; it dies with us, and its output goes to a file."""
    path = servers.directory / f"{name}.log"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("STREAM_APP__")}
    with path.open("wb") as log:
        process = subprocess.Popen(
            [*DYING_WITH_US, str(os.getpid()), *command],
            cwd=ROOT,
            env={**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return Program(name, path, process)


def observe(
    servers: Servers,
    store: str,
    programs: Sequence[Program],
    progress: Callable[[], Progress],
    events: int,
    *,
    stop_at: int | None = None,
    on_progress: Callable[[int], None] = lambda events: None,
) -> Run:
    """Sample a run until its programs have ended.

    Parameters
    ----------
    servers, store
        Whose CPU counts.
    programs
        What runs; they are ended if it fails.
    progress
        How far they are.
    events
        How many there are to do.
    stop_at
        Programs that do not know when all of them together are done are ended at so many events.
    on_progress
        Told how many events are done, at each sample.

    Raises
    ------
    BenchmarkError
        If a program ends with anything but 0, stands still or does not end.
    """
    run, begun_s = Run(), time.monotonic()
    trees = [Tree(program.pid) for program in programs]
    last_s, last_events = begun_s, -1
    try:
        while any(program.is_running for program in programs):
            next_s = time.monotonic() + SAMPLE_EVERY_S
            now = progress()
            at_s = time.monotonic()
            if now.events > last_events:
                last_s, last_events = at_s, now.events
                if now.all_take_part and run.ready_events is None and now.events > 0:
                    run.ready_events = now.events
                worker = sum(tree.cpu_s() for tree in trees)
                broker = process_cpu_s(servers.kafka.pid)
                redis_s = process_cpu_s(servers.stores[store].pid)
                others = machine_cpu_s() - worker - broker - redis_s - time.process_time()
                run.samples.append(Sample(at_s - begun_s, now.events, worker, broker, redis_s, others))
                on_progress(now.events)
            if stop_at is not None and now.events >= stop_at:
                break
            _refuse_failed(programs)
            if at_s - last_s > (END_DEADLINE_S if last_events >= events else STANDSTILL_S):
                raise BenchmarkError(
                    f"{programs[0].name}: expected {events} events and its end, stands still at "
                    f"{last_events}: {programs[0].log[-LOG_TAIL_CHARS:]}"
                )
            time.sleep(max(0.0, next_s - time.monotonic()))
    finally:
        for program in programs:
            program.stop()
    run.wall_s = time.monotonic() - begun_s
    if stop_at is None:
        _refuse_failed(programs)
    run.log = "\n".join(program.log for program in programs)
    return run


def _refuse_failed(programs: Sequence[Program]) -> None:
    for program in programs:
        if program.process.poll() not in (None, 0):
            raise BenchmarkError(
                f"{program.name}: expected it to end with 0, got {program.process.returncode}: "
                f"{program.log[-LOG_TAIL_CHARS:]}"
            )


def steady(run: Run, from_events: int, to_events: int) -> dict[str, float] | None:
    """Return what an event used between two counts of events.

    None where too few samples lie there, or where not all of its processes ever took part.

    Returns
    -------
    dict or None
        CPU microseconds an event of worker, broker, redis and all ("total"), events per second, cores that
        were busy with it and with everything else, and the counts of events that it is taken between.

    Examples
    --------
    >>> run = Run([Sample(float(n), 1000 * n, 0.1 * n, 0.02 * n, 0.03 * n) for n in range(9)], 1000)
    >>> {name: round(value, 6) for name, value in (steady(run, 2000, 7000) or {}).items()}["total"]
    150.0
    """
    if run.ready_events is None:
        return None
    lowest = max(from_events, run.ready_events)
    window = [sample for sample in run.samples if lowest <= sample.events <= to_events]
    if len(window) < 2:
        return None
    first, last = window[0], window[-1]
    events, seconds = last.events - first.events, last.at_s - first.at_s
    figures = {
        part: (getattr(last, part) - getattr(first, part)) / events * 1e6 for part in (*PARTS, "total")
    }
    return {
        **figures,
        "events_per_s": events / seconds,
        "busy_cores": (last.total - first.total) / seconds,
        "others_cores": (last.others - first.others) / seconds,
        "seconds": seconds,
        "from_events": first.events,
        "to_events": last.events,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and most.

    Examples
    --------
    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    return {"median": median(values), "min": min(values), "max": max(values)}
