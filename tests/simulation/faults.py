"""What goes wrong in a run, how often, and what is written down of it.

Every call of a worker to Redis or Kafka has one fate: on the way there, where it has its effect, or on the
way back. A seed decides how likely each fate is, and then each single one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, Literal

from stream_app.adapters.codec import Outgoing

Fate = Literal[
    "well",
    "crash before",
    "crash in flight",
    "crash after",
    "refused",
    "reply lost",
    "late",
    "torn",
    "torn crash",
    "refused generation",
    "frozen before",
    "frozen after",
]

#: Fates of one call, with the share of calls that meet it in a run which knows it.
CALL_FATES: Final[dict[Fate, float]] = {
    "crash before": 0.006,
    "crash in flight": 0.004,
    "crash after": 0.008,
    "refused": 0.015,
    "reply lost": 0.02,
    "late": 0.008,
    "torn": 0.05,
    "torn crash": 0.02,
    "refused generation": 0.05,
    "frozen before": 0.005,
    "frozen after": 0.005,
}
#: What happens to a run from outside, with the mean time between two, seconds.
EVENTS: Final[dict[str, float]] = {
    "Redis emptied": 8.0,
    "Redis restored": 8.0,
    "Redis away": 10.0,
    "Kafka away": 10.0,
    "rebalance": 4.0,
    "terminated": 8.0,
    "joined": 10.0,
    "retention": 5.0,
}
#: What happens to a slice between fetcher and partition, with its share.
SLICE_FATES: Final[dict[str, float]] = {"slice lost": 0.05, "slice repeated": 0.05, "slice delayed": 0.05}
#: What happens to an event between its producer and the log.
EVENT_FATES: Final[dict[str, float]] = {"bad record": 0.06, "aborted": 0.08, "racing a timer": 0.3}

STATE_LOST: Final = ("Redis emptied", "Redis restored")


class Faults:
    """The dice of one run, and its diary.

    Parameters
    ----------
    rng
    now_s
        Virtual time, for the diary.
    """

    def __init__(self, rng: random.Random, now_s: Callable[[], float]) -> None:
        self.rng = rng
        self._now_s = now_s
        self.diary: list[str] = []
        self.counts: Counter[str] = Counter()
        #: Once true, nothing goes wrong any more.
        self.are_over = False
        # A run knows about half of all faults: rare ones then meet each other undisturbed.
        self.rates: dict[str, float] = {}
        for table in (CALL_FATES, SLICE_FATES, EVENT_FATES):
            for name, share in table.items():
                self.rates[name] = share * rng.choice([0, 0, 0.5, 1, 2])
        self.every_s = {name: mean_s * rng.choice([0.5, 1, 2]) for name, mean_s in EVENTS.items()}
        self.known = {name for name in EVENTS if rng.random() < 0.5}
        if self.known & set(STATE_LOST):
            # What retention has dropped cannot be folded again: nothing there to be proved.
            self.known.discard("retention")

    def note(self, text: str, count: str = "") -> None:
        """Write a line into the diary, and count what it says."""
        self.diary.append(f"{self._now_s():9.3f} {text}")
        if count:
            self.counts[count] += 1

    def fate(self, kinds: Sequence[Fate]) -> Fate:
        """Decide what becomes of a call that may meet these fates."""
        if self.are_over:
            return "well"
        dice = self.rng.random()
        for kind in kinds:
            dice -= self.rates[kind]
            if dice < 0:
                return kind
        return "well"

    def happens(self, name: str) -> bool:
        """Decide about a slice or an event."""
        return not self.are_over and self.rng.random() < self.rates[name]

    def latency_s(self) -> float:
        """How long a way takes: mostly a moment, now and then seconds."""
        if self.are_over or self.rng.random() > 0.01:
            return self.rng.uniform(0.0, 0.002)
        return self.rng.uniform(0.1, 3.0)

    def part_of(self, messages: Sequence[Outgoing]) -> list[Outgoing]:
        """Choose what Kafka took of messages whose sending failed: of each topic a beginning."""
        taken: set[int] = set()
        for kind in ("entered", "exited", "dead_letter"):
            places = [n for n, message in enumerate(messages) if message.kind == kind]
            taken.update(places[: self.rng.randint(0, len(places))])
        return [message for n, message in enumerate(messages) if n in taken]
