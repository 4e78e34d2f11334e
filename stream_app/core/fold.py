"""One event, or the passing of time, applied to one user's profile: who enters and who leaves which segment.

Decides everything about membership, in the four steps of `Fold.apply`, so that the log of a user's
transitions is a function of the log of events and of nothing else. It must not know what time it is, where
profiles are kept, how records come or who is told: instants arrive as arguments, profiles are changed in
place, transitions are returned.

Why exits need no event: between events weights only fall, so the instant at which a member falls below a
threshold is known when he enters (`decay.crossing_ms`) and an event can only move it later. It is kept in the
profile, and whoever keeps the profile wakes `Fold.expire` at it.

Why an event is cheap: it can only raise the weights of its own label, asset and type, so only the segments
that name one of them are looked at (`segment_set.Index`), and of those where one item is enough only that
item.
"""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf
from typing import Literal

from stream_app.core.decay import (
    HOLD_MS,
    NEVER_MS,
    NO_WEIGHT_MS,
    REBASE_EXPONENT,
    Weights,
    crossing_ms,
    weight_at,
)
from stream_app.core.discovery import convert, end_leases, leave_undefined
from stream_app.core.event import Event
from stream_app.core.profile import REMEMBERED_IDS, Profile, TypeSums
from stream_app.core.segment_set import Bucket, Criterion, Index, Kind, Rule, SegmentSet
from stream_app.core.transition import Cause, Transition, exits_first, transition_id

__all__ = [
    "MAX_ASSETS",
    "MAX_EVENT_TYPES",
    "MAX_LABELS",
    "PRUNE_EVERY",
    "Fold",
    "event_digest",
    "transition_of",
]

MAX_LABELS = 512
MAX_ASSETS = 256
MAX_EVENT_TYPES = 64
"""Caps of one profile, over all its event types; they never drop what a base segment names."""

_DIGEST_BYTES = 8

PRUNE_EVERY = 64
_FAINT = 1e-3
"""Every 64th event drops the keys that weigh less than this part of the history floor."""


def event_digest(event_id: str) -> bytes:
    """Return the 8 bytes by which a profile remembers an event id.

    Examples
    --------
    >>> event_digest("e-1").hex()
    '317386494bf10d9f'
    """
    return hashlib.blake2b(event_id.encode(), digest_size=_DIGEST_BYTES).digest()


def remembers(recent_ids: bytes, digest: bytes) -> bool:
    """Tell whether a digest is among those of a profile.

    Examples
    --------
    >>> remembers(b"12345678abcdefgh", b"abcdefgh"), remembers(b"12345678abcdefgh", b"5678abcd")
    (True, False)
    """
    found = recent_ids.find(digest)
    while found % _DIGEST_BYTES and found >= 0:  # bytes of two others
        found = recent_ids.find(digest, found + 1)
    return found >= 0


