"""What the demo shows: a screen on a terminal, a few dozen plain lines elsewhere.

`Board` is what is known, fed by `stream_app.commands.demo` from the two output topics and from what Redis
says; drawing it is all that the rest of this module does.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

#: The screen keeps the last of them in sight; plain output prints the first of each status and cause.
SHOWN_TRANSITIONS: Final = 8
SHOWN_OF_A_KIND: Final = 3
#: Plain output: seconds between status lines, doubled after every few of them so that a long run stays short.
LINE_EVERY_S: Final = 3.0
LINES_BEFORE_SLOWER: Final = 6

_DRAW_EVERY_S = 0.25


@dataclass(slots=True)
class Board:
    """Everything the demo knows, as seen from outside of the worker.

    Parameters
    ----------
    segments
        Segment ids, in the order in which they are shown.
    stage
        What is going on, in words.
    sent, share_sent
        Events replayed so far, and the share of all (None if unknown).
    folded
        Events that the worker is done with: the watermarks in Redis, summed.
    stream_time_ms
        Where the events' clock stands; None before the first event.
    unfinished
        Messages that the worker has yet to publish, and partitions with exits that are due; None: not
        looked yet.
    accuracy
        How good the model's last predictions were, by task; see `stream_app.lookup`. Empty before the first.
    """

    segments: Sequence[str]
    stage: str = "starting"
    sent: int = 0
    share_sent: float | None = None
    folded: int = 0
    stream_time_ms: int | None = None
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    kinds: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    discoveries: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    last: deque[str] = field(default_factory=lambda: deque(maxlen=SHOWN_TRANSITIONS))
    transitions: int = 0
    unfinished: int | None = None
    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    began_s: float = field(default_factory=time.monotonic)
    folding_since_s: float | None = None
    finished_s: float | None = None

    def see(self, transition: Mapping[str, Any]) -> None:
        """Take note of one transition, as published."""
        status, segment_id, cause = transition["status"], transition["segment_id"], transition["cause"]
        self.counts[segment_id, status, cause] += 1
        self.transitions += 1
        until = f", until {transition['exits_at'][:16]}" if transition["exits_at"] else ""
        sign = "+" if status == "entered" else "-"
        line = (
            f"{transition['time'][:16].replace('T', ' ')}  {sign} {transition['user_id']} {status} "
            f"{segment_id} ({cause}, weight {transition['weight']:.2f}{until.replace('T', ' ')}"
            f"{_expectation(transition)})"
        )
        if transition.get("converted") is not None:
            self.discoveries["converted" if transition["converted"] else "left"] += 1
        self.last.append(line)
        kind = (status, cause, transition["segment_type"])
        self.kinds[kind] += 1
        if self.kinds[kind] <= SHOWN_OF_A_KIND:
            self.first.append(line)

    def progress(self, *, joined: bool, folded: int, stream_time_ms: int | None, unfinished: int) -> None:
        """Take note of whether the worker has joined, and how far it is."""
        if joined and self.sent and self.folding_since_s is None:
            self.folding_since_s = time.monotonic()
        self.folded, self.stream_time_ms, self.unfinished = folded, stream_time_ms, unfinished

    def count(self, segment_id: str, status: str, cause: str | None = None) -> int:
        """Count transitions of one segment."""
        return sum(
            number
            for (segment, its_status, its_cause), number in self.counts.items()
            if segment == segment_id and its_status == status and cause in (None, its_cause)
        )

    def members(self, segment_id: str) -> int:
        """Count who is in now."""
        return self.count(segment_id, "entered") - self.count(segment_id, "exited")

    @property
    def lag(self) -> int:
        """Events sent and not folded yet."""
        return max(0, self.sent - self.folded)

    @property
    def share_folded(self) -> float | None:
        """How much of all events is folded, from 0 to 1; None if it is unknown how many there are."""
        return self.share_sent * self.folded / self.sent if self.share_sent and self.sent else None

    @property
    def folding_s(self) -> float:
        """Seconds since the worker had joined and found events, until all was done."""
        if self.folding_since_s is None:
            return 0.0
        return (self.finished_s or time.monotonic()) - self.folding_since_s

    @property
    def events_per_s(self) -> float:
        """Events folded per second."""
        return self.folded / self.folding_s if self.folding_s > 0 else 0.0

    @property
    def clock(self) -> str:
        """Where the sample's clock stands, as a date."""
        if self.stream_time_ms is None:
            return "-"
        return time.strftime("%Y-%m-%d", time.gmtime(self.stream_time_ms / 1000))

    def rows(self) -> list[Sequence[str | int]]:
        """Give one row per segment: id, members, enters by cause, exits by cause."""
        return [
            (
                segment_id,
                self.members(segment_id),
                *(
                    self.count(segment_id, status, cause)
                    for status in ("entered", "exited")
                    for cause in CAUSES
                ),
            )
            for segment_id in self.segments
        ]


