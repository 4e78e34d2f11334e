"""Hold every touch of Faust's and aiokafka's internals against the installed versions."""

from __future__ import annotations

import ast
import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiokafka
import faust
import pytest
from aiokafka.consumer.consumer import AIOKafkaConsumer
from aiokafka.consumer.fetcher import Fetcher, FetchResult
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import SubscriptionState, TopicPartitionState
from faust.transport.consumer import Consumer
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread

from stream_app.adapters import transport
from stream_app.adapters.transport import Log, Slice, SliceApp, SliceConsumer, SliceConsumerThread, cut
from stream_app.errors import StartRefused
from tests.backends import Names, create_topic

PACKAGE = Path(transport.__file__).parent.parent


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("base", "mine", "name", "expected"),
    [
        (Consumer, SliceConsumer, "getmany", ["self", "timeout"]),
        (Consumer, SliceConsumer, "_add_gap", ["self", "tp", "offset_from", "offset_to"]),
        (Consumer, SliceConsumer, "_new_offset", ["self", "tp"]),
        (Consumer, SliceConsumer, "_filter_tps_with_pending_acks", ["self", "topics"]),
        (Consumer, SliceConsumer, "seek_to_committed", ["self"]),
        (Consumer, SliceConsumer, "on_partitions_assigned", ["self", "assigned", "generation_id"]),
        (Consumer, SliceConsumer, "on_partitions_revoked", ["self", "revoked"]),
        (Consumer, SliceConsumer, "verify_event_path", ["self", "now", "tp"]),
        (AIOKafkaConsumerThread, SliceConsumerThread, "_create_worker_consumer", ["self", "transport"]),
        (AIOKafkaConsumerThread, SliceConsumerThread, "_stopped_set", ["self"]),
        (faust.App, SliceApp, "_new_transport", ["self"]),
        (faust.App, SliceApp, "_create_directories", ["self"]),
    ],
)
def test_an_overridden_method_has_the_signature_that_faust_calls(
    base: type, mine: type, name: str, expected: list[str]
) -> None:
    assert parameters(getattr(base, name)) == expected
    assert parameters(getattr(mine, name)) == expected
    assert inspect.iscoroutinefunction(getattr(base, name)) == inspect.iscoroutinefunction(
        getattr(mine, name)
    )


def test_the_internals_that_the_thread_reads_are_there() -> None:
    assert parameters(Fetcher.fetched_records) == ["self", "partitions", "timeout", "max_records"]
    assert parameters(Fetcher._create_fetch_waiter) == ["self"]
    assert parameters(GroupCoordinator._do_heartbeat) == ["self"]
    assert isinstance(TopicPartitionState.has_valid_position, property)
    assert isinstance(TopicPartitionState.position, property)
    assert isinstance(SubscriptionState.reassignment_in_progress, property)
    assert parameters(SubscriptionState.fetch_context) == ["self"]
    assert "_update_position" in dir(FetchResult)
    assert "_coordination_task" in inspect.getsource(GroupCoordinator.__init__)
    assert "self._pending_exception = exc" in inspect.getsource(GroupCoordinator._push_error_to_user)
    constructor = inspect.signature(AIOKafkaConsumer.__init__).parameters
    for name in ("fetch_max_wait_ms", "isolation_level", "rebalance_timeout_ms", "max_poll_interval_ms"):
        assert name in constructor


def test_the_installed_faust_is_in_the_range_that_was_read() -> None:
    transport.check_faust_version()
    assert aiokafka.__version__.startswith("0.14.")


@pytest.mark.parametrize("version", ["0.15.2", "0.16.0", "1.0.0", "0.14.9"])
def test_another_faust_is_refused_with_what_to_do(version: str) -> None:
    with pytest.raises(StartRefused, match=r"expected faust-streaming >=0\.15\.3,<0\.16.*make venv"):
        transport.check_faust_version(version)


