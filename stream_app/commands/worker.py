"""`stream-app worker`: keep profiles and publish transitions. What it does is in `stream_app.app`."""

# ruff: noqa: PLC0415  (what is slow to import waits until the verb runs)

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Final

import click

from stream_app.commands.options import closing, configured
from stream_app.commands.processes import run_together
from stream_app.errors import StreamAppError

MOST_PROCESSES: Final = 64
PORT_SETTING: Final = "STREAM_APP__WORKER__HTTP_PORT"


@click.command(
    epilog=closing(
        "stream-app worker",
        "stream-app worker --processes 4     (one for each core)",
        "stream-app worker --until-end       (a backfill, a test)",
    )
)
@click.option(
    "--until-end",
    is_flag=True,
    help="Stop when everything that is in the topic now has been folded and published.",
)
@click.option(
    "--accept-gap",
    is_flag=True,
    help="Go on although the log no longer holds what comes next; what is lost stays lost.",
)
@click.option(
    "--unchecked", is_flag=True, help="Start although Redis does not tell its eviction policy or its role."
)
@click.option(
    "--processes",
    type=click.IntRange(1, MOST_PROCESSES),
    default=1,
    show_default=True,
    help="Run so many workers; more than partitions or cores are of no use. When one fails, all "
    "end. The second and later ones listen on the ports after worker.http_port.",
)
@configured
def worker(
    until_end: bool,
    accept_gap: bool,
    unchecked: bool,
    processes: int,
    config: Path | None,
    segments: Path | None,
) -> None:
    """Fold events into profiles; publish who enters and leaves.

    Runs until SIGTERM or Ctrl-C: then it finishes what it has begun, within worker.drain_deadline_s. Start as
    many as the events topic has partitions; they share the work, and one that dies is replaced by the others
    (with --processes all end together, to be started again).
    Nothing is lost either way: a new worker goes on where Redis says that the last one stood.

    What was in the topic before this service's first worker is history: with the wall clock the transitions
    of these records say `"replayed": true`, so that no campaign acts on them.

    It refuses to start on anything that would break its promises, with what to do; `stream-app topics`
    creates the topics that it needs.
    """
    from stream_app.settings import load_settings

    settings = load_settings(config, segments)
    if processes > 1:
        flags = {"--until-end": until_end, "--accept-gap": accept_gap, "--unchecked": unchecked}
        options = [flag for flag, given in flags.items() if given]
        options += [f"--config={config}"] if config else []
        options += [f"--segments={segments}"] if segments else []
        port = settings.worker.http_port
        sys.exit(
            run_together(
                [sys.executable, "-m", "stream_app", "worker", *options],
                [{PORT_SETTING: str(port + number if port else 0)} for number in range(processes)],
            )
        )
    from stream_app.app import run_worker  # Faust takes a second to import

    _log_to_stderr()
    run_worker(settings, until_end=until_end, accept_gap=accept_gap, unchecked=unchecked)


def _log_to_stderr() -> None:
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("stream_app").setLevel(logging.INFO)
    # aiokafka logs every attempt to reach a broker that is gone; what matters is said by who waits for it.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    # Faust logs the life of its services under the name of the module that subclasses them.
    logging.getLogger("stream_app.adapters.transport").setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_told_at_the_end)


def _told_at_the_end(record: logging.LogRecord) -> bool:
    """Keep what Faust logs of our own failures off the log: each ends the process, which says it once."""
    exc = record.exc_info[1] if record.exc_info else None
    return not isinstance(exc, StreamAppError)
