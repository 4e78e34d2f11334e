r"""The Redis Function library by which apps of any language read what the service knows.

Decides the library's text, its version, and how it comes into Redis; `functions.lua` decides what it answers.
The sums of a profile can only be read with the half-lives that they were stored under, so those are in the
text: a library belongs to one weights setting and one clock, and its version is a digest of its text. It is
what `sa_version` answers and what the field ``functions`` of ``sa:meta`` names, so that an app can tell with
one comparison whether what is loaded fits what is stored.

Functions belong to a Redis server, not to one of its numbered databases: two services with different settings
need two servers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal

from redis.exceptions import NoPermissionError, RedisError, ResponseError

from stream_app.adapters.profile_store import META_KEY, script_text
from stream_app.adapters.redis_client import Client, from_every_master
from stream_app.core.decay import Weights
from stream_app.errors import StartRefused, StoreUnavailable

__all__ = ["LIBRARY", "META_FIELD", "library_text", "library_version", "load", "loader"]

logger = logging.getLogger(__name__)

LIBRARY: Final = "stream_app"
META_FIELD: Final = "functions"
WHERE: Final = f"Redis, function library {LIBRARY}"

_VERSION_MARK: Final = "@VERSION@"
_VERSION_DIGITS: Final = 16


def library_text(weights: Weights, clock: Literal["wall", "event"]) -> str:
    r"""Return the library for one weights setting and clock, as ``FUNCTION LOAD`` takes it.

    Parameters
    ----------
    weights
        What the stored sums belong to; only the half-lives matter to a reader.
    clock
        With ``"event"`` the functions refuse to guess what "now" is.

    Examples
    --------
    >>> text = library_text(Weights(half_life_s=86_400), "wall")
    >>> text.splitlines()[0]
    '#!lua name=stream_app'
    >>> "local DEFAULT_HALF_LIFE_MS = 86400000\n" in text
    True
    """
    text = _filled(weights, clock)
    return text.replace(_VERSION_MARK, _digest(text))


def library_version(weights: Weights, clock: Literal["wall", "event"]) -> str:
    """Return the version of a library: 16 hex digits, another for every other text.

    Examples
    --------
    >>> day, week = Weights(half_life_s=86_400), Weights(half_life_s=604_800)
    >>> library_version(day, "wall") in library_text(day, "wall")
    True
    >>> library_version(day, "wall") == library_version(week, "wall")
    False
    """
    return _digest(_filled(weights, clock))


async def load(client: Client, weights: Weights, clock: Literal["wall", "event"]) -> str:
    """Make sure that Redis has this library, and say so in ``sa:meta``; one that differs is replaced.

    To be called after a claim, which alone says in ``sa:meta`` what the stored state was folded under, and
    after every one: a Redis that was restarted without its disk has lost the library, one that was flushed
    has lost ``sa:meta``. Where nothing is to be done that costs three small round trips.

    Parameters
    ----------
    client
        Of the one master, or of a Cluster, where every master needs the library; a replica has its master's.

    Returns
    -------
    str
        The version, as `sa_version` answers it.

    Raises
    ------
    StartRefused
        ``sa:meta`` has other settings than these, this Redis has no functions, the user behind ``redis.url``
        may not load them, or another library has taken their names. Nothing else of the service needs them: a
        worker says so and goes on.
    StoreUnavailable
        Redis did not answer as it should.
    """
    redis: Any = client  # redis-py types every reply as a union of all that any client might return
    version = library_version(weights, clock)
    settings = [weights.fingerprint().encode(), clock.encode()]
    try:
        stored = await redis.hmget(META_KEY, "weights", "clock")
        if stored != settings:
            raise StartRefused(
                f"{META_KEY} to have the settings of this library",
                "others" if any(stored) else "none",
                WHERE,
                "Start the worker whose settings the stored state has; the library was left as it is.",
            )
        if await _loaded(client) != {version}:
            await from_every_master(client, "FUNCTION LOAD", "REPLACE", library_text(weights, clock))
        # Last: where it stands, the library stands.
        await redis.hset(META_KEY, META_FIELD, version)
    except NoPermissionError as exc:
        action = "Allow FUNCTION, FCALL_RO, HMGET and HSET to the user behind redis.url (ACL SETUSER)"
        raise _refused("a user who may load it", exc, action) from exc
    except ResponseError as exc:
        said = str(exc).lower()
        if "unknown command" in said:
            raise _refused("Redis 7 or later, or Valkey", exc, "Use a Redis that has functions") from exc
        if "already exists" in said:
            action = "Find the other library with FUNCTION LIST and delete it"
            raise _refused("the names sa_* to be free", exc, action) from exc
        raise StoreUnavailable(WHERE, f"{type(exc).__name__}: {exc}") from exc
    except (RedisError, OSError) as exc:
        raise StoreUnavailable(WHERE, f"{type(exc).__name__}: {exc}") from exc
    return version


async def _loaded(client: Client) -> set[str]:
    """Return the versions that the masters have, none if one has no library or will not tell."""
    try:
        versions = await from_every_master(client, "FCALL_RO", "sa_version", 0)
    except NoPermissionError:
        return set()  # whoever may not call it may still be allowed to load it
    except ResponseError as exc:
        if "function not found" in str(exc).lower():
            return set()
        raise
    return {version.decode() for version in versions}


def _filled(weights: Weights, clock: Literal["wall", "event"]) -> str:
    """Return the text but for its version, which is a digest of this."""
    default_ms = weights.default_half_life_ms
    half_lives = [
        f"[{_lua_string(event_type)}] = {weights.half_life_ms(event_type):.17g}"
        for event_type in sorted(weights.event_types)
        if weights.half_life_ms(event_type) != default_ms
    ]
    return (
        script_text("functions.lua")
        .replace("@CLOCK@", clock)
        .replace("@DEFAULT_HALF_LIFE_MS@", f"{default_ms:.17g}")
        .replace("@HALF_LIVES_MS@", ", ".join(half_lives))
    )


def _lua_string(text: str) -> str:
    r"""Return a Lua literal of any text, byte by byte where it is not plain.

    Examples
    --------
    >>> print(_lua_string('buy"1é'))
    "buy\0341\195\169"
    """
    plain = "".join(
        chr(byte) if chr(byte).isalnum() and byte < 128 else f"\\{byte:03d}" for byte in text.encode()
    )
    return f'"{plain}"'


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_VERSION_DIGITS]


def _refused(expected: str, exc: RedisError, action: str) -> StartRefused:
    return StartRefused(
        expected,
        f"{type(exc).__name__}: {exc}",
        WHERE,
        f"{action}; until then apps cannot use FCALL_RO sa_*, and all else works.",
    )


def loader(
    client: Client, weights: Weights, clock: Literal["wall", "event"]
) -> Callable[[], Awaitable[None]]:
    """Return what loads the library, and tells once if it may not: profiles and topics do not need it."""
    told = False

    async def load_or_tell() -> None:
        nonlocal told
        try:
            await load(client, weights, clock)
        except StartRefused as exc:
            if not told:
                logger.warning("other languages must decay weights themselves, %s", exc)
            told = True

    return load_or_tell
