"""The real `stream-app`, killed at a named point or with one of its protections switched off.

Run as ``python -m tests.faults.faulty worker ...`` in place of ``python -m stream_app worker ...``. What is
wrong with it is in the environment (see `environment`), which wraps the real functions before the command
starts; nothing in the service knows of it.

At a point the process signals itself the n-th time that it is passed: it is killed, stands still until
somebody continues it, or is asked to end. A switch takes away what a guarantee rests on, so that a run which
holds with it must be seen to fail without it: these are the controls of the fault suite. Its clock may be
another than the machine's.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import aiokafka
import msgspec
from aiokafka.producer.sender import SendProduceReqHandler

from stream_app import app
from stream_app.adapters import partition, profile_store
from stream_app.adapters.assignment import Assignment
from stream_app.adapters.codec import Outgoing
from stream_app.adapters.log_ends import LogEnds, LogProbe
from stream_app.adapters.partition import PartitionTask
from stream_app.adapters.profile_cache import ProfileCache
from stream_app.adapters.profile_store import Commit, ProfileStore
from stream_app.adapters.publisher import Publisher
from stream_app.adapters.transport import Log, Slice, SliceApp, SliceConsumerThread
from stream_app.core import step
from stream_app.errors import StoreUnavailable
from tests.faults.unsafe import UNSAFE, UnsafeSwitch

Point = Literal["after load", "after fold", "after commit", "after publish", "before ack", "during rebalance"]
POINTS: Final[tuple[Point, ...]] = get_args(Point)
#: ``outbox``: what is to be published is not committed with the state. ``fence``: a commit asks neither for
#: the owner nor for the epoch, nor a claim for the generation. ``mismatch``: nor for the commit number.
#: ``lost``: nor whether there is a watermark at all. ``hold``: a commit or message that failed counts as
#: done. ``retries``: Kafka's client sends nothing again, and no message is waited for longer than `HASTE_S`.
#: ``ids``: what is published out of the outbox again gets another id. ``committed``: of a log with
#: transactions all is read. ``ask``: the timer does not ask the log whether more is to come. ``replay``:
#: Kafka hears of every watermark, also in the middle of a replay. ``appended``: the log ends where all its
#: replicas have it. ``definitions``: everybody counts as evaluated under the present definitions. ``stop``:
#: stopping Faust takes for ever, and the event loop with it; all other deadlines are short. ``prompt``: what
#: was fetched reaches its partition `HASTE_S` later.
ServiceSwitch = Literal[
    "outbox",
    "fence",
    "mismatch",
    "lost",
    "hold",
    "retries",
    "ids",
    "committed",
    "ask",
    "replay",
    "stop",
    "prompt",
    "appended",
    "definitions",
]
#: Of them, or of `tests.faults.unsafe`.
Switch = ServiceSwitch | UnsafeSwitch
SWITCHES: Final[tuple[Switch, ...]] = (*get_args(ServiceSwitch), *get_args(UnsafeSwitch))

#: What to do at a point, ``<point>:<count>``. What comes with a stop counts from when it is over.
STOP: Final = "FAULTY_STOP"
KILL: Final = "FAULTY_KILL"
TERM: Final = "FAULTY_TERM"
#: A list of faults in JSON, one life after the other: see `live_again`.
LIVES: Final = "FAULTY_LIVES"
#: A file that holds by how many milliseconds the wall clock is wrong; read whenever the clock is.
CLOCK: Final = "FAULTY_CLOCK"
WITHOUT: Final = "FAULTY_WITHOUT"

HASTE_S: Final = 0.8
#: How the log tells that a new life begins.
LIFE: Final = "=== life "
PR_SET_PDEATHSIG: Final = 1

#: The line of commit.lua that each switch takes away.
CHECKS: Final[Mapping[str, str]] = {
    "lost": "if not epoch or tonumber(epoch) < tonumber(ARGV[2]) or stored[4] then",
    "fence": "if owner ~= ARGV[1] or epoch ~= ARGV[2] then",
    "mismatch": "if commit ~= ARGV[3] then",
}
#: What takes its place; where nothing is known of a partition, what the worker knows is believed.
NOTHING: Final = "if false then"
AS_KNOWN: Final = f"if not epoch then owner, epoch, commit = ARGV[1], ARGV[2], ARGV[3] end {NOTHING}"


def environment(
    kill: tuple[Point, int] | None = None,
    without: Sequence[Switch] = (),
    *,
    stop: tuple[Point, int] | None = None,
    term: tuple[Point, int] | None = None,
    clock: Path | None = None,
    lives: Sequence[Mapping[str, str]] = (),
) -> dict[str, str]:
    """Say what shall be wrong with a process, for its environment; each of `lives` is one such saying."""
    said = {
        name: f"{at[0]}:{at[1]}" for name, at in ((STOP, stop), (KILL, kill), (TERM, term)) if at is not None
    }
    if without:
        said[WITHOUT] = ",".join(without)
    if clock is not None:
        said[CLOCK] = str(clock)
    if lives:
        said[LIVES] = json.dumps(lives)
    return said


def arrange(environ: Mapping[str, str]) -> None:
    """Wrap the real functions as the environment says."""
    for switch in filter(None, environ.get(WITHOUT, "").split(",")):
        _switch_off(switch)
    stop = _signal_at(environ.get(STOP, ""), signal.SIGSTOP, None)
    for name, number in ((KILL, signal.SIGKILL), (TERM, signal.SIGTERM)):
        _signal_at(environ.get(name, ""), number, stop)
    if clock := environ.get(CLOCK):
        _shift_clock(Path(clock))


# --- points ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Signal:
    """A signal that the process sends itself when it has passed a point often enough."""

    number: signal.Signals
    left: int
    #: What must have happened before passing the point counts.
    after: _Signal | None

    def pass_by(self) -> None:
        if self.after is not None and self.after.left > 0:
            return
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def _signal_at(said: str, number: signal.Signals, after: _Signal | None) -> _Signal | None:
    if not said:
        return None
    point, _, count = said.rpartition(":")
    made = _Signal(number, int(count), after)
    _call_at(point, made.pass_by)
    return made


def _call_at(point: str, pass_by: Callable[[], None]) -> None:
    if point == "after load":
        _after(ProfileStore, "read", pass_by)
    elif point == "after fold":
        fold_slice = step.fold_slice

        @functools.wraps(fold_slice)
        def fold(*args: Any, **kwargs: Any) -> Any:
            result = fold_slice(*args, **kwargs)
            pass_by()
            return result

        _replace(partition, "fold_slice", fold)
    elif point == "after commit":
        # One that leaves messages to publish: that is what a crash here could lose.
        _after(
            ProfileStore,
            "commit",
            pass_by,
            only=lambda store, p, epoch, number, step, cache: bool(step.outbox),
        )
    elif point == "after publish":
        _after(Publisher, "publish", pass_by, only=lambda publisher, messages: bool(messages))
    elif point == "before ack":
        submit = PartitionTask.submit

        def submitted(task: PartitionTask, part: Slice, acknowledge: Callable[[], object]) -> None:
            def acknowledged() -> object:
                pass_by()
                return acknowledge()

            submit(task, part, acknowledged)

        _replace(PartitionTask, "submit", submitted)
    elif point == "during rebalance":
        # What is taken away has been dropped; the group waits for this member to say so.
        _after(Assignment, "revoked", pass_by, only=lambda assignment, partitions: bool(partitions))
    else:
        raise ValueError(f"expected one of {', '.join(POINTS)}, got {point!r}")


def _after(
    owner: type, name: str, then: Callable[[], None], only: Callable[..., bool] = lambda *args: True
) -> None:
    real: Callable[..., Awaitable[Any]] = getattr(owner, name)

    @functools.wraps(real)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = await real(*args, **kwargs)
        if only(*args):
            then()
        return result

    _replace(owner, name, wrapped)


def _replace(owner: object, name: str, by: object) -> None:
    setattr(owner, name, by)


# --- the clock ---------------------------------------------------------------------------------------------


def _shift_clock(offset: Path) -> None:
    real = app.now_ms
    app.now_ms = lambda: real() + int(offset.read_text())


# --- switches ----------------------------------------------------------------------------------------------


def _switch_off(switch: str) -> None:
    if switch in CHECKS:
        _strike_out(switch)
    if switch == "fence":

        async def current(log: Log) -> bool:
            return True

        _replace(Log, "generation_is_current", current)
    elif switch == "outbox":
        commit = ProfileStore.commit

        async def forgetful(
            store: ProfileStore, p: int, epoch: int, number: int, step: Commit, cache: ProfileCache | None
        ) -> int | None:
            # Not emptied in place: "after commit" asks the step whether there was anything to publish.
            return await commit(store, p, epoch, number, replace(step, outbox=()), cache)

        _replace(ProfileStore, "commit", forgetful)
    elif switch == "hold":
        for owner, name in ((ProfileStore, "commit"), (Publisher, "publish")):
            _replace(owner, name, _believing(getattr(owner, name)))
    elif switch == "retries":
        _replace(SendProduceReqHandler, "_can_retry", lambda handler, error, batch: False)
        _replace(Publisher, "publish", _hasty(Publisher.publish))
    elif switch == "ids":
        _replace(ProfileStore, "outbox", _renamed(ProfileStore.outbox))
    elif switch == "committed":
        create = SliceConsumerThread._create_worker_consumer

        def uncommitted(thread: SliceConsumerThread, transport: object) -> aiokafka.AIOKafkaConsumer:
            consumer = create(thread, transport)
            consumer._isolation_level = "read_uncommitted"
            return consumer

        _replace(SliceConsumerThread, "_create_worker_consumer", uncommitted)
    elif switch == "ask":
        _replace(LogProbe, "ends", _remembering(LogProbe.ends))
    elif switch == "appended":

        async def nothing(probe: LogProbe, tps: object) -> dict[aiokafka.TopicPartition, int]:
            return {}

        _replace(LogProbe, "_appended", nothing)
    elif switch == "prompt":
        submit = Assignment.submit

        def later(assignment: Assignment, part: Slice, acknowledge: Callable[[], object]) -> None:
            asyncio.get_running_loop().call_later(HASTE_S, submit, assignment, part, acknowledge)

        _replace(Assignment, "submit", later)
    elif switch == "stop":
        app.STOP_S = HASTE_S  # type: ignore[misc]

        async def stop(faust: SliceApp) -> None:
            threading.Event().wait()

        _replace(SliceApp, "stop", stop)
    elif switch == "replay":

        def report(task: PartitionTask, owned: partition._Owned) -> None:
            task._shell.log.processed(task.partition, owned.watermark)

        _replace(PartitionTask, "_report_processed", report)
    elif switch == "definitions":

        async def left_alone(task: PartitionTask, users: object) -> bool:
            return True

        _replace(PartitionTask, "redefine", left_alone)
    elif switch in UNSAFE:
        UNSAFE[switch]()
    elif switch not in CHECKS:
        raise ValueError(f"{WITHOUT}: expected {', '.join(SWITCHES)}, got {switch!r}")


def _believing(real: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(real)
    async def believed(*args: Any, **kwargs: Any) -> Any:
        try:
            return await real(*args, **kwargs)
        except StoreUnavailable:
            return None

    return believed


def _hasty(real: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(real)
    async def hasty(*args: Any) -> None:
        try:
            async with asyncio.timeout(HASTE_S):
                await real(*args)
        except TimeoutError as exc:
            raise StoreUnavailable("Kafka, publish", f"no answer for {HASTE_S} s") from exc

    return hasty


def _renamed(real: Callable[..., AsyncIterator[list[bytes]]]) -> Callable[..., AsyncIterator[list[bytes]]]:
    def rename(blob: bytes) -> bytes:
        message = Outgoing.unpack(blob)
        said = json.loads(message.value or b"{}") if message.kind != "dead_letter" else {}
        if "id" not in said:
            return blob
        new = f"{said['id']} again"
        headers = tuple((name, new.encode() if name == "ce_id" else value) for name, value in message.headers)
        value = json.dumps({**said, "id": new}).encode()
        return msgspec.structs.replace(message, value=value, headers=headers).pack()

    @functools.wraps(real)
    async def renamed(*args: Any) -> AsyncIterator[list[bytes]]:
        async for page in real(*args):
            yield [rename(blob) for blob in page]

    return renamed


class _Anywhere(int):
    """The end of a log, as one who does not ask sees it: far away, and always where the fold stands."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def _remembering(real: Callable[[LogProbe, int], Awaitable[LogEnds]]) -> Callable[..., Awaitable[LogEnds]]:
    known: dict[int, LogEnds] = {}
    far = _Anywhere(2**62)

    @functools.wraps(real)
    async def remembered(probe: LogProbe, p: int) -> LogEnds:
        if p in known:
            return replace(known[p], end=far, appended=far, asked_ms=app.now_ms())
        known[p] = await real(probe, p)
        return known[p]

    return remembered


