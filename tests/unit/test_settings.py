"""Configuration: what is accepted, which source wins, and that every problem is told, without secrets."""

from __future__ import annotations

import ast
import ssl
import tomllib
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import trustme
from pydantic import ValidationError
from redis.asyncio.connection import parse_url

from stream_app.adapters.kafka_security import security_of
from stream_app.core.decay import EventTypeWeight
from stream_app.core.segment_advice import advice
from stream_app.errors import ConfigError, HoldExpired, StoreUnavailable
from stream_app.settings import (
    KafkaSettings,
    RedisSettings,
    Settings,
    WorkerSettings,
    faust_environment_problems,
    load_settings,
    unlocking_environment,
)

Load = Callable[..., Settings]
Problems = Callable[..., list[str]]

SHIPPED = Path(__file__).parents[2] / "config"
SNACKERS = '[[segments]]\nid = "snackers"\nlabels = ["Bag Snacks"]\nmin_weight = 2\n'


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Return a function that writes both files and loads them."""

    def load_texts(
        app: str = "", segments: str = SNACKERS, environ: Mapping[str, str] | None = None
    ) -> Settings:
        (tmp_path / "app.toml").write_text(app)
        (tmp_path / "segments.toml").write_text(segments)
        return load_settings(tmp_path / "app.toml", tmp_path / "segments.toml", environ or {})

    return load_texts


@pytest.fixture
def problems(load: Load, tmp_path: Path) -> Problems:
    """Return a function that loads what must be refused and returns its problems, paths cut to names."""

    def refused(
        app: str = "", segments: str = SNACKERS, environ: Mapping[str, str] | None = None
    ) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(app, segments, environ)
        return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]

    return refused


# What is accepted


def test_the_shipped_app_toml_says_the_defaults_and_nothing_else() -> None:
    settings = load_settings(SHIPPED / "app.toml", SHIPPED / "segments.toml", {})
    assert settings == Settings(segments=settings.segments)


def test_the_shipped_app_toml_names_every_key() -> None:
    text = (SHIPPED / "app.toml").read_text().replace("# ", "")
    for section, model in Settings.model_fields.items():
        if section != "segments":
            assert f"\n[{section}]\n" in text
            for key in type(model.default).model_fields:
                assert f"\n{key} = " in text or key == "event_types", key
    assert "\n[weights.event_types.purchase]\naction_weight = 1.0" in text


def test_the_shipped_segments_show_every_kind_of_criterion_and_draw_no_advice() -> None:
    settings = load_settings(SHIPPED / "app.toml", SHIPPED / "segments.toml", {})
    segments = settings.segments
    assert any(s.labels and s.match_labels == "any" and not s.asset_ids for s in segments)
    assert any(s.labels and s.match_labels == "all" for s in segments)
    assert any(s.asset_ids and s.match_assets == "any" and not s.labels for s in segments)
    assert any(s.asset_ids and s.match_assets == "all" for s in segments)
    assert any(s.labels and s.asset_ids for s in segments)
    assert any(s.event_types and not s.labels and not s.asset_ids for s in segments)
    assert any(s.event_types and s.labels for s in segments)
    assert any(s.min_weight == 0 for s in segments)
    assert any(s.exit_weight is not None and s.exit_weight < s.min_weight for s in segments)
    excluding = {s.id: s.exclude for s in segments if s.exclude}
    assert any(other in excluding for exclude in excluding.values() for other in exclude)
    assert advice(segments, settings.weights.core) == []


def test_every_shipped_segment_is_explained_above_its_id() -> None:
    for table in (SHIPPED / "segments.toml").read_text().split("[[segments]]\n")[1:]:
        assert table.startswith("# ")


def test_numbers_may_be_written_without_a_point(load: Load) -> None:
    settings = load("[weights]\nhalf_life_s = 60\n[worker]\nmax_future_skew_s = 0\n")
    assert settings.weights.half_life_s == 60.0
    assert settings.worker.max_future_skew_s == 0.0
    assert settings.segments[0].min_weight == 2.0


def test_event_types_reach_the_core(load: Load) -> None:
    weights = load(
        "[weights.event_types.purchase]\naction_weight = 3\n[weights.event_types.view]\nhalf_life_s = 60\n"
    ).weights.core
    assert weights.event_types == {
        "purchase": EventTypeWeight(action_weight=3.0),
        "view": EventTypeWeight(half_life_s=60.0),
    }
    assert weights.action_weight("view") == 1.0


def test_no_segments_at_all_are_a_valid_answer(load: Load) -> None:
    assert load(segments="").segments == ()


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        WorkerSettings().clock = "event"


def test_the_compiled_segments_are_built_once() -> None:
    settings = Settings()
    assert settings.segment_set is settings.segment_set


@pytest.mark.parametrize(
    ("url", "fits"),
    [
        ("redis://node:6379", True),
        ("rediss://app:s3cret@node:6379/0", True),
        ("redis://node:6379/1", False),
        ("unix:///run/redis.sock", False),
    ],
)
def test_a_redis_cluster_has_no_database_but_the_first_and_no_socket(url: str, fits: bool) -> None:
    if fits:
        assert Settings(redis=RedisSettings(url=url, cluster=True)).redis.cluster
        return
    with pytest.raises(ValidationError, match="a Redis Cluster has none but 0") as refused:
        Settings(redis=RedisSettings(url=url, cluster=True))
    assert "s3cret" not in str(refused.value)


def test_settings_built_in_code_must_not_contradict_themselves_either() -> None:
    with pytest.raises(ValidationError, match="four different topics"):
        Settings(kafka=KafkaSettings(exited_topic="events"))


@pytest.mark.parametrize(
    "servers", ["localhost:9092", "10.0.0.1:9092,10.0.0.2:9093", "[::1]:9092", "kafka-0.kafka.svc:1"]
)
def test_brokers_are_host_and_port(servers: str) -> None:
    assert KafkaSettings(bootstrap_servers=servers).bootstrap_servers == servers


# The environment


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        (
            "KAFKA__BOOTSTRAP_SERVERS",
            "127.0.0.1:19092",
            lambda s: s.kafka.bootstrap_servers == "127.0.0.1:19092",
        ),
        ("KAFKA__GROUP_ID", "7", lambda s: s.kafka.group_id == "7"),
        ("REDIS__CLUSTER", "true", lambda s: s.redis.cluster),
        ("KAFKA__SESSION_TIMEOUT_S", "6", lambda s: s.kafka.session_timeout_s == 6.0),
        ("REDIS__URL", "redis://h:1/2", lambda s: s.redis.url == "redis://h:1/2"),
        ("WORKER__CLOCK", "event", lambda s: s.worker.clock == "event"),
        ("WORKER__TRUST_CREATE_TIME", "true", lambda s: s.worker.trust_create_time is True),
        ("WORKER__HTTP_PORT", "8080", lambda s: s.worker.http_port == 8080),
        ("WORKER__MAX_DEAD_LETTER_SHARE", "0.5", lambda s: s.worker.max_dead_letter_share == 0.5),
        ("WEIGHTS__HALF_LIFE_S", "86_400", lambda s: s.weights.half_life_s == 86400.0),
        (
            "WEIGHTS__EVENT_TYPES__PURCHASE__ACTION_WEIGHT",
            "3",
            lambda s: s.weights.event_types["purchase"].action_weight == 3.0,
        ),
        (
            "WEIGHTS__EVENT_TYPES__ADD__TO__CART__HALF_LIFE_S",
            "60",
            lambda s: s.weights.event_types["add__to__cart"].half_life_s == 60.0,
        ),
    ],
)
def test_every_key_has_a_variable(
    load: Load, name: str, text: str, read: Callable[[Settings], object]
) -> None:
    assert read(load(environ={f"STREAM_APP__{name}": text}))


def test_the_environment_wins_over_the_file(load: Load) -> None:
    app = '[worker]\nclock = "event"\n[weights.event_types.Purchase]\naction_weight = 2\nhalf_life_s = 60\n'
    settings = load(
        app,
        environ={
            "STREAM_APP__WORKER__CLOCK": "wall",
            "STREAM_APP__WEIGHTS__EVENT_TYPES__PURCHASE__ACTION_WEIGHT": "5",
        },
    )
    assert settings.worker.clock == "wall"
    assert settings.weights.core.event_types == {"Purchase": EventTypeWeight(5.0, 60.0)}


def test_a_variable_mends_a_wrong_value_in_the_file(load: Load) -> None:
    settings = load('[worker]\nclock = "sun"\n', environ={"STREAM_APP__WORKER__CLOCK": "event"})
    assert settings.worker.clock == "event"


def test_other_peoples_variables_are_not_ours(load: Load) -> None:
    environ = {"STREAM_APP_HOME": "/x", "PATH": "/bin", "KAFKA__GROUP_ID": "g"}
    assert load(environ=environ).kafka.group_id == "stream-app"


@pytest.mark.parametrize(
    "name",
    [
        "STREAM_APP__",
        "STREAM_APP__WORKER",
        "STREAM_APP__WORKER__CLOK",
        "STREAM_APP__WORKR__CLOCK",
        "STREAM_APP__WORKER__CLOCK__X",
        "STREAM_APP__WEIGHTS__EVENT_TYPES",
        "STREAM_APP__WEIGHTS__EVENT_TYPES__PURCHASE",
        "STREAM_APP__WEIGHTS__EVENT_TYPES__PURCHASE__WEIGHT",
        "STREAM_APP__SEGMENTS__0__ID",
    ],
)
def test_a_variable_that_names_no_key_is_an_error(problems: Problems, name: str) -> None:
    found = problems(environ={name: "hunter2"})
    assert len(found) == 1
    assert found[0].startswith(
        f"environment: {name}: expected a variable that names a key, such as STREAM_APP__"
    )
    assert "hunter2" not in found[0]


# What is refused


@pytest.mark.parametrize(
    ("app", "problem"),
    [
        ("[worker]\nclock = 3\n", "[worker] clock: expected 'wall' or 'event', got 3"),
        (
            "[worker]\nhttp_port = 65536\n",
            "[worker] http_port: expected a number from 0 to 65535, got 65536",
        ),
        (
            '[worker]\nhttp_host = "here:80"\n',
            "[worker] http_host: expected a host name or an IP address without port, got 'here:80'",
        ),
        (
            "[worker]\nmax_future_skew_s = -1\n",
            "[worker] max_future_skew_s: expected a number from 0 to 86400 (seconds), got -1",
        ),
        (
            "[worker]\nmax_dead_letter_share = 0\n",
            "[worker] max_dead_letter_share: expected a number from 0.0001 to 1, got 0",
        ),
        (
            "[weights]\nhalf_life_s = 0\n",
            "[weights] half_life_s: expected a number from 0.001 to 1000000000000 (seconds), got 0",
        ),
        ("[weights]\nhalf_life_s = nan\n", "[weights] half_life_s: expected a finite number, got nan"),
        ("[weights]\nhalf_life_s = true\n", "[weights] half_life_s: expected a valid number, got True"),
        ('[weights]\nhalf_life_s = "60"\n', "[weights] half_life_s: expected a valid number, got '60'"),
        (
            "[weights]\nhistory_floor = 0\n",
            "[weights] history_floor: expected a number from 1e-09 to 0.1, got 0",
        ),
        (
            "[weights.event_types.view]\naction_weight = 0.009\n",
            "[weights.event_types.view] action_weight: expected 0, or at least 10 history floors (0.01), "
            "got 0.009",
        ),
        ('[weights]\nevent_types = "view"\n', "[weights] event_types: expected a table, got 'view'"),
        (
            "[weights.event_types.view]\nhalf_life = 1\n",
            "[weights.event_types.view] half_life: expected one of the keys action_weight, half_life_s, "
            "got an unknown key (did you mean half_life_s?)",
        ),
        (
            '[weights.event_types.""]\n',
            "[weights.event_types] : expected 1 to 64 characters without control characters, got ''",
        ),
        (
            '[kafka]\ngroup_id = ""\n',
            "[kafka] group_id: expected 1 to 249 characters without control characters, got ''",
        ),
        (
            '[kafka]\nevents_topic = "a b"\n',
            "[kafka] events_topic: expected a topic name of 1 to 249 letters, digits, '.', '_' or '-', "
            "got 'a b'",
        ),
        (
            '[kafka]\ndead_letter_topic = "segment-entered"\n',
            "[kafka] dead_letter_topic: expected four different topics, got 'segment-entered', which is "
            "entered_topic as well",
        ),
        (
            '[kafka]\nbootstrap_servers = "localhost"\n',
            "[kafka] bootstrap_servers: expected host:port addresses separated by commas, port 1 to "
            "65535, got 'localhost'",
        ),
        (
            "[model]\nmax_age_s = 5\n",
            "[model] max_age_s: expected a number from 60 to 31536000 seconds, got 5",
        ),
        (
            "[kafak]\n",
            "kafak: expected one of the keys kafka, redis, worker, weights, model, got an unknown key "
            "(did you mean kafka?)",
        ),
        ("kafka = 1\n", "kafka: expected a table, got 1"),
        (
            "[[segments]]\n",
            "segments: expected one of the keys kafka, redis, worker, weights, model, got an unknown key",
        ),
        (
            "[kafka\n",
            "expected TOML, got: Expected ']' at the end of a table declaration (at line 1, column 7)",
        ),
        ("x = " + "[" * 100_000, "expected TOML, got values nested too deeply to read"),
    ],
)
def test_a_wrong_app_toml_is_refused_with_where_expected_and_got(
    problems: Problems, app: str, problem: str
) -> None:
    assert problems(app) == [f"app.toml: {problem}"]


@pytest.mark.parametrize(
    ("segments", "problem"),
    [
        (
            '[[segments]]\nid = "a"\n',
            "segment 'a', labels: expected one of labels, asset_ids, event_types, got none (an empty "
            "list is none)",
        ),
        (
            '[[segments]]\nid = "a"\nlabels = []\n',
            "segment 'a', labels: expected one of labels, asset_ids, event_types, got none (an empty "
            "list is none)",
        ),
        (
            '[[segments]]\nid = "a"\nlabels = ["x"]\nmin_weight = 0.0005\n',
            "segment 'a', min_weight: expected 0 (any history) or at least history_floor (0.001), got 0.0005",
        ),
        (
            '[[segments]]\nid = "a"\nlabels = ["x"]\nmin_weight = 1\nexit_weight = 2\n',
            "segment 'a', exit_weight: expected at most min_weight (1), got 2.0",
        ),
        (
            '[[segments]]\nid = "a"\nlabels = ["x"]\nexclude = ["b"]\n',
            "segment 'a', exclude: expected ids of defined segments, got 'b'",
        ),
        (
            '[[segments]]\nid = "a"\nlabels = ["x"]\nexclude = ["b"]\n'
            '[[segments]]\nid = "b"\nlabels = ["x"]\nexclude = ["a"]\n',
            "segment 'a', exclude: expected no cycle, got a → b → a",
        ),
        (
            SNACKERS * 2,
            "segment 'snackers', id: expected an id that no other definition has, got the id of "
            "definition 1 again in definition 2",
        ),
        (
            '[[segments]]\nlabels = ["x"]\n',
            "segment number 1, id: expected a value, got none",
        ),
        (
            '[[segments]]\nid = "a"\nlabels = "x"\n',
            "segment 'a', labels: expected a list, got 'x'",
        ),
        (
            '[[segments]]\nid = "a"\nlabels = ["x", 3]\n',
            "segment 'a', labels[1]: expected a valid string, got 3",
        ),
        (
            '[[segments]]\nid = "a"\nlabels = ["x"]\ntype = "bse"\n',
            "segment 'a', type: expected 'base' or 'discovery', got 'bse'",
        ),
        (
            '[[segments]]\nid = "a"\nlabels = ["x"]\nmin_wieght = 1\n',
            "segment 'a', min_wieght: expected one of the keys id, name, type, labels, asset_ids, "
            "event_types, min_weight, exit_weight, match_labels, match_assets, exclude, got an unknown key "
            "(did you mean min_weight?)",
        ),
        ("[segments]\n", "segments: expected [[segments]] tables, got {}"),
        ("segments = [1]\n", "segments: expected [[segments]] tables, got [1]"),
        (
            '[[segment]]\nid = "a"\n',
            "segment: expected only [[segments]] tables, got an unknown key",
        ),
        (
            "[[segments]\n",
            "expected TOML, got: Expected ']]' at the end of an array declaration (at line 1, column 11)",
        ),
    ],
)
def test_a_wrong_segments_toml_is_refused_with_where_expected_and_got(
    problems: Problems, segments: str, problem: str
) -> None:
    assert problems(segments=segments) == [f"segments.toml: {problem}"]


def test_all_problems_of_all_sources_are_told_at_once(problems: Problems) -> None:
    found = problems(
        '[kafka]\ngroup_id = ""\ntopic = "x"\nexited_topic = "events"\n'
        '[worker]\nclock = "sun"\nhttp_port = 3.5\n',
        '[[segments]]\nid = "a"\n[[segments]]\nid = "b"\nlabels = [1]\nmatch_labels = "none"\n',
        {"STREAM_APP__WORKER__CLOCK": "moon", "STREAM_APP__WRKER__CLOCK": "moon"},
    )
    assert [problem.partition(": expected")[0] for problem in found] == [
        "environment: STREAM_APP__WRKER__CLOCK",
        "app.toml: [kafka] group_id",
        "app.toml: [kafka] topic",
        "environment: STREAM_APP__WORKER__CLOCK",
        "app.toml: [worker] http_port",
        "app.toml: [kafka] exited_topic",
        "segments.toml: segment 'b', labels[0]",
        "segments.toml: segment 'b', match_labels",
        "segments.toml: segment 'a', labels",
    ]
    assert all(": expected " in problem and ", got " in problem for problem in found)


def test_one_mistake_is_told_once_and_not_by_what_follows_from_it(problems: Problems) -> None:
    found = problems(
        "[weights]\nhistory_floor = -1\n[weights.event_types.view]\naction_weight = 0.001\n",
        '[[segments]]\nid = "a"\nlabels = ["x"]\nmin_weight = 1e-5\n',
    )
    assert [problem.partition(": expected")[0] for problem in found] == ["app.toml: [weights] history_floor"]


def test_a_reference_to_a_definition_that_could_not_be_read_is_no_second_problem(problems: Problems) -> None:
    found = problems(
        segments='[[segments]]\nid = "a"\nlabels = ["x"]\nexclude = ["b"]\n'
        '[[segments]]\nid = "b"\nlabels = ["x"]\nmin_weight = "much"\n'
    )
    assert found == ["segments.toml: segment 'b', min_weight: expected a valid number, got 'much'"]


def test_two_variables_for_one_key_are_refused(problems: Problems) -> None:
    found = problems(environ={"STREAM_APP__WORKER__CLOCK": "wall", "STREAM_APP__worker__CLOCK": "event"})
    assert found == [
        "environment: STREAM_APP__worker__CLOCK: expected one variable per key, got "
        "STREAM_APP__WORKER__CLOCK for the same"
    ]


def test_missing_files_are_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_settings(environ={})
    assert caught.value.problems == tuple(
        f"config/{name}.toml: expected a file, got none there: start in the directory that holds config/, or "
        f"name it with --{option} PATH"
        for name, option in (("app", "config"), ("segments", "segments"))
    )


def test_a_file_that_is_no_file_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes('# Zoë\nname = "Zoë"\n'.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_settings(tmp_path, tmp_path / "latin.toml", {})
    assert caught.value.problems == (
        f"{tmp_path}: expected a readable file, got Is a directory",
        f"{tmp_path}/latin.toml: expected UTF-8, got something else at byte 4",
    )


def test_the_report_says_how_many_where_and_what_to_do(problems: Problems) -> None:
    error = ConfigError(problems("[worker]\nclock = 3\nhttp_port = -1\n"))
    assert str(error).splitlines() == [
        "The configuration has 2 problems:",
        "  app.toml: [worker] clock: expected 'wall' or 'event', got 3",
        "  app.toml: [worker] http_port: expected a number from 0 to 65535, got -1",
        "Operator action: Correct what is listed and start again; nothing was started.",
    ]


def test_a_hold_that_expired_names_its_last_failure_and_one_action() -> None:
    error = HoldExpired(3, 60.0, StoreUnavailable("Redis, commit", "ConnectionError: refused"))
    assert str(error) == (
        "partition 3: expected the partition to go on within 60 s (worker.hold_deadline_s), got as the last "
        "of many: Redis, commit: expected an answer, got ConnectionError: refused. Operator action: Bring "
        "back what is named and start the worker again; nothing was acknowledged and it goes on "
        "where it stood."
    )


# Secrets

PASSWORD = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        f"redis://app:{PASSWORD}@cache:6379/0",
        f"redis://:{PASSWORD}@cache",
        f"rediss://{PASSWORD}@cache:6379",
        f"redis://cache:6379/0?password={PASSWORD}",
        f"unix://app:{PASSWORD}@/run/redis.sock",
    ],
)
def test_a_password_is_usable_and_never_shown(url: str) -> None:
    settings = Settings(redis=RedisSettings(url=url))
    assert settings.redis.url == url
    shown = [repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()]
    assert not any(PASSWORD in text for text in shown)
    assert "***" in settings.redis.redacted_url


@pytest.mark.parametrize(
    ("url", "redacted"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("rediss://app:x@cache.example:6380/2", "rediss://***@cache.example:6380/2"),
        ("redis://[::1]:6379", "redis://[::1]:6379"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?***"),
    ],
)
def test_what_may_be_shown_of_an_address_is_where_it_leads(url: str, redacted: str) -> None:
    assert RedisSettings(url=url).redacted_url == redacted


@pytest.mark.parametrize(
    "url",
    [
        f"http://app:{PASSWORD}@cache:6379",
        f"redis://app:{PASSWORD}/@cache:6379",
        f"redis://app:{PASSWORD}#@cache:6379",
        f"redis://app:{PASSWORD}?@cache:6379",
        f"redis://app:1/{PASSWORD}@cache",
        f"redis://app:1?{PASSWORD}@cache",
        f"redis://app:1#{PASSWORD}",
        f"redis://app:{PASSWORD}@cache:port",
        f"redis://app:{PASSWORD}@cache:0",
        f"redis://app:{PASSWORD}@/0",
        f"redis://app:{PASSWORD}@cache/zero",
        f"redis://app:{PASSWORD} @cache",
        f"redis://[{PASSWORD}",
        f"unix://app:{PASSWORD}@cache/redis.sock",
        PASSWORD,
        "",
    ],
)
def test_a_wrong_address_is_refused_without_being_shown(load: Load, url: str) -> None:
    for app, environ in ((f'[redis]\nurl = "{url}"\n', {}), ("", {"STREAM_APP__REDIS__URL": url})):
        with pytest.raises(ConfigError) as caught:
            load(app, SNACKERS, environ)
        assert len(caught.value.problems) == 1
        assert "got a str that is not shown" in str(caught.value)
        assert PASSWORD not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "app",
    [
        f'redis = "redis://:{PASSWORD}@cache"\n',
        f'[redis]\nurl = ["redis://:{PASSWORD}@cache"]\n',
        f'[redis]\npasword = "{PASSWORD}"\n',
        f'[kafka]\nbootstrap_servers = "app:{PASSWORD}@broker:9092"\n',
        f'[kafka]\nsasl_password = "{PASSWORD}"\n',
        f'password = "{PASSWORD}"\n',
        f'[redis]\nurl = "redis://:{PASSWORD}@cache\n',
    ],
)
def test_a_misplaced_password_is_not_shown_either(load: Load, app: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(app)
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


# Locked doors

SASL = """
[kafka]
security_protocol = "SASL_SSL"
sasl_mechanism = "SCRAM-SHA-512"
sasl_username = "app"
"""


def test_a_secret_may_stand_in_the_environment(load: Load) -> None:
    environ = {
        "STREAM_APP__KAFKA__SASL_PASSWORD": "12345",
        "STREAM_APP__REDIS__URL": "rediss://app@cache:6380/2",
        "STREAM_APP__REDIS__PASSWORD": "s/3:c?#@%=+&t",
    }
    settings = load(SASL, environ=environ)
    assert security_of(settings.kafka)["sasl_plain_password"] == "12345"
    options = parse_url(settings.redis.connection_url)
    assert (options["username"], options["password"], options["db"]) == ("app", "s/3:c?#@%=+&t", 2)


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_secret_may_stand_in_a_file_of_one_line(load: Load, tmp_path: Path, end: str) -> None:
    file = tmp_path / "secret"
    file.write_text(f" {PASSWORD} {end}")
    both = f'{SASL}sasl_password_file = "{file}"\n[redis]\npassword_file = "{file}"\n'
    settings = load(both)
    file.unlink()  # read once
    assert settings.kafka.sasl_password == settings.redis.password == f" {PASSWORD} "
    for shown in (repr(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert PASSWORD not in shown


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (None, "expected a readable file, got No such file or directory"),
        (b"", "with 1 to 1000 characters in one line, got another content"),
        (b"\n", "with 1 to 1000 characters in one line, got another content"),
        (f"{PASSWORD}\n\n".encode(), "got another content"),
        (f"user\n{PASSWORD}".encode(), "got another content"),
        (PASSWORD.encode() + b"\xff", "got another content"),
        (PASSWORD.encode() * 1000, "got another content"),
    ],
)
def test_a_file_that_holds_no_secret_is_refused_once_without_its_content(
    problems: Problems, tmp_path: Path, content: bytes | None, got: str
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    (problem,) = problems(f'{SASL}sasl_password_file = "{file}"\n')
    assert problem.startswith("app.toml: [kafka] sasl_password_file: expected a ")
    assert got in problem
    assert PASSWORD not in problem
    environ = {"STREAM_APP__REDIS__PASSWORD_FILE": str(file)}
    (problem,) = problems(environ=environ)
    assert problem.startswith("environment: STREAM_APP__REDIS__PASSWORD_FILE: expected a ")


def test_a_secret_where_the_name_of_its_file_belongs_is_not_shown(problems: Problems) -> None:
    for value in (f'"{PASSWORD}"', "[]", f'["{PASSWORD}"]'):
        (problem,) = problems(f"[redis]\npassword_file = {value}\n")
        assert PASSWORD not in problem
        assert not any(PASSWORD in p for p in problems(f"{SASL}sasl_password_file = {value}\n"))


@pytest.mark.parametrize(
    ("app", "found"),
    [
        (
            SASL,
            ["[kafka] sasl_password: expected it or sasl_password_file, since security_protocol is SASL_SSL"],
        ),
        (
            '[kafka]\nsecurity_protocol = "SASL_PLAINTEXT"\nsasl_password = "x"\n',
            [
                "[kafka] sasl_mechanism: expected a value, since",
                "[kafka] sasl_username: expected a value, since",
            ],
        ),
        (
            '[kafka]\nsasl_username = "app"\n',
            ["[kafka] sasl_username: expected security_protocol SASL_SSL or SASL_PLAINTEXT beside it"],
        ),
        (
            '[kafka]\nsecurity_protocol = "SSL"\nsasl_password = "x"\n',
            ["[kafka] sasl_password: expected security_protocol SASL_SSL or SASL_PLAINTEXT beside it"],
        ),
        (
            '[kafka]\nssl_ca_file = "CA"\n',
            ["[kafka] ssl_ca_file: expected security_protocol SSL or SASL_SSL beside it, got PLAINTEXT"],
        ),
        ('[kafka]\nsecurity_protocol = "TLS"\n', ["[kafka] security_protocol: expected 'PLAINTEXT', 'SSL'"]),
        (
            f'{SASL}sasl_password = "x"\nsasl_password_file = "y"\n',
            ["[kafka] sasl_password_file: expected one of sasl_password and sasl_password_file, got both"],
        ),
        (
            '[redis]\nurl = "redis://:x@cache"\npassword = "y"\n',
            ["[redis] url: expected no password beside redis.password, got one"],
        ),
        (
            '[redis]\nssl_ca_file = "CA"\n',
            ["[redis] ssl_ca_file: expected a redis.url that begins with rediss:// beside it, got redis"],
        ),
        (
            '[redis]\nurl = "rediss://cache"\nssl_key_file = "CA"\n',
            ["[redis] ssl_key_file: expected ssl_cert_file beside it, got none"],
        ),
        (
            '[redis]\nurl = "rediss://cache"\nssl_ca_file = "NONE"\n',
            ["[redis] ssl_ca_file: expected readable files, got No such file or directory"],
        ),
        (
            '[redis]\nurl = "rediss://cache"\nssl_ca_file = "EMPTY"\n',
            ["[redis] ssl_ca_file: expected PEM that OpenSSL can use, got "],
        ),
        (
            '[kafka]\nsecurity_protocol = "SSL"\nssl_cert_file = "CA"\nssl_key_file = "OTHER"\n',
            ["[kafka] ssl_cert_file: expected PEM that OpenSSL can use, got "],
        ),
    ],
)
def test_locks_that_contradict_each_other_or_are_no_locks_are_refused(
    problems: Problems, tmp_path: Path, app: str, found: list[str]
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("cache").private_key_pem.write_to_path(str(tmp_path / "other.pem"))
    (tmp_path / "empty.pem").touch()
    for name in ("ca", "other", "empty", "none"):
        app = app.replace(f'"{name.upper()}"', f'"{tmp_path}/{name}.pem"')
    told = problems(app)
    assert len(told) == len(found), told
    for problem, expected in zip(told, found, strict=True):
        assert expected in problem


def test_an_empty_variable_unsets_a_key_without_default_and_no_other(load: Load, problems: Problems) -> None:
    app = f'{SASL}sasl_password = "x"\n[worker]\nmax_dead_letter_share = 0.5\n'
    names = ("SASL_MECHANISM", "SASL_USERNAME", "SASL_PASSWORD")
    unset = {f"STREAM_APP__KAFKA__{name}": "" for name in names}
    settings = load(app, environ={**unset, "STREAM_APP__KAFKA__SECURITY_PROTOCOL": "SSL"})
    assert settings.kafka.sasl_username is None
    assert len(problems(environ={"STREAM_APP__KAFKA__GROUP_ID": ""})) == 1
    assert len(problems(app, environ={"STREAM_APP__WORKER__MAX_DEAD_LETTER_SHARE": ""})) == 1


def test_what_unlocks_makes_any_configuration_usable_for_servers_of_our_own(
    load: Load, tmp_path: Path
) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    (tmp_path / "secret").write_text(PASSWORD)
    app = (
        f'{SASL}sasl_password_file = "{tmp_path}/secret"\nssl_ca_file = "{tmp_path}/ca.pem"\n'
        f'[redis]\nurl = "rediss://cache"\npassword = "x"\nssl_ca_file = "{tmp_path}/ca.pem"\n'
    )
    settings = load(app)
    ours = {"STREAM_APP__REDIS__URL": "redis://127.0.0.1:1/0", "STREAM_APP__KAFKA__BOOTSTRAP_SERVERS": "b:1"}
    unlocked = load(app, environ={**unlocking_environment(settings), **ours})
    assert unlocked.kafka == settings.kafka.unlocked("b:1") == KafkaSettings(bootstrap_servers="b:1")
    assert unlocked.redis == settings.redis.unlocked("redis://127.0.0.1:1/0")
    assert dict(security_of(unlocked.kafka)) == {}
    assert unlocking_environment(unlocked) == {}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("rediss://cache:6380/2", "rediss://:p%2Fw@cache:6380/2?ssl_ca_certs=CA"),
        ("rediss://app@cache", "rediss://app:p%2Fw@cache?ssl_ca_certs=CA"),
        ("rediss://cache?socket_timeout=9", "rediss://:p%2Fw@cache?socket_timeout=9&ssl_ca_certs=CA"),
    ],
)
def test_redis_is_given_all_that_it_needs_in_one_url(url: str, expected: str) -> None:
    redis = RedisSettings(url=url, password="p/w", ssl_ca_file="CA")
    assert redis.connection_url == expected
    assert "p/w" not in redis.redacted_url


def test_tls_checks_the_certificate_and_the_host_name() -> None:
    context = security_of(KafkaSettings(security_protocol="SSL"))["ssl_context"]
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED


def test_every_client_of_kafka_is_given_its_security() -> None:
    kinds = {"AIOKafkaConsumer", "AIOKafkaProducer", "AIOKafkaAdminClient", "create_conn"}
    made = 0
    for path in (SHIPPED.parent / "stream_app").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] in kinds:
                made += 1
                spread = [ast.unparse(k.value) for k in call.keywords if k.arg is None]
                is_ours = path.name == "demo.py"  # whose broker is embedded
                assert any("security" in name for name in spread) or is_ours, f"{path}:{call.lineno}"
    assert made >= 7


# Faust's own environment


def test_variables_that_faust_would_put_over_our_settings_are_named() -> None:
    found = faust_environment_problems(
        {
            "BROKER_URL": "kafka://elsewhere",
            "STREAM_WAIT_EMPTY": "1",
            "HOME": "/",
            "STREAM_APP__REDIS__URL": "x",
        }
    )
    assert [problem.split(":")[1].strip() for problem in found] == ["BROKER_URL", "STREAM_WAIT_EMPTY"]
    assert not any("elsewhere" in problem for problem in found)


@pytest.mark.parametrize(
    "name",
    [
        "APP_ENV_PREFIX",
        "BROKER_COMMIT_INTERVAL",
        "BROKER_MAX_POLL_RECORDS",
        "BROKER_SESSION_TIMEOUT",
        "CONSUMER_AUTO_OFFSET_RESET",
        "PROCESSING_GUARANTEE",
        "STREAM_BUFFER_MAXSIZE",
        "FAUST_LOOP",
        "F_DATADIR",
    ],
)
def test_what_our_guarantees_rest_on_is_among_them(name: str) -> None:
    assert len(faust_environment_problems({name: "1"})) == 1


def test_a_clean_environment_has_no_problems() -> None:
    assert faust_environment_problems({"PATH": "/bin", "STREAM_APP__WORKER__CLOCK": "event"}) == []


def test_the_shipped_segments_are_few_and_have_names_for_people() -> None:
    tables = tomllib.loads((SHIPPED / "segments.toml").read_text())["segments"]
    assert 10 <= len(tables) <= 18
    assert all(table["name"] for table in tables)
