"""The examples in Node and Go, with those languages' ordinary clients, come to the numbers of `Lookup`.

Each example is built once in ``.cache/clients``, in a folder named after its content; npm and Go fetch the
pinned packages for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis

from stream_app.core.partitioner import partition_of
from stream_app.lookup import Lookup, UserView
from tests.backends import ROOT
from tests.conftest import missing
from tests.stored import DAY_MS, T0, random_profile, scored, store

SEED = 20260103
CLIENTS = ROOT / "tests" / "clients"
LANGUAGES = ("node", "go")
BUILD_DEADLINE_S = 300
RUN_DEADLINE_S = 60
ODD_USERS = (
    "",
    "a",
    "ab",
    "abc",
    "abcd",
    "é",
    "ann {1} é",
    "}:wm",
    "\N{GRINNING FACE}" * 7,
    "__proto__",
    "u" * 128,
)

Example = Callable[..., dict[str, Any]]


@pytest.fixture(params=LANGUAGES)
def example(request: pytest.FixtureRequest, fresh_redis: str) -> Example:
    """Run an example against the store: ``example(user_id, now_ms)`` returns what it prints."""
    command = built(request.param)

    def run(user_id: str, *now: int) -> dict[str, Any]:
        done = started(command, fresh_redis, user_id, *map(str, now))
        assert done.returncode == 0, done.stderr
        printed: dict[str, Any] = json.loads(done.stdout)
        return printed

    return run


def started(command: Sequence[str], url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an example to its end."""
    return subprocess.run(
        [*command, *arguments],
        env={**os.environ, "REDIS_URL": url},
        capture_output=True,
        text=True,
        timeout=RUN_DEADLINE_S,
        check=False,
    )


def built(language: str) -> Sequence[str]:
    """Return the command of an example, after having it built if that is not done yet."""
    source = CLIENTS / language
    files = sorted(path for path in source.iterdir() if path.is_file())
    content = hashlib.sha256()
    for path in files:
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = ROOT / ".cache" / "clients" / f"{language}-{content.hexdigest()[:16]}"
    if language == "node":
        command = [tool("node"), str(folder / "lookup.js")]
        fetch, build = [tool("npm"), "ci", "--ignore-scripts"], None
    else:
        command = [str(folder / "lookup")]
        fetch, build = [tool("go"), "mod", "download"], [tool("go"), "build", "-o", "lookup", "."]
    if not folder.is_dir():
        with unfinished(folder) as making:
            for path in files:
                shutil.copy2(path, making)
            if said := failure(fetch, making):
                missing(f"the packages of tests/clients/{language} cannot be fetched: {said}")
            if build is not None:
                said = failure(build, making)
                assert not said, said
    return command