@dataclass(frozen=True, slots=True)
class Fold:
    """The meaning of events under one set of definitions and one set of weight settings.

    Holds no state of its own: profiles belong to the caller, are changed in place, and must not be shared
    between threads.

    Parameters
    ----------
    segments
        The definitions. Only base segments are decided here.
    weights
        The settings under which the profiles' sums are stored.
    keeps_seen
        Whether profiles note when each label was last engaged, which the next-category model reads. Changes
        nothing else.

    Examples
    --------
    With a half-life of 1,000 s, one event of weight 1 stays above 0.5 for that long; a
    second one at that moment would make it 1.5. The user leaves when nothing comes:

    >>> from stream_app.core.segment import Segment
    >>> weights = Weights(half_life_s=1_000)
    >>> fold = Fold(SegmentSet([Segment("swim", labels=("swimwear",), min_weight=0.5)], weights), weights)
    >>> profile, entered = fold.apply(None, Event("u1", "view", 5_000, "e-1", ("swimwear",)), 5_000)
    >>> [(t.segment_id, t.status, t.cause.value, t.time_ms, t.weight, t.exits_at_ms) for t in entered]
    [('swim', 'entered', 'event', 5000, 1.0, 1005000)]
    >>> [(t.status, t.cause.value, t.time_ms, t.weight) for t in fold.expire(profile, 2_000_000)]
    [('exited', 'decay', 1005000, 0.5)]
    """

    segments: SegmentSet
    weights: Weights
    keeps_seen: bool = False

    def apply(
        self, profile: Profile | None, event: Event, stream_time_ms: int, offset: int | None = None
    ) -> tuple[Profile, list[Transition]]:
        """Apply one record of a user.

        1. Exits that are due happen first, each at its own instant.
        2. A profile past its forget instant, without a membership, is replaced by a new one.
        3. An event that is among the last 32 applied adds nothing.
        4. Otherwise its weights are added at its own timestamp, its segments are evaluated at R, and what has
           become too faint is forgotten.

        R is S, the stream time, or the user's last transition if that is later.

        Parameters
        ----------
        profile
            The user's, changed in place; `None` if there is none. Last evaluated under these definitions.
        event
            What happened; its timestamp is not after the stream time.
        stream_time_ms
            S: the largest instant of the partition's valid records, this one included.
        offset
            The record's, for the transitions that it causes.

        Returns
        -------
        profile
            The same object, or a new one where step 2 says so or there was none.
        transitions
            In order, may be empty. Their times are not before the user's last transition, nor after R.

        Raises
        ------
        ValueError
            If the profile was last evaluated under other definitions.
        """
        at_ms = stream_time_ms
        transitions: list[Transition] = []
        if profile is None:
            profile = self._new_profile(event.user_id, at_ms)
        else:
            if profile.last_transition_ms is not None and profile.last_transition_ms > at_ms:
                at_ms = profile.last_transition_ms
            if (
                profile.discovery
                or profile.definitions != self.segments.fingerprint
                or (profile.exits_at_ms and min(profile.exits_at_ms.values()) <= at_ms)
            ):
                transitions = self.expire(profile, at_ms)  # step 1
            if at_ms > profile.forget_ms and not profile.exits_at_ms:
                transitions += end_leases(profile, self.segments, at_ms, NEVER_MS)
                profile = self._new_profile(event.user_id, at_ms)  # step 2
        digest = event_digest(event.event_id)
        if remembers(profile.recent_ids, digest):  # step 3
            return profile, transitions
        if self._add(profile, event, at_ms):  # step 4
            candidates = self._touch(profile, event, at_ms)
            caused = (
                self._settle(profile, at_ms, candidates, (), Cause.EVENT, event.event_id, offset)
                if candidates
                else []
            )
            if profile.discovery:
                caused += convert(profile, event, self.segments, at_ms, offset)
                caused.sort(key=exits_first)
            transitions += caused
        profile.recent_ids = (profile.recent_ids + digest)[-_DIGEST_BYTES * REMEMBERED_IDS :]
        profile.applied += 1
        self._forget(profile, event.event_type, at_ms)
        return profile, transitions

    def expire(self, profile: Profile, until_ms: int) -> list[Transition]:
        """Let a user leave what is due, and in what that lets in.

        Parameters
        ----------
        profile
            Changed in place; last evaluated under these definitions.
        until_ms
            Exits at this instant or before it happen.

        Returns
        -------
        list of Transition
            Of base segments, instant by instant, with cause decay; then of discovery segments whose lease has
            run out, with cause model. May be empty.

        Raises
        ------
        ValueError
            If the profile was last evaluated under other definitions: its exits are theirs.
        """
        if profile.definitions != self.segments.fingerprint:
            raise ValueError(
                f"expected a profile under definitions {self.segments.fingerprint}, "
                f"got {profile.definitions}; redefine it first"
            )
        transitions: list[Transition] = []
        exits = profile.exits_at_ms
        while exits and (instant_ms := min(exits.values())) <= until_ms:
            due = [segment_id for segment_id, exit_ms in exits.items() if exit_ms <= instant_ms]
            positions = [self.segments.rule_by_id[segment_id].position for segment_id in due]
            transitions += self._settle(profile, instant_ms, positions, due, Cause.DECAY)
        if profile.discovery:
            transitions += end_leases(profile, self.segments, until_ms, until_ms)
        return transitions

    def redefine(self, profile: Profile, at_ms: int, old: SegmentSet) -> list[Transition]:
        """Bring a profile from other definitions to these.

        1. Exits that are due under the old definitions happen first, with cause decay.
        2. Members of segments that are gone leave; the numbering goes on should one come back.
        3. All other members stay if they are above the new exit threshold.
        4. Everyone else is let in as after an event.

        Discovery segments follow the next scoring, at the latest when the lease ends; members of one that is
        gone leave here.

        Parameters
        ----------
        profile
            Changed in place.
        at_ms
            Stream time; if the user's last transition is later, that instant is taken.
        old
            The definitions that the profile was last evaluated under, with the same weight settings.

        Returns
        -------
        list of Transition
            Those of step 1, then those of 2 to 4 with cause definition: exits, then enters, each by segment
            id.

        Raises
        ------
        ValueError
            If the profile was last evaluated under yet other definitions than `old`.
        """
        if profile.last_transition_ms is not None and profile.last_transition_ms > at_ms:
            at_ms = profile.last_transition_ms
        transitions = Fold(old, self.weights).expire(profile, at_ms)  # step 1
        rule_by_id = self.segments.rule_by_id
        gone = [segment_id for segment_id in profile.seqs if segment_id not in rule_by_id]
        changed = []
        for segment_id in gone:  # step 2
            if profile.is_member(segment_id):
                rule = old.rule_by_id[segment_id]
                weight, _ = self._standing(profile, rule, at_ms)
                changed.append(self._leave(profile, rule, at_ms, weight, Cause.DEFINITION))
        changed += leave_undefined(profile, self.segments, old, at_ms)
        due = []
        for segment_id in profile.exits_at_ms:  # step 3
            _, exit_ms = self._standing(profile, rule_by_id[segment_id], at_ms)
            profile.exits_at_ms[segment_id] = exit_ms
            if exit_ms <= at_ms:
                due.append(segment_id)
        positions = self._concerned(profile)  # step 4
        positions.update(rule_by_id[segment_id].position for segment_id in profile.exits_at_ms)
        changed += self._settle(profile, at_ms, positions, due, Cause.DEFINITION)
        changed.sort(key=exits_first)
        profile.definitions = self.segments.fingerprint
        return transitions + changed

    def _new_profile(self, user_id: str, at_ms: int) -> Profile:
        return Profile(user_id, at_ms, definitions=self.segments.fingerprint)

    def _add(self, profile: Profile, event: Event, at_ms: int) -> bool:
        """Add an event's weight to its keys at its own timestamp; tell whether there was any to add."""
        event_type = event.event_type
        amount = self.weights.action_weight(event_type)
        if amount == 0:
            return False
        half_life_ms = self.weights.half_life_ms(event_type)
        age_ms = event.event_time_ms - profile.landmark_ms
        if age_ms >= REBASE_EXPONENT * self.weights.shortest_half_life_ms:
            shortest_ms = min(map(self.weights.half_life_ms, (event_type, *profile.weights)))
            if age_ms >= REBASE_EXPONENT * shortest_ms:
                self._rebase(profile, at_ms)
                age_ms = event.event_time_ms - at_ms
        amount *= 2.0 ** (age_ms / half_life_ms)
        if self.keeps_seen and not profile.seen_ms and profile.applied:
            self._begin_seen(profile)
        sums = profile.weights.get(event_type)
        if sums is None:
            sums = profile.weights[event_type] = TypeSums(0.0, {}, {})
        sums.total += amount
        labels = sums.labels
        for label in event.labels:
            labels[label] = labels.get(label, 0.0) + amount
        if event.asset_id is not None:
            sums.assets[event.asset_id] = sums.assets.get(event.asset_id, 0.0) + amount
        if self.keeps_seen:
            seen_ms = profile.seen_ms
            for label in event.labels:
                before_ms = seen_ms.pop(label, event.event_time_ms)
                seen_ms[label] = max(before_ms, event.event_time_ms)
        elif profile.seen_ms:
            # Of a time when the model was on; no longer kept, so no longer true.
            profile.seen_ms = {}
        return True

    def _begin_seen(self, profile: Profile) -> None:
        """Take over what was engaged while the model was off, at an instant that is not known better."""
        profile.seen_ms.update(
            (label, profile.landmark_ms) for sums in profile.weights.values() for label in sums.labels
        )

    def _rebase(self, profile: Profile, landmark_ms: int) -> None:
        """Move the landmark of a profile; no weight changes, to the precision of a float."""
        elapsed_ms = landmark_ms - profile.landmark_ms
        for event_type, sums in profile.weights.items():
            left = 2.0 ** (-elapsed_ms / self.weights.half_life_ms(event_type))
            sums.total *= left
            for amounts in (sums.labels, sums.assets):
                for key, amount in amounts.items():
                    amounts[key] = amount * left
        profile.landmark_ms = landmark_ms

    def _touch(self, profile: Profile, event: Event, at_ms: int) -> set[int]:
        """Move the exits of the segments that an event names; return positions of whom it may let in.

        What an event does not name it cannot let anyone into: those weights have only fallen since the last
        evaluation. The same holds for the other items of a segment where one item decides, so there an exit
        moves if this item's crossing is later than it, and a user who is not in enters by this item or not at
        all.
        """
        exits = profile.exits_at_ms
        landmark_ms = profile.landmark_ms
        candidates: set[int] = set()
        whole: dict[int, Rule] = {}
        for kind, item, bucket in self._named(event):
            for rule in bucket.by_rule:
                whole[rule.position] = rule
            if not bucket.by_item:
                continue
            sums = self._sums(profile, kind, item, bucket.event_types)
            weight = weight_at(landmark_ms, sums, at_ms)
            for rule in bucket.by_item:
                exit_ms = exits.get(rule.id)
                if exit_ms is None:
                    # Another item may be high enough and have been refused for leaving too soon: then one
                    # that is above the exit threshold makes the stay longer.
                    if weight >= min(rule.enter_least, rule.exit_weight):
                        candidates.add(rule.position)
                else:
                    later_ms = crossing_ms(landmark_ms, sums, rule.log_exit_weight)
                    if later_ms > exit_ms:
                        exits[rule.id] = later_ms
        for rule in whole.values():
            weight, later_ms = self._standing(profile, rule, at_ms)
            exit_ms = exits.get(rule.id)
            if exit_ms is None:
                if weight >= rule.enter_least:
                    candidates.add(rule.position)
            elif later_ms > exit_ms:
                exits[rule.id] = later_ms
        return candidates

    def _named(self, event: Event) -> list[tuple[Kind, str, Bucket]]:
        """Return the rules that name what an event carries and count its type, with what they name."""
        found: list[tuple[Kind, str, Bucket]] = []
        segments = self.segments
        event_type, asset_id = event.event_type, event.asset_id
        counted = segments.by_type.get(event_type)
        for index in (segments.any_type,) if counted is None else (segments.any_type, counted):
            by_label = index.labels
            for label in event.labels:
                if label in by_label:
                    found += [("label", label, bucket) for bucket in by_label[label]]
            if asset_id is not None and asset_id in index.assets:
                found += [("asset", asset_id, bucket) for bucket in index.assets[asset_id]]
            if event_type in index.types:
                found += [("type", event_type, bucket) for bucket in index.types[event_type]]
        return found

    def _concerned(self, profile: Profile) -> set[int]:
        """Return positions of the segments that name anything a user has; in all others he weighs 0."""
        positions: set[int] = set()

        def collect(found: dict[str, tuple[Bucket, ...]], items: Iterable[str]) -> None:
            for item in items:
                for bucket in found.get(item, ()):
                    positions.update(rule.position for rule in (*bucket.by_item, *bucket.by_rule))

        empty = Index({}, {}, {})
        for event_type, sums in profile.weights.items():
            for index in (self.segments.any_type, self.segments.by_type.get(event_type, empty)):
                collect(index.labels, sums.labels)
                collect(index.assets, sums.assets)
                collect(index.types, (event_type,))
        return positions

    def _settle(
        self,
        profile: Profile,
        at_ms: int,
        positions: Iterable[int],
        due: Collection[str],
        cause: Cause,
        event_id: str | None = None,
        offset: int | None = None,
    ) -> list[Transition]:
        """Evaluate segments at one instant, and transitively those that exclude one that changed.

        Each is evaluated at most once, what it excludes before it.

        Parameters
        ----------
        profile
            Changed in place.
        at_ms
            The instant of all transitions.
        positions
            Of the segments to begin with.
        due
            Ids of the members who no longer meet the criteria; all other members do.
        cause, event_id, offset
            For the transitions.

        Returns
        -------
        list of Transition
            Exits, then enters, each by segment id.
        """
        rules = self.segments.rules
        exits = profile.exits_at_ms
        waiting = list(positions)
        heapify(waiting)
        seen = set(waiting)
        found = []
        while waiting:
            rule = rules[heappop(waiting)]
            suppressed = any(other in exits for other in rule.exclude)
            if rule.id in exits:
                if not suppressed and rule.id not in due:
                    continue
                weight, _ = self._standing(profile, rule, at_ms)
                found.append(self._leave(profile, rule, at_ms, weight, cause, event_id, offset))
            else:
                if suppressed:
                    continue
                weight, exit_ms = self._standing(profile, rule, at_ms)
                if weight < rule.enter_least or exit_ms - at_ms < HOLD_MS:
                    continue
                found.append(self._enter(profile, rule, at_ms, weight, exit_ms, cause, event_id, offset))
            for dependent in rule.dependents:
                if dependent not in seen:
                    seen.add(dependent)
                    heappush(waiting, dependent)
        found.sort(key=exits_first)
        return found

    def _enter(
        self,
        profile: Profile,
        rule: Rule,
        at_ms: int,
        weight: float,
        exit_ms: int,
        cause: Cause,
        event_id: str | None,
        offset: int | None,
    ) -> Transition:
        """Let a user in."""
        profile.exits_at_ms[rule.id] = exit_ms
        published_ms = exit_ms if exit_ms < NEVER_MS else None
        return _transition(profile, rule, "entered", at_ms, weight, published_ms, cause, event_id, offset)

    def _leave(
        self,
        profile: Profile,
        rule: Rule,
        at_ms: int,
        weight: float,
        cause: Cause,
        event_id: str | None = None,
        offset: int | None = None,
    ) -> Transition:
        """Let a user out."""
        del profile.exits_at_ms[rule.id]
        return _transition(profile, rule, "exited", at_ms, weight, None, cause, event_id, offset)

    def _standing(self, profile: Profile, rule: Rule, at_ms: int) -> tuple[float, int]:
        """Return a segment's weight at an instant, and when it falls to the exit threshold.

        The smallest over its criteria, and the earliest.
        """
        weight = inf
        exit_ms = NEVER_MS
        for criterion in rule.criteria:
            criterion_weight, criterion_exit_ms = self._criterion_standing(
                profile, criterion, rule.log_exit_weight, at_ms
            )
            weight = min(weight, criterion_weight)
            exit_ms = min(exit_ms, criterion_exit_ms)
        return weight, exit_ms

    def _criterion_standing(
        self, profile: Profile, criterion: Criterion, log_exit_weight: float, at_ms: int
    ) -> tuple[float, int]:
        """Return a criterion's weight at an instant, and when it falls to a threshold.

        The largest and latest of its items (any), or the smallest and earliest (all). An item that the user
        does not have weighs 0.
        """
        items: Collection[str] = criterion.items
        if not criterion.match_all:
            items = self._owned(profile, criterion)
            if not items:
                return 0.0, NO_WEIGHT_MS
        choose = min if criterion.match_all else max
        landmark_ms = profile.landmark_ms
        sums = [self._sums(profile, criterion.kind, item, criterion.event_types) for item in items]
        return (
            choose([weight_at(landmark_ms, one, at_ms) for one in sums]),
            choose([crossing_ms(landmark_ms, one, log_exit_weight) for one in sums]),
        )

    def _owned(self, profile: Profile, criterion: Criterion) -> Collection[str]:
        """Return the items of a criterion that a user has a sum of."""
        if criterion.kind == "type":
            return criterion.item_set.intersection(profile.weights)
        owned: set[str] = set()
        for event_type in criterion.event_types or profile.weights:
            sums = profile.weights.get(event_type)
            if sums is not None:
                amounts = sums.labels if criterion.kind == "label" else sums.assets
                if len(criterion.items) < len(amounts):
                    owned.update([item for item in criterion.items if item in amounts])
                else:
                    owned.update(criterion.item_set.intersection(amounts))
        return owned

    def _sums(
        self,
        profile: Profile,
        kind: Kind,
        item: str,
        event_types: tuple[str, ...] | None,
    ) -> dict[float, float]:
        """Return an item's sums by half-life in milliseconds, over some event types or all; may be empty."""
        found: dict[float, float] = {}
        if kind == "type":
            if item in profile.weights:
                found[self.weights.half_life_ms(item)] = profile.weights[item].total
            return found
        for event_type in event_types or profile.weights:
            sums = profile.weights.get(event_type)
            if sums is None:
                continue
            amount = (sums.labels if kind == "label" else sums.assets).get(item)
            if amount is not None:
                half_life_ms = self.weights.half_life_ms(event_type)
                found[half_life_ms] = found.get(half_life_ms, 0.0) + amount
        return found

    def _forget(self, profile: Profile, event_type: str, at_ms: int) -> None:
        """Drop what is too faint or too much, and set the forget instant.

        Called after an event of the given type was applied: forgetting is part of the fold, at instants that
        the log decides, so that it is a function of the log too.
        """
        if profile.applied % PRUNE_EVERY == 0:
            self._drop_faint(profile, at_ms)
            _forget_seen(profile)
        label_count = asset_count = 0
        for sums in profile.weights.values():
            label_count += len(sums.labels)
            asset_count += len(sums.assets)
        # Each counts keys, of which there are at least as many as distinct items.
        if label_count > MAX_LABELS:
            self._cap_items(profile, "label", MAX_LABELS, self.segments.named_labels, at_ms)
            _forget_seen(profile)
        if asset_count > MAX_ASSETS:
            self._cap_items(profile, "asset", MAX_ASSETS, self.segments.named_assets, at_ms)
        if len(profile.weights) > MAX_EVENT_TYPES:
            self._cap_event_types(profile, at_ms)
            _forget_seen(profile)
        largest: dict[float, float] = {}  # by half-life: of equal half-lives the largest sum lasts longest
        for name, sums in profile.weights.items():
            half_life_ms = self.weights.half_life_ms(name)
            if sums.total > largest.get(half_life_ms, 0.0):
                largest[half_life_ms] = sums.total
        forget_ms = at_ms + round(self.weights.half_life_ms(event_type))
        for half_life_ms, total in largest.items():
            faint_ms = crossing_ms(profile.landmark_ms, {half_life_ms: total}, self.weights.log_history_floor)
            if faint_ms > forget_ms:
                forget_ms = faint_ms
        profile.forget_ms = forget_ms

    def _drop_faint(self, profile: Profile, at_ms: int) -> None:
        """Drop every key whose weight is below a thousandth of the floor; memberships keep their exits."""
        least_weight = self.weights.history_floor * _FAINT
        for event_type, sums in list(profile.weights.items()):
            left = self._left(profile, event_type, at_ms)
            if sums.total * left < least_weight:
                del profile.weights[event_type]
                continue
            for amounts in (sums.labels, sums.assets):
                for key in [key for key, amount in amounts.items() if amount * left < least_weight]:
                    del amounts[key]

    def _cap_items(
        self,
        profile: Profile,
        kind: Literal["label", "asset"],
        cap: int,
        named: Collection[str],
        at_ms: int,
    ) -> None:
        """Over a cap of labels or assets, drop the faintest that no base segment names."""
        every = [sums.labels if kind == "label" else sums.assets for sums in profile.weights.values()]
        if len(set().union(*every)) <= cap:
            return
        weights: dict[str, float] = {}
        for event_type, amounts in zip(profile.weights, every, strict=True):
            left = self._left(profile, event_type, at_ms)
            for item, amount in amounts.items():
                weights[item] = weights.get(item, 0.0) + amount * left
        for item in _surplus(weights, cap, named):
            for amounts in every:
                amounts.pop(item, None)

    def _cap_event_types(self, profile: Profile, at_ms: int) -> None:
        """Over the cap of event types, drop the faintest of which no base segment names anything."""
        segments = self.segments
        weights = {}
        named = set()
        for event_type, sums in profile.weights.items():
            weights[event_type] = sums.total * self._left(profile, event_type, at_ms)
            if (
                event_type in segments.named_types
                or not segments.named_labels.isdisjoint(sums.labels)
                or not segments.named_assets.isdisjoint(sums.assets)
            ):
                named.add(event_type)
        for event_type in _surplus(weights, MAX_EVENT_TYPES, named):
            del profile.weights[event_type]

    def _left(self, profile: Profile, event_type: str, at_ms: int) -> float:
        """Return what one unit of an event type's sums weighs at an instant."""
        return float(2.0 ** ((profile.landmark_ms - at_ms) / self.weights.half_life_ms(event_type)))


