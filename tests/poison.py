"""Records that must end as dead letters: every class of bad input, by hand and by seed.

Decides nothing about reasons beyond `BAD_EXAMPLES`: what a mutation breaks first is the codec's business,
that it breaks something is certain. Everything is bad for any Kafka timestamp from 2017-02-01 to 2200, so the
records may be sent to a real broker. Knows nothing of the codec, so that it can judge it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgpack

Headers = tuple[tuple[str, bytes], ...]

MSGPACK: Final[Headers] = (("content-type", b"application/msgpack"),)
#: What brokers and producers accept without being told otherwise, with room for key and headers.
MAX_SENT_BYTES: Final = 900_000
#: Different events that are broken bytewise.
BROKEN_EVENTS: Final = 500

_REQUIRED = ("event_id", "user_id", "event_type", "timestamp")
_NOT_TEXT: tuple[Any, ...] = (None, 7, 1.5, True, [], ["u1"], {"id": "u1"})
_NO_TIMES: tuple[Any, ...] = (None, True, [], {})
_NO_LABELS: tuple[Any, ...] = ("Bag Snacks", 3, {}, [None], ["a", 3], [["a"]])
_NO_VALUES: tuple[Any, ...] = ("1.43", True, [], {})
_CONTROLS = "\x00\x01\t\n\r\x1b\x1f\x7f\x80\x85\x9f"


class Poison(NamedTuple):
    """One bad record, as it is sent."""

    key: bytes | None
    value: bytes | None
    headers: Headers


class BadExample(NamedTuple):
    """One bad record with the reason that its dead letter must carry."""

    name: str
    reason: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


def valid_event(**changes: Any) -> dict[str, Any]:
    """Return a valid event of user u1 in 2017, with some fields changed."""
    event: dict[str, Any] = {
        "event_id": "e1",
        "user_id": "u1",
        "event_type": "purchase",
        "timestamp": 1_483_273_590,
        "asset_id": "p1",
        "labels": ["Bag Snacks"],
        "value": 1.43,
    }
    return event | changes


def _json(event: object) -> bytes:
    return json.dumps(event, ensure_ascii=False).encode()


def _without(field: str) -> bytes:
    return _json({name: value for name, value in valid_event().items() if name != field})


def _user(user_id: Any) -> tuple[bytes | None, bytes]:
    key = user_id.encode() if isinstance(user_id, str) else b"u1"
    return key, _json(valid_event(user_id=user_id))


def _extra(text: bytes) -> bytes:
    """Return a valid event with one unknown field more, whose value is this JSON."""
    return _json(valid_event())[:-1] + b', "context": ' + text + b"}"


def _packed(event: dict[Any, Any]) -> bytes:
    return bytes(msgpack.packb(event, unicode_errors="surrogatepass"))


def _packed_extra(packed: bytes) -> bytes:
    """Return a valid event with one unknown field more, whose value is this msgpack."""
    return _packed(valid_event(context=0))[:-1] + packed


def _example(name: str, reason: str, value: bytes | None, headers: Headers = ()) -> BadExample:
    return BadExample(name, reason, b"u1", value, headers)


BAD_EXAMPLES: Final = (
    # size
    _example("one byte over 64 KiB", "size", _json(valid_event()).ljust(65_537)),
    _example("10 MB record (more than a broker takes unless told)", "size", b"x" * 10_000_000),
    _example("100,000-deep JSON", "size", b"[" * 100_000),
    _example("100,000-deep JSON, closed", "size", _extra(b"[" * 100_000 + b"]" * 100_000)),
    # undecodable
    _example("no value", "undecodable", None),
    _example("empty value", "undecodable", b""),
    _example("random bytes", "undecodable", bytes(range(128, 256))),
    _example("not JSON", "undecodable", b"event"),
    _example("cut off", "undecodable", _json(valid_event())[:-1]),
    _example("two documents", "undecodable", _json(valid_event()) * 2),
    _example("byte order mark", "undecodable", b"\xef\xbb\xbf" + _json(valid_event())),
    _example("UTF-16", "undecodable", json.dumps(valid_event()).encode("utf-16")),
    _example("single quotes", "undecodable", str(valid_event()).encode()),
    _example("a list", "undecodable", b"[]"),
    _example("a list of events", "undecodable", _json([valid_event()])),
    _example("null", "undecodable", b"null"),
    _example("a text", "undecodable", b'"u1"'),
    _example("NaN as a value", "undecodable", _json(valid_event(value=float("nan")))),
    _example("Infinity as a value", "undecodable", _json(valid_event(value=float("inf")))),
    _example("-Infinity as a timestamp", "undecodable", _json(valid_event(timestamp=float("-inf")))),
    _example("NaN in an unknown field", "undecodable", _extra(b"NaN")),
    _example("raw control character in a text", "undecodable", _json(valid_event()).replace(b"e1", b"e\x01")),
    _example("bad UTF-8 in an id", "undecodable", _json(valid_event()).replace(b"e1", b"e\xff")),
    _example("bad UTF-8 in an unknown field", "undecodable", _extra(b'"\xc3("')),
    _example("lone surrogate", "undecodable", _json(valid_event()).replace(b"e1", b"\\ud800")),
    _example(
        "surrogate in UTF-8", "undecodable", _json(valid_event()).replace(b"e1", b"\xed\xa0\x80")
    ),
    _example("101 levels", "undecodable", _extra(b"[" * 100 + b"]" * 100)),
    _example("30,000 levels", "undecodable", _extra(b"[" * 30_000 + b"]" * 30_000)),
    _example("30,000 levels of objects, cut off", "undecodable", _extra(b'{"a":' * 10_000)),
    _example("msgpack without its header", "undecodable", _packed(valid_event())),
    _example("JSON with the header of msgpack", "undecodable", _json(valid_event()), MSGPACK),
    _example("cut-off msgpack", "undecodable", _packed(valid_event())[:-1], MSGPACK),
    _example("101 levels of msgpack", "undecodable", _packed_extra(b"\x91" * 100 + b"\x00"), MSGPACK),
    _example("60,000 levels of msgpack", "undecodable", b"\x91" * 60_000 + b"\x00", MSGPACK),
    _example("60,000 levels in an unknown field", "undecodable", _packed_extra(b"\x91" * 60_000), MSGPACK),
    _example("900 levels, cut off", "undecodable", _packed_extra(b"\x91" * 900), MSGPACK),
    _example("a number for a field's name", "undecodable", _packed({**valid_event(), 7: 1}), MSGPACK),
    _example("lone surrogate in msgpack", "undecodable", _packed(valid_event(event_id="\ud800")), MSGPACK),
    # missing
    *(_example(f"no {field}", "missing", _without(field)) for field in _REQUIRED),
    _example("empty object", "missing", b"{}"),
    _example("empty msgpack map", "missing", b"\x80", MSGPACK),
    # type
    *(
        _example(f"{field} {json.dumps(value)}", "type", _json(valid_event(**{field: value})))
        for field in ("event_id", "user_id", "event_type")
        for value in _NOT_TEXT
    ),
    *(
        _example(f"timestamp {json.dumps(wrong)}", "type", _json(valid_event(timestamp=wrong)))
        for wrong in _NO_TIMES
    ),
    *(
        _example(f"labels {json.dumps(wrong)}", "type", _json(valid_event(labels=wrong)))
        for wrong in _NO_LABELS
    ),
    *(
        _example(f"value {json.dumps(wrong)}", "type", _json(valid_event(value=wrong)))
        for wrong in _NO_VALUES
    ),
    _example("asset_id a number", "type", _json(valid_event(asset_id=1082185))),
    _example("event_id as msgpack bytes", "type", _packed(valid_event(event_id=b"e1")), MSGPACK),
    _example("a msgpack timestamp", "type", _packed(valid_event(timestamp=msgpack.Timestamp(1, 0))), MSGPACK),
    # range
    BadExample("empty user_id", "range", *_user("")),
    BadExample("user_id of 129 characters", "range", *_user("u" * 129)),
    _example("empty event_id", "range", _json(valid_event(event_id=""))),
    _example("event_id of 129 characters", "range", _json(valid_event(event_id="e" * 129))),
    _example("empty asset_id", "range", _json(valid_event(asset_id=""))),
    _example("asset_id of 129 characters", "range", _json(valid_event(asset_id="é" * 129))),
    _example("empty event_type", "range", _json(valid_event(event_type=""))),
    _example("event_type of 65 characters", "range", _json(valid_event(event_type="t" * 65))),
    _example("empty label", "range", _json(valid_event(labels=["a", ""]))),
    _example("label of 65 characters", "range", _json(valid_event(labels=["l" * 65]))),
    _example("65 labels", "range", _json(valid_event(labels=[f"l{i}" for i in range(65)]))),
    _example("65 labels, all the same", "range", _json(valid_event(labels=["l"] * 65))),
    _example("10,000 labels", "range", _json(valid_event(labels=["l"] * 10_000))),
    _example("negative value", "range", _json(valid_event(value=-0.01))),
    _example("value 1e999", "range", _json(valid_event()).replace(b"1.43", b"1e999")),
    _example("timestamp 1e999", "range", _json(valid_event()).replace(b"1483273590", b"1e999")),
    _example("msgpack NaN as a value", "range", _packed(valid_event(value=float("nan"))), MSGPACK),
    _example("msgpack infinity as a value", "range", _packed(valid_event(value=float("inf"))), MSGPACK),
    # text
    *(
        BadExample(f"user_id with {control!r}", "text", *_user(f"u{control}1"))
        for control in _CONTROLS
    ),
    _example("event_id with NUL", "text", _json(valid_event(event_id="e\x00"))),
    _example("asset_id with a line feed", "text", _json(valid_event(asset_id="p\n1"))),
    _example("emoji and a tab", "text", _json(valid_event(event_id="🛒\t"))),
    # key
    BadExample("no key", "key", None, _json(valid_event())),
    BadExample("empty key", "key", b"", _json(valid_event())),
    BadExample("another key", "key", b"u2", _json(valid_event())),
    BadExample("the key in quotes", "key", b'"u1"', _json(valid_event())),
    BadExample("a key that is no UTF-8", "key", b"\xff", _json(valid_event())),
    BadExample("the key in another case", "key", b"U1", _json(valid_event())),
    BadExample("a key in Latin-1", "key", "Zoë".encode("latin-1"), _json(valid_event(user_id="Zoë"))),
    # time
    *(
        _example(f"timestamp {text!r}", "time", _json(valid_event(timestamp=text)))
        for text in (
            "",
            "yesterday",
            "1483273590",
            "2017-01-01",
            "2017-01-01T12:26:30",
            "2017-01-01 12:26:30Z",
            "2017-01-01T12:26Z",
            "2017-01-01T12:26:30+0100",
            "2017-01-01T12:26:30+24:00",
            "2017-01-01T12:26:30+05:60",
            "2017-01-01T12:26:30.Z",
            "2017-01-01T12:26:30,5Z",
            "2017-01-01T24:00:00Z",
            "2017-01-01T12:26:60Z",
            "2017-02-29T12:26:30Z",
            "2017-13-01T12:26:30Z",
            "20170101T122630Z",
            "2017-W01-1T12:26:30Z",
            " 2017-01-01T12:26:30Z",
            "2017-01-01T12:26:30Z\n",
            "２０１７-01-01T12:26:30Z",
            "+12017-01-01T12:26:30Z",
            "0000-01-01T00:00:00Z",
            "0001-01-01T00:00:00Z",
            "0001-01-01T00:00:00+23:59",
            "1969-12-31T23:59:59.999Z",
            "1970-01-01T00:00:00+00:01",
        )
    ),
    *(
        _example(f"timestamp {number!r}", "time", _json(valid_event(timestamp=number)))
        for number in (-1, -0.001, -62_135_596_800, -1e300, -(10**300))
    ),
    _example("msgpack NaN as a timestamp", "time", _packed(valid_event(timestamp=float("nan"))), MSGPACK),
    _example("msgpack infinity as a time", "time", _packed(valid_event(timestamp=float("inf"))), MSGPACK),
    # future
    *(
        _example(f"timestamp {instant!r}", "future", _json(valid_event(timestamp=instant)))
        for instant in (
            "9999-12-31T23:59:59Z",
            "9999-12-31T23:59:59-23:59",
            253_402_300_799,
            1_483_273_590_000,
            1e300,
            10**300,
            "2300-01-01T00:00:00Z",
        )
    ),
)  # fmt: skip


def poison_records(seed: int, n: int) -> Iterator[Poison]:
    """Yield bad records that a broker with default limits accepts: the same for the same seed.

    Parameters
    ----------
    seed
        Of the generator; print it where a test fails.
    n
        How many.

    Yields
    ------
    Poison
        In turn an example of `BAD_EXAMPLES`, in a random order without repeats until all have been used, and
        a random valid event that was broken in a random way.
    """
    rng = random.Random(seed)
    examples: list[BadExample] = []
    for i in range(n):
        if i % 2:
            yield rng.choice(_MUTATIONS)(rng)
            continue
        if not examples:
            examples = [example for example in BAD_EXAMPLES if len(example.value or b"") <= MAX_SENT_BYTES]
            rng.shuffle(examples)
        example = examples.pop()
        yield Poison(example.key, example.value, example.headers)


def _random_text(rng: random.Random, most: int) -> str:
    alphabet = "abcXYZ019 {}[]\"'\\/:.,-_é世🛒\u200d"
    return "".join(rng.choices(alphabet, k=rng.randint(1, most)))


def _random_event(rng: random.Random) -> dict[str, Any]:
    event: dict[str, Any] = {
        "event_id": _random_text(rng, 128),
        "user_id": _random_text(rng, 128),
        "event_type": _random_text(rng, 64),
        "timestamp": rng.choice([1_483_273_590, 1_483_273_590.25, "2017-01-01T12:26:30.250+01:00"]),
    }
    if rng.random() < 0.7:
        event["asset_id"] = _random_text(rng, 128)
    if rng.random() < 0.7:
        event["labels"] = [_random_text(rng, 64) for _ in range(rng.randint(0, 64))]
    if rng.random() < 0.5:
        event["value"] = rng.choice([0, 3, 2.5, 1e300])
    if rng.random() < 0.3:
        event["context"] = {"page": _random_text(rng, 30), "depth": [[[]]]}
    return event


def _sent(rng: random.Random, event: dict[str, Any]) -> Poison:
    """Return the event with the right key, in either encoding."""
    user_id = event.get("user_id")
    key = user_id.encode() if isinstance(user_id, str) else b"u1"
    return Poison(key, _packed(event), MSGPACK) if rng.random() < 0.3 else Poison(key, _json(event), ())


def _lacks_a_field(rng: random.Random) -> Poison:
    event = _random_event(rng)
    del event[rng.choice(_REQUIRED)]
    return _sent(rng, event)


def _wrong_type(rng: random.Random) -> Poison:
    field, wrong = rng.choice(
        [
            ("event_id", _NOT_TEXT),
            ("user_id", _NOT_TEXT),
            ("event_type", _NOT_TEXT),
            ("timestamp", _NO_TIMES),
            ("asset_id", _NOT_TEXT[1:]),
            ("labels", _NO_LABELS),
            ("value", _NO_VALUES),
        ]
    )
    return _sent(rng, _random_event(rng) | {field: rng.choice(wrong)})


def _too_long(rng: random.Random) -> Poison:
    field, limit = rng.choice([("event_id", 128), ("user_id", 128), ("asset_id", 128), ("event_type", 64)])
    text = _random_text(rng, 20) * (limit + 50) if rng.random() < 0.7 else ""
    return _sent(rng, _random_event(rng) | {field: text[: limit + rng.randint(1, 50)]})


def _bad_labels(rng: random.Random) -> Poison:
    labels = [_random_text(rng, 20) for _ in range(rng.randint(0, 63))]
    labels.insert(rng.randint(0, len(labels)), rng.choice(["", "l" * 65]))
    return _sent(rng, _random_event(rng) | {"labels": rng.choice([labels, ["l"] * rng.randint(65, 10_000)])})


def _control_character(rng: random.Random) -> Poison:
    field = rng.choice(["event_id", "user_id", "asset_id"])
    text = list(_random_text(rng, 120))
    text.insert(rng.randint(0, len(text)), rng.choice(_CONTROLS))
    return _sent(rng, _random_event(rng) | {field: "".join(text)})


def _bad_value(rng: random.Random) -> Poison:
    return _sent(rng, _random_event(rng) | {"value": rng.choice([float("nan"), float("inf"), -1, -1e-300])})


def _bad_time(rng: random.Random) -> Poison:
    wrong: list[Any] = [
        "9999-01-01T00:00:00Z",
        "0001-01-01T00:00:00Z",
        "2017-01-01T00:00:00",
        "now",
        -5,
        1e15,
    ]
    return _sent(rng, _random_event(rng) | {"timestamp": rng.choice([*wrong, rng.uniform(1e11, 1e18)])})


def _another_key(rng: random.Random) -> Poison:
    sent = _sent(rng, _random_event(rng))
    key = sent.key or b""
    return sent._replace(key=rng.choice([None, b"", key + b" ", b" " + key, key[:-1] + b"\xff", key * 2]))


def _cut_off(rng: random.Random) -> Poison:
    sent = _sent(rng, _random_event(rng))
    value = sent.value or b""
    return sent._replace(value=value[: rng.randrange(len(value))])


def _something_behind(rng: random.Random) -> Poison:
    sent = _sent(rng, _random_event(rng))
    value = sent.value or b""
    return sent._replace(value=value + rng.choice([b"}", b"x", b"{}", value]))


def _wrong_encoding(rng: random.Random) -> Poison:
    sent = _sent(rng, _random_event(rng))
    return sent._replace(headers=() if sent.headers else MSGPACK)


def _noise(rng: random.Random) -> Poison:
    # No JSON begins with a byte from 128 up, and as msgpack these are no maps.
    first = rng.choice([*range(0xA0, 0xDE), *range(0xE0, 0x100)])
    value = bytes([first]) + rng.randbytes(rng.randint(0, 300))
    return Poison(rng.choice([None, b"u1", rng.randbytes(8)]), value, rng.choice([(), MSGPACK]))


def _too_deep(rng: random.Random) -> Poison:
    event, levels = _random_event(rng), rng.randint(100, 3_000)
    opened, closed = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    text = _json(event)[:-1] + b', "context2": ' + opened * levels + b"0" + closed * levels + b"}"
    return Poison(event["user_id"].encode(), text, ())


def _too_big(rng: random.Random) -> Poison:
    event = _random_event(rng) | {"context": "x" * rng.randint(65_536, 300_000)}
    return _sent(rng, event)


_MUTATIONS: Final[tuple[Callable[[random.Random], Poison], ...]] = (
    _lacks_a_field,
    _wrong_type,
    _too_long,
    _bad_labels,
    _control_character,
    _bad_value,
    _bad_time,
    _another_key,
    _cut_off,
    _something_behind,
    _wrong_encoding,
    _noise,
    _too_deep,
    _too_big,
)


def mutated_records(seed: int, n: int) -> Iterator[Poison]:
    """Yield random valid events, each broken in a random way: in turn one of its fields, and its bytes.

    The same for the same seed. Bytes are broken without a thought for what they mean; kept is what no reader
    of JSON or msgpack could take for an event of the user whom the key names.
    """
    rng = random.Random(seed)
    valid = [_sent(rng, _random_event(rng)) for _ in range(BROKEN_EVENTS)]
    for i in range(n):
        if i % 2:
            yield rng.choice(_MUTATIONS)(rng)
            continue
        broken = _bytewise(rng, valid)
        while not _is_certainly_bad(broken):
            broken = _bytewise(rng, valid)
        yield broken


def _bytewise(rng: random.Random, valid: Sequence[Poison]) -> Poison:
    sent = rng.choice(valid)
    value = bytearray(sent.value or b"")
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(value) + 1)
        end = min(len(value), at + rng.randint(1, 40))
        if rng.random() < 0.1:
            other = rng.choice(valid).value or b""
            begin = rng.randrange(len(other))
            value[at:end] = other[begin : begin + rng.randint(1, 100)]
        else:
            rng.choice(_BYTE_MUTATIONS)(rng, value, at, end)
    return sent._replace(value=bytes(value[:MAX_SENT_BYTES]))


def _flip(rng: random.Random, value: bytearray, at: int, end: int) -> None:
    if at < end:
        value[at] ^= 1 << rng.randrange(8)


def _truncate(rng: random.Random, value: bytearray, at: int, end: int) -> None:
    del value[at:]


def _drop(rng: random.Random, value: bytearray, at: int, end: int) -> None:
    del value[at:end]


def _repeat(rng: random.Random, value: bytearray, at: int, end: int) -> None:
    value[at:end] = value[at:end] * rng.choice([2, 3, 200])


def _insert(rng: random.Random, value: bytearray, at: int, end: int) -> None:
    value[at:at] = rng.randbytes(rng.randint(1, 8))


def _nest(rng: random.Random, value: bytearray, at: int, end: int) -> None:
    value[at:at] = rng.choice([b"[", b'{"":', b"\x91", b"\x81\xa0"]) * rng.choice([1, 50, 150, 20_000])


def _huge(rng: random.Random, value: bytearray, at: int, end: int) -> None:
    digits = b"9" * rng.choice([20, 309, 4_301, 30_000])
    value[at:end] = rng.choice([digits, b"-" + digits, b"1e" + digits, b"-0." + digits, b"1E-" + digits])


_BYTE_MUTATIONS: Final = (_flip, _flip, _truncate, _drop, _repeat, _insert, _nest, _huge)


def _is_certainly_bad(poison: Poison) -> bool:
    """Tell whether a value is no document of its encoding, or none that could be its user's event."""
    value = poison.value or b""
    if len(value) > 65_536:
        return True
    try:
        if poison.headers:
            # Whatever is in an unknown field is nobody's business: texts that are none, maps as keys.
            pairs = msgpack.unpackb(value, raw=True, strict_map_key=False, object_pairs_hook=tuple)
            event = {name.decode(errors="replace"): it for name, it in pairs if isinstance(name, bytes)}
            user_id = event["user_id"]
        else:
            # As floats: Python reads integers of 4,300 digits at most, JSON has no limit.
            event = json.loads(value.decode(), parse_int=float)
            user_id = event["user_id"].encode()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, msgpack.UnpackException):
        return True
    return not event.keys() >= set(_REQUIRED) or user_id != poison.key
