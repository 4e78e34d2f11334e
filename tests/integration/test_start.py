"""A worker that would break its promises does not start: one sentence says why, and nothing is changed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import redis
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.records_to_delete import RecordsToDelete

from stream_app.adapters.kafka_admin import KafkaAdmin
from stream_app.adapters.profile_store import Identity, ProfileStore, connect
from stream_app.cli import main
from stream_app.core.decay import EventTypeWeight, Weights
from stream_app.core.segment import Segment
from stream_app.core.segment_set import SegmentSet
from stream_app.embedded import Server
from stream_app.embedded.servers import free_port
from tests.backends import Kind, Names, alter_topic, create_topic, read_to_end, redis_url_of
from tests.faults.rows import Row
from tests.processes import Programs

APP_TOML = """
[worker]
clock = "event"
[weights]
half_life_s = 3600.0
[weights.event_types.buy]
action_weight = 2.0
"""
SEGMENTS_TOML = """
[[segments]]
id = "tea"
labels = ["tea"]
min_weight = 0.5
"""
WEIGHTS = Weights(3600.0, 1e-3, {"buy": EventTypeWeight(2.0)})
SEGMENTS = SegmentSet([Segment("tea", labels=("tea",), min_weight=0.5)], WEIGHTS)
FIRST_S = 1_600_000_000
PASSWORD = "s3cret-Pa55"


@dataclass(frozen=True, slots=True)
class Stage:
    """A worker's surroundings: which servers, which names, which configuration."""

    programs: Programs
    names: Names
    directory: Path
    environment: Mapping[str, str]

    def having(self, **settings: str) -> Stage:
        """The same with other settings, written ``section__key=value``."""
        changed = {f"STREAM_APP__{name.upper()}": value for name, value in settings.items()}
        return replace(self, environment={**self.environment, **changed})

    def options(self) -> Sequence[str]:
        return (
            "--config",
            str(self.directory / "app.toml"),
            "--segments",
            str(self.directory / "segments.toml"),
        )

    def run(self, *arguments: str, status: int = 0) -> str:
        """Run a command to its end."""
        return self.programs.run(*arguments, *self.options(), environment=self.environment, status=status)

    def create_topics(self, timestamp_type: str = "LogAppendTime") -> None:
        """Create all four topics with one partition each, as `stream-app topics` does."""
        names = self.names
        stamped = {"message.timestamp.type": timestamp_type}

        async def create() -> None:
            await create_topic(self.kafka, names.events, config=stamped)
            for name in (names.entered, names.exited, names.dead_letter):
                await create_topic(self.kafka, name)

        asyncio.run(create())

    @property
    def kafka(self) -> str:
        return self.environment["STREAM_APP__KAFKA__BOOTSTRAP_SERVERS"]

    def refused(self, *arguments: str, status: int = 1) -> str:
        """Start a worker that must not start; return the sentence that it ends with."""
        log = self.run("worker", *arguments, status=status)
        assert "Traceback" not in log, log
        (sentence,) = [line for line in log.splitlines() if "Operator action: " in line]
        assert log.rstrip().endswith(sentence)
        return sentence


@pytest.fixture
def stage(kafka_bootstrap: str, kafka_kind: Kind, names: Names, programs: Programs, tmp_path: Path) -> Stage:
    """A broker and no Redis."""
    (tmp_path / "app.toml").write_text(APP_TOML)
    (tmp_path / "segments.toml").write_text(SEGMENTS_TOML)
    environment = {
        **names.environment(),
        "STREAM_APP__KAFKA__BOOTSTRAP_SERVERS": kafka_bootstrap,
        # The embedded broker makes a joining worker wait for it; Apache Kafka accepts no less than 6 s.
        "STREAM_APP__KAFKA__SESSION_TIMEOUT_S": "3" if kafka_kind == "embedded" else "6",
        "STREAM_APP__REDIS__URL": f"redis://127.0.0.1:{free_port()}/0",
    }
    return Stage(programs, names, tmp_path, environment)


