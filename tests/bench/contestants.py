"""Who takes part: how each contestant is started, how far it is, and what it does and does not do.

Each gets the same topic and an empty store, and its documented best settings. What it lacks beside the
service is said with its figure.
"""

from __future__ import annotations

import asyncio
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Final, Literal

import msgspec
import redis

from stream_app.adapters.profile_store import keys
from stream_app.commands.topics import create_missing_topics
from stream_app.core.partitioner import partition_of
from stream_app.settings import KafkaSettings
from tests.bench.judge import Judge, Judgement
from tests.bench.limit import Event
from tests.bench.measure import (
    PARTITIONS,
    SESSION_TIMEOUT_S,
    BenchmarkError,
    Broker,
    Progress,
    Run,
    Servers,
    empty,
    kafka_settings,
    names_of,
    observe,
    start_program,
)
from tests.bench.peers import (
    KAFKA_STREAMS_NOTES,
    QUIX_NOTES,
    Notes,
    kafka_streams_command,
    quix_command,
)
from tests.bench.workload import weights_environment
from tests.processes import Program

How = Literal["exactly", "lazily", "not"]

SUMMARY: Final = re.compile(r"folded \d+ events, set \d+ records aside, said (\d+) transitions")
PRINTED: Final = re.compile(rb"^progress (\d+)\s*$", re.MULTILINE)
#: Who shares a group stops by no count of its own: it is ended when so much of all is known to be done. Each
#: process says how far it is every 5,000 events.
SHARED_END: Final = 0.95
PROFILES_LOOKED_AT: Final = 400
#: Before the first run of the service has shown how large its profiles are.
BLOB_BYTES: Final = 700


@dataclass(frozen=True, slots=True)
class Setting:
    """What one run of a contestant is given."""

    servers: Servers
    redis_url: str
    kafka: KafkaSettings
    segments: Path
    definitions: Path
    events: int
    blob_bytes: int
    state: Path


@dataclass(frozen=True, slots=True)
class Command:
    """A program to start; `environment` is added to ours."""

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Contestant:
    """One row of the table.

    Attributes
    ----------
    key, title
        For the command line and for people.
    commands
        What to start, all at once.
    judged
        How its transitions are compared with the oracle's.
    notes
        What it does not do, or does beyond the service.
    share
        Of the events that it gets: who is slow would need hours.
    watermarks
        Whether its progress is what the watermarks in Redis say, else what it prints.
    store
        Which of the stores it uses.
    brokers
        On which it can run.
    """

    key: str
    title: str
    commands: Callable[[Setting], list[Command]]
    judged: How = "exactly"
    notes: str = ""
    share: float = 1.0
    watermarks: bool = False
    processes: int = 1
    store: str = "memory"
    brokers: tuple[Broker, ...] = ("apache", "embedded")


# --- how each is started -----------------------------------------------------------------------------------


def worker_environment(setting: Setting, *, model: bool) -> dict[str, str]:
    """Settings of `stream-app worker` for one run."""
    settings = {
        f"KAFKA__{key.upper()}": str(value)
        for key, value in setting.kafka.model_dump(exclude_unset=True).items()
    }
    settings |= {
        "REDIS__URL": setting.redis_url,
        "WORKER__CLOCK": "event",
        "WORKER__TRUST_CREATE_TIME": "true",
        "WORKER__HTTP_PORT": "0",
        "MODEL__ENABLED": "true" if model else "false",
    }
    return {f"STREAM_APP__{key}": value for key, value in settings.items()} | weights_environment()


def _worker(processes: int, *, model: bool) -> Callable[[Setting], list[Command]]:
    def commands(setting: Setting) -> list[Command]:
        words = [
            sys.executable,
            "-m",
            "stream_app",
            "worker",
            "--until-end",
            f"--segments={setting.segments}",
        ]
        return [Command(words, worker_environment(setting, model=model))] * processes

    return commands


def _plain(setting: Setting) -> list[Command]:
    options = {
        **_options(setting),
        "redis-url": setting.redis_url,
        "session-timeout": SESSION_TIMEOUT_S,
    }
    return [Command([sys.executable, "-m", "tests.bench.plain_agent", *_words(options)])]


def _limit(processes: int) -> Callable[[Setting], list[Command]]:
    def commands(setting: Setting) -> list[Command]:
        options: dict[str, object] = {
            "bootstrap": setting.kafka.bootstrap_servers,
            "redis-url": setting.redis_url,
            "topic": setting.kafka.events_topic,
            "events": setting.events,
            "processes": processes,
            "blob-bytes": setting.blob_bytes,
        }
        return [
            Command([sys.executable, "-m", "tests.bench.limit", *_words({**options, "number": number})])
            for number in range(processes)
        ]

    return commands


