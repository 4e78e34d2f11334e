"""The stored form of a profile: what comes back, and what is refused."""

import math

import msgpack
import pytest

from stream_app.core.decay import NEVER_MS, EventTypeWeight, Weights
from stream_app.core.profile import Discovery, Profile, TypeSums, pack, unpack, weights_at


def full_profile() -> Profile:
    return Profile(
        user_id="u1",
        landmark_ms=1_700_000_000_000,
        weights={
            "view": TypeSums(3.25, {"swimwear": 1.5, "été 🏖": 0.1}, {"a-1": 3.25}),
            "buy": TypeSums(2.0**499, {}, {}),
        },
        seqs={"swim": 3, "gone": 2, "always": 1},
        exits_at_ms={"swim": 1_700_000_500_000, "always": NEVER_MS},
        recent_ids=b"12345678" + b"\0" * 8,
        applied=77,
        forget_ms=1_800_000_000_000,
        last_transition_ms=1_700_000_000_001,
        definitions="0123456789abcdef",
    )


def discovering_profile() -> Profile:
    """Return the same with what the next-category model adds: two memberships and one that was."""
    profile = full_profile()
    profile.seen_ms = {"été 🏖": 1_700_000_000_000, "swimwear": 1_600_000_000_000}
    profile.discovery = {
        "swim-next": Discovery(3, 1_700_000_000_007, 1_700_000_600_000, ("swimwear", "été 🏖"), 0.1),
        "once": Discovery(4, 1_700_000_000_005),
        "ski-next": Discovery(1, 1_700_000_000_009, 1_700_000_400_000, ("ski",), 5e-324),
    }
    return profile


def stored(**changes: object) -> bytes:
    """Return a small valid profile's bytes with some fields changed."""
    document = {"v": 1, "l": 5, "w": {}, "m": {}, "i": b"", "n": 0, "f": 0, "t": None, "d": ""}
    packed: bytes = msgpack.packb(document | changes)
    return packed


def test_what_is_packed_comes_back_to_the_last_bit() -> None:
    profile = full_profile()
    assert unpack("u1", pack(profile)) == profile


def test_packing_what_was_unpacked_gives_the_same_bytes() -> None:
    blob = pack(full_profile())
    assert pack(unpack("u1", blob)) == blob


def test_the_stored_form_is_the_documented_map() -> None:
    document = msgpack.unpackb(pack(full_profile()))
    assert document == {
        "v": 1,
        "l": 1_700_000_000_000,
        "w": {
            "view": [3.25, {"swimwear": 1.5, "été 🏖": 0.1}, {"a-1": 3.25}],
            "buy": [2.0**499, {}, {}],
        },
        "m": {"swim": [3, 1_700_000_500_000], "gone": [2, None], "always": [1, NEVER_MS]},
        "i": b"12345678" + b"\0" * 8,
        "n": 77,
        "f": 1_800_000_000_000,
        "t": 1_700_000_000_001,
        "d": "0123456789abcdef",
    }


def test_the_next_exit_is_the_earliest_that_ever_comes() -> None:
    profile = full_profile()
    assert profile.next_exit_ms == 1_700_000_500_000
    del profile.exits_at_ms["swim"]
    assert profile.next_exit_ms is None
    assert profile.is_member("always")
    assert not profile.is_member("swim")


def test_what_the_model_adds_comes_back_to_the_last_bit_and_in_its_order() -> None:
    profile = discovering_profile()
    again = unpack("u1", pack(profile))
    assert again == profile
    assert list(again.seen_ms) == ["été 🏖", "swimwear"]
    assert pack(again) == pack(profile)


def test_what_the_model_adds_is_stored_as_documented() -> None:
    document = msgpack.unpackb(pack(discovering_profile()))
    assert {key: document.pop(key) for key in ("s", "p")} == {
        "s": {"été 🏖": 1_700_000_000_000, "swimwear": 1_600_000_000_000},
        "p": {
            "swim-next": [3, 1_700_000_600_000, ["swimwear", "été 🏖"], 0.1, 1_700_000_000_007],
            "once": [4, None, None, 0.0, 1_700_000_000_005],
            "ski-next": [1, 1_700_000_400_000, ["ski"], 5e-324, 1_700_000_000_009],
        },
    }
    assert document == msgpack.unpackb(pack(full_profile()))


@pytest.mark.parametrize("kept", ["seen_ms", "discovery"])
def test_either_of_what_the_model_adds_may_be_there_alone(kept: str) -> None:
    profile = discovering_profile()
    for name in {"seen_ms", "discovery"} - {kept}:
        setattr(profile, name, {})
    assert len(msgpack.unpackb(pack(profile))) == 10
    assert unpack("u1", pack(profile)) == profile


