"""The common event, applied to the stored form of a profile itself.

Decides nothing of its own: what `Patcher.apply` leaves behind is, to the byte, what `profile.unpack`,
`Fold.apply` and `profile.pack` would have made. It must know their rules, and leave to them every event that
asks for more than moving numbers and letting a user in (see `Patcher`).

Why there is a second way at all: an event changes a handful of numbers among some forty keys of a profile,
and making objects of all of them and bytes again took nine tenths of the fold. Compiled by mypyc, with
numbers and arrays of the machine, an event takes 3 us here where it takes 25 there; interpreted it would take
longer than there, so it is not used (`COMPILED`).
"""

from typing import Final, final

from librt.strings import BytesWriter, read_f64_be, read_i64_be, write_f64_be, write_i64_be
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

__all__ = ["CHANGED", "COMPILED", "LEFT", "UNCHANGED", "Patcher", "Stored"]

COMPILED: Final = not __file__.endswith(".py")

LEFT: Final = 0
UNCHANGED: Final = 1
CHANGED: Final = 2

_MAX_TYPES: Final = 15
_MAX_WIRES: Final = 100_000
_NOT_IN: Final = -1

# msgpack, as far as profiles are made of it.
_NIL: Final = 0xC0
_FLOAT64: Final = 0xCB
_UINT64: Final = 0xCF


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
        Whether an event was applied.
    first_exit_ms, next_exit_ms : int
        The earliest instant of leaving, before and now; `NEVER_MS` if none ever comes. Known when changed.
    forget_ms : int
        The forget instant now. Known when changed.
    is_in : bool
        Whether the user is in any segment now. Known when changed.
    moved : dict
        Maps segment id to the new instant of leaving, of those who entered or stay longer.
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


