"""What must hold for discovery segments whatever the scores say: they touch no base segment, and a slow plain
judge of who is in agrees.

Scores are drawn at random: they are what the fold of discovery segments is given, good or bad.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec import structs

from stream_app.core.decay import EventTypeWeight, Weights
from stream_app.core.discovery import DiscoveryRules, discover
from stream_app.core.event import Event
from stream_app.core.fold import Fold
from stream_app.core.profile import Profile, pack, unpack
from stream_app.core.scores import Recommendation
from stream_app.core.segment import Segment
from stream_app.core.segment_set import SegmentSet
from stream_app.core.step import fold_slice
from stream_app.core.transition import Transition, transition_id
from tests.laws.running import WHOLE, by_user
from tests.random_logs import (
    SHAPES,
    RandomLog,
    asset_name,
    core_records,
    core_segments,
    core_weights,
    label_name,
    random_log,
    type_name,
)

SEED = 11
T = 1_700_000_000_000
# A fast log, one of long sums, two that forget a lot, one with more names than a profile may hold.
SOME = ["seconds-event", "mixed-wall", "high-floor-event", "minutes-wall", "caps-event"]


def labels_of(profile: Profile) -> set[str]:
    """Return what the user has engaged: the labels that have a key."""
    return {label for sums in profile.weights.values() for label in sums.labels}


# Base segments do not see the model


@dataclass(frozen=True, slots=True)
class Scores:
    """Random scorings between the slices, and when."""

    rng: random.Random
    max_age_ms: int
    share: float  # of a slice's users; the worker scores all, but nothing may hang on that

    def recommendations(self, profile: Profile) -> list[Recommendation]:
        rng = self.rng
        return [
            Recommendation(
                type_name(rng.randrange(4)),
                rng.choice([None, asset_name(rng.randrange(6))]),
                tuple(label_name(n) for n in rng.sample(range(8), rng.randint(1, 3))),
                rng.random() ** 2,
                rng.random(),
            )
            for _ in range(rng.randint(0, 5))
        ]


@dataclass(slots=True)
class Outcome:
    """What a log left behind and said; `base` in its order."""

    profiles: dict[str, Profile] = field(default_factory=dict)
    base: list[Transition] = field(default_factory=list)
    discovery: list[Transition] = field(default_factory=list)
    renewed: int = 0

    def say(self, transitions: Iterable[Transition]) -> None:
        for transition in transitions:
            (self.base if transition.segment_type == "base" else self.discovery).append(transition)

    def base_parts(self) -> dict[str, Profile]:
        """Return the profiles without what the model adds."""
        return {
            user: structs.replace(profile, seen_ms={}, discovery={})
            for user, profile in self.profiles.items()
        }


def with_discovery(log: RandomLog) -> list[dict[str, Any]]:
    """Return the log's definitions and discovery segments beside them, which exclude some of them."""
    rng = random.Random(log.name)
    base = [segment["id"] for segment in log.segments if segment.get("type") != "discovery"]
    made: list[dict[str, Any]] = [{"id": "next-of-any", "type": "discovery", "event_types": [type_name(0)]}]
    for n in range(12):
        segment: dict[str, Any] = {"id": f"next-{n}", "type": "discovery"}
        criteria = rng.choice(["labels", "labels", "asset_ids", "event_types", "all"])
        if criteria in ("labels", "all"):
            segment["labels"] = [label_name(i) for i in rng.sample(range(8), rng.randint(1, 2))]
        if criteria in ("asset_ids", "all"):
            segment["asset_ids"] = [asset_name(i) for i in rng.sample(range(6), 3)]
        if criteria in ("event_types", "all"):
            segment["event_types"] = [type_name(i) for i in rng.sample(range(4), 2)]
        segment["min_weight"] = rng.choice([0, 0.05, 0.2, 0.5])
        if rng.random() < 0.5:
            segment["exclude"] = rng.sample(base, rng.randint(1, 3))
        made.append(segment)
    return [*log.segments, *made]


@functools.cache
def some_log(shape: str) -> RandomLog:
    log = random_log(shape, SEED)
    return dataclasses.replace(log, records=log.records[:1600], segments=with_discovery(log))


