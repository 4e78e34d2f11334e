"""What must hold for the next-category model whatever the stream: names mean nothing, counts add up, scoring
changes nothing, and nothing is learned from before it was scored.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import numpy as np
import pytest

from stream_app.core.model import Delta, Example, History, NextCategoryModel, Observed
from stream_app.core.scores import Scored, pack_scores
from tests.learned import counted, counts_of, held_by
from tests.model_streams import (
    example,
    history,
    new_model,
    observed_in_slices,
    plainly_counted,
    random_examples,
    some_histories,
)
from tests.random_logs import core_records, core_weights, random_log

SEEDS = [1, 2, 3]
FIELDS = [field.name for field in dataclasses.fields(Observed)]


def same_bits(one: Observed, other: Observed) -> bool:
    return all(getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in FIELDS)


def taught(seed: int, count: int = 600, cuts: Sequence[int] = (57,)) -> NextCategoryModel:
    model = new_model()
    observed_in_slices(model, random_examples(seed, count), cuts)
    return model


def labels_of(examples: Sequence[Example]) -> list[str]:
    return list(dict.fromkeys(label for one in examples for label in one.labels))


def through_bytes(document: dict[str, Any]) -> Any:
    return msgpack.unpackb(msgpack.packb(document))


def plain_scores(model: NextCategoryModel, histories: Sequence[History]) -> list[bytes]:
    return [pack_scores(scored) for scored in model.score(histories)]


# Names mean nothing


def bijection(seed: int, names: Sequence[str]) -> Callable[[str], str]:
    rng = random.Random(f"names {seed}")
    codes = rng.sample(range(10**6), len(names))
    new = dict(zip(names, (f"{rng.choice('zaé🏖 -')}{code}" for code in codes), strict=True))
    return lambda name: new.get(name, name)


def renamed(one: Example, name: Callable[[str], str]) -> Example:
    return Example(
        name(one.user_id),
        name(one.event_type),
        one.event_time_ms,
        tuple(map(name, one.labels)),
        None if one.asset_id is None else name(one.asset_id),
        one.fresh,
        one.weight,
    )


def renamed_scores(scored: Scored, name: Callable[[str], str]) -> Scored:
    return dataclasses.replace(
        scored,
        next_categories=[(name(label), share) for label, share in scored.next_categories],
        recommendations=[
            tip._replace(
                event_type=name(tip.event_type),
                asset_id=None if tip.asset_id is None else name(tip.asset_id),
                labels=tuple(map(name, tip.labels)),
            )
            for tip in scored.recommendations
        ],
    )


@pytest.mark.parametrize("kinds", [("label",), ("label", "asset", "view", "buy", "return", "user")], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_other_names_permute_scores_and_change_nothing_else(seed: int, kinds: tuple[str, ...]) -> None:
    examples = random_examples(seed, labels=30)
    names = {one.user_id for one in examples} | {one.asset_id for one in examples if one.asset_id}
    names |= {label for one in examples for label in one.labels} | {one.event_type for one in examples}
    name = bijection(seed, sorted(one for one in names if one.startswith(kinds)))
    others = [renamed(one, name) for one in examples]
    model, other = new_model(), new_model()
    before = observed_in_slices(model, examples, [57, 3])
    after = observed_in_slices(other, others, [57, 3])
    assert all(same_bits(one, two) for one, two in zip(before, after, strict=True)), seed

    readers = some_histories(seed, labels_of(examples))
    readers_too = [
        dataclasses.replace(one, labels=list(map(name, one.labels)), assets=frozenset(map(name, one.assets)))
        for one in readers
    ]
    assert [renamed_scores(one, name) for one in model.score(readers)] == other.score(readers_too)
    labels, weights = model.growth_weights(readers)
    labels_too, weights_too = other.growth_weights(readers_too)
    assert list(map(name, labels)) == labels_too
    assert weights.tobytes() == weights_too.tobytes()
    for label in [*labels[:5], "nobody"]:
        assert model.why(readers[3], label) == other.why(readers_too[3], name(label))
    state = model.ranker_state()
    assert state | {"labels": list(map(name, state["labels"]))} == other.ranker_state()
    assert model.accuracy() == other.accuracy()
    assert model.accuracy(labels[:3]) == other.accuracy(labels_too[:3])
    renamed_counts = {
        tuple(
            name(part) if isinstance(part, str) and place else part for place, part in enumerate(key)
        ): count
        for key, count in counts_of(model.take_delta()).items()
    }
    assert renamed_counts == counts_of(other.take_delta())


# Counts


@pytest.mark.parametrize("cuts", [(1,), (7, 200, 1), (57,), (10_000,)], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_plain_judge_counts_the_same_however_a_stream_is_cut(seed: int, cuts: tuple[int, ...]) -> None:
    examples = random_examples(seed)
    model = new_model()
    observed_in_slices(model, examples, cuts)
    held = held_by(model)
    delta = model.take_delta()
    assert counts_of(delta) == plainly_counted(examples), seed
    copied = new_model()
    copied.add(delta)
    assert held_by(copied) == held


@pytest.mark.parametrize("seed", [1, 2])
def test_deltas_taken_on_the_way_add_up_to_one_taken_at_the_end(seed: int) -> None:
    examples = random_examples(seed)
    model, at_once = new_model(), new_model()
    taken = []
    for begin in range(0, len(examples), 40):
        # Without histories: what is counted then differs, but alike in both.
        model.observe({}, examples[begin : begin + 40])
        at_once.observe({}, examples[begin : begin + 40])
        if begin % 120 == 0:
            taken.append(model.take_delta())
    taken += [model.take_delta(), model.take_delta()]
    assert taken[-1].examples == 0
    assert counts_of(Delta.merged(taken)) == counts_of(at_once.take_delta())


# As many records as show what the fold may do to a user inside a slice: begin him anew, forget labels of his.
@pytest.mark.parametrize("shape", ["seconds-event", "mixed-wall", "minutes-event", "high-floor-event"])
def test_a_log_counts_the_same_through_the_fold_however_it_is_cut(shape: str) -> None:
    log = random_log(shape, 11)
    records, weights = core_records(log.records)[:1500], core_weights(log.weights)
    stretch = (0, 0, records[-1].offset + 1)
    first, *others = [counts_of(counted({0: records}, [stretch], weights, size=size)) for size in (7, 1500)]
    for other in others:
        differ = [key for key in first.keys() | other.keys() if first.get(key) != other.get(key)]
        assert differ == [], log.name


@pytest.mark.parametrize("seed", SEEDS)
def test_counts_of_two_halves_of_the_users_add_up_to_those_of_the_whole(seed: int) -> None:
    examples = random_examples(seed)
    rng = random.Random(seed)
    chosen = {user for user in {one.user_id for one in examples} if rng.random() < 0.5}
    deltas, documents = [], []
    for half in (True, False):
        model = new_model()
        observed_in_slices(model, [one for one in examples if (one.user_id in chosen) == half], [31])
        deltas.append(model.take_delta())
        documents.append(through_bytes(deltas[-1].as_document()))
    whole = new_model()
    observed_in_slices(whole, examples, [64])
    expected, held = counts_of(whole.take_delta()), held_by(whole)
    for one, other in (deltas, deltas[::-1]):
        assert counts_of(Delta.merged([one, other])) == expected, seed
        added = new_model()
        added.add(one)
        added.add(other)
        assert held_by(added) == held
        assert counts_of(added.take_delta()) == {}, "what is added is not pending"
    read = [Delta.from_document(document) for document in documents]
    assert counts_of(Delta.merged(read)) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_added_and_taken_away_leaves_the_same_counts_and_scores(seed: int) -> None:
    examples = random_examples(seed)
    newest = max(examples, key=lambda one: one.event_time_ms).user_id
    users = sorted({one.user_id for one in examples} - {newest})
    gone = set(random.Random(seed).sample(users, len(users) // 2))
    staying, going = new_model(), new_model()
    observed_in_slices(staying, [one for one in examples if one.user_id not in gone], [50])
    observed_in_slices(going, [one for one in examples if one.user_id in gone], [50])
    delta = going.take_delta()
    assert set(going.statistics.labels) <= set(staying.statistics.labels)
    readers = some_histories(seed, staying.statistics.labels)
    held, state = held_by(staying), staying.ranker_state()
    scores, growth = plain_scores(staying, readers), staying.growth_weights(readers)[1]
    pending = counts_of(staying.take_delta())
    staying.add(delta)
    assert held_by(staying) != held
    staying.add(delta, -1)
    assert held_by(staying) == held, seed
    assert counts_of(staying.take_delta()) == {}
    assert pending["examples",] == held["examples",]
    assert staying.ranker_state() == state
    assert plain_scores(staying, readers) == scores
    assert staying.growth_weights(readers)[1].tobytes() == growth.tobytes()


# Scoring


@pytest.mark.parametrize("seed", SEEDS)
def test_scoring_changes_nothing_that_is_learned_nor_what_comes_of_it(seed: int) -> None:
    examples = random_examples(seed, 900)
    readers = some_histories(seed, labels_of(examples))
    asked, left_alone = new_model(), new_model()
    rng = random.Random(seed)
    begin = 0
    while begin < len(examples):
        part = examples[begin : begin + rng.choice([1, 20, 150])]
        begin += len(part)
        for _ in range(rng.randrange(3)):
            state, held, accuracy = asked.ranker_state(), held_by(asked), asked.accuracy()
            given = copy.deepcopy(readers)
            asked.score(readers)
            asked.growth_weights(readers)
            asked.why(readers[0], "label-1")
            asked.why(readers[0], "nobody")
            asked.accuracy(["label-1"])
            asked.checked_ranker_state(state)
            assert readers == given
            assert asked.ranker_state() == state
            assert held_by(asked) == held
            assert repr(asked.accuracy()) == repr(accuracy)
        assert same_bits(asked.observe({}, part), left_alone.observe({}, part)), (seed, begin)
    assert asked.ranker_state() == left_alone.ranker_state()
    assert counts_of(asked.take_delta()) == counts_of(left_alone.take_delta())
    assert repr(asked.accuracy()) == repr(left_alone.accuracy())
    assert asked.growth_weights(readers)[1].tobytes() == left_alone.growth_weights(readers)[1].tobytes()
    assert [one.next_categories for one in asked.score(readers)] == [
        one.next_categories for one in left_alone.score(readers)
    ]


def test_observing_leaves_histories_and_examples_as_they_are() -> None:
    examples = random_examples(4, 200)
    model = taught(4, 200)
    histories = {one.user_id: history(one.user_id, "label-0", "label-3", "nobody") for one in examples}
    given = copy.deepcopy(histories)
    model.observe(histories, examples)
    assert histories == given
    assert examples == random_examples(4, 200)


def test_asking_twice_gets_the_same_answer_and_in_another_order_the_same_to_rounding() -> None:
    model = taught(5)
    readers = some_histories(5, model.statistics.labels)
    assert plain_scores(model, readers) == plain_scores(model, readers)
    for forth, back in zip(model.score(readers), model.score(readers[::-1])[::-1], strict=True):
        assert forth.user_id == back.user_id
        assert dict(forth.next_categories) == pytest.approx(dict(back.next_categories), rel=1e-5)
        alone = model.score([readers[int(forth.user_id.rpartition("-")[2])]])[0]
        assert [tip.growth_weight for tip in alone.recommendations] == pytest.approx(
            [tip.growth_weight for tip in forth.recommendations], rel=1e-5
        )


# Repeatable


def digest(seed: int) -> str:
    """Return all that a run leaves behind, to the last bit."""
    model = new_model(seed)
    seen = [
        getattr(one, name).tobytes()
        for one in observed_in_slices(model, random_examples(seed), [57, 100, 1])
        for name in FIELDS
    ]
    scores = plain_scores(model, some_histories(seed, model.statistics.labels))
    document = [
        seen,
        scores,
        model.ranker_state(),
        model.take_delta().as_document(),
        model.accuracy(),
        model.version,
    ]
    return hashlib.sha256(msgpack.packb(document)).hexdigest()


def test_a_seeded_run_is_repeatable_to_the_last_bit() -> None:
    assert digest(6) == digest(6)


def test_a_run_in_another_process_with_other_hashes_of_strings_gives_the_same_bits() -> None:
    program = "from tests.laws.test_laws_of_the_model import digest; print(digest(6))"
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert found == {digest(6)}


# Scored before it is learned from

KNOWN = 1_600


def batch_of(seed: int, count: int) -> list[Example]:
    """Return examples of as many users, each once, with labels both known and new."""
    rng = random.Random(f"batch {seed}")
    return [
        example(
            f"reader-{number}", 10**6, *rng.sample(["label-0", "label-1", "label-2", "label-5", "new"], 2)
        )
        for number in range(count)
    ]


def known_of(batch: Sequence[Example], seed: int) -> dict[str, History]:
    rng = random.Random(f"known {seed}")
    return {
        one.user_id: history(
            one.user_id,
            *rng.sample(["label-0", "label-1", "label-2", "label-3", "label-9"], rng.randrange(4)),
            at_ms=one.event_time_ms,
        )
        for one in batch
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_what_other_users_bring_in_a_batch_does_not_touch_a_users_scores(seed: int) -> None:
    batch = batch_of(seed, 60)
    histories = known_of(batch, seed)
    rng = random.Random(seed)
    others = [
        one
        if number % 4 == 0
        else example(one.user_id, 10**6, rng.choice(["label-4", "label-8"]), f"unheard-of-{number}")
        for number, one in enumerate(batch)
    ]
    found = []
    for part in (batch, others):
        model = taught(seed, KNOWN)
        assert model.statistics.examples // 16 >= len(part), "one batch"
        found.append(model.observe(histories, part))
    for name in FIELDS:
        one, other = (getattr(observed, name)[::4] for observed in found)
        assert one.tobytes() == other.tobytes(), (seed, name)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_judged_is_what_a_model_says_that_only_scores(seed: int) -> None:
    batch = batch_of(seed, 60)
    histories = known_of(batch, seed)
    reader = taught(seed, KNOWN)
    scored = reader.score([histories[one.user_id] for one in batch])
    labels, growth = reader.growth_weights([histories[one.user_id] for one in batch])
    observed = taught(seed, KNOWN).observe(histories, batch)
    for number, (one, says) in enumerate(zip(batch, scored, strict=True)):
        first, share = says.next_categories[0]
        assert observed.next_top[number] == share
        assert observed.next_top_hit[number] == (first in one.labels)
        ranked = [label for label, _ in says.next_categories]
        came = [label for label in one.labels if label in labels]
        assert observed.next_rank[number] == min(ranked.index(label) + 1 for label in came)
        engaged = histories[one.user_id].labels
        new = [label for label in one.labels if label not in engaged]
        if not (engaged and new):
            assert np.isnan(observed.discovery_rank[number])
            continue
        weights = {label: growth[number, labels.index(label)] for label in labels if label not in engaged}
        assert observed.discovery_top[number] == pytest.approx(max(weights.values()), rel=1e-12)
        better = [
            1 + sum(weight > weights[label] for weight in weights.values())
            for label in new
            if label in weights
        ]
        assert observed.discovery_rank[number] == (min(better) if better else np.inf)


def test_a_label_that_everybody_brings_at_once_is_known_to_nobody_before() -> None:
    model = taught(1, KNOWN)
    count = model.statistics.examples // 16
    batch = [example(f"reader-{number}", 10**6, "brand new") for number in range(count)]
    assert np.isinf(model.observe({}, batch).next_rank).all()
    model.observe({}, batch)
    assert np.isfinite(model.observe({}, batch).next_rank).all()


def test_the_first_example_of_all_is_scored_by_a_model_that_knows_nothing() -> None:
    observed = new_model().observe(
        {}, [example("one", 0, "tea"), example("two", 1, "tea"), example("one", 2, "tea")]
    )
    assert observed.next_rank.tolist() == [np.inf, 1.0, 1.0]
    assert np.isnan(observed.next_top[0])
    assert np.isnan(observed.discovery_rank).all(), "who has no history discovers nothing, nor who comes back"
