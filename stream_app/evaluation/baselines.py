"""What a stream has shown so far, and the simple rankings that follow from it.

Decides which events are examples (the protocol is in the package's docstring) and what each baseline scores.
It must not know the model, profiles or files. All baselines are updated after every event, so each knows
everything that came before the event that it ranks; nothing here is learned in batches.

=====================  ======================================================================================
baseline               score of a label
=====================  ======================================================================================
`popularity`           events that carried it
`first_times`          users who have engaged it
`decayed_popularity`   events that carried it, with a half-life of 14 days
`markov`               share of it among what followed the labels of the user's last event, the mean over
                       these labels; popularity decides between equals and where nothing followed
`own_weights`          the user's own decayed weight of it, plus a thousandth of its share of all events
=====================  ======================================================================================
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from stream_app.core.decay import REBASE_EXPONENT, Weights
from stream_app.core.event import Event
from stream_app.evaluation.figures import middle_ranks

__all__ = ["BASELINES", "Baselines", "Judged", "Log"]

BASELINES: Final = ("popularity", "first_times", "decayed_popularity", "markov", "own_weights")
DECAYED_HALF_LIFE_MS: Final = 14 * 86_400_000.0

_TIE_BREAK: Final = 1e-6
_FAINT_SHARE: Final = 1e-3
_FIRST_COLUMNS: Final = 64

Floats = NDArray[np.float64]
_MISS = np.full(len(BASELINES), np.inf)


@dataclass(frozen=True, slots=True)
class Judged:
    """What an event is an example of, and how the baselines rank it.

    Parameters
    ----------
    next
        Ranks in the order of `BASELINES`, inf for a miss; `None` for an event that is no example.
    discovery
        Alike.
    """

    next: Floats | None
    discovery: Floats | None


@dataclass(slots=True)
class Log:
    """A stream in numbers, for whoever wants to learn from all of it at once.

    Parameters
    ----------
    users
        Of each event the number of its user, in order of first appearance.
    times_ms
        Of each event, milliseconds since the epoch.
    amounts
        What each event adds to the weights of its labels.
    labels
        Of each event the numbers of its labels, in order of first appearance; may be empty.
    """

    users: list[int] = field(default_factory=list)
    times_ms: list[int] = field(default_factory=list)
    amounts: list[float] = field(default_factory=list)
    labels: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(slots=True)
class _User:
    """One user so far: number, engaged labels, labels of the last event, sums by half-life."""

    number: int
    engaged: set[int] = field(default_factory=set)
    last: tuple[int, ...] = ()
    sums: dict[float, tuple[int, dict[int, float]]] = field(default_factory=dict)


class Baselines:
    """Judge the events of one stream and learn from them, one by one.

    Parameters
    ----------
    weights
        The settings that own weights decay by.

    Attributes
    ----------
    log
        All events so far.
    labels
        Maps label to its number, in order of first appearance.
    forgotten
        How many events would be discoveries, had their users' histories not begun anew with them.

    Examples
    --------
    >>> baselines = Baselines(Weights())
    >>> for day, label in enumerate(("tea", "milk", "tea")):
    ...     judged = baselines.judge(Event("u1", "view", day * 86_400_000, str(day), (label,)))
    >>> dict(zip(BASELINES, judged.next.tolist(), strict=True))
    {'popularity': 1.5, 'first_times': 1.5, 'decayed_popularity': 2.0, 'markov': 1.5, 'own_weights': 2.0}
    >>> judged.discovery is None
    True
    """

    def __init__(self, weights: Weights) -> None:
        self.log = Log()
        self.labels: dict[str, int] = {}
        self.forgotten = 0
        self._weights = weights
        self._users: dict[str, _User] = {}
        self._counts = np.zeros((3, _FIRST_COLUMNS))  # popularity, first times, decayed
        self._landmark_ms = 0
        self._followed: dict[int, dict[int, int]] = {}
        self._follows: dict[int, int] = {}

    @property
    def users(self) -> int:
        """How many users the stream has shown."""
        return len(self._users)

    def judge(self, event: Event, *, fresh: bool = False) -> Judged:
        """Rank an event by all that came before it, then learn from it.

        Parameters
        ----------
        event
            The next of the stream.
        fresh
            Whether the user's profile began with it: then it is no discovery, whatever the stream has shown
            of the user before.
        """
        user = self._users.get(event.user_id)
        if user is None:
            user = self._users[event.user_id] = _User(len(self._users))
        shown = len(self.labels)
        known = [self.labels[label] for label in event.labels if label in self.labels]
        numbers = tuple(self.labels.setdefault(label, len(self.labels)) for label in event.labels)
        judged = Judged(None, None)
        if numbers and shown:
            new = [number for number in numbers if number not in user.engaged] if user.engaged else []
            if new and fresh:
                self.forgotten += 1
                new = []
            judged = self._judge(user, shown, known, new, event.event_time_ms)
        self._learn(user, event, numbers)
        return judged

    def engaged(self, user_id: str) -> set[int]:
        """Return the numbers of the labels that a user has engaged so far; not to be changed."""
        user = self._users.get(user_id)
        return set() if user is None else user.engaged

    def _judge(self, user: _User, shown: int, known: list[int], new: list[int], time_ms: int) -> Judged:
        if not known:
            return Judged(_MISS, _MISS if new else None)
        scores = self._scores(user, shown, time_ms)
        ranks = middle_ranks(scores, known)
        if not new:
            return Judged(ranks, None)
        candidates = [number for number in new if number < shown]
        if not candidates:
            return Judged(ranks, _MISS)
        scores[:, np.fromiter(user.engaged, np.intp, len(user.engaged))] = -np.inf
        return Judged(ranks, middle_ranks(scores, candidates))

    def _scores(self, user: _User, shown: int, time_ms: int) -> Floats:
        """Return what every baseline gives to every label, shape (n_baselines, n_labels).

        Sums are compared in less than full precision, so that equal ones are equal in whatever order they
        were added up.
        """
        scores = np.zeros((len(BASELINES), shown))
        scores[:3] = self._counts[:, :shown]
        popularity, _, decayed, markov, own = scores
        share = popularity / popularity.sum()
        decayed *= 2.0 ** ((self._landmark_ms - time_ms) / DECAYED_HALF_LIFE_MS)
        decayed[:] = decayed.astype(np.float32)
        for last in user.last:
            row = self._followed.get(last)
            if row:
                markov[_keys(row)] += _values(row) / self._follows[last]
        np.round(markov, 12, out=markov)
        markov += _TIE_BREAK * share
        for half_life_ms, (landmark_ms, sums) in user.sums.items():
            own[_keys(sums)] += _values(sums) * 2.0 ** ((landmark_ms - time_ms) / half_life_ms)
        own[:] = own.astype(np.float32)
        own += _FAINT_SHARE * share
        return scores

    def _learn(self, user: _User, event: Event, numbers: tuple[int, ...]) -> None:
        time_ms = event.event_time_ms
        amount = self._weights.action_weight(event.event_type)
        log = self.log
        log.users.append(user.number)
        log.times_ms.append(time_ms)
        log.amounts.append(amount)
        log.labels.append(numbers)
        if not numbers:
            return
        if len(self.labels) > self._counts.shape[1]:
            self._counts = np.pad(self._counts, ((0, 0), (0, len(self.labels))))
        columns = list(numbers)
        popularity, first_times, decayed = self._counts
        popularity[columns] += 1.0
        first_times[[number for number in numbers if number not in user.engaged]] += 1.0
        exponent = (time_ms - self._landmark_ms) / DECAYED_HALF_LIFE_MS
        if exponent > REBASE_EXPONENT:
            decayed *= 2.0**-exponent
            self._landmark_ms, exponent = time_ms, 0.0
        decayed[columns] += 2.0**exponent
        for last in user.last:
            row = self._followed.setdefault(last, {})
            for number in numbers:
                row[number] = row.get(number, 0) + 1
            self._follows[last] = self._follows.get(last, 0) + len(numbers)
        user.last = numbers
        user.engaged.update(numbers)
        half_life_ms = self._weights.half_life_ms(event.event_type)
        landmark_ms, sums = user.sums.get(half_life_ms, (time_ms, {}))
        exponent = (time_ms - landmark_ms) / half_life_ms
        if exponent > REBASE_EXPONENT:
            sums = {number: earlier * 2.0**-exponent for number, earlier in sums.items()}
            landmark_ms, exponent = time_ms, 0.0
        for number in numbers:
            sums[number] = sums.get(number, 0.0) + amount * 2.0**exponent
        user.sums[half_life_ms] = (landmark_ms, sums)


def _keys(row: dict[int, int] | dict[int, float]) -> NDArray[np.intp]:
    return np.fromiter(row, np.intp, len(row))


def _values(row: dict[int, int] | dict[int, float]) -> Floats:
    return np.fromiter(row.values(), np.float64, len(row))
