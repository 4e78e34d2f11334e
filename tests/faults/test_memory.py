"""Two million events through one worker, which does not grow.

The naive oracle would take half an hour for so many; what is checked are counts: every event is folded once,
and who entered and has not left is a member.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pytest
from aiokafka import AIOKafkaProducer
from prometheus_client.parser import text_string_to_metric_families

from stream_app.core.partitioner import partition_of
from stream_app.embedded import Server
from tests.backends import Names, read_to_end
from tests.e2e.proof import Case
from tests.faults import leaky
from tests.faults.rows import Row, seed
from tests.integration.stage import FIRST_S, PARTITIONS, Stage, probe
from tests.processes import Program, Programs

pytestmark = pytest.mark.faults

EVENTS: Final = 2_000_000
#: With the model on an event takes several times as long; of fewer users, so that it has met all of them
#: several times in the first quarter.
EVENTS_WITH_MODEL: Final = 300_000
USERS_WITH_MODEL: Final = 5_000
EVENTS_OF_CONTROL: Final = 160_000
USERS: Final = 20_000
GROWTH: Final = 0.10
#: Records that are sent together; divides a quarter of each count.
PAGE: Final = 2_500
MAX_BATCH_BYTES: Final = 900_000
#: Records that the worker may be behind what is sent: more would only fill the broker's memory.
MOST_BEHIND: Final = 30_000
WEIGHTS: Final[dict[str, Any]] = {"half_life_s": 36_000.0, "history_floor": 0.01}
SEGMENTS: Final[list[dict[str, Any]]] = [
    {"id": "rare", "labels": ["l0"], "min_weight": 1.2, "exit_weight": 0.5},
    {"id": "rarer", "asset_ids": ["p1", "p2"], "min_weight": 0.5, "exclude": ["rare"]},
]
RSS: Final = re.compile(r"^VmRSS:\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Measured:
    """Resident memory of a worker after each quarter of its events, MB, and how long all took."""

    quarters: list[float]
    seconds: float

    @property
    def growth(self) -> float:
        """What came on top after the first quarter, as a share."""
        return self.quarters[-1] / self.quarters[0] - 1.0

    def __str__(self) -> str:
        at = ", ".join(f"{mb:.0f}" for mb in self.quarters)
        return f"RSS {at} MB after each quarter ({self.growth:+.1%}), {self.seconds:.0f} s"


@pytest.fixture
def build(
    kafka_server: Callable[..., Server], fresh_redis: str, programs: Programs, tmp_path: Path
) -> Callable[..., Stage]:
    """Build a stage on a broker of this test's own: what it holds must not stay with the session's."""
    # On a busy machine this takes longer than the session gives a test; each wait has a deadline of its own.
    faulthandler.cancel_dump_traceback_later()
    broker = kafka_server()

    def build(name: str, **settings: Any) -> Stage:
        directory = tmp_path / name
        directory.mkdir()
        case = Case(broker.address, fresh_redis, Names.unique(), SEGMENTS, WEIGHTS, "event")
        return Stage.build(case, programs, directory, **settings)

    return build


def events(count: int, users: int) -> Iterator[tuple[bytes, bytes]]:
    """Make events of users who come again and again, as (key, value), without keeping them."""
    rng = random.Random(seed())
    for n in range(count):
        user = f"u{rng.randrange(users)}"
        labels = f'"l{rng.randrange(64)}", "l{rng.randrange(64)}"'
        yield (
            user.encode(),
            (
                f'{{"event_id": "e{n}", "user_id": "{user}", "event_type": "view", '
                f'"timestamp": {FIRST_S + n}, "labels": [{labels}], "asset_id": "p{rng.randrange(500)}"}}'
            ).encode(),
        )


def measure(stage: Stage, worker: Program, count: int, users: int = USERS) -> Measured:
    """Feed a worker, never far ahead of it, and look at its memory after each quarter."""
    began_s = time.monotonic()
    quarters: list[float] = []

    def look(sent: int) -> None:
        worker.wait_until(lambda: sent - stage.folded() < MOST_BEHIND, 120, f"near {sent}")
        if sent % (count // 4) == 0:
            worker.wait_until(lambda: stage.folded() == sent, 120, f"at {sent}")
            quarters.append(resident_mb(worker))

    asyncio.run(feed(stage, events(count, users), look))
    return Measured(quarters, time.monotonic() - began_s)


async def feed(stage: Stage, stream: Iterator[tuple[bytes, bytes]], look: Callable[[int], None]) -> None:
    """Append events in batches; `look` is told how many are sent, each time that all batches are."""
    async with AIOKafkaProducer(
        bootstrap_servers=stage.case.kafka, acks="all", max_batch_size=MAX_BATCH_BYTES
    ) as producer:
        sent = 0
        while page := list(islice(stream, PAGE)):
            batches = {p: producer.create_batch() for p in range(PARTITIONS)}
            for key, value in page:
                batch = batches[partition_of(key, PARTITIONS)]
                assert batch.append(key=key, value=value, timestamp=None) is not None, "a batch is full"
            for partition, batch in batches.items():
                batch.close()
                await (await producer.send_batch(batch, stage.case.names.events, partition=partition))
            sent += len(page)
            await asyncio.to_thread(look, sent)


def resident_mb(program: Program) -> float:
    """Memory that a process holds, MB."""
    found = RSS.search(Path(f"/proc/{program.pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1000.0


def check_counts(stage: Stage, port: int, count: int) -> tuple[int, int]:
    """Fail unless each event was counted once, and the members are those who entered and did not leave."""
    counted = {
        sample.name: sample.value
        for family in text_string_to_metric_families(probe(port, "metrics")[1])
        for sample in family.samples
        if not sample.labels
    }
    assert counted["stream_app_events_total"] == count
    assert stage.watermarks() == stage.log_ends()
    names = stage.case.names
    members: set[tuple[str, str]] = set()
    with stage.case.open_redis(decode_responses=True) as client:
        for key in client.scan_iter(match="sa:{*}:members:*", count=1_000):
            members |= {(user, key.partition(":members:")[2]) for user in client.zrange(key, 0, -1)}
    entered = ids_and_places(stage, names.entered)
    exited = ids_and_places(stage, names.exited)
    latest: dict[tuple[str, str], tuple[str, int]] = {}
    for place, instant in [*entered.values(), *exited.values()]:
        latest[place] = max(instant, latest.get(place, ("", 0)))
    assert members == {place for place, (_, seq) in latest.items() if seq % 2}
    assert len(entered) - len(exited) == len(members)
    return len(entered), len(exited)


def ids_and_places(stage: Stage, topic: str) -> dict[str, tuple[tuple[str, str], tuple[str, int]]]:
    """Map the id of each transition of a topic to whom it is about and when; none may come twice."""
    found = {}
    for record in asyncio.run(read_to_end(stage.case.kafka, topic)):
        said = json.loads(record.value)
        assert said["id"] not in found
        found[said["id"]] = (said["user_id"], said["segment_id"]), (said["time"], said["seq"])
    return found


def started(stage: Stage, port: int, module: str = "stream_app") -> Program:
    environment = {**stage.environment, "STREAM_APP__WORKER__HTTP_PORT": str(port)}
    return stage.programs.start("worker", *stage.options, environment=environment, module=module)


@pytest.mark.parametrize(
    ("model", "count", "users"),
    [(False, EVENTS, USERS), (True, EVENTS_WITH_MODEL, USERS_WITH_MODEL)],
    ids=["without model", "with model"],
)
def test_memory_stays_bounded(
    model: bool,
    count: int,
    users: int,
    build: Callable[..., Stage],
    port: int,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        f"{count:,} events of {users:,} users through one worker, model {'on' if model else 'off'}",
        "memory after the first quarter and at the end is within 10 %",
    )
    # What is kept of profiles reaches its bound within the first quarter; it is not what is asked here.
    stage = build("stage", model__enabled=model, worker__cache_mb=8)
    worker = started(stage, port)
    measured = measure(stage, worker, count, users)
    row.note(f"{measured}; {count / measured.seconds:,.0f} events/s")
    print(measured)
    assert abs(measured.growth) < GROWTH, str(measured)
    entered, exited = check_counts(stage, port, count)
    row.note(f"each event folded once, {entered:,} enters, {exited:,} exits, members agree (no oracle)")
    worker.terminate()
    assert worker.wait(30) == 0, worker.log


def test_a_worker_that_leaks_is_found_out(
    build: Callable[..., Stage], port: int, fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(
        f"{EVENTS_OF_CONTROL:,} events through a worker that keeps what it has folded",
        "control of the rows on memory: a leak is seen",
    )
    stage = build("stage", model__enabled=False)
    measured = measure(stage, started(stage, port, leaky.__name__), EVENTS_OF_CONTROL)
    row.note(str(measured))
    assert measured.growth > GROWTH, str(measured)
