"""How many look-ups a second a running Redis answers, and how long each takes.

    python -m tests.bench.lookup_load --help

Each client is a process with its own `Lookup`, one question at a time, the next as soon as the answer is
there. Users are sampled from what is stored. A figure with the client's own work in it: what an app sees.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import click
import redis

from stream_app.lookup import Lookup

#: Of 100 questions, how many are which.
MIX = {"weights": 40, "segments": 20, "is_member": 20, "next_categories": 10, "recommendations": 10}
KEY = re.compile(r"sa:\{\d+\}:(profile|members):(.*)", re.DOTALL)
WARM_UP = 200
START_DEADLINE_S = 60
SCAN_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Load:
    """What one client is to do."""

    url: str
    users: Sequence[str]
    segments: Sequence[str]
    unknown: float
    seconds: float
    seed: int


@click.command(context_settings={"max_content_width": 110})
@click.option("--url", default="redis://localhost:6379/0", envvar="STREAM_APP__REDIS__URL", show_default=True)
@click.option("--clients", type=click.IntRange(1), default=4, show_default=True, help="Processes that ask.")
@click.option("--seconds", type=click.FloatRange(0.1), default=20.0, show_default=True, help="How long.")
@click.option("--users", type=click.IntRange(1), default=20_000, show_default=True, help="Users at most.")
@click.option(
    "--unknown",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of questions about nobody: two round trips.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the questions' order.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def main(
    url: str, clients: int, seconds: float, users: int, unknown: float, seed: int, *, as_json: bool
) -> None:
    """Ask a Redis with state for weights, segments, membership, next categories and recommendations.

    Fill it first, then ask while nothing or a worker runs, for instance:

    \b
      stream-app services > services.env &           # or name a Redis in STREAM_APP__REDIS__URL
      sleep 10 && . ./services.env
      stream-app topics && stream-app replay FILE    # and stream-app worker, in another terminal
      python -m tests.bench.lookup_load --seconds 20
      stream-app replay FILE --rate N &              # half of what the worker can do
      python -m tests.bench.lookup_load --seconds 20

    Times are wall clock, from the question to the typed answer, in milliseconds.
    """
    found_users, found_segments = sample(url, users, seed)
    if not found_users:
        raise click.ClickException(f"no profile in {url}: run a worker first, see --help")
    loads = [
        Load(url, found_users, found_segments or ["none"], unknown, seconds, seed + client)
        for client in range(clients)
    ]
    report = measure(loads)
    report = {"users": len(found_users), "segments": len(found_segments), "unknown": unknown, **report}
    if as_json:
        click.echo(json.dumps(report))
        return
    click.echo(f"{clients} clients, {len(found_users)} users, {report['seconds']:.1f} s")
    click.echo(f"{report['lookups_per_s']:,.0f} lookups/s, {report['failures']} failures\n")
    click.echo(f"{'':16} {'count':>9} {'p50 ms':>8} {'p99 ms':>8} {'p99.9 ms':>9} {'max ms':>8}")
    for name, row in {"all": report["all"], **report["by_question"]}.items():
        click.echo(
            f"{name:16} {row['count']:9,} {row['p50_ms']:8.3f} {row['p99_ms']:8.3f} {row['p999_ms']:9.3f} "
            f"{row['max_ms']:8.3f}"
        )


def sample(url: str, most: int, seed: int) -> tuple[list[str], list[str]]:
    """Return users and segments that are stored, found by SCAN; the users in random order."""
    users: set[str] = set()
    segments: set[str] = set()
    with redis.Redis.from_url(url) as client:
        for kind, found, limit in (("profile", users, most), ("members", segments, 10_000)):
            for key in client.scan_iter(match=f"sa:{{*}}:{kind}:*", count=SCAN_PAGE):
                named = KEY.fullmatch(key.decode())
                if named is not None and named[1] == kind:
                    found.add(named[2])
                if len(found) >= limit:
                    break
    shuffled = sorted(users)
    random.Random(seed).shuffle(shuffled)
    return shuffled, sorted(segments)


def measure(loads: Sequence[Load]) -> dict[str, Any]:
    """Run the clients at the same time; return what they saw together."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(loads))
    pipes = [context.Pipe(duplex=False) for _ in loads]
    processes = [
        context.Process(target=ask, args=(load, barrier, sending))
        for load, (_, sending) in zip(loads, pipes, strict=True)
    ]
    for process, (_, sending) in zip(processes, pipes, strict=True):
        process.start()
        sending.close()  # so that a client that dies is the end of its pipe
    took: dict[str, array[float]] = {name: array("d") for name in MIX}
    failures, seconds = 0, 0.0
    for receiving, _ in pipes:
        try:
            times, failed, lasted = receiving.recv()
        except EOFError:
            raise click.ClickException("a client has died; its own words are above") from None
        for name, part in times.items():
            took[name].frombytes(part)
        failures += failed
        seconds = max(seconds, lasted)
    for process in processes:
        process.join()
    together = array("d")
    for part in took.values():
        together.extend(part)
    return {
        "clients": len(loads),
        "seconds": seconds,
        "lookups_per_s": len(together) / seconds,
        "failures": failures,
        "all": quantiles(together),
        "by_question": {name: quantiles(times) for name, times in took.items() if times},
    }


def ask(load: Load, barrier: Any, sending: Connection) -> None:
    """Be one client: warm up, wait for the others, ask until the time is over, tell."""
    rng = random.Random(load.seed)
    names, shares = list(MIX), list(MIX.values())
    times: dict[str, array[float]] = {name: array("d") for name in MIX}
    failures = 0
    with Lookup(load.url) as lookup:

        def one(name: str) -> None:
            user = rng.choice(load.users) if rng.random() >= load.unknown else f"nobody-{rng.random()}"
            more = (rng.choice(load.segments),) if name == "is_member" else ()
            getattr(lookup, name)(user, *more)

        for name in rng.choices(names, shares, k=WARM_UP):
            one(name)
        barrier.wait(START_DEADLINE_S)
        begun = time.perf_counter()
        until = begun + load.seconds
        now = begun
        while now < until:
            for name in rng.choices(names, shares, k=100):
                asked = time.perf_counter()
                try:
                    one(name)
                except Exception as exc:
                    if not failures:
                        click.echo(f"failed: {type(exc).__name__}: {exc}", err=True)
                    failures += 1
                    continue
                now = time.perf_counter()
                times[name].append((now - asked) * 1000.0)
            now = time.perf_counter()
    sending.send(({name: part.tobytes() for name, part in times.items()}, failures, now - begun))


def quantiles(times_ms: Sequence[float]) -> dict[str, float]:
    """Return count, quantiles and the longest, in milliseconds.

    Examples
    --------
    >>> quantiles([3.0, 1.0, 2.0])
    {'count': 3, 'p50_ms': 2.0, 'p99_ms': 3.0, 'p999_ms': 3.0, 'max_ms': 3.0}
    """
    ordered = sorted(times_ms)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    return {
        "count": len(ordered),
        "p50_ms": at(0.5),
        "p99_ms": at(0.99),
        "p999_ms": at(0.999),
        "max_ms": ordered[-1] if ordered else 0.0,
    }


if __name__ == "__main__":
    main()
