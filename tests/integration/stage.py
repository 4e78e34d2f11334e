"""A configured service on a broker and a store, with a log to fill and workers to start."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import redis
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from redis.exceptions import RedisClusterException

from stream_app.embedded import Server
from tests.backends import Names, kafka_from_environment, kind_of, log_ends
from tests.e2e.proof import Case, Proof, prove
from tests.faults import faulty
from tests.faults.faulty import Point, Switch
from tests.oracle import Clock
from tests.processes import Program, Programs

PARTITIONS = 3
EVENTS = 14_000
SEED = 1  # one log for nearly all tests: the oracle judges it once
DRAIN_DEADLINE_S = 4.0
#: Ending interpreter and framework takes a while on a busy machine.
EXIT_SLACK_S = 8.0
FIRST_S = 1_600_000_000

WEIGHTS: dict[str, Any] = {
    "half_life_s": 3600.0,
    "history_floor": 0.01,
    "event_types": {"buy": {"action_weight": 2.0, "half_life_s": 600.0}},
}
SEGMENTS: list[dict[str, Any]] = [
    {"id": "fans", "labels": ["red"], "min_weight": 1.5, "exit_weight": 0.5},
    {"id": "any-colour", "labels": ["green", "blue"], "min_weight": 0.8, "exclude": ["fans"]},
    {"id": "buyers", "event_types": ["buy"], "min_weight": 1.0},
    {"id": "owners", "asset_ids": ["p1", "p2"], "min_weight": 0.0},
]


@dataclass(frozen=True, slots=True)
class Stage:
    """A broker with the four topics, a Redis, and workers to start on them."""

    case: Case
    partitions: int
    programs: Programs
    options: Sequence[str]
    environment: Mapping[str, str]

    @classmethod
    def build(
        cls,
        case: Case,
        programs: Programs,
        directory: Path,
        *,
        partitions: int = PARTITIONS,
        **settings: object,
    ) -> Self:
        """Write the configuration of `case` and create its topics; `settings` are ``section__key=value``."""
        types = case.weights.get("event_types", {})
        own = "".join(f"[weights.event_types.{name}]\n{_toml(fields)}" for name, fields in types.items())
        general = {name: value for name, value in case.weights.items() if name != "event_types"}
        (directory / "app.toml").write_text(f"[weights]\n{_toml(general)}{own}")
        (directory / "segments.toml").write_text(
            "".join(f"[[segments]]\n{_toml(segment)}" for segment in case.segments)
        )
        environment = {
            **case.names.environment(),
            "STREAM_APP__KAFKA__BOOTSTRAP_SERVERS": case.kafka,
            "STREAM_APP__KAFKA__SESSION_TIMEOUT_S": str(session_timeout_s()),
            "STREAM_APP__REDIS__URL": case.redis_url,
            **({"STREAM_APP__REDIS__CLUSTER": "true"} if case.cluster else {}),
            "STREAM_APP__WORKER__CLOCK": case.clock,
            **_variables(settings),
        }
        options = ("--config", str(directory / "app.toml"), "--segments", str(directory / "segments.toml"))
        stage = cls(case, partitions, programs, options, environment)
        stage.run("topics", "--partitions", str(partitions))
        return stage

    def run(self, *arguments: str, timeout_s: float = 90.0, status: int = 0, **settings: object) -> str:
        """Run a command to its end."""
        environment = {**self.environment, **_variables(settings)}
        return self.programs.run(
            *arguments, *self.options, environment=environment, timeout_s=timeout_s, status=status
        )

    def start(self, *arguments: str, **settings: object) -> Program:
        """Start a command."""
        environment = {**self.environment, **_variables(settings)}
        return self.programs.start(*arguments, *self.options, environment=environment)

    def start_faulty(
        self,
        *arguments: str,
        kill: tuple[Point, int] | None = None,
        without: Sequence[Switch] = (),
        stop: tuple[Point, int] | None = None,
        term: tuple[Point, int] | None = None,
        clock: Path | None = None,
        lives: Sequence[Mapping[str, str]] = (),
        **settings: object,
    ) -> Program:
        """Start a command with something wrong about it: see `tests.faults.faulty`."""
        fault = faulty.environment(kill, without, stop=stop, term=term, clock=clock, lives=lives)
        environment = {**self.environment, **_variables(settings), **fault}
        return self.programs.start(
            *arguments, *self.options, environment=environment, module="tests.faults.faulty"
        )

    def wm(self, partition: int) -> dict[str, str]:
        """What Redis holds of a partition's progress; empty if nothing, or if there is no Redis."""
        try:
            with self.case.open_redis(decode_responses=True) as client:
                return dict(client.hgetall(f"sa:{{{partition}}}:wm"))
        except (redis.ConnectionError, RedisClusterException):
            return {}

    def definitions(self, partition: int) -> str:
        """The segment set that all profiles of a partition have, as stored."""
        with self.case.open_redis(decode_responses=True) as client:
            return str(client.hget(f"sa:{{{partition}}}:definitions", self.wm(partition)["definitions"]))

    def watermarks(self) -> dict[int, int]:
        """Next offset of each partition, 0 where nobody has claimed it yet."""
        return {p: int(self.wm(p).get("watermark", 0)) for p in range(self.partitions)}

    def folded(self) -> int:
        """Records below the watermarks of all partitions."""
        return sum(self.watermarks().values())

    def is_done(self, ends: Mapping[int, int]) -> bool:
        """Whether all up to `ends` is folded, what is due by stream time has happened, all is published."""
        if self.watermarks() != ends:
            return False
        with self.case.open_redis() as client:
            return not any(
                client.xlen(f"sa:{{{p}}}:outbox")
                or client.zcount(f"sa:{{{p}}}:due", "-inf", self.wm(p)["stream_time_ms"])
                for p in range(self.partitions)
            )

    def log_ends(self) -> dict[int, int]:
        """Next offset that the log of each partition will give out."""
        return asyncio.run(log_ends(self.case.kafka, self.case.names.events))

    def send(self, events: Iterable[Mapping[str, Any]]) -> int:
        """Append events to the log, each to the partition of its user; returns how many."""
        return asyncio.run(send(self.case.kafka, self.case.names.events, events))

    def committed(self) -> dict[int, int]:
        """Offsets that Kafka holds for the group, 0 where it holds none."""
        return asyncio.run(_committed(self.case.kafka, self.case.names, self.partitions))

    def proven(self, record_property: Callable[[str, object], None], until_ms: int | None = None) -> Proof:
        """Compare what was said and stored with the oracle."""
        proof = prove(self.case, until_ms)
        record_property("proof", str(proof))
        print(proof)
        proof.holds()
        return proof


