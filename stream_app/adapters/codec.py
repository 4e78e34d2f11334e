"""Bytes in, `Event` or `InvalidEvent` out; transitions and dead letters in, `Outgoing` messages out.

Decides which records are valid and how everything on the topics is written down (a public contract). It must
not know Redis, other records, or a clock: the record's Kafka timestamp and, where that is only a producer's
word, the present arrive as arguments. Whether a record is valid is a function of the record (and of the
present, only where a producer's timestamp is checked against it), not of machine or stack depth.

A bad record is a value, not an exception: exactly one `InvalidEvent`, whose reason is one of a closed set, in
the order in which they are looked for:

=============  =====================================================================================
reason         the record
=============  =====================================================================================
`size`         is longer than 64 KiB
`undecodable`  has no value, is not UTF-8 JSON (or msgpack, where `content-type` says so), is no object, or
               nests deeper than 100 levels
`missing`      lacks `event_id`, `user_id`, `event_type` or `timestamp`
`type`         has a field of another type (numbers are not taken from texts, nor texts from numbers)
`range`        has an empty or too long text, too many labels, or a `value` that is negative or not finite
`text`         has a control character (Unicode category Cc) in `event_id`, `user_id` or `asset_id`
`key`          has another key than its `user_id` in UTF-8, or none
`time`         has a `timestamp` that is no RFC 3339 instant with offset and no finite number of seconds, or
               one before 1970, or a Kafka timestamp that is no instant
`future`       has a `timestamp` too far ahead of its Kafka timestamp, or that too far ahead of the present
=============  =====================================================================================

`detail` says what was expected and got in the record's own terms and never repeats what a user sent.

Unknown fields are ignored, whatever is in them; null is as good as absent for an optional field.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Literal
from urllib.parse import quote

import msgpack
import msgspec

from stream_app.core.decay import NEVER_MS
from stream_app.core.event import Event
from stream_app.core.transition import Prediction, Transition

MAX_RECORD_BYTES = 64 * 1024
MAX_NESTING = 100
MAX_DEAD_LETTER_BYTES = 2 * MAX_RECORD_BYTES + 2048
"""Upper bound of key, value and headers of a dead letter: what the dead-letter topic must accept."""

Reason = Literal["size", "undecodable", "missing", "type", "range", "text", "key", "time", "future"]
Headers = Sequence[tuple[str, bytes]]

_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class _WireEvent(msgspec.Struct, gc=False):
    """An event as it is written; what this cannot express is checked by `Decoder`."""

    event_id: _Id
    user_id: _Id
    event_type: _Name
    timestamp: int | float | str
    asset_id: _Id | None = None
    labels: Annotated[list[_Name], msgspec.Meta(max_length=64)] | None = None
    value: Annotated[float, msgspec.Meta(ge=0)] | None = None


_decode_json = msgspec.json.Decoder(_WireEvent).decode
_decode_msgpack = msgspec.msgpack.Decoder(_WireEvent).decode


@dataclass(frozen=True, slots=True)
class InvalidEvent:
    """Why a record was set aside.

    Parameters
    ----------
    reason
        One of the closed set above.
    field
        The field at fault; empty if it is the record as a whole.
    detail
        Expected and got, without anything that a user sent.
    """

    reason: Reason
    field: str
    detail: str


@dataclass(frozen=True, slots=True)
class Decoder:
    """Turn records into events, under one policy about time.

    Parameters
    ----------
    max_future_skew_s
        How far, in seconds, an event's timestamp may be ahead of its record's Kafka timestamp (it is then
        clamped to it), and a producer's Kafka timestamp ahead of the present.

    Examples
    --------
    >>> decoder = Decoder(max_future_skew_s=300.0)
    >>> value = b'{"event_id":"e1","user_id":"u1","event_type":"view","timestamp":1767323045.6789}'
    >>> event = decoder.decode(
    ...     key=b"u1", value=value, headers=(), kafka_time_ms=1_767_323_046_000, now_ms=None
    ... )
    >>> event.user_id, event.event_time_ms, event.labels
    ('u1', 1767323045678, ())
    >>> decoder.decode(key=None, value=value, headers=(), kafka_time_ms=1_767_323_046_000, now_ms=None)
    InvalidEvent(reason='key', field='key', detail='expected the user_id in UTF-8, got no key')
    """

    max_future_skew_s: float

    def decode(
        self,
        *,
        key: bytes | None,
        value: bytes | None,
        headers: Headers,
        kafka_time_ms: int,
        now_ms: int | None,
    ) -> Event | InvalidEvent:
        """Decode one record.

        Parameters
        ----------
        key, value, headers
            As the consumer got them.
        kafka_time_ms
            The record's Kafka timestamp, milliseconds since the epoch.
        now_ms
            The present, where the Kafka timestamp is a producer's and must be checked against it; None
            otherwise.

        Returns
        -------
        Event or InvalidEvent
            Never raises for what is in a record.
        """
        if value is None:
            return InvalidEvent("undecodable", "", "expected a value, got none")
        if len(value) > MAX_RECORD_BYTES:
            return InvalidEvent("size", "", f"expected at most {MAX_RECORD_BYTES} bytes, got {len(value)}")
        wire = _decode(value, headers)
        if isinstance(wire, InvalidEvent):
            return wire
        user_id, event_id, asset_id = wire.user_id, wire.event_id, wire.asset_id
        # isprintable is cheap and true for nearly all ids, and nothing printable is a control character.
        if not event_id.isprintable() and _CONTROL.search(event_id):
            return _control_character("event_id")
        if not user_id.isprintable() and _CONTROL.search(user_id):
            return _control_character("user_id")
        if asset_id is not None and not asset_id.isprintable() and _CONTROL.search(asset_id):
            return _control_character("asset_id")
        if wire.value == math.inf:  # only msgpack can write it
            return InvalidEvent("range", "value", "expected a finite number, got infinity")
        if key != user_id.encode():
            got = "no key" if key is None else "another key"
            return InvalidEvent("key", "key", f"expected the user_id in UTF-8, got {got}")
        event_time_ms = self._event_time_ms(wire.timestamp, kafka_time_ms, now_ms)
        if isinstance(event_time_ms, InvalidEvent):
            return event_time_ms
        labels = wire.labels
        if not labels:
            distinct: tuple[str, ...] = ()
        elif len(labels) == 1:
            distinct = (labels[0],)
        else:
            distinct = tuple(dict.fromkeys(labels))
        return Event(user_id, wire.event_type, event_time_ms, event_id, distinct, asset_id, wire.value)

    def _event_time_ms(
        self, timestamp: float | str, kafka_time_ms: int, now_ms: int | None
    ) -> int | InvalidEvent:
        if not 0 <= kafka_time_ms < NEVER_MS:
            return InvalidEvent(
                "time", "", "expected a Kafka timestamp from 1970 to 9999, got another or none"
            )
        if now_ms is not None and kafka_time_ms - now_ms > self.max_future_skew_s * 1000:
            return self._ahead("", kafka_time_ms - now_ms, "the present")
        event_time_ms = _instant_ms(timestamp)
        if event_time_ms is None:
            return InvalidEvent(
                "time",
                "timestamp",
                "expected RFC 3339 with offset or finite Unix seconds, got something else",
            )
        if event_time_ms < 0:
            return InvalidEvent("time", "timestamp", "expected 1970 or later, got an earlier instant")
        ahead_ms = event_time_ms - kafka_time_ms
        if ahead_ms <= 0:
            return event_time_ms
        if ahead_ms > self.max_future_skew_s * 1000:
            return self._ahead("timestamp", ahead_ms, "the record's Kafka timestamp")
        return kafka_time_ms

    def _ahead(self, field: str, ahead_ms: int, of: str) -> InvalidEvent:
        what = "a timestamp" if field else "a Kafka timestamp"
        most = f"{self.max_future_skew_s:g} s ahead of {of}"
        return InvalidEvent("future", field, f"expected {what} at most {most}, got {ahead_ms / 1000:g} s")


def _decode(value: bytes, headers: Headers) -> _WireEvent | InvalidEvent:
    try:
        if headers and _is_msgpack(headers):
            # A level costs a byte at least, so only what holds that many container bytes can be too deep.
            if len(value.translate(None, _NO_MSGPACK_CONTAINER)) > MAX_NESTING and _too_deep_msgpack(value):
                return _TOO_DEEP
            return _decode_msgpack(value)
        if len(value) > 2 * MAX_NESTING and _too_deep_json(value):
            return _TOO_DEEP
        if not value.isascii():
            value.decode()  # msgspec does not look into the texts of unknown fields
        return _decode_json(value)
    except msgspec.ValidationError as exc:
        return _explained(str(exc))
    except msgspec.DecodeError as exc:
        return InvalidEvent("undecodable", "", str(exc))
    except UnicodeDecodeError:
        return InvalidEvent("undecodable", "", "expected UTF-8, got other bytes")
    except RecursionError:  # what is cut off inside thousands of open brackets of msgpack
        return _TOO_DEEP


_TOO_DEEP = InvalidEvent("undecodable", "", f"expected at most {MAX_NESTING} levels of nesting, got more")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # all of category Cc
_FIELD = re.compile(r" - at `\$\.([a-z_]+)[^`]*`$")
_MISSING = re.compile(r"Object missing required field `([a-z_]+)`$")


def _explained(message: str) -> InvalidEvent:
    """Turn msgspec's sentence, which names types and fields of `_WireEvent` alone, into a reason."""
    if missing := _MISSING.match(message):
        return InvalidEvent("missing", missing[1], "expected the field, got none")
    found = _FIELD.search(message)
    if found is None:  # not an object, or an object whose keys are no texts
        return InvalidEvent("undecodable", "", message.partition(" - at ")[0])
    limits = " of length " in message or " >= " in message or "out of range" in message
    return InvalidEvent("range" if limits else "type", found[1], message[: found.start()])


