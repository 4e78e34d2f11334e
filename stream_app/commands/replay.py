"""`stream-app replay`: send files of events to the events topic.

Reading and keying is in `stream_app.adapters.event_lines`, batches and acknowledgements in
`stream_app.adapters.event_sender`; here they are joined, paced and shown.
"""

# ruff: noqa: N818, PLC0415  (errors are named as in stream_app.errors; slow imports wait until the verb runs)

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from stream_app.commands.options import (
    closing,
    configured,
    duration_text,
    json_output,
    print_json,
    read_settings,
)
from stream_app.errors import StreamAppError

if TYPE_CHECKING:
    from stream_app.adapters.event_lines import Block, Keyed, Keyer, Refusal, TimeOrder
    from stream_app.adapters.event_sender import EventSender
    from stream_app.settings import KafkaSettings

#: An event waits at most this long for others to share its batch.
LINGER_S: Final = 0.05
#: Blocks that are read ahead of sending.
READ_AHEAD: Final = 4

_PACE_S = 0.05
_SORTED_STEP = 5_000

#: Told the share of the work that is done (None if the input's size is unknown) and the events sent so far.
OnProgress = Callable[[float | None, int], None]


class ReplayInterrupted(StreamAppError):
    """Somebody pressed Ctrl-C."""

    def __init__(self) -> None:
        super().__init__(
            "to send the input to its end",
            "an interruption",
            "replay",
            "None if that was meant; what had been read is in the topic.",
        )


@dataclass(slots=True)
class Outcome:
    """What a replay did.

    Parameters
    ----------
    sent, acknowledged, refused
        Events; what was refused was not sent.
    seconds
        From the first read to the last acknowledgement.
    failure
        Why it broke off, if it did.
    """

    sent: int = 0
    acknowledged: int = 0
    refused: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    seconds: float = 0.0
    order: TimeOrder | None = None
    failure: StreamAppError | None = None

    @property
    def events_per_s(self) -> float:
        """Acknowledged events per second."""
        return self.acknowledged / self.seconds if self.seconds > 0 else 0.0


@click.command(
    epilog=closing(
        "stream-app replay events.jsonl.gz",
        "tail -f clicks.jsonl | stream-app replay -",
        "stream-app replay --sort january.jsonl february.jsonl --rate 5000",
    )
)
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE...",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="Send N events a second at most (default: as fast as Kafka takes them).",
)
@click.option(
    "--sort", is_flag=True, help="Send in the order of the events' timestamps; reads all into memory first."
)
@json_output
@configured
def replay(
    files: tuple[str, ...],
    rate: float | None,
    sort: bool,
    as_json: bool,
    config: Path | None,
    segments: Path | None,
) -> int:
    """Send files of events to the events topic.

    FILE is JSON, one event a line, gzipped or not; "-" is standard input. Each event goes to the partition
    of its user_id, byte for byte as it is; one without event_id gets "<file name>-<line number>"
    ("stdin-<line number>"), so that sending a file again adds nothing; two inputs of one name, and standard
    input that begins anew, give the same ids to other events, which are then taken for repeats: give events
    ids of their own there. Whether an event is valid is for the worker to say. Only a line without a
    readable user_id is refused here, since nobody knows which partition it belongs in; it is counted, and
    named at the end.

    Input far out of time order makes what follows late: a late event counts only what is left of it. How
    far the input goes back in time is said at the end; --sort sorts it.

    Exit code 0 means that every line was sent and acknowledged by Kafka.
    """
    from stream_app.adapters.event_lines import STDIN, input_bytes, input_name, read_blocks

    settings = read_settings(config, segments)
    for name, count in Counter(input_name(path) for path in set(files)).items():
        if count > 1:
            click.echo(
                f"{count} inputs are called {name}: lines of theirs without event_id get the same ids.",
                err=True,
            )
    if files.count(STDIN) > 1:
        raise click.UsageError("standard input can be read only once")
    if sort:
        click.echo("--sort: reading all of the input into memory before the first event is sent.", err=True)
    with progress_display("replay") as on_progress:
        outcome = asyncio.run(
            send_blocks(
                settings.kafka,
                read_blocks(files),
                input_bytes(files),
                rate=rate,
                sort=sort,
                on_progress=on_progress,
            )
        )
    if as_json:
        print_json(_document(outcome))
    else:
        _print_outcome(outcome, sort)
    for refusal in outcome.refusals:
        click.echo(f"refused {refusal.name}:{refusal.line}: {refusal.reason}", err=True)
    if outcome.refused > len(outcome.refusals):
        click.echo(f"refused {outcome.refused - len(outcome.refusals):,} more lines, not named", err=True)
    if outcome.failure is not None:
        raise outcome.failure
    return 0 if outcome.refused == 0 and outcome.acknowledged == outcome.sent else 1


