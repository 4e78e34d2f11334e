"""The peers of the service in the benchmark: how Quix Streams and Kafka Streams are made and started.

Both are made on demand below `.cache/bench/` and used again until what they are made from changes: Quix
Streams in a venv of its own, since it pins other versions of clients than the service, from a lock with
hashes; Kafka Streams by Maven, with the machine's own Java. What each of them has and lacks beside the
service is said here too, for the report. Nothing here measures.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.backends import ROOT

BUILT: Final = ROOT / ".cache" / "bench"
QUIX: Final = Path(__file__).parent / "quix"
QUIX_LOCK: Final = QUIX / "requirements.lock"
KAFKA_STREAMS: Final = Path(__file__).parent / "kafka_streams"
MAIN_CLASS: Final = "streamapp.bench.App"
MAKING_DEADLINE_S: Final = 540.0
SAID_CHARS: Final = 2000

#: Enough for the caches and the young generation; the collector that Java documents for throughput.
JVM: Final = ("-Xms512m", "-Xmx1g", "-XX:+UseParallelGC")


class PeerMissing(Exception):  # noqa: N818 - read in a sentence
    """This machine cannot have a contestant; the message says what was missing and what to do."""


@dataclass(frozen=True, slots=True)
class Notes:
    """What the figures of a contestant do not say.

    Attributes
    ----------
    has, lacks
        One sentence each, as the report prints them.
    settings
        What was chosen other than its defaults.
    """

    has: str
    lacks: str
    settings: str


QUIX_NOTES: Final = Notes(
    has="State is local (RocksDB) with a changelog topic to rebuild it from, so there is no store to run; "
    "its DataFrame API has windows, joins and connectors.",
    lacks="No exit by decay without an event of the user; at least once, so after a crash the events since "
    "the last checkpoint (5 s) may count twice and transitions are said twice; one thread per process; "
    "profiles cannot be looked up from outside.",
    settings="producer lingers 100 ms; all else by default (checkpoint every 5 s, changelog on)",
)
KAFKA_STREAMS_NOTES: Final = Notes(
    has="State is local (RocksDB) with a changelog topic and, if wanted, standby replicas; threads share one "
    "process; exactly-once is one setting away (off here, as by default); the DSL has windows and joins.",
    lacks="No exit by decay without an event of the user; at least once, so after a crash the events since "
    "the last commit (30 s) may count twice and transitions are said twice; profiles can be looked up from "
    "outside only through a server that one writes; its speed needs a warm JVM.",
    settings="2 stream threads, a cached store with 64 MB for caches, producer batches of 256 kB, parallel "
    "collector; all else by default (commit every 30 s, changelog, linger of 100 ms)",
)


# --- Quix Streams ------------------------------------------------------------------------------------------


def quix_command(
    *,
    bootstrap: str,
    topic: str,
    entered: str,
    exited: str,
    definitions: Path,
    group: str,
    events: int,
    state_dir: Path,
) -> list[str]:
    """Return the command of the Quix Streams contestant, installed first if it is not there yet.

    Raises
    ------
    PeerMissing
        If it could not be installed.
    """
    return [
        str(quix_python()),
        "-I",
        str(QUIX / "app.py"),
        *_options(bootstrap, topic, entered, exited, definitions, group, events, state_dir),
    ]


def quix_version() -> str:
    """Return which Quix Streams the lock names."""
    return _locked(QUIX_LOCK.read_text(encoding="utf-8"), "quixstreams")


def quix_python() -> Path:
    """Return the Python of the venv, made now if there is none or one of another lock."""
    home = BUILT / "quix-venv"
    python, stamp = home / "bin" / "python", home / "made-from"
    wanted = hashlib.sha256(QUIX_LOCK.read_bytes()).hexdigest()
    if python.exists() and stamp.is_file() and stamp.read_text() == wanted:
        return python
    _say("Installing Quix Streams into .cache/bench/quix-venv, about a minute the first time ...")
    shutil.rmtree(home, ignore_errors=True)
    try:
        venv.create(home, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        raise PeerMissing(
            f"Quix Streams: expected {sys.executable} to make a venv in {home}, got {exc}; Debian: "
            "`apt-get install python3-venv`"
        ) from exc
    _make(
        "Quix Streams",
        [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--require-hashes",
            "-r",
            str(QUIX_LOCK),
        ],
        "look whether pip reaches its package index, and run again",
    )
    stamp.write_text(wanted)
    return python


def _locked(lock: str, package: str) -> str:
    """Find a package's version in a lock.

    Examples
    --------
    >>> _locked("anyio==4.1 \\\\\\n    --hash=sha256:00\\nquixstreams==3.28.1 \\\\\\n", "quixstreams")
    '3.28.1'
    """
    for line in lock.splitlines():
        name, _, version = line.removesuffix("\\").strip().partition("==")
        if name == package:
            return version
    raise PeerMissing(f"expected {package}==... in {QUIX_LOCK}, found none: make the lock anew")


# --- Kafka Streams -----------------------------------------------------------------------------------------


def kafka_streams_command(
    *,
    bootstrap: str,
    topic: str,
    entered: str,
    exited: str,
    definitions: Path,
    group: str,
    events: int,
    state_dir: Path,
    threads: int = 2,
    cache_mb: int = 64,
) -> list[str]:
    """Return the command of the Kafka Streams contestant, built first if it is not there yet.

    Its caches are `cache_mb` large, all threads together; 10 is what Kafka Streams has by default, 0 is none.

    Raises
    ------
    PeerMissing
        If it could not be built, or there is no Java.
    """
    built = kafka_streams_build()
    return [
        _on_path("java", "Kafka Streams runs on Java 17 or later"),
        *JVM,
        # RocksDB unpacks its library there, and leaves it behind when it is killed.
        f"-Djava.io.tmpdir={state_dir}",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=error",
        "-cp",
        f"{built / 'classes'}:{built / 'jars'}/*",
        MAIN_CLASS,
        *_options(bootstrap, topic, entered, exited, definitions, group, events, state_dir),
        f"--threads={threads}",
        f"--cache-mb={cache_mb}",
    ]


def kafka_streams_version() -> str:
    """Return which Kafka Streams was built against."""
    (jar,) = (kafka_streams_build() / "jars").glob("kafka-streams-*.jar")
    return jar.stem.removeprefix("kafka-streams-")


def kafka_streams_build() -> Path:
    """Return the folder with `classes` and `jars`, built now if it is not there or of other sources."""
    sources = [KAFKA_STREAMS / "pom.xml", *sorted(KAFKA_STREAMS.glob("src/**/*.java"))]
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    home = BUILT / "kafka-streams"
    built = home / digest
    if built.is_dir():
        return built
    maven = _on_path("mvn", "Kafka Streams is built by Maven")
    _on_path("javac", "Kafka Streams is built with a JDK, 17 or later")
    _say("Building Kafka Streams into .cache/bench/kafka-streams, a minute or two the first time ...")
    shutil.rmtree(home, ignore_errors=True)
    unfinished = home / "unfinished"
    _make(
        "Kafka Streams",
        [
            maven,
            "-q",
            "-B",
            "-f",
            str(KAFKA_STREAMS / "pom.xml"),
            f"-Dbench.output={unfinished}",
            "-DincludeScope=runtime",
            f"-DoutputDirectory={unfinished / 'jars'}",
            "compile",
            "dependency:copy-dependencies",
        ],
        "look whether Maven reaches its repository, and run again",
    )
    unfinished.rename(built)
    return built


# --- both --------------------------------------------------------------------------------------------------


def _options(
    bootstrap: str,
    topic: str,
    entered: str,
    exited: str,
    definitions: Path,
    group: str,
    events: int,
    state_dir: Path,
) -> list[str]:
    return [
        f"--bootstrap={bootstrap}",
        f"--topic={topic}",
        f"--entered={entered}",
        f"--exited={exited}",
        f"--definitions={definitions}",
        f"--group={group}",
        f"--events={events}",
        f"--state-dir={state_dir}",
    ]


def _on_path(program: str, why: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise PeerMissing(
            f"expected {program} on the PATH, found none: {why}; Debian: "
            "`apt-get install openjdk-17-jdk-headless maven`"
        )
    return found


def _make(name: str, command: Sequence[str], advice: str) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=MAKING_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise PeerMissing(f"{name}: not made within {MAKING_DEADLINE_S:.0f} s; {advice}") from exc
    if done.returncode:
        said = (done.stdout + done.stderr)[-SAID_CHARS:]
        raise PeerMissing(
            f"{name}: expected `{' '.join(command[:4])} ...` to end with 0, got {done.returncode}; {advice}. "
            f"It said: {said}"
        )


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
