"""What the publisher sends arrives whole, in order, in the partition of its key; also what is hard to fit."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest

from stream_app.adapters.codec import Outgoing, transition_message
from stream_app.adapters.publisher import CHUNK_BYTES, MAX_BATCH_BYTES, Publisher, _chunks
from stream_app.commands.topics import create_missing_topics
from stream_app.core.partitioner import partition_of
from stream_app.core.transition import Cause, Transition
from stream_app.settings import KafkaSettings
from tests.backends import Names, read_to_end

PARTITIONS = 3


@pytest.fixture
async def publisher(kafka_bootstrap: str, names: Names) -> AsyncIterator[Publisher]:
    settings = KafkaSettings(
        bootstrap_servers=kafka_bootstrap,
        group_id=names.group,
        events_topic=names.events,
        entered_topic=names.entered,
        exited_topic=names.exited,
        dead_letter_topic=names.dead_letter,
    )
    await create_missing_topics(settings, PARTITIONS)
    made = Publisher(
        kafka_bootstrap,
        {"entered": names.entered, "exited": names.exited, "dead_letter": names.dead_letter},
    )
    await made.start()
    yield made
    await made.stop()


def left(user_id: str, seq: int) -> Outgoing:
    """Return what is said of a user who has left a segment."""
    transition = Transition(
        id=f"{seq:032x}",
        user_id=user_id,
        segment_id="segment",
        segment_type="base",
        segment_version="f" * 16,
        status="exited",
        cause=Cause.DECAY,
        seq=seq,
        time_ms=1_700_000_000_000,
        weight=0.5,
        min_weight=1.0,
        exits_at_ms=None,
        event_id=None,
        offset=None,
    )
    return transition_message(transition, topic="events", partition=0, replayed=False)


async def test_messages_arrive_in_the_partition_of_their_key_in_order(
    publisher: Publisher, kafka_bootstrap: str, names: Names
) -> None:
    rng = random.Random(1)
    messages = [left(f"u{rng.randrange(50)}", seq) for seq in range(2, 2_002, 2)]
    await publisher.publish(messages[:600])
    await publisher.publish(messages[600:])
    found = await read_to_end(kafka_bootstrap, names.exited)
    for partition in range(PARTITIONS):
        expected = [m for m in messages if m.key and partition_of(m.key, PARTITIONS) == partition]
        assert [(r.key, r.value, list(r.headers)) for r in found if r.partition == partition] == [
            (m.key, m.value, list(m.headers)) for m in expected
        ]


async def test_users_with_the_longest_ids_there_can_be_are_published_too(
    publisher: Publisher, kafka_bootstrap: str, names: Names
) -> None:
    # All for one partition: the user's id stands four times in a message, 512 bytes each.
    messages = [left("\N{GRINNING FACE}" * 128, seq) for seq in range(2, 1_002, 2)]
    await publisher.publish(messages)
    found = await read_to_end(kafka_bootstrap, names.exited)
    assert [r.value for r in found] == [m.value for m in messages]


async def test_dead_letters_without_a_key_are_spread_and_none_is_lost(
    publisher: Publisher, kafka_bootstrap: str, names: Names
) -> None:
    letters = [Outgoing("dead_letter", None, b"%d" % n, (("sa_reason", b"key"),)) for n in range(300)]
    await publisher.publish(letters)
    found = await read_to_end(kafka_bootstrap, names.dead_letter)
    assert sorted(int(r.value) for r in found) == list(range(300))
    assert {r.partition for r in found} == set(range(PARTITIONS))


@pytest.mark.parametrize("size", [0, 1, 700, 60_000, 131_072])
def test_a_chunk_fits_into_one_batch(size: int) -> None:
    headers = tuple((f"header-{n}", b"x" * (size % 600)) for n in range(8))
    messages = [
        Outgoing("dead_letter", b"k", b"v" * size, headers) for _ in range(1_000 if size < 1_000 else 20)
    ]
    chunks = list(_chunks(messages))
    assert [m for chunk in chunks for m in chunk] == messages
    for chunk in chunks:
        whole = sum(
            len(m.key or b"") + len(m.value or b"") + sum(len(n) + len(v) for n, v in m.headers)
            for m in chunk
        )
        assert whole <= max(CHUNK_BYTES, MAX_BATCH_BYTES if len(chunk) == 1 else 0)
