"""What a user costs: bytes in Redis, beside a plain hash with the same labels, and bytes in the worker.

    python -m tests.bench.memory --help

In Redis, users with 5, 20 and 100 labels are made by the real worker; then each key is asked for its size by
MEMORY USAGE with SAMPLES 0, which counts all of it. What the remembered event ids take is the difference to
the same profile without them, stored under a key of the same length; what is left is also asked for without
memberships, which a plain hash has none of. The plain hash holds, under the key `plain:<user_id>`, one field
per label: its weight in six significant digits and the Unix seconds of the instant that it is of, with a
space between. A profile keeps weights per event type, a plain hash does not, so both are made twice: from
events of one type, and of two in the workload's shares.

A membership is in two indexes: its segment's members, and once a user in what is due. Both are sorted sets,
and small ones are kept much tighter by Redis; the sets here are long enough to be kept as large ones are.

In the worker, the resident memory after a run over few users is compared with that after as many events of
many users. Several sizes tell a bound: from there on the memory no longer grows with the users.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import Any, Final

import click
import msgspec
import numpy as np
import redis

from stream_app.adapters.profile_store import keys
from stream_app.core.decay import Weights
from stream_app.core.partitioner import partition_of
from stream_app.core.profile import pack, unpack, weights_at
from tests.backends import Names
from tests.bench import workload
from tests.bench.live import PARTITIONS, machine, note, send_all, stage, table, wait_folded
from tests.bench.measure import BROKERS, Broker

LABELS, USERS, WORKER_USERS = (5, 20, 100), 2_000, (1_000, 50_000, 200_000)
#: More than a profile remembers the ids of.
LEAST_EVENTS: Final = 40
#: Few, so that each has many members.
SEGMENTS: Final = 5
FOLD_DEADLINE_S: Final = 900.0
#: What a worker has let go of is given back a little later.
REST_S: Final = 1.0
STATUS: Final = re.compile(r"^(VmRSS|VmHWM):\s+(\d+) kB$", re.MULTILINE)


def measure(
    broker: Broker = "embedded",
    labels: Sequence[int] = LABELS,
    users: int = USERS,
    worker_users: Sequence[int] = WORKER_USERS,
    *,
    model: bool = False,
) -> dict[str, Any]:
    """Measure bytes of users in Redis and in the worker.

    Parameters
    ----------
    broker
        Which servers; bytes depend on the Redis (Valkey where embedded).
    labels
        How many labels each user has, one measurement each.
    users
        How many of them.
    worker_users
        How many users the worker meets, one run each, in growing order.
    model
        Whether the next-category model is on.

    Returns
    -------
    dict
        Per count of labels and event types, bytes; the worker's resident memory by count of users.
    """
    rows = [_in_redis(broker, count, types, users, model=model) for count in labels for types in (1, 2)]
    return {
        "broker": broker,
        "machine": machine(),
        "users": users,
        "model": model,
        "redis": rows,
        "worker": _in_worker(broker, sorted(worker_users), model=model) if len(worker_users) > 1 else None,
    }


# --- in Redis ----------------------------------------------------------------------------------------------


def _in_redis(broker: Broker, labels: int, types: int, users: int, *, model: bool) -> dict[str, Any]:
    names = Names.unique()
    tables: list[dict[str, Any]] = [
        {
            "id": f"members-{n}",
            "name": f"Members {n}",
            "labels": [f"label-{x}" for x in range(n, _vocabulary(labels), SEGMENTS)],
            "min_weight": 0.5,
        }
        for n in range(SEGMENTS)
    ]
    values = list(_events(labels, types, users))
    with ExitStack() as stack:
        run_on = stack.enter_context(stage(broker))
        segments, _ = workload.write_definitions(run_on.directory, tables)
        run_on.create_topics(names)
        environment = run_on.environment(names, WORKER__CLOCK="event", MODEL__ENABLED=model)
        programs = stack.enter_context(run_on.programs(environment | workload.weights_environment()))
        client = stack.enter_context(run_on.redis())
        send_all(run_on, names.events, [user for user, _ in values], [value for _, value in values])
        before = int(client.info("memory")["used_memory"])
        worker = programs.start("worker", f"--segments={segments}")
        wait_folded(run_on, worker, len(values), f"users with {labels} labels", FOLD_DEADLINE_S)
        worker.stop()
        used = int(client.info("memory")["used_memory"]) - before
        found = _sizes(client, users)
        version = client.info("server")
    return {
        "labels": labels,
        "event_types": types,
        "users": users,
        "redis": f"{version.get('server_name', 'redis')} {version['redis_version']}",
        "all_keys_per_user": used / users,
        **found,
    }


def _vocabulary(labels: int) -> int:
    return 3 * labels


def _events(labels: int, types: int, users: int) -> Iterator[tuple[str, bytes]]:
    """Make users who each have exactly so many labels, and more events than a profile remembers."""
    rng = np.random.default_rng(1)
    own = np.array([rng.permutation(_vocabulary(labels))[:labels] for _ in range(users)])
    rounds = max(LEAST_EVENTS, labels)
    step_s = workload.SPAN_S / 2 / (rounds * users)
    now_s = float(workload.BEGIN_S)
    for number in range(rounds):
        bought = rng.random(users) < (workload.PURCHASE_SHARE if types > 1 else 0.0)
        for user in range(users):
            now_s += step_s
            yield (
                f"user-{user:06d}",
                msgspec.json.encode(
                    {
                        "event_id": f"e{number}-{user}",
                        "user_id": f"user-{user:06d}",
                        "event_type": "purchase" if bought[user] else "view",
                        "labels": [f"label-{own[user, number % labels]}"],
                        "timestamp": round(now_s, 3),
                    }
                ),
            )


def _sizes(client: redis.Redis, users: int) -> dict[str, Any]:
    """Ask for the sizes of what the worker left; writes scratch keys, which go again."""
    weights = Weights(half_life_s=workload.HALF_LIFE_S)
    total, without, bare, plain, value = [], [], [], [], []
    memberships = 0
    for number in range(users):
        user = f"user-{number:06d}"
        names = keys(partition_of(user.encode(), PARTITIONS))
        key = names.profile(user)
        blob: Any = client.get(key)
        profile = unpack(user, blob)
        memberships += len(profile.exits_at_ms)
        now_ms = profile.landmark_ms
        scratch, hashed = "x" * len(key), f"plain:{user}"
        fields: dict[str, float] = {}
        for sums in weights_at(profile, weights, now_ms).values():
            for label, weight in sums.labels.items():
                fields[label] = fields.get(label, 0.0) + weight
        profile.recent_ids = type(profile.recent_ids)()
        client.set(scratch, pack(profile))
        client.hset(hashed, mapping={label: f"{w:.6g} {now_ms // 1000}" for label, w in fields.items()})
        total.append(_usage(client, key))
        without.append(_usage(client, scratch))
        plain.append(_usage(client, hashed))
        profile.seqs, profile.exits_at_ms = {}, {}
        client.set(scratch, pack(profile))
        bare.append(_usage(client, scratch))
        value.append(len(blob))
        client.delete(scratch, hashed)
    index = {"members": 0, "due": 0}
    sets, entries = 0, 0
    for partition in range(PARTITIONS):
        names = keys(partition)
        for n in range(SEGMENTS):
            members = names.members(f"members-{n}")
            if client.exists(members):
                index["members"] += _usage(client, members)
                sets, entries = sets + 1, entries + int(client.zcard(members))
        if client.exists(names.due):
            index["due"] += _usage(client, names.due)
    bytes_per_membership = sum(index.values()) / max(1, entries)
    return {
        "profile": mean(total),
        "profile_value": mean(value),
        "ids": mean(total) - mean(without),
        "profile_without_ids": mean(without),
        "profile_without_ids_and_memberships": mean(bare),
        "plain_hash": mean(plain),
        "without_ids_over_hash": mean(without) / mean(plain),
        "memberships_per_user": memberships / users,
        "members_set_length": entries / max(1, sets),
        "index_per_membership": bytes_per_membership,
        "members_per_membership": index["members"] / max(1, entries),
        "due_per_user": index["due"] / users,
    }


def _usage(client: redis.Redis, key: str) -> int:
    size: Any = client.memory_usage(key, samples=0)
    if size is None:
        raise click.ClickException(f"expected a key {key} to ask for its size, got none")
    return int(size)


# --- in the worker -----------------------------------------------------------------------------------------


def _in_worker(broker: Broker, sizes: Sequence[int], *, model: bool) -> dict[str, Any]:
    """Run one worker per size over as many events of so many users; return its memory at the end."""
    events, found = max(sizes), []
    for users in sizes:
        names = Names.unique()
        lines = workload.Workload(events=events, users=users).lines()
        # Everybody comes equally often: each of the users is met, however many there are.
        values = [_of_user(line, number % users) for number, line in enumerate(lines)]
        with ExitStack() as stack:
            run_on = stack.enter_context(stage(broker))
            segments, _ = workload.write_definitions(run_on.directory, workload.definitions(200))
            run_on.create_topics(names)
            environment = run_on.environment(names, WORKER__CLOCK="event", MODEL__ENABLED=model)
            programs = stack.enter_context(run_on.programs(environment | workload.weights_environment()))
            send_all(run_on, names.events, [f"u{n % users}" for n in range(events)], values)
            note(f"a worker that meets {users:,} users")
            worker = programs.start("worker", f"--segments={segments}")
            wait_folded(run_on, worker, events, f"{users:,} users", FOLD_DEADLINE_S)
            time.sleep(REST_S)
            status = dict(STATUS.findall(Path(f"/proc/{worker.pid}/status").read_text()))
        found.append(
            {"users": users, "rss": int(status["VmRSS"]) * 1024, "most_rss": int(status["VmHWM"]) * 1024}
        )
    first, last = found[0], found[-1]
    return {
        "events": events,
        "sizes": found,
        "per_user": (last["rss"] - first["rss"]) / (last["users"] - first["users"]),
    }


class _Event(msgspec.Struct):
    event_id: str
    user_id: str
    event_type: str
    labels: list[str]
    timestamp: float


def _of_user(line: bytes, user: int) -> bytes:
    event = msgspec.json.decode(line, type=_Event)
    event.user_id = f"u{user}"
    return msgspec.json.encode(event)


# --- for people --------------------------------------------------------------------------------------------


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Say it for people."""
    rows: list[list[object]] = [
        [
            "bytes in Redis",
            "plain hash",
            "profile",
            "without ids",
            "/ hash",
            "nor memberships",
            "ids",
            "members",
            "due/user",
        ]
    ]
    rows[0] += ["index/membership", "memberships", "set length"]
    for row in report["redis"]:
        rows.append(
            [
                f"{row['labels']} labels, {row['event_types']} event types",
                row["plain_hash"],
                row["profile"],
                row["profile_without_ids"],
                f"{row['without_ids_over_hash']:.2f}",
                row["profile_without_ids_and_memberships"],
                row["ids"],
                row["members_per_membership"],
                row["due_per_user"],
                row["index_per_membership"],
                row["memberships_per_user"],
                row["members_set_length"],
            ]
        )
    out = [
        f"{report['redis'][0]['redis']}, {report['users']:,} users" if report["redis"] else "",
        table(rows),
    ]
    if report["worker"]:
        sizes: list[list[object]] = [["worker, resident MiB", "now", "at most"]]
        for size in report["worker"]["sizes"]:
            sizes.append([f"{size['users']:,} users", size["rss"] / 2**20, size["most_rss"] / 2**20])
        out += [table(sizes), f"{report['worker']['per_user']:.0f} bytes a user"]
    return out