@final
class Patcher:
    """Applies events to packed profiles, under one set of definitions and settings.

    It leaves to the fold: a user without a profile or with one of other definitions; what the next-category
    model keeps; exits that are due, and the beginning of a new profile; event types that weigh nothing or
    that the user has not had yet; the landmark's moving; every 64th event, which drops what is faint, and
    caps; segments with two criteria or all of several items, and the entering of segments that exclude or
    are excluded.

    Parameters
    ----------
    fold
        Whose rules it follows.
    """

    def __init__(self, fold: Fold) -> None:
        self._weights = fold.weights
        self._segments = fold.segments
        self._any_type = fold.segments.any_type
        self._fingerprint = _wire(fold.segments.fingerprint)
        self._ids = [_wire(rule.id) for rule in fold.segments.rules]
        self._wires: dict[str, bytes] = {}
        self._default_half_life_ms = fold.weights.default_half_life_ms
        self._own_half_lives = [
            (_wire(name), fold.weights.half_life_ms(name)) for name in fold.weights.event_types
        ]
        self._least_rebase_ms = REBASE_EXPONENT * fold.weights.shortest_half_life_ms
        # Of the profile in hand: of each event type where its name stands, its total, its labels, its assets
        # and their end; of each membership its name, its seq, its instant and what that is and will be.
        self._type_at = vec[i64]([0] * (_MAX_TYPES + 1))
        self._total_at = vec[i64]([0] * _MAX_TYPES)
        self._labels_at = vec[i64]([0] * _MAX_TYPES)
        self._assets_at = vec[i64]([0] * _MAX_TYPES)
        self._half_lives_ms = vec[float]([0.0] * _MAX_TYPES)
        self._members_end: i64 = 0
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
            The user's profile, changed in place if the record is applied.
        event, stream_time_ms, offset
            As for `Fold.apply`.
        transitions
            Gets those that the record causes.

        Returns
        -------
        int
            `CHANGED`, or `UNCHANGED` for an event that was applied before, or `LEFT`: nothing was done, the
            record is for the fold.
        """
        try:
            return self._apply(stored, event, stream_time_ms, offset, transitions)
        except IndexError:  # bytes that end early; unpacking says what is wrong with them
            return LEFT

    def _apply(
        self, stored: Stored, event: Event, at_ms: i64, offset: int | None, transitions: list[Transition]
    ) -> int:
        b = stored.blob
        # Head: {"v": 1, "l": landmark, "w": ...
        if not (b[0] == 0x89 and b[1] == 0xA1 and b[2] == 0x76 and b[3] == 1 and _field(b, 4, 0x6C)):
            return LEFT
        landmark_ms = _int(b, 6)
        i = _after_int(b, 6)
        if not _field(b, i, 0x77):
            return LEFT
        types_at = i + 2
        n_types: i64 = b[types_at] - 0x80
        if not 0 < n_types <= _MAX_TYPES:
            return LEFT
        wire = self._wire(event.event_type)
        own: i64 = -1
        n_labels: i64 = 0
        n_assets: i64 = 0
        type_at, total_at, labels_at, assets_at = (
            self._type_at,
            self._total_at,
            self._labels_at,
            self._assets_at,
        )
        i = types_at + 1
        t: i64 = 0
        while t < n_types:
            type_at[t] = i
            end = _after_str(b, i)
            if _same(b, i, end, wire):
                own = t
            if b[end] != 0x93 or b[end + 1] != _FLOAT64:
                return LEFT
            total_at[t] = end + 2
            labels_at[t] = i = end + 10
            n_labels += _map_size(b, i)
            assets_at[t] = i = _after_sums(b, i)
            n_assets += _map_size(b, i)
            i = _after_sums(b, i)
            t += 1
        type_at[n_types] = i
        if own < 0 or not _field(b, i, 0x6D):
            return LEFT
        members_at = i + 2
        n_members = self._read_members(b, members_at)
        i = members_end = self._members_end
        first_exit_ms: i64 = NEVER_MS
        is_in = False
        exit_ms_of, new_exit_ms = self._exit_ms, self._new_exit_ms
        k: i64 = 0
        while k < n_members:
            exit_ms = exit_ms_of[k]
            if exit_ms != _NOT_IN:
                is_in = True
                if exit_ms < first_exit_ms:
                    first_exit_ms = exit_ms
            k += 1
        # Tail: "i": ids, "n": applied, "f": forget, "t": last transition, "d": definitions}
        if not _field(b, i, 0x69):
            return LEFT
        ids_at = i + 2
        if b[ids_at] == 0xC4:
            ids_size: i64 = b[ids_at + 1]
            ids_at += 2
        elif b[ids_at] == 0xC5:
            ids_size = b[ids_at + 1] << 8 | b[ids_at + 2]
            ids_at += 3
        else:
            return LEFT
        i = ids_at + ids_size
        if ids_size % 8 or ids_size > 8 * REMEMBERED_IDS or not _field(b, i, 0x6E):
            return LEFT
        applied = _int(b, i + 2) + 1
        i = _after_int(b, i + 2)
        if not _field(b, i, 0x66):
            return LEFT
        forget_ms = _int(b, i + 2)
        i = _after_int(b, i + 2)
        if not _field(b, i, 0x74):
            return LEFT
        last_at = i + 2
        if b[last_at] == _NIL:
            i = last_at + 1
        else:
            last_ms = _int(b, last_at)
            at_ms = max(at_ms, last_ms)
            i = _after_int(b, last_at)
        last_end = i
        if (
            not _field(b, i, 0x64)
            or _after_str(b, i + 2) != len(b)
            or not _same(b, i + 2, len(b), self._fingerprint)
        ):
            return LEFT

        # Steps 1 to 3 of the fold.
        if first_exit_ms <= at_ms or (at_ms > forget_ms and not is_in):
            return LEFT
        digest = event_digest(event.event_id)
        wanted = read_i64_be(digest, 0)
        i = ids_at
        while i < ids_at + ids_size:
            if read_i64_be(b, i) == wanted:
                return UNCHANGED
            i += 8

        # Step 4: the weights.
        weights = self._weights
        amount = weights.action_weight(event.event_type)
        event_time_ms: i64 = event.event_time_ms
        age_ms = float(event_time_ms - landmark_ms)
        labels = event.labels
        asset_id = event.asset_id
        if (
            amount == 0.0
            or applied % PRUNE_EVERY == 0
            or age_ms >= self._least_rebase_ms
            or n_labels + len(labels) > MAX_LABELS
            or n_assets + 1 > MAX_ASSETS
        ):
            return LEFT
        half_life_ms = weights.half_life_ms(event.event_type)
        amount *= 2.0 ** (age_ms / half_life_ms)
        out = BytesWriter()
        out.write(b[: total_at[own]])
        write_f64_be(out, read_f64_be(b, total_at[own]) + amount)
        _add(out, b, labels_at[own], assets_at[own], [self._wire(label) for label in labels], amount)
        labels_grown = i64(len(out)) - assets_at[own]
        _add(
            out,
            b,
            assets_at[own],
            type_at[own + 1],
            [] if asset_id is None else [self._wire(asset_id)],
            amount,
        )
        grown = i64(len(out)) - type_at[own + 1]
        out.write(b[type_at[own + 1] : members_at])
        w = out.getvalue()
        assets_at[own] += labels_grown
        t = own + 1
        while t < n_types:
            type_at[t] += grown
            total_at[t] += grown
            labels_at[t] += grown
            assets_at[t] += grown
            t += 1
        type_at[n_types] += grown
        half_lives_ms = self._half_lives_ms
        t = 0
        while t < n_types:
            half_lives_ms[t] = half_life_ms if t == own else self._half_life_ms(w, type_at[t])
            t += 1

        # The segments that the event names.
        candidates: list[Rule] = []
        moved: dict[str, int] = {}
        counted = self._segments.by_type.get(event.event_type)
        index = self._any_type
        while True:
            for label in labels:
                label_buckets = index.labels.get(label)
                if label_buckets is not None and not self._touch(
                    w,
                    b,
                    n_types,
                    n_members,
                    landmark_ms,
                    at_ms,
                    "label",
                    label,
                    label_buckets,
                    moved,
                    candidates,
                ):
                    return LEFT
            if asset_id is not None:
                asset_buckets = index.assets.get(asset_id)
                if asset_buckets is not None and not self._touch(
                    w,
                    b,
                    n_types,
                    n_members,
                    landmark_ms,
                    at_ms,
                    "asset",
                    asset_id,
                    asset_buckets,
                    moved,
                    candidates,
                ):
                    return LEFT
            type_buckets = index.types.get(event.event_type)
            if type_buckets is not None and not self._touch(
                w,
                b,
                n_types,
                n_members,
                landmark_ms,
                at_ms,
                "type",
                event.event_type,
                type_buckets,
                moved,
                candidates,
            ):
                return LEFT
            if counted is None:
                break
            index = counted
            counted = None
        for rule in candidates:
            if rule.exclude or rule.dependents:
                return LEFT
        candidates.sort(key=_position)
        appended: list[Rule] = []
        caused: list[Transition] = []
        for rule in candidates:
            weight, exit_ms = self._standing(w, n_types, landmark_ms, at_ms, rule)
            if weight < rule.enter_least or exit_ms - at_ms < HOLD_MS:
                continue
            k = self._member(b, n_members, rule)
            seq: i64 = 1
            if k < 0:
                appended.append(rule)
            else:
                seq = _int(b, self._seq_at[k]) + 1
                new_exit_ms[k] = exit_ms
            moved[rule.id] = exit_ms
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
        transitions += caused

        # The new bytes, from the memberships on.
        out = BytesWriter()
        out.write(w)
        seq_at, exit_at = self._seq_at, self._exit_at
        i = members_at
        if appended:
            _write_map_size(out, n_members + len(appended))
            i = _first_key(b, members_at)
        next_exit_ms: i64 = NEVER_MS
        k = 0
        while k < n_members:
            exit_ms = exit_ms_of[k]
            new_ms = new_exit_ms[k]
            if new_ms != _NOT_IN:
                if exit_ms == _NOT_IN:
                    out.write(b[i : seq_at[k]])
                    _write_int(out, _int(b, seq_at[k]) + 1)
                    i = exit_at[k] + 1
                else:
                    out.write(b[i : exit_at[k]])
                    i = _after_int(b, exit_at[k])
                _write_int(out, new_ms)
                exit_ms = new_ms
            if exit_ms != _NOT_IN and exit_ms < next_exit_ms:
                next_exit_ms = exit_ms
            k += 1
        out.write(b[i:members_end])
        for rule in appended:
            exit_ms = moved[rule.id]
            out.write(self._ids[rule.position])
            out.append(0x92)
            out.append(1)
            _write_int(out, exit_ms)
            next_exit_ms = min(next_exit_ms, exit_ms)
        out.append(0xA1)
        out.append(0x69)
        if ids_size == 8 * REMEMBERED_IDS:
            i = ids_at + 8
            kept = ids_size - 8
        else:
            i = ids_at
            kept = ids_size
        if kept + 8 < 256:
            out.append(0xC4)
        else:
            out.append(0xC5)
            out.append(u8((kept + 8) >> 8))
        out.append(u8((kept + 8) & 0xFF))
        out.write(b[i : ids_at + ids_size])
        out.write(digest)
        out.append(0xA1)
        out.append(0x6E)
        _write_int(out, applied)
        out.append(0xA1)
        out.append(0x66)
        forget_ms = self._forget_ms(w, n_types, landmark_ms, at_ms + round(half_life_ms))
        _write_int(out, forget_ms)
        if caused:
            out.append(0xA1)
            out.append(0x74)
            _write_int(out, at_ms)
            out.write(b[last_end:])
        else:
            out.write(b[last_at - 2 :])

        if not stored.is_changed:
            stored.is_changed = True
            stored.first_exit_ms = first_exit_ms
        stored.moved.update(moved)
        stored.blob = out.getvalue()
        stored.next_exit_ms = next_exit_ms
        stored.forget_ms = forget_ms
        stored.is_in = is_in or len(caused) > 0
        return CHANGED

    def _wire(self, text: str) -> bytes:
        """Return a string as it stands in a profile."""
        found = self._wires.get(text)
        if found is None:
            if len(self._wires) >= _MAX_WIRES:
                self._wires.clear()
            found = self._wires[text] = _wire(text)
        return found

    def _half_life_ms(self, b: bytes, type_at: i64) -> float:
        """Return the half-life of the event type whose name stands there."""
        end = _after_str(b, type_at)
        for wire, half_life_ms in self._own_half_lives:
            if _same(b, type_at, end, wire):
                return half_life_ms
        return self._default_half_life_ms

    def _read_members(self, b: bytes, at: i64) -> i64:
        """Note where the memberships stand; return how many."""
        n = _map_size(b, at)
        while len(self._member_at) < n:
            self._member_at = append(self._member_at, i64(0))
            self._seq_at = append(self._seq_at, i64(0))
            self._exit_at = append(self._exit_at, i64(0))
            self._exit_ms = append(self._exit_ms, i64(0))
            self._new_exit_ms = append(self._new_exit_ms, i64(0))
        member_at, seq_at, exit_at = self._member_at, self._seq_at, self._exit_at
        exit_ms, new_exit_ms = self._exit_ms, self._new_exit_ms
        i = _first_key(b, at)
        k: i64 = 0
        while k < n:
            member_at[k] = i
            i = _after_str(b, i)
            if b[i] != 0x92:
                raise IndexError
            seq_at[k] = i + 1
            exit_at[k] = i = _after_int(b, i + 1)
            new_exit_ms[k] = _NOT_IN
            if b[i] == _NIL:
                exit_ms[k] = _NOT_IN
                i += 1
            else:
                exit_ms[k] = _int(b, i)
                i = _after_int(b, i)
            k += 1
        self._members_end = i
        return n

    def _member(self, b: bytes, n_members: i64, rule: Rule) -> i64:
        """Return which membership is a segment's, -1 if the user was never in it."""
        wire = self._ids[rule.position]
        member_at, seq_at = self._member_at, self._seq_at
        k: i64 = 0
        while k < n_members:
            # One byte, that of the pair, stands between name and seq.
            if _same(b, member_at[k], seq_at[k] - 1, wire):
                return k
            k += 1
        return -1

    def _touch(
        self,
        w: bytes,
        b: bytes,
        n_types: i64,
        n_members: i64,
        landmark_ms: i64,
        at_ms: i64,
        kind: Kind,
        item: str,
        buckets: tuple[Bucket, ...],
        moved: dict[str, int],
        candidates: list[Rule],
    ) -> bool:
        """Do what `Fold._touch` does for one item; `False` where more than it decides."""
        wire = self._wire(item)
        exit_ms_of, new_exit_ms = self._exit_ms, self._new_exit_ms
        for bucket in buckets:
            if bucket.by_rule:
                return False
            n_sums = self._read_sums(w, n_types, kind, wire, bucket.event_types)
            weight = self._weight(n_sums, landmark_ms, at_ms)
            for rule in bucket.by_item:
                k = self._member(b, n_members, rule)
                if k >= 0 and exit_ms_of[k] != _NOT_IN:
                    exit_ms = max(exit_ms_of[k], new_exit_ms[k])
                    later_ms = self._crossing_ms(n_sums, landmark_ms, rule.log_exit_weight)
                    if later_ms > exit_ms:
                        new_exit_ms[k] = later_ms
                        moved[rule.id] = later_ms
                elif weight >= min(rule.enter_least, rule.exit_weight) and rule not in candidates:
                    candidates.append(rule)
        return True

    def _standing(
        self, w: bytes, n_types: i64, landmark_ms: i64, at_ms: i64, rule: Rule
    ) -> tuple[float, int]:
        """Do what `Fold._standing` does, for a rule of which one item decides."""
        weight = 0.0
        exit_ms: i64 = NO_WEIGHT_MS
        criterion = rule.criteria[0]
        for item in criterion.items:
            n_sums = self._read_sums(w, n_types, criterion.kind, self._wire(item), criterion.event_types)
            if n_sums:
                weight = max(weight, self._weight(n_sums, landmark_ms, at_ms))
                exit_ms = max(exit_ms, self._crossing_ms(n_sums, landmark_ms, rule.log_exit_weight))
        return weight, exit_ms

    def _read_sums(
        self, w: bytes, n_types: i64, kind: Kind, wire: bytes, event_types: tuple[str, ...] | None
    ) -> i64:
        """Note an item's sums by half-life, over some event types or all; return how many there are."""
        n: i64 = 0
        type_at = self._type_at
        if event_types is None:
            t: i64 = 0
            while t < n_types:
                if kind != "type" or _same(w, type_at[t], self._total_at[t] - 2, wire):
                    n = self._add_sum(w, n, t, kind, wire)
                t += 1
            return n
        for event_type in event_types:
            type_wire = self._wire(event_type)
            t = 0
            while t < n_types:
                if _same(w, type_at[t], self._total_at[t] - 2, type_wire):
                    n = self._add_sum(w, n, t, kind, wire)
                    break
                t += 1
        return n

    def _add_sum(self, w: bytes, n: i64, t: i64, kind: Kind, wire: bytes) -> i64:
        """Add an item's sum of one event type to those that were noted; return how many there are."""
        if kind == "type":
            at = self._total_at[t]
        else:
            at = _find(w, self._labels_at[t] if kind == "label" else self._assets_at[t], wire)
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

    def _weight(self, n_sums: i64, landmark_ms: i64, at_ms: i64) -> float:
        """Return what `decay.weight_at` does of the sums that were noted."""
        elapsed_ms = float(at_ms - landmark_ms)
        total = 0.0
        u: i64 = 0
        while u < n_sums:
            total += self._sums[u] * 2.0 ** (-elapsed_ms / self._sum_half_lives_ms[u])
            u += 1
        return total

    def _crossing_ms(self, n_sums: i64, landmark_ms: i64, log_threshold: float) -> i64:
        """Return what `decay.crossing_ms` does of the sums that were noted."""
        if n_sums == 1:
            return single_crossing_ms(landmark_ms, self._sum_half_lives_ms[0], self._sums[0], log_threshold)
        sums = {}
        u: i64 = 0
        while u < n_sums:
            sums[self._sum_half_lives_ms[u]] = self._sums[u]
            u += 1
        return crossing_ms(landmark_ms, sums, log_threshold)

    def _forget_ms(self, w: bytes, n_types: i64, landmark_ms: i64, least_ms: i64) -> i64:
        """Return what `Fold._forget` does for the forget instant."""
        half_lives_ms, total_at = self._half_lives_ms, self._total_at
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
                    landmark_ms, half_lives_ms[t], total, self._weights.log_history_floor
                )
                forget_ms = max(forget_ms, faint_ms)
            t += 1
        return forget_ms


