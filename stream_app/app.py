"""Put the worker together and run it: the one composition root, and the only reader of clocks.

Decides what is connected to what, in which order things start and end, and which failure ends the process.
Nothing is connected before `run_worker` is called.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from aiokafka.errors import KafkaError
from threadpoolctl import threadpool_limits

from stream_app.adapters.assignment import Assignment
from stream_app.adapters.checks import KafkaFacts, check_kafka, check_redis, refuse
from stream_app.adapters.codec import Decoder
from stream_app.adapters.definitions import sweep_definitions
from stream_app.adapters.functions import loader
from stream_app.adapters.health import Health, serve_http
from stream_app.adapters.kafka_admin import KafkaAdmin
from stream_app.adapters.kafka_security import security_of, told
from stream_app.adapters.learning import Learner
from stream_app.adapters.log_ends import LogProbe
from stream_app.adapters.metrics import Metrics
from stream_app.adapters.model_store import ModelStore
from stream_app.adapters.partition import Shell
from stream_app.adapters.profile_store import Identity, ProfileStore
from stream_app.adapters.publisher import Publisher
from stream_app.adapters.redis_client import Client, connect
from stream_app.adapters.tasks import end_tasks
from stream_app.adapters.transport import Log, SliceApp, build_faust_app
from stream_app.adapters.until_end import wait_until_end
from stream_app.core.discovery import DiscoveryRules
from stream_app.core.fold import Fold
from stream_app.core.model import NextCategoryModel
from stream_app.core.patch import COMPILED, Patcher
from stream_app.errors import ConfigError, StartRefused, StoreUnavailable, StreamAppError
from stream_app.settings import Settings, faust_environment_problems

__all__ = ["Worker", "build_app", "run_worker"]

logger = logging.getLogger(__name__)

OWNER_BYTES: Final = 8
#: How long the thread that talks to Kafka may wait for the other to let it run: 5 ms is Python's wont, twice
#: for each slice.
SWITCH_S: Final = 0.0005
#: New containers between two looks of the garbage collector.
GC_AFTER: Final = 50_000
#: How long each part may take to stop after the drain.
STOP_S: Final = 5.0
#: Parts that are stopped one after the other, and one more for what none of them knows of.
PARTS: Final = 8


def now_ms() -> int:
    """Read the wall clock, Unix ms."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Worker:
    """The parts of a worker that have a life of their own; made by `build_app`, started by `run_worker`."""

    app: SliceApp
    assignment: Assignment
    store: ProfileStore
    publisher: Publisher
    probe: LogProbe
    log: Log
    health: Health
    shell: Shell


def build_app(settings: Settings, facts: KafkaFacts, redis_client: Client, *, accept_gap: bool) -> Worker:
    """Put the parts together. Connects to nothing.

    Parameters
    ----------
    settings : Settings
    facts : KafkaFacts
        What was learned of the broker.
    redis_client : redis.asyncio.Redis or Cluster
        As made by `stream_app.adapters.redis_client.connect`.
    accept_gap : bool
        Go on where the log no longer holds what the watermark asks for.
    """
    kafka, worker = settings.kafka, settings.worker
    security = security_of(kafka)
    wall = worker.clock == "wall"
    assignment = Assignment()
    app = build_faust_app(
        group_id=kafka.group_id,
        bootstrap_servers=kafka.bootstrap_servers,
        events_topic=kafka.events_topic,
        session_timeout_s=kafka.session_timeout_s,
        partitions=assignment,
        security=security,
    )
    metrics = Metrics()
    log = Log(app, kafka.events_topic)
    probe = LogProbe(kafka.bootstrap_servers, kafka.events_topic, now_ms, security=security)
    owner = secrets.token_hex(OWNER_BYTES)
    store = ProfileStore(redis_client, owner)
    publisher = Publisher(
        kafka.bootstrap_servers,
        {
            "entered": kafka.entered_topic,
            "exited": kafka.exited_topic,
            "dead_letter": kafka.dead_letter_topic,
        },
        security=security,
    )
    learner = None
    if settings.model.enabled:
        learner = Learner(
            NextCategoryModel(half_life_ms=settings.weights.core.default_half_life_ms),
            ModelStore(redis_client, owner),
            DiscoveryRules(settings.segment_set),
            settings.weights.core,
            partitions=facts.partitions,
            max_age_ms=round(settings.model.max_age_s * 1000),
            checkpoint_s=settings.model.checkpoint_s,
            monotonic_s=time.monotonic,
            metrics=metrics,
        )
    fold = Fold(settings.segment_set, settings.weights.core, keeps_seen=settings.model.enabled)
    shell = Shell(
        topic=kafka.events_topic,
        clock=worker.clock,
        fold=fold,
        decoder=Decoder(max_future_skew_s=worker.max_future_skew_s),
        store=store,
        publisher=publisher,
        log=log,
        probe=probe,
        identity=Identity(
            cluster_id=facts.cluster_id,
            topic=kafka.events_topic,
            partitions=facts.partitions,
            group=kafka.group_id,
            clock=worker.clock,
            weights=settings.weights.core.fingerprint(),
        ),
        metrics=metrics,
        now_ms=now_ms,
        monotonic_s=time.monotonic,
        hold_deadline_s=worker.hold_deadline_s,
        max_dead_letter_share=worker.max_dead_letter_share,
        retention_ms=facts.retention_ms if wall else None,
        check_producer_time=wall and worker.trust_create_time,
        accept_gap=accept_gap,
        load_functions=loader(redis_client, settings.weights.core, worker.clock),
        patcher=Patcher(fold) if COMPILED and learner is None else None,
        learner=learner,
        rescored_per_s=settings.model.rescored_per_s,
        cache_bytes=round(worker.cache_mb * 1e6) // facts.partitions,
    )
    health = Health(assignment, log, probe, metrics, time.monotonic)
    return Worker(app, assignment, store, publisher, probe, log, health, shell)


