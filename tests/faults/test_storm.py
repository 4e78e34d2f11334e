"""Three workers that come and go in a storm: started, ended, killed, frozen and thawed, in seeded order."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from tests.e2e.proof import prove
from tests.faults.faulty import Point, Switch
from tests.faults.rows import Row, seed
from tests.faults.stage import FaultStage, fault_log
from tests.faults.test_worker_killed import KILLED
from tests.processes import Program

pytestmark = pytest.mark.faults

WORKERS = 3
#: As long as a frozen or killed worker keeps its partitions.
SESSION_TIMEOUT_S = 1.5
PARTITIONS = 6
#: How often every partition is to change hands.
CHANGES = 3
#: Records that are appended at once, and how long after one portion the next: about what is folded meanwhile.
PORTION, PAUSE_S = 60, 0.2
RECORDS = 30_000
#: With so many records to fold, no more are appended.
MOST_WAITING = 600
#: How long the group may take over something that happened before the next thing does.
SETTLE_S = 10.0
HOLD_DEADLINE_S = 20.0
SELF_KILLED = "SIGKILL before a publication"
GAVE_UP = "gave up waiting for the group"
MOST_GIVING_UP = 6


@dataclass(slots=True)
class Storm:
    """What happens to the workers of a stage, and what came of it."""

    stage: FaultStage
    rng: random.Random
    without: Sequence[Switch] = ()
    workers: list[Program] = field(default_factory=list)
    frozen: list[Program] = field(default_factory=list)
    leaving: list[Program] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)
    owners: dict[int, list[str]] = field(default_factory=lambda: {p: [] for p in range(PARTITIONS)})
    log: list[tuple[bytes, bytes]] = field(default_factory=lambda: list(fault_log(seed(), RECORDS)))
    sent: int = 0
    fed_s: float = 0.0

    def changes(self) -> list[int]:
        """How often each partition has had another owner than before."""
        return [max(0, len(owners) - 1) for owners in self.owners.values()]

    def look(self) -> dict[int, int]:
        """Note who owns what, feed the log as it is folded, and return the epochs."""
        epochs, folded = {}, 0
        for partition, owners in self.owners.items():
            wm = self.stage.wm(partition)
            epochs[partition] = int(wm.get("epoch", 0))
            folded += int(wm.get("watermark", 0))
            if "owner" in wm and owners[-1:] != [wm["owner"]]:
                owners.append(wm["owner"])
        if time.monotonic() - self.fed_s > PAUSE_S and self.sent - folded < MOST_WAITING:
            self.sent += self.stage.append(self.log[self.sent : self.sent + PORTION])
            self.fed_s = time.monotonic()
        return epochs

    def settle(self) -> None:
        """Let every partition be claimed anew; what struck a worker that had none yet changes nothing."""
        before = self.look()
        deadline_s = time.monotonic() + SETTLE_S
        while any(epoch <= before[partition] for partition, epoch in self.look().items()):
            if time.monotonic() > deadline_s:
                return
            time.sleep(0.05)

    def bury(self) -> None:
        """Forget the workers that have ended by themselves, as they were told to or for want of a group."""
        for worker in [worker for worker in self.workers if not worker.is_running]:
            self.workers.remove(worker)
            status = worker.wait(1)
            assert status == KILLED or gave_up(worker), worker.log
            self.happened[SELF_KILLED if status == KILLED else GAVE_UP] += 1

    def strike(self) -> None:
        """Let one thing happen to one worker."""
        self.bury()
        awake = [worker for worker in self.workers if worker not in self.frozen]
        possible = ["start"] * 2 if len(self.workers) < WORKERS else []
        if len(awake) > 1:
            possible += ["SIGTERM", "SIGKILL", "SIGSTOP"]
        if self.frozen:
            possible += ["SIGCONT"] * 2
        what = "start" if not awake else self.rng.choice(possible)
        self.happened[what] += 1
        if what == "start":
            # Every other one kills itself where most could be lost.
            kills: list[tuple[Point, int] | None] = [("after commit", self.rng.randint(2, 6)), None]
            # The control has to come to it soon.
            kill = kills[0] if self.without else self.rng.choice(kills)
            self.workers.append(self.stage.start_faulty("worker", kill=kill, without=self.without))
        elif what == "SIGCONT":
            self.frozen.pop(0).resume()
        else:
            worker = self.rng.choice(awake)
            if what == "SIGSTOP":
                worker.pause()
                self.frozen.append(worker)
                return
            self.workers.remove(worker)
            if what == "SIGKILL":
                worker.kill()
            else:
                worker.terminate()
                self.leaving.append(worker)

    def rage(self, changes: int, wanted: Sequence[str]) -> None:
        """Strike until every partition has changed hands so often and all that is wanted has happened."""
        deadline_s = time.monotonic() + 400
        while min(self.changes()) < changes or not all(self.happened[what] for what in wanted):
            assert time.monotonic() < deadline_s, f"{self.changes()}, {self.happened}"
            self.strike()
            # Some things happen while the group is still busy with what happened before.
            if self.rng.random() < 0.7:
                self.settle()
        for worker in self.frozen:
            worker.resume()
        self.frozen.clear()
        assert self.sent < len(self.log), "the log was at its end before the storm was"

    def calm(self) -> None:
        """Let those who are left, and one that is new, do what is left; then end them."""
        while (last := self.stage.start("worker", "--until-end")).wait(150):
            assert gave_up(last), last.log
            self.happened[GAVE_UP] += 1
            assert self.happened[GAVE_UP] < MOST_GIVING_UP, "the group is not given back to anybody"
        self.bury()
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers + self.leaving:
            # Some had not begun, some were about to kill themselves.
            assert worker.wait(60) in (0, -signal.SIGTERM, KILLED) or gave_up(worker), worker.log


def gave_up(worker: Program) -> bool:
    """Whether a worker ended because its group gave it nothing; a supervisor would start it again.

    The embedded broker does so now and then, when members leave while others join.
    """
    return worker.wait(1) == 1 and "no assignment within" in worker.log.splitlines()[-1]


@pytest.mark.usefixtures("patience")
def test_workers_in_a_storm_lose_nothing(
    kafka_bootstrap: str,
    fresh_redis: str,
    stage_on: Callable[..., FaultStage],
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "three workers joining, ending, killed, frozen and thawed in a storm",
        "every partition changes hands again and again; nothing lost, nothing twice, in order",
    )

    def storm(seed_of_it: int, changes: int, wanted: Sequence[str], without: Sequence[Switch] = ()) -> Storm:
        stage = stage_on(
            kafka_bootstrap,
            fresh_redis,
            partitions=PARTITIONS,
            kafka__session_timeout_s=SESSION_TIMEOUT_S,
            worker__hold_deadline_s=HOLD_DEADLINE_S,
        )
        stage.flush()
        made = Storm(stage, random.Random(seed_of_it), without)
        made.rage(changes, wanted)
        made.calm()
        return made

    began_s = time.monotonic()
    real = storm(seed(), CHANGES, ("SIGTERM", "SIGKILL", "SIGSTOP", "SIGCONT", SELF_KILLED))
    row.judge(prove(real.stage.case))
    hands = real.changes()
    row.note(
        f"in {time.monotonic() - began_s:.0f} s each partition changed hands {min(hands)} to {max(hands)} "
        f"times: {dict(real.happened)}"
    )

    control = storm(seed() + 1, 0, (SELF_KILLED,), without=("outbox",))
    row.control("outbox off", prove(control.stage.case))
