"""Configuration: two files and the environment in, one checked `Settings` out.

Decides what every key may be, which source wins (environment over file over default), and how a problem is
told: all problems of `app.toml`, the environment and `segments.toml` in one `ConfigError`, each with where,
expected and got. It is the only reader of `os.environ` and of the configuration files. It must not know
Kafka, Redis or the clock: whether an address answers is the business of `doctor` and of the start.

One rule for the environment: the key `half_life_s` of `[weights]` is `STREAM_APP__WEIGHTS__HALF_LIFE_S`,
deeper tables go on in the same way (`STREAM_APP__WEIGHTS__EVENT_TYPES__PURCHASE__ACTION_WEIGHT`), texts are
taken as they are, numbers and `true` or `false` as in TOML. A variable that begins with `STREAM_APP__` and
names no key is an error, like an unknown key in a file.

Secrets: `redis.url` may hold a password. It is in no message, no `repr` and no dump; what may be printed is
`redis.redacted_url`.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

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


_HalfLife = Annotated[float, _between(MIN_HALF_LIFE_S, MAX_HALF_LIFE_S, " (seconds)")]
_Topic = Annotated[str, AfterValidator(_topic)]


class _Model(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class KafkaSettings(_Model):
    """The broker, the group and the four topics."""

    bootstrap_servers: Annotated[str, AfterValidator(_servers)] = "127.0.0.1:9092"
    group_id: Annotated[str, _text(249)] = "stream-app"
    events_topic: _Topic = "events"
    entered_topic: _Topic = "segment-entered"
    exited_topic: _Topic = "segment-exited"
    dead_letter_topic: _Topic = "events-dead-letter"
    session_timeout_s: Annotated[float, _between(1.0, 1800.0, " (seconds)")] = 10.0

    @property
    def topics(self) -> tuple[str, str, str, str]:
        """The four topics in the order events, entered, exited, dead letters."""
        return self.events_topic, self.entered_topic, self.exited_topic, self.dead_letter_topic


class RedisSettings(_Model):
    """Where the state lives; all keys begin with `sa:`.

    Examples
    --------
    >>> RedisSettings(url="rediss://app:s3cret@cache.example:6380/2")
    RedisSettings(redacted_url='rediss://***@cache.example:6380/2')
    """

    url: Annotated[str, AfterValidator(_redis_url), Field(repr=False, exclude=True)] = (
        "redis://127.0.0.1:6379/0"
    )

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own recipe for a computed property
    @property
    def redacted_url(self) -> str:
        """The address without user, password and query (redis-py reads a password from there too)."""
        url = urlsplit(self.url)
        user, at, address = url.netloc.rpartition("@")
        return (
            f"{url.scheme}://{'***@' if at and user else ''}{address}{url.path}{'?***' if url.query else ''}"
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

    sections, wrong = _validated(app)
    suspect = {problem.loc for problem in wrong}
    wrong += [p for p in _contradictions(sections) if p.needs.isdisjoint(suspect)]
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
        if isinstance(table, dict):  # else the file has something else there, which is told on its own
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
    kind = fields[str(loc[-1])].annotation
    return loc, kind is str or getattr(kind, "__origin__", None) is Literal


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
    if loc[0] == "redis" or "@" in str(value):
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
    result = []
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
