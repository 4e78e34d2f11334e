"""`stream-app doctor`: look at an environment and say what to do."""

# ruff: noqa: PLC0415  (what is slow to import waits until the verb runs)

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stream_app.commands.options import closing, configured, json_output, print_json, read_settings
from stream_app.errors import StreamAppError

if TYPE_CHECKING:
    from stream_app.adapters.checks import Finding
    from stream_app.settings import Settings

USERS_PER_PAGE = 1000
USERS_LOOKED_AT = 10_000
MARKS = {"ok": "ok       ", "bad": "BAD      ", "unchecked": "unchecked"}


@click.command(epilog=closing("stream-app doctor", "stream-app doctor --json"))
@json_output
@configured
def doctor(as_json: bool, config: Path | None, segments: Path | None) -> int:
    """Check configuration, Redis, Kafka and the stored state; say what to do.

    Everything that would stop a worker from starting is looked at, and what slows one down: lag, messages
    that wait in the outbox, users whose records lie where another partitioner has put them. Changes nothing.
    Exit code 1 if anything is bad.
    """
    settings = read_settings(config, segments)
    findings = asyncio.run(_examine(settings))
    if as_json:
        # Of what is well nothing is to be done: whoever prints actions must not be told to rebuild.
        shown = [replace(f, action="") if f.state == "ok" else f for f in findings]
        print_json({"findings": [asdict(finding) for finding in shown]})
    else:
        for finding in findings:
            click.echo(f"{MARKS[finding.state]}  {finding.name}: {finding.got}")
            if finding.state != "ok":
                click.echo(f"           expected {finding.expected}. {finding.action}")
    return 1 if any(finding.state == "bad" for finding in findings) else 0


async def _examine(settings: Settings) -> list[Finding]:
    from stream_app.adapters.checks import Finding, check_kafka, check_redis
    from stream_app.adapters.kafka_admin import KafkaAdmin
    from stream_app.adapters.kafka_security import security_of
    from stream_app.adapters.redis_client import connect
    from stream_app.adapters.topics import check_limits
    from stream_app.adapters.transport import check_faust_version
    from stream_app.settings import faust_environment_problems

    findings = [
        Finding("environment", "bad", "none of Faust's own variables", problem, "Unset the variable.")
        for problem in faust_environment_problems()
    ]
    try:
        check_faust_version()
        findings.append(Finding("Faust", "ok", "a version whose internals were read", "in range", ""))
    except StreamAppError as exc:
        findings.append(_failed("Faust", exc))
    redis_is_up = kafka_is_up = False
    client = connect(settings.redis.connection_url, cluster=settings.redis.cluster)
    try:
        try:
            findings += await check_redis(client, settings.redis.redacted_url)
            redis_is_up = True
        except StreamAppError as exc:
            findings.append(_failed("Redis", exc))
        try:
            security = security_of(settings.kafka)
            async with KafkaAdmin(settings.kafka.bootstrap_servers, security=security) as admin:
                found, facts = await check_kafka(admin, settings)
                findings += found
                findings += check_limits(settings.kafka, await admin.topic_configs(settings.kafka.topics))
                kafka_is_up = facts.partitions > 0
        except StreamAppError as exc:
            findings.append(_failed("Kafka", exc))
        if redis_is_up and kafka_is_up:
            findings += await _examine_partitions(settings, client, facts.partitions)
    finally:
        await client.aclose()
    return findings


async def _examine_partitions(settings: Settings, client: object, partitions: int) -> list[Finding]:
    from stream_app.adapters.checks import Finding
    from stream_app.adapters.kafka_security import security_of
    from stream_app.adapters.log_ends import LogProbe
    from stream_app.adapters.profile_store import ProfileStore
    from stream_app.core.partitioner import partition_of

    store = ProfileStore(client, "doctor")  # type: ignore[arg-type]
    probe = LogProbe(
        settings.kafka.bootstrap_servers,
        settings.kafka.events_topic,
        lambda: time.time_ns() // 1_000_000,
        security=security_of(settings.kafka),
    )
    findings = []
    await probe.start()
    try:
        ends = await probe.all_ends(partitions)
        watermarks = await store.watermarks(range(partitions))
        for partition, wm in watermarks.items():
            name, log = f"partition {partition}", ends[partition]
            if wm is None:
                got = f"never folded, {log.end - log.start} records wait for a worker"
                findings.append(Finding(name, "ok", "a worker", got, ""))
                continue
            inside = log.start <= wm.watermark <= log.end
            waiting = await store.outbox_length(partition)
            lag = log.end - wm.watermark
            got = (
                f"watermark {wm.watermark}, log {log.start} to {log.end}, lag {lag}, outbox entries {waiting}"
            )
            action = (
                "Run `stream-app rebuild`, or start the worker with --accept-gap; its refusal says which."
            )
            findings.append(
                Finding(name, "ok" if inside else "bad", "a watermark within the log", got, action)
            )
        misplaced = seen = 0
        async for page in store.scan_users(USERS_PER_PAGE):
            seen += len(page)
            misplaced += sum(partition_of(user.encode(), partitions) != partition for partition, user in page)
            if seen >= USERS_LOOKED_AT:
                break
        findings.append(
            Finding(
                "partitioner",
                "bad" if misplaced else "ok",
                "users where Kafka's default partitioner (murmur2 of the key) puts them",
                f"{misplaced} of {seen} users looked at are elsewhere",
                "Let all producers use murmur2 (librdkafka: partitioner=murmur2_random); look-ups of such "
                "users take a second round trip, and two producers that differ split a user.",
            )
        )
    except StreamAppError as exc:
        findings.append(_failed("stored state", exc))
    finally:
        await probe.stop()
    return findings


def _failed(name: str, exc: StreamAppError) -> Finding:
    from stream_app.adapters.checks import Finding

    return Finding(name, "bad", "an answer", str(exc).partition(" Operator action:")[0], exc.operator_action)
