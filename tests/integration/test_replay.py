"""`stream-app replay`: what goes out, what is refused, and what it says."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from aiokafka import ConsumerRecord

from stream_app.cli import main
from stream_app.core.partitioner import partition_of
from stream_app.embedded import Server
from tests.backends import ROOT, Names, create_topic, log_ends, read_to_end
from tests.processes import DYING_WITH_US

PARTITIONS = 3


@pytest.fixture
def topic(kafka_bootstrap: str, names: Names, monkeypatch: pytest.MonkeyPatch) -> str:
    """An events topic of this test, named by the environment."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("STREAM_APP__KAFKA__BOOTSTRAP_SERVERS", kafka_bootstrap)
    for name, value in names.environment().items():
        monkeypatch.setenv(name, value)
    asyncio.run(create_topic(kafka_bootstrap, names.events, PARTITIONS))
    return names.events


def event(user: int, timestamp: float, **more: object) -> bytes:
    return json.dumps({"user_id": f"u{user}", "timestamp": timestamp, **more}).encode() + b"\n"


def records_of(bootstrap: str, topic: str) -> list[ConsumerRecord]:
    return asyncio.run(read_to_end(bootstrap, topic))


def by_time_of_sending(records: list[ConsumerRecord]) -> list[dict[str, Any]]:
    return [json.loads(record.value) for record in sorted(records, key=lambda r: (r.timestamp, r.partition))]


