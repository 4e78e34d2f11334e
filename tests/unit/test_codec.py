"""The contracts of the topics: which records are events, why others are not, and what is written out."""

from __future__ import annotations

import hashlib
import inspect
import json
import string
import sys
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stream_app.adapters.codec import (
    MAX_DEAD_LETTER_BYTES,
    MAX_NESTING,
    MAX_RECORD_BYTES,
    Decoder,
    InvalidEvent,
    Outgoing,
    dead_letter,
    rfc_3339,
    transition_message,
)
from stream_app.core.event import Event
from stream_app.core.transition import Cause, Transition
from tests.poison import BAD_EXAMPLES, MSGPACK, BadExample, poison_records, valid_event

#: The same examples in every run, and none left behind on the disk.
seeded = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

SKEW_S = 300.0
KAFKA_TIME_MS = 1_767_323_045_678
"""2026-01-02T03:04:05.678Z, years after the events that are decoded here unless a test says otherwise."""


def decode(
    value: bytes | None,
    *,
    key: bytes | None = b"u1",
    headers: tuple[tuple[str, bytes], ...] = (),
    kafka_time_ms: int = KAFKA_TIME_MS,
    now_ms: int | None = None,
) -> Event | InvalidEvent:
    return Decoder(SKEW_S).decode(
        key=key, value=value, headers=headers, kafka_time_ms=kafka_time_ms, now_ms=now_ms
    )


def decode_event(**changes: Any) -> Event | InvalidEvent:
    event = valid_event(**changes)
    user_id = event["user_id"]
    return decode(json.dumps(event).encode(), key=user_id.encode())


def time_of(timestamp: object, **context: Any) -> int | str:
    """Return the event time of a record with this timestamp, or the reason why it has none."""
    result = decode(json.dumps(valid_event(timestamp=timestamp)).encode(), **context)
    return result.reason if isinstance(result, InvalidEvent) else result.event_time_ms


# Events in


def test_an_event_has_every_field_of_its_record() -> None:
    assert decode_event() == Event(
        user_id="u1",
        event_type="purchase",
        event_time_ms=1_483_273_590_000,
        event_id="e1",
        labels=("Bag Snacks",),
        asset_id="p1",
        value=1.43,
    )


def test_msgpack_means_the_same_as_json() -> None:
    assert decode(msgpack.packb(valid_event()), headers=MSGPACK) == decode_event()


@pytest.mark.parametrize(
    "headers",
    [
        (("content-type", b"application/msgpack"),),
        (("Content-Type", b"Application/MsgPack; charset=binary"),),
        (("trace", b"1"), ("content-type", b"application/json"), ("content-type", b"application/msgpack")),
    ],
)
def test_the_last_content_type_decides(headers: tuple[tuple[str, bytes], ...]) -> None:
    assert decode(msgpack.packb(valid_event()), headers=headers) == decode_event()


@pytest.mark.parametrize("headers", [(), (("content-type", b"text/plain"),), (("content-type", b""),)])
def test_anything_else_is_json(headers: tuple[tuple[str, bytes], ...]) -> None:
    assert decode(json.dumps(valid_event()).encode(), headers=headers) == decode_event()


def test_optional_fields_may_be_absent_or_null() -> None:
    required = {name: valid_event()[name] for name in ("event_id", "user_id", "event_type", "timestamp")}
    absent = decode(json.dumps(required).encode())
    assert absent == decode_event(asset_id=None, labels=None, value=None)
    assert absent == Event("u1", "purchase", 1_483_273_590_000, "e1")


def test_repeated_labels_count_once_in_the_order_of_first_appearance() -> None:
    event = decode_event(labels=["b", "a", "b", "c", "a"])
    assert isinstance(event, Event)
    assert event.labels == ("b", "a", "c")


@pytest.mark.parametrize(
    "user_id",
    [
        "{0}",
        "a b",
        " ",
        "🛒",
        "👩‍👩‍👧",
        "\u00a0",
        "\u202e",
        "\ufeff",
        "\ue000",
        "日本",
        "a" * 128,
        "🛒" * 128,
        "'\"\\/",
    ],
)
def test_braces_spaces_emoji_and_whatever_is_no_control_character_are_legal_in_ids(user_id: str) -> None:
    event = decode_event(user_id=user_id, event_id=user_id, asset_id=user_id)
    assert isinstance(event, Event)
    assert (event.user_id, event.event_id, event.asset_id) == (user_id, user_id, user_id)


