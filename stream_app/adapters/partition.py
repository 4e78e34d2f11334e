"""Take one partition through the path of an event: load, fold, commit, publish, acknowledge.

Decides the order of those steps, what is done when one of them fails, and when an exit that no event brings
is due. One `PartitionTask` a partition, from its assignment to its revocation; everything that it does to the
partition's state goes through one commit at a time. It must not know Faust or which worker owns what else.

Errors know two ways. A bad record is set aside: its dead letter is committed with the step. Whatever else
goes wrong is held: the work in hand is dropped unacknowledged, the partition is claimed anew, which reads the
truth from Redis, publishes what was committed and rewinds the log, until it works or the deadline has passed.
A commit is never repeated: after a lost reply nobody here knows whether it was made; the new claim reads it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

from stream_app.adapters.codec import (
    Decoder,
    InvalidEvent,
    Outgoing,
    called_replayed,
    dead_letter,
    transition_message,
)
from stream_app.adapters.fuse import DeadLetterFuse
from stream_app.adapters.learning import Learner
from stream_app.adapters.log_ends import LogEnds
from stream_app.adapters.metrics import Metrics
from stream_app.adapters.ports import AsksLogEnds, PublishesMessages, ReadsLog
from stream_app.adapters.profile_cache import ProfileCache
from stream_app.adapters.profile_store import Claim, Commit, Identity, Memberships, ProfileStore
from stream_app.adapters.transport import SLICE_BYTES, SLICE_RECORDS, Slice
from stream_app.core.decay import NEVER_MS
from stream_app.core.event import Record
from stream_app.core.fold import Fold
from stream_app.core.patch import CHANGED, LEFT, Patcher, Stored
from stream_app.core.profile import Profile
from stream_app.core.scores import pack_scores
from stream_app.core.segment_set import SegmentSet
from stream_app.core.step import Applied, Packed, fold_slice
from stream_app.core.transition import Transition
from stream_app.errors import (
    CommitMismatch,
    Fenced,
    HoldExpired,
    StartRefused,
    StateLost,
    StoreUnavailable,
    StreamAppError,
)

__all__ = ["PartitionMemory", "PartitionTask", "Shell"]

logger = logging.getLogger(__name__)

#: Slices that wait for a partition at most; at this depth nothing more is fetched for it.
QUEUED_SLICES: Final = 8
#: Users whose exits one commit fires, or who are re-evaluated by one commit, at most.
USERS_PER_STEP: Final = 500
#: With a backlog, exits that are due by stream time wait for so many slices, since each round of them is a
#: commit of its own. They carry their own instants and nobody's order changes; it saves 4 % of a replay.
FIRED_AFTER: Final = 4
#: How long after an exit's instant the timer asks whether the log has anything to say about it.
GRACE_MS: Final = 150
#: How long a published outbox waits for the next commit to drop it: a commit only for that, after each of the
#: small slices of a quiet stream, would be every second one.
TRIM_AFTER_S: Final = 0.1
#: How long a partition with nothing to do goes without asking whether it still owns its state.
MOST_IDLE_S: Final = 2.0
#: How soon the timer asks again when the log was ahead of the fold.
ASK_AGAIN_S: Final = 0.05
#: How often the background asks who was not scored for long.
RESCORE_EVERY_S: Final = 1.0
#: Kafka's number for a record whose timestamp the broker has set.
LOG_APPEND_TIME: Final = 1
#: A slice lost inside Faust shows as a gap; several may follow it before the rewind takes effect.
REWIND_AGAIN_S: Final = 1.0
FIRST_BACKOFF_S: Final = 0.1
LONGEST_BACKOFF_S: Final = 2.0
#: Kafka's brokers may take their time with what is published; a partition that waits longer is held.
PUBLISHED_WITHIN_S: Final = 3.0
#: A partition that went well for this long begins a new deadline when it fails again.
WELL_AGAIN_S: Final = 10.0
#: Added to a topic's retention before Redis may drop a forgotten profile.
RETENTION_MARGIN_MS: Final = 3_600_000

#: Failures after which a new claim may put things right.
HELD: Final = (StoreUnavailable, StateLost, Fenced, CommitMismatch)


@dataclass(frozen=True, slots=True)
class Shell:
    """What the partitions of one worker share; built in `stream_app.app`, nowhere else.

    Attributes
    ----------
    clock : {"wall", "event"}
        What a record's instant is: its Kafka timestamp or the event's own.
    now_ms, monotonic_s : callable
        The clocks; Unix ms, and seconds from an arbitrary start.
    retention_ms : int or None
        How long the events topic keeps a record; ``None``: without limit, or unknown.
    check_producer_time : bool
        Whether Kafka timestamps are the producers' and a time ahead of now is a bad record.
    load_functions : callable
        Makes the Redis Functions those of the claimed state; after every claim, since what emptied Redis may
        have taken them along.
    patcher : Patcher or None
        Applies common events to packed profiles; ``None``: all are unpacked, as the model needs them.
    learner : Learner or None
        The next-category model; ``None``: off.
    rescored_per_s : int
        Users whom a partition scores in the background at most.
    cache_bytes : int
        Bound of the packed profiles that a partition keeps.
    """

    topic: str
    clock: Literal["wall", "event"]
    fold: Fold
    decoder: Decoder
    store: ProfileStore
    publisher: PublishesMessages
    log: ReadsLog
    probe: AsksLogEnds
    identity: Identity
    metrics: Metrics
    now_ms: Callable[[], int]
    monotonic_s: Callable[[], float]
    hold_deadline_s: float
    max_dead_letter_share: float | None
    retention_ms: int | None
    check_producer_time: bool
    accept_gap: bool
    load_functions: Callable[[], Awaitable[None]]
    patcher: Patcher | None = None
    learner: Learner | None = None
    rescored_per_s: int = 64
    cache_bytes: int = 0


@dataclass(slots=True)
class _Owned:
    """What a claim established; gone with it."""

    epoch: int
    commit: int
    watermark: int
    stream_time_ms: int | None
    replayed_below: int
    next_due_ms: int | None
    old: Mapping[str, SegmentSet]
    #: What Kafka, or this process, knew at the claim to be processed.
    processed_below: int
    #: When a slice was folded last, or the surroundings were looked at.
    looked_s: float
    outbox_is_empty: bool = True
    scores_are_gone: bool = False
    rewound_s: float = 0.0
    #: When the outbox is dropped if no commit comes.
    trim_s: float = 0.0
    #: Slices folded since exits were last looked at.
    unfired: int = 0
    cache: ProfileCache = field(default_factory=lambda: ProfileCache(0))


@dataclass(frozen=True, slots=True)
class _Request:
    """Users to re-evaluate under the present definitions; with no users, the mark that all have been."""

    users: Sequence[str]
    done: asyncio.Future[bool] = field(compare=False)


@dataclass(slots=True)
class PartitionMemory:
    """What a process remembers of a partition from one assignment to the next.

    Attributes
    ----------
    last_epoch : int
        Highest epoch that it held, 0 for none.
    processed_below : int
        Next offset after everything that it committed, published and acknowledged. Kafka hears of it about
        a second later; if Redis is lost in between, this is the truer number.
    """

    last_epoch: int = 0
    processed_below: int = 0


class PartitionTask:
    """The life of one partition in this worker, from assignment to revocation.

    Parameters
    ----------
    partition : int
    shell : Shell
    memory : PartitionMemory
        What this process knows of the partition from before; kept up to date.
    """

    def __init__(self, partition: int, shell: Shell, memory: PartitionMemory) -> None:
        self.partition = partition
        self._memory = memory
        #: When Redis or Kafka last answered a step, on the shell's monotonic clock.
        self.moved_s = shell.monotonic_s()
        self._shell = shell
        self._held_by: StreamAppError | None = None
        self._publishing_since_s: float | None = None
        self._owned: _Owned | None = None
        self._queue: deque[tuple[Slice, Callable[[], object]]] = deque()
        self._requests: deque[_Request] = deque()
        self._wake = asyncio.Event()
        self._draining = False
        self._fuse = DeadLetterFuse(partition, shell.max_dead_letter_share)
        self._told: set[str] = set()
        self._held_since_s: float | None = None
        self._rescored_s = 0.0
        self._claimed_s = 0.0
        self._backoff_s = FIRST_BACKOFF_S

    # What the worker asks and tells, on its event loop.

    @property
    def held_by(self) -> StreamAppError | None:
        """Why the partition does not go on, ``None`` while it does."""
        if self._held_by is None and self._publishing_since_s is not None:
            waited_s = self._shell.monotonic_s() - self._publishing_since_s
            if waited_s > PUBLISHED_WITHIN_S:
                return StoreUnavailable("Kafka, publish", f"not all acknowledged for {waited_s:.0f} s")
        return self._held_by

    @property
    def is_serving(self) -> bool:
        """Whether the partition is claimed and folding."""
        return self._owned is not None

    @property
    def watermark(self) -> int | None:
        """Next offset to fold, ``None`` while the partition is not claimed."""
        return self._owned.watermark if self._owned else None

    @property
    def epoch(self) -> int:
        """Epoch of the latest claim."""
        return self._memory.last_epoch

    @property
    def needs_definitions(self) -> bool:
        """Whether some profiles may not yet have been evaluated under the present definitions."""
        return self._owned is not None and bool(self._owned.old)

    def wants(self) -> bool:
        """Say whether more slices may be fetched."""
        return self._owned is not None and not self._draining and len(self._queue) < QUEUED_SLICES

    def submit(self, part: Slice, acknowledge: Callable[[], object]) -> None:
        """Take a slice in."""
        self._queue.append((part, acknowledge))
        self._wake.set()

    async def redefine(self, users: Sequence[str]) -> bool:
        """Re-evaluate users under the present definitions; ``False`` if the claim was lost meanwhile."""
        return await self._request(users)

    async def mark_definitions(self) -> bool:
        """Note in ``wm`` that all profiles have the present definitions; ``False`` if the claim was lost."""
        return await self._request(())

    def drain(self) -> None:
        """Finish the step in hand, then end `run`."""
        self._draining = True
        self._wake.set()

    async def run(self) -> None:
        """Claim and serve until drained or cancelled.

        Raises
        ------
        StreamAppError
            When the partition cannot go on: refused state, a blown fuse, or a hold past its deadline.
        """
        try:
            while not self._draining:
                try:
                    await self._serve(await self._claim())
                except HELD as exc:
                    self._let_go()
                    await self._hold(exc)
        finally:
            self._let_go()

    # Owning the partition.

    async def _claim(self) -> _Owned:
        """Take the partition over and start where Redis stands.

        1. Make sure with Kafka that this member still belongs to the group: a zombie fails here.
        2. Claim under a new epoch: whoever wrote before is fenced from now on.
        3. The watermark must lie within the log; aiokafka would silently reset what does not.
        4. Publish what was committed and perhaps not published, to its end, before the next commit.
        5. Rewind the log to the watermark.
        """
        shell, p = self._shell, self.partition
        if p >= shell.identity.partitions:
            raise StartRefused(
                f"{shell.identity.partitions} partitions, as when the worker started",
                f"partition {p}",
                f"topic {shell.topic}",
                "Users have moved to other partitions: stop all workers and run `stream-app rebuild`. Those "
                "who moved begin anew; to keep their histories, replay all events into a new topic first.",
            )
        await self._check_generation()
        processed_below = committed = await shell.log.committed(p)
        if self._memory.processed_below:
            processed_below = max(processed_below or 0, self._memory.processed_below)
        ends = await shell.probe.ends(p)
        if processed_below is not None and processed_below > ends.end:
            # Of a log that is gone; of this one nobody knows what was processed.
            processed_below = None
        segments = shell.fold.segments
        claim = await shell.store.claim(
            p,
            shell.identity,
            last_epoch=self._memory.last_epoch,
            log_start=ends.start,
            processed_below=processed_below,
            replay_when_new=ends.end if shell.clock == "wall" else None,
            definitions=(segments.fingerprint, segments.canonical_json()),
            model_on=shell.learner is not None,
        )
        wm = claim.watermark
        self._memory.last_epoch = wm.epoch
        # What is folded again, or was there before the service, stays so if Redis is lost in the middle.
        self._memory.processed_below = max(self._memory.processed_below, wm.replayed_below)
        owned = _Owned(
            epoch=wm.epoch,
            commit=wm.commit,
            watermark=wm.watermark,
            stream_time_ms=wm.stream_time_ms,
            replayed_below=wm.replayed_below,
            next_due_ms=claim.next_due_ms,
            old=self._older_sets(claim),
            processed_below=processed_below or 0,
            looked_s=shell.monotonic_s(),
            cache=ProfileCache(shell.cache_bytes),
        )
        later = await shell.log.committed(p)
        if later is not None and later != committed:
            # Another had the partition in between. If Redis is behind him now, it has lost what he did.
            owned.processed_below = max(owned.processed_below, later)
            if later > max(wm.watermark, wm.replayed_below):
                owned.replayed_below = later
        await self._publish_outbox(owned)
        if owned.replayed_below > wm.replayed_below:
            await self._commit(owned, Commit(replayed_below=owned.replayed_below), [])
        if wm.watermark > ends.end:
            # Whoever had the partition may have gone on since the log was asked; nobody does now.
            ends = await shell.probe.ends(p)
        if not ends.start <= wm.watermark <= ends.end:
            await self._accept_gap(owned, ends)
        await shell.load_functions()
        if shell.learner is not None:
            log_is_new = owned.watermark < wm.watermark
            await shell.learner.claim(p, owned.watermark, wm.checkpoint, log_is_new=log_is_new)
        self._queue.clear()
        await shell.log.rewind(p, owned.watermark)
        self._owned = owned
        self._claimed_s = self.moved_s = shell.monotonic_s()
        self._held_by = None
        logger.info(
            "partition %d: claimed, epoch %d, watermark %d, log %d to %d",
            p, owned.epoch, owned.watermark, ends.start, ends.end,
        )  # fmt: skip
        return owned

    async def _check_generation(self) -> None:
        if not await self._shell.log.generation_is_current():
            where = f"Kafka, group {self._shell.identity.group}"
            raise StoreUnavailable(where, "the coordinator does not answer or not accept this member")

    def _older_sets(self, claim: Claim) -> Mapping[str, SegmentSet]:
        fold = self._shell.fold
        if claim.watermark.definitions == fold.segments.fingerprint and len(claim.definitions) == 1:
            return {}
        return {
            fingerprint: SegmentSet.from_canonical_json(text, fold.weights)
            for fingerprint, text in claim.definitions.items()
            if fingerprint != fold.segments.fingerprint
        }

    async def _accept_gap(self, owned: _Owned, ends: LogEnds) -> None:
        if not self._shell.accept_gap:
            below = owned.watermark < ends.start
            raise StartRefused(
                f"a watermark within the log, offsets {ends.start} to {ends.end}",
                f"watermark {owned.watermark}",
                f"topic {self._shell.topic}, partition {self.partition}",
                (
                    f"{ends.start - owned.watermark} records were deleted by retention before they were "
                    "folded: start with --accept-gap to go on without them."
                    if below
                    else "The topic was created anew under a Redis that knows the old one, or the broker has "
                    "lost records: run `stream-app rebuild`. Only after a new creation, --accept-gap keeps "
                    "the profiles and folds the new log from its start."
                ),
            )
        logger.warning(
            "partition %d: gap accepted, watermark %d -> %d", self.partition, owned.watermark, ends.start
        )
        step = Commit(watermark=ends.start)
        if owned.watermark > ends.end:
            # What was processed was the log that is gone.
            owned.replayed_below = step.replayed_below = 0
            self._memory.processed_below = 0
        await self._commit(owned, step, [])

    async def _publish_outbox(self, owned: _Owned) -> None:
        # Not what another leaves there, who has claimed the partition meanwhile: it is for him to publish.
        async for page in self._shell.store.outbox(self.partition, owned.commit):
            messages = [Outgoing.unpack(blob) for blob in page]
            if owned.watermark < owned.replayed_below:
                # An older snapshot's outbox: the log was once processed beyond it, so it was published.
                messages = [called_replayed(message) for message in messages]
            await self._publish(messages)
        # Also when there was none: Redis may have been emptied since the claim, and the outbox with it. What
        # was in it would be taken for published, and be called replayed when it is said for the first time.
        await self._trim(owned)

    def _let_go(self) -> None:
        self._owned = None
        self._queue.clear()
        while self._requests:
            request = self._requests.popleft()
            if not request.done.done():
                request.done.set_result(False)

    async def _hold(self, exc: StreamAppError) -> None:
        """Wait before the next claim, or give up when the deadline has passed."""
        now_s = self._shell.monotonic_s()
        if self._held_since_s is None or (self._claimed_s and now_s - self._claimed_s > WELL_AGAIN_S):
            self._held_since_s, self._backoff_s = now_s, FIRST_BACKOFF_S
        self._claimed_s = 0.0
        deadline_s = self._shell.hold_deadline_s
        if now_s - self._held_since_s > deadline_s:
            raise HoldExpired(self.partition, deadline_s, exc) from exc
        if self._held_by is None or type(self._held_by) is not type(exc):
            logger.warning("partition %d: held, %s", self.partition, exc)
        self._held_by = exc
        self._shell.metrics.holds.labels(type(exc).__name__).inc()
        self._wake.clear()
        if not self._draining:
            await self._sleep(self._backoff_s)
        self._backoff_s = min(2 * self._backoff_s, LONGEST_BACKOFF_S)

    # Serving it.

    async def _serve(self, owned: _Owned) -> None:
        while not self._draining:
            idle = True
            if self._queue:
                part, acknowledge = self._next_slice()
                await self._take_slice(owned, part, acknowledge)
                idle = False
                owned.unfired += 1
            if self._due_by_stream_time(owned) and (not self._queue or owned.unfired >= FIRED_AFTER):
                await self._fire_all(owned)
                owned.unfired = 0
                idle = False
            if self._due_by_stream_time(owned):
                # Nothing else looks at users before what is due has happened.
                continue
            self._report_processed(owned)
            if self._shell.learner is None:
                if await self._forget_scores(owned):
                    idle = False
            elif await self._keep_scores(owned, self._shell.learner):
                idle = False
            if self._requests:
                await self._answer(owned, self._requests.popleft())
                idle = False
            if idle and not owned.outbox_is_empty and self._shell.monotonic_s() >= owned.trim_s:
                await self._trim(owned)
                idle = False
            if idle:
                await self._wait(owned)
        await self._fire_all(owned)
        self._report_processed(owned)
        if not owned.outbox_is_empty:
            await self._trim(owned)
        await self.write_down()

    async def write_down(self) -> None:
        """Make what the model has learned from this partition durable, before it is left."""
        if self._shell.learner is not None:
            await self._shell.learner.leave(self.partition, self.epoch)

    def _next_slice(self) -> tuple[Slice, Callable[[], object]]:
        """Take what waits: small slices that follow each other as one, for one commit."""
        part, acknowledge = self._queue.popleft()
        acknowledgements = [acknowledge]
        records = list(part.records)
        next_offset = part.next_offset
        while self._queue:
            following, acknowledge = self._queue[0]
            if (
                following.from_offset != next_offset
                or len(records) + len(following.records) > SLICE_RECORDS
                or _size(records) + _size(following.records) > SLICE_BYTES
            ):
                break
            self._queue.popleft()
            records += following.records
            next_offset = following.next_offset
            acknowledgements.append(acknowledge)
        if len(acknowledgements) == 1:
            return part, acknowledgements[0]

        def acknowledge_all() -> None:
            for one in acknowledgements:
                one()

        return Slice(part.partition, part.from_offset, next_offset, tuple(records)), acknowledge_all

    async def _take_slice(self, owned: _Owned, part: Slice, acknowledge: Callable[[], object]) -> None:
        if part.from_offset != owned.watermark:
            # A slice before it was lost or repeated on the way here: nothing is folded out of turn.
            now_s = self._shell.monotonic_s()
            if now_s - owned.rewound_s > REWIND_AGAIN_S:
                owned.rewound_s = now_s
                self._queue.clear()
                await self._check_range(owned)
                await self._shell.log.rewind(self.partition, owned.watermark)
            return
        owned.rewound_s, owned.looked_s = 0.0, self._shell.monotonic_s()
        learned_below = owned.replayed_below
        if self._shell.learner is not None:
            learned_below = self._shell.learner.learned_below(self.partition)
        for piece in _split_at(part, owned.replayed_below, learned_below):
            if piece.from_offset == owned.replayed_below:
                # What was due by then was due the first time, too: it is said before anything new is.
                await self._fire_all(owned)
            await self._fold(owned, piece)
        acknowledge()

    async def _check_range(self, owned: _Owned) -> None:
        ends = await self._shell.probe.ends(self.partition)
        if not ends.start <= owned.watermark <= ends.end:
            raise StateLost(self.partition)

    async def _fold(self, owned: _Owned, part: Slice) -> None:
        """Fold one slice: every record's effects are committed with the watermark behind it, or none."""
        shell, p = self._shell, self.partition
        self._check_timestamps(part)
        records: list[Record] = []
        outgoing: list[Outgoing] = []
        reasons: Counter[str] = Counter()
        now_ms = shell.now_ms() if shell.check_producer_time else None
        for raw in part.records:
            event = shell.decoder.decode(
                key=raw.key, value=raw.value, headers=raw.headers, kafka_time_ms=raw.timestamp, now_ms=now_ms
            )
            if isinstance(event, InvalidEvent):
                outgoing.append(
                    dead_letter(
                        topic=shell.topic, partition=p, offset=raw.offset,
                        key=raw.key, value=raw.value, invalid=event,
                    )
                )  # fmt: skip
                reasons[event.reason] += 1
                self._tell_first(raw.offset, event)
            else:
                records.append(Record(raw.offset, raw.timestamp, event))
        users = dict.fromkeys(record.event.user_id for record in records)
        blobs = await shell.store.read(p, users, owned.cache)
        self.moved_s = shell.monotonic_s()

        def unpack(user_id: str, blob: bytes) -> Profile:
            profile = shell.store.unpack(p, user_id, blob)
            self._check_definitions(owned, profile)
            return profile

        packed = None
        profiles: dict[str, Profile] = {}
        before: Mapping[str, Memberships] = {}
        if shell.patcher is not None:
            packed = Packed(shell.patcher, blobs, unpack)
            before = packed.before
        else:
            profiles = {user_id: unpack(user_id, blob) for user_id, blob in blobs.items()}
            before = {user_id: dict(profile.memberships) for user_id, profile in profiles.items()}
        learner = shell.learner
        histories = {} if learner is None else learner.histories(profiles, records)
        result = fold_slice(
            shell.fold,
            records,
            profiles,
            owned.stream_time_ms,
            shell.clock,
            owned.old,
            packed,
        )
        replayed = part.from_offset < owned.replayed_below
        transitions = result.transitions
        scores: dict[str, bytes | None] = {}
        if learner is not None:
            # Every record is scored before it is learned from; its user is scored again as he is now.
            learner.learn(p, histories, result.applied, part.next_offset)
        if learner is not None and result.applied and result.stream_time_ms is not None:
            scores, found = self._discover(learner, result.profiles, result.stream_time_ms, result.applied)
            transitions = transitions + found
        outgoing += self._messages(transitions, replayed)
        step = self._step(result.profiles, before, {} if packed is None else packed.stored)
        step.watermark, step.stream_time_ms = part.next_offset, result.stream_time_ms
        step.scores, step.scored_ms = scores, result.stream_time_ms or 0
        await self._commit(owned, step, outgoing)
        shell.metrics.events.inc(len(records))
        for reason, count in reasons.items():
            shell.metrics.dead_letters.labels(reason).inc(count)
        self._count(transitions)
        self._held_since_s = None
        self._fuse.count(len(part.records), reasons.total())

    def _discover(
        self, learner: Learner, profiles: Mapping[str, Profile], at_ms: int, applied: Sequence[Applied]
    ) -> tuple[dict[str, bytes | None], list[Transition]]:
        """Score the users of a slice as they are after it, and let them into discovery segments and out.

        What is due by stream time happens first: nobody is kept out by a segment that he has left.
        """
        acted = [profiles[user_id] for user_id in dict.fromkeys(one.record.event.user_id for one in applied)]
        transitions: list[Transition] = []
        for profile in acted:
            due_ms = profile.next_exit_ms
            if due_ms is not None and due_ms <= at_ms:
                transitions += self._shell.fold.expire(profile, at_ms)
        scores: dict[str, bytes | None] = {}
        for profile, scored in zip(acted, learner.score(acted, at_ms), strict=True):
            scores[profile.user_id] = pack_scores(scored)
            transitions += learner.discover(profile, scored, at_ms)
        return scores, transitions

    async def _forget_scores(self, owned: _Owned) -> bool:
        """Without a model, delete what it had said of users while it was on; tell if there was any."""
        if owned.scores_are_gone:
            return False
        users = await self._shell.store.scored_before(self.partition, NEVER_MS, USERS_PER_STEP)
        if users:
            await self._commit(owned, Commit(scores=dict.fromkeys(users)), [])
        owned.scores_are_gone = not users
        return bool(users)

    async def _keep_scores(self, owned: _Owned, learner: Learner) -> bool:
        """Write down what was learned, score those again who have not acted for long; tell if any."""
        busy = False
        if learner.is_due(self.partition):
            await learner.checkpoint(self.partition, owned.epoch)
            busy = True
        now_s = self._shell.monotonic_s()
        if owned.stream_time_ms is None or now_s - self._rescored_s < RESCORE_EVERY_S:
            return busy
        self._rescored_s = now_s
        return await self._rescore(owned, learner, owned.stream_time_ms) or busy

    async def _rescore(self, owned: _Owned, learner: Learner, stream_time_ms: int) -> bool:
        """Score a bounded number of those users again whose last scoring is half the maximum age old."""
        shell = self._shell
        half_ms = learner.max_age_ms // 2
        at_ms = stream_time_ms
        if shell.clock == "wall" and not self._queue:
            # Read before the log is asked: what is appended later carries a later Kafka timestamp.
            at_ms = max(at_ms, shell.now_ms())
        users = await shell.store.scored_before(self.partition, at_ms - half_ms, shell.rescored_per_s)
        if users and at_ms > stream_time_ms:
            # With a backlog it follows stream time, as the timer does: nobody is judged ahead of his events.
            ends = await shell.probe.ends(self.partition)
            if ends.appended != owned.watermark or self._queue:
                at_ms = stream_time_ms
                users = await shell.store.scored_before(self.partition, at_ms - half_ms, shell.rescored_per_s)
        if not users:
            return False
        profiles, before = await shell.store.load(self.partition, users, owned.cache)
        scores: dict[str, bytes | None] = {}
        known: list[Profile] = []
        expired: dict[str, list[Transition]] = {}
        due_until_ms = at_ms if at_ms == stream_time_ms else at_ms - GRACE_MS
        for user_id in users:
            profile = profiles.get(user_id)
            if profile is None or (at_ms > profile.forget_ms and not profile.memberships):
                scores[user_id] = None
            elif profile.definitions == shell.fold.segments.fingerprint:
                # What is due happens first, as far as the timer would let it.
                due_ms = profile.next_exit_ms
                if due_ms is not None and due_ms <= due_until_ms:
                    expired[user_id] = shell.fold.expire(profile, due_until_ms)
                    due_ms = profile.next_exit_ms
                if due_ms is None or due_ms > at_ms:
                    known.append(profile)
        transitions: list[Transition] = []
        changed: dict[str, Profile] = {}
        for profile, scored in zip(known, learner.score(known, at_ms), strict=True):
            scores[profile.user_id] = pack_scores(scored)
            found = learner.discover(profile, scored, at_ms)
            found = expired.get(profile.user_id, []) + found
            if found or profile.memberships != before[profile.user_id]:
                changed[profile.user_id] = profile
                transitions += found
        if not scores:
            return False
        step = self._step(changed, before)
        step.scores, step.scored_ms = scores, at_ms
        replayed = owned.watermark < owned.replayed_below
        await self._commit(owned, step, self._messages(transitions, replayed))
        self._count(transitions)
        return True

    def _tell_first(self, offset: int, invalid: InvalidEvent) -> None:
        """Log the first bad record of each reason; all of them are in the dead-letter topic."""
        if invalid.reason not in self._told:
            self._told.add(invalid.reason)
            logger.warning(
                "partition %d, offset %d: set aside, %s of %s: %s (more of this reason are only counted)",
                self.partition, offset, invalid.reason, invalid.field or "the record", invalid.detail,
            )  # fmt: skip

    def _count(self, transitions: Sequence[Transition]) -> None:
        metrics = self._shell.metrics
        for (status, cause), count in Counter((one.status, one.cause) for one in transitions).items():
            metrics.transitions.labels(status, cause).inc(count)
        for transition in transitions:
            if transition.segment_type == "discovery":
                outcome: str = transition.status
                if outcome == "exited":
                    outcome = "converted" if transition.converted else "left"
                metrics.discoveries.labels(transition.segment_id, outcome).inc()

    def _check_timestamps(self, part: Slice) -> None:
        """Refuse producers' times under the wall clock unless trusted, whatever the topic says of itself."""
        shell = self._shell
        if shell.clock == "event" or shell.check_producer_time:
            return
        for raw in part.records:
            if raw.timestamp_type != LOG_APPEND_TIME:
                raise StartRefused(
                    "LogAppendTime, since stream time must not follow producers' clocks",
                    "a producer's (CreateTime)",
                    f"topic {shell.topic}, partition {self.partition}, offset {raw.offset}",
                    "Set worker.trust_create_time if all producers' clocks can be trusted, as with the "
                    "embedded broker, which keeps producers' times whatever the topic says.",
                )

    def _due_by_stream_time(self, owned: _Owned) -> bool:
        return (
            owned.next_due_ms is not None
            and owned.stream_time_ms is not None
            and owned.next_due_ms <= owned.stream_time_ms
        )

    async def _fire_all(self, owned: _Owned) -> None:
        """Let all exits happen that are due by stream time, a bounded number of users a commit.

        They belong to the log below the watermark. Kafka hears of a watermark only when they are published,
        so up to `replayed_below` they were, once; up to what it knew at the claim, too, where an older
        snapshot may stand without them.
        """
        replayed = owned.watermark <= max(owned.replayed_below, owned.processed_below)
        while owned.stream_time_ms is not None and self._due_by_stream_time(owned):
            await self._fire(owned, owned.stream_time_ms, replayed=replayed)

    async def _fire(self, owned: _Owned, until_ms: int, *, replayed: bool) -> None:
        """Let the exits due at or before `until_ms` happen, of a bounded number of users."""
        users = await self._shell.store.due(self.partition, until_ms, USERS_PER_STEP)
        if await self._evaluate(owned, users, until_ms, replayed=replayed):
            return
        # Either Redis was emptied a moment ago, which the owner check raises, or the index lies.
        await self._trim(owned)
        if owned.next_due_ms is not None and owned.next_due_ms <= until_ms:
            raise StartRefused(
                "profiles that leave a segment when the due index says so",
                f"none among {len(users)} users",
                f"partition {self.partition}, key sa:{{{self.partition}}}:due",
                "Find out what else writes to these keys, then run `stream-app rebuild`.",
            )

    async def _answer(self, owned: _Owned, request: _Request) -> None:
        answered = False
        try:
            await self._redefine(owned, request)
            answered = True
        finally:
            if not request.done.done():
                request.done.set_result(answered)

    async def _redefine(self, owned: _Owned, request: _Request) -> None:
        if request.users:
            # Without a valid record so far there is no profile either.
            replayed = owned.watermark < owned.replayed_below
            await self._evaluate(owned, request.users, owned.stream_time_ms or 0, replayed=replayed)
        elif owned.old:
            await self._commit(owned, Commit(definitions=self._shell.fold.segments.fingerprint), [])
            owned.old = {}

    async def _evaluate(self, owned: _Owned, users: Iterable[str], at_ms: int, *, replayed: bool) -> bool:
        """Commit what the instant `at_ms` changes for some users without an event; tell if it did."""
        shell = self._shell
        changed: dict[str, Profile] = {}
        before: dict[str, Memberships] = {}
        stored: dict[str, Stored] = {}
        transitions: list[Transition] = []
        for user_id, blob in (await shell.store.read(self.partition, users, owned.cache)).items():
            if shell.patcher is not None:
                one = Stored(user_id, blob)
                outcome = shell.patcher.expire(one, at_ms, transitions)
                if outcome == CHANGED:
                    stored[user_id] = one
                if outcome != LEFT:
                    continue
            profile = shell.store.unpack(self.partition, user_id, blob)
            memberships = dict(profile.memberships)
            if profile.definitions != shell.fold.segments.fingerprint:
                self._check_definitions(owned, profile)
                stream_time_ms = at_ms if owned.stream_time_ms is None else owned.stream_time_ms
                transitions += shell.fold.redefine(profile, stream_time_ms, owned.old[profile.definitions])
            elif profile.next_exit_ms is None or profile.next_exit_ms > at_ms:
                continue
            transitions += shell.fold.expire(profile, at_ms)
            changed[user_id] = profile
            before[user_id] = memberships
        if not changed and not stored:
            return False
        await self._commit(owned, self._step(changed, before, stored), self._messages(transitions, replayed))
        self._count(transitions)
        self._held_since_s = None
        return True

    def _check_definitions(self, owned: _Owned, profile: Profile) -> None:
        known = profile.definitions == self._shell.fold.segments.fingerprint
        if not known and profile.definitions not in owned.old:
            raise StartRefused(
                "every profile to be under definitions that Redis still holds",
                f"one under {profile.definitions!r}",
                f"partition {self.partition}, keys sa:{{{self.partition}}}:profile:*",
                "Run `stream-app rebuild`; the log is folded again.",
            )

    async def _wait(self, owned: _Owned) -> None:
        """Wait for a slice, a request, or the next instant at which the wall clock may fire an exit."""
        self._wake.clear()
        if self._queue or self._requests or self._draining:
            return
        now_s = self._shell.monotonic_s()
        wait_s = owned.looked_s + MOST_IDLE_S - now_s
        if wait_s <= 0:
            # Also while exits are due and the log is ahead: the slice that they wait for may be lost.
            await self._look_around(owned)
            owned.looked_s = self._shell.monotonic_s()
            return
        if not owned.outbox_is_empty:
            wait_s = min(wait_s, owned.trim_s - now_s)
        due_ms = owned.next_due_ms if self._shell.clock == "wall" else None
        due_s = None if due_ms is None else (due_ms + GRACE_MS - self._shell.now_ms()) / 1000.0
        if due_ms is None or due_s is None or due_s > 0:
            await self._sleep(wait_s if due_s is None else min(wait_s, due_s))
            return
        # The log is asked after the instant: what is appended from now on carries a later Kafka timestamp.
        ends = await self._shell.probe.ends(self.partition)
        if ends.appended == owned.watermark and not self._queue:
            until_ms = ends.asked_ms - GRACE_MS
            self._shell.metrics.exit_lateness_s.observe(max(0.0, (until_ms - due_ms) / 1000.0))
            await self._fire(owned, until_ms, replayed=owned.watermark < owned.replayed_below)
        else:
            await self._sleep(ASK_AGAIN_S)

    async def _look_around(self, owned: _Owned) -> None:
        """Notice, when nothing has come for a while, what nobody tells.

        A Redis that was emptied fails the owner check of a trim that has nothing to drop; a Kafka that is
        gone does not answer. A slice that was lost on the way here, with none behind it, shows as a position
        past the watermark.
        """
        await self._trim(owned)
        await self._check_generation()
        position = await self._shell.log.position(self.partition)
        if position is not None and position != owned.watermark and not self._queue:
            await self._check_range(owned)
            await self._shell.log.rewind(self.partition, owned.watermark)

    # Making a step durable and known.

    def _step(
        self,
        profiles: Mapping[str, Profile],
        before: Mapping[str, Memberships],
        stored: Mapping[str, Stored] = MappingProxyType({}),
    ) -> Commit:
        shell = self._shell
        expires_at_ms: dict[str, int] = {}
        if shell.clock == "wall" and shell.retention_ms is not None:
            margin_ms = shell.retention_ms + RETENTION_MARGIN_MS
            forgotten_ms = {
                user_id: profile.forget_ms for user_id, profile in profiles.items() if not profile.memberships
            }
            forgotten_ms.update(
                (user_id, one.forget_ms)
                for user_id, one in stored.items()
                if one.is_changed and not one.is_in
            )
            expires_at_ms = {
                user_id: forget_ms + margin_ms
                for user_id, forget_ms in forgotten_ms.items()
                # Redis breaks a script off, half done, at an instant that is no integer of its own.
                if forget_ms + margin_ms < NEVER_MS
            }
        return Commit(profiles=profiles, before=before, stored=stored, expires_at_ms=expires_at_ms)

    def _messages(self, transitions: Iterable[Transition], replayed: bool) -> list[Outgoing]:
        messages = []
        for transition in transitions:
            messages.append(
                transition_message(
                    transition, topic=self._shell.topic, partition=self.partition, replayed=replayed
                )
            )
        return messages

    async def _commit(self, owned: _Owned, step: Commit, outgoing: Sequence[Outgoing]) -> None:
        """Commit, then publish.

        1. One Lua call makes profiles, indexes, outbox and watermark durable.
        2. The outbox is published and awaited. If that fails, the next claim does it.
        3. The outbox is dropped with the next commit, or as soon as there is nothing else to do.
        """
        step.outbox = [message.pack() for message in outgoing]
        number = owned.commit + 1
        owned.next_due_ms = await self._shell.store.commit(
            self.partition, owned.epoch, number, step, owned.cache
        )
        owned.commit = number
        if step.watermark is not None:
            owned.watermark = step.watermark
        if step.stream_time_ms is not None:
            owned.stream_time_ms = step.stream_time_ms
        owned.outbox_is_empty = not outgoing
        owned.trim_s = self._shell.monotonic_s() + TRIM_AFTER_S
        self.moved_s = self._shell.monotonic_s()
        if outgoing:
            await self._publish(outgoing)

    async def _publish(self, messages: Sequence[Outgoing]) -> None:
        self._publishing_since_s = self._shell.monotonic_s()
        try:
            await self._shell.publisher.publish(messages)
        finally:
            self._publishing_since_s = None
        self.moved_s = self._shell.monotonic_s()

    async def _trim(self, owned: _Owned) -> None:
        owned.next_due_ms = await self._shell.store.trim(self.partition, owned.epoch, owned.commit)
        owned.outbox_is_empty = True

    def _report_processed(self, owned: _Owned) -> None:
        # Called when nothing is due by stream time. Below `replayed_below` Kafka's committed offset says how
        # far the log was once processed: a crash in the middle of a replay must find it there.
        self._memory.processed_below = max(self._memory.processed_below, owned.watermark)
        if owned.watermark >= owned.replayed_below:
            self._shell.log.processed(self.partition, owned.watermark)

    async def _request(self, users: Sequence[str]) -> bool:
        if self._owned is None:
            return False
        request = _Request(users, asyncio.get_running_loop().create_future())
        self._requests.append(request)
        self._wake.set()
        return await request.done

    async def _sleep(self, seconds: float) -> bool:
        """Sleep, but not past `drain` or new work; tell whether that came."""
        try:
            await asyncio.wait_for(self._wake.wait(), seconds)
        except TimeoutError:
            return False
        return True


def _size(records: Iterable[Any]) -> int:
    return sum([len(record.value or b"") + len(record.key or b"") for record in records])


def _split_at(part: Slice, *offsets: int) -> list[Slice]:
    """Cut a slice where offsets lie inside it: each piece is replayed or new, learned or not, as a whole."""
    cuts = sorted({offset for offset in offsets if part.from_offset < offset < part.next_offset})
    pieces = []
    for begin, end in zip([part.from_offset, *cuts], [*cuts, part.next_offset], strict=True):
        records: tuple[Any, ...] = (
            tuple(r for r in part.records if begin <= r.offset < end) if cuts else part.records
        )
        pieces.append(Slice(part.partition, begin, end, records))
    return pieces