async def send_blocks(
    kafka: KafkaSettings,
    blocks: Iterator[Block],
    total_bytes: int | None,
    *,
    rate: float | None = None,
    sort: bool = False,
    on_progress: OnProgress,
) -> Outcome:
    """Send everything that an input gives to the events topic.

    Parameters
    ----------
    kafka
        Where, and the topic's name.
    blocks
        The input; read in a thread of its own, a few blocks ahead.
    total_bytes
        Its size in the unit of `Block.position_bytes`; None if unknown.
    rate
        Events per second at most; None: no limit.
    sort
        Hold everything and send it in the order of timestamps. An event whose timestamp cannot be read stays
        behind the one before it.
    on_progress
        Called after every piece of work.

    Returns
    -------
    Outcome
        Also when it broke off, by cancellation too; then `failure` says why.

    Raises
    ------
    StreamAppError
        If it could not begin: no Kafka, no topic.
    """
    from stream_app.adapters.event_lines import MAX_LINE_BYTES, InputUnreadable, Keyer
    from stream_app.adapters.event_sender import BATCH_OVERHEAD_BYTES, EventSender
    from stream_app.adapters.kafka_admin import KafkaAdmin
    from stream_app.adapters.kafka_security import security_of

    topic = kafka.events_topic
    async with KafkaAdmin(kafka.bootstrap_servers, security=security_of(kafka)) as admin:
        partitions = await admin.partition_count(topic)
        topic_config = (await admin.topic_configs([topic])).get(topic, {})
    limit = int(topic_config.get("max.message.bytes", MAX_LINE_BYTES))
    keyer = Keyer(limit - BATCH_OVERHEAD_BYTES)
    outcome = Outcome(order=keyer.order, refusals=keyer.refusals)
    begin = time.monotonic()
    sender = EventSender(kafka.bootstrap_servers, topic, partitions, limit, security=security_of(kafka))
    try:
        async with sender:
            pace = _Pace(sender, rate)
            try:
                if sort:
                    await _send_sorted(pace, keyer, blocks, total_bytes, on_progress)
                else:
                    await _send_as_read(pace, keyer, blocks, total_bytes, on_progress)
            except InputUnreadable as error:
                outcome.failure = error
            except asyncio.CancelledError:
                # Ctrl-C is how `tail -f FILE | stream-app replay -` ends: what was read is still delivered.
                outcome.failure = ReplayInterrupted()
            await sender.finish()
    except StreamAppError as error:
        outcome.failure = error
    outcome.sent, outcome.acknowledged, outcome.refused = sender.sent, sender.acknowledged, keyer.refused
    outcome.seconds = time.monotonic() - begin
    return outcome