def _expectation(transition: Mapping[str, Any]) -> str:
    """Say what a discovery transition is about: what is expected of the user, or whether he did it."""
    prediction = transition.get("prediction")
    if prediction is not None:
        return f", next: {prediction['label']}"
    return ", converted" if transition.get("converted") else ""


def accuracy_text(accuracy: Mapping[str, Mapping[str, float]]) -> str:
    """Say in one line how good the last predictions of a first engagement were.

    Examples
    --------
    >>> figures = {"examples": 900, "hit@1": 0.05, "hit@10": 0.3, "mrr": 0.12, "popularity_mrr": 0.1}
    >>> accuracy_text({"discovery": figures})
    'last 900 first engagements: hit@1 5.0 %, hit@10 30.0 %, MRR 0.120 (by popularity alone 0.100)'
    """
    figures = accuracy.get("discovery", {})
    if not figures.get("examples"):
        return "no first engagements predicted yet"
    return (
        f"last {figures['examples']:,.0f} first engagements: hit@1 {figures['hit@1']:.1%}, "
        f"hit@10 {figures['hit@10']:.1%}, MRR {figures['mrr']:.3f} "
        f"(by popularity alone {figures['popularity_mrr']:.3f})"
    ).replace("%", " %")


CAUSES: Final = ("event", "decay", "model")
COLUMNS: Final = ("segment", "members", "entered: event", "decay", "model", "exited: event", "decay", "model")


class Display(Protocol):
    """What shows a board as it changes."""

    def refresh(self) -> None:
        """Show the board as it is now, if it is time."""


@contextmanager
def display(board: Board, console: Console) -> Iterator[Display]:
    """Show a board while the body runs: live on a terminal, else as lines."""
    if not console.is_terminal:
        lines = _Lines(board, console)
        yield lines
        lines.refresh()
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield _Screen(board, live)


class _Screen:
    def __init__(self, board: Board, live: Live) -> None:
        self._board = board
        self._live = live
        self._drawn_s = 0.0

    def refresh(self) -> None:
        now = time.monotonic()
        if now - self._drawn_s >= _DRAW_EVERY_S:
            self._drawn_s = now
            self._live.update(draw(self._board), refresh=True)


class _Lines:
    def __init__(self, board: Board, console: Console) -> None:
        self._board = board
        self._console = console
        self._stage = ""
        self._shown = 0
        self._lines = 0
        self._next_s = time.monotonic() + LINE_EVERY_S

    def refresh(self) -> None:
        board = self._board
        if board.stage != self._stage:
            self._stage = board.stage
            self._print(f"{board.stage} ...")
        for line in board.first[self._shown :]:
            self._print(line)
        self._shown = len(board.first)
        if board.sent and time.monotonic() >= self._next_s:
            self._lines += 1
            self._next_s = time.monotonic() + LINE_EVERY_S * 2 ** (self._lines // LINES_BEFORE_SLOWER)
            self._print(
                f"{board.clock}: {board.sent:,} events sent, {board.folded:,} folded "
                f"({board.events_per_s:,.0f}/s), {board.transitions:,} transitions"
            )
            if board.accuracy:
                self._print(f"model, {accuracy_text(board.accuracy)}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def draw(board: Board) -> Panel:
    """Draw a board.

    Parameters
    ----------
    board
        As it is now.

    Returns
    -------
    rich.panel.Panel
        Fits 100 columns.
    """
    numbers = Text.assemble(
        (f"{board.clock}   ", "bold cyan"),
        f"sent {board.sent:,}   folded {board.folded:,}   lag {board.lag:,}   ",
        (f"{board.events_per_s:,.0f} events/s   ", "green"),
        f"transitions {board.transitions:,}   {time.monotonic() - board.began_s:.0f} s",
    )
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in board.rows():
        table.add_row(
            *(str(cell) if isinstance(cell, str) else f"{cell:,}" for cell in row),
            style="" if any(row[1:]) else "dim",
        )
    last = Text()
    for line in board.last:
        last.append(line + "\n", style="green" if "  + " in line else "red")
    bar = Table.grid(expand=True)  # a bar by itself does not end its line
    bar.add_row(ProgressBar(total=1.0, completed=board.share_folded or 0.0, pulse=board.share_folded is None))
    model = Text(f"model, {accuracy_text(board.accuracy)}" if board.accuracy else "", style="magenta")
    return Panel(
        Group(numbers, bar, table, model, Text(), last),
        title=f"stream-app demo: {board.stage}",
        title_align="left",
    )
