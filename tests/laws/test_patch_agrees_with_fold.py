"""Events applied to packed profiles against the fold, to the byte, on 100,000 messy events, three times."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgpack
import pytest

from stream_app.core.decay import NEVER_MS, EventTypeWeight, Weights
from stream_app.core.event import Event, Record
from stream_app.core.fold import Fold
from stream_app.core.patch import CHANGED, LEFT, UNCHANGED, Patcher, Stored
from stream_app.core.profile import Profile, pack, unpack
from stream_app.core.segment import Segment
from stream_app.core.segment_set import SegmentSet
from stream_app.core.step import Packed, fold_slice
from stream_app.core.transition import Transition
from tests.laws.running import Run
from tests.random_logs import SHAPES, core_records, core_segments, core_weights, random_log

SEED = 20_261_123
#: Users and the instants at which they leave, as Redis holds them.
Index = dict[str, dict[str, int]]


@dataclass(slots=True)
class PackedRun:
    """A partition's profiles as bytes, and the indexes that commits would have written."""

    fold: Fold
    patcher: Patcher
    blobs: dict[str, bytes] = field(default_factory=dict)
    members: Index = field(default_factory=dict)
    due: dict[str, int] = field(default_factory=dict)
    happened: Counter[str] = field(default_factory=Counter)

    def slice(self, records: list[Record], stream_time_ms: int | None, clock: str) -> list[Transition]:
        users = {record.event.user_id for record in records}
        blobs = {user: self.blobs[user] for user in users if user in self.blobs}
        packed = Packed(self.patcher, blobs, unpack)
        assert clock in ("wall", "event")
        result = fold_slice(
            self.fold, records, {}, stream_time_ms, "wall" if clock == "wall" else "event", {}, packed
        )
        for user, profile in result.profiles.items():
            self.blobs[user] = pack(profile)
            assert packed.before.get(user, {}) == self.members.get(user, {})
            self._index(user, profile.memberships, profile.next_exit_ms)
        self._write(packed.stored.values())
        self.happened["unpacked"] += len(result.profiles)
        return result.transitions

    def expire_due(self, until_ms: int, order: list[str]) -> list[Transition]:
        transitions: list[Transition] = []
        for user in order:
            stored = Stored(user, self.blobs[user])
            outcome = self.patcher.expire(stored, until_ms, transitions)
            if outcome == LEFT:
                self.happened["left to the fold's expire"] += 1
                profile = unpack(user, self.blobs[user])
                transitions += self.fold.expire(profile, until_ms)
                self.blobs[user] = pack(profile)
                self._index(user, profile.memberships, profile.next_exit_ms)
            else:
                assert (outcome == CHANGED) == stored.is_changed
                self._write([stored])
        return transitions

    def _write(self, changed: Iterable[Stored]) -> None:
        for stored in changed:
            if not stored.is_changed:
                assert stored.blob is self.blobs[stored.user_id]
                continue
            user = stored.user_id
            assert stored.first_exit_ms == self.due.get(user, NEVER_MS)
            self.blobs[user] = stored.blob
            members = self.members[user]
            for segment_id, exits_at_ms in stored.moved.items():
                self.happened["moved"] += 1
                if exits_at_ms < 0:
                    self.happened["left"] += 1
                    members.pop(segment_id, None)
                else:
                    members[segment_id] = exits_at_ms
            self.due.pop(user, None)
            if stored.next_exit_ms < NEVER_MS:
                self.due[user] = stored.next_exit_ms
            assert stored.is_in == bool(members)
            assert stored.forget_ms == unpack(user, stored.blob).forget_ms
            self.happened["patched"] += 1

    def _index(self, user: str, memberships: Mapping[str, int], next_exit_ms: int | None) -> None:
        self.members[user] = dict(memberships)
        self.due.pop(user, None)
        if next_exit_ms is not None:
            self.due[user] = next_exit_ms


def assert_the_same(plain: Run, packed: PackedRun, users: set[str], where: str) -> None:
    for user in users:
        profile = plain.profiles[user]
        assert packed.blobs[user] == pack(profile), f"{where}, user {user}"
        assert packed.members[user] == dict(profile.memberships), f"{where}, user {user}"
        assert packed.due.get(user) == profile.next_exit_ms, f"{where}, user {user}"


