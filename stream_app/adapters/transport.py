"""Carry the log in slices from Faust to the partitions: the one module that touches Faust's internals.

Faust hands an agent one event at a time, counts what is acknowledged and decides from that where a restart
begins. Here one Faust message is a `Slice`, a run of records of one partition; where a restart begins is
decided by the watermark in Redis. What is overridden, and why:

``Consumer.getmany``
    Cuts what was fetched into slices, each with the position that it was fetched from, and fetches nothing
    for a partition that does not want more.
``Consumer._add_gap``, ``Consumer._new_offset``, ``Consumer._filter_tps_with_pending_acks``
    Faust reads the offsets inside a slice as gaps, and acknowledges by itself a message that it skips in a
    rebalance. What is committed to Kafka is what `Log.processed` was told, and nothing else.
``Consumer._read_offset``
    Faust drops messages below the last that it has read, and notes that after handing it on: what was rewound
    meanwhile would be dropped in silence. A partition sees for itself what it has folded.
``Consumer.seek_to_committed``
    Seeks nowhere: a partition seeks to its own watermark when it has claimed it.
``Consumer.on_partitions_assigned``, ``Consumer.on_partitions_revoked``
    Tell the partitions who owns what.
``AIOKafkaConsumerThread._create_worker_consumer``
    Reads committed records only, waits 50 ms, not 1,500 ms, for more, and is let in as all our clients are.
``AIOKafkaConsumerThread._stopped_set``
    Lets a worker that failed stop without a second failure.
``App._new_transport``, ``App._create_directories``
    Use the above, and leave nothing on disk.
``App.BootStrategy``
    Starts no producer: what is published goes through our own.

The contract tests (tests/contract/test_faust_contract.py) hold each of these against the installed Faust.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar, cast

import aiokafka
import faust
from aiokafka import TopicPartition
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import ConsumerStoppedError, KafkaError
from aiokafka.protocol.commit import OffsetFetchRequest
from faust.app.base import BootStrategy
from faust.serializers.schemas import Schema
from faust.transport.drivers import aiokafka as faust_aiokafka
from faust.types import TP
from faust.types.tuples import ConsumerMessage
from mode.supervisors import CrashingSupervisor

from stream_app.adapters.kafka_security import PLAINTEXT, Security, told
from stream_app.errors import StartRefused, StoreUnavailable

__all__ = ["Log", "Partitions", "Slice", "build_faust_app", "check_faust_version"]

FAUST_FROM: Final = (0, 15, 3)
FAUST_BELOW: Final = (0, 16)

SLICE_RECORDS: Final = 500
SLICE_BYTES: Final = 1024 * 1024
#: Slices that Faust may hold between the fetcher and the agent; a slice is up to `SLICE_RECORDS` records.
BUFFERED_SLICES: Final = 8
FETCH_RECORDS: Final = 4 * SLICE_RECORDS
FETCH_MAX_WAIT_MS: Final = 50
#: How long one look for records may last. A partition that wants records again waits at most this long.
FETCH_LOOK_S: Final = 0.05
COMMIT_INTERVAL_S: Final = 1.0
#: A partition that is added to the topic moves users: how long that may go unnoticed.
METADATA_MAX_AGE_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 15.0
#: How often it is looked whether the group has refused this member for good.
LOOK_S: Final = 0.5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of records of one partition, as fetched.

    Attributes
    ----------
    partition : int
    from_offset : int
        Position that the run was fetched from: the first offset that it speaks for.
    next_offset : int
        First offset that it does not speak for. With no records, a run of markers or compacted offsets.
    records : tuple of aiokafka.ConsumerRecord
        In log order, may be empty.
    """

    partition: int
    from_offset: int
    next_offset: int
    records: tuple[Any, ...]


