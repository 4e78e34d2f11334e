"""How long a commit keeps everybody else out of Redis, and what a look-up notices of it.

    python -m tests.bench.commit_block --help

Redis does one thing at a time, and a commit is one script. Its time comes from Redis's own SLOWLOG with a
threshold of 0, so it is the whole run of the script by the clock (where cores are few it may have to wait for
one), and nothing else: not the reading of its arguments from the socket, which are up to a megabyte. The
worker folds a backlog at full speed meanwhile, first into an empty Redis, then over what this has left.

Look-ups are asked one after the other by `tests.bench.lookup_load`: alone, with the worker stopped, and while
the worker folds the second backlog. Where cores are few the difference holds the fight for them as well, so
the third figure is of look-ups beside as many busy processes as worker and broker keep, which never ask
Redis: what is above that is due to Redis.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import click
import redis

from stream_app.adapters.profile_store import script_text
from tests.backends import Names
from tests.bench import lookup_load, workload
from tests.bench.live import (
    machine,
    note,
    quantiles,
    send_all,
    stage,
    table,
    user_of,
    wait_folded,
    watermarks,
)
from tests.bench.measure import BROKERS, Broker
from tests.processes import Program

EVENTS, USERS, SECONDS = 600_000, 20_000, 8.0
SLOWLOG_MOST: Final = 2_000_000
FOLD_DEADLINE_S: Final = 600.0
#: Cores that worker and broker keep busy during a backlog, about, beside a look-up's own.
BUSY: Final = 2


def measure(
    broker: Broker = "apache",
    events: int = EVENTS,
    users: int = USERS,
    seconds: float = SECONDS,
    clients: int = 1,
    *,
    model: bool = False,
    seed: int = 1,
) -> dict[str, Any]:
    """Fold two backlogs and look at Redis and at look-ups.

    Parameters
    ----------
    broker
        Which servers.
    events
        Of each of the two backlogs.
    users, seed
        Of the workload.
    seconds
        How long look-ups are asked, each time.
    clients
        Who ask at the same time, one question after the other.
    model
        Whether the next-category model is on.

    Returns
    -------
    dict
        Quantiles of the script's time and of look-ups, in ms.
    """
    names = Names.unique()
    lines = workload.Workload(events=2 * events, users=users, seed=seed).lines()
    owners = [user_of(line) for line in lines]
    with ExitStack() as stack:
        run_on = stack.enter_context(stage(broker))
        segments, _ = workload.write_definitions(run_on.directory, workload.definitions(200, seed=seed))
        run_on.create_topics(names)
        environment = run_on.environment(names, WORKER__CLOCK="event", MODEL__ENABLED=model)
        programs = stack.enter_context(run_on.programs(environment | workload.weights_environment()))
        client = stack.enter_context(run_on.redis())
        client.config_set("slowlog-max-len", SLOWLOG_MOST)
        client.config_set("slowlog-log-slower-than", 0)

        def fold(total: int, what: str) -> Program:
            worker = programs.start("worker", f"--segments={segments}")
            wait_folded(run_on, worker, total, what, FOLD_DEADLINE_S)
            return worker

        send_all(run_on, names.events, owners[:events], lines[:events])
        client.slowlog_reset()
        fold(events, "folding into an empty Redis").stop()
        first = commits(client)

        note("look-ups alone")
        found_users, found_segments = lookup_load.sample(run_on.redis_url, users, seed)
        loads = [
            lookup_load.Load(run_on.redis_url, found_users, found_segments, 0.0, seconds, seed + number)
            for number in range(clients)
        ]
        alone = lookup_load.measure(loads)
        note(f"look-ups beside {BUSY} processes that keep cores busy")
        with busy_processes(BUSY):
            contended = lookup_load.measure(loads)

        send_all(run_on, names.events, owners[events:], lines[events:])
        client.slowlog_reset()
        # Folding has begun, and all imports are done, before the look-ups begin.
        worker = fold(events + 1, "until the worker folds the second backlog")
        begun, at = sum(watermarks(client)), time.monotonic()
        note("look-ups while it folds")
        meanwhile = lookup_load.measure(loads)
        folded, took_s = sum(watermarks(client)) - begun, time.monotonic() - at
        covered = sum(watermarks(client)) < 2 * events
        wait_folded(run_on, worker, 2 * events, "folding the rest", FOLD_DEADLINE_S)
        second = commits(client)
    if not covered:
        note(
            f"The backlog of {events:,} events was folded before the look-ups of {seconds:g} s ended: their "
            "figures are of both; ask for more --events or fewer --seconds"
        )
    return {
        "broker": broker,
        "machine": machine(),
        "events": events,
        "users": users,
        "model": model,
        "script": {"empty": quantiles(first), "second": quantiles(second)},
        "lookups": {
            name: {**report["all"], "per_s": report["lookups_per_s"], "failures": report["failures"]}
            for name, report in (("alone", alone), ("busy cores", contended), ("folding", meanwhile))
        },
        "folded_per_s_meanwhile": folded / took_s,
        "covered": covered,
    }


def commits(client: redis.Redis) -> list[float]:
    """Return how long each commit that wrote something took, in ms, from Redis's slow log."""
    sha = (
        hashlib.sha1(script_text("commit.lua").encode()).hexdigest().encode()
    )  # the name that Redis gives it
    took = []
    for _, _, took_us, arguments, *_ in _slowlog(client):
        # A trim has no profile: no key but those that every call names, and "trim" within what is kept.
        is_ours = len(arguments) > 1 and arguments[1].lower() == sha
        if is_ours and b"trim" not in arguments[:24]:
            took.append(took_us / 1000)
    if not took:
        raise click.ClickException(
            "expected calls of commit.lua in Redis's SLOWLOG, got none: say here how it is called now"
        )
    return took


