"""Keep profiles, indexes, outbox and watermark of each partition in Redis.

Decides how a partition's state is laid out under the hash tag ``{p}`` and that it changes only through Lua
scripts: `claim.lua` takes a partition over, `commit.lua` makes one step durable, all or nothing (and
`checkpoint.lua` what was learned: see `model_store`). Must not know Kafka, the fold's rules or the clock.

Redis is a view of the log: whoever loses it folds the log again. What must never happen is that two writers
mix, or that a step is half written; that is what owner, epoch and commit number are for (see `commit.lua`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Final, TypeAlias

from redis.exceptions import RedisError

from stream_app.adapters.profile_cache import ProfileCache
from stream_app.adapters.redis_client import Client, connect, walk
from stream_app.adapters.redis_security import not_admitted
from stream_app.core.decay import NEVER_MS
from stream_app.core.patch import Stored
from stream_app.core.profile import Profile, earliest, pack, unpack
from stream_app.errors import CommitMismatch, Fenced, StartRefused, StateLost, StoreUnavailable

__all__ = ["Claim", "Commit", "Identity", "ProfileStore", "Watermark", "connect", "keys"]

SCHEMA_VERSION: Final = "1"
META_KEY: Final = "sa:meta"
#: Entries of up to 100 messages.
OUTBOX_PAGE: Final = 5


@dataclass(frozen=True, slots=True)
class PartitionKeys:
    """Names of the Redis keys of one partition; all in one Cluster slot by their hash tag."""

    prefix: str
    wm: str
    due: str
    outbox: str
    definitions: str
    scored: str
    model: str
    model_deltas: str

    def profile(self, user_id: str) -> str:
        """Return the key of a user's profile, a STRING in msgpack."""
        return f"{self.prefix}profile:{user_id}"

    def next(self, user_id: str) -> str:
        """Return the key of a user's next categories and recommendations, a STRING in msgpack."""
        return f"{self.prefix}next:{user_id}"

    def members(self, segment_id: str) -> str:
        """Return the key of a segment's member index, a ZSET of user_id by exits_at in Unix ms."""
        return f"{self.prefix}members:{segment_id}"


def keys(partition: int) -> PartitionKeys:
    """Name the keys of a partition.

    Examples
    --------
    >>> keys(3).profile("u1")
    'sa:{3}:profile:u1'
    """
    prefix = f"sa:{{{partition}}}:"
    names = ("wm", "due", "outbox", "definitions", "scored", "model", "model-deltas")
    return PartitionKeys(prefix, *(f"{prefix}{name}" for name in names))


@dataclass(frozen=True, slots=True)
class Identity:
    """What a partition's state belongs to; all of it must match what ``wm`` holds."""

    cluster_id: str
    topic: str
    partitions: int
    group: str
    clock: str
    weights: str

    def pairs(self) -> list[tuple[str, str]]:
        """Return field names and values as ``wm`` stores them."""
        return [
            ("schema", SCHEMA_VERSION),
            ("cluster_id", self.cluster_id),
            ("topic", self.topic),
            ("partitions", str(self.partitions)),
            ("group", self.group),
            ("clock", self.clock),
            ("weights", self.weights),
        ]


@dataclass(frozen=True, slots=True)
class Watermark:
    """The content of ``wm``: how far a partition is folded, by whom, and what its state belongs to.

    Attributes
    ----------
    watermark : int
        Next offset whose effects are not yet in Redis.
    stream_time_ms : int or None
        Largest instant of the valid records below the watermark, ``None`` before the first.
    replayed_below : int
        Transitions of records below this offset carry ``replayed: true``.
    checkpoint : int
        Number of the model's last checkpoint of this partition, 0 for none.
    """

    owner: str
    epoch: int
    commit: int
    watermark: int
    stream_time_ms: int | None
    definitions: str
    replayed_below: int
    checkpoint: int = 0

    @classmethod
    def read(cls, fields: Mapping[str, str]) -> Watermark:
        """Build from the fields of the hash."""
        stream_time = fields.get("stream_time_ms", "")
        return cls(
            owner=fields.get("owner", ""),
            epoch=int(fields["epoch"]),
            commit=int(fields["commit"]),
            watermark=int(fields["watermark"]),
            stream_time_ms=int(stream_time) if stream_time else None,
            definitions=fields["definitions"],
            replayed_below=int(fields["replayed_below"]),
            checkpoint=int(fields.get("checkpoint", 0)),
        )