def failure(command: Sequence[str], folder: Path) -> str:
    """Run a command to its end; return what it said if it failed."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=BUILD_DEADLINE_S, check=False
    )
    return (done.stdout + done.stderr)[-2000:] or "nothing" if done.returncode else ""


def tool(name: str) -> str:
    """Return where a program is; without it the test is skipped, or fails in CI."""
    return shutil.which(name) or missing(f"no {name} on the PATH to run the example in tests/clients with")


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """Yield a folder that takes its name only when it is whole."""
    making = folder.with_name(f"{folder.name}.{os.getpid()}")
    making.mkdir(parents=True)
    try:
        yield making
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def close(number: float) -> Any:
    return pytest.approx(number, rel=1e-9, abs=0)


def expected(view: UserView) -> dict[str, Any]:
    """Return what an example must print of a user, but for the partition."""
    weights = {
        event_type: {
            "total": close(sums.total),
            "labels": {name: close(weight) for name, weight in sums.labels.items()},
            "assets": {name: close(weight) for name, weight in sums.assets.items()},
        }
        for event_type, sums in view.weights.items()
    }
    segments: list[dict[str, Any]] = []
    for membership in view.segments:
        row: dict[str, Any] = {"segment_id": membership.segment_id, "type": "base"}
        row["exits_at"] = membership.exits_at_ms
        if membership.prediction is not None:
            row["type"] = "discovery"
            row["labels"] = list(membership.prediction.labels)
            row["score"] = close(membership.prediction.score)
        segments.append(row)
    scores = view.scores
    tips = [] if scores is None else scores.recommendations
    return {
        "weights": {"now": view.now_ms, "types": weights},
        "segments": {"now": view.now_ms, "segments": segments},
        "next": {
            "scored_at": None if scores is None else scores.at_ms,
            "model_version": None if scores is None else scores.model_version,
            "categories": [
                {"label": label, "score": close(score)}
                for label, score in ([] if scores is None else scores.next_categories)
            ],
            "recommendations": [
                {
                    "event_type": tip.event_type,
                    "asset_id": tip.asset_id,
                    "labels": list(tip.labels),
                    "growth_weight": close(tip.growth_weight),
                    "base_weight": close(tip.base_weight),
                }
                for tip in tips
            ],
        },
    }


async def test_an_example_prints_what_lookup_returns(fresh_redis: str, example: Example) -> None:
    rng = random.Random(SEED)
    users = [user_id for user_id in ODD_USERS if user_id]
    profiles = [random_profile(rng, user_id) for user_id in users]
    scores = [scored(user_id, [f"label {n} é" for n in range(n)]) for n, user_id in enumerate(users[:-2])]
    await store(fresh_redis, profiles, scores=scores)
    now = T0 + DAY_MS
    known = 0
    with Lookup(fresh_redis) as lookup:
        for user_id in users:
            printed = example(user_id, now)
            assert printed.pop("partition") == partition_of(user_id.encode(), lookup.meta().partitions)
            view = lookup.user(user_id, now)
            if view is None:
                assert printed == {"weights": None, "segments": None, "next": None}
            else:
                known += 1
                assert printed == expected(view)
    assert known > 5


async def test_an_example_knows_where_kafka_puts_a_user(fresh_redis: str, example: Example) -> None:
    await store(fresh_redis, partitions=1000)
    for user_id in ODD_USERS:
        assert example(user_id) == {
            "partition": partition_of(user_id.encode(), 1000),
            "weights": None,
            "segments": None,
            "next": None,
        }


@pytest.mark.parametrize("clock", ["wall", "event"])
async def test_without_an_instant_an_example_answers_as_of_the_services_now(
    fresh_redis: str, example: Example, clock: str
) -> None:
    profile = random_profile(random.Random(SEED), "ann")
    profile.forget_ms = 10**13
    await store(fresh_redis, [profile], clock=clock, stream_time_ms=T0 + 5)
    printed = example("ann")
    printed.pop("partition")
    with Lookup(fresh_redis) as lookup:
        view = lookup.user("ann", printed["weights"]["now"])
        assert view is not None
        assert printed["weights"] == expected(view)["weights"]
        if clock == "event":
            assert printed["weights"]["now"] == T0 + 5
        else:
            assert printed["weights"]["now"] > T0


@pytest.mark.parametrize("language", LANGUAGES)
async def test_an_example_refuses_a_library_that_does_not_fit_the_state(
    fresh_redis: str, language: str
) -> None:
    await store(fresh_redis, [random_profile(random.Random(SEED), "ann")])
    with redis.Redis.from_url(fresh_redis) as client:
        client.hset("sa:meta", "functions", "another")
    done = started(built(language), fresh_redis, "ann")
    assert done.returncode != 0
    assert "expected the function library another of sa:meta, got" in done.stderr


def test_lock_files_pin_and_name_no_registry() -> None:
    lock = (CLIENTS / "node" / "package-lock.json").read_text(encoding="utf-8")
    assert "http" not in lock
    assert lock.count('"integrity"') == lock.count('"node_modules/') > 0
    package = json.loads((CLIENTS / "node" / "package.json").read_text(encoding="utf-8"))
    assert all(version[0].isdigit() for version in package["dependencies"].values())
    assert "github.com/redis/go-redis/v9 v9." in (CLIENTS / "go" / "go.sum").read_text(encoding="utf-8")
