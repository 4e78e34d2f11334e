"""Ask Kafka where the partitions of the log begin and end.

The due timer may fire an exit only if the log, asked after the exit's instant, ends where the fold stands. So
the answer must be Kafka's own at the time of asking: positions and high waters that a consumer remembers say
when records came, not that no more are there. Must not know why somebody asks.

Ends are those of all records, also of transactions still open: a record of one will carry a timestamp from
before now when it becomes readable. An end is read off the answer to a fetch at the last offset that Kafka
lists: the embedded broker lists the first offset of the last batch, plus one, where Apache Kafka lists the
end; the high water of a fetch is right on both.

A record that the leader has and its followers have not is behind the high water and readable later, too, with
the timestamp that it has now; while a follower is slow or gone that may take half a minute. So the leader is
also asked how far its own log goes: `LogEnds.appended`. Apache Kafka tells that to whoever asks as a replica
that debugs (`ListOffsetsRequest.DEBUGGING_REPLICA_ID`); a broker that does not know the difference answers
with what it tells everybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import aiokafka
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, for_code
from aiokafka.protocol.offset import OffsetRequest

from stream_app.adapters.kafka_security import PLAINTEXT, Security, told

__all__ = ["LogEnds", "LogProbe"]

ANSWER_TIMEOUT_S = 15.0
FETCH_WAIT_MS = 50
#: One record is enough, and Kafka sends one even if it is larger than this.
FETCH_BYTES = 1024
#: A leader that was replaced and does not know it is asked for so long: its end stands still, and exits wait.
METADATA_MAX_AGE_MS = 30_000
#: Kafka's names for the end of a log and for a replica that only looks.
LATEST = -1
DEBUGGING_REPLICA = -2


@dataclass(frozen=True, slots=True)
class LogEnds:
    """Where a partition's log begins and ends, and when that was asked.

    Attributes
    ----------
    start, end : int
        First offset, and the next one after what all replicas have.
    asked_ms : int
        When the question was asked, Unix ms: what is appended later is not counted.
    appended : int
        Next offset after everything that the leader has, never below `end`.
    readable : int
        Next offset after what a reader of committed records is given; below `end` while a transaction is
        open.
    """

    start: int
    end: int
    asked_ms: int
    appended: int
    readable: int


class LogProbe:
    """Answers about the log's ends; questions that come together share one request.

    Parameters
    ----------
    bootstrap_servers : str
    topic : str
    now_ms : callable
        The wall clock, Unix ms.
    security : mapping
        As made by `stream_app.adapters.kafka_security.security_of`.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        topic: str,
        now_ms: Callable[[], int],
        *,
        security: Security = PLAINTEXT,
    ) -> None:
        self._topic = topic
        self._now_ms = now_ms
        self._consumer = aiokafka.AIOKafkaConsumer(
            bootstrap_servers=bootstrap_servers,
            group_id=None,
            enable_auto_commit=False,
            fetch_max_wait_ms=FETCH_WAIT_MS,
            max_partition_fetch_bytes=FETCH_BYTES,
            metadata_max_age_ms=METADATA_MAX_AGE_MS,
            **security,
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
            raise told(exc, "Kafka, connect") from exc

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
                    ends, readable = await self._high_waters(starts, await self._consumer.end_offsets(tps))
                    appended = await self._appended(tps)
            except Exception as exc:
                self._hang_up()
                failure = told(exc, "Kafka, ends of the log")
                for future in waiting.values():
                    if not future.done():
                        future.set_exception(failure)
                        future.exception()
                continue
            for tp in tps:
                if not waiting[tp.partition].done():
                    end = ends[tp]
                    found = LogEnds(
                        starts[tp],
                        end,
                        asked_ms,
                        appended=max(end, appended.get(tp, end)),
                        readable=readable[tp],
                    )
                    waiting[tp.partition].set_result(found)
        self._asking = None

    def _hang_up(self) -> None:
        """Ask the next time over new connections.

        aiokafka drops a connection on which nothing is answered after its own deadline only, which ours
        comes before: one that the other end has forgotten would be asked for ever.
        """
        for connection in list(self._consumer._client._conns.values()):
            connection.close()

    async def _high_waters(
        self, starts: dict[TopicPartition, int], listed: dict[TopicPartition, int]
    ) -> tuple[dict[TopicPartition, int], dict[TopicPartition, int]]:
        """Fetch the last listed record of each partition, for the ends of the log that come with it.

        Returns the ends of all records and those of what a reader of committed records is given.
        """
        ends = {tp: end for tp, end in listed.items() if end == starts[tp]}
        readable = dict(ends)
        fetched = [tp for tp in listed if tp not in ends]
        if not fetched:
            return ends, readable
        # A new assignment forgets the high waters of earlier answers.
        self._consumer.assign(fetched)
        for tp in fetched:
            self._consumer.seek(tp, listed[tp] - 1)
        try:
            while len(ends) < len(listed):
                await self._consumer.getmany(timeout_ms=FETCH_WAIT_MS)
                for tp in fetched:
                    high_water = self._consumer.highwater(tp)
                    if high_water is not None:
                        ends[tp] = max(high_water, listed[tp])
                        stable = self._consumer.last_stable_offset(tp)
                        # Brokers from before transactions do not tell, some tell it only to readers of
                        # committed records.
                        tells = stable is not None and stable >= 0
                        readable[tp] = min(stable, ends[tp]) if tells else ends[tp]
        finally:
            # Not `unsubscribe`: aiokafka then asks some node, perhaps one that is silent, for all topics.
            self._consumer.pause(*fetched)
        return ends, readable

    async def _appended(self, tps: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Ask each partition's leader where its own log ends; absent where it would not say."""
        client = self._consumer._client
        by_leader: dict[int, list[tuple[int, int]]] = {}
        for tp in tps:
            # Known, since it has just answered; a former leader would tell its own end, which does no harm.
            by_leader.setdefault(client.cluster.leader_for_partition(tp), []).append((tp.partition, LATEST))
        requests = (
            client.send(leader, OffsetRequest(DEBUGGING_REPLICA, 0, [(self._topic, asked)]))
            for leader, asked in by_leader.items()
        )
        found = {}
        for response in await asyncio.gather(*requests):
            for _, partitions in response.topics:
                for partition, code, *answer in partitions:
                    error = for_code(code)
                    if error.retriable:
                        raise error(f"partition {partition}")
                    if code == 0 and answer:
                        found[TopicPartition(self._topic, partition)] = int(answer[-1])
        return found
