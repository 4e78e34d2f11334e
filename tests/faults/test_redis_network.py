"""The way to Redis is slow, cut or lost; what was on its way is done once, late, or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from stream_app.embedded import Server
from tests.e2e.proof import prove
from tests.faults import faulty
from tests.faults.breakable import TRIM, Store, Trial, is_commit
from tests.faults.proxy import Proxy, Request
from tests.faults.rows import Row
from tests.faults.stage import FaultStage
from tests.faults.unsafe import TOLD
from tests.integration.stage import probe, wait_until

pytestmark = pytest.mark.faults

LOAD = b"\r\nMGET\r\n"
LASTING_S = 10.0
LOST_REPLIES = 20


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as proxy:
        yield proxy


@pytest.fixture
def store(redis_server: Callable[..., Server], proxy: Proxy, tmp_path: Path) -> Store:
    return Store(redis_server, proxy, tmp_path)


@pytest.fixture
def trial(
    kafka_bootstrap: str, store: Store, stage_on: Callable[..., FaultStage], port: int
) -> Callable[..., Trial]:
    """Prepare a run on an empty Redis behind the proxy: ``trial(*without)``."""

    def prepare(*without: faulty.Switch) -> Trial:
        with store.client() as client:
            client.flushall()
        # Controls without a model, which has checks of its own.
        stage = stage_on(kafka_bootstrap, store.url, redis__url=store.proxied_url, model__enabled=not without)
        return Trial(stage, store, port, without)

    return prepare


class Trouble:
    """A fault of the way to Redis."""

    scenario: ClassVar[str]
    #: How long it lasts, and what the worker hears meanwhile; "" where it is over too soon to be asked about.
    lasts_s: ClassVar[float] = LASTING_S
    says: ClassVar[str] = "TimeoutError"

    def strike(self, proxy: Proxy, at: Any) -> None:
        """Let the request `at` be the first to meet it."""
        raise NotImplementedError


class Late(Trouble):
    scenario = "Redis 6 s away for 10 s, above the timeout of 5 s"

    def strike(self, proxy: Proxy, at: Any) -> None:
        proxy.latency(3.0)


class Blackhole(Trouble):
    scenario = "nothing comes through to Redis for 10 s (blackhole)"

    def strike(self, proxy: Proxy, at: Any) -> None:
        proxy.at_request(at, proxy.blackhole)


class Reset(Trouble):
    scenario = "connections to Redis reset with a commit on its way"
    lasts_s, says = 0.0, ""

    def strike(self, proxy: Proxy, at: Any) -> None:
        proxy.at_request(at, proxy.reset)


class HalfOpen(Trouble):
    scenario = "connections to Redis half open: Redis gone from them, nobody told"
    lasts_s, says = 0.0, ""

    def strike(self, proxy: Proxy, at: Any) -> None:
        proxy.at_request(at, proxy.half_open)


@pytest.mark.parametrize("kind", [Late, Blackhole, Reset, HalfOpen])
def test_the_worker_waits_for_a_redis_out_of_reach_and_goes_on(
    kind: type[Trouble],
    trial: Callable[..., Trial],
    proxy: Proxy,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(kind.scenario, "unready but alive meanwhile; goes on by itself; nothing lost or twice")
    trouble = kind()
    real = trial()
    real.begin()
    trouble.strike(proxy, is_commit())
    began_s = time.monotonic()
    real.feed(2 / 3)
    if kind.says:
        real.await_hold(kind.says)
    else:
        real.worker.wait_until(lambda: ": held, Redis" in real.worker.log, 30, "held")
    wait_until(lambda: time.monotonic() - began_s >= trouble.lasts_s, 60, "over")
    proxy.heal()
    real.await_ready()
    row.note(f"ready again {time.monotonic() - began_s:.0f} s after it began")
    real.end()
    row.judge(prove(real.stage.case))

    control = trial("errors", "mismatch")
    control.begin()
    # A load: what is not known of users is what makes a difference that no second look repairs.
    trouble.strike(proxy, LOAD)
    control.feed(2 / 3)
    control.worker.wait_until(lambda: TOLD in control.worker.log, 30, "taking an error lightly")
    proxy.heal()
    control.end()
    row.control("errors taken for success, mismatch check off", prove(control.stage.case))


def test_a_redis_two_seconds_away_makes_it_slow_and_nothing_else(
    trial: Callable[..., Trial], proxy: Proxy, fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row("Redis 2 s away", "slower, never unready; nothing lost or twice")
    run = trial()
    run.begin()
    folded, commits = run.stage.folded(), run.commits()
    proxy.latency(1.0)
    began_s = time.monotonic()
    run.feed(0.4)  # a step takes several round trips, and a portion several steps
    ends = sum(run.stage.log_ends().values())
    run.worker.wait_until(lambda: run.stage.folded() == ends, 120, "folded")
    took_s = time.monotonic() - began_s
    assert probe(run.port, "readyz") == (200, "ok\n")
    assert probe(run.port, "livez") == (200, "ok\n")
    row.note(
        f"{ends - folded} records in {run.commits() - commits} commits took {took_s:.0f} s; no control: "
        "nothing fails, checked is that no partition was held"
    )
    proxy.heal()
    run.end()
    assert ": held, " not in run.worker.log
    row.judge(prove(run.stage.case))


def test_a_commit_that_arrives_when_the_partition_has_gone_on_changes_nothing(
    trial: Callable[..., Trial], store: Store, proxy: Proxy, fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(
        "a commit held up in the network arrives after all else is done", "refused; nothing lost or twice"
    )

    def run(trial: Trial) -> None:
        trial.begin()
        proxy.at_request(is_commit(trial.without), proxy.stall)
        trial.feed(2 / 3)
        trial.worker.wait_until(lambda: ": held, Redis, commit" in trial.worker.log, 30, "held")
        trial.end()
        with store.client() as client:

            def calls() -> int:
                found = client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})
                return int(found["calls"])

            # The worker is gone: what calls a script now is what it once sent.
            before = calls()
            proxy.heal()
            wait_until(lambda: calls() > before, 20, "arrived")
            wait_until(lambda: not store.proxy.links, 20, "all delivered")

    real = trial()
    run(real)
    row.judge(prove(real.stage.case))
    control = trial("fence", "mismatch")
    run(control)
    row.control("fence and mismatch check off", prove(control.stage.case))


@pytest.mark.parametrize("script", ["commit", "claim", "trim"])
def test_a_lost_reply_leaves_no_doubt(
    script: str,
    trial: Callable[..., Trial],
    proxy: Proxy,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        f"the reply to a {script} is lost, {LOST_REPLIES} times", "nothing lost or twice, in order"
    )
    real = trial()
    _lose_replies(real, proxy, script)
    row.judge(prove(real.stage.case))
    if script == "commit":
        control, said = trial("claim", "mismatch"), "taken for not done, mismatch check off"
    elif script == "claim":
        control, said = trial("outbox"), "outbox off"
    else:
        control, said = trial("order"), "outbox dropped before it is published"
    _lose_replies(control, proxy, script)
    row.control(said, prove(control.stage.case))


def _lose_replies(trial: Trial, proxy: Proxy, script: str) -> None:
    """Lose a reply in each part of the log; one to a claim after that to a commit, which makes it claim."""
    lose: dict[str, list[Request]] = {"commit": [is_commit(trial.without)], "trim": [TRIM]}
    lose["claim"] = [*lose["commit"], faulty.script_sha("claim.lua")]
    trial.begin()
    for n in range(LOST_REPLIES):
        wanted = proxy.lost_replies + len(lose[script])
        for request in lose[script]:
            proxy.lose_reply(request)
        trial.feed(1 / 3 + (n + 1) / LOST_REPLIES * 2 / 3)
        trial.worker.wait_until(lambda wanted=wanted: proxy.lost_replies == wanted, 30, f"reply {n} lost")  # type: ignore[misc]
    trial.end()
