"""What a worker lives through: signals, a Redis that goes, comes back or is meddled with, another owner."""

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
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from prometheus_client.parser import text_string_to_metric_families

from stream_app.adapters.partitioner import partition_of
from stream_app.adapters.profile_store import Identity, ProfileStore, connect
from stream_app.embedded import Server
from stream_app.embedded.servers import free_port
from tests.backends import Kind, Names, kafka_from_environment, kind_of, log_ends, read_to_end, redis_url_of
from tests.e2e.proof import Case, Proof, prove
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
    ) -> Stage:
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

    def wm(self, partition: int) -> dict[str, str]:
        """What Redis holds of a partition's progress; empty if nothing, or if there is no Redis."""
        try:
            with redis.Redis.from_url(self.case.redis_url, decode_responses=True) as client:
                raw: Any = client
                return dict(raw.hgetall(f"sa:{{{partition}}}:wm"))
        except redis.ConnectionError:
            return {}

    def definitions(self, partition: int) -> str:
        """The segment set that all profiles of a partition have, as stored."""
        with redis.Redis.from_url(self.case.redis_url, decode_responses=True) as client:
            raw: Any = client
            return str(raw.hget(f"sa:{{{partition}}}:definitions", self.wm(partition)["definitions"]))

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
        with redis.Redis.from_url(self.case.redis_url) as raw:
            client: Any = raw
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
    return {f"STREAM_APP__{name.upper()}": str(value).lower() for name, value in settings.items()}


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


@pytest.fixture
def case(kafka_bootstrap: str, fresh_redis: str, names: Names) -> Case:
    return event_clock_case(kafka_bootstrap, fresh_redis, names)


@pytest.fixture
def stage(case: Case, programs: Programs, tmp_path: Path) -> Stage:
    return Stage.build(case, programs, tmp_path, worker__drain_deadline_s=DRAIN_DEADLINE_S)


@pytest.fixture
def store(redis_server: Callable[..., Server]) -> Server:
    """A Redis of this test's own, to be killed."""
    return redis_server()


@pytest.fixture
def fragile_stage(
    kafka_bootstrap: str, store: Server, names: Names, programs: Programs, tmp_path: Path
) -> Stage:
    """The same on a Redis that may be killed."""
    case = event_clock_case(kafka_bootstrap, redis_url_of(store), names)
    return Stage.build(case, programs, tmp_path, worker__drain_deadline_s=DRAIN_DEADLINE_S)


def event_clock_case(kafka: str, redis_url: str, names: Names, clock: Clock = "event") -> Case:
    return Case(kafka, redis_url, names, SEGMENTS, WEIGHTS, clock)


# --- signals -----------------------------------------------------------------------------------------------


def test_sigterm_finishes_the_work_in_hand_and_tells_kafka_how_far_it_got(
    stage: Stage, record_property: Callable[[str, object], None]
) -> None:
    total = stage.send(synthetic_events(SEED, EVENTS))
    worker = stage.start("worker")
    worker.wait_until(lambda: stage.folded() > 1_000, 30, "at work")
    asked_s = time.monotonic()
    worker.terminate()
    assert worker.wait(DRAIN_DEADLINE_S + EXIT_SLACK_S) == 0, worker.log
    record_property("seconds to end", time.monotonic() - asked_s)
    watermarks = stage.watermarks()
    assert sum(watermarks.values()) < total, "the worker was done before it was asked to stop"
    assert stage.committed() == watermarks
    with redis.Redis.from_url(stage.case.redis_url) as client:
        assert [client.xlen(f"sa:{{{p}}}:outbox") for p in range(PARTITIONS)] == [0] * PARTITIONS
    stage.run("worker", "--until-end")
    assert stage.committed() == stage.log_ends()
    proof = stage.proven(record_property)
    assert proof.transitions > 1_000
    assert proof.repeats == 0
    assert proof.replayed == 0


