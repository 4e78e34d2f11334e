"""Say over HTTP whether the worker lives, is ready, and what it counts.

Decides what "alive" means: Faust can stay up with a dead coordinator, so that a process answers is not
enough.
Alive: the event loop answers, the group coordinator is in touch, and the log moves, or there is nothing to
read, or a partition is knowingly held. Ready: every assigned partition is claimed and none is held. A worker
that holds is alive and not ready: killing it would not bring Redis back.
"""

from __future__ import annotations

import asyncio
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

#: A coordinator that moves, or a partition that waits for the log, is given this long.
PATIENCE_S: Final = 8.0
LOOK_EVERY_S: Final = 1.0


@dataclass(slots=True)
class Health:
    """What the probes answer from; `watch` keeps it up to date."""

    assignment: Assignment
    log: Log
    probe: LogProbe
    metrics: Metrics
    monotonic_s: Callable[[], float]
    _progress: dict[int, tuple[tuple[int, int] | None, float]] = field(default_factory=dict)
    _coordinator_seen_s: float = 0.0
    _looked_s: float = 0.0

    def problems(self) -> list[str]:
        """Say why the worker should be restarted; empty while it should not."""
        now_s = self.monotonic_s()
        found = []
        if now_s - self._looked_s > PATIENCE_S:
            found.append(f"the event loop has not looked around for {now_s - self._looked_s:.0f} s")
        held = any(task.held_by is not None for task in self.assignment)
        if now_s - self._coordinator_seen_s > PATIENCE_S and not held:
            found.append(f"no group coordinator for {now_s - self._coordinator_seen_s:.0f} s")
        for partition, (_, moved_s) in sorted(self._progress.items()):
            if now_s - moved_s > PATIENCE_S:
                still_s = now_s - moved_s
                found.append(
                    f"partition {partition} has records to read and stands still for {still_s:.0f} s"
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
        self._looked_s = self._coordinator_seen_s = self.monotonic_s()
        while True:
            self._looked_s = self.monotonic_s()
            if self.log.is_alive():
                self._coordinator_seen_s = self._looked_s
            tasks = list(self.assignment)
            self.metrics.partitions.set(sum(task.is_serving for task in tasks))
            for gone in self._progress.keys() - {task.partition for task in tasks}:
                del self._progress[gone]
                self.metrics.lag.remove(str(gone))
            await asyncio.gather(*map(self._look_at, tasks))
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look_at(self, task: PartitionTask) -> None:
        """Take note of a partition's lag and of when it last moved."""
        now_s, stood_at = self.monotonic_s(), task.progress
        before, moved_s = self._progress.get(task.partition, (None, now_s))
        try:
            end = (await asyncio.wait_for(self.probe.ends(task.partition), LOOK_EVERY_S)).end
        except (StreamAppError, TimeoutError):
            # Kafka does not tell; the coordinator's silence speaks for itself.
            end = None
        if end is not None and stood_at is not None:
            self.metrics.lag.labels(str(task.partition)).set(max(0, end - stood_at[0]))
        nothing_to_do = end is None or (stood_at is not None and stood_at[0] >= end)
        moves = stood_at != before or task.partition not in self._progress
        if moves or nothing_to_do or task.held_by is not None:
            moved_s = now_s
        self._progress[task.partition] = (stood_at, moved_s)


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
