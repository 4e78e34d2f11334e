"""Two workers on four partitions predict nearly as well as one that sees everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stream_app.adapters.transport import SLICE_RECORDS
from stream_app.core.decay import Weights
from stream_app.core.event import Event
from stream_app.core.model import Delta, NextCategoryModel
from stream_app.core.partitioner import partition_of
from stream_app.evaluation.files import EventFile
from stream_app.evaluation.worker import MemoryWorker

PARTITIONS = 4
#: Events of the whole between two exchanges: at 1,000 a second, the two seconds of a short checkpoint_s.
EXCHANGE_EVENTS = 2_000


def slices(path: Path) -> Iterator[list[Event]]:
    file = EventFile(str(path), leave_out=["return"], sample_users=None, sort=False)
    return file.slices(SLICE_RECORDS, lambda share, done: None)


def document(model: NextCategoryModel) -> dict[str, object]:
    """What a model has counted in all, whatever the order."""
    statistics = model.statistics
    order = np.argsort(np.array(statistics.labels, np.object_))
    return {
        "labels": [statistics.labels[place] for place in order.tolist()],
        "popularity": statistics.popularity.totals(len(order))[order].tolist(),
        "first_times": statistics.first_times[order].tolist(),
        "last": statistics.last[np.ix_(order, order)].tolist(),
        "latest": statistics.latest[np.ix_(order, order)].tolist(),
        "before": statistics.before[np.ix_(order, order)].tolist(),
        "gaps": statistics.gaps.tolist(),
    }


def exchange(models: list[NextCategoryModel], pending: list[list[Delta]]) -> None:
    """Let every model take in what the others have learned, as `adapters/learning.py` does through Redis."""
    deltas = [Delta.merged(own) for own in pending]
    state = NextCategoryModel.average([model.ranker_state() for model in models])
    for number, model in enumerate(models):
        for other, delta in enumerate(deltas):
            if other != number:
                model.add(delta)
        model.set_ranker_state(state)
    for own in pending:
        own.clear()


def test_two_workers_on_four_partitions_keep_95_percent_of_the_discovery_mrr_of_one(
    shared_data: Path,
) -> None:
    path = shared_data / "ciao.jsonl.gz"
    one = MemoryWorker(Weights())
    alone = np.concatenate([one.go_through(part)[1].discovery_rank for part in slices(path)])

    # A partition a memory worker, since profiles belong to partitions; two of them share a model.
    workers = [MemoryWorker(Weights()) for _ in range(PARTITIONS)]
    models = [workers[0].model, workers[1].model]
    for number, worker in enumerate(workers):
        worker.model = models[number % 2]
    pending: list[list[Delta]] = [[], []]
    found = []
    seen = 0
    for part in slices(path):
        by_partition: dict[int, list[Event]] = {}
        for event in part:
            by_partition.setdefault(partition_of(event.user_id.encode(), PARTITIONS), []).append(event)
        for partition, events in sorted(by_partition.items()):
            _, observed = workers[partition].go_through(events)
            found.append(observed.discovery_rank)
            pending[partition % 2].append(workers[partition].delta)
        seen += len(part)
        if seen >= EXCHANGE_EVENTS:
            seen = 0
            exchange(models, pending)
    exchange(models, pending)
    together = np.concatenate(found)

    mrr_alone, mrr_together = (float(np.nanmean(1.0 / ranks)) for ranks in (alone, together))
    print(f"discovery MRR: one worker {mrr_alone:.4f}, two {mrr_together:.4f}")
    assert np.count_nonzero(~np.isnan(alone)) == np.count_nonzero(~np.isnan(together))
    assert mrr_together >= 0.95 * mrr_alone
    assert document(models[0]) == document(models[1]) == document(one.model)
