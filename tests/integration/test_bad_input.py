"""Bad records among good ones, through the real worker: set aside one by one, and nothing else changes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from tests.backends import Names, create_topic
from tests.e2e.proof import Case, prove
from tests.faults.rows import Row
from tests.integration.bad_records import LIMITS, Sent, bad_records, check_set_aside, read, send_raw
from tests.integration.stage import SEGMENTS, WEIGHTS, Stage, event_clock_case, synthetic_events
from tests.poison import valid_event
from tests.processes import Programs

SEED = 20_261_122


@pytest.fixture
def stage(kafka_bootstrap: str, fresh_redis: str, names: Names, programs: Programs, tmp_path: Path) -> Stage:
    asyncio.run(create_topic(kafka_bootstrap, names.events, partitions=3, config=LIMITS))
    return Stage.build(event_clock_case(kafka_bootstrap, fresh_redis, names), programs, tmp_path)


def test_every_bad_record_is_set_aside_once_and_nothing_else_changes(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    print(f"seed {SEED}")
    proof = check_set_aside(stage, SEED, bad_records(SEED), monkeypatch)
    proof.holds()
    record_property("dead letters", proof.dead_letters)
    assert proof.transitions > 500
    assert proof.repeats == 0


def test_a_kafka_timestamp_ahead_of_now_is_set_aside_and_does_not_move_stream_time(
    kafka_bootstrap: str, fresh_redis: str, names: Names, programs: Programs, tmp_path: Path
) -> None:
    asyncio.run(create_topic(kafka_bootstrap, names.events, config={"message.timestamp.type": "CreateTime"}))
    stage = Stage.build(
        Case(kafka_bootstrap, fresh_redis, names, SEGMENTS, WEIGHTS, "wall"),
        programs,
        tmp_path,
        partitions=1,
        worker__trust_create_time=True,
    )
    now_ms = time.time_ns() // 1_000_000
    stamps = [now_ms - 5_000, now_ms + 600_000, now_ms + 60_000, now_ms]

    async def send_stamped() -> None:
        async with AIOKafkaProducer(bootstrap_servers=kafka_bootstrap) as producer:
            for n, stamp_ms in enumerate(stamps):
                value = json.dumps(valid_event(event_id=f"e{n}", timestamp=stamp_ms / 1000)).encode()
                await producer.send_and_wait(names.events, value, key=b"u1", timestamp_ms=stamp_ms)

    asyncio.run(send_stamped())
    stage.run("worker", "--until-end")
    (letter,) = read(stage, names.dead_letter)
    headers = {name: value.decode() for name, value in letter.headers}
    assert (headers["sa_reason"], headers["sa_field"], headers["sa_offset"]) == ("future", "", "1")
    assert int(stage.wm(0)["stream_time_ms"]) == now_ms + 60_000


@pytest.mark.faults
def test_a_flood_of_bad_records_stops_the_worker_where_a_limit_is_set_and_loses_nothing(
    kafka_bootstrap: str,
    fresh_redis: str,
    names: Names,
    programs: Programs,
    tmp_path: Path,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "a flood of bad records, with worker.max_dead_letter_share set",
        "the worker stops with a sentence before it sets everything aside; nothing is lost",
    )
    case = event_clock_case(kafka_bootstrap, fresh_redis, names)
    stage = Stage.build(case, programs, tmp_path, partitions=1)
    valid, bad = 2_000, 12_000
    good = [
        Sent(event["user_id"].encode(), json.dumps(event).encode(), (), None)
        for event in synthetic_events(SEED, valid)
    ]
    flood = [Sent(b"u1", b'{"event_id": "%d"}' % n, (), "missing") for n in range(bad)]
    asyncio.run(send_raw(stage, good + flood))

    worker = stage.start("worker", "--until-end", worker__max_dead_letter_share=0.6)
    assert worker.wait(60) == 1, worker.log
    last = worker.log.strip().splitlines()[-1]
    assert last.startswith("partition 0: expected at most 0.6 of the latest 1")
    assert "Operator action: Read the dead-letter topic" in last
    assert "worker.max_dead_letter_share" in last
    stopped_at = stage.watermarks()[0]
    assert valid + 6_000 < stopped_at < valid + bad, "it stops once more than 60 % of 10,000 were bad"
    assert stage.committed()[0] <= stopped_at, "nothing is acknowledged that was not set aside"
    row.note(f"stopped with exit 1 after {stopped_at - valid:,} of {bad:,} bad records")

    # Without a limit the next one sets them all aside and goes on: the limit is what stopped it.
    stage.run("worker", "--until-end")
    offsets = [int(dict(letter.headers)["sa_offset"]) for letter in read(stage, names.dead_letter)]
    assert sorted(set(offsets)) == list(range(valid, valid + bad))
    assert len(offsets) - bad <= 500, "at most the last step before the end was said again"
    row.judge(prove(stage.case))
    row.note("without the limit a worker sets all of them aside and ends well")
