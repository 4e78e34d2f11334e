"""What is known of users at an instant, as rows for the model.

Decides what a user's history is while a slice of examples goes by: what was known before it, and the user's
own earlier examples of the slice. It must not know what is computed from it.

Everything that is counted from a row hangs on integers and on the order of engagements, never on a decayed
weight, so that cutting a log into other slices counts the same.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from stream_app.core.decay import Weights
from stream_app.core.features import LATEST, Ints, Rows
from stream_app.core.profile import Profile

__all__ = ["Example", "History", "Slice", "rows_of"]

_MOST_WEIGHT = 1e12
_MOST_EXPONENT = 500.0
_NONE = [-1] * LATEST

_Pairs = tuple[Ints, Ints, NDArray[np.float64], NDArray[np.float64]]
"""Rows, labels, weights and instants of the last engagement."""


class Example(NamedTuple):
    """An event as the model sees it; a tuple, since there is one for every event.

    Parameters
    ----------
    user_id, event_type, event_time_ms, labels, asset_id
        As in the event.
    fresh
        Whether the user's history began anew with it.
    weight
        What the event adds to the profile at its own instant; with 0 nothing is engaged by it.
    known
        What is left of the user's history, where the profile has forgotten some of it since the example
        before; else `None`.
    """

    user_id: str
    event_type: str
    event_time_ms: int
    labels: tuple[str, ...]
    asset_id: str | None
    fresh: bool = False
    weight: float = 1.0
    known: "History | None" = None


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
        Engaged assets; may be a view of the profile, to be read before it changes.
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
        >>> view = TypeSums(3.0, {"tea": 2.0, "milk": 1.0}, {"a-1": 3.0})
        >>> buy = TypeSums(1.0, {"tea": 1.0}, {})
        >>> user = Profile("u1", 0, {"view": view, "buy": buy}, seen_ms={"milk": 5, "tea": 9})
        >>> history = History.of(user, Weights(half_life_s=60), at_ms=60_000)
        >>> history.labels, history.weights, history.seen_ms, history.assets
        (['milk', 'tea'], [0.5, 1.5], [5, 9], {'a-1'})
        """
        elapsed_ms = max(0, at_ms - profile.landmark_ms)
        if len(profile.weights) == 1:
            [(event_type, sums)] = profile.weights.items()
            if len(profile.seen_ms) == len(sums.labels):
                # Most users have one type of event, and instants of all labels.
                left = 2.0 ** (-elapsed_ms / weights.half_life_ms(event_type))
                amounts = sums.labels
                instants = profile.seen_ms
                decayed = [amounts[label] * left for label in instants]
                of_seen = list(instants.values())
                return cls(profile.user_id, at_ms, list(instants), decayed, of_seen, sums.assets.keys())
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
        last_ms = [profile.landmark_ms] * len(labels)
        labels += seen_ms
        last_ms += seen_ms.values()
        return cls(profile.user_id, at_ms, labels, [total[label] for label in labels], last_ms, assets)


class _User:
    """One user while a slice goes by; weights are those of `at_ms`, later engagements weigh more."""

    __slots__ = ("at_ms", "known", "latest", "places", "seen_ms", "weights")

    def __init__(self, at_ms: int, places: list[int], weights: list[float], seen_ms: list[int]) -> None:
        self.at_ms = at_ms
        self.places, self.weights, self.seen_ms = places, weights, seen_ms
        self.latest = places[: -LATEST - 1 : -1]
        self.known: dict[int, int] | None = None  # where a label is in the lists, once that is asked

    def follow(self, places: Sequence[int]) -> None:
        """Let labels be the latest ones."""
        latest = self.latest
        for place in places:
            latest = [place, *[other for other in latest if other != place]]
        self.latest = latest[:LATEST]  # a new list: rows hold the old one

    def engage(self, place: int, amount: float, at_ms: int) -> None:
        """Add to a label's weight, at an instant."""
        if self.known is None:
            # The lists are the history's, which is not ours to change.
            self.places, self.weights, self.seen_ms = self.places[:], self.weights[:], self.seen_ms[:]
            self.known = {place: number for number, place in enumerate(self.places)}
        number = self.known.get(place)
        if number is None:
            self.known[place] = len(self.places)
            self.places.append(place)
            self.weights.append(amount)
            self.seen_ms.append(at_ms)
        else:
            self.weights[number] += amount
            self.seen_ms[number] = max(self.seen_ms[number], at_ms)

    def clear(self, at_ms: int) -> None:
        """Forget everything: the history begins anew."""
        self.at_ms = at_ms
        self.places, self.weights, self.seen_ms, self.latest, self.known = [], [], [], [], None


