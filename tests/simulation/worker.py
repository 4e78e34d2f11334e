"""One worker process of a run: the real partition tasks over a Redis and a Kafka in memory.

What a process has is here an object: it dies with `crash`, stands still while it is frozen, and whatever it
had sent is under way without it. Real are `Assignment`, `PartitionTask`, `ProfileStore`, `Decoder`, `Fold`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from stream_app.adapters.assignment import Assignment
from stream_app.adapters.codec import Decoder, Outgoing
from stream_app.adapters.log_ends import LogEnds
from stream_app.adapters.metrics import Metrics
from stream_app.adapters.partition import Shell
from stream_app.adapters.profile_store import Identity, ProfileStore, unavailable
from stream_app.adapters.tasks import end_tasks
from stream_app.adapters.transport import Slice
from stream_app.core.fold import Fold
from stream_app.core.patch import Patcher
from stream_app.errors import StoreUnavailable
from tests.simulation.faults import Fate, Faults
from tests.simulation.memory_kafka import MemoryKafka
from tests.simulation.memory_redis import MemoryClient, MemoryRedis
from tests.simulation.verdict import Witness

READ_FATES: tuple[Fate, ...] = ("crash before", "refused", "frozen before", "frozen after")
WRITE_FATES: tuple[Fate, ...] = (
    "crash before", "crash in flight", "crash after", "refused", "reply lost", "late", "frozen before",
    "frozen after",
)  # fmt: skip
PUBLISH_FATES: tuple[Fate, ...] = (*WRITE_FATES, "torn", "torn crash")
WRITES = ("claim", "commit")
LATE_AT_MOST_S = 4.0
#: As in the profile store's client and the publisher, shortened alike.
TIMEOUT_S = 1.0
HOLD_DEADLINE_S = 45.0


@dataclass(slots=True)
class Surroundings:
    """What all workers of a run share, and what is at present wrong with it."""

    redis: MemoryRedis
    kafka: MemoryKafka
    faults: Faults
    fold: Fold
    clock: Literal["wall", "event"]
    now_ms: Callable[[], int]
    away: set[str]
    #: Whose command Redis is executing.
    committing: list[Worker]
    witness: Witness
    publishes_outbox: bool = True
    cache_bytes: int = 0
    patcher: Patcher | None = None


class Worker:
    """A process, from its start to its end.

    Parameters
    ----------
    name
        Owner in Redis and member of the group; no two workers of a run have the same.
    skew_ms
        How far its clock is ahead of the broker's; within the grace of the timer.
    """

    def __init__(self, name: str, around: Surroundings, skew_ms: int) -> None:
        self.name = name
        self.around = around
        self.is_dead = False
        self.failure: BaseException | None = None
        self.positions: dict[int, int] = {}
        self.done_below: dict[int, int] = {}
        self.generation = -1
        self._loop = asyncio.get_running_loop()
        self._going = asyncio.Event()
        self._going.set()
        self._draining = False
        self.skew_ms = skew_ms
        self.assignment = Assignment()
        client: Any = MemoryClient(around.redis, self._to_redis)
        store = ProfileStore(client, name)
        if not around.publishes_outbox:
            store.outbox = _nothing  # type: ignore[method-assign]
        self.assignment.equip(
            Shell(
                topic=around.kafka.topic,
                clock=around.clock,
                fold=around.fold,
                decoder=Decoder(max_future_skew_s=300.0),
                store=store,
                publisher=MemoryPublisher(self),
                log=MemoryLog(self),
                probe=MemoryProbe(self),
                identity=Identity(
                    "cluster-1",
                    around.kafka.topic,
                    len(around.kafka.logs),
                    "stream-app",
                    around.clock,
                    around.fold.weights.fingerprint(),
                ),
                metrics=Metrics(),
                now_ms=self.now_ms,
                monotonic_s=self._loop.time,
                hold_deadline_s=HOLD_DEADLINE_S,
                max_dead_letter_share=None,
                retention_ms=None,
                check_producer_time=False,
                accept_gap=False,
                load_functions=self._load_functions,
                cache_bytes=around.cache_bytes,
                patcher=around.patcher,
            )
        )
        self._background = [
            asyncio.create_task(work())
            for work in (self._fetch, self._follow_group, self._commit_offsets, self._note_failure)
        ]
        self._burial: asyncio.Task[None] | None = None

    def now_ms(self) -> int:
        return self.around.now_ms() + self.skew_ms

    # --- life and death -----------------------------------------------------------------------------------

    def crash(self, where: str) -> None:
        """End as by SIGKILL: what was sent is under way, nothing more is done."""
        if not self.is_dead:
            self.is_dead = True
            self.around.faults.note(f"{self.name} killed, {where}", f"crash, {where}")
            self._burial = asyncio.create_task(self._bury())

    async def end(self) -> None:
        """Leave nothing behind, at the end of the run."""
        self.is_dead = True
        await self._bury()

    async def _bury(self) -> None:
        await end_tasks(self._background)
        await self.assignment.stop()

    def freeze(self, seconds: float, where: str) -> None:
        """Stand still as by SIGSTOP for a while, then go on as if nothing had been."""
        if self._going.is_set() and not self.is_dead:
            self.around.faults.note(f"{self.name} frozen for {seconds:.1f} s, {where}", "frozen")
            self._going.clear()
            self._loop.call_later(seconds, self._going.set)

    async def terminate(self) -> None:
        """End as by SIGTERM: finish the step in hand, tell Kafka, leave the group."""
        self._draining = True
        draining = asyncio.create_task(self.assignment.drain())
        done, _ = await asyncio.wait([draining], timeout=10.0)
        if not done or self.is_dead:
            await end_tasks([draining])
            self.crash("while draining")
            return
        group = self.around.kafka.group
        group.commit(self.name, self.generation, dict(self.done_below))
        group.leave(self.name)
        self.is_dead = True
        self.around.faults.note(f"{self.name} has ended by itself", "drained")
        self._burial = asyncio.create_task(self._bury())

    # --- the ways to Redis and Kafka ----------------------------------------------------------------------

    async def cross(
        self,
        what: str,
        effect: Callable[[], Any],
        error: Callable[[str], Exception],
        fates: Sequence[Fate],
        torn: Callable[[], Any] | None = None,
    ) -> Any:
        """Make one call: there, its effect, and back; anything may happen at each of the three.

        Parameters
        ----------
        what
            Name of the call, for the diary.
        effect
            What it does where it arrives, and its answer.
        error
            What the client raises, made of why.
        fates
            What this kind of call may meet.
        torn
            Half of the effect, for calls that have one.
        """
        faults, away = self.around.faults, "Kafka" if what.startswith("Kafka") else "Redis"
        await self._alive()
        fate = faults.fate(fates)
        if fate != "well":
            faults.note(f"{self.name} {what}: {fate}", f"{away}, {fate}")
        await asyncio.sleep(faults.latency_s())
        if fate == "frozen before":
            self.freeze(faults.rng.uniform(0.2, 8.0), f"before {what}")
        if fate == "crash before":
            self.crash(f"before {what}")
        if fate == "crash in flight":
            self._loop.call_later(faults.rng.uniform(0.0, LATE_AT_MOST_S), effect)
            self.crash(f"with {what} in flight")
        await self._alive()
        if away in self.around.away:
            await asyncio.sleep(faults.rng.uniform(0.0, 0.5))
            faults.counts[f"{away} found away"] += 1
            raise error("nobody answers")
        if fate == "refused":
            raise error("refused")
        if fate == "late":
            self._loop.call_later(faults.rng.uniform(TIMEOUT_S, LATE_AT_MOST_S), effect)
            await asyncio.sleep(TIMEOUT_S)
            raise error("no answer in time")
        if fate in ("torn", "torn crash") and torn is not None:
            torn()
            if fate == "torn crash":
                self.crash(f"in the middle of {what}")
            await self._alive()
            raise error("cut off")
        answer = effect()
        if fate == "crash after":
            self.crash(f"after {what}")
        if fate == "frozen after":
            self.freeze(faults.rng.uniform(0.2, 8.0), f"after {what}")
        await asyncio.sleep(faults.latency_s())
        await self._alive()
        if fate == "reply lost":
            raise error("reply lost")
        return answer

    async def _to_redis(self, name: str, effect: Callable[[], Any]) -> Any:
        def tracked() -> Any:
            self.around.committing.append(self)
            try:
                return effect()
            finally:
                self.around.committing.pop()

        def error(why: str) -> Exception:
            kind = RedisTimeoutError if why == "no answer in time" else RedisConnectionError
            return kind(why)

        return await self.cross(name, tracked, error, WRITE_FATES if name in WRITES else READ_FATES)

    async def to_kafka(
        self,
        what: str,
        effect: Callable[[], Any],
        fates: Sequence[Fate] = READ_FATES,
        torn: Callable[[], Any] | None = None,
    ) -> Any:
        return await self.cross(
            f"Kafka, {what}", effect, lambda why: StoreUnavailable(f"Kafka, {what}", why), fates, torn
        )

    async def _load_functions(self) -> None:
        with unavailable("load functions"):
            await self._to_redis("load functions", lambda: None)

    async def _alive(self) -> None:
        """Return when the process is not frozen; never, when it is dead."""
        if self.is_dead:
            await self._loop.create_future()
        await self._going.wait()

    # --- what Faust does beside the partitions ------------------------------------------------------------

    async def _fetch(self) -> None:
        around, faults = self.around, self.around.faults
        while True:
            busy = False
            for partition in sorted(self.assignment.tasks):
                if not self.assignment.wants(partition) or "Kafka" in around.away:
                    continue
                start = self.positions[partition]
                end, records = around.kafka.logs[partition].read(start, faults.rng.randint(1, 9))
                if end > start:
                    busy = True
                    self.positions[partition] = end
                    self._hand_on(Slice(partition, start, end, tuple(records)))
            await asyncio.sleep(faults.rng.uniform(0.005, 0.03) if busy else faults.rng.uniform(0.03, 0.15))
            await self._alive()

    def _hand_on(self, part: Slice) -> None:
        faults = self.around.faults

        def submit() -> None:
            if not self.is_dead:
                self.assignment.submit(part, lambda: None)

        what = f"{self.name} partition {part.partition}, offsets {part.from_offset} to {part.next_offset}"
        if faults.happens("slice lost"):
            faults.note(f"{what}: slice lost", "slice lost")
            return
        if faults.happens("slice delayed"):
            faults.note(f"{what}: slice delayed", "slice delayed")
            self._loop.call_later(faults.rng.uniform(0.01, 1.5), submit)
            return
        submit()
        if faults.happens("slice repeated"):
            faults.note(f"{what}: slice repeated", "slice repeated")
            submit()

    async def _follow_group(self) -> None:
        """Be told of a rebalance: soon, or so late that another has the partitions already."""
        around, group, rng = self.around, self.around.kafka.group, self.around.faults.rng
        while True:
            if "Kafka" not in around.away and not self._draining:
                group.heartbeat(self.name, self._loop.time())
                if not group.is_current(self.name, self.generation):
                    await self._take_part()
            await asyncio.sleep(rng.uniform(0.1, 0.5))
            await self._alive()

    async def _take_part(self) -> None:
        around, group, rng = self.around, self.around.kafka.group, self.around.faults.rng
        if self.assignment.tasks and not around.faults.are_over and rng.random() < 0.4:
            await asyncio.sleep(rng.uniform(0.5, 5.0))
            await self._alive()
            around.faults.counts["rebalance heard of late"] += 1
        await self.assignment.revoked(frozenset(self.assignment.tasks))
        self.done_below.clear()
        await self._alive()
        if self.name not in group.heard_s:
            group.join(self.name, self._loop.time())
        self.generation = group.generation
        mine = group.partitions_of(self.name)
        for partition in mine:
            log = around.kafka.logs[partition]
            self.positions[partition] = group.committed.get(partition, log.start)
        around.faults.note(f"{self.name} generation {self.generation}, partitions {sorted(mine)}")
        self.assignment.assigned(mine)

    async def _commit_offsets(self) -> None:
        around = self.around
        while True:
            await asyncio.sleep(1.0)
            await self._alive()
            if "Kafka" not in around.away:
                around.kafka.group.commit(self.name, self.generation, dict(self.done_below))

    async def _note_failure(self) -> None:
        self.failure = await self.assignment.failed()
        if not self.is_dead:
            self.is_dead = True
            self.around.faults.note(f"{self.name} stops: {self.failure}", "stopped")
            self._burial = asyncio.create_task(self._bury())


class MemoryLog:
    """The input topic as one worker reads it."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def rewind(self, partition: int, offset: int) -> None:
        await self._worker.to_kafka("rewind", lambda: self._worker.positions.update({partition: offset}))

    async def position(self, partition: int) -> int | None:
        found: int | None = await self._worker.to_kafka(
            "position", lambda: self._worker.positions.get(partition)
        )
        return found

    async def generation_is_current(self) -> bool:
        worker = self._worker
        group = worker.around.kafka.group
        if worker.around.faults.fate(["refused generation"]) != "well":
            worker.around.faults.note(f"{worker.name} is not believed", "generation refused")
            return False
        current: bool = await worker.to_kafka(
            "generation", lambda: group.is_current(worker.name, worker.generation)
        )
        if not current:
            worker.around.faults.counts["zombie found by Kafka"] += 1
        return current

    async def committed(self, partition: int) -> int | None:
        found: int | None = await self._worker.to_kafka(
            "committed", lambda: self._worker.around.kafka.group.committed.get(partition)
        )
        return found

    def processed(self, partition: int, next_offset: int) -> None:
        self._worker.done_below[partition] = next_offset


class MemoryProbe:
    """Where the log ends, as one worker asks."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def ends(self, partition: int) -> LogEnds:
        log = self._worker.around.kafka.logs[partition]
        asked_ms = self._worker.now_ms()
        found: LogEnds = await self._worker.to_kafka(
            "ends", lambda: LogEnds(log.start, log.end, asked_ms, log.end, log.end)
        )
        return found


class MemoryPublisher:
    """The output topics, as one worker writes to them."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        around = self._worker.around
        around.witness.published(self._worker.name, messages)

        def take(taken: Sequence[Outgoing]) -> None:
            around.kafka.take(taken)
            around.witness.received(taken)

        part = around.faults.part_of(messages)
        await self._worker.to_kafka("publish", lambda: take(messages), PUBLISH_FATES, lambda: take(part))


async def _nothing(partition: int, up_to: int | None = None) -> Any:
    """The outbox of a store that has none, for a control."""
    pages: list[list[bytes]] = []
    for page in pages:
        yield page
