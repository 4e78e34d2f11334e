"""Keep what the next-category model has learned from each partition in Redis.

Decides how counts travel: each checkpoint of a partition appends what was counted since the last one (a
delta), under the same owner and epoch check as a commit, so that whoever follows the deltas of all partitions
in order has the counts of the whole service. Every so often the deltas are added up to a base, so that a
newcomer has less to read. It must not know what a delta holds.

Nothing here is pickled: blobs are msgpack, written and checked by `stream_app.core`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from stream_app.adapters.profile_store import keys, script_text, unavailable
from stream_app.adapters.redis_client import Client
from stream_app.errors import CommitMismatch, Fenced, StateLost

__all__ = ["ModelStore", "StoredBase", "StoredDelta", "StoredModel"]

MODEL_SCHEMA: Final = "1"
#: Deltas that stay after a base holds them, for followers that are behind.
KEPT_DELTAS: Final = 64
#: Deltas in one answer of Redis.
PAGE_DELTAS: Final = 16


@dataclass(frozen=True, slots=True)
class StoredModel:
    """The head of a partition's checkpoint.

    Attributes
    ----------
    schema, settings : str
        What the blobs are written in and under; foreign ones are refused.
    writer : str
        Who wrote the last checkpoint, under which epoch: after Redis was restored from an older state the
        same number may stand for other counts.
    number : int
        Of the last checkpoint.
    base_number : int
        Of the last delta that the base holds, 0 if there is no base yet.
    watermark : int
        Next offset that has not been learned from.
    ranker : bytes
        The owner's ranker at that checkpoint.
    """

    schema: str
    settings: str
    writer: str
    number: int
    base_number: int
    watermark: int
    ranker: bytes


@dataclass(frozen=True, slots=True)
class StoredBase:
    """The deltas up to `base_number` as one (``None``: there are none), and where the last delta stands."""

    base_number: int
    base: bytes | None
    number: int
    writer: str


@dataclass(frozen=True, slots=True)
class StoredDelta:
    """What one checkpoint has added to the counts, and who wrote it."""

    number: int
    writer: str
    blob: bytes


class ModelStore:
    """Checkpoints of all partitions.

    Parameters
    ----------
    client : redis.asyncio.Redis or Cluster
        Made by `stream_app.adapters.redis_client.connect`: no retries.
    owner : str
        The name that the worker claims partitions under.
    """

    def __init__(self, client: Client, owner: str) -> None:
        # redis-py types every reply as a union of all that any client might return.
        self._redis: Any = client
        self.owner = owner
        self._script = client.register_script(script_text("checkpoint.lua"))

    async def heads(self, partitions: Iterable[int]) -> dict[int, StoredModel | None]:
        """Read the heads of some partitions in one round trip; ``None`` where nothing was ever learned.

        Raises
        ------
        ValueError
            A field is not what `checkpoint` writes; the message names the partition.
        StoreUnavailable
            Redis did not answer as it should.
        """
        wanted = list(partitions)
        fields = ("schema", "settings", "writer", "number", "base_number", "watermark", "ranker")
        pipeline = self._redis.pipeline(transaction=False)
        for partition in wanted:
            pipeline.hmget(keys(partition).model, *fields)
        with unavailable("read the model"):
            replies = await pipeline.execute()
        found: dict[int, StoredModel | None] = {}
        for partition, reply in zip(wanted, replies, strict=True):
            schema, settings, writer, number, base_number, watermark, ranker = reply
            if number is None and schema is None:
                found[partition] = None
                continue
            try:
                found[partition] = StoredModel(
                    schema.decode(),
                    settings.decode(),
                    writer.decode(),
                    int(number),
                    int(base_number or 0),
                    int(watermark),
                    ranker,
                )
            except (AttributeError, ValueError, TypeError) as exc:
                raise ValueError(f"partition {partition}: a checkpoint with fields missing or wrong") from exc
        return found

    async def base(self, partition: int) -> StoredBase:
        """Read the deltas that were added up, and how far the deltas go, at one instant."""
        with unavailable("read the model"):
            reply = await self._redis.hmget(keys(partition).model, "base_number", "base", "number", "writer")
        base_number, base, number, writer = reply
        return StoredBase(int(base_number or 0), base, int(number or 0), (writer or b"").decode())

    async def deltas(self, partition: int, first: int) -> list[StoredDelta]:
        """Read deltas from a number on, in order, a bounded page of them; empty at the end.

        Raises
        ------
        ValueError
            An entry is not what `checkpoint` writes.
        StoreUnavailable
            Redis did not answer as it should.
        """
        with unavailable("read the model"):
            page = await self._redis.xrange(keys(partition).model_deltas, min=f"{first}-0", count=PAGE_DELTAS)
        try:
            return [
                StoredDelta(int(entry.partition(b"-")[0]), fields[b"w"].decode(), fields[b"d"])
                for entry, fields in page
            ]
        except (KeyError, ValueError) as exc:
            raise ValueError("a delta with fields missing or wrong") from exc

    async def checkpoint(
        self, partition: int, epoch: int, number: int, delta: bytes, fields: Mapping[str, str | bytes | int]
    ) -> None:
        """Make checkpoint `number` durable: the one after the last.

        Parameters
        ----------
        partition, epoch : int
            As claimed.
        number : int
            One more than the stored one.
        delta : bytes
            What was counted since then.
        fields : mapping
            The head's other fields.

        Raises
        ------
        StateLost, Fenced, CommitMismatch, StoreUnavailable
            As `ProfileStore.commit`.
        """
        args: list[bytes | str | int] = [self.owner, epoch, number - 1, "checkpoint", delta]
        for name, value in {"schema": MODEL_SCHEMA, **fields}.items():
            args += [name, value]
        await self._run(partition, args, number - 1)

    async def compact(self, partition: int, epoch: int, number: int, base: bytes) -> None:
        """Replace the deltas up to `number` by their sum; the last `KEPT_DELTAS` of them stay."""
        keep = max(1, number - KEPT_DELTAS + 1)
        await self._run(partition, [self.owner, epoch, number, "compact", base, keep], number)

    async def _run(self, partition: int, args: Sequence[bytes | str | int], expected: int) -> None:
        names = keys(partition)
        with unavailable("checkpoint"):
            reply = await self._script(keys=[names.wm, names.model, names.model_deltas], args=args)
        code = reply[0].decode()
        if code == "LOST":
            raise StateLost(partition)
        if code == "FENCED":
            raise Fenced(partition, reply[1].decode())
        if code == "MISMATCH":
            raise CommitMismatch(partition, stored=int(reply[1]), expected=expected)
