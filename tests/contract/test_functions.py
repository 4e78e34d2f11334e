"""What the Redis Function library answers, held against a real Redis or Valkey and against `Lookup`."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any, Literal

import msgpack
import pytest
import redis

from stream_app.adapters import functions, profile_store
from stream_app.adapters.functions import LIBRARY, library_text, library_version, load
from stream_app.adapters.profile_store import connect
from stream_app.core.decay import NEVER_MS, EventTypeWeight, Weights
from stream_app.core.profile import Profile, TypeSums, pack, weights_at
from stream_app.core.scores import pack_scores
from stream_app.embedded import Server
from stream_app.errors import StartRefused, StoreUnavailable
from stream_app.lookup import Lookup, Prediction, questions
from tests.backends import redis_url_of
from tests.stored import DAY_MS, MODEL, T0, WEIGHTS, random_profile, scored, store

SEED = 20260102
Call = Callable[..., Any]


@pytest.fixture
def raw(fresh_redis: str) -> Iterator[Any]:
    """An ordinary client of the same Redis."""
    with redis.Redis.from_url(fresh_redis) as client:
        yield client


@pytest.fixture
def call(raw: Any) -> Call:
    """Call a function about a user of partition 0: ``call("sa_weights", "u1", now)``."""

    def call(name: str, user_id: str, now: int | str | None = None) -> Any:
        names = [f"sa:{{0}}:profile:{user_id}"]
        if name == "sa_next":
            names.append(f"sa:{{0}}:next:{user_id}")
        return raw.fcall_ro(name, len(names), *names, *([] if now is None else [now]))

    return call


def user(user_id: str = "u1", **fields: Any) -> Profile:
    fields = {"weights": {"view": TypeSums(3.0, {"tea": 2.0}, {})}, "forget_ms": T0 + 100 * DAY_MS, **fields}
    return Profile(user_id, T0, **fields)


async def loaded(url: str, weights: Weights = WEIGHTS, clock: Literal["wall", "event"] = "wall") -> str:
    async with contextlib.aclosing(connect(url)) as client:
        return await load(client, weights, clock)


def claimed(client: Any, weights: Weights = WEIGHTS, clock: str = "wall") -> None:
    """Say in ``sa:meta`` what a claim would have said."""
    client.hset("sa:meta", mapping={"weights": weights.fingerprint(), "clock": clock})


def decoded(flat: list[bytes]) -> dict[str, float]:
    return {name.decode(): float(number) for name, number in zip(flat[::2], flat[1::2], strict=True)}


def weights_of(reply: Any) -> dict[str, TypeSums]:
    return {
        event_type.decode(): TypeSums(float(total), decoded(labels), decoded(assets))
        for event_type, total, labels, assets in reply[1]
    }


# --- the same numbers as the core and `Lookup` -------------------------------------------------------------


def assert_close(got: dict[str, TypeSums], expected: dict[str, TypeSums]) -> None:
    assert got.keys() == expected.keys()
    for event_type, sums in expected.items():
        assert got[event_type].total == pytest.approx(sums.total, rel=1e-9, abs=0)
        assert got[event_type].labels == pytest.approx(sums.labels, rel=1e-9, abs=0)
        assert got[event_type].assets == pytest.approx(sums.assets, rel=1e-9, abs=0)


@pytest.mark.parametrize("now", [T0 - 400 * DAY_MS, T0, T0 + 7 * DAY_MS, T0 + 99 * DAY_MS, 9 * 10**14])
async def test_weights_are_those_of_the_core_for_any_profile(fresh_redis: str, call: Call, now: int) -> None:
    rng = random.Random(SEED + now)
    profiles = [random_profile(rng, f"u{n}") for n in range(100)]
    await store(fresh_redis, {0: profiles})
    known = 0
    for profile in profiles:
        reply = call("sa_weights", profile.user_id, now)
        if now > profile.forget_ms and not profile.exits_at_ms:
            assert reply is None
            continue
        known += 1
        assert reply[0] == now
        assert_close(weights_of(reply), weights_at(profile, WEIGHTS, now))
    assert known > 10


@pytest.mark.parametrize("now", [T0, T0 + 2 * DAY_MS, T0 + 50 * DAY_MS])
async def test_segments_and_scores_are_those_of_lookup(fresh_redis: str, call: Call, now: int) -> None:
    rng = random.Random(SEED + now)
    profiles = [random_profile(rng, f"u{n}") for n in range(60)]
    scores = [
        scored(profile.user_id, [f"label-{n}é" for n in range(rng.randrange(21))])
        for profile in rng.sample(profiles, 30)
    ]
    await store(fresh_redis, {0: profiles}, scores=scores)
    kinds = set()
    with Lookup(fresh_redis) as lookup:
        for profile in profiles:
            view = lookup.user(profile.user_id, now)
            if view is None:
                assert [call(name, profile.user_id, now) for name in ("sa_segments", "sa_next")] == [
                    None,
                    None,
                ]
                continue
            told = [
                (
                    segment_id.decode(),
                    kind.decode(),
                    exits_at,
                    Prediction(tuple(label.decode() for label in more[0]), float(more[1])) if more else None,
                )
                for segment_id, kind, exits_at, *more in call("sa_segments", profile.user_id, now)[1]
            ]
            expected = [
                (m.segment_id, "discovery" if m.prediction else "base", m.exits_at_ms, m.prediction)
                for m in view.segments
            ]
            assert told == expected
            kinds |= {kind for _, kind, *_ in told}

            scored_at, model, categories, tips = call("sa_next", profile.user_id, now)
            if view.scores is None:
                assert (scored_at, model, categories, tips) == (None, None, [], [])
                continue
            assert (scored_at, model.decode()) == (view.scores.at_ms, MODEL)
            assert list(decoded(categories).items()) == view.scores.next_categories
            assert [
                (
                    kind.decode(),
                    None if asset is None else asset.decode(),
                    tuple(label.decode() for label in labels),
                    float(growth),
                    float(base),
                )
                for kind, asset, labels, growth, base in tips
            ] == [
                (tip.event_type, tip.asset_id, tip.labels, tip.growth_weight, tip.base_weight)
                for tip in view.scores.recommendations
            ]
    assert kinds == ({"base", "discovery"} if now < T0 + 3 * DAY_MS else {"base"})


async def test_a_membership_that_never_ends_has_no_instant(fresh_redis: str, call: Call) -> None:
    await store(fresh_redis, {0: [user(seqs={"seen": 1}, exits_at_ms={"seen": NEVER_MS})]})
    assert call("sa_segments", "u1", T0) == [T0, [[b"seen", b"base", None]]]


async def test_every_event_type_has_its_own_half_life_whatever_its_name(fresh_redis: str, call: Call) -> None:
    names = ["view", "2", "end", "a b", '"', "\\", "\n", "\0", "]]", "@CLOCK@", "é", "\N{GRINNING FACE}"]
    weights = Weights(60.0, 1e-3, {name: EventTypeWeight(1.0, 60.0 + n) for n, name in enumerate(names)})
    profile = user(weights={name: TypeSums(1.0, {}, {}) for name in [*names, "other"]})
    await store(fresh_redis, {0: [profile]}, weights=weights)
    assert_close(weights_of(call("sa_weights", "u1", T0 + 60_000)), weights_at(profile, weights, T0 + 60_000))


# --- who and when ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sa_weights", "sa_segments", "sa_next"])
async def test_an_unknown_or_forgotten_user_is_nil(fresh_redis: str, call: Call, name: str) -> None:
    gone = user("gone", forget_ms=T0)
    stays = user("stays", forget_ms=T0, seqs={"seen": 1}, exits_at_ms={"seen": T0 + 1})
    await store(fresh_redis, {0: [gone, stays]})
    assert call(name, "nobody", T0) is None
    assert call(name, "gone", T0) is not None
    assert call(name, "gone", T0 + 1) is None
    assert call(name, "stays", T0 + 1) is not None


@pytest.mark.parametrize("given", ["", None])
async def test_without_an_instant_now_is_the_servers_time(
    fresh_redis: str, raw: Any, call: Call, given: str | None
) -> None:
    await store(fresh_redis, {0: [user(forget_ms=NEVER_MS)]})

    def server_ms() -> int:
        seconds, micros = raw.time()
        return int(seconds) * 1000 + int(micros) // 1000

    before = server_ms()
    told = call("sa_weights", "u1", given)[0]
    assert before <= told <= server_ms()


async def test_with_the_event_clock_nobody_guesses_what_now_is(fresh_redis: str, call: Call) -> None:
    await store(fresh_redis, {0: [user()]}, clock="event")
    with pytest.raises(redis.ResponseError, match=r"expected now in Unix milliseconds.*stream_time_ms"):
        call("sa_weights", "u1")
    assert call("sa_weights", "u1", T0)[0] == T0


@pytest.mark.parametrize("now", ["1.5", "1e12", "now", " 1", "0x10", "9" * 16, "-", "nan"])
async def test_an_instant_that_is_none_is_refused(fresh_redis: str, call: Call, now: str) -> None:
    await store(fresh_redis, {0: [user()]})
    with pytest.raises(redis.ResponseError, match="expected now in Unix milliseconds, got"):
        call("sa_weights", "u1", now)


async def test_other_keys_or_arguments_than_documented_are_refused(fresh_redis: str, raw: Any) -> None:
    await store(fresh_redis, {0: [user()]})
    with pytest.raises(redis.ResponseError, match=r"sa_next: expected 2 key\(s\)"):
        raw.fcall_ro("sa_next", 1, "sa:{0}:profile:u1")
    with pytest.raises(redis.ResponseError, match=r"sa_weights: expected 1 key\(s\)"):
        raw.fcall_ro("sa_weights", 0, "sa:{0}:profile:u1")
    with pytest.raises(redis.ResponseError, match="at most one argument"):
        raw.fcall_ro("sa_weights", 1, "sa:{0}:profile:u1", T0, T0)


# --- poison ------------------------------------------------------------------------------------------------


def changed(profile: Profile, **fields: Any) -> bytes:
    document = {**msgpack.unpackb(pack(profile)), **fields}
    blob: bytes = msgpack.packb({name: value for name, value in document.items() if value != "absent"})
    return blob


POISON_PROFILES = {
    "nothing": b"",
    "text": b"not a profile",
    "a number": b"\x01",
    "an array": msgpack.packb([1, 2]),
    "no fields": b"\x80",
    "cut short": pack(user())[:-3],
    "cut within bytes": pack(user(recent_ids=b"12345678" * 32))[:-200],
    "more behind it": pack(user()) + b"\xc0",
    "another version": changed(user(), v=2),
    "weights are text": changed(user(), w="text"),
    "weights without a total": changed(user(), w={"view": [None, {}, {}]}),
    "a sum that is text": changed(user(), w={"view": [1.0, {"tea": "1.0"}, {}]}),
    "a label that is a number": changed(user(), w={"view": [1.0, {7: 1.0}, {}]}),
    "not a number": changed(user(), w={"view": [1.0, {"tea": float("nan")}, {}]}),
    "infinity": changed(user(), w={"view": [float("inf"), {}, {}]}),
    "no landmark": changed(user(), l=None),
    "no forget instant": changed(user(), f="absent"),
}


@pytest.mark.parametrize("blob", POISON_PROFILES.values(), ids=POISON_PROFILES.keys())
async def test_a_profile_that_cannot_be_read_is_an_error_here_and_in_lookup(
    fresh_redis: str, raw: Any, call: Call, blob: bytes
) -> None:
    await store(fresh_redis, {0: [user()]}, partitions=1)
    raw.set("sa:{0}:profile:u1", blob)
    with pytest.raises(redis.ResponseError, match=r"not a profile of schema 1: .*`stream-app rebuild`"):
        call("sa_weights", "u1", T0)
    with (
        Lookup(fresh_redis) as lookup,
        pytest.raises(StartRefused, match=r"partition 0, keys sa:\{0\}:profile:\*.*`stream-app rebuild`"),
    ):
        lookup.weights("u1", T0)


def changed_scores(**fields: Any) -> bytes:
    blob: bytes = msgpack.packb({**msgpack.unpackb(pack_scores(scored("u1", ["tea"]))), **fields})
    return blob


POISON_SCORES = {
    "text": b"not scores",
    "another version": changed_scores(v=2),
    "no instant": changed_scores(t=None),
    "no model": changed_scores(m=None),
    "categories are text": changed_scores(n="text"),
    "a category without a score": changed_scores(n=[["tea", None]]),
    "a score that is infinite": changed_scores(n=[["tea", float("inf")]]),
    "a recommendation of nothing": changed_scores(r=[["view", None, None, 0.5, 0.5]]),
    "a growth weight that is none": changed_scores(r=[["view", None, ["a"], None, 0.5]]),
}


@pytest.mark.parametrize("blob", POISON_SCORES.values(), ids=POISON_SCORES.keys())
async def test_scores_that_cannot_be_read_are_an_error_here_and_in_lookup(
    fresh_redis: str, raw: Any, call: Call, blob: bytes
) -> None:
    await store(fresh_redis, {0: [user()]}, partitions=1, clock="event")
    raw.set("sa:{0}:next:u1", blob)
    with pytest.raises(redis.ResponseError, match=r"not a next of schema 1: .*`stream-app rebuild`"):
        call("sa_next", "u1", T0)
    with (
        Lookup(fresh_redis) as lookup,
        pytest.raises(StartRefused, match=r"partition 0, keys sa:\{0\}:next:\*.*`stream-app rebuild`"),
    ):
        lookup.recommendations("u1")


async def test_a_key_of_another_type_is_an_error(fresh_redis: str, raw: Any, call: Call) -> None:
    await store(fresh_redis, {0: [user()]})
    raw.delete("sa:{0}:profile:u1")
    raw.zadd("sa:{0}:profile:u1", {"u1": 1})
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        call("sa_weights", "u1", T0)


# --- the library -------------------------------------------------------------------------------------------


async def test_the_library_is_loaded_once_and_says_its_version(fresh_redis: str, raw: Any) -> None:
    raw.config_resetstat()
    older = Weights(half_life_s=1.0)
    claimed(raw, older)
    await loaded(fresh_redis, older)
    claimed(raw)
    version = await loaded(fresh_redis)
    assert version == library_version(WEIGHTS, "wall") == await loaded(fresh_redis)
    assert raw.fcall_ro("sa_version", 0).decode() == version
    assert raw.hget("sa:meta", "functions").decode() == version
    loads = raw.info("commandstats")["cmdstat_function|load"]["calls"]
    assert loads == 2  # the older settings' library, and its replacement
    assert [library[b"library_name"] for library in libraries(raw)] == [LIBRARY.encode()]


async def test_an_emptied_redis_gets_its_library_again(fresh_redis: str, raw: Any) -> None:
    claimed(raw)
    version = await loaded(fresh_redis)
    raw.flushall()
    raw.function_flush()
    claimed(raw)
    assert await loaded(fresh_redis) == version
    assert raw.fcall_ro("sa_version", 0).decode() == version


@pytest.mark.parametrize("state", ["of other weights", "of another clock", "none"])
async def test_a_library_that_the_state_cannot_be_read_with_replaces_nothing(
    fresh_redis: str, raw: Any, state: str
) -> None:
    claimed(raw)
    version = await loaded(fresh_redis)
    if state == "none":
        raw.delete("sa:meta")
    weights = Weights(half_life_s=1.0) if state == "of other weights" else WEIGHTS
    with pytest.raises(
        StartRefused, match=r"sa:meta to have the settings of this library, got (others|none)"
    ):
        await loaded(fresh_redis, weights, "event" if state == "of another clock" else "wall")
    assert raw.fcall_ro("sa_version", 0).decode() == version


def libraries(raw: Any) -> list[dict[bytes, Any]]:
    listed = raw.function_list()
    return [
        library if isinstance(library, dict) else dict(zip(library[::2], library[1::2], strict=True))
        for library in listed
    ]


def test_another_half_life_or_clock_is_another_version() -> None:
    hour = Weights(half_life_s=3600.0)
    longer = Weights(half_life_s=3600.0, event_types={"buy": EventTypeWeight(1.0, 7200.0)})
    versions = {
        library_version(hour, "wall"),
        library_version(hour, "event"),
        library_version(longer, "wall"),
        library_version(Weights(half_life_s=3600.001), "wall"),
    }
    assert len(versions) == 4
    assert all(re.fullmatch("[0-9a-f]{16}", version) for version in versions)
    heavier = Weights(half_life_s=3600.0, history_floor=0.01, event_types={"buy": EventTypeWeight(5.0)})
    assert library_text(heavier, "wall") == library_text(hour, "wall")  # readers need half-lives only


def test_the_library_touches_no_key_that_it_was_not_told() -> None:
    text = resources.files(functions.__package__ or "").joinpath("functions.lua").read_text(encoding="utf-8")
    code = re.sub(r"--[^\n]*", "", text)
    told = {"redis.call('GET', key)", "redis.call('GET', keys[2])", "redis.call('TIME')"}
    assert set(re.findall(r"redis\.p?call\([^)]*\)", code)) == told
    assert len(re.findall(r"\bp?call\b *\(", code)) == len(re.findall(r"redis\.call\(|\bpcall\(", code))
    assert re.findall(r"profile_of\(([^)]*)\)", code) == [
        "key, now",
        "keys[1], now",
        "keys[1], now",
        "keys[1], now",
    ]


async def test_a_user_who_may_not_load_functions_is_told_in_one_sentence(
    redis_server: Callable[..., Server],
) -> None:
    server = redis_server("--user", "app", "on", ">app", "~sa:*", "+@all", "-function", "-fcall_ro")
    with redis.Redis.from_url(redis_url_of(server)) as client:
        claimed(client)
    with pytest.raises(StartRefused) as refused:
        await loaded(f"redis://app:app@{server.address}/0")
    said = str(refused.value)
    assert re.match(
        r"Redis, function library stream_app: expected a user who may load it, got NoPermission", said
    )
    assert said.endswith("until then apps cannot use FCALL_RO sa_*, and all else works.")
    assert "\n" not in said


async def test_a_user_who_may_only_call_functions_finds_the_library_that_another_has_loaded(
    redis_server: Callable[..., Server],
) -> None:
    server = redis_server("--user", "app", "on", ">app", "~sa:*", "+@all", "-function")
    with redis.Redis.from_url(redis_url_of(server)) as client:
        claimed(client)
        version = await loaded(redis_url_of(server))
        assert await loaded(f"redis://app:app@{server.address}/0") == version
        claimed(client, newer := Weights(half_life_s=1.0))
    with pytest.raises(StartRefused, match="a user who may load it"):
        await loaded(f"redis://app:app@{server.address}/0", newer)


async def test_a_redis_without_functions_is_told_in_one_sentence(redis_server: Callable[..., Server]) -> None:
    server = redis_server("--rename-command", "FCALL_RO", "", "--rename-command", "FUNCTION", "")
    with redis.Redis.from_url(redis_url_of(server)) as client:
        claimed(client)
    with pytest.raises(StartRefused, match=r"expected Redis 7 or later, or Valkey, got .*unknown command"):
        await loaded(redis_url_of(server))


async def test_names_that_another_library_has_taken_are_told(redis_server: Callable[..., Server]) -> None:
    server = redis_server()
    with redis.Redis.from_url(redis_url_of(server)) as client:
        claimed(client)
        client.function_load("#!lua name=theirs\nredis.register_function('sa_next', function() return 1 end)")
    with pytest.raises(StartRefused, match=r"expected the names sa_\* to be free.*FUNCTION LIST"):
        await loaded(redis_url_of(server))


async def test_a_redis_that_is_full_or_away_is_unavailable(redis_server: Callable[..., Server]) -> None:
    server = redis_server()
    with redis.Redis.from_url(redis_url_of(server)) as client:
        claimed(client)
        client.config_set("maxmemory", "1mb")
        client.config_set("maxmemory", 1000)
    with pytest.raises(StoreUnavailable, match=r"Redis, function library stream_app: .*OutOfMemory"):
        await loaded(redis_url_of(server))
    with pytest.raises(StoreUnavailable, match="Redis, function library stream_app"):
        await loaded("redis://127.0.0.1:1/0")


def test_key_and_field_names_of_readers_are_those_of_the_worker() -> None:
    assert questions.META_KEY == profile_store.META_KEY
    assert questions.SCHEMA_VERSION == profile_store.SCHEMA_VERSION
    names = profile_store.keys(3)
    assert questions._profile_key(3, "u1") == names.profile("u1")
    assert questions._members_key(3, "tea") == names.members("tea")
    assert questions._next_key(3, "u1") == names.next("u1")
    assert questions._ask_settings(3).args[0] == names.wm
