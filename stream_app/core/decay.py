"""How much an event weighs, and when a sum of decaying weights falls below a threshold.

Decides the arithmetic of forward decay and nothing else: it must not know what a label, a segment or a
profile is.

An event of action weight a at t_i weighs a·2^(-(t - t_i)/h) at t, h being the half-life. Written relative to
a fixed landmark L, the sum over many events is

    W(t) = 2^(-(t - L)/h) · s,    s = Σ a·2^((t_i - L)/h)

so only s is stored, adding an event is one addition, additions commute (late events need no special case),
and nothing has to be touched as time passes. That is forward decay, from Cormode, Shkapenyuk, Srivastava and
Xu, "Forward Decay: A Practical Time Decay Model for Streaming Systems", ICDE 2009, which also proposes to
move the landmark before the numbers grow too large.

Numbers never overflow here: exponents of what is added stay below `REBASE_EXPONENT`, and 2**x of a very
negative x is 0.0. A sum may underflow to 0.0; its crossing is then `NO_WEIGHT_MS`, before every instant.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, log2

__all__ = [
    "HOLD_MS",
    "MAX_ACTION_WEIGHT",
    "MAX_HALF_LIFE_S",
    "MIN_HALF_LIFE_S",
    "MIN_HISTORY_FLOOR",
    "NEVER_MS",
    "NO_WEIGHT_MS",
    "REBASE_EXPONENT",
    "SLACK",
    "EventTypeWeight",
    "Weights",
    "crossing_ms",
    "single_crossing_ms",
    "weight_at",
    "weights_problems",
]

NEVER_MS = 253_402_300_800_000
"""10000-01-01T00:00:00Z: what would happen at or after it counts as never (RFC 3339 has no later year)."""

NO_WEIGHT_MS = -NEVER_MS
"""The crossing of a weight that is 0.0: before every instant that an event can carry."""

REBASE_EXPONENT = 500.0
"""An event whose exponent (t_i - L)/h would reach it moves the landmark first: 2^500 is far from 2^1023."""

SLACK = 1e-9
"""Weights are compared with entry thresholds with this relative slack, in the member's favour."""

HOLD_MS = 10
"""Nobody enters a segment for less than this."""

MIN_HALF_LIFE_S = 1e-3
MAX_HALF_LIFE_S = 1e12
MIN_HISTORY_FLOOR = 1e-9
MAX_ACTION_WEIGHT = 1e9
"""Bounds of the settings; within them no instant or sum comes near what a number can hold."""


