"""What is known of users at an instant, as rows for the model.

Decides what a user's history is while a slice of examples goes by: what was known before it, and the user's
own earlier examples of the slice. It must not know what is computed from it.

Everything that is counted from a row hangs on integers and on the order of engagements, never on a decayed
weight, so that cutting a log into other slices counts the same.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from stream_app.core.decay import Weights
from stream_app.core.features import LATEST, Ints, Rows
from stream_app.core.profile import Profile

__all__ = ["Example", "History", "Slice", "rows_of"]

_MOST_WEIGHT = 1e12
_MOST_EXPONENT = 500.0


@dataclass(frozen=True, slots=True)
class Example:
    """An event as the model sees it.

    Parameters
    ----------
    user_id, event_type, event_time_ms, labels, asset_id
        As in the event.
    fresh
        Whether the user's history began anew with it.
    weight
        What the event adds to the profile at its own instant; with 0 nothing is engaged by it.
    """

    user_id: str
    event_type: str
    event_time_ms: int
    labels: tuple[str, ...]
    asset_id: str | None
    fresh: bool = False
    weight: float = 1.0


@dataclass(slots=True)
class History:
    """What is known of a user at an instant.

    Parameters
    ----------
    user_id
        Whose it is.
    at_ms
        The instant, milliseconds since the epoch.
    labels
        Engaged, in order of last engagement.
    weights
        Of the labels at the instant, over all event types.
    seen_ms
        When each label was last engaged.
    assets
        Engaged assets.
    """

    user_id: str
    at_ms: int
    labels: list[str]
    weights: list[float]
    seen_ms: list[int]
    assets: Collection[str]

    @classmethod
    def of(cls, profile: Profile, weights: Weights, at_ms: int) -> Self:
        """Return what a profile says at an instant, not before its landmark.

        Examples
        --------
        >>> from stream_app.core.profile import TypeSums
        >>> sums = {"view": TypeSums(3.0, {"tea": 2.0, "milk": 1.0}, {"a-1": 3.0}), "buy": TypeSums(1.0, {"tea": 1.0})}
        >>> user = Profile("u1", 0, sums, seen_ms={"milk": 5, "tea": 9})
        >>> History.of(user, Weights(half_life_s=60), at_ms=60_000)
        History(user_id='u1', at_ms=60000, labels=['milk', 'tea'], weights=[0.5, 1.5], seen_ms=[5, 9], assets={'a-1'})
        """
        elapsed_ms = max(0, at_ms - profile.landmark_ms)
        total: dict[str, float] = dict.fromkeys(profile.seen_ms, 0.0)
        assets: set[str] = set()
        for event_type, sums in profile.weights.items():
            left = 2.0 ** (-elapsed_ms / weights.half_life_ms(event_type))
            for label, amount in sums.labels.items():
                total[label] = total.get(label, 0.0) + amount * left
            assets.update(sums.assets)
        seen_ms = profile.seen_ms
        # Labels without an instant come first: nothing says that they are recent.
        labels = [label for label in total if label not in seen_ms] if len(total) > len(seen_ms) else []
        instants = [profile.landmark_ms] * len(labels)
        labels += seen_ms
        instants += seen_ms.values()
        return cls(profile.user_id, at_ms, labels, [total[label] for label in labels], instants, assets)


class _User:
    """One user while a slice goes by; weights are those of `at_ms`, later engagements weigh more."""

    __slots__ = ("at_ms", "latest", "seen_ms", "weights")

    def __init__(self, at_ms: int, places: Sequence[int], weights: Sequence[float], seen_ms: Sequence[int]) -> None:
        self.at_ms = at_ms
        self.latest = list(places[: -LATEST - 1 : -1])
        self.weights = dict(zip(places, weights, strict=True))
        self.seen_ms = dict(zip(places, seen_ms, strict=True))

    def follow(self, places: Sequence[int]) -> None:
        """Let labels be the latest ones."""
        latest = self.latest
        for place in places:
            if place in latest:
                latest.remove(place)
            latest.insert(0, place)
        del latest[LATEST:]

    def engage(self, place: int, amount: float, at_ms: int) -> None:
        """Add to a label's weight, at an instant."""
        self.weights[place] = self.weights.get(place, 0.0) + amount
        self.seen_ms[place] = max(self.seen_ms.get(place, at_ms), at_ms)

    def clear(self, at_ms: int) -> None:
        """Forget everything: the history begins anew."""
        self.at_ms = at_ms
        self.weights, self.seen_ms, self.latest = {}, {}, []