def run_worker(settings: Settings, *, until_end: bool, accept_gap: bool, unchecked: bool) -> None:
    """Run a worker until SIGTERM or SIGINT, or, with `until_end`, until the log as it is now is folded.

    Parameters
    ----------
    settings : Settings
    until_end : bool
        Stop when every partition is folded up to the end that its log has at the start, whoever owns it.
    accept_gap : bool
        Go on where retention has overtaken the watermark, or the topic was created anew.
    unchecked : bool
        Start although Redis would not tell its eviction policy or role.

    Raises
    ------
    StreamAppError
        Why it did not start, or had to stop; nothing unfinished was acknowledged.
    """
    problems = faust_environment_problems()
    if problems:
        raise ConfigError(problems)
    # The model's products are small: handing them to other threads costs more than they do, on a busy machine
    # a hundred times more. Cores are for other workers.
    threadpool_limits(limits=1, user_api="blas")
    # What was imported is never garbage, and what a slice makes lives no longer than it: looked through
    # after every 700 new containers, as is Python's wont, it took 13 % of the worker's time.
    gc.freeze()
    sys.setswitchinterval(SWITCH_S)
    gc.set_threshold(GC_AFTER)
    left_behind: list[str] = []
    failures: list[BaseException] = []
    last_resort = threading.Timer(settings.worker.drain_deadline_s + PARTS * STOP_S, _end_here, [failures])
    last_resort.daemon = True
    runner = asyncio.Runner()
    failure: StreamAppError | None = None
    try:
        runner.run(
            _run(
                settings,
                left_behind,
                failures,
                last_resort,
                until_end=until_end,
                accept_gap=accept_gap,
                unchecked=unchecked,
            )
        )
    except StreamAppError as exc:
        failure = exc
    if left_behind:
        # What hangs on a dead broker, and its threads, would keep the process for ever.
        logger.warning("did not stop in time and are left behind: %s", ", ".join(left_behind))
        if failure is not None:
            print(failure, file=sys.stderr)
        sys.stderr.flush()
        os._exit(0 if failure is None else 1)
    runner.close()
    for thread in threading.enumerate():
        # The interpreter waits for them too, but without an end.
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    last_resort.cancel()
    if failure is not None:
        raise failure


