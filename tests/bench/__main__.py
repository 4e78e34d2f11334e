"""`python -m tests.bench`: every contestant over the same events, in rounds, and a report of what came out.

In this order: events are made up and sent once; each contestant is checked against the naive oracle over few
events, and is not timed where it fails; then, in rounds, all of them in shuffled order; then what is not a
race (latency, exits, memory, ...), and how the cost grows. What a part of it cannot have on this machine is
said in the report, and the rest goes on.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, Final

import click

from stream_app.errors import StreamAppError
from tests.backends import ROOT, ServiceMissing
from tests.bench import growth as growing
from tests.bench import report as reporting
from tests.bench.contestants import (
    BLOB_BYTES,
    CONTESTANTS,
    Contestant,
    Topic,
    check,
    middle_users,
    run,
    shuffled,
)
from tests.bench.judge import Judge, Judgement
from tests.bench.measure import BROKERS, BenchmarkError, Broker, Run, Servers, open_servers, send, steady
from tests.bench.peers import PeerMissing
from tests.bench.report import EARLY, LATE, OWN
from tests.bench.workload import SPAN_S, Workload, definitions, write_definitions

DEFAULT_OUT: Final = ROOT / ".cache" / "bench"
EVENTS: Final = 2_000_000
ROUNDS: Final = 3
CHECKED_EVENTS, CHECKED_USERS = 10_000, 1_000
#: Windows by shares of all events: after 400,000 and after 1,600,000 of two million. Who gets fewer events
#: has one of its own, by shares of those.
WINDOWS: Final = {EARLY: (0.2, 0.392), LATE: (0.8, 0.98)}
OWN_WINDOW: Final = (0.5, 0.98)
LEAST_EVENTS: Final = 5_000
#: Whose profiles give the limit the size of its blobs.
SIZED: Final = ("off-1", "off-2", "off-2-aof")
#: On the embedded broker, which no installation of size runs on, fewer take part by default.
EMBEDDED_DEFAULT: Final = ("off-1", "off-2", "on-2", "plain", "limit-2")
EMBEDDED_ROUNDS: Final = 1
QUICK_DEFAULT: Final = {
    "apache": ("off-2", "on-2", "plain", "quix-1", "kafka-streams", "limit-2"),
    "embedded": ("off-2", "plain"),
}

#: What is no race: module of this package, title, and arguments of its `measure` (default, then --quick).
EXTRAS: Final[Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "latency": (
        "From event to transition",
        {"warm_s": 30.0, "seconds": 20.0},
        {"warm_s": 3.0, "seconds": 5.0, "contestants": ("model off",)},
    ),
    "exits": ("Exits by decay", {}, {"users": 10_000, "spread_s": 6.0}),
    "memory": ("Memory", {}, {"labels": (5, 20), "users": 300, "worker_users": ()}),
    "commit_block": ("How long a commit blocks Redis", {}, {"events": 40_000, "seconds": 3.0}),
    "rebuild": ("Catching up after Redis is lost", {}, {"events": 100_000}),
    "start": ("From start to first event", {}, {"starts": 1}),
}
QUICK_GROWTH: Final = {"definitions": (10, 10_000), "users": (10_000, 100_000), "labels": (40, 1_000)}
#: What a part of the benchmark may lack or run into; the rest goes on.
EXPECTED: Final = (BenchmarkError, PeerMissing, ServiceMissing, StreamAppError, click.ClickException)


@click.command(
    context_settings={"max_content_width": 110},
    epilog="""\b
Examples:
  python -m tests.bench --quick
  python -m tests.bench --contestants off-2,limit-2 --skip all --broker apache
  python -m tests.bench --json > bench.json
