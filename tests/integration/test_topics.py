"""`stream-app topics`, and the questions that it and the worker ask the broker."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from stream_app.adapters.kafka_admin import KafkaAdmin, KafkaUnavailable, TopicMissing, TopicSpec
from stream_app.cli import main
from stream_app.errors import StreamAppError
from tests.backends import ROOT, Kind, Names, create_topic


@pytest.fixture
def environment(kafka_bootstrap: str, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped configuration with this test's broker and topics."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("STREAM_APP__KAFKA__BOOTSTRAP_SERVERS", kafka_bootstrap)
    for name, value in names.environment().items():
        monkeypatch.setenv(name, value)


async def write_batches(bootstrap: str, topic: str, *sizes: int) -> None:
    """Write one batch of each size to partition 0."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all")
    await producer.start()
    try:
        for size in sizes:
            batch = producer.create_batch()
            for _ in range(size):
                batch.append(timestamp=None, key=b"k", value=b"v")
            await (await producer.send_batch(batch, topic, partition=0))
    finally:
        await producer.stop()


# --- the command -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("environment")
def test_topics_are_created_once_and_then_exist(names: Names, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topics", "--partitions", "3", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["topics"]
    assert [row["name"] for row in first] == [names.events, names.entered, names.exited, names.dead_letter]
    assert {(row["state"], row["partitions"]) for row in first} == {("created", 3)}
    assert first[0]["timestamp_type"] == "LogAppendTime"
    assert main(["topics", "--json"]) == 0
    second = json.loads(capsys.readouterr().out)["topics"]
    assert {(row["state"], row["partitions"]) for row in second} == {("exists", 3)}


@pytest.mark.usefixtures("environment")
def test_what_is_missing_gets_as_many_partitions_as_the_events_have(
    kafka_bootstrap: str, names: Names, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["topics", "--partitions", "2"]) == 0
    monkeypatched = {"STREAM_APP__KAFKA__DEAD_LETTER_TOPIC": f"{names.dead_letter}-2"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in monkeypatched.items():
            patch.setenv(name, value)
        capsys.readouterr()
        assert main(["topics", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["topics"]
    assert [(row["state"], row["partitions"]) for row in rows] == [("exists", 2)] * 3 + [("created", 2)]


@pytest.mark.usefixtures("environment")
def test_another_number_of_partitions_is_named_for_each_topic(
    names: Names, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["topics", "--partitions", "2"]) == 0
    capsys.readouterr()
    assert main(["topics", "--partitions", "5"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 4
    assert err[0].startswith(f"topic {names.events}, partitions: expected 5, as asked for, got 2.")


@pytest.mark.usefixtures("environment")
def test_producers_timestamps_are_refused_with_the_wall_clock_unless_trusted(
    names: Names, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kafka_bootstrap: str
) -> None:
    asyncio.run(create_topic(kafka_bootstrap, names.events, 1, {"message.timestamp.type": "CreateTime"}))
    assert main(["topics"]) == 1
    assert "expected message.timestamp.type=LogAppendTime" in capsys.readouterr().err
    monkeypatch.setenv("STREAM_APP__WORKER__TRUST_CREATE_TIME", "true")
    assert main(["topics"]) == 0


@pytest.mark.usefixtures("environment")
def test_a_dead_letter_topic_that_is_too_small_is_named(
    names: Names, capsys: pytest.CaptureFixture[str], kafka_bootstrap: str
) -> None:
    asyncio.run(create_topic(kafka_bootstrap, names.dead_letter, 1, {"max.message.bytes": "100000"}))
    assert main(["topics", "--partitions", "1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"topic {names.dead_letter}, max.message.bytes: expected at least ")
    assert "got 100000. Operator action: Run kafka-configs.sh" in line


# --- the questions -----------------------------------------------------------------------------------------


async def test_asking_for_a_topic_does_not_create_it(kafka_bootstrap: str, names: Names) -> None:
    async with KafkaAdmin(kafka_bootstrap) as admin:
        with pytest.raises(TopicMissing, match=f"topic '{names.events}' to exist.*stream-app topics"):
            await admin.end_offsets(names.events)
        assert names.events not in await admin.partition_counts()


async def test_creating_a_topic_that_exists_is_no_error_and_not_said_to_be_created(
    kafka_bootstrap: str, names: Names
) -> None:
    specs = [TopicSpec(names.events, 2), TopicSpec(names.entered, 1, {"retention.ms": "1000"})]
    async with KafkaAdmin(kafka_bootstrap) as admin:
        assert await admin.create_topics(specs[:1]) == [names.events]
        assert await admin.create_topics(specs) == [names.entered]
        counts = await admin.partition_counts()
        assert (counts[names.events], counts[names.entered]) == (2, 1)
        configs = await admin.topic_configs([names.events, names.entered])
        assert configs[names.entered]["retention.ms"] == "1000"


async def test_an_impossible_topic_is_refused_with_kafkas_reason(
    kafka_bootstrap: str, names: Names, kafka_kind: Kind, request: pytest.FixtureRequest
) -> None:
    if kafka_kind == "embedded":
        reason = "the embedded broker takes any setting"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    async with KafkaAdmin(kafka_bootstrap) as admin:
        with pytest.raises(StreamAppError, match="InvalidConfig"):
            await admin.create_topics([TopicSpec(names.events, 1, {"max.message.bytes": "many"})])


async def test_the_end_of_a_log_is_behind_the_last_record_of_the_last_batch(
    kafka_bootstrap: str, names: Names
) -> None:
    await create_topic(kafka_bootstrap, names.events, 2)
    async with KafkaAdmin(kafka_bootstrap) as admin:
        assert await admin.end_offsets(names.events) == {0: 0, 1: 0}
        await write_batches(kafka_bootstrap, names.events, 1, 7, 100)
        assert await admin.end_offsets(names.events) == {0: 108, 1: 0}


async def test_a_group_counts_its_members_until_they_have_left(kafka_bootstrap: str, names: Names) -> None:
    await create_topic(kafka_bootstrap, names.events, 2)
    consumer = AIOKafkaConsumer(
        names.events,
        bootstrap_servers=kafka_bootstrap,
        group_id=names.group,
        session_timeout_ms=6000,
        enable_auto_commit=False,
    )
    async with KafkaAdmin(kafka_bootstrap) as admin:
        assert await admin.group_member_count(names.group) == 0
        await consumer.start()
        try:
            assert await admin.group_member_count(names.group) == 1
        finally:
            await consumer.stop()
        deadline = time.monotonic() + 20  # the embedded broker waits for the session to time out
        while await admin.group_member_count(names.group):
            assert time.monotonic() < deadline, "the member that left is still counted"
            await asyncio.sleep(0.2)


async def test_the_cluster_tells_its_id(kafka_bootstrap: str) -> None:
    async with KafkaAdmin(kafka_bootstrap) as admin:
        cluster = await admin.cluster()
    assert cluster.cluster_id
    assert cluster.brokers >= 1


async def test_a_kafka_that_is_not_there_is_a_sentence_after_the_deadline() -> None:
    with pytest.raises(
        KafkaUnavailable, match=r"127\.0\.0\.1:1: expected an answer within 0\.2 s, got no connection"
    ):
        async with KafkaAdmin("127.0.0.1:1", timeout_s=0.2):
            pass
