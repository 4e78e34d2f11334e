"""Counts: sums against dictionaries, sizes that must not matter, and documents that must be refused."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
import pytest

from stream_app.core.statistics import (
    ASSET_PERIODS,
    GAPS,
    HOURS,
    MAX_ASSET_PAIRS,
    MAX_EVENT_TYPES,
    MAX_LABELS,
    TABLES,
    Delta,
    Fading,
    Statistics,
    codes_of,
    gap_of,
)
from tests.learned import counts_of, held_by
from tests.model_streams import example, gap_bucket, history, new_model, random_examples

SEEDS = [1, 2, 3]
NAMED = ("label", "type", "asset")


def delta_of(counts: Counter[tuple[Any, ...]], examples: int, rng: random.Random) -> Delta:
    """Return counts as a delta: names in random order, some of them unused, and codes that repeat."""
    names: dict[str, list[str]] = {}
    for kind in NAMED:
        used = {key[1 + place] for key in counts for place, axis in enumerate(TABLES[key[0]]) if axis == kind}
        names[kind] = [*used, f"unused {kind}"]
        rng.shuffle(names[kind])
    tables: dict[str, tuple[list[int], list[int]]] = {}
    for (table, *key), count in counts.items():
        positions = [
            names[axis].index(value) if axis in NAMED else value
            for axis, value in zip(TABLES[table], key, strict=True)
        ]
        codes, amounts = tables.setdefault(table, ([], []))
        part = rng.randint(0, count - 1)
        for amount in (part, count - part):
            codes += codes_of(table, *positions).tolist()
            amounts.append(amount)
    arrays = {table: (np.array(codes), np.array(amounts)) for table, (codes, amounts) in tables.items()}
    return Delta(examples, names, arrays)


def random_counts(rng: random.Random, count: int = 60) -> Counter[tuple[Any, ...]]:
    axes: dict[str, Any] = {
        "label": lambda: f"label-{rng.randrange(12)}",
        "type": lambda: f"type-{rng.randrange(3)}",
        "asset": lambda: f"asset-{rng.randrange(9)}",
        "period": lambda: 5_000 + rng.randrange(40),
        "hour": lambda: rng.randrange(HOURS),
        "gap": lambda: rng.randrange(GAPS),
        "outcome": lambda: rng.randrange(2),
    }
    counts: Counter[tuple[Any, ...]] = Counter()
    for _ in range(count):
        table = rng.choice(list(TABLES))
        counts[(table, *(axes[axis]() for axis in TABLES[table]))] += rng.randint(1, 300)
    return counts


# Sums


@pytest.mark.parametrize("seed", SEEDS)
def test_merged_deltas_are_the_sum_of_dictionaries_in_any_order_and_grouping(seed: int) -> None:
    rng = random.Random(seed)
    parts = [random_counts(rng) for _ in range(5)]
    deltas = [delta_of(part, number, rng) for number, part in enumerate(parts)]
    expected: Counter[tuple[Any, ...]] = sum(parts, Counter()) + Counter({("examples",): 10})
    assert counts_of(Delta.merged(deltas)) == expected, seed
    assert counts_of(Delta.merged(deltas[::-1])) == expected
    left = Delta.merged([Delta.merged(deltas[:2]), deltas[2]])
    right = Delta.merged([deltas[3], Delta.merged([deltas[4], Delta()])])
    assert counts_of(Delta.merged([left, right])) == expected
    document = msgpack.unpackb(msgpack.packb(Delta.merged(deltas).as_document()))
    assert counts_of(Delta.from_document(document)) == expected
    assert document == Delta.from_document(document).as_document(), "the shortest form is a fixed point"


@pytest.mark.parametrize("seed", SEEDS)
def test_deltas_added_and_taken_away_in_turn_leave_the_sum_of_the_others(seed: int) -> None:
    rng = random.Random(seed)
    deltas = [delta_of(random_counts(rng), 3, rng) for _ in range(8)]
    # The newest period stays, so that the same periods are told apart.
    newest = Counter({("popularity", 5_050, "label-0"): 1, ("assets", 5_050, "asset-0", "label-0"): 1})
    deltas[0] = Delta.merged([deltas[0], delta_of(newest, 1, rng)])
    model = new_model()
    held: list[int] = [0]
    model.add(deltas[0])
    for _ in range(30):
        number = rng.randrange(1, 8)
        if number in held:
            held.remove(number)
            model.add(deltas[number], -1)
        else:
            held.append(number)
            model.add(deltas[number])
        expected = new_model()
        for other in held:
            expected.add(deltas[other])
        assert held_by(model) == held_by(expected), (seed, held)


@pytest.mark.parametrize("count", [1, 64, 65, 129, 1_000, MAX_LABELS])
def test_as_many_labels_as_there_may_be_are_added_at_once(count: int) -> None:
    labels = np.arange(count)
    ones = np.ones(count, np.int64)
    tables = {
        "first_times": (codes_of("first_times", labels), ones),
        "popularity": (codes_of("popularity", 5_000, labels), ones),
        "last": (codes_of("last", labels, labels[::-1]), ones),
    }
    delta = Delta(count, {"label": [f"label-{n}" for n in range(count)], "type": [], "asset": []}, tables)
    model = new_model()
    model.add(delta)
    expected: dict[tuple[Any, ...], int] = {
        ("examples",): count,
        **{("first_times", f"label-{n}"): 1 for n in range(count)},
        **{("popularity", f"label-{n}", 1 + 5_000 % 24): 1 for n in range(count)},
        **{("last", f"label-{n}", f"label-{count - 1 - n}"): 1 for n in range(count)},
    }
    assert held_by(model) == expected
    assert model.statistics.labels_dropped == 0


def test_many_labels_in_one_batch_are_counted() -> None:
    model = new_model()
    model.observe({}, [example(f"u{n}", n, "tea") for n in range(160)])
    batch = [example(f"v{n}", n, *(f"label-{64 * n + m}" for m in range(64))) for n in range(10)]
    model.observe({}, batch)
    assert len(model.statistics.labels) == 641
    assert model.take_delta().examples == 170


# Labels that leave


def one_of_each(labels: Sequence[str], count: int = 1) -> Delta:
    places = np.arange(len(labels))
    counts = np.full(len(labels), count)
    return Delta(
        len(labels),
        {"label": list(labels), "type": ["view"], "asset": []},
        {
            "popularity": (codes_of("popularity", 5_000, places), counts),
            "first_times": (places, counts),
            "hours": (codes_of("hours", 3, places), counts),
            "types": (codes_of("types", 0, places), counts),
        },
    )


@pytest.mark.parametrize("known", [1, 24, 256, 2_304, MAX_LABELS])
@pytest.mark.parametrize("new", [1, 2_048, MAX_LABELS])
def test_only_as_many_labels_leave_as_there_are_and_all_is_held_of_those_that_stay(
    known: int, new: int
) -> None:
    model = new_model()
    for weight, begin in enumerate(range(0, known, 700), 1):
        model.add(one_of_each([f"old-{n}" for n in range(begin, min(begin + 700, known))], weight))
    shapes = model.statistics.hours.shape[0], model.statistics.types.shape[0]
    examples = model.statistics.examples
    model.add(one_of_each([f"new-{n}" for n in range(new)]))
    statistics = model.statistics
    left = {f"old-{n}" for n in range(known)} - set(statistics.labels)
    assert len(statistics.labels) <= MAX_LABELS
    assert statistics.labels_dropped == len(left)
    assert (len(left) == 0) == (known + new <= MAX_LABELS)
    assert len(left) <= max(known + new - MAX_LABELS, MAX_LABELS // 8)
    weights = {f"old-{n}": 1 + n // 700 for n in range(known)}
    staying = [weights[label] for label in statistics.labels if label in weights]
    assert not left or not staying or max(weights[label] for label in left) <= min(staying), (
        "the rarest leave"
    )
    assert (statistics.hours.shape[0], statistics.types.shape[0]) == shapes == (HOURS, MAX_EVENT_TYPES)
    assert statistics.examples == examples + new
    held = held_by(model)
    for label, weight in weights.items():
        for key in (("first_times", label), ("hours", 3, label), ("types", "view", label)):
            assert held.get(key, 0) == (0 if label in left else weight)


@pytest.mark.parametrize("comes_back", [False, True])
def test_taking_away_what_has_left_meanwhile_leaves_nothing_negative(comes_back: bool) -> None:
    model = new_model()
    rare = Delta.merged([one_of_each(["rare"]), one_of_each(["rare"], 3)])
    model.add(rare)
    model.add(one_of_each([f"old-{n}" for n in range(MAX_LABELS - 1)], 9))
    model.add(one_of_each(["one too many"], 9))
    assert "rare" not in model.statistics.labels
    if comes_back:
        model.add(one_of_each(["rare"]))
    model.add(rare, -1)
    assert min(held_by(model).values()) > 0
    scored = model.score([history("u1", "old-1")])[0]
    assert all(0.0 <= share <= 1.0 for _, share in scored.next_categories)
    assert np.nanmin(model.growth_weights([history("u1", "old-1")])[1]) >= 0.0


def test_more_labels_than_there_may_be_come_one_after_the_other() -> None:
    model = new_model()
    model.observe({}, [example(f"fan-{n}", n, "tea", "milk") for n in range(400)])
    for n in range(0, 6_000, 600):
        model.observe(
            {},
            [
                example(f"u{n + m}", n + m, *(f"label-{n + m + k}" for k in range(20)))
                for m in range(0, 600, 20)
            ],
        )
    statistics = model.statistics
    assert len(statistics.labels) <= MAX_LABELS
    assert statistics.labels_dropped == 6_002 - len(statistics.labels)
    assert {"tea", "milk"} <= set(statistics.labels)
    assert statistics.nbytes < 300_000_000
    first = model.score([history("fan-1", "milk")])[0]
    assert all(math.isfinite(share) for _, share in first.next_categories)
    assert counts_of(model.take_delta())["first_times", "label-0"] == 1, (
        "what was counted is still on its way"
    )


def test_deltas_that_together_have_too_many_labels_lose_some_and_mix_up_none() -> None:
    places = np.arange(4_000)
    deltas = []
    for kind in ("a", "b"):
        names = [f"{kind}-{n}" for n in places.tolist()]
        tables = {
            "last": (codes_of("last", places, places), np.ones(4_000, np.int64)),
            "popularity": (codes_of("popularity", 5_000, places), np.ones(4_000, np.int64)),
        }
        deltas.append(Delta(1, {"label": names, "type": [], "asset": []}, tables))
    both = msgpack.unpackb(msgpack.packb(Delta.merged(deltas).as_document()))
    found = counts_of(Delta.from_document(both))
    expected = {**counts_of(deltas[0]), **counts_of(deltas[1])}
    assert found.items() <= {**expected, ("examples",): 2}.items()
    assert len({key[-1] for key in found}) >= 4_000


def test_a_hundred_thousand_assets_are_comfortable_and_more_are_bounded() -> None:
    statistics = Statistics()
    for begin in range(0, 400_000, 50_000):
        names = [f"asset-{n}" for n in range(begin, begin + 50_000)]
        places = np.arange(50_000)
        codes = codes_of("assets", 5_000 + begin // 100_000, places, places % 10)
        labels = [f"label-{n}" for n in range(10)]
        statistics.add(
            Delta(
                50_000,
                {"label": labels, "type": [], "asset": names},
                {"assets": (codes, np.ones(50_000, np.int64))},
            )
        )
        assert len(statistics.asset_rows) <= MAX_ASSET_PAIRS
        if begin == 50_000:
            assert len(statistics.asset_rows) == len(statistics.asset_ids) == 100_000
            assert statistics.assets.weights(100_000, 4.0).min() > 0.0
            assert statistics.assets.counts.nbytes < 100_000_000
    assert len(statistics.asset_ids) == len({pair >> 12 for pair in statistics.asset_rows}) <= MAX_ASSET_PAIRS
    assert sorted(statistics.asset_rows.values()) == list(range(len(statistics.asset_rows)))


def test_an_event_type_that_comes_often_is_counted_each_time_to_the_last_that_is_told_apart() -> None:
    statistics = Statistics()
    statistics.places_of("type", [f"type-{n}" for n in range(MAX_EVENT_TYPES - 1)])
    assert statistics.places_of("type", ["new", "new", "newer", "type-0", "new"]) == [255, 255, -1, 0, 255]


# Buckets and periods


def test_buckets_of_gaps_are_those_of_whole_numbers() -> None:
    ages = [-1, 0, *(base + near for base in (1 << n for n in range(1, 50)) for near in (-1, 0, 1))]
    ages += [3 << n for n in range(45)] + [(3 << n) - 1 for n in range(45)]
    assert gap_of(np.array(ages, np.float64)).tolist() == [gap_bucket(age) for age in ages]


@pytest.mark.parametrize("periods", [1, 2, 7, ASSET_PERIODS])
@pytest.mark.parametrize("seed", SEEDS)
def test_fading_counts_are_what_a_dictionary_of_periods_says(seed: int, periods: int) -> None:
    rng = random.Random(seed)
    fading = Fading(periods)
    counts: Counter[tuple[int, int]] = Counter()
    begin = 0
    for _ in range(40):
        begin += rng.choice([0, 0, 1, 3, 40])
        added = [(max(0, begin - rng.randrange(9)), rng.randrange(70), rng.randint(1, 5)) for _ in range(8)]
        if rng.random() < 0.3 and counts:
            added = [(*key, -amount) for key, amount in rng.sample(sorted(counts.items()), 1)]
        fading.add(*np.array(added).T)
        for period, row, amount in added:
            counts[period, row] += amount
        counts = +counts
        newest = fading.newest
        assert newest >= max((period for period, _ in counts), default=0)
        for old in (None, 0.0):
            expected = np.zeros(70)
            for (period, row), amount in counts.items():
                age = newest - period
                if age < periods:
                    expected[row] += amount * 0.5 ** (age / 3.0)
                else:
                    expected[row] += amount * (0.5 ** (periods / 3.0) if old is None else old)
            np.testing.assert_allclose(fading.weights(70, 3.0, old), expected, rtol=1e-12, atol=1e-12)
        totals = [sum(amount for (_, of), amount in counts.items() if of == row) for row in range(70)]
        assert fading.totals(70).tolist() == totals


# Documents


def valid_document(seed: int = 1) -> dict[str, Any]:
    model = new_model()
    model.observe({}, random_examples(seed, 60))
    document: dict[str, Any] = msgpack.unpackb(msgpack.packb(model.take_delta().as_document()))
    return document


@pytest.mark.parametrize("count", [1 << 31, (1 << 31) + 5, 1 << 40, (1 << 53) - 1])
@pytest.mark.parametrize("table", sorted(TABLES))
def test_a_count_that_is_too_large_does_no_harm(table: str, count: int) -> None:
    document = valid_document()
    columns = document["tables"][table]
    size = len(np.frombuffer(columns[-1][1], columns[-1][0]))
    columns[-1] = ["<i8", np.full(size, count).tobytes()]
    try:
        delta = Delta.from_document(document)
    except ValueError:
        return
    model = new_model()
    for _ in range(3):
        model.add(delta)
    scored = model.score([history("u1", "label-1"), history("u2")])
    weights = [share for one in scored for _, share in one.next_categories]
    weights += [number for one in scored for tip in one.recommendations for number in tip[3:]]
    assert weights
    assert all(map(math.isfinite, weights))
    assert min(held_by(model).values()) > 0


@pytest.mark.parametrize("examples", [-1, 1.0, True, None, "1", 1 << 70])
def test_a_number_of_examples_that_cannot_be_is_refused(examples: object) -> None:
    with pytest.raises(ValueError, match="not counts: "):
        Delta.from_document(valid_document() | {"examples": examples})


JUNK: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    7,
    1 << 40,
    1 << 63,
    1 << 70,
    -(1 << 40),
    0.5,
    math.nan,
    math.inf,
    "",
]
JUNK += [
    "label",
    "x" * 129,
    b"",
    b"\xff" * 8,
    b"\xff" * 7,
    [],
    [[]],
    {},
    {"a": 1},
    ["<i8", b""],
    ["<u1", b"\xff"],
]
JUNK += [["<f8", b"\0" * 8], ["<u1", "text"], ["<u2", b"\1"]]


def paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else []
    for key, child in children:
        found += paths(child, (*path, key))
    return found


def mutated(document: Any, rng: random.Random) -> Any:
    """Return a copy of which one place is replaced, left out, doubled, or has some of its bytes changed."""
    copied = msgpack.unpackb(msgpack.packb(document))
    path = rng.choice(paths(copied)[1:])
    node = copied
    for key in path[:-1]:
        node = node[key]
    key, old = path[-1], node[path[-1]]
    change = rng.randrange(4)
    if change == 0 and isinstance(old, bytes) and old:
        blob = bytearray(old)
        blob[rng.randrange(len(blob))] = rng.randrange(256)
        node[key] = bytes(blob)
    elif change == 1:
        del node[key]
    elif change == 2 and isinstance(node, list):
        node.append(old)
    elif change == 3 and isinstance(node, dict):
        node[rng.choice(["v", "label", "first_times", "new"])] = old
    else:
        node[key] = rng.choice(JUNK)
    return copied


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_document_is_refused_or_can_be_added_without_harm(seed: int) -> None:
    rng = random.Random(f"damage {seed}")
    document = valid_document(seed)
    expected = counts_of(Delta.from_document(document))
    refused = 0
    for number in range(400):
        damaged = mutated(document, rng)
        try:
            delta = Delta.from_document(damaged)
        except ValueError as exc:
            if not str(exc).startswith("not counts: "):
                raise
            refused += 1
            continue
        written = msgpack.unpackb(msgpack.packb(delta.as_document()))
        read = counts_of(Delta.from_document(written))
        assert read == counts_of(delta), (seed, number)
        if damaged == document:
            assert read == expected
        if number % 10 == 0:
            model = new_model()
            model.add(delta)
            shares = [share for _, share in model.score([history("u1", "label-1")])[0].next_categories]
            assert all(0.0 <= share <= 1.0 for share in shares), (seed, number)
    assert refused > 100
