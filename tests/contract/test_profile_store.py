"""What the two Lua scripts and their callers promise, held against a real Redis or Valkey.

The same promises are held against the Redis in memory on which the simulation runs (tests/simulation): what
the simulation says of the commit protocol is as good as that one is like the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from redis.crc import key_slot

from stream_app.adapters import profile_store
from stream_app.adapters.profile_cache import ProfileCache
from stream_app.adapters.profile_store import (
    OUTBOX_PAGE,
    Claim,
    Commit,
    Identity,
    Memberships,
    ProfileStore,
    Watermark,
    connect,
    keys,
)
from stream_app.adapters.redis_client import NEVER
from stream_app.core.decay import NEVER_MS, Weights
from stream_app.core.event import Event
from stream_app.core.fold import Fold
from stream_app.core.profile import Profile, TypeSums
from stream_app.core.segment import Segment
from stream_app.core.segment_set import SegmentSet
from stream_app.embedded import Server
from stream_app.embedded.servers import free_port
from stream_app.errors import CommitMismatch, Fenced, StartRefused, StateLost, StoreUnavailable
from tests.backends import redis_url_of
from tests.simulation.memory_redis import MemoryClient, MemoryRedis

WEIGHTS = Weights(half_life_s=3600.0)
IDENTITY = Identity("cluster-1", "events", 4, "stream-app", "wall", WEIGHTS.fingerprint())
PRESENT = ("f" * 16, '{"segments":"present"}')
T0 = 1_767_323_045_678
ODD_USERS = (
    "u1",
    "u 1",
    " ",
    "{}",
    "{1}",
    "}",
    "a}b{c",
    "1}:profile:u1",
    "}:wm",
    ":profile:u1",
    "profile:u1",
    "u1:profile:u1",
    "*",
    "[u]?",
    "line\nbreak\r\nagain",
    "tab\tnul\0end",
    "u1\u2028u1",
    "-",
    "+inf",
    "\N{GRINNING FACE}" * 128,
    "\N{GRINNING FACE}" * 127 + "u",
)

Content = dict[str, tuple[object, int]]
Writer = Callable[[ProfileStore], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Flavour:
    """One kind of Redis: clients for the store, and an ordinary one to look at what the store wrote."""

    connect: Callable[[], Any]
    raw: Any


@contextlib.contextmanager
def server_flavour(request: pytest.FixtureRequest) -> Iterator[Flavour]:
    url = request.getfixturevalue("fresh_redis")
    with redis.Redis.from_url(url) as client:
        yield Flavour(lambda: connect(url), client)


@contextlib.contextmanager
def memory_flavour(request: pytest.FixtureRequest) -> Iterator[Flavour]:
    server = MemoryRedis(lambda: time.time_ns() // 1_000_000)
    yield Flavour(lambda: MemoryClient(server), server)


@contextlib.contextmanager
def cluster_flavour(request: pytest.FixtureRequest) -> Iterator[Flavour]:
    url = request.getfixturevalue("redis_masters").url
    with AllMasters.from_url(url) as client:
        client.flushall(target_nodes=redis.RedisCluster.PRIMARIES)
        yield Flavour(lambda: connect(url, cluster=True), client)


class AllMasters(redis.RedisCluster):
    """An ordinary client of a Cluster, of which a question without a key is one to all masters."""

    def keys(self, pattern: Any = "*", **kwargs: Any) -> Any:
        return super().keys(pattern, target_nodes=self.PRIMARIES)


FLAVOURS = {"server": server_flavour, "memory": memory_flavour, "cluster": cluster_flavour}


@pytest.fixture(params=FLAVOURS)
def redis_flavour(request: pytest.FixtureRequest) -> Iterator[Flavour]:
    """The kinds of Redis that the whole suite runs on; tests that name a server run on that alone."""
    with FLAVOURS[request.param](request) as flavour:
        yield flavour


@pytest.fixture
def raw(redis_flavour: Flavour) -> Any:
    """An ordinary client of the same Redis, to look at what the store wrote."""
    return redis_flavour.raw


@pytest.fixture
async def store(redis_flavour: Flavour) -> AsyncIterator[ProfileStore]:
    made = ProfileStore(redis_flavour.connect(), "worker-a")
    yield made
    await made.close()


@pytest.fixture
async def rival(redis_flavour: Flavour) -> AsyncIterator[ProfileStore]:
    made = ProfileStore(redis_flavour.connect(), "worker-b")
    yield made
    await made.close()


async def claim(
    store: ProfileStore,
    partition: int = 0,
    *,
    identity: Identity = IDENTITY,
    last_epoch: int = 0,
    log_start: int = 0,
    processed_below: int | None = None,
    replay_when_new: int | None = None,
    definitions: tuple[str, str] = PRESENT,
) -> Claim:
    return await store.claim(
        partition,
        identity,
        last_epoch=last_epoch,
        log_start=log_start,
        processed_below=processed_below,
        replay_when_new=replay_when_new,
        definitions=definitions,
    )


def content(raw: Any) -> Content:
    """Everything that Redis holds, with its expiry. (DUMP will not do: a large hash has no order.)"""
    read: dict[bytes, Callable[[bytes], object]] = {
        b"string": raw.get,
        b"hash": raw.hgetall,
        b"zset": lambda key: raw.zrange(key, 0, -1, withscores=True),
        b"stream": raw.xrange,
    }
    return {
        key.decode(): (read[raw.type(key)](key), raw.pexpiretime(key)) for key in raw.scan_iter(count=1000)
    }


def hash_of(raw: Any, key: str) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in raw.hgetall(key).items()}


def zset_of(raw: Any, key: str) -> dict[str, float]:
    return {member.decode(): score for member, score in raw.zrange(key, 0, -1, withscores=True)}


def member(user_id: str, exits_at_ms: Mapping[str, int], left: Sequence[str] = ()) -> Profile:
    """A profile that is in some segments and has been in others."""
    return Profile(
        user_id,
        T0,
        {"view": TypeSums(1.5, {"tea": 1.25, user_id: 0.5}, {"a-1": 1.0})},
        seqs={**dict.fromkeys(exits_at_ms, 3), **dict.fromkeys(left, 2)},
        exits_at_ms=dict(exits_at_ms),
        recent_ids=b"8 bytes." + b"\0\xff\n\r{}% ",
        applied=2,
        forget_ms=T0 + 1,
        last_transition_ms=T0 - 5,
        definitions=PRESENT[0],
    )


def of(profile: Profile) -> Memberships:
    return dict(profile.memberships)


# --- claiming ----------------------------------------------------------------------------------------------


async def test_a_partition_without_state_is_claimed_at_the_start_of_its_log(
    store: ProfileStore, raw: Any
) -> None:
    got = await claim(store, 3, log_start=17)
    assert got == Claim(
        Watermark("worker-a", 1, 0, 17, None, PRESENT[0], 0),
        definitions={PRESENT[0]: PRESENT[1]},
        next_due_ms=None,
    )
    assert hash_of(raw, "sa:{3}:wm") == {
        "owner": "worker-a",
        "epoch": "1",
        "commit": "0",
        "watermark": "17",
        "stream_time_ms": "",
        "definitions": PRESENT[0],
        "replayed_below": "0",
        "schema": "1",
        "cluster_id": "cluster-1",
        "topic": "events",
        "partitions": "4",
        "group": "stream-app",
        "clock": "wall",
        "weights": WEIGHTS.fingerprint(),
    }
    assert set(raw.keys("*")) == {b"sa:{3}:wm", b"sa:{3}:definitions", b"sa:meta"}


async def test_a_second_claim_takes_the_next_epoch_and_keeps_everything_else(
    store: ProfileStore, rival: ProfileStore
) -> None:
    first = (await claim(store)).watermark
    user = member("u1", {"tea": T0 + 9})
    await store.commit(
        0, first.epoch, 1, Commit({"u1": user}, {}, {}, [b"m"], watermark=20, stream_time_ms=T0)
    )
    got = await claim(rival, log_start=5)
    assert got.watermark == replace(
        first, owner="worker-b", epoch=first.epoch + 1, commit=1, watermark=20, stream_time_ms=T0
    )
    assert got.next_due_ms == T0 + 9
    assert [page async for page in rival.outbox(0)] == [[b"m"]]


@pytest.mark.parametrize(
    ("stored", "last_epoch", "expected"), [(None, 7, 8), (3, 41, 42), (41, 3, 42), (5, 5, 6)]
)
async def test_an_epoch_is_above_the_stored_one_and_above_every_one_that_the_worker_ever_held(
    store: ProfileStore, raw: Any, stored: int | None, last_epoch: int, expected: int
) -> None:
    if stored is not None:
        await claim(store)
        raw.hset("sa:{0}:wm", "epoch", stored)
    assert (await claim(store, last_epoch=last_epoch)).watermark.epoch == expected
    assert raw.hget("sa:{0}:wm", "epoch") == b"%d" % expected


@pytest.mark.parametrize(
    ("field", "stored", "said"),
    [
        (
            "cluster_id",
            "cluster-0",
            "expected state of cluster id cluster-1, got state of cluster id cluster-0",
        ),
        ("topic", "clicks", "expected state of topic events, got state of topic clicks"),
        ("partitions", "6", "expected state of partitions 4, got state of partitions 6"),
        ("group", "others", "expected state of group stream-app, got state of group others"),
        ("clock", "event", "expected state of clock wall, got state of clock event"),
        ("weights", '{"half_life_s":60.0}', 'got state of weights {"half_life_s":60.0}'),
        ("schema", "0", "expected state of schema 1, got state of schema 0"),
        ("cluster_id", None, "got state of cluster id (none)"),
    ],
)
async def test_state_of_anything_else_is_refused_with_both_values_and_what_to_do(
    store: ProfileStore, raw: Any, field: str, stored: str | None, said: str
) -> None:
    await claim(store)
    if stored is None:
        raw.hdel("sa:{0}:wm", field)
    else:
        raw.hset("sa:{0}:wm", field, stored)
    before = content(raw)
    with pytest.raises(StartRefused) as refused:
        await claim(store, definitions=("other", "{}"), processed_below=99)
    sentence = str(refused.value)
    assert said in sentence
    assert sentence.startswith("key sa:{0}:wm: ")
    assert "stream-app rebuild" in refused.value.operator_action
    assert ("restore the old [weights]" in sentence) == (field == "weights")
    assert content(raw) == before


@pytest.mark.parametrize("known", [True, False])
async def test_a_partition_that_is_being_rebuilt_is_refused_and_left_alone(
    store: ProfileStore, raw: Any, known: bool
) -> None:
    if known:
        await claim(store)
    raw.hset("sa:{0}:wm", "rebuilding", 1)
    before = content(raw)
    with pytest.raises(StartRefused, match=r"partition 0, key sa:\{0\}:wm.*Run `stream-app rebuild` again"):
        await claim(store)
    assert content(raw) == before


@pytest.mark.parametrize(
    ("stored", "processed_below", "replay_when_new", "expected"),
    [
        # (watermark, replayed_below) in Redis, or none; Kafka's committed offset; the log's end
        pytest.param(None, None, None, 0, id="new, Kafka knows nothing, event clock"),
        pytest.param(None, None, 30, 30, id="new, Kafka knows nothing, wall clock"),
        pytest.param(None, None, 10, 0, id="new, and the log is empty"),
        pytest.param(None, 20, None, 20, id="new, Kafka knows how far the group was"),
        pytest.param(None, 20, 30, 20, id="what Kafka knows wins over the end of the log"),
        pytest.param((15, 0), 20, None, 20, id="the group was further than Redis"),
        pytest.param((15, 0), 15, None, 0, id="the group was where Redis is"),
        pytest.param((15, 0), 12, None, 0, id="the group was behind Redis"),
        pytest.param((15, 0), None, 30, 0, id="the log's end says nothing about state that is there"),
        pytest.param((15, 18), 16, None, 18, id="never lowered"),
        pytest.param((15, 18), None, None, 18, id="kept when Kafka has forgotten the group"),
        pytest.param((15, 18), 40, None, 40, id="raised"),
        pytest.param((40, 18), 30, None, 18, id="not raised to what is below the watermark"),
    ],
)
async def test_what_was_processed_before_and_is_not_in_redis_will_be_called_replayed(
    store: ProfileStore,
    raw: Any,
    stored: tuple[int, int] | None,
    processed_below: int | None,
    replay_when_new: int | None,
    expected: int,
) -> None:
    if stored is not None:
        await claim(store)
        raw.hset("sa:{0}:wm", mapping={"watermark": stored[0], "replayed_below": stored[1]})
    got = await claim(store, log_start=10, processed_below=processed_below, replay_when_new=replay_when_new)
    assert got.watermark.replayed_below == expected
    assert raw.hget("sa:{0}:wm", "replayed_below") == b"%d" % expected


async def test_profiles_without_the_watermark_that_speaks_for_them_are_refused(
    store: ProfileStore, raw: Any
) -> None:
    await claim(store)
    await store.commit(0, 1, 1, Commit({"u1": member("u1", {"tea": T0})}, {}, {}, [b"m"], 1, T0))
    raw.delete("sa:{0}:wm")
    before = content(raw)
    with pytest.raises(StartRefused, match=r"partition 0, key sa:\{0\}:wm.*run `stream-app rebuild`"):
        await claim(store)
    assert content(raw) == before


async def test_a_claim_under_new_definitions_hands_out_the_old_ones_and_leaves_the_mark(
    store: ProfileStore,
) -> None:
    await claim(store, definitions=("old", "{old}"))
    got = await claim(store, definitions=("new", "{new}"))
    assert got.definitions == {"old": "{old}", "new": "{new}"}
    assert got.watermark.definitions == "old"


# --- refusing a commit -------------------------------------------------------------------------------------


async def commit_something(store: ProfileStore) -> None:
    """What a worker of epoch 5 that knows of commit 8 would write next."""
    user = member("u1", {"tea": T0 + 1})
    step = Commit({"u1": user}, {}, {"u1": T0 * 2}, [b"m"], 99, T0, definitions="new")
    await store.commit(0, 5, 9, step)


async def trim_something(store: ProfileStore) -> None:
    await store.trim(0, 5, 8)


@pytest.mark.parametrize("writes", [commit_something, trim_something])
@pytest.mark.parametrize(
    ("wm", "error"),
    [
        pytest.param(None, StateLost, id="Redis was emptied"),
        pytest.param({"rebuilding": 1}, StateLost, id="only the mark of a rebuild"),
        pytest.param(
            {"owner": "worker-a", "epoch": 5, "commit": 8, "rebuilding": 1},
            StateLost,
            id="a rebuild has begun under the worker",
        ),
        pytest.param({"owner": "worker-a", "epoch": 4, "commit": 8}, StateLost, id="an older snapshot"),
        pytest.param(
            {"owner": "worker-b", "epoch": 4, "commit": 3}, StateLost, id="an older one of another's"
        ),
        pytest.param({"owner": "worker-b", "epoch": 5, "commit": 8}, Fenced, id="another owner"),
        pytest.param({"owner": "worker-b", "epoch": 5, "commit": 3}, Fenced, id="fenced before mismatched"),
        pytest.param({"owner": "worker-a", "epoch": 6, "commit": 8}, Fenced, id="a higher epoch"),
        pytest.param({"owner": "worker-b", "epoch": 10, "commit": 8}, Fenced, id="10 is higher than 5"),
        pytest.param({"owner": "worker-a", "epoch": 5, "commit": 9}, CommitMismatch, id="one commit ahead"),
        pytest.param({"owner": "worker-a", "epoch": 5, "commit": 7}, CommitMismatch, id="one commit behind"),
    ],
)
async def test_a_writer_that_does_not_own_what_it_believes_writes_nothing(
    store: ProfileStore,
    raw: Any,
    writes: Writer,
    wm: Mapping[str, str | int] | None,
    error: type[Exception],
) -> None:
    if wm is not None:
        raw.hset("sa:{0}:wm", mapping={"watermark": 1, **wm})
    raw.xadd("sa:{0}:outbox", {"m": "not published yet"}, id="8-1")
    raw.set("sa:{0}:profile:u1", "as it was")
    raw.hset("sa:{0}:definitions", "old", "{}")
    before = content(raw)
    with pytest.raises(error) as refused:
        await writes(store)
    assert content(raw) == before
    if isinstance(refused.value, Fenced) and wm is not None:
        assert (refused.value.partition, refused.value.owner) == (0, wm["owner"])
    if isinstance(refused.value, CommitMismatch) and wm is not None:
        assert (refused.value.stored, refused.value.expected) == (wm["commit"], 8)


async def test_the_owner_writes_nothing_into_what_is_being_rebuilt(store: ProfileStore, raw: Any) -> None:
    mine = (await claim(store)).watermark
    raw.hset("sa:{0}:wm", "rebuilding", 1)
    before = content(raw)
    with pytest.raises(StateLost):
        await store.commit(0, mine.epoch, 1, Commit(watermark=5))
    with pytest.raises(StateLost):
        await store.trim(0, mine.epoch, 0)
    assert content(raw) == before


async def test_whoever_was_claimed_away_is_fenced_and_the_rival_goes_on(
    store: ProfileStore, rival: ProfileStore, raw: Any
) -> None:
    mine = (await claim(store)).watermark
    theirs = (await claim(rival)).watermark
    with pytest.raises(Fenced, match="worker-b"):
        await store.commit(0, mine.epoch, 1, Commit(watermark=5))
    with pytest.raises(Fenced, match="worker-b"):
        await store.trim(0, mine.epoch, 0)
    await rival.commit(0, theirs.epoch, 1, Commit(watermark=7))
    assert raw.hget("sa:{0}:wm", "watermark") == b"7"


# --- what a commit does ------------------------------------------------------------------------------------


async def test_one_commit_writes_profiles_indexes_outbox_and_watermark(store: ProfileStore, raw: Any) -> None:
    await claim(store, 2)
    users = {
        "in": member("in", {"tea": T0 + 50, "milk": T0 + 40}),
        "for ever": member("for ever", {"tea": NEVER_MS}),
        "out": member("out", {}, left=["tea"]),
    }
    step = Commit(users, {}, {"out": T0 * 2}, [b"first", b"", b"\xff\0third"], 8, T0)
    assert await store.commit(2, 1, 1, step) == T0 + 40
    assert (await store.load(2, ["for ever", "nobody", "in", "out"])) == (
        users,
        {name: of(user) for name, user in users.items()},
    )
    assert zset_of(raw, "sa:{2}:members:tea") == {"in": T0 + 50, "for ever": float("inf")}
    assert zset_of(raw, "sa:{2}:members:milk") == {"in": T0 + 40}
    assert zset_of(raw, "sa:{2}:due") == {"in": T0 + 40}
    assert raw.xrange("sa:{2}:outbox") == [(b"1-1", {b"1": b"first", b"2": b"", b"3": b"\xff\0third"})]
    wm = hash_of(raw, "sa:{2}:wm")
    assert (wm["commit"], wm["watermark"], wm["stream_time_ms"]) == ("1", "8", str(T0))
    assert (wm["owner"], wm["epoch"], wm["definitions"]) == ("worker-a", "1", PRESENT[0])
    assert len(raw.keys("*")) == 10  # the four above, three profiles, wm, definitions, sa:meta


async def test_the_next_commit_writes_only_what_has_changed_and_removes_what_has_ended(
    store: ProfileStore, raw: Any
) -> None:
    await claim(store)
    first = {
        "stays": member("stays", {"tea": T0 + 10, "milk": T0 + 90}),
        "later": member("later", {"tea": T0 + 20}),
        "leaves": member("leaves", {"tea": T0 + 30, "milk": T0 + 99}),
        "for ever": member("for ever", {"tea": T0 + 40}),
    }
    await store.commit(0, 1, 1, Commit(first, {}, {}, [b"a", b"b"], 4, T0))
    profiles, before = await store.load(0, first)
    # The indexes are told apart from what the store writes: what is said to be unchanged is not touched.
    raw.zadd("sa:{0}:members:milk", {"stays": 1, "leaves": 3})
    raw.zadd("sa:{0}:due", {"stays": 2})
    second = {
        "stays": profiles["stays"],
        "later": member("later", {"tea": T0 + 25}),
        "leaves": member("leaves", {"milk": T0 + 99}, left=["tea"]),
        "for ever": member("for ever", {"tea": NEVER_MS}),
    }
    assert await store.commit(0, 1, 2, Commit(second, before, {}, [b"c"], 6, T0 + 1)) == 2
    assert zset_of(raw, "sa:{0}:members:tea") == {
        "stays": T0 + 10,
        "later": T0 + 25,
        "for ever": float("inf"),
    }
    assert zset_of(raw, "sa:{0}:members:milk") == {"stays": 1, "leaves": 3}
    assert zset_of(raw, "sa:{0}:due") == {"stays": 2, "later": T0 + 25, "leaves": T0 + 99}
    assert raw.xrange("sa:{0}:outbox") == [(b"2-1", {b"1": b"c"})]
    third = {name: member(name, {}, left=["tea", "milk"]) for name in second}
    before = {name: of(profile) for name, profile in second.items()}
    assert await store.commit(0, 1, 3, Commit(third, before, {}, [], 7, T0 + 2)) is None
    assert raw.exists("sa:{0}:due", "sa:{0}:members:tea", "sa:{0}:members:milk", "sa:{0}:outbox") == 0


async def test_what_a_commit_does_not_name_stays_as_it_is(store: ProfileStore, raw: Any) -> None:
    await claim(store)
    await store.commit(0, 1, 1, Commit(watermark=5, stream_time_ms=T0))
    before = hash_of(raw, "sa:{0}:wm")
    await store.commit(0, 1, 2, Commit())
    assert hash_of(raw, "sa:{0}:wm") == {**before, "commit": "2"}
    await store.commit(0, 1, 3, Commit(watermark=0, stream_time_ms=0))  # 0 is a value
    assert hash_of(raw, "sa:{0}:wm") == {**before, "commit": "3", "watermark": "0", "stream_time_ms": "0"}


async def test_what_is_called_replayed_can_be_forgotten_with_the_log_that_it_was_about(
    store: ProfileStore, raw: Any
) -> None:
    await claim(store, processed_below=30)
    await store.commit(0, 1, 1, Commit(watermark=5))
    assert raw.hget("sa:{0}:wm", "replayed_below") == b"30"
    await store.commit(0, 1, 2, Commit(watermark=0, replayed_below=0))
    assert raw.hget("sa:{0}:wm", "replayed_below") == b"0"


async def test_the_mark_of_new_definitions_drops_all_older_sets(store: ProfileStore, raw: Any) -> None:
    for definitions in (("first", "{1}"), ("second", "{2}"), ("third", "{3}")):
        await claim(store, definitions=definitions)
    assert len(hash_of(raw, "sa:{0}:definitions")) == 3
    await store.commit(0, 3, 1, Commit(watermark=1))
    assert len(hash_of(raw, "sa:{0}:definitions")) == 3
    await store.commit(0, 3, 2, Commit(definitions="third"))
    assert hash_of(raw, "sa:{0}:definitions") == {"third": "{3}"}
    assert raw.hget("sa:{0}:wm", "definitions") == b"third"


async def test_an_expiry_is_set_to_its_instant_and_cleared_by_the_next_commit_without_one(
    store: ProfileStore, raw: Any
) -> None:
    await claim(store)
    user = member("u1", {}, left=["tea"])
    expires_at_ms = time.time_ns() // 1_000_000 + 86_400_000
    await store.commit(0, 1, 1, Commit({"u1": user, "u2": user}, {}, {"u1": expires_at_ms}))
    assert raw.pexpiretime("sa:{0}:profile:u1") == expires_at_ms
    assert raw.pexpiretime("sa:{0}:profile:u2") == -1
    back = {name: member(name, {"tea": T0 + 1}) for name in ("u1", "u2")}
    await store.commit(0, 1, 2, Commit(back, {"u1": of(user), "u2": of(user)}))
    assert raw.pexpiretime("sa:{0}:profile:u1") == -1


async def test_a_profile_whose_expiry_has_passed_is_gone_and_its_indexes_were_empty(
    store: ProfileStore, raw: Any
) -> None:
    await claim(store)
    await store.commit(0, 1, 1, Commit({"u1": member("u1", {}, left=["tea"])}, {}, {"u1": 1}))
    assert await store.load(0, ["u1"]) == ({}, {})
    assert set(raw.keys("*")) == {b"sa:{0}:wm", b"sa:{0}:definitions", b"sa:meta"}


async def test_a_trim_drops_the_outbox_and_nothing_else(store: ProfileStore, raw: Any) -> None:
    await claim(store)
    user = member("u1", {"tea": T0 + 5})
    await store.commit(0, 1, 1, Commit({"u1": user}, {}, {}, [b"a", b"b"], 3, T0))
    before = content(raw)
    assert await store.outbox_length(0) == 1
    assert await store.trim(0, 1, 1) == T0 + 5
    assert await store.outbox_length(0) == 0
    del before["sa:{0}:outbox"]
    assert content(raw) == before
    assert await store.trim(0, 1, 1) == T0 + 5  # nothing left to drop is fine


@pytest.mark.parametrize("entries", [OUTBOX_PAGE, OUTBOX_PAGE + 1, 3 * OUTBOX_PAGE - 1])
@pytest.mark.parametrize("in_the_last", [1, 100])
async def test_an_outbox_of_many_pages_is_read_to_its_end_in_order(
    store: ProfileStore, raw: Any, entries: int, in_the_last: int
) -> None:
    await claim(store)
    messages = [b"%d" % number for number in range(100 * (entries - 1) + in_the_last)]
    for number in range(1, 12):  # commit 10 comes after commit 9, not after commit 1
        await store.commit(0, 1, number, Commit(outbox=messages))
    assert [entry for entry, _ in raw.xrange("sa:{0}:outbox")] == [
        b"11-%d" % (number + 1) for number in range(entries)
    ]
    pages = [page async for page in store.outbox(0)]
    assert max(map(len, pages)) == min(len(messages), 100 * OUTBOX_PAGE)
    assert [message for page in pages for message in page] == messages
    assert [page async for page in store.outbox(0, 11)] == pages
    assert [page async for page in store.outbox(0, 10)] == []


@pytest.mark.parametrize("count", [500, 1_100])  # the script takes 500 pairs at once
async def test_many_profiles_in_several_segments_fit_into_one_commit(
    store: ProfileStore, raw: Any, count: int
) -> None:
    await claim(store)
    names = [f"user-{number}" for number in range(count)]
    segments = [f"segment-{number}" for number in range(9)]
    users = {
        name: member(name, {s: T0 + 1_000 * n + k for k, s in enumerate(segments) if (n + k) % 3})
        for n, name in enumerate(names)
    }
    step = Commit(users, {}, {}, [name.encode() * 20 for name in names], 500, T0)
    await store.commit(0, 1, 1, step)
    loaded, before = await store.load(0, names)
    assert loaded == users
    assert before == {name: of(user) for name, user in users.items()}
    for segment in segments:
        expected = {n: u.exits_at_ms[segment] for n, u in users.items() if segment in u.exits_at_ms}
        assert zset_of(raw, f"sa:{{0}}:members:{segment}") == expected
    assert zset_of(raw, "sa:{0}:due") == {n: u.next_exit_ms for n, u in users.items()}
    assert await store.outbox_length(0) == count // 100
    gone = {name: member(name, {}, left=segments) for name in names}
    assert await store.commit(0, 1, 2, Commit(gone, before)) is None
    assert raw.keys("sa:{0}:members:*") == []


async def test_profiles_of_the_real_fold_come_back_as_they_were(store: ProfileStore) -> None:
    segments = SegmentSet(
        [Segment("tea", labels=("tea",), min_weight=0.5), Segment("any", event_types=("view",))], WEIGHTS
    )
    fold = Fold(segments, WEIGHTS)
    await claim(store, definitions=(segments.fingerprint, segments.canonical_json()))
    profiles: dict[str, Profile] = {}
    for number in range(200):
        name = f"u{number % 20}"
        event = Event(
            name, "view", T0 + number * 997, f"e-{number}", ("tea", f"l{number}"), f"a{number}", 1.5
        )
        profiles[name], _ = fold.apply(profiles.get(name), event, event.event_time_ms, number)
    next_due_ms = await store.commit(0, 1, 1, Commit(profiles, {}, {}, [], 200, T0))
    loaded, _ = await store.load(0, profiles)
    assert loaded == profiles
    assert next_due_ms == min(p.next_exit_ms for p in profiles.values() if p.next_exit_ms is not None)


async def test_partitions_are_committed_side_by_side(store: ProfileStore) -> None:
    async def work(partition: int) -> None:
        epoch = (await claim(store, partition)).watermark.epoch
        for number in range(1, 26):
            user = member(f"u{number}", {"tea": T0 + number})
            await store.commit(
                partition, epoch, number, Commit({user.user_id: user}, {}, {}, [b"m"], number, T0)
            )
            await store.trim(partition, epoch, number)

    await asyncio.gather(*map(work, range(16)))
    found = await store.watermarks(range(17))
    assert found.pop(16) is None
    assert {(wm.commit, wm.watermark) for wm in found.values() if wm} == {(25, 25)}


# --- whose keys ---------------------------------------------------------------------------------------------


async def test_no_user_id_reaches_the_keys_of_another_user_or_partition(
    store: ProfileStore, raw: Any
) -> None:
    for partition in (0, 1):
        await claim(store, partition)
    theirs = {name: member(name, {"milk": T0 + 7}) for name in ODD_USERS}
    await store.commit(1, 1, 1, Commit(theirs, {}, {}, [b"theirs"], 1, T0))
    before = content(raw)
    users: dict[str, Profile] = {}
    for number, name in enumerate(ODD_USERS):
        users[name] = member(name, {"tea": T0 + number})
        await store.commit(0, 1, number + 1, Commit({name: users[name]}, {}, {}, [b"mine"], number, T0))
    loaded, _ = await store.load(0, ODD_USERS)
    assert loaded == users
    assert (await store.load(1, ODD_USERS))[0] == theirs
    exits = {name: float(T0 + number) for number, name in enumerate(ODD_USERS)}
    assert zset_of(raw, "sa:{0}:members:tea") == exits
    assert zset_of(raw, "sa:{0}:due") == exits
    after = content(raw)
    mine = {key for key in after if key.startswith("sa:{0}:")}
    assert {key: value for key, value in after.items() if key not in mine} == {
        key: value for key, value in before.items() if key not in mine
    }
    assert mine == {f"sa:{{0}}:profile:{name}" for name in ODD_USERS} | {
        "sa:{0}:wm", "sa:{0}:definitions", "sa:{0}:due", "sa:{0}:outbox", "sa:{0}:members:tea",
    }  # fmt: skip
    gone = {name: member(name, {}, left=["tea"]) for name in ODD_USERS}
    step = Commit(gone, {name: of(user) for name, user in users.items()})
    assert await store.commit(0, 1, len(ODD_USERS) + 1, step) is None
    assert raw.exists("sa:{0}:members:tea", "sa:{0}:due") == 0


async def test_a_walk_over_all_profiles_finds_every_user_in_his_partition_and_nothing_else(
    store: ProfileStore, raw: Any
) -> None:
    for partition in (0, 1, 12):
        await claim(store, partition)
        users = {name: member(name, {"tea": T0}) for name in (*ODD_USERS, f"only-{partition}")}
        await store.commit(partition, 1, 1, Commit(users, {}, {}, [b"m"]))
    raw.set("sa:{x}:profile:u1", "no partition")
    raw.set("sb:{0}:profile:u1", "of somebody else")
    found = [user for page in [page async for page in store.scan_users(7)] for user in page]
    assert set(found) == {(p, name) for p in (0, 1, 12) for name in (*ODD_USERS, f"only-{p}")}


async def keys_of_a_full_commit(
    store: ProfileStore, partition: int, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The keys that the scripts are told about, from a claim to the trim."""
    told: list[str] = []
    ask = store._redis.evalsha

    async def evalsha(sha: str, numkeys: int, *rest: Any) -> Any:
        told.extend(key for key in rest[:numkeys] if not key.endswith(NEVER))
        return await ask(sha, numkeys, *rest)

    monkeypatch.setattr(store._redis, "evalsha", evalsha)
    await claim(store, partition)
    users = {name: member(name, {"tea": T0, "milk": T0 + 1}) for name in ODD_USERS}
    scores = dict.fromkeys(ODD_USERS, b"scores")
    step = Commit(users, {}, {}, [b"m"], 1, T0, PRESENT[0], scores=scores, scored_ms=T0)
    await store.commit(partition, 1, 1, step)
    await store.trim(partition, 1, 1)
    return told