@pytest.fixture
def settled(stage: Stage, fresh_redis: str) -> Stage:
    """Ten events of one partition, folded by a worker that has ended."""
    found = stage.having(redis__url=fresh_redis)
    found.create_topics()
    send_events(found, 0, 10)
    found.run("worker", "--until-end")
    assert state(fresh_redis)["wm"]["watermark"] == "10"
    return found


def send_events(stage: Stage, first: int, count: int) -> None:
    """Put events of one user a minute apart behind what is in the log."""
    path = stage.directory / f"events-{first}.jsonl"
    events = [
        {
            "event_id": f"e{number}",
            "user_id": "u1",
            "event_type": "view",
            "timestamp": FIRST_S + number * 60,
            "labels": ["tea"],
        }
        for number in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    with pytest.MonkeyPatch.context() as patch:  # in this process: starting one takes longer than it does
        for name, value in stage.environment.items():
            patch.setenv(name, value)
        assert main(["replay", str(path), *stage.options()]) == 0


@contextmanager
def unchanged(url: str) -> Iterator[None]:
    """Fail if what happens inside changes anything in Redis."""
    with redis.Redis.from_url(url) as client:
        before = content(client)
        yield
        assert content(client) == before


def content(raw: Any) -> dict[bytes, object]:
    """Everything that Redis holds."""
    read: dict[bytes, Callable[[bytes], object]] = {
        b"string": raw.get,
        b"hash": raw.hgetall,
        b"zset": lambda key: raw.zrange(key, 0, -1, withscores=True),
        b"stream": raw.xrange,
    }
    return {key: read[raw.type(key)](key) for key in raw.scan_iter(count=1000)}


def state(url: str, partition: int = 0) -> dict[str, Any]:
    """What Redis holds of a partition: the watermark's hash, the users, and the members of the segment."""
    with redis.Redis.from_url(url, decode_responses=True) as client:
        raw: Any = client
        prefix = f"sa:{{{partition}}}:"
        return {
            "wm": raw.hgetall(f"{prefix}wm"),
            "users": sorted(raw.keys(f"{prefix}profile:*")),
            "members": raw.zrange(f"{prefix}members:tea", 0, -1),
        }


def set_watermark(url: str, **fields: str | int) -> None:
    with redis.Redis.from_url(url) as client:
        raw: Any = client
        raw.hset("sa:{0}:wm", mapping=fields)


# --- Redis -------------------------------------------------------------------------------------------------


def test_a_redis_that_evicts_is_refused(stage: Stage, redis_server: Callable[..., Server]) -> None:
    url = redis_url_of(redis_server("--maxmemory-policy", "allkeys-lru"))
    with unchanged(url):
        sentence = stage.having(redis__url=url).refused("--unchecked")  # which is about what is not told
    assert f"Redis at {url}, eviction policy" in sentence
    assert "maxmemory-policy noeviction" in sentence
    assert "got allkeys-lru" in sentence
    assert "Set maxmemory-policy to noeviction" in sentence


def test_a_replica_is_refused(stage: Stage, redis_server: Callable[..., Server]) -> None:
    master = redis_server()
    replica = redis_server("--replicaof", "127.0.0.1", str(master.port))
    url = redis_url_of(replica)
    sentence = stage.having(redis__url=url).refused("--unchecked")
    assert f"Redis at {url}, role" in sentence
    assert "got slave" in sentence
    assert "Point redis.url at the master" in sentence


def test_a_redis_that_does_not_tell_is_refused_unless_unchecked(
    stage: Stage, redis_server: Callable[..., Server]
) -> None:
    server = redis_server("--user", "app", "on", f">{PASSWORD}", "~sa:*", "&*", "+@all", "-info")
    there = stage.having(redis__url=f"redis://app:{PASSWORD}@{server.address}/0")
    there.create_topics()
    with unchanged(redis_url_of(server)):
        sentence = there.refused("--until-end")
    assert f"Redis at redis://***@{server.address}/0, INFO" in sentence
    assert "start with --unchecked" in sentence
    log = there.run("worker", "--until-end", "--unchecked")
    assert PASSWORD not in sentence + log
    assert state(redis_url_of(server))["wm"]["epoch"] == "1"


def test_a_redis_that_is_not_there_is_refused(stage: Stage) -> None:
    port = free_port()
    sentence = stage.having(redis__url=f"redis://app:{PASSWORD}@127.0.0.1:{port}/0").refused()
    assert f"Redis at redis://***@127.0.0.1:{port}/0: expected an answer" in sentence
    assert "Check redis.url and that Redis is up" in sentence
    assert PASSWORD not in sentence


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{PASSWORD}@{{}}/0",
        f"redis://somebody:{PASSWORD}@{{}}/0",
        f"redis://{{}}/0?password={PASSWORD}",
        "redis://{}/0",
    ],
)
def test_wrong_credentials_are_refused_and_never_shown(
    stage: Stage, redis_server: Callable[..., Server], url: str
) -> None:
    server = redis_server("--requirepass", "another")
    there = stage.having(redis__url=url.format(server.address))
    sentence = there.refused()
    assert "expected to be let in" in sentence
    assert "Check the user and password of redis.url" in sentence
    assert server.address in sentence
    assert not any(PASSWORD in program.log for program in there.programs.started)