@pytest.fixture(scope="module")
def happened() -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    yield counts
    print(f"\nseed {SEED}: {dict(counts)}")


@pytest.mark.parametrize(("batch", "excluding"), [(1, False), (40, False), (40, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_patched_is_what_the_fold_makes_of_it_to_the_byte(
    shape: str, batch: int, excluding: bool, happened: Counter[str]
) -> None:
    log = random_log(shape, SEED)
    weights = core_weights(log.weights)
    segments = core_segments(log.segments, log.weights)
    if not excluding:
        alone = [dataclasses.replace(segment, exclude=()) for segment in segments.segments]
        segments = SegmentSet(alone, weights)
    fold = Fold(segments, weights)
    plain, packed = Run(fold, log.clock), PackedRun(fold, Patcher(fold))
    records = core_records(log.records)
    said = 0
    for number, first in enumerate(range(0, len(records), batch)):
        part = list(records[first : first + batch])
        where = f"{log.name}, records from {first}"
        spoken = packed.slice(part, plain.stream_time_ms, log.clock)
        plain.slice(part, stored=True)
        assert spoken == plain.transitions[said:], where
        said = len(plain.transitions)
        users = {record.event.user_id for record in part}
        assert_the_same(plain, packed, users, where)
        if number % 10 == 0 and plain.stream_time_ms is not None:
            due = [
                user
                for user, profile in plain.profiles.items()
                if profile.next_exit_ms is not None and profile.next_exit_ms <= plain.stream_time_ms
            ]
            spoken = packed.expire_due(plain.stream_time_ms, due)
            plain.expire_due()
            assert spoken == plain.transitions[said:], where
            said = len(plain.transitions)
            assert_the_same(plain, packed, set(due), where)
    happened.update(packed.happened)
    happened.update(events=len(records), transitions=said)


def test_much_was_patched_and_much_was_left(happened: Counter[str]) -> None:
    if happened["events"] < 200_000:
        pytest.skip("what happened is only known when the whole module runs")
    assert happened["patched"] > 100_000
    assert happened["left"] > 100_000
    assert happened["moved"] - happened["left"] > 100_000
    assert happened["unpacked"] > 20_000
    assert happened["left to the fold's expire"] > 500


WEIGHTS = Weights(half_life_s=1_000)
FOLD = Fold(SegmentSet([Segment("swim", labels=("swimwear",), min_weight=0.5)], WEIGHTS), WEIGHTS)


def a_profile(events: int = 3) -> Profile:
    profile: Profile | None = None
    for number in range(events):
        event = Event("u", "view", 5_000 + number, f"e-{number}", ("swimwear", "shoes"))
        profile, _ = FOLD.apply(profile, event, event.event_time_ms)
    assert profile is not None
    return profile


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_bytes_that_are_no_profile_are_left_to_who_says_what_is_wrong(cut: int) -> None:
    whole = pack(a_profile())
    for blob in (whole[:cut], whole[:cut] + b"\xc1" + whole[cut + 1 :], whole + b"\x00"):
        stored = Stored("u", blob)
        event = Event("u", "view", 6_000, "e-9", ("swimwear",))
        transitions: list[Transition] = []
        outcome = Patcher(FOLD).apply(stored, event, 6_000, 1, transitions)
        if outcome == LEFT:
            assert stored.blob is blob
            assert transitions == []
            continue
        # A byte inside a number makes another profile. One inside a name may be no text: it stays as it is,
        # for whoever unpacks it.
        try:
            again, _ = FOLD.apply(unpack("u", blob), event, 6_000)
        except ValueError as exc:
            with pytest.raises(ValueError, match=str(exc)[:40]):
                unpack("u", stored.blob)
        else:
            assert pack(again) == stored.blob


def packed_with(**fields: object) -> bytes:
    """Pack a profile and put something into it that `pack` would not."""
    stored = msgpack.unpackb(pack(a_profile()))
    stored.update(fields)
    return bytes(msgpack.packb(stored))


@pytest.mark.parametrize(
    "fields",
    [
        {"w": {"view": [math.inf, {"swimwear": 1.0}, {}]}},
        {"w": {"view": [1.0, {"swimwear": math.nan}, {}]}},
        {"w": {"view": [1.0, {}, {"a-1": -math.inf}]}},
        {"m": {"swim": [2, 9_000_000]}},
        {"m": {"swim": [1, None]}},
        {"m": {"swim": [0, None]}},
        {"m": {"swim": [1, 2**63]}},
        {"n": -1},
        {"i": b"1234567"},
        {"i": bytes(33 * 8)},
        {"v": 2},
        {"d": "of other definitions"},
        {"w": {}},
        {"w": {"view": [1.7e308, {"swimwear": 1.7e308}, {}]}},
    ],
    ids=str,
)
def test_numbers_that_unpacking_refuses_are_left_to_it(fields: dict[str, object]) -> None:
    blob = packed_with(**fields)
    stored = Stored("u", blob)
    event = Event("u", "view", 6_000, "e-9", ("swimwear",))
    assert Patcher(FOLD).apply(stored, event, 6_000, 1, []) == LEFT
    assert stored.blob is blob
    whole = Stored("u", packed_with())
    assert Patcher(FOLD).apply(whole, event, 6_000, 1, []) == CHANGED


@pytest.mark.parametrize("head", [b"\xd9\x08", b"\xda\x00\x08"], ids=["str 8", "str 16"])
def test_a_name_that_is_written_longer_than_need_be_is_left_to_who_reads_names(head: bytes) -> None:
    blob = pack(a_profile()).replace(b"\x82\xa8swimwear", b"\x82" + head + b"swimwear")
    assert unpack("u", blob) == a_profile()
    stored = Stored("u", blob)
    assert Patcher(FOLD).apply(stored, Event("u", "view", 6_000, "e-9", ("swimwear",)), 6_000, 1, []) == LEFT


def test_a_fold_that_keeps_what_the_model_reads_has_no_patcher() -> None:
    with pytest.raises(ValueError, match="keeps nothing for the model"):
        Patcher(Fold(FOLD.segments, WEIGHTS, keeps_seen=True))


@pytest.mark.parametrize("count", [16, 300, 400])
def test_many_segments_of_one_label_are_entered_as_by_the_fold(count: int) -> None:
    # Every second is entered by the second event; the weight of the others is between their thresholds.
    segments = SegmentSet(
        [
            Segment(f"s-{n}", labels=("x",), min_weight=1.5 if n % 2 else 3.0, exit_weight=1.2)
            for n in range(count)
        ],
        WEIGHTS,
    )
    fold = Fold(segments, WEIGHTS)
    patcher = Patcher(fold)
    plain, _ = fold.apply(None, Event("u", "view", 5_000, "e-0", ("x",)), 5_000)
    stored = Stored("u", pack(plain))
    outcomes = []
    for number in range(1, 5):
        event = Event("u", "view", 5_000 + number, f"e-{number}", ("x", "y"))
        transitions: list[Transition] = []
        outcomes.append(patcher.apply(stored, event, event.event_time_ms, number, transitions))
        plain, expected = fold.apply(plain, event, event.event_time_ms, number)
        if outcomes[-1] == LEFT:
            stored = Stored("u", pack(plain))
        else:
            assert transitions == expected
            assert stored.blob == pack(plain)
    # Where so many names are to be compared, the fold is faster.
    assert (LEFT in outcomes) == (count > 16)
    assert outcomes[0] == CHANGED


@pytest.mark.parametrize("match", ["any", "all"])
@pytest.mark.parametrize("count", [1, 30])
def test_many_names_of_who_is_in_no_segment_are_left_to_the_fold(
    count: int, match: Literal["any", "all"]
) -> None:
    labels = tuple(f"label-{n:03d}" for n in range(15))
    segments = [
        Segment(f"s-{n}", labels=("x", *labels), match_labels=match, min_weight=100.0, exit_weight=0.5)
        for n in range(count)
    ]
    fold = Fold(SegmentSet(segments, WEIGHTS), WEIGHTS)
    profile: Profile | None = None
    for number in range(20):
        owned = ("x", *[f"owned-{number}-{n}" for n in range(20)])
        profile, _ = fold.apply(profile, Event("u", "view", 5_000, f"e-{number}", owned), 5_000)
    assert profile is not None
    assert not profile.seqs
    event = Event("u", "view", 6_000, "e", ("x",))
    stored = Stored("u", pack(profile))
    outcome = Patcher(fold).apply(stored, event, 6_000, 1, [])
    # 16 items among 401 labels are 6,400 names a segment, and about as many bytes are stored.
    assert outcome == (LEFT if count > 1 else CHANGED)
    if outcome == CHANGED:
        fold.apply(profile, event, 6_000, 1)
        assert stored.blob == pack(profile)


NAMES = [
    "a",
    "\u00e9" * 20,
    "\u6f22" * 64,
    "\U0001f600" * 64,
    "view",
    "x" * 31,
    "x" * 32,
    "y" * 63,
    "\u00df" * 16,
]
ASSETS = [None, "a", "\U0001f600" * 128, "q" * 128, "n" * 31, "n" * 32, "\u00e9" * 127 + "b"]


@pytest.mark.parametrize("seed", range(40))
def test_names_of_all_lengths_and_early_instants_are_stored_as_by_the_fold(seed: int) -> None:
    chance = random.Random(seed)
    weights = Weights(
        chance.choice([1.0, 3_600.0, 2_592_000.0]), event_types={"x" * 32: EventTypeWeight(2.0, 7.0)}
    )
    segments = [
        Segment(
            f"s-{'i' * (27 + n)}",
            labels=tuple(chance.sample(NAMES, chance.randrange(1, 3))),
            asset_ids=tuple(filter(None, chance.sample(ASSETS, chance.randrange(2)))),
            min_weight=chance.choice([0.0, 0.5, 1.0, 2.0]),
        )
        for n in range(8)
    ]
    fold = Fold(SegmentSet(segments, weights), weights)
    patcher = Patcher(fold)
    # Near the epoch, and where instants begin to need a byte more.
    now_ms = chance.choice([0, 120, 65_500, 2**32 - 300])
    plain: Profile | None = None
    blob = b""
    patched = 0
    for number in range(60):
        now_ms += chance.choice([0, 0, 1, 10, 500])
        event = Event(
            "u",
            chance.choice(["view", "x" * 32, NAMES[3]]),
            chance.choice([now_ms, max(0, now_ms - 700)]),
            f"e-{number}",
            tuple(chance.sample(NAMES, chance.randrange(4))),
            chance.choice(ASSETS),
        )
        stored = Stored("u", blob)
        transitions: list[Transition] = []
        outcome = patcher.apply(stored, event, now_ms, number, transitions) if blob else LEFT
        if outcome == LEFT:
            # What was due may have happened; the fold goes on from there.
            left = unpack("u", stored.blob) if stored.blob else None
            left, rest = fold.apply(left, event, now_ms, number)
            transitions += rest
            blob = pack(left)
        else:
            patched += 1
            blob = stored.blob
        plain, expected = fold.apply(plain, event, now_ms, number)
        assert transitions == expected
        assert blob == pack(plain)
    assert patched > 20


def test_a_duplicate_is_known_also_when_32_ids_are_kept() -> None:
    profile = a_profile(40)
    stored = Stored("u", pack(profile))
    for number in range(8, 40):
        event = Event("u", "view", 9_000, f"e-{number}", ("swimwear",))
        assert Patcher(FOLD).apply(stored, event, 9_000, 1, []) == UNCHANGED
    assert not stored.is_changed
    event = Event("u", "view", 9_000, "e-7", ("swimwear",))
    assert Patcher(FOLD).apply(stored, event, 9_000, 1, []) == CHANGED


@pytest.mark.parametrize("count", [14, 15, 16, 17, 100])
def test_maps_grow_over_the_size_that_one_byte_holds(count: int) -> None:
    labels = tuple(f"label-{n}-{'x' * (n % 50)}" for n in range(count))
    segments = SegmentSet([Segment(f"s-{label}", labels=(label,)) for label in labels], WEIGHTS)
    fold = Fold(segments, WEIGHTS)
    patcher = Patcher(fold)
    plain, _ = fold.apply(None, Event("u", "view", 5_000, "e", ()), 5_000)
    stored = Stored("u", pack(plain))
    for number, label in enumerate(labels):
        event = Event("u", "view", 5_001 + number, f"e-{number}", (label,), f"asset-{label}")
        transitions: list[Transition] = []
        outcome = patcher.apply(stored, event, event.event_time_ms, number, transitions)
        plain, expected = fold.apply(plain, event, event.event_time_ms, number)
        if outcome == LEFT:
            assert plain.applied % 64 == 0
            stored = Stored("u", pack(plain))
        else:
            assert transitions == expected
            assert len(transitions) == 1
        assert stored.blob == pack(plain)
