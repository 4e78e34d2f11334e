"""What has been counted: by workers, in Redis and in memory, and by one model that reads a log alone."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgpack
import numpy as np
import redis

from stream_app.core.decay import Weights
from stream_app.core.event import Record
from stream_app.core.examples import examples_of, histories_before
from stream_app.core.fold import Fold
from stream_app.core.model import Delta, NextCategoryModel
from stream_app.core.profile import Profile
from stream_app.core.segment_set import SegmentSet
from stream_app.core.statistics import TABLES
from stream_app.core.step import fold_slice

#: Table and the names or numbers on its axes, to a count; ("examples",) to how many were counted.
Counts = Mapping[tuple[Any, ...], int]
#: Partition, first offset and next offset of what is learned from.
Stretch = tuple[int, int, int]
SLICE = 57


def counts_of(delta: Delta) -> Counts:
    """What a delta counts, in a form that equal counts share, read as its format is documented."""
    document = delta.as_document()
    found: Counter[tuple[Any, ...]] = Counter({("examples",): document["examples"]})
    for table, columns in document["tables"].items():
        values = [np.frombuffer(blob, kind).tolist() for kind, blob in columns]
        for *positions, count in zip(*values, strict=True):
            place = (
                document["names"][axis][position] if axis in document["names"] else position
                for axis, position in zip(TABLES[table], positions, strict=True)
            )
            found[(table, *place)] += count
    return {key: count for key, count in found.items() if count}


def held_by(model: NextCategoryModel) -> Counts:
    """What a model holds in memory, pending or not; popularity as long ago as the model tells it apart."""
    counted = model.statistics
    labels, types, assets = counted.labels, counted.event_types, counted.asset_ids
    size = len(labels)
    found: Counter[tuple[Any, ...]] = Counter({("examples",): counted.examples})

    def add(table: str, array: Any, *axes: Sequence[Any]) -> None:
        for place in np.argwhere(array).tolist():
            names = [axis[position] for axis, position in zip(axes, place, strict=True)]
            found[(table, *names)] += int(array[tuple(place)])

    hours, gaps = range(len(counted.hours)), range(len(counted.gaps))
    add("hours", counted.hours[:, :size], hours, labels)
    add("types", counted.types[: len(types), :size], types, labels)
    add("first_times", counted.first_times[:size], labels)
    add("gaps", counted.gaps, gaps, range(2))
    for table in ("last", "latest", "before"):
        add(table, getattr(counted, table)[:size, :size], labels, labels)
    add("popularity", counted.popularity.counts[:size], labels, range(counted.popularity.counts.shape[1]))
    shape = counted.assets.counts.shape
    for pair, row in counted.asset_rows.items():
        own = (assets[pair >> 12], labels[pair & 4095])
        for column in range(shape[1]):
            found[("assets", *own, column)] += int(counted.assets.counts[row, column])
    return {key: count for key, count in found.items() if count}


def held_of(delta: Delta, half_life_ms: float = 1.0) -> Counts:
    """What a model holds that was given a delta and nothing else."""
    model = NextCategoryModel(half_life_ms=half_life_ms)
    model.add(delta)
    return held_by(model)


def stored(redis_url: str, partitions: int) -> Delta:
    """What Redis has of all partitions, base and deltas, read as their format is documented."""
    found: list[Delta] = []
    with redis.Redis.from_url(redis_url) as client:
        raw: Any = client
        for partition in range(partitions):
            model = raw.hgetall(f"sa:{{{partition}}}:model")
            base_number = int(model.get(b"base_number", 0))
            blobs = [model[b"base"]] if base_number else []
            deltas = raw.xrange(f"sa:{{{partition}}}:model-deltas", min=f"{base_number + 1}-0")
            numbers = [int(entry.partition(b"-")[0]) for entry, _ in deltas]
            assert numbers == list(range(base_number + 1, int(model.get(b"number", 0)) + 1))
            blobs += [fields[b"d"] for _, fields in deltas]
            found += [Delta.from_document(unpacked(blob)) for blob in blobs]
    return Delta.merged(found)


def unpacked(blob: bytes) -> Any:
    """Read a stored blob."""
    return msgpack.unpackb(zlib.decompress(blob))


def packed(document: object) -> bytes:
    """Write a blob as it is stored."""
    blob: bytes = msgpack.packb(document)
    return zlib.compress(blob)


def counted(
    log: Mapping[int, Sequence[Record]],
    stretches: Iterable[Stretch],
    weights: Weights,
    *,
    size: int = SLICE,
) -> Delta:
    """What one model counts that reads stretches of a log alone; what lies between is folded only.

    Parameters
    ----------
    log
        Valid records by partition, by offset; offsets may be missing.
    stretches
        What is learned from.
    weights
        Of the fold.
    size
        Records of a slice.
    """
    model = NextCategoryModel(half_life_ms=weights.default_half_life_ms)
    fold = Fold(SegmentSet([], weights), weights, keeps_seen=True)
    learned: dict[int, list[Stretch]] = {}
    for stretch in stretches:
        learned.setdefault(stretch[0], []).append(stretch)
    for partition, own in learned.items():
        profiles: dict[str, Profile] = {}
        stream_ms: int | None = None
        cuts = sorted({0, *(offset for _, *ends in own for offset in ends), log[partition][-1].offset + 1})
        for cut, next_cut in pairwise(cuts):
            records = [record for record in log[partition] if cut <= record.offset < next_cut]
            learns = any(first <= cut < end for _, first, end in own)
            for start in range(0, len(records), size):
                part = records[start : start + size]
                histories = histories_before(profiles, [record.event for record in part], weights)
                result = fold_slice(fold, part, profiles, stream_ms, "event", {})
                stream_ms = result.stream_time_ms
                if learns:
                    model.observe(histories, examples_of(result.applied, weights))
    return model.take_delta()
