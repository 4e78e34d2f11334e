"""The real `stream-app`, killed at a named point or with one of its protections switched off.

Run as ``python -m tests.faults.faulty worker ...`` in place of ``python -m stream_app worker ...``. What is
wrong with it is in the environment (see `environment`), which wraps the real functions before the command
starts; nothing in the service knows of it.

A point kills the process by SIGKILL, from within, the n-th time that it is passed. A switch takes away what
a guarantee rests on, so that a run which holds with it must be seen to fail without it: these are the
controls of the fault suite.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Literal, get_args

from stream_app.adapters import partition, profile_store
from stream_app.adapters.assignment import Assignment
from stream_app.adapters.partition import PartitionTask
from stream_app.adapters.profile_store import Commit, ProfileStore
from stream_app.adapters.publisher import Publisher
from stream_app.adapters.transport import Log, Slice
from stream_app.core import step
from stream_app.errors import StoreUnavailable

Point = Literal["after load", "after fold", "after commit", "after publish", "before ack", "during rebalance"]
POINTS: Final[tuple[Point, ...]] = get_args(Point)
#: ``outbox``: what is to be published is not committed with the state. ``fence``: a commit asks neither for
#: the owner nor for the epoch, nor a claim for the generation. ``mismatch``: nor for the commit number.
#: ``lost``: nor whether there is a watermark at all. ``hold``: a commit or message that failed counts as
#: done.
Switch = Literal["outbox", "fence", "mismatch", "lost", "hold"]
SWITCHES: Final[tuple[Switch, ...]] = get_args(Switch)

KILL: Final = "FAULTY_KILL"
WITHOUT: Final = "FAULTY_WITHOUT"

#: The line of commit.lua that each switch takes away.
CHECKS: Final[Mapping[str, str]] = {
    "lost": "if not epoch or tonumber(epoch) < tonumber(ARGV[2]) or stored[4] then",
    "fence": "if owner ~= ARGV[1] or epoch ~= ARGV[2] then",
    "mismatch": "if commit ~= ARGV[3] then",
}


def environment(kill: tuple[Point, int] | None = None, without: Sequence[Switch] = ()) -> dict[str, str]:
    """Say what shall be wrong with a process, for its environment."""
    said = {}
    if kill is not None:
        said[KILL] = f"{kill[0]}:{kill[1]}"
    if without:
        said[WITHOUT] = ",".join(without)
    return said


def arrange(environ: Mapping[str, str]) -> None:
    """Wrap the real functions as the environment says."""
    for switch in filter(None, environ.get(WITHOUT, "").split(",")):
        _switch_off(switch)
    if said := environ.get(KILL):
        point, _, count = said.rpartition(":")
        _kill_at(point, int(count))


# --- points ------------------------------------------------------------------------------------------------


def _kill_at(point: str, count: int) -> None:
    passed = 0

    def pass_by() -> None:
        nonlocal passed
        passed += 1
        if passed >= count:
            os.kill(os.getpid(), signal.SIGKILL)

    if point == "after load":
        _after(ProfileStore, "load", pass_by)
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
        _after(ProfileStore, "commit", pass_by, only=lambda store, p, epoch, number, step: bool(step.outbox))
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
        raise ValueError(f"{KILL}: expected one of {', '.join(POINTS)}, got {point!r}")


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


# --- switches ----------------------------------------------------------------------------------------------


def _switch_off(switch: str) -> None:
    if switch in CHECKS:
        _strike_out(CHECKS[switch])
    if switch == "fence":

        async def current(log: Log) -> bool:
            return True

        _replace(Log, "generation_is_current", current)
    elif switch == "outbox":
        commit = ProfileStore.commit

        async def forgetful(store: ProfileStore, p: int, epoch: int, number: int, step: Commit) -> int | None:
            step.outbox = ()
            return await commit(store, p, epoch, number, step)

        _replace(ProfileStore, "commit", forgetful)
    elif switch == "hold":
        for owner, name in ((ProfileStore, "commit"), (Publisher, "publish")):
            _replace(owner, name, _believing(getattr(owner, name)))
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


def _strike_out(line: str) -> None:
    read = profile_store.script_text

    def without(name: str) -> str:
        text = read(name)
        if name != "commit.lua":
            return text
        if text.count(line) != 1:
            raise ValueError(f"commit.lua: expected one line {line!r}, got {text.count(line)}")
        return text.replace(line, "if false then")

    profile_store.script_text = without


if __name__ == "__main__":
    arrange(os.environ)
    from stream_app.__main__ import main

    sys.exit(main())
