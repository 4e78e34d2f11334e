"""The common event, applied to the stored form of a profile itself.

Decides nothing of its own: what `Patcher.apply` leaves behind of a profile that `profile.pack` wrote is, to
the byte, what `profile.unpack`, `Fold.apply` and `profile.pack` would have made. It must know their rules,
and leave to them every event that asks for more than moving numbers and letting a user in or out (see
`Patcher`).

Why there is a second way at all: an event changes a handful of numbers among some forty keys of a profile,
and most of its cost was to make objects of all of them, and bytes again. Compiled by mypyc, with numbers and
arrays of the machine, an event takes 3 to 4 us here, 13 to 15 there, and a worker 23 instead of 40 in all;
interpreted it would take longer than there, so it is not used (`COMPILED`).
"""

from math import inf
from typing import Final, final

from librt.strings import BytesWriter, read_f64_be, read_i64_be, write_f64_be
from librt.vecs import append, vec
from mypy_extensions import i64, u8

from stream_app.core.decay import (
    HOLD_MS,
    NEVER_MS,
    NO_WEIGHT_MS,
    REBASE_EXPONENT,
    crossing_ms,
    single_crossing_ms,
)
from stream_app.core.event import Event
from stream_app.core.fold import (
    MAX_ASSETS,
    MAX_LABELS,
    PRUNE_EVERY,
    Fold,
    event_digest,
    transition_of,
)
from stream_app.core.profile import REMEMBERED_IDS
from stream_app.core.segment_set import Bucket, Kind, Rule
from stream_app.core.transition import Cause, Transition, exits_first
from stream_app.core.wire import (
    NIL,
    after_int,
    after_sums,
    after_text,
    check_sum,
    find_sum,
    first_key,
    is_field,
    is_same,
    map_size,
    packed_text,
    read_int,
    write_int,
    write_map_size,
    write_sums,
)

__all__ = ["CHANGED", "COMPILED", "LEFT", "UNCHANGED", "Patcher", "Stored"]

COMPILED: Final = not __file__.endswith(".py")

LEFT: Final = 0
UNCHANGED: Final = 1
CHANGED: Final = 2

_MAX_TYPES: Final = 15
_MOST_ITEMS: Final = 16
_FEWEST_LOOKS: Final = 2_000
"""Names that one event may be compared with, and one more for every byte of the profile. One takes 3 to 12
ns; to unpack, fold and pack takes 12 us and one more for about 100 bytes: with more, dictionaries pay."""
_MOST_MEMBERS: Final = 0xFFFF
_NOT_IN: Final = -1
_LEAVES: Final = -2


class _TooManyNamesError(Exception):
    """The fold is faster."""


@final
class Stored:
    """A user's packed profile on its way through a slice.

    Parameters
    ----------
    user_id
        Whose it is.
    blob
        What `profile.pack` returned.

    Attributes
    ----------
    blob : bytes
        As it is now.
    is_changed : bool
        Whether it is another than it was.
    first_exit_ms, next_exit_ms : int
        The earliest instant of leaving, before and now; `NEVER_MS` if none ever comes. Known when changed.
    forget_ms : int
        The forget instant now. Known when changed.
    is_in : bool
        Whether the user is in any segment now. Known when changed.
    moved : dict
        Maps the segments that the user has entered, stays in for longer or has left to the new instant of
        leaving; -1 for the last.
    """

    def __init__(self, user_id: str, blob: bytes) -> None:
        self.user_id = user_id
        self.blob = blob
        self.is_changed = False
        self.first_exit_ms: i64 = NEVER_MS
        self.next_exit_ms: i64 = NEVER_MS
        self.forget_ms: i64 = 0
        self.is_in = False
        self.moved: dict[str, int] = {}

    def change(self, blob: bytes, first_exit_ms: i64, next_exit_ms: i64, forget_ms: i64, is_in: bool) -> None:
        """Take over what was made of the profile."""
        if not self.is_changed:
            self.is_changed = True
            self.first_exit_ms = first_exit_ms
        self.blob = blob
        self.next_exit_ms = next_exit_ms
        self.forget_ms = forget_ms
        self.is_in = is_in