# --- Kafka -------------------------------------------------------------------------------------------------


def topics_of(stage: Stage) -> set[str]:
    """Which of the test's topics exist."""

    async def ask() -> set[str]:
        async with KafkaAdmin(stage.kafka) as admin:
            return set(await admin.partition_counts())

    names = stage.names
    return asyncio.run(ask()) & {names.events, names.entered, names.exited, names.dead_letter}


@pytest.mark.parametrize("missing", [["events"], ["dead_letter"], ["entered", "exited"]])
def test_a_missing_topic_is_refused_and_not_created(
    stage: Stage, fresh_redis: str, kafka_bootstrap: str, missing: list[str]
) -> None:
    made = {"events", "entered", "exited", "dead_letter"} - set(missing)
    for name in made:
        asyncio.run(create_topic(kafka_bootstrap, getattr(stage.names, name)))
    with unchanged(fresh_redis):
        sentence = stage.having(redis__url=fresh_redis).refused()
    assert f"topic {getattr(stage.names, missing[0])}: expected the topic to exist" in sentence
    assert "Run `stream-app topics`" in sentence
    assert topics_of(stage) == {getattr(stage.names, name) for name in made}


def test_the_wall_clock_is_refused_on_a_topic_with_producers_times_unless_they_are_trusted(
    stage: Stage, fresh_redis: str
) -> None:
    wall = stage.having(redis__url=fresh_redis, worker__clock="wall")
    wall.create_topics("CreateTime")
    with unchanged(fresh_redis):
        sentence = wall.refused("--until-end")
    assert (
        f"topic {stage.names.events}, timestamp type: expected message.timestamp.type=LogAppendTime"
        in sentence
    )
    assert "got CreateTime" in sentence
    assert "Let `stream-app topics` create the topic" in sentence
    assert "worker.trust_create_time" in sentence
    wall.having(worker__trust_create_time="true").run("worker", "--until-end")


def test_records_with_producers_times_stop_the_wall_clock_whatever_the_topic_says(
    stage: Stage, fresh_redis: str, kafka_kind: Kind
) -> None:
    """The embedded broker never keeps to LogAppendTime; elsewhere a topic may be younger than its records."""
    wall = stage.having(redis__url=fresh_redis, worker__clock="wall")
    wall.create_topics("LogAppendTime" if kafka_kind == "embedded" else "CreateTime")
    send_events(wall, 0, 3)
    if kafka_kind != "embedded":
        asyncio.run(alter_topic(wall.kafka, wall.names.events, {"message.timestamp.type": "LogAppendTime"}))
    sentence = wall.refused("--until-end")
    assert f"topic {wall.names.events}, partition 0, offset 0: expected LogAppendTime" in sentence
    assert "CreateTime" in sentence
    assert "worker.trust_create_time" in sentence
    assert state(fresh_redis)["wm"]["watermark"] == "0"
    wall.having(worker__trust_create_time="true").run("worker", "--until-end")
    assert state(fresh_redis)["wm"]["watermark"] == "3"


