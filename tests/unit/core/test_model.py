"""The model as its users call it: what it recommends, odd input, and states that it must refuse."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import msgpack
import numpy as np
import pytest

from stream_app.core.model import Example, History, NextCategoryModel
from stream_app.core.scores import MAX_SCORES, Scored
from tests.model_streams import (
    DAY_MS,
    START_MS,
    example,
    history,
    new_model,
    observed_in_slices,
    random_examples,
    some_histories,
)

SEEDS = [1, 2, 3]
YEAR_MS = 365 * DAY_MS


def taught(seed: int = 1, count: int = 500, labels: int = 11) -> NextCategoryModel:
    model = new_model()
    observed_in_slices(model, random_examples(seed, count, labels=labels), [57])
    return model


def numbers_of(scored: Scored) -> list[float]:
    tips = [number for tip in scored.recommendations for number in (tip.growth_weight, tip.base_weight)]
    return [share for _, share in scored.next_categories] + tips


def check(model: NextCategoryModel, *histories: History) -> None:
    """Assert what must hold for any user of any model."""
    labels, growth = model.growth_weights(histories)
    for reader, scored, weights in zip(histories, model.score(histories), growth, strict=True):
        assert (scored.user_id, scored.at_ms) == (reader.user_id, reader.at_ms)
        assert all(0.0 <= number <= 1.0 for number in numbers_of(scored)), scored
        shares = [share for _, share in scored.next_categories]
        assert shares == sorted(shares, reverse=True)
        assert len(dict(scored.next_categories)) == len(shares) == min(MAX_SCORES, len(labels))
        tips = scored.recommendations
        assert [tip.growth_weight for tip in tips] == sorted(
            (tip.growth_weight for tip in tips), reverse=True
        )
        assert len(tips) <= MAX_SCORES
        for tip in tips:
            assert tip.labels
            assert set(tip.labels).isdisjoint(reader.labels)
            assert tip.asset_id is None or tip.asset_id not in reader.assets
            assert tip.growth_weight == pytest.approx(weights[labels.index(tip.labels[0])], rel=1e-12)
        of_label = dict(zip(labels, weights.tolist(), strict=True))
        assert all(math.isnan(of_label[label]) for label in reader.labels if label in of_label)
        new = [weight for label, weight in of_label.items() if label not in reader.labels]
        assert all(0.0 <= weight <= 1.0 for weight in new)


# Answers


@pytest.mark.parametrize("labels", [3, 11, 20, 21, 60])
@pytest.mark.parametrize("seed", SEEDS)
def test_answers_are_probabilities_best_first_and_of_nothing_that_was_engaged(seed: int, labels: int) -> None:
    model = taught(seed, labels=labels)
    check(model, *some_histories(seed, model.statistics.labels, 40))


@pytest.mark.parametrize("seed", SEEDS)
def test_growth_weights_of_what_is_not_engaged_sum_to_one_before_calibration(seed: int) -> None:
    model = taught(seed)
    state = model.ranker_state()
    plain = NextCategoryModel(half_life_ms=1.0).ranker_state()["calibrations"]
    model.set_ranker_state(state | {"calibrations": plain})
    readers = some_histories(seed, model.statistics.labels, 60)
    _, weights = model.growth_weights(readers)
    for reader, row in zip(readers, weights, strict=True):
        everything = set(model.statistics.labels) <= set(reader.labels)
        assert np.nansum(row) == pytest.approx(0.0 if everything else 1.0, abs=1e-3)
        shares = [share for _, share in model.score([reader])[0].next_categories]
        assert sum(shares) == pytest.approx(1.0, abs=1e-2)


def test_labels_of_which_the_same_is_known_are_told_in_the_order_of_their_appearance() -> None:
    model = new_model()
    labels = [f"label-{(7 * n) % 50}" for n in range(50)]
    model.observe({}, [example("all", 0, *labels)])
    scored = model.score([history("anyone")])[0]
    assert [label for label, _ in scored.next_categories] == labels[:MAX_SCORES]
    assert [tip.labels[0] for tip in scored.recommendations] == labels[:MAX_SCORES]


def test_users_of_whom_the_same_is_known_get_the_same() -> None:
    model = taught()
    twins = [history(f"twin-{n}", "label-0", "label-2") for n in range(9)]
    first, *others = model.score(twins)
    for other in others:
        assert other.next_categories == first.next_categories
        assert other.recommendations == first.recommendations


def test_recommended_labels_of_an_asset_leave_out_those_that_are_engaged() -> None:
    model = new_model()
    model.observe({}, [example(f"u{n}", n, "hat", "sun", "sea", asset="straw hat") for n in range(40)])
    (tip,) = model.score([history("u", "sun")])[0].recommendations[:1]
    assert (tip.asset_id, set(tip.labels)) == ("straw hat", {"hat", "sea"})
    tips = model.score([history("u", "sun", assets=["straw hat"])])[0].recommendations
    assert {(one.asset_id, one.labels) for one in tips} == {(None, ("hat",)), (None, ("sea",))}


@pytest.mark.parametrize("with_ranker", [False, True])
@pytest.mark.parametrize("asked_before", [False, True])
def test_a_model_without_counts_predicts_nothing_that_is_not_finite(
    asked_before: bool, with_ranker: bool
) -> None:
    model = new_model()
    reader = history("u", "label-1", "nobody")
    if asked_before:
        assert model.why(reader, "label-1") == {}
    if with_ranker:
        model.set_ranker_state(taught().ranker_state())
    labels, growth = model.growth_weights([reader])
    scored = model.score([reader])[0]
    assert all(map(math.isfinite, numbers_of(scored)))
    assert growth.shape == (1, len(labels))
    assert all(map(math.isfinite, model.why(reader, "label-1").values()))
    if not with_ranker:
        assert (scored.next_categories, scored.recommendations, labels) == ([], [], [])
        assert model.accuracy() == {"next": {"examples": 0.0}, "discovery": {"examples": 0.0}}
    assert model.observe({}, [example("u", 0, "label-1")]).next_rank.shape == (1,)


def test_nothing_in_gives_nothing_out() -> None:
    for model in (new_model(), taught()):
        state, examples = model.ranker_state(), model.statistics.examples
        assert model.observe({}, []).next_rank.tolist() == []
        assert model.score([]) == []
        assert model.growth_weights([])[1].shape[0] == 0
        assert np.isnan(model.observe({}, [example("u", 0), example("u", 1)]).next_rank).all()
        assert (model.ranker_state(), model.statistics.examples) == (state, examples)


# Odd input


def odd_streams() -> dict[str, list[Example]]:
    rng = random.Random(0)
    plain = random_examples(9, 300)
    return {
        "one label in all": [example(f"u{n % 5}", n, "tea") for n in range(300)],
        "a label in every event": [one._replace(labels=("always", *one.labels)) for one in plain],
        "64 labels in an event": [
            example(f"u{n % 7}", n, *rng.sample([f"label-{m}" for m in range(90)], 64)) for n in range(120)
        ],
        "all weights 0": [one._replace(weight=0.0) for one in plain],
        "weights that are no numbers": [
            one._replace(weight=rng.choice([math.nan, math.inf, -math.inf, -1.0, 1e308, 5e-324]))
            for one in plain
        ],
        "always fresh": [one._replace(fresh=True) for one in plain],
        "years late": [
            one._replace(event_time_ms=one.event_time_ms - rng.choice([0, 1, 20]) * YEAR_MS) for one in plain
        ],
        "the same instant": [one._replace(event_time_ms=START_MS) for one in plain],
        "the epoch": [one._replace(event_time_ms=rng.choice([0, 1, 999])) for one in plain],
        "one user": [one._replace(user_id="u") for one in plain],
        "every user once": [one._replace(user_id=f"u{n}") for n, one in enumerate(plain)],
        "hardly any labels": [
            one._replace(labels=one.labels if n % 50 == 0 else ()) for n, one in enumerate(plain)
        ],
        "strange names": [example(f"{n % 3}\0", n, "\0", "🏖" * 64, " ", asset="") for n in range(100)],
    }


@pytest.mark.parametrize("kind", sorted(odd_streams()))
def test_an_odd_stream_is_learned_with_finite_numbers(kind: str) -> None:
    examples = odd_streams()[kind]
    model = new_model()
    with np.errstate(divide="raise", invalid="raise"):
        found = observed_in_slices(model, examples, [40, 300])
        readers = some_histories(1, model.statistics.labels, 20)
        check(model, *readers)
    ranks = np.concatenate([one.next_rank for one in found])
    assert [math.isnan(rank) for rank in ranks] == [not one.labels for one in examples]
    assert (ranks[~np.isnan(ranks)] >= 1.0).all()
    tops = np.concatenate([one.next_top for one in found] + [one.discovery_top for one in found])
    assert ((tops >= 0.0) & (tops <= 1.0) | np.isnan(tops)).all()
    model.checked_ranker_state(model.ranker_state())
    for figures in model.accuracy().values():
        assert all(map(math.isfinite, figures.values()))
    assert all(head.steps_refused == 0 for head in model.heads.values())


def test_histories_at_the_ends_of_what_can_be_are_scored() -> None:
    model = taught()
    labels = [*model.statistics.labels, *(f"rare-{n}" for n in range(500))]
    model.observe({}, [example(f"w{n}", n, label) for n, label in enumerate(labels)])
    with np.errstate(divide="raise", invalid="raise"):
        check(
            model,
            history("of 500 labels", *labels[-500:]),
            history("of all labels", *labels),
            history("of nothing"),
            history("of the unheard-of", *(f"unheard-of-{n}" for n in range(9))),
            history("decayed", "label-1", "label-2", weight=0.0),
            history("hardly there", "label-1", weight=5e-324),
            history("of great weight", "label-1", weight=1e300),
            history("of endless weight", "label-1", weight=math.inf),
            history("of no number", "label-1", weight=math.nan),
            history("at the epoch", "label-1", at_ms=0),
            history("in a thousand years", "label-1", at_ms=START_MS + 1_000 * YEAR_MS),
            History("seen later than now", START_MS, ["label-1"], [1.0], [START_MS + YEAR_MS], ()),
            History("seen at the epoch", START_MS, ["label-1"], [1.0], [0], ()),
        )


def test_a_user_with_ten_thousand_events_in_one_slice_learns_like_anyone() -> None:
    examples = [example("busy", n, f"label-{n * n % 13}", f"label-{n % 7}") for n in range(10_000)]
    examples = [one._replace(labels=tuple(dict.fromkeys(one.labels))) for one in examples]
    model = new_model()
    observed = model.observe({}, examples)
    assert np.isfinite(observed.next_rank[200:]).all()
    assert model.statistics.examples == 10_000
    assert model.accuracy()["next"]["hit@5"] > 0.7
    check(model, history("busy", *model.statistics.labels[:5]))


# Accuracy


@pytest.mark.parametrize("seed", SEEDS)
def test_figures_are_those_of_what_was_observed(seed: int) -> None:
    model = new_model()
    examples = random_examples(seed, 800)
    found = observed_in_slices(model, examples, [57])
    # Before anything is known nothing is judged.
    first = int(np.flatnonzero(np.isfinite(np.concatenate([one.next_top for one in found])))[0])
    for task in ("next", "discovery"):
        ranks, top, hit = (
            np.concatenate([getattr(one, f"{task}_{name}") for one in found])
            for name in ("rank", "top", "top_hit")
        )
        judged = np.flatnonzero(~np.isnan(ranks))
        judged = judged[judged >= first]
        figures = model.accuracy()[task]
        assert figures["examples"] == len(judged)
        assert figures["mrr"] == pytest.approx((1.0 / ranks[judged]).mean())
        for most in (1, 5, 10):
            assert figures[f"hit@{most}"] == pytest.approx((ranks[judged] <= most).mean())
        known = judged[~np.isnan(top[judged])]
        bins = np.minimum(top[known] * 10, 9).astype(int)
        error = sum(abs((top[known] - hit[known])[bins == one].sum()) for one in range(10)) / len(known)
        assert figures["ece"] == pytest.approx(error)
        assert 0.0 < figures["log_loss"] < 21.0
        assert 0.0 < figures["markov_mrr"] < 1.0
        assert 0.0 < figures["popularity_mrr"] < 1.0


# States


@pytest.mark.parametrize("seed", SEEDS)
def test_a_model_restored_through_bytes_scores_and_learns_bit_for_bit(seed: int) -> None:
    model, restored = taught(seed), new_model()
    state = model.ranker_state()
    restored.set_ranker_state(msgpack.unpackb(msgpack.packb(state)))
    assert restored.ranker_state() == state
    restored.add(model.take_delta())
    assert restored.ranker_state() == state
    model.clear_counts()
    model.set_ranker_state(state)
    rebuilt = new_model()
    rebuilt.add(taught(seed).take_delta())
    rebuilt.set_ranker_state(state)
    readers = some_histories(seed, rebuilt.statistics.labels)
    batch = [example(f"late-{n}", 10**6 + n, "label-1", f"label-{n % 9}x") for n in range(40)]
    assert restored.growth_weights(readers)[1].tobytes() == rebuilt.growth_weights(readers)[1].tobytes()
    assert restored.score(readers) == rebuilt.score(readers)
    assert restored.observe({}, batch).next_top.tobytes() == rebuilt.observe({}, batch).next_top.tobytes()
    assert restored.ranker_state() == rebuilt.ranker_state()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_the_average_of_equal_states_is_that_state(count: int) -> None:
    state = taught().ranker_state()
    average = NextCategoryModel.average([copy.deepcopy(state) for _ in range(count)])
    assert average["labels"] == state["labels"]
    for task in ("next", "discovery"):
        for part in ("heads", "calibrations"):
            assert average[part][task]["steps"] == state[part][task]["steps"]
            for field in {"weights", "g2"} & state[part][task].keys():
                assert average[part][task][field] == pytest.approx(state[part][task][field], rel=1e-15)
        assert average["heads"][task]["affinities"] == state["heads"][task]["affinities"]


def test_the_average_does_not_hang_on_the_order_of_states_but_for_that_of_labels() -> None:
    states = [taught(seed).ranker_state() for seed in SEEDS]
    forth, back = NextCategoryModel.average(states), NextCategoryModel.average(states[::-1])
    assert sorted(forth["labels"]) == sorted(back["labels"])
    one, other = new_model(), new_model()
    one.set_ranker_state(forth)
    other.set_ranker_state(forth | {"labels": forth["labels"]})
    third = new_model()
    third.statistics.place_labels(forth["labels"])  # the same places, from the other average
    third.set_ranker_state(back)
    found, expected = third.ranker_state(), one.ranker_state()
    assert found["labels"] == expected["labels"]
    for task in ("next", "discovery"):
        assert found["heads"][task]["weights"] == pytest.approx(expected["heads"][task]["weights"], rel=1e-12)
        for field in ("weights", "g2"):
            np.testing.assert_allclose(
                np.frombuffer(found["heads"][task]["affinities"][field], "<f4"),
                np.frombuffer(expected["heads"][task]["affinities"][field], "<f4"),
                rtol=1e-6,
            )


@pytest.mark.parametrize("huge", [1e30, 1e300, -1e300, 1.7e308, -1.7e308])
@pytest.mark.parametrize(
    "place",
    [
        ("heads", "next", "weights"),
        ("heads", "discovery", "weights"),
        ("heads", "next", "g2"),
        ("calibrations", "next", "weights"),
        ("calibrations", "discovery", "weights"),
    ],
    ids="-".join,
)
def test_a_number_that_is_finite_but_huge_is_refused_or_does_no_harm(
    place: tuple[str, str, str], huge: float
) -> None:
    model = taught()
    state = model.ranker_state()
    part, task, field = place
    state[part][task][field] = dict.fromkeys(state[part][task][field], huge)
    try:
        average = model.average([model.checked_ranker_state(state)] * 3)
    except ValueError:
        return
    model.set_ranker_state(average)
    check(model, *some_histories(1, model.statistics.labels))


def test_huge_affinities_are_refused_or_do_no_harm() -> None:
    model = taught()
    state = model.ranker_state()
    blob = state["heads"]["next"]["affinities"]["weights"]
    state["heads"]["next"]["affinities"]["weights"] = np.full(len(blob) // 4, 3e38, "<f4").tobytes()
    try:
        model.set_ranker_state(model.average([model.checked_ranker_state(state)] * 2))
    except ValueError:
        return
    check(model, *some_histories(1, model.statistics.labels))


JUNK: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    1 << 70,
    0.0,
    0.5,
    -0.5,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x" * 65,
]
JUNK += ["label-1", b"", b"\0" * 4, b"\xff" * 4, [], [[]], ["label-1", "label-1"], {}, {"weights": {}}, 1e300]


def paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else []
    for key, child in children:
        found += paths(child, (*path, key))
    return found


def mutated(state: Any, rng: random.Random) -> Any:
    """Return a copy of which one place is replaced, left out, doubled, or has some of its bytes changed."""
    copied = copy.deepcopy(state)
    path = rng.choice(paths(copied)[1:])
    node = copied
    for key in path[:-1]:
        node = node[key]
    key, old = path[-1], node[path[-1]]
    change = rng.randrange(5)
    if change == 0 and isinstance(old, bytes):
        place = rng.randrange(len(old))
        node[key] = old[:place] + bytes([rng.randrange(256)]) + old[place + 1 :]
    elif change == 1:
        del node[key]
    elif change == 2 and isinstance(node, list):
        node.append(old)
    elif change == 3 and isinstance(node, dict):
        node["new"] = old
    else:
        node[key] = rng.choice(JUNK)
    return copied


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_state_is_refused_and_changes_nothing_or_can_be_gone_on_from(seed: int) -> None:
    rng = random.Random(f"damage {seed}")
    model = taught(seed, 200)
    state = model.ranker_state()
    readers = some_histories(seed, model.statistics.labels, 5)
    kept = model.score(readers)
    refused = 0
    for number in range(400):
        damaged = mutated(state, rng)
        try:
            model.set_ranker_state(damaged)
        except ValueError as exc:
            if not str(exc).startswith("not a ranker: "):
                raise
            assert model.ranker_state() == state, (seed, number)
            refused += 1
            continue
        if damaged == state:
            assert model.score(readers) == kept, (seed, number)
        if number % 5 == 0:
            check(model, *readers)
        model.checked_ranker_state(model.average([state, model.checked_ranker_state(damaged)]))
        model.set_ranker_state(state)
    assert refused > 100


@pytest.mark.parametrize(
    "state", [None, 7, "state", b"", [], {}, {"v": 1}, {"v": 2}, {"v": 1, "labels": []}], ids=str
)
def test_what_is_no_state_is_refused(state: object) -> None:
    with pytest.raises(ValueError, match="not a ranker: "):
        new_model().set_ranker_state(state)


@pytest.mark.parametrize(
    "labels", [["x" * 65], [""], ["a", "a"], [b"a"], [None], [["a"]], "ab", ("a",)], ids=str
)
def test_labels_of_a_state_that_cannot_be_are_refused(labels: object) -> None:
    with pytest.raises(ValueError, match="not a ranker: "):
        new_model().set_ranker_state(taught(1, 100).ranker_state() | {"labels": labels})


# Counts that change without growing


def test_scores_are_of_the_counts_that_are_there_not_of_those_that_were() -> None:
    deltas = []
    for first, second in (("tea", "milk"), ("milk", "tea")):
        model = new_model()
        model.observe({}, [example(f"u{n % 9}", n, first if n % 5 else second) for n in range(160)])
        deltas.append(model.take_delta())
    swapped = new_model()
    swapped.statistics.place_labels(["tea", "milk"])
    swapped.add(deltas[0])
    swapped.score([history("u", "tea")])
    swapped.observe({}, [example("v", 200, "tea")])
    swapped.add(deltas[0], -1)
    swapped.add(deltas[1])
    expected = new_model()
    expected.statistics.place_labels(["tea", "milk"])
    expected.add(deltas[1])
    expected.add(swapped.take_delta())
    expected.set_ranker_state(swapped.ranker_state())
    readers = [history("u", "tea"), history("w"), history("x", "milk")]
    assert swapped.growth_weights(readers)[1] == pytest.approx(
        expected.growth_weights(readers)[1], nan_ok=True
    )
    for one, other in zip(swapped.score(readers), expected.score(readers), strict=True):
        assert dict(one.next_categories) == pytest.approx(dict(other.next_categories), rel=1e-5)
