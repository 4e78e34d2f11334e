"""Publish what a commit left in the outbox, in order, and wait until Kafka has it.

Decides which topic a message goes to. Must not know where messages come from or what they say: after a crash
the same bytes are read back from the outbox and sent again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import aiokafka
from aiokafka.errors import (
    InvalidTopicError,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    ProducerClosed,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)

from stream_app.adapters.codec import Outgoing
from stream_app.adapters.kafka_security import PLAINTEXT, Security, told
from stream_app.core.partitioner import partition_of
from stream_app.errors import StartRefused

__all__ = ["Publisher"]

#: More than a dead letter's 64 KiB and its headers; Kafka's own default for a request is 1 MiB.
MAX_REQUEST_BYTES = 1024 * 1024
MAX_BATCH_BYTES = 256 * 1024
#: Messages that are under way at once, all of which may go into one batch.
CHUNK_BYTES = 192 * 1024
#: The most that framing takes: of a message, and of each of its headers (five and two varints).
FRAME_BYTES, HEADER_FRAME_BYTES = 32, 10
#: Failures that waiting does not cure.
PERMANENT = (
    InvalidTopicError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)

logger = logging.getLogger(__name__)
sender_logger = logging.getLogger("aiokafka.producer.sender")


class Publisher:
    """Sends to the output topics; one instance a worker, safe for concurrent tasks.

    Parameters
    ----------
    bootstrap_servers : str
    topics : mapping of Outgoing.kind to topic name
    timeout_s : float
        How long one message may take, retries included, seconds.
    security : mapping
        As made by `stream_app.adapters.kafka_security.security_of`.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        topics: Mapping[str, str],
        *,
        timeout_s: float = 20.0,
        security: Security = PLAINTEXT,
    ) -> None:
        self._security = security
        self._bootstrap_servers = bootstrap_servers
        self._topics = dict(topics)
        self._timeout_s = timeout_s
        #: ``None`` before the start and after a failure.
        self._producer: aiokafka.AIOKafkaProducer | None = None
        self._connecting = asyncio.Lock()
        self._kinds: tuple[bool, ...] = (True, False)
        self._given_up: dict[asyncio.Task[None], aiokafka.AIOKafkaProducer] = {}

    async def start(self) -> None:
        """Connect.

        An idempotent producer keeps messages single when the client itself sends again. A broker that knows
        none (the embedded one) is used without: aiokafka has one request under way per partition, so order
        holds, and a repeated message carries the id that it had.

        Raises
        ------
        StoreUnavailable
            If Kafka cannot be reached.
        """
        await self._connected()

    async def _connected(self) -> aiokafka.AIOKafkaProducer:
        async with self._connecting:
            if self._producer is None:
                self._producer = await self._connect()
            return self._producer

    async def _connect(self) -> aiokafka.AIOKafkaProducer:
        for idempotent in self._kinds:
            producer = aiokafka.AIOKafkaProducer(
                bootstrap_servers=self._bootstrap_servers,
                acks="all",
                enable_idempotence=idempotent,
                max_batch_size=MAX_BATCH_BYTES,
                max_request_size=MAX_REQUEST_BYTES,
                request_timeout_ms=int(self._timeout_s * 1000),
                **self._security,
            )
            # What aiokafka logs of a refusal is said below, or raised.
            sender_logger.setLevel(logging.CRITICAL)
            try:
                await producer.start()
            except KafkaError as exc:
                await producer.stop()
                if idempotent and not isinstance(exc, KafkaConnectionError):
                    logger.info(
                        "the broker has no idempotent producers (%s): a message that is sent again may come "
                        "twice, with the same id",
                        type(exc).__name__,
                    )
                    continue
                raise told(exc, "Kafka, connect") from exc
            finally:
                sender_logger.setLevel(logging.NOTSET)
            # Known for good: a broker in trouble must not be taken for one without idempotent producers.
            self._kinds = (idempotent,)
            return producer
        raise RuntimeError("expected a broker to have producers of one kind")

    async def stop(self) -> None:
        """Disconnect."""
        for producer in self._given_up.values():
            _fail(producer)
        await asyncio.gather(*self._given_up, return_exceptions=True)
        if self._producer is not None:
            await self._producer.stop()

    def _give_up(self, producer: aiokafka.AIOKafkaProducer) -> None:
        """Let the next message go through another producer.

        An idempotent producer numbers its batches, and a broker takes them in order only. One that aiokafka
        drops unsent, since its partition had no leader for too long, leaves a gap in the numbers, and all
        behind it are refused for ever.
        """
        if self._producer is producer:
            self._producer = None
            leaving = asyncio.create_task(self._leave(producer))
            self._given_up[leaving] = producer
            leaving.add_done_callback(self._given_up.pop)

    async def _leave(self, producer: aiokafka.AIOKafkaProducer) -> None:
        """Let what other partitions have under way in a producer end, for a while, then end it."""
        flushing = asyncio.ensure_future(producer.flush())
        await asyncio.wait({flushing}, timeout=2 * self._timeout_s)
        _fail(producer)
        await flushing
        await producer.stop()

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        """Send messages in order and return when all of them are acknowledged by all replicas.

        Raises
        ------
        StoreUnavailable
            If any is not; some may be, so the outbox is published again from its beginning.
        StartRefused
            If Kafka will never take one of them.
        """
        producer = await self._connected()
        try:
            for chunk in _chunks(messages):
                async with asyncio.timeout(2 * self._timeout_s):
                    await self._publish_chunk(producer, chunk)
        except PERMANENT as exc:
            raise StartRefused(
                f"output topics that take batches of up to {MAX_BATCH_BYTES} bytes from this user",
                f"{type(exc).__name__}: {exc}",
                "Kafka, publish",
                "Run `stream-app doctor`; raise the topic's max.message.bytes, or give write permission. "
                "What was not taken is in the outbox and is published at the next start.",
            ) from exc
        except (KafkaError, TimeoutError) as exc:
            self._give_up(producer)
            raise told(exc, "Kafka, publish") from exc

    async def _publish_chunk(self, producer: aiokafka.AIOKafkaProducer, chunk: Sequence[Outgoing]) -> None:
        """Send one batch to each partition: a message then costs 3 us, where it took 19 by itself."""
        batches: dict[tuple[str, int], Any] = {}
        partitions: dict[str, int] = {}
        for number, message in enumerate(chunk):
            topic = self._topics[message.kind]
            if topic not in partitions:
                partitions[topic] = len(await producer.partitions_for(topic))
            count = partitions[topic]
            # What has no key, a dead letter, has no order either.
            partition = number % count if message.key is None else partition_of(message.key, count)
            batch = batches.get((topic, partition))
            if batch is None:
                batch = batches[topic, partition] = producer.create_batch()
            added = batch.append(
                timestamp=None, key=message.key, value=message.value, headers=list(message.headers)
            )
            if added is None:
                raise MessageSizeTooLargeError(
                    f"expected a chunk of {CHUNK_BYTES} bytes to fit into a batch of {MAX_BATCH_BYTES}"
                )
        sent: list[asyncio.Future[Any]] = []
        try:
            for (topic, partition), batch in batches.items():
                batch.close()
                sent.append(await producer.send_batch(batch, topic, partition=partition))
        except Exception:
            await asyncio.gather(*sent, return_exceptions=True)
            raise
        # All of them, also when one fails: what is still under way must not arrive behind what follows.
        for answer in await asyncio.gather(*sent, return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer


def _fail(producer: aiokafka.AIOKafkaProducer) -> None:
    """Let everything that waits in a producer fail; it would wait for a broker that is away for ever."""
    producer._message_accumulator.fail_all(ProducerClosed())


def _weight(message: Outgoing) -> int:
    """Return the most that a message takes in a batch; a user's id alone may be 512 bytes, four times."""
    weight = FRAME_BYTES + len(message.value or b"") + len(message.key or b"")
    for name, value in message.headers:
        # The names are ours, of one byte a character.
        weight += HEADER_FRAME_BYTES + len(name) + len(value)
    return weight


def _chunks(messages: Sequence[Outgoing]) -> Iterator[list[Outgoing]]:
    """Cut messages so that those of one output partition are one batch, and the next waits for it.

    A batch that fails after the one behind it has arrived would be seen in the wrong order.
    """
    chunk: list[Outgoing] = []
    size = 0
    for message in messages:
        weight = _weight(message)
        if chunk and size + weight > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(message)
        size += weight
    if chunk:
        yield chunk
