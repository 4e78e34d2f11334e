"""Workers that share a log: they come, go and are killed, and several partitions are under way in each."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from stream_app.adapters.checks import check_kafka
from stream_app.adapters.kafka_admin import KafkaAdmin
from stream_app.adapters.profile_cache import ProfileCache
from stream_app.adapters.profile_store import ProfileStore, connect
from stream_app.app import Worker, build_app
from stream_app.core.partitioner import partition_of
from stream_app.settings import load_settings
from tests.backends import Names
from tests.integration.stage import Stage, event_clock_case, synthetic_events, wait_until
from tests.processes import Program, Programs

SEED = 7
PARTITIONS = 6
EVENTS = 60_000  # at least
USERS = 8_000
#: Events that are fed at once, and how often: slower than a worker, so that the log is never far behind and
#: never at its end while workers come and go.
PORTION, PAUSE_S = 100, 0.05
CLAIMED = re.compile(r"partition (\d+): claimed, epoch (\d+),")


@pytest.fixture
def stage(kafka_bootstrap: str, fresh_redis: str, names: Names, programs: Programs, tmp_path: Path) -> Stage:
    case = event_clock_case(kafka_bootstrap, fresh_redis, names)
    return Stage.build(case, programs, tmp_path, partitions=PARTITIONS)


def claimed(workers: Iterable[Program]) -> dict[int, list[int]]:
    """The epochs that these workers have claimed each partition under, by their logs."""
    found: dict[int, list[int]] = defaultdict(list)
    for worker in workers:
        for partition, epoch in CLAIMED.findall(worker.log):
            found[int(partition)].append(int(epoch))
    return found


class Owners:
    """Who owned which partition under which epoch, as Redis had it; watched from a thread of its own."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._stop = threading.Event()
        self.seen: dict[int, list[tuple[int, str]]] = defaultdict(list)
        self.now: dict[int, str] = {}

    def watch(self) -> None:
        while not self._stop.wait(0.02):
            for partition in range(PARTITIONS):
                wm = self._stage.wm(partition)
                if "owner" in wm:
                    self.now[partition] = wm["owner"]
                    entry = (int(wm["epoch"]), wm["owner"])
                    if self.seen[partition][-1:] != [entry]:
                        self.seen[partition].append(entry)

    def stop(self) -> None:
        self._stop.set()

    def count(self) -> int:
        """How many workers own partitions now."""
        return len(set(self.now.values())) if len(self.now) == PARTITIONS else 0

    @classmethod
    @contextmanager
    def watched(cls, stage: Stage) -> Iterator[Owners]:
        """Watch while the body runs."""
        owners = cls(stage)
        thread = threading.Thread(target=owners.watch)
        thread.start()
        try:
            yield owners
        finally:
            owners.stop()
            thread.join()