def _forget_seen(profile: Profile) -> None:
    """Drop the instants of labels that no longer have a sum."""
    seen_ms = profile.seen_ms
    if seen_ms:
        held = set().union(*(sums.labels for sums in profile.weights.values()))
        if len(held) < len(seen_ms):
            profile.seen_ms = {label: instant_ms for label, instant_ms in seen_ms.items() if label in held}


def _surplus(weights: dict[str, float], cap: int, named: Collection[str]) -> list[str]:
    """Return what to drop so that 7/8 of a cap remain: smallest first, ties by name, nothing named.

    Examples
    --------
    >>> _surplus({"a": 2.0, "b": 1.0, "c": 1.0, "d": 0.5}, 2, {"d"})
    ['b', 'c', 'a']
    >>> _surplus({"a": 2.0, "b": 1.0}, 2, set())
    []
    """
    if len(weights) <= cap:
        return []
    free = sorted((weight, item) for item, weight in weights.items() if item not in named)
    return [item for _, item in free[: len(weights) - cap * 7 // 8]]


def _transition(
    profile: Profile,
    rule: Rule,
    status: Literal["entered", "exited"],
    at_ms: int,
    weight: float,
    exits_at_ms: int | None,
    cause: Cause,
    event_id: str | None,
    offset: int | None,
) -> Transition:
    """Return the next numbered change of a membership."""
    seq = profile.seqs.get(rule.id, 0) + 1
    profile.seqs[rule.id] = seq
    profile.last_transition_ms = at_ms
    return transition_of(
        profile.user_id, rule, status, at_ms, seq, weight, exits_at_ms, cause, event_id, offset
    )


def transition_of(
    user_id: str,
    rule: Rule,
    status: Literal["entered", "exited"],
    at_ms: int,
    seq: int,
    weight: float,
    exits_at_ms: int | None,
    cause: Cause,
    event_id: str | None,
    offset: int | None,
) -> Transition:
    """Return the change of a membership, with what the definition adds to it; see `Transition`."""
    return Transition(
        id=transition_id(user_id, rule.id, at_ms, seq),
        user_id=user_id,
        segment_id=rule.id,
        segment_type=rule.segment.type,
        segment_version=rule.version,
        status=status,
        cause=cause,
        seq=seq,
        time_ms=at_ms,
        weight=weight,
        min_weight=rule.segment.min_weight,
        exits_at_ms=exits_at_ms,
        event_id=event_id,
        offset=offset,
    )
