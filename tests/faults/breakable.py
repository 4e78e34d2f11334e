"""A Redis with a disk behind a proxy, and a run of the service on it in three parts.

The log of the faults goes in thirds: one is folded when a fault begins, one meets it, one comes after it. So
every fault strikes in the middle of a run, however fast the machine is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import redis

from stream_app.embedded import Server
from tests.backends import redis_url_of
from tests.faults import faulty
from tests.faults.faulty import Switch
from tests.faults.proxy import Proxy
from tests.faults.rows import seed
from tests.faults.stage import EVENTS, FaultStage, fault_log
from tests.integration.stage import DRAIN_DEADLINE_S, EXIT_SLACK_S, kill_server, probe, wait_until
from tests.processes import Program

#: A trim is a call of commit.lua, too; its fourth argument tells.
TRIM: Final = b"$4\r\ntrim\r\n"
#: Longer than any of the faults; the worker's own default.
HOLD_S: Final = 60.0
#: How long one that lacks a protection may take for the last third.
CONTROL_S: Final = 15.0


class Store:
    """A Redis of one test, to be broken and mended; it finds its files again when it is started again.

    Parameters
    ----------
    start : callable
        The fixture ``redis_server``.
    proxy : Proxy
        What the workers come to; it is aimed at the server.
    directory : Path
    arguments
        More of the server's command line.
    """

    def __init__(
        self, start: Callable[..., Server], proxy: Proxy, directory: Path, arguments: Sequence[str] = ()
    ) -> None:
        self._start = start
        self.proxy = proxy
        self.directory = directory
        self._arguments = ("--dir", str(directory), *arguments)
        self.server = start(*self._arguments)
        proxy.aim(self.server.port)

    @property
    def url(self) -> str:
        """Where the test finds it, whatever the proxy does."""
        return redis_url_of(self.server)

    @property
    def proxied_url(self) -> str:
        """Where the workers find it."""
        return f"redis://{self.proxy.address}/0"

    @contextmanager
    def client(self) -> Iterator[Any]:
        """Connect to it."""
        with redis.Redis.from_url(self.url, decode_responses=True) as client:
            yield client

    def kill(self) -> None:
        """SIGKILL."""
        kill_server(self.server)

    def restart(self, *arguments: str) -> None:
        """Start it again on its port and with its files, which it may still be reading."""
        self.server = self._start(*self._arguments, *arguments, port=self.server.port)

    def await_loaded(self) -> None:
        """Wait until it has read its files."""
        with self.client() as client:
            wait_until(lambda: not client.info("persistence")["loading"], 60, "loaded")


def is_commit(without: Sequence[Switch] = ()) -> Callable[[bytes], bool]:
    """Tell the beginning of a commit from all else that workers who lack these protections send."""
    sha = faulty.script_sha("commit.lua", without)
    return lambda chunk: sha in chunk and TRIM not in chunk


@dataclass(slots=True)
class Trial:
    """One run on a `Store`: a worker, and how much of the log it has been given.

    Attributes
    ----------
    without : sequence of Switch
        The protections that the worker lacks.
    """

    stage: FaultStage
    store: Store
    port: int
    without: Sequence[Switch] = ()
    _records: list[tuple[bytes, bytes]] = field(default_factory=lambda: list(fault_log(seed(), EVENTS)))
    _fed: int = 0
    _worker: Program | None = None

    @property
    def worker(self) -> Program:
        assert self._worker is not None
        return self._worker

    def feed(self, share: float) -> None:
        """Append the log up to a share of it."""
        until = round(share * len(self._records))
        self.stage.append(self._records[self._fed : until])
        self._fed = until

    def begin(self) -> None:
        """Start the worker and let it fold the first third."""
        self.feed(1 / 3)
        self._worker = self.stage.start_faulty(
            "worker", without=self.without, worker__http_port=self.port, worker__hold_deadline_s=HOLD_S
        )
        self.catch_up()

    def catch_up(self) -> None:
        """Wait until all is folded, fired and published."""
        ends = self.stage.log_ends()
        self.worker.wait_until(lambda: self.stage.is_done(ends), 60, "done with what there is")

    def end(self) -> None:
        """Let the worker fold the rest of the log, and end; one that lacks a protection may end by itself."""
        self.feed(1)
        if self.without:
            ends = self.stage.log_ends()
            deadline_s = time.monotonic() + CONTROL_S
            while self.worker.is_running and not self.stage.is_done(ends) and time.monotonic() < deadline_s:
                time.sleep(0.1)
            self.worker.kill()
            return
        self.catch_up()
        self.worker.terminate()
        assert self.worker.wait(DRAIN_DEADLINE_S + EXIT_SLACK_S) == 0, self.worker.log

    def await_hold(self, because: str, timeout_s: float = 30) -> None:
        """Wait until the worker says that it is not ready, and why; it must count as alive."""

        def told() -> bool:
            status, why = probe(self.port, "readyz")
            return status == 503 and because in why

        self.worker.wait_until(told, timeout_s, f"unready because of {because}")
        assert probe(self.port, "livez") == (200, "ok\n")

    def await_ready(self, timeout_s: float = 30) -> None:
        """Wait until the worker is at work."""
        self.worker.wait_until(lambda: probe(self.port, "readyz")[0] == 200, timeout_s, "ready")

    def commits(self) -> int:
        """Commits of all partitions that the store knows of."""
        return sum(int(self.stage.wm(p).get("commit", 0)) for p in range(self.stage.partitions))
