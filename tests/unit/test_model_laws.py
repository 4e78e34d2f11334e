"""Laws of the next-category model, and input at the edges."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from stream_app.core import model as model_module
from stream_app.core.history import Batch
from stream_app.core.model import BATCH, Example, History, NextCategoryModel, Observed
from tests.unit.model_logs import (
    DAY_MS,
    HALF_LIFE_MS,
    START_MS,
    Journal,
    counts,
    observe_all,
    random_examples,
    trained,
)

FIELDS = ("next_rank", "next_top", "next_top_hit", "discovery_rank", "discovery_top", "discovery_top_hit")


def joined(found: list[Observed]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([getattr(one, name) for one in found]) for name in FIELDS}


def assert_same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    for name in FIELDS:
        assert np.array_equal(one[name], two[name], equal_nan=True), name


def test_equal_input_gives_equal_bits() -> None:
    examples = random_examples(1, 1_200)
    models = [NextCategoryModel(half_life_ms=HALF_LIFE_MS, seed=7) for _ in range(2)]
    assert_same(*(joined(observe_all(model, examples)) for model in models))
    assert models[0].ranker_state() == models[1].ranker_state()
    assert models[0].take_delta().as_document() == models[1].take_delta().as_document()


def test_other_names_of_labels_and_users_change_names_and_nothing_else() -> None:
    examples = random_examples(2, 1_000)
    renamed = [
        one._replace(labels=tuple(map(hash_of, one.labels)), user_id=f"x{one.user_id}") for one in examples
    ]
    journals = [Journal(), Journal()]
    models = [NextCategoryModel(half_life_ms=HALF_LIFE_MS) for _ in range(2)]
    found = [
        joined(observe_all(model, log, journal=journal))
        for model, log, journal in zip(models, (examples, renamed), journals, strict=True)
    ]
    assert_same(*found)
    users = list(journals[0].at_ms)
    scored = models[0].score([journals[0].history(user, START_MS + DAY_MS) for user in users])
    others = models[1].score([journals[1].history(f"x{user}", START_MS + DAY_MS) for user in users])
    for one, two in zip(scored, others, strict=True):
        assert [(hash_of(label), score) for label, score in one.next_categories] == two.next_categories
        assert [
            (
                tip.event_type,
                tip.asset_id,
                tuple(map(hash_of, tip.labels)),
                tip.growth_weight,
                tip.base_weight,
            )
            for tip in one.recommendations
        ] == [tuple(tip) for tip in two.recommendations]


def hash_of(label: str) -> str:
    return f"z{(int(label.removeprefix('label-')) * 7 + 3) % 12}"


def test_scoring_never_changes_anything() -> None:
    examples = random_examples(3, 1_000)
    asked, left_alone = (NextCategoryModel(half_life_ms=HALF_LIFE_MS) for _ in range(2))
    journal, other = Journal(), Journal()
    for begin in range(0, len(examples), 50):
        part = examples[begin : begin + 50]
        one = observe_all(asked, part, journal=journal)
        two = observe_all(left_alone, part, journal=other)
        assert_same(joined(one), joined(two))
        histories = [journal.history(user, START_MS + DAY_MS) for user in journal.at_ms]
        first = asked.score(histories)
        asked.growth_weights(histories)
        asked.why(histories[0], "label-1")
        asked.accuracy()
        assert asked.score(histories) == first
    assert asked.ranker_state() == left_alone.ranker_state()
    assert counts(asked.take_delta()) == counts(left_alone.take_delta())


def test_no_example_of_a_batch_is_learned_from_before_another_is_scored() -> None:
    model, journal = trained(4, 1_600, users=60)
    batch = [
        Example(f"user-{n}", "view", START_MS + 40 * DAY_MS, (f"label-{(n * 5) % 12}",), None)
        for n in range(60)
    ]
    histories = journal.histories(batch)
    alone = []
    for example in batch:
        copied = copy.deepcopy(model)
        alone.append(copied.observe(histories, [example]))
    together = model.observe(histories, batch)
    for name in FIELDS:
        expected = np.concatenate([getattr(one, name) for one in alone])
        assert getattr(together, name) == pytest.approx(expected, rel=1e-5, nan_ok=True), name


def test_a_batch_is_learned_from_before_the_next_is_scored() -> None:
    model = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    examples = [Example(f"u{n}", "view", START_MS + n, ("tea",), None) for n in range(3)]
    observed = model.observe({}, examples)
    assert observed.next_rank.tolist() == [np.inf, 1.0, 1.0]


def test_batches_grow_with_what_was_learned_and_end_at_the_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    count = NextCategoryModel._count

    def noted(self: NextCategoryModel, batch: Batch, new: np.ndarray) -> None:
        sizes.append(len(batch.examples))
        count(self, batch, new)

    monkeypatch.setattr(NextCategoryModel, "_count", noted)
    observe_all(NextCategoryModel(half_life_ms=HALF_LIFE_MS), random_examples(5, 6_000), slice_size=500)
    assert sizes[:20] == [1] * 20
    assert max(sizes) == BATCH
    assert sum(sizes) == 6_000


def test_it_learns_who_likes_what_and_what_follows_what() -> None:
    model = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    observe_all(model, random_examples(6, 4_000, most=1), slice_size=500)
    figures = model.accuracy()
    # What follows what is all that there is in these streams, so nothing can be much better than Markov.
    assert figures["next"]["mrr"] > 0.9 * figures["next"]["markov_mrr"]
    assert figures["next"]["mrr"] > 1.2 * figures["next"]["popularity_mrr"]
    assert figures["next"]["ece"] < 0.05


def test_an_engaged_label_is_never_recommended() -> None:
    model, journal = trained(7, 1_000)
    histories = [journal.history(user, START_MS + DAY_MS) for user in journal.at_ms]
    for history, scored in zip(histories, model.score(histories), strict=True):
        assert scored.recommendations or len(history.labels) == 12
        for tip in scored.recommendations:
            assert set(tip.labels).isdisjoint(history.labels)
            assert tip.asset_id not in history.assets
            assert 0.0 < tip.growth_weight < 1.0
            assert tip.event_type in {"view", "purchase"}
        weights = [tip.growth_weight for tip in scored.recommendations]
        assert weights == sorted(weights, reverse=True)
        assert {tip.labels[0] for tip in scored.recommendations} == {
            label for label in model.statistics.labels if label not in history.labels
        }


def test_growth_weights_are_those_of_the_recommendations() -> None:
    model, journal = trained(8, 1_000)
    histories = [journal.history(user, START_MS + DAY_MS) for user in journal.at_ms]
    labels, weights = model.growth_weights(histories)
    for row, (history, scored) in enumerate(zip(histories, model.score(histories), strict=True)):
        found = dict(zip(labels, weights[row].tolist(), strict=True))
        assert {label for label, weight in found.items() if np.isnan(weight)} == set(history.labels)
        for tip in scored.recommendations:
            assert tip.growth_weight == found[tip.labels[0]]


def test_why_adds_up_to_how_far_a_label_is_ahead_of_the_average() -> None:
    model, journal = trained(9, 1_000)
    history = journal.history("user-3", START_MS + DAY_MS)
    new = next(label for label in model.statistics.labels if label not in history.labels)
    assert set(model.why(history, new)) == {*model_module.DISCOVERY, "own numbers of the label"}
    assert set(model.why(history, history.labels[0])) == {*model_module.NEXT, "own numbers of the label"}
    assert model.why(history, "never heard of") == {}
    # Of all labels the contributions cancel out, and the more speaks for a label the better is its rank.
    [scored] = model.score([history])
    ahead = [sum(model.why(history, tip.labels[0]).values()) for tip in scored.recommendations]
    assert ahead == sorted(ahead, reverse=True)
    assert sum(ahead) == pytest.approx(0.0, abs=1e-4)


def test_a_new_model_predicts_nothing() -> None:
    model = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    history = History("u", START_MS, ["tea"], [1.0], [START_MS], ())
    [scored] = model.score([history])
    assert (scored.next_categories, scored.recommendations) == ([], [])
    assert model.growth_weights([history])[0] == []
    assert model.why(history, "tea") == {}
    assert model.accuracy() == {"next": {"examples": 0.0}, "discovery": {"examples": 0.0}}
    assert model.observe({}, []).next_rank.tolist() == []
    assert model.take_delta().examples == 0
    assert model.score([]) == []


def test_examples_without_labels_are_ignored() -> None:
    model = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    observed = model.observe({}, [Example("u", "view", START_MS, (), "a-1")] * 3)
    assert np.isnan(observed.next_rank).all()
    assert model.take_delta().examples == 0
    assert model.statistics.asset_ids == []


def test_a_single_label_is_the_answer_to_everything() -> None:
    model = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    examples = [Example(f"u{n % 5}", "view", START_MS + n, ("tea",), None) for n in range(600)]
    found = joined(observe_all(model, examples))
    assert found["next_rank"][1:].tolist() == [1.0] * 599
    assert np.isnan(found["discovery_rank"]).all()
    [scored] = model.score([History("u1", START_MS, ["tea"], [3.0], [START_MS], ())])
    assert [label for label, _ in scored.next_categories] == ["tea"]
    assert scored.recommendations == []
    assert np.isfinite(list(model.heads["next"].weights.values())).all()


def test_a_label_in_every_event_stays_first_and_does_no_harm() -> None:
    examples = [
        one._replace(labels=("always", *one.labels)) for one in random_examples(10, 800, most=1, fresh=0.0)
    ]
    model = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    found = joined(observe_all(model, examples))
    assert (found["next_rank"][200:] == 1.0).mean() > 0.95
    assert np.isfinite(found["next_top"][1:]).all()


def test_a_user_with_ten_thousand_events_and_one_with_five_hundred_labels() -> None:
    model = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    rng = np.random.default_rng(11)
    busy = [
        Example("busy", "view", START_MS + 1_000 * n, (f"label-{int(rng.integers(300))}",), f"asset-{n}")
        for n in range(10_000)
    ]
    observe_all(model, busy, slice_size=500)
    wide = [
        Example("wide", "view", START_MS + n, tuple(f"wide-{m}" for m in range(n, n + 64)), None)
        for n in range(0, 512, 64)
    ]
    found = joined(observe_all(model, wide))
    assert np.isfinite(found["next_top"]).all()
    assert len(model.statistics.labels) == 812
    assert model.take_delta().examples == 10_008


def test_a_fully_decayed_profile_is_scored_like_any_other() -> None:
    model, journal = trained(12, 600)
    history = journal.history("user-1", START_MS)
    faded = replace(history, weights=[0.0] * len(history.labels), at_ms=START_MS + 10**13)
    [scored] = model.score([faded])
    assert all(np.isfinite(score) for _, score in scored.next_categories)
    assert {tip.labels[0] for tip in scored.recommendations}.isdisjoint(history.labels)


def test_weights_that_are_not_finite_cannot_be_learned() -> None:
    model, journal = trained(13, 400)
    bad = [float("nan"), float("inf"), -float("inf")]
    for number, weight in enumerate(bad):
        history = History("odd", START_MS, ["label-1", "label-2"], [weight, 1.0], [0, 1], ())
        example = Example("odd", "view", START_MS + number, ("label-3",), None, weight=weight)
        model.observe({"odd": history}, [example, example])
    state = model.checked_ranker_state(model.ranker_state())
    assert state == model.ranker_state()
    [scored] = model.score([journal.history("user-1", START_MS)])
    assert all(0.0 <= score <= 1.0 for _, score in scored.next_categories)


def test_scores_are_the_best_twenty_best_first() -> None:
    model, journal = trained(14, 1_500, labels=40)
    [scored] = model.score([journal.history("user-2", START_MS + DAY_MS)])
    scores = [score for _, score in scored.next_categories]
    assert len(scores) == 20
    assert scores == sorted(scores, reverse=True)
    assert scored.model_version == model.version


def test_discoveries_are_examples_with_a_new_label_by_users_with_a_history() -> None:
    model = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    examples = [
        Example("u", "view", START_MS, ("tea",), None),
        Example("u", "view", START_MS, ("tea",), None),
        Example("u", "view", START_MS, ("tea", "milk"), None),
        Example("u", "view", START_MS, ("milk",), None, fresh=True),
        Example("u", "view", START_MS, ("tea",), None),
        Example("v", "view", START_MS, ("tea",), None),
    ]
    found = model.observe({}, examples)
    assert np.isnan(found.discovery_rank).tolist() == [True, True, False, True, False, True]
    assert found.discovery_rank[2] == np.inf  # milk was not known yet
    assert found.discovery_rank[4] == 1.0


def test_the_version_is_of_the_settings_and_not_of_what_was_learned() -> None:
    one, two = NextCategoryModel(half_life_ms=1.0), trained(15, 100)[0]
    assert one.version == two.version
    assert len(one.version) == 16
    int(one.version, 16)


def test_a_segment_can_ask_for_its_own_accuracy() -> None:
    model, _ = trained(16, 800)
    everything, own = model.accuracy()["discovery"], model.accuracy(["label-1"])["discovery"]
    assert 0.0 < own["examples"] < everything["examples"]
    assert 0.0 <= own["mrr"] <= 1.0
    assert model.accuracy(["never heard of"])["discovery"] == {"examples": 0.0}


def test_labels_keep_their_numbers_when_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_app.core.statistics.MAX_LABELS", 16)
    examples = random_examples(17, 500, labels=40, most=1)
    model = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    found = joined(observe_all(model, examples))
    assert model.statistics.labels_dropped > 0
    assert len(model.statistics.labels) <= 16
    assert np.isfinite(found["next_top"][1:]).all()
    assert model.take_delta().examples == 500
    model.checked_ranker_state(model.ranker_state())