def _strike_out(switch: str) -> None:
    read = profile_store.script_text
    profile_store.script_text = lambda name: _without_check(switch, name, read(name))


def _without_check(switch: str, name: str, text: str) -> str:
    if name != "commit.lua" or switch not in CHECKS:
        return text
    line = CHECKS[switch]
    if text.count(line) != 1:
        raise ValueError(f"{name}: expected one line {line!r}, got {text.count(line)}")
    return text.replace(line, AS_KNOWN if switch == "lost" else NOTHING)


def script_sha(name: str, without: Sequence[Switch] = ()) -> bytes:
    """Return what ``EVALSHA`` calls a script, as a process has it that lacks these protections."""
    text = profile_store.script_text(name)
    for switch in without:
        text = _without_check(switch, name, text)
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest().encode()


def live_again(lives: Sequence[Mapping[str, str]], command: Callable[[], int]) -> int:
    """Run the command once for each of some faults, in a process of its own that has to die of them.

    What a supervisor does, only faster: what takes seconds to import is imported once.
    """
    for number, life in enumerate(lives, 1):
        print(f"{LIFE}{number}: {dict(life)}", flush=True)
        pid = os.fork()
        if pid == 0:
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            arrange(life)
            return command()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != -signal.SIGKILL:
            print(f"life {number} ended with {status}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    from stream_app.__main__ import main

    if said := os.environ.get(LIVES):
        sys.exit(live_again(json.loads(said), main))
    arrange(os.environ)
    sys.exit(main())
