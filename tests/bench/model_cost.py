"""What the next-category model costs an event, in the real worker.

    python -m tests.bench.model_cost --help

Broker and store are embedded and this program's own. The events are sent once; then, in rounds,
`stream-app worker --until-end` folds them with the model off and on, and the plain agent
(`tests.bench.plain_agent`) its first few, each with an empty Redis, a new consumer group and new output
topics.

What is counted is CPU, which is steadier than wall time where others work on the same cores: of the program
by `getrusage` over its life, of broker and Redis by `/proc/PID/stat` from its start to its end. From each,
and from the wall time, what the same program used on a topic with one event, in the same round, is taken
off: start, imports, joining the group and the end are then gone, and the rest is divided by the events but
one. Nothing is said to numpy about threads that the worker does not say itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pstats
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import msgspec
import numpy as np
import redis

from stream_app.adapters.event_lines import read_blocks
from stream_app.commands.progress import lines as progress_lines
from stream_app.commands.replay import send_blocks
from stream_app.commands.topics import create_missing_topics
from stream_app.embedded import Server, embedded_kafka, embedded_redis
from stream_app.sample import load_sample
from stream_app.settings import KafkaSettings
from tests.backends import ROOT, Names
from tests.bench.measure import process_cpu_s, spread
from tests.bench.workload import blocks, draw_tastes, liked, toml_text
from tests.processes import DYING_WITH_US, Program

DEFAULT_LIMIT = 300_000
#: The embedded broker lets a worker wait for half of it before it joins.
SESSION_TIMEOUT_S = 6
#: A run may take so long, and so long an event.
DEADLINE_S, DEADLINE_PER_EVENT_S = 180.0, 0.005
SUMMARY = re.compile(r"folded (\d+) events, set (\d+) records aside, said (\d+) transitions")
LOG_TAIL_CHARS = 4000

OFF, ON, PLAIN = "model off", "model on", "plain agent"
PARTS = ("worker", "broker", "redis")

SYNTHETIC_ASSETS = 100_000
SYNTHETIC_SPAN_S = 365 * 86_400
SYNTHETIC_BEGIN_S = 1_700_000_000


# --- events and segments -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Input:
    """The events of a run, as lines of JSON, and what there is in them, most frequent labels first."""

    name: str
    lines: list[bytes]
    labels: list[str]
    event_types: list[str]
    users: int
    assets: int


class _Event(msgspec.Struct):
    user_id: str
    event_type: str
    asset_id: str | None = None
    labels: list[str] = []


def load_input(events: str | None, synthetic: int | None, users: int, limit: int, seed: int) -> Input:
    """Read a file, make a stream up, or take the sample; the first `limit` events."""
    if synthetic is not None:
        name, lines = f"synthetic-{synthetic}", synthetic_lines(synthetic, users, limit, seed)
    elif events is not None:
        name, lines = Path(events).name, []
        for block in read_blocks([events]):
            lines += [line for line in block.lines if line]
            if len(lines) >= limit:
                break
        lines = lines[:limit]
    else:
        name = "completejourney"
        lines = [line for block in load_sample(limit).blocks() for line in block.lines if line]
    decode = msgspec.json.Decoder(_Event).decode
    found, types = Counter[str](), Counter[str]()
    seen_users, assets = set(), set()
    for line in lines:
        event = decode(line)
        found.update(event.labels)
        types[event.event_type] += 1
        seen_users.add(event.user_id)
        assets.add(event.asset_id)
    labels = [label for label, _ in found.most_common()]
    return Input(name, lines, labels, [t for t, _ in types.most_common()], len(seen_users), len(assets))


def synthetic_lines(labels: int, users: int, events: int, seed: int) -> list[bytes]:
    """Make up a year of shopping, in time order.

    Labels are popular as 1/rank^0.7. A user has a taste of 40 to 60 of them, some liked better, and comes
    now and then (some more often) with a basket of 1 and more events of one instant, about four. An asset has
    one label, one event in ten also names a second one of the user's taste.
    """
    rng = np.random.default_rng(seed)
    width = min(60, labels)
    sizes = rng.integers(min(40, labels), width + 1, users)
    tastes = draw_tastes(rng, users, labels, width)
    baskets = 1 + rng.poisson(3.0, events)
    baskets = baskets[: int(np.searchsorted(np.cumsum(baskets), events)) + 1]
    activity = rng.lognormal(0.0, 1.0, users)
    visitors = rng.choice(users, len(baskets), p=activity / activity.sum())
    times = np.sort(rng.integers(0, SYNTHETIC_SPAN_S, len(baskets))) + SYNTHETIC_BEGIN_S
    user = np.repeat(visitors, baskets)[:events]
    time_s = np.repeat(times, baskets)[:events]
    label, second = (tastes[user, liked(rng, events, sizes[user])] for _ in range(2))
    with_second = rng.random(events) < 0.1
    assets_per_label = max(1, SYNTHETIC_ASSETS // labels)
    asset = label * assets_per_label + np.minimum(
        rng.exponential(assets_per_label / 8, events).astype(np.int64), assets_per_label - 1
    )
    kind = np.array(["purchase", "view", "redeem"])[rng.choice(3, events, p=[0.75, 0.2, 0.05])]
    encode = msgspec.json.Encoder().encode
    return [
        encode(
            {
                "user_id": f"u{u}",
                "event_type": k,
                "asset_id": f"a{a}",
                "labels": [f"label-{x}", f"label-{y}"] if both and x != y else [f"label-{x}"],
                "timestamp": t,
            }
        )
        for u, k, a, x, y, both, t in zip(
            *(c.tolist() for c in (user, kind, asset, label, second, with_second, time_s)), strict=True
        )
    ]


def segments_toml(found: Input, base: int, discovery: int, seed: int) -> str:
    """Make up base segments over all labels, and discovery segments of one label each."""
    rng = random.Random(seed)
    tables = []
    for number in range(base if found.labels else 0):
        labels = rng.sample(found.labels, min(len(found.labels), rng.randint(1, 3)))
        min_weight = rng.choice([0.0, 0.5, 1.5, 3.0])
        table = {"id": f"base-{number}", "name": f"Base {number}", "labels": labels, "min_weight": min_weight}
        if min_weight and number % 2:
            table["exit_weight"] = min_weight / 2
        if number % 10 == 9:
            table["event_types"] = found.event_types[:1]
        tables.append(table)
    for number in range(min(discovery, len(found.labels))):
        label = found.labels[(2 * number + 1) * len(found.labels) // (2 * discovery)]
        # Six times the average, as in the shipped segments.toml.
        least = min(0.5, 6.0 / len(found.labels))
        tables.append(
            {
                "id": f"discovery-{number}",
                "name": f"Discovery {number}",
                "type": "discovery",
                "labels": [label],
                "min_weight": round(least, 6),
            }
        )
    return toml_text(tables)


# --- one run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Use:
    """What one run used: CPU seconds and wall seconds; what it said of transitions."""

    worker: float
    broker: float
    redis: float
    wall: float
    transitions: int | None = None

    @property
    def cpu(self) -> float:
        return self.worker + self.broker + self.redis


@dataclass(frozen=True, slots=True)
class Bench:
    """The servers, and where the programs of this bench find them."""

    kafka: Server
    store: Server
    directory: Path
    partitions: int

    @property
    def redis_url(self) -> str:
        return f"redis://{self.store.address}/0"

    def kafka_settings(self, events_topic: str) -> KafkaSettings:
        """Settings of one run: a given events topic, everything else its own."""
        names = Names.unique()
        return KafkaSettings(
            bootstrap_servers=self.kafka.address,
            group_id=names.group,
            events_topic=events_topic,
            entered_topic=names.entered,
            exited_topic=names.exited,
            dead_letter_topic=names.dead_letter,
            session_timeout_s=SESSION_TIMEOUT_S,
        )

    def send(self, name: str, topic: str, lines: Sequence[bytes]) -> None:
        """Create a topic with these events."""

        async def send() -> None:
            kafka = self.kafka_settings(topic)
            await create_missing_topics(kafka, self.partitions)
            with progress_lines(f"sending to {topic}") as on_progress:
                outcome = await send_blocks(kafka, blocks(name, lines), len(lines), on_progress=on_progress)
            if outcome.failure is not None:
                raise click.ClickException(str(outcome.failure))
            if outcome.acknowledged != len(lines):
                raise click.ClickException(f"{outcome.acknowledged} of {len(lines)} events were taken")

        asyncio.run(send())

    def run(self, variant: str, topic: str, events: int, profile: Path | None = None) -> Use:
        """Run one program over a topic, from an empty Redis; return what it used."""
        kafka = self.kafka_settings(topic)
        asyncio.run(create_missing_topics(kafka, None))
        with redis.Redis.from_url(self.redis_url) as client:
            client.flushall()
            client.function_flush()
        command, environment = self._command(variant, kafka, events)
        if profile is not None:
            command = ["-m", "cProfile", "-o", str(profile), *command]
        before, begun = self._used(), time.monotonic()
        log = self._to_the_end(f"{variant.replace(' ', '-')}-{kafka.group_id}", command, environment, events)
        wall, after = time.monotonic() - begun, self._used()
        transitions = None
        if variant == PLAIN:
            done, aside = (events if f"did {events} events" in log else 0), 0
        else:
            told = SUMMARY.search(log)
            done, aside, transitions = (int(n) for n in told.groups()) if told else (0, 0, 0)
        if done + aside != events:
            raise click.ClickException(f"{variant} did {done} of {events} events:\n{log[-LOG_TAIL_CHARS:]}")
        worker, broker, store = (after[part] - before[part] for part in PARTS)
        return Use(worker, broker, store, wall, transitions)

    def _command(
        self, variant: str, kafka: KafkaSettings, events: int
    ) -> tuple[list[str], Mapping[str, str]]:
        if variant == PLAIN:
            options = {
                "bootstrap": self.kafka.address,
                "redis-url": self.redis_url,
                "topic": kafka.events_topic,
                "group": kafka.group_id,
                "events": events,
                "session-timeout": SESSION_TIMEOUT_S,
            }
            return ["-m", "tests.bench.plain_agent", *(f"--{k}={v}" for k, v in options.items())], {}
        settings = {
            f"KAFKA__{key.upper()}": str(value) for key, value in kafka.model_dump(exclude_unset=True).items()
        }
        settings |= {
            "REDIS__URL": self.redis_url,
            "WORKER__CLOCK": "event",
            "WORKER__TRUST_CREATE_TIME": "true",
            "WORKER__HTTP_PORT": "0",
            "MODEL__ENABLED": "true" if variant == ON else "false",
        }
        segments = f"--segments={self.directory / 'segments.toml'}"
        return (
            ["-m", "stream_app", "worker", "--until-end", segments],
            {f"STREAM_APP__{key}": value for key, value in settings.items()},
        )

    def _to_the_end(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], events: int
    ) -> str:
        """Run Python with these arguments; return what it printed. It dies with us."""
        path = self.directory / f"{name}.log"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("STREAM_APP__")}
        with path.open("ab") as log:
            process = subprocess.Popen(
                [*DYING_WITH_US, str(os.getpid()), sys.executable, *command],
                cwd=ROOT,
                env={**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        program = Program(name, path, process)
        try:
            status = program.wait(DEADLINE_S + events * DEADLINE_PER_EVENT_S)
        except AssertionError as exc:
            raise click.ClickException(str(exc)) from None
        finally:
            program.stop()
        if status != 0:
            raise click.ClickException(f"{name} ended with {status}:\n{program.log[-LOG_TAIL_CHARS:]}")
        return program.log

    def _used(self) -> dict[str, float]:
        """CPU seconds so far; the programs' is that of all children that have ended and been waited for."""
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "worker": ended.ru_utime + ended.ru_stime,
            "broker": process_cpu_s(self.kafka.pid),
            "redis": process_cpu_s(self.store.pid),
        }