def test_the_longest_allowed_event_is_valid() -> None:
    event = decode_event(
        event_id="e" * 128,
        asset_id="p" * 128,
        event_type="t" * 64,
        labels=[f"{i:02d}" + "l" * 62 for i in range(64)],
        value=0,
    )
    assert isinstance(event, Event)
    assert len(event.labels) == 64


def test_a_record_of_exactly_64_kib_is_valid() -> None:
    assert decode(json.dumps(valid_event()).encode().ljust(MAX_RECORD_BYTES)) == decode_event()


@pytest.mark.parametrize(
    "context", [b"1e400", b"9" * 5_000, b'"\\u0000"', b'{"user_id":"u2"}', b"[" * 99 + b"]" * 99]
)
def test_unknown_fields_are_ignored_whatever_is_in_them(context: bytes) -> None:
    assert (
        decode(json.dumps(valid_event()).encode()[:-1] + b', "context": ' + context + b"}") == decode_event()
    )


def test_brackets_inside_texts_are_no_nesting() -> None:
    context = '[{"\\' * 500
    assert decode(json.dumps(valid_event(context=[context, {context: context}])).encode()) == decode_event()


def nested(levels: int) -> list[tuple[bytes, tuple[tuple[str, bytes], ...]]]:
    """Return a valid event of so many levels in all, in both encodings."""
    value: Any = []
    for _ in range(levels - 2):
        value = [value]
    event = valid_event(context=value)
    return [(json.dumps(event).encode(), ()), (msgpack.packb(event), MSGPACK)]


def decode_deep_in_the_stack(
    frames: int, value: bytes, headers: tuple[tuple[str, bytes], ...]
) -> Event | InvalidEvent:
    if frames:
        return decode_deep_in_the_stack(frames - 1, value, headers)
    return decode(value, headers=headers)


def frames_in_use() -> int:
    frame, count = inspect.currentframe(), 0
    while frame is not None:
        frame, count = frame.f_back, count + 1
    return count


@pytest.mark.parametrize("frames_left", [sys.getrecursionlimit(), MAX_NESTING + 50])
def test_how_deep_a_record_may_nest_does_not_depend_on_the_stack(frames_left: int) -> None:
    frames = max(0, sys.getrecursionlimit() - frames_in_use() - frames_left)
    for value, headers in nested(MAX_NESTING):
        assert decode_deep_in_the_stack(frames, value, headers) == decode_event()
    for value, headers in nested(MAX_NESTING + 1) + nested(500):
        result = decode_deep_in_the_stack(frames, value, headers)
        assert isinstance(result, InvalidEvent)
        assert result.reason == "undecodable"


def test_unclosed_quotes_do_not_slow_the_check_of_nesting_down() -> None:
    # An expression that begins again at every quote would take minutes here.
    value = b"[" * 150 + b'"' + b'\\"' * 32_000
    assert isinstance(decode(value), InvalidEvent)


# Time


@pytest.mark.parametrize(
    ("timestamp", "expected_ms"),
    [
        ("2017-01-01T12:26:30Z", 1_483_273_590_000),
        ("2017-01-01T12:26:30.1Z", 1_483_273_590_100),
        ("2017-01-01T12:26:30.1239999Z", 1_483_273_590_123),
        ("2017-01-01T12:26:30.999999999999Z", 1_483_273_590_999),
        ("2017-01-01T13:26:30+01:00", 1_483_273_590_000),
        ("2017-01-01T00:26:30-12:00", 1_483_273_590_000),
        ("2017-01-01T12:26:30-00:00", 1_483_273_590_000),
        ("2017-01-01t12:26:30z", 1_483_273_590_000),
        ("2016-12-31T23:59:60Z", 1_483_228_800_000),
        ("2016-12-31T18:59:60.5-05:00", 1_483_228_800_000),
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T01:00:00.0009+01:00", 0),
        (1_483_273_590, 1_483_273_590_000),
        (1_483_273_590.0, 1_483_273_590_000),
        (1_483_273_590.29, 1_483_273_590_290),
        (1_483_273_590.1239, 1_483_273_590_123),
        (0.29, 290),
        (0, 0),
        (-0.0, 0),
    ],
)
def test_instants_are_cut_to_milliseconds(timestamp: object, expected_ms: int) -> None:
    assert time_of(timestamp) == expected_ms


