"""How fast everything is folded again after Redis was emptied, beside how fast it was the first time.

    python -m tests.bench.rebuild --help

The same events, the same group: a worker folds the log to its end, `stream-app rebuild --yes` forgets what
Redis holds, and a worker folds the log again, this time calling what it says a replay. Both passes are timed
from a tenth of the events to the last of them, by the watermarks, so that the start of the process, its
imports and joining the group are no part of it; the whole time from the start of the first process to the end
of the last is beside it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

import click

from tests.backends import Names
from tests.bench import workload
from tests.bench.live import POLL_S, Stage, machine, note, send_all, shown, stage, table, user_of, watermarks
from tests.bench.measure import BROKERS, Broker
from tests.processes import Program, Programs

EVENTS, USERS = 1_000_000, 20_000
#: Of the events, before which more workers may still be joining.
WARM_SHARE: Final = 0.1
DEADLINE_S, DEADLINE_PER_EVENT_S = 120.0, 0.002
SUMMARY: Final = re.compile(r"folded (\d+) events, set (\d+) records aside, said (\d+) transitions")
FIRST, AGAIN = "first", "again"


def measure(
    broker: Broker = "apache",
    events: int = EVENTS,
    users: int = USERS,
    processes: int = 1,
    definitions: int = 200,
    *,
    model: bool = False,
    seed: int = 1,
) -> dict[str, Any]:
    """Fold the same events twice.

    Parameters
    ----------
    broker
        Which servers.
    events, users, definitions, seed
        Of the workload.
    processes
        Workers of the group.
    model
        Whether the next-category model is on.

    Returns
    -------
    dict
        Events/s and CPU of both passes, and the second's events/s over the first's.
    """
    names = Names.unique()
    lines = workload.Workload(events=events, users=users, seed=seed).lines()
    with ExitStack() as stack:
        run_on = stack.enter_context(stage(broker))
        tables = workload.definitions(definitions, seed=seed)
        segments, _ = workload.write_definitions(run_on.directory, tables)
        run_on.create_topics(names)
        environment = run_on.environment(names, WORKER__CLOCK="event", MODEL__ENABLED=model)
        programs = stack.enter_context(run_on.programs(environment | workload.weights_environment()))
        send_all(run_on, names.events, [user_of(line) for line in lines], lines)
        passes = {}
        for turn in (FIRST, AGAIN):
            if turn == AGAIN:
                note("stream-app rebuild --yes")
                programs.run("rebuild", "--yes", timeout_s=DEADLINE_S)
            passes[turn] = _pass(run_on, programs, str(segments), events, processes, turn)
    said = {turn: figures["transitions"] for turn, figures in passes.items()}
    if len(set(said.values())) != 1:
        raise click.ClickException(f"expected as many transitions the second time, got {said}")
    return {
        "broker": broker,
        "machine": machine(),
        "events": events,
        "users": users,
        "definitions": definitions,
        "processes": processes,
        "model": model,
        "passes": passes,
        "again_over_first": passes[AGAIN]["events_per_s"] / passes[FIRST]["events_per_s"],
    }


def _pass(
    run_on: Stage, programs: Programs, segments: str, events: int, processes: int, turn: str
) -> dict[str, Any]:
    begun = time.monotonic()
    workers = [
        programs.start("worker", "--until-end", f"--segments={segments}", name=f"{turn}-{n + 1}")
        for n in range(processes)
    ]
    moved: list[tuple[float, int, float]] = []
    with run_on.redis() as client, shown(f"folding, {turn}") as move:
        while not moved or moved[-1][1] < events:
            done = sum(watermarks(client))
            if done and (not moved or moved[-1][1] < done):
                moved.append((time.monotonic(), done, sum(run_on.cpu_s(workers).values())))
            move(done / events, done)
            _check(workers, begun, events)
            time.sleep(POLL_S)
    transitions = 0
    for worker in workers:
        status = worker.wait(DEADLINE_S)
        told = SUMMARY.search(worker.log)
        if status != 0 or told is None:
            raise click.ClickException(f"{worker.name} ended with {status}:\n{worker.log[-4000:]}")
        transitions += int(told[3])
    began_s = moved[0][0] - begun
    moved = [moment for moment in moved if moment[1] >= WARM_SHARE * events]
    if len(moved) < 2:
        raise click.ClickException(
            "expected several commits to take the time of, got one; ask for more --events"
        )
    (first_s, first, first_cpu), (last_s, last, last_cpu) = moved[0], moved[-1]
    return {
        "events_per_s": (last - first) / (last_s - first_s),
        "cpu_us_per_event": (last_cpu - first_cpu) / (last - first) * 1e6,
        "first_moved_s": began_s,
        "whole_s": time.monotonic() - begun,
        "transitions": transitions,
    }


def _check(workers: Sequence[Program], begun: float, events: int) -> None:
    ended = [worker for worker in workers if not worker.is_running and worker.process.returncode != 0]
    late_s = time.monotonic() - begun - DEADLINE_S - DEADLINE_PER_EVENT_S * events
    if ended or late_s > 0:
        what = f"{ended[0].name} ended" if ended else "the workers are not through within the deadline"
        raise click.ClickException(f"{what}:\n{(ended or workers)[0].log[-4000:]}")


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Say it for people."""
    rows: list[list[object]] = [
        ["pass", "events/s", "us CPU/event", "s to first commit", "s in all", "transitions"]
    ]
    for turn, figures in report["passes"].items():
        rows.append(
            [
                turn,
                round(figures["events_per_s"]),
                figures["cpu_us_per_event"],
                figures["first_moved_s"],
                figures["whole_s"],
                figures["transitions"],
            ]
        )
    return [
        f"{report['broker']}, {report['processes']} workers, model {'on' if report['model'] else 'off'}: "
        f"{report['events']:,} events of {report['users']:,} users, {report['definitions']} definitions",
        table(rows),
        f"again / first: {report['again_over_first']:.2f}",
    ]


@click.command(context_settings={"max_content_width": 110})
@click.option("--broker", type=click.Choice(BROKERS), default="apache", show_default=True, help="Servers.")
@click.option("--events", type=click.IntRange(5000), default=EVENTS, show_default=True, help="In the log.")
@click.option("--users", type=click.IntRange(1), default=USERS, show_default=True, help="Who act.")
@click.option("--definitions", type=click.IntRange(1), default=200, show_default=True, help="Base segments.")
@click.option("--processes", type=click.IntRange(1, 4), default=1, show_default=True, help="Workers.")
@click.option("--model/--no-model", default=False, show_default=True, help="The next-category model.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of events and definitions.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def main(
    broker: Broker,
    events: int,
    users: int,
    definitions: int,
    processes: int,
    seed: int,
    *,
    model: bool,
    as_json: bool,
) -> None:
    """Measure catching up after `stream-app rebuild` against the first pass over the same log.

    \b
      python -m tests.bench.rebuild
      python -m tests.bench.rebuild --events 60000
    """
    report = measure(broker, events, users, processes, definitions, model=model, seed=seed)
    click.echo(json.dumps(report) if as_json else "\n".join(report_lines(report)))


if __name__ == "__main__":
    main()