@pytest.mark.parametrize("partition", [0, 7, 1234])
async def test_all_keys_of_a_partition_lie_in_one_cluster_slot_and_are_told_to_the_scripts(
    store: ProfileStore, raw: Any, partition: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = await keys_of_a_full_commit(store, partition, monkeypatch)
    assert len(set(told)) == 5 + 2 * len(ODD_USERS) + 2
    assert {key_slot(key.encode()) for key in told} == {key_slot(str(partition).encode())}
    assert {key.decode() for key in raw.keys("*")} == {*told, "sa:meta"} - {keys(partition).outbox}


async def test_a_cluster_node_accepts_every_script(
    redis_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = redis_server("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    url = redis_url_of(server)
    with redis.Redis.from_url(url) as client:
        raw: Any = client
        raw.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        deadline = time.monotonic() + 15
        while b"cluster_state:ok" not in raw.execute_command("CLUSTER", "INFO"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        made = ProfileStore(connect(url), "worker-a")
        try:
            await keys_of_a_full_commit(made, 3, monkeypatch)
            with pytest.raises(StoreUnavailable, match=r"(?i)slot"):  # the node would have said so
                await made._run(3, [keys(3).wm, keys(4).wm], ["worker-a", 1, 1, "trim"], 1)
        finally:
            await made.close()


COMMENT = re.compile(r"--[^\n]*")
FROM_KEYS = re.compile(
    r"^\s*local\s+([\w, ]+?)\s*=\s*(KEYS\[[^\]\n]*(?:\[[^\]\n]*\][^\]\n]*)*\](?:\s*,\s*KEYS\[\d+\])*)\s*$",
    re.M,
)
#: What looks at no key, or writes none.
KEYLESS = re.compile(r"\bredis\.(?:acl_check_cmd|error_reply)\b")
CALL = re.compile(r"\bredis\s*\.\s*\w+\s*\(\s*'(?P<command>\w+)'\s*,\s*(?P<key>KEYS\[|unpack\(\w+|\w+)")


def keys_made_in_lua(text: str) -> list[str]:
    """Name the calls of a script whose key is not one that it was told."""
    code = KEYLESS.sub("", COMMENT.sub("", text))
    told = {
        name.strip()
        for names, values in FROM_KEYS.findall(code)
        for name in names.split(",")
        if names.count(",") == values.count("KEYS[") - 1
    }
    calls = list(CALL.finditer(code))
    # MSET is told in a list in which every other word is a key.
    listed = set()
    for name in re.findall(r"'MSET', unpack\((\w+),", code):
        filled = re.findall(rf"^\s*{name}\[.*$", code, re.M)
        pair = re.compile(rf"\s*{name}\[[^=]*\], {name}\[[^=]*\] = (?:KEYS\[[^\]]*\]|(\w+)),")
        pairs = [line for line in filled if (made := pair.match(line)) and made[1] in {None, *told}]
        if filled and len(pairs) == len(filled):
            listed.add(f"unpack({name}")
    found = [
        f"{call['command']} {call['key']}" for call in calls if call["key"] not in {"KEYS[", *told, *listed}
    ]
    if len(calls) != len(re.findall(r"\bredis\b", code)):
        found.append("a call of another form")
    for name in told:  # a name that is given another value somewhere is no longer a key that was told
        if len(re.findall(rf"\b{name}\b\s*(?:,\s*\w+\s*)*=[^=]", code)) != 1:
            found.append(f"{name} is assigned twice")
    return found


def test_no_script_builds_the_name_of_a_key() -> None:
    # A function is handed its keys under another name; see test_functions.py.
    found = Path(profile_store.__file__).parents[1].rglob("*.lua")
    scripts = sorted(path for path in found if path.name != "functions.lua")
    assert {path.name for path in scripts} >= {"claim.lua", "commit.lua"}
    for path in scripts:
        assert keys_made_in_lua(path.read_text(encoding="utf-8")) == [], path.name


@pytest.mark.parametrize(
    "text",
    [
        "redis.call('SET', 'sa:{' .. p .. '}:wm', 1)",
        "local key = 'sa:' .. ARGV[1]\nredis.call('SET', key, 1)",
        "redis.call('SET', ARGV[1], 1)",
        "local key = KEYS[1]\nkey = key .. 'x'\nredis.call('SET', key, 1)",
        "local call = redis.call\ncall('SET', KEYS[1] .. 'x', 1)",
        "redis.pcall(command, KEYS[1])",
        "list[1], list[2] = 'sa:' .. ARGV[1], 1\nredis.call('MSET', unpack(list, 1, 2))",
        "list[1], list[2] = ARGV[1], KEYS[1]\nredis.call('MSET', unpack(list, 1, 2))",
        "list[1], list[2] = KEYS[1], 1\nlist[3] = 'x'\nredis.call('MSET', unpack(list, 1, 3))",
        "redis.call('MSET', unpack(ARGV, 1, 2))",
    ],
)
def test_a_script_that_builds_the_name_of_a_key_would_be_found(text: str) -> None:
    assert keys_made_in_lua(text)


# --- reading ------------------------------------------------------------------------------------------------


async def test_due_users_come_earliest_first_up_to_the_instant_and_the_limit(store: ProfileStore) -> None:
    await claim(store)
    users = {f"u{n}": member(f"u{n}", {"tea": T0 + 100 - n}) for n in range(100)}
    await store.commit(0, 1, 1, Commit(users))
    assert await store.due(0, T0 + 3, 10) == ["u99", "u98", "u97"]
    assert await store.due(0, T0 + 100, 2) == ["u99", "u98"]
    assert await store.due(0, T0, 10) == []
    assert await store.next_due_ms(0) == T0 + 1
    assert await store.next_due_ms(1) is None


async def test_a_profile_that_cannot_be_read_stops_the_worker_with_what_to_do(
    store: ProfileStore, raw: Any
) -> None:
    raw.set("sa:{0}:profile:u1", b"not a profile")
    with pytest.raises(StartRefused, match=r"partition 0, keys sa:\{0\}:profile:\*.*`stream-app rebuild`"):
        await store.load(0, ["u1"])


async def test_profiles_come_in_the_order_asked_for_whoever_is_kept(store: ProfileStore, raw: Any) -> None:
    users = ["u3", "u1", "u2", "nobody", "u4"]
    blobs = {user: user.encode() for user in users if user != "nobody"}
    for user in ("u3", "u2"):
        raw.set(f"sa:{{0}}:profile:{user}", blobs[user])
    cache = ProfileCache(1_000)
    cache.put_all({user: blobs[user] for user in ("u1", "u4")})
    assert list((await store.read(0, users, cache)).items()) == list(blobs.items())


async def test_nobody_to_load_asks_nothing() -> None:
    made = ProfileStore(connect("redis://127.0.0.1:1/0"), "worker-a")
    assert await made.load(0, []) == ({}, {})
    with pytest.raises(StoreUnavailable, match="Redis, load"):
        await made.load(0, ["u1"])
    await made.close()


# --- a Redis that fails ------------------------------------------------------------------------------------


class Cut:
    """A TCP proxy in front of Redis that cuts a connection when it is told to."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        self._host, self._port = address.hostname, address.port or 6379
        #: Cut when the next request comes (it does not reach Redis), or when the next reply comes.
        self.before_request = self.before_reply = False
        self.connections = 0
        self.requests: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        to_redis, from_redis = await asyncio.open_connection(self._host, self._port)
        there = asyncio.create_task(self._requests(reader, from_redis))
        back = asyncio.create_task(self._replies(to_redis, writer))
        await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
        for task in (there, back):
            task.cancel()
        for end in (writer, from_redis):
            end.close()
            with contextlib.suppress(OSError):
                await end.wait_closed()

    async def _requests(self, reader: asyncio.StreamReader, redis_end: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            self.requests.append(data)
            if self.before_request:
                self.before_request = False
                return
            redis_end.write(data)
            await redis_end.drain()

    async def _replies(self, redis_end: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await redis_end.read(1 << 20):
            if self.before_reply:
                self.before_reply = False
                return
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def cut_off(url: str) -> AsyncIterator[tuple[Cut, str]]:
    cut = Cut(url)
    server = await asyncio.start_server(cut, "127.0.0.1")
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield cut, urlsplit(url)._replace(netloc=f"127.0.0.1:{port}").geturl()


@pytest.mark.parametrize("made", [True, False], ids=["after the write", "before the write"])
async def test_a_commit_whose_connection_is_cut_is_never_repeated(fresh_redis: str, made: bool) -> None:
    with redis.Redis.from_url(fresh_redis) as client:
        await cut_a_commit(fresh_redis, client, made)


async def cut_a_commit(url: str, raw: Any, made: bool) -> None:
    async with cut_off(url) as (cut, url):
        store = ProfileStore(connect(url), "worker-a")
        try:
            await claim(store)
            await store.commit(0, 1, 1, Commit(outbox=[b"first"]))  # Redis knows the script from now on
            cut.requests.clear()
            cut.before_reply, cut.before_request = made, not made
            user = member("u1", {"tea": T0 + 1})
            with pytest.raises(StoreUnavailable, match="Redis, commit"):
                await store.commit(0, 1, 2, Commit({"u1": user}, {}, {}, [b"second"], 7, T0))
            assert b"".join(cut.requests).count(b"EVALSHA") == 1
            assert (raw.hget("sa:{0}:wm", "commit"), raw.hget("sa:{0}:wm", "watermark")) == (
                (b"2", b"7") if made else (b"1", b"0")
            )
            assert [fields for _, fields in raw.xrange("sa:{0}:outbox")] == [
                {b"1": b"second" if made else b"first"}
            ]
            # Only a new claim tells which of the two it was.
            assert (await claim(store)).watermark.commit == (2 if made else 1)
        finally:
            await store.close()


async def test_a_redis_that_is_full_makes_no_commit_and_no_half_of_one(
    redis_server: Callable[..., Server],
) -> None:
    server = redis_server()
    url = redis_url_of(server)
    with redis.Redis.from_url(url) as client:
        raw: Any = client
        store = ProfileStore(connect(url), "worker-a")
        try:
            await claim(store)
            await store.commit(0, 1, 1, Commit({"u1": member("u1", {"tea": T0})}, {}, {}, [b"m"], 1, T0))
            before = content(raw)
            raw.config_set("maxmemory", "1mb")
            raw.config_set("maxmemory", 1 + raw.info("memory")["used_memory"] // 2)
            with pytest.raises(StoreUnavailable, match=r"Redis, commit.*OutOfMemory"):
                await store.commit(0, 1, 2, Commit({"u2": member("u2", {"tea": T0})}, {}, {}, [b"n"], 2, T0))
            assert content(raw) == before
            with pytest.raises(StoreUnavailable, match=r"Redis, commit.*OutOfMemory"):
                await store.commit(0, 1, 2, Commit(watermark=2))
            assert content(raw) == before
            raw.config_set("maxmemory", 0)
            await store.commit(0, 1, 2, Commit(watermark=2))
        finally:
            await store.close()


@pytest.mark.parametrize("url", ["redis://:wr0ng-one@{}/0", "redis://nobody:wr0ng-one@{}/0", "redis://{}/0"])
async def test_wrong_credentials_stop_the_worker_without_showing_them(
    redis_server: Callable[..., Server], url: str
) -> None:
    server = redis_server("--requirepass", "r1ght-one")
    store = ProfileStore(connect(url.format(server.address)), "worker-a")
    with pytest.raises(StartRefused, match="expected to be let in") as refused:
        await claim(store)
    await store.close()
    assert "wr0ng" not in str(refused.value)


async def test_a_command_that_the_acl_forbids_stops_the_worker(redis_server: Callable[..., Server]) -> None:
    server = redis_server("--user", "app", "on", ">app", "~sa:*", "+@all", "-evalsha")
    store = ProfileStore(connect(f"redis://app:app@{server.address}/0"), "worker-a")
    with pytest.raises(StartRefused, match=r"a user who may use sa:\* and the commands of this service"):
        await claim(store)
    await store.close()


@pytest.mark.parametrize("command", ["set", "del", "zadd", "zrem", "zrange", "xadd", "hset", "hkeys", "hdel"])
async def test_a_command_that_the_acl_forbids_inside_a_commit_leaves_nothing_half_made(
    redis_server: Callable[..., Server], command: str
) -> None:
    server = redis_server("--user", "app", "on", ">app", "~sa:*", "+@all")
    store = ProfileStore(connect(f"redis://app:app@{server.address}/0"), "worker-a")
    with redis.Redis.from_url(f"redis://{server.address}/0") as raw:
        try:
            await claim(store)
            before = content(raw)
            raw.acl_setuser("app", commands=[f"-{command}"], enabled=True)
            one = Commit({"u1": member("u1", {"tea": T0})}, {}, {}, [b"m"], 1, T0, definitions="other")
            with pytest.raises(StartRefused, match=f"Redis, commit.*no permissions to run the '{command}'"):
                await store.commit(0, 1, 1, one)
            assert content(raw) == before
            raw.acl_setuser("app", commands=[f"+{command}"], enabled=True)
            await store.commit(0, 1, 1, one)
            assert content(raw) != before
        finally:
            await store.close()
