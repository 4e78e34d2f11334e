"""Nothing is lost, said twice under two ids or said in the wrong order, whatever goes wrong, seed by seed.

``FAULT_SEEDS`` says how many seeds (the nightly run: 2,000), ``FAULT_SEED`` the first of them.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from stream_app.adapters.profile_store import Commit, Identity, ProfileStore
from stream_app.errors import Fenced
from tests.e2e.proof import Proof
from tests.faults.rows import Row, seed
from tests.simulation.faults import CALL_FATES, EVENT_FATES, EVENTS, SLICE_FATES
from tests.simulation.memory_redis import MemoryClient, MemoryRedis
from tests.simulation.run import Outcome, Switches, run_seed

FIRST_SEED: Final = seed()
SEEDS: Final = int(os.environ.get("FAULT_SEEDS", "220"))
SEEDS_A_TEST: Final = 20
#: Seeds that have shown a defect of the service.
FOUND_SOMETHING: Final = (11, 79, 88, 170, 181, 212, 474, 513)
#: Among this many seeds a control must report something. Without commit numbers it takes the most: what a
#: worker has kept of its users hides that Redis was set back.
CONTROL_SEEDS: Final = 300
DIARY_SHOWN: Final = 150

#: Effects of faults that some seed must have had, beside the faults themselves.
EFFECTS: Final = (
    "Redis found away",
    "Kafka found away",
    "refused: fenced",
    "refused: lost",
    "refused: mismatch",
    "zombie found by Kafka",
    "member expired",
    "rebalance heard of late",
    "drained",
    "frozen",
    "repeats",
    "called replayed as promised",
    "dead letters",
    "history",
)

pytestmark = pytest.mark.faults

_counts: Counter[str] = Counter()
_proofs: list[Proof] = []


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Whatever the service logs of thousands of faults hides what failed; the diary tells it in order."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def report(outcome: Outcome) -> str:
    """What failed, how to run it alone, and what had happened."""
    return "\n".join(
        [
            f"seed {outcome.seed}: run it alone with",
            f"  FAULT_SEED={outcome.seed} FAULT_SEEDS=1 .venv/bin/pytest tests/simulation -k every_seed",
            *outcome.problems,
            f"the last {DIARY_SHOWN} lines of its diary:",
            *outcome.diary[-DIARY_SHOWN:],
        ]
    )


@pytest.mark.parametrize("first", range(FIRST_SEED, FIRST_SEED + SEEDS, SEEDS_A_TEST))
def test_every_seed_ends_in_what_the_oracle_proved_of_its_log(first: int) -> None:
    for number in range(first, min(first + SEEDS_A_TEST, FIRST_SEED + SEEDS)):
        outcome = run_seed(number)
        _proofs.append(outcome.proof)
        assert not outcome.problems, report(outcome)
        _counts.update(outcome.counts)


@pytest.mark.parametrize("seed", FOUND_SOMETHING)
def test_what_a_seed_has_found_stays_mended(seed: int) -> None:
    outcome = run_seed(seed)
    assert not outcome.problems, report(outcome)


@pytest.mark.skipif(SEEDS < 200, reason="few seeds do not meet every fault")
def test_over_the_seeds_every_fault_was_met_and_had_an_effect(fault_row: Callable[[str, str], Row]) -> None:
    if not _counts:
        pytest.skip("counts what the seeds before it met: run the whole file")
    row = fault_row(
        f"simulation: everything at once, by chance, seeds {FIRST_SEED} to {FIRST_SEED + SEEDS - 1}",
        "nothing lost, nothing twice, in order, `replayed` as promised",
    )
    for proof in _proofs:
        row.judge(proof)
    assert len(_proofs) == SEEDS, "a seed has failed, and the rest of its portion was not run"
    for what in (
        "crash",
        "frozen",
        "reply lost",
        "Redis emptied",
        "Redis restored",
        "rebalance",
        "refused: fenced",
    ):
        row.note(f"{what}: {sum(count for name, count in _counts.items() if what in name):,}")
    names = set(EFFECTS) | set(SLICE_FATES) | set(EVENT_FATES) | set(EVENTS) - {"terminated"}
    fates = [fate for fate in CALL_FATES if not fate.startswith(("torn", "refused g"))]
    names |= {f"{where}, {fate}" for fate in fates for where in ("Redis", "Kafka")}
    names |= {"Kafka, torn", "Kafka, torn crash", "generation refused"}
    names |= {f"crash, {when} {what}" for when in ("before", "after") for what in ("claim", "commit")}
    names |= {f"crash, before {what}" for what in ("mget", "xrange", "zrange", "hset")}
    names |= {f"crash, before Kafka, {what}" for what in ("publish", "ends", "rewind", "generation")}
    names |= {"crash, after Kafka, publish", "crash, in the middle of Kafka, publish"}
    assert {name for name in names if not _counts[name]} == set()


@pytest.mark.parametrize("seed", [FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2])
def test_the_same_seed_is_the_same_run(seed: int) -> None:
    first, second = run_seed(seed), run_seed(seed)
    assert first.diary == second.diary
    assert first.counts == second.counts
    assert run_seed(seed + 1).diary != first.diary


@pytest.mark.parametrize("fence", [True, False])
async def test_only_the_fence_keeps_a_zombie_out_of_a_state_that_counts_as_far_as_its_own(
    fence: bool,
) -> None:
    # Commit numbers stop most of what a fence stops; not this: Redis was emptied, and has got as far again.
    server = MemoryRedis(lambda: 0)
    server.unchecked = frozenset() if fence else frozenset({"fenced"})
    zombie_client: Any = MemoryClient(server)
    owner_client: Any = MemoryClient(server)
    zombie, owner = ProfileStore(zombie_client, "zombie"), ProfileStore(owner_client, "owner")
    identity = Identity("cluster-1", "events", 1, "stream-app", "wall", "{}")
    for store in (zombie, owner):
        server.flushall()
        claim = await store.claim(
            0, identity, last_epoch=0, log_start=0, processed_below=None, replay_when_new=None,
            definitions=("f", "{}"),
        )  # fmt: skip
        assert claim.watermark.epoch == 1
        await store.commit(0, 1, 1, Commit(watermark=30 if store is zombie else 5, outbox=[b"unpublished"]))
    if fence:
        with pytest.raises(Fenced):
            await zombie.commit(0, 1, 2, Commit(watermark=40))
    else:
        await zombie.commit(0, 1, 2, Commit(watermark=40))
    lost = server.hget("sa:{0}:wm", "watermark") == b"40" and not server.xlen("sa:{0}:outbox")
    assert lost is not fence


@pytest.mark.parametrize(
    ("switched_off", "switches"),
    [
        ("asking whether Redis lost the state", Switches(unchecked=frozenset({"lost"}))),
        ("fence and commit numbers", Switches(unchecked=frozenset({"fenced", "mismatch"}))),
        ("commit numbers", Switches(unchecked=frozenset({"mismatch"}))),
        ("publishing what a crash left in the outbox", Switches(publishes_outbox=False)),
    ],
)
def test_with_a_guard_switched_off_the_same_seeds_report_it(
    switched_off: str, switches: Switches, fault_row: Callable[[str, str], Row]
) -> None:
    row = fault_row(f"simulation, without {switched_off}", "a control: it must report losses or duplicates")
    for number in range(FIRST_SEED, FIRST_SEED + CONTROL_SEEDS):
        proof = run_seed(number, switches).proof
        if proof.missing or proof.extra or proof.out_of_order or proof.wrong or proof.state:
            row.control(f"seed {number}", proof)
            return
    pytest.fail(f"{CONTROL_SEEDS} seeds, and nobody misses it")
