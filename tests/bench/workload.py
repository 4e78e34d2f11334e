"""The events and the definitions that every contestant of the benchmark gets, made up from a seed.

What is decided here: how often users come, which labels they like, how many definitions an event touches, and
that timestamps only grow, so that stream time is the event's own time. An event carries one label and no
asset unless asked: label weights are what all contestants keep. Events come singly, not in baskets, so a
batch hardly ever holds two of one user: nothing is gained by folding a user's events together.

The definitions are written twice, with the same content: segments.toml for the service, JSON for its peers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream_app.adapters.event_lines import Block

HALF_LIFE_S: Final = 30 * 86_400.0
ACTION_WEIGHTS: Final = {"view": 1.0, "purchase": 3.0}
PURCHASE_SHARE: Final = 0.15
BEGIN_S: Final = 1_700_000_000
SPAN_S: Final = 60 * 86_400
TASTE: Final = 40
#: So many users have a taste of their own; user n beyond has that of user n modulo this.
TASTES: Final = 20_000
MIN_WEIGHTS: Final = (0.5, 1.5, 3.5, 6.5)
ASSETS: Final = 100_000
BLOCK_LINES: Final = 2_000


@dataclass(frozen=True, slots=True)
class Workload:
    """What a stream is made from; two of the same fields are the same to the byte.

    Attributes
    ----------
    events, users, labels
        How many.
    with_assets
        Whether each event also names an asset of its label.
    span_s
        How much time the stream covers, in seconds.
    warm_users
        Whether the stream begins with one event of each user, that names all labels of the user's taste:
        from then on all profiles exist and keep their size.
    taste
        How many labels a user likes, at most.
    """

    events: int
    users: int = 20_000
    labels: int = 300
    seed: int = 1
    with_assets: bool = False
    span_s: float = SPAN_S
    warm_users: bool = False
    taste: int = TASTE

    @property
    def warm_events(self) -> int:
        """How many events come first only to make the profiles."""
        return self.users if self.warm_users else 0

    @property
    def total(self) -> int:
        """All events, those that make the profiles included."""
        return self.warm_events + self.events

    def lines(self) -> list[bytes]:
        """Make the events, as lines of JSON in the order of their timestamps."""
        rng = np.random.default_rng(self.seed)
        tastes = draw_tastes(rng, min(self.users, TASTES), self.labels, min(self.taste, self.labels))
        activity = rng.lognormal(0.0, 1.0, self.users)
        user = rng.choice(self.users, self.events, p=activity / activity.sum())
        label = tastes[user % len(tastes), liked(rng, self.events, tastes.shape[1])]
        purchase = rng.random(self.events) < PURCHASE_SHARE
        each_label_has = max(1, ASSETS // self.labels)
        asset = label * each_label_has + np.minimum(
            rng.exponential(each_label_has / 8, self.events).astype(np.int64), each_label_has - 1
        )
        # Steps of uneven length: no two events are a half-life apart to the millisecond, where one program
        # would say that a weight is below its threshold and another that it is not yet.
        step_ms = max(1, int(self.span_s * 1000) // max(1, self.total))
        times_ms = BEGIN_S * 1000 + np.cumsum(rng.integers(1, 2 * step_ms, self.total, endpoint=True))
        encode = msgspec.json.Encoder().encode
        lines = []
        if self.warm_users:
            everybody = rng.permutation(self.users).tolist()
            for u, now_ms in zip(everybody, times_ms.tolist(), strict=False):
                lines.append(
                    encode(
                        {
                            "event_id": f"w{u}",
                            "user_id": f"u{u}",
                            "event_type": "view",
                            "labels": [f"label-{x}" for x in tastes[u % len(tastes)].tolist()],
                            "timestamp": now_ms / 1000,
                        }
                    )
                )
        columns = (user, label, purchase, asset, times_ms[self.warm_events :])
        for number, (u, x, bought, a, now_ms) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            event: dict[str, Any] = {
                "event_id": f"e{number}",
                "user_id": f"u{u}",
                "event_type": "purchase" if bought else "view",
                "labels": [f"label-{x}"],
                "timestamp": now_ms / 1000,
            }
            if self.with_assets:
                event["asset_id"] = f"a{a}"
            lines.append(encode(event))
        return lines


def draw_tastes(rng: np.random.Generator, users: int, labels: int, width: int) -> NDArray[np.int64]:
    """Draw for each user the labels that the user likes, most liked first; popular as 1/rank^0.7."""
    popularity = -0.7 * np.log(np.arange(1, labels + 1))
    tastes = np.empty((users, width), np.int64)
    for first in range(0, users, 1000):
        part = slice(first, min(first + 1000, users))
        # The largest of log weight + Gumbel noise are a weighted draw without replacement.
        keys = popularity + rng.gumbel(size=(part.stop - part.start, labels))
        top = np.argpartition(keys, -width, axis=1)[:, -width:]
        tastes[part] = rng.permuted(top, axis=1)
    return tastes


def liked(rng: np.random.Generator, count: int, sizes: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """Draw places in tastes of these sizes: what stands first is liked most."""
    # The root of a uniform number, turned around.
    return ((1.0 - np.sqrt(rng.random(count))) * sizes).astype(np.int64)


def blocks(name: str, lines: Sequence[bytes]) -> Iterator[Block]:
    """Cut lines into what `stream_app.commands.replay.send_blocks` sends."""
    for first in range(0, len(lines), BLOCK_LINES):
        part: list[bytes | None] = [*lines[first : first + BLOCK_LINES]]
        yield Block(name, first + 1, part, first + len(part))


# --- definitions -------------------------------------------------------------------------------------------


def definitions(
    count: int,
    labels: int = 300,
    seed: int = 1,
    *,
    absent: int = 0,
    min_weights: Sequence[float] = MIN_WEIGHTS,
) -> list[dict[str, Any]]:
    """Make up base segments, as the tables of segments.toml.

    Parameters
    ----------
    count
        How many name labels that events carry: one to three of them, any of which will do.
    labels
        How many labels there are.
    seed
        Same seed, same definitions; a greater `count` only adds some.
    absent
        So many more name labels that no event carries.
    min_weights
        What thresholds are drawn from; every second definition is left at half of its own.

    Examples
    --------
    >>> [table["id"] for table in definitions(2, absent=1)]
    ['base-0', 'base-1', 'absent-0']
    >>> definitions(2)[0].keys() & {"exit_weight"}, definitions(2)[1].keys() & {"exit_weight"}
    (set(), {'exit_weight'})
    """
    rng = random.Random(seed)
    tables = []
    for number in range(count + absent):
        there = number < count
        name = f"base-{number}" if there else f"absent-{number - count}"
        places = rng.sample(range(labels), min(labels, rng.randint(1, 3)))
        min_weight = rng.choice(min_weights)
        table: dict[str, Any] = {
            "id": name,
            "name": name.replace("-", " ").capitalize(),
            "labels": [f"label-{x}" if there else f"absent-{number - count}-{x}" for x in places],
            "min_weight": min_weight,
        }
        if number % 2:
            table["exit_weight"] = min_weight / 2
        tables.append(table)
    return tables


def toml_text(tables: Sequence[dict[str, Any]]) -> str:
    """Write definitions as segments.toml has them."""
    return "\n".join(
        "[[segments]]\n"
        + "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in table.items())
        for table in tables
    )


def peers_json(tables: Sequence[dict[str, Any]]) -> str:
    """Write definitions, and how weights are made, as the other contestants read them."""
    return json.dumps(
        {
            "half_life_s": HALF_LIFE_S,
            "action_weights": ACTION_WEIGHTS,
            "segments": [
                {
                    "id": table["id"],
                    "labels": table["labels"],
                    "min_weight": table["min_weight"],
                    "exit_weight": table.get("exit_weight", table["min_weight"]),
                }
                for table in tables
            ],
        },
        indent=1,
    )


def weights_settings() -> dict[str, Any]:
    """Return the `[weights]` section that goes with the events, as a plain dict."""
    return {
        "half_life_s": HALF_LIFE_S,
        "event_types": {name: {"action_weight": weight} for name, weight in ACTION_WEIGHTS.items()},
    }


def weights_environment() -> dict[str, str]:
    """Return the same as the service's environment variables."""
    own = {
        f"STREAM_APP__WEIGHTS__EVENT_TYPES__{name.upper()}__ACTION_WEIGHT": str(weight)
        for name, weight in ACTION_WEIGHTS.items()
    }
    return {"STREAM_APP__WEIGHTS__HALF_LIFE_S": str(HALF_LIFE_S), **own}


def write_definitions(directory: Path, tables: Sequence[dict[str, Any]]) -> tuple[Path, Path]:
    """Write segments.toml and definitions.json into a folder; return both paths."""
    segments, peers = directory / "segments.toml", directory / "definitions.json"
    segments.write_text(toml_text(tables), encoding="utf-8")
    peers.write_text(peers_json(tables), encoding="utf-8")
    return segments, peers
