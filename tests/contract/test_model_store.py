"""What `checkpoint.lua` and its caller promise, held against a real Redis or Valkey."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from stream_app.adapters import model_store
from stream_app.adapters.model_store import (
    KEPT_DELTAS,
    MODEL_SCHEMA,
    PAGE_DELTAS,
    ModelStore,
    StoredBase,
    StoredDelta,
    StoredModel,
)
from stream_app.adapters.profile_store import Commit, ProfileStore, connect, keys
from stream_app.embedded import Server
from stream_app.embedded.servers import free_port
from stream_app.errors import CommitMismatch, Fenced, StartRefused, StateLost, StoreUnavailable
from tests.backends import redis_url_of
from tests.contract.test_profile_store import claim, content, cut_off, hash_of, keys_made_in_lua

SETTINGS = "0123456789abcdef"
WRITER = "worker-a-1"
#: Every byte, and what text protocols and Lua patterns trip over.
ODD_BYTES = bytes(range(256)) + b"\r\n$-1\r\n\0%s%%\xff"

Writer = Callable[[ModelStore], Awaitable[None]]


@pytest.fixture
def raw(fresh_redis: str) -> Iterator[Any]:
    """An ordinary client of the same Redis, to look at what the store wrote."""
    with redis.Redis.from_url(fresh_redis) as client:
        yield client


@pytest.fixture
async def profiles(fresh_redis: str) -> AsyncIterator[ProfileStore]:
    made = ProfileStore(connect(fresh_redis), "worker-a")
    yield made
    await made.close()


@pytest.fixture
async def rivals(fresh_redis: str) -> AsyncIterator[ProfileStore]:
    made = ProfileStore(connect(fresh_redis), "worker-b")
    yield made
    await made.close()


@pytest.fixture
async def store(fresh_redis: str) -> AsyncIterator[ModelStore]:
    client = connect(fresh_redis)
    yield ModelStore(client, "worker-a")
    await client.aclose()


def head_of(number: int) -> dict[str, str | bytes | int]:
    """What a worker writes beside the counts of a checkpoint."""
    return {
        "settings": SETTINGS,
        "watermark": 100 * number,
        "ranker": b"ranker %d" % number,
        "accuracy": f'{{"mrr":{number}}}',
    }


async def write(store: ModelStore, partition: int, first: int, last: int) -> None:
    """Make checkpoints `first` to `last`, under the first epoch."""
    for number in range(first, last + 1):
        await store.checkpoint(partition, 1, number, b"delta %d" % number, head_of(number))


async def all_deltas(store: ModelStore, partition: int, first: int = 1) -> list[StoredDelta]:
    """Read page after page, to the end."""
    found: list[StoredDelta] = []
    while page := await store.deltas(partition, found[-1].number + 1 if found else first):
        assert len(page) <= PAGE_DELTAS
        found += page
    return found


def delta_of(number: int) -> StoredDelta:
    """What `write` has written."""
    return StoredDelta(number, WRITER, b"delta %d" % number)


# --- what a checkpoint does ---------------------------------------------------------------------------------


async def test_where_nothing_was_learned_there_is_no_head_no_base_and_no_delta(
    profiles: ProfileStore, store: ModelStore
) -> None:
    got = await claim(profiles)
    assert got.watermark.checkpoint == 0
    assert await store.heads([0, 1]) == {0: None, 1: None}
    assert await store.heads([]) == {}
    assert await store.base(0) == StoredBase(0, None, 0, "")
    assert await store.deltas(0, 1) == []


async def test_a_checkpoint_writes_the_head_the_delta_and_its_number_and_nothing_else(
    profiles: ProfileStore, store: ModelStore, raw: Any
) -> None:
    await claim(profiles, 2)
    before = content(raw)
    await store.checkpoint(2, 1, 1, b"counted", head_of(1))
    assert raw.xrange("sa:{2}:model-deltas") == [(b"1-0", {b"d": b"counted", b"w": WRITER.encode()})]
    assert raw.hgetall("sa:{2}:model") == {
        b"schema": MODEL_SCHEMA.encode(),
        b"settings": SETTINGS.encode(),
        b"writer": WRITER.encode(),
        b"number": b"1",
        b"watermark": b"100",
        b"ranker": b"ranker 1",
        b"accuracy": b'{"mrr":1}',
    }
    after = content(raw)
    wm, _ = after.pop("sa:{2}:wm")
    wm_before, _ = before.pop("sa:{2}:wm")
    assert wm == {**dict(wm_before), b"checkpoint": b"1"}  # type: ignore[call-overload]
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {"sa:{2}:model", "sa:{2}:model-deltas"}
    assert await store.heads([2]) == {2: StoredModel(MODEL_SCHEMA, SETTINGS, WRITER, 1, 0, 100, b"ranker 1")}


async def test_the_next_checkpoint_replaces_the_head_and_appends_its_delta(
    profiles: ProfileStore, store: ModelStore
) -> None:
    await claim(profiles)
    await write(store, 0, 1, 12)  # 10 comes after 9, not after 1
    assert (await store.heads([0]))[0] == StoredModel(
        MODEL_SCHEMA, SETTINGS, WRITER, 12, 0, 1200, b"ranker 12"
    )
    assert await all_deltas(store, 0) == [delta_of(number) for number in range(1, 13)]
    assert await all_deltas(store, 0, first=10) == [delta_of(number) for number in (10, 11, 12)]
    assert await store.deltas(0, 13) == []


async def test_the_number_of_the_last_checkpoint_comes_with_the_claim_and_outlives_the_owner(
    profiles: ProfileStore, rivals: ProfileStore, store: ModelStore, fresh_redis: str
) -> None:
    await claim(profiles)
    await write(store, 0, 1, 3)
    theirs = (await claim(rivals)).watermark
    assert theirs.checkpoint == 3
    client = connect(fresh_redis)
    try:
        rival = ModelStore(client, "worker-b")
        await rival.checkpoint(0, theirs.epoch, 4, b"theirs", head_of(4))
        assert await store.deltas(0, 3) == [delta_of(3), StoredDelta(4, "worker-b-2", b"theirs")]
    finally:
        await client.aclose()
    assert (await claim(profiles)).watermark.checkpoint == 4


async def test_checkpoints_and_commits_have_numbers_of_their_own(
    profiles: ProfileStore, store: ModelStore, raw: Any
) -> None:
    await claim(profiles)
    await profiles.commit(0, 1, 1, Commit(watermark=5))
    await store.checkpoint(0, 1, 1, b"a", head_of(1))
    await profiles.commit(0, 1, 2, Commit(watermark=9))
    await profiles.commit(0, 1, 3, Commit(watermark=12, outbox=[b"m"]))
    await store.checkpoint(0, 1, 2, b"b", head_of(2))
    await profiles.trim(0, 1, 3)
    wm = hash_of(raw, "sa:{0}:wm")
    assert (wm["commit"], wm["checkpoint"], wm["watermark"]) == ("3", "2", "12")


async def test_heads_of_many_partitions_are_told_apart(profiles: ProfileStore, store: ModelStore) -> None:
    for partition in (0, 1, 10, 11):
        await claim(profiles, partition)
        await write(store, partition, 1, partition + 1)
    heads = await store.heads([11, 5, 0, 10, 1])
    assert {p: head.number if head else None for p, head in heads.items()} == {
        11: 12, 5: None, 0: 1, 10: 11, 1: 2,
    }  # fmt: skip


async def test_bytes_come_back_as_they_were(profiles: ProfileStore, store: ModelStore, raw: Any) -> None:
    seed = 11
    print(f"seed {seed}")
    large = random.Random(seed).randbytes(1 << 21)
    await claim(profiles)
    for number, blob in enumerate((b"", b"\0", ODD_BYTES, large), 1):
        await store.checkpoint(0, 1, number, blob, {**head_of(number), "ranker": blob, "accuracy": blob})
        head = (await store.heads([0]))[0]
        assert head is not None
        assert head.ranker == raw.hget("sa:{0}:model", "accuracy") == blob
        assert await store.deltas(0, number) == [StoredDelta(number, WRITER, blob)]
        await store.compact(0, 1, number, blob)
        assert await store.base(0) == StoredBase(number, blob, number, WRITER)


# --- adding up ----------------------------------------------------------------------------------------------


async def test_a_base_replaces_old_deltas_and_the_latest_stay_for_those_who_are_behind(
    profiles: ProfileStore, store: ModelStore, raw: Any
) -> None:
    await claim(profiles)
    await write(store, 0, 1, KEPT_DELTAS + 9)
    head = (await store.heads([0]))[0]
    wm = raw.hgetall("sa:{0}:wm")
    await store.compact(0, 1, KEPT_DELTAS + 9, b"all of them")
    assert await store.base(0) == StoredBase(KEPT_DELTAS + 9, b"all of them", KEPT_DELTAS + 9, WRITER)
    kept = await all_deltas(store, 0)
    assert [delta.number for delta in kept] == list(range(10, KEPT_DELTAS + 10))
    assert kept[0] == delta_of(10)
    after = (await store.heads([0]))[0]
    assert head is not None
    assert after == replace(head, base_number=KEPT_DELTAS + 9)
    assert raw.hgetall("sa:{0}:wm") == wm, "what is learned is the same"


async def test_a_base_of_few_deltas_keeps_them_all(profiles: ProfileStore, store: ModelStore) -> None:
    await claim(profiles)
    await write(store, 0, 1, 5)
    await store.compact(0, 1, 5, b"five")
    assert [delta.number for delta in await all_deltas(store, 0)] == [1, 2, 3, 4, 5]


async def test_deltas_go_on_after_a_base_and_a_later_base_takes_its_place(
    profiles: ProfileStore, store: ModelStore
) -> None:
    await claim(profiles)
    await write(store, 0, 1, 5)
    await store.compact(0, 1, 5, b"five")
    await write(store, 0, 6, KEPT_DELTAS + 10)
    head = (await store.heads([0]))[0]
    assert head is not None
    assert (head.number, head.base_number) == (KEPT_DELTAS + 10, 5)
    await store.compact(0, 1, KEPT_DELTAS + 10, b"more")
    assert await store.base(0) == StoredBase(KEPT_DELTAS + 10, b"more", KEPT_DELTAS + 10, WRITER)
    assert [delta.number for delta in await all_deltas(store, 0)] == list(range(11, KEPT_DELTAS + 11))


# --- refusing -----------------------------------------------------------------------------------------------


async def checkpoint_something(store: ModelStore) -> None:
    """What a worker of epoch 5 that knows of checkpoint 8 would write next."""
    await store.checkpoint(0, 5, 9, b"counted", head_of(9))


async def compact_something(store: ModelStore) -> None:
    await store.compact(0, 5, 8, b"added up")


LOST_OR_FENCED = [
    pytest.param(None, StateLost, id="Redis was emptied"),
    pytest.param({"rebuilding": 1}, StateLost, id="only the mark of a rebuild"),
    pytest.param(
        {"owner": "worker-a", "epoch": 5, "checkpoint": 8, "rebuilding": 1},
        StateLost,
        id="a rebuild has begun under the worker",
    ),
    pytest.param({"owner": "worker-a", "epoch": 4, "checkpoint": 8}, StateLost, id="an older snapshot"),
    pytest.param(
        {"owner": "worker-b", "epoch": 4, "checkpoint": 3}, StateLost, id="an older one of another's"
    ),
    pytest.param({"owner": "worker-b", "epoch": 5, "checkpoint": 8}, Fenced, id="another owner"),
    pytest.param({"owner": "worker-b", "epoch": 5, "checkpoint": 3}, Fenced, id="fenced before mismatched"),
    pytest.param({"owner": "worker-a", "epoch": 6, "checkpoint": 8}, Fenced, id="a higher epoch"),
    pytest.param({"owner": "worker-b", "epoch": 10, "checkpoint": 8}, Fenced, id="10 is higher than 5"),
]


async def refused(store: ModelStore, raw: Any, writes: Writer, wm: Mapping[str, str | int] | None) -> Any:
    """Return the error of a writer, who must have changed nothing."""
    if wm is not None:
        raw.hset("sa:{0}:wm", mapping={"watermark": 1, "commit": 7, **wm})
    raw.hset("sa:{0}:model", mapping={"number": 8, "base": "as it was", "base_number": 2})
    raw.xadd("sa:{0}:model-deltas", {"d": "as it was"}, id="8-0")
    before = content(raw)
    with pytest.raises((StateLost, Fenced, CommitMismatch)) as error:
        await writes(store)
    assert content(raw) == before
    return error.value


@pytest.mark.parametrize("writes", [checkpoint_something, compact_something])
@pytest.mark.parametrize(("wm", "error"), LOST_OR_FENCED)
async def test_a_writer_that_does_not_own_what_it_believes_writes_nothing(
    store: ModelStore,
    raw: Any,
    writes: Writer,
    wm: Mapping[str, str | int] | None,
    error: type[Exception],
) -> None:
    found = await refused(store, raw, writes, wm)
    assert type(found) is error
    if isinstance(found, Fenced) and wm is not None:
        assert (found.partition, found.owner) == (0, wm["owner"])


@pytest.mark.parametrize("stored", [None, 0, 7, 9, 80])
async def test_a_checkpoint_that_does_not_follow_the_last_one_writes_nothing(
    store: ModelStore, raw: Any, stored: int | None
) -> None:
    wm: dict[str, str | int] = {"owner": "worker-a", "epoch": 5}
    if stored is not None:
        wm["checkpoint"] = stored
    found = await refused(store, raw, checkpoint_something, wm)
    assert isinstance(found, CommitMismatch)
    assert (found.stored, found.expected) == (stored or 0, 8)


async def test_whoever_was_claimed_away_is_fenced(
    profiles: ProfileStore, rivals: ProfileStore, store: ModelStore
) -> None:
    await claim(profiles)
    await write(store, 0, 1, 2)
    await claim(rivals)
    with pytest.raises(Fenced, match="worker-b"):
        await store.checkpoint(0, 1, 3, b"late", head_of(3))
    with pytest.raises(Fenced, match="worker-b"):
        await store.compact(0, 1, 2, b"late")
    assert [delta.number for delta in await all_deltas(store, 0)] == [1, 2]
    assert (await store.base(0)).base is None


async def test_deltas_that_somebody_left_behind_are_not_written_over(
    profiles: ProfileStore, store: ModelStore, raw: Any
) -> None:
    await claim(profiles)
    raw.xadd("sa:{0}:model-deltas", {"d": "left behind"}, id="4-0")
    before = content(raw)
    with pytest.raises(StoreUnavailable, match="Redis, checkpoint"):
        await store.checkpoint(0, 1, 1, b"counted", head_of(1))
    assert content(raw) == before


@pytest.mark.parametrize(
    ("damage", "value"),
    [
        ("number", None),
        ("number", "twelve"),
        ("number", ""),
        ("schema", None),
        ("schema", b"\xff"),
        ("settings", None),
        ("settings", b"\xff"),
        ("writer", None),
        ("watermark", None),
        ("watermark", "1e3"),
        ("base_number", "x"),
    ],
)
async def test_a_head_that_no_checkpoint_has_written_is_told_by_its_partition(
    profiles: ProfileStore, store: ModelStore, raw: Any, damage: str, value: str | bytes | None
) -> None:
    await claim(profiles, 3)
    await write(store, 3, 1, 1)
    if value is None:
        raw.hdel("sa:{3}:model", damage)
    else:
        raw.hset("sa:{3}:model", damage, value)
    with pytest.raises(ValueError, match="partition 3: "):
        await store.heads([2, 3])


# --- whose keys ---------------------------------------------------------------------------------------------


async def keys_told(profiles: ProfileStore, partition: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that the script is told about, by a checkpoint and an addition."""
    told: list[str] = []
    store = ModelStore(profiles._redis, profiles.owner)
    await claim(profiles, partition)
    ask = profiles._redis.evalsha

    async def evalsha(sha: str, numkeys: int, *rest: Any) -> Any:
        told.extend(rest[:numkeys])
        return await ask(sha, numkeys, *rest)

    monkeypatch.setattr(profiles._redis, "evalsha", evalsha)
    await write(store, partition, 1, 2)
    await store.compact(partition, 1, 2, b"two")
    return told


