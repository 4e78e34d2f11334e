"""What a partition's task promises to those who wait for it, when a step fails."""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from stream_app.adapters.fuse import FUSE_RECORDS, DeadLetterFuse
from stream_app.adapters.metrics import Metrics
from stream_app.adapters.partition import PartitionMemory, PartitionTask, _Owned, _split_at
from stream_app.adapters.tasks import end_tasks
from stream_app.adapters.transport import Slice
from stream_app.core.decay import NEVER_MS, Weights
from stream_app.core.event import Event, Record
from stream_app.core.fold import Fold
from stream_app.core.segment_set import SegmentSet
from stream_app.core.step import fold_slice
from stream_app.errors import StoreUnavailable, TooManyDeadLetters


class FailingStore:
    """A store that cannot be reached, and says when it was asked."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answer = asyncio.Event()

    async def scored_before(self, partition: int, until_ms: int, limit: int) -> list[str]:
        return []

    async def read(self, partition: int, users: object, cache: object) -> object:
        self.asked.set()
        await self.answer.wait()
        raise StoreUnavailable("Redis, load", "ConnectionError")


def claimed_task(store: FailingStore) -> PartitionTask:
    weights = Weights()
    shell: Any = SimpleNamespace(
        store=store,
        fold=Fold(SegmentSet([], weights), weights),
        metrics=Metrics(),
        clock="event",
        log=SimpleNamespace(processed=lambda partition, offset: None),
        monotonic_s=lambda: 0.0,
        hold_deadline_s=60.0,
        max_dead_letter_share=None,
        patcher=None,
        learner=None,
    )
    task = PartitionTask(0, shell, PartitionMemory())

    async def claim() -> _Owned:
        old: Any = {"of-yesterday": None}
        owned = _Owned(1, 0, 0, 5, 0, None, old, 0, 0.0)
        task._owned = owned
        return owned

    task._claim = claim  # type: ignore[method-assign]
    return task


@pytest.mark.parametrize("how", ["the store fails", "the partition is revoked"])
async def test_whoever_waits_for_a_re_evaluation_is_told_that_it_was_not_made(how: str) -> None:
    store = FailingStore()
    task = claimed_task(store)
    running = asyncio.create_task(task.run())
    await asyncio.sleep(0)
    answer = asyncio.create_task(task.redefine(["u1"]))
    await asyncio.wait_for(store.asked.wait(), 5)
    if how == "the store fails":
        store.answer.set()
    else:
        await end_tasks([running])
    assert await asyncio.wait_for(answer, 5) is False
    await end_tasks([running])


def test_a_slice_is_split_where_the_replay_ends() -> None:
    records = tuple(SimpleNamespace(offset=offset) for offset in (3, 4, 7))
    below, above = _split_at(Slice(0, 2, 9, records), 5)
    assert (below.from_offset, below.next_offset, [r.offset for r in below.records]) == (2, 5, [3, 4])
    assert (above.from_offset, above.next_offset, [r.offset for r in above.records]) == (5, 9, [7])
    assert _split_at(Slice(0, 2, 9, records), 2) == _split_at(Slice(0, 2, 9, records), 9)


def test_the_fuse_blows_over_the_last_10_000_records_only() -> None:
    fuse = DeadLetterFuse(3, 0.5)
    fuse.count(FUSE_RECORDS - 500, FUSE_RECORDS - 500)  # too few records to judge
    fuse = DeadLetterFuse(3, 0.5)
    for _ in range(FUSE_RECORDS // 500):
        fuse.count(500, 0)
    fuse.count(0, 0)
    for _ in range(10):
        fuse.count(500, 500)
    with pytest.raises(TooManyDeadLetters, match="partition 3"):
        fuse.count(500, 500)
    DeadLetterFuse(3, None).count(2 * FUSE_RECORDS, 2 * FUSE_RECORDS)


@pytest.mark.parametrize(
    ("retention_ms", "expires"), [(7 * 86_400_000, True), (NEVER_MS, False), (2**63 - 1, False)]
)
def test_a_forgotten_profile_expires_at_an_instant_that_redis_can_hold_or_never(
    retention_ms: int, expires: bool
) -> None:
    weights = Weights(half_life_s=3600.0)
    shell: Any = SimpleNamespace(clock="wall", retention_ms=retention_ms, monotonic_s=lambda: 0.0)
    shell.max_dead_letter_share = None
    task = PartitionTask(0, shell, PartitionMemory())
    fold = Fold(SegmentSet([], weights), weights)
    at_ms = 1_700_000_000_000
    event = Event("u1", "view", at_ms, "e1", ("tea",))
    result = fold_slice(fold, [Record(0, at_ms, event)], {}, None, "wall", {})
    assert bool(task._step(result.profiles, {}).expires_at_ms) is expires


# --- what waits --------------------------------------------------------------------------------------------


def waiting(*slices: tuple[int, int, int]) -> list[tuple[int, int, int, int]]:
    """Queue slices of (from, next, record bytes); return those taken: from, next, records, acknowledged."""
    task = claimed_task(FailingStore())
    done: list[int] = []
    for number, (begin, end, size) in enumerate(slices):
        records = tuple(SimpleNamespace(offset=n, key=b"", value=b"x" * size) for n in range(begin, end))
        task.submit(Slice(0, begin, end, records), partial(done.append, number))
    taken = []
    while task._queue:
        part, acknowledge = task._next_slice()
        acknowledge()
        assert [record.offset for record in part.records] == list(range(part.from_offset, part.next_offset))
        taken.append((part.from_offset, part.next_offset, len(part.records), len(done)))
    assert done == list(range(len(slices)))
    return taken


def test_small_slices_that_follow_each_other_are_taken_as_one() -> None:
    assert waiting((0, 3, 10), (3, 4, 10), (4, 4, 10), (4, 9, 10)) == [(0, 9, 9, 4)]


def test_no_more_are_taken_together_than_one_slice_may_hold() -> None:
    assert waiting((0, 400, 10), (400, 500, 10), (500, 501, 10)) == [(0, 500, 500, 2), (500, 501, 1, 3)]
    assert waiting((0, 2, 400_000), (2, 3, 400_000)) == [(0, 2, 2, 1), (2, 3, 1, 2)]


def test_slices_with_a_gap_between_them_are_taken_one_by_one() -> None:
    assert waiting((0, 3, 10), (5, 6, 10), (0, 3, 10)) == [(0, 3, 3, 1), (5, 6, 1, 2), (0, 3, 3, 3)]