class _Pace:
    """Sends at a rate, or as fast as Kafka takes it."""

    def __init__(self, sender: EventSender, rate: float | None) -> None:
        self.sender = sender
        self._rate = rate
        self._begin = time.monotonic()
        self._flushed = self._begin

    async def send(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        if self._rate is None:
            await self.sender.send(keys, values)
            if time.monotonic() - self._flushed > LINGER_S:
                await self.flush()
            return
        step = max(1, round(self._rate * _PACE_S))
        for first in range(0, len(keys), step):
            due = self._begin + self.sender.sent / self._rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await self.sender.send(keys[first : first + step], values[first : first + step])
            await self.flush()

    async def flush(self) -> None:
        await self.sender.flush()
        self._flushed = time.monotonic()


async def _send_as_read(
    pace: _Pace, keyer: Keyer, blocks: Iterator[Block], total_bytes: int | None, on_progress: OnProgress
) -> None:
    async for block in _read_ahead(blocks):
        if block is None:  # nothing to read at the moment: let go what waits for company
            await pace.flush()
            continue
        keyed = keyer.key(block)
        await pace.send(keyed.keys, keyed.values)
        on_progress(block.position_bytes / total_bytes if total_bytes else None, pace.sender.sent)


async def _send_sorted(
    pace: _Pace, keyer: Keyer, blocks: Iterator[Block], total_bytes: int | None, on_progress: OnProgress
) -> None:
    records: list[tuple[int, bytes, bytes]] = []
    time_ms = 0
    async for block in _read_ahead(blocks):
        if block is None:
            continue
        keyed: Keyed = keyer.key(block)
        for key, value, own_ms in zip(keyed.keys, keyed.values, keyed.times_ms, strict=True):
            time_ms = time_ms if own_ms is None else own_ms
            records.append((time_ms, key, value))
    records.sort(key=lambda record: record[0])  # stable: equal instants stay in the order of the input
    for first in range(0, len(records), _SORTED_STEP):
        step = records[first : first + _SORTED_STEP]
        await pace.send([key for _, key, _ in step], [value for _, _, value in step])
        on_progress(pace.sender.sent / len(records), pace.sender.sent)


async def _read_ahead(blocks: Iterator[Block]) -> AsyncIterator[Block | None]:
    """Read in a thread; yield None whenever nothing came for a while.

    The thread is a daemon: nothing can wake one that waits for standard input.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Block | BaseException | None] = asyncio.Queue()
    room = threading.Semaphore(READ_AHEAD)

    def read() -> None:
        last: BaseException | None = None
        with suppress(RuntimeError):  # the loop is closed: nobody wants the rest
            try:
                for block in blocks:
                    loop.call_soon_threadsafe(queue.put_nowait, block)
                    room.acquire()
            except Exception as error:  # raised where it is awaited
                last = error
            loop.call_soon_threadsafe(queue.put_nowait, last)

    threading.Thread(target=read, name="replay input", daemon=True).start()
    while True:
        try:
            async with asyncio.timeout(LINGER_S):
                block = await queue.get()
        except TimeoutError:
            yield None
            block = await queue.get()
        if block is None:
            return
        if isinstance(block, BaseException):
            raise block
        room.release()
        yield block


def _print_outcome(outcome: Outcome, was_sorted: bool) -> None:
    click.echo(
        f"Sent {outcome.sent:,} events, {outcome.acknowledged:,} acknowledged, {outcome.refused:,} refused, "
        f"in {outcome.seconds:.1f} s ({outcome.events_per_s:,.0f} events/s)."
    )
    order = outcome.order
    if order is None or order.latest_ms is None:
        return
    if order.at is None:
        click.echo("The input is in time order.")
        return
    click.echo(
        f"The input goes back in time by up to {duration_text(order.largest_step_back_ms)} "
        f"({order.at[0]}:{order.at[1]}), in {order.late:,} events; "
        + ("it was sent in time order (--sort)." if was_sorted else "--sort sends it in time order.")
    )


def _document(outcome: Outcome) -> dict[str, Any]:
    order = outcome.order
    return {
        "sent": outcome.sent,
        "acknowledged": outcome.acknowledged,
        "refused": outcome.refused,
        "refusals": [asdict(refusal) for refusal in outcome.refusals],
        "seconds": round(outcome.seconds, 3),
        "events_per_s": round(outcome.events_per_s, 1),
        "late_events": order.late if order is not None else 0,
        "largest_step_back_ms": order.largest_step_back_ms if order is not None else 0,
        "largest_step_back_at": None if order is None or order.at is None else f"{order.at[0]}:{order.at[1]}",
        "failure": None if outcome.failure is None else str(outcome.failure),
    }


def progress_display(name: str) -> AbstractContextManager[OnProgress]:
    """Show progress on stderr: a bar on a terminal, a line every few seconds elsewhere.

    Parameters
    ----------
    name
        The verb.
    """
    from stream_app.commands.progress import bar, lines  # rich takes 0.1 s to import

    return bar(name) if click.get_text_stream("stderr").isatty() else lines(name)
