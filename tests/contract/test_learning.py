"""Workers that share what they learn through Redis: every record counts once, whatever happens to whom.

A worker here is the real one without Kafka: stores, fold and learner on a log in memory. It is judged by what
one model counts that reads the same log alone.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest
import redis

from stream_app.adapters.learning import COMPACT_EVERY, Learner
from stream_app.adapters.metrics import Metrics
from stream_app.adapters.model_store import KEPT_DELTAS, ModelStore
from stream_app.adapters.profile_store import Commit, Identity, ProfileStore, connect, keys
from stream_app.adapters.rebuild import forget_everything, forget_model
from stream_app.core.decay import Weights
from stream_app.core.discovery import DiscoveryRules
from stream_app.core.event import Event, Record
from stream_app.core.fold import Fold
from stream_app.core.model import NextCategoryModel
from stream_app.core.segment_set import SegmentSet
from stream_app.core.step import fold_slice
from stream_app.errors import (
    CommitMismatch,
    Fenced,
    ModelStateError,
    StateLost,
    StoreUnavailable,
)
from tests.contract.test_profile_store import content, cut_off
from tests.learned import Counts, Stretch, counted, held_by, held_of, packed, stored

SEED = 23
PARTITIONS = 4
WEIGHTS = Weights(half_life_s=30 * 86_400.0)
SEGMENTS = SegmentSet([], WEIGHTS)
T0 = 1_600_000_000_000
LABELS = ("tea", "juice", "cola", "milk", "bread", "jam", "salt", "pepper", "\N{GRINNING FACE}")
SLICE = 40
#: So far apart that the log spans more time than popularity is told apart in.
STEP_MS = 3 * 3_600_000

Log = Mapping[int, Sequence[Record]]


def made_up(seed: int, count: int) -> dict[int, list[Record]]:
    """A log of some partitions, each with users of its own."""
    rng = random.Random(seed)
    log: dict[int, list[Record]] = {p: [] for p in range(PARTITIONS)}
    for number in range(count):
        partition = rng.randrange(PARTITIONS)
        event = Event(
            f"user {partition}-{rng.randrange(30)}",
            rng.choice(("view", "view", "buy")),
            T0 + number * STEP_MS - rng.choice((0, 0, 0, rng.randrange(40 * STEP_MS))),
            f"e{number}",
            tuple(rng.sample(LABELS, rng.choice((0, 1, 1, 1, 2, 3)))),
            rng.choice((None, f"a{rng.randrange(40)}")),
            1.0,
        )
        log[partition].append(Record(len(log[partition]), event.event_time_ms, event))
    return log


@pytest.fixture(scope="module")
def log() -> Log:
    print(f"seed {SEED}")
    return made_up(SEED, 1_600)


def everything(log: Log) -> list[Stretch]:
    return [(p, 0, len(log[p])) for p in log]


_KNOWN: dict[tuple[Stretch, ...], Counts] = {}


def expected(log: Log, stretches: Iterable[Stretch]) -> Counts:
    """What must be counted if some stretches are learned from, each once."""
    wanted = tuple(stretches)
    if wanted not in _KNOWN:
        _KNOWN[wanted] = held_of(counted(log, wanted, WEIGHTS))
    return _KNOWN[wanted]


def totals(counts: Counts) -> Counts:
    """The same, however long ago something was popular."""
    found: Counter[tuple[Any, ...]] = Counter()
    for key, count in counts.items():
        found[key[:-1] if key[0] in ("popularity", "assets") else key] += count
    return found


def kept(url: str) -> Counts:
    """What Redis has counted."""
    return held_of(stored(url, PARTITIONS))


# --- a worker without Kafka ---------------------------------------------------------------------------------


def learner_of(model: NextCategoryModel, store: ModelStore | None, metrics: Metrics | None = None) -> Learner:
    unused: Any = store
    return Learner(
        model,
        unused,
        DiscoveryRules(SEGMENTS),
        WEIGHTS,
        partitions=PARTITIONS,
        max_age_ms=86_400_000,
        checkpoint_s=0.01,
        monotonic_s=lambda: 0.0,
        metrics=metrics or Metrics(),
    )


class Worker:
    """What a worker does with its partitions, one step at a time."""

    def __init__(self, url: str, name: str, log: Log, store: type[ModelStore] = ModelStore) -> None:
        self.client = connect(url)
        self.log = log
        self.profiles = ProfileStore(self.client, name)
        self.store = store(self.client, name)
        self.metrics = Metrics()
        self.model = NextCategoryModel(half_life_ms=WEIGHTS.default_half_life_ms)
        self.learner = learner_of(self.model, self.store, self.metrics)
        self.fold = Fold(SEGMENTS, WEIGHTS, keeps_seen=True)
        self.epoch = dict.fromkeys(range(PARTITIONS), 0)
        self.commit: dict[int, int] = {}
        self.watermark: dict[int, int] = {}
        self.stream_ms: dict[int, int | None] = {}

    async def begin(self, *partitions: int) -> None:
        """Start as a worker does, and take partitions over."""
        await self.learner.start()
        await self.claim(*partitions)

    async def claim(self, *partitions: int) -> None:
        for p in partitions:
            claimed = await self.profiles.claim(
                p,
                Identity("cluster-1", "events", PARTITIONS, "group", "event", WEIGHTS.fingerprint()),
                last_epoch=self.epoch[p],
                log_start=0,
                processed_below=None,
                replay_when_new=None,
                definitions=(SEGMENTS.fingerprint, SEGMENTS.canonical_json()),
                model_on=True,
            )
            wm = claimed.watermark
            self.epoch[p], self.commit[p] = wm.epoch, wm.commit
            self.watermark[p], self.stream_ms[p] = wm.watermark, wm.stream_time_ms
            await self.learner.claim(p, wm.watermark, wm.checkpoint)

    async def slice(self, p: int, size: int = SLICE, *, commits: bool = True) -> None:
        """Fold the next records and learn from them; without a commit, that is all that happens."""
        first = self.watermark[p]
        learned_below = self.learner.learned_below(p)
        if first < learned_below < first + size:
            size = learned_below - first  # as a worker cuts what it has learned from in part
        records = self.log[p][first : first + size]
        if not records:
            return
        users = dict.fromkeys(record.event.user_id for record in records)
        profiles, before = await self.profiles.load(p, users)
        histories = self.learner.histories(profiles, records)
        stream_ms = self.stream_ms[p]
        result = fold_slice(self.fold, records, profiles, stream_ms, "event", {})
        end = first + len(records)
        self.learner.learn(p, histories, result.applied, end)
        if not commits:
            return
        step = Commit(result.profiles, before, watermark=end, stream_time_ms=result.stream_time_ms)
        await self.profiles.commit(p, self.epoch[p], self.commit[p] + 1, step)
        self.commit[p] += 1
        self.watermark[p], self.stream_ms[p] = end, result.stream_time_ms

    async def read(self, p: int, until: int | None = None, size: int = SLICE) -> None:
        """Fold and learn up to an offset, or to the end."""
        until = len(self.log[p]) if until is None else until
        while self.watermark[p] < until:
            await self.slice(p, min(size, until - self.watermark[p]))

    async def checkpoint(self, *partitions: int) -> None:
        for p in partitions:
            await self.learner.checkpoint(p, self.epoch[p])

    async def leave(self, *partitions: int) -> None:
        for p in partitions:
            await self.learner.leave(p, self.epoch[p])

    async def look(self) -> None:
        """Look once at what others have learned."""
        async with self.learner._lock:
            await self.learner._look_at_others()

    @property
    def counts(self) -> Counts:
        """What its model holds."""
        return held_by(self.model)

    @property
    def lost(self) -> float:
        """How many records it says were not learned from."""
        found = self.metrics.registry.get_sample_value("stream_app_model_examples_lost_total")
        assert found is not None
        return found


@pytest.fixture
async def hire(fresh_redis: str, log: Log) -> AsyncIterator[Callable[..., Worker]]:
    """Make workers on one Redis; `hire("a")` has read nothing yet."""
    async with AsyncExitStack() as stack:

        def make(name: str, url: str = fresh_redis, store: type[ModelStore] = ModelStore) -> Worker:
            worker = Worker(url, name, log, store)
            stack.push_async_callback(worker.client.aclose)
            return worker

        yield make


@pytest.fixture
def raw(fresh_redis: str) -> Iterator[Any]:
    with redis.Redis.from_url(fresh_redis) as client:
        yield client


Hire = Callable[..., Worker]


# --- sharing ------------------------------------------------------------------------------------------------


async def test_one_worker_counts_what_a_model_counts_that_reads_the_log_alone(
    hire: Hire, log: Log, fresh_redis: str
) -> None:
    worker = hire("a")
    await worker.learner.start()
    await worker.claim(*range(PARTITIONS))
    for p in range(PARTITIONS):
        await worker.read(p)
    whole = expected(log, everything(log))
    assert whole
    assert worker.counts == whole
    assert kept(fresh_redis) == {}
    await worker.leave(*range(PARTITIONS))
    assert kept(fresh_redis) == worker.counts == whole


@pytest.mark.parametrize("seed", [1, 2])
async def test_two_workers_that_share_partitions_count_what_one_counts(
    hire: Hire, log: Log, fresh_redis: str, seed: int
) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    owner = {0: hire("a"), 1: hire("b")}
    for worker in owner.values():
        await worker.learner.start()
    for p in range(PARTITIONS):
        await owner[p % 2].claim(p)
    left = list(range(PARTITIONS))
    while left:
        p = rng.choice(left)
        worker = owner[p % 2]
        await worker.slice(p, rng.randint(1, 60))
        if rng.random() < 0.3:
            await worker.checkpoint(p)
        if rng.random() < 0.3:
            await owner[rng.randrange(2)].look()
        if worker.watermark[p] == len(log[p]):
            left.remove(p)
    for p in range(PARTITIONS):
        await owner[p % 2].checkpoint(p)
    for worker in owner.values():
        await worker.look()
    whole = expected(log, everything(log))
    assert owner[0].counts == owner[1].counts == kept(fresh_redis) == whole


async def test_who_comes_later_starts_with_all_that_was_learned(hire: Hire, log: Log) -> None:
    first, second = hire("a"), hire("b")
    await first.claim(0, 1)
    for p in (0, 1):
        await first.read(p)
        await first.checkpoint(p)
    await second.learner.start()
    assert second.counts == first.counts == expected(log, [(p, 0, len(log[p])) for p in (0, 1)])


async def test_whoever_follows_does_so_by_himself_until_he_is_stopped(hire: Hire, log: Log) -> None:
    first, second = hire("a"), hire("b")
    await second.learner.start()
    following = asyncio.create_task(second.learner.follow())
    await first.claim(0)
    await first.read(0)
    await first.checkpoint(0)
    deadline = time.monotonic() + 20
    while second.counts != first.counts:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following


async def test_a_partition_that_changes_hands_cleanly_loses_nothing(
    hire: Hire, log: Log, fresh_redis: str
) -> None:
    first, second = hire("a"), hire("b")
    for worker in (first, second):
        await worker.learner.start()
    owner, other = first, second
    for share in (0.2, 0.4, 0.7, 1.0):
        await owner.claim(0)
        await owner.read(0, int(share * len(log[0])))
        await owner.leave(0)
        await other.look()
        owner, other = other, owner
    whole = expected(log, [(0, 0, len(log[0]))])
    assert first.counts == second.counts == kept(fresh_redis) == whole
    assert first.lost == second.lost == 0


async def test_a_worker_that_starts_on_what_another_left_cleanly_says_of_nothing_that_it_is_lost(
    hire: Hire, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    first = hire("a")
    await first.claim(0)
    await first.read(0, 100)
    await first.leave(0)
    second = hire("b")
    await second.learner.start()
    await second.claim(0)
    assert second.lost == 0
    assert "not learned from" not in caplog.text
    await second.read(0)
    assert second.counts == expected(log, [(0, 0, len(log[0]))])


async def test_rankers_are_the_mean_of_the_own_one_for_each_partition_owned_and_of_those_that_changed(
    hire: Hire, log: Log
) -> None:
    first, second = hire("a"), hire("b")
    for worker, owned in ((first, (0, 1)), (second, (2,))):
        await worker.learner.start()
        await worker.claim(*owned)
        for p in owned:
            await worker.read(p)
    own, theirs = first.model.ranker_state(), second.model.ranker_state()
    assert own != theirs
    await second.checkpoint(2)
    await first.look()
    assert first.model.ranker_state() == first.model.average([own, own, theirs])
    settled = first.model.ranker_state()
    await first.look()
    assert first.model.ranker_state() == settled, "nothing new: nothing changes"
    await first.checkpoint(0, 1)
    newcomer = hire("c")
    await newcomer.learner.start()
    assert newcomer.model.ranker_state() == newcomer.model.average([settled, settled, theirs])


# --- a record is learned from once --------------------------------------------------------------------------


async def test_a_slice_that_is_folded_again_after_a_commit_that_failed_is_not_learned_from_again(
    hire: Hire, log: Log, fresh_redis: str
) -> None:
    worker = hire("a")
    await worker.claim(0)
    await worker.read(0, 80)
    await worker.slice(0, commits=False)
    await worker.slice(0, 25, commits=False)  # the log was cut differently the second time
    await worker.claim(0)
    assert worker.watermark[0] == 80
    await worker.read(0, size=33)
    await worker.leave(0)
    assert worker.counts == kept(fresh_redis) == expected(log, [(0, 0, len(log[0]))])
    assert worker.lost == 0


@pytest.mark.parametrize("followed", [True, False])
async def test_what_was_learned_ahead_of_a_commit_that_failed_is_not_learned_again_by_the_next_owner(
    hire: Hire, log: Log, fresh_redis: str, followed: bool
) -> None:
    first, second = hire("a"), hire("b")
    await second.learner.start()
    await first.claim(0)
    await first.read(0, 80)
    await first.slice(0, commits=False)
    await first.leave(0)  # the checkpoint is 40 records ahead of the watermark
    if followed:
        await second.look()
    await second.claim(0)
    assert second.watermark[0] == 80
    await second.read(0)
    await second.leave(0)
    assert second.counts == kept(fresh_redis) == expected(log, [(0, 0, len(log[0]))])
    assert second.lost == 0


@pytest.mark.parametrize("made", [True, False], ids=["after the write", "before the write"])
async def test_a_checkpoint_whose_reply_was_lost_is_neither_forgotten_nor_counted_twice(
    hire: Hire, log: Log, fresh_redis: str, made: bool
) -> None:
    async with cut_off(fresh_redis) as (cut, url):
        worker = hire("a", url)
        await worker.claim(0)
        await worker.read(0, 80)
        await worker.checkpoint(0)  # Redis knows the script from now on
        await worker.read(0, 120)
        cut.before_reply, cut.before_request = made, not made
        with pytest.raises(StoreUnavailable, match="Redis, checkpoint"):
            await worker.checkpoint(0)
        await worker.claim(0)
        await worker.read(0)
        await worker.checkpoint(0)
        assert worker.counts == kept(fresh_redis) == expected(log, [(0, 0, len(log[0]))])
        assert worker.lost == 0
        await worker.client.aclose()


async def test_after_another_worker_owned_a_partition_only_what_nobody_wrote_down_is_lost(
    hire: Hire, log: Log, fresh_redis: str
) -> None:
    first, second = hire("a"), hire("b")
    for worker in (first, second):
        await worker.learner.start()
    await first.claim(0, 1)
    await first.read(1)
    await first.read(0, 120)
    await first.checkpoint(0, 1)
    await first.read(0, 200)
    await second.claim(0)  # as if the first were dead
    assert second.lost == 80
    with pytest.raises(Fenced):
        await first.leave(0)
    await second.read(0, 260)
    await second.checkpoint(0)
    await first.look()
    assert first.counts == kept(fresh_redis)
    await second.leave(0)
    await first.claim(0)
    await first.read(0)
    await first.leave(0)
    await second.look()
    whole = expected(log, [(0, 0, 120), (0, 200, len(log[0])), (1, 0, len(log[1]))])
    assert first.counts == second.counts == kept(fresh_redis) == whole
    assert first.lost == 0


async def test_a_worker_that_was_fenced_and_claims_again_keeps_what_only_it_has_learned(
    hire: Hire, log: Log, fresh_redis: str
) -> None:
    first, second = hire("a"), hire("b")
    await first.claim(0)
    await first.read(0, 120)
    await second.claim(0)
    with pytest.raises(Fenced):
        await first.checkpoint(0)
    await first.claim(0)
    await first.read(0)
    await first.leave(0)
    assert first.counts == kept(fresh_redis) == expected(log, [(0, 0, len(log[0]))])


async def test_a_worker_takes_back_what_it_could_not_write_down(hire: Hire, log: Log, raw: Any) -> None:
    worker = hire("a")
    await worker.claim(0, 1)
    for p in (0, 1):
        await worker.read(p, 100)
        await worker.checkpoint(p)
        await worker.read(p, 200)
    raw.hset(keys(0).wm, "rebuilding", 1)
    with pytest.raises(StateLost):
        await worker.leave(0)
    assert worker.counts == expected(log, [(0, 0, 100), (1, 0, 200)])
    await worker.leave(1)
    assert worker.counts == expected(log, [(0, 0, 100), (1, 0, 200)])
    await worker.leave(1)  # leaving twice is leaving once
    assert worker.counts == expected(log, [(0, 0, 100), (1, 0, 200)])


async def test_a_redis_that_does_not_answer_makes_a_worker_take_back_what_it_learned(
    hire: Hire, log: Log, fresh_redis: str
) -> None:
    async with cut_off(fresh_redis) as (cut, url):
        worker = hire("a", url)
        await worker.claim(0)
        await worker.read(0, 100)
        await worker.checkpoint(0)
        await worker.read(0, 150)
        cut.before_reply = True  # it is written, and nobody knows
        with pytest.raises(StoreUnavailable):
            await worker.leave(0)
        # What was taken back has moved the present on, from which popularity is told apart.
        assert totals(worker.counts) == totals(expected(log, [(0, 0, 100)]))
        await worker.look()
        assert worker.counts == kept(fresh_redis) == expected(log, [(0, 0, 150)])
        await worker.client.aclose()


# --- a Redis that forgets -----------------------------------------------------------------------------------


async def test_a_redis_that_was_flushed_is_learned_again_from_the_beginning(
    hire: Hire, log: Log, fresh_redis: str, raw: Any
) -> None:
    first, second = hire("a"), hire("b")
    for worker, owned in ((first, (0, 1)), (second, (2, 3))):
        await worker.learner.start()
        await worker.claim(*owned)
        for p in owned:
            await worker.read(p, 150)
            await worker.checkpoint(p)
            await worker.read(p, 200)
    await first.look()
    raw.flushall()
    with pytest.raises(StateLost):
        await first.checkpoint(0)
    for worker, owned in ((first, (0, 1)), (second, (2, 3))):
        await worker.claim(*owned)
        for p in owned:
            assert worker.watermark[p] == 0
            await worker.read(p)
            await worker.checkpoint(p)
    await first.look()
    await second.look()
    whole = expected(log, everything(log))
    assert first.counts == second.counts == kept(fresh_redis) == whole
    assert first.lost == second.lost == 0


async def test_a_follower_sees_that_redis_was_flushed_even_if_it_is_as_full_as_before(
    hire: Hire, log: Log, fresh_redis: str, raw: Any
) -> None:
    first, second = hire("a"), hire("b")
    await first.claim(0)
    await first.read(0, 200)
    await first.checkpoint(0)
    await second.learner.start()
    raw.flushall()
    await first.claim(0)
    await first.read(0, 80)
    await first.checkpoint(0)  # number 1 again, of other records
    await second.look()
    assert second.counts == first.counts == kept(fresh_redis)
    await first.read(0)
    await first.checkpoint(0)
    await second.look()
    assert second.counts == first.counts == expected(log, [(0, 0, len(log[0]))])


def saved(raw: Any) -> dict[bytes, bytes]:
    return {key: raw.dump(key) for key in raw.scan_iter(match="sa:*", count=1000)}


def restore(raw: Any, state: Mapping[bytes, bytes]) -> None:
    raw.flushall()
    for key, value in state.items():
        raw.restore(key, 0, value)


async def test_a_redis_that_was_restored_from_an_older_state_is_learned_again_from_there(
    hire: Hire, log: Log, fresh_redis: str, raw: Any
) -> None:
    first, second = hire("a"), hire("b")
    for worker, owned in ((first, (0, 1)), (second, (2, 3))):
        await worker.learner.start()
        await worker.claim(*owned)
        for p in owned:
            await worker.read(p, 120)
            await worker.checkpoint(p)
    older = saved(raw)
    for worker, owned in ((first, (0, 1)), (second, (2, 3))):
        for p in owned:
            await worker.read(p, 240)
            await worker.checkpoint(p)
            await worker.read(p, 280)
    await first.look()
    restore(raw, older)
    with pytest.raises(CommitMismatch):
        await first.slice(0)
    for worker, owned in ((first, (0, 1)), (second, (2, 3))):
        await worker.claim(*owned)
        for p in owned:
            assert worker.watermark[p] == 120
            await worker.read(p)
            await worker.checkpoint(p)
    await first.look()
    await second.look()
    whole = expected(log, everything(log))
    assert first.counts == second.counts == kept(fresh_redis) == whole
    assert first.lost == second.lost == 0


async def test_a_follower_sees_that_redis_was_restored_even_if_it_is_as_full_as_before(
    hire: Hire, log: Log, fresh_redis: str, raw: Any
) -> None:
    first, second = hire("a"), hire("b")
    await first.claim(0)
    for end in (60, 120):
        await first.read(0, end)
        await first.checkpoint(0)
    older = saved(raw)
    await first.read(0, 180)
    await first.checkpoint(0)
    await second.learner.start()
    restore(raw, older)
    await first.claim(0)
    await first.read(0, 300)
    await first.checkpoint(0)  # number 3 again, of more records
    await second.look()
    assert second.counts == first.counts == kept(fresh_redis)
    await first.read(0)
    await first.checkpoint(0)
    await second.look()
    assert second.counts == first.counts == expected(log, [(0, 0, len(log[0]))])


async def test_who_notices_a_restored_redis_at_somebody_elses_partition_writes_down_nothing_empty(
    hire: Hire, log: Log, fresh_redis: str, raw: Any
) -> None:
    first, second = hire("a"), hire("b")
    await first.claim(0)
    await second.claim(1)
    await first.read(0, 80)
    await second.read(1, 80)
    await first.checkpoint(0)
    await second.checkpoint(1)
    older = saved(raw)
    await first.read(0, 160)
    await second.read(1, 160)
    await first.checkpoint(0)
    await second.checkpoint(1)
    await first.look()
    await first.read(0, 200)
    restore(raw, older)  # under the same epoch
    await first.look()
    await first.checkpoint(0)
    await first.claim(0)
    await first.read(0)
    await first.checkpoint(0)
    stretches = [(0, 0, len(log[0])), (1, 0, 80)]
    assert first.counts == kept(fresh_redis) == expected(log, stretches)


async def test_who_counts_anew_does_not_count_twice_what_is_written_down_and_not_known_to_be(
    hire: Hire, log: Log, fresh_redis: str
) -> None:
    async with cut_off(fresh_redis) as (cut, url):
        first, second = hire("a", url), hire("b")
        await first.claim(0)
        await second.claim(1)
        await first.read(0, 80)
        await first.checkpoint(0)
        for number in range(1, 2 * COMPACT_EVERY + 1):
            await second.read(1, number)
            await second.checkpoint(1)
            if number == 1:
                await first.look()
        await first.read(0, 120)
        cut.before_reply = True
        with pytest.raises(StoreUnavailable):
            await first.checkpoint(0)
        await first.look()  # so far behind with the other partition that it counts anew
        await first.claim(0)
        await first.read(0)
        await first.checkpoint(0)
        stretches = [(0, 0, len(log[0])), (1, 0, 2 * COMPACT_EVERY)]
        assert first.counts == kept(fresh_redis) == expected(log, stretches)
        await first.client.aclose()


# --- adding up ----------------------------------------------------------------------------------------------


async def test_adding_up_changes_nothing_for_anybody(
    hire: Hire, log: Log, fresh_redis: str, raw: Any
) -> None:
    owner, behind, late = hire("a"), hire("b"), hire("c")
    await owner.claim(0)
    await behind.learner.start()
    for number in range(1, COMPACT_EVERY):
        await owner.read(0, number)
        await owner.checkpoint(0)
        if number == COMPACT_EVERY // 2:
            await behind.look()
    assert raw.hget(keys(0).model, "base_number") is None
    await owner.read(0, COMPACT_EVERY)
    await owner.checkpoint(0)
    assert raw.hget(keys(0).model, "base_number") == b"%d" % COMPACT_EVERY
    await behind.look()
    await late.learner.start()
    whole = expected(log, [(0, 0, COMPACT_EVERY)])
    assert owner.counts == behind.counts == late.counts == kept(fresh_redis) == whole
    for number in range(COMPACT_EVERY + 1, 2 * COMPACT_EVERY + 6):
        await owner.read(0, number)
        await owner.checkpoint(0)
    assert raw.hget(keys(0).model, "base_number") == b"%d" % (2 * COMPACT_EVERY)
    last = hire("d")
    await last.learner.start()
    await late.look()
    whole = expected(log, [(0, 0, 2 * COMPACT_EVERY + 5)])
    assert owner.counts == late.counts == last.counts == kept(fresh_redis) == whole


async def test_a_follower_so_far_behind_that_deltas_are_gone_begins_anew(
    hire: Hire, log: Log, fresh_redis: str, raw: Any
) -> None:
    owner, behind = hire("a"), hire("b")
    await behind.claim(1)
    await behind.read(1, 80)
    await behind.checkpoint(1)
    await behind.read(1, 120)  # not written down yet, and not to be forgotten
    await owner.claim(0)
    for number in range(1, 2 * COMPACT_EVERY + KEPT_DELTAS):
        await owner.read(0, number)
        await owner.checkpoint(0)
        if number == 3:
            await behind.look()
    assert raw.xrange(keys(0).model_deltas, count=1)[0][0] > b"4-0"
    await behind.look()
    end = 2 * COMPACT_EVERY + KEPT_DELTAS - 1
    assert behind.counts == expected(log, [(0, 0, end), (1, 0, 120)])
    await behind.read(1)
    await behind.checkpoint(1)
    await owner.look()
    whole = expected(log, [(0, 0, end), (1, 0, len(log[1]))])
    assert owner.counts == behind.counts == kept(fresh_redis) == whole


class Interrupted(ModelStore):
    """A store whose owner adds up between a newcomer's look at the head and at the base."""

    meanwhile: Callable[[], Any] | None = None

    async def heads(self, partitions: Iterable[int]) -> Any:
        found = await super().heads(partitions)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            await meanwhile()
        return found


