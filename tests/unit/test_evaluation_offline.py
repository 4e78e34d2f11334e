"""The offline recommenders on streams whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from stream_app.core.decay import Weights
from stream_app.core.event import Event
from stream_app.evaluation.baselines import Baselines, Log
from tests import offline

HALF_LIFE_MS = Weights().default_half_life_ms
TASTES = (("tea", "milk", "rusk"), ("bolt", "nut", "saw"), ("seed", "pot", "rake"))


def tasteful(users: int) -> tuple[Log, list[int]]:
    """Return a log in which everybody goes through one taste, in its order, and its discoveries."""
    baselines = Baselines(Weights())
    discoveries = []
    number = 0
    for user in range(users):
        for label in TASTES[user % len(TASTES)]:
            event = Event(f"u{user}", "view", number * 60_000, str(number), (label,))
            if baselines.judge(event).discovery is not None:
                discoveries.append(number)
            number += 1
    return baselines.log, discoveries


def test_every_recommender_finds_what_belongs_together() -> None:
    log, discoveries = tasteful(600)
    begin = len(log.users) * 4 // 5
    ranks = offline.judge(log, begin, discoveries, HALF_LIFE_MS)
    assert list(ranks) == ["ease", "item_knn", "logistic"]
    judged = sum(number >= begin for number in discoveries)
    for name, found in ranks.items():
        assert found.shape == (judged,)
        assert np.mean(found) < 1.6, name  # of six labels that no taste of the user holds, none comes before


def test_nothing_is_learned_from_what_is_judged() -> None:
    log, discoveries = tasteful(60)
    begin = len(log.users) * 4 // 5
    trained, before, after = offline.replayed(log, begin, discoveries, HALF_LIFE_MS, (60, 9))
    assert trained.counts.sum() == begin
    assert len(before.last) + len(after.last) == len(discoveries)
    assert not (before.true & (before.users.counts > 0)).any()
    assert not (after.candidates & (after.users.counts > 0)).any()


@pytest.mark.parametrize("begin", [0, 30])
def test_without_anything_to_learn_from_or_to_judge_there_is_no_recommender(begin: int) -> None:
    log, discoveries = tasteful(10)
    assert offline.judge(log, begin, discoveries, HALF_LIFE_MS) == {}
    assert offline.judge(Log(), 0, [], HALF_LIFE_MS) == {}


def test_tables_that_are_too_large_are_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    log, discoveries = tasteful(60)
    monkeypatch.setattr(offline, "MAX_CELLS", 100)
    assert offline.judge(log, 100, discoveries, HALF_LIFE_MS) == {}
