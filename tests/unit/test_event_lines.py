"""What becomes of a line of a replayed file."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path

import pytest

from stream_app.adapters import event_lines
from stream_app.adapters.event_lines import Block, InputUnreadable, Keyed, Keyer, input_name, read_blocks
from stream_app.errors import StreamAppError

LIMIT = 1_000_000


def keyed(*lines: bytes, name: str = "log.jsonl", first: int = 1) -> tuple[Keyed, Keyer]:
    keyer = Keyer(LIMIT)
    return keyer.key(Block(name, first, list(lines), 0)), keyer


def lines_of(*paths: Path) -> list[tuple[str, int, bytes | None]]:
    return [
        (block.name, number, line)
        for block in read_blocks([str(path) for path in paths])
        for number, line in enumerate(block.lines, block.first)
    ]


def test_an_event_without_id_gets_one_of_file_name_and_line_number() -> None:
    result, _ = keyed(b'{"user_id":"u1"}', b"", b'{"user_id":"u2"}', first=7)
    assert [json.loads(value)["event_id"] for value in result.values] == ["log.jsonl-7", "log.jsonl-9"]


def test_an_event_with_id_leaves_byte_for_byte_as_it_is() -> None:
    line = b'{ "event_id" : "e1", "user_id":"u\\u0031",  "x": [1.0, 1e3] }'
    result, _ = keyed(line)
    assert result.values == [line]
    assert result.keys == [b"u1"]


def test_an_id_that_is_null_or_no_text_is_left_for_the_worker_to_judge() -> None:
    lines = [b'{"event_id":null,"user_id":"u1"}', b'{"event_id":5,"user_id":"u1"}']
    result, keyer = keyed(*lines)
    assert result.values == lines
    assert keyer.refused == 0


@pytest.mark.parametrize("name", ['a"b\\c.jsonl', "100%d.jsonl", "größe 💡.jsonl"])
def test_any_file_name_makes_valid_json(name: str) -> None:
    result, _ = keyed(b'{"user_id":"u1"}', name=name)
    assert json.loads(result.values[0])["event_id"] == f"{name}-1"


@pytest.mark.parametrize(
    "line",
    [
        b'{"user_id":"u1","value":NaN}',
        b'{"user_id":"u1","value":1e999,"timestamp":"yesterday"}',
        b'{"user_id":"u1","labels":["\xff"]}',
        b'{"user_id":"u1","labels":7,"event_type":null}',
        b'{"user_id":"","timestamp":true}',
        b'{"user_id":"\\u0000{}\\ud83d\\ude00 "}',
    ],
)
def test_an_invalid_event_that_can_be_keyed_is_sent(line: bytes) -> None:
    result, keyer = keyed(line)
    assert (len(result.keys), keyer.refused) == (1, 0)
    assert result.values[0] == b'{"event_id":"log.jsonl-1",' + line[1:]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"nonsense", "not JSON"),
        (b'{"user_id":"u1"', "not JSON"),
        (b'["user_id"]', "expected a JSON object, got another value"),
        (b'{"event_type":"view"}', "user_id: expected a text, got none"),
        (b'{"user_id":5}', "user_id: expected a text, got int"),
        (b'{"user_id":"\\ud800"}', "user_id: expected Unicode text, got something else"),
        (b'{"user_id":"\xff"}', "user_id: expected Unicode text, got something else"),
        (b'{"user_id":"u1","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"user_id":"u1","x":"' + b"y" * LIMIT + b'"}', f"expected at most {LIMIT} bytes"),
        (None, "longer than 16777216 bytes"),
    ],
)
def test_a_line_that_cannot_be_keyed_is_refused_with_its_reason(line: bytes | None, reason: str) -> None:
    keyer = Keyer(LIMIT)
    result = keyer.key(Block("log.jsonl", 3, [b'{"user_id":"u1"}', line], 0))
    assert len(result.keys) == 1
    (refusal,) = keyer.refusals
    assert (refusal.name, refusal.line) == ("log.jsonl", 4)
    assert reason in refusal.reason


def test_refusals_beyond_a_hundred_are_counted_and_not_named() -> None:
    _, keyer = keyed(*[b"x"] * 250)
    assert (keyer.refused, len(keyer.refusals)) == (250, event_lines.MAX_NAMED_REFUSALS)


def test_a_step_back_is_measured_from_the_latest_timestamp_before_it() -> None:
    times = [10, 30, 20, "1970-01-01T00:00:05Z", None, "?", 253_402_300_800, -1, 40, 39]
    _, keyer = keyed(*(json.dumps({"user_id": "u", "timestamp": t}).encode() for t in times))
    assert keyer.order.latest_ms == 40_000
    assert (keyer.order.late, keyer.order.largest_step_back_ms) == (3, 25_000)
    assert keyer.order.at == ("log.jsonl", 4)


def test_files_are_read_one_after_the_other_gzipped_or_not(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"three\n") + gzip.compress(b"\nfive\n"))
    (tmp_path / "empty").write_bytes(b"")
    assert lines_of(tmp_path / "a.jsonl", tmp_path / "empty", tmp_path / "b.gz") == [
        ("a.jsonl", 1, b"one\r"),
        ("a.jsonl", 2, b"two"),
        ("b.gz", 1, b"three"),
        ("b.gz", 2, b""),
        ("b.gz", 3, b"five"),
    ]


def test_lines_come_out_whole_however_small_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = [b"x" * n for n in range(60)]
    (tmp_path / "a").write_bytes(b"\n".join(content))
    monkeypatch.setattr(event_lines, "BLOCK_BYTES", 7)
    assert [line for _, _, line in lines_of(tmp_path / "a")] == content


def test_a_line_too_long_to_hold_is_passed_over_and_keeps_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_lines, "BLOCK_BYTES", 16)
    monkeypatch.setattr(event_lines, "MAX_LINE_BYTES", 64)
    (tmp_path / "a").write_bytes(b"one\n" + b"y" * 500 + b"\nthree\n" + b"z" * 500)
    found = lines_of(tmp_path / "a")
    assert found == [("a", 1, b"one"), ("a", 2, None), ("a", 3, b"three"), ("a", 4, None)]


def test_positions_end_at_the_size_of_all_inputs(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\n" * 1000)
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"two\n" * 1000))
    paths = [str(tmp_path / "a"), str(tmp_path / "b.gz")]
    positions = [block.position_bytes for block in read_blocks(paths)]
    assert positions == sorted(positions)
    assert positions[-1] == event_lines.input_bytes(paths)


def test_a_damaged_gzip_file_is_a_sentence_with_file_and_line(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b"%d\n" % n for n in range(200_000)))
    (tmp_path / "broken.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputUnreadable, match=r"broken\.gz, after line [1-9]\d+: expected readable lines"):
        lines_of(tmp_path / "broken.gz")


def test_standard_input_is_called_stdin() -> None:
    assert input_name("-") == "stdin"
    assert input_name("some/where/events.jsonl.gz") == "events.jsonl.gz"


@pytest.mark.parametrize("name", ["x" * 116, "a\nb"])
def test_a_file_name_that_makes_no_event_id_is_refused(name: str) -> None:
    with pytest.raises(StreamAppError, match="event ids are made of it"):
        input_name(name)


def test_a_pipe_has_no_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\n")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert event_lines.input_bytes([str(tmp_path / "a"), str(fifo)]) is None


def test_a_block_is_given_as_soon_as_something_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [b"one\ntw", b"o\n"]

    class Pipe(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
            part = parts.pop(0) if parts else b""
            buffer[: len(part)] = part
            return len(part)

    monkeypatch.setattr(event_lines, "_open", lambda path: Pipe())
    assert [block.lines for block in read_blocks(["-"])] == [[b"one"], [b"two"]]
