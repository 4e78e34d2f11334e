"""Figures against the slow judge, and what is said where there is nothing to say."""

from __future__ import annotations

import random
from math import inf, nan

import numpy as np
import pytest

from stream_app.evaluation.figures import BINS, Figures, figures, middle_ranks, reliability
from tests import prequential

NO_HIT = np.empty(0, dtype=np.bool_)


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_the_slow_judge(seed: int) -> None:
    chance = random.Random(seed)
    ranks = [chance.choice([1, 1.5, 2, 5, 5.5, 10, 11, 200, inf]) for _ in range(500)]
    top = [chance.choice([0.0, 0.1, 0.35, chance.random(), 1.0]) for _ in ranks]
    hit = [chance.random() < score for score in top]
    found = figures(np.array(ranks), np.array(top), np.array(hit)).document()
    expected = prequential.summary(ranks) | {"ece": prequential.calibration_error(top, hit)}
    assert found == pytest.approx(expected, rel=1e-12)


def test_no_examples_have_no_figures() -> None:
    assert figures(np.empty(0), np.empty(0), NO_HIT) == Figures(0)


def test_misses_alone_are_zeros() -> None:
    assert figures(np.array([inf, inf])) == Figures(2, 0.0, 0.0, 0.0, 0.0)


def test_a_ranking_without_scores_has_no_calibration_error() -> None:
    found = figures(np.array([1.0, inf]), np.array([nan, nan]), np.array([False, False]))
    assert found.ece is None
    assert found.mrr == 0.5


def test_scores_that_always_come_true_as_often_as_they_say_have_no_error() -> None:
    hit = np.array([True, False, False, False] * 25)
    assert figures(np.ones(100), np.full(100, 0.25), hit).ece == 0.0


def test_every_score_is_in_the_bin_that_says_so() -> None:
    top = np.array([0.0, 0.0999, 0.1, 0.95, 1.0, nan])
    found = reliability(top, np.array([False, False, True, True, True, True]))
    assert len(found) == BINS
    assert [None if one is None else one.examples for one in found] == [2, 1, *[None] * 7, 2]


def test_labels_that_are_no_candidates_are_behind_all_others() -> None:
    scores = np.array([[0.0, -np.inf, 0.0, -np.inf, 0.0]])
    assert middle_ranks(scores, [2]).tolist() == [2.0]
