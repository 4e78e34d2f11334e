"""`stream-app services`: the contract of its output and of its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import redis

from stream_app.embedded.servers import free_port, kafka_cluster_id
from tests.backends import ROOT


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stream_app", "services", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_services_print_three_export_lines_when_up_and_end_on_a_signal(
    number: signal.Signals,
) -> None:
    kafka_port, redis_port = free_port(), free_port()
    process = start("--kafka-port", str(kafka_port), "--redis-port", str(redis_port))
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(3)]
        assert lines == [
            "export STREAM_APP__WORKER__TRUST_CREATE_TIME=true",
            f"export STREAM_APP__KAFKA__BOOTSTRAP_SERVERS=127.0.0.1:{kafka_port}",
            f"export STREAM_APP__REDIS__URL=redis://127.0.0.1:{redis_port}/0",
        ]
        assert kafka_cluster_id(kafka_port) is not None
        assert redis.Redis(port=redis_port).ping()
        process.send_signal(number)
        out, _ = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (0, "")
    assert kafka_cluster_id(kafka_port) is None
    with pytest.raises(redis.ConnectionError):
        redis.Redis(port=redis_port).ping()


def test_a_taken_port_is_a_sentence_and_exit_code_1() -> None:
    first = start()
    try:
        assert first.stdout is not None
        taken = [first.stdout.readline() for _ in range(3)][1].strip().rpartition(":")[2]
        second = start("--kafka-port", taken)
        out, err = second.communicate(timeout=20)
        assert (second.returncode, out) == (1, "")
        assert len(err.splitlines()) == 1
        assert f"127.0.0.1:{taken}: expected a free TCP port, got one that is in use" in err
    finally:
        first.terminate()
        first.wait(20)


def test_a_server_that_dies_ends_the_services_with_a_sentence() -> None:
    process = start()
    try:
        assert process.stdout is not None
        url = [process.stdout.readline() for _ in range(3)][2].strip().partition("=")[2]
        os.kill(int(redis.Redis.from_url(url).info("server")["process_id"]), signal.SIGKILL)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert "Valkey at 127.0.0.1:" in err
    assert "Traceback" not in err
