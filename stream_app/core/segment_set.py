"""All definitions together: checked, in the order of evaluation, and compiled for the fold.

Decides in which order segments are evaluated, what a definition asks of a user (`thresholds_of`,
`criteria_of`), and, by an inverted index from items to rules, which segments an event can touch at all: its
cost does not grow with the definitions that do not name its label, asset or type. Decides also the text by
which a set is kept and recognised (`SegmentSet.canonical_json`). It must not know how a weight is stored or
how a user enters: that is `fold`.
"""

import heapq
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stream_app.core.decay import SLACK, Weights
from stream_app.core.segment import Segment, as_json, canonical, digest, problems

__all__ = [
    "Bucket",
    "Criterion",
    "Index",
    "Kind",
    "Rule",
    "SegmentSet",
    "criteria_of",
    "thresholds_of",
]

Kind = Literal["label", "asset", "type"]
"""What an item of a criterion is."""


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
        self.fingerprint = digest([canonical(segment) for segment in self._sorted()])

    def __repr__(self) -> str:
        return f"SegmentSet({len(self.segments)} segments, fingerprint={self.fingerprint!r})"

    def _sorted(self) -> list[Segment]:
        return sorted(self.segments, key=lambda segment: segment.id)

    def get(self, segment_id: str) -> Segment | None:
        """Return the definition with an id, `None` if there is none."""
        return self._by_id.get(segment_id)

    def canonical_json(self) -> str:
        """Return all definitions as JSON that depends on nothing but them; see `from_canonical_json`."""
        return as_json([canonical(segment) for segment in self._sorted()])

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
        criteria = criteria_of(segment)
        enter_weight, exit_weight = thresholds_of(segment, weights.history_floor)
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


def thresholds_of(segment: Segment, floor: float) -> tuple[float, float]:
    """Return the weights at which a user enters and leaves, with 0 read as the floor."""
    enter_weight = segment.min_weight if segment.min_weight > 0 else floor
    if segment.exit_weight is None:
        return enter_weight, enter_weight
    return enter_weight, segment.exit_weight if segment.exit_weight > 0 else floor


def criteria_of(segment: Segment) -> tuple[Criterion, ...]:
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