@dataclass(frozen=True, slots=True)
class EventTypeWeight:
    """How much one event type counts, and for how long.

    Parameters
    ----------
    action_weight
        What one event adds at its own instant; 0 means that the type never counts.
    half_life_s
        Seconds until half of it is left; `None` means the half-life of all types.
    """

    action_weight: float = 1.0
    half_life_s: float | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """The settings under which sums are stored; sums of one `Weights` mean nothing under another.

    Parameters
    ----------
    half_life_s
        Half-life of every event type that has none of its own, in seconds.
    history_floor
        The least weight that counts as history.
    event_types
        Maps event type to what differs from action weight 1 and the default half-life, may be empty.

    Raises
    ------
    ValueError
        If a setting is out of bounds; the message lists all that are.

    Notes
    -----
    A steady user with r events a second has a weight of r·h/ln 2, so changing a half-life moves
    the meaning of every threshold with it.

    Examples
    --------
    >>> weights = Weights(half_life_s=86_400, event_types={"purchase": EventTypeWeight(3.0, 604_800)})
    >>> weights.action_weight("purchase"), weights.half_life_ms("purchase")
    (3.0, 604800000.0)
    >>> weights.action_weight("view"), weights.half_life_ms("view")
    (1.0, 86400000.0)
    """

    half_life_s: float = 2_592_000.0
    history_floor: float = 1e-3
    event_types: Mapping[str, EventTypeWeight] = field(default_factory=dict)
    _half_lives_ms: dict[str, float] = field(init=False, repr=False, compare=False)
    _action_weights: dict[str, float] = field(init=False, repr=False, compare=False)
    default_half_life_ms: float = field(init=False, repr=False, compare=False)
    shortest_half_life_ms: float = field(init=False, repr=False, compare=False)
    log_history_floor: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = weights_problems(self.half_life_s, self.history_floor, self.event_types)
        if found:
            raise ValueError("; ".join(found))
        default_ms = float(self.half_life_s) * 1000.0
        half_lives_ms = {
            event_type: default_ms if weight.half_life_s is None else float(weight.half_life_s) * 1000.0
            for event_type, weight in self.event_types.items()
        }
        derived = {
            "_half_lives_ms": half_lives_ms,
            "_action_weights": {
                name: float(weight.action_weight) for name, weight in self.event_types.items()
            },
            "default_half_life_ms": default_ms,
            "shortest_half_life_ms": min([default_ms, *half_lives_ms.values()]),
            "log_history_floor": log2(self.history_floor),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def half_life_ms(self, event_type: str) -> float:
        """Return the half-life of an event type in milliseconds."""
        return self._half_lives_ms.get(event_type, self.default_half_life_ms)

    def action_weight(self, event_type: str) -> float:
        """Return what one event of a type adds at its own instant."""
        return self._action_weights.get(event_type, 1.0)

    def fingerprint(self) -> str:
        """Return the settings as canonical JSON: equal texts read stored sums alike.

        An event type that is listed with the default action weight and half-life is the same as one that is
        not listed, so it is left out.

        Examples
        --------
        >>> Weights(60, 0.01, {"view": EventTypeWeight(1, 60), "buy": EventTypeWeight(2)}).fingerprint()
        '{"event_types":{"buy":{"action_weight":2.0,"half_life_s":60.0}},"half_life_s":60.0,"history_floor":0.01}'
        """
        default_s = float(self.half_life_s)
        event_types = {}
        for event_type, weight in self.event_types.items():
            half_life_s = default_s if weight.half_life_s is None else float(weight.half_life_s)
            action_weight = float(weight.action_weight)
            if (action_weight, half_life_s) != (1.0, default_s):
                event_types[event_type] = {"action_weight": action_weight, "half_life_s": half_life_s}
        document = {
            "half_life_s": default_s,
            "history_floor": float(self.history_floor),
            "event_types": event_types,
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def weights_problems(
    half_life_s: float, history_floor: float, event_types: Mapping[str, EventTypeWeight]
) -> list[str]:
    """List what is wrong with weight settings, each as where, expected and got.

    Parameters
    ----------
    half_life_s, history_floor, event_types
        As in `Weights`.

    Returns
    -------
    list of str
        Empty if the settings can be used.

    Notes
    -----
    An action weight is 0 or at least ten floors, so that the last event of a user is history for
    more than three half-lives and the forget instant cannot be reached by the event that sets it.

    Examples
    --------
    >>> weights_problems(60.0, 1e-3, {"view": EventTypeWeight(0.005)})
    ['event_types.view.action_weight: expected 0 or a number from 0.01 (ten floors) to 1e+09, got 0.005']
    """
    found = []
    half_lives = [("half_life_s", half_life_s)]
    for event_type, weight in event_types.items():
        if weight.half_life_s is not None:
            half_lives.append((f"event_types.{event_type}.half_life_s", weight.half_life_s))
    for where, seconds in half_lives:
        if not MIN_HALF_LIFE_S <= seconds <= MAX_HALF_LIFE_S:
            bounds = f"{MIN_HALF_LIFE_S:g} to {MAX_HALF_LIFE_S:g}"
            found.append(f"{where}: expected a number of seconds from {bounds}, got {seconds!r}")
    if not MIN_HISTORY_FLOOR <= history_floor <= 1.0:
        found.append(
            f"history_floor: expected a number from {MIN_HISTORY_FLOOR:g} to 1, got {history_floor!r}"
        )
        return found
    least = 10 * history_floor
    for event_type, weight in event_types.items():
        amount = weight.action_weight
        if not (amount == 0 or least * (1 - SLACK) <= amount <= MAX_ACTION_WEIGHT):
            found.append(
                f"event_types.{event_type}.action_weight: expected 0 or a number from {least:g} (ten floors) "
                f"to {MAX_ACTION_WEIGHT:g}, got {amount!r}"
            )
    return found


def weight_at(landmark_ms: int, sums: Mapping[float, float], at_ms: int) -> float:
    """Return the weight of forward-decayed sums at an instant.

    Parameters
    ----------
    landmark_ms
        The instant that the sums are relative to.
    sums
        Maps half-life in milliseconds to the sum of that half-life, may be empty.
    at_ms
        Not before the landmark.

    Returns
    -------
    float
        Σ s·2^(-(at - L)/h), 0.0 for no sums.

    Examples
    --------
    One event a day ago with a half-life of a day, and one of weight 4 with a half-life of an hour:

    >>> weight_at(0, {86_400_000.0: 1.0, 3_600_000.0: 4.0}, 86_400_000)
    0.5000002384185791
    """
    elapsed_ms = at_ms - landmark_ms
    total = 0.0
    for half_life_ms, amount in sums.items():
        total += amount * 2.0 ** (-elapsed_ms / half_life_ms)
    return total


def crossing_ms(landmark_ms: int, sums: Mapping[float, float], log_threshold: float) -> int:
    """Return the instant at which forward-decayed sums fall to a threshold.

    It is computed from the sums relative to their landmark, never from "now", so every computation of it from
    the same sums gives the same integer.

    Parameters
    ----------
    landmark_ms
        The instant that the sums are relative to.
    sums
        Maps half-life in milliseconds to the sum of that half-life, may be empty.
    log_threshold
        Logarithm to base 2 of the threshold.

    Returns
    -------
    int
        Milliseconds since the epoch, rounded; `NEVER_MS` at most, `NO_WEIGHT_MS` for sums that are 0.

    Notes
    -----
    One half-life: t* = L + h·(log2 s - log2 threshold). Several: log2 of the sum, G(x) = log2 Σ 2^(log2
    s_i - x/h_i), is convex and falling in x = t - L (a log-sum-exp of falling lines), so Newton's method
    started at the latest single crossing, where G is still at or above the threshold, approaches the root
    from the left and never passes it. Steep sums that would make plain Newton crawl are straight lines here:
    a handful of steps do.

    Examples
    --------
    Weight 4 with a half-life of 1,000 ms halves twice until it is 1:

    >>> crossing_ms(5_000, {1_000.0: 4.0}, log_threshold=0.0)
    7000
    >>> crossing_ms(5_000, {1_000.0: 4.0, 60_000.0: 0.9}, 0.0)
    9755
    >>> crossing_ms(5_000, {1_000.0: 0.0}, 0.0) == NO_WEIGHT_MS
    True
    """
    count = 0
    latest = -inf
    for half_life_ms, amount in sums.items():
        if amount > 0.0:
            count += 1
            single = half_life_ms * (log2(amount) - log_threshold)
            if single > latest:
                latest = single
    if count == 0:
        return NO_WEIGHT_MS
    if count > 1:
        latest = _newton(sums, log_threshold, latest)
    return _instant_ms(landmark_ms, latest)


def single_crossing_ms(landmark_ms: int, half_life_ms: float, amount: float, log_threshold: float) -> int:
    """Return what `crossing_ms` does, for the sum of one half-life, in 0.3 us instead of 0.7.

    Examples
    --------
    >>> single_crossing_ms(5_000, 1_000.0, 4.0, log_threshold=0.0)
    7000
    """
    if amount <= 0.0:
        return NO_WEIGHT_MS
    return _instant_ms(landmark_ms, half_life_ms * (log2(amount) - log_threshold))


def _instant_ms(landmark_ms: int, after_ms: float) -> int:
    # Rounded before the landmark is added, so that a shifted clock shifts the result by exactly as much.
    return NEVER_MS if after_ms >= NEVER_MS - landmark_ms else landmark_ms + round(after_ms)


def _newton(sums: Mapping[float, float], log_threshold: float, start_ms: float) -> float:
    """Return x with log2 Σ s_i·2^(-x/h_i) = log_threshold, from a start left of it; see `crossing_ms`."""
    lines = [
        (log2(amount) - log_threshold, 1.0 / half_life_ms)
        for half_life_ms, amount in sums.items()
        if amount > 0.0
    ]
    x = start_ms
    for _ in range(100):
        heights = [height - x * slope for height, slope in lines]
        top = max(heights)
        parts = [2.0 ** (height - top) for height in heights]
        total = sum(parts)
        excess = top + log2(total)
        fall = sum([part * line[1] for part, line in zip(parts, lines, strict=True)]) / total
        step = excess / fall
        x += step
        # Convergence is quadratic: what is left after such a step is far below the rounding to milliseconds.
        if step <= 1e-7 + abs(x) * 1e-16:
            break
    return x
