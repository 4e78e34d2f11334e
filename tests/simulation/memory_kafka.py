"""A Kafka without a broker: the log, one consumer group, and what the output topics received.

Everything is told at once and truthfully; what gets lost on the way there is the business of `faults`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stream_app.adapters.codec import Outgoing

LOG_APPEND_TIME = 1
SESSION_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class LogRecord:
    """A record as a Kafka client hands it out."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    timestamp_type: int = LOG_APPEND_TIME


@dataclass(slots=True)
class PartitionLog:
    """One partition: its records, and the offsets between which they are to be had."""

    records: list[LogRecord] = field(default_factory=list)
    start: int = 0
    end: int = 0

    def read(self, position: int, limit: int) -> tuple[int, list[LogRecord]]:
        """Return up to `limit` records from `position` on, and the position behind them.

        Aborted records and markers have offsets and are not handed out.
        """
        ahead = [record for record in self.records if record.offset >= max(position, self.start)]
        found = ahead[:limit]
        return (self.end if len(ahead) <= limit else found[-1].offset + 1), found


@dataclass(slots=True)
class Group:
    """The consumer group as its coordinator knows it."""

    rng: random.Random
    partitions: int
    generation: int = 0
    heard_s: dict[str, float] = field(default_factory=dict)
    assigned: dict[int, str] = field(default_factory=dict)
    committed: dict[int, int] = field(default_factory=dict)

    def heartbeat(self, member: str, now_s: float) -> None:
        if member in self.heard_s:
            self.heard_s[member] = now_s

    def join(self, member: str, now_s: float) -> None:
        self.heard_s[member] = now_s
        self.rebalance()

    def leave(self, member: str) -> None:
        if self.heard_s.pop(member, None) is not None:
            self.rebalance()

    def expire(self, now_s: float) -> int:
        """Put out members that were not heard for the session timeout; tell how many."""
        silent = [m for m, heard_s in self.heard_s.items() if now_s - heard_s > SESSION_TIMEOUT_S]
        for member in silent:
            self.leave(member)
        return len(silent)

    def rebalance(self) -> None:
        """Deal the partitions out anew; whoever has one is not asked, and hears of it later."""
        self.generation += 1
        members = sorted(self.heard_s)
        self.rng.shuffle(members)
        self.assigned = {p: members[p % len(members)] for p in range(self.partitions)} if members else {}

    def is_current(self, member: str, generation: int) -> bool:
        return member in self.heard_s and generation == self.generation

    def partitions_of(self, member: str) -> frozenset[int]:
        return frozenset(p for p, owner in self.assigned.items() if owner == member)

    def commit(self, member: str, generation: int, offsets: dict[int, int]) -> bool:
        if not self.is_current(member, generation):
            return False
        self.committed |= offsets
        return True


@dataclass(frozen=True, slots=True)
class Said:
    """A message as a consumer of the output topics reads it back."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]


class MemoryKafka:
    """The broker.

    Parameters
    ----------
    now_ms
        Its clock: the Kafka timestamp of a record is the moment of its append.
    """

    def __init__(
        self, topic: str, partitions: int, rng: random.Random, now_ms: Callable[[], int], first_offset: int
    ) -> None:
        self.topic = topic
        self._now_ms = now_ms
        self.logs = [PartitionLog(start=first_offset, end=first_offset) for _ in range(partitions)]
        self.group = Group(rng, partitions)
        self.said: dict[Literal["entered", "exited", "dead_letter"], list[Said]] = {
            "entered": [],
            "exited": [],
            "dead_letter": [],
        }

    def append(self, partition: int, key: bytes | None, value: bytes | None) -> LogRecord:
        log = self.logs[partition]
        record = LogRecord(self.topic, partition, log.end, self._now_ms(), key, value)
        log.records.append(record)
        log.end += 1
        return record

    def abort(self, partition: int, offsets: int) -> None:
        """Use offsets up without a record that anybody may read."""
        self.logs[partition].end += offsets

    def take(self, messages: Sequence[Outgoing]) -> None:
        for message in messages:
            topic = self.said[message.kind]
            topic.append(
                Said(message.kind, 0, len(topic), message.key, message.value, message.headers),
            )
