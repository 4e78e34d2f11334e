"""What the four topics of this service have to be like: the content of `stream-app topics`.

Decides how a missing topic is created and when an existing one cannot carry the guarantees. It asks nobody;
what Kafka says is passed in. The timestamp type of the events topic is judged in
`stream_app.adapters.checks`, because a worker refuses to start over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from stream_app.adapters.checks import Finding
from stream_app.adapters.kafka_admin import TopicSpec
from stream_app.settings import KafkaSettings

DEFAULT_PARTITIONS: Final = 4
#: Kafka's own default, written down so that the limit of the dead letters can be told from it.
EVENTS_MAX_MESSAGE_BYTES: Final = 1_048_588
#: What a dead letter can be larger than its record by: seven headers, one of them the topic's name (at most
#: 249 characters), and what Kafka adds.
DEAD_LETTER_HEADERS_BYTES: Final = 2048

_LIMIT = "max.message.bytes"


def wanted_topics(kafka: KafkaSettings, partitions: int) -> list[TopicSpec]:
    """Describe the four topics as they are created.

    Parameters
    ----------
    kafka
        Their names.
    partitions
        How many each gets; the same for all, so that a user has one partition number everywhere.

    Returns
    -------
    list of TopicSpec
        Events (stamped by the broker, so that stream time does not follow producers' clocks), entered,
        exited, dead letters (with room for a record of the events topic and the headers that say what is
        wrong with it).
    """
    return [
        TopicSpec(
            kafka.events_topic,
            partitions,
            {"message.timestamp.type": "LogAppendTime", _LIMIT: str(EVENTS_MAX_MESSAGE_BYTES)},
        ),
        TopicSpec(kafka.entered_topic, partitions),
        TopicSpec(kafka.exited_topic, partitions),
        TopicSpec(
            kafka.dead_letter_topic,
            partitions,
            {_LIMIT: str(EVENTS_MAX_MESSAGE_BYTES + DEAD_LETTER_HEADERS_BYTES)},
        ),
    ]


def check_limits(kafka: KafkaSettings, configs: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Tell whether every record of the events topic could be published as a dead letter.

    A dead letter carries its record's key whole, and a key may fill a record; so the limit that counts is the
    events topic's, not the size of a valid event.

    Parameters
    ----------
    kafka
        The topics' names.
    configs
        By topic, then by setting, as Kafka tells them. A limit that is not told is none (the embedded
        broker has none).

    Returns
    -------
    list of Finding
        One, or none where there is no limit to compare.
    """
    events = configs.get(kafka.events_topic, {}).get(_LIMIT)
    dead_letters = configs.get(kafka.dead_letter_topic, {}).get(_LIMIT)
    if events is None or dead_letters is None:
        return []
    needed = int(events) + DEAD_LETTER_HEADERS_BYTES
    return [
        Finding(
            f"topic {kafka.dead_letter_topic}, {_LIMIT}",
            "ok" if int(dead_letters) >= needed else "bad",
            f"at least {needed} (the limit of {kafka.events_topic} and {DEAD_LETTER_HEADERS_BYTES} for "
            "headers), since a dead letter that cannot be published stops the worker",
            dead_letters,
            f"kafka-configs.sh --alter --entity-type topics --entity-name {kafka.dead_letter_topic} "
            f"--add-config {_LIMIT}={needed}",
        )
    ]


def check_partitions(kafka: KafkaSettings, counts: Mapping[str, int], partitions: int) -> list[Finding]:
    """Tell which topics have another number of partitions than was asked for.

    Parameters
    ----------
    kafka
        The topics' names.
    counts
        By topic; one that does not exist is absent.
    partitions
        The number asked for.

    Returns
    -------
    list of Finding
        One per topic that exists.
    """
    return [
        Finding(
            f"topic {topic}, partitions",
            "ok" if counts[topic] == partitions else "bad",
            f"{partitions}, as asked for",
            str(counts[topic]),
            "Ask for the number there is. To change it, create the topic anew and `stream-app rebuild`, as "
            "users would change partitions.",
        )
        for topic in kafka.topics
        if topic in counts
    ]
