"""Switches that take away what makes a failing Redis harmless: see `tests.faults.faulty`, which offers them.

``errors``: what Redis did not do counts as done: a commit, a trim, and a load as one that found nobody.
``claim``: a commit that failed counts as not done; its slice is folded again without a new claim.
``script``: a commit whose script Redis does not know (any more) counts as done.
``once``: a command whose connection broke is sent again, as redis-py does if it is not told otherwise.
``order``: the outbox is dropped before it is published.

The first three say on stderr when they have had an effect: `TOLD`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Literal

from redis.asyncio.retry import Retry
from redis.commands.core import AsyncScript
from redis.exceptions import NoScriptError

from stream_app.adapters import redis_client
from stream_app.adapters.partition import PartitionTask
from stream_app.adapters.profile_cache import ProfileCache
from stream_app.adapters.profile_store import Commit, ProfileStore
from stream_app.errors import StoreUnavailable

UnsafeSwitch = Literal["errors", "claim", "script", "once", "order"]
SENT_AGAIN: Final = 3
TOLD: Final = "taken lightly: "


def _take_lightly(problem: Exception) -> None:
    print(f"{TOLD}{problem}", file=sys.stderr, flush=True)


def _without_errors() -> None:
    _wrap(ProfileStore, "commit", _answering(None))
    _wrap(ProfileStore, "trim", _answering(None))
    _wrap(ProfileStore, "read", _answering({}))


def _without_claim() -> None:
    def again(real: Callable[..., Awaitable[Any]], *args: Any) -> Awaitable[Any]:
        return real(*args)

    _wrap(PartitionTask, "_fold", again)


def _answering(answer: object) -> Callable[..., Awaitable[Any]]:
    async def answered(real: Callable[..., Awaitable[Any]], *args: Any) -> object:
        return answer

    return answered


def _wrap(owner: type, name: str, instead: Callable[..., Awaitable[Any]]) -> None:
    real: Callable[..., Awaitable[Any]] = getattr(owner, name)

    @functools.wraps(real)
    async def wrapped(*args: Any) -> Any:
        try:
            return await real(*args)
        except StoreUnavailable as exc:
            _take_lightly(exc)
        return await instead(real, *args)

    setattr(owner, name, wrapped)


def _without_script() -> None:
    async def call(script: AsyncScript, keys: Sequence[Any] = (), args: Sequence[Any] = ()) -> Any:
        client: Any = script.registered_client
        try:
            return await client.evalsha(script.sha, len(keys), *keys, *args)
        except NoScriptError as exc:
            await client.script_load(script.script)
            if args[3] != "commit":
                return await client.evalsha(script.sha, len(keys), *keys, *args)
            _take_lightly(exc)
        return [b"OK", b""]

    AsyncScript.__call__ = call  # type: ignore[method-assign, assignment]


def _without_once() -> None:
    module: Any = redis_client
    module.Retry = lambda backoff, retries: Retry(backoff, SENT_AGAIN)


def _without_order() -> None:
    commit = ProfileStore.commit

    async def committed(
        store: ProfileStore, p: int, epoch: int, number: int, step: Commit, cache: ProfileCache | None
    ) -> int | None:
        await commit(store, p, epoch, number, step, cache)
        return await store.trim(p, epoch, number)

    service: Any = ProfileStore
    service.commit = committed


UNSAFE: Final[Mapping[str, Callable[[], None]]] = {
    "errors": _without_errors,
    "claim": _without_claim,
    "script": _without_script,
    "once": _without_once,
    "order": _without_order,
}
