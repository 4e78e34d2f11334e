"""The judge of the evaluation: its protocol in plain loops, slow enough to be believed.

Everything is counted anew from the earlier events before each event, with dictionaries and exact fractions.
It imports nothing of the evaluation; only names of baselines agree. Good for some hundreds of events.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import inf

DAY_MS = 86_400_000

Score = tuple[float, ...] | tuple[Fraction, float]


@dataclass(frozen=True)
class Seen:
    """An event, as far as the protocol reads it."""

    user: str
    time_ms: int
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """How one event was ranked by each baseline; `discovery` is None for an event that is none."""

    number: int
    next: Mapping[str, float]
    discovery: Mapping[str, float] | None


def examples(events: Sequence[Seen], half_life_ms: float) -> list[Example]:
    """Judge every event by the ones before it."""
    found = []
    for number, event in enumerate(events):
        before = events[:number]
        shown = {label for earlier in before for label in earlier.labels}
        if not event.labels or not shown:
            continue
        own = [earlier for earlier in before if earlier.user == event.user and earlier.labels]
        engaged = {label for earlier in own for label in earlier.labels}
        scores = baseline_scores(before, own, shown, event.time_ms, half_life_ms)
        new = set(event.labels) - engaged
        discovery = None
        if own and new:
            discovery = {name: rank(score, shown - engaged, new) for name, score in scores.items()}
        ranks = {name: rank(score, shown, set(event.labels)) for name, score in scores.items()}
        found.append(Example(number, ranks, discovery))
    return found


def baseline_scores(
    before: Sequence[Seen], own: Sequence[Seen], shown: set[str], now_ms: int, half_life_ms: float
) -> dict[str, dict[str, Score]]:
    popularity = {label: sum(label in event.labels for event in before) for label in shown}
    everything = sum(popularity.values())
    users_of = {label: {event.user for event in before if label in event.labels} for label in shown}
    followers = []
    for user in {event.user for event in before}:
        path = [event for event in before if event.user == user and event.labels]
        followers += [
            (last, label)
            for first, second in pairwise(path)
            for last in first.labels
            for label in second.labels
        ]

    def follows(label: str) -> Fraction:
        if not own:
            return Fraction(0)
        shares = []
        for last in own[-1].labels:
            after_last = [follower for first, follower in followers if first == last]
            shares.append(Fraction(after_last.count(label), len(after_last) or 1))
        return sum(shares, Fraction(0)) / len(shares)

    def weight(label: str, events: Sequence[Seen], half_life_ms: float) -> float:
        ages = [(now_ms - event.time_ms) / half_life_ms for event in events if label in event.labels]
        return single(math.fsum(math.pow(0.5, age) for age in ages))

    return {
        "popularity": {label: (popularity[label],) for label in shown},
        "first_times": {label: (len(users_of[label]),) for label in shown},
        "decayed_popularity": {label: (weight(label, before, 14 * DAY_MS),) for label in shown},
        "markov": {label: (follows(label), popularity[label]) for label in shown},
        "own_weights": {
            label: (weight(label, own, half_life_ms) + popularity[label] / everything / 1000,)
            for label in shown
        },
    }


def rank(scores: Mapping[str, Score], candidates: set[str], true: set[str]) -> float:
    """Return the middle rank of the best-ranked true label, inf if none is a candidate."""
    best = inf
    for label in true & candidates:
        others = [scores[other] for other in candidates if other != label]
        better = sum(score > scores[label] for score in others)
        equal = sum(score == scores[label] for score in others)
        best = min(best, 1 + better + equal / 2)
    return best


def single(number: float) -> float:
    """Return a number in single precision, in which sums in another order are the same."""
    (rounded,) = struct.unpack("f", struct.pack("f", number))
    return float(rounded)


def summary(ranks: Sequence[float]) -> dict[str, float | int | None]:
    """Return the figures of some ranks, as they are named in JSON."""
    if not ranks:
        return {"examples": 0, "mrr": None, "hit@1": None, "hit@5": None, "hit@10": None}
    total = {"mrr": 0.0, "hit@1": 0.0, "hit@5": 0.0, "hit@10": 0.0}
    for one in ranks:
        total["mrr"] += 1 / one
        for most in (1, 5, 10):
            total[f"hit@{most}"] += one <= most
    return {"examples": len(ranks), **{name: amount / len(ranks) for name, amount in total.items()}}


def calibration_error(top: Sequence[float], hit: Sequence[bool]) -> float | None:
    """Return the expected calibration error over ten equal bins."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for score, right in zip(top, hit, strict=True):
        bins.setdefault(min(9, int(score * 10)), []).append((score, right))
    if not bins:
        return None
    error = 0.0
    for pairs in bins.values():
        error += abs(sum(score for score, _ in pairs) - sum(right for _, right in pairs))
    return error / len(top)
