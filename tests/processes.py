"""Run `stream-app` as real processes: ended with their test, their output shown when it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.backends import ROOT

STOP_DEADLINE_S = 15.0

# Asks the kernel to kill it when the thread that started it ends (Linux), then becomes the real program under
# the same process id. Not a preexec_fn: Python code between fork and exec can hang a process with threads.
DYING_WITH_US = (
    sys.executable,
    "-I",
    "-S",
    "-c",
    """
import ctypes, os, signal, sys
# A shell without job control starts what it puts in the background with SIGINT ignored, for all below it.
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "linux":
    PR_SET_PDEATHSIG, SIGKILL = 1, 9
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the tests are gone")
os.execv(sys.argv[2], sys.argv[2:])
""",
)


@dataclass(frozen=True, slots=True)
class Program:
    """One running `stream-app` command."""

    name: str
    log_path: Path
    process: subprocess.Popen[bytes] = field(repr=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def log(self) -> str:
        """Everything it has printed, both streams."""
        return self.log_path.read_text(errors="replace")

    def wait(self, timeout_s: float) -> int:
        """Wait for its end and return its exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {timeout_s} s:\n{self.log[-4000:]}") from None

    def wait_until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Poll until the condition holds; fails if the program ends first or time runs out."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.is_running, (
                f"{self.name} ended ({self.process.returncode}) before {what}:\n{self.log[-4000:]}"
            )
            assert time.monotonic() < deadline, (
                f"{self.name}: not {what} in {timeout_s} s:\n{self.log[-4000:]}"
            )
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL, and wait: nothing of it runs any more."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        """SIGTERM, the polite end, without waiting."""
        self.process.terminate()

    def pause(self) -> None:
        """SIGSTOP: it stands still until `resume`, and does not know it."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Make sure that it is gone, politely first."""
        if self.is_running:
            self.resume()
            self.process.terminate()
            try:
                self.process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.kill()


class Programs:
    """Starts the programs of one test; each gets a log file of its own."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._directory = directory
        self._environment = environment
        self.started: list[Program] = []

    def start(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        name: str = "",
        module: str = "stream_app",
    ) -> Program:
        """Start ``stream-app ARGUMENTS...``.

        Parameters
        ----------
        arguments
            Command and options.
        environment
            Settings of this program, on top of the test's. The caller's own ``STREAM_APP__`` variables are
            not inherited.
        cwd
            Its working directory: where `config/` is looked for.
        name
            What it is called in a failure; default: the command and a number.
        module
            What Python runs as the command.
        """
        name = name or f"{arguments[0]}-{len(self.started) + 1}"
        path = self._directory / f"{name}.log"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("STREAM_APP__")}
        with path.open("ab") as log:
            process = subprocess.Popen(
                [*DYING_WITH_US, str(os.getpid()), sys.executable, "-m", module, *arguments],
                cwd=cwd,
                env={
                    **inherited,
                    "PYTHONPATH": str(ROOT),
                    "PYTHONUNBUFFERED": "1",
                    **self._environment,
                    **(environment or {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        program = Program(name, path, process)
        self.started.append(program)
        return program

    def run(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        timeout_s: float = 60,
        status: int = 0,
    ) -> str:
        """Run a command to its end; fails unless it exits with `status`. Returns what it printed."""
        program = self.start(*arguments, environment=environment, cwd=cwd)
        ended_with = program.wait(timeout_s)
        assert ended_with == status, (
            f"{program.name}: expected {status}, got {ended_with}:\n{program.log[-4000:]}"
        )
        return program.log

    def stop(self) -> None:
        """End all that still run, the last one first."""
        for program in reversed(self.started):
            program.stop()