# --- state of something else -------------------------------------------------------------------------------


async def claim_for_another(stage: Stage, url: str, **differs: object) -> None:
    """Write the watermark that a worker with these differences would have left behind."""
    async with KafkaAdmin(stage.kafka) as admin:
        cluster = (await admin.cluster()).cluster_id
    assert cluster is not None
    mine = Identity(cluster, stage.names.events, 1, stage.names.group, "event", WEIGHTS.fingerprint())
    store = ProfileStore(connect(url), "somebody")
    try:
        await store.claim(
            0,
            replace(mine, **differs),  # type: ignore[arg-type]
            last_epoch=0,
            log_start=0,
            processed_below=None,
            replay_when_new=None,
            definitions=(SEGMENTS.fingerprint, SEGMENTS.canonical_json()),
        )
    finally:
        await store.close()


@pytest.mark.parametrize(
    ("differs", "said"),
    [
        ({"topic": "another-topic"}, "got state of topic another-topic"),
        ({"partitions": 2}, "expected state of partitions 1, got state of partitions 2"),
        ({"group": "another-group"}, "got state of group another-group"),
        ({"clock": "wall"}, "expected state of clock event, got state of clock wall"),
    ],
    ids=["topic", "partitions", "group", "clock"],
)
def test_state_of_another_log_is_refused(
    stage: Stage, fresh_redis: str, differs: Mapping[str, object], said: str
) -> None:
    there = stage.having(redis__url=fresh_redis)
    there.create_topics()
    asyncio.run(claim_for_another(there, fresh_redis, **differs))
    with unchanged(fresh_redis):
        sentence = there.refused("--until-end")
    assert "key sa:{0}:wm: expected state of" in sentence
    assert said in sentence
    restore = (
        "Set worker.clock to 'wall'"
        if "of clock" in sentence
        else "Point redis.url at this service's own Redis"
    )
    assert restore in sentence
    assert "or run `stream-app rebuild`" in sentence


def test_state_of_the_same_log_is_taken_over(stage: Stage, fresh_redis: str) -> None:
    there = stage.having(redis__url=fresh_redis)
    there.create_topics()
    asyncio.run(claim_for_another(there, fresh_redis))
    there.run("worker", "--until-end")
    assert state(fresh_redis)["wm"]["epoch"] == "2"


@pytest.mark.faults
def test_a_broker_that_was_started_anew_under_a_lasting_redis_is_refused(
    settled: Stage,
    fresh_redis: str,
    kafka_server: Callable[..., Server],
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "a broker that lost everything, started anew under a lasting Redis",
        "the worker refuses with a sentence and changes nothing",
    )
    row.note("checked: exit 1, the sentence, every key of Redis as before")
    anew = settled.having(kafka__bootstrap_servers=kafka_server().address)
    anew.create_topics()
    with unchanged(fresh_redis):
        sentence = anew.refused("--until-end")
    assert "expected state of cluster id" in sentence


@pytest.mark.parametrize(
    "setting",
    [
        {"weights__half_life_s": "7200.0"},
        {"weights__history_floor": "0.002"},
        {"weights__event_types__buy__action_weight": "3.0"},
    ],
    ids=["half-life", "floor", "action weight"],
)
def test_sums_under_other_weights_are_refused_until_they_are_rebuilt(
    stage: Stage, fresh_redis: str, setting: Mapping[str, str]
) -> None:
    there = stage.having(redis__url=fresh_redis)
    there.create_topics()
    asyncio.run(claim_for_another(there, fresh_redis))
    with unchanged(fresh_redis):
        sentence = there.having(**setting).refused("--until-end")
    assert "key sa:{0}:wm: expected state of weights {" in sentence
    assert "restore the old [weights], or run `stream-app rebuild`" in sentence