@final
class Patcher:
    """Applies events to packed profiles, under one set of definitions and settings.

    It leaves to the fold: a user without a profile or with one of other definitions; profiles with anything
    that the next-category model keeps, discovery segments included; the beginning of a new profile; event
    types that weigh nothing or that the user has not had yet; the landmark's moving; every 64th event, which
    drops what is faint, and all that comes near a cap; who enters and leaves segments that exclude, are
    excluded or count very many items or types; and whatever compares more names than the fold takes time for.

    Parameters
    ----------
    fold
        Whose rules it follows.

    Raises
    ------
    ValueError
        If the fold keeps what the next-category model reads.

    Notes
    -----
    It keeps what it has read of the profile in hand: not safe to share between threads. Names in a profile
    are compared and copied, never read, so one that is no text stays as it is, for who unpacks it.

    Examples
    --------
    A user who has one event of weight 1 gets another, a half-life later; both ways come to the same bytes:

    >>> from stream_app.core.decay import Weights
    >>> from stream_app.core.profile import pack
    >>> from stream_app.core.segment import Segment
    >>> from stream_app.core.segment_set import SegmentSet
    >>> weights = Weights(half_life_s=1_000)
    >>> segments = SegmentSet([Segment("swim", labels=("swimwear",), min_weight=1.2)], weights)
    >>> fold = Fold(segments, weights)
    >>> profile, _ = fold.apply(None, Event("u1", "view", 0, "e-1", ("swimwear",)), 0)
    >>> stored, second = Stored("u1", pack(profile)), Event("u1", "view", 1_000_000, "e-2", ("swimwear",))
    >>> entered = []
    >>> Patcher(fold).apply(stored, second, 1_000_000, 7, entered) == CHANGED
    True
    >>> [(one.segment_id, one.status, one.weight) for one in entered], stored.moved
    ([('swim', 'entered', 1.5)], {'swim': 1321928})
    >>> fold.apply(profile, second, 1_000_000, 7)[1] == entered, pack(profile) == stored.blob
    (True, True)
    """

    def __init__(self, fold: Fold) -> None:
        if fold.keeps_seen:
            raise ValueError("expected a fold that keeps nothing for the model, got one that does")
        self._weights = fold.weights
        self._any_type = fold.segments.any_type
        self._by_type = fold.segments.by_type
        self._fingerprint = packed_text(fold.segments.fingerprint)
        self._ids = [packed_text(rule.id) for rule in fold.segments.rules]
        self._rules = {packed_text(rule.id): rule for rule in fold.segments.rules}
        self._is_simple = [
            not rule.exclude
            and not rule.dependents
            and all(
                len(criterion.items) <= _MOST_ITEMS and len(criterion.event_types or ()) <= _MOST_ITEMS
                for criterion in rule.criteria
            )
            for rule in fold.segments.rules
        ]
        named = fold.segments.named_labels | fold.segments.named_assets | fold.segments.named_types
        self._named = {name: packed_text(name) for name in (*named, *fold.weights.event_types)}
        self._looks: i64 = 0
        self._candidates: list[Rule] = []
        self._default_half_life_ms = fold.weights.default_half_life_ms
        self._own_half_lives = {
            packed_text(name): fold.weights.half_life_ms(name) for name in fold.weights.event_types
        }
        self._least_rebase_ms = REBASE_EXPONENT * fold.weights.shortest_half_life_ms
        # Of the profile in hand: what is in it, and where.
        self._landmark_ms: i64 = 0
        self._n_types: i64 = 0
        self._members_at: i64 = 0
        self._members_end: i64 = 0
        self._n_members: i64 = 0
        self._first_exit_ms: i64 = 0
        self._is_in = False
        self._ids_at: i64 = 0
        self._ids_end: i64 = 0
        self._applied: i64 = 0
        self._forget_ms: i64 = 0
        self._last_at: i64 = 0
        self._last_end: i64 = 0
        self._last_ms: i64 = 0
        # Further, of each event type where its name stands, its total, its labels, its assets and its end; of
        # each membership its name, its seq, its instant, and what that is and will be.
        self._type_at = vec[i64]([0] * (_MAX_TYPES + 1))
        self._total_at = vec[i64]([0] * _MAX_TYPES)
        self._labels_at = vec[i64]([0] * _MAX_TYPES)
        self._assets_at = vec[i64]([0] * _MAX_TYPES)
        self._half_lives_ms = vec[float]([0.0] * _MAX_TYPES)
        self._member_at = vec[i64]()
        self._seq_at = vec[i64]()
        self._exit_at = vec[i64]()
        self._exit_ms = vec[i64]()
        self._new_exit_ms = vec[i64]()
        # The sums of an item, by half-life.
        self._sums = vec[float]([0.0] * _MAX_TYPES)
        self._sum_half_lives_ms = vec[float]([0.0] * _MAX_TYPES)

    def apply(
        self,
        stored: Stored,
        event: Event,
        stream_time_ms: int,
        offset: int | None,
        transitions: list[Transition],
    ) -> int:
        """Apply one record of a user, if it is a common one.

        Parameters
        ----------
        stored
            The user's profile, changed in place.
        event, stream_time_ms, offset
            As for `Fold.apply`.
        transitions
            Gets those that the record causes.

        Returns
        -------
        int
            `CHANGED`, or `UNCHANGED` for an event that was applied before, or `LEFT`: the record is for the
            fold. Exits that are due may have happened in each case; the fold's first step then finds none.
        """
        try:
            if not self._read(stored.blob):
                return LEFT
            at_ms: i64 = stream_time_ms
            at_ms = max(at_ms, self._last_ms)
            if self._first_exit_ms <= at_ms and not (
                self._expire(stored, at_ms, transitions) and self._read(stored.blob)
            ):
                return LEFT
            return self._apply(stored, event, at_ms, offset, transitions)
        except (
            IndexError,
            _TooManyNamesError,
        ):  # bytes may end early; unpacking says what is wrong with them
            return LEFT

    def expire(self, stored: Stored, until_ms: int, transitions: list[Transition]) -> int:
        """Let a user leave what is due, if that is all that there is to it.

        Parameters
        ----------
        stored
            The user's profile, changed in place if anything was due.
        until_ms
            As for `Fold.expire`.
        transitions
            Gets those that come of it.

        Returns
        -------
        int
            `CHANGED`, or `UNCHANGED` where nothing is due, or `LEFT`: nothing was done, it is for the fold.
        """
        try:
            if not self._read(stored.blob):
                return LEFT
            if self._first_exit_ms > until_ms:
                return UNCHANGED
            return CHANGED if self._expire(stored, until_ms, transitions) else LEFT
        except (IndexError, _TooManyNamesError):
            return LEFT

    def _read(self, b: bytes) -> bool:
        """Note what stands where in a profile; `False` if it is not one of these definitions."""
        # {"v": 1, "l": landmark, "w": ...
        if not (b[0] == 0x89 and is_field(b, 1, 0x76) and b[3] == 1 and is_field(b, 4, 0x6C)):
            return False
        self._landmark_ms = read_int(b, 6)
        i = after_int(b, 6)
        if not is_field(b, i, 0x77):
            return False
        n_types: i64 = b[i + 2] - 0x80
        if not 0 <= n_types <= _MAX_TYPES:
            return False
        self._n_types = n_types
        i += 3
        type_at, total_at = self._type_at, self._total_at
        labels_at, assets_at = self._labels_at, self._assets_at
        t: i64 = 0
        while t < n_types:
            type_at[t] = i
            i = after_text(b, i)
            if b[i] != 0x93:
                return False
            check_sum(b, i + 1)
            total_at[t] = i + 2
            labels_at[t] = i = i + 10
            assets_at[t] = i = after_sums(b, i)
            i = after_sums(b, i)
            t += 1
        type_at[n_types] = i
        # "m": {segment: [seq, instant], ...}
        if not is_field(b, i, 0x6D):
            return False
        self._members_at = i + 2
        i = self._read_members(b, i + 2)
        self._members_end = i
        # "i": ids, "n": applied, "f": forget, "t": last transition, "d": definitions}
        if not is_field(b, i, 0x69):
            return False
        if b[i + 2] == 0xC4:
            size: i64 = b[i + 3]
            i += 4
        elif b[i + 2] == 0xC5:
            high: i64 = b[i + 3]
            low: i64 = b[i + 4]
            size = high << 8 | low
            i += 5
        else:
            return False
        self._ids_at = i
        self._ids_end = i = i + size
        if size % 8 or size > 8 * REMEMBERED_IDS or not is_field(b, i, 0x6E):
            return False
        self._applied = read_int(b, i + 2)
        i = after_int(b, i + 2)
        if not is_field(b, i, 0x66):
            return False
        self._forget_ms = read_int(b, i + 2)
        i = after_int(b, i + 2)
        if not is_field(b, i, 0x74):
            return False
        self._last_at = i + 2
        if b[i + 2] == NIL:
            self._last_ms = -1
            i += 3
        else:
            self._last_ms = read_int(b, i + 2)
            i = after_int(b, i + 2)
        self._last_end = i
        size = len(b)
        self._looks = _FEWEST_LOOKS + size
        return (
            is_field(b, i, 0x64)
            and after_text(b, i + 2) == size
            and is_same(b, i + 2, size, self._fingerprint)
        )

    def _read_members(self, b: bytes, at: i64) -> i64:
        """Note where the memberships stand, and the first exit; return where they end."""
        n = map_size(b, at)
        while len(self._member_at) < n:
            self._member_at = append(self._member_at, i64(0))
            self._seq_at = append(self._seq_at, i64(0))
            self._exit_at = append(self._exit_at, i64(0))
            self._exit_ms = append(self._exit_ms, i64(0))
            self._new_exit_ms = append(self._new_exit_ms, i64(0))
        member_at, seq_at, exit_at = self._member_at, self._seq_at, self._exit_at
        exit_ms_of, new_exit_ms = self._exit_ms, self._new_exit_ms
        first_exit_ms: i64 = NEVER_MS
        is_in = False
        i = first_key(b, at)
        k: i64 = 0
        while k < n:
            member_at[k] = i
            i = after_text(b, i)
            if b[i] != 0x92:
                raise IndexError
            seq_at[k] = i + 1
            seq = read_int(b, i + 1)
            exit_at[k] = i = after_int(b, i + 1)
            if seq == 0 or ((seq & 1) == 0) != (b[i] == NIL):
                raise IndexError
            new_exit_ms[k] = _NOT_IN
            if b[i] == NIL:
                exit_ms_of[k] = _NOT_IN
                i += 1
            else:
                exit_ms = read_int(b, i)
                exit_ms_of[k] = exit_ms
                is_in = True
                if exit_ms < first_exit_ms:
                    first_exit_ms = exit_ms
                i = after_int(b, i)
            k += 1
        self._n_members = n
        self._first_exit_ms = first_exit_ms
        self._is_in = is_in
        return i

    def _expire(self, stored: Stored, until_ms: i64, transitions: list[Transition]) -> bool:
        """Let the exits happen that are due in the profile that was read; `False` leaves it as it is."""
        b = stored.blob
        exit_ms_of, new_exit_ms = self._exit_ms, self._new_exit_ms
        n_members = self._n_members
        first_exit_ms = instant_ms = self._first_exit_ms
        self._read_half_lives(b)
        caused: list[Transition] = []
        while instant_ms <= until_ms:
            said: list[Transition] = []
            next_ms: i64 = NEVER_MS
            k: i64 = 0
            while k < n_members:
                exit_ms = exit_ms_of[k]
                # Who has left already is marked as who will.
                if exit_ms == instant_ms and new_exit_ms[k] == _NOT_IN:
                    rule = self._rules.get(b[self._member_at[k] : self._seq_at[k] - 1])
                    if rule is None or not self._is_simple[rule.position]:
                        return False
                    weight, _ = self._standing(b, instant_ms, rule)
                    new_exit_ms[k] = _LEAVES
                    said.append(
                        transition_of(
                            stored.user_id,
                            rule,
                            "exited",
                            instant_ms,
                            read_int(b, self._seq_at[k]) + 1,
                            weight,
                            None,
                            Cause.DECAY,
                            None,
                            None,
                        )
                    )
                elif exit_ms > instant_ms and exit_ms < next_ms:
                    next_ms = exit_ms
                k += 1
            if len(said) > 1:
                said.sort(key=exits_first)
            caused += said
            self._last_ms = instant_ms
            instant_ms = next_ms
            if next_ms >= NEVER_MS:
                break
        out = BytesWriter()
        is_in = False
        i: i64 = 0
        k = 0
        while k < n_members:
            if new_exit_ms[k] == _LEAVES:
                out.write(b[i : self._seq_at[k]])
                write_int(out, read_int(b, self._seq_at[k]) + 1)
                out.append(NIL)
                i = after_int(b, self._exit_at[k])
            elif exit_ms_of[k] != _NOT_IN:
                is_in = True
            k += 1
        out.write(b[i : self._last_at])
        write_int(out, self._last_ms)
        out.write(b[self._last_end :])
        for transition in caused:
            stored.moved[transition.segment_id] = _NOT_IN
        transitions += caused
        stored.change(out.getvalue(), first_exit_ms, instant_ms, self._forget_ms, is_in)
        return True

    def _apply(
        self, stored: Stored, event: Event, at_ms: i64, offset: int | None, transitions: list[Transition]
    ) -> int:
        """Apply an event to the profile that was read, in which no exit is due."""
        b = stored.blob
        # Steps 2 and 3 of the fold.
        if at_ms > self._forget_ms and not self._is_in:
            return LEFT
        digest = event_digest(event.event_id)
        wanted = read_i64_be(digest, 0)
        i = self._ids_at
        while i < self._ids_end:
            if read_i64_be(b, i) == wanted:
                return UNCHANGED
            i += 8

        # Step 4: the weights.
        event_type = event.event_type
        labels = event.labels
        asset_id = event.asset_id
        weights = self._weights
        amount = weights.action_weight(event_type)
        landmark_ms = self._landmark_ms
        event_time_ms: i64 = event.event_time_ms
        age_ms = float(event_time_ms - landmark_ms)
        n_types = self._n_types
        type_at, total_at = self._type_at, self._total_at
        labels_at, assets_at = self._labels_at, self._assets_at
        wire = self._wire(event_type)
        own: i64 = -1
        n_labels: i64 = 0
        n_assets: i64 = 0
        t: i64 = 0
        while t < n_types:
            if is_same(b, type_at[t], total_at[t] - 2, wire):
                own = t
            n_labels += map_size(b, labels_at[t])
            n_assets += map_size(b, assets_at[t])
            t += 1
        if (
            own < 0
            or amount == 0.0
            or (self._applied + 1) % PRUNE_EVERY == 0
            or age_ms >= self._least_rebase_ms
            or n_labels + len(labels) > MAX_LABELS
            or n_assets + 1 > MAX_ASSETS
        ):
            return LEFT
        half_life_ms = weights.half_life_ms(event_type)
        amount *= 2.0 ** (age_ms / half_life_ms)
        after_own = type_at[own + 1]
        out = BytesWriter()
        out.write(b[: total_at[own]])
        write_f64_be(out, read_f64_be(b, total_at[own]) + amount)
        wires = [self._wire(label) for label in labels]
        self._look(len(wires) * map_size(b, labels_at[own]))
        write_sums(out, b, labels_at[own], assets_at[own], wires, amount)
        labels_grown = i64(len(out)) - assets_at[own]
        wires = []
        if asset_id is not None:
            wires.append(self._wire(asset_id))
        write_sums(out, b, assets_at[own], after_own, wires, amount)
        grown = i64(len(out)) - after_own
        out.write(b[after_own : self._members_at])
        w = out.getvalue()
        assets_at[own] += labels_grown
        t = own + 1
        while t < n_types:
            type_at[t] += grown
            total_at[t] += grown
            labels_at[t] += grown
            assets_at[t] += grown
            t += 1
        self._read_half_lives(w)

        # The segments that the event names.
        candidates: list[Rule] = []
        self._candidates = candidates
        seen: set[int] = set()
        counted = self._by_type.get(event_type)
        index = self._any_type
        while True:
            for label in labels:
                buckets = index.labels.get(label)
                if buckets is not None and not self._touch(w, b, at_ms, "label", label, buckets, seen):
                    return LEFT
            if asset_id is not None:
                buckets = index.assets.get(asset_id)
                if buckets is not None and not self._touch(w, b, at_ms, "asset", asset_id, buckets, seen):
                    return LEFT
            buckets = index.types.get(event_type)
            if buckets is not None and not self._touch(w, b, at_ms, "type", event_type, buckets, seen):
                return LEFT
            if counted is None:
                break
            index = counted
            counted = None
        n_members = self._n_members
        exit_ms_of, new_exit_ms = self._exit_ms, self._new_exit_ms
        appended: list[Rule] = []
        appended_ms: list[int] = []
        caused: list[Transition] = []
        if candidates:
            if n_members + len(candidates) > _MOST_MEMBERS:
                return LEFT
            for rule in candidates:
                if not self._is_simple[rule.position]:
                    return LEFT
            candidates.sort(key=_position)
            for rule in candidates:
                weight, exit_ms = self._standing(w, at_ms, rule)
                if weight < rule.enter_least or exit_ms - at_ms < HOLD_MS:
                    continue
                k = self._member(b, rule)
                seq: i64 = 1
                if k < 0:
                    appended.append(rule)
                    appended_ms.append(exit_ms)
                else:
                    seq = read_int(b, self._seq_at[k]) + 1
                    new_exit_ms[k] = exit_ms
                caused.append(
                    transition_of(
                        stored.user_id,
                        rule,
                        "entered",
                        at_ms,
                        seq,
                        weight,
                        exit_ms if exit_ms < NEVER_MS else None,
                        Cause.EVENT,
                        event.event_id,
                        offset,
                    )
                )
            if len(caused) > 1:
                caused.sort(key=exits_first)

        # The new bytes, from the memberships on.
        out = BytesWriter()
        out.write(w)
        members_at = self._members_at
        i = members_at
        if appended:
            write_map_size(out, n_members + len(appended))
            i = first_key(b, members_at)
        next_exit_ms: i64 = NEVER_MS
        moved: dict[str, int] = {}
        k = 0
        while k < n_members:
            exit_ms = exit_ms_of[k]
            new_ms = new_exit_ms[k]
            if new_ms != _NOT_IN:
                seq_at = self._seq_at[k]
                exit_at = self._exit_at[k]
                if exit_ms == _NOT_IN:
                    out.write(b[i:seq_at])
                    write_int(out, read_int(b, seq_at) + 1)
                    i = exit_at + 1
                else:
                    out.write(b[i:exit_at])
                    i = after_int(b, exit_at)
                write_int(out, new_ms)
                exit_ms = new_ms
                moved[self._rules[b[self._member_at[k] : seq_at - 1]].id] = new_ms
            if exit_ms != _NOT_IN and exit_ms < next_exit_ms:
                next_exit_ms = exit_ms
            k += 1
        if appended:
            out.write(b[i : self._members_end])
            i = self._members_end
            for rule, new_ms in zip(appended, appended_ms, strict=True):
                moved[rule.id] = new_ms
                out.write(self._ids[rule.position])
                out.append(0x92)
                out.append(1)
                write_int(out, new_ms)
                next_exit_ms = min(next_exit_ms, new_ms)
        ids_at, ids_end = self._ids_at, self._ids_end
        if ids_end - ids_at == 8 * REMEMBERED_IDS:
            # As many as before: the head of the field stays as it is, and the oldest makes room.
            out.write(b[i:ids_at])
            ids_at += 8
        else:
            out.write(b[i : self._members_end])
            out.append(0xA1)
            out.append(0x69)
            size = ids_end - ids_at + 8
            if size < 256:
                out.append(0xC4)
            else:
                out.append(0xC5)
                out.append(u8(size >> 8))
            out.append(u8(size & 0xFF))
        out.write(b[ids_at:ids_end])
        out.write(digest)
        out.append(0xA1)
        out.append(0x6E)
        write_int(out, self._applied + 1)
        out.append(0xA1)
        out.append(0x66)
        forget_ms = self._faint_ms(w, at_ms + round(half_life_ms))
        write_int(out, forget_ms)
        if caused:
            out.append(0xA1)
            out.append(0x74)
            write_int(out, at_ms)
            out.write(b[self._last_end :])
        else:
            out.write(b[self._last_at - 2 :])
        transitions += caused
        stored.moved.update(moved)
        stored.change(
            out.getvalue(), self._first_exit_ms, next_exit_ms, forget_ms, self._is_in or len(caused) > 0
        )
        return CHANGED

    def _wire(self, text: str) -> bytes:
        """Return a string as it stands in a profile; what definitions name is known, for half the price."""
        return self._named.get(text) or packed_text(text)

    def _read_half_lives(self, b: bytes) -> None:
        """Note the half-lives of the event types of the profile in hand."""
        half_lives_ms = self._half_lives_ms
        t: i64 = 0
        while t < self._n_types:
            name = b[self._type_at[t] : self._total_at[t] - 2]
            half_lives_ms[t] = self._own_half_lives.get(name, self._default_half_life_ms)
            t += 1

    def _look(self, names: i64) -> None:
        """Account for names that are about to be compared."""
        self._looks -= names
        if self._looks < 0:
            raise _TooManyNamesError

    def _member(self, b: bytes, rule: Rule) -> i64:
        """Return which membership is a segment's, -1 if the user was never in it."""
        wire = self._ids[rule.position]
        member_at, seq_at = self._member_at, self._seq_at
        n_members = self._n_members
        self._look(n_members)
        k: i64 = 0
        while k < n_members:
            # One byte, that of the pair, stands between name and seq.
            if is_same(b, member_at[k], seq_at[k] - 1, wire):
                return k
            k += 1
        return -1

    def _touch(
        self,
        w: bytes,
        b: bytes,
        at_ms: i64,
        kind: Kind,
        item: str,
        buckets: tuple[Bucket, ...],
        seen: set[int],
    ) -> bool:
        """Do what `Fold._touch` does for one item; `False` where that is more than is done here.

        `seen` has the positions of candidates, and of rules that were looked at as a whole.
        """
        candidates = self._candidates
        wire = self._wire(item)
        exit_ms_of, new_exit_ms = self._exit_ms, self._new_exit_ms
        for bucket in buckets:
            if bucket.by_item:
                n_sums = self._read_sums(w, kind, wire, bucket.event_types)
                weight = self._weight(n_sums, at_ms)
                for rule in bucket.by_item:
                    k = self._member(b, rule)
                    if k >= 0 and exit_ms_of[k] != _NOT_IN:
                        later_ms = self._crossing_ms(n_sums, rule.log_exit_weight)
                        if later_ms > max(exit_ms_of[k], new_exit_ms[k]):
                            new_exit_ms[k] = later_ms
                    elif weight >= min(rule.enter_least, rule.exit_weight) and rule.position not in seen:
                        seen.add(rule.position)
                        candidates.append(rule)
            for rule in bucket.by_rule:
                if rule.position in seen:
                    continue
                seen.add(rule.position)
                if not self._is_simple[rule.position]:
                    return False
                weight, later_ms = self._standing(w, at_ms, rule)
                k = self._member(b, rule)
                if k >= 0 and exit_ms_of[k] != _NOT_IN:
                    if later_ms > max(exit_ms_of[k], new_exit_ms[k]):
                        new_exit_ms[k] = later_ms
                elif weight >= rule.enter_least:
                    candidates.append(rule)
        return True

    def _standing(self, w: bytes, at_ms: i64, rule: Rule) -> tuple[float, i64]:
        """Return what `Fold._standing` does."""
        weight = inf
        exit_ms: i64 = NEVER_MS
        for criterion in rule.criteria:
            is_first = True
            criterion_weight = 0.0
            criterion_ms: i64 = NO_WEIGHT_MS
            for item in criterion.items:
                n_sums = self._read_sums(w, criterion.kind, self._wire(item), criterion.event_types)
                if n_sums == 0 and not criterion.match_all:
                    continue
                item_weight = self._weight(n_sums, at_ms)
                item_ms = self._crossing_ms(n_sums, rule.log_exit_weight)
                if is_first:
                    criterion_weight, criterion_ms = item_weight, item_ms
                    is_first = False
                elif criterion.match_all:
                    criterion_weight = min(criterion_weight, item_weight)
                    criterion_ms = min(criterion_ms, item_ms)
                else:
                    criterion_weight = max(criterion_weight, item_weight)
                    criterion_ms = max(criterion_ms, item_ms)
            weight = min(weight, criterion_weight)
            exit_ms = min(exit_ms, criterion_ms)
        return weight, exit_ms

    def _read_sums(self, w: bytes, kind: Kind, wire: bytes, event_types: tuple[str, ...] | None) -> i64:
        """Note an item's sums by half-life, over some event types or all; return how many there are."""
        n: i64 = 0
        n_types = self._n_types
        type_at = self._type_at
        if event_types is None:
            t: i64 = 0
            while t < n_types:
                if kind != "type" or is_same(w, type_at[t], self._total_at[t] - 2, wire):
                    n = self._add_sum(w, n, t, kind, wire)
                t += 1
            return n
        for event_type in event_types:
            type_wire = self._wire(event_type)
            t = 0
            while t < n_types:
                if is_same(w, type_at[t], self._total_at[t] - 2, type_wire):
                    n = self._add_sum(w, n, t, kind, wire)
                    break
                t += 1
        return n

    def _add_sum(self, w: bytes, n: i64, t: i64, kind: Kind, wire: bytes) -> i64:
        """Add an item's sum of one event type to those that were noted; return how many there are."""
        if kind == "type":
            at = self._total_at[t]
        else:
            at = self._labels_at[t] if kind == "label" else self._assets_at[t]
            self._look(map_size(w, at))
            at = find_sum(w, at, wire)
            if at < 0:
                return n
        amount = read_f64_be(w, at)
        half_life_ms = self._half_lives_ms[t]
        sums, half_lives_ms = self._sums, self._sum_half_lives_ms
        u: i64 = 0
        while u < n:
            if half_lives_ms[u] == half_life_ms:
                sums[u] += amount
                return n
            u += 1
        half_lives_ms[n] = half_life_ms
        sums[n] = amount
        return n + 1

    def _weight(self, n_sums: i64, at_ms: i64) -> float:
        """Return what `decay.weight_at` does of the sums that were noted."""
        elapsed_ms = float(at_ms - self._landmark_ms)
        total = 0.0
        u: i64 = 0
        while u < n_sums:
            total += self._sums[u] * 2.0 ** (-elapsed_ms / self._sum_half_lives_ms[u])
            u += 1
        return total

    def _crossing_ms(self, n_sums: i64, log_threshold: float) -> i64:
        """Return what `decay.crossing_ms` does of the sums that were noted."""
        if n_sums == 1:
            return single_crossing_ms(
                self._landmark_ms, self._sum_half_lives_ms[0], self._sums[0], log_threshold
            )
        sums = {}
        u: i64 = 0
        while u < n_sums:
            sums[self._sum_half_lives_ms[u]] = self._sums[u]
            u += 1
        return crossing_ms(self._landmark_ms, sums, log_threshold)

    def _faint_ms(self, w: bytes, least_ms: i64) -> i64:
        """Return what `Fold._forget` does for the forget instant."""
        half_lives_ms, total_at = self._half_lives_ms, self._total_at
        n_types = self._n_types
        forget_ms = least_ms
        t: i64 = 0
        while t < n_types:
            total = read_f64_be(w, total_at[t])
            # The largest total of a half-life lasts longest; of equal ones any.
            u: i64 = 0
            while u < n_types and not (
                half_lives_ms[u] == half_lives_ms[t] and read_f64_be(w, total_at[u]) > total
            ):
                u += 1
            if u == n_types and total > 0.0:
                faint_ms = single_crossing_ms(
                    self._landmark_ms, half_lives_ms[t], total, self._weights.log_history_floor
                )
                forget_ms = max(forget_ms, faint_ms)
            t += 1
        return forget_ms


def _position(rule: Rule) -> int:
    return rule.position