def _control_character(field: str) -> InvalidEvent:
    return InvalidEvent("text", field, "expected no control characters, got at least one")


def _is_msgpack(headers: Headers) -> bool:
    for name, content_type in reversed(headers):
        if name.lower() == "content-type":
            if content_type == b"application/msgpack":
                return True
            return content_type.split(b";")[0].strip().lower() == b"application/msgpack"
    return False


# How deep a record may nest must not depend on the depth of the Python stack that happens to read it, as
# msgspec's own limit does: the same record would be valid in one worker and a dead letter in another.

_JSON_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
_NO_MSGPACK_CONTAINER = bytes(b for b in range(256) if not (0x80 <= b <= 0x9F or 0xDC <= b <= 0xDF))


def _too_deep_json(value: bytes) -> bool:
    if value.count(b"[") + value.count(b"{") <= MAX_NESTING:
        return False
    level = 0
    for token in _JSON_TOKEN.finditer(value):
        match token[0]:
            case b"[" | b"{":
                level += 1
                if level > MAX_NESTING:
                    return True
            case b"]" | b"}":
                level -= 1
    return False


class _Level(int):
    """How many levels a container of msgpack holds, itself included."""


class _TooDeepError(Exception):
    pass


def _level(items: Sequence[object]) -> _Level:
    level = 1 + max((item for item in items if type(item) is _Level), default=0)
    if level > MAX_NESTING:
        raise _TooDeepError
    return _Level(level)