def test_without_the_model_a_profile_has_the_bytes_that_it_had_before_there_was_one() -> None:
    profile = Profile("u1", 1_000, {"view": TypeSums(1.5, {"swimwear": 1.5}, {})}, forget_ms=2_000)
    assert pack(profile).hex() == (
        "89a17601a16ccd03e8a17781a47669657793cb3ff800000000000081a87377696d77656172cb3ff800000000000080"
        "a16d80a169c400a16e00a166cd07d0a174c0a164a0"
    )
    assert list(msgpack.unpackb(pack(full_profile()))) == list("vlwminftd")


def test_memberships_are_those_of_both_kinds() -> None:
    profile = discovering_profile()
    assert profile.memberships == {
        "swim": 1_700_000_500_000,
        "always": NEVER_MS,
        "swim-next": 1_700_000_600_000,
        "ski-next": 1_700_000_400_000,
    }
    assert profile.next_exit_ms == 1_700_000_400_000
    profile.discovery["ski-next"] = Discovery(2, 1_700_000_400_000)
    assert profile.next_exit_ms == 1_700_000_500_000
    assert full_profile().memberships == {"swim": 1_700_000_500_000, "always": NEVER_MS}


def test_a_lease_alone_is_the_next_exit() -> None:
    profile = Profile("u1", 0, discovery={"next": Discovery(1, 5, 9, ("a",), 0.5)})
    assert (profile.memberships, profile.next_exit_ms) == ({"next": 9}, 9)
    profile.discovery["next"] = Discovery(2, 9)
    assert (profile.memberships, profile.next_exit_ms) == ({}, None)


def test_a_member_of_a_discovery_segment_is_in_no_base_segment_by_that() -> None:
    assert not discovering_profile().is_member("swim-next")


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"v": None},
        {"extra": 1},
        {"l": 1.5},
        {"l": None},
        {"n": None},
        {"f": "0"},
        {"t": 0.5},
        {"d": 7},
        {"d": None},
        {"i": b"1234567"},
        {"i": b"\0" * 8 * 33},
        {"i": "12345678"},
        {"w": []},
        {"w": {"view": [1.0, {}]}},
        {"w": {"view": ["1", {}, {}]}},
        {"w": {"view": [1.0, {"a": "x"}, {}]}},
        {"w": {"view": [1.0, {b"a": 1.0}, {}]}},
        {"w": {b"view": [1.0, {}, {}]}},
        {"w": {"view": [1.0, [], {}]}},
        {"w": {"view": [math.nan, {}, {}]}},
        {"w": {"view": [1.0, {"a": math.inf}, {}]}},
        {"w": {"view": [1.0, {"a": math.inf, "b": -math.inf}, {}]}},
        {"w": {"view": [1.0, {}, {"a": math.nan, "b": 1.0}]}},
        {"m": {"swim": [1, None]}},
        {"m": {"swim": [2, 5]}},
        {"m": {"swim": [0, None]}},
        {"m": {"swim": [1.0, 5]}},
        {"m": {"swim": [1]}},
        {"m": {b"swim": [1, 5]}},
        {"m": {"swim": [2, 5.0]}},
        {"m": {"swim": [2, "5"]}},
        {"m": {"swim": [2, True]}},
        {"s": {"a": True}},
        {"p": {"next": [2, 5.0, None, 0.0, 3]}},
        {"p": {"next": [2, "5", None, 0.0, 3]}},
        {"p": {"next": [2, True, None, 0.0, 3]}},
        {"p": {"next": [2, None, ["a"], 0.0, 3]}},
        {"p": {"next": [2, None, [], 0.0, 3]}},
        {"p": {"next": [2, None, None, 0.5, 3]}},
        {"p": {"next": [1, 5, None, 0.5, 3]}},
        {"p": {"next": [1, 5, [], 0.5, 3]}},
        {"p": {"next": [1, 5, 0, 0.5, 3]}},
        {"p": {"next": [1, 5, "ab", 0.5, 3]}},
        {"p": {"next": [1, 5, {"a": 1}, 0.5, 3]}},
        {"p": {"next": [1, 5, [1], 0.5, 3]}},
        {"p": {"next": [1, 5, [b"a"], 0.5, 3]}},
        {"p": {"next": [1, 5, ["a", None], 0.5, 3]}},
        {"s": None},
        {"s": 7},
        {"s": []},
        {"s": ["a"]},
        {"s": "a"},
        {"s": {"a": None}},
        {"s": {"a": "5"}},
        {"s": {"a": 5.0}},
        {"s": {"a": [5]}},
        {"s": {"a": math.nan}},
        {"s": {"a": 1.5, "b": -1.5}},
        {"s": {b"a": 5}},
        {"s": {5: 5}},
        {"p": None},
        {"p": 7},
        {"p": []},
        {"p": ["next"]},
        {"p": "next"},
        {"p": {"next": None}},
        {"p": {"next": 7}},
        {"p": {"next": [1, 5, ["a"], 0.5]}},
        {"p": {"next": [1, 5, ["a"], 0.5, 3, 4]}},
        {"p": {"next": [1, None, ["a"], 0.5, 3]}},
        {"p": {"next": [1, 5.0, ["a"], 0.5, 3]}},
        {"p": {"next": [1, "5", ["a"], 0.5, 3]}},
        {"p": {"next": [2, 5, ["a"], 0.5, 3]}},
        {"p": {"next": [0, None, None, 0.0, 3]}},
        {"p": {"next": [-1, 5, ["a"], 0.5, 3]}},
        {"p": {"next": [1.0, 5, ["a"], 0.5, 3]}},
        {"p": {"next": [True, 5, ["a"], 0.5, 3]}},
        {"p": {"next": [None, 5, ["a"], 0.5, 3]}},
        {"p": {"next": [1, 5, 7, 0.5, 3]}},
        {"p": {"next": [1, 5, True, 0.5, 3]}},
        {"p": {"next": [1, 5, ["a"], None, 3]}},
        {"p": {"next": [1, 5, ["a"], "0.5", 3]}},
        {"p": {"next": [1, 5, ["a"], math.nan, 3]}},
        {"p": {"next": [1, 5, ["a"], math.inf, 3]}},
        {"p": {"next": [1, 5, ["a"], 0.5, None]}},
        {"p": {"next": [1, 5, ["a"], 0.5, 3.0]}},
        {"p": {"next": [1, 5, ["a"], 0.5, "3"]}},
        {"p": {b"next": [1, 5, ["a"], 0.5, 3]}},
        {"p": {"next": [1, 5, ["a"], 0.5, 3]}, "s": {"a": None}},
        {"s": {"a": 5}, "extra": 1},
        {"p": {"next": [1, 5, ["a"], 0.5, 3]}, "s": {"a": 5}, "extra": 1},
        {"s": {"a": 5}, "v": 2},
    ],
    ids=str,
)
def test_a_stored_form_that_is_not_ours_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a profile: "):
        unpack("u1", stored(**changes))