def session_timeout_s() -> float:
    """As short as the broker allows: the embedded one lets a joining worker wait for half of it."""
    return 3.0 if kind_of(kafka_from_environment(os.environ), os.environ) == "embedded" else 6.0


def _toml(fields: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items())


def _variables(settings: Mapping[str, object]) -> dict[str, str]:
    return {
        f"STREAM_APP__{name.upper()}": str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in settings.items()
    }


async def send(bootstrap: str, topic: str, events: Iterable[Mapping[str, Any]]) -> int:
    """Append events to a topic, keyed by user."""
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", linger_ms=5) as producer:
        sent = [
            await producer.send(topic, key=event["user_id"].encode(), value=json.dumps(event).encode())
            for event in events
        ]
        await asyncio.gather(*sent)
    return len(sent)


async def _committed(bootstrap: str, names: Names, partitions: int) -> dict[int, int]:
    async with AIOKafkaConsumer(
        bootstrap_servers=bootstrap, group_id=names.group, enable_auto_commit=False
    ) as consumer:
        return {p: await consumer.committed(TopicPartition(names.events, p)) or 0 for p in range(partitions)}


def synthetic_events(
    seed: int, count: int, *, users: int = 1_000, step_s: float = 1.0
) -> list[dict[str, Any]]:
    """Make events in order of time, some late, some twice; the same for the same seed."""
    rng = random.Random(seed)
    events: list[dict[str, Any]] = []
    for n in range(count):
        if n > 10 and rng.random() < 0.01:
            events.append(events[-rng.randint(1, 10)])
            continue
        late_s = rng.choice([30.0, 3_000.0]) if rng.random() < 0.05 else 0.0
        events.append(
            {
                "event_id": f"e{seed}-{n}",
                "user_id": f"u{rng.randrange(users)}",
                "event_type": rng.choice(["view", "view", "buy"]),
                "timestamp": round(FIRST_S + n * step_s - late_s, 3),
                "labels": rng.sample(["red", "green", "blue", "grey"], rng.randint(0, 2)),
                "asset_id": f"p{rng.randrange(12)}",
            }
        )
    return events


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Poll until something holds that no program of the test decides."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def kill_server(server: Server) -> None:
    """End a server of this test's own at once."""
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not server.is_running, 10, f"{server.name} gone")


def probe(port: int, path: str) -> tuple[int, str]:
    """Ask the worker over HTTP; (0, "") while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()
    except OSError:
        return 0, ""


def claims(worker: Program) -> Counter[int]:
    """How often a worker has claimed each partition, from its log."""
    return Counter(
        int(line.split("partition ")[1].split(":")[0])
        for line in worker.log.splitlines()
        if ": claimed, epoch " in line
    )


def event_clock_case(kafka: str, redis_url: str, names: Names, clock: Clock = "event") -> Case:
    return Case(kafka, redis_url, names, SEGMENTS, WEIGHTS, clock)


def flush(stage: Stage) -> None:
    with redis.Redis.from_url(stage.case.redis_url) as client:
        client.flushdb()
