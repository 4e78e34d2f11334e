"""Run one server for a parent process and end it when that parent is gone, however it went.

Started by file name as a process of its own (``python -I -S guard.py PARENT_PID DIRECTORY COMMAND...``), so
it uses the standard library alone and imports nothing of this package.

The parent holds the write end of this process's standard input. When it closes it, or is killed (the kernel
closes it then), the guard ends the server and removes the server's directory. A parent that forked without
exec leaves a copy of that pipe in its child, so the guard also asks four times a second who its parent is.
The server in turn is tied to the guard by ``PR_SET_PDEATHSIG`` (Linux): a guard that is itself killed takes
the server with it. That signal hangs on the parent's *thread*, which is why the guard, with its single
thread, stands between a threaded program and its server.

The guard leads a session of its own: Ctrl-C at the terminal reaches the program in the foreground, which
still needs its servers to finish in order.

The process id of the server is printed on standard output, one line, as soon as it runs.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

POLL_S = 0.25
TERMINATION_S = 5.0
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOG_NAME = "server.log"
_PR_SET_PDEATHSIG = 1


class _Ended(Exception):  # noqa: N818 - read in a sentence: the guard was ended
    """A signal asked the guard to end."""


def _end(signum: int, frame: object) -> None:
    raise _Ended


def _die_with(parent_pid: int) -> None:
    """Have the kernel kill the calling process when its parent thread ends; runs between fork and exec."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it ended before the request was made
            os._exit(1)


def _wait(server: subprocess.Popen[bytes], parent_pid: int) -> None:
    """Return when the server has ended or the parent no longer wants it."""
    while server.poll() is None and os.getppid() == parent_pid:
        readable, _, _ = select.select([0], [], [], POLL_S)
        if readable and not os.read(0, 1024):
            return


def main(parent_pid: int, directory: Path, command: list[str]) -> int:
    """Run `command` in `directory` until it ends or the parent does.

    Parameters
    ----------
    parent_pid
        Process that wants the server.
    directory
        Working directory of the server; its output goes to ``server.log`` there. Removed at the end, unless
        the server ended by itself: then the parent still wants to read the log, and removes it.
    command
        Absolute path of the program, and its arguments.

    Returns
    -------
    int
        Exit status for the guard: 0 when the server was ended on request, else 1.
    """
    for signum in ENDING_SIGNALS:
        signal.signal(signum, _end)
    own_pid = os.getpid()
    # An empty environment: Tansu and the JVM both read variables that would change what they do.
    with (directory / LOG_NAME).open("ab") as log:
        server = subprocess.Popen(
            command,
            cwd=directory,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: _die_with(own_pid),  # noqa: PLW1509 - there is one thread
        )
    try:
        os.write(1, f"{server.pid}\n".encode())
        _wait(server, parent_pid)
    except (_Ended, BrokenPipeError):
        pass
    for signum in ENDING_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)  # already ending
    if server.poll() is not None:
        return 1
    server.terminate()
    try:
        server.wait(TERMINATION_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
