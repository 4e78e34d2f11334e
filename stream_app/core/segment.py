"""What a segment is, and which definitions make sense together.

Decides what a definition may say, what it means in a form that equal meanings share (`canonical`, and
`Segment.version` from it), and what makes a set of definitions unusable (`problems`: all of it, not only the
first). It must not know how definitions are ordered and compiled, which is `segment_set`, whether a valid one
is wise, which is `segment_advice`, or how a user enters, which is `fold`.

Ids are 1 to 64 characters of a-z, 0-9, "_", "." and "-", the first one a letter or a digit: they become part
of Redis keys, CloudEvents sources and command lines, and must not need quoting in any of them.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stream_app.core.decay import Weights

__all__ = [
    "MAX_ITEMS",
    "MAX_SEGMENTS",
    "Problem",
    "Segment",
    "as_json",
    "canonical",
    "digest",
    "problems",
    "shown",
]

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
        return digest(canonical(self))


def canonical(segment: Segment) -> dict[str, Any]:
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


def as_json(document: object) -> str:
    """Return the one JSON text of a document: keys sorted, no spaces, letters as they are."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(document: object) -> str:
    """Return the first 16 hex digits of SHA-256 of a document's JSON."""
    return hashlib.sha256(as_json(document).encode()).hexdigest()[:16]


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
        return f"segment {shown(self.segment_id)}, {self.key}" if self.segment_id else self.key

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, got {self.got}"


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
            found.append(Problem("", f"segment {place}, id", _ID_EXPECTED, shown(segment.id)))
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
        found.append(Problem(segment.id, "type", "'base' or 'discovery'", shown(segment.type)))
    for key, match in (("match_labels", segment.match_labels), ("match_assets", segment.match_assets)):
        if match not in ("any", "all"):
            found.append(Problem(segment.id, key, "'any' or 'all'", shown(match)))
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
                found.append(Problem(segment.id, key, expected, shown(item)))
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
                found.append(Problem(segment.id, "exclude", "ids of defined segments", shown(other)))
            elif types[other] != "base":
                got = f"{shown(other)}, of type {shown(types[other])}"
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


def shown(text: str) -> str:
    """Return text for a message, quoted, escaped and cut to a readable length."""
    return ascii(text) if len(text) <= 80 else f"{text[:77]!a}… ({len(text)} characters)"
