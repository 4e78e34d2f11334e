"""One seed is one run: a log, two or three workers, everything that goes wrong, and what came of it.

While the log is written faults happen. Then they stop, and the workers have a while to come to the end:
everything folded and published, everything fired that is due, Kafka's committed offsets at the log's end. The
model is off: what it says is no function of the log (design.md, section 5).
"""

from __future__ import annotations

import asyncio
import json
import random
import zlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from stream_app.adapters.codec import rfc_3339
from stream_app.core.fold import Fold
from stream_app.core.patch import Patcher
from stream_app.errors import HoldExpired
from tests.e2e.proof import Proof
from tests.oracle import OracleRecord
from tests.random_logs import (
    DAY_MS,
    HOUR_MS,
    SECOND_MS,
    Shape,
    core_segments,
    core_weights,
    random_records,
    random_segments,
    random_weights,
)
from tests.simulation import virtual_clock
from tests.simulation.faults import Faults
from tests.simulation.memory_kafka import MemoryKafka
from tests.simulation.memory_redis import MemoryRedis
from tests.simulation.verdict import Witness, prove
from tests.simulation.worker import Surroundings, Worker

FIRST_RECORDS, MOST_RECORDS = 20, 80
#: Virtual Unix time at the start; later than every event of the logs below.
STARTS_AT_MS = 1_900_000_000_000
LONGEST_SILENCE_S = 20.0
WORKERS_AT_MOST = 4
SKEW_MS = 60
#: How often the topic of a live run is older than the service.
HISTORY_SHARE = 0.3
#: How long after the last fault the workers may take to come to the end, virtual seconds.
SETTLES_WITHIN_S = 90.0

WALL_SHAPES = (
    Shape(0, 0, "wall", 300, (2.0, 5.0, 0.1), silence_ms=20 * SECOND_MS, labels=4, silence_share=0.01),
    Shape(0, 0, "wall", 400, (3.0, 0.4, 30.0, 1.0), silence_ms=10 * SECOND_MS, silence_share=0.02),
)
EVENT_SHAPES = (
    Shape(0, 0, "event", 20 * SECOND_MS, (600.0, 60.0, 7200.0, 30.0), silence_ms=DAY_MS, silence_share=0.02),
    Shape(0, 0, "event", 300, (3.0, 1.0, 0.25, 20.0), late_share=0.3, silence_share=0.02),
    Shape(0, 0, "event", HOUR_MS, (7 * 86400.0, 86400.0, 30 * 86400.0), silence_ms=60 * DAY_MS),
)


@dataclass(frozen=True, slots=True)
class Switches:
    """What of the protocol is in force; the controls switch one off."""

    unchecked: frozenset[str] = frozenset()
    publishes_outbox: bool = True


@dataclass(slots=True)
class Outcome:
    """What a run came to; `problems` is empty when all is well."""

    seed: int
    proof: Proof
    problems: list[str] = field(default_factory=list)
    diary: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def run_seed(seed: int, switches: Switches | None = None) -> Outcome:
    """Make one run; the same seed makes the same run."""
    return virtual_clock.run(_Run(seed, switches or Switches()).outcome())


class _WatchedRedis(MemoryRedis):
    """Tells of each accepted script."""

    watch: Callable[[str, Sequence[str], Sequence[Any]], None]

    def evalsha(self, name: str, numkeys: int, *rest: Any) -> list[Any]:
        reply = super().evalsha(name, numkeys, *rest)
        if reply[0] == b"OK":
            self.watch(name, rest[:numkeys], rest[numkeys:])
        return reply


