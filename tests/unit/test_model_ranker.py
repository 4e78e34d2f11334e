"""The heads: that they are River's, that they descend the loss, and their state."""

import copy
import functools
import math
from typing import Any

import numpy as np
import pytest
from river import linear_model, optim

from stream_app.core.calibration import Calibration
from stream_app.core.features import Features, Matrices, Workspace
from stream_app.core.history import rows_of
from stream_app.core.model import DISCOVERY, NEXT, NextCategoryModel
from stream_app.core.ranker import (
    MAX_AFFINITIES,
    RATE,
    STEP_ROWS,
    Affinities,
    Ranker,
    affinity_inputs,
    softmax,
)
from tests.unit.model_logs import HALF_LIFE_MS, observe_all, random_examples, trained

NAMES = ("a", "b", "c", "d", "e")


def some_features(rng: np.random.Generator, n_rows: int, n_labels: int) -> Features:
    engaged = rng.random((n_rows, n_labels)) < 0.3
    rows, labels = np.nonzero(engaged)
    return Features(
        NAMES[:2],
        NAMES[2:4],
        NAMES[4:],
        rng.normal(size=(2, n_labels)),
        rng.normal(size=(n_rows, 2, n_labels)),
        rng.normal(size=(1, len(rows))),
        rows,
        labels,
    )


def loss(ranker: Ranker, features: Features, came: dict[int, list[int]], excluded: np.ndarray) -> float:
    logits = ranker.logits(features, None)
    logits[excluded] = -np.inf
    shares = softmax(logits)
    return -sum(math.log(sum(shares[row, labels])) for row, labels in came.items()) / len(came)


class Remembers(optim.AdaGrad):
    """An optimizer that only notes the gradient."""

    def step(self, w: Any, g: Any) -> Any:
        self.gradient = g
        return w


def test_a_step_goes_along_the_gradient_of_the_loss() -> None:
    rng = np.random.default_rng(1)
    features = some_features(rng, 8, 6)
    came = {0: [1], 2: [3, 4], 3: [0], 7: [5]}
    excluded = rng.random((8, 6)) < 0.2
    for row, labels in came.items():
        excluded[row, labels] = False
    ranker = Ranker({name: float(rng.normal()) for name in NAMES})
    ranker.model.optimizer = Remembers()
    logits = ranker.logits(features, None)
    logits[excluded] = -np.inf
    pairs = np.array([(row, label) for row, labels in came.items() for label in labels])
    ranker.learn(features, None, softmax(logits), (pairs[:, 0], pairs[:, 1]))
    start = ranker.weights
    for name, slope in ranker.model.optimizer.gradient.items():
        moved = []
        for change in (1e-6, -1e-6):
            ranker.set_weights(start | {name: start[name] + change})
            moved.append(loss(ranker, features, came, excluded))
        assert slope == pytest.approx((moved[0] - moved[1]) / 2e-6, abs=1e-7)


def learn_many(river: Any, differences: np.ndarray, came: np.ndarray) -> None:
    """Let River learn from a batch; with pandas through its front door."""
    try:
        import pandas  # noqa: PLC0415
    except ImportError:
        saved = river._enter_learn_mode(set(NAMES[:4]))
        gradient = functools.partial(river._eval_gradient_many, differences)
        river._fit(list(NAMES[:4]), came, 1, get_grad=gradient)
        river._exit_learn_mode(saved)
    else:
        river.learn_many(pandas.DataFrame(differences, columns=list(NAMES[:4])), pandas.Series(came))


def test_with_two_candidates_a_step_is_rivers_learn_many_on_their_difference() -> None:
    # p(1) / (p(0) + p(1)) is the logistic function of the difference of the logits.
    rng = np.random.default_rng(2)
    river: Any = linear_model.LogisticRegression(optim.AdaGrad(RATE), intercept_lr=0.0)
    ranker = Ranker(dict.fromkeys(NAMES[:4], 0.0))
    none = np.zeros(0, np.int64)
    for _ in range(5):
        features = some_features(rng, STEP_ROWS, 2)
        features = Features(
            NAMES[:2], NAMES[2:4], (), features.of_labels, features.of_pairs, np.zeros((0, 0)), none, none
        )
        came = rng.integers(0, 2, STEP_ROWS)
        both = np.concatenate(
            [np.broadcast_to(features.of_labels, (STEP_ROWS, 2, 2)), features.of_pairs], axis=1
        )
        ranker.learn(features, None, softmax(ranker.logits(features, None)), (np.arange(STEP_ROWS), came))
        learn_many(river, both[:, :, 1] - both[:, :, 0], came == 1)
        for name, weight in river.weights.items():
            assert ranker.weights[name] == pytest.approx(weight, rel=0, abs=1e-12)


