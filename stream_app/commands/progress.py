"""Progress on stderr: a bar on a terminal, and plain lines, few of them, in a log."""

# ruff: noqa: PLC0415  (what is slow to import waits until something is shown)

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

LINE_EVERY_S = 5.0
_DRAW_EVERY_S = 0.1


@contextmanager
def bar(name: str, unit: str = "events") -> Iterator[Callable[[float | None, int], None]]:
    """Draw a bar with events, rate and time left; the yielded function moves it.

    Parameters
    ----------
    name
        What is going on.
    unit
        What is counted.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.fields[events]:>12,}} {unit}"),
        TextColumn("{task.fields[rate]:>9,.0f}/s"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", style="progress.remaining"),
    )
    begin = drawn = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=10) as progress:
        task = progress.add_task(name, total=None, events=0, rate=0.0, left="")

        def move(share: float | None, events: int) -> None:
            nonlocal drawn
            now = time.monotonic()
            if now - drawn < _DRAW_EVERY_S and share != 1.0:
                return
            drawn = now
            total = None if share is None else 1.0
            progress.update(
                task,
                total=total,
                completed=share or 0.0,
                events=events,
                rate=events / max(now - begin, 1e-9),
                left=_time_left(share, now - begin),
            )

        yield move


@contextmanager
def lines(name: str, unit: str = "events") -> Iterator[Callable[[float | None, int], None]]:
    """Print a line every few seconds; the yielded function takes note of where things stand.

    Parameters
    ----------
    name
        What is going on.
    unit
        What is counted.
    """
    begin = printed = time.monotonic()

    def note(share: float | None, events: int) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed < LINE_EVERY_S:
            return
        printed = now
        done = "" if share is None else f", {share:.0%}, {_time_left(share, now - begin)}"
        click.echo(f"{name}: {events:,} {unit}, {events / (now - begin):,.0f}/s{done}", err=True)

    yield note


def _time_left(share: float | None, elapsed_s: float) -> str:
    if not share:
        return "time left unknown"
    left_s = round(elapsed_s * (1.0 - share) / share)
    return f"{left_s // 60}:{left_s % 60:02d} left"
