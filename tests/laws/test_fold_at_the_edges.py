"""The fold against the oracle where one millisecond decides: at exits, forget instants and the 10 ms hold.

Random instants hardly ever meet an edge. Here every record is placed with the oracle's knowledge of its user.
"""

from __future__ import annotations

import math
import random

import pytest

from tests.laws.running import compare, compare_profiles, run
from tests.oracle import Clock, Oracle, OracleRecord, judge
from tests.random_logs import RandomLog, Shape, label_name, random_segments, random_weights, type_name

SHAPE = Shape(400, 3, "event", 1000, (8.0, 2.0, 30.0), labels=4, assets=4, event_types=4)
LABELS = [label_name(n) for n in range(SHAPE.labels)]


def edge_log(seed: int, clock: Clock) -> RandomLog:
    """Make a log whose records fall on, or a hair beside, what is due."""
    rng = random.Random(seed)
    segments, weights = random_segments(rng, SHAPE), random_weights(rng, SHAPE)
    oracle = Oracle(segments, weights)
    now_ms = SHAPE.first_ms
    records: list[OracleRecord] = []
    leap_share = (0.15, 0.0)[seed % 2]  # to the last edge, a forget instant; without, users grow old
    for n in range(SHAPE.events):
        user_id = f"u{rng.randrange(SHAPE.users)}"
        user = oracle.users.get(user_id)
        edges = []
        if user is not None:
            edges += [exit_ms + d for exit_ms in user.members.values() for d in (-11, -10, -9, -1, 0, 1)]
            edges += [user.forget_ms + d for d in (0, 1)]
        edges = sorted(edge for edge in edges if edge >= now_ms)
        if edges and rng.random() < 0.5:
            now_ms = edges[-1] if rng.random() < leap_share else rng.choice(edges[:4])
        elif rng.random() < 0.3:
            now_ms += rng.randrange(1000)
        event_type = type_name(rng.randrange(SHAPE.event_types))
        event_time_ms = now_ms
        action = oracle.action_weight(event_type)
        if action > 0 and rng.random() < 0.4:  # so late that alone it stands a few ms above some threshold
            rule = rng.choice(oracle.rules)
            half_lives_old = math.log2(max(action, rule.enter_at) / rule.enter_at)
            event_time_ms += rng.choice([-1, 8, 9, 10, 11]) - round(
                half_lives_old * oracle.half_life_ms(event_type)
            )
        event_id = f"e{n}"
        if user is not None and len(user.ids) == 32 and rng.random() < 0.2:
            # The oldest of the last 32, the one just before it, or the newest.
            mine = [record.event_id for record in records if record.user_id == user_id]
            before = [other for other in mine if other not in user.ids]
            event_id = rng.choice([user.ids[0], user.ids[-1], *before[-1:]])
        record = OracleRecord(
            offset=n,
            kafka_time_ms=now_ms,
            user_id=user_id,
            event_type=event_type,
            event_time_ms=min(event_time_ms, now_ms),
            event_id=event_id,
            labels=tuple(rng.sample(LABELS, rng.randrange(3))),
            asset_id=rng.choice([None, "asset-0", "asset-1", "asset-2"]),
        )
        oracle.fold(record, clock)
        records.append(record)
    return RandomLog(f"edge_log({seed}, {clock!r})", clock, records, segments, weights)


@pytest.mark.parametrize("clock", ["event", "wall"])
@pytest.mark.parametrize("seed", range(12))
def test_the_fold_and_the_oracle_agree_to_the_millisecond(seed: int, clock: Clock) -> None:
    log = edge_log(seed, clock)
    verdict = judge(log.records, log.segments, log.weights, log.clock)
    for batch, expire_every, stored in ((1, 1, True), (7, None, False)):
        state = run(log, batch, expire_every=expire_every, stored=stored)
        agreement = compare(verdict.transitions, state.transitions, log.name)
        assert agreement.compared > 300, log.name
        compare_profiles(verdict.profiles, state, log.name)
