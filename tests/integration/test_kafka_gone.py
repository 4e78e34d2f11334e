"""A worker whose Kafka is gone: held, unready, soon not alive, and ended within its deadlines."""

from __future__ import annotations

import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from stream_app.embedded import Server
from stream_app.embedded.servers import free_port
from tests.backends import Names
from tests.processes import Program, Programs

HOLD_S = 8.0
DRAIN_S = 3.0
#: Each part of the worker may take 5 s to stop, and what hangs is left behind.
STOP_SLACK_S = 40.0
SEGMENTS = '[[segments]]\nid = "seen"\nevent_types = ["view"]\n'


class Running:
    def __init__(self, worker: Program, broker: Server, http_port: int) -> None:
        self.worker, self.broker, self.http_port = worker, broker, http_port

    def status(self, probe: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/{probe}", timeout=2) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def kill_broker(self) -> None:
        os.kill(self.broker.pid, signal.SIGKILL)


@pytest.fixture
def start(
    kafka_server: Callable[..., Server], fresh_redis: str, names: Names, programs: Programs, tmp_path: Path
) -> Callable[..., Running]:
    """Start a worker on a broker of this test's own, and wait until it is ready."""

    def start(**settings: str) -> Running:
        broker = kafka_server()
        (tmp_path / "segments.toml").write_text(SEGMENTS)
        environment = {
            **names.environment(),
            "STREAM_APP__KAFKA__BOOTSTRAP_SERVERS": broker.address,
            "STREAM_APP__KAFKA__SESSION_TIMEOUT_S": "6",
            "STREAM_APP__REDIS__URL": fresh_redis,
            "STREAM_APP__WORKER__CLOCK": "event",
            "STREAM_APP__WORKER__DRAIN_DEADLINE_S": str(DRAIN_S),
            "STREAM_APP__WORKER__HTTP_PORT": str(http_port := free_port()),
            **settings,
        }
        options = ("--segments", str(tmp_path / "segments.toml"))
        programs.run("topics", "--partitions", "2", *options, environment=environment)
        worker = programs.start("worker", *options, environment=environment)
        running = Running(worker, broker, http_port)
        worker.wait_until(lambda: running.status("readyz") == 200, 40, "ready")
        return running

    return start


def test_a_worker_whose_kafka_is_gone_is_unready_at_once_and_gives_up_with_a_sentence(
    start: Callable[..., Running],
) -> None:
    running = start(STREAM_APP__WORKER__HOLD_DEADLINE_S=str(HOLD_S))
    assert running.status("livez") == 200
    running.kill_broker()
    gone_s = time.monotonic()
    running.worker.wait_until(lambda: running.status("readyz") == 503, 30, "unready")
    # Later, when the coordinator has been silent for 6 s, it is not: see tests/faults/test_watchdog.py.
    assert running.status("livez") == 200
    assert running.worker.wait(HOLD_S + STOP_SLACK_S + 60) == 1
    assert time.monotonic() - gone_s >= HOLD_S
    last = running.worker.log.strip().splitlines()[-1]
    assert "(worker.hold_deadline_s)" in last
    assert "Kafka" in last
    assert "Operator action:" in last
    assert len(running.worker.log.splitlines()) < 200


def test_sigterm_ends_a_worker_whose_kafka_is_gone_and_it_says_why(start: Callable[..., Running]) -> None:
    running = start(STREAM_APP__WORKER__HOLD_DEADLINE_S="300")
    running.kill_broker()
    running.worker.wait_until(lambda: running.status("readyz") == 503, 30, "unready")
    running.worker.terminate()
    assert running.worker.wait(DRAIN_S + STOP_SLACK_S) == 1
    assert "Operator action:" in running.worker.log.strip().splitlines()[-1]


def test_a_taken_port_for_the_probes_is_a_sentence(
    kafka_bootstrap: str, fresh_redis: str, names: Names, programs: Programs, tmp_path: Path
) -> None:
    (tmp_path / "segments.toml").write_text(SEGMENTS)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = {
            **names.environment(),
            "STREAM_APP__KAFKA__BOOTSTRAP_SERVERS": kafka_bootstrap,
            "STREAM_APP__REDIS__URL": fresh_redis,
            "STREAM_APP__WORKER__CLOCK": "event",
            "STREAM_APP__WORKER__HTTP_PORT": str(taken.getsockname()[1]),
        }
        options = ("--segments", str(tmp_path / "segments.toml"))
        programs.run("topics", *options, environment=environment)
        said = programs.run("worker", *options, environment=environment, status=1)
    assert "Traceback" not in said
    assert "worker.http_port" in said
