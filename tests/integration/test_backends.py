"""What the tests themselves stand on: the servers they asked for, and the truth about a topic's end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import redis
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from stream_app.embedded import Server
from tests.backends import (
    Kind,
    Names,
    create_topic,
    empty_redis,
    kind_of,
    log_ends,
    read_to_end,
    redis_url_of,
)


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"TEST_BACKEND": "embedded"}, "embedded"),
        ({"TEST_BACKEND": "apache"}, "apache"),
        ({}, "environment"),
    ],
)
def test_what_test_backend_names_wins_over_named_servers(environment: dict[str, str], kind: Kind) -> None:
    assert kind_of("127.0.0.1:9092", environment) == kind


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'rabbitmq'"):
        kind_of(None, {"TEST_BACKEND": "rabbitmq"})


async def test_the_end_of_a_log_counts_every_record_of_its_last_batch(
    kafka_bootstrap: str, names: Names
) -> None:
    await create_topic(kafka_bootstrap, names.events, partitions=3)
    producer = AIOKafkaProducer(bootstrap_servers=kafka_bootstrap, acks="all")
    await producer.start()
    try:
        for records in (1, 100):
            batch = producer.create_batch()
            for number in range(records):
                batch.append(key=None, value=b"%d" % number, timestamp=None)
            batch.close()
            await (await producer.send_batch(batch, names.events, partition=1))
    finally:
        await producer.stop()
    assert await log_ends(kafka_bootstrap, names.events) == {0: 0, 1: 101, 2: 0}
    assert [record.offset for record in await read_to_end(kafka_bootstrap, names.events)] == list(range(101))


async def test_a_record_of_ten_megabytes_is_kept(kafka_bootstrap: str, names: Names) -> None:
    await create_topic(kafka_bootstrap, names.events)
    producer = AIOKafkaProducer(bootstrap_servers=kafka_bootstrap, max_request_size=11_000_000)
    await producer.start()
    try:
        await producer.send_and_wait(names.events, b"x" * 10_000_000)
    finally:
        await producer.stop()
    (record,) = await read_to_end(kafka_bootstrap, names.events)
    assert len(record.value) == 10_000_000


async def test_a_group_of_one_has_its_partitions_within_seconds(kafka_bootstrap: str, names: Names) -> None:
    await create_topic(kafka_bootstrap, names.events, partitions=4)
    consumer = AIOKafkaConsumer(
        names.events, bootstrap_servers=kafka_bootstrap, group_id=names.group, session_timeout_ms=6000
    )
    try:
        async with asyncio.timeout(10):
            await consumer.start()
        assert len(consumer.assignment()) == 4
    finally:
        await consumer.stop()


def test_a_fresh_redis_is_empty(fresh_redis: str) -> None:
    with redis.Redis.from_url(fresh_redis) as client:
        assert client.dbsize() == 0
        client.set("left by this test", "1")


def test_nothing_of_the_test_before_is_left(fresh_redis: str) -> None:
    with redis.Redis.from_url(fresh_redis) as client:
        assert client.dbsize() == 0


def test_on_a_server_of_others_only_an_empty_database_is_used(redis_server: Callable[..., Server]) -> None:
    server = redis_server()
    theirs = [redis.Redis.from_url(redis_url_of(server, database)) for database in (0, 1)]
    for client in theirs:
        client.set("theirs", "1")
    with empty_redis(redis_url_of(server), ours=False) as url:
        assert url == redis_url_of(server, 2)
        with redis.Redis.from_url(url) as client:
            client.set("ours", "1")
    with redis.Redis.from_url(redis_url_of(server, 2)) as client:
        assert client.dbsize() == 0
    for client in theirs:
        assert client.get("theirs") == b"1"
        client.close()