""",
)
@click.option(
    "--broker",
    type=click.Choice([*BROKERS, "both"]),
    default="both",
    show_default=True,
    help="apache: Apache Kafka on the machine's Java with the redis-server of the PATH; embedded: Tansu and "
    "Valkey.",
)
@click.option(
    "--events",
    type=click.IntRange(10_000),
    default=EVENTS,
    show_default=True,
    help="Of the longest run; each contestant gets its share, the first of them.",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=ROUNDS, show_default=True, help="Of all contestants."
)
@click.option(
    "--contestants",
    metavar="A,B",
    help=f"Only these: {', '.join(CONTESTANTS)} (default: all; embedded: {', '.join(EMBEDDED_DEFAULT)}).",
)
@click.option(
    "--users", type=click.IntRange(100), default=20_000, show_default=True, help="Some come more often."
)
@click.option(
    "--labels",
    type=click.IntRange(3),
    default=300,
    show_default=True,
    help="Of all events, popular as 1/rank^0.7; a user has a taste of 40 at most.",
)
@click.option(
    "--definitions",
    "count",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Base segments of one to three labels each.",
)
@click.option("--with-assets", is_flag=True, help="Events also name assets, which only this service keeps.")
@click.option(
    "--skip",
    metavar="A,B",
    default="",
    help=f"Leave out of: {', '.join(EXTRAS)}, growth; or all of these.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="A tenth of the events, one round, fewer contestants, short extras: about 4 minutes.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of what is made up, and of the order.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_OUT,
    help="Where report.json, README.md and the pictures go (default: .cache/bench).",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout instead of the table.")
@click.pass_context
def main(
    context: click.Context,
    broker: str,
    events: int,
    rounds: int,
    contestants: str | None,
    users: int,
    labels: int,
    count: int,
    with_assets: bool,
    skip: str,
    quick: bool,
    seed: int,
    out: Path,
    as_json: bool,
) -> None:
    """Run this service and its peers on the same events; print a table, write a report.

    Everything is started here, on free ports of the loopback address, and ended: brokers, stores,
    contestants. The table goes to stdout, what runs now to stderr. The default takes about 45 minutes on two
    cores.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Not the default, which leaves temporary directories behind.
        signal.signal(number, lambda signum, _: sys.exit(128 + signum))
    # The embedded broker has no idempotent producers, which aiokafka says at length.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    if quick:
        given = click.core.ParameterSource.DEFAULT
        events = events if context.get_parameter_source("events") != given else EVENTS // 10
        rounds = rounds if context.get_parameter_source("rounds") != given else 1
    skipped = chosen_names(skip, [*EXTRAS, "growth"], "--skip", all_of_them=True)
    brokers: Sequence[Broker] = BROKERS if broker == "both" else [b for b in BROKERS if b == broker]
    workload = Workload(events, users, labels, seed, with_assets)
    tables = definitions(count, labels, seed)
    begun_s = time.monotonic()
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "tests.bench", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": reporting.machine(),
        "versions": reporting.versions(),
        "settings": {
            "events": events,
            "users": users,
            "labels": labels,
            "definitions": count,
            "rounds": rounds,
            "seed": seed,
            "with_assets": with_assets,
            "span_days": SPAN_S / 86_400,
        },
        "windows_text": windows_text(events),
        "brokers": {},
        "extras": {},
    }
    with showing() as show:
        show("making the events up", None)
        lines = workload.lines()
        for kind in brokers:
            keys = (
                chosen_names(contestants, CONTESTANTS, "--contestants")
                if contestants is not None
                else default_names(kind, quick=quick)
            )
            taking_part = [CONTESTANTS[key] for key in keys if kind in CONTESTANTS[key].brokers]
            turns = rounds if kind == brokers[0] else min(rounds, EMBEDDED_ROUNDS)
            report["brokers"][kind] = race(kind, taking_part, lines, tables, turns, seed, show)
    del lines
    for name, (title, usual, short) in EXTRAS.items():
        if name not in skipped:
            report["extras"][name] = extra(name, title, brokers[0], short if quick else usual)
    if "growth" not in skipped:
        with showing() as show:
            report["growth"] = growing.measure(
                brokers[0],
                growing.EVENTS // 4 if quick else growing.EVENTS,
                1 if quick else growing.ROUNDS,
                QUICK_GROWTH if quick else None,
                seed,
                lambda what: show(what, None),
            )
    report["extra_bars"] = [bar.as_dict() for bar in reporting.extra_bars(report["extras"])]
    report["load_at_end"] = os.getloadavg()
    report["took_s"] = time.monotonic() - begun_s
    written = reporting.write(report, out)
    click.echo(json.dumps(report) if as_json else "\n".join(reporting.lines(report)))
    for path in written:
        click.echo(f"written: {path}", err=True)