@pytest.mark.parametrize("added", [{"s": {"a": 5}}, {"p": {"next": [2, None, None, 0.0, 3]}}], ids=str)
@pytest.mark.parametrize("field", "vlwminftd")
def test_what_the_model_adds_does_not_stand_in_for_a_field(field: str, added: dict[str, object]) -> None:
    document = msgpack.unpackb(stored(**added))
    del document[field]
    with pytest.raises(ValueError, match="not a profile: "):
        unpack("u1", msgpack.packb(document))


@pytest.mark.parametrize(
    "blob", [b"", b"\xc1", b"\x80", b"\x93\x01\x02\x03", stored()[:-1], stored() + b"\0", b"\x91" * 2_000]
)
def test_bytes_that_are_no_profile_are_refused(blob: bytes) -> None:
    with pytest.raises(ValueError, match="not a profile: "):
        unpack("u1", blob)


def test_a_whole_number_written_as_an_integer_is_the_same_number() -> None:
    blob = stored(w={"view": [1, {"a": 1}, {}]}, p={"next": [1, 5, ["a"], 1, 3]})
    profile = unpack("u1", blob)
    assert profile.weights == {"view": TypeSums(1.0, {"a": 1.0}, {})}
    assert profile.discovery["next"].score == 1.0


def test_the_smallest_valid_profile_is_accepted() -> None:
    assert unpack("u1", stored()) == Profile("u1", 5)


def test_readers_see_every_key_decayed_by_its_own_half_life() -> None:
    weights = Weights(half_life_s=60, event_types={"buy": EventTypeWeight(2.0, 120)})
    profile = Profile(
        "u1", 1_000, {"view": TypeSums(4.0, {"a": 2.0}, {"x": 1.0}), "buy": TypeSums(8.0, {"a": 8.0}, {})}
    )
    assert weights_at(profile, weights, 121_000) == {
        "view": TypeSums(1.0, {"a": 0.5}, {"x": 0.25}),
        "buy": TypeSums(4.0, {"a": 4.0}, {}),
    }


def test_a_reader_whose_clock_is_behind_the_landmark_sees_the_weights_there() -> None:
    profile = Profile("u1", 10**12, {"view": TypeSums(1.0, {}, {})})
    assert weights_at(profile, Weights(half_life_s=1), 0) == {"view": TypeSums(1.0, {}, {})}


def test_reading_changes_nothing() -> None:
    profile = full_profile()
    weights_at(profile, Weights(), 1_700_000_000_500)
    assert profile == full_profile()
