"""Lines of event files in, the events to judge out, in the order of the file or of their timestamps.

Decides what of a file is judged. Lines become events as they would on their way through `replay` and the
worker; what the worker would set aside is refused here, by line. It must not know what is done with events.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import Final

from stream_app.adapters.codec import MAX_RECORD_BYTES, Decoder, InvalidEvent
from stream_app.adapters.event_lines import (
    MAX_NAMED_REFUSALS,
    Block,
    InputUnreadable,
    Keyer,
    Refusal,
    input_bytes,
    input_name,
    read_blocks,
)
from stream_app.core.decay import NEVER_MS
from stream_app.core.event import Event
from stream_app.errors import StreamAppError

__all__ = ["EventFile", "OnProgress", "Place", "kept_user"]

#: Told the share of the file that was read (None if its size is unknown) and the events so far.
OnProgress = Callable[[float | None, int], None]
#: Where an event was: the file's name and the number of the line.
Place = tuple[str, int]

#: The record's Kafka timestamp bounds how far in the future an event may be; a file has none.
_NO_KAFKA_TIME_MS: Final = NEVER_MS - 1


def kept_user(user_id: str, every: int) -> bool:
    """Tell whether a user belongs to the sample of every n-th.

    The same users on every machine and in every file: CRC-32 of the id in UTF-8, divisible by n.

    Examples
    --------
    >>> [user for user in ("u1", "u2", "u3", "u4", "u5", "u6") if kept_user(user, 2)]
    ['u1', 'u2', 'u3']
    """
    return zlib.crc32(user_id.encode()) % every == 0


class EventFile:
    """One file, read once, and what was passed over on the way.

    Parameters
    ----------
    path
        JSONL, gzipped or not; "-" is standard input.
    leave_out
        Event types that are not judged.
    sample_users
        Keep the users of `kept_user`; `None` keeps all.
    sort
        Hold all events and yield them in the order of their timestamps.

    Attributes
    ----------
    left_out
        Maps event type to the number of events left out.
    """

    def __init__(
        self, path: str, *, leave_out: Collection[str] = (), sample_users: int | None = None, sort: bool
    ) -> None:
        self.left_out: Counter[str] = Counter()
        self._path = path
        self._leave_out = frozenset(leave_out)
        self._sample_users = sample_users
        self._sort = sort
        self._read_bytes = 0
        self._keyer = Keyer(2 * MAX_RECORD_BYTES)
        self._invalid = 0
        self._invalid_named: list[Refusal] = []

    @property
    def refused(self) -> int:
        """How many lines are no events."""
        return self._keyer.refused + self._invalid

    @property
    def refusals(self) -> list[Refusal]:
        """The first of these lines, each with the reason."""
        named = sorted([*self._keyer.refusals, *self._invalid_named], key=lambda refusal: refusal.line)
        return named[:MAX_NAMED_REFUSALS]

    def slices(self, size: int, on_progress: OnProgress) -> Iterator[list[Event]]:
        """Yield the events in slices.

        Parameters
        ----------
        size
            Of every slice but the last.
        on_progress
            Called after every slice.

        Raises
        ------
        StreamAppError
            Where the file cannot be read, or goes back in time without `sort`.
        """
        total = input_bytes([self._path])
        events = self._in_order(self._events())
        done = 0
        while part := list(islice(events, size)):
            yield part
            done += len(part)
            on_progress(self._read_bytes / total if total and not self._sort else None, done)

    def _events(self) -> Iterator[tuple[Event, Place]]:
        """Yield what is judged, each with its place."""
        decode = Decoder(max_future_skew_s=0.0).decode
        for block in self._blocks():
            keyed = self._keyer.key(block)
            self._read_bytes = block.position_bytes
            for key, value, line in zip(keyed.keys, keyed.values, keyed.lines, strict=True):
                event = decode(key=key, value=value, headers=(), kafka_time_ms=_NO_KAFKA_TIME_MS, now_ms=None)
                if isinstance(event, InvalidEvent):
                    self._refuse(block.name, line, event)
                elif self._sample_users is None or kept_user(event.user_id, self._sample_users):
                    if event.event_type in self._leave_out:
                        self.left_out[event.event_type] += 1
                    else:
                        yield event, (block.name, line)

    def _blocks(self) -> Iterator[Block]:
        line = 0
        try:
            for block in read_blocks([self._path]):
                yield block
                line = block.first + len(block.lines) - 1
        except InputUnreadable as error:
            raise StreamAppError(
                "readable lines",
                " ".join(str(error.__cause__).split()),
                f"{input_name(self._path)}, after line {line}",
                "Repair the file; what a part of it would say of the model is not shown.",
            ) from error

    def _refuse(self, name: str, line: int, invalid: InvalidEvent) -> None:
        self._invalid += 1
        if len(self._invalid_named) < MAX_NAMED_REFUSALS:
            field = f"{invalid.field}: " if invalid.field else ""
            self._invalid_named.append(Refusal(name, line, f"{field}{invalid.detail}"))

    def _in_order(self, placed: Iterator[tuple[Event, Place]]) -> Iterator[Event]:
        if self._sort:
            # Stable: equal instants stay in the order of the file.
            yield from sorted([event for event, _ in placed], key=lambda event: event.event_time_ms)
            return
        latest_ms = 0
        for event, (name, line) in placed:
            if event.event_time_ms < latest_ms:
                back_s = (latest_ms - event.event_time_ms) / 1000
                raise StreamAppError(
                    "events in the order of their timestamps, since each is judged by what came before it",
                    f"one that is {back_s:,.3f} s earlier than one before it",
                    f"{name}:{line}",
                    "Give --sort, which reads the file into memory and sorts it.",
                )
            latest_ms = event.event_time_ms
            yield event
