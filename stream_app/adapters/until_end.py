"""Know when a log that was there at the start is done with: for backfills, tests and benchmarks.

Decides what "done" means: every partition's watermark has reached the end that its log had, whoever owns it,
nothing that is due is left, everything is published, and Kafka has heard how far the group is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from stream_app.adapters.log_ends import LogEnds
from stream_app.adapters.partition import Shell
from stream_app.errors import StoreUnavailable

__all__ = ["wait_until_end"]

LOOK_EVERY_S: Final = 0.1


async def wait_until_end(shell: Shell, ends: Mapping[int, LogEnds]) -> None:
    """Return when all partitions are done.

    Parameters
    ----------
    shell : Shell
    ends : mapping of partition to LogEnds
        As they were at the start.
    """
    left = dict(ends)
    while left:
        for partition in list(left):
            try:
                if await _is_done(shell, partition, left[partition]):
                    del left[partition]
            except StoreUnavailable:
                # The partitions themselves hold, and give up, on what does not answer.
                break
        await asyncio.sleep(LOOK_EVERY_S)


async def _is_done(shell: Shell, partition: int, ends: LogEnds) -> bool:
    wm = (await shell.store.watermarks([partition]))[partition]
    if wm is None or wm.watermark < ends.end:
        return False
    fingerprint = shell.fold.segments.fingerprint
    if wm.definitions != fingerprint or await shell.store.definitions(partition) != {fingerprint}:
        return False
    if await shell.store.outbox_length(partition):
        return False
    if shell.clock == "event" and wm.stream_time_ms is not None:
        next_due_ms = await shell.store.next_due_ms(partition)
        if next_due_ms is not None and next_due_ms <= wm.stream_time_ms:
            return False
    if ends.end == ends.start:
        return True
    committed = await shell.log.committed(partition)
    return committed is not None and committed >= ends.end
