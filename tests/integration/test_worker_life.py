"""What a worker lives through: signals, a Redis that goes, comes back or is meddled with, another owner."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from aiokafka import AIOKafkaProducer
from prometheus_client.parser import text_string_to_metric_families

from stream_app.adapters.profile_store import Identity, ProfileStore, connect
from stream_app.core.partitioner import partition_of
from stream_app.embedded import Server
from stream_app.embedded.servers import free_port
from tests.backends import Kind, Names, read_to_end, redis_url_of
from tests.e2e.proof import Case, prove
from tests.faults.rows import Row
from tests.integration.stage import (
    DRAIN_DEADLINE_S,
    EVENTS,
    EXIT_SLACK_S,
    PARTITIONS,
    SEED,
    Stage,
    claims,
    event_clock_case,
    flush,
    kill_server,
    probe,
    synthetic_events,
)
from tests.processes import Programs


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


@pytest.mark.faults
def test_what_a_producer_aborted_is_never_folded_and_does_not_stop_the_watermark(
    stage: Stage, kafka_kind: Kind, tmp_path: Path, fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(
        "a transactional producer that aborts every third time", "what was aborted is never folded"
    )
    if kafka_kind == "embedded":
        pytest.skip("the embedded broker has no transactions")
    events = synthetic_events(SEED, EVENTS)
    aborted = asyncio.run(_send_in_transactions(stage, events))
    worker = stage.start("worker", "--until-end")
    assert worker.wait(60) == 0, worker.log
    ends = stage.log_ends()
    assert stage.watermarks() == stage.committed() == ends
    assert sum(ends.values()) > len(events), "markers take offsets too"
    proof = row.judge(prove(stage.case))
    assert proof.events == len(events) - aborted
    assert proof.transitions > 300
    flush(stage)
    (tmp_path / "control").mkdir()
    case = replace(stage.case, names=Names.unique())
    control = Stage.build(case, stage.programs, tmp_path / "control")
    asyncio.run(_send_in_transactions(control, events))
    worker = control.start_faulty("worker", "--until-end", without=["committed"])
    assert worker.wait(60) == 0, worker.log
    row.control("read_committed off", prove(control.case))


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