# --- rounds and figures ------------------------------------------------------------------------------------


@click.command(context_settings={"max_content_width": 110})
@click.option(
    "--events",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="JSONL(.gz) in time order (default: the sample of the demo).",
)
@click.option(
    "--synthetic",
    type=click.IntRange(2, 100_000),
    metavar="LABELS",
    help="A made-up stream with so many labels instead.",
)
@click.option("--users", type=click.IntRange(1), default=20_000, show_default=True, help="Of --synthetic.")
@click.option(
    "--limit", type=click.IntRange(2), default=DEFAULT_LIMIT, show_default=True, help="Events at most."
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Of all variants.")
@click.option("--segments", type=click.IntRange(0), default=40, show_default=True, help="Base segments.")
@click.option("--discovery", type=click.IntRange(0), default=4, show_default=True, help="Discovery segments.")
@click.option(
    "--plain-events",
    type=click.IntRange(0),
    default=20_000,
    show_default=True,
    help="Events of the plain agent, at most; 0 leaves it out.",
)
@click.option("--partitions", type=click.IntRange(1), default=4, show_default=True, help="Of the topics.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of what is made up.")
@click.option("--profile", is_flag=True, help="Also run once with the model on under cProfile; say where.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def main(
    events: str | None,
    synthetic: int | None,
    users: int,
    limit: int,
    rounds: int,
    segments: int,
    discovery: int,
    plain_events: int,
    partitions: int,
    seed: int,
    *,
    profile: bool,
    as_json: bool,
) -> None:
    """Measure what the model adds to an event's CPU, and both beside a plain Faust agent.

    \b
      python -m tests.bench.model_cost --events complete_journey.jsonl.gz --limit 506364
      python -m tests.bench.model_cost --synthetic 1000
      python -m tests.bench.model_cost --limit 30000 --rounds 1 --profile

    The plain agent does a part of the events only, the first, with the smallest profiles: that is in its
    favour. Broker and Redis are counted in steps of 10 ms.
    """
    if events is not None and synthetic is not None:
        raise click.UsageError("--events or --synthetic, not both")
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Not the default, which leaves the temporary directory behind.
        signal.signal(number, lambda signum, _: sys.exit(128 + signum))
    # The embedded broker has no idempotent producers, which aiokafka says at length.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    note("reading the events")
    found = load_input(events, synthetic, users, limit, seed)
    if len(found.lines) < 2:
        raise click.ClickException("fewer than two events")
    with (
        tempfile.TemporaryDirectory(prefix="model-cost-") as directory,
        embedded_kafka() as kafka,
        embedded_redis() as store,
    ):
        bench = Bench(kafka, store, Path(directory), partitions)
        toml = segments_toml(found, segments, discovery, seed)
        (bench.directory / "segments.toml").write_text(toml, encoding="utf-8")
        report = {
            "input": found.name,
            "events": len(found.lines),
            "users": found.users,
            "labels": len(found.labels),
            "assets": found.assets,
            "base_segments": toml.count('id = "base-'),
            "discovery_segments": toml.count('id = "discovery-'),
            "partitions": partitions,
            "cores": os.cpu_count(),
            **measure(bench, found, rounds, plain_events),
        }
        if profile:
            report["profile"] = profiled(bench, len(found.lines))
    click.echo(json.dumps(report) if as_json else "\n".join(report_lines(report)))


def measure(bench: Bench, found: Input, rounds: int, plain_events: int) -> dict[str, Any]:
    """Run all variants in turns; return every run and what comes out of all."""
    sizes = {OFF: len(found.lines), ON: len(found.lines)}
    if plain_events >= 2:
        sizes[PLAIN] = min(plain_events, len(found.lines))
    topics = {size: f"events-{size}" for size in {1, *sizes.values()}}
    for size, topic in topics.items():
        bench.send(found.name, topic, found.lines[:size])
    total, begun, done = 2 * len(sizes) * rounds, time.monotonic(), 0
    kept = []
    for turn in range(rounds):
        figures: dict[str, Any] = {"load": os.getloadavg()[0]}
        # Every other round the other way round, so that what drifts does not always meet the same variant.
        for variant in [*sizes][:: -1 if turn % 2 else 1]:
            uses = {}
            for size in (1, sizes[variant]):
                uses[size] = use = bench.run(variant, topics[size], size)
                done += 1
                left_s = (time.monotonic() - begun) / done * (total - done)
                note(
                    f"[{done}/{total}] round {turn + 1}/{rounds}, {variant}, {size:,} events: "
                    f"{use.cpu:.1f} s CPU, {use.wall:.1f} s; about {left_s:.0f} s left"
                )
            figures[variant] = per_event(uses[sizes[variant]], uses[1], sizes[variant] - 1)
        figures["model adds"] = {
            key: figures[ON][key] - figures[OFF][key] for key in (*PARTS, "together", "wall")
        }
        kept.append(figures)
    rows = [*sizes, "model adds"]
    keys = (*PARTS, "together", "wall")
    summary = {row: {key: spread([r[row][key] for r in kept]) for key in keys} for row in rows}
    ratios = {}
    if PLAIN in sizes:
        for variant in (OFF, ON):
            ratios[f"{PLAIN} / {variant}"] = {
                key: spread([r[PLAIN][key] / r[variant][key] for r in kept])
                for key in ("worker", "together", "wall")
            }
    ratios[f"{ON} / {OFF}"] = {
        key: spread([r[ON][key] / r[OFF][key] for r in kept]) for key in ("worker", "together", "wall")
    }
    return {
        "plain_events": sizes.get(PLAIN, 0),
        "us_per_event": summary,
        "ratios": ratios,
        "rounds": kept,
    }


def per_event(use: Use, start: Use, events: int) -> dict[str, Any]:
    """Return microseconds an event, without what a run over one event used; and that, in seconds."""
    us = {key: (getattr(use, key) - getattr(start, key)) / events * 1e6 for key in (*PARTS, "wall")}
    return {
        **us,
        "together": sum(us[part] for part in PARTS),
        "events": events + 1,
        "transitions": use.transitions,
        "busy_cores": (use.worker - start.worker) / max(1e-9, use.wall - start.wall),
        "start_worker_s": start.worker,
        "start_wall_s": start.wall,
        "worker_s": use.worker,
        "wall_s": use.wall,
    }


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Say it for people."""
    rounds = report["rounds"]
    out = [
        f"{report['input']}: {report['events']:,} events, {report['users']:,} users, {report['labels']:,} "
        f"labels, {report['assets']:,} assets; {report['base_segments']} base and "
        f"{report['discovery_segments']} discovery segments, {report['partitions']} partitions, "
        f"{report['cores']} cores, {len(rounds)} rounds",
        "",
        "us an event beyond a run over one event: median (min to max) over the rounds; all but wall is CPU",
        f"{'':14}" + "".join(f"{name:>24}" for name in (*PARTS, "together", "wall")),
    ]
    for row, figures in report["us_per_event"].items():
        out.append(f"{row:14}" + "".join(f"{_spread_text(value):>24}" for value in figures.values()))
    out += ["", f"{'ratio':24}" + "".join(f"{name:>24}" for name in ("worker", "together", "wall"))]
    for row, figures in report["ratios"].items():
        out.append(f"{row:24}" + "".join(f"{_spread_text(value):>24}" for value in figures.values()))
    out.append("")
    for row in (row for row in report["us_per_event"] if row in rounds[0]):
        if row == "model adds":
            continue
        said = rounds[0][row]["transitions"]
        out.append(
            f"{row}: {rounds[0][row]['events']:,} events, start and end "
            f"{median(r[row]['start_worker_s'] for r in rounds):.2f} s CPU, "
            f"{median(r[row]['start_wall_s'] for r in rounds):.1f} s wall; then "
            f"{median(r[row]['busy_cores'] for r in rounds):.2f} cores busy"
            + ("" if said is None else f"; {said:,} transitions")
        )
    if "profile" in report:
        out += ["", *profile_lines(report["profile"])]
    return out


def _spread_text(value: Mapping[str, float]) -> str:
    return f"{value['median']:.1f} ({value['min']:.1f} to {value['max']:.1f})"


def note(text: str) -> None:
    click.echo(text, err=True)


# --- where the time goes -----------------------------------------------------------------------------------

#: (file, line, function), as pstats names a function.
Function = tuple[str, int, str]

TOP = 25
#: Packages that are a part of their own; what else is called (numpy, River, C) belongs to who calls it.
OWN_PARTS = ("asyncio", "faust", "mode", "aiokafka", "redis", "hiredis", "click")
IDLE = ("<method 'poll' of 'select.epoll' objects>", "<method 'acquire' of '_thread.lock' objects>")


def profiled(bench: Bench, events: int) -> dict[str, Any]:
    """Run with the model on under cProfile; return where the main thread's time went."""
    found = []
    for size in (1, events):
        path = bench.directory / f"profile-{size}"
        note(f"under cProfile, {size:,} events")
        use = bench.run(ON, f"events-{size}", size, path)
        found.append((use, pstats.Stats(str(path)).stats))  # type: ignore[attr-defined]
    (start_use, start), (use, stats) = found
    scale = 1e6 / (events - 1)

    def beyond(function: Function, field: int) -> float:
        return float(stats[function][field] - (start[function][field] if function in start else 0)) * scale

    busy = [function for function in stats if function[2] not in IDLE]
    own = {function: beyond(function, 2) for function in busy}
    # What starts everything also waits for everything, which is no work.
    ours = [
        function
        for function in busy
        if "/stream_app/" in function[0] and not function[0].endswith(("/commands/worker.py", "/app.py"))
    ]
    parts: dict[str, float] = defaultdict(float)
    owners = _Owners(stats)
    for function, us in own.items():
        for part, share in owners.of(function).items():
            parts[part] += us * share

    def top(functions: Sequence[Function], field: int) -> list[dict[str, Any]]:
        functions = sorted(functions, key=lambda function: -beyond(function, field))[:TOP]
        return [
            {"function": _name(function), "calls": beyond(function, 1) / 1e6, "us": beyond(function, field)}
            for function in functions
        ]

    return {
        "worker_us": (use.worker - start_use.worker) * scale,
        "main_thread_us": sum(own.values()),
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])[:TOP]),
        "inclusive": top(ours, 3),
        "own": top(busy, 2),
    }


