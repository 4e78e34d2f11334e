"""What one would write by hand: a Faust agent, one event at a time, one Redis GET and SET each.

    python -m tests.bench.plain_agent --help

For scale beside the worker (`tests.bench` and `tests.bench.model_cost` run it). It keeps decayed label
weights and memberships of users, and publishes who enters and leaves which segment. No exits without an
event, no model, and no promise: an event whose weights were stored and whose offset was not committed counts
twice, a transition can be lost or said twice, two events of one user on two workers overwrite each other. Its
settings are Faust's own, but for those that a short run on one broker needs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import faust
import msgpack
import redis.asyncio as aioredis

PROGRESS_EVERY = 500


@dataclass(frozen=True, slots=True)
class Definitions:
    """What makes a weight and a segment: `definitions.json` of the benchmark."""

    half_life_s: float = 2_592_000.0
    action_weights: dict[str, float] = field(default_factory=dict)
    segments: dict[str, dict[str, Any]] = field(default_factory=dict)
    by_label: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Definitions:
        """Read the file, and index its segments by id and by label."""
        found = json.loads(path.read_text(encoding="utf-8"))
        by_label: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for segment in found["segments"]:
            for label in segment["labels"]:
                by_label[label].append(segment)
        segments = {segment["id"]: segment for segment in found["segments"]}
        return cls(found["half_life_s"], found["action_weights"], segments, dict(by_label))


@click.command()
@click.option("--bootstrap", required=True, help="Kafka, host:port.")
@click.option("--redis-url", required=True, help="Redis.")
@click.option("--topic", required=True, help="Events, JSON; must exist.")
@click.option("--entered", default="segment-entered", show_default=True, help="Topic; must exist.")
@click.option("--exited", default="segment-exited", show_default=True, help="Topic; must exist.")
@click.option(
    "--definitions",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Segments, as JSON (default: none, only weights are kept).",
)
@click.option("--group", required=True, help="Consumer group.")
@click.option("--events", required=True, type=click.IntRange(1), help="Stop after so many.")
@click.option("--state-dir", type=click.Path(file_okay=False), help="For Faust's own files.")
@click.option("--session-timeout", default=6.0, show_default=True, help="Of the group, seconds.")
def main(
    bootstrap: str,
    redis_url: str,
    topic: str,
    entered: str,
    exited: str,
    definitions: Path | None,
    group: str,
    events: int,
    state_dir: str | None,
    session_timeout: float,
) -> None:
    """Keep decayed label weights of users in Redis and publish transitions, until so many events are done."""
    logging.basicConfig(level=logging.WARNING)
    known = Definitions() if definitions is None else Definitions.read(definitions)
    with tempfile.TemporaryDirectory(prefix="plain-agent-", dir=state_dir) as directory:
        app = faust.App(
            group,
            broker=f"kafka://{bootstrap}",
            datadir=directory,
            autodiscover=False,
            web_enabled=False,
            topic_disable_leader=True,
            # The embedded broker lets a new member wait for half of it.
            broker_session_timeout=session_timeout,
            broker_heartbeat_interval=session_timeout / 3.0,
        )
        done = asyncio.run(_run(app, redis_url, (topic, entered, exited), known, events))
    click.echo(f"did {done} events")


async def _run(
    app: faust.App, redis_url: str, topics: tuple[str, str, str], definitions: Definitions, events: int
) -> int:
    redis = aioredis.Redis.from_url(redis_url)
    log, entered, exited = (app.topic(name, value_serializer="raw", key_serializer="raw") for name in topics)
    end = asyncio.Event()
    done = 0

    @app.agent(log)
    async def learn(stream: Any) -> None:
        nonlocal done
        async for value in stream:
            event = json.loads(value)
            key = f"plain:{event['user_id']}"
            stored: Any = await redis.get(key)
            packed, transitions = fold(stored, event, definitions)
            await redis.set(key, packed)
            for transition in transitions:
                to = entered if transition["status"] == "entered" else exited
                await to.send(key=transition["user_id"].encode(), value=json.dumps(transition).encode())
            done += 1
            if done % PROGRESS_EVERY == 0 or done == events:
                click.echo(f"progress {done}")
            if done == events:
                end.set()

    await app.start()
    stopped = asyncio.create_task(app.wait_until_stopped())
    ended = asyncio.create_task(end.wait())
    await asyncio.wait({stopped, ended}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    # Its producer delivers what it still holds.
    await app.stop()
    await redis.aclose()
    return done


def fold(
    stored: bytes | None, event: dict[str, Any], definitions: Definitions
) -> tuple[bytes, list[dict[str, Any]]]:
    """Add an event to what is stored of its user; return that, and who enters and leaves what.

    Stored are each label with its weight and the instant that this is of, the segments that the user is in,
    and how many transitions there were in each.

    Examples
    --------
    >>> tea = {"id": "tea", "labels": ["tea"], "min_weight": 1.2, "exit_weight": 1.2}
    >>> known = Definitions(segments={"tea": tea}, by_label={"tea": [tea]})
    >>> event = {"user_id": "u1", "event_type": "view", "labels": ["tea"], "timestamp": 0.0}
    >>> first, said = fold(None, event, known)
    >>> later = {**event, "labels": ["tea", "milk"], "timestamp": known.half_life_s}
    >>> second, said = fold(first, later, known)
    >>> msgpack.unpackb(second)
    {'weights': {'tea': [1.5, 2592000.0], 'milk': [1.0, 2592000.0]}, 'in': ['tea'], 'seqs': {'tea': 1}}
    >>> [(transition["segment_id"], transition["status"]) for transition in said]
    [('tea', 'entered')]
    """
    user = msgpack.unpackb(stored) if stored else {"weights": {}, "in": [], "seqs": {}}
    weights, now_s, half_life_s = user["weights"], event["timestamp"], definitions.half_life_s
    transitions = []

    def weight_of(segment: dict[str, Any]) -> float:
        best = 0.0
        for label in segment["labels"]:
            if label in weights:
                weight, since_s = weights[label]
                best = max(best, weight * 2.0 ** ((since_s - now_s) / half_life_s))
        return best

    def say(segment_id: str, status: str, weight: float) -> None:
        user["seqs"][segment_id] = seq = user["seqs"].get(segment_id, 0) + 1
        transitions.append(
            {
                "user_id": event["user_id"],
                "segment_id": segment_id,
                "status": status,
                "seq": seq,
                "time": round(now_s * 1000),
                "weight": weight,
            }
        )

    for segment_id in list(user["in"]):
        segment = definitions.segments[segment_id]
        weight = weight_of(segment)
        if weight < segment["exit_weight"]:
            user["in"].remove(segment_id)
            say(segment_id, "exited", weight)
    added = definitions.action_weights.get(event["event_type"], 1.0)
    for label in event["labels"]:
        weight, since_s = weights.get(label, (0.0, now_s))
        weights[label] = [added + weight * 2.0 ** ((since_s - now_s) / half_life_s), now_s]
    for label in event["labels"]:
        for segment in definitions.by_label.get(label, ()):
            if segment["id"] not in user["in"]:
                weight = weight_of(segment)
                if weight >= segment["min_weight"]:
                    user["in"].append(segment["id"])
                    say(segment["id"], "entered", weight)
    packed: bytes = msgpack.packb(user)
    return packed, transitions


if __name__ == "__main__":
    main()