def _position(rule: Rule) -> int:
    return rule.position


def _wire(text: str) -> bytes:
    r"""Return a string in msgpack.

    Examples
    --------
    >>> _wire("swim"), len(_wire("s" * 40)), len(_wire("s" * 300))
    (b'\xa4swim', 42, 303)
    """
    raw = text.encode()
    size = len(raw)
    if size < 32:
        return bytes([0xA0 | size]) + raw
    if size < 256:
        return bytes([0xD9, size]) + raw
    return bytes([0xDA, size >> 8, size & 0xFF]) + raw


def _field(b: bytes, i: i64, name: i64) -> bool:
    """Tell whether a field of this one letter begins here."""
    return b[i] == 0xA1 and b[i + 1] == name


def _same(b: bytes, at: i64, end: i64, wire: bytes) -> bool:
    """Tell whether this part of a profile is these bytes; ids differ at their end, if anywhere."""
    k = i64(len(wire))
    if end - at != k:
        return False
    k -= 1
    while k >= 0:
        if b[at + k] != wire[k]:
            return False
        k -= 1
    return True


def _after_str(b: bytes, i: i64) -> i64:
    """Return where a string ends."""
    first: i64 = b[i]
    if 0xA0 <= first <= 0xBF:
        return i + 1 + (first & 31)
    if first == 0xD9:
        size: i64 = b[i + 1]
        return i + 2 + size
    if first == 0xDA:
        high: i64 = b[i + 1]
        low: i64 = b[i + 2]
        return i + 3 + (high << 8 | low)
    raise IndexError


