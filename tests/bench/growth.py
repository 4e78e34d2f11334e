"""Whether an event costs more where there are more definitions, more users, or more labels.

    python -m tests.bench.growth --help

One worker, model off; CPU per event of worker, broker and Redis together. What grows is the only thing that
differs between the points of a curve:

definitions
    The same events; an event touches the same definitions, since the additional ones name labels that no
    event carries.
users
    First one event of each user that names all labels of the user's taste: then all profiles exist, with the
    same number of labels, and only then is it measured. No threshold is as low as one event's weight, so that
    making the profiles says nothing.
labels
    The same users with as many labels each, from a larger vocabulary. There are definitions in proportion, so
    that an event touches as many.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from tests.bench.contestants import CONTESTANTS, Topic, run
from tests.bench.measure import BROKERS, BenchmarkError, Broker, Servers, open_servers, send, spread, steady
from tests.bench.report import growth_bars
from tests.bench.workload import MIN_WEIGHTS, Workload, definitions, write_definitions

DEFINITIONS: Final = (10, 100, 1_000, 10_000)
USERS: Final = (10_000, 100_000, 1_000_000)
LABELS: Final = (40, 300, 1_000)
EVENTS: Final = 200_000
ROUNDS: Final = 2
#: Labels of a user whose profile was made in advance.
WARM_TASTE: Final = 10
TOUCHED: Final = 10
BASE_DEFINITIONS: Final = 200
BASE_LABELS: Final = 300
#: Of the events that count: partitions do not all reach them at once.
FROM_SHARE, TO_SHARE = 0.25, 0.98

NOTES: Final = (
    "- definitions: an event touches the same ones everywhere; the others name labels that no event carries.",
    f"- users: all profiles exist before what is measured, each with {WARM_TASTE} labels.",
    "- labels: 40 of them a user at most; definitions in proportion, so that an event touches as many.",
)


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a curve: what was sent, and under which definitions."""

    curve: str
    size: int
    topic: Topic
    warm_events: int


def measure(
    broker: Broker = "apache",
    events: int = EVENTS,
    rounds: int = ROUNDS,
    sizes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 1,
    on_run: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure the curves, on servers of their own.

    Parameters
    ----------
    broker
        Which servers.
    events
        Of each run, beside those that make profiles.
    rounds
        Of all points.
    sizes
        By curve, ascending; default: `DEFINITIONS`, `USERS`, `LABELS`.
    seed
        Of the events.
    on_run
        Told what begins.

    Returns
    -------
    dict
        By curve its points, each with its figures and its ratio to the first point of the same round.
    """
    chosen = {"definitions": DEFINITIONS, "users": USERS, "labels": LABELS} if sizes is None else sizes
    with (
        tempfile.TemporaryDirectory(prefix="bench-growth-") as directory,
        open_servers(broker, Path(directory)) as servers,
    ):
        on_run("growth: sending the events")
        points = _points(servers, chosen, events, seed)
        found: dict[tuple[str, int], list[dict[str, float]]] = {}
        said: dict[tuple[str, int], float] = {}
        for turn in range(rounds):
            for number, point in enumerate(points[:: -1 if turn % 2 else 1]):
                on_run(
                    f"growth, round {turn + 1}/{rounds}, {number + 1}/{len(points)}: "
                    f"{point.size:,} {point.curve}"
                )
                figures, transitions = _run(servers, point, events)
                found.setdefault((point.curve, point.size), []).append(figures)
                said[point.curve, point.size] = transitions
    curves = {
        curve: [
            {
                "size": size,
                "figures": {
                    name: spread([f[name] for f in found[curve, size]]) for name in found[curve, size][0]
                },
                "ratio": spread(
                    [
                        mine["total"] / first["total"]
                        for mine, first in zip(found[curve, size], found[curve, of_curve[0]], strict=True)
                    ]
                ),
                "transitions_per_event": said[curve, size],
            }
            for size in of_curve
        ]
        for curve, of_curve in chosen.items()
    }
    report: dict[str, Any] = {"broker": broker, "events": events, "rounds": rounds, "curves": curves}
    return {**report, "bars": [bar.as_dict() for bar in growth_bars(report)], "notes": NOTES}


def _points(servers: Servers, sizes: Mapping[str, Sequence[int]], events: int, seed: int) -> list[Point]:
    points = []

    def add(curve: str, size: int, name: str, workload: Workload, tables: Sequence[dict[str, Any]]) -> None:
        directory = servers.directory / f"{curve}-{size}"
        directory.mkdir()
        segments, peers = write_definitions(directory, tables)
        topic = Topic(name, workload.total, segments, peers)
        points.append(Point(curve, size, topic, workload.warm_events))

    if of_curve := sizes.get("definitions"):
        same = Workload(events, labels=BASE_LABELS, seed=seed)
        send(servers, "definitions", same.lines())
        for size in of_curve:
            tables = definitions(TOUCHED, BASE_LABELS, seed, absent=size - TOUCHED)
            add("definitions", size, "definitions", same, tables)
    for size in sizes.get("users", ()):
        workload = Workload(
            events, users=size, labels=BASE_LABELS, seed=seed, warm_users=True, taste=WARM_TASTE
        )
        send(servers, f"users-{size}", workload.lines())
        tables = definitions(BASE_DEFINITIONS, BASE_LABELS, seed, min_weights=MIN_WEIGHTS[1:])
        add("users", size, f"users-{size}", workload, tables)
    for size in sizes.get("labels", ()):
        workload = Workload(events, labels=size, seed=seed)
        send(servers, f"labels-{size}", workload.lines())
        add(
            "labels",
            size,
            f"labels-{size}",
            workload,
            definitions(BASE_DEFINITIONS * size // BASE_LABELS, size, seed),
        )
    return points


def _run(servers: Servers, point: Point, events: int) -> tuple[dict[str, float], float]:
    """Run one worker; return its figures beyond what makes the profiles, and transitions per event."""
    outcome = run(CONTESTANTS["off-1"], servers, point.topic)
    begin = point.warm_events
    figures = steady(outcome.run, begin + int(FROM_SHARE * events), begin + int(TO_SHARE * events))
    if figures is None:
        raise BenchmarkError(
            f"growth, {point.size:,} {point.curve}: expected at least two samples among {events:,} events, "
            "got fewer: ask for more events"
        )
    return figures, (outcome.transitions or 0) / events


@click.command(context_settings={"max_content_width": 110})
@click.option("--broker", type=click.Choice(BROKERS), default="apache", show_default=True)
@click.option("--events", type=click.IntRange(10_000), default=EVENTS, show_default=True, help="Of each run.")
@click.option("--rounds", type=click.IntRange(1), default=ROUNDS, show_default=True, help="Of all points.")
@click.option("--curve", "only", type=click.Choice(["definitions", "users", "labels"]), help="Only this one.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of what is made up.")
def main(broker: Broker, events: int, rounds: int, only: str | None, seed: int) -> None:
    """Measure what an event costs as definitions, users and labels grow; print JSON."""
    sizes = {"definitions": DEFINITIONS, "users": USERS, "labels": LABELS}
    chosen = sizes if only is None else {only: sizes[only]}
    found = measure(broker, events, rounds, chosen, seed, lambda what: click.echo(what, err=True))
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
