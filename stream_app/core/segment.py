"""What a segment is, which definitions make sense, and which of them an event concerns.

Decides whether a set of definitions is valid (`problems`), whether it is wise (`advice`), in which order its
segments are evaluated, and, by an inverted index from items to segments, whom an event can touch at all: the
cost of an event does not grow with the definitions that do not name its label, asset or type. It must not
know how a weight is stored or how a user enters: that is `fold`.

Ids are 1 to 64 characters of a-z, 0-9, "_", "." and "-", the first one a letter or a digit: they become part
of Redis keys, CloudEvents sources and command lines, and must not need quoting in any of them.
"""

import hashlib
import heapq
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stream_app.core.decay import HOLD_MS, SLACK, Weights

__all__ = [
    "MAX_ITEMS",
    "MAX_SEGMENTS",
    "Advice",
    "Bucket",
    "Criterion",
    "Index",
    "Kind",
    "Problem",
    "Rule",
    "Segment",
    "SegmentSet",
    "advice",
    "problems",
]

Kind = Literal["label", "asset", "type"]
"""What an item of a criterion is."""

MAX_SEGMENTS = 10_000
MAX_ITEMS = 1_000

_ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_ID_EXPECTED = "1 to 64 characters of a-z, 0-9, '_', '.', '-', the first a letter or a digit"
_ITEM_LENGTHS = {"labels": 64, "asset_ids": 128, "event_types": 64}


@dataclass(frozen=True, slots=True)
class Segment:
    """One definition, as written in segments.toml.

    Parameters
    ----------
    id
        Names the segment everywhere; see the module's docstring for its alphabet.
    name
        For people; the service ignores it.
    type
        "base": users with a history of engagement. "discovery": users whose next category this may be.
    labels, asset_ids, event_types
        What is counted. An empty one is not given. Event types restrict what labels and assets sum over;
        alone, they are what is counted.
    min_weight
        The weight from which a user is let in; 0 means any history at all, that is `history_floor`.
    exit_weight
        The weight below which a member leaves; `None` means at `min_weight`.
    match_labels, match_assets
        Whether one item is enough or all are needed, each by itself.
    exclude
        Ids of base segments whose members are not let in, and leave.

    Examples
    --------
    >>> segment = Segment("swim", labels=("swimwear", "beach"), min_weight=2)
    >>> segment.version
    '266d9238f52483be'
    >>> Segment("swim", labels=("beach", "swimwear"), min_weight=2.0).version == segment.version
    True
    """

    id: str
    name: str = ""
    type: Literal["base", "discovery"] = "base"
    labels: tuple[str, ...] = ()
    asset_ids: tuple[str, ...] = ()
    event_types: tuple[str, ...] = ()
    min_weight: float = 0.0
    exit_weight: float | None = None
    match_labels: Literal["any", "all"] = "any"
    match_assets: Literal["any", "all"] = "any"
    exclude: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """The first 16 hex digits of SHA-256 of the definition's canonical JSON."""
        return _digest(_canonical(self))


def _canonical(segment: Segment) -> dict[str, Any]:
    """Return a definition so that equal meanings give equal JSON: lists sorted without repeats, floats."""
    return {
        "id": segment.id,
        "name": segment.name,
        "type": segment.type,
        "labels": sorted(set(segment.labels)),
        "asset_ids": sorted(set(segment.asset_ids)),
        "event_types": sorted(set(segment.event_types)),
        "min_weight": float(segment.min_weight),
        "exit_weight": None if segment.exit_weight is None else float(segment.exit_weight),
        "match_labels": segment.match_labels,
        "match_assets": segment.match_assets,
        "exclude": sorted(set(segment.exclude)),
    }


