"""What a growth weight is worth to a campaign: the lift of its top decile.

A discovery segment cuts across users: of all who have not engaged a label it holds those with the largest
growth weight. So that is what is measured, label by label. At instants 30 days apart all users of the 30 days
before are scored. Of those who have not engaged a label, the tenth with the largest growth weight is compared
with all of them: which share engages the label, for the first time, within the 30 days that follow? The lift
is the first engagements in the top deciles over those that deciles drawn at random would hold, both summed
over labels and instants. Pairs of different labels are never ranked against each other: that would measure
how popular the labels are.

Left out: instants with less than 30 days of stream after them, and labels with fewer than ten such users.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["WINDOW_MS", "Lift", "LiftMeter"]

WINDOW_MS: Final = 30 * 86_400_000
_DECILE: Final = 10


@dataclass(frozen=True, slots=True)
class Lift:
    """The lift so far.

    Parameters
    ----------
    value
        First engagements in the top deciles over expected ones; `None` where none was expected.
    instants, pairs
        How often users were scored, and the (user, label) pairs that were looked at.
    found, expected
        First engagements in the top deciles, and those that random deciles would hold.
    """

    value: float | None
    instants: int
    pairs: int
    found: float
    expected: float


@dataclass(slots=True)
class _Scored:
    at_ms: int
    rows: dict[str, int]
    weights: NDArray[np.float64]
    engaged: NDArray[np.bool_]


class LiftMeter:
    """Take scorings and first engagements in the order of time, and sum up.

    Examples
    --------
    Ten users, scored for one label; the one with the largest weight is the only one who engages it:

    >>> meter = LiftMeter()
    >>> weights = np.linspace(0.1, 1.0, 10)[:, None]
    >>> meter.score(0, [f"u{row}" for row in range(10)], weights)
    >>> meter.engage("u9", 0)
    >>> meter.close(WINDOW_MS)
    >>> meter.lift
    Lift(value=10.0, instants=1, pairs=10, found=1.0, expected=0.1)
    """

    def __init__(self) -> None:
        self.lift = Lift(None, 0, 0, 0.0, 0.0)
        self._open: _Scored | None = None
        self._active_ms: dict[str, int] = {}
        self._begin_ms: int | None = None

    def due(self, now_ms: int) -> bool:
        """Tell whether users should be scored at an instant: 30 days after the last, or the first, event."""
        if self._begin_ms is None:
            self._begin_ms = now_ms
        return self._open is None and now_ms - self._begin_ms >= WINDOW_MS

    def active(self, now_ms: int) -> list[str]:
        """Return the users with an event in the 30 days before, in order of first appearance."""
        return [user_id for user_id, at_ms in self._active_ms.items() if now_ms - at_ms <= WINDOW_MS]

    def score(self, at_ms: int, users: Sequence[str], weights: NDArray[np.float64]) -> None:
        """Note what users were given.

        Parameters
        ----------
        at_ms
            The instant.
        users
            One a row.
        weights
            Array, shape (n_users, n_labels): growth weights, nan where a user has engaged the label. The
            columns are the labels by number.
        """
        rows = {user_id: row for row, user_id in enumerate(users)}
        self._open = _Scored(at_ms, rows, weights, np.zeros(weights.shape, dtype=np.bool_))

    def see(self, user_id: str, at_ms: int) -> None:
        """Note an event of a user."""
        self._active_ms[user_id] = at_ms

    def engage(self, user_id: str, number: int) -> None:
        """Note that a user has engaged a label, by number, for the first time."""
        scored = self._open
        if scored is not None and number < scored.weights.shape[1] and user_id in scored.rows:
            scored.engaged[scored.rows[user_id], number] = True

    def close(self, now_ms: int) -> None:
        """Sum up a scoring whose 30 days are over; call before what happens at `now_ms` is noted."""
        scored = self._open
        if scored is None or now_ms - scored.at_ms < WINDOW_MS:
            return
        self._open = None
        before = self.lift
        pairs, found, expected = before.pairs, before.found, before.expected
        for column, hit in zip(scored.weights.T, scored.engaged.T, strict=True):
            given = np.flatnonzero(~np.isnan(column))
            if len(given) < _DECILE:
                continue
            most = round(len(given) / _DECILE)
            top = given[np.argsort(-column[given], kind="stable")[:most]]
            pairs += len(given)
            found += float(np.count_nonzero(hit[top]))
            expected += most * float(np.mean(hit[given]))
        value = found / expected if expected else None
        self.lift = Lift(value, before.instants + 1, pairs, found, expected)