def chosen_names(
    text: str, known: Sequence[str] | Mapping[str, Any], option: str, *, all_of_them: bool = False
) -> list[str]:
    """Read names with commas between them.

    Examples
    --------
    >>> chosen_names("b,a", ["a", "b", "c"], "--skip")
    ['b', 'a']
    >>> chosen_names("all", ["a", "b"], "--skip", all_of_them=True)
    ['a', 'b']
    """
    if all_of_them and text == "all":
        return list(known)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return names


def default_names(broker: Broker, *, quick: bool) -> list[str]:
    """Return who takes part where nothing is said."""
    if quick:
        return list(QUICK_DEFAULT[broker])
    return list(CONTESTANTS if broker == "apache" else EMBEDDED_DEFAULT)


def windows_text(events: int) -> str:
    """Say which events the figures are taken between."""
    early, late = ([int(share * events) for share in WINDOWS[name]] for name in (EARLY, LATE))
    return (
        f"events {early[0]:,} to {early[1]:,} and {late[0]:,} to {late[1]:,} for who gets that many; else "
        f"{OWN_WINDOW[0]:.0%} to {OWN_WINDOW[1]:.0%} of the contestant's own events, which are the first "
        "ones, with the smallest profiles: that is in its favour."
    )


# --- the race ----------------------------------------------------------------------------------------------

Show = Callable[[str, float | None], None]


def race(
    broker: Broker,
    contestants: Sequence[Contestant],
    lines: Sequence[bytes],
    tables: Sequence[dict[str, Any]],
    rounds: int,
    seed: int,
    show: Show,
) -> dict[str, Any]:
    """Check all contestants on one kind of servers, then time them in rounds."""
    found: dict[str, Any] = {
        "titles": {c.key: c.title for c in contestants},
        "notes": {c.key: c.notes for c in contestants},
        "checks": {},
        "problems": {},
        "profile_bytes": {},
        "rounds": [],
    }
    appendonly = any(c.store == "appendonly" for c in contestants)
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        try:
            with open_servers(broker, Path(directory), appendonly=appendonly) as servers:
                _race(servers, contestants, lines, tables, rounds, seed, show, found)
        except (ServiceMissing, StreamAppError) as exc:
            found["problems"] |= {c.key: str(exc) for c in contestants}
    found["summary"] = reporting.summarise(found["rounds"])
    # In the order of the table, whatever the order of the runs.
    found["summary"] = {c.key: found["summary"][c.key] for c in contestants if c.key in found["summary"]}
    found["ratios"] = reporting.ratios(found["rounds"])
    # What was not measured for a fault stands among the problems; what was not asked for, nowhere.
    found["bars"] = [bar.as_dict() for bar in reporting.bars(found) if bar.value is not None]
    return found


