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
from stream_app.adapters.publisher import MAX_BATCH_BYTES
from stream_app.settings import KafkaSettings

DEFAULT_PARTITIONS: Final = 4
#: Kafka's own default. Written down for the dead letters, as an administrator's lower default could not
#: hold them.
DEAD_LETTER_LIMIT_BYTES: Final = 1_048_588
#: A limit is for a batch of messages; one of the worker's, and what a batch has beside them.
NEEDED_BYTES: Final = MAX_BATCH_BYTES + 4096

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
        exited, dead letters.
    """
    return [
        TopicSpec(kafka.events_topic, partitions, {"message.timestamp.type": "LogAppendTime"}),
        TopicSpec(kafka.entered_topic, partitions),
        TopicSpec(kafka.exited_topic, partitions),
        TopicSpec(kafka.dead_letter_topic, partitions, {_LIMIT: str(DEAD_LETTER_LIMIT_BYTES)}),
    ]


def check_limits(kafka: KafkaSettings, configs: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Tell whether everything that the worker publishes fits into its topic.

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
        One per topic that the worker publishes to and that has a limit.
    """
    found = []
    for topic, needed in (
        (kafka.entered_topic, NEEDED_BYTES),
        (kafka.exited_topic, NEEDED_BYTES),
        (kafka.dead_letter_topic, NEEDED_BYTES),
    ):
        limit = configs.get(topic, {}).get(_LIMIT)
        if limit is None:
            continue
        found.append(
            Finding(
                f"topic {topic}, {_LIMIT}",
                "ok" if int(limit) >= needed else "bad",
                f"at least {needed}, since what cannot be published stops the worker",
                limit,
                f"Run kafka-configs.sh --alter --entity-type topics --entity-name {topic} "
                f"--add-config {_LIMIT}={needed}.",
            )
        )
    return found


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