@pytest.mark.parametrize("task", ["next", "discovery"])
def test_the_dense_score_is_rivers_predict_proba_one(task: str) -> None:
    model, journal = trained(3, 600)
    matrices = Matrices(model.statistics, Workspace(np.float64))
    histories = [journal.history(user, 1_800_000_000_000) for user in list(journal.at_ms)[:8]]
    rows = rows_of(histories, model.statistics.label_places, matrices.n_labels)
    features = matrices.features(model.statistics, rows)
    if task == "discovery":
        features = matrices.discovery_features(features, rows)
    head = model.heads[task]
    logits = head.logits(features, None)
    for row in range(len(histories)):
        for label in range(matrices.n_labels):
            river: Any = head.model
            chance = river.predict_proba_one(features.one(row, label))[True]
            assert 1.0 / (1.0 + math.exp(-logits[row, label])) == pytest.approx(chance, rel=0, abs=1e-12)


def test_float32_moves_scores_by_less_than_a_millionth_of_what_they_span() -> None:
    model, journal = trained(4, 600)
    history = journal.history("user-1", 1_800_000_000_000)
    found = []
    for kind in (np.float32, np.float64):
        matrices = Matrices(model.statistics, Workspace(kind))
        rows = rows_of([history], model.statistics.label_places, matrices.n_labels)
        found.append(model.heads["next"].logits(matrices.features(model.statistics, rows), None))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_weights_are_learned_by_rivers_optimizer() -> None:
    model, _ = trained(5, 300)
    head = model.heads["next"]
    assert isinstance(head.model, linear_model.LogisticRegression)
    assert isinstance(head.model.optimizer, optim.AdaGrad)
    assert set(head.model.optimizer.g2) == set(NEXT) == set(head.weights)
    assert set(model.heads["discovery"].weights) == set(DISCOVERY)
    assert head.model.optimizer.n_iterations > 0


def test_labels_that_are_all_too_unlikely_for_a_float_are_still_learned() -> None:
    ranker = Ranker({"a": 1.0})
    none = np.zeros(0, np.int64)
    features = Features(
        ("a",), (), (), np.array([[0.0, 900.0]]), np.zeros((1, 0, 2)), np.zeros((0, 0)), none, none
    )
    ranker.learn(features, None, softmax(ranker.logits(features, None)), (np.array([0]), np.array([0])))
    assert ranker.weights["a"] < 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_learned_from(bad: float) -> None:
    rng = np.random.default_rng(6)
    features = some_features(rng, 4, 3)
    features.of_pairs[1, 0, 2] = bad
    ranker = Ranker(dict.fromkeys(NAMES, 0.5))
    before = copy.deepcopy(ranker.state(3))
    with np.errstate(invalid="ignore"):
        shares = softmax(ranker.logits(features, np.ones((4, 1 + 2 * MAX_AFFINITIES), np.float32)))
        inputs = np.full((4, 1 + 2 * MAX_AFFINITIES), np.float32(bad))
        ranker.learn(features, inputs, shares, (np.arange(4), np.arange(4) % 3))
    assert ranker.state(3) == before
    assert ranker.steps_refused == 1


def test_affinities_learn_what_no_shared_feature_can_say() -> None:
    rng = np.random.default_rng(7)
    model, journal = trained(8, 300)
    history = journal.history("user-1", 1_800_000_000_000)
    rows = rows_of([history], model.statistics.label_places, len(model.statistics.labels))
    inputs = affinity_inputs(rows)
    assert inputs[0, 0] == 1.0
    assert inputs[0, 1 + MAX_AFFINITIES :] @ inputs[0, 1 + MAX_AFFINITIES :] == pytest.approx(1.0)
    affinities = Affinities()
    for _ in range(50):
        affinities.step(inputs.T @ rng.normal(1.0, 0.1, (1, 3)).astype(np.float32))
    assert (affinities.weights[0, :3] < 0.0).all()
    assert (affinities.weights[:, 3:] == 0.0).all()


def test_affinities_follow_their_labels() -> None:
    affinities = Affinities()
    rng = np.random.default_rng(9)
    affinities.weights[:] = rng.normal(size=affinities.weights.shape)
    before = affinities.weights.copy()
    affinities.keep(np.array([2, 5, 70]))
    rows = [0, 1 + 2, 1 + 5, 1 + MAX_AFFINITIES + 2, 1 + MAX_AFFINITIES + 5]
    moved = [0, 1, 2, 1 + MAX_AFFINITIES, 2 + MAX_AFFINITIES]
    assert np.array_equal(affinities.weights[np.ix_(moved, [0, 1])], before[np.ix_(rows, [2, 5])])
    assert np.count_nonzero(affinities.weights) == 10