def _after_int(b: bytes, i: i64) -> i64:
    """Return where a number that is not negative ends."""
    first: i64 = b[i]
    if first < 0x80:
        return i + 1
    if 0xCC <= first <= 0xCF:
        return i + 1 + (1 << (first - 0xCC))
    raise IndexError


def _int(b: bytes, i: i64) -> i64:
    """Return a number that is not negative."""
    first: i64 = b[i]
    if first < 0x80:
        return first
    if first == _UINT64:
        return read_i64_be(b, i + 1)
    end = _after_int(b, i)
    found: i64 = 0
    i += 1
    while i < end:
        found = found << 8 | i64(b[i])
        i += 1
    return found


def _write_int(out: BytesWriter, number: i64) -> None:
    """Write a number that is not negative, as short as can be."""
    if number < 0x80:
        out.append(u8(number))
    elif number >= 0x1_0000_0000:
        out.append(_UINT64)
        write_i64_be(out, number)
    else:
        if number < 0x100:
            out.append(0xCC)
        elif number < 0x1_0000:
            out.append(0xCD)
            out.append(u8(number >> 8))
        else:
            out.append(0xCE)
            out.append(u8(number >> 24))
            out.append(u8(number >> 16 & 0xFF))
            out.append(u8(number >> 8 & 0xFF))
        out.append(u8(number & 0xFF))


