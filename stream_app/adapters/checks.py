"""Look, before anything is written, whether this Redis and these topics are fit for the guarantees.

Decides what makes a start impossible. `stream-app worker` refuses with the first of these findings that is
not well; `stream-app doctor` shows all of them. Must not change anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from redis.exceptions import NoPermissionError, RedisError

from stream_app.adapters.kafka_admin import KafkaAdmin
from stream_app.adapters.redis_client import Client, Cluster, info_of_nodes
from stream_app.adapters.redis_security import refusal
from stream_app.core.decay import NEVER_MS
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


async def check_redis(client: Client, url: str) -> list[Finding]:
    """Look at eviction policy, role and kind, from INFO, which managed services allow; at every node.

    Parameters
    ----------
    client : redis.asyncio.Redis or Cluster
    url : str
        Its address without credentials, to name it.

    Raises
    ------
    StartRefused
        If Redis does not answer, or not to these credentials.
    """
    where = f"Redis at {url}"
    in_cluster = isinstance(client, Cluster)
    try:
        infos = await info_of_nodes(client)
    except (RedisError, OSError) as exc:
        # The nodes of a Cluster cannot even be found without some rights.
        if isinstance(exc, NoPermissionError) and (not in_cluster or "'info'" in str(exc)):
            return [
                Finding(
                    f"{where}, INFO", "unchecked", "leave to ask for INFO", str(exc),
                    "Allow INFO in the ACL, or start with --unchecked after checking by hand that the "
                    "eviction policy is noeviction and that this is no replica.",
                )
            ]  # fmt: skip
        raise refusal(exc, where) or StartRefused(
            "an answer", f"{type(exc).__name__}: {exc}", where,
            "Check redis.url and that Redis is up, and whether that port wants TLS (rediss://); `stream-app "
            "services` starts one for trying things out.",
        ) from exc  # fmt: skip
    return [
        finding
        for node, info in infos.items()
        for finding in _findings(f"{where}, node {node}" if node else where, info, in_cluster=in_cluster)
    ]


def _findings(where: str, info: dict[str, Any], *, in_cluster: bool) -> list[Finding]:
    policy, role = info.get("maxmemory_policy"), info.get("role")
    findings = [
        Finding(
            f"{where}, eviction policy",
            "unchecked" if policy is None else "ok" if policy == "noeviction" else "bad",
            "maxmemory-policy noeviction, since an evicted profile is a lost history",
            str(policy),
            "Set maxmemory-policy to noeviction (if Redis does not tell, check by hand, then --unchecked).",
        )
    ]
    if in_cluster:  # whose nodes change roles by themselves: a replica has to be as fit as its master
        return findings
    findings.append(
        Finding(
            f"{where}, role",
            "unchecked" if role is None else "ok" if role == "master" else "bad",
            "a master, since a replica takes no writes and lags behind",
            str(role),
            "Point redis.url at the master.",
        )
    )
    if info.get("cluster_enabled"):
        findings.append(
            Finding(
                f"{where}, kind", "bad", "one server, as redis.cluster is false", "a node of a Redis Cluster",
                "Set redis.cluster to true.",
            )
        )  # fmt: skip
    return findings


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
            f"{counts[topic]} partitions" if topic in counts else "no such topic, or not for this user",
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
            kept_ms = retention + segment_ms
            retention_ms = None if retention == UNLIMITED or kept_ms >= NEVER_MS else kept_ms
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