@seeded
@given(st.integers(0, KAFKA_TIME_MS))
def test_an_instant_in_milliseconds_survives_every_way_of_writing_it(instant_ms: int) -> None:
    assert time_of(rfc_3339(instant_ms)) == instant_ms
    assert time_of(instant_ms / 1000) == instant_ms


@pytest.mark.parametrize(
    ("ahead_ms", "expected"),
    [
        (-1, KAFKA_TIME_MS - 1),
        (0, KAFKA_TIME_MS),
        (1, KAFKA_TIME_MS),
        (300_000, KAFKA_TIME_MS),
        (300_001, "future"),
    ],
)
def test_a_timestamp_slightly_ahead_of_its_record_is_clamped_and_one_further_ahead_refused(
    ahead_ms: int, expected: int | str
) -> None:
    assert time_of(rfc_3339(KAFKA_TIME_MS + ahead_ms)) == expected


@pytest.mark.parametrize(("ahead_ms", "expected"), [(0, 1_483_273_590_000), (300_000, 1_483_273_590_000), (300_001, "future")])  # noqa: E501 # fmt: skip
def test_a_producers_kafka_timestamp_too_far_ahead_of_now_is_refused(
    ahead_ms: int, expected: int | str
) -> None:
    assert time_of(1_483_273_590, now_ms=KAFKA_TIME_MS - ahead_ms) == expected


def test_the_brokers_own_timestamp_is_not_compared_with_now() -> None:
    assert time_of(1_483_273_590, kafka_time_ms=253_402_300_799_999, now_ms=None) == 1_483_273_590_000


@pytest.mark.parametrize("kafka_time_ms", [-1, 253_402_300_800_000, 2**63 - 1])
def test_a_kafka_timestamp_that_is_no_instant_is_refused(kafka_time_ms: int) -> None:
    assert time_of(0, kafka_time_ms=kafka_time_ms) == "time"


# Dead letters


@pytest.mark.parametrize("bad", BAD_EXAMPLES, ids=lambda bad: bad.name)
def test_every_kind_of_bad_record_has_its_reason(bad: BadExample) -> None:
    result = decode(bad.value, key=bad.key, headers=bad.headers)
    assert isinstance(result, InvalidEvent)
    assert result.reason == bad.reason


def test_poison_is_always_refused_and_the_same_for_the_same_seed() -> None:
    for seed in range(3):
        for record in poison_records(seed, 400):
            result = decode(record.value, key=record.key, headers=record.headers)
            assert isinstance(result, InvalidEvent), (seed, record)
    assert list(poison_records(7, 50)) == list(poison_records(7, 50))


def test_a_reason_names_the_field_at_fault() -> None:
    assert decode_event(labels=["a", "b", 3]) == InvalidEvent("type", "labels", "Expected `str`, got `int`")
    assert decode_event(value=-1) == InvalidEvent("range", "value", "Expected `float` >= 0.0")
    assert decode_event(asset_id="a\tb") == InvalidEvent(
        "text", "asset_id", "expected no control characters, got at least one"
    )
    assert decode(b'{"event_id": "e1"}') == InvalidEvent("missing", "user_id", "expected the field, got none")
    assert time_of("9999-12-31T23:59:59Z") == "future"


@seeded
@given(st.binary(max_size=300), st.sampled_from([(), MSGPACK]), st.none() | st.binary(max_size=5))
@example(b"\x81\xc0\xc0", MSGPACK, None)
@example(b"\xd6\xff\x00\x00\x00\x00", MSGPACK, None)
def test_arbitrary_bytes_never_raise(value: bytes, headers: Any, key: bytes | None) -> None:
    assert isinstance(decode(value, key=key, headers=headers), InvalidEvent)


#: Of every size in UTF-8, of every kind that could be mistaken for a control character, and none that is one.
LEGAL = (
    "aZ09 {}[]\"'\\/:,._-%\u00a0\u00ad\u00e9\u0301\u200d\u2028\u202e\u4e16\ue000\ufeff\U0001f6d2\U0010ffff"
)
legal = st.sampled_from(LEGAL)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(legal, max_size=70)
json_values = st.recursive(
    scalars | st.just("2017-01-01T00:00:00Z"),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(legal, max_size=5), inner, max_size=5)
    ),
    max_leaves=10,
)


