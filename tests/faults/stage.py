"""A stage of the integration tests with the log that the faults are tried on, bad records included."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import redis
from aiokafka import AIOKafkaProducer

from tests.faults.rows import seed
from tests.integration.stage import Stage, synthetic_events

EVENTS: Final = 6_000
#: One record in so many cannot be read, or is under another user's key.
BAD_EVERY: Final = 97


def fault_log(first_seed: int, count: int) -> Iterator[tuple[bytes, bytes]]:
    """Make the log of a run as (key, value): late events, repeated ones, and bad ones among them.

    The same for the same seed, so that the oracle judges it once.
    """
    rng = random.Random(first_seed)
    for n, event in enumerate(synthetic_events(first_seed, count, users=400)):
        key, value = event["user_id"].encode(), json.dumps(event).encode()
        yield key, value
        if n % BAD_EVERY == 0:
            yield rng.choice([(key, value[:-1]), (b"somebody else", value), (key, b"[]")])


@dataclass(frozen=True, slots=True)
class FaultStage(Stage):
    """A broker with the four topics, a Redis, workers to start on them, and the log of the faults."""

    def fill(self, count: int = EVENTS, *, first_seed: int | None = None) -> int:
        """Append the log of a run; returns how many records that are."""
        return self.append(list(fault_log(seed() if first_seed is None else first_seed, count)))

    def append(self, records: Sequence[tuple[bytes, bytes]]) -> int:
        """Append some records, (key, value); returns how many."""
        asyncio.run(_send(self.case.kafka, self.case.names.events, records))
        return len(records)

    def lose_what_a_worker_publishes(self, commits: int = 2) -> None:
        """Kill a worker without an outbox after so many commits, and let another one go on: a control."""
        worker = self.start_faulty("worker", kill=("after commit", commits), without=["outbox"])
        assert worker.wait(60) == -signal.SIGKILL, worker.log
        self.run("worker", "--until-end")

    def flush(self) -> None:
        """Empty Redis: nothing of an earlier run is left."""
        with redis.Redis.from_url(self.case.redis_url) as client:
            client.flushall()


async def _send(bootstrap: str, topic: str, records: Sequence[tuple[bytes, bytes]]) -> None:
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", linger_ms=5) as producer:
        sent = [await producer.send(topic, value, key=key) for key, value in records]
        await asyncio.gather(*sent)
