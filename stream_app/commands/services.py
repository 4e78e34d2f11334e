"""`stream-app services`: the embedded Kafka and Redis in the foreground."""

# ruff: noqa: PLC0415  (what is slow to import waits until the verb runs)

from __future__ import annotations

import signal
import threading
from pathlib import Path

import click

from stream_app.commands.options import closing, configured
from stream_app.errors import StreamAppError

_LOOK_EVERY_S = 0.5
_LOG_TAIL_CHARS = 2000


def export_lines(kafka_address: str, redis_address: str) -> list[str]:
    """Say how a shell's next commands find the embedded services.

    Parameters
    ----------
    kafka_address, redis_address
        "host:port".

    Returns
    -------
    list of str
        `export` lines; the last is Redis's address, so that who has read it knows that all is up.
    """
    return [
        # The embedded broker keeps producers' timestamps whatever the topic says.
        "export STREAM_APP__WORKER__TRUST_CREATE_TIME=true",
        f"export STREAM_APP__KAFKA__BOOTSTRAP_SERVERS={kafka_address}",
        f"export STREAM_APP__REDIS__URL=redis://{redis_address}/0",
    ]


@click.command(
    epilog=closing(
        "stream-app services > services.env &      (then: . ./services.env)",
        "stream-app services --kafka-port 9092 --redis-port 6379",
    )
)
@click.option(
    "--kafka-port",
    type=click.IntRange(0, 65535),
    default=0,
    metavar="N",
    help="Port of Kafka (default: a free one).",
)
@click.option(
    "--redis-port",
    type=click.IntRange(0, 65535),
    default=0,
    metavar="N",
    help="Port of Redis (default: a free one).",
)
@configured
def services(kafka_port: int, redis_port: int, config: Path | None, segments: Path | None) -> None:
    """Run an embedded Kafka and Redis until Ctrl-C or SIGTERM.

    For trying things out and for tests: a Kafka-compatible broker (Tansu) and a Redis-compatible store
    (Valkey) that keep everything in memory, listen on 127.0.0.1 only, and are gone when this command ends.
    When both answer, it prints the export lines with which every other command finds them, and stays in the
    foreground. Needs the extra "embedded".
    """
    from stream_app.embedded import embedded_kafka, embedded_redis

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with embedded_kafka(kafka_port) as kafka, embedded_redis(redis_port) as redis:
        for line in export_lines(kafka.address, redis.address):
            click.echo(line)
        click.echo("Services are up; Ctrl-C ends them.", err=True)
        while not ended.wait(_LOOK_EVERY_S):
            for server in (kafka, redis):
                if not server.is_running:
                    raise StreamAppError(
                        "to run until Ctrl-C",
                        f"its end: {server.log[-_LOG_TAIL_CHARS:].strip()}",
                        f"{server.name} at {server.address}",
                        "Start the services again; what was in them is gone.",
                    )