def test_state_that_is_being_rebuilt_is_refused(stage: Stage, fresh_redis: str) -> None:
    there = stage.having(redis__url=fresh_redis)
    there.create_topics()
    asyncio.run(claim_for_another(there, fresh_redis))
    set_watermark(fresh_redis, rebuilding=1)
    with unchanged(fresh_redis):
        sentence = there.refused("--until-end")
    assert "a rebuild that was broken off" in sentence
    assert "Run `stream-app rebuild` again" in sentence


# --- a log that does not go on where the watermark stands --------------------------------------------------


def create_events_anew(stage: Stage) -> None:
    """Delete the events topic and create it again, empty."""

    async def anew() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=stage.kafka)
        await admin.start()
        try:
            await admin.delete_topics([stage.names.events])
            deadline = time.monotonic() + 20
            while stage.names.events in await admin.list_topics():
                assert time.monotonic() < deadline, "the topic is still there"
                await asyncio.sleep(0.05)
        finally:
            await admin.close()
        await create_topic(stage.kafka, stage.names.events)

    asyncio.run(anew())


@pytest.mark.faults
def test_a_log_that_was_created_anew_is_refused_unless_the_gap_is_accepted(
    settled: Stage, fresh_redis: str, fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(
        "the events topic deleted and created again, shorter than what was folded",
        "refused with a sentence; --accept-gap keeps the profiles and folds the new log",
    )
    row.note(
        "checked: exit 1, the sentence, users and members as before; then each transition of the new log"
    )
    # As a rebuild leaves it: what lies below was said once. It is not about the log that follows.
    set_watermark(fresh_redis, replayed_below=10)
    create_events_anew(settled)
    send_events(settled, 600, 3)
    before = state(fresh_redis)
    sentence = settled.refused("--until-end")
    assert "expected a watermark within the log, offsets 0 to 3, got watermark 10" in sentence
    assert f"topic {settled.names.events}, partition 0" in sentence
    assert "run `stream-app rebuild`" in sentence
    assert "--accept-gap" in sentence
    after = state(fresh_redis)
    assert after["wm"]["watermark"] == "10"
    assert (after["users"], after["members"]) == (before["users"], before["members"])

    settled.run("worker", "--until-end", "--accept-gap")
    after = state(fresh_redis)
    assert (after["wm"]["watermark"], after["users"]) == ("3", before["users"])
    names = settled.names
    said = asyncio.run(read_to_end(settled.kafka, names.entered, names.exited))
    causes = [(m["cause"], m["seq"], m["replayed"]) for m in (json.loads(record.value) for record in said)]
    assert causes == [("event", 1, False), ("event", 3, False), ("decay", 2, False)]


def delete_records(bootstrap: str, topic: str, before_offset: int) -> None:
    """Let the log of partition 0 begin at an offset, as retention would."""

    async def delete() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap, request_timeout_ms=10_000)
        await admin.start()
        try:
            await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(before_offset)})
        finally:
            await admin.close()

    asyncio.run(delete())


@pytest.mark.faults
def test_records_deleted_before_they_were_folded_are_refused_unless_the_gap_is_accepted(
    request: pytest.FixtureRequest,
    kafka_kind: Kind,
    fresh_redis: str,
    kafka_bootstrap: str,
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "retention overtakes the watermark (DeleteRecords)",
        "refused with a sentence that counts what is gone; --accept-gap goes on with the rest",
    )
    if kafka_kind == "embedded":
        pytest.skip("Tansu cannot delete records: the log never begins above 0")
    row.note(
        "checked: exit 1, the sentence, users and watermark as before; then the watermark at the log's end"
    )
    settled: Stage = request.getfixturevalue("settled")
    send_events(settled, 10, 30)
    delete_records(kafka_bootstrap, settled.names.events, 25)
    before = state(fresh_redis)
    sentence = settled.refused("--until-end")
    assert "expected a watermark within the log, offsets 25 to 40, got watermark 10" in sentence
    assert "15 records were deleted by retention before they were folded" in sentence
    assert "start with --accept-gap to go on without them" in sentence
    assert state(fresh_redis)["wm"]["watermark"] == "10"
    assert state(fresh_redis)["users"] == before["users"]

    settled.run("worker", "--until-end", "--accept-gap")
    assert state(fresh_redis)["wm"]["watermark"] == "40"


