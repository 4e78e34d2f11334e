"""`Lookup` and `AsyncLookup` on a real Redis or Valkey, with state as the worker stores it."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest
import redis

from stream_app.core.decay import NEVER_MS, Weights
from stream_app.core.profile import Discovery, Profile, TypeSums, weights_at
from stream_app.embedded import Server
from stream_app.errors import StartRefused, StoreUnavailable
from stream_app.lookup import (
    AsyncLookup,
    Lookup,
    Membership,
    NextCategories,
    NextCategory,
    Prediction,
    Recommendations,
)
from tests.backends import ROOT, redis_url_of
from tests.stored import DAY_MS, MODEL, PARTITIONS, T0, WEIGHTS, scored, store

Ask = Callable[..., Awaitable[Any]]

LATER = 4_000_000_000_000  # the year 2096: beyond the wall clock of any test
ANN = Profile(
    "ann {1} é",
    T0 - DAY_MS,
    {
        "view": TypeSums(3.0, {"tea": 2.0, "mugs": 1.0}, {"a-1": 1.0}),
        "purchase": TypeSums(5.0, {"tea": 5.0}, {}),
    },
    {"tea-lovers": 1, "seen": 3, "left": 2},
    {"tea-lovers": LATER, "seen": NEVER_MS},
    forget_ms=LATER,
    discovery={
        "mug-next": Discovery(1, T0, LATER - 1, ("mugs", "cups"), 0.25),
        "was-next": Discovery(2, T0),
    },
)
BOB = Profile("bob", T0, {"view": TypeSums(1.0, {}, {})}, forget_ms=LATER)


@pytest.fixture(params=["sync", "async"])
async def ask(request: pytest.FixtureRequest, fresh_redis: str) -> AsyncIterator[Ask]:
    """Ask either client: ``await ask("weights", "u1")``; members come as a list."""
    if request.param == "sync":
        with Lookup(fresh_redis) as lookup:

            async def ask_sync(method: str, *args: Any) -> Any:
                answer = getattr(lookup, method)(*args)
                return list(answer) if method == "members" else answer

            yield ask_sync
        return
    async with AsyncLookup(fresh_redis) as asynchronous:

        async def ask_async(method: str, *args: Any) -> Any:
            answer = getattr(asynchronous, method)(*args)
            return [member async for member in answer] if method == "members" else await answer

        yield ask_async


@pytest.fixture
def raw(fresh_redis: str) -> Iterator[Any]:
    with redis.Redis.from_url(fresh_redis) as client:
        yield client


# --- answers ------------------------------------------------------------------------------------------------


async def test_weights_are_decayed_to_the_instant_that_is_asked_for(fresh_redis: str, ask: Ask) -> None:
    await store(fresh_redis, [ANN, BOB])
    at_ms = T0 + 30 * DAY_MS
    found = await ask("weights", ANN.user_id, at_ms)
    assert (found.user_id, found.now_ms) == (ANN.user_id, at_ms)
    assert found.by_type == weights_at(ANN, WEIGHTS, at_ms)
    assert found.labels["tea"] == pytest.approx(2.0 * 2 ** (-31 / 30) + 5.0 * 2 ** (-31 / 90))
    assert await ask("weights", ANN.user_id, datetime.fromtimestamp(at_ms / 1000, UTC)) == found


async def test_without_an_instant_weights_are_those_of_now(fresh_redis: str, ask: Ask) -> None:
    await store(fresh_redis, [ANN])
    before_ms = time.time_ns() // 1_000_000
    found = await ask("weights", ANN.user_id)
    assert before_ms <= found.now_ms <= time.time_ns() // 1_000_000
    assert found.by_type == weights_at(ANN, WEIGHTS, found.now_ms)


async def test_with_the_event_clock_now_is_what_the_partition_has_reached(fresh_redis: str, ask: Ask) -> None:
    await store(fresh_redis, [ANN, BOB], clock="event", stream_time_ms=T0 + 5)
    for profile in (ANN, BOB):
        assert (await ask("weights", profile.user_id)).now_ms == T0 + 5
    assert (await ask("meta")).clock == "event"


async def test_segments_come_with_their_exits_and_predictions(fresh_redis: str, ask: Ask) -> None:
    await store(fresh_redis, [ANN])
    assert await ask("segments", ANN.user_id) == (
        Membership(ANN.user_id, "mug-next", LATER - 1, Prediction(("mugs", "cups"), 0.25)),
        Membership(ANN.user_id, "seen", None),
        Membership(ANN.user_id, "tea-lovers", LATER),
    )


async def test_next_categories_and_recommendations_are_what_was_stored(fresh_redis: str, ask: Ask) -> None:
    told = scored(ANN.user_id, ["mugs", "cups"])
    await store(fresh_redis, [ANN], scores=[told])
    assert await ask("next_categories", ANN.user_id) == NextCategories(
        ANN.user_id, T0, MODEL, (NextCategory("mugs", 1 / 3), NextCategory("cups", 1 / 4))
    )
    assert await ask("recommendations", ANN.user_id) == Recommendations(
        ANN.user_id, T0, MODEL, tuple(told.recommendations)
    )
    assert (await ask("meta")).model


async def test_a_user_who_was_never_scored_is_not_an_unknown_one(fresh_redis: str, ask: Ask) -> None:
    await store(fresh_redis, [BOB])
    assert await ask("next_categories", "bob") == NextCategories("bob", None, None, ())
    assert await ask("recommendations", "bob") == Recommendations("bob", None, None, ())
    assert await ask("segments", "bob") == ()
    assert (await ask("user", "bob")).scores is None
    assert not (await ask("meta")).model


async def test_an_unknown_user_is_none_and_in_no_segment(fresh_redis: str, ask: Ask) -> None:
    await store(fresh_redis, [ANN])
    for method in ("weights", "segments", "next_categories", "recommendations", "user"):
        assert await ask(method, "nobody") is None
        assert await ask(method, "") is None
    assert await ask("is_member", "nobody", "seen") is False


async def test_a_forgotten_user_is_unknown_unless_still_in_a_base_segment(fresh_redis: str, ask: Ask) -> None:
    gone = Profile("gone", T0, {"view": TypeSums(1.0, {}, {})}, forget_ms=T0)
    stays = Profile(
        "stays", T0, {"view": TypeSums(1.0, {}, {})}, {"seen": 1}, {"seen": NEVER_MS}, forget_ms=T0
    )
    await store(fresh_redis, [gone, stays], scores=[scored("gone", ["tea"])])
    for method in ("weights", "segments", "next_categories", "recommendations", "user"):
        assert await ask(method, "gone") is None
        assert await ask(method, "stays") is not None
    assert await ask("weights", "gone", T0) is not None


async def test_a_user_is_known_as_a_whole(fresh_redis: str, ask: Ask) -> None:
    told = scored(ANN.user_id, ["mugs"])
    await store(fresh_redis, [ANN], scores=[told])
    view = await ask("user", ANN.user_id, T0)
    assert view.profile == ANN
    assert view.weights == weights_at(ANN, WEIGHTS, T0)
    assert [membership.segment_id for membership in view.segments] == ["mug-next", "seen", "tea-lovers"]
    assert view.scores == told
    assert [m.segment_id for m in (await ask("user", ANN.user_id, LATER)).segments] == ["seen"]


async def test_membership_is_asked_for_one_segment(fresh_redis: str, ask: Ask) -> None:
    await store(fresh_redis, [ANN, BOB])
    held = {
        "tea-lovers": True,
        "seen": True,
        "mug-next": True,
        "left": False,
        "was-next": False,
        "none": False,
    }
    for segment_id, member in held.items():
        assert await ask("is_member", ANN.user_id, segment_id) is member
        assert await ask("is_member", "bob", segment_id) is False


async def test_a_membership_ends_at_its_instant_though_the_exit_is_not_published_yet(
    fresh_redis: str, ask: Ask
) -> None:
    late = Profile(
        "late",
        T0,
        {"view": TypeSums(1.0, {}, {})},
        {"past": 1, "seen": 1},
        {"past": T0, "seen": LATER},
        forget_ms=LATER,
    )
    await store(fresh_redis, [late, ANN])
    assert [m.segment_id for m in await ask("segments", "late")] == ["seen"]
    assert not await ask("is_member", "late", "past")
    assert await ask("members", "past") == []
    assert await ask("member_count", "past") == 0
    assert await ask("member_count", "seen") == 2


@pytest.mark.parametrize("clock", ["wall", "event"])
async def test_members_of_all_partitions_are_iterated_page_by_page(
    fresh_redis: str, ask: Ask, clock: str
) -> None:
    users = [
        Profile(
            f"u{n}", T0, {"view": TypeSums(1.0, {}, {})}, {"seen": 1}, {"seen": LATER + n}, forget_ms=LATER
        )
        for n in range(2 * 1000)
    ]
    await store(fresh_redis, {0: users[:1000], 2: users[1000:1999], 3: users[1999:]}, clock=clock)
    members = await ask("members", "seen")
    assert [(m.user_id, m.exits_at_ms) for m in members] == [(f"u{n}", LATER + n) for n in range(2000)]
    assert await ask("member_count", "seen") == 2000
    assert await ask("members", "none") == []


@pytest.mark.parametrize("partition", range(PARTITIONS))
async def test_a_user_whom_another_partitioner_has_put_elsewhere_is_found(
    fresh_redis: str, ask: Ask, partition: int
) -> None:
    await store(fresh_redis, {partition: [ANN]}, scores=[scored(ANN.user_id, ["mugs"])])
    assert (await ask("user", ANN.user_id)).partition == partition
    assert await ask("is_member", ANN.user_id, "seen")
    assert len((await ask("next_categories", ANN.user_id)).categories) == 1


# --- what it costs ------------------------------------------------------------------------------------------


async def test_one_question_is_one_round_trip(fresh_redis: str, raw: Any, ask: Ask) -> None:
    await store(fresh_redis, [ANN], scores=[scored(ANN.user_id, ["mugs"])])
    await ask("meta")

    def reads() -> int:
        return int(raw.info("stats")["total_reads_processed"])

    for method, *args in (
        ("weights", ANN.user_id),
        ("weights", ANN.user_id, T0),
        ("segments", ANN.user_id),
        ("is_member", ANN.user_id, "seen"),
        ("next_categories", ANN.user_id),
        ("recommendations", ANN.user_id),
        ("user", ANN.user_id),
    ):
        before = reads()
        await ask(method, *args)
        assert reads() - before - 1 == 1, method  # the second INFO is a read too
    before = reads()
    await ask("weights", "nobody")
    assert reads() - before - 1 == 2


async def test_threads_may_share_a_lookup(fresh_redis: str) -> None:
    await store(fresh_redis, [ANN, BOB])
    with Lookup(fresh_redis) as lookup, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: lookup.weights([ANN, BOB][n % 2].user_id, T0), range(400)))
    assert [None if one is None else one.user_id for one in found] == [ANN.user_id, "bob"] * 200


async def test_tasks_may_share_an_async_lookup(fresh_redis: str) -> None:
    await store(fresh_redis, [ANN, BOB])
    async with AsyncLookup(fresh_redis) as lookup:
        found = await asyncio.gather(*[lookup.weights([ANN, BOB][n % 2].user_id, T0) for n in range(200)])
    assert [None if one is None else one.user_id for one in found] == [ANN.user_id, "bob"] * 100


async def test_the_load_tool_measures_every_question(fresh_redis: str) -> None:
    await store(fresh_redis, [ANN, BOB], scores=[scored(ANN.user_id, ["mugs"])])
    program = [sys.executable, "-m", "tests.bench.lookup_load", "--json", "--url", fresh_redis]
    arguments = ["--clients", "2", "--seconds", "0.2", "--unknown", "0.1"]
    process = await asyncio.create_subprocess_exec(
        *program, *arguments, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate()
    report = json.loads(printed)
    assert (report["clients"], report["users"], report["failures"]) == (2, 2, 0)
    assert sum(row["count"] for row in report["by_question"].values()) == report["all"]["count"]
    assert report["by_question"].keys() == {
        "weights",
        "segments",
        "is_member",
        "next_categories",
        "recommendations",
    }


# --- what can go wrong --------------------------------------------------------------------------------------


async def test_a_rebuild_under_other_weights_is_noticed_by_who_was_there_before(
    fresh_redis: str, raw: Any, ask: Ask
) -> None:
    await store(fresh_redis, [ANN])
    assert (await ask("weights", ANN.user_id, T0)).by_type == weights_at(ANN, WEIGHTS, T0)
    raw.flushall()
    other = Weights(half_life_s=3600.0)
    await store(fresh_redis, [ANN], weights=other, partitions=7)
    assert (await ask("weights", ANN.user_id, T0)).by_type == weights_at(ANN, other, T0)
    assert (await ask("meta")).partitions == 7


async def test_a_redis_without_state_is_refused_with_what_to_do(fresh_redis: str, ask: Ask) -> None:
    for method, *args in (("weights", "u1"), ("is_member", "u1", "tea"), ("members", "tea"), ("meta",)):
        with pytest.raises(StartRefused, match=r"key sa:meta: expected state of schema 1, got none.*worker"):
            await ask(method, *args)


async def test_a_connection_that_redis_has_closed_meanwhile_is_opened_again(
    fresh_redis: str, raw: Any, ask: Ask
) -> None:
    await store(fresh_redis, [ANN])
    for _ in range(3):
        assert await ask("weights", ANN.user_id) is not None
        raw.client_kill_filter(_type="normal", skipme=True)


async def test_a_redis_that_does_not_answer_is_unavailable_without_naming_the_user(
    fresh_redis: str, raw: Any, ask: Ask
) -> None:
    await store(fresh_redis, {0: [BOB]}, partitions=1)
    raw.delete("sa:{0}:profile:bob")
    raw.lpush("sa:{0}:profile:bob", "not a string")
    with pytest.raises(StoreUnavailable, match=r"Redis, look-up: .*WRONGTYPE") as unavailable:
        await ask("weights", "bob")
    assert "bob" not in str(unavailable.value)


async def test_a_redis_that_is_away_is_unavailable(redis_server: Callable[..., Server]) -> None:
    gone = "redis://127.0.0.1:1/0"
    with Lookup(gone) as lookup, pytest.raises(StoreUnavailable, match="Redis, look-up"):
        lookup.weights("u1")
    async with AsyncLookup(gone) as asynchronous:
        with pytest.raises(StoreUnavailable, match="Redis, look-up"):
            await asynchronous.weights("u1")
    with redis.Redis.from_url(url := redis_url_of(redis_server())) as client:
        client.client_pause(60_000)
        with Lookup(url, timeout_s=0.1) as lookup, pytest.raises(StoreUnavailable, match="Timeout"):
            lookup.weights("u1")


async def test_scores_that_cannot_be_read_say_where_they_are(fresh_redis: str, raw: Any, ask: Ask) -> None:
    await store(fresh_redis, {0: [BOB]}, partitions=1)
    raw.set("sa:{0}:next:bob", b"\x80")
    for method in ("next_categories", "recommendations", "user"):
        with pytest.raises(
            StartRefused, match=r"partition 0, keys sa:\{0\}:next:\*: expected scores of schema 1"
        ):
            await ask(method, "bob")
    assert await ask("weights", "bob") is not None
