"""Lines of JSON in, keyed records out: the reading half of `replay`.

It decides what a line becomes: which key it gets, which event_id if it has none, or why it cannot be sent at
all. It does not decide whether an event is valid; the worker judges that, so everything that can be keyed
leaves as it is, byte for byte, but for an event_id put in front. On the way it measures how far the input
goes back in time. It must not know Kafka, rates or progress bars.

Lines come in blocks: a slow input (a pipe) never waits for a full one, and no input is held in memory.
"""

# Errors are named as in stream_app.errors, to be read in sentences.
# ruff: noqa: N818

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from stream_app.errors import StreamAppError

STDIN: Final = "-"
BLOCK_BYTES: Final = 256 * 1024
#: A longer line is not held in memory. Far above what Kafka takes, which has its own limit per topic.
MAX_LINE_BYTES: Final = 16 * 1024 * 1024
#: Refused lines that are kept by name; the others are only counted, so that memory stays bounded.
MAX_NAMED_REFUSALS: Final = 100

_MAX_EVENT_ID = 128
_YEAR_10000_S = 253_402_300_800
_LINE_NUMBER_DIGITS = 12


class InputUnreadable(StreamAppError):
    """An input broke off: an unreadable file, a damaged gzip stream."""

    def __init__(self, name: str, line: int, got: str) -> None:
        super().__init__(
            "readable lines",
            got,
            f"{name}, after line {line}",
            "Repair the file and replay what is missing: the lines before are in the topic; sent again, they "
            "count double for users with more than 32 of these events.",
        )


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive lines of one input.

    Parameters
    ----------
    name
        What the input is called in event ids and messages: the file's base name, "stdin".
    first
        Number of the first line, from 1.
    lines
        The lines, without their ends; None stands for one above `MAX_LINE_BYTES`.
    position_bytes
        How much of all inputs has been read so far, as stored (compressed where they are).
    """

    name: str
    first: int
    lines: list[bytes | None]
    position_bytes: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """A line that cannot be sent."""

    name: str
    line: int
    reason: str


@dataclass(slots=True)
class Keyed:
    """What a block became: parallel lists of what can be sent, in the block's order.

    Parameters
    ----------
    keys, values
        The records: user_id in UTF-8, JSON.
    lines
        Line number of each.
    times_ms
        Event timestamp of each; None where it cannot be read (the worker will say so).
    """

    name: str
    position_bytes: int
    keys: list[bytes] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    times_ms: list[int | None] = field(default_factory=list)


@dataclass(slots=True)
class TimeOrder:
    """How far an input goes back in time.

    An event is late by the distance to the latest timestamp before it. The measure is of the whole input; a
    partition of the topic sees a part of it, and so at most this.

    Examples
    --------
    >>> order = TimeOrder()
    >>> for line, time_ms in enumerate([1_000, 5_000, 2_000, 6_000], 1):
    ...     order.see("log", line, time_ms)
    >>> order.late, order.largest_step_back_ms, order.at
    (1, 3000, ('log', 3))
    """

    latest_ms: int | None = None
    late: int = 0
    largest_step_back_ms: int = 0
    at: tuple[str, int] | None = None

    def see(self, name: str, line: int, time_ms: int) -> None:
        """Note the next event's timestamp."""
        if self.latest_ms is None or time_ms >= self.latest_ms:
            self.latest_ms = time_ms
            return
        self.late += 1
        if self.latest_ms - time_ms > self.largest_step_back_ms:
            self.largest_step_back_ms = self.latest_ms - time_ms
            self.at = (name, line)


class _Head(msgspec.Struct):
    user_id: str
    event_id: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    timestamp: Any = None


class Keyer:
    """Turns blocks into keyed records, counting refusals and steps back in time over all of them.

    Parameters
    ----------
    max_record_bytes
        Key and value together; a longer record is refused here, because the topic would refuse it.
    """

    def __init__(self, max_record_bytes: int) -> None:
        self.order = TimeOrder()
        self.refused = 0
        self.refusals: list[Refusal] = []
        self._max_record_bytes = max_record_bytes
        self._decode = msgspec.json.Decoder(_Head).decode

    def key(self, block: Block) -> Keyed:
        """Key the lines of a block; blank ones are passed over.

        Parameters
        ----------
        block
            Any block of any input, inputs one after the other.

        Returns
        -------
        Keyed
            Without the lines that were refused.
        """
        keyed = Keyed(block.name, block.position_bytes)
        prefix = b'{"event_id":"' + json.dumps(block.name)[1:-1].encode()
        decode, see, unset = self._decode, self.order.see, msgspec.UNSET
        for number, line in enumerate(block.lines, block.first):
            if line is None:
                self._refuse(block.name, number, f"longer than {MAX_LINE_BYTES} bytes")
                continue
            line = line.strip()
            if not line:
                continue
            try:
                head = decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                lenient = _head_of_doubtful(line)
                if isinstance(lenient, str):
                    self._refuse(block.name, number, lenient)
                    continue
                head = lenient
            try:
                key = head.user_id.encode()
            except UnicodeEncodeError:
                self._refuse(block.name, number, "user_id: expected Unicode text, got something else")
                continue
            value = line if head.event_id is not unset else b'%b-%d",%b' % (prefix, number, line[1:])
            if len(key) + len(value) > self._max_record_bytes:
                got = f"{len(key) + len(value)} bytes"
                self._refuse(
                    block.name, number, f"expected at most {self._max_record_bytes} bytes, got {got}"
                )
                continue
            time_ms = event_time_ms(head.timestamp)
            if time_ms is not None:
                see(block.name, number, time_ms)
            keyed.keys.append(key)
            keyed.values.append(value)
            keyed.lines.append(number)
            keyed.times_ms.append(time_ms)
        return keyed

    def _refuse(self, name: str, line: int, reason: str) -> None:
        self.refused += 1
        if len(self.refusals) < MAX_NAMED_REFUSALS:
            self.refusals.append(Refusal(name, line, reason))


