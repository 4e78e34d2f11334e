"""How punctual exits are that no event brings, when very many are due in the same minute.

    python -m tests.bench.exits --help

One event lets each user into one segment, with a timestamp in the past from which it follows, to the
millisecond, when the user leaves: one half-life after it, evenly over a minute that begins when all events
are folded. Nothing is sent then: the wall clock's timer alone makes the exits. Each is late by the instant at
which it was in the log of the exited topic (the broker's timestamp; embedded: when a consumer had it), minus
its own instant t*, minus the grace of 150 ms that the timer waits by design.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import datetime
from typing import Any, Final

import click
import msgspec

from stream_app.adapters.partition import GRACE_MS
from tests.backends import Names
from tests.bench import workload
from tests.bench.live import (
    Received,
    machine,
    note,
    quantiles,
    receiving,
    send_all,
    settled,
    shown,
    stage,
    table,
    wait_folded,
)
from tests.bench.measure import BROKERS, Broker

USERS, SPREAD_S, SEGMENTS = 100_000, 60.0, 20
#: Long enough that a half-life lies between an event and its exit whatever the folding takes.
HALF_LIFE_S: Final = 600.0
#: Worker start and folding, allowed for before the first exit: so long, and so long a user.
AHEAD_S, AHEAD_PER_USER_S = 20.0, 0.0002
QUIET_S: Final = 5.0
FOLD_DEADLINE_S: Final = 300.0


def measure(
    broker: Broker = "apache",
    users: int = USERS,
    spread_s: float = SPREAD_S,
    processes: int = 1,
    *,
    model: bool = False,
) -> dict[str, Any]:
    """Let users leave and see when it is said.

    Parameters
    ----------
    broker
        Which servers.
    users
        How many leave.
    spread_s
        In what time, seconds.
    processes
        Workers of the group.
    model
        Whether the next-category model is on.

    Returns
    -------
    dict
        Lateness beyond t* and the grace, as in the log and as received, in ms; how many users never left.
    """
    names = Names.unique()
    tables = [
        {"id": f"leaving-{n}", "labels": [f"label-{n}"], "min_weight": 0.5, "name": f"Leaving {n}"}
        for n in range(SEGMENTS)
    ]
    with ExitStack() as stack:
        run_on = stack.enter_context(stage(broker))
        segments, _ = workload.write_definitions(run_on.directory, tables)
        run_on.create_topics(names)
        environment = run_on.environment(
            names, WORKER__CLOCK="wall", MODEL__ENABLED=model, WEIGHTS__HALF_LIFE_S=HALF_LIFE_S
        )
        programs = stack.enter_context(run_on.programs(environment))
        found, check = stack.enter_context(receiving(run_on, [names.exited]))
        note(f"{processes} workers, {broker}: starting")
        # Before the workers: what a new group finds in the log counts as history, and is folded all the same.
        first_exit_ms = time.time_ns() // 1_000_000 + int((AHEAD_S + AHEAD_PER_USER_S * users) * 1000)
        values = [
            _event(n, first_exit_ms + int(n * spread_s * 1000 / users) - int(HALF_LIFE_S * 1000))
            for n in range(users)
        ]
        send_all(run_on, names.events, [f"u{n}" for n in range(users)], values)
        workers = [
            programs.start("worker", f"--segments={segments}", name=f"worker-{n + 1}")
            for n in range(processes)
        ]
        wait_folded(run_on, workers[0], users, "letting users in", FOLD_DEADLINE_S)
        spare_s = first_exit_ms / 1000 - time.time()
        if spare_s < 0:
            raise click.ClickException(
                f"expected all users in before the first was due to leave, got {-spare_s:.1f} s too late: "
                "ask for fewer users on this machine"
            )
        time.sleep(spare_s)
        before = run_on.cpu_s(workers)
        with shown("users leaving", unit="exits") as move:
            while time.time() * 1000 < first_exit_ms + spread_s * 1000:
                time.sleep(0.2)
                check()
                move(len(found) / users, len(found))
        settled(found, check, QUIET_S, FOLD_DEADLINE_S)
        used = {part: cpu_s - before[part] for part, cpu_s in run_on.cpu_s(workers).items()}
    return {
        "broker": broker,
        "machine": machine(),
        "users": users,
        "spread_s": spread_s,
        "processes": processes,
        "model": model,
        "grace_ms": GRACE_MS,
        "folded_before_s": spare_s,
        "missing": users - len(found),
        "us_per_exit": {part: cpu_s / max(1, len(found)) * 1e6 for part, cpu_s in used.items()},
        **_lateness(found, broker),
    }


def _event(number: int, at_ms: int) -> bytes:
    return msgspec.json.encode(
        {
            "event_id": f"e{number}",
            "user_id": f"u{number}",
            "event_type": "view",
            "labels": [f"label-{number % SEGMENTS}"],
            "timestamp": at_ms / 1000,
        }
    )


def _lateness(found: list[Received], broker: Broker) -> dict[str, Any]:
    """Return how late the exits were, as published and as received."""
    received, stamped = [], []
    for message in found:
        said = msgspec.json.decode(message.value)
        due_ms = round(datetime.fromisoformat(said["time"]).timestamp() * 1000)
        received.append(message.received_ns / 1e6 - due_ms - GRACE_MS)
        stamped.append(float(message.stamped_ms - due_ms - GRACE_MS))
    by_log = broker == "apache"
    return {
        "published": quantiles(stamped if by_log else received),
        "published_is": "the broker's timestamp" if by_log else "received by a consumer",
        "received": quantiles(received),
    }


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Say it for people."""
    rows: list[list[object]] = [["ms after t* and the grace", "exits", "p50", "p99", "p99.9", "max"]]
    for name in ("published", "received"):
        q = report[name]
        rows.append([name, q["count"], *(q.get(f"{at}_ms") for at in ("p50", "p99", "p999", "max"))])
    cpu = ", ".join(f"{part} {us:.0f}" for part, us in report["us_per_exit"].items())
    return [
        f"{report['broker']}, {report['processes']} workers, model {'on' if report['model'] else 'off'}: "
        f"{report['users']:,} users due to leave within {report['spread_s']:g} s, {report['missing']:,} did "
        f"not; published: {report['published_is']}",
        table(rows),
        f"us CPU an exit: {cpu}",
    ]


@click.command(context_settings={"max_content_width": 110})
@click.option("--broker", type=click.Choice(BROKERS), default="apache", show_default=True, help="Servers.")
@click.option("--users", type=click.IntRange(1), default=USERS, show_default=True, help="Who leave.")
@click.option("--spread", type=click.FloatRange(0), default=SPREAD_S, show_default=True, help="In seconds.")
@click.option("--processes", type=click.IntRange(1, 4), default=1, show_default=True, help="Workers.")
@click.option("--model/--no-model", default=False, show_default=True, help="The next-category model.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def main(broker: Broker, users: int, spread: float, processes: int, *, model: bool, as_json: bool) -> None:
    """Measure how late the wall clock's timer says that users leave.

    \b
      python -m tests.bench.exits                              # 100,000 in a minute; takes under three
      python -m tests.bench.exits --users 5000 --spread 1      # three times as dense
      python -m tests.bench.exits --processes 2
    """
    report = measure(broker, users, spread, processes, model=model)
    click.echo(json.dumps(report) if as_json else "\n".join(report_lines(report)))


if __name__ == "__main__":
    main()