@seeded
@given(st.dictionaries(st.sampled_from(sorted(valid_event())), json_values, max_size=4), st.booleans())
def test_any_values_in_an_events_fields_never_raise(changes: dict[str, Any], as_msgpack: bool) -> None:
    event = valid_event(**changes)
    try:
        packed = msgpack.packb(event) if as_msgpack else json.dumps(event).encode()
    except OverflowError:  # msgpack has no integers beyond 64 bits
        return
    user_id = event["user_id"]
    key = user_id.encode(errors="replace") if isinstance(user_id, str) else b"u1"
    result = decode(packed, key=key, headers=MSGPACK if as_msgpack else ())
    assert isinstance(result, Event | InvalidEvent)


SECRET = "qzjx"


@seeded
@given(
    st.sampled_from(sorted(valid_event())),
    st.text(st.sampled_from(string.printable), max_size=10),
    st.integers(1, 40),
)
def test_nothing_that_a_user_sent_is_in_a_reason(field: str, text: str, times: int) -> None:
    secret = (SECRET + text) * times
    for event in (valid_event(**{field: secret}), valid_event(**{field: [secret]}), {secret: secret}):
        value = json.dumps(event).encode()
        for sent, headers in (
            (value, ()),
            (value[:-2], ()),
            (msgpack.packb(event), MSGPACK),
            (value, MSGPACK),
        ):
            result = decode(sent, key=secret.encode(), headers=headers)
            if isinstance(result, InvalidEvent):
                assert SECRET not in result.detail + result.field


ids = st.text(legal, min_size=1, max_size=128)
names = st.text(legal | st.sampled_from("\x00\n\x7f\x9f"), min_size=1, max_size=64)
events = st.builds(
    Event,
    user_id=ids,
    event_type=names,
    event_time_ms=st.integers(0, KAFKA_TIME_MS),
    event_id=ids,
    labels=st.lists(names, max_size=64, unique=True).map(tuple),
    asset_id=st.none() | ids,
    value=st.none() | st.floats(0, allow_infinity=False),
)


@seeded
@given(events, st.booleans(), st.booleans())
def test_a_valid_event_comes_back_as_it_was_written(event: Event, as_msgpack: bool, as_text: bool) -> None:
    written = {
        "event_id": event.event_id,
        "user_id": event.user_id,
        "event_type": event.event_type,
        "timestamp": rfc_3339(event.event_time_ms) if as_text else event.event_time_ms / 1000,
        "labels": list(event.labels),
        "asset_id": event.asset_id,
        "value": event.value,
    }
    value = msgpack.packb(written) if as_msgpack else json.dumps(written).encode()
    if len(value) <= MAX_RECORD_BYTES:
        assert decode(value, key=event.user_id.encode(), headers=MSGPACK if as_msgpack else ()) == event


@pytest.mark.parametrize(
    ("key", "value"), [(b"u1", b"\xff\x00"), (None, None), (b"k" * 200_000, b"v" * 200_000), (b"", b"")]
)
def test_a_dead_letter_carries_what_can_be_published_of_the_record_and_where_the_whole_is(
    key: bytes | None, value: bytes | None
) -> None:
    invalid = InvalidEvent("undecodable", "", "expected UTF-8, got other bytes")
    message = dead_letter(invalid, topic="events", partition=3, offset=1234, key=key, value=value)
    assert message.kind == "dead_letter"
    assert message.key == (key if key is None else key[:65_536])
    assert message.value == (value if value is None else value[:65_536])
    assert message.headers == (
        ("sa_reason", b"undecodable"),
        ("sa_field", b""),
        ("sa_topic", b"events"),
        ("sa_partition", b"3"),
        ("sa_offset", b"1234"),
        ("sa_length", str(len(value or b"")).encode()),
        ("sa_sha256", hashlib.sha256(value or b"").hexdigest().encode()),
    )
    headers = sum(len(name) + len(content) for name, content in message.headers)
    assert len(message.key or b"") + len(message.value or b"") + headers <= MAX_DEAD_LETTER_BYTES