def test_only_the_transport_imports_faust_or_mode() -> None:
    importers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            if any(name.split(".")[0] in ("faust", "mode") for name in names):
                importers.add(path.relative_to(PACKAGE).as_posix())
    # settings.py asks Faust, lazily, which environment variables it would read.
    assert importers == {"adapters/transport.py", "settings.py"}


def test_nobody_takes_acknowledges_automatically_or_enters_an_event() -> None:
    offences = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "np":
                continue  # numpy's, of arrays
            if isinstance(node, ast.Attribute) and node.attr in ("take", "noack_take", "take_events"):
                offences.append(f"{path.name}:{node.lineno} {node.attr}")
            if isinstance(node, ast.AsyncWith) and any(
                isinstance(item.context_expr, ast.Name) and "event" in item.context_expr.id
                for item in node.items
            ):
                offences.append(f"{path.name}:{node.lineno} async with event")
    assert offences == []


def test_the_agent_reads_a_stream_without_automatic_acknowledgement() -> None:
    source = inspect.getsource(transport.build_faust_app)
    assert ".noack().events()" in source
    assert "stream_wait_empty=False" in source
    assert faust.Stream.noack(SimpleNamespace(clone=lambda **options: options)) == {  # type: ignore[arg-type, comparison-overlap]
        "enable_acks": False
    }


def record(offset: int, size: int = 100) -> Any:
    return SimpleNamespace(offset=offset, key=b"", value=b"x" * size)


def test_a_fetch_is_cut_into_slices_that_speak_for_every_offset_once() -> None:
    records = [record(offset) for offset in range(10, 1310) if offset % 7]
    slices = cut(0, 8, 1320, records)
    assert slices[0].from_offset == 8
    assert slices[-1].next_offset == 1320
    assert all(a.next_offset == b.from_offset for a, b in pairwise(slices))
    assert [r.offset for part in slices for r in part.records] == [r.offset for r in records]
    assert max(len(part.records) for part in slices) == transport.SLICE_RECORDS


def test_a_slice_is_bounded_in_bytes_but_takes_a_record_that_is_larger_alone() -> None:
    slices = cut(0, 0, 4, [record(0, 700_000), record(1, 700_000), record(2, 9_000_000), record(3, 10)])
    assert [len(part.records) for part in slices] == [1, 1, 1, 1]


def test_a_fetch_that_only_moves_the_position_is_a_slice_without_records() -> None:
    assert cut(3, 5, 9, []) == [Slice(3, 5, 9, ())]
    assert cut(3, 5, 5, []) == []


class Recorder:
    """Partitions that take what they are told to want and remember it."""

    def __init__(self, *, acknowledge: bool = True, most_slices: int = 1_000_000) -> None:
        self.log: Log | None = None
        self.failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.acknowledge = acknowledge
        self.most_slices = most_slices
        self.slices: list[Slice] = []
        self.claimed: set[int] = set()
        self._claiming: set[asyncio.Task[None]] = set()

    def wants(self, partition: int) -> bool:
        return partition in self.claimed and len(self.slices) < self.most_slices

    def assigned(self, partitions: frozenset[int]) -> None:
        self._claiming.add(asyncio.create_task(self._claim(partitions)))

    async def _claim(self, partitions: frozenset[int]) -> None:
        assert self.log is not None
        assert await self.log.generation_is_current()
        for partition in partitions:
            await self.log.rewind(partition, 0)
        self.claimed |= partitions

    async def revoked(self, partitions: frozenset[int]) -> None:
        self.claimed -= partitions

    def submit(self, part: Slice, acknowledge: Callable[[], object]) -> None:
        assert self.log is not None
        self.slices.append(part)
        acknowledge()
        if self.acknowledge:
            self.log.processed(part.partition, part.next_offset)

    async def failed(self) -> BaseException:
        return await asyncio.shield(self.failure)

    def next_offset(self) -> int:
        return sum(max(s.next_offset for s in self.slices if s.partition == p) for p in self.claimed_slices())

    def claimed_slices(self) -> set[int]:
        return {part.partition for part in self.slices}