@dataclass(slots=True)
class Batch:
    """Rows of examples, those of one user together.

    Parameters
    ----------
    rows
        What was known before each.
    order
        Array, shape (n_rows,): the number of each row's example in the slice.
    examples
        The example of each row.
    came_rows, came
        Pairs of row and label position: what came. Labels for which the model has no room are missing.
    """

    rows: Rows
    order: Ints
    examples: list[Example]
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
        by_user: dict[str, list[int]] = {}
        for number, example in enumerate(self.examples[begin:end], begin):
            numbers = by_user.get(example.user_id)
            if numbers is None:
                by_user[example.user_id] = [number]
            else:
                numbers.append(number)
        # Users with several rows come first: only for them it has to be found out what changes in between.
        order = [number for numbers in by_user.values() if len(numbers) > 1 for number in numbers]
        several = len(order)
        order += [numbers[0] for numbers in by_user.values() if len(numbers) == 1]
        examples = [self.examples[number] for number in order]
        at_ms = np.array([example.event_time_ms for example in examples], np.float64)
        since_ms: list[int] = []
        latest: list[list[int]] = []
        came_rows: list[int] = []
        came: list[int] = []
        known = _Known()
        begins: list[int] = []  # of runs: each row knows what the one before knew, and what came there
        later: list[tuple[_User, int, list[int]]] = []
        places, last_of = self._places, self._last
        user, user_id = _User(0, [], [], []), None
        last = -1
        for row, (number, example) in enumerate(zip(order, examples, strict=True)):
            comes_first = example.user_id != user_id
            if comes_first:
                user_id = example.user_id
                user = self._user(user_id, example)
                last = last_of[user_id]
            begins_anew = example.fresh or example.known is not None
            if begins_anew:
                later = [one for one in later if one[0] is not user]
                if example.known is not None:
                    user = self._users[example.user_id] = _read(example.known, places)
                else:
                    user.clear(example.event_time_ms)
            if comes_first or begins_anew:
                begins.append(row)
                known.add(row, user)
            since_ms.append(user.at_ms)
            latest.append(user.latest)
            own = [places[label] for label in example.labels if label in places]
            came += own
            came_rows += [row] * len(own)
            if number < last and example.weight > 0.0:
                user.follow(own)
                if last >= end:
                    later.append((user, row, own))
        # A late event does not bring back what has decayed since.
        exponents = (at_ms - np.array(since_ms, np.float64)) / self._half_life_ms
        added = np.array([example.weight for example in examples], np.float64)
        amounts = np.clip(np.nan_to_num(added), 0.0, _MOST_WEIGHT)
        amounts *= 2.0 ** np.clip(exponents, -_MOST_EXPONENT, _MOST_EXPONENT)
        for user, row, own in later:
            for place in own:
                user.engage(place, float(amounts[row]), int(at_ms[row]))
        pairs = np.array(came_rows, np.int64), np.array(came, np.int64)
        found = known.pairs()
        if several:
            found = _accumulated(found, begins, several, size, pairs, amounts, at_ms)
        left = 2.0 ** -np.clip(exponents, 0.0, _MOST_EXPONENT)
        return Batch(_rows(at_ms, size, found, latest, left), np.array(order), examples, *pairs)

    def _user(self, user_id: str, example: Example) -> _User:
        user = self._users.get(user_id)
        if user is None:
            history = self._histories.get(user_id)
            if history is None:
                user = _User(example.event_time_ms, [], [], [])
            else:
                user = _read(history, self._places)
            self._users[user_id] = user
        return user