def test_sigterm_while_redis_is_gone_ends_within_the_deadline_and_says_why(
    fragile_stage: Stage, store: Server
) -> None:
    fragile_stage.send(synthetic_events(SEED, EVENTS))
    worker = fragile_stage.start("worker", worker__hold_deadline_s=60)
    worker.wait_until(lambda: fragile_stage.folded() > 500, 30, "at work")
    kill_server(store)
    worker.wait_until(lambda: "held, Redis" in worker.log, 20, "held")
    worker.terminate()
    assert worker.wait(DRAIN_DEADLINE_S + EXIT_SLACK_S) == 1, worker.log
    last = worker.log.strip().splitlines()[-1]
    assert last.startswith("Redis, ")
    assert "Operator action: Bring the service back; nothing was acknowledged" in last


# --- a Redis that is away ----------------------------------------------------------------------------------


def test_a_worker_whose_redis_was_lost_is_unready_but_alive_and_then_folds_the_log_again(
    fragile_stage: Stage,
    store: Server,
    redis_server: Callable[..., Server],
    record_property: Callable[[str, object], None],
) -> None:
    stage, port = fragile_stage, free_port()
    total = stage.send(synthetic_events(SEED, EVENTS))
    worker = stage.start("worker", "--until-end", worker__http_port=port, worker__hold_deadline_s=30)
    worker.wait_until(lambda: stage.folded() > 0.3 * total, 40, "past 30 %")
    assert probe(port, "readyz") == (200, "ok\n")
    kill_server(store)
    worker.wait_until(lambda: probe(port, "readyz")[0] == 503, 20, "unready")
    status, why = probe(port, "readyz")
    assert status == 503
    assert "is held: Redis" in why
    assert probe(port, "livez") == (200, "ok\n")
    redis_server(port=store.port)
    worker.wait_until(lambda: probe(port, "readyz")[0] == 200, 20, "ready again")
    assert worker.wait(60) == 0, worker.log
    proof = stage.proven(record_property)
    assert proof.replayed > 100
    assert proof.repeats > 100


def test_a_worker_gives_up_with_a_sentence_when_redis_stays_away(
    fragile_stage: Stage, store: Server, record_property: Callable[[str, object], None]
) -> None:
    hold_s = 2.0
    fragile_stage.send(synthetic_events(SEED, EVENTS))
    worker = fragile_stage.start("worker", worker__hold_deadline_s=hold_s)
    worker.wait_until(lambda: fragile_stage.folded() > 500, 30, "at work")
    kill_server(store)
    gone_s = time.monotonic()
    assert worker.wait(hold_s + 5 + EXIT_SLACK_S) == 1
    record_property("seconds to give up", time.monotonic() - gone_s)
    assert time.monotonic() - gone_s >= hold_s
    last = worker.log.strip().splitlines()[-1]
    assert f"expected the partition to go on within {hold_s:g} s (worker.hold_deadline_s)" in last
    assert "Redis" in last
    assert "Operator action:" in last


def test_until_end_ends_although_redis_was_lost_when_a_partition_was_already_done(
    stage: Stage, record_property: Callable[[str, object], None]
) -> None:
    events = synthetic_events(SEED, EVENTS)
    of_partition = _by_partition(stage, events)
    small, *large = sorted(of_partition, key=lambda p: len(of_partition[p]))
    stage.send(of_partition[small][:50])
    rest = stage.send(event for p in large for event in of_partition[p])
    worker = stage.start("worker", "--until-end")

    def half_way() -> bool:
        watermarks = stage.watermarks()
        return watermarks[small] == 50 and sum(watermarks.values()) > 0.4 * rest

    worker.wait_until(half_way, 30, "half-way")
    flush(stage)
    assert worker.wait(60) == 0, worker.log
    assert stage.watermarks() == stage.log_ends()
    assert stage.proven(record_property).replayed > 0


