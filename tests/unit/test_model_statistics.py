"""Counts: what is counted, that it adds up exactly, and what is refused."""

import copy
from collections import Counter
from typing import Any

import msgpack
import numpy as np
import pytest

from stream_app.core import statistics
from stream_app.core.model import Delta, Example, NextCategoryModel
from stream_app.core.statistics import Fading, Statistics, codes_of, gap_of
from tests.unit.model_logs import HALF_LIFE_MS, START_MS, counts, observe_all, random_examples


def counted(examples: list[Example], slice_size: int = 50) -> Delta:
    model = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    observe_all(model, examples, slice_size=slice_size)
    return model.take_delta()


def slow_counts(examples: list[Example]) -> dict[str, Counter[tuple[object, ...]]]:
    """Count by the book, one example and one pair at a time."""
    found: dict[str, Counter[tuple[object, ...]]] = {table: Counter() for table in statistics.TABLES}
    seen: dict[str, dict[str, int]] = {}
    for example in examples:
        if example.fresh:
            seen[example.user_id] = {}
        known = seen.setdefault(example.user_id, {})
        latest = list(known)[::-1]
        at_ms = example.event_time_ms
        for label, seen_ms in known.items():
            gap = int(gap_of(np.array([float(at_ms - seen_ms)]))[0])
            found["gaps"][gap, 0] += 1
            found["gaps"][gap, 1] += label in example.labels
        for number, label in enumerate(example.labels):
            found["popularity"][at_ms // statistics.PERIOD_MS, label] += 1
            found["hours"][at_ms // 3_600_000 % 24, label] += 1
            found["types"][example.event_type, label] += 1
            if example.asset_id is not None:
                found["assets"][at_ms // statistics.PERIOD_MS, example.asset_id, label] += 1
            found["last"].update((one, label) for one in latest[:1])
            found["latest"].update((one, label) for one in latest[:3])
            if label not in known:
                found["first_times"][(label,)] += 1
                earlier = [one for one in example.labels[:number] if one not in known]
                found["before"].update((one, label) for one in (*known, *earlier))
        for label in example.labels:
            known[label] = max(known.pop(label, at_ms), at_ms)
    return {table: +counter for table, counter in found.items()}


@pytest.mark.parametrize("slice_size", [1, 7, 50, 1_000])
def test_counts_are_what_the_plain_definition_says_however_the_log_is_cut(slice_size: int) -> None:
    examples = random_examples(1, 700)
    assert counts(counted(examples, slice_size)) == slow_counts(examples)


def test_counts_of_two_halves_of_the_users_add_up_to_those_of_all() -> None:
    examples = random_examples(2, 900)
    halves = [[one for one in examples if (one.user_id < "user-14") is first] for first in (True, False)]
    assert all(halves)
    both = Delta.merged(
        [counted(half, slice_size) for half, slice_size in zip(halves, (13, 50), strict=True)]
    )
    assert counts(both) == counts(counted(examples))
    assert both.examples == 900


def test_a_model_that_is_given_the_counts_of_others_has_the_same_statistics_in_any_order() -> None:
    examples = random_examples(3, 600)
    deltas = [counted([one for one in examples if one.user_id.endswith(end)]) for end in "0123456789"]
    forth, back = Statistics(), Statistics()
    for delta in deltas:
        forth.add(delta)
    for delta in reversed(deltas):
        back.add(delta)
    assert forth.examples == back.examples == 600
    order = [back.label_places[label] for label in forth.labels]
    size = len(order)
    assert np.array_equal(forth.before[:size, :size], back.before[np.ix_(order, order)])
    assert np.array_equal(forth.popularity.totals(size), back.popularity.totals(size)[order])
    assert np.array_equal(forth.popularity.weights(size, 4.0), back.popularity.weights(size, 4.0)[order])
    assert np.array_equal(forth.gaps, back.gaps)


def test_what_was_added_can_be_taken_away_again() -> None:
    kept, gone = counted(random_examples(4, 300)), counted(random_examples(5, 300))
    alone, mixed = Statistics(), Statistics()
    alone.add(kept)
    mixed.add(kept)
    mixed.add(gone)
    mixed.add(gone, -1)
    size = len(alone.labels)
    assert mixed.examples == alone.examples
    assert np.array_equal(mixed.last[:size, :size], alone.last[:size, :size])
    assert np.array_equal(mixed.popularity.totals(size), alone.popularity.totals(size))
    assert int(mixed.popularity.totals(len(mixed.labels))[size:].sum()) == 0


def test_a_delta_holds_what_came_since_the_last_one() -> None:
    examples = random_examples(6, 400)
    model = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    parts = []
    for number, _ in enumerate(observe_all(model, examples)):
        parts.append(model.take_delta())
        assert model.take_delta().examples == 0, number
    # All were taken after the last slice: what is pending is one delta or none.
    assert counts(Delta.merged(parts)) == counts(counted(examples))


def test_counts_survive_msgpack() -> None:
    delta = counted(random_examples(7, 300))
    document = msgpack.unpackb(msgpack.packb(delta.as_document()))
    restored = Delta.from_document(document)
    assert counts(restored) == counts(delta)
    assert restored.as_document() == delta.as_document()


def test_an_empty_delta_is_one() -> None:
    empty = Statistics().take_delta()
    assert Delta.from_document(empty.as_document()).examples == 0
    assert Delta.merged([]).as_document() == empty.as_document()


def broken(change: Any) -> Any:
    document = copy.deepcopy(counted(random_examples(8, 60)).as_document())
    change(document)
    return document


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(v=9), "v = 9"),
        (lambda d: d.update(examples=-1), "number of examples"),
        (lambda d: d.update(examples=1.5), "number of examples"),
        (lambda d: d.pop("names"), "names"),
        (lambda d: d["names"].update(label=["a", "a"]), "distinct names"),
        (lambda d: d["names"]["label"].__setitem__(0, "x" * 65), "1 to 64 characters"),
        (lambda d: d["names"]["label"].__setitem__(0, 7), "1 to 64 characters"),
        (lambda d: d["names"]["label"].pop(), "axis label"),
        (lambda d: d["tables"].update(other=[]), "'other'"),
        (lambda d: d["tables"]["last"].pop(), "'last'"),
        (lambda d: d["tables"]["last"].__setitem__(0, ["<f8", b"\0" * 8]), "type of integers"),
        (lambda d: d["tables"]["last"].__setitem__(0, ["<u1", "text"]), "type of integers"),
        (lambda d: d["tables"]["last"].__setitem__(0, ["<u2", b"\0"]), "not counts"),
        (lambda d: d["tables"]["last"].__setitem__(0, ["<u1", b"\0"]), "values on axis label"),
        (lambda d: d["tables"]["hours"].__setitem__(0, ["<u1", b"\x18" * 999]), "axis hour"),
        (lambda d: d["tables"].update(first_times=[["<u1", b"\0"], ["<u1", b"\0"]]), "axis count"),
        (lambda d: d["tables"].update(first_times=[["<i8", b"\xff" * 8], ["<u1", b"\1"]]), "axis label"),
        (lambda d: d.update(tables=None), "not counts"),
    ],
)
def test_counts_that_are_anything_else_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match="not counts") as refused:
        Delta.from_document(broken(change))
    assert message in str(refused.value)