class Feed:
    """Events that are appended to the log bit by bit from a thread of their own, until `finish`."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._events = synthetic_events(SEED, 3 * EVENTS, users=USERS, step_s=0.1)
        self._finishing = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._feed()))
        self.sent = 0

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        self._thread.join()

    def finish(self) -> None:
        """Append what is left of `EVENTS`, at once."""
        assert self._thread.is_alive(), "the log was at its end before the last rebalance"
        self._finishing.set()
        self._thread.join()

    async def _feed(self) -> None:
        async with AIOKafkaProducer(bootstrap_servers=self._stage.case.kafka, acks="all") as producer:
            while not self._stop.is_set() and not self._finishing.wait(PAUSE_S):
                await self._send(producer, PORTION)
            if self._finishing.is_set():
                await self._send(producer, max(0, EVENTS - self.sent))

    async def _send(self, producer: AIOKafkaProducer, count: int) -> None:
        topic = self._stage.case.names.events
        portion = self._events[self.sent : self.sent + count]
        futures = [
            await producer.send(topic, json.dumps(e).encode(), key=e["user_id"].encode()) for e in portion
        ]
        await asyncio.gather(*futures)
        self.sent += len(portion)


def test_workers_that_come_go_and_are_killed_share_a_log_without_loss(
    stage: Stage, record_property: Callable[[str, object], None]
) -> None:
    print(f"seed {SEED}")
    with Owners.watched(stage) as owners, Feed(stage) as feed:
        first = stage.start("worker")
        first.wait_until(lambda: owners.count() == 1 and stage.folded() > 1_000, 30, "at work alone")
        second = stage.start("worker")
        second.wait_until(lambda: owners.count() == 2, 30, "two at work")
        third = stage.start("worker")
        third.wait_until(lambda: owners.count() == 3, 30, "three at work")
        first.terminate()
        assert first.wait(30) == 0, first.log
        third.wait_until(lambda: owners.count() == 2, 30, "two at work again")
        second.kill()
        feed.finish()
        last = stage.start("worker", "--until-end")
        assert last.wait(90) == 0, last.log
        third.terminate()
        assert third.wait(30) == 0, third.log
    assert stage.watermarks() == stage.log_ends() == stage.committed()

    workers = [first, second, third, last]
    epochs = claimed(workers)
    record_property("claims by partition", {p: len(epochs[p]) for p in sorted(epochs)})
    for partition in range(PARTITIONS):
        # A claim is the only one of its epoch: whoever claims takes the partition from all before.
        # One that was cut short by a revocation has an epoch and no line in a log.
        assert len(set(epochs[partition])) == len(epochs[partition]), epochs[partition]
        assert int(stage.wm(partition)["epoch"]) >= max(epochs[partition])
        seen = owners.seen[partition]
        assert all(one[0] < other[0] for one, other in pairwise(seen)), seen
    assert all(claimed([worker]) for worker in workers), "one of them never had anything to do"
    proof = stage.proven(record_property)
    assert proof.events == feed.sent >= EVENTS
    assert proof.transitions > 10_000
    assert proof.replayed == 0


# --- several partitions under way in one worker ------------------------------------------------------------


class WaitingStore(ProfileStore):
    """A store whose answers for one partition wait for the test; everything else is the real thing."""

    def __init__(self, *args: Any, slow: int) -> None:
        super().__init__(*args)
        self.slow = slow
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()

    async def read(
        self, partition: int, user_ids: Iterable[str], cache: ProfileCache | None = None
    ) -> dict[str, bytes]:
        if partition == self.slow:
            self.asked.set()
            await self.may_answer.wait()
        return await super().read(partition, user_ids, cache)


@asynccontextmanager
async def worker_here(stage: Stage, slow: int, directory: Path) -> AsyncIterator[tuple[Worker, WaitingStore]]:
    """Run a worker in this process: the real one, but for its store."""
    settings = load_settings(Path(stage.options[1]), Path(stage.options[3]), stage.environment)
    async with KafkaAdmin(stage.case.kafka) as admin:
        _, facts = await check_kafka(admin, settings)
    client = connect(stage.case.redis_url)
    built = build_app(settings, facts, client, accept_gap=False)
    store = WaitingStore(client, built.store.owner, slow=slow)
    worker = replace(built, store=store, shell=replace(built.shell, store=store))
    worker.assignment.equip(worker.shell)
    await worker.probe.start()
    await worker.publisher.start()
    await worker.app.start()
    try:
        yield worker, store
        await asyncio.wait_for(worker.assignment.drain(), 10)
        await worker.log.commit()
    finally:
        store.may_answer.set()
        await worker.assignment.stop()
        await asyncio.wait_for(worker.app.stop(), 20)
        await worker.publisher.stop()
        await worker.probe.stop()
        await client.aclose()


def test_a_partition_that_waits_for_redis_does_not_stop_the_others(
    stage: Stage, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    events = synthetic_events(SEED, 30_000)
    of_partition: dict[int, list[dict[str, Any]]] = {p: [] for p in range(PARTITIONS)}
    for e in events:
        of_partition[partition_of(e["user_id"].encode(), PARTITIONS)].append(e)
    slow = max(of_partition, key=lambda p: len(of_partition[p]))
    half = {p: len(of_partition[p]) // 2 for p in of_partition}
    stage.send(e for p in of_partition for e in of_partition[p][: half[p]])
    asyncio.run(_hold_one(stage, slow, of_partition, half, tmp_path))
    assert stage.watermarks() == stage.log_ends() == stage.committed()
    proof = stage.proven(record_property)
    assert proof.repeats == 0


async def _hold_one(
    stage: Stage,
    slow: int,
    of_partition: Mapping[int, Sequence[dict[str, Any]]],
    half: Mapping[int, int],
    directory: Path,
) -> None:
    async with worker_here(stage, slow, directory) as (_, store):
        await asyncio.wait_for(store.asked.wait(), 30)
        everything = {p: len(of_partition[p]) for p in of_partition}

        def watermarks_are(expected: Mapping[int, int]) -> Callable[[], bool]:
            return lambda: stage.watermarks() == expected

        await asyncio.to_thread(
            wait_until, watermarks_are({**half, slow: 0}), 30, "all others folded to the end"
        )
        # Far more than all the buffers between the log and the partition that waits can take.
        await asyncio.to_thread(stage.send, [e for p in of_partition for e in of_partition[p][half[p] :]])
        await asyncio.to_thread(
            wait_until, watermarks_are({**everything, slow: 0}), 30, "what came later folded too"
        )
        store.may_answer.set()
        await asyncio.to_thread(wait_until, watermarks_are(everything), 30, "the last one as well")
