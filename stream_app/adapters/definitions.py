"""Bring every stored profile under the present segment definitions, beside the stream.

Decides which profiles are looked at and when a partition is done. Users with a record are re-evaluated by the
fold when it meets them; all others are found here by one walk over Redis a worker, in bounded pages. A
partition that was claimed while the walk was under way is walked again: the mark is set only when every
profile was seen under one claim.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from stream_app.adapters.assignment import Assignment
from stream_app.adapters.partition import PartitionTask
from stream_app.adapters.profile_store import ProfileStore
from stream_app.errors import StoreUnavailable

__all__ = ["sweep_definitions"]

logger = logging.getLogger(__name__)

PAGE_USERS: Final = 500
LOOK_EVERY_S: Final = 0.5


async def sweep_definitions(assignment: Assignment, store: ProfileStore) -> None:
    """Run until cancelled."""
    while True:
        waiting = {task.partition: task for task in assignment if task.needs_definitions}
        if waiting:
            try:
                await _walk(waiting, store)
            except StoreUnavailable as exc:
                logger.warning("definitions: the walk is begun again, %s", exc)
        await asyncio.sleep(LOOK_EVERY_S)


async def _walk(waiting: dict[int, PartitionTask], store: ProfileStore) -> None:
    epochs = {partition: task.epoch for partition, task in waiting.items()}
    seen = 0
    async for page in store.scan_users(PAGE_USERS):
        by_partition: dict[int, list[str]] = {}
        for partition, user_id in page:
            if partition in waiting:
                by_partition.setdefault(partition, []).append(user_id)
        for partition, users in by_partition.items():
            seen += len(users)
            if not await waiting[partition].redefine(users):
                del waiting[partition]
        if not waiting:
            return
    for partition, task in waiting.items():
        if task.epoch == epochs[partition] and await task.mark_definitions():
            logger.info("partition %d: all profiles are under the present definitions", partition)
    logger.info("definitions: %d stored profiles looked at", seen)
