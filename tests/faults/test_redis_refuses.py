"""A Redis that answers with errors, or not at all: the worker waits, and goes on where it stood."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from stream_app.embedded import Server
from stream_app.embedded.servers import free_port
from tests.e2e.proof import prove
from tests.faults.breakable import Store, Trial
from tests.faults.proxy import Proxy
from tests.faults.rows import Row
from tests.faults.stage import FaultStage
from tests.faults.unsafe import TOLD
from tests.integration.stage import EXIT_SLACK_S, wait_until

pytestmark = pytest.mark.faults

#: Parts of the log before each of which Redis forgets its scripts.
FLUSHES = 8
PASSWORD = "correct horse"


class Refusal:
    """A state of Redis in which it does not do what it is asked."""

    scenario: ClassVar[str]
    #: What the worker hears.
    says: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]] = ()

    def __init__(self, store: Store) -> None:
        self.store = store

    def begin(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError

    def _set(self, name: str, value: str) -> None:
        with self.store.client() as client:
            client.config_set(name, value)


class OutOfMemory(Refusal):
    scenario = "Redis is full (OOM: maxmemory lowered, then raised)"
    says = "OutOfMemoryError"

    def begin(self) -> None:
        self._set("maxmemory", "1")

    def end(self) -> None:
        self._set("maxmemory", "0")


class ReadOnly(Refusal):
    scenario = "Redis becomes a replica (READONLY), then a master again"
    says = "ReadOnlyError"

    def begin(self) -> None:
        with self.store.client() as client:
            client.replicaof("127.0.0.1", free_port())  # a master that it never reaches: it keeps what it has

    def end(self) -> None:
        with self.store.client() as client:
            client.replicaof("NO", "ONE")


class Misconfigured(Refusal):
    scenario = "Redis cannot save its snapshot and takes no writes (MISCONF)"
    says = "MISCONF"
    # Snapshots are asked for, by the test alone: not within an hour by itself.
    arguments = ("--save", "3600 1000000")

    def _save(self, expected: str) -> None:
        with self.store.client() as client:
            client.execute_command("BGSAVE")

            def status() -> str:
                found = client.info("persistence")
                return "under way" if found["rdb_bgsave_in_progress"] else found["rdb_last_bgsave_status"]

            wait_until(lambda: status() == expected, 20, f"a snapshot that ends with {expected}")

    def begin(self) -> None:
        snapshot = self.store.directory / "dump.rdb"
        snapshot.unlink(missing_ok=True)
        snapshot.mkdir()  # nothing can be renamed to a directory's name
        self._save("err")

    def end(self) -> None:
        (self.store.directory / "dump.rdb").rmdir()
        self._save("ok")


class Loading(Refusal):
    scenario = "Redis restarted and loading its data (LOADING)"
    says = "BusyLoadingError"

    def begin(self) -> None:
        with self.store.client() as client:
            client.save()
        self.store.kill()
        # Some seconds for the few hundred keys of a third of the log, answering meanwhile.
        self.store.restart("--key-load-delay", "10000", "--loading-process-events-interval-bytes", "1024")

    def end(self) -> None:
        self.store.await_loaded()


class Killed(Refusal):
    scenario = "Redis SIGKILLed with appendonly everysec, restarted"
    says = "ConnectionError"
    arguments = ("--appendonly", "yes", "--appendfsync", "everysec")

    def begin(self) -> None:
        self.store.kill()

    def end(self) -> None:
        self.store.restart()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as proxy:
        yield proxy


@pytest.mark.parametrize("kind", [OutOfMemory, ReadOnly, Misconfigured, Loading, Killed])
def test_the_worker_waits_for_a_redis_that_refuses_and_goes_on(
    kind: type[Refusal],
    kafka_bootstrap: str,
    redis_server: Callable[..., Server],
    proxy: Proxy,
    stage_on: Callable[..., FaultStage],
    port: int,
    tmp_path: Path,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(kind.scenario, "unready but alive meanwhile; goes on by itself; nothing lost or twice")
    store = Store(redis_server, proxy, tmp_path, kind.arguments)
    refusal = kind(store)

    stage = stage_on(kafka_bootstrap, store.url)
    trial = Trial(stage, store, port)
    trial.begin()
    folded = stage.folded()
    refusal.begin()
    trial.feed(2 / 3)
    trial.await_hold(kind.says)
    refusal.end()
    ended_s = time.monotonic()
    trial.await_ready()
    row.note(f"ready again {time.monotonic() - ended_s:.1f} s after it was over")
    trial.end()
    assert stage.folded() > folded
    row.judge(prove(stage.case))

    with store.client() as client:
        client.flushall()
    stage = stage_on(kafka_bootstrap, store.url, model__enabled=False)
    trial = Trial(stage, store, port, ("errors", "mismatch"))
    trial.begin()
    refusal.begin()
    trial.feed(2 / 3)
    trial.worker.wait_until(lambda: TOLD in trial.worker.log, 30, "taking an error lightly")
    refusal.end()
    trial.end()
    row.control("errors taken for success, mismatch check off", prove(stage.case))


def test_a_redis_that_forgets_its_scripts_is_told_them_again(
    kafka_bootstrap: str,
    redis_server: Callable[..., Server],
    proxy: Proxy,
    stage_on: Callable[..., FaultStage],
    port: int,
    tmp_path: Path,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "Redis forgets its scripts in mid-run (NOSCRIPT)", "goes on at once; nothing lost or twice"
    )
    store = Store(redis_server, proxy, tmp_path)

    stage = stage_on(kafka_bootstrap, store.url)
    trial = Trial(stage, store, port)
    trial.begin()
    with store.client() as client:
        client.config_resetstat()
        for n in range(FLUSHES):
            client.script_flush()
            trial.feed((n + 1) / FLUSHES * 2 / 3 + 1 / 3)
            trial.catch_up()
        met = int(client.info("errorstats")["errorstat_NOSCRIPT"]["count"])
    trial.end()
    assert met >= FLUSHES
    row.note(f"{met} calls met it in {FLUSHES} flushes, {trial.worker.log.count(': held, ')} holds")
    row.judge(prove(stage.case))

    with store.client() as client:
        client.flushall()
    stage = stage_on(kafka_bootstrap, store.url)
    trial = Trial(stage, store, port, ("script", "mismatch"))
    trial.begin()
    with store.client() as client:
        client.script_flush()
    trial.feed(2 / 3)
    trial.worker.wait_until(lambda: TOLD in trial.worker.log, 30, "taking it lightly")
    trial.end()
    row.control("a missing script counts as run, mismatch check off", prove(stage.case))


def test_a_worker_that_redis_lets_in_no_more_says_so_and_ends(
    kafka_bootstrap: str,
    redis_server: Callable[..., Server],
    proxy: Proxy,
    stage_on: Callable[..., FaultStage],
    port: int,
    tmp_path: Path,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "Redis wants a password in mid-run (NOAUTH)", "exits non-zero with one sentence; the next goes on"
    )
    store = Store(redis_server, proxy, tmp_path)
    stage = stage_on(kafka_bootstrap, store.url)
    trial = Trial(stage, store, port)
    trial.begin()
    with store.client() as client:
        client.config_set("requirepass", PASSWORD)
        # Who was let in stays in; a new connection is asked.
        client.client_kill_filter(_type="normal", skipme=True)
        trial.feed(1)
        began_s = time.monotonic()
        assert trial.worker.wait(20 + EXIT_SLACK_S) == 1, trial.worker.log
        row.note(f"exited 1 after {time.monotonic() - began_s:.1f} s, no control: nothing is committed")
        client.config_set("requirepass", "")
    last = trial.worker.log.strip().splitlines()[-1]
    assert "AuthenticationError" in last
    assert "Operator action: Check the user" in last
    assert PASSWORD not in trial.worker.log
    assert "Traceback" not in trial.worker.log
    assert stage.folded() < sum(stage.log_ends().values())
    stage.run("worker", "--until-end")
    row.judge(prove(stage.case))
