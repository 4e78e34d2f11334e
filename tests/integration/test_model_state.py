"""What the model has learned outlives its workers, and discovery segments say what is true of the users.

Counts are compared with those of one model that reads the same log alone: exactly, whatever workers did.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import pytest
import redis

from stream_app.adapters.codec import Decoder, InvalidEvent
from stream_app.cli import main
from stream_app.core.decay import NEVER_MS, Weights
from stream_app.core.event import Record
from stream_app.embedded.servers import free_port
from stream_app.settings import load_settings
from tests.backends import Names, read_to_end
from tests.e2e.proof import Case
from tests.integration.stage import EXIT_SLACK_S, Stage, claims, probe, synthetic_events
from tests.integration.test_worker_life import metrics
from tests.learned import Stretch, counted, counts_of, stored
from tests.oracle import unix_ms
from tests.processes import Program, Programs

SEED = 31
PARTITIONS = 4
EVENTS = 6_000
CHECKPOINT_S = 0.2
#: Nothing is forgotten within a test's log: what a user has engaged can be read off the log.
WEIGHTS: dict[str, Any] = {"half_life_s": 3_650 * 86_400.0, "history_floor": 0.0001}
BASE: list[dict[str, Any]] = [
    {"id": "fans", "labels": ["red"], "min_weight": 1.5, "exit_weight": 0.5},
    {"id": "any-colour", "labels": ["green", "blue"], "min_weight": 0.8, "exclude": ["fans"]},
    {"id": "buyers", "event_types": ["buy"], "min_weight": 1.0},
]
COLOURS = ("red", "green", "blue", "grey")
NOT_LEARNED = re.compile(r"partition (\d+): (\d+) records are not learned from")

Messages = list[dict[str, Any]]
Log = Mapping[int, Sequence[Record]]


@pytest.fixture
def case(kafka_bootstrap: str, fresh_redis: str, names: Names) -> Case:
    return Case(kafka_bootstrap, fresh_redis, names, BASE, WEIGHTS, "event")


def stage_of(case: Case, programs: Programs, directory: Path, **settings: object) -> Stage:
    return Stage.build(
        case,
        programs,
        directory,
        partitions=PARTITIONS,
        **{"model__checkpoint_s": CHECKPOINT_S, **settings},
    )


@pytest.fixture
def stage(case: Case, programs: Programs, tmp_path: Path) -> Stage:
    print(f"seed {SEED}")
    return stage_of(case, programs, tmp_path)


# --- what the tests ask ------------------------------------------------------------------------------------


def weights_of(stage: Stage) -> Weights:
    """The settings of the workers, as they read them."""
    return load_settings(Path(stage.options[1]), Path(stage.options[3]), stage.environment).weights.core


def read_log(stage: Stage) -> Log:
    """The valid records of the log, by partition, as a worker decodes them."""
    decoder = Decoder(max_future_skew_s=300.0)
    log: dict[int, list[Record]] = {p: [] for p in range(PARTITIONS)}
    for raw in asyncio.run(read_to_end(stage.case.kafka, stage.case.names.events)):
        event = decoder.decode(
            key=raw.key, value=raw.value, headers=raw.headers, kafka_time_ms=raw.timestamp, now_ms=None
        )
        if not isinstance(event, InvalidEvent):
            log[raw.partition].append(Record(raw.offset, raw.timestamp, event))
    return log


def whole(stage: Stage) -> list[Stretch]:
    return [(p, 0, end) for p, end in stage.log_ends().items()]


def check_counts(stage: Stage, stretches: Sequence[Stretch]) -> None:
    """Redis must have counted these stretches of the log, each record once."""
    expected = counts_of(counted(read_log(stage), stretches, weights_of(stage)))
    assert expected[("examples",)] > 1_000
    got = counts_of(stored(stage.case.redis_url, PARTITIONS))
    wrong = {key: (got.get(key, 0), expected.get(key, 0)) for key in got.keys() | expected.keys()}
    assert {key: pair for key, pair in wrong.items() if pair[0] != pair[1]} == {}


def here(stage: Stage, *arguments: str) -> str:
    """Run a command in this process, since starting one takes longer than it does; what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        for name, value in stage.environment.items():
            patch.setenv(name, value)
        assert main([*arguments, *stage.options]) == 0, printed.getvalue()
    return printed.getvalue()