@pytest.mark.parametrize("partition", [0, 7, 1234])
async def test_all_keys_of_a_partition_lie_in_one_cluster_slot_and_are_told_to_the_script(
    profiles: ProfileStore, raw: Any, partition: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = await keys_told(profiles, partition, monkeypatch)
    names = keys(partition)
    assert set(told) == {names.wm, names.model, names.model_deltas}
    assert {key_slot(key.encode()) for key in told} == {key_slot(str(partition).encode())}
    assert {key.decode() for key in raw.keys("*")} == {*told, names.definitions, "sa:meta"}


async def test_a_cluster_node_accepts_the_script(
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
            await keys_told(made, 3, monkeypatch)
            store = ModelStore(made._redis, "worker-a")
            head = (await store.heads([3]))[3]
            assert head is not None
            assert (head.number, head.base_number) == (2, 2)
        finally:
            await made.close()


def test_the_script_builds_no_name_of_a_key() -> None:
    text = Path(model_store.__file__).with_name("checkpoint.lua").read_text(encoding="utf-8")
    assert keys_made_in_lua(text) == []


# --- a Redis that fails -------------------------------------------------------------------------------------


async def test_a_redis_that_is_full_keeps_no_checkpoint_and_no_half_of_one(
    redis_server: Callable[..., Server],
) -> None:
    url = redis_url_of(redis_server())
    with redis.Redis.from_url(url) as client:
        raw: Any = client
        profiles = ProfileStore(connect(url), "worker-a")
        store = ModelStore(profiles._redis, "worker-a")
        try:
            await claim(profiles)
            await write(store, 0, 1, KEPT_DELTAS + 2)
            before = content(raw)
            raw.config_set("maxmemory", "1mb")
            raw.config_set("maxmemory", 1 + raw.info("memory")["used_memory"] // 2)
            with pytest.raises(StoreUnavailable, match=r"Redis, checkpoint.*OutOfMemory"):
                await write(store, 0, KEPT_DELTAS + 3, KEPT_DELTAS + 3)
            assert content(raw) == before
            with pytest.raises(StoreUnavailable, match=r"Redis, checkpoint.*OutOfMemory"):
                await store.compact(0, 1, KEPT_DELTAS + 2, b"all of them")
            assert content(raw) == before, "no delta is dropped for a base that is not there"
            raw.config_set("maxmemory", 0)
            await write(store, 0, KEPT_DELTAS + 3, KEPT_DELTAS + 3)
        finally:
            await profiles.close()


@pytest.mark.parametrize("made", [True, False], ids=["after the write", "before the write"])
async def test_a_checkpoint_whose_connection_is_cut_is_never_repeated(
    fresh_redis: str, raw: Any, made: bool
) -> None:
    async with cut_off(fresh_redis) as (cut, url):
        profiles = ProfileStore(connect(url), "worker-a")
        store = ModelStore(profiles._redis, "worker-a")
        try:
            await claim(profiles)
            await write(store, 0, 1, 1)  # Redis knows the script from now on
            cut.requests.clear()
            cut.before_reply, cut.before_request = made, not made
            with pytest.raises(StoreUnavailable, match="Redis, checkpoint"):
                await write(store, 0, 2, 2)
            assert b"".join(cut.requests).count(b"EVALSHA") == 1
            # Only a new claim tells which of the two it was.
            assert (await claim(profiles)).watermark.checkpoint == (2 if made else 1)
            assert raw.xlen("sa:{0}:model-deltas") == (2 if made else 1)
        finally:
            await profiles.close()


async def test_nobody_who_answers_is_said_with_what_was_tried() -> None:
    client = connect("redis://127.0.0.1:1/0")
    store = ModelStore(client, "worker-a")
    try:
        for asked in (store.heads([0]), store.base(0), store.deltas(0, 1)):
            with pytest.raises(StoreUnavailable, match="Redis, read the model"):
                await asked
        with pytest.raises(StoreUnavailable, match="Redis, checkpoint"):
            await store.compact(0, 1, 1, b"")
    finally:
        await client.aclose()


async def test_wrong_credentials_stop_the_worker(redis_server: Callable[..., Server]) -> None:
    server = redis_server("--requirepass", "r1ght-one")
    client = connect(f"redis://:wr0ng-one@{server.address}/0")
    store = ModelStore(client, "worker-a")
    with pytest.raises(StartRefused, match="expected to be let in") as error:
        await store.heads([0])
    await client.aclose()
    assert "wr0ng" not in str(error.value)