@dataclass(slots=True)
class Batch:
    """Rows of examples, those of one user together.

    Parameters
    ----------
    rows
        What was known before each.
    order
        Array, shape (n_rows,): the number of each row's example.
    came_rows, came
        Pairs of row and label position: what came. Labels for which the model has no room are missing.
    """

    rows: Rows
    order: Ints
    came_rows: Ints
    came: Ints


class Slice:
    """The users of a slice of examples, as they change while it goes by.

    Parameters
    ----------
    histories
        Maps user id to what is known before the first example.
    examples
        Of the slice, all with labels.
    places
        Maps label to position, may grow meanwhile.
    half_life_ms
        Of the weights.
    """

    def __init__(
        self,
        histories: Mapping[str, History],
        examples: Sequence[Example],
        places: Mapping[str, int],
        half_life_ms: float,
    ) -> None:
        self.examples = examples
        self._histories = histories
        self._places = places
        self._half_life_ms = half_life_ms
        self._users: dict[str, _User] = {}
        # Who does not come again need not be kept up to date.
        self._last = {example.user_id: number for number, example in enumerate(examples)}

    def rows(self, begin: int, end: int, size: int) -> Batch:
        """Return the rows of the next examples, and take them into their users' histories.

        Parameters
        ----------
        begin, end
            From where the last call ended.
        size
            How many labels there are.
        """
        count = end - begin
        by_user: dict[str, list[int]] = {}
        for number in range(begin, end):
            by_user.setdefault(self.examples[number].user_id, []).append(number)
        order = [number for numbers in by_user.values() for number in numbers]
        at_ms = np.array([self.examples[number].event_time_ms for number in order], np.float64)
        added = np.array([self.examples[number].weight for number in order])
        since_ms = np.empty(count)
        latest = np.full((count, LATEST), -1)
        came_rows: list[int] = []
        came: list[int] = []
        known = _Known()
        begins = []  # of rows that follow one another: each knows what the one before knew, and what came there
        later: list[tuple[_User, int, list[int]]] = []
        places = self._places
        row = 0
        for user_id, numbers in by_user.items():
            first = self.examples[numbers[0]]
            user = self._user(user_id, first)
            last = self._last[user_id]
            begins.append(row)
            if not first.fresh:
                known.add(row, user)
            for number in numbers:
                example = self.examples[number]
                if example.fresh:
                    user.clear(example.event_time_ms)
                    if begins[-1] < row:
                        begins.append(row)
                    later = [one for one in later if one[0] is not user]
                since_ms[row] = user.at_ms
                latest[row, : len(user.latest)] = user.latest
                own = [places[label] for label in example.labels if label in places]
                came_rows += [row] * len(own)
                came += own
                if number < last and example.weight > 0.0:
                    user.follow(own)
                    if last >= end:
                        later.append((user, row, own))
                row += 1
        # A late event does not bring back what has decayed since.
        exponents = (at_ms - since_ms) / self._half_life_ms
        added = np.clip(np.nan_to_num(added), 0.0, _MOST_WEIGHT)
        amounts = added * 2.0 ** np.clip(exponents, -_MOST_EXPONENT, _MOST_EXPONENT)
        for user, row, own in later:
            for place in own:
                user.engage(place, float(amounts[row]), int(at_ms[row]))
        weights, seen_ms = known.dense(count, size)
        pairs = np.array(came_rows, np.int64), np.array(came, np.int64)
        _accumulate(weights, seen_ms, begins, pairs, amounts, at_ms)
        left = 2.0 ** -np.clip(exponents, 0.0, _MOST_EXPONENT)
        return Batch(_rows(at_ms, weights, seen_ms, latest, left), np.array(order), *pairs)

    def _user(self, user_id: str, example: Example) -> _User:
        user = self._users.get(user_id)
        if user is None:
            history = self._histories.get(user_id)
            if history is None:
                user = _User(example.event_time_ms, (), (), ())
            else:
                user = _read(history, self._places)
            self._users[user_id] = user
        return user


