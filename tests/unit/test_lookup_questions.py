"""What a look-up asks Redis, how often, and what it makes of the replies; nothing here does any I/O."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, TypeVar

import pytest

from stream_app.core.decay import Weights
from stream_app.core.partitioner import partition_of
from stream_app.core.profile import Profile, TypeSums, pack
from stream_app.errors import StartRefused, StoreUnavailable
from stream_app.lookup import questions
from stream_app.lookup.questions import Command, Known, Talk, answered, instant

T = TypeVar("T")

HOUR = Weights(half_life_s=3600.0).fingerprint().encode()
DAY = Weights(half_life_s=86_400.0).fingerprint().encode()
USER = Profile("u1", 0, {"view": TypeSums(4.0, {"tea": 4.0}, {})}, forget_ms=10**15)
PARTITIONS = 8
EXPECTED = partition_of(b"u1", PARTITIONS)
WHEN = instant(None, wall_ms=3_600_000)


class Store:
    """Redis as a dictionary that counts round trips, for as many commands as a look-up uses."""

    def __init__(
        self, *, weights: bytes = HOUR, partitions: int = PARTITIONS, clock: bytes = b"wall"
    ) -> None:
        self.round_trips = 0
        self.content: dict[str, Any] = {}
        self.settle(weights, partitions, clock)

    def settle(self, weights: bytes, partitions: int = PARTITIONS, clock: bytes = b"wall") -> None:
        """Begin anew under these settings, as after a rebuild."""
        settings = {b"weights": weights, b"partitions": b"%d" % partitions, b"clock": clock}
        self.content = {
            "sa:meta": {b"schema": b"1", b"topic": b"events", b"group": b"g", **settings},
            **{f"sa:{{{p}}}:wm": {**settings, b"stream_time_ms": b"7200000"} for p in range(partitions)},
        }

    def put(self, partition: int, profile: Profile = USER) -> None:
        self.content[f"sa:{{{partition}}}:profile:{profile.user_id}"] = pack(profile)

    def ask(self, known: Known | None, question: Callable[..., Talk[T]], *args: Any) -> tuple[Known, T]:
        talk = answered(known, question, *args)
        replies: Sequence[Any] | None = None
        while True:
            try:
                commands = talk.send(replies)  # type: ignore[arg-type]  # None starts it
            except StopIteration as done:
                known, answer = done.value
                return known, answer
            self.round_trips += 1
            replies = [self._reply(command) for command in commands]

    def _reply(self, command: Command) -> Any:
        key, *args = command.args
        stored = self.content.get(key)
        match command.name:
            case "hgetall":
                return stored or {}
            case "hmget":
                return [(stored or {}).get(field.encode()) for field in args[0]]
            case "get":
                return stored
            case "exists":
                return int(stored is not None)
            case "zscore":
                return (stored or {}).get(args[0])
            case name:
                raise AssertionError(name)


QUESTIONS_OF_A_USER: list[tuple[Callable[..., Talk[Any]], tuple[Any, ...]]] = [
    (questions.weights, ("u1", WHEN)),
    (questions.segments, ("u1", WHEN)),
    (questions.is_member, ("u1", "tea", WHEN)),
    (questions.next_categories, ("u1", WHEN)),
    (questions.recommendations, ("u1", WHEN)),
    (questions.user, ("u1", WHEN)),
]


@pytest.mark.parametrize(("question", "args"), QUESTIONS_OF_A_USER)
def test_a_question_is_one_round_trip_after_the_first(
    question: Callable[..., Talk[Any]], args: tuple[Any, ...]
) -> None:
    store = Store()
    store.put(EXPECTED)
    known, _ = store.ask(None, question, *args)
    assert store.round_trips == 2  # sa:meta is read once
    store.ask(known, question, *args)
    assert store.round_trips == 3


@pytest.mark.parametrize(("question", "args"), QUESTIONS_OF_A_USER)
def test_a_user_elsewhere_or_nowhere_takes_one_more(
    question: Callable[..., Talk[Any]], args: tuple[Any, ...]
) -> None:
    store = Store()
    known, nobody = store.ask(None, question, *args)
    assert nobody is None or nobody is False
    assert store.round_trips == 3
    store.put((EXPECTED + 3) % PARTITIONS)
    _, found = store.ask(known, question, *args)
    assert found is not None
    assert store.round_trips == 5


def test_one_partition_leaves_nowhere_else_to_look() -> None:
    store = Store(partitions=1)
    assert store.ask(None, questions.weights, "u1", WHEN)[1] is None
    assert store.round_trips == 2


def test_now_is_the_wall_clock_or_the_stream_time_or_what_was_said() -> None:
    for clock, now, left in [
        (b"wall", None, 0.5),
        (b"event", None, 0.25),
        (b"wall", 0, 1.0),
        (b"event", 3 * 3_600_000, 0.125),
    ]:
        store = Store(clock=clock)
        store.put(EXPECTED)
        _, found = store.ask(None, questions.weights, "u1", instant(now, wall_ms=3_600_000))
        assert found is not None
        assert found.labels == {"tea": 4.0 * left}


def test_a_client_that_outlives_a_rebuild_reads_the_new_settings() -> None:
    store = Store()
    store.put(EXPECTED)
    known, _ = store.ask(None, questions.weights, "u1", WHEN)
    store.settle(DAY, partitions=PARTITIONS)
    store.put(EXPECTED)
    known, found = store.ask(known, questions.weights, "u1", WHEN)
    assert found is not None
    assert found.labels["tea"] == pytest.approx(4.0 * 2 ** (-1 / 24))
    for partitions in (2 * PARTITIONS, 1):
        store.settle(DAY, partitions=partitions)
        store.put(partition_of(b"u1", partitions))
        known, found = store.ask(known, questions.weights, "u1", WHEN)
        assert found is not None
        assert known.meta.partitions == partitions


def test_a_redis_that_was_emptied_is_no_redis_full_of_unknown_users() -> None:
    store = Store()
    known, _ = store.ask(None, questions.weights, "u1", WHEN)
    store.content.clear()
    with pytest.raises(StartRefused, match="expected state of schema 1, got none"):
        store.ask(known, questions.weights, "u1", WHEN)


def test_settings_that_contradict_each_other_are_never_read_by() -> None:
    store = Store()
    store.put(EXPECTED)
    store.content[f"sa:{{{EXPECTED}}}:wm"][b"weights"] = DAY  # a claim whose sa:meta is not written yet
    with pytest.raises(
        StoreUnavailable, match=rf"settings in sa:\{{{EXPECTED}\}}:wm that are not those of sa:meta"
    ):
        store.ask(None, questions.weights, "u1", WHEN)


def test_a_partition_that_nobody_has_claimed_yet_does_not_matter() -> None:
    store = Store()
    del store.content[f"sa:{{{EXPECTED}}}:wm"]
    assert store.ask(None, questions.weights, "u1", WHEN)[1] is None


@pytest.mark.parametrize(
    "now",
    [
        1_767_323_045_678,
        datetime(2026, 1, 2, 3, 4, 5, 678_999, UTC),
        datetime(2026, 1, 2, 8, 34, 5, 678_000, timezone(timedelta(hours=5, minutes=30))),
    ],
)
def test_an_instant_is_milliseconds_or_a_datetime_of_any_zone(now: int | datetime) -> None:
    assert instant(now, 0).given_ms == 1_767_323_045_678


@pytest.mark.parametrize("now", [1_767_323_045.678, "1767323045678", True])
def test_seconds_as_a_float_are_no_instant(now: Any) -> None:
    with pytest.raises(TypeError, match="now: expected Unix milliseconds as int or a datetime, got"):
        instant(now, 0)


def test_a_datetime_without_a_zone_is_no_instant() -> None:
    with pytest.raises(ValueError, match="without a time zone"):
        instant(datetime(2026, 1, 2), 0)


def test_an_app_that_looks_up_imports_no_stream_processor_and_no_model() -> None:
    heavy = {"faust", "mode", "river", "numpy", "scipy", "pandas", "aiokafka", "pydantic", "aiohttp"}
    program = f"import stream_app.lookup, sys; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
