"""`stream-app topics`: create the topics that are missing, and say what is there."""

# ruff: noqa: PLC0415  (what is slow to import waits until the verb runs)

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stream_app.commands.options import (
    closing,
    configured,
    duration_text,
    json_output,
    print_json,
    print_table,
    read_settings,
)
from stream_app.errors import StreamAppError

if TYPE_CHECKING:
    from stream_app.adapters.checks import Finding
    from stream_app.settings import KafkaSettings, Settings


@click.command(epilog=closing("stream-app topics --partitions 8"))
@click.option(
    "--partitions",
    type=click.IntRange(1, 10_000),
    metavar="N",
    help="Partitions of each topic that is created (default 4); a topic that exists must have as many.",
)
@json_output
@configured
def topics(partitions: int | None, as_json: bool, config: Path | None, segments: Path | None) -> int:
    """Create the topics that are missing; say what exists.

    The four topics are named in app.toml: events in; segment-entered, segment-exited and dead letters out.
    Run it once before the first worker, and again whenever you want to know that all is well: nothing that
    exists is changed. What a topic must be like and is not is named, with what to do (exit code 1).

    The number of partitions bounds how many workers can share the work, and cannot be changed later without a
    rebuild.
    """
    settings = read_settings(config, segments)
    rows, findings = asyncio.run(_topics(settings, partitions))
    bad = [finding for finding in findings if finding.state == "bad"]
    if as_json:
        print_json({"topics": rows, "findings": [asdict(finding) for finding in findings]})
    else:
        print_table(
            ["topic", "state", "partitions", "timestamps", "keeps records", "largest batch"],
            [[cell if cell is not None else "not told" for cell in _shown(row)] for row in rows],
        )
    for finding in bad:
        click.echo(StreamAppError(finding.expected, finding.got, finding.name, finding.action), err=True)
    return 1 if bad else 0


async def _topics(
    settings: Settings, partitions: int | None
) -> tuple[list[dict[str, str | int | None]], list[Finding]]:
    from stream_app.adapters.checks import check_kafka
    from stream_app.adapters.kafka_admin import KafkaAdmin
    from stream_app.adapters.kafka_security import security_of
    from stream_app.adapters.topics import check_limits, check_partitions

    kafka = settings.kafka
    created = await create_missing_topics(kafka, partitions)
    async with KafkaAdmin(kafka.bootstrap_servers, security=security_of(kafka)) as admin:
        counts = await admin.partition_counts()
        configs = await admin.topic_configs(kafka.topics)
        findings, _ = await check_kafka(admin, settings)
    findings += check_limits(kafka, configs)
    if partitions is not None:
        findings += check_partitions(kafka, counts, partitions)
    rows: list[dict[str, str | int | None]] = [
        {
            "name": name,
            "state": "created" if name in created else "exists",
            "partitions": counts[name],
            "timestamp_type": configs[name].get("message.timestamp.type"),
            "retention_ms": _integer(configs[name].get("retention.ms")),
            "max_message_bytes": _integer(configs[name].get("max.message.bytes")),
        }
        for name in kafka.topics
    ]
    return rows, findings


async def create_missing_topics(kafka: KafkaSettings, partitions: int | None) -> list[str]:
    """Create what is missing of the four topics.

    Parameters
    ----------
    kafka
        Where, and their names.
    partitions
        How many each gets; None: as many as the events topic has, or the default.

    Returns
    -------
    list of str
        The names of those that were missing.
    """
    from stream_app.adapters.kafka_admin import KafkaAdmin
    from stream_app.adapters.kafka_security import security_of
    from stream_app.adapters.topics import DEFAULT_PARTITIONS, wanted_topics

    async with KafkaAdmin(kafka.bootstrap_servers, security=security_of(kafka)) as admin:
        before = await admin.partition_counts()
        wanted = wanted_topics(kafka, partitions or before.get(kafka.events_topic) or DEFAULT_PARTITIONS)
        return await admin.create_topics([spec for spec in wanted if spec.name not in before])


def _integer(text: str | None) -> int | None:
    return None if text is None else int(text)


def _shown(row: dict[str, str | int | None]) -> list[str | int | None]:
    retention, limit = row["retention_ms"], row["max_message_bytes"]
    return [
        row["name"],
        row["state"],
        row["partitions"],
        row["timestamp_type"],
        None if retention is None else "for ever" if int(retention) < 0 else duration_text(int(retention)),
        None if limit is None else f"{limit} bytes",
    ]
