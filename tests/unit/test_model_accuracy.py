"""Figures of the last predictions, against plain definitions."""

import numpy as np
import pytest

from stream_app.core.accuracy import Judged, Window, calibration_error, mid_ranks


def plain_rank(scores: list[float], came: list[int]) -> float:
    best = max(scores[label] for label in came)
    above = sum(score > best for score in scores)
    equal = sum(score == best for score in scores)
    return above + (equal + 1) / 2


def test_ranks_are_those_of_the_plain_definition() -> None:
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 6, (200, 9)).astype(float)
    wanted = [rng.choice(9, rng.integers(1, 4), replace=False) for _ in range(200)]
    for row, column in zip(*np.nonzero(rng.random((200, 9)) < 0.2), strict=True):
        if column not in wanted[row]:
            scores[row, column] = -np.inf
    pairs = np.array([(row, label) for row, labels in enumerate(wanted) for label in labels])
    ranks, best = mid_ranks(scores, (pairs[:, 0], pairs[:, 1]))
    for row, labels in enumerate(wanted):
        assert ranks[row] == plain_rank(scores[row].tolist(), labels.tolist())
        assert best[row] in labels
        assert scores[row, best[row]] == max(scores[row, labels])


def judged(count: int, rank: float = 1.0, label: str = "a") -> Judged:
    one = np.ones(count)
    names = np.full(count, label, np.object_)
    return Judged(rank * one, 0.5 * one, one > 0, 0.25 * one, 2.0 * one, np.full(count, np.inf), names, names)


def test_a_window_forgets_what_is_older_than_its_size() -> None:
    window = Window(100)
    window.add(judged(60, rank=4.0))
    window.add(judged(60))
    window.add(judged(20))
    figures = window.figures()
    assert figures["examples"] == 100
    assert figures["hit@1"] == pytest.approx(0.8)
    assert figures["mrr"] == pytest.approx(0.8 + 0.2 / 4)
    assert figures["log_loss"] == pytest.approx(-np.log(0.25))
    assert figures["ece"] == pytest.approx(0.5)
    assert (figures["popularity_mrr"], figures["markov_mrr"]) == (0.5, 0.0)


def test_more_than_a_window_at_once_leaves_the_last() -> None:
    window = Window(10)
    window.add(judged(25))
    assert window.figures()["examples"] == 10


def test_figures_of_labels_are_those_of_their_examples() -> None:
    window = Window(100)
    window.add(judged(30, label="a"))
    window.add(judged(20, rank=2.0, label="b"))
    assert window.figures(["b"])["mrr"] == 0.5
    assert window.figures(["a", "b"])["examples"] == 50
    assert window.figures([]) == {"examples": 0.0}


def test_what_was_never_judged_counts_as_a_miss_and_not_for_calibration() -> None:
    window = Window(10)
    missing = judged(2, rank=np.inf)
    missing.top[:] = np.nan
    window.add(missing)
    figures = window.figures()
    assert (figures["mrr"], figures["hit@10"], figures["ece"]) == (0.0, 0.0, 0.0)


def test_a_perfectly_calibrated_score_has_no_error() -> None:
    top = np.repeat([0.25, 0.75], 400)
    came = np.arange(800) % 4 < np.repeat([1, 3], 400)
    assert calibration_error(top, came) == pytest.approx(0.0)