class Partitions(Protocol):
    """What the transport tells the owner of the partitions, always on the worker's event loop."""

    def wants(self, partition: int) -> bool:
        """Say whether more slices of a partition may be fetched."""

    def assigned(self, partitions: frozenset[int]) -> None:
        """Take note of the whole new assignment."""

    async def revoked(self, partitions: frozenset[int]) -> None:
        """Stop work on partitions that may belong to another worker when this returns."""

    def submit(self, part: Slice, acknowledge: Callable[[], object]) -> None:
        """Take a slice; `acknowledge` tells Faust that it is done with."""

    async def failed(self) -> BaseException:
        """Wait until a partition cannot go on, and return why."""


def check_faust_version(version: str | None = None) -> None:
    """Refuse a Faust whose internals were not read.

    Raises
    ------
    StartRefused
        If Faust is outside the pinned range.
    """
    found = version or faust.__version__
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if not FAUST_FROM <= numbers < FAUST_BELOW:
        raise StartRefused(
            "faust-streaming >=0.15.3,<0.16, whose internals this service overrides",
            found,
            "installed packages",
            "Install the locked dependencies (`make venv`).",
        )


class _PassThrough(Schema[Any, Any]):
    """Hand a slice on as it is: there is nothing to decode in it yet."""

    def loads_key(self, app: Any, message: Any, **options: Any) -> Any:
        return message.key

    def loads_value(self, app: Any, message: Any, **options: Any) -> Any:
        return message.value


class SliceConsumerThread(faust_aiokafka.AIOKafkaConsumerThread):
    """The thread that talks to Kafka; methods named ``*_here`` run in it, on its own event loop."""

    def _create_worker_consumer(self, transport: Any) -> aiokafka.AIOKafkaConsumer:
        conf = self.app.conf
        self._assignor = RoundRobinPartitionAssignor
        return aiokafka.AIOKafkaConsumer(
            client_id=conf.broker_client_id,
            group_id=conf.id,
            bootstrap_servers=faust_aiokafka.server_list(transport.url, transport.default_port),
            partition_assignment_strategy=[RoundRobinPartitionAssignor],
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_poll_records=FETCH_RECORDS,
            max_poll_interval_ms=int((conf.broker_max_poll_interval or 300.0) * 1000.0),
            fetch_max_wait_ms=FETCH_MAX_WAIT_MS,
            request_timeout_ms=int(conf.broker_request_timeout * 1000.0),
            session_timeout_ms=int(conf.broker_session_timeout * 1000.0),
            rebalance_timeout_ms=int(conf.broker_rebalance_timeout * 1000.0),
            heartbeat_interval_ms=int(conf.broker_heartbeat_interval * 1000.0),
            isolation_level="read_committed",
            metadata_max_age_ms=conf.consumer_metadata_max_age_ms,
            **cast(SliceApp, self.app).security,
        )

    def _stopped_set(self) -> None:
        try:
            super()._stopped_set()
        except RuntimeError:
            # A crash of the application has ended this thread and closed its loop already.
            self._stopped.set()

    async def fetch_here(self, wanted: frozenset[TopicPartition]) -> list[Slice]:
        """Take what has been fetched for some partitions, waiting `FETCH_LOOK_S` at most."""
        consumer = self._ensure_consumer()
        fetcher = consumer._fetcher
        if consumer._closed or fetcher._closed:
            raise ConsumerStoppedError
        # The context tells aiokafka that we are alive; without it a worker that holds would leave the group.
        with fetcher._subscriptions.fetch_context():
            if not wanted:
                await asyncio.sleep(FETCH_LOOK_S)
                return []
            slices = await self._drain_here(wanted)
            if slices:
                return slices
            waiter = fetcher._create_fetch_waiter()
            _, pending = await asyncio.wait([waiter], timeout=FETCH_LOOK_S)
            if pending:
                waiter.cancel()
                return []
            waiter.result()
            return await self._drain_here(wanted)

    async def _drain_here(self, wanted: frozenset[TopicPartition]) -> list[Slice]:
        fetcher = self._ensure_consumer()._fetcher
        subscriptions = fetcher._subscriptions
        if subscriptions.subscription is None or subscriptions.reassignment_in_progress:
            return []
        assignment = subscriptions.subscription.assignment
        if assignment is None or not assignment.active:
            return []
        states = {tp: assignment.state_value(tp) for tp in wanted if tp in assignment.tps}
        before = {tp: state.position for tp, state in states.items() if state.has_valid_position}
        # With timeout 0 nothing below waits, so no seek can come between `before` and what is drained.
        drained = await fetcher.fetched_records(frozenset(before), timeout=0, max_records=FETCH_RECORDS)
        slices: list[Slice] = []
        for tp, start in before.items():
            if states[tp].has_valid_position:
                slices += cut(tp.partition, start, states[tp].position, drained.get(tp, ()))
        return slices

    async def seek_here(self, tp: TopicPartition, offset: int) -> None:
        """Fetch from `offset` on, if the partition is still assigned."""
        consumer = self._ensure_consumer()
        if tp in consumer.assignment():
            consumer.seek(tp, offset)

    async def position_here(self, tp: TopicPartition) -> int | None:
        """Tell the next offset to be fetched, without waiting for one."""
        subscription = self._ensure_consumer()._fetcher._subscriptions.subscription
        if subscription is None or subscription.assignment is None or tp not in subscription.assignment.tps:
            return None
        state = subscription.assignment.state_value(tp)
        return state.position if state.has_valid_position else None

    async def generation_is_current_here(self) -> bool:
        """Ask the group coordinator whether this member's generation is the group's."""
        coordinator = self._ensure_consumer()._coordinator
        return bool(await coordinator._do_heartbeat())

    async def committed_here(self, tp: TopicPartition) -> int | None:
        """Ask for the group's committed offset, ``None`` if Kafka knows none."""
        offset: int | None = await self._ensure_consumer().committed(tp)
        return offset

    def coordinator_refusal(self) -> BaseException | None:
        """Return why the group will never have this member; aiokafka tells only who asks it for records."""
        coordinator = getattr(self._consumer, "_coordinator", None)
        return None if coordinator is None else coordinator._pending_exception

    async def coordinator_answers_here(self, tp: TopicPartition) -> bool:
        """Say whether somebody keeps in touch with the group's coordinator, and whether that answers.

        Asked is what changes nothing in the group, and not over the connection on which the coordinator lets
        a member wait that joins.
        """
        coordinator = self._ensure_consumer()._coordinator
        node = coordinator.coordinator_id
        if coordinator._coordination_task.done() or node is None:
            return False
        question = OffsetFetchRequest(coordinator.group_id, [(tp.topic, [tp.partition])])
        await coordinator._client.send(node, question)
        return True


