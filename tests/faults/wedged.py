"""The real `stream-app`, of which a part stands still when it is told to.

Run as ``python -m tests.faults.wedged worker ...``. SIGUSR1 lets every partition wait for ever between
reading its users and folding them, and a second one lets them go on. SIGUSR2 ends the task that keeps in
touch with the group's coordinator; nothing brings that back.
"""

from __future__ import annotations

import asyncio
import functools
import signal
import sys
from typing import Any, Final

from aiokafka.consumer.group_coordinator import GroupCoordinator

from stream_app.adapters.profile_store import ProfileStore

WEDGE: Final = signal.SIGUSR1
END_COORDINATION: Final = signal.SIGUSR2
LOOK_EVERY_S: Final = 0.05


def arrange() -> None:
    """Wrap the real functions and wait for the signals."""
    is_wedged = False
    coordinators: list[GroupCoordinator] = []
    read, init = ProfileStore.read, GroupCoordinator.__init__

    @functools.wraps(read)
    async def wedged(*args: Any, **kwargs: Any) -> Any:
        packed = await read(*args, **kwargs)
        while is_wedged:  # noqa: ASYNC110 - a signal's handler has no event loop to tell
            await asyncio.sleep(LOOK_EVERY_S)
        return packed

    @functools.wraps(init)
    def known(coordinator: GroupCoordinator, *args: Any, **kwargs: Any) -> None:
        init(coordinator, *args, **kwargs)
        coordinators.append(coordinator)

    def toggle(*_: object) -> None:
        nonlocal is_wedged
        is_wedged = not is_wedged

    def end_coordination(*_: object) -> None:
        for coordinator in coordinators:
            task = coordinator._coordination_task
            task.get_loop().call_soon_threadsafe(task.cancel)

    vars_of: Any = ProfileStore
    vars_of.read = wedged
    vars_of = GroupCoordinator
    vars_of.__init__ = known
    signal.signal(WEDGE, toggle)
    signal.signal(END_COORDINATION, end_coordination)


if __name__ == "__main__":
    arrange()
    from stream_app.__main__ import main

    sys.exit(main())
