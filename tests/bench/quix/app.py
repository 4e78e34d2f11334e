"""The benchmark's work as a Quix Streams application, written as its documentation would have it.

    app.py --help

It runs in a venv of its own (see `tests.bench.peers`) and imports nothing of the service. Decided here: the
pipeline, the settings, and when the program ends. One stateful function reads and writes one user's profile
per event, in the RocksDB store that Quix Streams keeps per partition, backed by its changelog topic; it
returns transitions, and each goes to the topic that its status names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quixstreams import Application  # type: ignore[import-not-found]
from quixstreams.models import Topic  # type: ignore[import-not-found]
from quixstreams.state import State  # type: ignore[import-not-found]

PROGRESS_EVERY = 5_000
PROFILE = "profile"


def folding(definitions: dict[str, Any]) -> Callable[[dict[str, Any], State], list[dict[str, Any]]]:
    """Make the function that folds an event into its user's profile and returns the transitions.

    A profile is `[weights, memberships]`: label -> [weight, the instant that this is of], and
    segment -> [1 for inside, number of transitions].
    """
    half_life_s: float = definitions["half_life_s"]
    action_weights: dict[str, float] = definitions["action_weights"]
    segments = {
        segment["id"]: (segment["id"], segment["labels"], segment["min_weight"], segment["exit_weight"])
        for segment in definitions["segments"]
    }
    naming: defaultdict[str, list[tuple[str, list[str], float, float]]] = defaultdict(list)
    for segment in segments.values():
        for label in segment[1]:
            naming[label].append(segment)

    def strongest(weights: dict[str, list[float]], labels: list[str], now: float) -> float:
        most = 0.0
        for label in labels:
            if label in weights:
                weight, since = weights[label]
                weight *= 2.0 ** ((since - now) / half_life_s)
                if weight > most:
                    most = weight
        return most

    def fold(event: dict[str, Any], state: State) -> list[dict[str, Any]]:
        user, now = event["user_id"], event["timestamp"]
        stored = state.get(PROFILE)
        weights: dict[str, list[float]] = stored[0] if stored else {}
        memberships: dict[str, list[int]] = stored[1] if stored else {}
        transitions: list[dict[str, Any]] = []

        def say(segment_id: str, status: str, seq: int, weight: float) -> None:
            transitions.append(
                {
                    "user_id": user,
                    "segment_id": segment_id,
                    "status": status,
                    "seq": seq,
                    "time": round(now * 1000),
                    "weight": weight,
                }
            )

        for segment_id, membership in memberships.items():
            if membership[0]:
                _, labels, _, exit_weight = segments[segment_id]
                weight = strongest(weights, labels, now)
                if weight < exit_weight:
                    membership[0] = 0
                    membership[1] += 1
                    say(segment_id, "exited", membership[1], weight)
        added = action_weights.get(event["event_type"], 1.0)
        for label in event["labels"]:
            weight, since = weights.get(label, (0.0, now))
            weights[label] = [weight * 2.0 ** ((since - now) / half_life_s) + added, now]
        for label in event["labels"]:
            for segment_id, labels, min_weight, _ in naming.get(label, ()):
                present = memberships.get(segment_id)
                if present is None or not present[0]:
                    weight = strongest(weights, labels, now)
                    if weight >= min_weight:
                        seq = present[1] + 1 if present else 1
                        memberships[segment_id] = [1, seq]
                        say(segment_id, "entered", seq, weight)
        state.set(PROFILE, [weights, memberships])
        return transitions

    return fold


def run(options: argparse.Namespace) -> int:
    """Process events until so many are done; returns how many were."""
    app = Application(
        broker_address=options.bootstrap,
        consumer_group=options.group,
        auto_offset_reset="earliest",
        state_dir=options.state_dir,
        # At least once and a checkpoint every 5 s, as by default: it writes changelog, store (with fsync)
        # and offsets; a profile that changed several times since the last is written once. 30 s gain nothing.
        # librdkafka's advice for throughput is to wait longer than its 5 ms, for fuller batches.
        producer_extra_config={"linger.ms": 100},
        loglevel="WARNING",
        on_message_processed=lambda topic, partition, offset: count(),
    )
    entered, exited = app.topic(options.entered), app.topic(options.exited)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if done % PROGRESS_EVERY == 0 or done == options.events:
            print(f"progress {done}", flush=True)
            if done == options.events:
                app.stop()

    def topic_of(transition: dict[str, Any], key: Any, timestamp: int, headers: Any) -> Topic:
        return entered if transition["status"] == "entered" else exited

    fold = folding(json.loads(Path(options.definitions).read_bytes()))
    app.dataframe(app.topic(options.topic)).apply(fold, stateful=True, expand=True).to_topic(topic_of)
    # Ends with a checkpoint, which waits for the delivery of all that was produced.
    app.run()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Decayed label weights per user, segments entered and left, by Quix Streams; "
        "part of `make bench`."
    )
    parser.add_argument("--bootstrap", required=True, help="Kafka, host:port")
    parser.add_argument("--topic", required=True, help="events, JSON, key user_id; read from the start")
    parser.add_argument("--entered", required=True, help="where to say that a user entered; must exist")
    parser.add_argument("--exited", required=True, help="where to say that a user left; must exist")
    parser.add_argument("--definitions", required=True, help="file with the segments, JSON")
    parser.add_argument("--group", required=True, help="consumer group")
    parser.add_argument("--events", required=True, type=int, help="end after so many")
    parser.add_argument("--state-dir", required=True, help="folder for RocksDB")
    options = parser.parse_args()
    done = run(options)
    if done < options.events:
        sys.exit(f"ended by a signal after {done} of {options.events} events")
    print(f"did {done} events", flush=True)


if __name__ == "__main__":
    main()
