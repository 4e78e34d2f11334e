"""Bad records among good ones, what has to become of them, and the judge of that."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
from aiokafka import AIOKafkaProducer, ConsumerRecord

from stream_app.adapters.codec import Decoder, InvalidEvent
from tests.backends import read_to_end
from tests.e2e import proof as e2e_proof
from tests.e2e.proof import Proof, prove
from tests.integration.stage import Stage, claims, synthetic_events
from tests.oracle import records_by_partition
from tests.poison import BAD_EXAMPLES, MSGPACK, Headers, poison_records, valid_event

POISON = 2_000
VALID = 3_000
KEPT_BYTES = 65_536
LARGEST_BYTES = 12_000_000
#: What the events topic has to take.
LIMITS = {"message.timestamp.type": "LogAppendTime", "max.message.bytes": str(LARGEST_BYTES)}
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


def valid_records(seed: int) -> Iterator[Sent]:
    """Ordinary events and odd ones that are legal, as JSON and as msgpack."""
    for n, event in enumerate(synthetic_events(seed, VALID, users=120, step_s=20.0)):
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


def bad_records(seed: int) -> Iterator[Sent]:
    """All the examples, random poison, and every kind once more with marked user data."""
    for example in BAD_EXAMPLES:
        yield Sent(example.key, example.value, example.headers, example.reason)
    for poison in poison_records(seed, POISON):
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


def check_set_aside(stage: Stage, seed: int, bad: Iterable[Sent], monkeypatch: pytest.MonkeyPatch) -> Proof:
    """Send bad records among good ones and fail unless each is set aside once and the rest is as if alone.

    The good ones keep their order. Returns what the oracle says of them; the dead letters are judged here.
    """
    records = [*valid_records(seed), *bad]
    positions = set(random.Random(seed).sample(range(len(records)), VALID))
    good_ones, bad_ones = iter(records[:VALID]), iter(records[VALID:])
    records = [next(good_ones) if n in positions else next(bad_ones) for n in range(len(records))]
    asyncio.run(send_raw(stage, records))
    ends = stage.log_ends()
    assert sum(ends.values()) == len(records)

    worker = stage.start("worker")
    worker.wait_until(lambda: stage.watermarks() == ends, 120, "done")
    worker.terminate()
    assert worker.wait(20) == 0, worker.log
    assert claims(worker) == dict.fromkeys(ends, 1), "something made it begin again"
    assert "held" not in worker.log

    log = read(stage, stage.case.names.events)
    sent = {(raw.partition, raw.offset): records[int(dict(raw.headers)[NUMBER])] for raw in log}
    check_dead_letters(stage, log, sent)
    check_nothing_private(worker.log, records)
    monkeypatch.setattr(
        e2e_proof, "records_by_partition", lambda log: records_by_partition(as_json(log, sent))
    )
    return prove(stage.case)


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
