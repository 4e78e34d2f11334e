"""How long after an event was due its transition is with a consumer, at a steady rate.

    python -m tests.bench.latency --help

The sender keeps to a schedule that was fixed before the start, whatever happens to the events before: when
something stalls, the events that were due meanwhile wait, and their waiting counts (no coordinated omission).
A latency is the instant at which a consumer of the output topics had a transition, minus the instant at which
the event that caused it was due: the sender's own lateness, the broker twice, and the consumer's fetch are in
it. Beside it stands the instant at which the transition was in the log (the broker's timestamp on Apache
Kafka; on the embedded broker the worker's own, taken before it sends). Quantiles are of all raw values.

A transition is matched with its event by the event_id that it carries; the plain agent's, which carries none,
by user and time. Contestants: the service with the wall clock, model off and on, and the plain agent. One
that cannot keep up with the rate has no steady state there: its waiting grows for as long as the run lasts,
and what is still missing a while after the end is left out. That is said, and it is measured at half the rate
as well.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import click
import msgspec

from stream_app.core.partitioner import partition_of
from tests.backends import Names
from tests.bench import workload
from tests.bench.live import (
    PARTITIONS,
    SESSION_TIMEOUT_S,
    START_DEADLINE_S,
    Move,
    Received,
    Schedule,
    Stage,
    head_of,
    machine,
    machine_cpu_s,
    note,
    quantiles,
    receiving,
    send_all,
    sending,
    settled,
    shown,
    stage,
    table,
)
from tests.bench.measure import BROKERS, Broker, process_cpu_s
from tests.processes import Program, Programs

OFF, ON, PLAIN = "model off", "model on", "plain agent"
CONTESTANTS: Final = (OFF, ON, PLAIN)
#: The broker's JVM compiles for half a minute; that is no steady state.
RATE, WARM_S, SECONDS = 2_000, 30.0, 30.0
#: Between the start of the sender's process and its first event.
LEAD_S: Final = 4.0
#: Whoever is further behind than this when the last event is due does not keep up.
KEEPS_UP_MS: Final = 1_000.0
PROBES: Final = 16
PROBE_WAIT_S: Final = 1.0
QUIET_S: Final = 2.0
#: How long after the last event is due its transition is waited for.
LATEST_S: Final = 30.0
#: The plain agent ends by SIGTERM, not by a count.
ENDLESS: Final = 10**9


def measure(
    broker: Broker = "apache",
    contestants: Sequence[str] = CONTESTANTS,
    rate: int = RATE,
    warm_s: float = WARM_S,
    seconds: float = SECONDS,
    users: int = 20_000,
    definitions: int = 200,
    seed: int = 1,
) -> dict[str, Any]:
    """Measure each contestant on servers of its own.

    Parameters
    ----------
    broker
        Which servers.
    contestants
        Of `CONTESTANTS`.
    rate
        Events a second.
    warm_s, seconds
        How long events flow before what is measured, and how long that is.
    users, definitions, seed
        Of the workload.

    Returns
    -------
    dict
        By contestant a list of runs: one, or, where that was too fast, a second one at half the rate.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for contestant in contestants:
        runs[contestant] = [_run(broker, contestant, rate, warm_s, seconds, users, definitions, seed)]
        if not runs[contestant][0]["keeps_up"]:
            half = max(1, rate // 2)
            note(f"{contestant} does not keep up with {rate:,} events/s; now at {half:,}")
            runs[contestant].append(_run(broker, contestant, half, warm_s, seconds, users, definitions, seed))
    return {
        "broker": broker,
        "machine": machine(),
        "rate": rate,
        "warm_s": warm_s,
        "seconds": seconds,
        "users": users,
        "definitions": definitions,
        "runs": runs,
    }


def _run(
    broker: Broker,
    contestant: str,
    rate: int,
    warm_s: float,
    seconds: float,
    users: int,
    definitions: int,
    seed: int,
) -> dict[str, Any]:
    count = int((warm_s + seconds) * rate)
    events = [
        msgspec.json.decode(line) for line in workload.Workload(events=count, users=users, seed=seed).lines()
    ]
    tables = workload.definitions(definitions, seed=seed)
    names = Names.unique()
    with stage(broker) as run_on, run_on.programs({}) as programs:
        run_on.create_topics(names)
        with receiving(run_on, [names.entered, names.exited]) as (found, check):
            note(f"{contestant}, {broker}: starting")
            program = _start(run_on, programs, contestant, names, tables)
            _wait_until_serving(run_on, program, names, found, tables)
            heads = [head_of(**{k: v for k, v in event.items() if k != "timestamp"}) for event in events]
            schedule = Schedule(
                run_on.kafka.address,
                names.events,
                [event["user_id"] for event in events],
                heads,
                time.time_ns() + int(LEAD_S * 1e9),
                int(1e9 / rate),
            )
            with sending(schedule) as sender, shown(f"{contestant}, {rate:,}/s") as move:
                used = _watch(run_on, program, sender.pid, schedule, warm_s, count, move)
                lags = sender.wait()
            settled(found, check, QUIET_S, LATEST_S)
        program.stop()
        if contestant != PLAIN and program.process.returncode != 0:
            raise click.ClickException(f"the worker ended with an error:\n{program.log[-4000:]}")
    first = int(warm_s * rate)
    received, stamped, enters = _latencies(schedule, found, contestant == PLAIN, first)
    # How long the last events took: who falls behind has a latency that grows with the time of the run.
    last = [ms for number, ms in received if number >= count - max(1, rate)]
    behind_ms = quantiles(last).get("p50_ms")
    return {
        "contestant": contestant,
        "rate": rate,
        "events": count - first,
        "transitions": len(received),
        "entered": enters,
        "keeps_up": behind_ms is not None and behind_ms <= KEEPS_UP_MS,
        "received": quantiles([ms for _, ms in received]),
        "stamped": quantiles([ms for _, ms in stamped]),
        "sender_late": quantiles(lags[first:]),
        "cores_busy": {part: cpu_s / seconds for part, cpu_s in used.items()},
    }


def _start(
    run_on: Stage, programs: Programs, contestant: str, names: Names, tables: list[dict[str, Any]]
) -> Program:
    segments, peers = workload.write_definitions(run_on.directory, tables)
    if contestant == PLAIN:
        options = {
            "bootstrap": run_on.kafka.address,
            "redis-url": run_on.redis_url,
            "topic": names.events,
            "entered": names.entered,
            "exited": names.exited,
            "definitions": peers,
            "group": names.group,
            "events": ENDLESS,
            "session-timeout": SESSION_TIMEOUT_S[run_on.broker],
        }
        arguments = [f"--{key}={value}" for key, value in options.items()]
        return programs.start(*arguments, name="plain-agent", module="tests.bench.plain_agent")
    environment = run_on.environment(names, WORKER__CLOCK="wall", MODEL__ENABLED=contestant == ON)
    return programs.start(
        "worker", f"--segments={segments}", environment=environment | workload.weights_environment()
    )


def _wait_until_serving(
    run_on: Stage,
    program: Program,
    names: Names,
    found: Sequence[Received],
    tables: Sequence[Mapping[str, Any]],
) -> None:
    """Send events that let somebody in until that was said of every partition."""
    label = next((t["labels"][0] for t in tables if t["min_weight"] <= 0.5), None)
    if label is None:
        raise click.ClickException("expected a definition with min_weight 0.5, got none; ask for more")
    missing, number = set(range(PARTITIONS)), 0
    until = time.monotonic() + START_DEADLINE_S
    while missing:
        if not program.is_running or time.monotonic() > until:
            raise click.ClickException(
                f"{program.name} said nothing of partitions {sorted(missing)}:\n{program.log[-4000:]}"
            )
        users = [f"probe-{number + k}" for k in range(PROBES)]
        number += PROBES
        values = [
            head_of(event_id=user, user_id=user, event_type="view", labels=[label])
            + b'"timestamp":%.3f}' % time.time()
            for user in users
        ]
        send_all(run_on, names.events, users, values, silent=True)
        time.sleep(PROBE_WAIT_S)
        missing -= {partition_of(_key(message).encode(), PARTITIONS) for message in list(found)}


def _key(message: Received) -> str:
    return str(json.loads(message.value)["user_id"])


def _watch(
    run_on: Stage,
    program: Program,
    sender: int,
    schedule: Schedule,
    warm_s: float,
    count: int,
    move: Move,
) -> dict[str, float]:
    """Wait until the last event is due; return the CPU seconds used since the warm-up."""

    def used() -> dict[str, float]:
        ours = run_on.cpu_s([program])
        ours["sender and reader"] = process_cpu_s(os.getpid()) + process_cpu_s(sender)
        return ours | {"others": machine_cpu_s() - sum(ours.values())}

    before: dict[str, float] | None = None
    warm_ns = schedule.start_ns + int(warm_s * 1e9)
    while (now_ns := time.time_ns()) < schedule.due_ns(count):
        if not program.is_running:
            raise click.ClickException(f"{program.name} ended early:\n{program.log[-4000:]}")
        if before is None and now_ns >= warm_ns:
            before = used()
        sent = max(0, (now_ns - schedule.start_ns) // schedule.step_ns)
        move(sent / count, sent)
        time.sleep(0.1)
    after = used()
    return {part: after[part] - (before or after)[part] for part in after}


def _latencies(
    schedule: Schedule, found: Sequence[Received], is_plain: bool, first: int
) -> tuple[list[tuple[int, float]], list[tuple[int, float]], int]:
    """Match transitions with events: (event number, ms) as received and as stamped; and how many entered."""
    number_of: dict[object, int] = {}
    for number, (head, user) in enumerate(zip(schedule.heads, schedule.users, strict=True)):
        if is_plain:
            number_of.setdefault((user, schedule.due_ns(number) // 1_000_000), number)
        else:
            number_of[json.loads(head + b'"end":0}')["event_id"]] = number
    received, stamped, enters, matched = [], [], 0, 0
    for message in found:
        said = msgspec.json.decode(message.value)
        event = None if is_plain else said["event"]
        key = (said["user_id"], said["time"]) if is_plain else event and event["event_id"]
        number = number_of.get(key, -1)
        matched += number >= 0
        if number < first:
            continue
        due_ms = schedule.due_ns(number) / 1e6
        received.append((number, message.received_ns / 1e6 - due_ms))
        stamped.append((number, message.stamped_ms - due_ms))
        enters += said["status"] == "entered"
    if not matched:
        raise click.ClickException(f"no transition of {len(found)} could be matched with an event")
    return received, stamped, enters


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Say it for people."""
    rows: list[list[object]] = [
        ["ms after the event was due", "events/s", "transitions", "p50", "p99", "p99.9", "max", "keeps up"]
    ]
    for contestant, runs in report["runs"].items():
        for run in runs:
            for name in ("received", "stamped", "sender_late"):
                q = run[name]
                rows.append(
                    [
                        f"{contestant}, {name.replace('_', ' ')}",
                        run["rate"],
                        q["count"],
                        *(q.get(f"{at}_ms") for at in ("p50", "p99", "p999", "max")),
                        run["keeps_up"],
                    ]
                )
    busy = [
        f"{contestant} at {run['rate']:,}/s: cores busy with "
        + ", ".join(f"{part} {cores:.2f}" for part, cores in run["cores_busy"].items())
        for contestant, runs in report["runs"].items()
        for run in runs
    ]
    return [
        f"{report['broker']}: {report['users']:,} users, {report['definitions']} definitions, "
        f"{report['seconds']:g} s after {report['warm_s']:g} s of warm-up",
        table(rows),
        *busy,
    ]


@click.command(context_settings={"max_content_width": 110})
@click.option("--broker", type=click.Choice(BROKERS), default="apache", show_default=True)
@click.option(
    "--contestant",
    "contestants",
    type=click.Choice(CONTESTANTS),
    multiple=True,
    default=CONTESTANTS,
    help="May be given several times; default: all.",
)
@click.option("--rate", type=click.IntRange(1, 100_000), default=RATE, show_default=True, help="Events/s.")
@click.option("--warm", type=click.FloatRange(0), default=WARM_S, show_default=True, help="Seconds.")
@click.option("--seconds", type=click.FloatRange(1), default=SECONDS, show_default=True, help="Measured.")
@click.option("--users", type=click.IntRange(1), default=20_000, show_default=True, help="Who act.")
@click.option("--definitions", type=click.IntRange(1), default=200, show_default=True, help="Base segments.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of events and definitions.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def main(
    broker: Broker,
    contestants: Sequence[str],
    rate: int,
    warm: float,
    seconds: float,
    users: int,
    definitions: int,
    seed: int,
    *,
    as_json: bool,
) -> None:
    """Measure event to transition at a steady rate, without coordinated omission.

    \b
      python -m tests.bench.latency                                       # a minute for each contestant
      python -m tests.bench.latency --broker embedded --contestant "model off" --seconds 10

    "received" is what a consumer of the output topics sees, from the instant that the event was due.
    "stamped" is the timestamp of the transition in the log, in whole ms: the broker's on Apache Kafka, on the
    embedded broker that of the worker's sending. "sender late" is part of both.
    """
    report = measure(broker, contestants, rate, warm, seconds, users, definitions, seed)
    click.echo(json.dumps(report) if as_json else "\n".join(report_lines(report)))


if __name__ == "__main__":
    main()