def _end_here(failures: list[BaseException]) -> None:
    """End the process, whatever it hangs on, and say first why it was to stop.

    Deadlines are kept by the event loop, and Faust stops a thread by waiting for it in that loop: if the
    thread does not end, no deadline comes.
    """
    print(
        *failures,
        StartRefused(
            "to stop within the deadlines (worker.drain_deadline_s)",
            "a part of the worker that hangs",
            "worker, on stopping",
            "None for the state: nothing unfinished was acknowledged and the next worker goes on from the "
            "watermark.",
        ),
        sep="\n",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


async def _run(
    settings: Settings,
    left_behind: list[str],
    failures: list[BaseException],
    last_resort: threading.Timer,
    *,
    until_end: bool,
    accept_gap: bool,
    unchecked: bool,
) -> None:
    """Start, wait for a reason to stop, stop.

    1. Look at the surroundings and refuse what does not fit.
    2. Start what the partitions need, then Faust, which joins the group.
    3. Wait for a signal, a failure, or the end of the log.
    4. Drain: finish the steps in hand, tell Kafka how far they got.
    5. Stop everything, each part within `STOP_S`; what hangs is named in `left_behind`, and what blocks the
       event loop meets the last resort, which is started when there is a reason to stop.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:

        def at_the_end(name: str, part: Callable[[], Coroutine[Any, Any, Any]]) -> None:
            async def end() -> None:
                if not await _ends_within(part(), STOP_S):
                    left_behind.append(name)

            stack.push_async_callback(end)

        client = connect(settings.redis.connection_url, cluster=settings.redis.cluster)
        at_the_end("Redis client", client.aclose)
        refuse(await check_redis(client, settings.redis.redacted_url), unchecked=unchecked)
        security = security_of(settings.kafka)
        async with KafkaAdmin(settings.kafka.bootstrap_servers, security=security) as admin:
            findings, facts = await check_kafka(admin, settings)
        refuse(findings, unchecked=unchecked)

        worker = build_app(settings, facts, client, accept_gap=accept_gap)
        worker.assignment.equip(worker.shell)
        await worker.probe.start()
        at_the_end("log probe", worker.probe.stop)
        await worker.publisher.start()
        at_the_end("publisher", worker.publisher.stop)
        if worker.shell.learner is not None:
            await worker.shell.learner.start()
        ends = await worker.probe.all_ends(facts.partitions) if until_end else {}
        if settings.worker.http_port:
            runner = await serve_http(worker.health, settings.worker.http_host, settings.worker.http_port)
            at_the_end("probes", runner.cleanup)

        at_the_end("Faust", worker.app.stop)
        reasons: dict[str, asyncio.Task[Any]] = {
            "signal": asyncio.create_task(stop.wait()),
            "failure": asyncio.create_task(worker.assignment.failed()),
            "faust": asyncio.create_task(worker.log.crashed()),
            "start": asyncio.create_task(_join(worker, settings)),
        }
        try:
            done, _ = await asyncio.wait(reasons.values(), return_when=asyncio.FIRST_COMPLETED)
            if reasons["start"] in done and reasons["start"].exception() is None:
                del reasons["start"]
                reasons["health"] = asyncio.create_task(worker.health.watch())
                reasons["definitions"] = asyncio.create_task(
                    sweep_definitions(worker.assignment, worker.store)
                )
                if worker.shell.learner is not None:
                    reasons["model"] = asyncio.create_task(worker.shell.learner.follow())
                if until_end:
                    reasons["end"] = asyncio.create_task(wait_until_end(worker.shell, ends))
                done, _ = await asyncio.wait(reasons.values(), return_when=asyncio.FIRST_COMPLETED)
            last_resort.start()
            failure = _failure(reasons, done)
            if failure is None:
                failure = await _drain(worker, settings.worker.drain_deadline_s)
            if failure is not None:
                failures.append(failure)
            logger.info("%s", worker.shell.metrics.summary())
        finally:
            at_the_end("background tasks", lambda: end_tasks(reasons.values()))
            at_the_end("partitions", worker.assignment.stop)
        if failure is not None:
            raise failure


async def _join(worker: Worker, settings: Settings) -> None:
    """Start Faust, which returns when the group has given this worker its partitions.

    Raises
    ------
    StoreUnavailable
        If that takes longer than a partition may be held, after two session timeouts: that long a group may
        wait for a member that was killed.
    """
    deadline_s = settings.worker.hold_deadline_s + 2 * settings.kafka.session_timeout_s
    starting = asyncio.ensure_future(worker.app.start())
    done, _ = await asyncio.wait({starting}, timeout=deadline_s)
    group = f"Kafka, group {worker.shell.identity.group}"
    if not done:
        raise StoreUnavailable(group, f"no assignment within {deadline_s:g} s")
    exc = starting.exception()
    if exc is not None:
        raise told(exc, group) from exc


def _failure(reasons: dict[str, asyncio.Task[Any]], done: set[asyncio.Task[Any]]) -> BaseException | None:
    for name, task in reasons.items():
        if task not in done:
            continue
        exc = task.exception()
        if exc is not None:
            return exc
        if name in ("failure", "faust"):
            found: BaseException = task.result()
            if isinstance(found, KafkaError):
                return told(found, "Kafka, consumer group")
            return found
        logger.info("stopping: %s", {"signal": "a signal came", "end": "the end of the log is reached"}[name])
    return None


async def _drain(worker: Worker, deadline_s: float) -> BaseException | None:
    """Finish the steps in hand and tell Kafka, within the deadline; return what kept that from being done."""

    async def drain() -> None:
        await worker.assignment.drain()
        await worker.log.commit()

    draining = asyncio.ensure_future(drain())
    done, _ = await asyncio.wait({draining}, timeout=deadline_s)
    if not done or draining.cancelled():
        held = "; ".join(str(task.held_by) for task in worker.assignment if task.held_by)
        return StartRefused(
            f"to finish the work in hand within {deadline_s:g} s (worker.drain_deadline_s)",
            held or "Redis or Kafka that did not answer",
            "worker, on stopping",
            "None for the state: nothing unfinished was acknowledged and the next worker goes on from the "
            "watermark.",
        )
    failure = worker.assignment.failure or draining.exception()
    if isinstance(failure, KafkaError):
        return told(failure, "Kafka, commit of the offsets")
    return failure or next((task.held_by for task in worker.assignment if task.held_by), None)


async def _ends_within(work: Coroutine[Any, Any, Any], deadline_s: float) -> bool:
    """Run a shutdown for a limited time; tell whether it ended, well or not.

    Not `asyncio.wait_for`, which waits for what it has cancelled, and Faust's services take no cancellation.
    """
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait({task}, timeout=deadline_s)
    if done and not task.cancelled() and task.exception() is not None:
        logger.warning("while stopping: %s: %s", type(task.exception()).__name__, task.exception())
    return bool(done)
