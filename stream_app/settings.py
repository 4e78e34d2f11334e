"""Configuration: two files and the environment in, one checked `Settings` out.

Decides what every key may be, which source wins (environment over file over default), and how a problem is
told: all problems of `app.toml`, the environment and `segments.toml` in one `ConfigError`, each with where,
expected and got. It is the only reader of `os.environ` and of the configuration files. It must not know
Kafka, Redis or the clock: whether an address answers is the business of `doctor` and of the start.

One rule for the environment: the key `half_life_s` of `[weights]` is `STREAM_APP__WEIGHTS__HALF_LIFE_S`,
deeper tables go on in the same way (`STREAM_APP__WEIGHTS__EVENT_TYPES__PURCHASE__ACTION_WEIGHT`), texts are
taken as they are (an empty one unsets a key that has no default), numbers and `true` or `false` as in TOML. A
variable that begins with `STREAM_APP__` and names no key is an error, like an unknown key in a file.

Secrets: `redis.url` may hold a password, `redis.password` and `kafka.sasl_password` are one. They are in no
message, no `repr` and no dump; what may be printed of the address is `redis.redacted_url`. A secret may stand
in a file that `<key>_file` names: it is read once, here, and becomes the value of `<key>`.
"""

from __future__ import annotations

import difflib
import os
import re
import ssl
import tomllib
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
    computed_field,
    model_validator,
)
from pydantic_core import ErrorDetails

from stream_app.core.decay import (
    MAX_ACTION_WEIGHT,
    MAX_HALF_LIFE_S,
    MIN_HALF_LIFE_S,
    MIN_HISTORY_FLOOR,
    SLACK,
    EventTypeWeight,
    Weights,
)
from stream_app.core.segment import Segment, problems
from stream_app.core.segment_set import SegmentSet
from stream_app.errors import ConfigError

DEFAULT_CONFIG = Path("config/app.toml")
DEFAULT_SEGMENTS = Path("config/segments.toml")
ENVIRONMENT_PREFIX = "STREAM_APP__"

_SHOWN_CHARACTERS = 60
_TLS_KEYS = ("ssl_ca_file", "ssl_cert_file", "ssl_key_file")
#: Keys whose value is a secret; each may be read from a file instead, which its `<key>_file` names.
_SECRETS = (("kafka", "sasl_password"), ("redis", "password"))

_Loc = tuple[str | int, ...]


def _between(low: float, high: float, unit: str = "") -> AfterValidator:
    """Accept a number from `low` to `high`, both included; NaN is in no range."""

    def check(value: float) -> float:
        if not low <= value <= high:
            raise ValueError(f"a number from {low:.15g} to {high:.15g}{unit}")
        return value

    return AfterValidator(check)


def _text(most: int) -> AfterValidator:
    """Accept 1 to `most` characters without control characters and lone surrogates."""

    def check(value: str) -> str:
        if not 1 <= len(value) <= most or any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
            raise ValueError(f"1 to {most} characters without control characters")
        return value

    return AfterValidator(check)


def _topic(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,249}", value) or value in (".", ".."):
        raise ValueError("a topic name of 1 to 249 letters, digits, '.', '_' or '-'")
    return value


def _servers(value: str) -> str:
    for address in value.split(","):
        host, _, port = address.strip().rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        if (
            not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", host)
            or not bare
            or not re.fullmatch(r"[0-9]{1,5}", port)
            or not 1 <= int(port) <= 65535
        ):
            raise ValueError("host:port addresses separated by commas, port 1 to 65535")
    return ",".join(address.strip() for address in value.split(","))


def _host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+", value):
        raise ValueError("a host name or an IP address without port")
    return value


_REDIS_URL = "redis://[user:password@]host[:port][/database], rediss://... or unix://path"


def _redis_url(value: str) -> str:
    # What does not parse cleanly could show a piece of a password where a host or a path is expected, so
    # characters that a password must have percent-encoded are refused outside the place of a password.
    try:
        url = urlsplit(value)
        port_valid = url.port is None or url.port > 0
    except ValueError:
        raise ValueError(_REDIS_URL) from None
    remote = (
        url.scheme in ("redis", "rediss") and bool(url.hostname) and re.fullmatch(r"/?|/[0-9]+", url.path)
    )
    local = url.scheme == "unix" and not url.hostname and len(url.path) > 1
    misplaced = "@" in url.path + url.query or "#" in value or any(c.isspace() for c in value)
    if not (remote or local) or not port_valid or misplaced:
        raise ValueError(_REDIS_URL)
    return value


