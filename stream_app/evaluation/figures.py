"""Ranks and top scores in, figures out.

Decides what MRR, hit@k and ECE mean here and nothing else: it must not know who ranked. The rank of an
example is `inf` where the ranking had none of its labels (a miss: it counts with a reciprocal rank of 0).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["BINS", "Bin", "Figures", "figures", "middle_ranks", "reliability"]

BINS = 10
"""How many equal parts of the scores from 0 to 1 are compared with what came true."""


@dataclass(frozen=True, slots=True)
class Figures:
    """How well examples were ranked; `None` where there is nothing to say it of.

    Parameters
    ----------
    examples
        How many.
    mrr
        Mean reciprocal rank.
    hit_1, hit_5, hit_10
        Share with a rank of at most 1, 5, 10.
    ece
        Expected calibration error of the top score.
    """

    examples: int
    mrr: float | None = None
    hit_1: float | None = None
    hit_5: float | None = None
    hit_10: float | None = None
    ece: float | None = None

    def document(self) -> dict[str, float | int | None]:
        """Return the figures as they are named in JSON.

        Examples
        --------
        >>> Figures(0).document()
        {'examples': 0, 'mrr': None, 'hit@1': None, 'hit@5': None, 'hit@10': None, 'ece': None}
        """
        return {name.replace("_", "@"): value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Bin:
    """The examples whose top score is in one part of the scale.

    Parameters
    ----------
    examples
        How many, at least one.
    score
        The mean of their top scores.
    hit_rate
        The share whose best-ranked label came true.
    """

    examples: int
    score: float
    hit_rate: float


def middle_ranks(scores: NDArray[np.float64], labels: Sequence[int]) -> NDArray[np.float64]:
    """Return the rank that each of several rankings gives to the best-ranked of some labels.

    Parameters
    ----------
    scores
        Array, shape (n_rankings, n_labels); -inf for a label that is no candidate.
    labels
        Columns of the labels that came true, all of them candidates, at least one.

    Returns
    -------
    array, shape (n_rankings,)
        1 and what is better, plus half of what is equal.

    Examples
    --------
    >>> middle_ranks(np.array([[0.5, 0.2, 0.2, 0.1], [3.0, 0.0, 0.0, 0.0]]), [2, 3])
    array([2.5, 3. ])
    """
    own = scores[:, labels]
    everyone = scores[:, None, :]
    better = np.count_nonzero(everyone > own[:, :, None], axis=2)
    equal = np.count_nonzero(everyone == own[:, :, None], axis=2)
    ranks: NDArray[np.float64] = np.min(1.0 + better + (equal - 1) / 2.0, axis=1)
    return ranks


def figures(
    ranks: NDArray[np.float64],
    top: NDArray[np.float64] | None = None,
    hit: NDArray[np.bool_] | None = None,
) -> Figures:
    """Sum up examples.

    Parameters
    ----------
    ranks
        Array, shape (n_examples,): middle ranks, inf for a miss; may be empty.
    top
        Of each example the probability that was given to the best-ranked label, nan where none was ranked;
        `None` for a ranking without probabilities.
    hit
        Whether that label came true; goes with `top`.

    Examples
    --------
    >>> found = figures(np.array([1.0, 2.0, 12.5, np.inf]))
    >>> found.mrr, found.hit_1, found.hit_5, found.hit_10
    (0.395, 0.25, 0.5, 0.5)
    """
    count = len(ranks)
    if count == 0:
        return Figures(0)
    hit_1, hit_5, hit_10 = (float(np.count_nonzero(ranks <= most) / count) for most in (1, 5, 10))
    ece = None
    if top is not None and hit is not None:
        bins = [found for found in reliability(top, hit) if found is not None]
        judged = sum(found.examples for found in bins)
        if judged:
            ece = sum(found.examples * abs(found.score - found.hit_rate) for found in bins) / judged
    return Figures(count, float(np.mean(1.0 / ranks)), hit_1, hit_5, hit_10, ece)


def reliability(top: NDArray[np.float64], hit: NDArray[np.bool_]) -> list[Bin | None]:
    """Compare top scores with what came true.

    Parameters
    ----------
    top
        Array, shape (n_examples,): probabilities; nan is passed over.
    hit
        Whether the label that had it came true.

    Returns
    -------
    list of Bin or None
        `BINS` of them, `None` where no score is. Bin i holds i/10 <= score < (i+1)/10, the last also 1.

    Notes
    -----
    The expected calibration error is the mean of |score - hit rate| over the bins, each with its share of
    the examples (Naeini, Cooper and Hauskrecht, AAAI 2015).

    Examples
    --------
    >>> reliability(np.array([0.25, 0.29, 1.0]), np.array([True, False, True]))[2]
    Bin(examples=2, score=0.27, hit_rate=0.5)
    """
    given = ~np.isnan(top)
    top, hit = top[given], hit[given]
    place = np.clip((top * BINS).astype(np.intp), 0, BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    scores = np.bincount(place, weights=top, minlength=BINS)
    hits = np.bincount(place, weights=hit, minlength=BINS)
    return [
        Bin(int(count), float(score / count), float(right / count)) if count else None
        for count, score, right in zip(counts, scores, hits, strict=True)
    ]
