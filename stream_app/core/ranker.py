"""How features become scores, and how that is learned.

Decides the form of a ranking head: a linear model of River's over the features of a pair, trained so that the
label that came scores highest among its candidates (a conditional softmax). It must not know what the
features mean.

Why not one logistic decision per pair, with sampled negatives: all candidates of a row are computed anyway,
so their exact gradient costs one more pass, has no noise, needs no random numbers, and gives a probability
over the candidates. With two candidates it is logistic regression on the difference of their features.

A few labels are so frequent that they deserve numbers of their own: `Affinities` adds what the user's latest
and engaged labels say for and against each of the labels that appeared first. What it says is one more
feature.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray
from river import linear_model, optim
from river.utils import VectorDict

from stream_app.core.features import LATEST_FADE, Features, Floats, Ints, Rows

__all__ = ["AFFINITY", "MAX_AFFINITIES", "Affinities", "Ranker", "softmax"]

AFFINITY = "own numbers of the label"
MAX_AFFINITIES = 64
"""So many labels have numbers of their own: those that appeared first."""
AFFINITY_RATE = 0.02
RATE = 0.2
STEP_ROWS = 32
"""Rows of one step: small enough to learn fast, large enough to cost little."""
_EPS = 1e-4


def softmax(logits: Floats) -> Floats:
    """Return the probability of each candidate, row by row.

    Parameters
    ----------
    logits
        Array, shape (n_rows, n_labels); minus infinity for what is no candidate, which gets 0. Without any
        candidate all of a row is 0.

    Examples
    --------
    >>> softmax(np.array([[0.0, 0.0, -np.inf], [-np.inf, -np.inf, -np.inf]])).tolist()
    [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    """
    top = logits.max(axis=1, keepdims=True)
    none = top == -np.inf
    top[none] = 0.0
    shares: Floats = logits - top
    np.exp(shares, out=shares)
    total = shares.sum(axis=1, keepdims=True)
    total[none] = 1.0
    shares /= total
    return shares


def _blame(shares: Floats, came: tuple[Ints, Ints]) -> NDArray[np.bool_]:
    """Turn probabilities into the gradient of the loss by logit, in place; say in which rows something came.

    Examples
    --------
    >>> shares = np.full((2, 2), 0.5)
    >>> _blame(shares, (np.array([1]), np.array([0]))).tolist(), shares.tolist()
    ([False, True], [[0.0, 0.0], [-0.5, 0.5]])
    """
    rows, labels = came
    own = shares[came]
    counts = np.bincount(rows, minlength=len(shares))
    total = np.bincount(rows, own, len(shares))[rows]
    # All that came may have a probability too small for a float: then they are blamed alike.
    target = np.where(total > 0.0, own / np.where(total > 0.0, total, 1.0), 1.0 / counts[rows])
    shares[rows, labels] -= target
    taught = counts > 0
    if not taught.all():
        shares[~taught] = 0.0
    return taught


def _slopes(features: Features, blame: Floats) -> Floats:
    """Return the gradient of each row's loss by feature, in the order of the features."""
    own = features.of_engaged * blame[features.rows, features.labels]
    begins = np.searchsorted(features.rows, np.arange(len(blame)))
    # A sum over no pairs is not what `reduceat` makes of it.
    of_engaged = np.add.reduceat(np.pad(own, ((0, 0), (0, 1))), begins, axis=1).T
    of_engaged[np.bincount(features.rows, minlength=len(blame)) == 0] = 0.0
    of_pairs = np.matmul(features.of_pairs, blame[:, :, None])[:, :, 0]
    slopes: Floats = np.concatenate([blame @ features.of_labels.T, of_pairs, of_engaged], axis=1)
    return slopes


class Affinities:
    """A weight for each pair of labels that have numbers of their own, and one for each such label.

    Parameters
    ----------
    labels
        Which labels, at most `MAX_AFFINITIES`.

    Attributes
    ----------
    weights, g2
        Arrays, shape (1 + 2·n, n), float32: of the label itself, of the user's latest labels, of all engaged
        labels; and AdaGrad's sum of squared gradients of each.
    """

    def __init__(self) -> None:
        self.weights = np.zeros((1 + 2 * MAX_AFFINITIES, MAX_AFFINITIES), np.float32)
        self.g2 = np.zeros_like(self.weights)

    def keep(self, places: Ints) -> None:
        """Keep the numbers of labels that had these positions, in order."""
        self.set_state(self.state(MAX_AFFINITIES), _moved(places))

    def state(self, n_labels: int) -> dict[str, bytes]:
        """Return the numbers of the first labels: float32, little endian, row by row."""
        size = min(n_labels, MAX_AFFINITIES)
        rows = _rows_of(np.arange(size))
        return {
            "weights": self.weights[rows, :size].astype("<f4").tobytes(),
            "g2": self.g2[rows, :size].astype("<f4").tobytes(),
        }

    def set_state(self, state: Mapping[str, bytes], places: Ints) -> None:
        """Go on from what `state` returned.

        Parameters
        ----------
        places
            The positions that its labels have now; a label beyond `MAX_AFFINITIES` loses its numbers.
        """
        size = len(places)
        held = np.flatnonzero(places < MAX_AFFINITIES)
        for name in ("weights", "g2"):
            array = np.zeros((1 + 2 * MAX_AFFINITIES, MAX_AFFINITIES), np.float32)
            given = np.frombuffer(state[name], "<f4").reshape(1 + 2 * size, size)
            source = np.concatenate([[0], 1 + held, 1 + size + held])
            array[np.ix_(_rows_of(places[held]), places[held])] = given[np.ix_(source, held)]
            setattr(self, name, array)

    def step(self, gradient: Floats) -> None:
        """Make one AdaGrad step, unless the gradient is not finite."""
        if not np.isfinite(gradient).all():
            return
        height, width = gradient.shape
        weights, g2 = self.weights[:height, :width], self.g2[:height, :width]
        g2 += gradient * gradient
        weights -= AFFINITY_RATE * gradient / np.sqrt(g2 + _EPS)


def _rows_of(places: Ints) -> Ints:
    """Return the rows of the affinities that belong to labels."""
    return np.concatenate([[0], 1 + places, 1 + MAX_AFFINITIES + places])


def _moved(kept: Ints) -> Ints:
    """Return where each of the first labels is now, given the former positions of those that were kept."""
    places = np.full(MAX_AFFINITIES, MAX_AFFINITIES)
    own = np.flatnonzero(kept < MAX_AFFINITIES)
    places[kept[own]] = own
    return places


def affinity_inputs(rows: Rows) -> Floats:
    """Return what the affinities of all labels are computed from.

    Returns
    -------
    array, shape (n_rows, 1 + 2·`MAX_AFFINITIES`)
        1; the latest labels, fading; the engaged labels, together of length 1.
    """
    n_rows, n_labels = rows.engaged.shape
    inputs = np.zeros((n_rows, 1 + 2 * MAX_AFFINITIES), np.float32)
    inputs[:, 0] = 1.0
    every = np.arange(n_rows)
    for number in range(rows.latest.shape[1]):
        label = rows.latest[:, number]
        own = (label >= 0) & (label < MAX_AFFINITIES)
        inputs[every[own], 1 + label[own]] = LATEST_FADE**number
    width = min(n_labels, MAX_AFFINITIES)
    count = np.maximum(rows.counts, 1).astype(np.float32)
    engaged = inputs[:, 1 + MAX_AFFINITIES : 1 + MAX_AFFINITIES + width]
    engaged[:] = rows.engaged[:, :width]
    engaged /= np.sqrt(count)[:, None]
    return inputs


class Ranker:
    """One head: scores of all labels for the rows of a batch.

    Parameters
    ----------
    weights
        Maps the features that it uses to the weights that it starts with.

    Attributes
    ----------
    model
        River's model; its weights are the features' and nothing else is learned but the affinities.
    steps_refused
        How many steps were not made because a gradient was not finite.

    Examples
    --------
    >>> ranker = Ranker({"popularity": 0.0})
    >>> none = np.zeros(0, np.int64)
    >>> features = Features(
    ...     ("popularity",), (), (), np.array([[0.0, 1.0]]), np.zeros((1, 0, 2)), np.zeros((0, 0)), none, none
    ... )
    >>> came = np.array([0]), np.array([1])
    >>> for _ in range(3):
    ...     ranker.learn(features, None, softmax(ranker.logits(features, None)), came)
    >>> {name: round(weight, 3) for name, weight in ranker.weights.items()}
    {'popularity': 0.439}
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.model = linear_model.LogisticRegression(optim.AdaGrad(RATE), intercept_lr=0.01)
        self.affinities = Affinities()
        self.steps_refused = 0
        self.set_weights(weights)

    @property
    def weights(self) -> dict[str, float]:
        """Maps feature to weight."""
        weights: dict[str, float] = self.model.weights
        return weights

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Replace the weights of the features."""
        self.model._weights = VectorDict(dict(weights))

    def logits(self, features: Features, inputs: Floats | None) -> Floats:
        """Return the logits of all labels.

        Parameters
        ----------
        features
            Of the rows.
        inputs
            As `affinity_inputs` returns them; `None` for no affinities.

        Returns
        -------
        array, shape (n_rows, n_labels)
        """
        of_labels, of_pairs, of_engaged = self._split(features)
        logits: Floats = np.matmul(of_pairs, features.of_pairs)
        logits += of_labels @ features.of_labels
        if of_engaged.any():
            logits[features.rows, features.labels] += of_engaged @ features.of_engaged
        if inputs is not None:
            found = self.affinity(inputs, logits.shape[1])
            logits[:, : found.shape[1]] += found
        return logits

    def affinity(self, inputs: Floats, n_labels: int) -> Floats:
        """Return the feature that the affinities are, of the labels that have numbers of their own."""
        width = min(n_labels, MAX_AFFINITIES)
        found: Floats = inputs @ self.affinities.weights[:, :width]
        return found

    def _split(self, features: Features) -> tuple[Floats, Floats, Floats]:
        """Return the weights of the features of each kind, 0 for one that this head does not use."""
        weights = self.weights
        kind = features.of_labels.dtype
        return (
            np.array([weights.get(name, 0.0) for name in features.label_names], kind),
            np.array([weights.get(name, 0.0) for name in features.pair_names], kind),
            np.array([weights.get(name, 0.0) for name in features.engaged_names], kind),
        )

    def learn(
        self, features: Features, inputs: Floats | None, shares: Floats, came: tuple[Ints, Ints]
    ) -> None:
        """Learn which labels came, in steps of `STEP_ROWS` rows.

        Parameters
        ----------
        features, inputs
            As for `logits`.
        shares
            The softmax of the logits, over the candidates; used up. The steps of a batch share it: a batch is
            small beside what was learned before, and computing it anew for each step was measured to gain
            nothing.
        came
            Pairs of row and label, by row, all candidates; a row without any teaches nothing.

        Notes
        -----
        The loss of a row is -log Σ p_l over the labels that came: it is enough that one of them is ranked
        high, and that is what is counted.
        """
        taught = _blame(shares, came)
        slopes = _slopes(features, shares)
        steps = -(-len(shares) // STEP_ROWS)
        for step in range(steps):
            # Every so-many-th row: all steps see the same mixture, so that none undoes another's work.
            rows = slice(step, None, steps)
            count = int(np.count_nonzero(taught[rows]))
            if count == 0:
                continue
            self._step(features, slopes[rows].sum(axis=0) / count)
            if inputs is not None:
                width = min(shares.shape[1], MAX_AFFINITIES)
                self.affinities.step(inputs[rows].T @ (shares[rows, :width] / count))

    def _step(self, features: Features, slopes: Floats) -> None:
        """Make one step along the gradient, given in the order of the features."""
        names = (*features.label_names, *features.pair_names, *features.engaged_names)
        weights = self.model._weights
        gradient = {
            name: slope for name, slope in zip(names, slopes.tolist(), strict=True) if name in weights
        }
        if not all(map(isfinite, gradient.values())):
            self.steps_refused += 1
            return
        # As `LogisticRegression._fit` does: the optimizer's step on the model's own weights. The intercept is
        # the same for all candidates, so its gradient is 0.
        self.model.optimizer.step(weights, gradient)

    def contributions(
        self, features: Features, inputs: Floats, label: int, candidates: NDArray[np.bool_]
    ) -> dict[str, float]:
        """Return what each feature adds to the logit of a label, less what it adds to the average candidate.

        Parameters
        ----------
        features, inputs
            Of one row.
        label
            Its position.
        candidates
            Array, shape (n_labels,).
        """
        size = len(candidates)
        of_engaged = np.zeros((len(features.engaged_names), size))
        of_engaged[:, features.labels] = features.of_engaged
        own = np.zeros(size)
        affinity = self.affinity(inputs, size)[0]
        own[: len(affinity)] = affinity
        values = {
            **dict(zip(features.label_names, features.of_labels, strict=True)),
            **dict(zip(features.pair_names, features.of_pairs[0], strict=True)),
            **dict(zip(features.engaged_names, of_engaged, strict=True)),
            AFFINITY: own,
        }
        return {
            name: float(weight * (values[name][label] - values[name][candidates].mean()))
            for name, weight in (self.weights | {AFFINITY: 1.0}).items()
        }

    # State, as plain data.

    def state(self, n_labels: int) -> dict[str, Any]:
        """Return all that was learned; of affinities those of the first labels, at most `MAX_AFFINITIES`."""
        optimizer = self.model.optimizer
        return {
            "weights": self.weights,
            "g2": {name: float(optimizer.g2.get(name, 0.0)) for name in self.weights},
            "steps": optimizer.n_iterations,
            "affinities": self.affinities.state(n_labels),
        }

    def set_state(self, state: Mapping[str, Any], places: Ints) -> None:
        """Go on from what `state` returned, the labels of which now have other positions."""
        self.set_weights(state["weights"])
        optimizer = self.model.optimizer
        optimizer.g2.clear()
        optimizer.g2.update(state["g2"])
        optimizer.n_iterations = state["steps"]
        self.affinities.set_state(state["affinities"], places)
