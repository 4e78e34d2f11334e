"""What the partitions of one worker share of the next-category model, and share with other workers.

Decides from which record on a partition is learned from, when what was learned is made durable, and how the
counts and rankers of several workers come together. It must not know how the model learns (`core/model.py`).

Counts are sums over partitions. The model of a worker holds, of every partition, the deltas that Redis has up
to some number, and of its own partitions what was counted since (pending). Whoever owns a partition appends
its pending counts as the next delta; all others follow. A worker that loses a partition takes pending counts
that were not made durable back, so that all workers stay equal to what Redis has.

Rankers are averaged: every few seconds each worker takes the mean of its own and of those that others have
written since it last looked.

A record is learned from once: the offset from which to learn on (`learned_below`) goes into the checkpoint
with the counts, may be ahead of the partition's watermark when a commit failed, and is then not learned from
again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from stream_app.adapters.metrics import Metrics
from stream_app.adapters.model_store import MODEL_SCHEMA, ModelStore, StoredModel
from stream_app.adapters.profile_store import keys
from stream_app.adapters.redis_client import Client
from stream_app.core.decay import Weights
from stream_app.core.discovery import DiscoveryRules, discover
from stream_app.core.event import Record
from stream_app.core.examples import examples_of, histories_before
from stream_app.core.model import Delta, History, NextCategoryModel
from stream_app.core.profile import Profile
from stream_app.core.scores import Scored
from stream_app.core.step import Applied
from stream_app.core.transition import Transition
from stream_app.errors import ModelStateError, StoreUnavailable

__all__ = ["Learner", "read_model"]

logger = logging.getLogger(__name__)

#: Deltas beyond a base before they are added up.
COMPACT_EVERY: Final = 64
#: How often a base that changes under the reading is read again.
READS: Final = 5
#: A blob may not unpack to more than this, bytes.
MAX_UNPACKED: Final = 1 << 30


@dataclass(slots=True)
class _Part:
    """What the model holds of one partition.

    Attributes
    ----------
    number, base_number : int
        Of the last delta that it holds, and of the last one that Redis has added up.
    writer : str
        Of that last delta: the same number by somebody else stands for other counts.
    learned_below, written_below : int
        Next offset to learn from, and what of it Redis knows.
    stale : bool
        Redis has less than was held: nothing is learned until the partition has been claimed again.
    pending : list of Delta
        Counted and not yet written down.
    """

    number: int = 0
    base_number: int = 0
    writer: str = ""
    learned_below: int = 0
    written_below: int = 0
    owned: bool = False
    stale: bool = False
    written_s: float = 0.0
    pending: list[Delta] = field(default_factory=list)

    def has(self, head: StoredModel | None) -> bool:
        """Tell whether all that Redis has is held, and nothing else but what is pending."""
        if head is None:
            return self.number == 0
        return (self.number, self.writer) == (head.number, head.writer)


@dataclass(frozen=True, slots=True)
class _Counts:
    """Deltas that follow each other, and number and writer of the last."""

    number: int
    writer: str
    deltas: list[Delta]


class Learner:
    """The model of one worker, on its event loop.

    Parameters
    ----------
    model : NextCategoryModel
    store : ModelStore
    rules : DiscoveryRules or None
        The discovery segments; ``None`` for who only reads.
    weights : Weights
        The settings that profiles are stored under.
    partitions : int
        Of the events topic.
    max_age_ms : int
        How long a membership of a discovery segment lasts without another scoring.
    checkpoint_s : float
        Seconds between checkpoints, and between looks at what others have learned.
    monotonic_s : callable
        Seconds from an arbitrary start.
    """

    def __init__(
        self,
        model: NextCategoryModel,
        store: ModelStore,
        rules: DiscoveryRules | None,
        weights: Weights,
        *,
        partitions: int,
        max_age_ms: int,
        checkpoint_s: float,
        monotonic_s: Callable[[], float],
        metrics: Metrics,
    ) -> None:
        self.model = model
        self.max_age_ms = max_age_ms
        self._store = store
        self._rules = rules
        self._weights = weights
        self._checkpoint_s = checkpoint_s
        self._monotonic_s = monotonic_s
        self._metrics = metrics
        named = {} if rules is None else rules.labels()
        self._segment_labels = {segment_id: labels for segment_id, labels in named.items() if labels}
        self._measured_s = -checkpoint_s
        self._figures: dict[str, Any] = {}
        self._accuracy: dict[str, dict[str, float]] = {}
        self._parts = {partition: _Part() for partition in range(partitions)}
        self._lock = asyncio.Lock()

    # Owning a partition.

    async def start(self) -> None:
        """Read what all workers have learned so far.

        Raises
        ------
        ModelStateError
            What is stored cannot be read, or is of another kind of model.
        StoreUnavailable
            Redis did not answer as it should.
        """
        async with self._lock:
            heads = await self._heads(self._parts)
            for partition, head in heads.items():
                await self._catch_up(partition, head)
            rankers = [self._ranker(p, head) for p, head in heads.items() if head is not None]
            if rankers:
                self.model.set_ranker_state(self.model.average(rankers))

    async def claim(
        self, partition: int, watermark: int, checkpoint: int, *, log_is_new: bool = False
    ) -> None:
        """Begin to learn from a partition, where its last owner has stopped.

        Parameters
        ----------
        partition : int
        watermark, checkpoint : int
            As claimed: the next offset to fold, and the number of the last checkpoint.
        log_is_new : bool
            The topic was created anew: offsets say nothing about what was learned before.

        Raises
        ------
        ModelStateError, StoreUnavailable
            As `start`.
        """
        async with self._lock:
            part = self._parts[partition]
            head = (await self._heads([partition]))[partition]
            stored = 0 if head is None else head.number
            if stored != checkpoint:
                # Both are written by one script, and nobody but the owner may run it.
                got = f"number {stored or 'none'}, though {checkpoint} were written"
                raise ModelStateError(got, _where(partition))
            if not part.owned or part.stale or not part.has(head):
                self._take_back(part)
                await self._catch_up(partition, head)
                part.learned_below = 0 if head is None else head.watermark
                part.stale = False
            if log_is_new:
                part.learned_below = watermark
            missed = watermark - part.learned_below
            if missed > 0:
                if head is None:
                    logger.info("partition %d: learning from offset %d on", partition, watermark)
                else:
                    self._metrics.examples_lost.inc(missed)
                    logger.warning(
                        "partition %d: %d records are not learned from, a worker ended before its checkpoint",
                        partition, missed,
                    )  # fmt: skip
                part.learned_below = watermark
            part.written_below = 0 if head is None else head.watermark
            part.owned = True
            part.written_s = self._monotonic_s()

    async def leave(self, partition: int, epoch: int) -> None:
        """Stop learning from a partition, and write down what was learned if that is still possible."""
        part = self._parts[partition]
        if not part.owned:
            return
        try:
            await self.checkpoint(partition, epoch)
        finally:
            part.owned = False
            self._take_back(part)

    # One slice.

    def histories(self, profiles: Mapping[str, Profile], records: Sequence[Record]) -> dict[str, History]:
        """Return what is known of a slice's users before it, to be kept while their profiles change."""
        return histories_before(profiles, [record.event for record in records], self._weights)

    def learn(
        self, partition: int, histories: Mapping[str, History], applied: Sequence[Applied], next_offset: int
    ) -> None:
        """Score every record of a slice, then learn from it, unless that was done before.

        A slice that was learned from in part is to be cut at `learned_below`.
        """
        part = self._parts[partition]
        if part.stale or next_offset <= part.learned_below:
            return
        examples = examples_of(applied, self._weights)
        if examples:
            self.model.observe(histories, examples)
            part.pending.append(self.model.take_delta())
        part.learned_below = max(part.learned_below, next_offset)

    def learned_below(self, partition: int) -> int:
        """Return the next offset to learn from."""
        return self._parts[partition].learned_below

    def score(self, profiles: Iterable[Profile], at_ms: int) -> list[Scored]:
        """Score users as they are."""
        return self.model.score([History.of(profile, self._weights, at_ms) for profile in profiles])

    def discover(self, profile: Profile, scored: Scored, at_ms: int) -> list[Transition]:
        """Let a user who was scored into discovery segments and out of them."""
        if not self._rules:
            return []
        return discover(
            profile,
            scored.recommendations,
            self._rules,
            at_ms,
            max_age_ms=self.max_age_ms,
            model_version=self.model.version,
            accuracy=self._accuracy,
        )

    # Making it durable.

    def is_due(self, partition: int) -> bool:
        """Say whether it is time for a checkpoint."""
        part = self._parts[partition]
        changed = part.learned_below != part.written_below
        return changed and self._monotonic_s() - part.written_s >= self._checkpoint_s

    async def checkpoint(self, partition: int, epoch: int) -> None:
        """Write down what was learned since the last checkpoint, if there was any record.

        Raises
        ------
        StateLost, Fenced, CommitMismatch, StoreUnavailable
            As `ModelStore.checkpoint`; nothing is lost, the next claim puts it right.
        """
        part = self._parts[partition]
        part.written_s = self._monotonic_s()
        if part.stale or part.learned_below == part.written_below:
            return
        async with self._lock:
            delta = Delta.merged(part.pending)
            part.pending = [delta]
            learned_below = part.learned_below
            fields: dict[str, str | bytes | int] = {
                "settings": self.model.version,
                "watermark": learned_below,
                "ranker": _packed(self.model.ranker_state()),
                "accuracy": json.dumps(self._measured()),
            }
            number = part.number + 1
            await self._store.checkpoint(partition, epoch, number, _packed(delta.as_document()), fields)
            part.number, part.writer = number, f"{self._store.owner}-{epoch}"
            part.written_below = learned_below
            # Not cleared: a slice may have come while Redis was answering.
            part.pending = part.pending[1:]
            if number - part.base_number >= COMPACT_EVERY:
                await self._compact(partition, epoch)

    async def follow(self) -> None:
        """Take in what other workers learn, every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(self._checkpoint_s)
            try:
                async with self._lock:
                    await self._look_at_others()
            except StoreUnavailable as exc:
                # The partitions themselves hold, and give up, on a Redis that does not answer.
                logger.warning("model: others are looked at again later, %s", exc)

    # Below, the lock is held.

    async def _look_at_others(self) -> None:
        others = [partition for partition, part in self._parts.items() if not part.owned]
        heads = await self._heads(others)
        changed = []
        for partition, head in heads.items():
            part = self._parts[partition]
            if part.owned or part.has(head):
                continue
            await self._catch_up(partition, head)
            if head is not None:
                changed.append(self._ranker(partition, head))
        if changed:
            own = [self.model.ranker_state()] * sum(part.owned for part in self._parts.values())
            self.model.set_ranker_state(self.model.average([*own, *changed]))

    async def _heads(self, partitions: Iterable[int]) -> dict[int, StoredModel | None]:
        try:
            heads = await self._store.heads(partitions)
        except ValueError as exc:
            raise ModelStateError(str(exc), "keys sa:{p}:model") from exc
        for partition, head in heads.items():
            if head is None:
                continue
            if head.schema != MODEL_SCHEMA or head.settings != self.model.version:
                raise ModelStateError(
                    f"one of schema {head.schema} and model {head.settings}, this being "
                    f"schema {MODEL_SCHEMA} and model {self.model.version}",
                    _where(partition),
                )
        return heads

    async def _catch_up(self, partition: int, head: StoredModel | None) -> None:
        """Make what is held of a partition what Redis has of it."""
        part = self._parts[partition]
        if part.has(head):
            return
        found: _Counts | None = None
        if part.number == 0:
            found = await self._all_deltas(partition)
        elif head is not None and head.number > part.number:
            found = await self._later_deltas(partition, part.number, part.writer, head.number)
        if found is None:
            # Restored from an older state, or so far behind that deltas in between are gone: only a new
            # beginning gives equal counts.
            await self._reload()
            return
        for delta in found.deltas:
            self.model.add(delta)
        part.number, part.writer = found.number, found.writer
        part.base_number = 0 if head is None else head.base_number

    async def _reload(self) -> None:
        """Count anew from what Redis has and what is pending here."""
        heads = await self._heads(self._parts)
        found = {
            partition: _Counts(0, "", []) if head is None else await self._all_deltas(partition)
            for partition, head in heads.items()
        }
        # From here on nothing waits, so no slice can be learned from in between.
        self.model.clear_counts()
        for partition, counts in found.items():
            part, head = self._parts[partition], heads[partition]
            if (counts.number, counts.writer) != (part.number, part.writer):
                part.pending.clear()
                part.stale = part.owned
            part.number, part.writer = counts.number, counts.writer
            part.base_number = 0 if head is None else head.base_number
            for delta in [*counts.deltas, *part.pending]:
                self.model.add(delta)

    async def _all_deltas(self, partition: int) -> _Counts:
        """Read the counts of a partition."""
        for _ in range(READS):
            stored = await self._store.base(partition)
            if stored.base is None and stored.base_number:
                raise ModelStateError("a head without the base that it names", _where(partition))
            base = [] if stored.base is None else [_delta(stored.base, partition)]
            if stored.base_number == stored.number:
                return _Counts(stored.number, stored.writer, base)
            later = await self._later_deltas(partition, stored.base_number, None, stored.number)
            if later is not None:
                return _Counts(later.number, later.writer, base + later.deltas)
            # The owner has added deltas up, and dropped them, between the two reads.
        raise ModelStateError(f"deltas missing before number {stored.number}", _where(partition))

    async def _later_deltas(
        self, partition: int, number: int, writer: str | None, until: int
    ) -> _Counts | None:
        """Read the deltas after a number, at least until another; ``None`` if that is not possible.

        With a writer, the delta of that number must still be there, and be his.
        """
        deltas: list[Delta] = []
        after = number - 1 if writer is not None else number
        while after < until:
            try:
                page = await self._store.deltas(partition, after + 1)
            except ValueError as exc:
                raise ModelStateError(str(exc), f"key {keys(partition).model_deltas}") from exc
            if not page or page[0].number != after + 1:
                return None
            for stored in page:
                if stored.number > number:
                    deltas.append(_delta(stored.blob, partition))
                elif stored.writer != writer:
                    return None
                after, last = stored.number, stored.writer
        return _Counts(after, last, deltas)

    async def _compact(self, partition: int, epoch: int) -> None:
        part = self._parts[partition]
        counts = await self._all_deltas(partition)

        def add_up() -> bytes:
            return _packed(Delta.merged(counts.deltas).condensed().as_document())

        await self._store.compact(partition, epoch, counts.number, await asyncio.to_thread(add_up))
        part.base_number = counts.number

    def _measured(self) -> dict[str, Any]:
        """Publish how good the last predictions were: on /metrics, with enters, in the checkpoint."""
        now_s = self._monotonic_s()
        if self._figures and now_s - self._measured_s < self._checkpoint_s:
            return self._figures
        self._measured_s = now_s
        tasks = self.model.accuracy()
        segments = self.model.discovery_accuracy(self._segment_labels)
        for task, figures in tasks.items():
            for name, value in figures.items():
                self._metrics.accuracy.labels(task, name).set(value)
        for segment_id, figures in segments.items():
            for name, value in figures.items():
                self._metrics.segment_accuracy.labels(segment_id, name).set(value)
        self._accuracy = {"": tasks["discovery"], **segments}
        self._figures = {
            "worker": self._store.owner,
            "examples": self.model.statistics.examples,
            "tasks": tasks,
            "segments": segments,
        }
        return self._figures

    def _take_back(self, part: _Part) -> None:
        for delta in part.pending:
            self.model.add(delta, -1)
        part.pending.clear()

    def _ranker(self, partition: int, head: StoredModel) -> dict[str, Any]:
        try:
            return self.model.checked_ranker_state(_unpacked(head.ranker))
        except ValueError as exc:
            raise ModelStateError(f"a ranker that cannot be read ({exc})", _where(partition)) from exc


async def read_model(client: Client, weights: Weights, partitions: int) -> NextCategoryModel:
    """Return the model of the whole service as it was last written down, for who only reads.

    Raises
    ------
    ModelStateError, StoreUnavailable
        As `Learner.start`.
    """
    reader = Learner(
        NextCategoryModel(half_life_ms=weights.default_half_life_ms),
        ModelStore(client, "reader"),
        None,
        weights,
        partitions=partitions,
        max_age_ms=0,
        checkpoint_s=0.0,
        monotonic_s=lambda: 0.0,
        metrics=Metrics(),
    )
    await reader.start()
    return reader.model


def _where(partition: int) -> str:
    return f"partition {partition}, key {keys(partition).model}"


def _packed(document: object) -> bytes:
    packed: bytes = msgpack.packb(document)
    return zlib.compress(packed, 1)


def _unpacked(blob: bytes) -> object:
    """Return what `_packed` was given.

    Raises
    ------
    ValueError
        If these bytes are not of its making, or unpack to more than is reasonable.
    """
    try:
        stream = zlib.decompressobj()
        packed = stream.decompress(blob, MAX_UNPACKED)
        if stream.unconsumed_tail or not stream.eof:
            raise ValueError(f"expected a whole blob of at most {MAX_UNPACKED} bytes")
        return msgpack.unpackb(packed)
    except (zlib.error, ValueError, TypeError, msgpack.UnpackException) as exc:
        raise ValueError(f"not packed numbers: {exc}") from exc


def _delta(blob: bytes, partition: int) -> Delta:
    try:
        return Delta.from_document(_unpacked(blob))
    except ValueError as exc:
        raise ModelStateError(f"counts that cannot be read ({exc})", _where(partition)) from exc