@click.command(context_settings={"max_content_width": 110})
@click.option("--broker", type=click.Choice(BROKERS), default="embedded", show_default=True, help="Servers.")
@click.option("--labels", type=click.IntRange(1, 400), multiple=True, default=LABELS, help="Each: one row.")
@click.option("--users", type=click.IntRange(10), default=USERS, show_default=True, help="Of each row.")
@click.option(
    "--worker-users",
    type=click.IntRange(1),
    multiple=True,
    default=WORKER_USERS,
    help="Users that a worker meets; two at least, else the worker is not measured.",
)
@click.option("--model/--no-model", default=False, show_default=True, help="The next-category model.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def main(
    broker: Broker,
    labels: Sequence[int],
    users: int,
    worker_users: Sequence[int],
    *,
    model: bool,
    as_json: bool,
) -> None:
    """Measure bytes per user in Redis and in the worker.

    \b
      python -m tests.bench.memory
      python -m tests.bench.memory --labels 5 --users 500 --worker-users 1   # Redis only, quickly
      python -m tests.bench.memory --broker apache      # with the redis-server of the PATH
    """
    report = measure(broker, labels, users, worker_users, model=model)
    click.echo(json.dumps(report) if as_json else "\n".join(report_lines(report)))


if __name__ == "__main__":
    main()
