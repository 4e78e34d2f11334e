"""Say over HTTP whether the worker lives, is ready, and what it counts.

Decides what "alive" means: Faust can stay up with a dead coordinator, so that a process answers is not
enough.
Alive: the event loop answers, the group coordinator answers, and every partition moves, or has nothing to
read, or is knowingly held. Ready: every assigned partition is claimed and none is held. A worker that holds
is alive and not ready: killing it would not bring Redis back.

Whatever turns a probe does so within 10 s of when it happens: `PATIENCE_S` and two looks, which take 2 s each
at worst.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web
from prometheus_client import generate_latest

from stream_app.adapters.assignment import Assignment
from stream_app.adapters.log_ends import LogProbe
from stream_app.adapters.metrics import Metrics
from stream_app.adapters.partition import PartitionTask
from stream_app.adapters.transport import Log
from stream_app.errors import StartRefused, StreamAppError

__all__ = ["Health", "serve_http"]

logger = logging.getLogger(__name__)

#: A coordinator that moves, or a partition that waits for the log, is given this long. More than Redis may
#: take for an answer: a partition that waits for one is held next.
PATIENCE_S: Final = 6.0
#: A claim asks Kafka several times; each answer may take 15 s.
CLAIM_PATIENCE_S: Final = 60.0
LOOK_EVERY_S: Final = 1.0
#: A group that rebalances takes seconds. A worker that waits longer for an assignment says so, each time.
UNASSIGNED_S: Final = 45.0


@dataclass(slots=True)
class Health:
    """What the probes answer from; `watch` keeps it up to date."""

    assignment: Assignment
    log: Log
    probe: LogProbe
    metrics: Metrics
    monotonic_s: Callable[[], float]
    _well_s: dict[int, float] = field(default_factory=dict)
    _readable: dict[int, int] = field(default_factory=dict)
    _coordinator_seen_s: float = 0.0
    _looked_s: float | None = None
    _told_s: float = 0.0

    def problems(self) -> list[str]:
        """Say why the worker should be restarted; empty while it should not."""
        if self._looked_s is None:
            # It is about to join the group, which has a deadline of its own.
            return []
        now_s = self.monotonic_s()
        found = []
        if now_s - self._looked_s > PATIENCE_S:
            found.append(f"the event loop has not looked around for {now_s - self._looked_s:.0f} s")
        if now_s - self._coordinator_seen_s > PATIENCE_S:
            found.append(f"no group coordinator for {now_s - self._coordinator_seen_s:.0f} s")
        for task in self.assignment:
            still_s = now_s - max(self._well_s.get(task.partition, now_s), task.moved_s)
            if not task.is_serving and still_s > CLAIM_PATIENCE_S:
                found.append(f"partition {task.partition} is being claimed for {still_s:.0f} s")
            elif task.is_serving and still_s > PATIENCE_S:
                found.append(
                    f"partition {task.partition} has records to read and stands still for {still_s:.0f} s"
                )
        return found

    def unready(self) -> list[str]:
        """Say why the worker is not at work; empty while it is."""
        found = []
        if not self.assignment.was_assigned:
            found.append("no assignment yet")
        for task in self.assignment:
            if task.held_by is not None:
                found.append(f"partition {task.partition} is held: {task.held_by}")
            elif not task.is_serving:
                found.append(f"partition {task.partition} is not claimed yet")
        return found

    async def watch(self) -> None:
        """Look at coordinator, lag and progress, until cancelled."""
        self._looked_s = self._coordinator_seen_s = self._told_s = self.monotonic_s()
        await asyncio.gather(self._watch_coordinator(), self._watch_partitions())

    async def _watch_coordinator(self) -> None:
        while True:
            if await self.log.coordinator_answers():
                self._coordinator_seen_s = self.monotonic_s()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _watch_partitions(self) -> None:
        while True:
            self._looked_s = self.monotonic_s()
            self.tell_if_unassigned()
            tasks = list(self.assignment)
            self.metrics.partitions.set(sum(task.is_serving for task in tasks))
            for gone in self._well_s.keys() - {task.partition for task in tasks}:
                del self._well_s[gone]
                self._readable.pop(gone, None)
                self.metrics.lag.remove(str(gone))
            await asyncio.gather(*map(self._look_at, tasks))
            await asyncio.sleep(LOOK_EVERY_S)

    def tell_if_unassigned(self) -> None:
        """Warn of a group that gives this worker nothing, not even an empty assignment."""
        now_s = self.monotonic_s()
        if not self.assignment.was_assigned and now_s - self._told_s >= UNASSIGNED_S:
            self._told_s = now_s
            logger.warning(
                "expected the group to assign partitions or none, got nothing for %.0f s: another member may "
                "keep it rebalancing. A group of `stream-app services` can be stuck for good: stop all "
                "workers and start the services anew",
                UNASSIGNED_S,
            )

    async def _look_at(self, task: PartitionTask) -> None:
        """Take note of a partition's lag, and of whether it stands still for a good reason."""
        partition, now_s = task.partition, self.monotonic_s()
        self._well_s.setdefault(partition, now_s)
        watermark = task.watermark
        try:
            ends = await asyncio.wait_for(self.probe.ends(partition), LOOK_EVERY_S)
        except (StreamAppError, TimeoutError):
            # Kafka is slow, or does not tell: what it told last still stands there to be read.
            readable = self._readable.get(partition)
        else:
            # Behind a transaction that is still open there is nothing to read for us.
            readable = self._readable[partition] = ends.readable
            if watermark is not None:
                self.metrics.lag.labels(str(partition)).set(max(0, ends.end - watermark))
        nothing_to_do = readable is None or (watermark is not None and watermark >= readable)
        if nothing_to_do or task.held_by is not None:
            self._well_s[partition] = now_s


async def serve_http(health: Health, host: str, port: int) -> web.AppRunner:
    """Serve ``/livez``, ``/readyz`` and ``/metrics``; the caller cleans the runner up."""

    def answer(problems: list[str]) -> web.Response:
        text = "ok\n" if not problems else "".join(f"{problem}\n" for problem in problems)
        return web.Response(text=text, status=503 if problems else 200)

    async def livez(_: web.Request) -> web.Response:
        return answer(health.problems())

    async def readyz(_: web.Request) -> web.Response:
        return answer(health.unready())

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(health.metrics.registry), content_type="text/plain", charset="utf-8"
        )

    application = web.Application()
    application.add_routes(
        [web.get("/livez", livez), web.get("/readyz", readyz), web.get("/metrics", metrics)]
    )
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as exc:
        await runner.cleanup()
        raise StartRefused(
            "an address that is free", str(exc), f"worker.http_host {host}, worker.http_port {port}",
            "Choose another port, or 0 for none.",
        ) from exc  # fmt: skip
    return runner
