"""Say what is wrong with what a run left behind, by the naive oracle and by what `replayed` promises."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stream_app.adapters.codec import Outgoing
from stream_app.core.decay import Weights
from tests.backends import Names
from tests.e2e.proof import Proof, compare_dead_letters, compare_state, compare_transitions
from tests.oracle import Clock, OracleProfile, OracleTransition, judge, records_by_partition, unix_ms
from tests.simulation.memory_kafka import MemoryKafka
from tests.simulation.memory_redis import MemoryRedis

NAMES = Names("events", "entered", "exited", "dead_letter", "stream-app")


def prove(
    kafka: MemoryKafka,
    redis: MemoryRedis,
    segments: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Any],
    core_weights: Weights,
    clock: Clock,
    until_ms: int | None,
) -> Proof:
    """Compare all that was said and is kept with the oracle's judgement of the log."""
    log = [record for partition in kafka.logs for record in partition.records]
    partitions = records_by_partition(log)
    proof = Proof(events=len(log))
    valid = {(p, record.offset) for p, records in partitions.items() for record in records}
    bad = {(record.partition, record.offset) for record in log} - valid
    compare_dead_letters(proof, bad, kafka.said["dead_letter"])
    expected: list[OracleTransition] = []
    profiles: dict[int, dict[str, OracleProfile]] = {}
    stream_times: dict[int, int] = {}
    for partition, records in partitions.items():
        verdict = judge(records, segments, weights, clock, until_ms)
        assert verdict.stream_time_ms is not None
        expected += verdict.transitions
        profiles[partition] = verdict.profiles
        stream_times[partition] = verdict.stream_time_ms
    compare_transitions(proof, NAMES, expected, [*kafka.said["entered"], *kafka.said["exited"]])
    at_ms = {p: max(s, until_ms or s) for p, s in stream_times.items()}
    compare_state(proof, redis, core_weights, profiles, stream_times, at_ms)
    return proof


class Witness:
    """Sees every commit and every message, and holds them to what `replayed` promises.

    When Redis loses state, everything that was said and lies below what Kafka knows to be processed is owed
    the mark: whoever says it again must say so. (What lies above may have been said without Kafka's knowing.)
    Except him whom the loss has passed by: a zombie that meets a snapshot of the time when it was the owner,
    and goes on until the owner's next claim, asks nobody how far the log was processed.

    Parameters
    ----------
    kafka, redis, clock
        Of the run.
    partition_of
        Tells a user's partition.
    """

    def __init__(
        self, kafka: MemoryKafka, redis: MemoryRedis, clock: Clock, partition_of: Callable[[str], int]
    ) -> None:
        self._kafka = kafka
        self._redis = redis
        self._clock = clock
        self._partition_of = partition_of
        #: Ids owed the mark, and those already said, both by partition.
        self._owed: dict[int, set[str]] = {}
        #: Next offset after what was in each partition before the first worker.
        self.history_below: dict[int, int] = {}
        self._lost_below: dict[int, int] = {}
        self._losses = 0
        self._claimed_after: dict[tuple[str, int], int] = {}
        self._said: dict[str, dict[str, Any]] = {}
        #: What a worker has committed and is about to publish.
        self._in_hand: dict[tuple[str, int], set[str]] = {}
        self.problems: list[str] = []
        #: Messages that were owed the mark and had it; commits by whom a loss has passed by.
        self.marked = 0
        self.unaware = 0

    def state_is_lost(self) -> None:
        """Redis is emptied or restored now."""
        self._lost_below = dict(self._kafka.group.committed)
        self._losses += 1
        partitions = records_by_partition(
            record for partition in self._kafka.logs for record in partition.records
        )
        for message in self._said.values():
            partition = self._partition_of(message["user_id"])
            below = self._kafka.group.committed.get(partition, 0)
            if message["event"] is not None:
                owed = message["event"]["offset"] < below
            else:
                instants = [
                    r.kafka_time_ms if self._clock == "wall" else r.event_time_ms
                    for r in partitions.get(partition, ())
                    if r.offset < below
                ]
                owed = unix_ms(message["time"]) <= max(instants, default=-1)
            if owed:
                self._owed.setdefault(partition, set()).add(message["id"])

    def script_ran(self, worker: str, name: str, keys: Sequence[str], args: Sequence[Any]) -> None:
        """A claim, commit or trim was accepted."""
        partition = int(keys[0].removeprefix("sa:{").partition("}")[0])
        self._in_hand.pop((worker, partition), None)
        if name == "claim":
            self._claimed_after[(worker, partition)] = self._losses
        if name != "commit" or args[3] != "commit":
            return
        said = [
            message
            for _, fields in self._redis.xrange(keys[2])
            for packed in fields.values()
            if (message := _transition(Outgoing.unpack(packed))) is not None
        ]
        self._in_hand[(worker, partition)] = {message["id"] for message in said}
        if self._knows(worker, partition):
            self._check(f"{worker} commits", partition, said)
        else:
            self.unaware += 1

    def published(self, worker: str, messages: Sequence[Outgoing]) -> None:
        """A worker hands messages to Kafka."""
        for outgoing in messages:
            message = _transition(outgoing)
            if message is None:
                continue
            partition = self._partition_of(message["user_id"])
            # At what Kafka knows nothing is folded again: a message that comes twice is an ordinary repeat.
            watermark = int(self._redis.hget(f"sa:{{{partition}}}:wm", "watermark") or 0)
            folds_again = watermark < self._lost_below.get(partition, 0)
            if not self._knows(worker, partition):
                self.unaware += 1
            elif folds_again and message["id"] not in self._in_hand.get((worker, partition), ()):
                self._check(f"{worker} publishes from the outbox", partition, [message])

    def received(self, messages: Sequence[Outgoing]) -> None:
        """Kafka has taken messages."""
        for outgoing in messages:
            message = _transition(outgoing)
            if message is not None:
                self._check_history(message)
                first = self._said.setdefault(message["id"], message)
                if first is message and self._clock == "event" and message["replayed"]:
                    self.problems.append(f"said for the first time and called replayed: {message}")

    def _check_history(self, message: Mapping[str, Any]) -> None:
        event = message["event"]
        below = self.history_below.get(self._partition_of(message["user_id"]), 0)
        if event is not None and event["offset"] < below and not message["replayed"]:
            self.problems.append(f"was there before the service, not called replayed: {message}")

    def _knows(self, worker: str, partition: int) -> bool:
        """Tell whether a worker has claimed the partition since Redis last lost state."""
        return self._claimed_after[(worker, partition)] == self._losses

    def _check(self, who: str, partition: int, messages: Sequence[Mapping[str, Any]]) -> None:
        for message in messages:
            if message["id"] in self._owed.get(partition, ()):
                self.marked += message["replayed"]
                if not message["replayed"]:
                    self.problems.append(
                        f"{who} what was said before Redis lost it, not called replayed: {message}"
                    )


def _transition(outgoing: Outgoing) -> dict[str, Any] | None:
    if outgoing.kind == "dead_letter" or outgoing.value is None:
        return None
    message: dict[str, Any] = json.loads(outgoing.value)
    return message
