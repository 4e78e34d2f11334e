"""What can go wrong with this service, as opposed to with a record.

Every class here means STOP (or HOLD, then stop): ours or the infrastructure's fault, nothing is acknowledged,
and the process exits non-zero with the message. A bad record is not an error: it is the value
`stream_app.adapters.codec.InvalidEvent` and is set aside. Which of the two verbs applies is decided in
`stream_app.app` alone; this module knows neither Kafka nor Redis nor exit codes.

Every message says what was expected, what was got and where, and ends with "Operator action: ...", so that
the person who reads it at night need not read the source.
"""
# The names are the team's vocabulary (`Fenced`, not `FencedError`): they are read in sentences.
# ruff: noqa: N818

from __future__ import annotations

from collections.abc import Sequence


class StreamAppError(Exception):
    """Base of all errors that stop the service.

    Parameters
    ----------
    expected
        What had to be so, as a noun phrase ("a watermark within the log").
    got
        What was found instead, with both numbers where there are two.
    where
        The place: file and key, partition, key in Redis, address without credentials.
    operator_action
        What to do now, as a full sentence.

    Examples
    --------
    >>> print(StreamAppError("4 partitions", "6", "topic events", "Run `stream-app rebuild`."))
    topic events: expected 4 partitions, got 6. Operator action: Run `stream-app rebuild`.
    """

    def __init__(self, expected: str, got: str, where: str, operator_action: str) -> None:
        super().__init__(f"{where}: expected {expected}, got {got}. Operator action: {operator_action}")
        self.operator_action = operator_action


class ConfigError(StreamAppError):
    """The configuration cannot be used; all problems of all its sources are reported together.

    Parameters
    ----------
    problems
        One sentence each, "where: expected ..., got ...", without secrets; at least one.

    Examples
    --------
    >>> print(ConfigError(["config/app.toml: [worker] clock: expected 'wall' or 'event', got 'sun'"]))
    The configuration has 1 problem:
      config/app.toml: [worker] clock: expected 'wall' or 'event', got 'sun'
    Operator action: Correct what is listed and start again; nothing was started.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        action = "Correct what is listed and start again; nothing was started."
        super().__init__("no problems", str(len(problems)), "configuration", action)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"The configuration has {count} problem{'' if count == 1 else 's'}:"
        lines = [head, *(f"  {problem}" for problem in self.problems)]
        return "\n".join([*lines, f"Operator action: {self.operator_action}"])


class StartRefused(StreamAppError):
    """The surroundings (broker, Redis, stored state, installed packages) contradict the configuration."""


class ModelStateError(StreamAppError):
    """What the model has learned cannot be read, or was learned by another kind of model.

    Parameters
    ----------
    got
        What is wrong with it.
    where
        The partition and key.

    Examples
    --------
    >>> print(ModelStateError("none", "partition 3, key sa:{3}:model"))  # doctest: +ELLIPSIS
    partition 3, key sa:{3}:model: expected a checkpoint that this version can read, got none. Operator ...
    """

    def __init__(self, got: str, where: str) -> None:
        super().__init__(
            "a checkpoint that this version can read",
            got,
            where,
            "Restore it, start the version that wrote it, or run `stream-app rebuild --model` to learn "
            "afresh from now on; profiles and base segments are not touched.",
        )


class StateLost(StreamAppError):
    """Redis no longer holds the claim that this worker made for a partition.

    Met by claiming again and folding the log from the watermark that Redis holds; it reaches the operator
    only when that fails too.
    """

    def __init__(self, partition: int) -> None:
        super().__init__(
            "the claim that this worker wrote",
            "none, or one of a lower epoch",
            f"partition {partition}, key sa:{{{partition}}}:wm",
            "Check whether Redis was flushed or restored from a snapshot; the worker claims again and folds "
            "the log from the watermark that Redis holds.",
        )
        self.partition = partition


class Fenced(StreamAppError):
    """Another worker owns the partition: this one's work on it is dropped, nothing of it is published."""

    def __init__(self, partition: int, owner: str) -> None:
        super().__init__(
            "this worker to own the partition",
            f"owner {owner!r}",
            f"partition {partition}, key sa:{{{partition}}}:wm",
            "None after a rebalance. If it repeats without one, look for a second deployment that uses the "
            "same Redis.",
        )
        self.partition = partition
        self.owner = owner


class CommitMismatch(StreamAppError):
    """The stored commit number is not the one that this commit builds on; the state must be read again."""

    def __init__(self, partition: int, stored: int, expected: int) -> None:
        super().__init__(
            f"commit number {expected}",
            str(stored),
            f"partition {partition}, key sa:{{{partition}}}:wm",
            "None: a lost reply does this once and the worker reads the state again. If it repeats, look for "
            "something else that writes to the service's keys.",
        )
        self.partition = partition
        self.stored = stored
        self.expected = expected


class StoreUnavailable(StreamAppError):
    """Redis or Kafka did not do what was asked; the partition is held and tries again until its deadline.

    Parameters
    ----------
    where
        The service and what was asked of it, without credentials ("Redis, commit").
    got
        The failure in one line, without credentials.
    """

    def __init__(self, where: str, got: str) -> None:
        super().__init__(
            "an answer",
            got,
            where,
            "Bring the service back; nothing was acknowledged and the work goes on where it stood.",
        )


class HoldExpired(StreamAppError):
    """A partition was held for as long as the configuration allows; the worker stops without advancing.

    Parameters
    ----------
    partition
        The partition that could not go on.
    deadline_s
        `worker.hold_deadline_s`, seconds.
    last
        The last failure.
    """

    def __init__(self, partition: int, deadline_s: float, last: Exception) -> None:
        got = f"as the last of many: {_without_action(last)}"
        super().__init__(
            f"the partition to go on within {deadline_s:g} s (worker.hold_deadline_s)",
            got,
            f"partition {partition}",
            "Bring back what is named and start the worker again; nothing was acknowledged and it goes on "
            "where it stood.",
        )
        self.partition = partition
        self.deadline_s = deadline_s


def _without_action(failure: Exception) -> str:
    return str(failure).partition(" Operator action: ")[0].rstrip(".") or type(failure).__name__


class TooManyDeadLetters(StreamAppError):
    """The fuse `worker.max_dead_letter_share` has blown.

    Parameters
    ----------
    partition
        The partition on which it happened.
    dead_letters, records
        How many of how many latest records were set aside.
    max_share
        The configured share, above 0 and at most 1.
    """

    def __init__(self, partition: int, dead_letters: int, records: int, max_share: float) -> None:
        super().__init__(
            f"at most {max_share:g} of the latest {records} records to be dead letters",
            str(dead_letters),
            f"partition {partition}",
            "Read the dead-letter topic (header sa_reason), correct the producer, then start again; to go on "
            "regardless, raise or remove worker.max_dead_letter_share.",
        )
        self.partition = partition
        self.dead_letters = dead_letters
        self.records = records
        self.max_share = max_share