def folded(
    log: RandomLog,
    cuts: Sequence[int],
    *,
    scores: Scores | None,
    after_slice: Callable[[Outcome, int], None] | None = None,
) -> Outcome:
    """Fold a log in slices of the given lengths; with scores as a worker does whose model is on."""
    segments, weights = core_segments(log.segments, log.weights), core_weights(log.weights)
    fold, rules = Fold(segments, weights, keeps_seen=scores is not None), DiscoveryRules(segments)
    records = core_records(log.records)
    outcome = Outcome()
    stream_time_ms: int | None = None
    start = 0
    for n, length in enumerate(cuts):
        part = records[start : start + length]
        start += length
        result = fold_slice(fold, part, outcome.profiles, stream_time_ms, log.clock, {})
        outcome.say(result.transitions)
        stream_time_ms = result.stream_time_ms
        if scores is not None and stream_time_ms is not None:
            for user in dict.fromkeys(one.record.event.user_id for one in result.applied):
                if scores.rng.random() < scores.share:
                    profile = outcome.profiles[user]
                    before = profile.memberships
                    found = discover(
                        profile,
                        scores.recommendations(profile),
                        rules,
                        stream_time_ms,
                        max_age_ms=scores.max_age_ms,
                    )
                    moved = {t.segment_id for t in found}
                    outcome.renewed += sum(
                        profile.memberships[s] != lease_ms for s, lease_ms in before.items() if s not in moved
                    )
                    outcome.say(found)
                    outcome.profiles[user] = unpack(user, pack(profile))
        if after_slice is not None and stream_time_ms is not None:
            after_slice(outcome, stream_time_ms)
        if n % 3 == 0 and stream_time_ms is not None:
            expire_due(fold, outcome, stream_time_ms)
    assert start >= len(records)
    assert stream_time_ms is not None
    expire_due(fold, outcome, stream_time_ms)
    return outcome


def expire_due(fold: Fold, outcome: Outcome, until_ms: int) -> None:
    for profile in outcome.profiles.values():
        due_ms = profile.next_exit_ms
        if due_ms is not None and due_ms <= until_ms:
            outcome.say(fold.expire(profile, until_ms))


@functools.cache
def without_a_model(shape: str) -> Outcome:
    """Return what the log says in one slice with the model off, not to be changed."""
    return folded(some_log(shape), [WHOLE], scores=None)


def random_cuts(rng: random.Random, records: int, longest: int) -> list[int]:
    cuts: list[int] = []
    while sum(cuts) < records:
        cuts.append(rng.choice([0, 1, 1, 2, rng.randint(1, longest)]))
    return cuts


@pytest.mark.parametrize("longest", [1, 8, 200])
@pytest.mark.parametrize("shape", SOME)
def test_base_segments_are_the_same_with_the_model_on_or_off_at_any_slices(shape: str, longest: int) -> None:
    log = some_log(shape)
    rng = random.Random(f"{SEED}/{shape}/{longest}")
    cuts = random_cuts(rng, len(log.records), longest)
    max_age_ms = SHAPES[shape].step_ms * rng.choice([100, 1_000, 10_000])
    on = folded(log, cuts, scores=Scores(rng, max_age_ms, share=0.8))
    off, whole = folded(log, cuts, scores=None), without_a_model(shape)
    where = f"{log.name}, seed {SEED}, slices of up to {longest}, {max_age_ms} ms"
    assert on.base == off.base, where
    assert by_user(on.base) == by_user(whole.base), where
    assert on.base_parts() == off.base_parts() == whole.base_parts() == whole.profiles, where
    assert off.discovery == [], where
    # Enough of everything happened: exclusion both ways is in the definitions.
    counts = {
        "enter": sum(t.status == "entered" for t in on.discovery),
        "convert": sum(t.converted is True for t in on.discovery),
        "model": sum(t.converted is False for t in on.discovery),
        "renewed": on.renewed,
        "base": len(on.base),
    }
    assert min(counts.values()) > 5, f"{where}: {counts} are too few to prove anything"


@pytest.mark.parametrize("shape", ["seconds-event", "minutes-wall", "high-floor-event"])
def test_the_logs_forget_users_who_were_in_discovery_segments(shape: str) -> None:
    # Else the law above would not say that a membership of this kind keeps no profile from being forgotten.
    log = some_log(shape)
    forgotten = 0
    last: dict[str, tuple[int, bool]] = {}

    def look(outcome: Outcome, _: int) -> None:
        nonlocal forgotten
        for user, profile in outcome.profiles.items():
            applied, known = last.get(user, (0, False))
            forgotten += known and profile.applied < applied
            last[user] = profile.applied, bool(profile.discovery)

    folded(log, [1] * len(log.records), scores=Scores(random.Random(SEED), 10**7, 1.0), after_slice=look)
    assert forgotten > 10, log.name