def _map_size(b: bytes, i: i64) -> i64:
    """Return how many pairs a map has."""
    first: i64 = b[i]
    if 0x80 <= first <= 0x8F:
        return first & 15
    if first == 0xDE:
        high: i64 = b[i + 1]
        low: i64 = b[i + 2]
        return high << 8 | low
    raise IndexError


def _first_key(b: bytes, i: i64) -> i64:
    """Return where the first key of a map stands."""
    return i + 3 if b[i] == 0xDE else i + 1


def _write_map_size(out: BytesWriter, size: i64) -> None:
    if size < 16:
        out.append(u8(0x80 | size))
    else:
        out.append(0xDE)
        out.append(u8(size >> 8))
        out.append(u8(size & 0xFF))


def _after_sums(b: bytes, at: i64) -> i64:
    """Return where a map of name to sum ends."""
    size = _map_size(b, at)
    i = _first_key(b, at)
    while size > 0:
        i = _after_str(b, i)
        if b[i] != _FLOAT64:
            raise IndexError
        i += 9
        size -= 1
    return i


def _find(b: bytes, at: i64, wire: bytes) -> i64:
    """Return where the sum of a name stands in such a map, -1 if it is not there."""
    size = _map_size(b, at)
    i = _first_key(b, at)
    while size > 0:
        end = _after_str(b, i)
        if _same(b, i, end, wire):
            return end + 1
        i = end + 9
        size -= 1
    return -1


def _add(out: BytesWriter, b: bytes, at: i64, end: i64, wires: list[bytes], amount: float) -> None:
    """Write a map of name to sum with an amount added to some, new ones at the end."""
    if not wires:
        out.write(b[at:end])
        return
    there: list[int] = []
    missing: list[bytes] = []
    for wire in wires:
        found = _find(b, at, wire)
        if found < 0:
            missing.append(wire)
        else:
            there.append(found)
    i = at
    if missing:
        _write_map_size(out, _map_size(b, at) + len(missing))
        i = _first_key(b, at)
    if len(there) > 1:
        there.sort()
    for found in there:
        out.write(b[i:found])
        write_f64_be(out, read_f64_be(b, found) + amount)
        i = found + 8
    out.write(b[i:end])
    for wire in missing:
        out.write(wire)
        out.append(_FLOAT64)
        write_f64_be(out, amount)