@dataclass(frozen=True, slots=True)
class Claim:
    """A partition taken over: its watermark, and the older segment sets that profiles may still carry."""

    watermark: Watermark
    definitions: Mapping[str, str]
    next_due_ms: int | None


#: Segment id to the instant of leaving.
Memberships: TypeAlias = Mapping[str, int]
_NONE: Final[Memberships] = {}


@dataclass(slots=True)
class Commit:
    """One step to make durable.

    Attributes
    ----------
    profiles : mapping of user_id to Profile
        Changed profiles, whole.
    before : mapping of user_id to Memberships
        What the indexes hold for these users now: as loaded, to write only what changed.
    expires_at_ms : mapping of user_id to int
        Instant from which Redis may drop the profile; absent: never.
    outbox : list of bytes
        Messages to publish after the commit.
    watermark, stream_time_ms, definitions, replayed_below
        New values of ``wm``; ``None`` leaves what is there.
    scores : mapping of user_id to bytes or None
        Next categories and recommendations, packed, of users who were scored; ``None`` forgets them.
    scored_ms : int
        The instant of the scoring.
    stored : mapping of user_id to Stored
        More profiles, changed as they are packed; those that are not changed are passed over.
    """

    profiles: Mapping[str, Profile] = field(default_factory=dict)
    before: Mapping[str, Memberships] = field(default_factory=dict)
    expires_at_ms: Mapping[str, int] = field(default_factory=dict)
    outbox: Sequence[bytes] = ()
    watermark: int | None = None
    stream_time_ms: int | None = None
    definitions: str | None = None
    replayed_below: int | None = None
    scores: Mapping[str, bytes | None] = field(default_factory=dict)
    scored_ms: int = 0
    stored: Mapping[str, Stored] = field(default_factory=dict)