def _too_deep_msgpack(value: bytes) -> bool:
    try:
        msgpack.unpackb(
            value,
            raw=True,
            strict_map_key=False,
            list_hook=_level,
            object_pairs_hook=lambda pairs: _level([item for pair in pairs for item in pair]),
        )
    except (_TooDeepError, msgpack.StackError):
        return True
    except ValueError:  # malformed: told by the decoder that counts
        return False
    return False


_OFFSET = r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_RFC_3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-5][0-9](?:\.[0-9]+)?" + _OFFSET
).fullmatch
_LEAP_SECOND = re.compile(r"(.{10}[Tt].{6})60(?:\.[0-9]+)?(" + _OFFSET + ")").fullmatch
_from_iso = datetime.fromisoformat
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BEGINNING = datetime(1970, 1, 1)
_LATEST_S = NEVER_MS // 1000


def _instant_ms(timestamp: float | str) -> int | None:
    """Read an instant and cut it to milliseconds.

    Parameters
    ----------
    timestamp
        RFC 3339 with offset, or Unix seconds.

    Returns
    -------
    int or None
        Milliseconds since the epoch, UTC; None if it is neither. A number before the epoch comes back as one
        millisecond before it, one after the year 9999 as the year 10000.

    Examples
    --------
    >>> _instant_ms("2026-01-02T04:04:05.6789+01:00"), _instant_ms(1767323045.6789), _instant_ms(3)
    (1767323045678, 1767323045678, 3000)
    >>> _instant_ms("2016-12-31T23:59:60Z")  # the leap second, as POSIX counts it
    1483228800000
    >>> _instant_ms("2026-01-02T04:04:05"), _instant_ms(float("nan"))
    (None, None)
    """
    if isinstance(timestamp, str):
        return _rfc_3339_ms(timestamp)
    if 0 <= timestamp < _LATEST_S:
        if isinstance(timestamp, int):
            return timestamp * 1000
        # Microseconds first: 0.29 seconds are 290 ms, though 0.29 * 1000 is 289.99999999999994.
        return round(timestamp * 1e6) // 1000
    if timestamp != timestamp or timestamp in (math.inf, -math.inf):
        return None
    return -1 if timestamp < 0 else NEVER_MS


