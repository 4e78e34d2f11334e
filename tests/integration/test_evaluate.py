"""`stream-app evaluate`: what it reads, refuses and prints, and the real streams that it judges.

The tests of real streams need ../shared/data and take about a minute; without it they are skipped.
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stream_app.adapters.transport import SLICE_RECORDS
from stream_app.cli import main
from stream_app.core.decay import Weights
from stream_app.core.event import Event
from stream_app.evaluation.baselines import BASELINES, Baselines
from stream_app.evaluation.figures import figures
from stream_app.evaluation.files import EventFile
from stream_app.evaluation.offline import offline_judge
from stream_app.evaluation.prequential import Report, evaluate_stream
from stream_app.evaluation.worker import MemoryWorker
from tests import prequential
from tests.prequential import DAY_MS, Seen

Evaluate = Callable[..., dict[str, Any]]

BEGIN_S = 1_767_225_600
WEIGHTS = Weights()
TIMINGS = ("us_per_event", "fold_us_per_event")


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a configuration whose servers do not exist."""
    (tmp_path / "config").mkdir()
    config = '[kafka]\nbootstrap_servers = "127.0.0.1:1"\n[redis]\nurl = "redis://127.0.0.1:1"\n'
    (tmp_path / "config" / "app.toml").write_text(config)
    (tmp_path / "config" / "segments.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Run the command on files and return the report of the first stream."""

    def run(*arguments: str, code: int = 0) -> dict[str, Any]:
        assert main(["evaluate", "--json", *arguments]) == code
        document = json.loads(capsys.readouterr().out)
        assert list(document) == ["streams"]
        report: dict[str, Any] = document["streams"][0]
        return report

    return run


def shop(count: int = 900, seed: int = 1) -> list[dict[str, Any]]:
    """Return events of users who go round a few labels, each in the same order: something to learn."""
    chance = random.Random(seed)
    places = [0] * 25
    events = []
    for number in range(count):
        user = chance.randrange(25)
        places[user] += chance.choice([0, 1, 1, 2])
        label = (user % 5 + places[user] // 4) % 12
        events.append(
            {
                "user_id": f"u{user}",
                "event_type": chance.choice(["view", "view", "buy"]),
                "asset_id": f"a{label}-{chance.randrange(3)}",
                "labels": [f"l{label}"],
                "timestamp": BEGIN_S + number * 9_000,
            }
        )
    return events


def write(path: Path, events: Iterable[object]) -> str:
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return str(path)


def without_timings(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in TIMINGS}


# --- the report --------------------------------------------------------------------------------------------


def test_the_document_has_what_others_read(evaluate: Evaluate, tmp_path: Path) -> None:
    report = evaluate(write(tmp_path / "shop.jsonl", shop()))
    figures = {"mrr", "hit@1", "hit@5", "hit@10", "ece"}
    assert report["file"] == str(tmp_path / "shop.jsonl")
    assert report["events"] == 900
    assert report["us_per_event"] > 0
    for task in ("next", "discovery"):
        assert figures <= set(report[task])
        assert all(0 <= report[task][name] <= 1 for name in figures)
        assert all(figures <= set(baseline[task]) for baseline in report["baselines"].values())
    assert {*BASELINES, "ease", "item_knn", "logistic"} == set(report["baselines"])
    assert len(report["deciles"]) == 10
    assert sum(part["next"]["examples"] for part in report["deciles"]) == report["next"]["examples"] == 899


def test_the_figures_are_those_of_the_slow_judge(evaluate: Evaluate, tmp_path: Path) -> None:
    events = shop(400)
    report = evaluate(write(tmp_path / "shop.jsonl", events))
    seen = [Seen(event["user_id"], event["timestamp"] * 1000, tuple(event["labels"])) for event in events]
    slow = prequential.examples(seen, 30.0 * DAY_MS)
    for name in BASELINES:
        found = report["baselines"][name]
        nexts = {one.number: one.next[name] for one in slow}
        discoveries = {one.number: one.discovery[name] for one in slow if one.discovery is not None}
        for task, ranks in (("next", nexts), ("discovery", discoveries)):
            last = [rank for number, rank in ranks.items() if number >= 320]
            assert found[task] | {"ece": 0} == pytest.approx(
                prequential.summary(list(ranks.values())) | {"ece": 0}
            )
            assert found["last_20"][task] | {"ece": 0} == pytest.approx(
                prequential.summary(last) | {"ece": 0}
            )


def test_the_model_is_judged_by_what_it_observed_in_the_workers_slices(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    path = write(tmp_path / "shop.jsonl", shop(1_200))
    report = evaluate(path)
    events = [
        event for part in EventFile(path, sort=False).slices(7, lambda share, done: None) for event in part
    ]
    worker = MemoryWorker(WEIGHTS)
    ranks, top, hit = [], [], []
    for first in range(0, len(events), SLICE_RECORDS):
        _, observed = worker.go_through(events[first : first + SLICE_RECORDS])
        ranks += np.nan_to_num(observed.next_rank, nan=np.inf).tolist()
        top += observed.next_top.tolist()
        hit += [right == 1 for right in observed.next_top_hit]
    assert report["next"] | {"ece": 0} == pytest.approx(prequential.summary(ranks[1:]) | {"ece": 0})
    given = [place for place, score in enumerate(top) if place and score == score]
    error = prequential.calibration_error([top[place] for place in given], [hit[place] for place in given])
    assert report["next"]["ece"] == pytest.approx(error)


def test_the_model_learns(evaluate: Evaluate, tmp_path: Path) -> None:
    report = evaluate(write(tmp_path / "shop.jsonl", shop(3_000)))
    parts = [part["next"]["mrr"] for part in report["deciles"]]
    assert parts[-1] > parts[0]
    assert report["last_20"]["next"]["mrr"] > report["baselines"]["popularity"]["last_20"]["next"]["mrr"]


def test_two_runs_say_the_same(evaluate: Evaluate, tmp_path: Path) -> None:
    path = write(tmp_path / "shop.jsonl", shop())
    assert without_timings(evaluate(path)) == without_timings(evaluate(path))


def test_every_file_is_a_stream_of_its_own(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = write(tmp_path / "one.jsonl", shop()), write(tmp_path / "other.jsonl", shop(seed=2))
    assert main(["evaluate", "--json", one, other]) == 0
    streams = json.loads(capsys.readouterr().out)["streams"]
    assert [stream["file"] for stream in streams] == [one, other]
    assert without_timings(streams[1]) == without_timings(evaluate(other))


def test_the_text_shows_the_model_beside_all_baselines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", write(tmp_path / "shop.jsonl", shop())]) == 0
    out = capsys.readouterr().out
    assert "900 events, 25 users, 12 labels" in out
    for words in (
        "next category, 899 examples",
        "discovery, ",
        "popularity of first times",
        "decayed popularity",
        "Markov",
        "own weights",
        "EASE, offline",
        "item-KNN, offline",
        "logistic, offline",
        "MRR by tenths of the stream",
        "Lift of the top decile of growth weight",
        "Processor time per event",
    ):
        assert words in out


def test_a_half_life_of_the_configuration_is_the_profiles(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "shop.jsonl", shop())
    before = evaluate(path)["baselines"]["own_weights"]["next"]["mrr"]
    monkeypatch.setenv("STREAM_APP__WEIGHTS__HALF_LIFE_S", "3600")
    assert evaluate(path)["baselines"]["own_weights"]["next"]["mrr"] != before


# --- what is judged ----------------------------------------------------------------------------------------


def test_a_sample_keeps_the_users_whose_crc_is_divisible(evaluate: Evaluate, tmp_path: Path) -> None:
    events = shop()
    report = evaluate(write(tmp_path / "shop.jsonl", events), "--sample-users", "3")
    kept = [event for event in events if zlib.crc32(event["user_id"].encode()) % 3 == 0]
    assert 0 < len(kept) < len(events)
    assert report["events"] == len(kept)
    assert report["users"] == len({event["user_id"] for event in kept})
    assert without_timings(report) | {"file": "", "sample_users": None} == without_timings(
        evaluate(write(tmp_path / "kept.jsonl", kept))
    ) | {"file": ""}


def test_returns_are_left_out_and_counted(evaluate: Evaluate, tmp_path: Path) -> None:
    events = shop()
    events += [event | {"event_type": "return"} for event in events[::9]]
    events.sort(key=itemgetter("timestamp"))
    path = write(tmp_path / "shop.jsonl", events)
    report = evaluate(path)
    assert report["left_out"] == {"return": 100}
    assert report["events"] == 900
    assert evaluate(path, "--leave-out", "")["events"] == 1_000
    other = evaluate(path, "--leave-out", "buy", "--leave-out", "return")
    assert set(other["left_out"]) == {"buy", "return"}


def test_a_file_that_goes_back_in_time_is_refused_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = shop(50)
    events[30], events[31] = events[31], events[30]
    assert main(["evaluate", write(tmp_path / "shop.jsonl", events)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "shop.jsonl:32: expected events in the order of their timestamps, since each is judged by what came "
        "before it, got one that is 9,000.000 s earlier than one before it. Operator action: Give --sort, "
        "which reads the file into memory and sorts it.\n"
    )


def test_sort_makes_it_the_same_as_a_sorted_file(evaluate: Evaluate, tmp_path: Path) -> None:
    events = shop()
    expected = evaluate(write(tmp_path / "sorted.jsonl", events))
    random.Random(5).shuffle(events)
    report = evaluate(write(tmp_path / "shuffled.jsonl", events), "--sort")
    assert without_timings(report) | {"file": ""} == without_timings(expected) | {"file": ""}


def test_a_line_that_is_no_event_is_named_and_makes_the_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(event) for event in shop(20)]
    lines[4] = '{"user_id": "u1", "event_type": "view", "timestamp": "yesterday"}'
    lines[6] = "no JSON"
    lines[8] = '{"user_id": "u1", "event_type": "view", "labels": ["a"], "timestamp": 1e400}'
    (tmp_path / "shop.jsonl").write_text("\n".join(lines))
    assert main(["evaluate", "--json", "shop.jsonl"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)["streams"][0]
    assert (report["events"], report["refused"]) == (17, 3)
    named = [line.split(":")[:2] for line in captured.err.splitlines() if line.startswith("refused")]
    assert named == [["refused shop.jsonl", "5"], ["refused shop.jsonl", "7"], ["refused shop.jsonl", "9"]]


def test_an_event_that_comes_twice_counts_once(evaluate: Evaluate, tmp_path: Path) -> None:
    events = [event | {"event_id": f"e{number}"} for number, event in enumerate(shop(100))]
    report = evaluate(write(tmp_path / "shop.jsonl", [*events[:60], events[59], *events[60:]]))
    assert (report["events"], report["duplicates"]) == (100, 1)


def test_a_gzipped_file_is_read_like_a_plain_one(evaluate: Evaluate, tmp_path: Path) -> None:
    plain = write(tmp_path / "shop.jsonl", shop())
    zipped = tmp_path / "shop.jsonl.gz"
    zipped.write_bytes(gzip.compress(Path(plain).read_bytes()))
    expected = without_timings(evaluate(plain)) | {"file": ""}
    assert without_timings(evaluate(str(zipped))) | {"file": ""} == expected


def test_standard_input_is_read_and_the_document_is_all_that_is_printed(tmp_path: Path) -> None:
    path = write(tmp_path / "shop.jsonl", shop())
    with open(path, "rb") as stdin:
        done = subprocess.run(
            [sys.executable, "-m", "stream_app", "evaluate", "--json", "-"],
            stdin=stdin,
            capture_output=True,
            text=True,
            check=True,
        )
    (report,) = json.loads(done.stdout)["streams"]
    assert (report["file"], report["events"]) == ("-", 900)


def test_a_damaged_file_is_one_sentence_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(json.dumps(event) + "\n" for event in shop())
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(text.encode())[:-2000])
    assert main(["evaluate", "cut.jsonl.gz"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("cut.jsonl.gz, after line ")
    assert line.endswith("Repair the file; what a part of it would say of the model is not shown.")


# --- where there is nothing to say -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize(
    ("name", "events"),
    [
        ("empty", []),
        ("unlabelled", [event | {"labels": []} for event in shop(700)]),
        ("one label", [event | {"labels": ["l"]} for event in shop(700)]),
        ("one event", shop(1)),
        ("a new label each time", [event | {"labels": [str(n)]} for n, event in enumerate(shop(700))]),
    ],
)
def test_files_with_little_in_them_have_defined_answers(
    form: str, name: str, events: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "events.jsonl", events)
    if form == "text":
        assert main(["evaluate", path]) == 0
        assert f"{len(events)} events" in capsys.readouterr().out
        return
    assert main(["evaluate", "--json", path]) == 0
    report = json.loads(capsys.readouterr().out)["streams"][0]
    assert report["events"] == len(events)
    if name == "one label":
        assert report["next"]["mrr"] == 1.0
        assert report["baselines"]["popularity"]["next"]["mrr"] == 1.0
    elif name == "a new label each time":
        assert report["next"]["mrr"] == report["discovery"]["mrr"] == 0.0
    else:
        assert report["next"]["mrr"] is None
        assert report["next"]["examples"] == 0
    if name != "a new label each time":
        assert report["discovery"]["mrr"] is None
    assert report["lift"]["value"] is None
    assert (report["us_per_event"] is None) == (name == "empty")


def test_one_user_with_ten_thousand_events_is_judged(evaluate: Evaluate, tmp_path: Path) -> None:
    events = [event | {"user_id": "u"} for event in shop(10_000)]
    report = evaluate(write(tmp_path / "events.jsonl", events))
    assert report["events"] == 10_000
    assert report["discovery"]["examples"] == report["labels"] - 1


def test_without_a_checkout_the_offline_recommenders_are_said_to_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert offline_judge(tmp_path / "offline.py") is None
    monkeypatch.setattr(offline_judge, "__defaults__", (tmp_path / "offline.py",))
    assert main(["evaluate", write(tmp_path / "shop.jsonl", shop(100))]) == 0
    out = capsys.readouterr().out
    assert "Offline recommenders: not installed" in out
    assert "EASE" not in out


# --- real streams ------------------------------------------------------------------------------------------


SAMPLES = {"online_retail": 4, "complete_journey": 5, "ml_latest_small": None, "ciao": None}


def stream(shared_data: Path, name: str) -> Iterator[list[Event]]:
    file = EventFile(
        str(shared_data / f"{name}.jsonl.gz"), leave_out=["return"], sample_users=SAMPLES[name], sort=False
    )
    return file.slices(SLICE_RECORDS, lambda share, done: None)


@pytest.fixture(scope="module")
def reports(shared_data: Path) -> Callable[[str], Report]:
    """Evaluate a stream of the shared data, once."""
    made: dict[str, Report] = {}

    def report(name: str) -> Report:
        if name not in made:
            made[name] = evaluate_stream(stream(shared_data, name), WEIGHTS, offline_judge())
        return made[name]

    return report


def mrr(found: Any) -> float:
    assert found is not None
    assert found.mrr is not None
    return float(found.mrr)


@pytest.mark.parametrize(
    ("name", "next_markov", "first_times", "markov"),
    [
        ("online_retail", 0.385, 0.122, 0.151),
        ("complete_journey", 0.114, 0.108, 0.105),
        ("ml_latest_small", 0.679, 0.600, 0.649),
    ],
)
def test_baselines_are_those_that_were_measured_before_the_model_was_designed(
    reports: Callable[[str], Report], name: str, next_markov: float, first_times: float, markov: float
) -> None:
    baselines = reports(name).baselines
    assert mrr(baselines["markov"]["next"].whole) == pytest.approx(next_markov, abs=6e-4)
    assert mrr(baselines["first_times"]["discovery"].whole) == pytest.approx(first_times, abs=6e-4)
    assert mrr(baselines["markov"]["discovery"].whole) == pytest.approx(markov, abs=6e-4)


def test_on_reviews_they_are_too_if_the_service_never_forgets(shared_data: Path) -> None:
    baselines = Baselines(WEIGHTS)
    judged = [baselines.judge(event) for part in stream(shared_data, "ciao") for event in part]
    nexts = np.array([one.next for one in judged if one.next is not None])
    discoveries = np.array([one.discovery for one in judged if one.discovery is not None])
    for ranks, name, measured in (
        (nexts, "own_weights", 0.731),
        (discoveries, "first_times", 0.600),
        (discoveries, "markov", 0.635),
    ):
        assert mrr(figures(ranks[:, BASELINES.index(name)])) == pytest.approx(measured, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "ease", "item_knn", "logistic"),
    [
        ("online_retail", 0.136, 0.130, 0.146),
        ("complete_journey", 0.117, 0.111, 0.119),
        ("ml_latest_small", 0.670, 0.669, 0.657),
        ("ciao", 0.623, 0.644, 0.614),
    ],
)
def test_offline_recommenders_are_as_good_as_those_that_were_measured(
    reports: Callable[[str], Report], name: str, ease: float, item_knn: float, logistic: float
) -> None:
    offline = reports(name).offline
    assert offline is not None
    for one, measured in (("ease", ease), ("item_knn", item_knn), ("logistic", logistic)):
        assert mrr(offline[one].last_20) > measured - 0.008


@pytest.mark.parametrize(
    ("name", "next_mrr", "discovery_mrr", "ece"),
    [
        ("online_retail", 0.390, 0.156, 0.05),
        ("complete_journey", 0.155, 0.115, 0.05),
        ("ml_latest_small", 0.695, 0.650, 0.08),
        ("ciao", 0.740, 0.650, 0.08),
    ],
)
def test_the_model_is_as_good_as_the_project_asks(
    reports: Callable[[str], Report], name: str, next_mrr: float, discovery_mrr: float, ece: float
) -> None:
    report = reports(name)
    assert mrr(report.model["next"].whole) >= next_mrr
    found = report.model["discovery"].whole
    assert mrr(found) >= discovery_mrr
    assert found is not None
    assert found.ece is not None
    assert found.ece <= ece


@pytest.mark.parametrize("name", ["online_retail", "complete_journey"])
def test_on_the_shops_the_model_beats_what_learned_offline_and_its_top_decile_sells(
    reports: Callable[[str], Report], name: str
) -> None:
    report = reports(name)
    offline = report.offline
    assert offline is not None
    last = mrr(report.model["discovery"].last_20)
    assert {one: mrr(found.last_20) for one, found in offline.items() if mrr(found.last_20) >= last} == {}
    assert report.lift.value is not None
    assert report.lift.value >= 1.5


def test_retail_discovery_is_far_above_popularity_of_first_times(reports: Callable[[str], Report]) -> None:
    report = reports("online_retail")
    popularity = mrr(report.baselines["first_times"]["discovery"].whole)
    assert mrr(report.model["discovery"].whole) >= 1.2 * popularity


def test_journey_next_is_far_above_markov(reports: Callable[[str], Report]) -> None:
    report = reports("complete_journey")
    assert mrr(report.model["next"].whole) >= 1.3 * mrr(report.baselines["markov"]["next"].whole)


def test_films_discovery_is_within_a_hundredth_of_ease(reports: Callable[[str], Report]) -> None:
    report = reports("ml_latest_small")
    assert report.offline is not None
    assert mrr(report.model["discovery"].last_20) >= mrr(report.offline["ease"].last_20) - 0.01


def test_baselines_on_a_real_stream_are_those_of_the_slow_judge(shared_data: Path) -> None:
    file = EventFile(str(shared_data / "ml_latest_small.jsonl.gz"), sample_users=100, sort=False)
    events: list[Event] = [event for part in file.slices(500, lambda share, done: None) for event in part][
        :200
    ]
    seen = [Seen(event.user_id, event.event_time_ms, event.labels) for event in events]
    baselines = Baselines(WEIGHTS)
    fast = [judged for event in events if (judged := baselines.judge(event)).next is not None]
    slow = prequential.examples(seen, WEIGHTS.default_half_life_ms)
    for number, name in enumerate(BASELINES):
        assert [judged.next[number] for judged in fast if judged.next is not None] == [
            one.next[name] for one in slow
        ]