@pytest.mark.parametrize("document", [None, 7, b"", [], {}, {"v": 1}, {"v": 1, "examples": 1, "names": []}])
def test_what_is_no_map_of_counts_is_refused(document: object) -> None:
    with pytest.raises(ValueError, match="not counts"):
        Delta.from_document(document)


def test_fading_counts_do_not_depend_on_the_order_of_adding() -> None:
    rng = np.random.default_rng(9)
    periods, rows, times = rng.integers(0, 60, 500), rng.integers(0, 9, 500), rng.integers(1, 4, 500)
    forth, back = Fading(8), Fading(8)
    forth.add(periods, rows, times)
    for number in rng.permutation(500):
        one = slice(number, number + 1)
        back.add(periods[one], rows[one], times[one])
    assert np.array_equal(forth.weights(9, 2.0), back.weights(9, 2.0))
    assert forth.totals(9).tolist() == np.bincount(rows, times, 9).astype(int).tolist()


def test_the_rarest_labels_leave_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MAX_LABELS", 64)
    model = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    often = [Example("u", "view", START_MS, (f"often-{n % 40}",), f"asset-{n % 40}") for n in range(120)]
    model.observe({}, often)
    rare = [Example("v", "view", START_MS, (f"rare-{n}",), None) for n in range(24)]
    model.observe({}, rare)
    assert model.statistics.labels_dropped == 0
    model.observe({}, [Example("w", "view", START_MS, ("one-more",), None)])
    labels = model.statistics.labels
    assert model.statistics.labels_dropped == 8
    assert labels == [f"often-{n}" for n in range(40)] + [f"rare-{n}" for n in range(16)] + ["one-more"]
    assert model.statistics.popularity.totals(len(labels)).tolist() == [3] * 40 + [1] * 17
    assert model.statistics.last[1, 2] == 3
    # What was counted before is still there, under its own names.
    assert counts(model.take_delta())["first_times"][("rare-23",)] == 1
    assert model.score([]) == []


def test_more_new_labels_than_there_is_room_for_are_not_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MAX_LABELS", 16)
    model = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    model.observe({}, [Example("u", "view", START_MS, tuple(f"label-{n}" for n in range(40)), None)])
    assert len(model.statistics.labels) == 16
    model.observe({}, [Example("u", "view", START_MS, tuple(f"other-{n}" for n in range(40)), None)])
    assert len(model.statistics.labels) == 16
    # All sixteen made room, and no more than there were are said to have left.
    assert model.statistics.labels_dropped == 16


def test_too_many_assets_leave_each_label_its_most_popular_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MAX_ASSET_PAIRS", 30)
    monkeypatch.setattr(statistics, "KEPT_ASSETS", 5)
    kept = Statistics()
    kept.place_labels(["tea", "milk"])
    names = [f"asset-{number}" for number in range(31)]
    places = np.array(kept.places_of("asset", names))
    period = np.full(31, 100)
    kept.count(1, {"assets": (codes_of("assets", period, places, np.arange(31) % 2), 1 + np.arange(31))})
    assert sorted(kept.asset_ids) == sorted(names[-10:])
    assert len(kept.asset_rows) == 10


def test_event_types_beyond_the_cap_are_not_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MAX_EVENT_TYPES", 2)
    model = NextCategoryModel(half_life_ms=HALF_LIFE_MS)
    model.observe({}, [Example("u", f"type-{n}", START_MS, ("tea",), None) for n in range(4)])
    assert model.statistics.event_types == ["type-0", "type-1"]
    assert int(model.statistics.types.sum()) == 2


def test_gap_buckets_grow_with_the_gap_and_end() -> None:
    gaps = gap_of(np.array([0.0, 1.0, 1.4, 1.5, 2.0, 60_000.0, 3.15e10, 1e15, 1e300]))
    assert gaps.tolist() == sorted(gaps.tolist())
    assert gaps[-1] == statistics.GAPS - 1
