"""Servers and programs for the tests, by name: see `tests/backends.py` and `tests/processes.py`.

A server that cannot be had is a skip with its reason; with ``CI=true`` it is a failure, since there nobody
reads skips.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import pytest

from stream_app.core import fold
from stream_app.embedded import EmbeddedServerError, Server
from tests import backends
from tests.backends import Kind, Names, ServiceMissing
from tests.faults import rows
from tests.faults.cluster import RedisCluster, redis_cluster
from tests.faults.rows import Row
from tests.processes import Programs

LOG_SHOWN_CHARS = 20_000
_programs = pytest.StashKey[Programs]()
_row = pytest.StashKey[Row]()
_rows = pytest.StashKey[list[Row]]()
_failed = pytest.StashKey[dict[str, None]]()
_began_s = pytest.StashKey[float]()


def servers() -> str:
    """Say where the broker and the store come from."""
    kafka = backends.kind_of(backends.kafka_from_environment(os.environ), os.environ)
    store = backends.kind_of(backends.redis_from_environment(os.environ), os.environ)
    return f"Kafka {kafka}, Redis {store}"


def pytest_report_header() -> list[str]:
    core = "interpreted" if str(fold.__file__).endswith(".py") else "compiled"
    return [f"servers: {servers()}", f"core: {core}", f"seed of the faults: {rows.seed()} (FAULT_SEED)"]


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a compiled core that is older than what it was compiled from: something else would be tested.

    With ``CI=true`` also an interpreted one that nobody has asked for.
    """
    for compiled in Path(fold.__file__).parent.glob("*.so"):
        source = compiled.with_name(compiled.name.partition(".")[0] + ".py")
        if not source.exists() or source.stat().st_mtime > compiled.stat().st_mtime:
            pytest.exit(
                f"{source.name} has changed since it was compiled: run `make clean venv`", returncode=4
            )
    wanted = config.pluginmanager.hasplugin("tests.interpreted") or "STREAM_APP_INTERPRETED" in os.environ
    if os.environ.get("CI") == "true" and not wanted and str(fold.__file__).endswith(".py"):
        pytest.exit("the core is not compiled: see what `make venv` says, a C compiler may be missing", 4)


# --- the table of faults -----------------------------------------------------------------------------------


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_rows] = []
    session.config.stash[_failed] = {}
    session.config.stash[_began_s] = time.monotonic()


def pytest_sessionfinish(session: pytest.Session) -> None:
    write_rows(session.config)


def write_rows(config: pytest.Config) -> None:
    """Write down what there is: a run that is cut off keeps the rows that it has."""
    stash = config.stash
    failed = stash[_failed]
    rows.write(stash[_rows], list(failed), servers(), time.monotonic() - stash[_began_s])


@pytest.fixture
def fault_row(request: pytest.FixtureRequest) -> Callable[[str, str], Row]:
    """Begin the row of the fault table that this test is: see `tests.faults.rows`."""

    def begin(scenario: str, guarantee: str) -> Row:
        row = Row(scenario, guarantee, test=request.node.nodeid)
        request.node.stash[_row] = row
        request.config.stash[_rows].append(row)
        return row

    return begin


def missing(reason: str) -> NoReturn:
    """Skip the test on a laptop, fail it in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must have every server: {reason}", pytrace=False)
    pytest.skip(reason)


# --- the session's own servers -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def kafka_kind() -> Kind:
    """Where the broker comes from: "embedded", "apache", "docker" or "environment"."""
    return backends.kind_of(backends.kafka_from_environment(os.environ), os.environ)


@pytest.fixture(scope="session")
def redis_kind() -> Kind:
    """Where the store comes from: "embedded", "apache" (the PATH's), "docker" or "environment"."""
    return backends.kind_of(backends.redis_from_environment(os.environ), os.environ)


@pytest.fixture(scope="session")
def kafka_bootstrap(kafka_kind: Kind) -> Iterator[str]:
    """Bootstrap servers of the session's broker; use topics of `names`."""
    with ExitStack() as stack:
        try:
            bootstrap = stack.enter_context(
                backends.open_kafka(kafka_kind, backends.kafka_from_environment(os.environ))
            )
        except (ServiceMissing, EmbeddedServerError) as exc:
            missing(str(exc))
        yield bootstrap


@pytest.fixture(scope="session")
def redis_url(redis_kind: Kind) -> Iterator[str]:
    """URL of the session's store; other tests use it too: see `fresh_redis`."""
    with ExitStack() as stack:
        try:
            url = stack.enter_context(
                backends.open_redis(redis_kind, backends.redis_from_environment(os.environ))
            )
        except (ServiceMissing, EmbeddedServerError) as exc:
            missing(str(exc))
        yield url


@pytest.fixture(scope="session")
def redis_masters(redis_kind: Kind) -> Iterator[RedisCluster]:
    """The session's Redis Cluster of three masters; other tests use it too: empty it first."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(redis_cluster(redis_kind))
        except (ServiceMissing, EmbeddedServerError) as exc:
            missing(str(exc))
        yield made


# --- what one test owns ------------------------------------------------------------------------------------


@pytest.fixture
def names() -> Names:
    """Topics and a consumer group that no other test uses; they do not exist yet."""
    return Names.unique()


@pytest.fixture
def fresh_redis(redis_url: str, redis_kind: Kind) -> Iterator[str]:
    """URL of a database of the session's store with nothing in it."""
    with ExitStack() as stack:
        try:
            url = stack.enter_context(backends.empty_redis(redis_url, ours=redis_kind != "environment"))
        except ServiceMissing as exc:
            missing(str(exc))
        yield url


@pytest.fixture
def redis_server(redis_kind: Kind) -> Iterator[Callable[..., Server]]:
    """Start a store of this test's own, to be killed, filled or misconfigured at will.

    ``redis_server("--maxmemory-policy", "allkeys-lru", port=0)`` returns the `Server`.
    """
    with ExitStack() as stack:

        def start(*arguments: str, port: int = 0) -> Server:
            try:
                return stack.enter_context(backends.local_redis(redis_kind, port, arguments))
            except ServiceMissing as exc:
                missing(str(exc))

        yield start


@pytest.fixture
def kafka_server(kafka_kind: Kind) -> Iterator[Callable[..., Server]]:
    """Start a broker of this test's own (``kafka_server(port=0)``); Apache's takes about 4 seconds."""
    with ExitStack() as stack:

        def start(*, port: int = 0) -> Server:
            try:
                return stack.enter_context(backends.local_kafka(kafka_kind, port))
            except ServiceMissing as exc:
                missing(str(exc))

        yield start


@pytest.fixture
def programs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Programs]:
    """Start `stream-app` commands as processes that end with the test; their logs are shown if it fails."""
    started = Programs(tmp_path, {})
    request.node.stash[_programs] = started
    yield started
    started.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    row = item.stash.get(_row, None)
    if row is not None and (call.when == "call" or report.outcome != "passed"):
        row.outcome = report.outcome
    if report.failed:
        item.config.stash[_failed][item.nodeid] = None
    if row is not None and call.when == "teardown":
        write_rows(item.config)
    if report.failed and _programs in item.stash:
        for program in item.stash[_programs].started:
            report.sections.append((f"log of {program.name}", program.log[-LOG_SHOWN_CHARS:]))
    return report


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the larger real data sets, which are not part of this repository."""
    folder = Path(os.environ.get("SHARED_DATA_DIR", backends.ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set SHARED_DATA_DIR")
    return folder
