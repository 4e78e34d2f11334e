"""Probabilities that come true as often as they say, and figures of predictions: against plain judges."""

from __future__ import annotations

import functools
import math
import random
from typing import Any

import msgpack
import numpy as np
import pytest
from river import linear_model, optim

from stream_app.core.accuracy import Judged, Window, calibration_error, mid_ranks
from stream_app.core.calibration import Calibration
from tests import prequential

SEEDS = [1, 2, 3]


# Calibration


def test_a_new_map_leaves_scores_as_they_are() -> None:
    scores = np.linspace(0.001, 0.999, 50)
    assert Calibration().probabilities(scores) == pytest.approx(scores, rel=1e-12)


@pytest.mark.parametrize("stretch", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("shift", [-1.5, 0.0, 1.0])
def test_probabilities_move_towards_the_truth(stretch: float, shift: float) -> None:
    rng = np.random.default_rng(7)
    calibration = Calibration()

    def truth(scores: np.ndarray) -> np.ndarray:
        return 1.0 / (1.0 + np.exp(-(stretch * np.log(scores / (1.0 - scores)) + shift)))

    judged = np.linspace(0.05, 0.9, 20)
    distance = [np.abs(calibration.probabilities(judged) - truth(judged)).mean()]
    for _ in range(4):
        for _ in range(400):
            scores = rng.uniform(0.02, 0.95, 256)
            calibration.learn(scores, rng.random(256) < truth(scores))
        distance.append(np.abs(calibration.probabilities(judged) - truth(judged)).mean())
    assert distance[-1] < 0.03
    assert distance[-1] < distance[0] / 3 or distance[0] < 0.03


def test_better_probabilities_have_the_smaller_error_and_the_smaller_log_loss() -> None:
    rng = np.random.default_rng(8)
    calibration = Calibration()
    scores = rng.uniform(0.3, 0.95, 40_000)
    came = rng.random(40_000) < scores / 2
    for begin in range(0, 38_000, 50):
        calibration.learn(scores[begin : begin + 50], came[begin : begin + 50])
    late, truth = scores[38_000:], came[38_000:]
    better = calibration.probabilities(late)
    assert calibration_error(better, truth) < calibration_error(late, truth) / 3

    def loss(shares: np.ndarray) -> float:
        return float(-np.log(np.where(truth, shares, 1 - shares)).mean())

    assert loss(better) < loss(late)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_map_keeps_the_order_of_scores(seed: int) -> None:
    rng = np.random.default_rng(seed)
    calibration = Calibration()
    for _ in range(300):
        scores = rng.uniform(0.0, 1.0, 20)
        calibration.learn(scores, rng.random(20) < scores**2)
    shares = calibration.probabilities(np.linspace(0.0, 1.0, 1_000))
    assert (np.diff(shares) >= 0).all()
    assert ((shares >= 0) & (shares <= 1)).all()


def test_certain_scores_and_no_scores_are_learned_without_harm() -> None:
    calibration = Calibration()
    calibration.learn(np.zeros(0), np.zeros(0, np.bool_))
    assert calibration.state()["weights"] == Calibration().state()["weights"]
    for scores in (np.zeros(3), np.ones(3), np.array([0.0, 1.0, 5e-324])):
        for came in (np.zeros(3, np.bool_), np.ones(3, np.bool_)):
            calibration.learn(scores.astype(np.float32), came)
    assert all(map(math.isfinite, calibration.state()["weights"].values()))
    assert np.isfinite(calibration.probabilities(np.array([0.0, 0.5, 1.0]))).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_map_is_a_logistic_regression_of_rivers_on_the_log_odds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    calibration = Calibration()
    river: Any = linear_model.LogisticRegression(optim.SGD(0.5), intercept_lr=0.0)
    river._weights.update({"log odds": 1.0, "shift": 0.0})
    for count in (1, 1, 7, 256):
        scores = rng.uniform(0.01, 0.99, count)
        came = rng.random(count) < 0.4
        log_odds = np.log(scores / (1.0 - scores))
        expected = [
            river.predict_proba_one({"log odds": value, "shift": 1.0})[True] for value in log_odds.tolist()
        ]
        assert calibration.probabilities(scores) == pytest.approx(expected, rel=1e-12)
        calibration.learn(scores, came)
        river._fit(
            ["log odds", "shift"],
            came,
            count / 256,  # a batch counts by its size
            functools.partial(river._eval_gradient_many, np.stack([log_odds, np.ones(count)], axis=1)),
        )
        assert calibration.model.weights == pytest.approx(river.weights, rel=1e-12)
    assert calibration.model.optimizer.n_iterations == river.optimizer.n_iterations


def test_the_state_of_the_map_comes_back_to_the_last_bit() -> None:
    rng = np.random.default_rng(1)
    calibration, copied = Calibration(), Calibration()
    for _ in range(10):
        calibration.learn(rng.random(9), rng.random(9) < 0.5)
    copied.set_state(msgpack.unpackb(msgpack.packb(calibration.state())))
    assert copied.state() == calibration.state()
    scores, came = rng.random(9), rng.random(9) < 0.5
    calibration.learn(scores, came)
    copied.learn(scores, came)
    assert copied.state() == calibration.state()
    assert copied.probabilities(scores).tobytes() == calibration.probabilities(scores).tobytes()


# Ranks


@pytest.mark.parametrize("seed", SEEDS)
def test_ranks_are_those_of_a_plain_judge_with_ties_in_the_middle(seed: int) -> None:
    rng = random.Random(seed)
    scores = np.array([[float(rng.randrange(4)) for _ in range(8)] for _ in range(60)])
    candidates = [{label for label in range(8) if rng.random() < 0.8} for _ in range(60)]
    came = []
    for row, own in enumerate(candidates):
        for label in set(range(8)) - own:
            scores[row, label] = -math.inf
        came += [(row, label) for label in rng.sample(sorted(own), min(len(own), rng.randrange(4)))]
    rows, labels = np.array(came).T
    ranks, best = mid_ranks(scores, (rows, labels))
    for row, own in enumerate(candidates):
        true = {label for of, label in came if of == row}
        of_label = {label: (scores[row, label],) for label in range(8)}
        expected = prequential.rank(
            {str(label): score for label, score in of_label.items()},
            {str(one) for one in own},
            {str(one) for one in true},
        )
        assert ranks[row] == expected, seed
        highest = [
            label for of, label in came if of == row and scores[row, label] == max(scores[row, list(true)])
        ]
        assert best[row] == (highest[0] if highest else -1)


# The window


@pytest.mark.parametrize("seed", SEEDS)
def test_the_error_of_probabilities_is_that_of_a_plain_judge(seed: int) -> None:
    rng = np.random.default_rng(seed)
    top = np.concatenate([rng.random(500), [0.0, 1.0, 0.1, 0.5, 0.9999999]])
    came = rng.random(len(top)) < top
    assert calibration_error(top, came) == pytest.approx(
        prequential.calibration_error(top.tolist(), came.tolist()), rel=1e-12
    )


def judged(rng: np.random.Generator, count: int) -> Judged:
    ranks = rng.choice([1.0, 1.5, 2.0, 5.0, 5.5, 10.0, 11.0, np.inf], count)
    names = np.array([f"label-{number}" for number in rng.integers(6, size=count)], np.object_)
    return Judged(
        ranks,
        np.where(rng.random(count) < 0.1, np.nan, rng.random(count)),
        rng.random(count) < 0.4,
        np.where(rng.random(count) < 0.1, 0.0, rng.random(count)),
        rng.integers(1, 40, count).astype(float),
        rng.integers(1, 40, count) / 2 + 1,
        np.where(np.isinf(ranks), "", names),
        names[::-1],
    )


def plain_figures(rows: list[tuple[float, float, bool, float, float, float, str, str]]) -> dict[str, float]:
    if not rows:
        return {"examples": 0.0}
    count = len(rows)
    with_top = [(row[1], row[2]) for row in rows if not math.isnan(row[1])]
    error = prequential.calibration_error([top for top, _ in with_top], [came for _, came in with_top])
    return {
        "examples": float(count),
        "mrr": sum(1 / row[0] for row in rows) / count,
        **{f"hit@{most}": sum(row[0] <= most for row in rows) / count for most in (1, 5, 10)},
        "log_loss": sum(-math.log(max(row[3], 1e-9)) for row in rows) / count,
        "ece": error or 0.0,
        "popularity_mrr": sum(1 / row[4] for row in rows) / count,
        "markov_mrr": sum(1 / row[5] for row in rows) / count,
    }


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_window_says_what_is_recomputed_from_its_last_predictions(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    window = Window(size)
    rows: list[tuple[float, float, bool, float, float, float, str, str]] = []
    assert window.figures() == {"examples": 0.0}
    for count in (0, 1, 3, 40, 250, 2, 99):
        one = judged(rng, count)
        window.add(one)
        rows += zip(
            one.ranks.tolist(),
            one.top.tolist(),
            one.top_came.tolist(),
            one.likelihood.tolist(),
            one.popularity_ranks.tolist(),
            one.markov_ranks.tolist(),
            one.labels.tolist(),
            one.top_labels.tolist(),
            strict=True,
        )
        last = rows[-size:]
        assert window.figures() == pytest.approx(plain_figures(last), rel=1e-9, abs=1e-12), (seed, count)
        for labels in ({"label-1"}, {"label-0", "label-5"}, {"nobody"}, set()):
            chosen = [row for row in last if row[6] in labels or row[7] in labels]
            assert window.figures(labels) == pytest.approx(plain_figures(chosen), rel=1e-9, abs=1e-12)


def test_a_window_of_nothing_but_the_unknown_has_finite_figures() -> None:
    window = Window(5)
    endless, none = np.full(3, np.inf), np.full(3, np.nan)
    empty = np.array([""] * 3, np.object_)
    window.add(Judged(endless, none, np.zeros(3, np.bool_), np.zeros(3), endless, endless, empty, empty))
    figures = window.figures()
    assert all(map(math.isfinite, figures.values()))
    assert (figures["mrr"], figures["hit@10"], figures["ece"]) == (0.0, 0.0, 0.0)
    assert figures["log_loss"] == pytest.approx(-math.log(1e-9))
