"""A head's scores and steps, held against River's own and against derivatives by differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from river import linear_model, optim

from stream_app.core.features import Features, Floats, Ints, Matrices, Rows, Workspace
from stream_app.core.history import rows_of
from stream_app.core.model import NextCategoryModel
from stream_app.core.ranker import (
    AFFINITY,
    AFFINITY_RATE,
    MAX_AFFINITIES,
    RATE,
    STEP_ROWS,
    Ranker,
    affinity_inputs,
    softmax,
)
from tests.model_streams import new_model, observed_in_slices, random_examples, some_histories

NONE = np.zeros(0, np.int64)


def taught(seed: int = 1, count: int = 500) -> NextCategoryModel:
    model = new_model()
    observed_in_slices(model, random_examples(seed, count), [57])
    return model


def exact(model: NextCategoryModel) -> tuple[Rows, dict[str, Features], Floats]:
    """Return rows, the features of both heads in double precision, and what affinities are computed from."""
    statistics = model.statistics
    histories = some_histories(1, statistics.labels, 12)
    rows = rows_of(histories, statistics.label_places, len(statistics.labels))
    matrices = Matrices(statistics, Workspace(np.float64))
    features = matrices.features(statistics, rows)
    both = {"next": features, "discovery": matrices.discovery_features(features, rows)}
    # Memory is used in turn, and here both are looked at.
    copies = {
        task: Features(
            one.label_names,
            one.pair_names,
            one.engaged_names,
            one.of_labels.copy(),
            one.of_pairs.copy(),
            one.of_engaged.copy(),
            one.rows,
            one.labels,
        )
        for task, one in both.items()
    }
    return rows, copies, affinity_inputs(rows).astype(np.float64)


def as_features(values: Floats) -> Features:
    """Return features of pairs alone, from an array (rows, features, labels)."""
    names = tuple(f"f{number}" for number in range(values.shape[1]))
    return Features(
        (), names, (), np.zeros((0, values.shape[2])), values, np.zeros((0, 0), values.dtype), NONE, NONE
    )


def river_like(weights: Mapping[str, float]) -> Any:
    model = linear_model.LogisticRegression(optim.AdaGrad(RATE), intercept_lr=0.0)
    model._weights.update(weights)
    return model


def taught_labels(labels: list[int]) -> tuple[Ints, Ints]:
    return np.arange(len(labels)), np.array(labels)


@pytest.mark.parametrize("task", ["next", "discovery"])
def test_the_dense_score_of_every_pair_is_rivers_own(task: str) -> None:
    model = taught()
    rows, features, inputs = exact(model)
    head, own = model.heads[task], features[task]
    logits = head.logits(own, None)
    whole = head.logits(own, inputs)
    found = head.affinity(inputs, logits.shape[1])
    assert logits.dtype == np.float64
    with_affinity = river_like(head.weights | {AFFINITY: 1.0})
    for row in range(len(rows.at_ms)):
        for label in range(logits.shape[1]):
            pair = {name: value for name, value in own.one(row, label).items() if name in head.weights}
            assert logits[row, label] == pytest.approx(head.model._raw_dot_one(pair), rel=1e-12, abs=1e-12)
            pair[AFFINITY] = float(found[row, label])
            share = 1.0 / (1.0 + math.exp(-whole[row, label]))
            assert share == pytest.approx(with_affinity.predict_proba_one(pair)[True], rel=1e-12, abs=1e-12)


def test_with_two_candidates_a_step_is_rivers_learn_one_on_the_difference_of_their_features() -> None:
    rng = np.random.default_rng(1)
    ranker = Ranker(dict.fromkeys(("f0", "f1", "f2"), 0.1))
    river = river_like(ranker.weights)
    for _ in range(50):
        values = rng.normal(size=(1, 3, 2))
        features = as_features(values)
        came = int(rng.integers(2))
        difference = values[0, :, came] - values[0, :, 1 - came]
        shares = softmax(ranker.logits(features, None))
        assert shares[0, came] == pytest.approx(
            river.predict_proba_one(dict(zip(ranker.weights, difference.tolist(), strict=True)))[True],
            rel=1e-12,
        )
        ranker.learn(features, None, shares, taught_labels([came]))
        river.learn_one(dict(zip(ranker.weights, difference.tolist(), strict=True)), True)
        assert ranker.weights == pytest.approx(river.weights, rel=1e-12, abs=1e-12)
    assert ranker.model.optimizer.g2 == pytest.approx(river.optimizer.g2, rel=1e-12)
    assert ranker.model.optimizer.n_iterations == river.optimizer.n_iterations == 50


@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (STEP_ROWS, 1), (STEP_ROWS + 1, 2), (8 * STEP_ROWS, 8)])
def test_a_batch_is_learned_in_steps_of_so_many_rows(rows: int, steps: int) -> None:
    ranker = Ranker({"f0": 0.0})
    features = as_features(np.random.default_rng(3).normal(size=(rows, 1, 4)))
    ranker.learn(features, None, softmax(ranker.logits(features, None)), taught_labels([1] * rows))
    assert ranker.model.optimizer.n_iterations == steps


@pytest.mark.parametrize("task", ["next", "discovery"])
def test_a_step_goes_along_the_derivative_of_the_loss(task: str) -> None:
    # AdaGrad's sum of squares is the square of the gradient after one step, so it gives away the gradient.
    model = taught()
    rows, features, inputs = exact(model)
    own, trained = features[task], model.heads[task]
    few = np.flatnonzero(~rows.engaged.all(axis=1))
    assert len(few) > 3
    engaged = np.isin(rows.rows, few)
    pairs = [
        (row, label)
        for row in few.tolist()
        for label in np.flatnonzero(~rows.engaged[row]).tolist()[: 1 + row % 3]
        if row % 4  # some rows teach nothing
    ]
    came = (np.array([row for row, _ in pairs]), np.array([label for _, label in pairs]))
    taught_rows = sorted(set(came[0].tolist()))

    def head(weights: Mapping[str, float], affinities: Floats) -> Ranker:
        made = Ranker(weights)
        made.affinities.weights = affinities
        return made

    def logits_of(one: Ranker) -> Floats:
        logits = one.logits(own, inputs)
        if task == "discovery":
            logits[rows.rows[engaged], rows.labels[engaged]] = -np.inf
        return logits

    def loss(one: Ranker) -> float:
        shares = softmax(logits_of(one))
        total = 0.0
        for row in taught_rows:
            total -= math.log(sum(shares[row, label] for of, label in pairs if of == row))
        return total / len(taught_rows)

    affinities = trained.affinities.weights.astype(np.float64)
    one = head(trained.weights, trained.affinities.weights.copy())
    one.learn(own, inputs, softmax(logits_of(one)), came)
    assert one.model.optimizer.n_iterations == 1
    step = 1e-6
    for name, weight in trained.weights.items():
        slope = (
            loss(head(trained.weights | {name: weight + step}, affinities))
            - loss(head(trained.weights | {name: weight - step}, affinities))
        ) / (2 * step)
        assert one.model.optimizer.g2[name] == pytest.approx(slope**2, rel=1e-3, abs=1e-10), name
        moved = one.weights[name] - weight
        assert moved == pytest.approx(-RATE * slope / math.sqrt(slope**2 + 1e-8), rel=1e-2, abs=1e-4), name
    size = len(model.statistics.labels)
    for place in [(0, 0), (0, 3), (1, 1), (2, 0), (1 + MAX_AFFINITIES, 2), (3 + MAX_AFFINITIES, size - 1)]:
        nudge = np.zeros_like(affinities)
        nudge[place] = step
        slope = (
            loss(head(trained.weights, affinities + nudge)) - loss(head(trained.weights, affinities - nudge))
        ) / (2 * step)
        assert one.affinities.g2[place] == pytest.approx(slope**2, rel=1e-2, abs=1e-8), place
        moved = one.affinities.weights[place] - affinities[place]
        assert moved == pytest.approx(-AFFINITY_RATE * slope / math.sqrt(slope**2 + 1e-4), rel=1e-2, abs=1e-5)


def test_rows_in_which_nothing_came_teach_nothing() -> None:
    ranker = Ranker({"f0": 0.25})
    features = as_features(np.random.default_rng(4).normal(size=(40, 1, 4)))
    before = ranker.state(4)
    ranker.learn(
        features,
        np.ones((40, 1 + 2 * MAX_AFFINITIES), np.float32),
        softmax(ranker.logits(features, None)),
        (NONE, NONE),
    )
    assert ranker.state(4) == before


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_softmax_is_what_a_plain_loop_computes(seed: int) -> None:
    logits = np.random.default_rng(seed).normal(scale=30.0, size=(20, 7))
    logits[np.random.default_rng(seed + 9).random((20, 7)) < 0.3] = -np.inf
    logits[3] = -np.inf
    given = logits.copy()
    shares = softmax(logits)
    assert np.array_equal(logits, given)
    for row, values in zip(shares.tolist(), logits.tolist(), strict=True):
        top = max(values)
        parts = [math.exp(value - top) if value > -math.inf else 0.0 for value in values]
        assert row == pytest.approx([part / (sum(parts) or 1.0) for part in parts], rel=1e-12)


@pytest.mark.parametrize("size", [1, 5, MAX_AFFINITIES])
def test_numbers_of_labels_follow_their_labels_to_other_places(size: int) -> None:
    rng = np.random.default_rng(size)
    ranker = Ranker({"f0": 0.0})
    ranker.affinities.step(rng.normal(size=(1 + 2 * MAX_AFFINITIES, size)).astype(np.float32))
    old = ranker.affinities.weights.copy()
    state = ranker.state(size)
    places = rng.permutation(2 * MAX_AFFINITIES)[:size]
    other = Ranker({})
    other.set_state(state, places)
    for label, place in enumerate(places.tolist()):
        if place >= MAX_AFFINITIES:
            continue
        assert other.affinities.weights[0, place] == old[0, label]
        for engaged, of in enumerate(places.tolist()):
            if of < MAX_AFFINITIES:
                for part in (1, 1 + MAX_AFFINITIES):
                    assert other.affinities.weights[part + of, place] == old[part + engaged, label]
    held = [place for place in places.tolist() if place < MAX_AFFINITIES]
    assert not np.delete(other.affinities.weights, held, axis=1).any()
