"""The lift of growth weights against a count in plain loops."""

from __future__ import annotations

import random

import numpy as np
import pytest

from stream_app.evaluation.lift import WINDOW_MS, Lift, LiftMeter


def plain_lift(weights: list[list[float | None]], engaged: set[tuple[int, int]]) -> float | None:
    """Count label by label; None stands for a label that the user had engaged before."""
    found = expected = 0.0
    for label in range(len(weights[0])):
        users = [user for user in range(len(weights)) if weights[user][label] is not None]
        if len(users) < 10:
            continue
        users.sort(key=lambda user: weights[user][label] or 0.0, reverse=True)
        tenth = round(len(users) / 10)
        found += sum((user, label) in engaged for user in users[:tenth])
        expected += tenth * sum((user, label) in engaged for user in users) / len(users)
    return found / expected if expected else None


@pytest.mark.parametrize("seed", range(5))
def test_the_lift_is_that_of_plain_loops(seed: int) -> None:
    chance = random.Random(seed)
    users, labels = 30 + 7 * seed, 6
    weights = [
        [None if chance.random() < 0.4 else chance.random() for _ in range(labels)] for _ in range(users)
    ]
    engaged = {
        (user, label)
        for user in range(users)
        for label in range(labels)
        if (weight := weights[user][label]) is not None and chance.random() < weight / 2
    }
    meter = LiftMeter()
    table = np.array([[np.nan if weight is None else weight for weight in row] for row in weights])
    meter.score(0, [f"u{user}" for user in range(users)], table)
    for user, label in engaged:
        meter.engage(f"u{user}", label)
    meter.close(WINDOW_MS)
    expected = plain_lift(weights, engaged)
    assert expected is not None
    assert expected > 1
    assert meter.lift.value == pytest.approx(expected, rel=1e-12)


def scored(users: int) -> LiftMeter:
    meter = LiftMeter()
    meter.score(0, [f"u{number}" for number in range(users)], np.linspace(0.9, 0.1, users)[:, None])
    return meter


def test_what_comes_after_the_window_does_not_count() -> None:
    meter = scored(20)
    meter.close(WINDOW_MS - 1)
    assert meter.lift.instants == 0
    meter.close(WINDOW_MS)
    meter.engage("u0", 0)
    assert meter.lift == Lift(None, 1, 20, 0.0, 0.0)


def test_labels_with_fewer_than_ten_users_are_left_out() -> None:
    meter = scored(9)
    meter.engage("u0", 0)
    meter.close(WINDOW_MS)
    assert meter.lift == Lift(None, 1, 0, 0.0, 0.0)


def test_users_and_labels_that_were_not_scored_are_passed_over() -> None:
    meter = scored(20)
    meter.engage("somebody", 0)
    meter.engage("u0", 1)
    meter.close(WINDOW_MS)
    assert meter.lift.found == 0.0


def test_users_are_scored_every_thirty_days_and_only_who_was_there_lately() -> None:
    meter = LiftMeter()
    assert not meter.due(5)
    meter.see("early", 5)
    meter.see("late", 5 + WINDOW_MS)
    assert not meter.due(4 + WINDOW_MS)
    assert meter.due(5 + WINDOW_MS)
    assert meter.active(6 + WINDOW_MS) == ["late"]
    meter.score(5 + WINDOW_MS, ["late"], np.array([[0.5]]))
    assert not meter.due(6 + WINDOW_MS)
    meter.close(5 + 2 * WINDOW_MS)
    assert meter.due(5 + 2 * WINDOW_MS)