async def test_a_newcomer_who_reads_while_the_owner_adds_up_counts_nothing_twice(
    hire: Hire, log: Log, fresh_redis: str
) -> None:
    owner, newcomer = hire("a"), hire("b", store=Interrupted)
    await owner.claim(0)

    async def write(first: int, last: int) -> None:
        for number in range(first, last + 1):
            await owner.read(0, number)
            await owner.checkpoint(0)

    await write(1, 2 * COMPACT_EVERY - 1)

    async def meanwhile() -> None:
        await write(2 * COMPACT_EVERY, 2 * COMPACT_EVERY)

    store: Any = newcomer.store
    store.meanwhile = meanwhile
    await newcomer.learner.start()
    await newcomer.look()
    assert newcomer.counts == owner.counts == expected(log, [(0, 0, 2 * COMPACT_EVERY)])


# --- a checkpoint that cannot be read -----------------------------------------------------------------------


def other_settings(raw: Any) -> None:
    raw.hset(keys(0).model, "settings", "f" * 16)


def other_schema(raw: Any) -> None:
    raw.hset(keys(0).model, "schema", "0")


def no_settings(raw: Any) -> None:
    raw.hdel(keys(0).model, "settings")


def no_ranker(raw: Any) -> None:
    raw.hdel(keys(0).model, "ranker")


