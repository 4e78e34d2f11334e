"""Offline recommenders, the competition of the online model: EASE, item-KNN and a logistic regression.

They learn from the first 80 % of a stream at once and are judged on the discoveries of the last 20 %, where
they know each user as of that moment. `stream-app evaluate` loads this file by path.

Each is given the best of a few settings on the judged part itself. That flatters them, so what beats them
here beats them anywhere. Users are rows of what they have engaged (0 or 1), of the logarithm of how often, or
of the logarithm of their decayed weights.

- EASE: Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019.
- item-KNN: cosine of the columns, shrunk, the k nearest (Sarwar et al., WWW 2001).
- logistic: one softmax over the labels that a user has not engaged, from the user's row and last labels,
  trained on the discoveries of the first 80 % by AdaGrad; the weights are the mean over all steps after the
  first pass (Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from stream_app.evaluation.baselines import Log

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

MAX_CELLS = 100_000_000
"""Above so many numbers in a table of users or examples by labels nothing is trained."""

FORMS = ("engaged", "counts", "weights")
EASE_L2 = (30.0, 100.0, 300.0, 1000.0)
KNN_SHRINK = (0.0, 10.0, 100.0)
KNN_NEAREST = (20, 50, None)
LOGISTIC_FORMS = (("weights",), ("engaged", "weights"))
LOGISTIC_L2 = (30.0, 100.0)
LOGISTIC_PASSES, LOGISTIC_RATE, LOGISTIC_BATCH = 3, 0.05, 256


@dataclass
class Users:
    """Rows of users at some moments, all of shape (n_rows, n_labels)."""

    counts: Floats
    weights: Floats

    def form(self, name: str) -> Floats:
        match name:
            case "engaged":
                return (self.counts > 0).astype(np.float64)
            case "counts":
                return np.log1p(self.counts)
            case _:
                return np.log1p(self.weights)


@dataclass
class Discoveries:
    """Examples: the users as they were, which labels could be ranked and which came true."""

    users: Users
    last: Bools
    candidates: Bools
    true: Bools

    def ranks(self, scores: Floats) -> Floats:
        """Return the middle rank of the best-ranked true label of each row, inf where none is a candidate."""
        found = np.full(len(scores), np.inf)
        rows, columns = np.nonzero(self.true & self.candidates)
        for row, column in zip(rows, columns, strict=True):
            others = scores[row, self.candidates[row]]
            own = scores[row, column]
            rank = 1 + np.count_nonzero(others > own) + (np.count_nonzero(others == own) - 1) / 2
            found[row] = min(found[row], rank)
        return found


def judge(log: Log, begin: int, discoveries: Sequence[int], half_life_ms: float) -> dict[str, Floats]:
    """Train on the events before `begin` and rank the discoveries from there on.

    Parameters
    ----------
    log
        The stream.
    begin
        The number of the first event that nothing is trained on.
    discoveries
        The numbers of the events that are examples, ascending.
    half_life_ms
        Of the weights.

    Returns
    -------
    dict
        Maps recommender to the ranks of the discoveries from `begin` on. Empty where there is nothing to
        train on or to judge, or too much for tables (`MAX_CELLS`).
    """
    labels = 1 + max((number for numbers in log.labels for number in numbers), default=-1)
    users = 1 + max(log.users, default=-1)
    judged = sum(number >= begin for number in discoveries)
    learned = len(discoveries) - judged
    if not judged or not learned or max(users, len(discoveries)) * labels > MAX_CELLS:
        return {}
    trained, before, after = replayed(log, begin, discoveries, half_life_ms, (users, labels))
    if not (before.true & before.candidates).any():
        return {}
    return {
        "ease": best(after, (after.users.form(form) @ items for form, items in ease(trained))),
        "item_knn": best(after, (after.users.form(form) @ items for form, items in item_knn(trained))),
        "logistic": best(after, logistic(before, after)),
    }


def replayed(
    log: Log, begin: int, discoveries: Sequence[int], half_life_ms: float, shape: tuple[int, int]
) -> tuple[Users, Discoveries, Discoveries]:
    """Return all users as they are at `begin`, and the discoveries before and after it."""
    now = Users(np.zeros(shape), np.zeros(shape))
    trained = now
    latest_ms = np.zeros(shape[0])
    last = np.zeros(shape, dtype=np.bool_)
    shown = np.zeros(shape[1], dtype=np.bool_)
    chosen = set(discoveries)
    rows: list[tuple[Floats, Floats, Bools, Bools, Bools]] = []
    for number, (user, time_ms, amount, columns) in enumerate(
        zip(log.users, log.times_ms, log.amounts, log.labels, strict=True)
    ):
        if number == begin:
            trained = Users(now.counts.copy(), now.weights.copy())
        if not columns:
            continue
        places = list(columns)
        now.weights[user] *= 0.5 ** ((time_ms - latest_ms[user]) / half_life_ms)
        latest_ms[user] = time_ms
        if number in chosen:
            new = now.counts[user] == 0
            true = np.zeros(shape[1], dtype=np.bool_)
            true[places] = True
            rows.append(
                (
                    now.counts[user].copy(),
                    now.weights[user].copy(),
                    last[user].copy(),
                    new & shown,
                    true & new,
                )
            )
        now.counts[user, places] += 1
        now.weights[user, places] += amount
        last[user] = False
        last[user, places] = True
        shown[places] = True

    def joined(part: list[tuple[Floats, Floats, Bools, Bools, Bools]]) -> Discoveries:
        counts, weights, last, candidates, true = (np.array(column) for column in zip(*part, strict=True))
        return Discoveries(Users(counts, weights), last, candidates, true)

    cut = int(np.searchsorted(discoveries, begin))
    return trained, joined(rows[:cut]), joined(rows[cut:])


def best(after: Discoveries, settings: Iterator[Floats]) -> Floats:
    """Return the ranks of the setting, given as its scores, that does best on what is judged."""
    return max(map(after.ranks, settings), key=lambda ranks: float(np.mean(1 / ranks)))


def ease(trained: Users) -> Iterator[tuple[str, Floats]]:
    """Yield, setting by setting, the form of the rows and the matrix that they are multiplied with."""
    for form, l2 in product(FORMS, EASE_L2):
        rows = trained.form(form)
        inverse = np.linalg.inv(rows.T @ rows + l2 * np.eye(rows.shape[1]))
        similarity = inverse / -np.diag(inverse)
        np.fill_diagonal(similarity, 0.0)
        yield form, similarity


def item_knn(trained: Users) -> Iterator[tuple[str, Floats]]:
    for form, shrink, nearest in product(FORMS, KNN_SHRINK, KNN_NEAREST):
        rows = trained.form(form)
        products = rows.T @ rows
        norms = np.sqrt(np.diag(products))
        similarity = products / (np.outer(norms, norms) + shrink + 1e-12)
        np.fill_diagonal(similarity, 0.0)
        if nearest is not None and nearest < len(similarity):
            similarity[similarity < np.sort(similarity, axis=0)[-nearest]] = 0.0
        yield form, similarity


def logistic(before: Discoveries, after: Discoveries) -> Iterator[Floats]:
    known = (before.true & before.candidates).any(axis=1)
    candidates = before.candidates[known]
    true = (before.true & before.candidates)[known].astype(np.float32)
    true /= true.sum(axis=1, keepdims=True)
    for forms, l2 in product(LOGISTIC_FORMS, LOGISTIC_L2):
        rows, judged = (
            np.hstack([*map(part.users.form, forms), part.last]).astype(np.float32)
            for part in (before, after)
        )
        weights, intercepts = fitted(rows[known], candidates, true, l2)
        yield (judged @ weights + intercepts).astype(np.float64)


def fitted(
    rows: NDArray[np.float32], candidates: Bools, true: NDArray[np.float32], l2: float, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return weights and intercepts of a softmax over each row's candidates."""
    weights = np.zeros((rows.shape[1], true.shape[1]), np.float32)
    intercepts = np.zeros(true.shape[1], np.float32)
    squares, intercept_squares = np.full_like(weights, 1e-8), np.full_like(intercepts, 1e-8)
    weights_sum, intercepts_sum, steps = np.zeros_like(weights), np.zeros_like(intercepts), 0
    random = np.random.default_rng(seed)
    for number in range(LOGISTIC_PASSES):
        order = random.permutation(len(rows))
        for first in range(0, len(rows), LOGISTIC_BATCH):
            batch = order[first : first + LOGISTIC_BATCH]
            logits = np.where(candidates[batch], rows[batch] @ weights + intercepts, -np.inf)
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            errors = (odds / odds.sum(axis=1, keepdims=True) - true[batch]) / len(batch)
            gradient = rows[batch].T @ errors + l2 / len(rows) * weights
            shift = errors.sum(axis=0)
            squares += gradient**2
            intercept_squares += shift**2
            weights -= LOGISTIC_RATE * gradient / np.sqrt(squares)
            intercepts -= LOGISTIC_RATE * shift / np.sqrt(intercept_squares)
            if number > 0:
                weights_sum += weights
                intercepts_sum += intercepts
                steps += 1
    return weights_sum / np.float32(steps), intercepts_sum / np.float32(steps)