@pytest.mark.parametrize("shape", SOME)
def test_a_forgotten_user_with_a_past_in_discovery_may_be_removed_at_any_time(shape: str) -> None:
    log = some_log(shape)
    rng = random.Random(SEED)
    removed = 0

    def remove(outcome: Outcome, stream_time_ms: int) -> None:
        nonlocal removed
        for user, profile in list(outcome.profiles.items()):
            if stream_time_ms > profile.forget_ms and not profile.memberships and rng.random() < 0.3:
                removed += bool(profile.discovery)
                del outcome.profiles[user]

    cuts = random_cuts(rng, len(log.records), 20)
    on = folded(log, cuts, scores=Scores(rng, SHAPES[shape].step_ms * 300, 1.0), after_slice=remove)
    assert by_user(on.base) == by_user(without_a_model(shape).base), log.name
    assert removed > 10 or shape in ("caps-event", "mixed-wall"), f"{log.name} has too few to prove anything"


@pytest.mark.parametrize("shape", SOME)
def test_other_definitions_on_the_way_change_base_segments_in_the_same_way(shape: str) -> None:
    log = some_log(shape)
    rng = random.Random(f"{SEED}/{shape}/definitions")
    weights = core_weights(log.weights)
    excluded = {other for segment in log.segments for other in segment.get("exclude", ())}
    sets = [core_segments(log.segments, log.weights)]
    for _ in range(3):  # each loses some of either kind, and some base segments become discovery segments
        kept = [dict(s) for s in log.segments if s["id"] in excluded or rng.random() < 0.7]
        for segment in kept:
            if segment["id"] not in excluded and rng.random() < 0.4:
                segment["type"] = "base" if segment.get("type") == "discovery" else "discovery"
        sets.append(core_segments(kept, log.weights))
    outcomes = [Outcome(), Outcome()]
    records = core_records(log.records)
    stream_time_ms: int | None = None
    for n, start in enumerate(range(0, len(records), 50)):
        now, old = sets[n // 12 % len(sets)], sets[(n // 12 - 1) % len(sets)]
        before_ms = stream_time_ms
        for on, outcome in zip((False, True), outcomes, strict=True):
            fold = Fold(now, weights, keeps_seen=on)
            if n % 12 == 0 and before_ms is not None:
                for profile in outcome.profiles.values():
                    outcome.say(fold.redefine(profile, before_ms, old))
            part = records[start : start + 50]
            result = fold_slice(fold, part, outcome.profiles, before_ms, log.clock, {})
            outcome.say(result.transitions)
            stream_time_ms = result.stream_time_ms
            if on and stream_time_ms is not None:
                scores = Scores(rng, SHAPES[shape].step_ms * 1_000, 1.0)
                for profile in result.profiles.values():
                    tips = scores.recommendations(profile)
                    outcome.say(
                        discover(profile, tips, DiscoveryRules(now), stream_time_ms, max_age_ms=10**7)
                    )
            if stream_time_ms is not None:
                expire_due(fold, outcome, stream_time_ms)
    off, on_ = outcomes
    # A segment that was a discovery segment goes on counting, so its numbers hang on what it was.
    sometimes = {segment.id for one in sets for segment in one.segments if segment.type == "discovery"}
    for outcome in outcomes:
        for profile in outcome.profiles.values():
            profile.seqs = {s: seq for s, seq in profile.seqs.items() if s not in sometimes}
        outcome.base = [
            structs.replace(t, seq=t.seq % 2, id="") if t.segment_id in sometimes else t for t in outcome.base
        ]
    assert on_.base == off.base, f"{log.name}, seed {SEED}"
    assert on_.base_parts() == off.base_parts(), f"{log.name}, seed {SEED}"
    assert sum(t.cause == "definition" for t in on_.discovery) > 3
    assert sum(t.cause == "definition" for t in on_.base) > 3


# What was engaged


@pytest.mark.parametrize("shape", SHAPES)
def test_engagements_are_noted_of_exactly_the_labels_that_have_a_key(shape: str) -> None:
    log = random_log(shape, SEED)
    weights = core_weights(log.weights)
    fold = Fold(core_segments(log.segments, log.weights), weights, keeps_seen=True)
    profiles: dict[str, Profile] = {}
    expected: dict[str, list[str]] = {}
    stream_time_ms: int | None = None
    dropped = 0
    for record in core_records(log.records[:3000]):
        event = record.event
        result = fold_slice(fold, [record], profiles, stream_time_ms, log.clock, {})
        stream_time_ms = result.stream_time_ms
        assert stream_time_ms is not None
        if event.user_id not in result.profiles:
            continue
        profile = result.profiles[event.user_id]
        noted = [] if result.applied and result.applied[0].fresh else expected.get(event.user_id, [])
        if result.applied and weights.action_weight(event.event_type) > 0:
            noted = [label for label in noted if label not in event.labels] + list(event.labels)
        held = labels_of(profile)
        expected[event.user_id] = [label for label in noted if label in held]
        dropped += len(noted) - len(expected[event.user_id])
        assert list(profile.seen_ms) == expected[event.user_id], f"{log.name}, record {record.offset}"
        assert profile.seen_ms.keys() == held, f"{log.name}, record {record.offset}"
        assert all(instant_ms <= stream_time_ms for instant_ms in profile.seen_ms.values())
    if shape in ("caps-event", "high-floor-event", "high-floor-wall", "minutes-event"):
        assert dropped > 0, f"{log.name} drops too little to prove anything"


# Who is in: the judge


@dataclass(slots=True)
class Stay:
    """One membership of the judge's: never changed into another, only ended."""

    entered_ms: int
    lease_ms: int
    promised: tuple[str, ...]
    score: float
    left_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """What the judge expects to be published."""

    segment_id: str
    status: str
    cause: str
    seq: int
    time_ms: int
    weight: float
    exits_at_ms: int | None
    event_id: str | None
    converted: bool | None
    promised: tuple[str, ...] | None

    @classmethod
    def of(cls, t: Transition) -> Said:
        promised = None if t.prediction is None else t.prediction.labels
        return cls(
            t.segment_id,
            t.status,
            t.cause.value,
            t.seq,
            t.time_ms,
            t.weight,
            t.exits_at_ms,
            t.event_id,
            t.converted,
            promised,
        )


class Judge:
    """Who is in which discovery segment, of one user, by the documentation: slow and plain.

    It keeps every stay since the profile began and looks at all definitions at every step. What the fold of
    base segments says (memberships, the forget instant, that a profile began anew) is given.
    """

    def __init__(self, definitions: Sequence[Segment], max_age_ms: int) -> None:
        self.definitions = {s.id: s for s in definitions if s.type == "discovery"}
        self.max_age_ms = max_age_ms
        self.stays: dict[str, list[Stay]] = {}

    def present(self) -> dict[str, Stay]:
        return {s: stays[-1] for s, stays in self.stays.items() if stays and stays[-1].left_ms is None}

    def last_ms(self, segment_id: str) -> int:
        """Return the instant of the last transition in a segment: no later one is before it."""
        stays = self.stays.get(segment_id, [])
        if not stays:
            return 0
        left_ms = stays[-1].left_ms
        return stays[-1].entered_ms if left_ms is None else left_ms

    def leave(
        self, segment_id: str, at_ms: int, cause: str, weight: float, event_id: str | None = None
    ) -> Said:
        time_ms = max(at_ms, self.last_ms(segment_id))
        self.stays[segment_id][-1].left_ms = time_ms
        seq = 2 * len(self.stays[segment_id])
        return Said(
            segment_id, "exited", cause, seq, time_ms, weight, None, event_id, event_id is not None, None
        )

    def passes_time(self, until_ms: int) -> list[Said]:
        """A lease that has run out ends with cause model, at its end."""
        over = sorted((stay.lease_ms, s) for s, stay in self.present().items() if stay.lease_ms <= until_ms)
        said = [self.leave(s, lease_ms, "model", self.present()[s].score) for lease_ms, s in over]
        return sorted(said, key=lambda one: (one.time_ms, one.segment_id))

    def engages(self, event: Event, at_ms: int) -> list[Said]:
        """Who engages what he was promised leaves, converted, at the record's instant."""
        converting = sorted(s for s, stay in self.present().items() if set(stay.promised) & set(event.labels))
        return [self.leave(s, at_ms, "event", self.present()[s].score, event.event_id) for s in converting]

    def begins_anew(self) -> None:
        assert not self.present(), "no lease outlasts the profile"
        self.stays = {}

    def redefines(self, definitions: Sequence[Segment], at_ms: int) -> list[Said]:
        said = self.passes_time(at_ms)
        self.definitions = {s.id: s for s in definitions if s.type == "discovery"}
        gone = sorted(s for s in self.present() if s not in self.definitions)
        return said + [self.leave(s, at_ms, "definition", self.present()[s].score) for s in gone]

    def scores(
        self,
        at_ms: int,
        recommendations: Sequence[Recommendation],
        base: Iterable[str],
        forget_ms: int,
    ) -> list[Said]:
        exits, enters = [], []
        for segment_id, segment in sorted(self.definitions.items()):
            meeting = [r for r in recommendations if self.meets(r, segment)]
            best = max(meeting, key=lambda r: r.growth_weight, default=None)
            shut_out = any(other in base for other in segment.exclude)
            lease_ms = min(at_ms + self.max_age_ms, forget_ms)
            stay = self.present().get(segment_id)
            if stay is not None:
                exit_weight = segment.exit_weight
                if exit_weight is None:
                    exit_weight = 0.5 * segment.min_weight
                if best is None or best.growth_weight < exit_weight or shut_out:
                    weight = 0.0 if best is None else best.growth_weight
                    exits.append(self.leave(segment_id, at_ms, "model", weight))
                else:
                    stay.lease_ms = lease_ms
                    stay.promised, stay.score = best.labels, best.growth_weight
            if segment_id in self.present() or best is None or best.growth_weight < segment.min_weight:
                continue
            time_ms = max(at_ms, self.last_ms(segment_id))
            if shut_out or lease_ms < time_ms + 10:
                continue
            stays = self.stays.setdefault(segment_id, [])
            stays.append(Stay(time_ms, lease_ms, best.labels, best.growth_weight))
            seq = 2 * len(stays) - 1
            weight = best.growth_weight
            enters.append(
                Said(segment_id, "entered", "model", seq, time_ms, weight, lease_ms, None, None, best.labels)
            )
        return exits + enters

    @staticmethod
    def meets(recommendation: Recommendation, segment: Segment) -> bool:
        """`asset_ids` ANY, `labels` ALL, `event_types` ANY; a list that is not given asks nothing."""
        if any(label not in recommendation.labels for label in segment.labels):
            return False
        if segment.asset_ids and recommendation.asset_id not in segment.asset_ids:
            return False
        return not segment.event_types or recommendation.event_type in segment.event_types


LABELS = [f"l{n}" for n in range(9)]
ASSETS = ["x", "y", "z"]
TYPES = ["view", "buy"]
WEIGHTS = Weights(half_life_s=20, history_floor=0.02, event_types={"idle": EventTypeWeight(0.0)})


def random_definitions(rng: random.Random) -> list[Segment]:
    """Make base segments and discovery segments; ids from a fixed list, so that others come and go."""
    made = [
        Segment("base-0", labels=(LABELS[0], LABELS[1]), min_weight=0.5),
        Segment("base-1", event_types=("buy",), min_weight=1.5, exclude=("base-0",)),
        Segment("base-2", asset_ids=("x",), min_weight=0.0),
    ]
    for n in range(10):
        if rng.random() < 0.2:
            continue
        criteria: dict[str, Any] = {}
        asked = rng.randint(1, 7)
        if asked & 1:
            criteria["labels"] = tuple(rng.sample(LABELS, rng.choice([1, 1, 1, 2])))
        if asked & 2:
            criteria["asset_ids"] = tuple(rng.sample(ASSETS, rng.randint(1, 2)))
        if asked & 4:
            criteria["event_types"] = tuple(rng.sample(TYPES, rng.randint(1, 2)))
        min_weight = rng.choice([0.0, 0.1, 0.3, 0.5])
        exit_weight = rng.choice([None, None, 0.0, min_weight, min_weight / 2])
        exclude = tuple(rng.sample([s.id for s in made[:3]], rng.choice([0, 0, 0, 1, 2])))
        made.append(
            Segment(
                f"next-{n}",
                type="discovery",
                min_weight=min_weight,
                exit_weight=exit_weight,
                exclude=exclude,
                **criteria,
            )
        )
    return made


def random_tips(rng: random.Random, engaged: Iterable[str], honest: bool) -> list[Recommendation]:
    """Draw recommendations; honest ones name no engaged label, and their weights fall."""
    free = [label for label in LABELS if not honest or label not in engaged]
    tips = []
    for _ in range(rng.randint(0, 6)):
        if free:
            labels = tuple(rng.sample(free, min(len(free), rng.choice([1, 1, 2, 3]))))
            weight = rng.choice([0.0, 0.05, 0.1, 0.225, 0.3, 0.375, 0.5, rng.random()])
            asset_id = rng.choice([None, *ASSETS])
            tips.append(Recommendation(rng.choice(TYPES), asset_id, labels, weight, weight / 2))
    return sorted(tips, key=lambda one: -one.growth_weight) if honest else tips


class Story:
    """One user's random life, told to the code and to the judge."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = rng = random.Random(f"story/{seed}")
        self.honest = seed % 2 == 0
        self.max_age_ms = rng.choice([9, 10, 2_000, 20_000, 10**9])
        self.definitions = random_definitions(rng)
        self.segments = SegmentSet(self.definitions, WEIGHTS)
        self.fold = Fold(self.segments, WEIGHTS, keeps_seen=True)
        self.judge = Judge(self.definitions, self.max_age_ms)
        self.profile: Profile | None = None
        self.stream_time_ms = T
        self.last_scored_ms = T
        self.log: list[Transition] = []
        self.steps: list[str] = []
        self.began = [0]  # places in the log at which a profile began anew
        self.ids: list[str] = []  # of the events applied to the profile
        self.forgotten = 0

    def agree(self, step: str, found: Sequence[Transition], expected: Sequence[Said]) -> None:
        self.steps.append(step)
        where = f"story {self.seed}, step {len(self.steps)}: {step}"
        self.log += found
        said = [Said.of(t) for t in found if t.segment_type == "discovery"]
        assert said == list(expected), where
        if self.profile is None:
            return
        present = self.judge.present()
        leases = {
            s: state.exits_at_ms
            for s, state in self.profile.discovery.items()
            if state.exits_at_ms is not None
        }
        assert leases == {s: stay.lease_ms for s, stay in present.items()}, where
        assert self.profile.memberships == {**self.profile.exits_at_ms, **leases}, where
        for segment_id, state in self.profile.discovery.items():
            assert (state.seq % 2 == 1) == (segment_id in present), where
            promised = present[segment_id].promised if segment_id in present else ()
            assert state.labels == promised, where
        for lease_ms in leases.values():
            assert lease_ms <= self.profile.forget_ms, where
            assert lease_ms <= self.last_scored_ms + self.max_age_ms, where
        self.profile = unpack(self.profile.user_id, pack(self.profile))

    def acts(self) -> None:
        rng = self.rng
        pause_ms = rng.choice([0, 0, 1, 500, 3_000, rng.randint(0, 40_000), 400_000])
        self.stream_time_ms += pause_ms
        labels = tuple(rng.sample(LABELS, rng.choice([0, 1, 1, 2])))
        late_ms = rng.choice([0, 0, 0, rng.randint(0, 60_000)])
        event = Event(
            "u1",
            rng.choice([*TYPES, *TYPES, "idle"]),
            self.stream_time_ms - late_ms,
            rng.choice(self.ids[-40:]) if self.ids and rng.random() < 0.05 else f"e-{len(self.steps)}",
            labels,
            rng.choice([None, *ASSETS]),
        )
        at_ms = self.stream_time_ms
        if self.profile is not None:
            at_ms = max(at_ms, self.profile.last_transition_ms or 0)
        before = self.profile
        self.profile, found = self.fold.apply(before, event, self.stream_time_ms, len(self.steps))
        expected = self.judge.passes_time(at_ms)
        if self.profile is not before:
            self.judge.begins_anew()
            self.forgotten += before is not None
            self.ids = []
            self.began.append(len(self.log) + sum(t.cause != "event" for t in found))
        if event.event_id not in self.ids[-32:]:
            self.ids.append(event.event_id)
            if event.event_type != "idle":  # an event without weight engages nothing
                expected += self.judge.engages(event, at_ms)
        self.agree(f"{event} at {at_ms}", found, expected)

    def is_scored(self) -> None:
        if self.profile is None:
            return
        rng = self.rng
        at_ms = self.stream_time_ms
        if rng.random() < 0.3:  # in the background, at the wall clock's now
            at_ms += rng.choice([0, 100, rng.randint(0, 15_000)])
        if self.profile.next_exit_ms is not None and self.profile.next_exit_ms <= at_ms:
            self.waits(at_ms)  # the timer has its turn first
        tips = random_tips(rng, self.profile.seen_ms, self.honest)
        found = discover(
            self.profile,
            tips,
            DiscoveryRules(self.segments),
            at_ms,
            max_age_ms=self.max_age_ms,
        )
        self.last_scored_ms = at_ms
        base, forget_ms = self.profile.exits_at_ms, self.profile.forget_ms
        expected = self.judge.scores(at_ms, tips, base, forget_ms)
        self.agree(f"scored at {at_ms}: {tips}", found, expected)
        if self.honest:
            own = labels_of(self.profile)
            for t in found:
                if t.prediction is not None:
                    assert own.isdisjoint(t.prediction.labels), f"story {self.seed}: {t}"
            for segment_id, stay in self.judge.present().items():
                assert own.isdisjoint(stay.promised), f"story {self.seed}: {segment_id}, {stay}"

    def waits(self, until_ms: int | None = None) -> None:
        if self.profile is None:
            return
        if until_ms is None:
            until_ms = self.stream_time_ms + self.rng.choice([0, 10, 2_000, self.rng.randint(0, 30_000)])
        found = self.fold.expire(self.profile, until_ms)
        self.agree(f"waits until {until_ms}", found, self.judge.passes_time(until_ms))

    def is_redefined(self) -> None:
        if self.profile is None:
            return
        old = self.segments
        self.definitions = random_definitions(self.rng)
        self.segments = SegmentSet(self.definitions, WEIGHTS)
        self.fold = Fold(self.segments, WEIGHTS, keeps_seen=True)
        at_ms = max(self.stream_time_ms, self.profile.last_transition_ms or 0)
        found = self.fold.redefine(self.profile, self.stream_time_ms, old)
        self.agree(f"redefined at {at_ms}", found, self.judge.redefines(self.definitions, at_ms))


@functools.cache
def told(seed: int) -> Story:
    story = Story(seed)
    rng = story.rng
    for _ in range(250):
        step = rng.choice([story.acts] * 5 + [story.is_scored] * 5 + [story.waits] * 2)
        if rng.random() < 0.03:
            step = story.is_redefined
        step()
    return story


STORIES = range(120)


@pytest.mark.parametrize("seed", STORIES)
def test_the_judge_agrees_on_who_is_in_which_discovery_segment(seed: int) -> None:
    told(seed)


@pytest.mark.parametrize("seed", STORIES)
def test_entered_and_exited_alternate_and_neither_ids_nor_instants_go_back(seed: int) -> None:
    story = told(seed)
    last: dict[str, Transition] = {}
    began = iter([*story.began, len(story.log) + 1])
    next_began = next(began)
    for place, t in enumerate(story.log):
        where = f"story {seed}, transition {place}: {t}"
        while place >= next_began:
            # A new profile numbers from 1 again, and nobody was left in the old one.
            assert all(before.status == "exited" for before in last.values()), where
            last = {s: structs.replace(before, seq=0) for s, before in last.items()}
            next_began = next(began)
        before = last.get(t.segment_id)
        assert t.seq == (1 if before is None else before.seq + 1), where
        assert t.status == ("entered" if t.seq % 2 == 1 else "exited"), where
        assert before is None or t.time_ms >= before.time_ms, where
        assert t.id == transition_id("u1", t.segment_id, t.time_ms, t.seq), where
        if t.segment_type == "discovery":
            assert (t.prediction is not None) == (t.status == "entered"), where
            assert (t.converted is None) == (t.status == "entered"), where
            assert (t.event_id is not None) == (t.cause == "event") == (t.converted is True), where
            if t.exits_at_ms is not None:
                assert t.exits_at_ms - t.time_ms >= 10, where
        last[t.segment_id] = t
    assert len({t.id for t in story.log}) == len(story.log), f"story {seed}"


def test_the_stories_have_everything_in_them() -> None:
    counts = Counter[str]()
    for seed in STORIES:
        story = told(seed)
        counts["forgotten"] += story.forgotten
        converted: dict[str, Transition] = {}
        for t in story.log:
            if t.segment_type == "discovery":
                counts[f"{t.status}, {t.cause}, converted {t.converted}"] += 1
                before = converted.pop(t.segment_id, None)
                counts["again after a conversion"] += before is not None and before.time_ms == t.time_ms
                if t.converted:
                    converted[t.segment_id] = t
    assert len(counts) == 6, counts
    assert min(counts.values()) > 50, counts
