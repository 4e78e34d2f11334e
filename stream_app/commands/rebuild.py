"""`stream-app rebuild`: forget what Redis holds, so that the log is folded again."""

# ruff: noqa: PLC0415  (what is slow to import waits until the verb runs)

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stream_app.commands.options import closing, configured, duration_text, read_settings
from stream_app.commands.progress import bar, lines
from stream_app.errors import StartRefused

if TYPE_CHECKING:
    from stream_app.settings import Settings

PATIENCE_S = 3.0
LOOK_EVERY_S = 0.5


@click.command(epilog=closing("stream-app rebuild", "stream-app rebuild --yes", "stream-app rebuild --model"))
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--model", is_flag=True, help="Forget only what the next-category model has learned; it begins afresh."
)
@configured
def rebuild(yes: bool, model: bool, config: Path | None, segments: Path | None) -> int:
    """Forget this service's Redis keys; the next worker folds the log from its beginning.

    Needed after a change of half-lives, action weights or floor, which are part of what is stored. What the
    log no longer holds is gone for good, so it is said first what it still holds. What is published for the
    second time says `"replayed": true`.

    Refuses while the group has members, after waiting as long as a killed worker counts as one: stop the
    workers first. Broken off, it is run again; until it is through, workers refuse to start.

    With --model, only what the next-category model has learned is forgotten, for instance a checkpoint that
    this version cannot read. Profiles and segments stay as they are, and nothing is folded again.
    """
    settings = read_settings(config, segments)
    partitions, held = asyncio.run(_survey(settings))
    if model:
        if not yes:
            question = f"Delete what the model has learned in {settings.redis.redacted_url}?"
            click.confirm(question, abort=True, err=True)
        forgotten = asyncio.run(_forget_model(settings, partitions))
        click.echo(
            f"Forgotten in {forgotten} partitions; the next worker learns from its watermark on.", err=True
        )
        return 0
    click.echo(held, err=True)
    if not yes:
        click.confirm(f"Delete all keys sa:* in {settings.redis.redacted_url}?", abort=True, err=True)
    deleted = asyncio.run(_forget(settings, partitions))
    click.echo(f"{deleted} keys deleted. Start a worker to fold the log again.", err=True)
    return 0


async def _survey(settings: Settings) -> tuple[int, str]:
    from stream_app.adapters.kafka_admin import KafkaAdmin
    from stream_app.adapters.kafka_security import security_of
    from stream_app.adapters.log_ends import LogProbe

    kafka = settings.kafka
    security = security_of(kafka)
    async with KafkaAdmin(kafka.bootstrap_servers, security=security) as admin:
        # A worker that was killed counts as a member until its session has timed out.
        deadline_s = time.monotonic() + kafka.session_timeout_s + PATIENCE_S
        while members := await admin.group_member_count(kafka.group_id):
            if time.monotonic() > deadline_s:
                raise StartRefused(
                    "no members in the group while its state is deleted",
                    str(members),
                    f"group {kafka.group_id}",
                    "Stop the workers first.",
                )
            await asyncio.sleep(LOOK_EVERY_S)
        partitions = await admin.partition_count(kafka.events_topic)
        config = (await admin.topic_configs([kafka.events_topic])).get(kafka.events_topic, {})
    probe = LogProbe(
        kafka.bootstrap_servers, kafka.events_topic, lambda: time.time_ns() // 1_000_000, security=security
    )
    await probe.start()
    try:
        ends = await probe.all_ends(partitions)
    finally:
        await probe.stop()
    records = sum(e.end - e.start for e in ends.values())
    gone = sum(e.start for e in ends.values())
    retention_ms = int(config.get("retention.ms", -1))
    kept = "without limit" if retention_ms < 0 else f"for {duration_text(retention_ms)}"
    held = f"The log holds up to {records} records in {partitions} partitions and keeps them {kept}"
    return partitions, f"{held}; {gone} are gone."


async def _forget_model(settings: Settings, partitions: int) -> int:
    from stream_app.adapters.rebuild import forget_model
    from stream_app.adapters.redis_client import connect

    client = connect(settings.redis.connection_url, cluster=settings.redis.cluster)
    try:
        return await forget_model(client, partitions)
    finally:
        await client.aclose()


async def _forget(settings: Settings, partitions: int) -> int:
    from stream_app.adapters.rebuild import forget_everything
    from stream_app.adapters.redis_client import connect

    client = connect(settings.redis.connection_url, cluster=settings.redis.cluster)
    shown = bar if click.get_text_stream("stderr").isatty() else lines
    try:
        with shown("rebuild", unit="keys") as move:
            return await forget_everything(
                client, partitions, lambda done, total: move(done / total if total else None, done)
            )
    finally:
        await client.aclose()
