"""The fold against the naive oracle, on more than 100,000 messy events, however their log is cut."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.laws.running import WHOLE, compare, compare_profiles, run
from tests.oracle import Verdict, judge
from tests.random_logs import SHAPES, RandomLog, random_log

SEED = 20_260_101

# records a slice, slices between firings of the due timer (None: at the end), profiles go through bytes
SLICINGS = [
    pytest.param(1, 25, True, id="one by one, stored, with the due timer"),
    pytest.param(7, 3, False, id="by 7, with the due timer"),
    pytest.param(500, 1, True, id="by 500, stored, with the due timer"),
    pytest.param(WHOLE, None, False, id="whole"),
]


@functools.lru_cache(maxsize=1)  # the slicings of one log run one after another
def judged(shape: str) -> tuple[RandomLog, Verdict]:
    log = random_log(shape, SEED)
    return log, judge(log.records, log.segments, log.weights, log.clock)


@pytest.fixture(scope="module")
def happened() -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    yield counts
    print(f"\nseed {SEED}: {dict(counts)}")


@pytest.mark.parametrize(("batch", "expire_every", "stored"), SLICINGS)
@pytest.mark.parametrize("shape", SHAPES, scope="module")
def test_the_fold_says_what_the_oracle_says(
    shape: str, batch: int, expire_every: int | None, stored: bool, happened: Counter[str]
) -> None:
    log, verdict = judged(shape)
    state = run(log, batch, expire_every=expire_every, stored=stored)
    where = f"{log.name}, slices of {batch}"
    assert state.stream_time_ms == verdict.stream_time_ms, where
    agreement = compare(verdict.transitions, state.transitions, where)
    # An instant is only as sharp as the last bits of a logarithm, times the half-life.
    blur_ms = 4 * sys.float_info.epsilon * max(SHAPES[shape].half_lives_s) * 1000
    assert agreement.rounded_otherwise <= agreement.compared * (1e-3 + blur_ms), where
    compare_profiles(verdict.profiles, state, where)
    happened["compared"] += agreement.compared
    happened["rounded_otherwise"] += agreement.rounded_otherwise
    if batch == WHOLE:
        happened.update(events=len(log.records), transitions=len(verdict.transitions))
        happened.update(verdict.happened)


def test_the_logs_hold_more_than_100_000_events_and_every_kind_of_mess(happened: Counter[str]) -> None:
    logs = [random_log(shape, SEED) for shape in SHAPES]
    assert sum(len(log.records) for log in logs) >= 100_000
    assert {log.clock for log in logs} == {"wall", "event"}
    if happened["events"] < 100_000:
        pytest.skip("what happened is only known when the whole module runs")
    assert happened["rounded_otherwise"] < happened["compared"] * 1e-3
    kinds = ["profile_forgotten", "key_forgotten", "duplicate", "suppressed", "refused_by_hold"]
    assert [kind for kind in kinds if happened[kind] < 1000] == []
    assert [kind for kind in ("label_cap", "asset_cap", "type_cap") if happened[kind] == 0] == []