# --- configuration -----------------------------------------------------------------------------------------


def test_faust_settings_from_the_environment_are_refused(stage: Stage) -> None:
    environment = {
        **stage.environment,
        "STREAM_WAIT_EMPTY": "1",
        "BROKER_URL": f"kafka://user:{PASSWORD}@elsewhere",
        "PROCESSING_GUARANTEE": "exactly_once",
    }
    log = replace(stage, environment=environment).run("worker", status=2)
    assert "The configuration has 3 problems:" in log
    for name in ("STREAM_WAIT_EMPTY", "BROKER_URL", "PROCESSING_GUARANTEE"):
        assert f"environment: {name}: expected not to be set, since Faust would put it over" in log
    assert PASSWORD not in log
    assert "Traceback" not in log


def test_all_problems_of_all_sources_are_reported_at_once_and_nothing_is_started(
    stage: Stage, fresh_redis: str
) -> None:
    (stage.directory / "app.toml").write_text(
        """
        [kafka]
        topics = "events"
        [worker]
        clock = "sun"
        max_dead_letter_share = 2.0
        [weights]
        history_floor = 0.05
        [weights.event_types.buy]
        action_weight = 0.2
        """
    )
    (stage.directory / "segments.toml").write_text(
        """
        [[segments]]
        id = "tea"
        labels = ["tea"]
        min_weight = 1.0
        exit_weight = 2.0
        [[segments]]
        id = "empty"
        labels = []
        [[segments]]
        id = "a"
        labels = ["a"]
        exclude = ["b"]
        [[segments]]
        id = "b"
        labels = ["b"]
        exclude = ["a"]
        [[segments]]
        id = "typo"
        label = ["typo"]
        """
    )
    there = stage.having(
        redis__url=fresh_redis,
        redis__passwort=PASSWORD,
        worker__hold_deadline_s="soon",
        kafka__exited_topic=stage.names.entered,
    )
    with unchanged(fresh_redis):
        log = there.run("worker", "--until-end", status=2)
    for where, what in (
        ("[kafka] topics", "an unknown key"),
        ("[worker] clock", "got 'sun'"),
        ("[worker] max_dead_letter_share", "got 2.0"),
        ("[weights.event_types.buy] action_weight", "at least 10 history floors"),
        ("STREAM_APP__REDIS__PASSWORT", "got an unknown one"),
        ("STREAM_APP__WORKER__HOLD_DEADLINE_S", "got 'soon'"),
        ("STREAM_APP__KAFKA__EXITED_TOPIC", "expected four different topics"),
        ("segment 'tea', exit_weight", "got 2.0"),
        ("segment 'empty', labels", "got none"),
        ("exclude", "cycle"),
        ("segment 'typo', label", "an unknown key"),
    ):
        assert any(where in line and what in line for line in log.splitlines()), (where, what, log)
    assert PASSWORD not in log
    assert "Traceback" not in log
    assert topics_of(there) == set()


@pytest.mark.parametrize("file", ["app.toml", "segments.toml"])
@pytest.mark.parametrize(
    "content", [b"[worker\nclock", b"\xff\xfe", None], ids=["broken", "binary", "missing"]
)
def test_a_file_that_cannot_be_read_never_starts_a_worker(
    stage: Stage, file: str, content: bytes | None
) -> None:
    path = stage.directory / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    log = stage.run("worker", status=2)
    assert f"{path}: expected " in log
    assert "Operator action: Correct what is listed and start again; nothing was started." in log
    assert "Traceback" not in log


def test_an_unknown_option_is_wrong_use(stage: Stage) -> None:
    log = stage.run("worker", "--until-ends", status=2)
    assert "--until-ends" in log
    assert "Traceback" not in log
