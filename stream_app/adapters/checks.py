"""Look, before anything is written, whether this Redis and these topics are fit for the guarantees.

Decides what makes a start impossible. `stream-app worker` refuses with the first of these findings that is
not well; `stream-app doctor` shows all of them. Must not change anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import redis.asyncio as aioredis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from stream_app.adapters.kafka_admin import KafkaAdmin
from stream_app.errors import StartRefused
from stream_app.settings import Settings

__all__ = ["Finding", "KafkaFacts", "check_kafka", "check_redis", "refuse"]

UNLIMITED = -1
DEFAULT_SEGMENT_MS = 7 * 86_400_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at.

    Attributes
    ----------
    state : {"ok", "bad", "unchecked"}
        ``unchecked``: the service would not tell; a start needs ``--unchecked``.
    """

    name: str
    state: Literal["ok", "bad", "unchecked"]
    expected: str
    got: str
    action: str


@dataclass(frozen=True, slots=True)
class KafkaFacts:
    """What the worker needs to know of the broker.

    Attributes
    ----------
    retention_ms : int or None
        How long the events topic keeps records at most; ``None``: without limit, or not told.
    """

    cluster_id: str
    partitions: int
    retention_ms: int | None


def refuse(findings: Sequence[Finding], *, unchecked: bool) -> None:
    """Stop at the first finding that is not well.

    Raises
    ------
    StartRefused
        If any is bad, or could not be checked and `unchecked` is false.
    """
    for finding in findings:
        if finding.state == "bad" or (finding.state == "unchecked" and not unchecked):
            raise StartRefused(finding.expected, finding.got, finding.name, finding.action)


async def check_redis(client: aioredis.Redis, url: str) -> list[Finding]:
    """Look at eviction policy and role, from INFO, which managed services allow.

    Parameters
    ----------
    client : redis.asyncio.Redis
    url : str
        Its address without credentials, to name it.

    Raises
    ------
    StartRefused
        If Redis does not answer, or not to these credentials.
    """
    where = f"Redis at {url}"
    try:
        info: dict[str, Any] = await client.info("everything")
    except AuthenticationError as exc:
        raise StartRefused(
            "to be let in", str(exc), where, "Check the user and password of redis.url."
        ) from exc
    except NoPermissionError as exc:
        return [
            Finding(
                f"{where}, INFO", "unchecked", "leave to ask for INFO", str(exc),
                "Allow INFO in the ACL, or start with --unchecked after checking by hand that the eviction "
                "policy is noeviction and that this is no replica.",
            )
        ]  # fmt: skip
    except (RedisError, OSError) as exc:
        raise StartRefused(
            "an answer", f"{type(exc).__name__}: {exc}", where,
            "Check redis.url and that Redis is up; `stream-app services` starts one for trying things out.",
        ) from exc  # fmt: skip
    policy, role = info.get("maxmemory_policy"), info.get("role")
    return [
        Finding(
            f"{where}, eviction policy",
            "unchecked" if policy is None else "ok" if policy == "noeviction" else "bad",
            "maxmemory-policy noeviction, since an evicted profile is a lost history",
            str(policy),
            "Set maxmemory-policy to noeviction (if Redis does not tell, check by hand, then --unchecked).",
        ),
        Finding(
            f"{where}, role",
            "unchecked" if role is None else "ok" if role == "master" else "bad",
            "a master, since a replica takes no writes and lags behind",
            str(role),
            "Point redis.url at the master.",
        ),
    ]


async def check_kafka(admin: KafkaAdmin, settings: Settings) -> tuple[list[Finding], KafkaFacts]:
    """Look at the cluster and at the four topics.

    Raises
    ------
    StreamAppError
        If Kafka does not answer.
    """
    kafka = settings.kafka
    where = f"Kafka at {kafka.bootstrap_servers}"
    cluster = await admin.cluster()
    counts = await admin.partition_counts()
    findings = [
        Finding(
            f"{where}, topic {topic}", "ok" if topic in counts else "bad", "the topic to exist",
            f"{counts[topic]} partitions" if topic in counts else "no such topic",
            "Run `stream-app topics`, which creates what is missing.",
        )
        for topic in kafka.topics
    ]  # fmt: skip
    retention_ms: int | None = None
    if kafka.events_topic in counts:
        config = (await admin.topic_configs([kafka.events_topic])).get(kafka.events_topic, {})
        findings.append(_timestamp_type(where, kafka.events_topic, config, settings))
        if "retention.ms" in config and config.get("cleanup.policy", "delete") == "delete":
            retention = int(config["retention.ms"])
            # A segment is deleted as a whole, when its last record is old enough.
            segment_ms = int(config.get("segment.ms", DEFAULT_SEGMENT_MS))
            retention_ms = None if retention == UNLIMITED else retention + segment_ms
    if cluster.cluster_id is None:
        findings.append(
            Finding(
                f"{where}, cluster id", "bad", "a cluster id, to know whose offsets are stored", "none",
                "Use a broker that tells its cluster id (Apache Kafka 0.10.1 or later).",
            )
        )  # fmt: skip
    return findings, KafkaFacts(cluster.cluster_id or "", counts.get(kafka.events_topic, 0), retention_ms)


def _timestamp_type(where: str, topic: str, config: dict[str, str], settings: Settings) -> Finding:
    found = config.get("message.timestamp.type")
    fine = settings.worker.clock == "event" or settings.worker.trust_create_time or found == "LogAppendTime"
    return Finding(
        f"{where}, topic {topic}, timestamp type",
        "ok" if fine else "bad",
        "message.timestamp.type=LogAppendTime, since stream time must not follow producers' clocks",
        str(found or "not told"),
        "Let `stream-app topics` create the topic or alter it, or set worker.trust_create_time if all "
        "producers' clocks can be trusted.",
    )
