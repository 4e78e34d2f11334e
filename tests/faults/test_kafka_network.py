"""A network that fails between the worker and Kafka, while messages are on their way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import pytest

from tests.backends import Kind
from tests.e2e.proof import prove
from tests.faults.conftest import Proxied
from tests.faults.faulty import Switch
from tests.faults.proxy import Proxy
from tests.faults.rows import Row, seed
from tests.faults.stage import FaultStage, fault_log
from tests.integration.stage import claims, session_timeout_s
from tests.processes import Program

pytestmark = pytest.mark.faults

#: Enough that a worker is still at it when something happens for the tenth time.
EVENTS: Final = 9_000
DONE_WITHIN_S: Final = 120.0
KILLED: Final = -9
#: Where every step takes a second.
SLOW_EVENTS: Final = 5_000
SLOW_S: Final = 0.5
#: What tells a request with messages of the worker's from all others.
IN_MESSAGES: Final = b"ce_id"
#: A message is then lost when its request is, and nothing but the outbox brings it back.
NOTHING_SENT_AGAIN: Final[Sequence[Switch]] = ("outbox", "retries")


class Tried:
    """Runs of a worker behind a proxy: each on topics of its own, with the same log."""

    def __init__(self, row: Row, proxy: Proxy, build: Callable[[], FaultStage]) -> None:
        self.row, self.proxy, self._build = row, proxy, build
        self.stage = build()

    def run(self, fault: Callable[[Program], None], events: int = EVENTS) -> None:
        """Let the fault happen to the service as it is: nothing may be lost."""
        self.stage.fill(events)
        worker = self.stage.start("worker")
        fault(worker)
        ends = self.stage.log_ends()
        worker.wait_until(lambda: self.stage.is_done(ends), DONE_WITHIN_S, "done")
        worker.terminate()
        assert worker.wait(DONE_WITHIN_S) == 0, worker.log
        self.row.judge(prove(self.stage.case))

    def anew(self) -> None:
        """Forget the run before: the next has topics of its own."""
        self.stage.flush()
        self.stage = self._build()

    def control(
        self, without: Sequence[Switch], fault: Callable[[Program], None], events: int = EVENTS
    ) -> None:
        """Let it happen again to a service without some protections: that must be seen."""
        self.anew()
        self.stage.fill(events)
        worker = self.stage.start_faulty("worker", without=without)
        fault(worker)
        ends, deadline_s = self.stage.log_ends(), time.monotonic() + DONE_WITHIN_S
        while worker.is_running and not self.stage.is_done(ends) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        worker.stop()
        self.row.control(f"{' and '.join(without)} off", prove(self.stage.case))


@pytest.fixture
def tried(
    proxied_kafka: Proxied, fresh_redis: str, stage_on: Callable[..., FaultStage]
) -> Callable[[Row], Tried]:
    def begin(row: Row) -> Tried:
        proxy = proxied_kafka.proxy
        return Tried(row, proxy, lambda: stage_on(proxy.address, fresh_redis, worker__hold_deadline_s=120))

    return begin


def at_publications(
    proxy: Proxy,
    worker: Program,
    times: int,
    fault: Callable[[], None],
    after_s: float = 0.0,
    feed: Callable[[int], object] = lambda n: None,
) -> None:
    """Let something happen to a request with messages in it, so many times, with a pause after each.

    What the n-th is to be about can be fed when it is awaited: a quick worker is soon done with the rest.
    """
    happened = 0

    def happen() -> None:
        nonlocal happened
        happened += 1
        fault()

    for n in range(1, times + 1):
        proxy.at_request(IN_MESSAGES, happen)
        feed(n)
        worker.wait_until(lambda n=n: happened == n, 60, f"hit {n} times")  # type: ignore[misc]
        time.sleep(after_s)


def batched_log(portions: int) -> Iterator[list[tuple[bytes, bytes]]]:
    """Cut the log of a run into so many portions."""
    records = list(fault_log(seed(), EVENTS))
    size = -(-len(records) // portions)
    return (records[at : at + size] for at in range(0, len(records), size))


def test_connections_to_kafka_reset_every_second(
    tried: Callable[[Row], Tried], fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row("all connections to Kafka reset, once a second, 6 times", "nothing lost, order kept")
    trial = tried(row)

    def reset(worker: Program) -> None:
        portions = list(batched_log(6))
        at_publications(
            trial.proxy,
            worker,
            6,
            trial.proxy.reset,
            after_s=1.0,
            feed=lambda n: trial.stage.append(portions[n - 1]),
        )

    trial.run(reset, events=0)
    trial.control(NOTHING_SENT_AGAIN, reset, events=0)


def test_kafka_in_a_blackhole_for_longer_than_the_session_timeout(
    kafka_kind: Kind, tried: Callable[[Row], Tried], fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(
        "Kafka silent for two session timeouts, then all connections gone",
        "nothing lost, order kept; the worker joins the group anew by itself",
    )
    trial = tried(row)
    silent_s = 2 * session_timeout_s()

    def silence(worker: Program) -> None:
        at_publications(trial.proxy, worker, 1, trial.proxy.blackhole, after_s=silent_s)
        trial.proxy.reset()
        trial.proxy.heal()
        over_s = time.monotonic()
        if kafka_kind == "apache":
            worker.wait_until(lambda: min(claims(worker).values()) == 2, 60, "given up by the group and back")
            row.note(f"back in the group after {time.monotonic() - over_s:.0f} s")

    if kafka_kind != "apache":
        row.note("the embedded broker gives a silent member up only when another one speaks")
    trial.run(silence)
    trial.control(NOTHING_SENT_AGAIN, silence)


def test_connections_to_kafka_half_open(
    tried: Callable[[Row], Tried], fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row("all connections to Kafka half open", "nothing lost, order kept; noticed by itself")
    trial = tried(row)

    def half_open(worker: Program) -> None:
        at_publications(trial.proxy, worker, 1, trial.proxy.half_open)

    began_s = time.monotonic()
    trial.run(half_open)
    row.note(f"done {time.monotonic() - began_s:.0f} s after it began")
    trial.control(NOTHING_SENT_AGAIN, half_open)


def test_replies_to_publications_are_lost(
    kafka_kind: Kind, tried: Callable[[Row], Tried], fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(
        "the reply to a publication lost, 10 times",
        "nothing lost; what comes again has its id; on Apache Kafka nothing does",
    )
    trial = tried(row)

    def lose_replies(worker: Program) -> None:
        before = trial.proxy.lost_replies
        for n in range(1, 11):
            trial.proxy.lose_reply(IN_MESSAGES)
            worker.wait_until(lambda n=n: trial.proxy.lost_replies == before + n, 60, f"lost {n} replies")  # type: ignore[misc]

    trial.run(lose_replies)
    assert (row.repeats > 0) == (kafka_kind != "apache"), row.repeats
    trial.control(["retries", "ids"], lose_replies)


def test_a_worker_killed_while_kafka_is_slow(
    tried: Callable[[Row], Tried], fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row("500 ms to Kafka and 500 ms back, the worker killed in it", "nothing lost, order kept")
    trial = tried(row)

    def from_the_first_message_on() -> None:
        # Not before: a worker asks Kafka two dozen questions until it is at work.
        trial.proxy.heal()
        trial.proxy.at_request(IN_MESSAGES, lambda: trial.proxy.latency(SLOW_S))

    def slow(without: Sequence[Switch]) -> None:
        trial.stage.fill(SLOW_EVENTS)
        from_the_first_message_on()
        worker = trial.stage.start_faulty("worker", kill=("after commit", 4), without=without)
        assert worker.wait(DONE_WITHIN_S) == KILLED, worker.log
        from_the_first_message_on()
        worker = trial.stage.start_faulty("worker", "--until-end", without=without)
        assert worker.wait(DONE_WITHIN_S) == 0, worker.log
        trial.proxy.heal()

    slow([])
    row.judge(prove(trial.stage.case))
    trial.anew()
    slow(["outbox"])
    row.control("outbox off", prove(trial.stage.case))
