"""How good the last predictions were.

Decides the figures of a ranking and of its probabilities, over a sliding window of examples. It must not know
who ranked.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["WINDOW", "Judged", "Window", "calibration_error", "mid_ranks"]

WINDOW = 10_000
"""Examples that a window holds."""

_BINS = 10


@dataclass(frozen=True, slots=True)
class Judged:
    """Predictions of one task and what came, one row per example.

    Parameters
    ----------
    ranks
        Of the best-ranked label that came, from 1, ties in the middle; infinite if none was known.
    top, top_came
        The probability of the best candidate, nan without candidates, and whether it came.
    likelihood
        The probability of the labels that came, together.
    popularity_ranks, markov_ranks
        As `ranks`, by popularity (of first times, in discovery) and by the last label alone.
    labels
        The best-ranked label that came, "" if none was known.
    top_labels
        The best candidate, "" without candidates.
    """

    ranks: NDArray[np.float64]
    top: NDArray[np.float64]
    top_came: NDArray[np.bool_]
    likelihood: NDArray[np.float64]
    popularity_ranks: NDArray[np.float64]
    markov_ranks: NDArray[np.float64]
    labels: NDArray[np.object_]
    top_labels: NDArray[np.object_]


def mid_ranks(
    scores: NDArray[np.floating], came: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the rank of the best label that came, row by row; labels that tie share the middle.

    Parameters
    ----------
    scores
        Array, shape (n_rows, n_labels); minus infinity for what is no candidate.
    came
        Pairs of row and label, all of them candidates.

    Returns
    -------
    ranks
        From 1; infinite for a row where nothing came.
    best
        The label in question, -1 for none.

    Examples
    --------
    >>> scores = np.array([[3.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    >>> came = (np.array([0, 0]), np.array([3, 1]))
    >>> mid_ranks(scores, came)[0].tolist()
    [2.5, inf]
    >>> scores[0, 0] = -np.inf
    >>> ranks, best = mid_ranks(scores, came)
    >>> ranks.tolist(), best.tolist()
    ([1.5, inf], [1, -1])
    """
    best = np.full(len(scores), -np.inf, scores.dtype)
    np.maximum.at(best, came[0], scores[came])
    labels = np.full(len(scores), -1)
    # In reverse, so that the first of equals is what stays.
    reached = np.flatnonzero(scores[came] == best[came[0]])[::-1]
    labels[came[0][reached]] = came[1][reached]
    above = _counts(scores > best[:, None])
    ranks = (above + _counts(scores >= best[:, None]) + 1) / 2
    return np.where(labels < 0, np.inf, ranks), labels


def _counts(held: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return how many of each row hold; bytes are summed twice as fast as bools are counted."""
    counts: NDArray[np.int64] = held.view(np.int8).sum(axis=1, dtype=np.int32).astype(np.int64)
    return counts


def calibration_error(top: NDArray[np.float64], came: NDArray[np.bool_]) -> float:
    """Return how far probabilities are from frequencies: the expected calibration error in ten bins.

    Notes
    -----
    Σ over bins of (share of the examples) · |mean probability - share that came|, bins of equal width.

    Examples
    --------
    >>> calibration_error(np.array([0.5, 0.5, 0.9, 0.9]), np.array([True, False, True, True]))
    0.04999999999999999
    """
    if not len(top):
        return float("nan")
    bins = np.minimum((top * _BINS).astype(np.int64), _BINS - 1)
    gaps = np.bincount(bins, top - came, _BINS)
    return float(np.abs(gaps).sum() / len(top))


class Window:
    """The last predictions of one task.

    Examples
    --------
    >>> window = Window(2)
    >>> one, name = np.ones(3), np.array(["a", "b", "b"], object)
    >>> window.add(Judged(np.array([9.0, 1.0, 4.0]), one, one > 0, one, 2 * one, 4 * one, name, name))
    >>> figures = window.figures()
    >>> figures["examples"], figures["mrr"], figures["popularity_mrr"]
    (2.0, 0.625, 0.5)
    >>> window.figures(labels=["a"])["examples"]
    0.0
    """

    def __init__(self, size: int = WINDOW) -> None:
        self._numbers = np.zeros((6, size))
        self._labels = np.full((2, size), "", np.object_)
        self._count = 0

    def add(self, judged: Judged) -> None:
        """Add predictions; the oldest leave."""
        size = self._numbers.shape[1]
        numbers = np.array(
            [
                judged.ranks,
                judged.top,
                judged.top_came,
                judged.likelihood,
                judged.popularity_ranks,
                judged.markov_ranks,
            ]
        )[:, -size:]
        places = (self._count + np.arange(numbers.shape[1])) % size
        self._numbers[:, places] = numbers
        self._labels[0, places] = judged.labels[-size:]
        self._labels[1, places] = judged.top_labels[-size:]
        self._count += numbers.shape[1]

    def figures(self, labels: Collection[str] | None = None) -> dict[str, float]:
        """Return what the window says.

        Parameters
        ----------
        labels
            Only examples of which the label that came, or the best candidate, is one of these; `None` for
            all.

        Returns
        -------
        dict
            "examples", "mrr", "hit@1", "hit@5", "hit@10", "log_loss" (nats), "ece", "popularity_mrr",
            "markov_mrr"; without examples the first is 0 and no other is there.
        """
        if labels is None:
            return _figures(self._numbers[:, : min(self._count, self._numbers.shape[1])])
        return self.figures_by({"": labels})[""]

    def figures_by(self, groups: Mapping[str, Collection[str]]) -> dict[str, dict[str, float]]:
        """Return `figures` for many groups of labels, by the names of the groups."""
        size = min(self._count, self._numbers.shape[1])
        places: dict[str, set[int]] = {label: set() for labels in groups.values() for label in labels}
        for labels in self._labels[:, :size]:
            for place, label in enumerate(labels.tolist()):
                if label in places:
                    places[label].add(place)
        found = {}
        for name, labels in groups.items():
            chosen = sorted(set().union(*(places[label] for label in labels)))
            found[name] = _figures(self._numbers[:, chosen])
        return found


def _figures(numbers: NDArray[np.float64]) -> dict[str, float]:
    """Return the figures of some columns of a window."""
    count = numbers.shape[1]
    if count == 0:
        return {"examples": 0.0}
    ranks, top, came, likelihood, popularity, markov = numbers
    judged = np.isfinite(top)
    return {
        "examples": float(count),
        "mrr": float((1.0 / ranks).mean()),
        "hit@1": float((ranks <= 1).mean()),
        "hit@5": float((ranks <= 5).mean()),
        "hit@10": float((ranks <= 10).mean()),
        "log_loss": float(-np.log(np.maximum(likelihood, 1e-9)).mean()),
        "ece": calibration_error(top[judged], came[judged] > 0) if judged.any() else 0.0,
        "popularity_mrr": float((1.0 / popularity).mean()),
        "markov_mrr": float((1.0 / markov).mean()),
    }