class _NothingRead(dict[TP, int | None]):
    """Stands for what Faust has read of a partition: nothing, ever."""

    def __getitem__(self, tp: TP) -> int | None:
        return None

    def __setitem__(self, tp: TP, offset: int | None) -> None:
        return None


class SliceConsumer(faust_aiokafka.Consumer):
    """Faust's consumer, with slices as its messages and our own account of what is processed."""

    app: SliceApp
    _thread: SliceConsumerThread

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.partitions = self.app.partitions
        self._read_offset = _NothingRead()
        #: Next offset to commit to Kafka, by topic and partition.
        self.processed: dict[TP, int] = {}

    def _new_consumer_thread(self) -> SliceConsumerThread:
        return SliceConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def in_thread(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the thread that talks to Kafka and wait for its result."""
        try:
            return await asyncio.wrap_future(
                asyncio.run_coroutine_threadsafe(coroutine, self._thread.thread_loop)
            )
        finally:
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                # The thread has ended before it began; Python would complain behind the worker's last word.
                coroutine.close()

    async def getmany(
        self,
        timeout: float,  # noqa: ASYNC109 - Faust calls it so
    ) -> AsyncIterator[tuple[TP, ConsumerMessage]]:
        if not self.flow_active:
            await self.wait(cast(Any, self.can_resume_flow))
        generation = self.app.consumer_generation_id
        wanted = frozenset(
            TopicPartition(tp.topic, tp.partition)
            for tp in self._get_active_partitions()
            if self.partitions.wants(tp.partition)
        )
        topic = next(iter(wanted)).topic if wanted else ""
        for part in await self.in_thread(self._thread.fetch_here(wanted)):
            if not self.flow_active or self.should_stop or self.app.consumer_generation_id != generation:
                # Dropped: the partition sees that its next slice does not begin at its watermark and rewinds.
                return
            tp = TP(topic, part.partition)
            yield tp, self._message(tp, part)

    def _message(self, tp: TP, part: Slice) -> ConsumerMessage:
        return ConsumerMessage(
            tp.topic,
            tp.partition,
            part.next_offset - 1,
            0.0,
            0,
            [],
            b"",
            cast(Any, part),
            None,
            0,
            0,
            tp,
            generation_id=self.app.consumer_generation_id,
        )

    async def seek_to_committed(self) -> Mapping[TP, int]:
        return {}

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        return None

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterator[TP]:
        return iter(list(self.processed))

    def _new_offset(self, tp: TP) -> int | None:
        self._acked[tp].clear()
        self._acked_index[tp].clear()
        return self.processed.get(tp)

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        await super().on_partitions_assigned(assigned, generation_id)
        self.partitions.assigned(frozenset(tp.partition for tp in assigned))

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        await self.partitions.revoked(frozenset(tp.partition for tp in revoked))
        for tp in revoked:
            self.processed.pop(tp, None)
        await super().on_partitions_revoked(revoked)

    def verify_event_path(self, now: float, tp: TP) -> None:
        # Faust's guess at stuck partitions knows nothing of slices; the watchdog has its own (health.py).
        return None


class SliceTransport(faust_aiokafka.Transport):
    """Faust's Kafka transport with `SliceConsumer`."""

    Consumer = SliceConsumer


class ConsumerOnly(BootStrategy):
    """Starts no producer of Faust's: nothing is sent through it, and it knows no credentials."""

    enable_kafka_producer = False


class SliceApp(faust.App):
    """A Faust application whose transport is `SliceTransport`."""

    partitions: Partitions
    security: Security
    BootStrategy = ConsumerOnly

    def _new_transport(self) -> SliceTransport:
        return SliceTransport(self.conf.broker_consumer, self)

    def _create_directories(self) -> None:
        # For tables, which we have none of.
        return None


class Log:
    """The input topic as the partitions see it: where it ends, who owns it, how far it is processed.

    Parameters
    ----------
    app : SliceApp
        As returned by `build_faust_app`.
    topic : str
        Name of the events topic.
    """

    def __init__(self, app: SliceApp, topic: str) -> None:
        self._app = app
        self._topic = topic

    async def rewind(self, partition: int, offset: int) -> None:
        """Fetch a partition from `offset` on."""
        tp = TopicPartition(self._topic, partition)
        await self._consumer.in_thread(self._consumer._thread.seek_here(tp, offset))

    async def position(self, partition: int) -> int | None:
        """Return the next offset to be fetched, ``None`` if there is none yet."""
        tp = TopicPartition(self._topic, partition)
        return await self._ask(self._consumer._thread.position_here(tp))

    async def generation_is_current(self) -> bool:
        """Make sure with Kafka that this member still belongs to the group as it is now."""
        return bool(await self._ask(self._consumer._thread.generation_is_current_here()))

    async def committed(self, partition: int) -> int | None:
        """Return the group's committed offset of a partition, ``None`` if Kafka knows none."""
        return await self._ask(self._consumer._thread.committed_here(TopicPartition(self._topic, partition)))

    def processed(self, partition: int, next_offset: int) -> None:
        """Let the next background commit tell Kafka that everything below `next_offset` is processed."""
        self._consumer.processed[TP(self._topic, partition)] = next_offset

    async def commit(self) -> None:
        """Tell Kafka now how far the partitions are processed."""
        await self._consumer.commit()

    async def coordinator_answers(self) -> bool:
        """Say whether the group coordinator is known and answers."""
        thread = self._consumer._thread
        try:
            return bool(await self._ask(thread.coordinator_answers_here(TopicPartition(self._topic, 0))))
        except StoreUnavailable:
            return False

    async def crashed(self) -> BaseException:
        """Wait until Faust has crashed, or the group will never have this member, and return why."""
        crash = asyncio.ensure_future(self._app._crashed.wait())
        try:
            while not crash.done():
                await asyncio.wait({crash}, timeout=LOOK_S)
                thread = getattr(self._app._consumer, "_thread", None)
                refusal: BaseException | None = thread.coordinator_refusal() if thread is not None else None
                if refusal is not None:
                    return refusal
        finally:
            crash.cancel()
        reason: BaseException = self._app.crash_reason or RuntimeError("Faust crashed and does not say why")
        return reason

    @property
    def _consumer(self) -> SliceConsumer:
        return cast(SliceConsumer, self._app.consumer)

    async def _ask(self, question: Coroutine[Any, Any, T]) -> T:
        try:
            return await asyncio.wait_for(self._consumer.in_thread(question), ANSWER_TIMEOUT_S)
        except (KafkaError, TimeoutError) as exc:
            raise told(exc, "Kafka, consumer group") from exc


def cut(partition: int, start: int, end: int, records: Iterable[Any]) -> list[Slice]:
    """Cut a run of records into slices of at most `SLICE_RECORDS` records and about `SLICE_BYTES` bytes.

    Parameters
    ----------
    partition : int
    start, end : int
        Position before and after the run; together the slices speak for exactly these offsets.
    records : iterable of aiokafka.ConsumerRecord
        In log order.
    """
    slices: list[Slice] = []
    held: list[Any] = []
    size = 0
    for record in records:
        weight = len(record.value or b"") + len(record.key or b"")
        if held and (len(held) == SLICE_RECORDS or size + weight > SLICE_BYTES):
            slices.append(Slice(partition, start, held[-1].offset + 1, tuple(held)))
            start, held, size = held[-1].offset + 1, [], 0
        held.append(record)
        size += weight
    if held or start < end:
        slices.append(Slice(partition, start, end, tuple(held)))
    return slices


def build_faust_app(
    *,
    group_id: str,
    bootstrap_servers: str,
    events_topic: str,
    session_timeout_s: float,
    partitions: Partitions,
    security: Security = PLAINTEXT,
) -> SliceApp:
    """Build the Faust application: one agent that hands slices to `partitions`. Connects to nothing.

    Raises
    ------
    StartRefused
        If Faust is outside the pinned range.
    """
    check_faust_version()
    app = SliceApp(
        group_id,
        broker=[f"aiokafka://{server.strip()}" for server in bootstrap_servers.split(",")],
        autodiscover=False,
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        processing_guarantee="at_least_once",
        stream_wait_empty=False,
        stream_buffer_maxsize=BUFFERED_SLICES,
        broker_commit_interval=COMMIT_INTERVAL_S,
        broker_session_timeout=session_timeout_s,
        broker_heartbeat_interval=session_timeout_s / 3.0,
        broker_request_timeout=max(40.0, session_timeout_s),
        consumer_metadata_max_age_ms=round(METADATA_MAX_AGE_S * 1000),
        agent_supervisor=CrashingSupervisor,
    )
    app.partitions = partitions
    app.security = security
    topic = app.topic(events_topic, schema=_PassThrough(), internal=False)

    @app.agent(topic, concurrency=1, name="slices")
    async def slices(stream: Any) -> None:
        events = aiter(stream.noack().events())
        failed = asyncio.ensure_future(partitions.failed())
        try:
            while True:
                following = asyncio.ensure_future(anext(events, None))
                await asyncio.wait({following, failed}, return_when=asyncio.FIRST_COMPLETED)
                if failed.done():
                    following.cancel()
                    raise failed.result()
                event = following.result()
                if event is None:
                    return
                partitions.submit(event.value, event.ack)
        finally:
            failed.cancel()

    return app
