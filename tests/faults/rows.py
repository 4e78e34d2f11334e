"""The rows of the fault table: what a scenario promises, what was counted, and that its control can fail.

A test that is a row takes the fixture ``fault_row``::

    def test_...(stage, fault_row):
        row = fault_row("worker killed after the commit, before the publication", "nothing lost, ids stable")
        ...
        row.judge(prove(stage.case))            # counts, and fails unless all is zero
        ...                                     # the same again with a protection switched off
        row.control("outbox off", prove(stage.case))   # fails unless that reports a loss or a duplicate
        row.note("exited 1 after 4.1 s")        # a measured fact to be read in the table

A row is written when its test passes, fails or is skipped, with that outcome. `tests.faults.table` makes the
page of them. ``FAULT_ROWS`` names the file that a run writes them to; without it nothing is written.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from tests.e2e.proof import Proof

FIRST_SEED: Final = 20_261_122


def seed() -> int:
    """Return the seed of this run: ``FAULT_SEED``, else one that is always the same."""
    return int(os.environ.get("FAULT_SEED", FIRST_SEED))


@dataclass(slots=True)
class Row:
    """One scenario of the table; see the module.

    Attributes
    ----------
    runs, events, transitions, dead_letters : int
        What was judged, over all runs of the row.
    lost, duplicated, out_of_order, wrong : int
        What the judge found: said by the oracle and not by the service; said by the service and not by the
        oracle, after dropping repeats of an id; not in the order of first sightings; with another content,
        or state that differs in Redis.
    repeats, replayed : int
        Messages that came again with their id; messages that said so of themselves.
    controls : list of str
        What was switched off and what the judge then found.
    notes : list of str
        What was measured beside.
    """

    scenario: str
    guarantee: str
    test: str = ""
    outcome: str = "not run"
    runs: int = 0
    events: int = 0
    transitions: int = 0
    dead_letters: int = 0
    lost: int = 0
    duplicated: int = 0
    out_of_order: int = 0
    wrong: int = 0
    repeats: int = 0
    replayed: int = 0
    controls: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def judge(self, proof: Proof) -> Proof:
        """Count what a run came to; fail unless nothing is lost, duplicated, out of order or wrong."""
        self.runs += 1
        self.events += proof.events
        self.transitions += proof.transitions
        self.dead_letters += proof.dead_letters
        self.lost += len(proof.missing)
        self.duplicated += len(proof.extra)
        self.out_of_order += len(proof.out_of_order)
        self.wrong += len(proof.wrong) + len(proof.state)
        self.repeats += proof.repeats
        self.replayed += proof.replayed
        print(f"{self.scenario}: {proof}")
        proof.holds()
        return proof

    def control(self, switched_off: str, proof: Proof) -> None:
        """Note what the judge found without a protection; fail unless it found a loss or a duplicate."""
        found = {
            "lost": len(proof.missing),
            "duplicated": len(proof.extra),
            "out of order": len(proof.out_of_order),
            "wrong": len(proof.wrong) + len(proof.state),
        }
        said = ", ".join(f"{count} {name}" for name, count in found.items() if count)
        if proof.unfolded:
            said += f" ({proof.unfolded} records left unfolded)"
        print(f"{self.scenario}, control, {switched_off}: {proof}")
        assert said, (
            f"{self.scenario}: with {switched_off} nothing was found: the run proves nothing\n{proof}"
        )
        self.controls.append(f"{switched_off}: {said}")

    def note(self, fact: str) -> None:
        """Add a measured fact."""
        self.notes.append(fact)


def write(rows: list[Row], failed: list[str], servers: str, seconds: float) -> None:
    """Write the rows of a run to the file that the environment names, if it names one."""
    path = os.environ.get("FAULT_ROWS")
    if not path:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    said = {
        "servers": servers,
        "date": datetime.now(UTC).date().isoformat(),
        "seed": seed(),
        "seconds": round(seconds),
        "failed": failed,
        "rows": [asdict(row) for row in rows],
    }
    Path(path).write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n")
