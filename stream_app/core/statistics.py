"""What is counted of all users' events, as integers that add up exactly.

Decides which counts the next-category model is made of, how they are kept, and their form outside (`Delta`).
It must not know what is computed from them.

Every count is an integer and a plain sum over examples, and which counts an example adds to depends on the
user's own history alone. So the counts of a partition are a function of its log, the counts of several
partitions are added in any order with the same result to the last bit, and what was added can be taken away
again. Popularity fades without a decaying float: engagements are counted per period of time, periods older
than a window of them are counted together, and how much a period still weighs is decided by the reader.

A count is addressed by a code, one integer that packs the positions on the table's axes (`TABLES`). Positions
of labels, event types and assets are positions in lists of names, in order of first appearance.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ASSET_PERIODS",
    "GAPS",
    "HOURS",
    "LABEL_PERIODS",
    "MAX_ASSET_PAIRS",
    "MAX_EVENT_TYPES",
    "MAX_LABELS",
    "PERIOD_MS",
    "TABLES",
    "Delta",
    "Fading",
    "Statistics",
    "codes_of",
    "gap_of",
]

Ints = NDArray[np.int64]

MAX_LABELS = 4096
"""Labels in the model; over it the rarest leave."""
MAX_EVENT_TYPES = 256
"""Event types that are told apart; later ones are not counted."""
MAX_ASSET_PAIRS = 262_144
"""Pairs of asset and label; over it each label keeps its most popular ones."""
KEPT_ASSETS = 200
"""Assets that a label keeps then."""
DELTA_VERSION = 1

PERIOD_MS = 302_400_000
"""Half a week: popularity is counted per period of this length."""
LABEL_PERIODS = 24
ASSET_PERIODS = 12
"""How many periods are told apart."""
HOURS = 24
GAPS = 96
"""Buckets of the time since a label was last engaged: 0 for none, then two per doubling of it."""

_BITS = {"label": 12, "type": 12, "asset": 26, "period": 20, "hour": 5, "gap": 7, "outcome": 1}
_LONGEST = {"label": 64, "type": 64, "asset": 128}

TABLES: Mapping[str, tuple[str, ...]] = {
    # Engagements of a label, by time, by hour of the day (UTC), and by event type.
    "popularity": ("period", "label"),
    "hours": ("hour", "label"),
    "types": ("type", "label"),
    # Engagements by users who had not engaged the label before.
    "first_times": ("label",),
    # Pairs (k, l): l was engaged when k was the user's latest label, one of the latest three.
    "last": ("label", "label"),
    "latest": ("label", "label"),
    # Pairs (k, l): l was engaged for the first time by who had engaged k, or k stands before l in that event.
    "before": ("label", "label"),
    # Engaged labels by the time since their last engagement: how many there were, how many came again.
    "gaps": ("gap", "outcome"),
    # Engagements of an asset that carries a label.
    "assets": ("period", "asset", "label"),
}
"""Axes of every table, the last one first in a code."""

NAMED = ("label", "type", "asset")
LABEL_BITS = _BITS["label"]
LABEL_MASK = (1 << LABEL_BITS) - 1
"""The label of a code, which is always the last position."""
_PAIR_MASK = (1 << (_BITS["asset"] + LABEL_BITS)) - 1
"""The asset and the label of a code of `assets`."""


_MOST_EXAMPLES = 1 << 53
_MOST_COUNT = 1 << 31
"""What a document may say at most: counts are kept in 32 bits."""


def codes_of(table: str, *positions: NDArray[Any] | int) -> Ints:
    """Return the codes of counts from their positions on the axes of a table.

    Examples
    --------
    >>> codes_of("last", np.array([1, 0]), np.array([2, 3])).tolist()
    [4098, 3]
    """
    codes: Any = np.int64(0)
    for axis, position in zip(TABLES[table], positions, strict=True):
        codes = (codes << _BITS[axis]) | np.asarray(position, np.int64)
    return np.atleast_1d(codes)


def _positions(table: str, codes: Ints) -> list[Ints]:
    """Return what `codes_of` was given."""
    found: list[Ints] = []
    for axis in reversed(TABLES[table]):
        found.append(codes & ((1 << _BITS[axis]) - 1))
        codes = codes >> _BITS[axis]
    return found[::-1]


def gap_of(ages_ms: NDArray[np.float64]) -> Ints:
    """Return the bucket of the time since a label was last engaged: two per doubling, exact at the edges.

    The exponent and the first bit of the mantissa of a float are such a bucket, without a logarithm that
    might round differently elsewhere.

    Parameters
    ----------
    ages_ms
        Whole milliseconds; negative counts as 0.

    Examples
    --------
    >>> gap_of(np.array([-5.0, 0.0, 1.0, 2.0, 3.0, 4.0, 86_400_000.0])).tolist()
    [0, 0, 1, 3, 4, 5, 53]
    """
    half_octaves = (np.maximum(ages_ms, 0.5).view(np.int64) >> 51) - (1023 * 2 - 1)
    buckets: Ints = np.clip(half_octaves, 0, GAPS - 1)
    return buckets


def _no_names() -> dict[str, list[str]]:
    return {kind: [] for kind in NAMED}


@dataclass(slots=True)
class Delta:
    """Counts on their way: what was counted in some examples, apart from all other counts.

    Not to be changed. As taken from a model, codes may repeat and the lists of names are the model's own;
    `merged` gives the shortest form.

    Parameters
    ----------
    examples
        How many examples were counted.
    names
        Maps each kind of name, "label", "type" and "asset", to a list; its positions are what codes hold.
    tables
        Maps table to codes and counts, two arrays of one length, int64. Tables may be missing.

    Examples
    --------
    >>> one = {"first_times": (np.array([0]), np.array([1]))}
    >>> two = {"first_times": (np.array([0, 1]), np.array([1, 1]))}
    >>> one = Delta(1, {"label": ["b"], "type": [], "asset": []}, one)
    >>> two = Delta(1, {"label": ["a", "b"], "type": [], "asset": []}, two)
    >>> both = Delta.merged([one, two])
    >>> both.examples, both.names["label"], both.tables["first_times"][1].tolist()
    (2, ['b', 'a'], [2, 1])
    """

    examples: int = 0
    names: dict[str, list[str]] = field(default_factory=_no_names)
    tables: dict[str, tuple[Ints, Ints]] = field(default_factory=dict)

    @classmethod
    def merged(cls, deltas: Iterable["Delta"]) -> "Delta":
        """Return the sum of deltas: each count once, names that are used, in order of first appearance.

        Of more labels or event types than a model can have the rarest are left out, with their counts.
        """
        deltas = list(deltas)
        names = _Names()
        left_out = _left_out(deltas)
        collected: dict[str, list[tuple[Ints, Ints]]] = {}
        for group in _grouped(deltas):
            tables = {
                table: _summed([delta.tables[table] for delta in group if table in delta.tables])
                for table in TABLES
                if any(table in delta.tables for delta in group)
            }
            used: dict[str, list[Ints]] = {kind: [] for kind in NAMED}
            for table, (codes, _) in tables.items():
                for axis, positions in zip(TABLES[table], _positions(table, codes), strict=True):
                    if axis in used:
                        used[axis].append(positions)
            places = {}
            for kind, positions_of in used.items():
                given = group[0].names[kind]
                place = np.full(len(given), -1, np.int64)
                if positions_of:
                    for position in np.unique(np.concatenate(positions_of)).tolist():
                        if given[position] not in left_out[kind]:
                            place[position] = names.add(kind, given[position])
                places[kind] = place
            for table, (codes, counts) in tables.items():
                if any(left_out.values()):
                    held = _held(table, codes, places)
                    codes, counts = codes[held], counts[held]
                collected.setdefault(table, []).append((_recoded(table, codes, places), counts))
        summed = {table: _summed(parts) for table, parts in collected.items()}
        return cls(
            sum(delta.examples for delta in deltas),
            names.lists,
            {table: part for table, part in summed.items() if len(part[0])},
        )

    def condensed(self) -> "Delta":
        """Return the same counts with what a model does not tell apart put together.

        Periods that have faded away are one, and of too many assets each label keeps its most popular ones,
        so the sum of a partition's deltas does not grow for ever.
        """
        tables = dict(self.tables)
        names = self.names
        for table, periods in (("popularity", LABEL_PERIODS), ("assets", ASSET_PERIODS)):
            if table not in tables or not len(tables[table][0]):
                continue
            codes, counts = tables[table]
            of_period, *others = _positions(table, codes)
            oldest = max(0, int(of_period.max()) - periods)
            codes = codes_of(table, np.maximum(of_period, oldest), *others)
            tables[table] = _summed([(codes, counts)])
        if "assets" in tables:
            codes, counts = tables["assets"]
            pairs, place = np.unique(codes & _PAIR_MASK, return_inverse=True)
            if len(pairs) > MAX_ASSET_PAIRS:
                keep = _most_popular(pairs, np.bincount(place, counts, len(pairs)).astype(np.float64))
                held = np.isin(place, keep)
                tables["assets"] = codes[held], counts[held]
        return Delta.merged([Delta(self.examples, names, tables)])

    def as_document(self) -> dict[str, Any]:
        """Return the delta as plain data: maps, lists, integers, strings and bytes.

        ============  =====================================================================================
        ``v``         int, 1
        ``examples``  int
        ``names``     map of "label", "type", "asset" to an array of distinct names
        ``tables``    map of table to an array of columns, one per axis in the order of `TABLES` and the
                      counts last; a column is [type, bytes], type being "<u1", "<u2", "<u4" or "<i8" (little
                      endian)
        ============  =====================================================================================
        """
        short = Delta.merged([self])
        return {
            "v": DELTA_VERSION,
            "examples": short.examples,
            "names": short.names,
            "tables": {
                table: [_column(values) for values in (*_positions(table, codes), counts)]
                for table, (codes, counts) in short.tables.items()
            },
        }

    @classmethod
    def from_document(cls, document: object) -> "Delta":
        """Read what `as_document` returned.

        Raises
        ------
        ValueError
            If it is anything else; counts that are read wrongly would be added for good.

        Examples
        --------
        >>> Delta.from_document({"v": 2})
        Traceback (most recent call last):
        ...
        ValueError: not counts: expected a map with v = 1, got v = 2
        """
        try:
            return cls._read(document)
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise ValueError(f"not counts: {exc}") from exc

    @classmethod
    def _read(cls, document: Any) -> "Delta":
        version = document.get("v") if isinstance(document, dict) else None
        if version != DELTA_VERSION:
            raise ValueError(f"expected a map with v = {DELTA_VERSION}, got v = {version!r}")
        examples = document["examples"]
        if type(examples) is not int or not 0 <= examples < _MOST_EXAMPLES:
            raise ValueError(f"expected a number of examples, got {examples!r}")
        names = {}
        for kind in NAMED:
            given = document["names"][kind]
            if type(given) is not list or len(given) > 1 << _BITS[kind] or len(set(given)) != len(given):
                raise ValueError(f"expected a list of distinct names of kind {kind}, got another thing")
            for name in given:
                if type(name) is not str or not 0 < len(name) <= _LONGEST[kind]:
                    raise ValueError(f"expected names of 1 to {_LONGEST[kind]} characters, got {name!r:.80}")
            names[kind] = given
        tables = {}
        for table, columns in document["tables"].items():
            axes = TABLES.get(table)
            if axes is None or len(columns) != len(axes) + 1:
                raise ValueError(
                    f"expected one of the tables {', '.join(TABLES)} with its axes, got {table!r}"
                )
            *positions, counts = [_values(column) for column in columns]
            for axis, values in zip((*axes, "count"), (*positions, counts), strict=True):
                if len(values) != len(counts):
                    raise ValueError(f"expected {len(counts)} values on axis {axis}, got {len(values)}")
                least, most = 0, 1 << 53
                if axis == "count":
                    least, most = 1, _MOST_COUNT
                elif axis in NAMED:
                    most = len(names[axis])
                else:
                    most = {"hour": HOURS, "gap": GAPS}.get(axis, 1 << _BITS[axis])
                if len(values) and not least <= values.min() <= values.max() < most:
                    raise ValueError(
                        f"expected values from {least} to below {most} on axis {axis} of {table}, "
                        f"got {values.min()} to {values.max()}"
                    )
            tables[table] = (codes_of(table, *positions), counts)
        return cls(examples, names, tables)


def _column(values: Ints) -> list[str | bytes]:
    most = int(values.max(initial=0))
    kind = "<u1" if most < 1 << 8 else "<u2" if most < 1 << 16 else "<u4" if most < 1 << 32 else "<i8"
    return [kind, values.astype(kind).tobytes()]


def _values(column: Any) -> Ints:
    kind, blob = column
    if kind not in ("<u1", "<u2", "<u4", "<i8") or type(blob) is not bytes:
        raise ValueError(f"expected a type of integers and bytes, got {kind!r:.20} and {type(blob).__name__}")
    return np.frombuffer(blob, kind).astype(np.int64)


def _left_out(deltas: Sequence[Delta]) -> dict[str, set[str]]:
    """Return the names for which there is no room in one delta, by kind: the rarest, of equals the later."""
    found: dict[str, set[str]] = {kind: set() for kind in NAMED}
    for kind, table, most in (("label", "popularity", MAX_LABELS), ("type", "types", MAX_EVENT_TYPES)):
        names = dict.fromkeys(name for group in _grouped(deltas) for name in group[0].names[kind])
        if len(names) <= most:
            continue
        totals = dict.fromkeys(names, 0)
        for delta in deltas:
            if table not in delta.tables:
                continue
            codes, counts = delta.tables[table]
            positions = _positions(table, codes)[TABLES[table].index(kind)]
            for position, count in enumerate(np.bincount(positions, counts).tolist()):
                if count:
                    totals[delta.names[kind][position]] += int(count)
        ranked = sorted(totals, key=lambda name: -totals[name])
        found[kind] = set(ranked[most:])
    return found


def _held(table: str, codes: Ints, places: Mapping[str, Ints]) -> NDArray[np.bool_]:
    """Tell which codes have a place for all their names."""
    held = np.ones(len(codes), np.bool_)
    for axis, positions in zip(TABLES[table], _positions(table, codes), strict=True):
        if axis in places:
            held &= places[axis][positions] >= 0
    return held


def _most_popular(pairs: Ints, weights: NDArray[np.float64]) -> Ints:
    """Return where the `KEPT_ASSETS` heaviest pairs of each label stand; 7/8 of the bound at most."""
    labels = pairs & LABEL_MASK
    order = np.lexsort((np.arange(len(pairs)), -weights, labels))
    begins = np.searchsorted(labels[order], labels[order])
    kept = order[np.arange(len(order)) - begins < KEPT_ASSETS]
    # Below the bound, so that it is not reached again at once.
    most = MAX_ASSET_PAIRS * 7 // 8
    if len(kept) > most:
        kept = kept[np.lexsort((kept, -weights[kept]))[:most]]
    return np.sort(kept)


def _grouped(deltas: Sequence[Delta]) -> list[list[Delta]]:
    """Return deltas that share their lists of names together, so that they are summed before all else."""
    groups: dict[tuple[int, ...], list[Delta]] = {}
    for delta in deltas:
        groups.setdefault(tuple(id(delta.names[kind]) for kind in NAMED), []).append(delta)
    return list(groups.values())


def _summed(parts: Sequence[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    """Return the sum of counts: each code once, in order, none that is 0."""
    codes = np.concatenate([codes for codes, _ in parts])
    counts = np.concatenate([counts for _, counts in parts])
    unique, place = np.unique(codes, return_inverse=True)
    total = np.zeros(len(unique), np.int64)
    np.add.at(total, place, counts)
    left = total != 0
    return unique[left], total[left]


def _recoded(table: str, codes: Ints, places: Mapping[str, Ints]) -> Ints:
    """Return codes with positions of names replaced."""
    positions = _positions(table, codes)
    for number, axis in enumerate(TABLES[table]):
        if axis in places:
            positions[number] = places[axis][positions[number]]
    return codes_of(table, *positions)


class _Names:
    """Lists of distinct names with their positions."""

    def __init__(self) -> None:
        self.lists = _no_names()
        self.places: dict[str, dict[str, int]] = {kind: {} for kind in NAMED}

    def add(self, kind: str, name: str) -> int:
        place = self.places[kind]
        position = place.get(name)
        if position is None:
            position = place[name] = len(place)
            self.lists[kind].append(name)
        return position

    def kept(self, kind: str, keep: Ints) -> None:
        """Keep only the names at some positions, in new lists: deltas still refer to the old one."""
        self.lists = dict(self.lists)
        self.lists[kind] = [self.lists[kind][position] for position in keep.tolist()]
        self.places[kind] = {name: position for position, name in enumerate(self.lists[kind])}


class Fading:
    """Counts per period of time, of which the last ones are told apart.

    Which periods those are is decided by the latest one ever counted, so the counts do not depend on the
    order in which they were added.

    Parameters
    ----------
    periods
        How many are told apart; older ones are counted together.

    Attributes
    ----------
    counts
        Array, shape (capacity, 1 + periods), int32: first the old ones, then a ring.
    newest
        The latest period.

    Examples
    --------
    >>> fading = Fading(2)
    >>> fading.add(np.array([7, 8, 8]), np.array([0, 0, 0]), np.array([1, 1, 1]))
    >>> fading.weights(1, half_life=1.0).tolist(), fading.totals(1).tolist()
    ([2.5], [3])
    >>> fading.add(np.array([9]), np.array([0]), np.array([1]))
    >>> fading.weights(1, half_life=1.0, old=0.0).tolist()
    [2.0]
    """

    def __init__(self, periods: int) -> None:
        self.counts = np.zeros((64, 1 + periods), np.int32)
        self.newest = 0
        self._periods = periods

    def add(self, periods: Ints, rows: Ints, counts: Ints) -> None:
        """Add counts to rows, in the period of each."""
        if not len(rows):
            return
        self._reach(int(rows.max()) + 1)
        newest = int(periods.max())
        if newest > self.newest:
            for period in range(max(self.newest + 1, newest - self._periods + 1), newest + 1):
                column = 1 + period % self._periods
                self.counts[:, 0] += self.counts[:, column]
                self.counts[:, column] = 0
            self.newest = newest
        columns = np.where(periods > self.newest - self._periods, 1 + periods % self._periods, 0)
        np.add.at(self.counts, (rows, columns), counts.astype(np.int32))

    def totals(self, size: int) -> Ints:
        """Return the sums over all time of the first rows."""
        self._reach(size)
        totals: Ints = self.counts[:size].sum(axis=1, dtype=np.int64)
        return totals

    def weights(self, size: int, half_life: float, old: float | None = None) -> NDArray[np.float64]:
        """Return sums of the first rows in which a period weighs half as much every `half_life` periods.

        Parameters
        ----------
        size
            How many rows.
        half_life
            In periods.
        old
            What a count of the old ones weighs; `None` for as much as the period after them would.
        """
        self._reach(size)
        ages = np.zeros(1 + self._periods)
        columns = np.arange(self._periods)
        ages[1:] = (self.newest - columns) % self._periods
        left = 2.0 ** (-ages / half_life)
        left[0] = 2.0 ** (-self._periods / half_life) if old is None else old
        weights: NDArray[np.float64] = self.counts[:size] @ left
        return weights

    def keep(self, rows: Ints) -> None:
        """Keep only some rows."""
        self.counts = self.counts[rows]

    def _reach(self, size: int) -> None:
        if size > len(self.counts):
            more = max(size, 2 * len(self.counts)) - len(self.counts)
            self.counts = np.pad(self.counts, ((0, more), (0, 0)))


class Statistics:
    """All counts of the model, with what was counted here since it was last asked for.

    Attributes
    ----------
    examples
        How many examples were counted, here and elsewhere.
    moved
        How many examples were counted or taken away.
    changes
        How often counts have changed: equal numbers mean equal counts.
    labels_dropped
        How many labels have left because there were too many.
    popularity
        Of labels.
    hours, types, first_times, gaps
        Arrays, shapes (24, capacity), (types, capacity), (capacity,) and (`GAPS`, 2).
    last, latest, before
        Arrays, shape (capacity, capacity), int32; see `TABLES`.
    assets
        Of pairs of an asset and a label; rows as in `asset_rows`.
    asset_rows
        Maps asset position·4096 + label position to a row.
    """

    def __init__(self) -> None:
        self._names = _Names()
        self._pending: list[Delta] = []
        self.examples = 0
        self.moved = 0
        self.changes = 0
        self.labels_dropped = 0
        self.popularity = Fading(LABEL_PERIODS)
        self.assets = Fading(ASSET_PERIODS)
        self.asset_rows: dict[int, int] = {}
        capacity = 64
        self.hours = np.zeros((HOURS, capacity), np.int64)
        self.types = np.zeros((MAX_EVENT_TYPES, capacity), np.int64)
        self.first_times = np.zeros(capacity, np.int64)
        self.gaps = np.zeros((GAPS, 2), np.int64)
        self.last = np.zeros((capacity, capacity), np.int32)
        self.latest = np.zeros((capacity, capacity), np.int32)
        self.before = np.zeros((capacity, capacity), np.int32)

    @property
    def labels(self) -> list[str]:
        """The labels, in order of first appearance; not to be changed."""
        return self._names.lists["label"]

    @property
    def label_places(self) -> Mapping[str, int]:
        """Maps label to its position."""
        return self._names.places["label"]

    @property
    def event_types(self) -> list[str]:
        """The event types, in order of first appearance; not to be changed."""
        return self._names.lists["type"]

    @property
    def asset_ids(self) -> list[str]:
        """The assets; not to be changed."""
        return self._names.lists["asset"]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        arrays = (self.hours, self.types, self.first_times, self.gaps, self.last, self.latest, self.before)
        return sum(array.nbytes for array in (*arrays, self.popularity.counts, self.assets.counts))

    def make_room(self, labels: Iterable[str]) -> Ints | None:
        """Let the rarest labels leave if new ones would be too many.

        Returns
        -------
        array or None
            The former positions of the labels that stay, in order: all positions have changed. `None` if
            nothing has.
        """
        new = set(labels).difference(self.label_places)
        if len(self.labels) + len(new) <= MAX_LABELS:
            return None
        drop = max(len(self.labels) + len(new) - MAX_LABELS, MAX_LABELS // 8)
        return self._drop_labels(min(drop, len(self.labels)))

    def place_labels(self, labels: Iterable[str]) -> None:
        """Give labels a position, new ones at the end, as far as there is room for them."""
        places = self.label_places
        before = len(places)
        for label in labels:
            if label not in places and len(places) < MAX_LABELS:
                self._names.add("label", label)
        if len(places) > before:
            self.changes += 1
            self._grow()

    def places_of(self, kind: str, names: Sequence[str]) -> list[int]:
        """Return the positions of event types or assets, new ones at the end; -1 for event types too many."""
        place = self._names.places[kind].get
        found = [place(name, -1) for name in names]
        if -1 in found:
            for number, name in enumerate(names):
                if found[number] >= 0:
                    continue
                if (
                    kind != "type"
                    or name in self._names.places[kind]
                    or len(self.event_types) < MAX_EVENT_TYPES
                ):
                    found[number] = self._names.add(kind, name)
        return found

    def count(self, examples: int, tables: Mapping[str, Ints | tuple[Ints, Ints]]) -> None:
        """Count examples, here and in what `take_delta` will return.

        Parameters
        ----------
        examples
            How many.
        tables
            Maps table to codes, each counting 1, or to codes and counts.
        """
        full = {
            table: part if isinstance(part, tuple) else (part, np.ones(len(part), np.int64))
            for table, part in tables.items()
        }
        delta = Delta(
            examples, self._names.lists, {table: part for table, part in full.items() if len(part[0])}
        )
        self._pending.append(delta)
        self._apply(delta.examples, delta.tables)

    def take_delta(self) -> Delta:
        """Return what was counted here since the last call."""
        pending, self._pending = self._pending, []
        if len(pending) == 1:
            return pending[0]
        if len(_grouped(pending)) > 1:
            return Delta.merged(pending)
        tables = {}
        for table in TABLES:
            parts = [delta.tables[table] for delta in pending if table in delta.tables]
            if parts:
                tables[table] = (
                    np.concatenate([codes for codes, _ in parts]),
                    np.concatenate([counts for _, counts in parts]),
                )
        names = pending[0].names if pending else _no_names()
        return Delta(sum(delta.examples for delta in pending), names, tables)

    def add(self, delta: Delta, sign: int = 1) -> None:
        """Add counts from elsewhere, or with sign -1 take them away again; they are not pending.

        Counts of labels for which there is no room are left out: see `make_room`. What has left since it was
        added is not there to be taken away.
        """
        delta = Delta.merged([delta])
        if sign > 0:
            self.place_labels(delta.names["label"])
            self.places_of("asset", delta.names["asset"])
            self.places_of("type", delta.names["type"])
        places = {
            kind: np.array([self._names.places[kind].get(name, -1) for name in delta.names[kind]], np.int64)
            for kind in NAMED
        }
        tables = {}
        for table, (codes, counts) in delta.tables.items():
            known = _held(table, codes, places)
            tables[table] = (_recoded(table, codes[known], places), sign * counts[known])
        self._apply(sign * delta.examples, tables)
        if sign < 0:
            # A label that left and came back since has lost the counts that are taken away here.
            arrays = (
                self.hours,
                self.types,
                self.first_times,
                self.gaps,
                self.last,
                self.latest,
                self.before,
            )
            for array in (*arrays, self.popularity.counts, self.assets.counts):
                np.maximum(array, 0, out=array)

    def _apply(self, examples: int, tables: Mapping[str, tuple[Ints, Ints]]) -> None:
        self.examples += examples
        self.moved += abs(examples)
        self.changes += 1
        for table, (codes, counts) in tables.items():
            positions = _positions(table, codes)
            if table == "popularity":
                self.popularity.add(positions[0], positions[1], counts)
            elif table == "assets":
                self._add_assets(positions[0], codes & _PAIR_MASK, counts)
            else:
                array = getattr(self, table)
                np.add.at(array, tuple(positions), counts.astype(array.dtype))

    def _add_assets(self, periods: Ints, pairs: Ints, counts: Ints) -> None:
        rows = self.asset_rows
        known = pairs.tolist()
        found = [rows.get(pair, -1) for pair in known]
        if -1 in found:
            found = [rows.setdefault(pair, len(rows)) for pair in known]
        place = np.array(found, np.int64)
        self.assets.add(periods, place, counts)
        if len(rows) > MAX_ASSET_PAIRS:
            self._drop_assets()

    def _grow(self) -> None:
        size, capacity = len(self.labels), len(self.first_times)
        if size <= capacity:
            return
        grown = capacity
        while grown < size:
            grown *= 2
        more = min(grown, MAX_LABELS) - capacity
        self.first_times = np.pad(self.first_times, (0, more))
        self.hours = np.pad(self.hours, ((0, 0), (0, more)))
        self.types = np.pad(self.types, ((0, 0), (0, more)))
        for table in ("last", "latest", "before"):
            setattr(self, table, np.pad(getattr(self, table), ((0, more), (0, more))))

    def _drop_labels(self, drop: int) -> Ints:
        """Let the rarest labels leave; return the former positions of the others."""
        totals = self.popularity.totals(len(self.labels))
        # Of equally rare ones those that appeared last leave.
        order = np.lexsort((-np.arange(len(totals)), totals))
        keep = np.sort(order[drop:])
        self.labels_dropped += drop
        place = np.full(len(self.labels), -1, np.int64)
        place[keep] = np.arange(len(keep))
        self._names.kept("label", keep)
        self.popularity.keep(keep)
        capacity = len(self.first_times)
        room = (0, capacity - len(keep))
        self.first_times = np.pad(self.first_times[keep], room)
        for table in ("hours", "types"):
            setattr(self, table, np.pad(getattr(self, table)[:, keep], ((0, 0), room)))
        for table in ("last", "latest", "before"):
            setattr(self, table, np.pad(getattr(self, table)[np.ix_(keep, keep)], (room, room)))
        pairs = np.fromiter(self.asset_rows, np.int64, len(self.asset_rows))
        label = place[pairs & LABEL_MASK]
        self._keep_assets((pairs & ~LABEL_MASK) | label, np.flatnonzero(label >= 0))
        self.changes += 1
        return keep

    def _drop_assets(self) -> None:
        """Let every label keep its most popular assets."""
        pairs = np.fromiter(self.asset_rows, np.int64, len(self.asset_rows))
        self._keep_assets(pairs, _most_popular(pairs, self.assets.weights(len(pairs), 4.0)))

    def _keep_assets(self, pairs: Ints, keep: Ints) -> None:
        self.assets.keep(keep)
        assets, place = np.unique(pairs[keep] >> _BITS["label"], return_inverse=True)
        self._names.kept("asset", assets)
        recoded = (place << _BITS["label"]) | (pairs[keep] & LABEL_MASK)
        self.asset_rows = {pair: row for row, pair in enumerate(recoded.tolist())}