# Transitions out

ENTERED = Transition(
    id="00112233445566778899aabbccddeeff",
    user_id="Zoë {1}",
    segment_id="buy-swimwear",
    segment_type="base",
    segment_version="9f2c000000000000",
    status="entered",
    cause=Cause.EVENT,
    seq=7,
    time_ms=KAFKA_TIME_MS,
    weight=2.31,
    min_weight=1.0,
    exits_at_ms=KAFKA_TIME_MS + 604_800_000,
    event_id="e1",
    offset=1234,
)
EXITED = Transition(
    id="ffeeddccbbaa99887766554433221100",
    user_id="u1",
    segment_id="50% off/new",
    segment_type="base",
    segment_version="9f2c000000000000",
    status="exited",
    cause=Cause.DECAY,
    seq=8,
    time_ms=0,
    weight=1e-7,
    min_weight=0.0,
    exits_at_ms=None,
    event_id=None,
    offset=None,
)


def test_a_transition_is_written_field_by_field_as_the_contract_says() -> None:
    message = transition_message(ENTERED, topic="events", partition=3, replayed=False)
    assert message.kind == "entered"
    assert message.key == "Zoë {1}".encode()
    assert message.value is not None
    assert message.value.decode() == (
        '{"id":"00112233445566778899aabbccddeeff","user_id":"Zoë {1}","segment_id":"buy-swimwear",'
        '"segment_type":"base","segment_version":"9f2c000000000000","status":"entered","cause":"event","seq":7,'
        '"replayed":false,"time":"2026-01-02T03:04:05.678Z","weight":2.31,"min_weight":1.0,'
        '"exits_at":"2026-01-09T03:04:05.678Z",'
        '"event":{"event_id":"e1","topic":"events","partition":3,"offset":1234}}'
    )


def test_an_exit_by_decay_has_neither_event_nor_end() -> None:
    message = transition_message(EXITED, topic="events", partition=3, replayed=True)
    assert message.value is not None
    written = json.loads(message.value)
    assert message.kind == "exited"
    assert (written["event"], written["exits_at"], written["replayed"]) == (None, None, True)
    assert (written["cause"], written["time"], written["weight"]) == (
        "decay",
        "1970-01-01T00:00:00.000Z",
        1e-7,
    )
    assert "prediction" not in written


def test_a_transition_is_a_cloud_event_in_binary_mode() -> None:
    message = transition_message(ENTERED, topic="events", partition=3, replayed=False)
    assert message.headers == (
        ("ce_specversion", b"1.0"),
        ("ce_id", b"00112233445566778899aabbccddeeff"),
        ("ce_type", b"stream_app.segment.entered.v1"),
        ("ce_source", b"/segments/buy-swimwear"),
        ("ce_subject", "Zoë {1}".encode()),
        ("ce_time", b"2026-01-02T03:04:05.678Z"),
        ("ce_partitionkey", "Zoë {1}".encode()),
        ("content-type", b"application/json"),
    )
    exited = dict(transition_message(EXITED, topic="events", partition=3, replayed=False).headers)
    assert exited["ce_type"] == b"stream_app.segment.exited.v1"
    assert exited["ce_source"] == b"/segments/50%25%20off%2Fnew"


@pytest.mark.parametrize(
    ("instant_ms", "written"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (5, "1970-01-01T00:00:00.005Z"),
        (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
    ],
)
def test_instants_are_written_in_utc_with_milliseconds(instant_ms: int, written: str) -> None:
    assert rfc_3339(instant_ms) == written


@seeded
@given(
    st.builds(
        Outgoing,
        kind=st.sampled_from(["entered", "exited", "dead_letter"]),
        key=st.none() | st.binary(),
        value=st.none() | st.binary(),
        headers=st.lists(st.tuples(st.text(legal), st.binary())).map(tuple),
    )
)
def test_a_message_comes_out_of_the_outbox_as_it_went_in(message: Outgoing) -> None:
    assert Outgoing.unpack(message.pack()) == message


@pytest.mark.parametrize("packed", [b"", b"\x90", b"{}", Outgoing("entered", None, None, ()).pack()[:-1]])
def test_what_is_no_message_is_not_unpacked(packed: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Outgoing.unpack(packed)