def _accumulated(
    found: _Pairs,
    begins: Sequence[int],
    several: int,
    size: int,
    came: tuple[Ints, Ints],
    amounts: NDArray[np.float64],
    at_ms: NDArray[np.float64],
) -> _Pairs:
    """Let every row of a run know what came in the rows before it.

    Parameters
    ----------
    found
        What is known of the first row of each run.
    begins
        Where runs begin.
    several
        Runs of more than one row end before this row.
    size
        How many labels there are.
    came
        Pairs of row and label.
    amounts, at_ms
        What a row's example adds to its labels, and when.
    """
    rows, labels, weights, seen_ms = found
    first = int(np.searchsorted(rows, several))
    dense = np.zeros((several, size))
    dense[rows[:first], labels[:first]] = weights[:first]
    instants = np.full((several, size), -np.inf)
    instants[rows[:first], labels[:first]] = seen_ms[:first]
    ends = [begin for begin in begins if begin < several]
    starts = np.zeros(len(at_ms) + 1, np.bool_)
    starts[[*begins, len(at_ms)]] = True
    following = came[0] + 1
    held = ~starts[following] & (amounts[came[0]] > 0.0)
    next_rows, next_labels, source = following[held], came[1][held], came[0][held]
    np.add.at(dense, (next_rows, next_labels), amounts[source])
    np.maximum.at(instants, (next_rows, next_labels), at_ms[source])
    for begin, end in pairwise([*ends, several]):
        np.cumsum(dense[begin:end], axis=0, out=dense[begin:end])
        np.maximum.accumulate(instants[begin:end], axis=0, out=instants[begin:end])
    flat = np.flatnonzero(instants.ravel() > -np.inf)
    of_row = flat // size
    return (
        np.concatenate([of_row, rows[first:]]),
        np.concatenate([flat - of_row * size, labels[first:]]),
        np.concatenate([dense.ravel()[flat], weights[first:]]),
        np.concatenate([instants.ravel()[flat], seen_ms[first:]]),
    )


def rows_of(histories: Sequence[History], places: Mapping[str, int], size: int) -> Rows:
    """Return the rows of users as they are."""
    known = _Known()
    latest = []
    for row, history in enumerate(histories):
        user = _read(history, places)
        known.add(row, user)
        latest.append(user.latest)
    at_ms = np.array([history.at_ms for history in histories], np.float64)
    return _rows(at_ms, size, known.pairs(), latest, np.ones(len(histories)))


def _read(history: History, places: Mapping[str, int]) -> _User:
    """Return a user as a history says, without labels that the model does not have."""
    found = [places.get(label, -1) for label in history.labels]
    if -1 not in found:
        return _User(history.at_ms, found, history.weights, history.seen_ms)
    kept = [number for number, place in enumerate(found) if place >= 0]
    return _User(
        history.at_ms,
        [found[number] for number in kept],
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
        self.rows.append(row)
        self.counts.append(len(user.places))
        self.labels += user.places
        self.amounts += user.weights
        self.instants += user.seen_ms

    def pairs(self) -> _Pairs:
        """Return rows, labels, weights and last engagements, by row."""
        return (
            np.repeat(np.array(self.rows, np.int64), self.counts),
            np.array(self.labels, np.int64),
            np.nan_to_num(np.array(self.amounts, np.float64), posinf=_MOST_WEIGHT),
            np.array(self.instants, np.float64),
        )


def _rows(
    at_ms: NDArray[np.float64],
    size: int,
    found: _Pairs,
    latest: Sequence[list[int]],
    left: NDArray[np.float64],
) -> Rows:
    """Return rows of what was found, of which so much is left at the instant of each row."""
    rows, labels, weights, seen_ms = found
    engaged = np.zeros((len(at_ms), size), np.bool_)
    engaged[rows, labels] = True
    padded = [places + _NONE[len(places) :] for places in latest]
    return Rows(
        at_ms,
        engaged,
        rows,
        labels,
        np.clip(weights * left[rows], 0.0, _MOST_WEIGHT),
        at_ms[rows] - seen_ms,
        np.array(padded, np.int64).reshape(-1, LATEST),
    )
