"""What the rows of the fault table share: one log, and servers behind proxies."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from stream_app.embedded import Server
from stream_app.embedded.servers import free_port
from tests.backends import Kind, Names, local_kafka, local_redis
from tests.faults.proxy import Proxy
from tests.faults.stage import FaultStage
from tests.integration.stage import event_clock_case
from tests.processes import Programs

PATIENCE_S = 900


@dataclass(frozen=True, slots=True)
class Proxied:
    """A server of this test's own and the proxy that stands before it; clients use the proxy's address."""

    server: Server
    proxy: Proxy


def only_apache(kafka_kind: Kind, why: str) -> None:
    """Skip elsewhere, after the row has begun: the table shows why."""
    if kafka_kind != "apache":
        pytest.skip(f"only on Apache Kafka: {why}")


@pytest.fixture
def proxied_redis(redis_kind: Kind) -> Iterator[Proxied]:
    """A store of this test's own behind a fault proxy."""
    with local_redis(redis_kind) as server, Proxy(server.port) as proxy:
        yield Proxied(server, proxy)


@pytest.fixture
def proxied_kafka(kafka_kind: Kind) -> Iterator[Proxied]:
    """A broker of this test's own behind a fault proxy, which is the address that it tells its clients."""
    with Proxy() as proxy, local_kafka(kafka_kind, advertised_port=proxy.port) as server:
        proxy.aim(server.port)
        yield Proxied(server, proxy)


@pytest.fixture
def stage_on(programs: Programs, tmp_path: Path) -> Callable[..., FaultStage]:
    """Build a stage on given servers: ``stage_on(kafka, redis_url, **settings)``.

    Every call has topics, a group and files of its own, so that a scenario and its control do not meet.
    """
    numbers = count(1)

    def build(kafka: str, redis_url: str, names: Names | None = None, **settings: Any) -> FaultStage:
        directory = tmp_path / f"stage-{next(numbers)}"
        directory.mkdir()
        case = event_clock_case(kafka, redis_url, names or Names.unique())
        return FaultStage.build(case, programs, directory, **settings)

    return build


@pytest.fixture
def stage(kafka_bootstrap: str, fresh_redis: str, stage_on: Callable[..., FaultStage]) -> FaultStage:
    """A stage on the session's own servers, with nothing in its topics."""
    return stage_on(kafka_bootstrap, fresh_redis)


@pytest.fixture
def patience() -> Iterator[None]:
    """Let a test of many lives take longer than others before it is taken for one that hangs."""
    faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def port() -> int:
    """A free port, for the worker's probes."""
    return free_port()
