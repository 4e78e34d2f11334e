"""What the next-category model says of one user, and its form in Redis.

Decides the shape of an answer and its bytes, which are a public API with a schema version. It must not know
how scores come about (that is `model`): readers import this module, and need neither numpy nor River.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import msgpack
import msgspec

__all__ = ["MAX_SCORES", "SCORES_VERSION", "Recommendation", "Scored", "pack_scores", "unpack_scores"]

SCORES_VERSION = 1
MAX_SCORES = 20
"""How many next categories, and how many recommendations, are kept of a user at most."""

_encode = msgspec.msgpack.Encoder().encode


class Recommendation(NamedTuple):
    """Something that a user has never engaged and may turn to next.

    A tuple, since many are made: its fields are in the order in which they are stored.

    Parameters
    ----------
    event_type
        The likeliest action for the label.
    asset_id
        An asset of the label that the user has not engaged, `None` if none is known.
    labels
        The recommended label, then the asset's other labels that the user has not engaged.
    growth_weight
        The calibrated probability, from 0 to 1, that the label is the next one of those that the user has not
        engaged, given that one of them is.
    base_weight
        The calibrated probability, from 0 to 1, that the label is the next one of all.
    """

    event_type: str
    asset_id: str | None
    labels: tuple[str, ...]
    growth_weight: float
    base_weight: float


@dataclass(frozen=True, slots=True)
class Scored:
    """One user's scores.

    Parameters
    ----------
    user_id
        Whose they are.
    at_ms
        The instant of the scoring, milliseconds since the epoch.
    next_categories
        Pairs of label and calibrated probability, best first, at most `MAX_SCORES`, may be empty: a new model
        predicts nothing.
    recommendations
        Best first, at most `MAX_SCORES`, may be empty.
    model_version
        Which kind of model said so.
    """

    user_id: str
    at_ms: int
    next_categories: Sequence[tuple[str, float]]
    recommendations: Sequence[Recommendation]
    model_version: str = ""


def pack_scores(scored: Scored) -> bytes:
    """Return the stored form of a user's scores.

    Returns
    -------
    bytes
        A msgpack map with these keys:

        ======  ===========================================================================================
        ``v``   int, the schema version, 1
        ``t``   int, the instant of the scoring, milliseconds since the epoch
        ``m``   str, the model version
        ``n``   array of [label, score], best first: next categories
        ``r``   array of [event type, asset id or nil, array of labels, growth weight, base weight], best
                first: recommendations
        ======  ===========================================================================================

    Examples
    --------
    >>> tip = Recommendation("view", "a-1", ("swimwear",), 0.25, 0.125)
    >>> blob = pack_scores(Scored("u1", 1_000, [("beach", 0.5)], [tip], "9f2c"))
    >>> len(blob), unpack_scores("u1", blob).recommendations[0].growth_weight
    (76, 0.25)
    """
    return _encode(
        {
            "v": SCORES_VERSION,
            "t": scored.at_ms,
            "m": scored.model_version,
            "n": scored.next_categories,
            "r": scored.recommendations,
        }
    )


def unpack_scores(user_id: str, blob: bytes) -> Scored:
    r"""Return what `pack_scores` was given.

    Raises
    ------
    ValueError
        If these bytes are not of its making.

    Examples
    --------
    >>> unpack_scores("u1", b"\x80")
    Traceback (most recent call last):
    ...
    ValueError: not scores: expected a map with v = 1, got v = None
    """
    try:
        document = msgpack.unpackb(blob)
        if type(document) is not dict or document.get("v") != SCORES_VERSION:
            got = document.get("v") if type(document) is dict else type(document).__name__
            raise ValueError(f"expected a map with v = {SCORES_VERSION}, got v = {got!r}")
        if type(document["n"]) is not list or type(document["r"]) is not list:
            raise ValueError("expected arrays in n and r, got others")
        categories = [(label, score) for label, score in document["n"]]
        tips = []
        for event_type, asset_id, labels, growth_weight, base_weight in document["r"]:
            if not (asset_id is None or type(asset_id) is str) or type(labels) is not list or not labels:
                raise ValueError("expected an asset id or nil and labels in r, got others")
            "".join([event_type, *labels])
            tips.append(Recommendation(event_type, asset_id, tuple(labels), growth_weight, base_weight))
        numbers = [score for _, score in categories]
        numbers += [number for tip in tips for number in (tip.growth_weight, tip.base_weight)]
        if not all(type(number) is float and isfinite(number) for number in numbers):
            raise ValueError("expected finite scores, got others")
        "".join([label for label, _ in categories])
        at_ms, model_version = document["t"], document["m"]
        if type(at_ms) is not int or type(model_version) is not str:
            raise ValueError("expected an instant in t and a string in m, got others")
    except (ValueError, TypeError, LookupError, AttributeError, msgpack.UnpackException) as exc:
        # Without the user: the message may be logged.
        raise ValueError(f"not scores: {exc}") from exc
    return Scored(user_id, at_ms, categories, tips, model_version)