def test_a_state_makes_the_round_trip_to_the_last_bit() -> None:
    model, _ = trained(10, 400)
    state = model.ranker_state()
    other = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    other.set_ranker_state(copy.deepcopy(state))
    assert other.ranker_state() == state
    assert other.heads["next"].model._weights == model.heads["next"].model._weights


def test_a_restored_model_goes_on_as_if_nothing_had_happened() -> None:
    examples = random_examples(11, 900)
    model, journal = NextCategoryModel(half_life_ms=HALF_LIFE_MS), None
    observe_all(model, examples[:600])
    other = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    other.add(copy.deepcopy(model.take_delta()))
    other.set_ranker_state(copy.deepcopy(model.ranker_state()))
    model.clear_counts()
    again = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    observe_all(again, examples[:600])
    model.add(again.take_delta())
    found = [observe_all(one, examples[600:], journal=journal) for one in (model, other)]
    for one, two in zip(*found, strict=True):
        assert np.array_equal(one.next_rank, two.next_rank)
        assert np.array_equal(one.next_top, two.next_top)
        assert np.array_equal(one.discovery_rank, two.discovery_rank, equal_nan=True)


def test_the_average_of_equal_states_is_that_state() -> None:
    state = trained(12, 300)[0].ranker_state()
    assert NextCategoryModel.average([state]) == state
    assert NextCategoryModel.average([state, state]) == state


def test_the_average_is_the_mean_and_knows_the_labels_of_all() -> None:
    one, two = trained(13, 300)[0].ranker_state(), trained(14, 300, labels=20)[0].ranker_state()
    mean = NextCategoryModel.average([one, two])
    for name in NEXT:
        both = [state["heads"]["next"]["weights"][name] for state in (one, two)]
        assert mean["heads"]["next"]["weights"][name] == sum(both) / 2
        both = [state["heads"]["next"]["g2"][name] for state in (one, two)]
        assert mean["heads"]["next"]["g2"][name] == sum(both) / 2
    assert mean["labels"] == list(dict.fromkeys([*one["labels"], *two["labels"]]))

    def own(state: dict[str, Any], label: str) -> float:
        number, size = state["labels"].index(label), len(state["labels"])
        blob = state["heads"]["next"]["affinities"]["weights"]
        return float(np.frombuffer(blob, "<f4").reshape(1 + 2 * size, size)[0, number])

    shared = next(label for label in one["labels"] if label in two["labels"])
    assert own(mean, shared) == pytest.approx((own(one, shared) + own(two, shared)) / 2)
    single = next(label for label in two["labels"] if label not in one["labels"])
    assert own(mean, single) == own(two, single)
    NextCategoryModel(half_life_ms=HALF_LIFE_MS).set_ranker_state(mean)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(v=2),
        lambda s: s.pop("labels"),
        lambda s: s.update(labels=["a", "a"]),
        lambda s: s["labels"].append("one more"),
        lambda s: s["heads"].pop("next"),
        lambda s: s["heads"]["next"]["weights"].update({"popularity": float("nan")}),
        lambda s: s["heads"]["next"]["weights"].update({"popularity": "1"}),
        lambda s: s["heads"]["next"]["weights"].update({"other": 1.0}),
        lambda s: s["heads"]["next"]["g2"].update({"popularity": -1.0}),
        lambda s: s["heads"]["next"].update(steps=-1),
        lambda s: s["heads"]["next"]["affinities"].update(weights=b"\0"),
        lambda s: s["heads"]["next"]["affinities"].update(
            weights=b"\xff" * len(s["heads"]["next"]["affinities"]["weights"])
        ),
        lambda s: s["calibrations"]["discovery"]["weights"].update(shift=float("inf")),
        lambda s: s["calibrations"].update(next=None),
    ],
)
def test_a_state_that_is_anything_else_is_refused_and_changes_nothing(change: Any) -> None:
    model, _ = trained(15, 120)
    state = copy.deepcopy(model.ranker_state())
    before = copy.deepcopy(state)
    change(state)
    with pytest.raises(ValueError, match="not a ranker"):
        model.set_ranker_state(state)
    assert model.ranker_state() == before


def test_calibration_is_increasing_and_follows_what_comes() -> None:
    rng = np.random.default_rng(16)
    calibration = Calibration()
    for _ in range(400):
        scores = rng.random(128)
        calibration.learn(scores, rng.random(128) < scores**2)
    found = calibration.probabilities(np.linspace(0.0, 1.0, 11))
    assert (np.diff(found) > 0.0).all()
    assert found[5] == pytest.approx(0.25, abs=0.05)
    assert np.isfinite(found).all()


def test_calibration_does_not_learn_from_nothing() -> None:
    calibration = Calibration()
    calibration.learn(np.zeros(0), np.zeros(0, np.bool_))
    assert calibration.probabilities(np.array([0.3]))[0] == pytest.approx(0.3)