class Running:
    def __init__(self, app: SliceApp, log: Log, partitions: Recorder) -> None:
        self.app, self.log, self.partitions = app, log, partitions


async def produce(bootstrap: str, topic: str, count: int) -> None:
    async with aiokafka.AIOKafkaProducer(bootstrap_servers=bootstrap, linger_ms=5) as producer:
        sent = [await producer.send(topic, b"x" * 50, key=b"u") for _ in range(count)]
        await asyncio.gather(*sent)


@pytest.fixture
async def run(kafka_bootstrap: str, names: Names) -> AsyncIterator[Callable[..., Any]]:
    started: list[SliceApp] = []

    async def start(count: int, **options: Any) -> Running:
        await create_topic(kafka_bootstrap, names.events)
        await produce(kafka_bootstrap, names.events, count)
        partitions = Recorder(**options)
        app = transport.build_faust_app(
            group_id=names.group,
            bootstrap_servers=kafka_bootstrap,
            events_topic=names.events,
            session_timeout_s=6.0,
            partitions=partitions,
        )
        partitions.log = Log(app, names.events)
        await app.start()
        started.append(app)
        return Running(app, partitions.log, partitions)

    yield start
    for app in started:
        await asyncio.wait_for(app.stop(), 20)


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.05)


async def test_committed_offsets_follow_within_seconds(run: Callable[..., Any]) -> None:
    running = await run(20_000)
    await until(lambda: running.partitions.slices and running.partitions.next_offset() == 20_000)

    async def committed() -> bool:
        return bool(await running.log.committed(0) == 20_000)

    await until(committed, 5.0)


async def test_no_producer_of_fausts_own_is_started(run: Callable[..., Any]) -> None:
    running = await run(1)
    await until(lambda: running.partitions.slices)
    assert running.app.producer._producer is None
    assert not running.app.producer.started


async def test_what_is_acknowledged_but_not_reported_as_processed_is_not_committed(
    run: Callable[..., Any],
) -> None:
    running = await run(3_000, acknowledge=False)
    await until(lambda: running.partitions.slices and running.partitions.next_offset() == 3_000)
    await running.log.commit()
    assert await running.log.committed(0) is None
    running.log.processed(0, 1_234)
    await running.log.commit()
    assert await running.log.committed(0) == 1_234


async def test_what_is_rewound_is_delivered_again_whatever_faust_has_read(run: Callable[..., Any]) -> None:
    running = await run(3_000)
    await until(lambda: running.partitions.slices and running.partitions.next_offset() == 3_000)
    assert await running.log.position(0) == 3_000
    running.partitions.slices.clear()
    await running.log.rewind(0, 1_000)
    await until(lambda: running.partitions.slices and running.partitions.next_offset() == 3_000)
    assert running.partitions.slices[0].from_offset == 1_000
    assert sum(len(part.records) for part in running.partitions.slices) == 2_000


def test_faust_asks_for_what_it_has_read_before_it_hands_a_message_on() -> None:
    source = inspect.getsource(Consumer._drain_messages)
    assert "get_read_offset = self._read_offset.__getitem__" in source
    assert "if r_offset is None or offset >= r_offset:" in source


async def test_the_buffer_is_bounded_in_slices(run: Callable[..., Any]) -> None:
    running = await run(60_000, most_slices=3)
    await until(lambda: len(running.partitions.slices) >= 3)
    await running.log.committed(0)  # a round trip through the thread: whatever was under way has arrived
    fetched_at_once = transport.FETCH_RECORDS // transport.SLICE_RECORDS
    assert len(running.partitions.slices) <= 3 + fetched_at_once + transport.BUFFERED_SLICES
    assert all(len(part.records) <= transport.SLICE_RECORDS for part in running.partitions.slices)


async def test_the_failure_of_a_partition_crashes_faust_within_five_seconds(run: Callable[..., Any]) -> None:
    running = await run(10)
    running.partitions.failure.set_result(RuntimeError("a partition failed"))
    crashed = await asyncio.wait_for(running.log.crashed(), 5.0)
    assert str(crashed) == "a partition failed"