def learned_below(stage: Stage) -> dict[int, int]:
    """Next offset to learn from, of each partition, as Redis has it; 0 where nothing was written down."""
    with redis.Redis.from_url(stage.case.redis_url) as client:
        raw: Any = client
        return {p: int(raw.hget(f"sa:{{{p}}}:model", "watermark") or 0) for p in range(PARTITIONS)}


def lost_by(worker: Program) -> dict[int, int]:
    """How many records a worker says were not learned from, by partition."""
    found: dict[int, int] = defaultdict(int)
    for partition, count in NOT_LEARNED.findall(worker.log):
        found[int(partition)] += int(count)
    return dict(found)


def said(stage: Stage) -> Messages:
    """All transitions so far, by topic and place, each with where it was said."""
    names = stage.case.names
    records = asyncio.run(read_to_end(stage.case.kafka, names.entered, names.exited))
    return [{**json.loads(r.value), "place": (r.topic, r.partition, r.offset)} for r in records]


# --- workers that end --------------------------------------------------------------------------------------


def portions(count: int, size: int) -> Iterator[list[dict[str, Any]]]:
    """Parts of one log, to be sent while workers come and go."""
    events = synthetic_events(SEED, count * size, users=300)
    for number in range(count):
        yield events[number * size : (number + 1) * size]


def test_a_worker_that_is_killed_loses_what_it_learned_since_its_last_checkpoint_and_nothing_else(
    stage: Stage,
) -> None:
    lost: Counter[int] = Counter()
    told: Counter[int] = Counter()
    learned_from: list[Stretch] = []
    learns_from = dict.fromkeys(range(PARTITIONS), 0)
    sent = iter(portions(7, 700))
    for kill in range(3):
        stage.send(next(sent))
        ends = stage.log_ends()
        worker = stage.start("worker", model__checkpoint_s=1)
        # Only what was written down by the one before is there to begin with.
        worker.wait_until(partial(same, learned_below, stage, ends), 60, "done and written down")
        stage.send(next(sent))
        worker.wait_until(lambda: stage.folded() > sum(ends.values()) + 500, 60, "at work again")  # noqa: B023
        worker.kill()
        told.update(lost_by(worker))
        learned, folded = learned_below(stage), stage.watermarks()
        for p in learned:
            # What was learned from is durable up to here, and after the next start from there on.
            learned_from.append((p, learns_from[p], learned[p]))
            learns_from[p] = max(learned[p], folded[p])
            lost[p] += learns_from[p] - learned[p]
        print(f"kill {kill + 1}: {lost} lost so far")
    assert lost.total() > 0, "nothing was lost: nothing was tested"
    stage.send(next(sent))
    ends = stage.log_ends()
    port = free_port()
    last = stage.start("worker", worker__http_port=port)
    last.wait_until(lambda: stage.is_done(ends) and learned_below(stage) == ends, 60, "done")
    said_lost = metrics(port)[("stream_app_model_examples_lost_total",)]
    last.terminate()
    assert last.wait(20 + EXIT_SLACK_S) == 0, last.log
    assert said_lost == sum(lost_by(last).values())
    told.update(lost_by(last))
    assert +told == +lost
    learned_from += [(p, first, ends[p]) for p, first in learns_from.items()]
    check_counts(stage, [stretch for stretch in learned_from if stretch[1] < stretch[2]])


def same(read: Callable[[Stage], object], stage: Stage, expected: object) -> bool:
    return read(stage) == expected