def _json(document: object) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _digest(document: object) -> str:
    return hashlib.sha256(_json(document).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that makes a set of definitions unusable.

    Parameters
    ----------
    segment_id
        Whose definition; "" for the set as a whole.
    key
        The key of the definition that is wrong.
    expected, got
        In words that a sentence can be made of.

    Examples
    --------
    >>> print(Problem("swim", "min_weight", "a finite number", "nan"))
    segment 'swim', min_weight: expected a finite number, got nan
    """

    segment_id: str
    key: str
    expected: str
    got: str

    @property
    def where(self) -> str:
        """The place in the definitions, in words."""
        return f"segment {_shown(self.segment_id)}, {self.key}" if self.segment_id else self.key

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, got {self.got}"


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing that is allowed and probably not meant.

    Parameters
    ----------
    segment_id
        Whose definition.
    key
        The key of the definition to think about.
    text
        What will happen, and what to do about it.
    """

    segment_id: str
    key: str
    text: str

    def __str__(self) -> str:
        return f"segment {_shown(self.segment_id)}, {self.key}: {self.text}"


@dataclass(frozen=True, slots=True)
class Criterion:
    """One condition of a base segment, ready to be evaluated.

    Parameters
    ----------
    kind
        What its items are.
    items
        Distinct, at least one.
    item_set
        The same, to intersect with what a user has.
    match_all
        Whether the smallest item decides (all) or the largest (any).
    event_types
        The types that an item's weight is summed over; `None` means all. For items that are types, `None`.
    """

    kind: Kind
    items: tuple[str, ...]
    item_set: frozenset[str]
    match_all: bool
    event_types: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Rule:
    """A base segment, ready to be evaluated.

    Parameters
    ----------
    id
        The segment's.
    segment
        The definition.
    version
        The definition's, computed once.
    position
        Its place in the topological order: greater than that of every segment that it excludes.
    criteria
        One or two; all must hold.
    enter_least
        The least weight that enters: the entry threshold less the slack in the member's favour.
    exit_weight
        The threshold that a member must not fall below.
    log_exit_weight
        Its logarithm to base 2.
    exclude
        Ids of the segments that suppress this one.
    dependents
        Positions of the segments that this one suppresses.
    one_item_decides
        Whether a single item is enough to enter: one criterion, and any of its items will do.
    """

    id: str
    segment: Segment
    version: str
    position: int
    criteria: tuple[Criterion, ...]
    enter_least: float
    exit_weight: float
    log_exit_weight: float
    exclude: tuple[str, ...]
    dependents: tuple[int, ...]
    one_item_decides: bool


@dataclass(frozen=True, slots=True)
class Bucket:
    """The rules that name one item and sum it over the same event types.

    Parameters
    ----------
    event_types
        What the item's weight is summed over; `None` means all types.
    by_item
        Rules of which this item alone decides.
    by_rule
        Rules that need their other items too.
    """

    event_types: tuple[str, ...] | None
    by_item: tuple[Rule, ...]
    by_rule: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """Whom an item concerns: maps label, asset or type to the buckets of rules that name it."""

    labels: dict[str, tuple[Bucket, ...]]
    assets: dict[str, tuple[Bucket, ...]]
    types: dict[str, tuple[Bucket, ...]]


class SegmentSet:
    """All definitions together, checked, ordered and indexed. Never changes after it is built.

    Parameters
    ----------
    segments
        In any order; the order has no meaning.
    weights
        Gives the history floor, with which `min_weight = 0` compares.

    Raises
    ------
    ValueError
        If `problems` finds any; the message lists them all.

    Attributes
    ----------
    segments : tuple of Segment
        In topological order: what is excluded comes before what excludes it, otherwise by id.
    rules : tuple of Rule
        The base segments among them, in the same order.
    rule_by_id : dict
        Maps id to rule.
    any_type : Index
        Rules that sum over all event types, by their items.
    by_type : dict
        Maps event type to the `Index` of the rules that count it by name.
    named_labels, named_assets, named_types : frozenset of str
        What any base segment names: caps never drop it.
    fingerprint : str
        16 hex digits; equal for equal definitions in any order.

    Examples
    --------
    >>> loyal = Segment("loyal", event_types=("purchase",), min_weight=5)
    >>> fresh = Segment("fresh", event_types=("purchase",), exclude=("loyal",))
    >>> [segment.id for segment in SegmentSet([fresh, loyal], Weights()).segments]
    ['loyal', 'fresh']
    """

    __slots__ = (
        "_by_id",
        "any_type",
        "by_type",
        "fingerprint",
        "named_assets",
        "named_labels",
        "named_types",
        "rule_by_id",
        "rules",
        "segments",
    )

    def __init__(self, segments: Iterable[Segment], weights: Weights) -> None:
        given = list(segments)
        found = problems(given, weights)
        if found:
            raise ValueError("; ".join(str(problem) for problem in found))
        self.segments = _in_topological_order(given)
        self._by_id = {segment.id: segment for segment in self.segments}
        self.rules = _compile(self.segments, weights)
        self.rule_by_id = {rule.id: rule for rule in self.rules}
        self.any_type, self.by_type = _index(self.rules)
        base = [rule.segment for rule in self.rules]
        self.named_labels = frozenset(item for segment in base for item in segment.labels)
        self.named_assets = frozenset(item for segment in base for item in segment.asset_ids)
        self.named_types = frozenset(item for segment in base for item in segment.event_types)
        self.fingerprint = _digest([_canonical(segment) for segment in self._sorted()])

    def __repr__(self) -> str:
        return f"SegmentSet({len(self.segments)} segments, fingerprint={self.fingerprint!r})"

    def _sorted(self) -> list[Segment]:
        return sorted(self.segments, key=lambda segment: segment.id)

    def get(self, segment_id: str) -> Segment | None:
        """Return the definition with an id, `None` if there is none."""
        return self._by_id.get(segment_id)

    def canonical_json(self) -> str:
        """Return all definitions as JSON that depends on nothing but them; see `from_canonical_json`."""
        return _json([_canonical(segment) for segment in self._sorted()])

    @classmethod
    def from_canonical_json(cls, text: str, weights: Weights) -> "SegmentSet":
        """Rebuild a set from its `canonical_json`: profiles may have been evaluated under an older set.

        Parameters
        ----------
        text
            What `canonical_json` returned.
        weights
            The settings that the profiles are stored under.

        Raises
        ------
        ValueError
            If the text is anything else.

        Examples
        --------
        >>> a = SegmentSet([Segment("swim", labels=("swimwear",))], Weights())
        >>> SegmentSet.from_canonical_json(a.canonical_json(), Weights()).fingerprint == a.fingerprint
        True
        """
        try:
            entries: list[dict[str, Any]] = json.loads(text)
            for entry in entries:
                entry.update({key: tuple(value) for key, value in entry.items() if type(value) is list})
            return cls([Segment(**entry) for entry in entries], weights)
        except (TypeError, AttributeError) as exc:
            raise ValueError(
                f"segment definitions: expected a list written by canonical_json, got {exc}"
            ) from exc


def problems(segments: Sequence[Segment], weights: Weights) -> list[Problem]:
    """List everything that makes definitions unusable, not only the first.

    Parameters
    ----------
    segments
        As read, in the file's order; types of fields are taken as checked.
    weights
        Gives the history floor.

    Returns
    -------
    list of Problem
        Empty if a `SegmentSet` can be built.

    Examples
    --------
    >>> segments = [Segment("a", exclude=("b",)), Segment("b", labels=("x",), exclude=("a",))]
    >>> for problem in problems(segments, Weights()):
    ...     print(problem)
    segment 'a', labels: expected one of labels, asset_ids, event_types, got none (an empty list is none)
    segment 'a', exclude: expected no cycle, got a → b → a
    """
    found: list[Problem] = []
    if len(segments) > MAX_SEGMENTS:
        found.append(Problem("", "segments", f"at most {MAX_SEGMENTS} definitions", str(len(segments))))
        return found
    places: dict[str, int] = {}
    for place, segment in enumerate(segments, start=1):
        if not _ID.fullmatch(segment.id):
            found.append(Problem("", f"segment {place}, id", _ID_EXPECTED, _shown(segment.id)))
        elif segment.id in places:
            got = f"the id of definition {places[segment.id]} again in definition {place}"
            found.append(Problem(segment.id, "id", "an id that no other definition has", got))
        places.setdefault(segment.id, place)
        found.extend(_criteria_problems(segment))
        found.extend(_threshold_problems(segment, weights.history_floor))
    found.extend(_exclude_problems(segments))
    return found


def _criteria_problems(segment: Segment) -> list[Problem]:
    """List what is wrong with what a segment counts."""
    found = []
    if segment.type not in ("base", "discovery"):
        found.append(Problem(segment.id, "type", "'base' or 'discovery'", _shown(segment.type)))
    for key, match in (("match_labels", segment.match_labels), ("match_assets", segment.match_assets)):
        if match not in ("any", "all"):
            found.append(Problem(segment.id, key, "'any' or 'all'", _shown(match)))
    lists = {"labels": segment.labels, "asset_ids": segment.asset_ids, "event_types": segment.event_types}
    if not any(lists.values()):
        expected = "one of labels, asset_ids, event_types"
        found.append(Problem(segment.id, "labels", expected, "none (an empty list is none)"))
    for key, items in lists.items():
        if len(items) > MAX_ITEMS:
            found.append(Problem(segment.id, key, f"at most {MAX_ITEMS} items", str(len(items))))
            continue
        limit = _ITEM_LENGTHS[key]
        for item in items:
            if not 1 <= len(item) <= limit or any(
                unicodedata.category(char) in ("Cc", "Cs") for char in item
            ):
                expected = f"items of 1 to {limit} characters, none of them a control character"
                found.append(Problem(segment.id, key, expected, _shown(item)))
    return found


def _threshold_problems(segment: Segment, floor: float) -> list[Problem]:
    """List what is wrong with a segment's thresholds."""
    found = []
    sound = True
    for key, value in (("min_weight", segment.min_weight), ("exit_weight", segment.exit_weight)):
        if value is None:
            continue
        if not (math.isfinite(value) and value >= 0):
            found.append(Problem(segment.id, key, "a finite number, not negative", repr(value)))
            sound = False
        elif segment.type == "base" and 0 < value < floor:
            expected = f"0 (any history) or at least history_floor ({floor:g})"
            found.append(Problem(segment.id, key, expected, repr(value)))
    if not sound or segment.exit_weight is None:
        return found
    if segment.exit_weight > segment.min_weight:
        expected = f"at most min_weight ({segment.min_weight:g})"
        found.append(Problem(segment.id, "exit_weight", expected, repr(segment.exit_weight)))
    if segment.type == "base" and segment.exit_weight == 0 and segment.min_weight > 0:
        # Weights never reach 0, so a member would stay for ever, even with all else forgotten.
        expected = f"at least history_floor ({floor:g}) where min_weight is not 0"
        found.append(Problem(segment.id, "exit_weight", expected, repr(segment.exit_weight)))
    return found


def _exclude_problems(segments: Sequence[Segment]) -> list[Problem]:
    """List exclusions of what is not there, not base, or in the end oneself."""
    found = []
    types = {segment.id: segment.type for segment in segments}
    edges: dict[str, list[str]] = {segment.id: [] for segment in segments}
    for segment in segments:
        if len(segment.exclude) > MAX_ITEMS:
            found.append(
                Problem(segment.id, "exclude", f"at most {MAX_ITEMS} items", str(len(segment.exclude)))
            )
            continue
        for other in segment.exclude:
            if other == segment.id:
                found.append(Problem(segment.id, "exclude", "other segments", "itself"))
            elif other not in types:
                found.append(Problem(segment.id, "exclude", "ids of defined segments", _shown(other)))
            elif types[other] != "base":
                got = f"{_shown(other)}, of type {_shown(types[other])}"
                found.append(Problem(segment.id, "exclude", "ids of base segments", got))
            else:
                edges[segment.id].append(other)
    for cycle in _cycles(edges):
        found.append(Problem(cycle[0], "exclude", "no cycle", " → ".join([*cycle, cycle[0]])))
    return found


def _cycles(edges: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Return one cycle for every way back that a depth-first walk meets, none if there is no cycle.

    Each begins at its first id in the alphabet. The walk keeps its own stack: a chain of 10,000 exclusions is
    deeper than Python's.
    """
    cycles = []
    done: set[str] = set()
    for start in edges:
        if start in done:
            continue
        path: list[str] = []
        on_path: dict[str, int] = {}
        stack: list[tuple[str, bool]] = [(start, False)]
        while stack:
            node, leaving = stack.pop()
            if leaving:
                path.pop()
                del on_path[node]
                done.add(node)
            elif node in on_path:
                cycle = path[on_path[node] :]
                first = cycle.index(min(cycle))
                cycles.append(cycle[first:] + cycle[:first])
            elif node not in done:
                on_path[node] = len(path)
                path.append(node)
                stack.append((node, True))
                stack.extend((other, False) for other in edges[node])
    return cycles


def _in_topological_order(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Return acyclic segments, excluded before excluding, otherwise by id (Kahn, 1962)."""
    by_id = {segment.id: segment for segment in segments}
    waiting_for = {segment.id: len(set(segment.exclude)) for segment in by_id.values()}
    excluded_by: dict[str, list[str]] = {segment_id: [] for segment_id in by_id}
    for segment in by_id.values():
        for other in set(segment.exclude):
            excluded_by[other].append(segment.id)
    ready = [segment_id for segment_id, count in waiting_for.items() if count == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        segment_id = heapq.heappop(ready)
        order.append(by_id[segment_id])
        for dependent in excluded_by[segment_id]:
            waiting_for[dependent] -= 1
            if waiting_for[dependent] == 0:
                heapq.heappush(ready, dependent)
    return tuple(order)


def _compile(segments: Sequence[Segment], weights: Weights) -> tuple[Rule, ...]:
    """Turn base segments, in topological order, into rules."""
    base = [segment for segment in segments if segment.type == "base"]
    dependents: dict[str, list[int]] = {segment.id: [] for segment in base}
    for position, segment in enumerate(base):
        for other in set(segment.exclude):
            dependents[other].append(position)
    rules = []
    for position, segment in enumerate(base):
        criteria = _criteria(segment)
        enter_weight, exit_weight = _thresholds(segment, weights.history_floor)
        rules.append(
            Rule(
                id=segment.id,
                segment=segment,
                version=segment.version,
                position=position,
                criteria=criteria,
                enter_least=enter_weight * (1.0 - SLACK),
                exit_weight=exit_weight,
                log_exit_weight=math.log2(exit_weight),
                exclude=tuple(dict.fromkeys(segment.exclude)),
                dependents=tuple(dependents[segment.id]),
                one_item_decides=len(criteria) == 1
                and (not criteria[0].match_all or len(criteria[0].items) == 1),
            )
        )
    return tuple(rules)


def _thresholds(segment: Segment, floor: float) -> tuple[float, float]:
    """Return the weights at which a user enters and leaves, with 0 read as the floor."""
    enter_weight = segment.min_weight if segment.min_weight > 0 else floor
    if segment.exit_weight is None:
        return enter_weight, enter_weight
    return enter_weight, segment.exit_weight if segment.exit_weight > 0 else floor


def _criteria(segment: Segment) -> tuple[Criterion, ...]:
    """Return the conditions of a segment; event types are one only where there is nothing else."""
    event_types = tuple(dict.fromkeys(segment.event_types)) or None
    criteria = []
    if segment.labels:
        criteria.append(_criterion("label", segment.labels, segment.match_labels == "all", event_types))
    if segment.asset_ids:
        criteria.append(_criterion("asset", segment.asset_ids, segment.match_assets == "all", event_types))
    if not criteria:
        criteria.append(_criterion("type", segment.event_types, False, None))
    return tuple(criteria)


def _criterion(
    kind: Kind,
    items: Sequence[str],
    match_all: bool,
    event_types: tuple[str, ...] | None,
) -> Criterion:
    distinct = tuple(dict.fromkeys(items))
    return Criterion(kind, distinct, frozenset(distinct), match_all, event_types)


@dataclass(slots=True)
class _OpenIndex:
    """An `Index` under construction: maps (kind, item, event types) to the rules that name it."""

    rules: dict[tuple[str, str, tuple[str, ...] | None], list[Rule]] = field(default_factory=dict)

    def add(self, criterion: Criterion, rule: Rule) -> None:
        for item in criterion.items:
            self.rules.setdefault((criterion.kind, item, criterion.event_types), []).append(rule)

    def closed(self) -> Index:
        buckets: dict[str, dict[str, list[Bucket]]] = {"label": {}, "asset": {}, "type": {}}
        for (kind, item, event_types), rules in self.rules.items():
            bucket = Bucket(
                event_types,
                by_item=tuple(rule for rule in rules if rule.one_item_decides),
                by_rule=tuple(rule for rule in rules if not rule.one_item_decides),
            )
            buckets[kind].setdefault(item, []).append(bucket)
        label, asset, kind_type = (
            {item: tuple(found) for item, found in buckets[kind].items()}
            for kind in ("label", "asset", "type")
        )
        return Index(label, asset, kind_type)


def _index(rules: Sequence[Rule]) -> tuple[Index, dict[str, Index]]:
    """Return the index of rules that count every event type, and one for each event type counted by name."""
    any_type = _OpenIndex()
    by_type: dict[str, _OpenIndex] = {}
    for rule in rules:
        for criterion in rule.criteria:
            if criterion.kind == "type":
                for event_type in criterion.items:
                    single = _criterion("type", (event_type,), criterion.match_all, None)
                    by_type.setdefault(event_type, _OpenIndex()).add(single, rule)
            elif criterion.event_types is None:
                any_type.add(criterion, rule)
            else:
                for event_type in criterion.event_types:
                    by_type.setdefault(event_type, _OpenIndex()).add(criterion, rule)
    return any_type.closed(), {event_type: index.closed() for event_type, index in by_type.items()}


def advice(segments: Sequence[Segment], weights: Weights) -> list[Advice]:
    """List what valid definitions will do that their author probably does not expect.

    Parameters
    ----------
    segments
        Definitions without `problems`.
    weights
        The settings that they will run under.

    Returns
    -------
    list of Advice
        In the order of the definitions; empty if there is nothing to say.

    Notes
    -----
    Nobody enters for less than 10 ms, so one event of weight a enters only if
    h·log2(a/exit_weight) is 10 ms or more: never where the two are equal. The proposed threshold is
    a·2^(-1/10), at which one event keeps a user in for a tenth of its half-life.

    Examples
    --------
    >>> for hint in advice([Segment("swim", labels=("swimwear",), min_weight=1)], Weights()):
    ...     print(hint)  # doctest: +NORMALIZE_WHITESPACE
    segment 'swim', min_weight: one event of the heaviest type counts 1 and is below 1 within 10 ms, so it
    never enters; with min_weight = 0.933 it enters, for 3.0 days
    """
    found: list[Advice] = []
    base = {segment.id: segment for segment in segments if segment.type == "base"}
    for segment in base.values():
        found.extend(_event_type_advice(segment, weights))
        found.extend(_threshold_advice(segment, weights))
        for other in segment.exclude:
            if other in base and _always_holds_with(base[other], segment, weights):
                text = f"who meets its criteria also meets those of {_shown(other)}: nobody ever enters"
                found.append(Advice(segment.id, "exclude", text))
    return found


def _event_type_advice(segment: Segment, weights: Weights) -> list[Advice]:
    """Say which of a segment's event types never count."""
    idle = [event_type for event_type in segment.event_types if weights.action_weight(event_type) == 0]
    if not idle:
        return []
    names = ", ".join(_shown(event_type) for event_type in idle)
    if len(idle) == len(segment.event_types):
        text = f"the action weight of {names} is 0: nobody ever enters"
    else:
        text = f"the action weight of {names} is 0: it never counts"
    return [Advice(segment.id, "event_types", text)]


def _threshold_advice(segment: Segment, weights: Weights) -> list[Advice]:
    """Say when one event just reaches the threshold and yet never enters."""
    event_types = segment.event_types or (
        *weights.event_types,
        "",
    )  # "": any type that has no settings of its own
    amount, half_life_ms = max(
        (weights.action_weight(name), weights.half_life_ms(name)) for name in event_types
    )
    enter_weight, exit_weight = _thresholds(segment, weights.history_floor)
    if amount < enter_weight * (1.0 - SLACK) or half_life_ms * math.log2(amount / exit_weight) >= HOLD_MS:
        return []
    proposed = float(f"{amount * 2.0 ** -max(0.1, 2 * HOLD_MS / half_life_ms):.3g}")
    duration = _duration(half_life_ms * math.log2(amount / proposed))
    key = "min_weight" if segment.exit_weight is None else "exit_weight"
    text = (
        f"one event of the heaviest type counts {amount:g} and is below {exit_weight:g} within {HOLD_MS} ms, "
        f"so it never enters; with {key} = {proposed:g} it enters, for {duration}"
    )
    return [Advice(segment.id, key, text)]


def _always_holds_with(other: Segment, segment: Segment, weights: Weights) -> bool:
    """Tell whether a segment counts the same as another one that is easier to be in."""

    def counted(one: Segment) -> tuple[object, ...]:
        return tuple(
            (item.kind, item.item_set, item.match_all, set(item.event_types or ())) for item in _criteria(one)
        )

    if other.exclude or counted(other) != counted(segment):
        return False
    easier = zip(
        _thresholds(other, weights.history_floor), _thresholds(segment, weights.history_floor), strict=True
    )
    return all(theirs <= ours for theirs, ours in easier)


def _duration(duration_ms: float) -> str:
    """Return a duration in the largest unit of which it has at least one.

    Examples
    --------
    >>> _duration(259_200_000), _duration(90_000), _duration(3)
    ('3.0 days', '1.5 minutes', '0.003 seconds')
    """
    for unit_ms, unit in ((86_400_000, "days"), (3_600_000, "hours"), (60_000, "minutes")):
        if duration_ms >= unit_ms:
            return f"{duration_ms / unit_ms:.1f} {unit}"
    return f"{duration_ms / 1000:.3g} seconds"


def _shown(text: str) -> str:
    """Return text for a message, quoted, escaped and cut to a readable length."""
    return ascii(text) if len(text) <= 80 else f"{text[:77]!a}… ({len(text)} characters)"