def _race(
    servers: Servers,
    contestants: Sequence[Contestant],
    lines: Sequence[bytes],
    tables: Sequence[dict[str, Any]],
    rounds: int,
    seed: int,
    show: Show,
    found: dict[str, Any],
) -> None:
    segments, peers = write_definitions(servers.directory, tables)
    show(f"{servers.broker}: sending the events", None)
    # Who needs fewer events reads a topic with the first of them only: `--until-end` reads to the end.
    sizes = {
        c.key: min(len(lines), max(LEAST_EVENTS * c.processes, int(c.share * len(lines))))
        for c in contestants
    }
    topics = {}
    for size in sorted(set(sizes.values())):
        part = lines[:size]
        send(servers, f"events-{size}", part)
        topics[size] = Topic(f"events-{size}", size, segments, peers, middle_users(part))
    few = Workload(CHECKED_EVENTS, CHECKED_USERS, seed=seed)
    send(servers, "checked", few.lines())
    checked = Topic("checked", CHECKED_EVENTS, segments, peers)
    show(f"{servers.broker}: the oracle judges {CHECKED_EVENTS:,} events", None)
    judge = Judge(servers.kafka.address, checked.name, tables)
    well = []
    for number, contestant in enumerate(contestants):
        show(f"{servers.broker}: checking {contestant.title}", number / len(contestants))
        try:
            judgement = check(contestant, servers, checked, judge)
        except EXPECTED as exc:
            judgement = Judgement(0, 0, 0, str(exc))
        found["checks"][contestant.key] = {**asdict(judgement), "judged": contestant.judged}
        if judgement.problem:
            found["problems"][contestant.key] = judgement.problem
        else:
            well.append(contestant)
    blob_bytes: dict[int, int] = found["profile_bytes"]
    total, done = rounds * len(well), 0
    for turn in range(rounds):
        figures: dict[str, Any] = {}
        order = shuffled(well, seed, turn)
        if turn == 0:
            # The limit stores blobs of the size of the service's profiles: those must have been seen.
            order.sort(key=lambda contestant: contestant.judged == "not")
        for contestant in order:
            topic = topics[sizes[contestant.key]]
            what = f"{servers.broker}, round {turn + 1}/{rounds}: {contestant.title}"
            base = done / total

            def on_progress(
                events: int, what: str = what, base: float = base, all_of_it: int = topic.events
            ) -> None:
                show(f"{what}, {events:,} of {all_of_it:,} events", base + events / all_of_it / total)

            on_progress(0)
            try:
                size = blob_bytes.get(topic.events, BLOB_BYTES)
                outcome = run(contestant, servers, topic, size, on_progress)
            except EXPECTED as exc:
                found["problems"].setdefault(contestant.key, str(exc))
                continue
            finally:
                done += 1
            if contestant.key in SIZED and outcome.profile_bytes:
                blob_bytes[topic.events] = outcome.profile_bytes
            if outcome.transitions is not None and contestant.processes == 1:
                found["transitions_per_event"] = outcome.transitions / topic.events
            figures[contestant.key] = {
                "windows": windows(outcome.run, topic.events, len(lines)),
                "wall_s": outcome.run.wall_s,
                "events": topic.events,
                "transitions": outcome.transitions,
                "load": os.getloadavg()[0],
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        found["rounds"].append(figures)


def windows(found: Run, events: int, longest: int) -> dict[str, dict[str, float]]:
    """Take a run's figures from the windows of the longest run that it reaches; else from its own."""
    shares = {name: window for name, window in WINDOWS.items() if window[1] * longest <= events}
    of = longest
    if not shares:
        shares, of = {OWN: OWN_WINDOW}, events
    taken = {name: steady(found, int(begin * of), int(end * of)) for name, (begin, end) in shares.items()}
    return {name: figures for name, figures in taken.items() if figures is not None}


def extra(name: str, title: str, broker: Broker, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Let another module of this package measure, on servers of its own."""
    click.echo(f"{title} (tests.bench.{name})", err=True)
    try:
        module = import_module(f"tests.bench.{name}")
        servers = {"broker": broker} if "broker" in signature(module.measure).parameters else {}
        figures = module.measure(**servers, **arguments)
        return {"title": title, "figures": figures, "lines": list(module.report_lines(figures))}
    except (*EXPECTED, AssertionError) as exc:
        return {"title": title, "problem": str(exc)}


# --- what runs now -----------------------------------------------------------------------------------------


@contextmanager
def showing() -> Iterator[Show]:
    """Say on stderr what runs now: a bar on a terminal, else a line for each new thing."""
    # Imported here: what is slow to import waits until something is shown.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    console = Console(stderr=True)
    if not console.is_terminal:
        said = ""

        def say(what: str, share: float | None) -> None:
            nonlocal said
            if (begin := what.partition(",")[0] + what.partition(":")[2].partition(",")[0]) != said:
                said = begin
                click.echo(what if share is None else f"[{share:4.0%}] {what}", err=True)

        yield say
        return
    columns = (BarColumn(30), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)

        def move(what: str, share: float | None) -> None:
            total = None if share is None else 1.0
            progress.update(task, description=what, total=total, completed=share or 0.0)

        yield move


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
