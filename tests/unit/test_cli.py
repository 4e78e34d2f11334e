"""The command line contract that needs no service: help, exit codes, one sentence per failure."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from stream_app.adapters.kafka_admin import KafkaAdmin
from stream_app.cli import cli, main
from stream_app.commands.options import print_table
from stream_app.errors import StreamAppError
from tests.backends import ROOT

SEGMENTS = """
[[segments]]
id = "snackers"
labels = ["Bag Snacks"]
min_weight = 2.0
exit_weight = 1.0

[[segments]]
id = "milk"
labels = ["Milk"]
event_types = ["purchase"]
min_weight = 1.0
exclude = ["snackers"]
"""


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a valid config/, and no configuration from the environment."""
    for name in [name for name in os.environ if name.startswith("STREAM_APP__")]:
        monkeypatch.delenv(name)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "app.toml").write_text("")
    (tmp_path / "config" / "segments.toml").write_text(SEGMENTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def verbs() -> list[tuple[str, ...]]:
    """All commands, those of groups included."""
    found: list[tuple[str, ...]] = []
    for name, command in cli.commands.items():
        found.append((name,))
        if isinstance(command, click.Group):
            found += [(name, sub) for sub in command.commands]
    return found


def leaves() -> list[tuple[str, ...]]:
    groups = {path[:-1] for path in verbs()}
    return [path for path in verbs() if path not in groups]


@pytest.mark.parametrize("verb", [(), *verbs()])
def test_help_of_every_command_shows_an_example_and_the_exit_codes(
    verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"  stream-app {' '.join(verb)}".rstrip() in out
    assert "Exit codes: 0 done, 1 failed, 2 wrong use or configuration." in out


@pytest.mark.parametrize("verb", leaves())
def test_every_command_takes_config_and_segments_after_its_name(
    verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    main([*verb, "--help"])
    out = capsys.readouterr().out
    assert "--config PATH" in out
    assert "--segments PATH" in out


def test_help_imports_nothing_that_is_slow_or_connects() -> None:
    heavy = ["faust", "aiokafka", "redis", "pydantic", "pandas", "rich", "msgspec"]
    program = (
        "import sys; from stream_app.__main__ import main; main(['--help']);"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["replay"],
        ["replay", "no-such-file.jsonl"],
        ["replay", "-", "-"],
        ["replay", "-", "--rate", "0"],
        ["topics", "--partitions", "0"],
        ["topics", "--unknown"],
        ["services", "--kafka-port", "70000"],
        ["demo", "--limit", "many"],
        ["segments", "nonsense"],
    ],
)
def test_wrong_use_is_one_line_on_stderr_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("stream-app")
    assert "--help`." in captured.err


def test_no_command_shows_the_help_and_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["topics"], ["replay", "-"], ["worker"], ["demo"], ["segments", "check"]])
def test_a_wrong_configuration_is_a_line_per_problem_and_exit_code_2(
    verb: list[str], working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = working_directory / "bad.toml"
    bad.write_text('[kafka]\nbootstrap_servers = "nowhere"\nunknown = 1\n[worker]\nclock = "sun"\n')
    assert main([*verb, "--config", str(bad), "--segments", "missing.toml"]) == 2
    captured = capsys.readouterr()
    problems = [line for line in captured.err.splitlines() if "expected" in line]
    assert len(problems) == 4
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("verb", [["topics"], ["replay", "events.jsonl"]])
def test_an_unreachable_kafka_is_one_sentence_and_exit_code_1(
    verb: list[str],
    working_directory: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STREAM_APP__KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.setattr(KafkaAdmin.__init__, "__kwdefaults__", {"timeout_s": 0.3})
    (working_directory / "events.jsonl").write_text('{"user_id":"u1"}\n')
    assert main(verb) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert err.startswith("Kafka at 127.0.0.1:1: expected an answer within 0.3 s, got no connection")
    assert "Operator action: Check kafka.bootstrap_servers" in err


def test_a_failure_is_its_sentence_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise StreamAppError("rain", "sun", "sky", "Wait.")

    monkeypatch.setitem(cli.commands, "fail", click.Command("fail", callback=fail))
    assert main(["fail"]) == 1
    assert capsys.readouterr().err == "sky: expected rain, got sun. Operator action: Wait.\n"


def test_an_interruption_is_exit_code_1_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.commands, "wait", click.Command("wait", callback=interrupt))
    assert main(["wait"]) == 1
    assert capsys.readouterr().err.strip() == "Interrupted."


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m stream_app segments check --json --config config/app.toml | true",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_segments_check_shows_the_definitions_and_what_to_think_about(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["segments", "check"]) == 0
    out = capsys.readouterr().out.splitlines()
    table = [re.split(r"  +", line) for line in out[:3]]
    assert table == [
        ["segment", "type", "criteria", "enters at", "leaves below", "excluded by"],
        ["snackers", "base", "any of 1 labels", "2", "1", "-"],
        ["milk", "base", "any of 1 labels and types purchase", "1", "1", "snackers"],
    ]
    assert any(line.startswith("advice: segment 'milk', min_weight: one event") for line in out)
    assert out[-1] == "2 segments, no problems, 1 to think about."


def test_segments_check_as_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["segments", "check", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["problems"] == []
    assert [segment["id"] for segment in document["segments"]] == ["snackers", "milk"]
    assert document["segments"][1]["exclude"] == ["snackers"]
    assert len(document["segments"][0]["version"]) == 16
    assert [(hint["segment_id"], hint["key"]) for hint in document["advice"]] == [("milk", "min_weight")]


def test_segments_check_of_wrong_definitions_names_each_and_is_still_json_if_asked(
    working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = working_directory / "draft.toml"
    draft.write_text('[[segments]]\nid = "a"\n[[segments]]\nid = "b"\nlabels = ["x"]\nexclude = ["c"]\n')
    assert main(["segments", "check", "--segments", str(draft), "--json"]) == 2
    captured = capsys.readouterr()
    problems = json.loads(captured.out)["problems"]
    assert len(problems) == 2
    assert all(problem in captured.err for problem in problems)


def test_the_definitions_that_are_shipped_are_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["segments", "check"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("no problems, nothing to think about.")


def test_a_table_is_aligned_with_numbers_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "n"], [["a", 5], ["long", 1000]])
    assert capsys.readouterr().out == "name     n\na        5\nlong  1000\n"