def text_for_ranker(raw: Any) -> None:
    raw.hset(keys(0).model, "ranker", "text")


def foreign_ranker(raw: Any) -> None:
    raw.hset(keys(0).model, "ranker", packed([1, 2, 3]))


def cut_ranker(raw: Any) -> None:
    raw.hset(keys(0).model, "ranker", raw.hget(keys(0).model, "ranker")[:-3])


def spoil_delta(raw: Any, blob: bytes | None) -> None:
    """Put other bytes into the first delta, or a field that means nothing in the place of all."""
    (first, fields), *rest = raw.xrange(keys(0).model_deltas)
    fields = {b"x": b"y"} if blob is None else {**fields, b"d": blob}
    raw.delete(keys(0).model_deltas)
    for entry, values in [(first, fields), *rest]:
        raw.xadd(keys(0).model_deltas, values, id=entry)


def other_fields_in_delta(raw: Any) -> None:
    spoil_delta(raw, None)


def text_for_delta(raw: Any) -> None:
    spoil_delta(raw, b"text")


def foreign_delta(raw: Any) -> None:
    spoil_delta(raw, packed("not counts"))


def pickled_delta(raw: Any) -> None:
    spoil_delta(raw, b"\x80\x04K\x01.")


def cut_delta(raw: Any) -> None:
    ((_, fields),) = raw.xrange(keys(0).model_deltas, count=1)
    spoil_delta(raw, fields[b"d"][: len(fields[b"d"]) // 2])


def no_first_delta(raw: Any) -> None:
    raw.xdel(keys(0).model_deltas, "1-0")


def no_last_delta(raw: Any) -> None:
    raw.xtrim(keys(0).model_deltas, maxlen=0, approximate=False)


def no_base(raw: Any) -> None:
    raw.hset(keys(0).model, "base_number", 1)


def no_number(raw: Any) -> None:
    raw.hdel(keys(0).model, "number")


def an_older_number(raw: Any) -> None:
    raw.hset(keys(0).model, "number", 2)


def no_checkpoint(raw: Any) -> None:
    raw.delete(keys(0).model)


def neither_checkpoint_nor_deltas(raw: Any) -> None:
    raw.delete(keys(0).model, keys(0).model_deltas)


#: Redis after some checkpoints of partitions 0 and 1; made once for all kinds of damage.
_LEARNED: dict[bytes, bytes] = {}


@pytest.mark.parametrize(
    "damage",
    [
        other_settings, other_schema, no_settings, no_ranker, text_for_ranker, foreign_ranker, cut_ranker,
        text_for_delta, foreign_delta, pickled_delta, cut_delta, other_fields_in_delta, no_first_delta,
        no_last_delta, no_base, no_number, an_older_number, no_checkpoint, neither_checkpoint_nor_deltas,
    ],
)  # fmt: skip
async def test_a_checkpoint_that_cannot_be_read_is_told_with_what_to_do_and_left_as_it_is(
    hire: Hire, log: Log, raw: Any, fresh_redis: str, damage: Callable[[Any], None]
) -> None:
    if not _LEARNED:
        first = hire("a")
        await first.claim(0, 1)
        for end in (20, 40, 60):
            for p in (0, 1):
                await first.read(p, end)
                await first.checkpoint(p)
        _LEARNED.update(saved(raw))
    restore(raw, _LEARNED)
    damage(raw)
    before = content(raw)
    second = hire("b")
    with pytest.raises(ModelStateError, match=r"partition 0|key sa:\{0\}:model") as error:
        await second.begin(0)
    assert "`stream-app rebuild --model`" in error.value.operator_action
    after = content(raw)
    for key in (keys(0).model, keys(0).model_deltas):
        assert after.get(key) == before.get(key), "what may yet be saved was touched"

    # Then what the message says helps.
    assert await forget_model(second.client, PARTITIONS) >= 1
    assert raw.exists(keys(0).model, keys(0).model_deltas, keys(1).model, keys(1).model_deltas) == 0
    profiles = {key for key in before if ":profile:" in key}
    assert {key: content(raw)[key] for key in profiles} == {key: before[key] for key in profiles}
    third = hire("c")
    await third.learner.start()
    await third.claim(0, 1)
    assert third.lost == 0, "forgotten on purpose"
    for p in (0, 1):
        assert third.watermark[p] == 60
        await third.read(p, 80)
        await third.checkpoint(p)
    assert third.counts == kept(fresh_redis)
    left = [record for p in (0, 1) for record in log[p][60:80] if record.event.labels]
    assert third.counts[("examples",)] == len(left)


async def test_a_checkpoint_that_goes_bad_under_a_worker_ends_what_follows_it(
    hire: Hire, log: Log, raw: Any
) -> None:
    first, second = hire("a"), hire("b")
    await first.claim(0)
    await second.learner.start()
    following = asyncio.create_task(second.learner.follow())
    await first.read(0, 60)
    await first.checkpoint(0)
    other_settings(raw)
    with pytest.raises(ModelStateError, match=r"model f{16}"):
        await asyncio.wait_for(following, 20)


async def test_a_forgetting_that_was_broken_off_is_refused_until_it_is_run_again(
    hire: Hire, log: Log, raw: Any
) -> None:
    first = hire("a")
    await first.claim(0)
    await first.read(0, 60)
    await first.checkpoint(0)
    raw.hdel(keys(0).wm, "checkpoint")  # where it was broken off
    second = hire("b")
    with pytest.raises(ModelStateError, match="partition 0"):
        await second.begin(0)
    await forget_model(second.client, PARTITIONS)
    third = hire("c")
    await third.learner.start()
    await third.claim(0)
    await third.read(0)
    await third.checkpoint(0)
    assert third.counts[("examples",)] == sum(bool(record.event.labels) for record in log[0][60:])


async def test_only_the_model_of_an_older_state_is_no_state_to_go_on_from(
    hire: Hire, log: Log, raw: Any
) -> None:
    first = hire("a")
    await first.claim(0)
    await first.read(0, 60)
    await first.checkpoint(0)
    older = {key: raw.dump(key) for key in (keys(0).model, keys(0).model_deltas)}
    await first.read(0, 120)
    await first.checkpoint(0)
    for key, value in older.items():
        raw.restore(key, 0, value, replace=True)
    second = hire("b")
    with pytest.raises(ModelStateError, match="partition 0"):
        await second.begin(0)


async def test_a_rebuild_forgets_the_model_too_and_all_is_learned_again(
    hire: Hire, log: Log, raw: Any, fresh_redis: str
) -> None:
    first = hire("a")
    await first.claim(*range(PARTITIONS))
    for p in range(PARTITIONS):
        await first.read(p)
    await first.leave(*range(PARTITIONS))
    await forget_everything(first.client, PARTITIONS, lambda done, total: None)
    assert raw.keys("*") == []
    second = hire("b")
    await second.learner.start()
    await second.claim(*range(PARTITIONS))
    for p in range(PARTITIONS):
        await second.read(p, size=11)
    await second.leave(*range(PARTITIONS))
    assert second.counts == first.counts == kept(fresh_redis)