def _slowlog(client: redis.Redis) -> list[Any]:
    # As it came: redis-py joins the arguments into one text.
    connection = client.connection_pool.get_connection()
    try:
        connection.send_command("SLOWLOG", "GET", "-1")  # type: ignore[no-untyped-call]  # in redis-py
        found: list[Any] = connection.read_response()
    finally:
        client.connection_pool.release(connection)
    return found


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep so many cores busy with Python that touches nothing else."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_spin, daemon=True) for _ in range(count)]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.terminate()
            process.join()


def _spin() -> None:
    while True:
        sum(range(10_000))


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Say it for people."""
    rows: list[list[object]] = [["ms", "count", "p50", "p99", "p99.9", "max"]]
    for name, q in report["script"].items():
        rows.append([f"commit.lua, {name} backlog", q["count"], *_figures(q)])
    for name, q in report["lookups"].items():
        rows.append([f"look-up, {name}", q["count"], *_figures(q)])
    return [
        f"{report['broker']}, model {'on' if report['model'] else 'off'}, {report['users']:,} users, "
        f"{report['events']:,} events a backlog; {report['folded_per_s_meanwhile']:,.0f} events/s folded "
        "beside look-ups",
        table([[_three(cell) if isinstance(cell, float) else cell for cell in row] for row in rows]),
    ]


def _figures(q: Mapping[str, float]) -> list[object]:
    return [q[f"{at}_ms"] for at in ("p50", "p99", "p999", "max")]


def _three(value: float) -> str:
    return f"{value:.3f}"


@click.command(context_settings={"max_content_width": 110})
@click.option("--broker", type=click.Choice(BROKERS), default="apache", show_default=True, help="Servers.")
@click.option("--events", type=click.IntRange(1000), default=EVENTS, show_default=True, help="A backlog.")
@click.option("--users", type=click.IntRange(1), default=USERS, show_default=True, help="Who act.")
@click.option(
    "--seconds", type=click.FloatRange(0.5), default=SECONDS, show_default=True, help="Of look-ups."
)
@click.option("--clients", type=click.IntRange(1), default=1, show_default=True, help="Who look up.")
@click.option("--model/--no-model", default=False, show_default=True, help="The next-category model.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of events and definitions.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def main(
    broker: Broker,
    events: int,
    users: int,
    seconds: float,
    clients: int,
    seed: int,
    *,
    model: bool,
    as_json: bool,
) -> None:
    """Measure how long the commit script blocks Redis, and look-ups with and without a worker at full speed.

    \b
      python -m tests.bench.commit_block
      python -m tests.bench.commit_block --events 60000 --seconds 2
    """
    report = measure(broker, events, users, seconds, clients, model=model, seed=seed)
    click.echo(json.dumps(report) if as_json else "\n".join(report_lines(report)))


if __name__ == "__main__":
    main()
