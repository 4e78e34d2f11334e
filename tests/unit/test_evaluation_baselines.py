"""The fast baselines against the slow judge, and the corners of the protocol."""

from __future__ import annotations

import random
from math import inf

import pytest

from stream_app.core.decay import EventTypeWeight, Weights
from stream_app.core.event import Event
from stream_app.evaluation.baselines import BASELINES, Baselines, Judged
from tests import prequential
from tests.prequential import DAY_MS, Seen

HALF_LIFE_MS = 30.0 * DAY_MS


def event(user: str, time_ms: int, *labels: str, event_type: str = "view") -> Event:
    return Event(user, event_type, time_ms, f"{user}-{time_ms}", labels)


def judged_by(baselines: Baselines, *events: Event) -> list[Judged]:
    return [baselines.judge(one) for one in events]


def named(ranks: object) -> dict[str, float]:
    return dict(zip(BASELINES, ranks, strict=True))  # type: ignore[call-overload]


def random_stream(seed: int, count: int, users: int, labels: int) -> list[Seen]:
    chance = random.Random(seed)
    now_ms = 1_600_000_000_000
    stream = []
    for _ in range(count):
        now_ms += chance.choice([0, 0, 1_000, DAY_MS, 40 * DAY_MS])
        names = chance.sample(range(labels), chance.choice([0, 1, 1, 1, 2, 3]))
        skewed = tuple(dict.fromkeys(f"l{min(name, chance.randrange(labels))}" for name in names))
        stream.append(Seen(f"u{chance.randrange(users)}", now_ms, skewed))
    return stream


@pytest.mark.parametrize("seed", range(8))
def test_ranks_are_those_of_the_slow_judge(seed: int) -> None:
    stream = random_stream(seed, count=220, users=4 + seed, labels=5 + 3 * seed)
    slow = {one.number: one for one in prequential.examples(stream, HALF_LIFE_MS)}
    baselines = Baselines(Weights())
    for number, seen in enumerate(stream):
        fast = baselines.judge(event(seen.user, seen.time_ms, *seen.labels))
        if number not in slow:
            assert fast == Judged(None, None)
            continue
        assert fast.next is not None
        assert named(fast.next) == slow[number].next, (seed, number)
        if fast.discovery is None:
            assert slow[number].discovery is None
        else:
            assert named(fast.discovery) == slow[number].discovery, (seed, number)


def test_the_first_labelled_event_of_a_stream_is_no_example() -> None:
    unlabelled, first, second = judged_by(
        Baselines(Weights()), event("u", 0), event("u", 1, "tea"), event("u", 2, "tea")
    )
    assert unlabelled == first == Judged(None, None)
    assert second.next is not None


def test_an_event_whose_labels_were_never_shown_is_a_miss_of_both_tasks() -> None:
    *_, judged = judged_by(Baselines(Weights()), event("u", 0, "tea"), event("u", 1, "milk", "rice"))
    assert named(judged.next) == named(judged.discovery) == dict.fromkeys(BASELINES, inf)


def test_a_label_that_was_never_shown_does_not_hurt_one_that_was() -> None:
    *_, judged = judged_by(Baselines(Weights()), event("u", 0, "tea"), event("v", 1, "milk", "tea"))
    assert named(judged.next) == dict.fromkeys(BASELINES, 1.0)


def test_the_first_event_of_a_user_is_no_discovery_and_the_next_new_label_is_one() -> None:
    *_, first, second, again = judged_by(
        Baselines(Weights()),
        event("u", 0, "tea", "milk"),
        event("v", 1, "tea"),
        event("v", 2, "milk"),
        event("v", 3, "milk"),
    )
    assert first.discovery is None
    assert named(second.discovery) == dict.fromkeys(BASELINES, 1.0)
    assert again.discovery is None


def test_a_user_with_events_but_no_label_has_no_history_to_discover_from() -> None:
    *_, judged = judged_by(Baselines(Weights()), event("u", 0, "tea"), event("v", 1), event("v", 2, "tea"))
    assert judged.discovery is None


def test_a_user_whose_history_begins_anew_has_none_to_discover_from() -> None:
    baselines = Baselines(Weights())
    judged_by(baselines, event("u", 0, "tea"), event("v", 1, "milk"))
    begun = baselines.judge(event("u", 2, "milk"), fresh=True)
    assert begun.next is not None
    assert begun.discovery is None
    assert baselines.forgotten == 1
    assert baselines.judge(event("v", 3, "tea")).discovery is not None


def test_own_weights_follow_the_settings_of_each_event_type() -> None:
    types = {"buy": EventTypeWeight(action_weight=5.0), "peek": EventTypeWeight(half_life_s=60.0)}
    baselines = Baselines(Weights(event_types=types))
    judged_by(
        baselines,
        event("u", 0, "milk"),
        event("u", 1, "milk"),
        event("u", 2, "rice", event_type="buy"),
        *[event("u", 3 + number, "tea", event_type="peek") for number in range(9)],
    )
    soon = baselines.judge(event("u", 20, "tea"))
    later = baselines.judge(event("u", DAY_MS, "tea"))
    assert named(soon.next)["own_weights"] == 1.0  # 9 for tea, 5 for rice, 2 for milk
    assert named(later.next)["own_weights"] == 3.0  # of tea only the last view is left


def test_weights_outlive_a_landmark_that_moves() -> None:
    baselines = Baselines(Weights(half_life_s=1.0))
    judged_by(baselines, event("u", 0, "tea"), event("u", 0, "milk"), event("u", 600_000, "milk"))
    judged = baselines.judge(event("u", 600_500, "milk"))
    assert named(judged.next)["own_weights"] == 1.0


def test_more_labels_than_were_reserved_keep_their_counts() -> None:
    baselines = Baselines(Weights())
    for number in range(300):
        baselines.judge(event(f"u{number}", number, f"l{number}"))
    baselines.judge(event("v", 300, "l7"))
    assert named(baselines.judge(event("w", 301, "l7")).next)["popularity"] == 1.0
    assert len(baselines.labels) == 300
