"""Locked doors: the whole service over SASL, TLS and a Redis user of few rights; what is told of a wrong key.

Apache Kafka and redis-server have the locks. The embedded broker knows neither SASL nor TLS: with it the
half of Redis runs alone.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
from redis.exceptions import NoPermissionError

from stream_app.adapters.checks import check_redis
from stream_app.adapters.functions import load
from stream_app.adapters.profile_store import Commit, Identity, ProfileStore
from stream_app.adapters.rebuild import forget_everything
from stream_app.adapters.redis_client import connect
from stream_app.core.decay import Weights
from stream_app.errors import StartRefused
from stream_app.lookup import Lookup
from tests.backends import ROOT, Kind, Names, ServiceMissing, create_topic, read_to_end
from tests.conftest import missing
from tests.e2e.proof import prove
from tests.faults.certificates import HOST, Authority
from tests.faults.cluster import RedisCluster
from tests.faults.locks import (
    DESCRIBE_CONFIGS,
    KAFKA_SECRET,
    READ,
    REDIS_SECRET,
    USER,
    WRITE,
    LockedKafka,
    LockedRedis,
    documented_rules,
    documented_rules_in_a_cluster,
    locked_kafka,
    locked_redis,
    needed,
)
from tests.faults.rows import Row
from tests.faults.stage import FaultStage
from tests.integration.stage import SEGMENTS, event_clock_case, synthetic_events
from tests.poison import BAD_EXAMPLES, MAX_SENT_BYTES
from tests.processes import Program, Programs

pytestmark = pytest.mark.faults

EVENTS = 1_500
SOMEBODY = synthetic_events(1, 1)[0]["user_id"]
#: Far more than a refusal takes, so that only an endless retry fails.
SECONDS = 45.0
RIGHTS = documented_rules()
READERS = ROOT / "stream_app" / "lookup" / "README.md"

FaultRow = Callable[[str, str], Row]


@dataclass(frozen=True, slots=True)
class Doors:
    """The servers of these tests; `kafka` is None where the broker has no locks."""

    kafka: LockedKafka | None
    redis: LockedRedis
    plain_kafka: str

    def settings(self) -> dict[str, object]:
        """How a service is let in everywhere."""
        return {**(self.kafka.settings() if self.kafka else {}), **self.redis.settings()}


@pytest.fixture(scope="module")
def doors(
    kafka_kind: Kind, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Doors]:
    directory = tmp_path_factory.mktemp("locks")
    with ExitStack() as stack:
        try:
            kafka = stack.enter_context(locked_kafka(directory)) if kafka_kind == "apache" else None
            authority = kafka.authority if kafka else Authority(directory)
            store = stack.enter_context(locked_redis(authority, authority.issue("redis")))
        except ServiceMissing as exc:
            missing(str(exc))
        plain = kafka.plain if kafka else request.getfixturevalue("kafka_bootstrap")
        yield Doors(kafka, store, plain)


@pytest.fixture
def kafka(doors: Doors) -> LockedKafka:
    if doors.kafka is None:
        pytest.skip("the broker of this run knows neither SASL nor TLS; TEST_BACKEND=apache has both")
    return doors.kafka


@pytest.fixture
def make_stage(doors: Doors, programs: Programs, tmp_path: Path) -> Callable[..., FaultStage]:
    """Build a stage whose judge has the plain doors and whose service only the locked ones."""

    def make(**settings: object) -> FaultStage:
        names = Names.unique()
        doors.redis.admit(RIGHTS[USER])
        with redis.Redis.from_url(doors.redis.plain) as client:
            client.flushall()
        if doors.kafka is not None:
            doors.kafka.allow(*needed(names))
        directory = tmp_path / names.group
        directory.mkdir()
        case = event_clock_case(doors.plain_kafka, doors.redis.plain, names)
        return FaultStage.build(case, programs, directory, partitions=2, **{**doors.settings(), **settings})

    return make


# --- it works ----------------------------------------------------------------------------------------------


def test_the_whole_service_works_behind_locked_doors_with_no_more_rights_than_the_readme_names(
    doors: Doors, make_stage: Callable[..., FaultStage], tmp_path: Path, fault_row: FaultRow
) -> None:
    over = "Kafka over SASL_SSL (SCRAM-SHA-512) with ACLs, " if doors.kafka else ""
    row = fault_row(
        f"{over}Redis over TLS, an ACL user who may use `sa:*` and the commands in use",
        "the end-to-end proof holds: replay, worker, rebuild, worker again",
    )
    stage = make_stage()
    with redis.Redis.from_url(doors.redis.plain) as judge:
        judge.config_resetstat()
        send_file(stage, tmp_path, synthetic_events(1, EVENTS))
        stage.run("worker", "--until-end")
        used = commands_used(judge)
        row.judge(stage.proven(lambda *_: None))
        judge.config_resetstat()
        stage.run("doctor")
        stage.run("show", SOMEBODY)
        stage.run("segments", "list")
        stage.run("segments", "members", SEGMENTS[0]["id"])
        stage.run("rebuild", "--model", "--yes")
        stage.run("rebuild", "--yes")
        used |= commands_used(judge)
    stage.run("worker", "--until-end")
    again = row.judge(stage.proven(lambda *_: None))
    assert again.repeats == again.transitions == again.replayed
    control = make_stage()
    control.fill(EVENTS)
    control.lose_what_a_worker_publishes()
    row.control("outbox off, killed after a commit", prove(control.case))
    rights = {word.removeprefix("+") for word in RIGHTS[USER].split() if word.startswith("+")}
    in_scripts = set()
    for script in (ROOT / "stream_app" / "adapters").glob("*.lua"):
        in_scripts |= {name.lower() for name in re.findall(r"redis\.call\('(\w+)'", script.read_text())}
    assert rights <= used | in_scripts


def test_a_certificate_of_our_own_lets_us_in_where_the_server_wants_one(
    doors: Doors, make_stage: Callable[..., FaultStage]
) -> None:
    stage = make_stage()
    ours = doors.redis.authority.issue("client", "stream-app")
    with redis.Redis.from_url(doors.redis.plain) as judge:
        judge.config_set("tls-auth-clients", "yes")
        try:
            said = refused(stage, "worker", "--until-end")
            files: dict[str, Any] = {
                "redis__ssl_cert_file": ours.certificate,
                "redis__ssl_key_file": ours.key,
            }
            stage.run("worker", "--until-end", **files)
        finally:
            judge.config_set("tls-auth-clients", "no")
    assert "redis" in said.lower()


def test_kafka_may_want_a_certificate_instead_of_a_password(
    kafka: LockedKafka, make_stage: Callable[..., FaultStage]
) -> None:
    ours = kafka.authority.issue("kafka-client", USER)
    certificate = {
        "kafka__bootstrap_servers": kafka.mutual,
        "kafka__security_protocol": "SSL",
        "kafka__ssl_cert_file": ours.certificate,
        "kafka__ssl_key_file": ours.key,
        "kafka__sasl_mechanism": "",
        "kafka__sasl_username": "",
        "kafka__sasl_password": "",
    }
    stage = make_stage(**certificate)
    stage.send(synthetic_events(1, 300))
    stage.run("worker", "--until-end")
    stage.proven(lambda *_: None)
    assert "TLS" in refused(stage, "topics", kafka__ssl_cert_file="", kafka__ssl_key_file="")


def test_apps_look_up_over_tls_with_the_rights_of_a_reader(
    doors: Doors, make_stage: Callable[..., FaultStage]
) -> None:
    stage = make_stage()
    stage.send(synthetic_events(1, 300))
    stage.run("worker", "--until-end")
    (rights,) = re.findall(r"`ACL SETUSER app on >secret ([^`]+)`", READERS.read_text())
    doors.redis.admit(rights)
    secret = quote(REDIS_SECRET, safe="")
    url = f"rediss://{USER}:{secret}@{doors.redis.host_and_port}/0?ssl_ca_certs={doors.redis.authority.file}"
    with Lookup(url) as lookup:
        view = lookup.user(SOMEBODY)
        assert view is not None
        assert lookup.segments(SOMEBODY) == view.segments
        assert lookup.is_member(SOMEBODY, "nothing") is False
        assert lookup.member_count(SEGMENTS[0]["id"]) == len(list(lookup.members(SEGMENTS[0]["id"])))
        lookup.accuracy()
    with redis.Redis.from_url(url) as reader:
        prefix = f"sa:{{{view.partition}}}"
        now = stage.wm(view.partition)["stream_time_ms"]
        assert reader.execute_command("FCALL_RO", "sa_weights", 1, f"{prefix}:profile:{SOMEBODY}", now)
        with pytest.raises(NoPermissionError):
            reader.delete(f"{prefix}:profile:{SOMEBODY}")
    with Lookup(url.replace(secret, "wrong")) as lookup, pytest.raises(StartRefused, match="to be let in"):
        lookup.user(SOMEBODY)
    with (
        Lookup(url.partition("?")[0]) as lookup,
        pytest.raises(StartRefused, match="a certificate that can be trusted"),
    ):
        lookup.user(SOMEBODY)


async def test_in_a_cluster_the_rights_that_the_readme_adds_are_enough(redis_masters: RedisCluster) -> None:
    weights = Weights()
    identity = Identity("cluster", "events", 4, "group", "event", weights.fingerprint())
    for server in redis_masters.masters:
        with redis.Redis.from_url(f"redis://{server.address}") as node:
            node.flushall()
            rules = documented_rules_in_a_cluster().split()
            node.execute_command("ACL", "SETUSER", USER, "reset", "on", ">secret", *rules)
    url = redis_masters.url.replace("redis://", f"redis://{USER}:secret@")
    client = connect(url, cluster=True)
    store = ProfileStore(client, "worker-a")
    assert [finding.state for finding in await check_redis(client, "a cluster")] == ["ok"] * 3
    for partition in range(4):  # in slots of all three masters
        await store.claim(
            partition,
            identity,
            last_epoch=0,
            log_start=0,
            processed_below=None,
            replay_when_new=None,
            definitions=("fingerprint", "{}"),
        )
        await store.commit(partition, 1, 1, Commit(watermark=1, outbox=[b"message"]))
        assert [page async for page in store.outbox(partition)] == [[b"message"]]
        await store.trim(partition, 1, 1)
        await store.load(partition, ["somebody"])
    await load(client, weights, "event")
    assert [page async for page in store.scan_users(100)] == []
    with Lookup(url, cluster=True) as lookup:
        assert lookup.user("somebody") is None
    assert await forget_everything(client, 4, lambda *_: None) == 9  # four wm, four definitions, sa:meta
    await client.aclose()


# --- a wrong key is one sentence ---------------------------------------------------------------------------

REDIS_FAULTS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "wrong secret": (("worker", "--until-end"), "expected to be let in"),
    "wrong secret, a reader": (("show", SOMEBODY), "expected to be let in"),
    "unknown authority": (("worker", "--until-end"), "unable to get local issuer certificate|self-signed"),
    "expired": (("worker", "--until-end"), "certificate has expired"),
    "expired, a reader": (("segments", "list"), "certificate has expired"),
    "another host's": (("worker", "--until-end"), f"not valid for '{HOST}'"),
    "no TLS there": (("worker", "--until-end"), "expected an answer|expected a TLS connection"),
    "TLS there": (("worker", "--until-end"), "expected an answer"),
}


@pytest.mark.parametrize("fault", REDIS_FAULTS)
def test_a_redis_that_does_not_let_us_in_or_cannot_be_trusted_is_one_sentence(
    doors: Doors, make_stage: Callable[..., FaultStage], fault: str
) -> None:
    stage = make_stage()
    authority = doors.redis.authority
    arguments, expected = REDIS_FAULTS[fault]
    with ExitStack() as stack:
        changes: dict[str, object] = {}
        if "wrong secret" in fault:
            changes = {"redis__password": "wrong"}
        elif fault == "unknown authority":
            changes = {"redis__ssl_ca_file": ""}
        elif fault == "no TLS there":
            changes = {"redis__url": doors.redis.plain.replace("redis://", f"rediss://{USER}@")}
        elif fault == "TLS there":
            url = f"redis://{USER}@{doors.redis.host_and_port}/0"
            changes = {"redis__url": url, "redis__ssl_ca_file": ""}
        else:
            hosts = ["redis.example"] if "host" in fault else []
            wrong = authority.issue(fault.replace(" ", "-"), *hosts, expired="expired" in fault)
            other = stack.enter_context(locked_redis(authority, wrong))
            other.admit(RIGHTS[USER])
            changes = {"redis__url": f"rediss://{USER}@{other.host_and_port}/0"}
        assert re.search(expected, refused(stage, *arguments, **changes))


KAFKA_FAULTS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "wrong secret": (("worker", "--until-end"), "expected to be let in"),
    "wrong secret, PLAIN": (("topics",), "expected to be let in"),
    "expired": (("worker", "--until-end"), "certificate has expired"),
    "another host's": (("topics",), f"not valid for '{HOST}'"),
    "unknown authority": (("rebuild", "--yes"), "unable to get local issuer certificate|self-signed"),
    "another mechanism": (("topics",), "with SCRAM-SHA-256, got UnsupportedSaslMechanismError"),
    "no TLS there": (("topics",), "kafka.security_protocol"),
}


@pytest.mark.parametrize("fault", KAFKA_FAULTS)
def test_a_kafka_that_does_not_let_us_in_or_cannot_be_trusted_is_one_sentence(
    kafka: LockedKafka, make_stage: Callable[..., FaultStage], fault: str
) -> None:
    stage = make_stage()
    arguments, expected = KAFKA_FAULTS[fault]
    changes = {
        "wrong secret": {"kafka__sasl_password": "wrong"},
        "wrong secret, PLAIN": {"kafka__sasl_password": "wrong", "kafka__sasl_mechanism": "PLAIN"},
        "expired": {"kafka__bootstrap_servers": kafka.expired},
        "another host's": {"kafka__bootstrap_servers": kafka.elsewhere},
        "unknown authority": {"kafka__ssl_ca_file": ""},
        "another mechanism": {"kafka__sasl_mechanism": "SCRAM-SHA-256"},
        "no TLS there": {"kafka__bootstrap_servers": kafka.plain},
    }[fault]
    assert re.search(expected, refused(stage, *arguments, **changes))


# --- a right that is missing is one sentence ---------------------------------------------------------------

#: A right of Redis, who needs it, and what it is needed for.
MISSING_IN_REDIS = (
    ("+evalsha", ("worker", "--until-end"), "evalsha"),
    ("+mget", ("worker", "--until-end"), "mget"),
    ("+xadd", ("worker", "--until-end"), "xadd"),
    ("+info", ("worker", "--until-end"), "leave to ask for INFO"),
    ("~sa:*", ("worker", "--until-end"), "key"),
    ("+get", ("show", SOMEBODY), "get"),
    ("+unlink", ("rebuild", "--yes"), "unlink"),
)


@pytest.mark.parametrize(("right", "arguments", "named"), MISSING_IN_REDIS, ids=str)
def test_a_right_that_redis_does_not_give_is_one_sentence(
    doors: Doors,
    make_stage: Callable[..., FaultStage],
    right: str,
    arguments: tuple[str, ...],
    named: str,
) -> None:
    stage = make_stage()
    stage.send(synthetic_events(1, 300))
    if arguments[0] != "worker":
        stage.run("worker", "--until-end")
    doors.redis.admit(" ".join(word for word in RIGHTS[USER].split() if word != right))
    assert named in refused(stage, *arguments)


def test_without_the_right_to_load_functions_the_worker_says_so_and_goes_on(
    doors: Doors, make_stage: Callable[..., FaultStage]
) -> None:
    stage = make_stage()
    stage.send(synthetic_events(1, 300))
    with redis.Redis.from_url(doors.redis.plain) as judge:
        judge.function_flush()
    doors.redis.admit(RIGHTS[USER].replace("+function|load ", ""))
    log = stage.run("worker", "--until-end")
    assert log.count("function library stream_app: expected a user who may load it") == 1
    stage.proven(lambda *_: None)


#: What Kafka does not allow, on which resource, and who needs it.
MISSING_IN_KAFKA = (
    ("group", READ, ("worker", "--until-end"), "GroupAuthorizationFailedError"),
    ("events", READ, ("worker", "--until-end"), "TopicAuthorizationFailedError"),
    ("events", DESCRIBE_CONFIGS, ("worker", "--until-end"), "TopicAuthorizationFailedError"),
    ("entered", WRITE, ("worker", "--until-end"), "no such topic, or not for this user"),
    ("events", WRITE, ("replay", "-"), "TopicAuthorizationFailedError"),
)


@pytest.mark.parametrize(("resource", "operation", "arguments", "named"), MISSING_IN_KAFKA, ids=str)
def test_a_right_that_kafka_does_not_give_is_one_sentence(
    kafka: LockedKafka,
    make_stage: Callable[..., FaultStage],
    tmp_path: Path,
    resource: str,
    operation: int,
    arguments: tuple[str, ...],
    named: str,
) -> None:
    stage = on_other_topics(make_stage())
    names = stage.case.names
    kafka.allow(
        *(
            (kind, name, [o for o in operations if (name, o) != (getattr(names, resource), operation)])
            for kind, name, operations in needed(names)
        )
    )
    stage.send(synthetic_events(1, 300))
    if arguments[0] == "replay":
        arguments = ("replay", str(events_file(tmp_path, synthetic_events(2, 10))))
    assert named in refused(stage, *arguments)


# --- secrets and user data are in no output ----------------------------------------------------------------


@pytest.mark.parametrize("kept_in", ["environment", "files"])
def test_no_secret_is_in_anything_that_a_command_prints(
    doors: Doors, make_stage: Callable[..., FaultStage], tmp_path: Path, programs: Programs, kept_in: str
) -> None:
    settings: dict[str, object] = {}
    if kept_in == "files":
        for section, key, secret in (
            ("kafka", "sasl_password", KAFKA_SECRET),
            ("redis", "password", REDIS_SECRET),
        ):
            (tmp_path / section).write_text(f"{secret}\n")
            if section == "redis" or doors.kafka is not None:
                settings |= {f"{section}__{key}": "", f"{section}__{key}_file": tmp_path / section}
    else:
        user = f"{USER}:{quote(REDIS_SECRET, safe='')}"
        settings = {"redis__url": f"rediss://{user}@{doors.redis.host_and_port}/0", "redis__password": ""}
    stage = make_stage(**settings)
    send_file(stage, tmp_path, synthetic_events(1, 300))
    stage.run("worker", "--until-end", worker__clock="event")
    stage.run("topics", "--json")
    stage.run("doctor")
    stage.run("doctor", "--json")
    stage.run("show", SOMEBODY, "--json")
    stage.run("segments", "list", "--json")
    stage.run("rebuild", "--yes")
    # And when it fails: nothing there, no TLS, no right, a wrong configuration.
    gone: dict[str, Any] = {"redis__url": f"rediss://{USER}@127.0.0.1:1/0"} if kept_in == "files" else {}
    stage.run("doctor", "--json", status=1, kafka__bootstrap_servers="127.0.0.1:1", **gone)
    stage.run("show", SOMEBODY, status=1, **(gone or {"redis__ssl_ca_file": ""}))
    stage.run("worker", status=2, worker__clock="sun", redis__ssl_key_file=tmp_path / "none")
    doors.redis.admit("~sa:* +info")
    stage.run("worker", "--until-end", status=1)
    stage.run("doctor", "--json", status=1)
    assert len(programs.started) >= 13
    for program in programs.started:
        for form in forms(KAFKA_SECRET) | forms(REDIS_SECRET):
            assert form not in program.log, f"{program.name} tells a secret"


def test_user_data_reaches_no_log_line_and_hostile_ids_reach_no_other_key(
    make_stage: Callable[..., FaultStage], fault_row: FaultRow
) -> None:
    row = fault_row(
        "user ids that imitate keys, hash tags, globs and protocol; line breaks, 128 emoji, bad records",
        "each user has his own keys and no other key exists; no id, label or event is in a log line",
    )
    stage = make_stage()
    events = [
        {**event, "user_id": user, "labels": ["red", label], "event_id": f"{event['event_id']}-secret-event"}
        for user in HOSTILE_IDS
        for event, label in zip(synthetic_events(7, 6, users=1), HOSTILE_LABELS * 2, strict=True)
    ]
    stage.send([event for n in range(6) for event in events[n::6]])
    worker = stage.start("worker", "--until-end")
    assert worker.wait(90) == 0, worker.log
    row.judge(stage.proven(lambda *_: None))
    keys = stored_keys(stage)
    assert keys == expected_keys(stage, HOSTILE_IDS)
    # What must not be stored at all; the judge's oracle does not read these.
    bad = [(e.key, e.value) for e in BAD_EXAMPLES if e.key and e.value and not e.headers]
    bad = [(key, value) for key, value in bad if len(value) < MAX_SENT_BYTES]
    for user in UNFIT_IDS:
        value = json.dumps({**events[0], "user_id": user}).encode()
        bad.append((user.encode(), value))
    stage.append(bad)
    second = stage.start("worker", "--until-end")
    assert second.wait(90) == 0, second.log
    assert f"folded 0 events, set {len(bad)} records aside" in second.log
    assert stored_keys(stage) == keys
    row.note(f"{len(HOSTILE_IDS)} ids, {len(bad)} bad records")
    for program in (worker, second):
        for told in told_of_users():
            assert told not in program.log, f"{program.name} tells user data: {told!r}"
    control = make_stage()
    control.send(events)
    control.lose_what_a_worker_publishes(1)
    row.control("outbox off, killed after a commit", prove(control.case))


HOSTILE_IDS = (
    "victim-qzx1",
    "{0}-tag-qzx1",
    "}:profile:victim-qzx1",
    "x}:wm-qzx1",
    "sa:{1}:wm",
    "0}:due:qzx1",
    "victim-qzx1:next",
    "with spaces qzx1 ",
    " qzx1 lead",
    "*?[a-z]qzx1",
    "\\r\\nqzx1",
    "line\u2028separatorqzx1",
    "quote'\"qzx1",
    "\u202eqzx1rtl",
    "--flagqzx1",
    "🛒" * 128,
    "é" * 128,
)
#: Control characters are refused, and what is too long.
UNFIT_IDS = ("evil\nqzx2", "evil\r\nSET qzx2", "evil\x00qzx2", "evil\x1b[2Jqzx2", "e" * 125 + "qzx2")
HOSTILE_LABELS = ["label-qzx3 {0}", "label-qzx3\u2028x", "label-qzx3 %s %(x)s"]


# --- helpers -----------------------------------------------------------------------------------------------


def refused(stage: FaultStage, *arguments: str, **changes: object) -> str:
    """Run a command that must fail soon, with one sentence and no traceback; returns the sentence."""
    began_s = time.monotonic()
    program: Program = stage.start(*arguments, **changes)
    status = program.wait(SECONDS)
    seconds = time.monotonic() - began_s
    log = program.log
    print(f"{' '.join(arguments)}: {status} after {seconds:.1f} s: {log.strip().splitlines()[-1]}")
    assert status == 1, log
    assert "Traceback" not in log, log
    sentences = [line for line in log.splitlines() if "Operator action: " in line]
    assert len(sentences) == 1, log
    assert ": expected " in sentences[0], log
    assert ", got " in sentences[0], log
    for form in forms(KAFKA_SECRET) | forms(REDIS_SECRET):
        assert form not in log
    return sentences[0]


def forms(secret: str) -> set[str]:
    """The ways in which a secret could be written down."""
    plain = secret.encode()
    sasl = f"\0{USER}\0{secret}".encode()
    return {
        secret,
        quote(secret),
        quote(secret, safe=""),
        repr(secret)[1:-1],
        json.dumps(secret)[1:-1],
        plain.hex(),
        base64.b64encode(plain).decode().rstrip("="),
        base64.b64encode(sasl).decode().rstrip("="),
    }


def on_other_topics(stage: FaultStage) -> FaultStage:
    """The same with topics and a group of which Kafka allows nothing yet."""
    names = Names.unique()
    for topic in (names.events, names.entered, names.exited, names.dead_letter):
        asyncio.run(create_topic(stage.case.kafka, topic, stage.partitions))
    environment = {**stage.environment, **names.environment()}
    return replace(stage, case=replace(stage.case, names=names), environment=environment)


def events_file(directory: Path, events: Sequence[Mapping[str, Any]]) -> Path:
    path = directory / "events.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def send_file(stage: FaultStage, directory: Path, events: Sequence[Mapping[str, Any]]) -> None:
    stage.run("replay", str(events_file(directory, events)))


def commands_used(client: Any) -> set[str]:
    """What clients have run, scripts included, since the figures were last reset."""
    return {
        name.removeprefix("cmdstat_") for name, stat in client.info("commandstats").items() if stat["calls"]
    }


def stored_keys(stage: FaultStage) -> set[str]:
    """Names of all keys, but for those that come and go with what waits."""
    with redis.Redis.from_url(stage.case.redis_url) as client:
        return {key.decode() for key in client.scan_iter(count=1000)}


def expected_keys(stage: FaultStage, users: Sequence[str]) -> set[str]:
    """Names of the keys that these users and the definitions can have, in the partitions that Kafka chose."""
    log = asyncio.run(read_to_end(stage.case.kafka, stage.case.names.events))
    partition = {record.key.decode(): record.partition for record in log}
    found = stored_keys(stage)
    fixed = {"sa:meta"}
    for p in range(stage.partitions):
        names = ("wm", "due", "definitions", "scored", "model", "model-deltas")
        fixed |= {f"sa:{{{p}}}:{name}" for name in names}
        fixed |= {f"sa:{{{p}}}:members:{segment['id']}" for segment in SEGMENTS}
    own = {f"sa:{{{partition[user]}}}:{kind}:{user}" for user in users for kind in ("profile", "next")}
    # A set that is empty is no key; a user's own keys must all be there.
    return own | (fixed & found)


def told_of_users() -> set[str]:
    """Marks of user data, in the forms in which a log could have them."""
    texts = {user for user in (*HOSTILE_IDS, *UNFIT_IDS) if user != "sa:{1}:wm"} | set(HOSTILE_LABELS)
    texts |= {"qzx1", "qzx2", "qzx3", "-secret-event", "🛒", "Bag Snacks"}
    return texts | {repr(text)[1:-1] for text in texts} | {json.dumps(text)[1:-1] for text in texts}
