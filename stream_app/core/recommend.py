"""What to offer a user for a label that he may turn to next.

Decides which asset and which event type stand for a label, from the counts. It must not know how labels are
scored.
"""

from collections.abc import Collection, Sequence

import numpy as np

from stream_app.core.scores import Recommendation
from stream_app.core.statistics import KEPT_ASSETS, LABEL_BITS, LABEL_MASK, Statistics

__all__ = ["Recommender"]

HALF_LIFE = 4.0
"""Of the popularity of an asset, in periods of half a week."""

_Offer = tuple[str, tuple[str, ...], list[tuple[str, tuple[str, ...]]]]
"""Event type; the label; assets with their labels, that label first."""
_UNKNOWN: _Offer = ("", (), [])
_new = tuple.__new__


class Recommender:
    """A snapshot of assets and event types.

    Attributes
    ----------
    examples
        How many examples had been counted when it was made.
    """

    def __init__(self, statistics: Statistics) -> None:
        self.examples = statistics.examples
        self._labels = list(statistics.labels)
        self._assets = list(statistics.asset_ids)
        pairs = np.fromiter(statistics.asset_rows, np.int64, len(statistics.asset_rows))
        weights = statistics.assets.weights(len(pairs), HALF_LIFE)
        held = weights > 0.0
        pairs, weights = pairs[held], weights[held]
        # By label, the most popular first; of equals the one that appeared first.
        order = np.lexsort((pairs, -weights, pairs & LABEL_MASK))
        self._by_label = pairs[order]
        self._begins = np.searchsorted(self._by_label & LABEL_MASK, np.arange(len(self._labels) + 1))
        self._by_asset = np.sort(pairs)
        types = statistics.types[: len(statistics.event_types), : len(self._labels)]
        likeliest = types.argmax(axis=0) if len(types) else np.zeros(len(self._labels), np.int64)
        self._types = [statistics.event_types[place] if len(types) else "" for place in likeliest.tolist()]
        self._known: list[_Offer | None] = [None] * len(self._labels)

    def offers(
        self,
        labels: Sequence[int],
        growth_weights: Sequence[float],
        base_weights: Sequence[float],
        assets: Collection[str],
        engaged: Collection[str],
    ) -> list[Recommendation]:
        """Return a recommendation for each of a user's best labels.

        Parameters
        ----------
        labels
            Positions, best first, none engaged.
        growth_weights, base_weights
            Of the labels.
        assets, engaged
            Assets and labels of the user; neither is recommended.
        """
        found = []
        known = self._known
        own: frozenset[str] | None = None
        for label, growth_weight, base_weight in zip(labels, growth_weights, base_weights, strict=False):
            kept = known[label] if label < len(known) else _UNKNOWN
            event_type, names, offered = self._find(label) if kept is None else kept
            if not names:  # it has appeared since
                continue
            asset_id = None
            for one, carried in offered:
                if one not in assets:
                    asset_id, names = one, carried
                    if len(carried) > 1:
                        if own is None:
                            own = frozenset(engaged)
                        if not own.isdisjoint(carried):
                            names = tuple(other for other in carried if other not in own)
                    break
            # As `Recommendation(...)`, in a third of the time: twenty are made of each user.
            found.append(_new(Recommendation, (event_type, asset_id, names, growth_weight, base_weight)))
        return found

    def _find(self, label: int) -> _Offer:
        """Return a label's offer, and keep it for the next user."""
        begin, end = self._begins[label], self._begins[label + 1]
        name = self._labels[label]
        assets = self._by_label[begin : min(end, begin + KEPT_ASSETS)] >> LABEL_BITS
        firsts = np.searchsorted(self._by_asset, assets << LABEL_BITS).tolist()
        lasts = np.searchsorted(self._by_asset, (assets + 1) << LABEL_BITS).tolist()
        offered = []
        for asset, first, last in zip(assets.tolist(), firsts, lasts, strict=True):
            names: tuple[str, ...] = (name,)
            if last - first > 1:
                others = (self._by_asset[first:last] & LABEL_MASK).tolist()
                names += tuple(self._labels[place] for place in others if place != label)
            offered.append((self._assets[asset], names))
        found = self._known[label] = (self._types[label], (name,), offered)
        return found
