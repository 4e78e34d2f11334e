"""What all verbs have in common: where the configuration is, and how results are printed.

Results go to stdout, as text or (with `--json`) as one JSON document; everything else goes to stderr. Exit
codes are decided in `stream_app.cli`.
"""

# ruff: noqa: PLC0415  (what is slow to import waits until the verb runs)

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from stream_app.settings import Settings

Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 wrong use or configuration."


def closing(*examples: str) -> str:
    """Return how the help of a verb ends: examples, one a line, and the exit codes."""
    return "\n".join(["\b", "Examples:", *(f"  {example}" for example in examples), "", EXIT_CODES])


def configured(command: Command) -> Command:
    """Give a verb `--config` and `--segments`, passed as `config` and `segments` (Path or None)."""
    for option, file, content in (
        ("--segments", "segments.toml", "the segment definitions"),
        ("--config", "app.toml", "everything else: addresses, topics, weights"),
    ):
        command = click.option(
            option,
            type=click.Path(path_type=Path),
            metavar="PATH",
            help=f"{file}, {content} (default: config/{file}).",
        )(command)
    return command


def json_output(command: Command) -> Command:
    """Give a verb the option `--json`, passed as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(command)


def read_settings(config: Path | None, segments: Path | None) -> Settings:
    """Load the configuration for a verb that talks to Kafka or Redis itself, and keep its libraries quiet.

    What those libraries log is said by this program's own error, in one sentence.

    Raises
    ------
    ConfigError
        With every problem.
    """
    from stream_app.settings import load_settings  # pydantic takes 0.2 s to import

    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    return load_settings(config, segments)


def print_json(document: object) -> None:
    """Print the one JSON document of a verb that was asked for `--json`."""
    click.echo(json.dumps(document, ensure_ascii=False, indent=2, allow_nan=False))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows as aligned columns, numbers to the right.

    Parameters
    ----------
    heads
        One per column.
    rows
        Cells; an int or float is aligned to the right.
    """
    texts = [list(heads), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in texts) for column in range(len(heads))]
    right = [bool(rows) and isinstance(rows[0][column], int | float) for column in range(len(heads))]
    for line in texts:
        cells = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def printable(text: str) -> str:
    r"""Return a text that came from outside in a form that cannot steer a terminal.

    Examples
    --------
    >>> printable("tea \x1b[2J")
    'tea \\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration_text(duration_ms: float) -> str:
    """Say a duration in at most two units.

    Parameters
    ----------
    duration_ms
        Milliseconds, not negative.

    Examples
    --------
    >>> duration_text(400), duration_text(90_000), duration_text(273_600_000)
    ('0.4 s', '1 min 30 s', '3 d 4 h')
    """
    if duration_ms < 60_000:
        return f"{duration_ms / 1000:.3g} s"
    rest = round(duration_ms / 1000)
    parts = []
    for name, seconds in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, seconds)
        if count:
            parts.append(f"{count} {name}")
        elif parts:
            break
    return " ".join(parts[:2])