_ONE_LINE = "1 to 1000 characters in one line"


def _secret(value: str) -> str:
    if not 1 <= len(value) <= 1000 or any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise ValueError(_ONE_LINE)
    return value


_HalfLife = Annotated[float, _between(MIN_HALF_LIFE_S, MAX_HALF_LIFE_S, " (seconds)")]
_Topic = Annotated[str, AfterValidator(_topic)]
_File = Annotated[str, _text(4096)]
_Secret = Annotated[str, AfterValidator(_secret)]
SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]


class _Model(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


def _is_lock(key: str) -> bool:
    return key.startswith(("security_", "sasl_", "ssl_", "password", "cluster"))


class KafkaSettings(_Model):
    """The broker and how to be let in, the group and the four topics.

    Examples
    --------
    >>> kafka = KafkaSettings(security_protocol="SASL_SSL", sasl_username="app", sasl_password="s3cret")
    >>> kafka.uses_sasl, kafka.uses_tls, "s3cret" in repr(kafka)
    (True, True, False)
    """

    bootstrap_servers: Annotated[str, AfterValidator(_servers)] = "127.0.0.1:9092"
    group_id: Annotated[str, _text(249)] = "stream-app"
    events_topic: _Topic = "events"
    entered_topic: _Topic = "segment-entered"
    exited_topic: _Topic = "segment-exited"
    dead_letter_topic: _Topic = "events-dead-letter"
    session_timeout_s: Annotated[float, _between(1.0, 1800.0, " (seconds)")] = 10.0
    security_protocol: SecurityProtocol = "PLAINTEXT"
    sasl_mechanism: SaslMechanism | None = None
    sasl_username: Annotated[str, _text(255)] | None = None
    sasl_password: Annotated[_Secret | None, Field(repr=False, exclude=True)] = None
    sasl_password_file: _File | None = None
    ssl_ca_file: _File | None = None
    ssl_cert_file: _File | None = None
    ssl_key_file: _File | None = None

    @property
    def uses_sasl(self) -> bool:
        """Whether the broker is told a user and a password."""
        return self.security_protocol.startswith("SASL_")

    @property
    def uses_tls(self) -> bool:
        """Whether the connections are encrypted and the broker's certificate is checked."""
        return self.security_protocol.endswith("SSL")

    @property
    def topics(self) -> tuple[str, str, str, str]:
        """The four topics in the order events, entered, exited, dead letters."""
        return self.events_topic, self.entered_topic, self.exited_topic, self.dead_letter_topic

    def unlocked(self, bootstrap_servers: str) -> KafkaSettings:
        """Return the same for a broker of our own at `bootstrap_servers`, which lets everybody in."""
        return self.model_copy(
            update={key: field.default for key, field in type(self).model_fields.items() if _is_lock(key)}
            | {"bootstrap_servers": bootstrap_servers}
        )


class RedisSettings(_Model):
    """Where the state lives; all keys begin with `sa:`.

    Examples
    --------
    >>> RedisSettings(url="rediss://app:s3cret@cache.example:6380/2")  # doctest: +ELLIPSIS
    RedisSettings(..., redacted_url='rediss://***@cache.example:6380/2')
    """

    url: Annotated[str, AfterValidator(_redis_url), Field(repr=False, exclude=True)] = (
        "redis://127.0.0.1:6379/0"
    )
    password: Annotated[_Secret | None, Field(repr=False, exclude=True)] = None
    password_file: _File | None = None
    ssl_ca_file: _File | None = None
    ssl_cert_file: _File | None = None
    ssl_key_file: _File | None = None

    cluster: bool = False

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own recipe for a computed property
    @property
    def redacted_url(self) -> str:
        """The address without user, password and query (redis-py reads a password from there too)."""
        url = urlsplit(self.url)
        user, at, address = url.netloc.rpartition("@")
        return (
            f"{url.scheme}://{'***@' if at and user else ''}{address}{url.path}{'?***' if url.query else ''}"
        )

    @property
    def connection_url(self) -> str:
        """The address with all that a client needs to be let in: a secret, for redis-py alone."""
        url = urlsplit(self.url)
        user, _, address = url.netloc.rpartition("@")
        if self.password is not None:
            user = f"{user.removesuffix(':')}:{quote(self.password, safe='')}"
        names = {"ssl_ca_certs": self.ssl_ca_file, "ssl_certfile": self.ssl_cert_file}
        names["ssl_keyfile"] = self.ssl_key_file
        files = urlencode({name: path for name, path in names.items() if path is not None})
        query = "&".join(part for part in (url.query, files) if part)
        return url._replace(netloc=f"{user}@{address}" if user else address, query=query).geturl()

    def unlocked(self, url: str) -> RedisSettings:
        """Return the same for a server of our own at `url`, which knows no passwords."""
        return self.model_copy(
            update={key: field.default for key, field in type(self).model_fields.items() if _is_lock(key)}
            | {"url": url}
        )


class WorkerSettings(_Model):
    """How one worker process behaves."""

    clock: Literal["wall", "event"] = "wall"
    max_future_skew_s: Annotated[float, _between(0.0, 86400.0, " (seconds)")] = 300.0
    trust_create_time: bool = False
    hold_deadline_s: Annotated[float, _between(0.1, 86400.0, " (seconds)")] = 60.0
    drain_deadline_s: Annotated[float, _between(0.1, 3600.0, " (seconds)")] = 20.0
    max_dead_letter_share: Annotated[float, _between(1e-4, 1.0)] | None = None
    http_host: Annotated[str, AfterValidator(_host)] = "127.0.0.1"
    http_port: Annotated[int, _between(0, 65535)] = 0
    cache_mb: Annotated[float, _between(0.0, 1e6, " (MB)")] = 128.0


class EventTypeSettings(_Model):
    """What one event of a type adds, and how fast it fades (None: as all others)."""

    action_weight: Annotated[float, _between(0.0, MAX_ACTION_WEIGHT)] = 1.0
    half_life_s: _HalfLife | None = None


class WeightsSettings(_Model):
    """How events count; see `core` for the form that the fold takes."""

    half_life_s: _HalfLife = 30 * 86400.0
    # The default action weight is 1 and must be at least ten floors.
    history_floor: Annotated[float, _between(MIN_HISTORY_FLOOR, 0.1)] = 1e-3
    event_types: dict[Annotated[str, _text(64)], EventTypeSettings] = Field(default_factory=dict)

    @property
    def core(self) -> Weights:
        """The same as the pure core's fact."""
        types = {
            name: EventTypeWeight(action_weight=t.action_weight, half_life_s=t.half_life_s)
            for name, t in self.event_types.items()
        }
        return Weights(half_life_s=self.half_life_s, history_floor=self.history_floor, event_types=types)


class ModelSettings(_Model):
    """The next-category model."""

    enabled: bool = True
    max_age_s: Annotated[float, _between(60, 31_536_000, " seconds")] = 604_800.0
    rescored_per_s: Annotated[int, _between(1, 100_000, " users")] = 64
    checkpoint_s: Annotated[float, _between(0.1, 3600, " seconds")] = 5.0


class _Sections(_Model):
    """The tables of app.toml."""

    kafka: KafkaSettings = KafkaSettings()
    redis: RedisSettings = RedisSettings()
    worker: WorkerSettings = WorkerSettings()
    weights: WeightsSettings = WeightsSettings()
    model: ModelSettings = ModelSettings()


class Settings(_Sections):
    """Everything that can be configured, checked; built once and passed by argument.

    Examples
    --------
    >>> settings = Settings(segments=(Segment(id="snackers", labels=("Bag Snacks",), min_weight=2.0),))
    >>> settings.worker.clock, settings.weights.core.half_life_s, len(settings.segment_set.segments)
    ('wall', 2592000.0, 1)
    """

    segments: tuple[InstanceOf[Segment], ...] = ()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if contradictions := _contradictions(self):
            raise ValueError(
                "; ".join(f"{_key(p.loc)}: expected {p.expected}, got {p.got}" for p in contradictions)
            )
        return self

    @cached_property
    def segment_set(self) -> SegmentSet:
        """The definitions compiled for the fold, under these weights.

        Raises
        ------
        ValueError
            If the definitions contradict each other; `load_settings` has refused those.
        """
        return SegmentSet(self.segments, self.weights.core)


class _SegmentTable(_Model):
    """One `[[segments]]` table; only its types are checked here, its meaning by the core."""

    id: str
    name: str = ""
    type: Literal["base", "discovery"] = "base"
    labels: list[str] = Field(default_factory=list)
    asset_ids: list[str] = Field(default_factory=list)
    event_types: list[str] = Field(default_factory=list)
    min_weight: float = 0.0
    exit_weight: float | None = None
    match_labels: Literal["any", "all"] = "any"
    match_assets: Literal["any", "all"] = "any"
    exclude: list[str] = Field(default_factory=list)

    def segment(self) -> Segment:
        return Segment(
            id=self.id,
            name=self.name,
            type=self.type,
            labels=tuple(self.labels),
            asset_ids=tuple(self.asset_ids),
            event_types=tuple(self.event_types),
            min_weight=self.min_weight,
            exit_weight=self.exit_weight,
            match_labels=self.match_labels,
            match_assets=self.match_assets,
            exclude=tuple(self.exclude),
        )


@dataclass(frozen=True, slots=True)
class _Problem:
    """One thing wrong at one key, before it is known from which source the value came."""

    loc: _Loc
    expected: str
    got: str
    # Other keys that the statement rests on; where one of them is wrong itself, it says nothing.
    needs: frozenset[_Loc] = frozenset()


def unlocking_environment(settings: Settings) -> dict[str, str]:
    """Return variables that take away whatever these settings have of users, passwords and certificates.

    For a process that is to use servers of our own with a configuration made for others.
    """
    return {
        f"{ENVIRONMENT_PREFIX}{section}__{key}".upper(): _as_variable(field.default)
        for section, locks in (("kafka", settings.kafka), ("redis", settings.redis))
        for key, field in type(locks).model_fields.items()
        if _is_lock(key) and getattr(locks, key) != field.default
    }


def _as_variable(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else str(value).lower()


def load_settings(
    config: Path | None = None,
    segments: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Read both files and the environment and check them together.

    Parameters
    ----------
    config
        Path of `app.toml`; None: `config/app.toml` of the working directory.
    segments
        Path of `segments.toml`; None: `config/segments.toml` of the working directory.
    environ
        The environment; None: the process's own.

    Returns
    -------
    Settings
        Frozen; a key that no source names has its default.

    Raises
    ------
    ConfigError
        With every problem of every source.
    """
    environ = os.environ if environ is None else environ
    app_path = DEFAULT_CONFIG if config is None else config
    segments_path = DEFAULT_SEGMENTS if segments is None else segments
    found: list[str] = []
    app = _read_toml(app_path, "--config", found)
    origins = _apply_environment(app, environ, found)

    def where(loc: _Loc) -> str:
        if loc in origins:
            return f"environment: {origins[loc]}"
        return f"{app_path}: {_key(loc)}"

    unread = _read_secrets(app, where, found)
    sections, wrong = _validated(app)
    suspect = unread | {problem.loc for problem in wrong}
    wrong += [p for p in _contradictions(sections) if p.needs.isdisjoint(suspect)]
    wrong += [*_certificates("kafka", sections.kafka), *_certificates("redis", sections.redis)]
    for problem in wrong:
        found.append(f"{where(problem.loc)}: expected {problem.expected}, got {problem.got}")
    # Of the weights, definitions depend on the floor; where that is unknown, no threshold lies below it.
    unknown = not suspect.isdisjoint({("weights",), ("weights", "history_floor")})
    floor = MIN_HISTORY_FLOOR if unknown else sections.weights.history_floor
    definitions = _read_segments(segments_path, Weights(history_floor=floor), found)
    if found:
        raise ConfigError(found)
    return Settings(**dict(sections), segments=definitions)


def faust_environment_problems(environ: Mapping[str, str] | None = None) -> list[str]:
    """Name the variables of the environment that Faust would read over this service's settings.

    Faust lets its own variables, which have no prefix of ours (`BROKER_URL`, `STREAM_WAIT_EMPTY`, ...), win
    over what a program passes to `faust.App`; guarantees of this service rest on what it passes. The names
    come from the installed Faust's own list of settings.

    Parameters
    ----------
    environ
        The environment; None: the process's own.

    Returns
    -------
    list of str
        One sentence per variable that is set, sorted by name; values are not shown. Empty: all is well.

    Notes
    -----
    Imports Faust, and so is called by what is about to run Faust anyway. Faust reads some variables while it
    is imported and dies of a wrong one: where any of those is set, only those are named.
    """
    environ = os.environ if environ is None else environ
    at_import = {prefix + name for prefix in ("FAUST_", "F_") for name in _FAUST_IMPORT_NAMES}
    names = at_import.intersection(environ)
    if not names:
        from faust.types.settings import Settings as FaustSettings  # noqa: PLC0415  # see Notes

        read = {param.env_name for param in FaustSettings.SETTINGS.values() if param.env_name is not None}
        names = read.intersection(environ)
    return [
        f"environment: {name}: expected not to be set, since Faust would put it over this service's "
        "settings, got a value"
        for name in sorted(names)
    ]


# faust/types/_env.py and faust/__init__.py, with FAUST_ or F_ before them.
_FAUST_IMPORT_NAMES = (
    "BLOCKING_TIMEOUT",
    "CONSOLE_PORT",
    "DATADIR",
    "DEBUG",
    "FORCE_BLOCKING_TIMEOUT",
    "F_WEB_BIND",
    "LOOP",
    "STRICT",
    "WEB_PORT",
    "WEB_TRANSPORT",
    "WORKDIR",
)


def _read_toml(path: Path, option: str, found: list[str]) -> dict[str, Any]:
    """Return the file as a table, or an empty one and a problem."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        found.append(
            f"{path}: expected a file, got none there: start in the directory that holds config/, or name it "
            f"with {option} PATH"
        )
    except OSError as exc:
        found.append(f"{path}: expected a readable file, got {exc.strerror or type(exc).__name__}")
    except UnicodeDecodeError as exc:
        found.append(f"{path}: expected UTF-8, got something else at byte {exc.start}")
    except ValueError as exc:  # TOMLDecodeError, and a number with thousands of digits
        found.append(f"{path}: expected TOML, got: {exc}")
    except RecursionError:
        found.append(f"{path}: expected TOML, got values nested too deeply to read")
    return {}


def _apply_environment(app: dict[str, Any], environ: Mapping[str, str], found: list[str]) -> dict[_Loc, str]:
    """Put the overrides into `app`; return which variable each key came from."""
    origins: dict[_Loc, str] = {}
    for name in sorted(environ):
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        target = _override_target(name, app)
        if target is None:
            known = _environment_names()
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"such as {near[0]}" if near else f"{known[0]} or another of the README's list"
            found.append(
                f"environment: {name}: expected a variable that names a key, {hint}, got an unknown one"
            )
            continue
        loc, textual = target
        if loc in origins:
            found.append(
                f"environment: {name}: expected one variable per key, got {origins[loc]} for the same"
            )
            continue
        table: Any = app
        for part in loc[:-1]:
            table = table.setdefault(part, {}) if isinstance(table, dict) else None
        if isinstance(table, dict) and textual and not environ[name] and _may_be_unset(loc):
            table.pop(loc[-1], None)
        elif isinstance(table, dict):  # else the file has something else there, which is told on its own
            table[loc[-1]] = environ[name] if textual else _scalar(environ[name])
            origins[loc] = name
    return origins


def _override_target(name: str, app: Mapping[str, Any]) -> tuple[_Loc, bool] | None:
    """Return the key that a variable names and whether its value is a text; None if it names none."""
    section, *rest = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
    field = _Sections.model_fields.get(section)
    if field is None or not rest:
        return None
    model = field.annotation
    loc: _Loc = (section, *rest)
    if loc[:2] == ("weights", "event_types"):
        if len(rest) < 3:
            return None
        written = "__".join(rest[1:-1])
        table = app.get("weights", {})
        types = table.get("event_types", {}) if isinstance(table, dict) else {}
        names = [t for t in types if t.lower() == written] if isinstance(types, dict) else []
        model, loc = EventTypeSettings, ("weights", "event_types", names[0] if names else written, rest[-1])
    elif len(rest) != 1:
        return None
    fields = model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else {}
    if loc[-1] not in fields:
        return None
    return loc, _is_text(fields[str(loc[-1])].annotation)


def _may_be_unset(loc: _Loc) -> bool:
    """Tell whether a key has no default, so that an empty variable can only mean none."""
    model = _Sections.model_fields[str(loc[0])].annotation
    return isinstance(model, type) and model.model_fields[str(loc[-1])].default is None and len(loc) == 2


def _is_text(kind: object) -> bool:
    """Tell whether a key holds a text: any, or one of a few words."""
    if get_origin(kind) is Annotated:
        return _is_text(get_args(kind)[0])
    return kind is str or get_origin(kind) is Literal or any(_is_text(part) for part in get_args(kind))


def _environment_names() -> list[str]:
    names = []
    for section, field in _Sections.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            names += [f"{section}__{key}" for key in model.model_fields if key != "event_types"]
    names += [f"weights__event_types__purchase__{key}" for key in EventTypeSettings.model_fields]
    return [ENVIRONMENT_PREFIX + name.upper() for name in names]


def _scalar(text: str) -> object:
    """Read a number or a truth value as TOML does; anything else stays a text, which the key then refuses."""
    try:
        value = tomllib.loads(f"value = {text.strip()}")
    except (ValueError, RecursionError):
        return text
    read = value.get("value")
    return read if len(value) == 1 and isinstance(read, bool | int | float) else text


def _read_secrets(app: dict[str, Any], where: Callable[[_Loc], str], found: list[str]) -> set[_Loc]:
    """Put what `<key>_file` holds in the place of `<key>`; return the keys of which that is unknown.

    Neither a file's content nor its name is shown: whoever mistook one key for the other has a secret there.
    """
    unread: set[_Loc] = set()
    for section, key in _SECRETS:
        table, file_key = app.get(section), f"{key}_file"
        path = table.get(file_key) if isinstance(table, dict) else None
        if not isinstance(table, dict) or not isinstance(path, str):
            continue  # what is wrong with it is told with all other keys
        problem = None
        if key in table:
            problem = f"expected one of {key} and {file_key}, got both"
        else:
            try:
                text = Path(path).read_text(encoding="utf-8")
                table[key] = _secret(text.removesuffix("\n").removesuffix("\r"))
            except OSError as exc:
                problem = f"expected a readable file, got {exc.strerror or type(exc).__name__}"
            except ValueError:
                problem = f"expected a file of UTF-8 with {_ONE_LINE}, got another content"
        if problem:
            found.append(f"{where((section, file_key))}: {problem}")
            unread.add((section, key))
    return unread


def _validated(raw: dict[str, Any]) -> tuple[_Sections, list[_Problem]]:
    """Validate; where a key is wrong, say so and go on with its default, so that the rest is checked too."""
    wrong: list[_Problem] = []
    while True:
        try:
            return _Sections.model_validate(raw), wrong
        except ValidationError as exc:
            for error in exc.errors(include_url=False):
                wrong.append(_problem(error, _Sections))
                _prune(raw, wrong[-1].loc)


def _problem(error: ErrorDetails, model: type[BaseModel]) -> _Problem:
    """Translate pydantic's finding; its own wording names types that no file has."""
    loc = tuple(part for part in error["loc"] if part != "[key]")
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[-1]), keys := _keys_beside(loc, model), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return _Problem(loc, f"one of the keys {', '.join(keys)}", f"an unknown key{hint}")
    if kind == "missing":
        return _Problem(loc, "a value", "none")
    if kind == "value_error":
        expected = str(error["ctx"]["error"])
    elif kind in ("model_type", "dict_type"):
        expected = "a table"
    elif kind == "list_type":
        expected = "a list"
    else:
        expected = error["msg"].removeprefix("Input should be ")
    return _Problem(loc, expected, _shown(loc, value))


def _keys_beside(loc: _Loc, model: type[BaseModel]) -> list[str]:
    if len(loc) == 4:
        model = EventTypeSettings
    elif len(loc) == 2 and isinstance(found := model.model_fields[str(loc[0])].annotation, type):
        model = found
    return list(model.model_fields)


def _shown(loc: _Loc, value: object) -> str:
    """Return what may be shown of a value: nothing of `[redis]` and of what could hold a password."""
    if loc[0] == "redis" or "password" in str(loc[-1]) or "@" in str(value):
        return f"a {type(value).__name__} that is not shown, since it may hold a password"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def _prune(raw: dict[str, Any], loc: _Loc) -> None:
    """Remove a wrong value; inside a list the whole list is wrong."""
    table: Any = raw
    for part in loc[:-1]:
        if not isinstance(table.get(part), dict):
            table.pop(part, None)
            return
        table = table[part]
    table.pop(loc[-1], None)


def _contradictions(sections: _Sections) -> list[_Problem]:
    """Return what is wrong between keys that are each right by themselves."""
    result = [*_locks(sections.kafka), *_redis_locks(sections.redis)]
    kafka, weights = sections.kafka, sections.weights
    owner: dict[str, str] = {}
    for key in ("events_topic", "entered_topic", "exited_topic", "dead_letter_topic"):
        topic = getattr(kafka, key)
        other = owner.setdefault(topic, key)
        if other != key:
            result.append(
                _Problem(
                    ("kafka", key),
                    "four different topics",
                    f"{topic!r}, which is {other} as well",
                    frozenset({("kafka", other)}),
                )
            )
    if sections.redis.cluster:
        address = urlsplit(sections.redis.url)
        if address.scheme == "unix" or address.path.strip("/") not in ("", "0"):
            result.append(
                _Problem(
                    ("redis", "cluster"),
                    "false, or a redis.url of a host without a database: a Redis Cluster has none but 0",
                    "true",
                    frozenset({("redis", "url")}),
                )
            )
    for name, event_type in weights.event_types.items():
        weight, least = event_type.action_weight, 10 * weights.history_floor
        if weight != 0 and weight < least * (1 - SLACK):
            result.append(
                _Problem(
                    ("weights", "event_types", name, "action_weight"),
                    f"0, or at least 10 history floors ({least:g})",
                    f"{weight:g}",
                    frozenset({("weights", "history_floor")}),
                )
            )
    return result


def _locks(kafka: KafkaSettings) -> Iterator[_Problem]:
    """Yield what is missing or idle beside `kafka.security_protocol`."""
    protocol = kafka.security_protocol
    needs: frozenset[_Loc] = frozenset({("kafka", "security_protocol")})
    for key in ("sasl_mechanism", "sasl_username", "sasl_password"):
        loc, is_set = ("kafka", key), getattr(kafka, key) is not None
        if kafka.uses_sasl and not is_set:
            expected = "it or sasl_password_file" if key == "sasl_password" else "a value"
            yield _Problem(loc, f"{expected}, since security_protocol is {protocol}", "none", needs | {loc})
        if is_set and not kafka.uses_sasl:
            yield _Problem(loc, "security_protocol SASL_SSL or SASL_PLAINTEXT beside it", protocol, needs)
    if not kafka.uses_tls:
        for key in _set_tls_keys(kafka):
            yield _Problem(("kafka", key), "security_protocol SSL or SASL_SSL beside it", protocol, needs)
    yield from _key_without_certificate("kafka", kafka)


def _redis_locks(redis: RedisSettings) -> Iterator[_Problem]:
    """Yield what contradicts `redis.url`."""
    needs: frozenset[_Loc] = frozenset({("redis", "url")})
    url = urlsplit(redis.url)
    if redis.password is not None and (url.password is not None or "password" in parse_qs(url.query)):
        yield _Problem(("redis", "url"), "no password beside redis.password", "one", needs)
    if url.scheme != "rediss":
        for key in _set_tls_keys(redis):
            yield _Problem(
                ("redis", key), "a redis.url that begins with rediss:// beside it", url.scheme, needs
            )
    yield from _key_without_certificate("redis", redis)


def tls_context(locks: KafkaSettings | RedisSettings) -> ssl.SSLContext:
    """Return how to make TLS connections: certificate and host name of the other side are checked.

    Raises
    ------
    OSError
        If a file of certificates cannot be used; `load_settings` has refused those.
    """
    context = ssl.create_default_context(cafile=locks.ssl_ca_file)
    if locks.ssl_cert_file is not None:
        # Without a password OpenSSL would ask the terminal for that of an encrypted key.
        context.load_cert_chain(locks.ssl_cert_file, locks.ssl_key_file, password="")
    return context


def _certificates(section: str, locks: KafkaSettings | RedisSettings) -> Iterator[_Problem]:
    """Yield which files of certificates cannot be used; what is in them is not shown."""
    for keys in (("ssl_ca_file",), ("ssl_cert_file", "ssl_key_file")):
        used = {key: getattr(locks, key) for key in keys}
        if used[keys[0]] is None:
            continue
        try:
            tls_context(locks.model_copy(update=dict.fromkeys(_TLS_KEYS) | used))
        except ssl.SSLError as exc:
            yield _Problem((section, keys[0]), "PEM that OpenSSL can use", exc.reason or "something else")
        except OSError as exc:
            yield _Problem((section, keys[0]), "readable files", exc.strerror or type(exc).__name__)


def _set_tls_keys(model: KafkaSettings | RedisSettings) -> list[str]:
    return [key for key in _TLS_KEYS if getattr(model, key) is not None]


def _key_without_certificate(section: str, model: KafkaSettings | RedisSettings) -> Iterator[_Problem]:
    if model.ssl_key_file is not None and model.ssl_cert_file is None:
        needs: frozenset[_Loc] = frozenset({(section, "ssl_cert_file")})
        yield _Problem((section, "ssl_key_file"), "ssl_cert_file beside it", "none", needs)


def _read_segments(path: Path, weights: Weights, found: list[str]) -> tuple[Segment, ...]:
    """Return the definitions that can be read; problems of them and between them go to `found`."""
    raw = _read_toml(path, "--segments", found)
    tables = raw.pop("segments", [])
    for key in raw:
        found.append(f"{path}: {key}: expected only [[segments]] tables, got an unknown key")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        found.append(f"{path}: segments: expected [[segments]] tables, got {_shown(('segments',), tables)}")
        return ()
    segments: list[Segment] = []
    unnamed = False
    wrong_ids: set[str] = set()
    for number, table in enumerate(tables, 1):
        name = f"segment {table['id']!r}" if isinstance(table.get("id"), str) else f"segment number {number}"
        wrong: list[_Problem] = []
        while True:
            try:
                segments.append(_SegmentTable.model_validate(table).segment())
                break
            except ValidationError as exc:
                for error in exc.errors(include_url=False):
                    wrong.append(_problem(error, _SegmentTable))
                    _prune(table, wrong[-1].loc)
            if "id" not in table:
                unnamed = True
                break
        found += [f"{path}: {name}, {_key(p.loc)}: expected {p.expected}, got {p.got}" for p in wrong]
        if wrong and "id" in table:
            wrong_ids.add(table["id"])
    for problem in problems(segments, weights):
        # Not about a definition that was read only in part, nor about a reference to one without a valid id.
        if problem.segment_id not in wrong_ids and not (unnamed and problem.key == "exclude"):
            found.append(f"{path}: {problem}")
    return tuple(segments)


def _key(loc: _Loc) -> str:
    """Write a key as the file has it.

    Examples
    --------
    >>> _key(("weights", "event_types", "purchase", "half_life_s"))
    '[weights.event_types.purchase] half_life_s'
    >>> _key(("labels", 2))
    'labels[2]'
    """
    names = [str(part) for part in loc if isinstance(part, str)]
    index = "".join(f"[{part}]" for part in loc if isinstance(part, int))
    head, last = names[:-1], names[-1]
    return f"[{'.'.join(head)}] {last}{index}" if head else f"{last}{index}"
