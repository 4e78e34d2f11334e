"""Keyed events into a topic, in order, with a count of what Kafka acknowledged: the writing half of `replay`.

It decides batches, back pressure and what a failure is. Every event is written with `acks=all`, to the
partition of its key, with the time of sending as its Kafka timestamp. The producer is idempotent where the
broker can (Apache Kafka can, the embedded broker cannot), so that a batch whose acknowledgement got lost is
not written twice. It must not know files, JSON or progress bars.

aiokafka's `send()` handles one record at a time (20 to 30 thousand/s); this module fills whole batches per
partition and hands those over, which is several times as fast.
"""

# Errors are named as in stream_app.errors, to be read in sentences.
# ruff: noqa: N818

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from stream_app.adapters.kafka_admin import KafkaUnavailable
from stream_app.adapters.kafka_security import NOT_ALLOWED, PLAINTEXT, Security, not_allowed
from stream_app.core.partitioner import partition_of
from stream_app.errors import StreamAppError

BATCH_BYTES: Final = 256 * 1024
#: A batch's header and one record's own fields, with room to spare; Kafka's limit is on the whole batch.
BATCH_OVERHEAD_BYTES: Final = 256
DELIVERY_DEADLINE_S: Final = 30.0

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0


class NotAcknowledged(StreamAppError):
    """Kafka did not take events that were sent."""

    def __init__(self, bootstrap_servers: str, topic: str, got: str) -> None:
        super().__init__(
            f"every event for topic {topic!r} to be acknowledged",
            got,
            f"Kafka at {bootstrap_servers}",
            "Look at the broker, then replay what is missing; an event that is among the last 32 of its user "
            "is recognised by its event_id and counts once.",
        )


class EventSender:
    """A producer for one topic; use it with `async with`.

    Parameters
    ----------
    bootstrap_servers
        "host:port", several separated by commas.
    topic
        An existing topic.
    partitions
        How many it has.
    max_batch_bytes
        The topic's `max.message.bytes`, if it has one; batches stay below it.
    security
        As made by `stream_app.adapters.kafka_security.security_of`.

    Attributes
    ----------
    sent, acknowledged
        Events handed over, and those that Kafka has confirmed. When `finish` returns, they are equal.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        topic: str,
        partitions: int,
        max_batch_bytes: int = BATCH_BYTES,
        *,
        security: Security = PLAINTEXT,
    ) -> None:
        self._security = security
        self.sent = 0
        self.acknowledged = 0
        self._bootstrap_servers = bootstrap_servers
        self._topic = topic
        self._batch_bytes = min(BATCH_BYTES, max_batch_bytes)
        self._batches: list[Any] = [None] * partitions
        self._pending: set[asyncio.Future[Any]] = set()
        self._failure: BaseException | None = None
        self._producer: AIOKafkaProducer | None = None

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                self._producer = await self._start(idempotent=True) or await self._start(idempotent=False)
        except TimeoutError as error:
            raise KafkaUnavailable(self._bootstrap_servers, _START_TIMEOUT_S, "no answer") from error
        if self._producer is None:
            raise KafkaUnavailable(self._bootstrap_servers, _START_TIMEOUT_S, "no connection for a producer")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop(self._producer)

    async def send(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Hand over events, in this order; waits while too much is under way.

        Parameters
        ----------
        keys, values
            Parallel.

        Raises
        ------
        NotAcknowledged
            If an earlier event failed, or Kafka takes nothing any more.
        """
        batches, count = self._batches, len(self._batches)
        for key, value in zip(keys, values, strict=True):
            partition = partition_of(key, count)
            batch = batches[partition]
            if batch is None or batch.append(timestamp=None, key=key, value=value) is None:
                if batch is not None:
                    await self._hand_over(partition)
                batch = batches[partition] = self._running.create_batch()
                batch.append(timestamp=None, key=key, value=value)
            self.sent += 1

    async def flush(self) -> None:
        """Hand over what is in unfinished batches; does not wait for acknowledgements."""
        for partition, batch in enumerate(self._batches):
            if batch is not None:
                await self._hand_over(partition)
        await asyncio.sleep(0)

    async def finish(self) -> None:
        """Hand over everything and wait until it is acknowledged.

        Raises
        ------
        NotAcknowledged
            If anything was not.
        """
        await self.flush()
        while self._pending and self._failure is None:
            done, _ = await asyncio.wait(
                self._pending, timeout=DELIVERY_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                self._failure = TimeoutError(f"no acknowledgement for {DELIVERY_DEADLINE_S:g} s")
        self._raise_failure()

    @property
    def _running(self) -> AIOKafkaProducer:
        if self._producer is None:
            raise RuntimeError("EventSender is used outside of `async with`")
        return self._producer

    async def _start(self, *, idempotent: bool) -> AIOKafkaProducer | None:
        """Start a producer; None if the broker cannot do it this way."""
        producer = AIOKafkaProducer(
            bootstrap_servers=self._bootstrap_servers,
            acks="all",
            enable_idempotence=idempotent,
            max_batch_size=self._batch_bytes,
            request_timeout_ms=round(DELIVERY_DEADLINE_S * 1000),
            **self._security,
        )
        try:
            await producer.start()
        except KafkaError:
            await self._stop(producer)
            return None
        except BaseException:
            await self._stop(producer)
            raise
        return producer

    async def _stop(self, producer: AIOKafkaProducer | None) -> None:
        if producer is None:
            return
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):  # it would wait for a dead broker for ever
                await producer.stop()
        except (TimeoutError, KafkaError):
            pass

    async def _hand_over(self, partition: int) -> None:
        self._raise_failure()
        batch, self._batches[partition] = self._batches[partition], None
        batch.close()
        count = batch.record_count()
        try:
            future = await self._running.send_batch(batch, self._topic, partition=partition)
        except KafkaError as error:
            self._failure = error
            self._raise_failure()
        self._pending.add(future)
        future.add_done_callback(lambda done: self._settle(done, count))

    def _settle(self, future: asyncio.Future[Any], count: int) -> None:
        self._pending.discard(future)
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self.acknowledged += count
        elif self._failure is None:
            self._failure = error

    def _raise_failure(self) -> None:
        if isinstance(self._failure, NOT_ALLOWED):
            raise not_allowed(self._failure, f"Kafka at {self._bootstrap_servers}, topic {self._topic}")
        if self._failure is not None:
            got = " ".join(str(self._failure).split()) or type(self._failure).__name__
            raise NotAcknowledged(self._bootstrap_servers, self._topic, got) from self._failure