def test_a_worker_that_is_asked_to_stop_loses_nothing(stage: Stage) -> None:
    workers = []
    events, more = portions(2, 2_000)
    # Records that nothing can be learned from are at the end: bad ones, some without labels, some twice.
    tail = [{**more[n], "event_id": f"last {n}", "labels": []} for n in range(40)]
    tail += [{**more[n], "timestamp": None} for n in range(40)]
    for part in (events, [*more, *tail, *tail]):
        worker = stage.start("worker", model__checkpoint_s=60)
        workers.append(worker)
        worker.wait_until(lambda: len(claims(worker)) == PARTITIONS, 60, "in charge")  # noqa: B023
        before = stage.folded()
        stage.send(part)
        worker.wait_until(lambda: stage.folded() > before, 60, "at work")  # noqa: B023
        if part is not events:
            ends = stage.log_ends()
            worker.wait_until(lambda: stage.is_done(ends), 60, "done")  # noqa: B023
        worker.terminate()
        assert worker.wait(20 + EXIT_SLACK_S) == 0, worker.log
        assert learned_below(stage) == stage.watermarks()
    workers.append(stage.start("worker", "--until-end", model__checkpoint_s=60))
    assert workers[-1].wait(60) == 0, workers[-1].log
    assert learned_below(stage) == stage.watermarks() == stage.log_ends()
    assert [lost_by(worker) for worker in workers] == [{}] * len(workers)
    check_counts(stage, whole(stage))


def owners(stage: Stage) -> set[str]:
    return {stage.wm(p).get("owner", "") for p in range(PARTITIONS)}


