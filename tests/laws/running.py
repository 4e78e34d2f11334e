"""Runs the core over a whole log as a worker would, in slices, and compares what it says with the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from stream_app.core.decay import Weights
from stream_app.core.event import Record
from stream_app.core.fold import Fold
from stream_app.core.profile import Profile, pack, unpack
from stream_app.core.segment_set import SegmentSet
from stream_app.core.step import fold_slice
from stream_app.core.transition import Transition
from tests.oracle import Clock, OracleProfile, OracleTransition
from tests.random_logs import RandomLog, core_records, core_segments, core_weights

WHOLE = 10**9


class OfUser(Protocol):
    @property
    def user_id(self) -> str: ...


A = TypeVar("A", bound=OfUser)


@dataclass(slots=True)
class Run:
    """A partition's profiles and everything that was said."""

    fold: Fold
    clock: Clock
    profiles: dict[str, Profile] = field(default_factory=dict)
    transitions: list[Transition] = field(default_factory=list)
    stream_time_ms: int | None = None

    def slice(self, records: Sequence[Record], *, stored: bool = False) -> None:
        """Fold one slice; with `stored`, every profile goes through its bytes before and after."""
        users = {record.event.user_id for record in records}
        profiles = {user: self.profiles[user] for user in users if user in self.profiles}
        if stored:
            profiles = {user: unpack(user, pack(profile)) for user, profile in profiles.items()}
        result = fold_slice(self.fold, records, profiles, self.stream_time_ms, self.clock, {})
        changed = result.profiles
        if stored:
            changed = {user: unpack(user, pack(profile)) for user, profile in changed.items()}
        self.profiles.update(changed)
        self.transitions += result.transitions
        self.stream_time_ms = result.stream_time_ms

    def expire_due(self, until_ms: int | None = None) -> None:
        """Do what the due timer does: let exits due by `until_ms` (None: the stream time) happen."""
        until_ms = self.stream_time_ms if until_ms is None else until_ms
        if until_ms is None:
            return
        for profile in self.profiles.values():
            next_exit_ms = profile.next_exit_ms
            if next_exit_ms is not None and next_exit_ms <= until_ms:
                self.transitions += self.fold.expire(profile, until_ms)


def run(
    log: RandomLog,
    batch: int = 500,
    *,
    expire_every: int | None = None,
    stored: bool = False,
    after_slice: Callable[[Run], None] | None = None,
) -> Run:
    """Fold the log in slices of `batch` records, then let everybody due at the final stream time leave.

    `expire_every` slices the due timer fires (None: only at the end); with `stored` profiles go through their
    bytes between slices; `after_slice` may change what is stored.
    """
    return run_records(
        core_records(log.records),
        core_segments(log.segments, log.weights),
        core_weights(log.weights),
        log.clock,
        batch,
        expire_every=expire_every,
        stored=stored,
        after_slice=after_slice,
    )


def run_records(
    records: Sequence[Record],
    segments: SegmentSet,
    weights: Weights,
    clock: Clock,
    batch: int = 500,
    *,
    expire_every: int | None = None,
    stored: bool = False,
    after_slice: Callable[[Run], None] | None = None,
) -> Run:
    """Do what `run` does, from the core's own types."""
    state = Run(Fold(segments, weights), clock)
    for n, start in enumerate(range(0, len(records), batch)):
        state.slice(records[start : start + batch], stored=stored)
        if expire_every is not None and n % expire_every == 0:
            state.expire_due()
        if after_slice is not None:
            after_slice(state)
    state.expire_due()
    return state


def by_user(transitions: Iterable[A]) -> dict[str, list[A]]:
    """Return each user's log in order."""
    users: dict[str, list[A]] = {}
    for transition in transitions:
        users.setdefault(transition.user_id, []).append(transition)
    return users


@dataclass(slots=True)
class Agreement:
    """How many transitions were compared, and how many of their instants were rounded the other way."""

    compared: int = 0
    rounded_otherwise: int = 0


def compare(expected: Sequence[OracleTransition], got: Sequence[Transition], where: str) -> Agreement:
    """Assert that each user's log is the oracle's: ids, times to 1 ms, weights to 1e-9 relative."""
    agreement = Agreement()
    expected_of, got_of = by_user(expected), by_user(got)
    assert expected_of.keys() == got_of.keys(), where
    for user, theirs in expected_of.items():
        for n, (want, have) in enumerate(zip(theirs, got_of[user], strict=False)):
            wrong = _differences(want, have)
            assert wrong == [], f"{where}, user {user!r}, transition {n}:\nexpected {want}\ngot      {have}"
            agreement.compared += 1
            agreement.rounded_otherwise += (want.time_ms, want.exits_at_ms) != (
                have.time_ms,
                have.exits_at_ms,
            )
        assert len(theirs) == len(got_of[user]), f"{where}, user {user!r}: missing or extra at the end"
    return agreement


def _differences(want: OracleTransition, have: Transition) -> list[str]:
    """Return the fields that differ by more than the rounding of an instant explains."""
    exact = ("segment_id", "status", "cause", "seq", "min_weight", "event_id", "offset")
    wrong = [name for name in exact if getattr(want, name) != getattr(have, name)]
    if abs(want.time_ms - have.time_ms) > 1:
        wrong.append("time_ms")
    if want.exits_at_ms is None or have.exits_at_ms is None:
        if want.exits_at_ms is not have.exits_at_ms:
            wrong.append("exits_at_ms")
    elif abs(want.exits_at_ms - have.exits_at_ms) > 1:
        wrong.append("exits_at_ms")
    if want.time_ms == have.time_ms:
        if want.id != have.id:
            wrong.append("id")
        if not math.isclose(want.weight, have.weight, rel_tol=1e-9, abs_tol=1e-100):
            wrong.append("weight")
    return wrong


def compare_profiles(
    expected: dict[str, OracleProfile], state: Run, where: str, at_ms: int | None = None
) -> None:
    """Assert that every user's weights (to 1e-9 relative), memberships and counts are the oracle's.

    Weights are compared at `at_ms`, the instant that the oracle's are for; None means the stream time.
    """
    assert expected.keys() == state.profiles.keys(), where
    at_ms = state.stream_time_ms if at_ms is None else at_ms
    assert at_ms is not None
    for user, want in expected.items():
        profile = state.profiles[user]
        context = f"{where}, user {user!r}"
        weights = stored_weights(profile, state.fold.weights, at_ms)
        assert weights.keys() == want.weights.keys(), context
        for key, weight in want.weights.items():
            assert math.isclose(weights[key], weight, rel_tol=1e-9, abs_tol=1e-100), f"{context}, {key}"
        assert profile.exits_at_ms.keys() == want.exits_at_ms.keys(), context
        assert profile.applied == want.applied, context
        assert {s: seq for s, seq in profile.seqs.items() if seq > 0} == want.seqs, context
        assert abs(profile.forget_ms - want.forget_ms) <= 1, context


def stored_weights(profile: Profile, weights: Weights, at_ms: int) -> dict[tuple[str, str, str], float]:
    """Return every stored sum decayed to `at_ms`, by (event type, kind, name)."""
    found: dict[tuple[str, str, str], float] = {}
    for event_type, sums in profile.weights.items():
        left = 2.0 ** ((profile.landmark_ms - at_ms) / weights.half_life_ms(event_type))
        found[event_type, "type", ""] = sums.total * left
        found |= {(event_type, "label", label): stored * left for label, stored in sums.labels.items()}
        found |= {(event_type, "asset", asset): stored * left for asset, stored in sums.assets.items()}
    return found
