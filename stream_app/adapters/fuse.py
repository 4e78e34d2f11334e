"""Stop a worker that sets too much aside: the optional limit ``worker.max_dead_letter_share``.

Decides when a flood of bad records is no longer the records' fault. Must not know what makes a record bad.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from stream_app.errors import TooManyDeadLetters

__all__ = ["DeadLetterFuse"]

FUSE_RECORDS: Final = 10_000


class DeadLetterFuse:
    """Blow when too many of the last records of a partition were bad.

    Parameters
    ----------
    partition : int
    max_share : float or None
        Largest share of bad records among the last 10,000; ``None`` never blows.
    """

    def __init__(self, partition: int, max_share: float | None) -> None:
        self._partition = partition
        self._max_share = max_share
        self._steps: deque[tuple[int, int]] = deque()
        self._records = 0
        self._bad = 0

    def count(self, records: int, bad: int) -> None:
        """Count a slice.

        Raises
        ------
        TooManyDeadLetters
            If the share is above the limit over the last 10,000 records or more.
        """
        if self._max_share is None or not records:
            return
        self._steps.append((records, bad))
        self._records += records
        self._bad += bad
        while self._records - self._steps[0][0] >= FUSE_RECORDS:
            old_records, old_bad = self._steps.popleft()
            self._records -= old_records
            self._bad -= old_bad
        if self._records >= FUSE_RECORDS and self._bad > self._max_share * self._records:
            raise TooManyDeadLetters(self._partition, self._bad, self._records, self._max_share)