def _quix(processes: int) -> Callable[[Setting], list[Command]]:
    def commands(setting: Setting) -> list[Command]:
        return [Command(quix_command(**_arguments(setting, f"quix-{number}"))) for number in range(processes)]

    return commands


def _kafka_streams(setting: Setting) -> list[Command]:
    return [Command(kafka_streams_command(**_arguments(setting, "kafka-streams"), threads=2))]


def _options(setting: Setting) -> dict[str, object]:
    kafka = setting.kafka
    return {
        "bootstrap": kafka.bootstrap_servers,
        "topic": kafka.events_topic,
        "entered": kafka.entered_topic,
        "exited": kafka.exited_topic,
        "definitions": setting.definitions,
        "group": kafka.group_id,
        "events": setting.events,
        "state-dir": setting.state,
    }


def _words(options: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def _arguments(setting: Setting, name: str) -> dict[str, Any]:
    state = setting.state / name
    state.mkdir()
    options = {**_options(setting), "state-dir": state}
    return {name.replace("-", "_"): value for name, value in options.items()}


# --- who they are ------------------------------------------------------------------------------------------

OURS_NOTE: Final = "exits at their own instant, also with no event; replay-safe; profiles open to lookups"


def _peer_note(notes: Notes) -> str:
    return f"{notes.has} {notes.lacks} Settings: {notes.settings}"


CONTESTANTS: Final[Mapping[str, Contestant]] = {
    contestant.key: contestant
    for contestant in (
        Contestant(
            "off-1",
            "this service, 1 worker",
            _worker(1, model=False),
            notes=OURS_NOTE,
            share=0.4,
            watermarks=True,
        ),
        Contestant(
            "off-2",
            "this service, 2 workers",
            _worker(2, model=False),
            notes=OURS_NOTE,
            watermarks=True,
            processes=2,
        ),
        Contestant(
            "off-2-aof",
            "this service, 2 workers, appendonly everysec",
            _worker(2, model=False),
            notes="as above; a crash of Redis costs a second's folding again, not all of it",
            share=0.4,
            watermarks=True,
            processes=2,
            store="appendonly",
        ),
        Contestant(
            "on-1",
            "this service, model on, 1 worker",
            _worker(1, model=True),
            notes="also learns and stores each user's next categories",
            share=0.15,
            watermarks=True,
        ),
        Contestant(
            "on-2",
            "this service, model on, 2 workers",
            _worker(2, model=True),
            notes="also learns and stores each user's next categories",
            share=0.15,
            watermarks=True,
            processes=2,
        ),
        Contestant(
            "plain",
            "plain Faust agent",
            _plain,
            "lazily",
            "no exit before the user's next event; counts twice after a crash; loses or repeats transitions",
            share=0.0125,
        ),
        Contestant(
            "quix-1",
            "Quix Streams, 1 process",
            _quix(1),
            "lazily",
            _peer_note(QUIX_NOTES),
            share=0.25,
        ),
        Contestant(
            "quix-2",
            "Quix Streams, 2 processes",
            _quix(2),
            "lazily",
            _peer_note(QUIX_NOTES),
            share=0.25,
            processes=2,
        ),
        Contestant(
            "kafka-streams",
            "Kafka Streams, 2 threads",
            _kafka_streams,
            "lazily",
            _peer_note(KAFKA_STREAMS_NOTES),
        ),
        Contestant(
            "limit-1",
            "the limit, 1 process",
            _limit(1),
            "not",
            "no logic: reads, decodes, MGET, commit.lua with blobs of a profile's size",
            share=0.4,
            watermarks=True,
        ),
        Contestant(
            "limit-2",
            "the limit, 2 processes",
            _limit(2),
            "not",
            "no logic: reads, decodes, MGET, commit.lua with blobs of a profile's size",
            share=0.4,
            watermarks=True,
            processes=2,
        ),
    )
}


# --- one run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Topic:
    """Events that lie in Kafka, and the definitions that go with them.

    Attributes
    ----------
    name, events
        Of the topic.
    segments, definitions
        Files, as the service and as its peers read them.
    middle_users
        Who the events in the middle are of: the sizes of their profiles are those that matter.
    """

    name: str
    events: int
    segments: Path
    definitions: Path
    middle_users: tuple[str, ...] = ()


def middle_users(lines: Sequence[bytes]) -> tuple[str, ...]:
    """Return the users of some events in the middle."""
    begin = max(0, len(lines) // 2 - PROFILES_LOOKED_AT // 2)
    decode = msgspec.json.Decoder(Event).decode
    return tuple({decode(line).user_id for line in lines[begin : begin + PROFILES_LOOKED_AT]})


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run, the names that it was given, and what it said of itself."""

    run: Run
    kafka: KafkaSettings
    redis_url: str
    transitions: int | None = None
    profile_bytes: int | None = None


def run(
    contestant: Contestant,
    servers: Servers,
    topic: Topic,
    blob_bytes: int = BLOB_BYTES,
    on_progress: Callable[[int], None] = lambda events: None,
) -> Outcome:
    """Run a contestant over a topic, from an empty store, to its end.

    Raises
    ------
    BenchmarkError
        If it cannot be started, fails, or has not done all events.
    ServiceMissing
        If this machine lacks what it needs.
    """
    url = servers.redis_url(contestant.store)
    empty(url)
    kafka = kafka_settings(servers, topic.name)
    asyncio.run(create_missing_topics(kafka, PARTITIONS))
    state = servers.directory / f"state-{kafka.group_id}"
    state.mkdir()
    setting = Setting(servers, url, kafka, topic.segments, topic.definitions, topic.events, blob_bytes, state)
    programs = [
        start_program(servers, f"{contestant.key}-{number}-{kafka.group_id}", c.words, c.environment)
        for number, c in enumerate(contestant.commands(setting))
    ]
    watermarks = _Watermarks(url, topic, contestant.processes)
    told = watermarks if contestant.watermarks else _Printed(programs)
    observed = observe(
        servers,
        contestant.store,
        programs,
        told,
        topic.events,
        stop_at=int(SHARED_END * topic.events) if shares_a_count(contestant) else None,
        on_progress=on_progress,
    )
    done, transitions = watermarks().events if contestant.watermarks else topic.events, None
    watermarks.close()
    if done != topic.events:
        raise BenchmarkError(f"{contestant.title}: expected {topic.events} events to be done, got {done}")
    # A worker that loses a partition does not count what it had under way there.
    if contestant.judged == "exactly" and contestant.processes == 1:
        transitions = sum(int(n) for n in SUMMARY.findall(observed.log))
    return Outcome(observed, kafka, url, transitions, watermarks.profile_bytes)


class _Watermarks:
    """Progress by what Redis says of each partition, and on the way the size of a profile."""

    def __init__(self, url: str, topic: Topic, processes: int) -> None:
        self._redis = redis.Redis.from_url(url)
        self._topic = topic
        self._processes = processes
        self.profile_bytes: int | None = None

    def __call__(self) -> Progress:
        with self._redis.pipeline(transaction=False) as pipe:
            for p in range(PARTITIONS):
                pipe.hmget(keys(p).wm, "watermark", "owner")
            found = pipe.execute()
        events = sum(int(watermark or 0) for watermark, _ in found)
        if self.profile_bytes is None and events >= self._topic.events / 2:
            self._look_at_profiles()
        # The limit's processes share one name, and the partitions by hand.
        owners = {owner for _, owner in found}
        return Progress(
            events, None not in owners and (len(owners) == self._processes or owners == {b"limit"})
        )

    def _look_at_profiles(self) -> None:
        with self._redis.pipeline(transaction=False) as pipe:
            for user in self._topic.middle_users:
                pipe.strlen(keys(partition_of(user.encode(), PARTITIONS)).profile(user))
            sizes = [size for size in pipe.execute() if size]
        self.profile_bytes = round(fmean(sizes)) if sizes else None

    def close(self) -> None:
        self._redis.close()


class _Printed:
    """Progress by what the programs print, each of its own share."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self._programs = programs
        self._read = [0] * len(programs)
        self._events = [0] * len(programs)

    def __call__(self) -> Progress:
        for number, program in enumerate(self._programs):
            with program.log_path.open("rb") as log:
                log.seek(self._read[number])
                text = log.read()
            # What is not yet a whole line is read again.
            whole = text[: text.rfind(b"\n") + 1]
            self._read[number] += len(whole)
            if found := PRINTED.findall(whole):
                self._events[number] = int(found[-1])
        return Progress(sum(self._events), all(self._events))


def shares_a_count(contestant: Contestant) -> bool:
    """Tell whether no process of a contestant can know when all of them together are done."""
    return contestant.processes > 1 and not contestant.watermarks


def check(contestant: Contestant, servers: Servers, topic: Topic, judge: Judge) -> Judgement:
    """Run a contestant over few events and compare what it published with the oracle's verdict."""
    if contestant.judged == "not":
        return Judgement(0, 0, 0)
    if shares_a_count(contestant):
        # Several of them would be ended before the last events: the same program, alone.
        several = contestant.commands
        contestant = replace(contestant, processes=1, commands=lambda setting: several(setting)[:1])
    outcome = run(contestant, servers, topic)
    names = names_of(outcome.kafka)
    if contestant.judged == "exactly":
        return judge.exactly(names, outcome.redis_url)
    return judge.lazily(names.entered, names.exited)


def shuffled(chosen: Sequence[Contestant], seed: int, turn: int) -> list[Contestant]:
    """Return all of them in the order of one round."""
    return random.Random(seed * 1000 + turn).sample(list(chosen), len(chosen))
