"""Bad records among good ones, through the real worker: set aside one by one, and nothing else changes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
from aiokafka import AIOKafkaProducer, ConsumerRecord

from stream_app.adapters.codec import Decoder, InvalidEvent
from tests.backends import Names, create_topic, read_to_end
from tests.e2e import proof as e2e_proof
from tests.e2e.proof import Case
from tests.integration.stage import (
    SEGMENTS,
    WEIGHTS,
    Stage,
    claims,
    event_clock_case,
    synthetic_events,
)
from tests.oracle import records_by_partition
from tests.poison import BAD_EXAMPLES, MSGPACK, Headers, poison_records, valid_event
from tests.processes import Programs

SEED = 20_261_122
POISON = 2_000
VALID = 3_000
KEPT_BYTES = 65_536
LARGEST_BYTES = 12_000_000
FIELDS = {"", "key", "event_id", "user_id", "event_type", "timestamp", "asset_id", "labels", "value"}
#: What must never be seen in a log; users, labels, assets and ids are marked with it.
MARK = "do-not-log-me"
NUMBER = "test-number"


@dataclass(frozen=True, slots=True)
class Sent:
    """One record of the log; `reason` is None for a valid one, "" for one that is bad for whatever reason."""

    key: bytes | None
    value: bytes | None
    headers: Headers
    reason: str | None


@pytest.fixture
def stage(kafka_bootstrap: str, fresh_redis: str, names: Names, programs: Programs, tmp_path: Path) -> Stage:
    limits = {"message.timestamp.type": "LogAppendTime", "max.message.bytes": str(LARGEST_BYTES)}
    asyncio.run(create_topic(kafka_bootstrap, names.events, partitions=3, config=limits))
    return Stage.build(event_clock_case(kafka_bootstrap, fresh_redis, names), programs, tmp_path)


def valid_records() -> Iterator[Sent]:
    """Ordinary events and odd ones that are legal, as JSON and as msgpack."""
    for n, event in enumerate(synthetic_events(SEED, VALID, users=120, step_s=20.0)):
        marked = {
            **event,
            "event_id": f"{MARK}-{event['event_id']}",
            "user_id": (f"{MARK}-{event['user_id']}", f"{{{MARK}}} {event['user_id']} 🛒")[n % 2],
            "labels": [*event["labels"], f"{MARK}-label"],
        }
        if n % 10 == 0:
            marked["labels"] += [f"l{i}" for i in range(64 - len(marked["labels"]))]
        if n % 11 == 0:
            marked |= {"value": 12.5, "context": {"page": MARK, "path": [[[]]]}}
        key = marked["user_id"].encode()
        if n % 3 == 0:
            yield Sent(key, msgpack.packb(marked), MSGPACK, None)
        else:
            yield Sent(key, json.dumps(marked, ensure_ascii=n % 2 == 0).encode(), (), None)


def bad_records() -> Iterator[Sent]:
    """All the examples, random poison, and every kind once more with marked user data."""
    for example in BAD_EXAMPLES:
        yield Sent(example.key, example.value, example.headers, example.reason)
    for poison in poison_records(SEED, POISON):
        yield Sent(*poison, "")
    marked = valid_event(
        event_id=f"{MARK}-e", user_id=f"{MARK}-u", labels=[f"{MARK}-l"], asset_id=f"{MARK}-a"
    )
    key = marked["user_id"].encode()
    for reason, changes in (
        ("type", {"value": MARK}),
        ("type", {"labels": MARK}),
        ("range", {"event_type": MARK * 10}),
        ("range", {"labels": [MARK * 10]}),
        ("range", {"event_id": MARK * 10}),
        ("text", {"asset_id": f"{MARK}\x00"}),
        ("time", {"timestamp": MARK}),
        ("future", {"timestamp": "9999-01-01T00:00:00Z"}),
        ("time", {"timestamp": "0001-01-01T00:00:00Z"}),
    ):
        yield Sent(key, json.dumps(marked | changes).encode(), (), reason)
        yield Sent(key, msgpack.packb(marked | changes), MSGPACK, reason)
    yield Sent(MARK.encode(), json.dumps(marked).encode(), (), "key")
    yield Sent(None, json.dumps(marked).encode(), (), "key")
    yield Sent(key, None, (), "undecodable")
    yield Sent(key, json.dumps(marked).encode()[:-1], (), "undecodable")
    yield Sent(key, json.dumps(marked).encode().ljust(10_000_000), (), "size")


async def send_raw(stage: Stage, records: Sequence[Sent]) -> None:
    """Append records as they are, each with its number in a header that nobody reads but this test."""
    async with AIOKafkaProducer(
        bootstrap_servers=stage.case.kafka, acks="all", linger_ms=5, max_request_size=LARGEST_BYTES
    ) as producer:
        sent = [
            await producer.send(
                stage.case.names.events,
                key=record.key,
                value=record.value,
                headers=[*record.headers, (NUMBER, str(number).encode())],
            )
            for number, record in enumerate(records)
        ]
        await asyncio.gather(*sent)


def read(stage: Stage, topic: str) -> list[ConsumerRecord]:
    return asyncio.run(read_to_end(stage.case.kafka, topic))


def test_every_bad_record_is_set_aside_once_and_nothing_else_changes(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    print(f"seed {SEED}")
    records = [*valid_records(), *bad_records()]
    # Bad ones come between good ones; the good ones keep their order.
    positions = sorted(random.Random(SEED).sample(range(len(records)), VALID))
    good, bad = iter(records[:VALID]), iter(records[VALID:])
    wanted = set(positions)
    records = [next(good) if n in wanted else next(bad) for n in range(len(records))]
    asyncio.run(send_raw(stage, records))
    ends = stage.log_ends()
    assert sum(ends.values()) == len(records)

    worker = stage.start("worker")
    pid = worker.pid
    worker.wait_until(lambda: stage.watermarks() == ends, 90, "done")
    worker.terminate()
    assert worker.wait(20) == 0, worker.log
    assert worker.pid == pid
    assert claims(worker) == {0: 1, 1: 1, 2: 1}, "something made it begin again"
    assert "held" not in worker.log

    log = read(stage, stage.case.names.events)
    sent = {(raw.partition, raw.offset): records[int(dict(raw.headers)[NUMBER])] for raw in log}
    check_dead_letters(stage, log, sent)
    check_nothing_private(worker.log, records)
    monkeypatch.setattr(
        e2e_proof, "records_by_partition", lambda log: records_by_partition(as_json(log, sent))
    )
    proof = stage.proven(record_property)
    record_property("dead letters", len(records) - VALID)
    assert proof.transitions > 500
    assert proof.repeats == 0


def check_dead_letters(
    stage: Stage, log: Iterable[ConsumerRecord], sent: Mapping[tuple[int, int], Sent]
) -> None:
    names = stage.case.names
    letters: dict[tuple[int, int], ConsumerRecord] = {}
    for letter in read(stage, names.dead_letter):
        headers = {name: value.decode() for name, value in letter.headers}
        place = int(headers["sa_partition"]), int(headers["sa_offset"])
        assert place not in letters, f"{place} was set aside twice"
        letters[place] = letter
    bad = [raw for raw in log if sent[raw.partition, raw.offset].reason is not None]
    assert letters.keys() == {(raw.partition, raw.offset) for raw in bad}
    decoder = Decoder(max_future_skew_s=300.0)
    for raw in bad:
        record = sent[raw.partition, raw.offset]
        letter = letters[raw.partition, raw.offset]
        whole = record.value or b""
        headers = {name: value.decode() for name, value in letter.headers}
        judged = decoder.decode(
            key=raw.key, value=raw.value, headers=raw.headers, kafka_time_ms=raw.timestamp, now_ms=None
        )
        assert isinstance(judged, InvalidEvent)
        assert headers == {
            "sa_reason": record.reason or judged.reason,
            "sa_field": judged.field,
            "sa_topic": names.events,
            "sa_partition": str(raw.partition),
            "sa_offset": str(raw.offset),
            "sa_length": str(len(whole)),
            "sa_sha256": hashlib.sha256(whole).hexdigest(),
        }
        assert headers["sa_field"] in FIELDS
        assert letter.key == record.key
        assert letter.value == (None if record.value is None else record.value[:KEPT_BYTES])
    reasons = Counter(dict(letter.headers)["sa_reason"].decode() for letter in letters.values())
    print(f"dead letters {len(letters)} {dict(reasons)}")
    assert reasons.keys() == {example.reason for example in BAD_EXAMPLES}


def check_nothing_private(text: str, records: Iterable[Sent]) -> None:
    """Fail if a log shows anything of what is in records: no marked text, and no text of any that is long."""
    assert MARK not in text
    for record in records:
        for found in _texts(record):
            assert found not in text, "user data in the log"


def _texts(record: Sent) -> Iterator[str]:
    """Yield the texts of a record that are long enough not to be met by chance."""
    try:
        event = msgpack.unpackb(record.value) if record.headers else json.loads(record.value or b"")
    except (ValueError, RecursionError, msgpack.UnpackException):
        return
    if not isinstance(event, dict):
        return
    for value in event.values():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and len(text) > 7:
                yield text


def as_json(log: Iterable[ConsumerRecord], sent: Mapping[tuple[int, int], Sent]) -> Iterator[Any]:
    """Yield the valid records of the log, all as JSON, for the oracle, which reads nothing else."""
    for raw in log:
        record = sent[raw.partition, raw.offset]
        if record.reason is None:
            event = msgpack.unpackb(record.value) if record.headers else json.loads(record.value or b"")
            yield SimpleNamespace(
                topic=raw.topic,
                partition=raw.partition,
                offset=raw.offset,
                timestamp=raw.timestamp,
                key=raw.key,
                value=json.dumps(event).encode(),
            )


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


def test_a_flood_of_bad_records_stops_the_worker_where_a_limit_is_set_and_loses_nothing(
    kafka_bootstrap: str, fresh_redis: str, names: Names, programs: Programs, tmp_path: Path
) -> None:
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

    stage.run("worker", "--until-end")
    offsets = [int(dict(letter.headers)["sa_offset"]) for letter in read(stage, names.dead_letter)]
    assert sorted(set(offsets)) == list(range(valid, valid + bad))
    assert len(offsets) - bad <= 500, "at most the last step before the end was said again"
