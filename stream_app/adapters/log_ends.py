"""Ask Kafka where the partitions of the log begin and end.

The due timer may fire an exit only if the log, asked after the exit's instant, ends where the fold stands. So
the answer must be Kafka's own at the time of asking: positions and high waters that a consumer remembers say
when records came, not that no more are there. Must not know why somebody asks.

Ends are those of all records, also of transactions still open: a record of one will carry a timestamp from
before now when it becomes readable. An end is read off the answer to a fetch at the last offset that Kafka
lists: the embedded broker lists the first offset of the last batch, plus one, where Apache Kafka lists the
end; the high water of a fetch is right on both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import aiokafka
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from stream_app.errors import StoreUnavailable

__all__ = ["LogEnds", "LogProbe"]

ANSWER_TIMEOUT_S = 15.0
FETCH_WAIT_MS = 50
#: One record is enough, and Kafka sends one even if it is larger than this.
FETCH_BYTES = 1024


@dataclass(frozen=True, slots=True)
class LogEnds:
    """First and next offset of a partition's log, and when they were asked for."""

    start: int
    end: int
    asked_ms: int


class LogProbe:
    """Answers about the log's ends; questions that come together share one request.

    Parameters
    ----------
    bootstrap_servers : str
    topic : str
    now_ms : callable
        The wall clock, Unix ms.
    """

    def __init__(self, bootstrap_servers: str, topic: str, now_ms: Callable[[], int]) -> None:
        self._topic = topic
        self._now_ms = now_ms
        self._consumer = aiokafka.AIOKafkaConsumer(
            bootstrap_servers=bootstrap_servers,
            group_id=None,
            enable_auto_commit=False,
            fetch_max_wait_ms=FETCH_WAIT_MS,
            max_partition_fetch_bytes=FETCH_BYTES,
        )
        self._waiting: dict[int, asyncio.Future[LogEnds]] = {}
        self._asking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect.

        Raises
        ------
        StoreUnavailable
            If Kafka cannot be reached.
        """
        try:
            await self._consumer.start()
        except KafkaError as exc:
            raise StoreUnavailable("Kafka, connect", f"{type(exc).__name__}: {exc}") from exc

    async def stop(self) -> None:
        """Disconnect."""
        if self._asking is not None:
            self._asking.cancel()
        await self._consumer.stop()

    async def ends(self, partition: int) -> LogEnds:
        """Return where a partition begins and ends, as asked after this call began.

        Raises
        ------
        StoreUnavailable
            If Kafka does not answer.
        """
        waiting = self._waiting.get(partition)
        if waiting is None:
            waiting = self._waiting[partition] = asyncio.get_running_loop().create_future()
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(waiting)

    async def all_ends(self, partitions: int) -> dict[int, LogEnds]:
        """Return where partitions 0 to `partitions` - 1 begin and end."""
        found = await asyncio.gather(*map(self.ends, range(partitions)))
        return dict(enumerate(found))

    async def _ask(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, {}
            asked_ms = self._now_ms()
            tps = [TopicPartition(self._topic, p) for p in waiting]
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    starts = await self._consumer.beginning_offsets(tps)
                    ends = await self._high_waters(starts, await self._consumer.end_offsets(tps))
            except Exception as exc:
                failure = StoreUnavailable("Kafka, ends of the log", f"{type(exc).__name__}: {exc}")
                for future in waiting.values():
                    if not future.done():
                        future.set_exception(failure)
                        future.exception()
                continue
            for tp in tps:
                if not waiting[tp.partition].done():
                    waiting[tp.partition].set_result(LogEnds(starts[tp], ends[tp], asked_ms))
        self._asking = None

    async def _high_waters(
        self, starts: dict[TopicPartition, int], listed: dict[TopicPartition, int]
    ) -> dict[TopicPartition, int]:
        """Fetch the last listed record of each partition, for the end of the log that comes with it."""
        ends = {tp: end for tp, end in listed.items() if end == starts[tp]}
        fetched = [tp for tp in listed if tp not in ends]
        if not fetched:
            return ends
        # A new assignment forgets the high waters of earlier answers.
        self._consumer.assign(fetched)
        for tp in fetched:
            self._consumer.seek(tp, listed[tp] - 1)
        while len(ends) < len(listed):
            await self._consumer.getmany(timeout_ms=FETCH_WAIT_MS)
            for tp in fetched:
                high_water = self._consumer.highwater(tp)
                if high_water is not None:
                    ends[tp] = max(high_water, listed[tp])
        self._consumer.unsubscribe()
        return ends
