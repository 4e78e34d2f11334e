"""Several workers under one command: started, ended and answered for together.

Decides what one process's end means for the others. The workers themselves know nothing of each other but
what the consumer group tells them, exactly as if they ran on different machines.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Final

__all__ = ["run_together"]

LOOK_EVERY_S: Final = 0.1
_PR_SET_PDEATHSIG: Final = 1


def run_together(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """Run a command once with each environment, until all have ended.

    SIGTERM and SIGINT are passed on, so each finishes what it has begun. When one fails, the others are
    ended in the same way: whoever restarts the command restarts all of them. If this process is killed, they
    are told to end (Linux).

    Parameters
    ----------
    command
        Program and arguments.
    environments
        What each has beyond this process's own environment, at least one.

    Returns
    -------
    int
        0 if all ended well, else the exit code of the first that did not.
    """
    running: list[subprocess.Popen[bytes]] = []

    def end_all(number: int, _: object = None) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_all)
    parent = os.getpid()
    for environment in environments:
        running.append(
            subprocess.Popen(
                command,
                env={**os.environ, **environment},
                # No other thread runs here that could hold a lock at the fork.
                preexec_fn=lambda: _end_with(parent),  # noqa: PLW1509
            )
        )
    failed = 0
    while any(process.poll() is None for process in running):
        if not failed:
            failed = _first_failure(running)
            if failed:
                end_all(signal.SIGTERM)
        time.sleep(LOOK_EVERY_S)
    return failed or _first_failure(running)


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    codes = [process.poll() for process in processes]
    # A process that a signal has killed has a negative code, which is no exit code.
    return next((1 if code < 0 else code for code in codes if code), 0)


def _end_with(parent: int) -> None:
    """Have the kernel send SIGTERM when the parent ends; runs between fork and exec."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the request was made
            os._exit(1)
