"""How long a worker takes from the start of its process to the first event processed.

    python -m tests.bench.start --help

The topic holds events, the group is new and Redis is empty. An event counts as processed when its watermark
is in Redis, so profiles, indexes and outbox are too; when a consumer has the first transition stands beside
it. On the way: Python and the imports, checks of broker and store, joining the group, claims. On the embedded
broker a new group waits for half of the session timeout, whoever joins. Each start has topics and a group of
its own on servers that run already.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

import click

from tests.backends import Names
from tests.bench import workload
from tests.bench.live import (
    SESSION_TIMEOUT_S,
    START_DEADLINE_S,
    Stage,
    machine,
    note,
    receiving,
    send_all,
    stage,
    table,
    user_of,
    watermarks,
)
from tests.bench.measure import BROKERS, Broker

STARTS, EVENTS = 5, 2_000
LOOK_EVERY_S: Final = 0.005


def measure(
    brokers: Sequence[Broker] = BROKERS, starts: int = STARTS, events: int = EVENTS, *, model: bool = True
) -> dict[str, Any]:
    """Start workers and take the time.

    Parameters
    ----------
    brokers
        Which servers, one after the other.
    starts
        How many times on each.
    events
        In the topic at the start.
    model
        Whether the next-category model is on, as it is by default; without it, its packages are not imported.

    Returns
    -------
    dict
        By broker all times and their medians, seconds.
    """
    lines = workload.Workload(events=events, users=1_000).lines()
    found = {}
    for broker in brokers:
        with stage(broker) as run_on:
            runs = []
            for number in range(starts):
                note(f"{broker}: start {number + 1} of {starts}")
                runs.append(_start(run_on, lines, model=model))
        found[broker] = {
            "session_timeout_s": SESSION_TIMEOUT_S[broker],
            "runs": runs,
            "median": {key: statistics.median(run[key] for run in runs) for key in runs[0]},
        }
    return {"machine": machine(), "events": events, "starts": starts, "model": model, "brokers": found}


def _start(run_on: Stage, lines: Sequence[bytes], *, model: bool) -> dict[str, float]:
    names = Names.unique()
    segments, _ = workload.write_definitions(run_on.directory, workload.definitions(200))
    run_on.empty_store()
    run_on.create_topics(names)
    send_all(run_on, names.events, [user_of(line) for line in lines], lines)
    environment = run_on.environment(names, WORKER__CLOCK="event", MODEL__ENABLED=model)
    with ExitStack() as stack:
        programs = stack.enter_context(run_on.programs(environment | workload.weights_environment()))
        found, check = stack.enter_context(receiving(run_on, [names.entered]))
        client = stack.enter_context(run_on.redis())
        begun, begun_ns = time.monotonic(), time.time_ns()
        worker = programs.start("worker", f"--segments={segments}")
        processed_s: float | None = None
        while processed_s is None or not found:
            if processed_s is None and any(watermarks(client)):
                processed_s = time.monotonic() - begun
            if not worker.is_running or time.monotonic() - begun > START_DEADLINE_S:
                raise click.ClickException(
                    f"expected an event processed within {START_DEADLINE_S:g} s, got none:\n"
                    f"{worker.log[-4000:]}"
                )
            check()
            time.sleep(LOOK_EVERY_S)
    return {"processed_s": processed_s, "transition_s": (found[0].received_ns - begun_ns) / 1e9}


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Say it for people."""
    rows: list[list[object]] = [["seconds from the start", "median", "least", "most"]]
    for broker, figures in report["brokers"].items():
        for key, name in (("processed_s", "first event processed"), ("transition_s", "first transition had")):
            values = [run[key] for run in figures["runs"]]
            rows.append(
                [
                    f"{broker}, {name}",
                    *(f"{v:.2f}" for v in (figures["median"][key], min(values), max(values))),
                ]
            )
    return [f"{report['starts']} starts, model {'on' if report['model'] else 'off'}", table(rows)]


@click.command(context_settings={"max_content_width": 110})
@click.option(
    "--broker",
    "brokers",
    type=click.Choice(BROKERS),
    multiple=True,
    default=BROKERS,
    help="Servers; may be given twice. Default: both.",
)
@click.option("--starts", type=click.IntRange(1), default=STARTS, show_default=True, help="On each.")
@click.option("--events", type=click.IntRange(100), default=EVENTS, show_default=True, help="In the topic.")
@click.option("--model/--no-model", default=True, show_default=True, help="The next-category model.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def main(brokers: Sequence[Broker], starts: int, events: int, *, model: bool, as_json: bool) -> None:
    """Measure how soon `stream-app worker` processes its first event.

    \b
      python -m tests.bench.start
      python -m tests.bench.start --broker apache --starts 1
    """
    report = measure(brokers, starts, events, model=model)
    click.echo(json.dumps(report) if as_json else "\n".join(report_lines(report)))


if __name__ == "__main__":
    main()
