"""Servers that live and die with this program: a Kafka-compatible broker and a Redis-compatible store.

They let a newcomer run the whole service from PyPI alone, without Docker, JVM or a running service. Both keep
everything in memory and listen on the loopback address only. Nothing here knows the service: it starts
programs, waits until they answer, and ends them.

`servers` decides how a server is started and recognised, `guard` how it is ended whatever happens to us.
"""

from stream_app.embedded.servers import (
    EmbeddedServerError,
    Server,
    ServerProgram,
    embedded_kafka,
    embedded_redis,
    run_server,
)

__all__ = [
    "EmbeddedServerError",
    "Server",
    "ServerProgram",
    "embedded_kafka",
    "embedded_redis",
    "run_server",
]
