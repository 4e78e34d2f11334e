"""Stored state for the tests of readers: written by the worker's own store, with profiles of every shape."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping, Sequence

from stream_app.adapters import functions
from stream_app.adapters.profile_store import Commit, Identity, ProfileStore, connect
from stream_app.core.decay import NEVER_MS, EventTypeWeight, Weights
from stream_app.core.partitioner import partition_of
from stream_app.core.profile import REMEMBERED_IDS, Discovery, Profile, TypeSums
from stream_app.core.scores import Recommendation, Scored, pack_scores

T0 = 1_767_323_045_678
DAY_MS = 86_400_000
PARTITIONS = 4
WEIGHTS = Weights(
    half_life_s=30 * 86_400.0,
    event_types={
        "purchase": EventTypeWeight(3.0, 90 * 86_400.0),
        'odd "]]\\\n\0 @VERSION@ %d é\N{GRINNING FACE}': EventTypeWeight(1.0, 12_345.678),
    },
)
EVENT_TYPES = ("view", *WEIGHTS.event_types)
MODEL = "9f2c4e5d6b7a8190"
LETTERS = "aé\N{GRINNING FACE}"


async def store(
    url: str,
    profiles: Sequence[Profile] | Mapping[int, Sequence[Profile]] = (),
    *,
    scores: Sequence[Scored] = (),
    weights: Weights = WEIGHTS,
    clock: str = "wall",
    partitions: int = PARTITIONS,
    stream_time_ms: int = T0,
) -> str:
    """Write what a worker would have written, and load the functions; returns their version.

    Parameters
    ----------
    url
        Redis.
    profiles
        Each goes to its user's partition, or to the one that is told.
    scores
        Of any of these users.
    weights, clock, partitions
        Settings of the service.
    stream_time_ms
        Of every partition.
    """
    by_partition: dict[int, list[Profile]] = {partition: [] for partition in range(partitions)}
    if isinstance(profiles, Mapping):
        by_partition |= {partition: list(part) for partition, part in profiles.items()}
    else:
        for profile in profiles:
            by_partition[partition_of(profile.user_id.encode(), partitions)].append(profile)
    identity = Identity("cluster-1", "events", partitions, "stream-app", clock, weights.fingerprint())
    made = ProfileStore(connect(url), "worker-a")
    try:
        for partition, part in by_partition.items():
            claim = await made.claim(
                partition,
                identity,
                last_epoch=0,
                log_start=0,
                processed_below=None,
                replay_when_new=None,
                definitions=("f" * 16, "{}"),
                model_on=bool(scores),
            )
            users = {profile.user_id: profile for profile in part}
            written = Commit(
                users,
                watermark=1,
                stream_time_ms=stream_time_ms,
                scores={scored.user_id: pack_scores(scored) for scored in scores if scored.user_id in users},
                scored_ms=stream_time_ms,
            )
            await made.commit(partition, claim.watermark.epoch, claim.watermark.commit + 1, written)
    finally:
        await made.close()
    async with contextlib.aclosing(connect(url)) as loading:
        return await functions.load(loading, weights, "wall" if clock == "wall" else "event")


def scored(user_id: str, labels: Sequence[str], *, at_ms: int = T0) -> Scored:
    """Return what one scoring leaves behind: awkward floats, an asset and none."""
    return Scored(
        user_id,
        at_ms,
        [(label, 1 / (3 + rank)) for rank, label in enumerate(labels)],
        [
            Recommendation(
                "view",
                None if rank % 2 else f"asset-{rank}",
                (label, "other"),
                1 / (7 + rank),
                0.1 / (9 + rank),
            )
            for rank, label in enumerate(labels)
        ],
        MODEL,
    )


def random_profile(rng: random.Random, user_id: str) -> Profile:
    """Return a profile with any of what a profile may hold, up to its limits."""
    landmark_ms = rng.choice([0, T0 - rng.randrange(DAY_MS), T0 - rng.randrange(300 * DAY_MS)])

    def names(most: int, longest: int) -> list[str]:
        count = rng.choice([0, 1, rng.randrange(most), most])
        return [f"{n}{rng.choice(LETTERS) * rng.randrange(longest - 4)}" for n in range(count)]

    def amount() -> float:
        return rng.choice([rng.random(), 10 ** rng.uniform(-12, 150), float(rng.randrange(100))])

    weights = {
        event_type: TypeSums(
            amount(), {name: amount() for name in names(60, 64)}, {name: amount() for name in names(30, 128)}
        )
        for event_type in rng.sample(EVENT_TYPES, rng.randrange(1, len(EVENT_TYPES) + 1))
    }
    seqs: dict[str, int] = {}
    exits_at_ms: dict[str, int] = {}
    for n in range(rng.randrange(20)):
        seqs[f"segment-{n}"] = rng.randrange(1, 100)
        if seqs[f"segment-{n}"] % 2:
            exits_at_ms[f"segment-{n}"] = rng.choice([T0 + rng.randrange(-DAY_MS, 100 * DAY_MS), NEVER_MS])
    forget_ms = T0 + rng.randrange(-DAY_MS, 300 * DAY_MS)
    discovery = {
        f"discovery-{n}": Discovery(1, T0, min(T0 + 3 * DAY_MS, forget_ms), ("tea", "é"), rng.random())
        if rng.random() < 0.5
        else Discovery(2, T0)
        for n in range(rng.choice([0, 0, 3]))
    }
    return Profile(
        user_id,
        landmark_ms,
        weights,
        seqs,
        exits_at_ms,
        rng.randbytes(8 * rng.choice([0, 1, REMEMBERED_IDS])),
        applied=rng.choice([1, 2**31, 2**60]),
        forget_ms=forget_ms,
        last_transition_ms=rng.choice([None, T0]),
        definitions="f" * 16,
        seen_ms=rng.choice([{}, {label: T0 for sums in weights.values() for label in sums.labels}]),
        discovery=discovery,
    )