def test_every_event_arrives_once_in_order_in_the_partition_of_its_user(
    kafka_bootstrap: str, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, zipped = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_bytes(b"".join(event(n % 101, n) for n in range(5_000)))
    zipped.write_bytes(
        gzip.compress(b"".join(event(n % 101, n, event_id=f"own-{n}") for n in range(5_000, 9_000)))
    )
    before_ms = time.time_ns() // 1_000_000
    assert main(["replay", str(plain), str(zipped)]) == 0
    after_ms = time.time_ns() // 1_000_000
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Sent 9,000 events, 9,000 acknowledged, 0 refused, in ")
    assert out[1] == "The input is in time order."
    records = records_of(kafka_bootstrap, topic)
    values = [json.loads(record.value) for record in records]
    assert {value["event_id"] for value in values} == {
        *(f"a.jsonl-{n + 1}" for n in range(5_000)),
        *(f"own-{n}" for n in range(5_000, 9_000)),
    }
    assert len(records) == 9_000
    for record, value in zip(records, values, strict=True):
        assert record.key == value["user_id"].encode()
        assert record.partition == partition_of(record.key, PARTITIONS)
        assert before_ms <= record.timestamp <= after_ms
    for partition in range(PARTITIONS):
        times = [v["timestamp"] for r, v in zip(records, values, strict=True) if r.partition == partition]
        assert times == sorted(times)


def test_lines_that_cannot_be_keyed_are_named_and_the_rest_is_sent(
    kafka_bootstrap: str, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mixed.jsonl"
    bad = b'{"user_id":"u2","value":NaN}\n'
    path.write_bytes(event(1, 1) + b"nonsense\n" + bad + b'\n{"timestamp":3}\n' + event(2, 4))
    assert main(["replay", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("Sent 3 events, 3 acknowledged, 2 refused")
    assert captured.err.splitlines() == [
        "refused mixed.jsonl:2: not JSON",
        "refused mixed.jsonl:5: user_id: expected a text, got none",
    ]
    values = [record.value for record in records_of(kafka_bootstrap, topic)]
    assert b'{"event_id":"mixed.jsonl-3",' + bad[1:-1] in values
    assert len(values) == 3


def test_a_line_above_the_topics_limit_is_refused_and_the_rest_is_sent(
    kafka_bootstrap: str, topic: str, names: Names, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = f"{names.events}-limited"
    asyncio.run(create_topic(kafka_bootstrap, limited, 1, {"max.message.bytes": "100000"}))
    path = tmp_path / "large.jsonl"
    path.write_bytes(event(1, 1) + event(1, 2, x="y" * 99_000) + event(1, 3, x="y" * 100_000) + event(1, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAM_APP__KAFKA__EVENTS_TOPIC", limited)
        assert main(["replay", str(path)]) == 1
    assert "refused large.jsonl:3: expected at most 99744 bytes, got 1000" in capsys.readouterr().err
    assert [json.loads(r.value)["timestamp"] for r in records_of(kafka_bootstrap, limited)] == [1, 2, 4]


def test_an_event_larger_than_a_batch_is_sent_by_itself(
    kafka_bootstrap: str, topic: str, tmp_path: Path
) -> None:
    path = tmp_path / "large.jsonl"
    path.write_bytes(event(1, 1) + event(1, 2, x="y" * 900_000) + event(1, 3))
    assert main(["replay", str(path)]) == 0
    assert [json.loads(r.value)["timestamp"] for r in records_of(kafka_bootstrap, topic)] == [1, 2, 3]


def test_how_far_the_input_goes_back_in_time_is_said_and_sort_sorts_it(
    kafka_bootstrap: str, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_bytes(b"".join(event(1, t) for t in (100_000, 300_000, 200_000)))
    two.write_bytes(
        event(1, 26_400) + b'{"user_id":"u1","timestamp":"?"}\n' + event(1, 300_000, event_id="last")
    )
    assert main(["replay", str(one), str(two)]) == 0
    said = "The input goes back in time by up to 3 d 4 h (two.jsonl:1), in 2 events; "
    assert capsys.readouterr().out.splitlines()[1] == said + "--sort sends it in time order."
    assert main(["replay", "--sort", str(one), str(two)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1] == said + "it was sent in time order (--sort)."
    assert "reading all of the input into memory" in captured.err
    values = [json.loads(record.value) for record in records_of(kafka_bootstrap, topic)]
    assert [value["timestamp"] for value in values[6:]] == [26_400, "?", 100_000, 200_000, 300_000, 300_000]
    assert values[6]["event_id"] == "two.jsonl-1"
    assert values[-1]["event_id"] == "last"


def test_json_output_is_one_document(topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(event(1, 5) + event(1, 2) + b"x\n")
    assert main(["replay", "--json", str(path)]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["sent"], document["acknowledged"], document["refused"]) == (2, 2, 1)
    assert document["refusals"] == [{"name": "a.jsonl", "line": 3, "reason": "not JSON"}]
    assert (document["largest_step_back_ms"], document["largest_step_back_at"]) == (3000, "a.jsonl:2")


def test_a_rate_is_kept(topic: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(event(1, n) for n in range(600)))
    begin = time.monotonic()
    assert main(["replay", "--rate", "1000", str(path)]) == 0
    assert time.monotonic() - begin > 0.5


def test_events_on_a_pipe_leave_without_waiting_for_more(
    kafka_bootstrap: str, topic: str, names: Names
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "stream_app", "replay", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=dict(os.environ),
    )
    assert process.stdin is not None
    try:
        process.stdin.write(event(1, 1) + event(2, 2))
        process.stdin.flush()
        deadline = time.monotonic() + 20
        while sum(asyncio.run(log_ends(kafka_bootstrap, topic)).values()) < 2:
            assert time.monotonic() < deadline, "the two events did not leave while the pipe was open"
        out, err = process.communicate(event(3, 3), timeout=20)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (0, b"")
    assert out.startswith(b"Sent 3 events, 3 acknowledged")
    ids = {json.loads(record.value)["event_id"] for record in records_of(kafka_bootstrap, topic)}
    assert ids == {"stdin-1", "stdin-2", "stdin-3"}


def test_an_interrupted_replay_delivers_what_it_has_read_and_says_so(
    kafka_bootstrap: str, topic: str
) -> None:
    process = subprocess.Popen(
        [*DYING_WITH_US, str(os.getpid()), sys.executable, "-m", "stream_app", "replay", "-", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=dict(os.environ),
    )
    assert process.stdin is not None
    try:
        process.stdin.write(b"".join(event(n, n) for n in range(1_000)))
        process.stdin.flush()
        deadline = time.monotonic() + 20
        while sum(asyncio.run(log_ends(kafka_bootstrap, topic)).values()) < 1_000:
            assert time.monotonic() < deadline, "the events did not leave"
        process.send_signal(signal.SIGINT)
        process.wait(20)  # the pipe is still open
        assert process.stdout is not None
        assert process.stderr is not None
        document, err = json.loads(process.stdout.read()), process.stderr.read()
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert (document["sent"], document["acknowledged"]) == (1_000, 1_000)
    assert err.startswith(b"replay: expected to send the input to its end, got an interruption.")


def test_a_missing_topic_is_a_sentence_and_is_not_created(
    kafka_bootstrap: str, topic: str, names: Names, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(event(1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAM_APP__KAFKA__EVENTS_TOPIC", "no-such-topic")
        for _ in range(2):
            assert main(["replay", str(path)]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert "expected topic 'no-such-topic' to exist" in line
            assert "Run `stream-app topics`" in line


def test_a_broken_input_says_what_was_sent_before(
    kafka_bootstrap: str, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = gzip.compress(b"".join(event(n, n) for n in range(100_000)))
    path = tmp_path / "broken.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    assert main(["replay", str(path)]) == 1
    captured = capsys.readouterr()
    assert "broken.jsonl.gz, after line" in captured.err
    sent = int(captured.out.split()[1].replace(",", ""))
    assert captured.out.startswith(f"Sent {sent:,} events, {sent:,} acknowledged")
    assert sum(asyncio.run(log_ends(kafka_bootstrap, topic)).values()) == sent > 0


def test_a_broker_that_goes_away_is_a_failure_and_nothing_unacknowledged_is_claimed(
    kafka_server: Any, names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: Server = kafka_server()
    asyncio.run(create_topic(server.address, names.events, 1))
    environment = {
        **os.environ,
        **names.environment(),
        "STREAM_APP__KAFKA__BOOTSTRAP_SERVERS": server.address,
    }
    program = (
        "import sys; from stream_app.adapters import event_sender;"
        "event_sender.DELIVERY_DEADLINE_S = 2.0;"
        "from stream_app.__main__ import main; sys.exit(main(['replay', '--rate', '200', '--json', '-']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment,
    )
    assert process.stdin is not None
    try:
        process.stdin.write(b"".join(event(1, n) for n in range(400)))
        process.stdin.flush()
        deadline = time.monotonic() + 20
        while not sum(asyncio.run(log_ends(server.address, names.events)).values()):
            assert time.monotonic() < deadline, "nothing arrived"
        os.kill(server.pid, 9)
        out, err = process.communicate(timeout=40)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    document = json.loads(out)
    assert 0 < document["acknowledged"] < document["sent"] <= 400
    (line,) = err.decode().splitlines()
    assert line.startswith(f"Kafka at {server.address}: expected every event for topic")