def _accumulate(
    weights: NDArray[np.float64],
    seen_ms: NDArray[np.float64],
    begins: Sequence[int],
    pairs: tuple[Ints, Ints],
    amounts: NDArray[np.float64],
    at_ms: NDArray[np.float64],
) -> None:
    """Let every row of a run know what came in the rows before it; the first row of each run is given."""
    count = len(weights)
    if len(begins) == count:
        return
    first = np.zeros(count + 1, np.bool_)
    first[[*begins, count]] = True
    following = pairs[0] + 1
    held = ~first[following] & (amounts[pairs[0]] > 0.0)
    rows, labels = following[held], pairs[1][held]
    np.add.at(weights, (rows, labels), amounts[pairs[0][held]])
    np.maximum.at(seen_ms, (rows, labels), at_ms[pairs[0][held]])
    for begin, end in pairwise([*begins, count]):
        if end - begin > 1:
            np.cumsum(weights[begin:end], axis=0, out=weights[begin:end])
            np.maximum.accumulate(seen_ms[begin:end], axis=0, out=seen_ms[begin:end])


def rows_of(histories: Sequence[History], places: Mapping[str, int], size: int) -> Rows:
    """Return the rows of users as they are."""
    known = _Known()
    latest = np.full((len(histories), LATEST), -1)
    for row, history in enumerate(histories):
        own = [places.get(label, -1) for label in history.labels]
        if -1 in own:
            user = _read(history, places)
            known.add(row, user)
            latest[row, : len(user.latest)] = user.latest
            continue
        known.extend(row, own, history.weights, history.seen_ms)
        tail = own[: -LATEST - 1 : -1]
        latest[row, : len(tail)] = tail
    at_ms = np.array([history.at_ms for history in histories], np.float64)
    return _rows(at_ms, *known.dense(len(histories), size), latest, np.ones(len(histories)))


def _read(history: History, places: Mapping[str, int]) -> _User:
    """Return a user as a history says, without labels that the model does not have."""
    own = [places.get(label, -1) for label in history.labels]
    if -1 not in own:
        return _User(history.at_ms, own, history.weights, history.seen_ms)
    kept = [number for number, place in enumerate(own) if place >= 0]
    return _User(
        history.at_ms,
        [own[number] for number in kept],
        [history.weights[number] for number in kept],
        [history.seen_ms[number] for number in kept],
    )


class _Known:
    """What is known of some rows, collected."""

    __slots__ = ("amounts", "counts", "instants", "labels", "rows")

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.counts: list[int] = []
        self.labels: list[int] = []
        self.amounts: list[float] = []
        self.instants: list[int] = []

    def add(self, row: int, user: _User) -> None:
        """Take what is known of a user into a row."""
        self.extend(row, user.weights, user.weights.values(), user.seen_ms.values())

    def extend(
        self, row: int, labels: Collection[int], amounts: Iterable[float], instants: Iterable[int]
    ) -> None:
        """Take labels, weights and last engagements into a row."""
        self.rows.append(row)
        self.counts.append(len(labels))
        self.labels += labels
        self.amounts += amounts
        self.instants += instants

    def dense(self, count: int, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return weights and last engagements, shape (count, size); 0 and -inf where nothing is known."""
        places = np.repeat(np.array(self.rows, np.int64) * size, self.counts) + np.array(self.labels, np.int64)
        weights = np.zeros((count, size))
        weights.ravel()[places] = np.nan_to_num(np.array(self.amounts, np.float64), posinf=_MOST_WEIGHT)
        seen_ms = np.full((count, size), -np.inf)
        seen_ms.ravel()[places] = np.array(self.instants, np.float64)
        return weights, seen_ms


def _rows(
    at_ms: NDArray[np.float64],
    weights: NDArray[np.float64],
    seen_ms: NDArray[np.float64],
    latest: Ints,
    left: NDArray[np.float64],
) -> Rows:
    size = weights.shape[1]
    engaged = seen_ms > -np.inf
    pairs = np.flatnonzero(engaged)
    rows = pairs // max(size, 1)
    amounts = weights.ravel()[pairs] * left[rows]
    return Rows(
        at_ms,
        engaged,
        rows,
        pairs - rows * size,
        np.clip(amounts, 0.0, _MOST_WEIGHT),
        at_ms[rows] - seen_ms.ravel()[pairs],
        latest,
    )
