"""Histories as rows: what is known before each example, however the examples are cut into batches."""

import numpy as np
import pytest

from stream_app.core.features import LATEST
from stream_app.core.history import Example, History, Slice, rows_of
from tests.unit.model_logs import HALF_LIFE_MS, START_MS, Journal, random_examples

LABELS = [f"label-{number}" for number in range(12)]
PLACES = {label: place for place, label in enumerate(LABELS)}


@pytest.mark.parametrize("seed", range(12))
def test_a_row_knows_what_its_user_did_before_it_and_nothing_else(seed: int) -> None:
    examples = random_examples(seed, 120, users=4, fresh=0.05)
    journal = Journal()
    for example in examples[:60]:
        journal.add(example)
    part = Slice(journal.histories(examples[60:]), examples[60:], PLACES, HALF_LIFE_MS)
    cut = 20 + seed
    for begin, end in ((0, cut), (cut, 60)):
        batch = part.rows(begin, end, len(LABELS))
        row_of = {number: row for row, number in enumerate(batch.order.tolist())}
        for number in range(begin, end):
            example, row = examples[60 + number], row_of[number]
            known = {} if example.fresh else journal.seen_ms.get(example.user_id, {})
            own = batch.rows.rows == row
            labels = [LABELS[place] for place in batch.rows.labels[own].tolist()]
            ages_ms = dict(zip(labels, batch.rows.ages_ms[own].tolist(), strict=True))
            assert ages_ms == {label: example.event_time_ms - seen_ms for label, seen_ms in known.items()}
            assert np.flatnonzero(batch.rows.engaged[row]).tolist() == sorted(
                PLACES[label] for label in known
            )
            latest = [PLACES[label] for label in known][: -LATEST - 1 : -1]
            assert batch.rows.latest[row].tolist() == latest + [-1] * (LATEST - len(latest))
            if known:
                history = journal.history(example.user_id, example.event_time_ms)
                expected = dict(zip(history.labels, history.weights, strict=True))
                weights = dict(zip(labels, batch.rows.weights[own].tolist(), strict=True))
                assert weights == pytest.approx(expected, rel=1e-4)
            assert batch.examples[row] is example
            came = batch.came[batch.came_rows == row].tolist()
            assert came == [PLACES[label] for label in example.labels]
            journal.add(example)


def test_an_example_that_weighs_nothing_engages_nothing() -> None:
    examples = [
        Example("u", "impression", START_MS, ("label-1",), None, weight=0.0),
        Example("u", "view", START_MS + 1, ("label-2",), None),
        Example("u", "view", START_MS + 2, ("label-3",), None),
    ]
    rows = Slice({}, examples, PLACES, HALF_LIFE_MS).rows(0, 3, len(LABELS)).rows
    assert [np.flatnonzero(row).tolist() for row in rows.engaged] == [[], [], [2]]


def test_labels_that_the_model_does_not_have_are_left_out_of_a_history() -> None:
    history = History("u", START_MS, ["gone", "label-4", "lost"], [3.0, 1.0, 2.0], [1, 2, 3], ())
    rows = rows_of([history], PLACES, len(LABELS))
    assert rows.labels.tolist() == [4]
    assert rows.weights.tolist() == [1.0]
    assert rows.latest[0].tolist() == [4, -1, -1, -1, -1]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf"), -1.0, 1e300, 0.0])
def test_no_weight_makes_a_row_that_is_not_finite(weight: float) -> None:
    history = History("u", START_MS, ["label-1"], [weight], [0], ())
    rows = rows_of([history], PLACES, len(LABELS))
    assert np.isfinite(rows.weights).all()
    assert (rows.weights >= 0.0).all()
    examples = [Example("v", "view", START_MS + n, ("label-1",), None, weight=weight) for n in range(3)]
    rows = Slice({}, examples, PLACES, HALF_LIFE_MS).rows(0, 3, len(LABELS)).rows
    assert np.isfinite(rows.weights).all()


def test_centuries_between_events_are_no_overflow() -> None:
    at_ms = [0, START_MS, 250_000_000_000_000]
    examples = [Example("u", "view", instant, ("label-1",), None) for instant in at_ms]
    rows = Slice({}, examples, PLACES, 1_000.0).rows(0, 3, len(LABELS)).rows
    assert np.isfinite(rows.weights).all()
    assert rows.ages_ms.tolist() == [START_MS, 250_000_000_000_000 - START_MS]
