"""`show`, `segments list|members`, `doctor` and `rebuild` on a state that a real worker has made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
import redis

from tests import backends
from tests.backends import Names
from tests.processes import Programs

Run = Callable[..., str]

DAY_S = 86_400
BEGIN_S = 1_767_225_600  # 2026-01-01
BOB_LEAVES = "2026-10-26T23:22:12.866Z"  # 20 s and log2(1000) half-lives of 30 days after the beginning
SEGMENTS = """
[[segments]]
id = "tea"
name = "Tea drinkers"
labels = ["tea"]
min_weight = 1.5

[[segments]]
id = "seen"
event_types = ["view"]
"""


@pytest.fixture(scope="module")
def own_redis(redis_kind: backends.Kind) -> Iterator[str]:
    with backends.local_redis(redis_kind) as server:
        yield backends.redis_url_of(server)


@pytest.fixture(scope="module")
def run(kafka_bootstrap: str, own_redis: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Fold a small log, and yield what runs a command on the result; `rebuild` comes last."""
    tmp_path = tmp_path_factory.mktemp("commands")
    names = Names.unique()
    programs = Programs(tmp_path, {})
    events = [
        {
            "user_id": user,
            "event_type": "view",
            "labels": ["tea"],
            "asset_id": "a1",
            "timestamp": BEGIN_S + at_s,
        }
        for at_s, user in ((0, "ann {1}"), (10, "ann {1}"), (20, "bob"), (40 * DAY_S, "cid"))
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (tmp_path / "segments.toml").write_text(SEGMENTS)
    environment = {
        **names.environment(),
        "STREAM_APP__KAFKA__BOOTSTRAP_SERVERS": kafka_bootstrap,
        "STREAM_APP__KAFKA__SESSION_TIMEOUT_S": "6",
        "STREAM_APP__REDIS__URL": own_redis,
        "STREAM_APP__WORKER__CLOCK": "event",
    }

    def run(*arguments: str, status: int = 0) -> str:
        command = [*arguments, "--segments", str(tmp_path / "segments.toml")]
        return programs.run(*command, environment=environment, status=status)

    run("topics", "--partitions", "1")
    run("replay", str(tmp_path / "events.jsonl"))
    run("worker", "--until-end")
    yield run
    programs.stop()


def test_show_tells_weights_at_stream_time_and_segments_with_their_exits(run: Run) -> None:
    shown = json.loads(run("show", "ann {1}", "--json"))
    assert shown["known"]
    assert shown["now"] == "2026-02-10T00:00:00.000Z"
    at = 2.0 ** (-(40 * DAY_S) / (30 * DAY_S)) + 2.0 ** (-(40 * DAY_S - 10) / (30 * DAY_S))
    assert shown["weights"]["view"]["labels"]["tea"] == pytest.approx(at, rel=1e-9)
    assert shown["weights"]["view"]["total"] == pytest.approx(at, rel=1e-9)
    assert [segment["segment_id"] for segment in shown["segments"]] == ["seen"]  # tea was left by decay
    text = run("show", "ann {1}")
    assert "seen" in text
    assert f"{at:.4f}" in text


def test_an_unknown_user_is_said_to_be_unknown(run: Run) -> None:
    assert json.loads(run("show", "nobody", "--json", status=1)) == {"user_id": "nobody", "known": False}


def test_segments_are_listed_with_their_members(run: Run) -> None:
    listed = json.loads(run("segments", "list", "--json"))["segments"]
    assert {segment["id"]: segment["members"] for segment in listed} == {"tea": 0, "seen": 3}
    assert "Tea drinkers" in run("segments", "list")


def test_members_come_with_the_instant_of_leaving_the_first_to_leave_first(run: Run) -> None:
    members = json.loads(run("segments", "members", "seen", "--json"))["members"]
    assert [member["user_id"] for member in members] == ["bob", "ann {1}", "cid"]
    assert members[0]["exits_at"] == BOB_LEAVES
    assert run("segments", "members", "seen", "--limit", "1").startswith(f"bob\t{BOB_LEAVES}\n")
    assert "expected one of" in run("segments", "members", "none", status=2)


def test_doctor_finds_a_healthy_environment_healthy(run: Run) -> None:
    findings = json.loads(run("doctor", "--json"))["findings"]
    assert {finding["state"] for finding in findings} == {"ok"}
    assert {finding["action"] for finding in findings} == {""}
    assert any("watermark 4, log 0 to 4, lag 0, outbox entries 0" in finding["got"] for finding in findings)


def test_doctor_names_users_that_another_partitioner_has_put_elsewhere(run: Run, own_redis: str) -> None:
    with redis.Redis.from_url(own_redis) as client:
        client.copy("sa:{0}:profile:bob", "sa:{7}:profile:bob")
        assert "1 of 4 users looked at are elsewhere" in run("doctor", status=1)
        client.delete("sa:{7}:profile:bob")


def test_doctor_says_what_to_do_about_a_broker_that_is_not_there(
    fresh_redis: str, programs: Programs
) -> None:
    environment = {
        "STREAM_APP__KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "STREAM_APP__REDIS__URL": fresh_redis,
    }
    said = programs.run("doctor", environment=environment, status=1)
    assert "BAD" in said
    assert "kafka.bootstrap_servers" in said


def test_rebuild_forgets_everything_and_the_next_worker_comes_to_the_same(run: Run) -> None:
    before = run("segments", "members", "seen", "--json")
    said = run("rebuild", "--yes")
    assert "The log holds up to 4 records in 1 partitions" in said
    assert "expected state of schema 1, got none" in run("show", "bob", status=1)
    run("worker", "--until-end")
    assert run("segments", "members", "seen", "--json") == before
