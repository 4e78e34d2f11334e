"""The limit: what consuming, decoding, reading and committing cost when nothing is done in between.

    python -m tests.bench.limit --help

The service's slices, one MGET and one call of the service's own commit script each, with blobs of the size
of its profiles, and no logic: no weights, no segments, no transitions. Nothing that keeps state this way in
Python can be much faster (the service now spares the MGET for users whom it knows). It promises nothing
either: its partitions are assigned by hand, and what a crash leaves is not looked at.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any, Final

import click
import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition

from stream_app.adapters.profile_store import keys, script_text
from stream_app.adapters.redis_client import connect
from stream_app.adapters.transport import FETCH_MAX_WAIT_MS, SLICE_RECORDS
from tests.bench.measure import PARTITIONS

OWNER: Final = "limit"
FETCHES_OF_SLICES: Final = 4
LOOK_EVERY_S: Final = 0.1


class Event(msgspec.Struct, gc=False):
    """What the service decodes of an event of the benchmark."""

    event_id: str
    user_id: str
    event_type: str
    timestamp: float
    labels: list[str] = []
    asset_id: str | None = None


@click.command()
@click.option("--bootstrap", required=True, help="Kafka, host:port.")
@click.option("--redis-url", required=True, help="Redis; empty.")
@click.option("--topic", required=True, help="Events, JSON; must exist.")
@click.option("--events", required=True, type=click.IntRange(1), help="In the topic, all partitions.")
@click.option("--number", default=0, show_default=True, help="Which of the processes this is, from 0.")
@click.option("--processes", default=1, show_default=True, help="How many share the partitions.")
@click.option("--blob-bytes", default=700, show_default=True, help="Size of what is stored of a user.")
def main(
    bootstrap: str, redis_url: str, topic: str, events: int, number: int, processes: int, blob_bytes: int
) -> None:
    """Read and commit one process's share of a topic, until all processes are done."""
    partitions = range(number, PARTITIONS, processes)
    done = asyncio.run(_run(bootstrap, redis_url, topic, partitions, events, blob_bytes))
    click.echo(f"did {done} events")


async def _run(
    bootstrap: str, redis_url: str, topic: str, partitions: Sequence[int], events: int, blob_bytes: int
) -> int:
    redis: Any = connect(redis_url)
    commit = redis.register_script(script_text("commit.lua"))
    for p in partitions:
        await redis.hset(keys(p).wm, mapping={"owner": OWNER, "epoch": 1, "commit": 0, "watermark": 0})
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        fetch_max_wait_ms=FETCH_MAX_WAIT_MS,
    )
    await consumer.start()
    consumer.assign([TopicPartition(topic, p) for p in partitions])
    decode = msgspec.json.Decoder(Event).decode
    # Random, and different from one write to the next.
    noise = random.Random(1).randbytes(blob_bytes + 4096)
    commits = dict.fromkeys(partitions, 0)
    done = 0

    async def take(p: int, records: Sequence[Any]) -> None:
        names = keys(p)
        for first in range(0, len(records), SLICE_RECORDS):
            part = records[first : first + SLICE_RECORDS]
            users = {decode(record.value).user_id for record in part}
            profiles = [names.profile(user) for user in users]
            await redis.mget(profiles)
            number = commits[p]
            args: list[Any] = [OWNER, 1, number, "commit", part[-1].offset + 1, part[-1].timestamp, "", ""]
            args += [len(users), 0, 0, 0, 0, 0, 0]
            for place in range(len(users)):
                begin = (number + 7 * place) % 4096
                args.append(noise[begin : begin + blob_bytes])
            fixed = [names.wm, names.due, names.outbox, names.definitions, names.scored]
            answer = await commit(keys=[*fixed, *profiles], args=args)
            if answer[0] != b"OK":
                raise click.ClickException(f"commit.lua: expected OK, got {answer}; is Redis this program's?")
            commits[p] = number + 1

    # Each partition takes what it got while the next is fetched and decoded, as in the service.
    busy: dict[int, asyncio.Task[None]] = {}
    looked_at_s = 0.0
    loop = asyncio.get_running_loop()
    while True:
        idle = [TopicPartition(topic, p) for p in partitions if p not in busy]
        found = await consumer.getmany(
            *idle, timeout_ms=0 if busy else FETCH_MAX_WAIT_MS, max_records=FETCHES_OF_SLICES * SLICE_RECORDS
        )
        for partition, records in found.items():
            if records:
                done += len(records)
                busy[partition.partition] = asyncio.create_task(take(partition.partition, records))
        if busy:
            await asyncio.wait(busy.values(), return_when=asyncio.FIRST_COMPLETED)
            for p in [p for p, task in busy.items() if task.done()]:
                await busy.pop(p)
        elif loop.time() - looked_at_s > LOOK_EVERY_S:
            looked_at_s = loop.time()
            stored = [await redis.hget(keys(p).wm, "watermark") for p in range(PARTITIONS)]
            if sum(int(watermark or 0) for watermark in stored) >= events:
                break
    await consumer.stop()
    await redis.aclose()
    return done


if __name__ == "__main__":
    main()
