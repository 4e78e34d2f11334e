"""Whether a contestant does the work at all: what it has published, beside the naive oracle's verdict.

The service must have said every transition exactly, exits by decay at their own instant included. The others
have no timers: where a user's weight falls below a threshold between two events, the oracle's exit is
expected with the user's next event, and not at all where none comes. Entering they must say exactly.
"""

from __future__ import annotations

import asyncio
import bisect
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.backends import Names, read_to_end
from tests.bench.workload import weights_settings
from tests.e2e.proof import Case, prove
from tests.oracle import OracleRecord, OracleTransition, oracle_transitions, records_by_partition

SHOWN: Final = 3
#: Contestants add weights up in different orders.
RELATIVE: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a check found; `problem` is empty when all is well."""

    events: int
    entered: int
    exited: int
    problem: str = ""


#: What one transition is known by: user, segment, number, status, instant.
Key = tuple[str, str, int, str, int]


class Judge:
    """Judges all contestants over one topic; what is expected of them is worked out once.

    Parameters
    ----------
    bootstrap, events_topic
        The log that they all read.
    tables
        The definitions, as the tables of segments.toml.
    """

    def __init__(self, bootstrap: str, events_topic: str, tables: Sequence[Mapping[str, Any]]) -> None:
        self._bootstrap = bootstrap
        self._tables = tables
        log = asyncio.run(read_to_end(bootstrap, events_topic))
        self.events = len(log)
        self._lazy: dict[Key, float] = {}
        for records in records_by_partition(log).values():
            said = oracle_transitions(records, tables, weights_settings(), "event")
            self._lazy |= lazy(records, said)

    def exactly(self, names: Names, redis_url: str) -> Judgement:
        """Judge the service: every transition, what its consumers read of it, and what Redis holds."""
        proof = prove(Case(self._bootstrap, redis_url, names, self._tables, weights_settings(), "event"))
        counts: dict[str, int] = defaultdict(int)
        for cause, count in proof.causes.items():
            counts[cause.split()[0]] += count
        problem = ""
        try:
            proof.holds()
        except AssertionError as exc:
            problem = str(exc)
        if proof.repeats:
            problem = problem or f"{proof.repeats} transitions were said twice, though nothing failed"
        return Judgement(proof.events, counts["entered"], counts["exited"], problem)

    def lazily(self, entered: str, exited: str) -> Judgement:
        """Judge a contestant without timers by what it published to these two topics."""
        said: dict[Key, float] = {}
        problems = []
        for record in asyncio.run(read_to_end(self._bootstrap, entered, exited)):
            message = json.loads(record.value)
            status = "entered" if record.topic == entered else "exited"
            key = (message["user_id"], message["segment_id"], message["seq"], status, message["time"])
            if record.key.decode() != message["user_id"] or message["status"] != status:
                problems.append(f"key or topic does not fit {message}")
            if key in said:
                problems.append(f"said twice: {message}")
            said[key] = message["weight"]
        missing, extra = self._lazy.keys() - said.keys(), said.keys() - self._lazy.keys()
        problems += [f"expected {key}, got none" for key in sorted(missing)[:SHOWN]]
        problems += [f"expected none, got {key}" for key in sorted(extra)[:SHOWN]]
        problems += [
            f"{key}: expected weight {self._lazy[key]}, got {said[key]}"
            for key in sorted(self._lazy.keys() & said.keys())
            if key[3] == "entered" and not math.isclose(self._lazy[key], said[key], rel_tol=RELATIVE)
        ][:SHOWN]
        found = [key[3] for key in said]
        problem = ""
        if problems:
            problem = (
                f"of {len(self._lazy)} transitions {len(missing)} are missing, {len(extra)} too many: "
                + "; ".join(problems)
            )
        return Judgement(self.events, found.count("entered"), found.count("exited"), problem)


def lazy(records: Sequence[OracleRecord], said: Sequence[OracleTransition]) -> dict[Key, float]:
    """Return what a contestant without timers must say of one partition's log, with its weight.

    Examples
    --------
    >>> record = OracleRecord(0, 0, "u1", "view", 1000, "e1", ("tea",))
    >>> out = OracleTransition("", "u1", "s", "exited", "decay", 2, 900, 0.5, 1.0, None, None, None)
    >>> lazy([record], [out])
    {('u1', 's', 2, 'exited', 1000): 0.5}
    >>> lazy([], [out])
    {}
    """
    times_ms: dict[str, list[int]] = defaultdict(list)
    for record in records:
        times_ms[record.user_id].append(record.event_time_ms)
    expected: dict[Key, float] = {}
    for transition in said:
        at_ms = transition.time_ms
        if transition.status == "exited":
            own = times_ms[transition.user_id]
            place = bisect.bisect_left(own, at_ms)
            if place == len(own):
                continue
            at_ms = own[place]
        key = (transition.user_id, transition.segment_id, transition.seq, transition.status, at_ms)
        expected[key] = transition.weight
    return expected
