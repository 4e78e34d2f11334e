"""What the topics have to be like, judged without a broker."""

from __future__ import annotations

import pytest

from stream_app.adapters.topics import NEEDED_BYTES, check_limits, check_partitions, wanted_topics
from stream_app.settings import KafkaSettings

KAFKA = KafkaSettings()


def test_events_are_stamped_by_the_broker() -> None:
    events, *others = wanted_topics(KAFKA, 3)
    assert events.name == "events"
    assert events.config["message.timestamp.type"] == "LogAppendTime"
    assert [spec.name for spec in others] == ["segment-entered", "segment-exited", "events-dead-letter"]
    assert {spec.partitions for spec in [events, *others]} == {3}


def test_the_topics_as_created_hold_all_that_is_published() -> None:
    configs = {spec.name: spec.config for spec in wanted_topics(KAFKA, 3)}
    assert {finding.state for finding in check_limits(KAFKA, configs)} == {"ok"}


@pytest.mark.parametrize(
    ("topic", "needed"),
    [
        ("events-dead-letter", NEEDED_BYTES),
        ("segment-entered", NEEDED_BYTES),
        ("segment-exited", NEEDED_BYTES),
    ],
)
def test_a_limit_below_what_is_published_is_named_with_what_to_do(topic: str, needed: int) -> None:
    (enough,) = check_limits(KAFKA, {topic: {"max.message.bytes": str(needed)}})
    (low,) = check_limits(KAFKA, {topic: {"max.message.bytes": str(needed - 1)}})
    assert (enough.state, low.state) == ("ok", "bad")
    assert f"--entity-name {topic} --add-config max.message.bytes={needed}" in low.action


def test_a_limit_that_is_not_told_is_none() -> None:
    assert check_limits(KAFKA, {"events-dead-letter": {}}) == []


def test_another_number_of_partitions_is_named_with_both_numbers() -> None:
    findings = check_partitions(KAFKA, {"events": 4, "segment-entered": 8}, 8)
    assert [(f.name, f.state, f.expected[0], f.got) for f in findings] == [
        ("topic events, partitions", "bad", "8", "4"),
        ("topic segment-entered, partitions", "ok", "8", "8"),
    ]