class _Owners:
    """Whose a function's own time is: its module of ours, its package, or its callers' in their shares."""

    def __init__(
        self, stats: Mapping[Function, tuple[int, int, float, float, Mapping[Function, Any]]]
    ) -> None:
        self._stats = stats
        self._known: dict[Function, dict[str, float]] = {}

    def of(self, function: Function) -> dict[str, float]:
        """Return shares, which add up to 1, of parts of the program."""
        if function in self._known:
            return self._known[function]
        path = function[0]
        if "/stream_app/" in path:
            return {"stream_app/" + path.rpartition("/stream_app/")[2]: 1.0}
        for package in OWN_PARTS:
            if f"/{package}/" in path:
                return {package: 1.0}
        self._known[function] = {"other": 1.0}  # for who comes back here in a circle
        callers = self._stats[function][4]
        # By own time within that caller's calls; by calls where that is nothing.
        weights = {caller: figures[2] for caller, figures in callers.items()}
        total = sum(weights.values())
        if total > 0:
            shares: dict[str, float] = defaultdict(float)
            for caller, weight in weights.items():
                for part, share in self.of(caller).items():
                    shares[part] += share * weight / total
            self._known[function] = dict(shares)
        return self._known[function]


def _name(function: Function) -> str:
    path, line, name = function
    if path == "~":
        return name
    for root in ("/site-packages/", "/stream_app/"):
        if root in path:
            path = ("stream_app/" if root == "/stream_app/" else "") + path.rpartition(root)[2]
    return f"{path}:{line} {name}"


def profile_lines(report: Mapping[str, Any]) -> list[str]:
    """Say for people where the time went."""
    total = report["main_thread_us"]
    out = [
        f"Under cProfile, model on: {report['worker_us']:.1f} us CPU an event; the main thread is busy for "
        f"{total:.1f} us of wall time. Small Python functions look dearer than they are, and threads of BLAS "
        "are not seen: read shares, not times.",
        "",
        "by module, with the C, numpy and River that it calls:",
        *(f"  {us:8.2f} us {us / total:6.1%}  {part}" for part, us in report["parts"].items()),
    ]
    for title, key in (("functions of stream_app, with what they call", "inclusive"), ("own time", "own")):
        out += ["", f"{title}: us and calls an event"]
        out += [f"  {row['us']:8.2f} {row['calls']:9.3f}  {row['function']}" for row in report[key]]
    return out


if __name__ == "__main__":
    main()
