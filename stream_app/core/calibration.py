"""How a score becomes the probability that it says it is.

Decides the map from a ranker's softmax to a probability, learned online from whether top scores came true. It
must not know where scores come from.

The map is Platt's: the log-odds of the score, stretched and shifted. Its two numbers are a River logistic
regression; a new one leaves scores as they are. An increasing map changes no ranking.

Source: Platt, "Probabilistic Outputs for Support Vector Machines", 1999.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray
from river import linear_model, optim
from river.utils import VectorDict

__all__ = ["Calibration"]

Floats = NDArray[np.floating]

_LEAST = 1e-4
"""Scores are cut to this and its complement: log-odds beyond would move the map for one example."""
_RATE = 0.5
_BATCH = 256
"""One example moves the map by this part of `_RATE` at most, whatever batch it comes in."""


class Calibration:
    """The map of one head.

    Examples
    --------
    Scores of a half that come true one time in four:

    >>> calibration = Calibration()
    >>> calibration.probabilities(np.array([0.5])).tolist()
    [0.5]
    >>> for _ in range(200):
    ...     calibration.learn(np.full(64, 0.5), np.arange(64) % 4 == 0)
    >>> calibration.probabilities(np.array([0.5])).round(2).tolist()
    [0.25]
    """

    def __init__(self) -> None:
        self.model = linear_model.LogisticRegression(optim.SGD(_RATE), intercept_lr=0.01)
        self.model._weights = VectorDict({"log odds": 1.0, "shift": 0.0})

    def probabilities(self, scores: Floats) -> NDArray[np.float64]:
        """Return calibrated probabilities, of the shape of the scores."""
        weights = self.model.weights
        logits = weights["log odds"] * _log_odds(scores) + weights["shift"]
        probabilities: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-logits))
        return probabilities

    def learn(self, scores: Floats, came: NDArray[np.bool_]) -> None:
        """Learn from at most 256 scores and whether what they were given to came.

        The rate stays as it is, so that the map follows a ranker that changes.
        """
        blame = (self.probabilities(scores) - came) / _BATCH
        gradient = {"log odds": float(_log_odds(scores) @ blame), "shift": float(blame.sum())}
        if all(map(isfinite, gradient.values())):
            self.model.optimizer.step(self.model._weights, gradient)

    def state(self) -> dict[str, Any]:
        """Return the learned numbers."""
        weights = self.model.weights
        return {"weights": weights, "steps": self.model.optimizer.n_iterations}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.model._weights = VectorDict(dict(state["weights"]))
        self.model.optimizer.n_iterations = state["steps"]


def _log_odds(scores: Floats) -> NDArray[np.float64]:
    clipped = np.clip(np.asarray(scores, np.float64), _LEAST, 1.0 - _LEAST)
    log_odds: NDArray[np.float64] = np.log(clipped / (1.0 - clipped))
    return log_odds
