"""A Redis without a server: the commands that the profile store and its tests use, and its two scripts.

`claim` and `commit` are written anew in Python from what the heads of claim.lua and commit.lua promise, so
that a run of the simulation needs no process, no socket and no real time. The same contract suite holds both
(tests/contract/test_profile_store.py). Must not know who asks, nor what goes wrong on the way.
"""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from redis.exceptions import ResponseError


class Fields(dict[bytes, bytes]):
    """A hash."""


class Ranked(dict[bytes, float]):
    """A sorted set: members by score, then by name."""

    def in_order(self) -> list[tuple[bytes, float]]:
        return sorted(self.items(), key=lambda item: (item[1], item[0]))


class Entries(dict[tuple[int, int], dict[bytes, bytes]]):
    """A stream: fields by the two numbers of an entry's id, in the order in which they were added."""


Kept = bytes | Fields | Ranked | Entries


class MemoryRedis:
    """The server: what is kept, with the commands under redis-py's names, and no waiting.

    Parameters
    ----------
    now_ms
        Tells when an expiry has passed.

    `unchecked` names the checks of a commit that are switched off: "lost", "fenced", "mismatch". With one
    off, a writer is let through where that check alone would have stopped it.
    """

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self._now_ms = now_ms
        self._kept: dict[bytes, Kept] = {}
        self._expires_at_ms: dict[bytes, int] = {}
        self.unchecked: frozenset[str] = frozenset()
        #: How often a commit or a trim was refused, by the check that refused it.
        self.refused: dict[str, int] = {}

    # --- as a whole ---------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[dict[bytes, Kept], dict[bytes, int]]:
        """Return a copy of everything, as a file on disk would hold it."""
        return copy.deepcopy(self._kept), dict(self._expires_at_ms)

    def restore(self, snapshot: tuple[dict[bytes, Kept], dict[bytes, int]]) -> None:
        """Go back to a snapshot."""
        self._kept, self._expires_at_ms = copy.deepcopy(snapshot[0]), dict(snapshot[1])

    def flushall(self) -> None:
        self._kept.clear()
        self._expires_at_ms.clear()

    # --- any key ------------------------------------------------------------------------------------------

    def keys(self, pattern: str | bytes = "*") -> list[bytes]:
        for key in list(self._expires_at_ms):
            self._drop_if_expired(key)
        wanted = re.compile(fnmatch.translate(_text(pattern)))
        return sorted(key for key in self._kept if wanted.match(_text(key)))

    def scan_iter(self, match: str = "*", count: int = 10) -> Iterator[bytes]:
        return iter(self.keys(match))

    def scan(self, cursor: int, match: str = "*", count: int = 10) -> tuple[int, list[bytes]]:
        found = self.keys(match)
        following = cursor + count
        return (following if following < len(found) else 0), found[cursor:following]

    def type(self, key: str | bytes) -> bytes:
        kept = self._get(key)
        names = {bytes: b"string", Fields: b"hash", Ranked: b"zset", Entries: b"stream"}
        return b"none" if kept is None else names[type(kept)]

    def exists(self, *keys: str | bytes) -> int:
        return sum(self._get(key) is not None for key in keys)

    def delete(self, *keys: str | bytes) -> int:
        found = self.exists(*keys)
        for key in keys:
            self._kept.pop(_raw(key), None)
            self._expires_at_ms.pop(_raw(key), None)
        return found

    def pexpiretime(self, key: str | bytes) -> int:
        return -2 if self._get(key) is None else self._expires_at_ms.get(_raw(key), -1)

    # --- strings ------------------------------------------------------------------------------------------

    def get(self, key: str | bytes) -> bytes | None:
        kept = self._get(key)
        assert kept is None or isinstance(kept, bytes)
        return kept

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        return [self.get(key) for key in keys]

    def set(self, key: str | bytes, value: object, pxat: object = None, keepttl: bool = False) -> None:
        self._kept[_raw(key)] = _raw(value)
        if pxat is not None:
            self._expires_at_ms[_raw(key)] = int(_text(pxat))
            self._drop_if_expired(_raw(key))
        elif not keepttl:
            self._expires_at_ms.pop(_raw(key), None)

    # --- hashes -------------------------------------------------------------------------------------------

    def hset(
        self,
        key: str | bytes,
        field: object = None,
        value: object = None,
        mapping: Mapping[Any, object] | None = None,
    ) -> None:
        fields = self._hash(key)
        if field is not None:
            fields[_raw(field)] = _raw(value)
        for name, item in (mapping or {}).items():
            fields[_raw(name)] = _raw(item)

    def hget(self, key: str | bytes, field: object) -> bytes | None:
        return self.hgetall(key).get(_raw(field))

    def hgetall(self, key: str | bytes) -> dict[bytes, bytes]:
        kept = self._get(key)
        assert kept is None or isinstance(kept, Fields)
        return {} if kept is None else dict(kept)

    def hkeys(self, key: str | bytes) -> list[bytes]:
        return list(self.hgetall(key))

    def hdel(self, key: str | bytes, *fields: object) -> None:
        for field in fields:
            self._hash(key).pop(_raw(field), None)
        self._drop_if_empty(key)

    # --- sorted sets --------------------------------------------------------------------------------------

    def zadd(self, key: str | bytes, mapping: Mapping[Any, object]) -> None:
        for member, score in mapping.items():
            self._zset(key)[_raw(member)] = float(_text(score))

    def zrem(self, key: str | bytes, member: object) -> None:
        self._zset(key).pop(_raw(member), None)
        self._drop_if_empty(key)

    def zrange(self, key: str | bytes, start: int, end: int, withscores: bool = False) -> list[Any]:
        ordered = self._read_zset(key).in_order()
        chosen = ordered[start:] if end == -1 else ordered[start : end + 1]
        return chosen if withscores else [member for member, _ in chosen]

    def zrangebyscore(
        self, key: str | bytes, low: float | str, high: float | str, start: int = 0, num: int | None = None
    ) -> list[bytes]:
        found = [m for m, score in self._read_zset(key).in_order() if float(low) <= score <= float(high)]
        return found[start:] if num is None else found[start : start + num]

    # --- streams ------------------------------------------------------------------------------------------

    def xadd(self, key: str | bytes, fields: Mapping[Any, object], id: str) -> None:  # noqa: A002
        kept = self._kept.setdefault(_raw(key), Entries())
        assert isinstance(kept, Entries)
        number = _entry_id(id)
        if any(number <= other for other in kept):
            raise ResponseError(
                "The ID specified in XADD is equal or smaller than the target stream top item"
            )
        kept[number] = {_raw(name): _raw(value) for name, value in fields.items()}

    def xlen(self, key: str | bytes) -> int:
        return len(self._read_stream(key))

    def xrange(
        self,
        key: str | bytes,
        min: str = "-",  # noqa: A002
        max: str = "+",  # noqa: A002
        count: int | None = None,
    ) -> list[tuple[bytes, dict[bytes, bytes]]]:
        above = _entry_id(min.removeprefix("(")) if min != "-" else (-1, -1)
        found = [
            (b"%d-%d" % number, dict(fields))
            for number, fields in self._read_stream(key).items()
            if (number > above or (number == above and not min.startswith("(")))
            and (max == "+" or number[0] <= int(max))
        ]
        return found[:count]

    # --- scripts ------------------------------------------------------------------------------------------

    def evalsha(self, name: str, numkeys: int, *rest: Any) -> list[Any]:
        """Run `claim` or `commit`; a script's digest is its name here."""
        keys, args = list(rest[:numkeys]), [_raw(arg) for arg in rest[numkeys:]]
        return {"claim": self._claim, "commit": self._commit}[name](keys, args)

    def _claim(self, keys: list[str], args: list[bytes]) -> list[Any]:
        wm_key, sets_key = keys
        owner, last_epoch, log_start, processed_below, replay_when_new, set_id, set_json, pairs = args[:8]
        named = args[8:]
        identity = [(named[2 * n], named[2 * n + 1]) for n in range(int(pairs))]
        wm = self.hgetall(wm_key)
        if b"rebuilding" in wm:
            return [b"REBUILDING"]
        is_new = b"epoch" not in wm
        if is_new and self.exists(sets_key):
            return [b"TORN"]
        if is_new:
            wm |= {
                b"epoch": b"0",
                b"commit": b"0",
                b"watermark": log_start,
                b"stream_time_ms": b"",
                b"definitions": set_id,
                b"replayed_below": b"0",
                **dict(identity),
            }
            processed_below = processed_below or replay_when_new
        for field, mine in identity:
            if wm.get(field) != mine:
                return [b"FOREIGN", field, wm.get(field, b""), mine]
        wm[b"owner"] = owner
        wm[b"epoch"] = b"%d" % (1 + max(int(wm[b"epoch"]), int(last_epoch)))
        if processed_below and int(processed_below) > int(wm[b"watermark"]):
            wm[b"replayed_below"] = b"%d" % max(int(wm[b"replayed_below"]), int(processed_below))
        self.hset(wm_key, mapping=wm)
        self.hset(sets_key, set_id, set_json)
        return [b"OK", [item for pair in wm.items() for item in pair]]

    def _commit(self, keys: list[str], args: list[bytes]) -> list[Any]:
        wm_key, due_key, outbox_key, sets_key, scored_key = keys[:5]
        told = iter(args)
        owner, epoch, expected, kind = (next(told) for _ in range(4))
        watermark, stream_time_ms, definitions, replayed_below = (next(told) for _ in range(4))
        n_staying, n_expiring, n_due, n_undue, n_indexes, n_scores, n_outbox = (
            int(next(told)) for _ in range(7)
        )
        wm = self.hgetall(wm_key)
        refusal = self._refusal(wm, owner, epoch, expected)
        if refusal:
            return refusal

        self.delete(outbox_key)
        if kind == b"commit":
            following = iter(keys[5:])
            for _ in range(n_staying):
                self.set(next(following), next(told))
            for _ in range(n_expiring):
                self.set(next(following), next(told), pxat=next(told))
            for _ in range(n_due):
                due_ms, user = next(told), next(told)
                self.zadd(due_key, {user: due_ms})
            for _ in range(n_undue):
                self.zrem(due_key, next(told))
            for _ in range(n_indexes):
                key, n_in, n_out = next(following), int(next(told)), int(next(told))
                for _ in range(n_in):
                    exits_at, user = next(told), next(told)
                    self.zadd(key, {user: exits_at})
                for _ in range(n_out):
                    self.zrem(key, next(told))
            for _ in range(n_scores):
                key, user, blob, scored_ms, expiry = next(following), *(next(told) for _ in range(4))
                if blob == b"-":
                    self.delete(key)
                    self.zrem(scored_key, user)
                else:
                    keeps = expiry == b"="
                    self.set(key, blob, pxat=None if keeps else expiry or None, keepttl=keeps)
                    self.zadd(scored_key, {user: scored_ms})
            number = int(wm.get(b"commit", 0)) + 1
            for first in range(0, n_outbox, 100):
                fields = {str(n + 1): next(told) for n in range(first, min(first + 100, n_outbox))}
                self.xadd(outbox_key, fields, id=f"{number}-{first // 100 + 1}")
            if definitions:
                self.hdel(sets_key, *(other for other in self.hkeys(sets_key) if other != definitions))
            said = {
                b"definitions": definitions,
                b"replayed_below": replayed_below,
                b"stream_time_ms": stream_time_ms,
                b"watermark": watermark,
            }
            self.hset(wm_key, mapping={field: value for field, value in said.items() if value})
            self.hset(wm_key, "commit", number)
        head = self._read_zset(due_key).in_order()[:1]
        return [b"OK", b"%d" % int(head[0][1]) if head else b""]

    def _refusal(
        self, wm: Mapping[bytes, bytes], owner: bytes, epoch: bytes, expected: bytes
    ) -> list[Any] | None:
        """Return what a writer who does not own what he believes is told, `None` if he may write."""
        stored_owner, stored_epoch = wm.get(b"owner", b""), wm.get(b"epoch")
        if stored_epoch is None or int(stored_epoch) < int(epoch) or b"rebuilding" in wm:
            # Whoever does not see that state was lost sees nothing of the rest either.
            return None if "lost" in self.unchecked else self._refuse("lost", [b"LOST"])
        is_mine = stored_owner == owner and stored_epoch == epoch
        if not is_mine and "fenced" not in self.unchecked:
            return self._refuse("fenced", [b"FENCED", stored_owner, stored_epoch])
        if wm[b"commit"] != expected and "mismatch" not in self.unchecked:
            return self._refuse("mismatch", [b"MISMATCH", wm[b"commit"]])
        return None

    def _refuse(self, check: str, reply: list[Any]) -> list[Any]:
        self.refused[check] = self.refused.get(check, 0) + 1
        return reply

    # --- keeping ------------------------------------------------------------------------------------------

    def _get(self, key: str | bytes) -> Kept | None:
        self._drop_if_expired(_raw(key))
        return self._kept.get(_raw(key))

    def _hash(self, key: str | bytes) -> Fields:
        kept = self._kept.setdefault(_raw(key), Fields())
        assert isinstance(kept, Fields)
        return kept

    def _zset(self, key: str | bytes) -> Ranked:
        kept = self._kept.setdefault(_raw(key), Ranked())
        assert isinstance(kept, Ranked)
        return kept

    def _read_zset(self, key: str | bytes) -> Ranked:
        kept = self._get(key)
        assert kept is None or isinstance(kept, Ranked)
        return Ranked() if kept is None else kept

    def _read_stream(self, key: str | bytes) -> Entries:
        kept = self._get(key)
        assert kept is None or isinstance(kept, Entries)
        return Entries() if kept is None else kept

    def _drop_if_empty(self, key: str | bytes) -> None:
        if not self._kept.get(_raw(key)):
            self._kept.pop(_raw(key), None)

    def _drop_if_expired(self, key: bytes) -> None:
        expires_at_ms = self._expires_at_ms.get(key)
        if expires_at_ms is not None and expires_at_ms <= self._now_ms():
            del self._expires_at_ms[key]
            self._kept.pop(key, None)


#: Carries a command to the server: told its name, and what has its effect when called.
Way = Callable[[str, Callable[[], Any]], Awaitable[Any]]


async def straight(name: str, effect: Callable[[], Any]) -> Any:
    """Nothing happens on the way."""
    return effect()


class MemoryClient:
    """The asyncio client: every command goes one way to the server, where anything may happen to it."""

    def __init__(self, server: MemoryRedis, way: Way = straight) -> None:
        self._server = server
        self._way = way

    def register_script(self, text: str) -> Callable[..., Awaitable[Any]]:
        head = re.match(r"-- (\w+)\(", text)
        assert head is not None

        async def run(keys: Sequence[str], args: Sequence[Any]) -> Any:
            return await self.evalsha(head[1], len(keys), *keys, *args)

        return run

    async def aclose(self) -> None:
        """Let go of nothing."""

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        command = getattr(self._server, name)

        async def ask(*args: Any, **kwargs: Any) -> Any:
            what = args[0] if name == "evalsha" else name
            return await self._way(what, lambda: command(*args, **kwargs))

        return ask


def _raw(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _entry_id(text: str | bytes) -> tuple[int, int]:
    first, _, second = _text(text).partition("-")
    return int(first), int(second)