class _Run:
    def __init__(self, seed: int, switches: Switches) -> None:
        self.seed = seed
        self.switches = switches
        self.rng = random.Random(f"simulation/{seed}")

    async def outcome(self) -> Outcome:
        rng, loop = self.rng, asyncio.get_running_loop()
        self.loop = loop
        shape = rng.choice(WALL_SHAPES if rng.random() < 0.6 else EVENT_SHAPES)
        self.clock = shape.clock
        self.shape = Shape(
            **{
                **{name: getattr(shape, name) for name in Shape.__slots__},
                "events": rng.randint(FIRST_RECORDS, MOST_RECORDS),
                "users": rng.randint(3, 12),
            }
        )
        self.weights = random_weights(rng, self.shape)
        self.segments = random_segments(rng, self.shape)
        self.faults = Faults(rng, loop.time)
        self.kafka = MemoryKafka("events", rng.randint(1, 3), rng, self.now_ms, rng.choice([0, 0, 7]))
        self.redis = _WatchedRedis(self.now_ms)
        self.redis.unchecked = self.switches.unchecked
        self.witness = Witness(self.kafka, self.redis, self.clock, self.partition_of)
        fold_weights = core_weights(self.weights)
        fold = Fold(core_segments(self.segments, self.weights), fold_weights)
        self.around = Surroundings(
            self.redis,
            self.kafka,
            self.faults,
            fold,
            self.clock,
            self.now_ms,
            set(),
            [],
            self.witness,
            self.switches.publishes_outbox,
            # Nobody is kept, some are, all are: every way to a profile is gone.
            cache_bytes=(0, 1_500, 1_000_000)[self.seed % 3],
            # Both ways of applying an event.
            patcher=Patcher(fold) if self.seed % 5 else None,
        )
        self.redis.watch = lambda name, keys, args: self.witness.script_ran(
            self.around.committing[-1].name, name, keys, args
        )
        self.workers: list[Worker] = []
        self.wanted = rng.randint(2, 3)
        self.problems: list[str] = []

        self.records = iter(random_records(rng, self.shape))
        if self.clock == "wall" and rng.random() < HISTORY_SHARE:
            self._write_history()
        weather = [asyncio.create_task(work()) for work in self._weather()]
        keeper = asyncio.create_task(self._keep_workers())
        await self._produce()
        await asyncio.sleep(rng.uniform(0.0, 3.0))
        self.faults.note("faults are over")
        self.faults.are_over = True
        for task in weather:
            task.cancel()
        self.around.away.clear()
        proof = Proof()
        if await self._settle():
            until_ms = self.now_ms() if self.clock == "wall" else None
            proof = prove(
                self.kafka, self.redis, self.segments, self.weights, fold_weights, self.clock, until_ms
            )
        keeper.cancel()
        for worker in self.workers:
            await worker.end()
        for name in ("missing", "extra", "wrong", "out_of_order", "state"):
            found = getattr(proof, name)
            if found:
                self.problems.append(f"{len(found)} {name}: {found[:3]}")
        self.problems += self.witness.problems
        counts = self.faults.counts
        counts["repeats"] += proof.repeats
        counts["called replayed as promised"] += self.witness.marked
        counts["commits by whom a loss has passed by"] += self.witness.unaware
        counts["transitions"] += proof.transitions
        counts["dead letters"] += proof.dead_letters
        counts.update({f"refused: {check}": n for check, n in self.redis.refused.items()})
        return Outcome(self.seed, proof, self.problems, self.faults.diary, counts)

    def now_ms(self) -> int:
        return STARTS_AT_MS + int(self.loop.time() * 1000)

    def partition_of(self, user_id: str) -> int:
        return zlib.crc32(user_id.encode()) % len(self.kafka.logs)

    # --- the workers --------------------------------------------------------------------------------------

    async def _keep_workers(self) -> None:
        """Start workers, again when they have died, and let the coordinator notice who is silent."""
        started = 0
        while True:
            for worker in self.workers:
                if worker.is_dead and worker.failure is not None:
                    self._judge_failure(worker.failure)
            self.workers = [worker for worker in self.workers if not worker.is_dead]
            while len(self.workers) < self.wanted:
                started += 1
                skew_ms = self.rng.randint(-SKEW_MS, SKEW_MS)
                self.workers.append(Worker(f"worker-{started}", self.around, skew_ms))
                if self.rng.random() < 0.5:
                    break
            expired = self.kafka.group.expire(self.loop.time())
            self.faults.counts["member expired"] += expired
            await asyncio.sleep(self.rng.uniform(0.1, 1.0))

    def _judge_failure(self, failure: BaseException) -> None:
        if isinstance(failure, HoldExpired):
            self.faults.counts["hold expired"] += 1
        else:
            self.problems.append(f"a worker stopped: {type(failure).__name__}: {failure}")

    # --- the log ------------------------------------------------------------------------------------------

    def _write_history(self) -> None:
        """Let the topic hold events before the service's first worker comes: nobody may act on them."""
        for record in islice(self.records, self.rng.randint(1, FIRST_RECORDS)):
            self._append(self.partition_of(record.user_id), record.user_id, record)
        self.witness.history_below = {p: log.end for p, log in enumerate(self.kafka.logs)}
        self.faults.counts["history"] += 1

    async def _produce(self) -> None:
        """Write the log, at the pace of its own instants in wall mode."""
        last_ms = None
        for record in self.records:
            gap_s = self.rng.uniform(0.0, 0.5)
            if self.clock == "wall" and last_ms is not None:
                gap_s = min(max(0, record.kafka_time_ms - last_ms) / 1000, LONGEST_SILENCE_S)
            last_ms = record.kafka_time_ms
            user_id = record.user_id
            if self.clock == "wall" and self.faults.happens("racing a timer"):
                gap_s, user_id = self._race(gap_s, user_id)
            await asyncio.sleep(gap_s)
            partition = self.partition_of(user_id)
            if self.faults.happens("aborted"):
                self.kafka.abort(partition, self.rng.randint(1, 4))
                self.faults.counts["aborted"] += 1
            self._append(partition, user_id, record)
            if self.faults.happens("bad record"):
                self._append_bad(partition, user_id, record)

    def _race(self, gap_s: float, user_id: str) -> tuple[float, str]:
        """Aim the next record at a user's exit: at its instant, or at its instant and the timer's grace."""
        due = [
            entry
            for p in range(len(self.kafka.logs))
            for entry in self.redis.zrange(f"sa:{{{p}}}:due", 0, 0, withscores=True)
        ]
        if not due:
            return gap_s, user_id
        user, due_ms = self.rng.choice(due)
        aimed_ms = due_ms + self.rng.choice([-2, -1, 0, 1, 140, 149, 150, 151, 155, 200])
        ahead_s = (aimed_ms - self.now_ms()) / 1000
        if not 0 <= ahead_s < LONGEST_SILENCE_S:
            return gap_s, user_id
        self.faults.counts["racing a timer"] += 1
        return ahead_s, user.decode() if self.rng.random() < 0.7 else user_id

    def _append(self, partition: int, user_id: str, record: OracleRecord) -> None:
        lateness_ms = record.kafka_time_ms - record.event_time_ms
        event_ms = record.event_time_ms if self.clock == "event" else self.now_ms() - lateness_ms
        self._write(partition, user_id.encode(), self._event(user_id, event_ms, record))

    def _append_bad(self, partition: int, user_id: str, record: OracleRecord) -> None:
        """Write what must be set aside."""
        key: bytes | None = user_id.encode()
        good = self._event(user_id, record.event_time_ms, record)
        ahead = self._event(user_id, self.now_ms() + DAY_MS, record)
        key, value = self.rng.choice(
            [(key, None), (key, b"{"), (key, b"[]"), (key, ahead), (None, good), (b"somebody else", good)]
        )
        self._write(partition, key, value)
        self.faults.counts["bad record"] += 1

    def _event(self, user_id: str, event_ms: int, record: OracleRecord) -> bytes:
        event = {
            "event_id": record.event_id,
            "user_id": user_id,
            "event_type": record.event_type,
            "timestamp": rfc_3339(event_ms),
            "labels": list(record.labels),
            "asset_id": record.asset_id,
        }
        return json.dumps(event).encode()

    def _write(self, partition: int, key: bytes | None, value: bytes | None) -> None:
        record = self.kafka.append(partition, key, value)
        self.faults.note(f"record {partition}/{record.offset} of {key!r}")

    # --- what happens from outside ------------------------------------------------------------------------

    def _weather(self) -> list[Callable[[], Any]]:
        happenings: dict[str, Callable[[], Any]] = {
            "Redis emptied": self._empty_redis,
            "Redis restored": self._restore_redis,
            "Redis away": lambda: self._away("Redis"),
            "Kafka away": lambda: self._away("Kafka"),
            "rebalance": self._rebalance,
            "terminated": self._terminate,
            "joined": self._join,
            "retention": self._drop_old_records,
        }
        self.snapshots: deque[Any] = deque(maxlen=6)

        def again(name: str) -> Callable[[], Any]:
            async def work() -> None:
                while True:
                    await asyncio.sleep(self.rng.expovariate(1 / self.faults.every_s[name]))
                    await happenings[name]()

            return work

        return [again(name) for name in sorted(self.faults.known)] + [self._take_snapshots]

    async def _take_snapshots(self) -> None:
        while True:
            self.snapshots.append(self.redis.snapshot())
            await asyncio.sleep(self.rng.uniform(0.1, 3.0))

    async def _empty_redis(self) -> None:
        self.witness.state_is_lost()
        self.redis.flushall()
        self.faults.note("Redis is emptied", "Redis emptied")

    async def _restore_redis(self) -> None:
        self.witness.state_is_lost()
        self.redis.restore(self.rng.choice(list(self.snapshots)))
        self.faults.note("Redis is an older snapshot of itself", "Redis restored")

    async def _away(self, what: str) -> None:
        self.around.away.add(what)
        self.faults.note(f"{what} is away", f"{what} away")
        await asyncio.sleep(self.rng.uniform(0.1, 6.0))
        self.around.away.discard(what)
        self.faults.note(f"{what} is back")

    async def _rebalance(self) -> None:
        self.kafka.group.rebalance()
        self.faults.note("the group is rebalanced", "rebalance")

    async def _terminate(self) -> None:
        living = [worker for worker in self.workers if not worker.is_dead]
        if living:
            await self.rng.choice(living).terminate()

    async def _join(self) -> None:
        self.wanted = min(self.wanted + 1, WORKERS_AT_MOST)
        self.faults.counts["joined"] += 1

    async def _drop_old_records(self) -> None:
        """Let retention pass, not over what is still to be folded."""
        for partition, log in enumerate(self.kafka.logs):
            watermark = int(self.redis.hget(f"sa:{{{partition}}}:wm", "watermark") or 0)
            if watermark > log.start:
                log.start = self.rng.randint(log.start, watermark)
                self.faults.note(f"partition {partition} begins at {log.start}", "retention")

    # --- the end ------------------------------------------------------------------------------------------

    async def _settle(self) -> bool:
        """Wait until everything is done; tell whether it was, in time."""
        began_s = self.loop.time()
        while waiting := self._not_done():
            if self.problems:
                return False
            if self.loop.time() - began_s > SETTLES_WITHIN_S:
                self.problems.append(f"after {SETTLES_WITHIN_S} s without a fault still {waiting}")
                return False
            await asyncio.sleep(0.1)
        return True

    def _not_done(self) -> str:
        for partition, log in enumerate(self.kafka.logs):
            prefix = f"sa:{{{partition}}}:"
            wm = self.redis.hgetall(f"{prefix}wm")
            where = f"partition {partition}"
            if int(wm.get(b"watermark", -1)) != log.end:
                return f"{where}: watermark {wm.get(b'watermark')!r} of {log.end}"
            if self.redis.xlen(f"{prefix}outbox"):
                return f"{where}: an outbox"
            if self.kafka.group.committed.get(partition) != log.end:
                return f"{where}: committed {self.kafka.group.committed.get(partition)} of {log.end}"
            until = self.now_ms() if self.clock == "wall" else int(wm[b"stream_time_ms"] or 0)
            if any(score <= until for _, score in self.redis.zrange(f"{prefix}due", 0, 0, withscores=True)):
                return f"{where}: exits due"
        return ""
