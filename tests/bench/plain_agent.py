"""What one would write by hand: a Faust agent, one event at a time, one Redis GET and SET each.

    python -m tests.bench.plain_agent --help

For scale beside the worker (`tests.bench.model_cost` runs it). It keeps decayed label weights per user and
nothing else: no segments, no transitions, no exits by decay, no model, and no promise: an event whose
weights were stored and whose offset was not committed counts twice, two events of one user on two workers
overwrite each other. Its settings are Faust's own, but for those that a short run on one broker needs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
from typing import Any

import click
import faust
import msgpack
import redis.asyncio as aioredis

HALF_LIFE_S = 2_592_000.0


@click.command()
@click.option("--bootstrap", required=True, help="Kafka, host:port.")
@click.option("--redis-url", required=True, help="Redis.")
@click.option("--topic", required=True, help="Events, JSON; must exist.")
@click.option("--group", required=True, help="Consumer group.")
@click.option("--events", required=True, type=click.IntRange(1), help="Stop after so many.")
@click.option("--session-timeout", default=6.0, show_default=True, help="Of the group, seconds.")
def main(bootstrap: str, redis_url: str, topic: str, group: str, events: int, session_timeout: float) -> None:
    """Keep decayed label weights of users in Redis, until so many events are done."""
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="plain-agent-") as directory:
        done = asyncio.run(_run(bootstrap, redis_url, topic, group, events, session_timeout, directory))
    click.echo(f"did {done} events")


async def _run(
    bootstrap: str,
    redis_url: str,
    topic: str,
    group: str,
    events: int,
    session_timeout_s: float,
    directory: str,
) -> int:
    app = faust.App(
        group,
        broker=f"kafka://{bootstrap}",
        datadir=directory,
        autodiscover=False,
        web_enabled=False,
        topic_disable_leader=True,
        # The embedded broker lets a new member wait for half of it.
        broker_session_timeout=session_timeout_s,
        broker_heartbeat_interval=session_timeout_s / 3.0,
    )
    redis = aioredis.Redis.from_url(redis_url)
    end = asyncio.Event()
    done = 0

    @app.agent(app.topic(topic, value_serializer="raw", key_serializer="raw"))
    async def learn(stream: Any) -> None:
        nonlocal done
        async for value in stream:
            event = json.loads(value)
            key = f"plain:{event['user_id']}"
            stored: Any = await redis.get(key)
            await redis.set(key, fold(stored, event["labels"], event["timestamp"]))
            done += 1
            if done == events:
                end.set()

    await app.start()
    stopped = asyncio.create_task(app.wait_until_stopped())
    ended = asyncio.create_task(end.wait())
    await asyncio.wait({stopped, ended}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    await app.stop()
    await redis.aclose()
    return done


def fold(stored: bytes | None, labels: list[str], timestamp_s: float) -> bytes:
    """Add an event to a user's label weights: each label with its weight and the instant that this is of.

    Examples
    --------
    >>> first = fold(None, ["tea"], 0.0)
    >>> msgpack.unpackb(fold(first, ["tea", "milk"], HALF_LIFE_S))
    {'tea': [1.5, 2592000.0], 'milk': [1.0, 2592000.0]}
    """
    weights: dict[str, list[float]] = msgpack.unpackb(stored) if stored else {}
    for label in labels:
        weight, since_s = weights.get(label, (0.0, timestamp_s))
        weights[label] = [1.0 + weight * 2.0 ** ((since_s - timestamp_s) / HALF_LIFE_S), timestamp_s]
    packed: bytes = msgpack.packb(weights)
    return packed


if __name__ == "__main__":
    main()