def _head_of_doubtful(line: bytes) -> _Head | str:
    """Read what a key needs from a line that strict JSON does not admit (NaN, bytes that are not UTF-8).

    Returns the reason if it cannot be found: then nobody knows which partition the line would belong in.
    """
    try:
        found = json.loads(line.decode("utf-8", "surrogateescape"))
    except RecursionError:
        return "nested too deeply to find its user_id"
    except ValueError:
        return "not JSON"
    if not isinstance(found, dict):
        return "expected a JSON object, got another value"
    if "user_id" not in found:
        return "user_id: expected a text, got none"
    if not isinstance(found["user_id"], str):
        return f"user_id: expected a text, got {type(found['user_id']).__name__}"
    event_id = msgspec.Raw() if "event_id" in found else msgspec.UNSET
    return _Head(found["user_id"], event_id, found.get("timestamp"))


def event_time_ms(timestamp: object) -> int | None:
    """Read an event's timestamp as far as ordering an input needs it.

    Parameters
    ----------
    timestamp
        The field as decoded from JSON.

    Returns
    -------
    int or None
        Milliseconds since the epoch; None for what is none, or none of this age. The worker, which has the
        last word on it, will set that event aside, so that it must not count as the latest.

    Examples
    --------
    >>> event_time_ms(1483273590), event_time_ms("2017-01-01T12:26:30Z"), event_time_ms("yesterday")
    (1483273590000, 1483273590000, None)
    """
    if isinstance(timestamp, str):
        try:
            moment = datetime.fromisoformat(timestamp)
        except ValueError:
            return None
        return None if moment.tzinfo is None else round(moment.timestamp() * 1e6) // 1000
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float):
        return None
    return round(timestamp * 1e6) // 1000 if 0 <= timestamp < _YEAR_10000_S else None


def input_name(path: str) -> str:
    """Return what an input is called in event ids: the base name as given, "stdin" for "-".

    Raises
    ------
    StreamAppError
        If no event_id of at most 128 characters can be made with it.
    """
    if path == STDIN:
        return "stdin"
    name = os.fsencode(Path(path).name).decode("utf-8", "replace")
    longest = _MAX_EVENT_ID - 1 - _LINE_NUMBER_DIGITS
    if len(name) > longest or any(unicodedata.category(c) == "Cc" for c in name):
        raise StreamAppError(
            f"a name of at most {longest} characters without control characters, as event ids are made of it",
            f"{len(name)} characters" if len(name) > longest else "a control character",
            f"input {name!r}",
            "Rename the file, or pass it as standard input: `stream-app replay - < FILE`.",
        )
    return name


def input_bytes(paths: Sequence[str]) -> int | None:
    """Return the size of all inputs as stored, in bytes; None if one of them is a pipe."""
    total = 0
    for path in paths:
        status = os.fstat(0) if path == STDIN else os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return None
        total += status.st_size
    return total


def read_blocks(paths: Sequence[str]) -> Iterator[Block]:
    """Read files one after the other, gzipped or not (told by content, not by name).

    Parameters
    ----------
    paths
        As given on the command line; "-" is standard input.

    Yields
    ------
    Block
        What could be read at once, at most about `BLOCK_BYTES` and one line.

    Raises
    ------
    InputUnreadable
        Where an input breaks off; the lines before have been yielded.
    """
    before = 0
    for path in paths:
        name = input_name(path)
        line = 0
        try:
            with _open(path) as raw:
                for lines in _lines(raw):
                    position = before + _position(raw)
                    yield Block(name, line + 1, lines, position)
                    line += len(lines)
                before += _position(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise InputUnreadable(name, line, " ".join(str(error).split())) from error


def _open(path: str) -> BinaryIO:
    # Unbuffered and our own: a thread blocked in sys.stdin.buffer keeps the process from ending.
    return io.FileIO(0, closefd=False) if path == STDIN else io.FileIO(path)


def _position(raw: BinaryIO) -> int:
    try:
        return raw.tell()
    except OSError:
        return 0


def _lines(raw: BinaryIO) -> Iterator[list[bytes | None]]:
    """Split a stream into lists of whole lines, None for a line that is too long to hold."""
    buffered = io.BufferedReader(raw, BLOCK_BYTES)  # type: ignore[type-var]
    zipped = buffered.peek(2)[:2] == b"\x1f\x8b"
    stream = gzip.GzipFile(fileobj=buffered) if zipped else buffered
    rest, first, oversized = b"", True, False
    while chunk := stream.read1(BLOCK_BYTES):
        if first:
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is no part of the JSON
            first = False
        lines: list[bytes | None] = []
        lines += (rest + chunk).split(b"\n")
        rest = lines.pop() or b""
        if oversized and lines:
            lines[0] = None
            oversized = False
        if len(rest) > MAX_LINE_BYTES:
            rest, oversized = b"", True
        if lines:
            yield lines
    if rest or oversized:
        yield [None if oversized else rest]
    buffered.detach()
