"""An event loop whose time is not ours: when nothing is ready, it is already the next timer's instant.

A minute passes as fast as its work is done, and always in the same order: no threads, no sockets, no clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from stream_app.adapters.tasks import end_tasks

T = TypeVar("T")

#: Many more than any work takes that waits for no timer.
MOST_TURNS_AT_ONCE = 100_000


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs coroutines by a clock that begins at 0 and moves from timer to timer."""

    _scheduled: list[asyncio.TimerHandle]

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._turns = 0
        self._selector = self

    def time(self) -> float:
        return self._now_s

    def select(self, timeout_s: float | None) -> list[Any]:
        """What the base class takes for waiting until something is to be read."""
        if timeout_s is None:
            raise RuntimeError("everybody waits and no timer is set: nothing can ever happen again")
        self._turns += 1
        if self._turns > MOST_TURNS_AT_ONCE:
            raise RuntimeError(f"{MOST_TURNS_AT_ONCE} turns and time stands still: somebody is busy for ever")
        if timeout_s > 0 and self._scheduled[0].when() > self._now_s:
            self._now_s = self._scheduled[0].when()
            self._turns = 0
        return []

    def _process_events(self, events: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """There is nobody to be woken from another thread."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in virtual time, and end what it leaves behind."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(end_tasks(asyncio.all_tasks(loop)))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