def _by_partition(stage: Stage, events: Iterable[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {p: [] for p in range(stage.partitions)}
    for event in events:
        found[partition_of(event["user_id"].encode(), stage.partitions)].append(event)
    return found


def flush(stage: Stage) -> None:
    with redis.Redis.from_url(stage.case.redis_url) as client:
        client.flushdb()


# --- a Redis that is meddled with --------------------------------------------------------------------------


def test_redis_flushed_under_an_idle_worker_is_folded_again_without_a_new_event(
    stage: Stage, record_property: Callable[[str, object], None]
) -> None:
    stage.send(synthetic_events(SEED, EVENTS))
    ends = stage.log_ends()
    worker = stage.start("worker")
    worker.wait_until(lambda: stage.is_done(ends), 40, "done")
    flush(stage)
    worker.wait_until(lambda: stage.is_done(ends), 30, "done again")
    worker.terminate()
    assert worker.wait(DRAIN_DEADLINE_S + EXIT_SLACK_S) == 0, worker.log
    proof = stage.proven(record_property)
    assert proof.repeats == proof.transitions
    assert proof.replayed == proof.transitions


def test_a_lost_watermark_is_not_folded_twice_into_the_profiles_that_are_left(
    stage: Stage, record_property: Callable[[str, object], None]
) -> None:
    stage.send(synthetic_events(SEED, EVENTS))
    ends = stage.log_ends()
    worker = stage.start("worker")
    worker.wait_until(lambda: stage.is_done(ends), 40, "done")
    with redis.Redis.from_url(stage.case.redis_url) as client:
        client.delete("sa:{1}:wm")
    assert worker.wait(40) == 1, worker.log
    last = worker.log.strip().splitlines()[-1]
    assert "sa:{1}:" in last
    assert "stream-app rebuild" in last
    flush(stage)
    stage.run("worker", "--until-end")
    stage.proven(record_property)


def test_a_commit_number_that_somebody_raised_is_read_again(
    stage: Stage, record_property: Callable[[str, object], None]
) -> None:
    total = stage.send(synthetic_events(SEED, EVENTS))
    worker = stage.start("worker", "--until-end")
    raised = 0
    with redis.Redis.from_url(stage.case.redis_url) as client:
        for share in (0.1, 0.3, 0.5):
            worker.wait_until(lambda share=share: stage.folded() > share * total, 40, f"past {share:.0%}")  # type: ignore[misc]
            for p in range(PARTITIONS):
                raised += int(client.hincrby(f"sa:{{{p}}}:wm", "commit", 1) > 0)
    assert worker.wait(60) == 0, worker.log
    assert raised == 3 * PARTITIONS
    assert "expected commit number" in worker.log
    assert sum(claims(worker).values()) > PARTITIONS
    assert stage.proven(record_property).replayed == 0


def test_a_worker_that_is_fenced_asks_kafka_and_claims_its_partition_again(
    stage: Stage, record_property: Callable[[str, object], None]
) -> None:
    port = free_port()
    total = stage.send(synthetic_events(SEED, EVENTS))
    worker = stage.start("worker", "--until-end", worker__http_port=port)
    epochs = []
    for share in (0.1, 0.3, 0.5):
        worker.wait_until(lambda share=share: stage.folded() > share * total, 40, f"past {share:.0%}")  # type: ignore[misc]
        epochs.append(asyncio.run(_intrude(stage, 0)))
        worker.wait_until(
            lambda: int(stage.wm(0).get("epoch", 0)) > epochs[-1], 20, "claimed by the worker again"
        )
    assert metrics(port)[("stream_app_holds_total", "Fenced")] >= 1
    assert worker.wait(60) == 0, worker.log
    assert claims(worker)[1] == claims(worker)[2] == 1, "the others were not disturbed"
    assert int(stage.wm(0)["epoch"]) == 7
    proof = stage.proven(record_property)
    assert proof.replayed == 0


async def _intrude(stage: Stage, partition: int) -> int:
    """Claim a partition as another worker would; returns the epoch."""
    wm = stage.wm(partition)
    identity = Identity(
        wm["cluster_id"], wm["topic"], int(wm["partitions"]), wm["group"], wm["clock"], wm["weights"]
    )
    client = connect(stage.case.redis_url)
    try:
        claim = await ProfileStore(client, "another worker").claim(
            partition,
            identity,
            last_epoch=0,
            log_start=0,
            processed_below=None,
            replay_when_new=None,
            definitions=(wm["definitions"], stage.definitions(partition)),
        )
    finally:
        await client.aclose()
    return claim.watermark.epoch


def test_metrics_count_what_happened(stage: Stage) -> None:
    port = free_port()
    events = synthetic_events(SEED, 3_000)
    stage.send(events)
    stage.send([{**events[0], "timestamp": None}, {**events[0], "user_id": ""}])
    ends = stage.log_ends()
    worker = stage.start("worker", worker__http_port=port)
    worker.wait_until(lambda: stage.is_done(ends), 40, "done")
    lag = "stream_app_lag_records"
    worker.wait_until(
        lambda: [metrics(port).get((lag, str(p))) for p in range(PARTITIONS)] == [0.0] * PARTITIONS,
        10,
        "seen",
    )
    counted = metrics(port)
    names = stage.case.names
    said = asyncio.run(read_to_end(stage.case.kafka, names.entered, names.exited))
    causes = Counter((record.topic, json.loads(record.value)["cause"]) for record in said)
    assert counted[("stream_app_events_total",)] == len(events)
    assert counted[("stream_app_dead_letters_total", "type")] == 1
    assert counted[("stream_app_dead_letters_total", "range")] == 1
    assert counted[("stream_app_partitions",)] == PARTITIONS
    assert causes[(names.entered, "event")] > 100
    assert {key[1:]: n for key, n in counted.items() if key[0] == "stream_app_transitions_total"} == {
        (cause, "entered" if topic == names.entered else "exited"): n for (topic, cause), n in causes.items()
    }


def metrics(port: int) -> dict[tuple[str, ...], float]:
    """All counters and gauges of a worker, by name and the values of its labels in the labels' order."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(probe(port, "metrics")[1])
        for sample in family.samples
    }


# --- a log with transactions -------------------------------------------------------------------------------


def test_what_a_producer_aborted_is_never_folded_and_does_not_stop_the_watermark(
    stage: Stage, kafka_kind: Kind, record_property: Callable[[str, object], None]
) -> None:
    if kafka_kind == "embedded":
        pytest.skip("the embedded broker has no transactions")
    events = synthetic_events(SEED, EVENTS)
    aborted = asyncio.run(_send_in_transactions(stage, events))
    worker = stage.start("worker", "--until-end")
    assert worker.wait(60) == 0, worker.log
    ends = stage.log_ends()
    assert stage.watermarks() == stage.committed() == ends
    assert sum(ends.values()) > len(events), "markers take offsets too"
    proof = stage.proven(record_property)
    assert proof.events == len(events) - aborted
    assert proof.transitions > 300


async def _send_in_transactions(stage: Stage, events: Sequence[Mapping[str, Any]]) -> int:
    """Send events in transactions of 40, two producers in turn, every third aborted; returns how many."""
    names, aborted = stage.case.names, 0
    async with AsyncExitStack() as stack:
        producers = [
            await stack.enter_async_context(
                AIOKafkaProducer(
                    bootstrap_servers=stage.case.kafka, transactional_id=f"{names.group}-{n}", linger_ms=1
                )
            )
            for n in range(2)
        ]
        pages = [events[start : start + 40] for start in range(0, len(events), 40)]
        for n, two in enumerate(zip(pages[::2], pages[1::2], strict=True)):
            for producer in producers:
                await producer.begin_transaction()
            for one, other in zip(*two, strict=True):  # interleaved in the log
                for producer, event in zip(producers, (one, other), strict=True):
                    await producer.send(
                        names.events, key=event["user_id"].encode(), value=json.dumps(event).encode()
                    )
            for m, (producer, page) in enumerate(zip(producers, two, strict=True)):
                if (n + m) % 3 == 0:
                    await producer.flush()  # or the records of an aborted transaction would never be sent
                    await producer.abort_transaction()
                    aborted += len(page)
                else:
                    await producer.commit_transaction()
    return aborted
