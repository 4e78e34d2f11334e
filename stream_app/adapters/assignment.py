"""Keep one task for each partition that Kafka has given to this worker.

Decides when the work on a partition begins and ends, and turns the failure of one into the failure of the
worker. It must not know what the tasks do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from stream_app.adapters.partition import PartitionMemory, PartitionTask, Shell
from stream_app.adapters.tasks import end_tasks
from stream_app.adapters.transport import Slice

__all__ = ["Assignment"]

logger = logging.getLogger(__name__)

#: How long a revocation waits for the model's last checkpoint of what it takes away.
WRITE_DOWN_S: Final = 2.0


class Assignment:
    """The partitions of one worker; what the transport calls `Partitions`.

    Everything here runs on the worker's event loop.
    """

    def __init__(self) -> None:
        self._shell: Shell | None = None
        self._tasks: dict[int, PartitionTask] = {}
        self._running: dict[int, asyncio.Task[None]] = {}
        self._memory: dict[int, PartitionMemory] = {}
        self._failure: asyncio.Future[BaseException] | None = None
        #: Whether Kafka has ever given an assignment, an empty one included.
        self.was_assigned = False
        self._draining = False

    def equip(self, shell: Shell) -> None:
        """Give what the tasks need; before the first assignment."""
        self._shell = shell
        self._failure = asyncio.get_running_loop().create_future()

    @property
    def tasks(self) -> Mapping[int, PartitionTask]:
        """Partitions that this worker owns or is about to claim."""
        return self._tasks

    def __iter__(self) -> Iterator[PartitionTask]:
        return iter(list(self._tasks.values()))

    # What the transport asks and tells.

    def wants(self, partition: int) -> bool:
        """Say whether more slices of a partition may be fetched."""
        task = self._tasks.get(partition)
        return task is not None and task.wants()

    def assigned(self, partitions: frozenset[int]) -> None:
        """Begin work on what is new in the assignment."""
        self.was_assigned = True
        if self._shell is None or self._draining:
            return
        for partition in sorted(partitions - self._tasks.keys()):
            memory = self._memory.setdefault(partition, PartitionMemory())
            task = PartitionTask(partition, self._shell, memory)
            self._tasks[partition] = task
            running = asyncio.create_task(task.run(), name=f"partition-{partition}")
            running.add_done_callback(self._note_end)
            self._running[partition] = running

    async def revoked(self, partitions: frozenset[int]) -> None:
        """End work on partitions; nothing of it is under way when this returns."""
        running, left = [], []
        for partition in partitions:
            task = self._tasks.pop(partition, None)
            if task is not None:
                left.append(task)
            run = self._running.pop(partition, None)
            if run is not None:
                running.append(run)
        await end_tasks(running)
        await self._write_down(left)

    async def _write_down(self, left: Iterable[PartitionTask]) -> None:
        """Let the model keep what it learned from partitions that are left, if that is quick."""
        writing = [asyncio.create_task(task.write_down()) for task in left]
        if not writing:
            return
        done, late = await asyncio.wait(writing, timeout=WRITE_DOWN_S)
        for task in done:
            if (exc := task.exception()) is not None:
                logger.info("model: what was learned since the last checkpoint is lost, %s", exc)
        await end_tasks(late)

    def submit(self, part: Slice, acknowledge: Callable[[], object]) -> None:
        """Hand a slice to its partition; one that is no longer here drops it unacknowledged."""
        task = self._tasks.get(part.partition)
        if task is not None:
            task.submit(part, acknowledge)

    async def failed(self) -> BaseException:
        """Wait until a partition cannot go on, and return why."""
        if self._failure is None:
            raise RuntimeError("expected equip() before failed()")
        return await asyncio.shield(self._failure)

    # What the worker asks and tells.

    @property
    def failure(self) -> BaseException | None:
        """Why a partition could not go on, ``None`` if all could."""
        return self._failure.result() if self._failure is not None and self._failure.done() else None

    async def drain(self) -> None:
        """Let every partition finish its step in hand, and end them all."""
        self._draining = True
        for task in self._tasks.values():
            task.drain()
        if self._running:
            await asyncio.wait(self._running.values())

    async def stop(self) -> None:
        """End all partitions where they stand."""
        self._draining = True
        await self.revoked(frozenset(self._tasks))

    def _note_end(self, running: asyncio.Task[None]) -> None:
        if running.cancelled():
            return
        exc = running.exception()
        if exc is not None and self._failure is not None and not self._failure.done():
            self._failure.set_result(exc)