def _rfc_3339_ms(text: str) -> int | None:
    if not _RFC_3339(text):
        return _leap_second_ms(text)
    try:
        since = _from_iso(text if text[-1] != "z" else text.upper()) - _EPOCH
    except ValueError:  # a day or an hour that does not exist
        return None
    return since.days * 86_400_000 + since.seconds * 1000 + since.microseconds // 1000


def _leap_second_ms(text: str) -> int | None:
    """Count a leap second, which ends a day in UTC, as POSIX does: as the first second of the next day."""
    leap = _LEAP_SECOND(text)
    before_ms = _rfc_3339_ms(f"{leap[1]}59{leap[2]}") if leap else None
    return before_ms + 1000 if before_ms is not None and (before_ms + 1000) % 86_400_000 == 0 else None


class Outgoing(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One message for one of the output topics, as it waits in the outbox.

    Parameters
    ----------
    kind
        Which of the three topics; its name is configuration.
    key, value, headers
        The Kafka record.
    """

    kind: Literal["entered", "exited", "dead_letter"]
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]

    def pack(self) -> bytes:
        """Return the message as msgpack: an array of kind, key, value, headers.

        Examples
        --------
        >>> message = Outgoing("entered", b"u1", b"{}", (("ce_id", b"00"),))
        >>> Outgoing.unpack(message.pack()) == message
        True
        """
        return _encode_msgpack(self)

    @classmethod
    def unpack(cls, packed: bytes) -> Outgoing:
        """Return what `pack` was given.

        Raises
        ------
        ValueError
            If these bytes are not of `pack`'s making.
        """
        return _decode_outgoing(packed)


_encode_msgpack = msgspec.msgpack.Encoder().encode
_decode_outgoing = msgspec.msgpack.Decoder(Outgoing).decode


class _WireEventReference(msgspec.Struct, gc=False):
    event_id: str
    topic: str
    partition: int
    offset: int


class _WirePrediction(msgspec.Struct, gc=False):
    label: str
    labels: tuple[str, ...]
    event_type: str
    asset_id: str | None
    score: float
    model_version: str
    accuracy: dict[str, float]


class _WireTransition(msgspec.Struct, gc=False):
    """The JSON value of a transition; the order of the fields is the order on the topic.

    `prediction` is there for who enters a discovery segment, `converted` for who leaves one.
    """

    id: str
    user_id: str
    segment_id: str
    segment_type: str
    segment_version: str
    status: str
    cause: str
    seq: int
    replayed: bool
    time: str
    weight: float
    min_weight: float
    exits_at: str | None
    event: _WireEventReference | None
    prediction: _WirePrediction | msgspec.UnsetType = msgspec.UNSET
    converted: bool | msgspec.UnsetType = msgspec.UNSET


_encode_json = msgspec.json.Encoder().encode


def rfc_3339(instant_ms: int) -> str:
    """Write an instant as RFC 3339 in UTC with milliseconds.

    Parameters
    ----------
    instant_ms
        Milliseconds since the epoch, UTC; before the year 10000.

    Examples
    --------
    >>> rfc_3339(1_767_323_045_678)
    '2026-01-02T03:04:05.678Z'
    """
    # Put together from what was written before: 0.3 us, where isoformat took 1.3; there are two in a message.
    days, rest = divmod(instant_ms, 86_400_000)
    minutes, rest = divmod(rest, 60_000)
    seconds, milliseconds = divmod(rest, 1_000)
    return f"{_day(days)}{_MINUTES[minutes]}{_TWO_DIGITS[seconds]}.{_THREE_DIGITS[milliseconds]}Z"


_TWO_DIGITS = tuple(f"{number:02d}" for number in range(60))
_THREE_DIGITS = tuple(f"{number:03d}" for number in range(1000))
_MINUTES = tuple(f"{number // 60:02d}:{number % 60:02d}:" for number in range(1440))


@lru_cache(maxsize=4096)
def _day(days: int) -> str:
    """Return a day's date, and what parts it from the time, from the number of days since the epoch."""
    return (_BEGINNING + timedelta(days=days)).date().isoformat() + "T"


def transition_message(transition: Transition, *, topic: str, partition: int, replayed: bool) -> Outgoing:
    """Write a transition as a CloudEvents 1.0 message in binary mode.

    Parameters
    ----------
    transition
        What happened.
    topic, partition
        Where the record that caused it lies, if one did.
    replayed
        Whether it is said again while the log is folded again: apply it, do not act on it.

    Returns
    -------
    Outgoing
        Keyed by user, JSON value.

    Notes
    -----
    Segment ids may hold any character, so the path in `ce_source` is percent-encoded.
    """
    event = None
    if transition.event_id is not None and transition.offset is not None:
        event = _WireEventReference(transition.event_id, topic, partition, transition.offset)
    exits_at_ms = transition.exits_at_ms
    time = rfc_3339(transition.time_ms)
    value = _encode_json(
        _WireTransition(
            id=transition.id,
            user_id=transition.user_id,
            segment_id=transition.segment_id,
            segment_type=transition.segment_type,
            segment_version=transition.segment_version,
            status=transition.status,
            cause=transition.cause,
            seq=transition.seq,
            replayed=replayed,
            time=time,
            weight=transition.weight,
            min_weight=transition.min_weight,
            exits_at=None if exits_at_ms is None else rfc_3339(exits_at_ms),
            event=event,
            prediction=_prediction(transition.prediction),
            converted=msgspec.UNSET if transition.converted is None else transition.converted,
        )
    )
    user = transition.user_id.encode()
    entered = transition.status == "entered"
    headers = (
        ("ce_specversion", b"1.0"),
        ("ce_id", transition.id.encode()),
        ("ce_type", b"stream_app.segment.entered.v1" if entered else b"stream_app.segment.exited.v1"),
        ("ce_source", _source(transition.segment_id)),
        ("ce_subject", user),
        ("ce_time", time.encode()),
        ("ce_partitionkey", user),
        ("content-type", b"application/json"),
    )
    return Outgoing(transition.status, user, value, headers)


@lru_cache(maxsize=100_000)
def _source(segment_id: str) -> bytes:
    return f"/segments/{quote(segment_id, safe='')}".encode()


def called_replayed(message: Outgoing) -> Outgoing:
    """Return a transition's message as one that is said again while the log is folded again.

    Examples
    --------
    >>> called_replayed(Outgoing("exited", b"u", b'{"seq":2,"replayed":false}', ())).value
    b'{"seq":2,"replayed":true}'
    """
    if message.kind == "dead_letter" or message.value is None:
        return message
    # Within a string of the message these quotes would be escaped.
    value = message.value.replace(b'"replayed":false', b'"replayed":true', 1)
    return Outgoing(message.kind, message.key, value, message.headers)


def _prediction(prediction: Prediction | None) -> _WirePrediction | msgspec.UnsetType:
    if prediction is None:
        return msgspec.UNSET
    return _WirePrediction(
        label=prediction.label,
        labels=prediction.labels,
        event_type=prediction.event_type,
        asset_id=prediction.asset_id,
        score=prediction.score,
        model_version=prediction.model_version,
        accuracy=dict(prediction.accuracy),
    )


def dead_letter(
    invalid: InvalidEvent, *, topic: str, partition: int, offset: int, key: bytes | None, value: bytes | None
) -> Outgoing:
    """Write a record that was set aside for the dead-letter topic.

    Parameters
    ----------
    invalid
        Why.
    topic, partition, offset
        Where the whole record lies in the log.
    key, value
        Of the record. Of both the first 64 KiB are kept, so that no dead letter is too big to publish; length
        and hash are the whole value's (of a record without a value: those of no bytes).

    Returns
    -------
    Outgoing
        With the key and the value of the record and the `sa_` headers.
    """
    whole = b"" if value is None else value
    headers = (
        ("sa_reason", invalid.reason.encode()),
        ("sa_field", invalid.field.encode()),
        ("sa_topic", topic.encode()),
        ("sa_partition", str(partition).encode()),
        ("sa_offset", str(offset).encode()),
        ("sa_length", str(len(whole)).encode()),
        ("sa_sha256", hashlib.sha256(whole).hexdigest().encode()),
    )
    return Outgoing(
        "dead_letter",
        key if key is None else key[:MAX_RECORD_BYTES],
        value if value is None else value[:MAX_RECORD_BYTES],
        headers,
    )
