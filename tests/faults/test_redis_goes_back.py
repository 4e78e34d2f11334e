"""A Redis that forgets: what it held at an earlier time, or nothing, is folded up to now again."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from stream_app.embedded import Server
from tests.backends import read_to_end
from tests.e2e.proof import Case, prove
from tests.faults.breakable import Store, Trial, is_commit
from tests.faults.faulty import Switch
from tests.faults.proxy import Proxy
from tests.faults.rows import Row, seed
from tests.faults.stage import FaultStage
from tests.integration.stage import wait_until

pytestmark = pytest.mark.faults


class Setback:
    """A way to lose what was committed since the first third of the log, or more."""

    scenario: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]] = ()
    #: The protection that notices.
    noticed_by: ClassVar[Switch] = "mismatch"

    def __init__(self, store: Store) -> None:
        self.store = store

    def remember(self) -> None:
        """Note what is there now."""

    def happen(self) -> None:
        """Bring Redis back to it; clients find the same address."""
        raise NotImplementedError


class TornFile(Setback):
    """The machine goes down: what the kernel had not written is gone, the end of the file of commands."""

    scenario = "Redis SIGKILLed with appendonly everysec, last writes lost, restarted"
    arguments = ("--appendonly", "yes", "--appendfsync", "everysec")

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._rng = random.Random(seed())
        self._least_bytes = 0

    def _file(self) -> Path:
        return max((self.store.directory / "appendonlydir").glob("*.incr.aof"))

    def remember(self) -> None:
        self._least_bytes = self._file().stat().st_size

    def happen(self) -> None:
        self.store.kill()
        with self._file().open("r+b") as file:
            size = file.seek(0, 2)
            file.truncate(self._rng.randrange(self._least_bytes, (self._least_bytes + size) // 2))
        self.store.restart()
        self.store.await_loaded()


class OlderSnapshot(Setback):
    scenario = "Redis replaced by an older snapshot in mid-run"

    def remember(self) -> None:
        with self.store.client() as client:
            client.save()
        shutil.copy(self.store.directory / "dump.rdb", self.store.directory / "older.rdb")

    def happen(self) -> None:
        self.store.kill()
        shutil.copy(self.store.directory / "older.rdb", self.store.directory / "dump.rdb")
        self.store.restart()
        self.store.await_loaded()


class Emptied(Setback):
    scenario = "Redis flushed in mid-run"
    noticed_by = "lost"

    def happen(self) -> None:
        with self.store.client() as client:
            client.flushall()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as proxy:
        yield proxy


@pytest.mark.parametrize("kind", [TornFile, OlderSnapshot, Emptied])
def test_a_redis_that_goes_back_is_folded_up_to_now_again(
    kind: type[Setback],
    kafka_bootstrap: str,
    redis_server: Callable[..., Server],
    proxy: Proxy,
    stage_on: Callable[..., FaultStage],
    port: int,
    tmp_path: Path,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        kind.scenario, "the log is folded again; what is said again says so, and nothing else does"
    )
    store = Store(redis_server, proxy, tmp_path, kind.arguments)
    setback = kind(store)

    stage = stage_on(kafka_bootstrap, store.url, redis__url=store.proxied_url)
    trial = Trial(stage, store, port)
    trial.begin()
    setback.remember()
    _lose_unseen(trial, setback)
    trial.catch_up()
    # Once more, with a commit on its way.
    proxy.at_request(is_commit(), proxy.blackhole)
    trial.feed(5 / 6)
    wait_until(lambda: proxy.begun == 1, 30, "a commit on its way")
    commits = trial.commits()
    setback.happen()
    assert trial.commits() < commits
    proxy.reset()
    proxy.heal()
    trial.end()
    proof = row.judge(prove(stage.case))
    assert proof.repeats > 100
    _only_what_is_said_again_says_so(stage.case)

    with store.client() as client:
        client.flushall()
    # A client that sends again by itself, so that nobody learns of it from a cut connection; and no model,
    # which has checks of its own.
    stage = stage_on(kafka_bootstrap, store.url, redis__url=store.proxied_url, model__enabled=False)
    trial = Trial(stage, store, port, (kind.noticed_by, "once"))
    trial.begin()
    setback.remember()
    with store.client() as client:
        meta = client.hgetall("sa:meta")
    _lose_unseen(trial, setback)
    with store.client() as client:
        client.hset("sa:meta", mapping=meta)  # what reads the state needs it, and only a claim writes it
    trial.end()
    assert trial.worker.log.count(": claimed, epoch ") == stage.partitions, "the loss was noticed"
    row.control(f"{kind.noticed_by} check off, commands sent again", prove(stage.case))


def _lose_unseen(trial: Trial, setback: Setback) -> None:
    """Take away what the second third of the log has changed, while the worker stands still."""
    trial.feed(2 / 3)
    trial.catch_up()
    trial.worker.pause()
    commits = trial.commits()
    setback.happen()
    assert trial.commits() < commits
    trial.worker.resume()


def _only_what_is_said_again_says_so(case: Case) -> None:
    """``replayed`` is for what consumers have heard before, all of it; they act on all else."""
    said: set[str] = set()
    for record in asyncio.run(read_to_end(case.kafka, case.names.entered, case.names.exited)):
        message = json.loads(record.value)
        assert message["replayed"] == (message["id"] in said), message
        said.add(message["id"])