def test_two_workers_that_share_a_log_and_hand_partitions_over_count_what_one_counts(stage: Stage) -> None:
    events = synthetic_events(SEED, EVENTS, users=300)
    stage.send(events[: EVENTS // 4])
    first = stage.start("worker")
    first.wait_until(lambda: len(owners(stage)) == 1 and stage.folded() > 100, 60, "at work alone")
    second = stage.start("worker")
    second.wait_until(lambda: len(owners(stage)) == 2, 60, "at work, too")
    stage.send(events[EVENTS // 4 : EVENTS // 2])
    ends = stage.log_ends()
    second.wait_until(lambda: stage.watermarks() == ends, 60, "half-way")
    stage.send(events[EVENTS // 2 :])
    second.wait_until(lambda: stage.folded() > 0.6 * EVENTS, 60, "further")
    first.terminate()
    assert first.wait(20 + EXIT_SLACK_S) == 0, first.log
    ends = stage.log_ends()
    second.wait_until(lambda: stage.is_done(ends), 60, "done")
    second.terminate()
    assert second.wait(20 + EXIT_SLACK_S) == 0, second.log
    assert learned_below(stage) == stage.watermarks() == ends
    assert lost_by(first) == lost_by(second) == {}
    check_counts(stage, whole(stage))


def test_a_checkpoint_of_another_kind_of_model_stops_the_worker_until_it_is_forgotten(stage: Stage) -> None:
    events = synthetic_events(SEED, EVENTS // 3, users=300)
    stage.send(events)
    stage.run("worker", "--until-end")
    with redis.Redis.from_url(stage.case.redis_url) as client:
        raw: Any = client
        raw.hset("sa:{2}:model", "settings", "f" * 16)
        log = stage.run("worker", "--until-end", status=1)
        last = log.strip().splitlines()[-1]
        assert "partition 2, key sa:{2}:model: expected a checkpoint that this version can read" in last
        assert "Operator action:" in last
        assert "`stream-app rebuild --model`" in last
        assert "Traceback" not in log
        profiles = {key: raw.get(key) for key in raw.scan_iter(match="sa:{*}:profile:*", count=1000)}
        before = stage.watermarks()
        assert f"Forgotten in {PARTITIONS} partitions" in here(stage, "rebuild", "--model", "--yes")
        assert raw.keys("sa:{*}:model*") == []
        assert {key: raw.get(key) for key in profiles} == profiles
    stage.send([{**event, "event_id": f"again {n}"} for n, event in enumerate(events)])
    worker = stage.start("worker", "--until-end")
    assert worker.wait(60) == 0, worker.log
    assert lost_by(worker) == {}
    log_of_events = read_log(stage)
    learned = counts_of(stored(stage.case.redis_url, PARTITIONS))[("examples",)]
    later = [r for p, records in log_of_events.items() for r in records if r.offset >= before[p]]
    ids = {record.event.event_id for record in later if record.event.labels}
    assert 0 < learned <= len(ids)
    assert learned > 0.95 * len(ids), "but for duplicates, all since then is learned from"


# --- base segments -----------------------------------------------------------------------------------------


def test_base_segments_are_the_same_with_the_model_on_off_and_rebuilt(
    case: Case, programs: Programs, tmp_path: Path
) -> None:
    discovery = [
        {"id": f"{colour}-next", "type": "discovery", "labels": [colour], "min_weight": 0.05}
        for colour in COLOURS
    ]
    stage = stage_of(replace(case, segments=[*BASE, *discovery]), programs, tmp_path)
    stage.send(synthetic_events(SEED, EVENTS // 3, users=300))
    runs: list[Messages] = []
    states: list[dict[str, Any]] = []
    known: set[tuple[str, int, int]] = set()
    for enabled in (True, False, True):
        if runs:
            here(stage, "rebuild", "--yes")
        stage.run("worker", "--until-end", model__enabled=enabled)
        messages = said(stage)
        runs.append([message for message in messages if message["place"] not in known])
        known |= {message["place"] for message in messages}
        with redis.Redis.from_url(case.redis_url) as client:
            raw: Any = client
            keys = [f"sa:{{{p}}}:members:{s['id']}" for p in range(PARTITIONS) for s in BASE]
            states.append({key: raw.zrange(key, 0, -1, withscores=True) for key in keys})
    base = [
        [
            {name: value for name, value in message.items() if name not in ("place", "replayed")}
            for message in run
            if message["segment_type"] == "base"
        ]
        for run in runs
    ]
    assert len(base[0]) > 300
    assert base[0] == base[1] == base[2]
    assert states[0] == states[1] == states[2]
    kinds = [{message["segment_type"] for message in run} for run in runs]
    assert kinds == [{"base", "discovery"}, {"base"}, {"base", "discovery"}]
    assert {message["status"] for message in runs[1]} == {"entered", "exited"}


# --- discovery segments over real events -------------------------------------------------------------------

REAL_EVENTS = 4_000


@pytest.fixture(scope="session")
def real_events() -> list[dict[str, Any]]:
    """The first of the reviews where the shared data is at hand, else of the PyPI grocery sample."""
    from stream_app.sample import load_sample  # noqa: PLC0415 - pandas is slow to import

    shared = Path(__file__).parents[3] / "shared" / "data" / "ciao.jsonl.gz"
    if shared.is_file():
        with gzip.open(shared, "rt", encoding="utf-8") as lines:
            events = [json.loads(line) for line in islice(lines, REAL_EVENTS)]
    else:
        events = list(islice(load_sample(60_000).events(), REAL_EVENTS))
    return [{**event, "event_id": f"r{number}"} for number, event in enumerate(events)]


@dataclass(slots=True)
class Past:
    """What a user has done, as the log tells it, in its order."""

    partition: int = -1
    #: Offset, instant at which it took effect, labels, asset.
    events: list[tuple[int, int, frozenset[str], str | None]] = field(default_factory=list)

    def labels(self, *, before_ms: int) -> set[str]:
        return {label for _, at_ms, labels, _ in self.events if at_ms < before_ms for label in labels}

    def assets(self, *, before_ms: int) -> set[str | None]:
        return {asset for _, at_ms, _, asset in self.events if at_ms < before_ms}


def pasts(log: Log) -> dict[str, Past]:
    """Recompute from the log when each event took effect: at the largest time so far in its partition."""
    found: dict[str, Past] = defaultdict(Past)
    for partition, records in log.items():
        stream_ms = 0
        for record in records:
            event = record.event
            stream_ms = max(stream_ms, event.event_time_ms)
            past = found[event.user_id]
            past.partition = partition
            past.events.append((record.offset, stream_ms, frozenset(event.labels), event.asset_id))
    return dict(found)


def by_place(messages: Messages) -> dict[tuple[str, str], Messages]:
    """The transitions of each user in each segment, by seq."""
    found: dict[tuple[str, str], Messages] = defaultdict(list)
    for message in messages:
        found[(message["user_id"], message["segment_id"])].append(message)
    return {place: sorted(own, key=lambda m: m["seq"]) for place, own in found.items()}


def check_enter(message: Mapping[str, Any], definition: Mapping[str, Any], past: Past) -> None:
    """An ENTER must predict something new to the user that meets the definition."""
    at_ms, prediction = unix_ms(message["time"]), message["prediction"]
    assert (message["cause"], message["event"]) == ("model", None)
    assert "converted" not in message
    assert definition["min_weight"] <= prediction["score"] == message["weight"] <= 1
    assert prediction["label"] in prediction["labels"]
    assert re.fullmatch(r"[0-9a-f]{16}", prediction["model_version"])
    assert set(definition.get("labels", ())) <= set(prediction["labels"])
    for criterion, value in (
        ("asset_ids", prediction["asset_id"]),
        ("event_types", prediction["event_type"]),
    ):
        assert not definition.get(criterion) or value in definition[criterion]
    # Whatever took effect before that instant was known when the user was let in.
    assert not past.labels(before_ms=at_ms) & set(prediction["labels"])
    assert prediction["asset_id"] is None or prediction["asset_id"] not in past.assets(before_ms=at_ms)
    assert past.events[0][1] <= at_ms, "nobody is known before the first event"
    assert unix_ms(message["exits_at"]) > at_ms


def check_exit(message: Mapping[str, Any], definition: Mapping[str, Any], past: Past) -> None:
    """An EXIT is converted if and only if an event of the user engaged what he had not at that instant."""
    assert "prediction" not in message
    assert message["converted"] == (message["cause"] == "event")
    if not message["converted"]:
        assert (message["cause"], message["event"]) == ("model", None)
        return
    ((at_ms, labels),) = [
        (at_ms, labels) for offset, at_ms, labels, _ in past.events if offset == message["event"]["offset"]
    ]
    assert at_ms == unix_ms(message["time"])
    earlier = {
        label for offset, _, own, _ in past.events if offset < message["event"]["offset"] for label in own
    }
    new = labels - earlier
    assert new, "nothing that the event engaged was new to the user"
    if definition.get("labels"):
        assert set(definition["labels"]) & new


def check_memberships(own: Messages, labels: set[str], past: Past) -> None:
    """Nobody stays in a segment whose labels he has engaged, nor comes in at an instant when he had."""
    for entered, exited in zip_longest(own[::2], own[1::2]):
        first_ms = unix_ms(entered["time"])
        end_ms = NEVER_MS if exited is None else unix_ms(exited["time"])
        engaged = [
            offset for offset, at_ms, has, _ in past.events if first_ms <= at_ms < end_ms and has & labels
        ]
        assert engaged == [], (entered, exited)


def discovery_segments(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One for each of the commonest labels, one for many assets, one for the types of events."""
    labels: dict[str, int] = defaultdict(int)
    assets: dict[str, int] = defaultdict(int)
    for event in events:
        assets[event["asset_id"]] += 1
        for label in event["labels"]:
            labels[label] += 1
    common = sorted(labels, key=lambda label: -labels[label])[:30]
    popular = sorted(assets, key=lambda asset: -assets[asset])[:200]
    types = sorted({event["event_type"] for event in events})
    even = 1 / len(labels)  # what a model that knows nothing would say of each label
    return [
        *(
            {"id": f"next-{n}", "type": "discovery", "labels": [label], "min_weight": 1.2 * even}
            for n, label in enumerate(common)
        ),
        {"id": "popular-next", "type": "discovery", "asset_ids": popular, "min_weight": 2 * even},
        {
            "id": "any-next",
            "type": "discovery",
            "event_types": types,
            "min_weight": 2.5 * even,
            "exclude": ["fans"],
        },
        {"id": "fans", "labels": common[:1], "min_weight": 3.0},
    ]


def test_discovery_segments_hold_who_has_not_engaged_yet_and_say_when_he_does(
    case: Case,
    programs: Programs,
    tmp_path: Path,
    real_events: list[dict[str, Any]],
    record_property: Callable[[str, object], None],
) -> None:
    definitions = {table["id"]: table for table in discovery_segments(real_events)}
    case = replace(case, segments=list(definitions.values()))
    stage = stage_of(case, programs, tmp_path, model__max_age_s=30 * 86_400)
    stage.send(real_events)
    ends = stage.log_ends()
    port = free_port()
    worker = stage.start("worker", worker__http_port=port)
    worker.wait_until(lambda: stage.is_done(ends) and learned_below(stage) == ends, 90, "done")
    check_accuracy(stage, port, [name for name in definitions if name != "fans"])
    worker.terminate()
    assert worker.wait(20 + EXIT_SLACK_S) == 0, worker.log

    messages = [message for message in said(stage) if message["segment_type"] == "discovery"]
    past = pasts(read_log(stage))
    members: set[tuple[str, str]] = set()
    kinds: dict[str, int] = defaultdict(int)
    for (user_id, segment_id), own in by_place(messages).items():
        assert [m["seq"] for m in own] == list(range(1, len(own) + 1))
        assert [m["status"] for m in own] == (["entered", "exited"] * len(own))[: len(own)]
        assert [unix_ms(m["time"]) for m in own] == sorted(unix_ms(m["time"]) for m in own)
        for message in own:
            check = check_enter if message["status"] == "entered" else check_exit
            check(message, definitions[segment_id], past[user_id])
            kinds[f"{message['status']} {message.get('converted', '')}".strip()] += 1
        check_memberships(own, set(definitions[segment_id].get("labels", ())), past[user_id])
        if len(own) % 2:
            members.add((user_id, segment_id))
    record_property("discovery transitions", dict(kinds))
    print(dict(kinds))
    assert kinds["entered"] > 200
    assert kinds["exited True"] > 20
    assert kinds["exited False"] > 20
    assert len({message["id"] for message in messages}) == len(messages)
    assert any(message["prediction"]["accuracy"] for message in messages if message["status"] == "entered")

    held = {(u, s) for u, s in members_of(stage) if definitions[s].get("type") == "discovery"}
    assert held == members, "the member index is not what was said"


def members_of(stage: Stage) -> set[tuple[str, str]]:
    """Who is in which segment, as the index has it."""
    with redis.Redis.from_url(stage.case.redis_url, decode_responses=True) as client:
        raw: Any = client
        return {
            (user_id, key.split(":members:")[1])
            for key in raw.scan_iter(match="sa:{*}:members:*", count=1000)
            for user_id in raw.zrange(key, 0, -1)
        }


def check_accuracy(stage: Stage, port: int, segment_ids: Sequence[str]) -> None:
    """The same figures on `/metrics` and in `segments list`."""
    task = re.compile(r'stream_app_model_accuracy\{figure="(.+?)",task="(.+?)"\} (\S+)')
    shown = {(name, figure): float(value) for figure, name, value in task.findall(probe(port, "metrics")[1])}
    listed = json.loads(here(stage, "segments", "list", "--json"))
    for name in ("next", "discovery"):
        assert listed["accuracy"][name]["examples"] > 100
        for figure in ("hit@1", "hit@5", "hit@10", "mrr", "log_loss", "ece"):
            assert shown[(name, figure)] >= 0
            assert listed["accuracy"][name][figure] == pytest.approx(shown[(name, figure)], abs=0.05)
        for figure in ("popularity_mrr", "markov_mrr"):
            assert 0 < listed["accuracy"][name][figure] <= 1
    of_segments = {segment["id"]: segment["accuracy"] for segment in listed["segments"]}
    assert of_segments["fans"] is None
    assert any(of_segments[segment_id] and of_segments[segment_id]["examples"] for segment_id in segment_ids)
    text = here(stage, "segments", "list")
    assert "model, next category, last" in text
    assert "model, first engagement, last" in text