class ProfileStore:
    """State of all partitions that one worker owns; one instance a worker, safe for concurrent tasks.

    Parameters
    ----------
    client : redis.asyncio.Redis or Cluster
        Made by `connect`: no retries.
    owner : str
        Random name of this worker, written into each claimed ``wm``.
    """

    def __init__(self, client: Client, owner: str) -> None:
        # redis-py types every reply as a union of all that any client might return.
        self._redis: Any = client
        self.owner = owner
        self._claim = client.register_script(script_text("claim.lua"))
        self._commit = client.register_script(script_text("commit.lua"))

    async def claim(
        self,
        partition: int,
        identity: Identity,
        *,
        last_epoch: int,
        log_start: int,
        processed_below: int | None,
        replay_when_new: int | None,
        definitions: tuple[str, str],
        model_on: bool = False,
    ) -> Claim:
        """Take a partition over under a new epoch, and say in ``sa:meta`` how to read what is stored.

        Raises
        ------
        StartRefused
            The state belongs to another cluster, topic, group, partition count or weight setting, or is being
            rebuilt.
        StoreUnavailable
            Redis did not answer as it should.
        """
        names = keys(partition)
        pairs = identity.pairs()
        args: list[str | int] = [
            self.owner,
            last_epoch,
            log_start,
            "" if processed_below is None else processed_below,
            "" if replay_when_new is None else replay_when_new,
            definitions[0],
            definitions[1],
            len(pairs),
        ]
        for name, value in pairs:
            args += [name, value]
        with unavailable("claim"):
            reply = await self._claim(keys=[names.wm, names.definitions], args=args)
            code = reply[0].decode()
            if code == "OK":
                flat = [item.decode() for item in reply[1]]
                fields = dict(zip(flat[::2], flat[1::2], strict=True))
                # Readers need it, and whoever emptied Redis took it along.
                meta = {**dict(pairs), "model": "on" if model_on else "off"}
                await self._redis.hset(META_KEY, mapping=meta)
                stored = await self._hash(names.definitions)
                head = await self._redis.zrange(names.due, 0, 0, withscores=True)
                return Claim(Watermark.read(fields), stored, int(head[0][1]) if head else None)
        if code == "REBUILDING":
            raise StartRefused(
                "state that is whole",
                "a rebuild that was broken off",
                f"partition {partition}, key {names.wm}",
                "Run `stream-app rebuild` again, then start the worker.",
            )
        if code == "TORN":
            raise StartRefused(
                "a watermark beside the profiles that it speaks for",
                "none",
                f"partition {partition}, key {names.wm}",
                "Find out who deleted it, then run `stream-app rebuild`; the log is folded again.",
            )
        raise _foreign(names.wm, *(item.decode() for item in reply[1:4]))

    async def read(
        self, partition: int, user_ids: Iterable[str], cache: ProfileCache | None = None
    ) -> dict[str, bytes]:
        """Read the packed profiles of some users; users without one are absent.

        Redis is asked, in one round trip, for those who are not in the cache.

        Raises
        ------
        StoreUnavailable
            Redis did not answer as it should.
        """
        users = list(user_ids)
        if not users:
            return {}
        names = keys(partition)
        blobs = {} if cache is None else cache.get_all(users)
        unknown = [user for user in users if user not in blobs]
        if unknown:
            with unavailable("load"):
                stored = await self._redis.mget([names.profile(user) for user in unknown])
            blobs.update((user, blob) for user, blob in zip(unknown, stored, strict=True) if blob is not None)
            # In their order, whoever was kept: that of a commit must not hang on the cache.
            blobs = {user: blobs[user] for user in users if user in blobs}
        return blobs

    async def load(
        self, partition: int, user_ids: Iterable[str], cache: ProfileCache | None = None
    ) -> tuple[dict[str, Profile], dict[str, Memberships]]:
        """Read the profiles of some users, and their memberships as they are; users without one are absent.

        Raises
        ------
        StoreUnavailable
            Redis did not answer as it should.
        StartRefused
            A stored profile cannot be read.
        """
        blobs = await self.read(partition, user_ids, cache)
        profiles = {user: self.unpack(partition, user, blob) for user, blob in blobs.items()}
        return profiles, {user: dict(profile.memberships) for user, profile in profiles.items()}

    @staticmethod
    def unpack(partition: int, user_id: str, blob: bytes) -> Profile:
        """Return the profile that a blob is.

        Raises
        ------
        StartRefused
            It is none.
        """
        try:
            return unpack(user_id, blob)
        except ValueError as exc:
            raise StartRefused(
                f"a profile of schema {SCHEMA_VERSION}",
                f"a value that cannot be read ({exc})",
                f"partition {partition}, keys {keys(partition).prefix}profile:*",
                "Find out what else writes to these keys, then run `stream-app rebuild`.",
            ) from exc

    async def due(self, partition: int, until_ms: int, limit: int) -> list[str]:
        """Return up to `limit` users whose next exit is at or before `until_ms`, earliest first."""
        with unavailable("due"):
            found = await self._redis.zrangebyscore(keys(partition).due, "-inf", until_ms, start=0, num=limit)
        return [user.decode() for user in found]

    async def scored_before(self, partition: int, until_ms: int, limit: int) -> list[str]:
        """Return up to `limit` users whose last scoring was at or before `until_ms`, earliest first."""
        with unavailable("scored"):
            found = await self._redis.zrangebyscore(
                keys(partition).scored, "-inf", until_ms, start=0, num=limit
            )
        return [user.decode() for user in found]

    async def commit(
        self,
        partition: int,
        epoch: int,
        number: int,
        commit: Commit,
        cache: ProfileCache | None = None,
    ) -> int | None:
        """Make one step durable: commit number `number` follows.

        The cache learns the profiles when Redis has confirmed them, and forgets everything when it has not.

        Returns
        -------
        int or None
            The partition's next exit instant, ``None`` if no exit is due ever.

        Raises
        ------
        StateLost
            ``wm`` is gone or of a lower epoch: Redis was emptied or restored.
        Fenced
            Another worker has claimed the partition.
        CommitMismatch
            The last commit is not the one that this worker knows.
        StoreUnavailable
            Redis did not answer as it should; the step may or may not have been made.
        """
        names = keys(partition)
        prefix = f"{names.prefix}profile:"
        packed: dict[str, bytes] = {}
        staying: list[str] = []
        expiring: list[str] = []
        blobs: list[bytes] = []
        expiring_blobs: list[bytes | int] = []
        due: list[str | int] = []
        undue: list[str] = []
        inside: dict[str, list[str | int]] = {}
        outside: dict[str, list[str]] = {}
        for user, profile in commit.profiles.items():
            expires_at_ms = commit.expires_at_ms.get(user)
            blob = packed[user] = pack(profile)
            if expires_at_ms is None:
                staying.append(prefix + user)
                blobs.append(blob)
            else:
                expiring.append(prefix + user)
                expiring_blobs += (blob, expires_at_ms)
            held = commit.before.get(user, _NONE)
            memberships = profile.memberships
            if memberships == held:
                continue
            next_exit = earliest(memberships)
            if next_exit is None:
                undue.append(user)
            elif next_exit != earliest(held):
                due += (next_exit, user)
            for segment_id, exits_at in memberships.items():
                if held.get(segment_id) != exits_at:
                    inside.setdefault(segment_id, []).extend(
                        ("+inf" if exits_at >= NEVER_MS else exits_at, user)
                    )
            for segment_id in held:
                if segment_id not in memberships:
                    outside.setdefault(segment_id, []).append(user)
        for user, kept in commit.stored.items():
            if not kept.is_changed:
                continue
            blob = packed[user] = kept.blob
            expires_at_ms = commit.expires_at_ms.get(user)
            if expires_at_ms is None:
                staying.append(prefix + user)
                blobs.append(blob)
            else:
                expiring.append(prefix + user)
                expiring_blobs += (blob, expires_at_ms)
            moved = kept.moved
            if not moved:
                continue
            next_exit_ms = kept.next_exit_ms
            if next_exit_ms >= NEVER_MS:
                undue.append(user)
            elif next_exit_ms != kept.first_exit_ms:
                due += (next_exit_ms, user)
            for segment_id, exits_at in moved.items():
                if exits_at < 0:
                    outside.setdefault(segment_id, []).append(user)
                else:
                    inside.setdefault(segment_id, []).extend(
                        ("+inf" if exits_at >= NEVER_MS else exits_at, user)
                    )
        indexes = list(dict.fromkeys((*inside, *outside)))
        members: list[str | int] = []
        for segment_id in indexes:
            entered, left = inside.get(segment_id, []), outside.get(segment_id, [])
            members += (len(entered) // 2, len(left), *entered, *left)
        scores: list[bytes | str | int] = []
        for user, scored in commit.scores.items():
            # Without a profile beside them they live as long as they did.
            expiry = commit.expires_at_ms.get(user, "") if user in commit.profiles else "="
            scores += (user, "-" if scored is None else scored, commit.scored_ms, expiry)
        script_keys = [
            *(names.wm, names.due, names.outbox, names.definitions, names.scored),
            *staying,
            *expiring,
            *map(names.members, indexes),
            *map(names.next, commit.scores),
        ]
        head: list[bytes | str | int] = [
            self.owner,
            epoch,
            number - 1,
            "commit",
            "" if commit.watermark is None else commit.watermark,
            "" if commit.stream_time_ms is None else commit.stream_time_ms,
            commit.definitions or "",
            "" if commit.replayed_below is None else commit.replayed_below,
            len(staying),
            len(expiring),
            len(due) // 2,
            len(undue),
            len(indexes),
            len(commit.scores),
            len(commit.outbox),
        ]
        args = [*head, *blobs, *expiring_blobs, *due, *undue, *members, *scores, *commit.outbox]
        try:
            next_due_ms = await self._run(partition, script_keys, args, number - 1)
        except BaseException:
            if cache is not None:
                cache.clear()
            raise
        if cache is not None:
            cache.put_all(packed)
        return next_due_ms

    async def trim(self, partition: int, epoch: int, number: int) -> int | None:
        """Drop the outbox of commit `number`, which is published; checks and errors of `commit`."""
        names = keys(partition)
        args: list[bytes | str | int] = [self.owner, epoch, number, "trim", *("",) * 4, *(0,) * 7]
        script_keys = [names.wm, names.due, names.outbox, names.definitions, names.scored]
        return await self._run(partition, script_keys, args, number)

    async def outbox(self, partition: int, up_to: int | None = None) -> AsyncIterator[list[bytes]]:
        """Yield what is committed and not known to be published, in order, in pages of `OUTBOX_PAGE`.

        With `up_to`, only what commits up to that number have left.
        """
        first, last = "-", "+" if up_to is None else str(up_to)
        while True:
            with unavailable("read the outbox"):
                page = await self._redis.xrange(
                    keys(partition).outbox, min=first, max=last, count=OUTBOX_PAGE
                )
            if not page:
                return
            yield [message for _, fields in page for message in fields.values()]
            first = "(" + page[-1][0].decode()

    async def watermarks(self, partitions: Iterable[int]) -> dict[int, Watermark | None]:
        """Read the watermarks of some partitions, whoever owns them."""
        wanted = list(partitions)
        with unavailable("read watermarks"):
            found = [await self._hash(keys(p).wm) for p in wanted]
        return {
            p: Watermark.read(fields) if "epoch" in fields else None
            for p, fields in zip(wanted, found, strict=True)
        }

    async def outbox_length(self, partition: int) -> int:
        """Return how many entries, of up to 100 messages, are committed and not known to be published."""
        with unavailable("read the outbox"):
            return int(await self._redis.xlen(keys(partition).outbox))

    async def definitions(self, partition: int) -> set[str]:
        """Return the fingerprints of the segment sets that profiles of a partition may have."""
        with unavailable("read the definitions"):
            return {name.decode() for name in await self._redis.hkeys(keys(partition).definitions)}

    async def next_due_ms(self, partition: int) -> int | None:
        """Return the partition's earliest exit instant."""
        with unavailable("due"):
            head = await self._redis.zrange(keys(partition).due, 0, 0, withscores=True)
        return int(head[0][1]) if head else None

    async def scan_users(self, count: int) -> AsyncIterator[list[tuple[int, str]]]:
        """Walk over all stored profiles once, as pages of (partition, user_id); a user may come twice."""
        pages = aiter(walk(self._redis, "sa:{*}:profile:*", count))
        while True:
            with unavailable("scan"):
                page = await anext(pages, None)
            if page is None:
                return
            users = []
            for raw in page:
                partition, _, rest = raw.decode().removeprefix("sa:{").partition("}:profile:")
                if partition.isdigit() and rest:
                    users.append((int(partition), rest))
            if users:
                yield users

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()

    async def _hash(self, key: str) -> dict[str, str]:
        fields = await self._redis.hgetall(key)
        return {name.decode(): value.decode() for name, value in fields.items()}

    async def _run(
        self, partition: int, script_keys: list[str], args: list[bytes | str | int], expected: int
    ) -> int | None:
        with unavailable("commit"):
            reply = await self._commit(keys=script_keys, args=args)
        code = reply[0].decode()
        if code == "OK":
            return int(float(reply[1])) if reply[1] else None
        if code == "LOST":
            raise StateLost(partition)
        if code == "FENCED":
            raise Fenced(partition, reply[1].decode())
        raise CommitMismatch(partition, stored=int(reply[1]), expected=expected)


class unavailable:  # noqa: N801 - reads as a phrase at its `with`
    """Translate what Redis raises: wrong credentials stop the worker, all else is retried by the caller."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if exc is not None and (refused := not_admitted(exc, f"Redis, {self._doing}")):
            raise refused from exc
        if isinstance(exc, RedisError | OSError):
            raise StoreUnavailable(f"Redis, {self._doing}", f"{type(exc).__name__}: {exc}") from exc


def script_text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _foreign(key: str, name: str, stored: str, mine: str) -> StartRefused:
    if name == "clock":
        action = (
            f"Set worker.clock to {stored!r} (STREAM_APP__WORKER__CLOCK={stored}), as the stored state was "
            "folded, or run `stream-app rebuild` to fold the log again by the other clock."
        )
    elif name == "weights":
        action = (
            "Half-lives, action weights and floor are part of the stored sums: restore the old [weights], or "
            "run `stream-app rebuild` to fold the log again under the new ones."
        )
    else:
        action = "Point redis.url at this service's own Redis, or run `stream-app rebuild` to clear it."
    label = name.replace("_", " ")
    found = f"state of {label} {stored or '(none)'}"
    return StartRefused(f"state of {label} {mine}", found, f"key {key}", action)
