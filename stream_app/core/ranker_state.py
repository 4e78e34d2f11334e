"""What the heads have learned, on its way between workers and to a checkpoint.

Decides how such a state is checked and averaged. It must not know how it is learned or where it is kept.

A state is plain data:

================  =========================================================================================
``v``             int, 1
``labels``        array of the labels that have numbers of their own, distinct
``heads``         map of "next" and "discovery" to a map of ``weights`` and ``g2`` (maps of feature to
                  float), ``steps`` (int), and ``affinities``: ``weights`` and ``g2``, each bytes of
                  (1 + 2n)·n float32, little endian, n being the number of labels
``calibrations``  map of "next" and "discovery" to a map of ``weights`` and ``steps``
================  =========================================================================================

Weights and squared gradients of several workers are averaged; adding up their changes instead was measured
to ruin the ranking.
"""

from collections.abc import Mapping, Sequence
from math import fsum
from typing import Any

import numpy as np

from stream_app.core.ranker import MAX_AFFINITIES

__all__ = ["STATE_VERSION", "average_states", "checked_state"]

STATE_VERSION = 1
CALIBRATED = ("log odds", "shift")
_TASKS = ("next", "discovery")
_MOST = {"weights": 1e6, "g2": 1e18}
"""Far beyond what is learned; larger ones would be infinite as 32 bit, and their scores nan."""


def checked_state(state: Any, features: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return a state after a look at all of it.

    Parameters
    ----------
    state
        Of any kind.
    features
        Maps task to the features of its head.

    Raises
    ------
    ValueError
        If it is not one of these features, or a number is missing or not finite: one nan would be averaged
        into every worker.

    Examples
    --------
    >>> checked_state({"v": 0}, {})
    Traceback (most recent call last):
    ...
    ValueError: not a ranker: expected a map with v = 1, got v = 0
    """
    try:
        version = state.get("v") if isinstance(state, Mapping) else None
        if version != STATE_VERSION:
            raise ValueError(f"expected a map with v = {STATE_VERSION}, got v = {version!r}")
        labels = state["labels"]
        if type(labels) is not list or len(labels) > MAX_AFFINITIES or len(set(labels)) != len(labels):
            raise ValueError(
                f"expected a list of at most {MAX_AFFINITIES} distinct labels, got another thing"
            )
        if not all(type(label) is str and 0 < len(label) <= 64 for label in labels):
            raise ValueError("expected labels of 1 to 64 characters, got others")
        heads = {}
        for task in _TASKS:
            head = state["heads"][task]
            heads[task] = {
                **_numbers(head, features[task], ("weights", "g2")),
                "affinities": _affinities(head, len(labels)),
            }
        calibrations = {
            task: _numbers(state["calibrations"][task], CALIBRATED, ("weights",)) for task in _TASKS
        }
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise ValueError(f"not a ranker: {exc}") from exc
    return {"v": STATE_VERSION, "labels": labels, "heads": heads, "calibrations": calibrations}


def _numbers(part: Mapping[str, Any], names: Sequence[str], fields: Sequence[str]) -> dict[str, Any]:
    for field in fields:
        given = part[field]
        if set(given) != set(names):
            raise ValueError(f"expected {field} of {', '.join(names)}, got {', '.join(map(str, given))}")
        for name, value in given.items():
            least = 0.0 if field == "g2" else -_MOST[field]
            if type(value) is not float or not least <= value <= _MOST[field]:
                raise ValueError(
                    f"expected numbers of at most {_MOST[field]:g} in {field}, got {value!r} for {name}"
                )
    steps = part["steps"]
    if type(steps) is not int or steps < 0:
        raise ValueError(f"expected a number of steps, got {steps!r}")
    return {field: {name: part[field][name] for name in names} for field in fields} | {"steps": steps}


def _affinities(head: Mapping[str, Any], count: int) -> dict[str, bytes]:
    expected = 4 * (1 + 2 * count) * count
    found = {}
    for field in ("weights", "g2"):
        blob = head["affinities"][field]
        if type(blob) is not bytes or len(blob) != expected:
            raise ValueError(f"expected {expected} bytes of affinities for {count} labels")
        values = np.frombuffer(blob, "<f4")
        least = 0.0 if field == "g2" else -_MOST[field]
        if not ((values >= least) & (values <= _MOST[field])).all():
            raise ValueError(f"expected finite numbers in {field} of affinities, got others")
        found[field] = blob
    return found


def average_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of states, at least one, as `checked_state` returns them.

    Affinities of two labels are the mean over the states that know both.
    """
    labels = list(dict.fromkeys(label for state in states for label in state["labels"]))[:MAX_AFFINITIES]
    heads = {}
    for task in _TASKS:
        parts = [state["heads"][task] for state in states]
        affinities = [
            _average_affinities(
                [(state["labels"], state["heads"][task]["affinities"][field]) for state in states], labels
            )
            for field in ("weights", "g2")
        ]
        heads[task] = {**_average(parts), "affinities": dict(zip(("weights", "g2"), affinities, strict=True))}
    calibrations = {task: _average([state["calibrations"][task] for state in states]) for task in _TASKS}
    return {"v": STATE_VERSION, "labels": labels, "heads": heads, "calibrations": calibrations}


def _average(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mean: dict[str, Any] = {
        field: {name: fsum(part[field][name] for part in parts) / len(parts) for name in parts[0][field]}
        for field in ("weights", "g2")
        if field in parts[0]
    }
    return mean | {"steps": sum(part["steps"] for part in parts) // len(parts)}


def _average_affinities(parts: Sequence[tuple[Sequence[str], bytes]], labels: Sequence[str]) -> bytes:
    size = len(labels)
    place = {label: number for number, label in enumerate(labels)}
    total = np.zeros((1 + 2 * size, size))
    known = np.zeros_like(total)
    for own, blob in parts:
        held = np.array([number for number, label in enumerate(own) if label in place], np.int64)
        target = np.array([place[own[number]] for number in held.tolist()], np.int64)
        given = np.frombuffer(blob, "<f4").reshape(1 + 2 * len(own), len(own))
        source = np.concatenate([[0], 1 + held, 1 + len(own) + held])
        rows = np.concatenate([[0], 1 + target, 1 + size + target])
        total[np.ix_(rows, target)] += given[np.ix_(source, held)]
        known[np.ix_(rows, target)] += 1.0
    return (total / np.maximum(known, 1.0)).astype("<f4").tobytes()
