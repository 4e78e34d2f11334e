"""The stored form of a user's scores: what comes back, and what is refused."""

import math

import msgpack
import pytest

from stream_app.core.scores import MAX_SCORES, Recommendation, Scored, pack_scores, unpack_scores


def full_scores() -> Scored:
    return Scored(
        user_id="u1",
        at_ms=1_700_000_000_000,
        next_categories=[("swimwear", 0.5), ("été 🏖", 0.1), ("tea", 5e-324)],
        recommendations=[
            Recommendation("view", "a-1", ("été 🏖", "beach"), 0.25, 0.1),
            Recommendation("buy", None, ("ski",), 0.0, 1.0),
        ],
        model_version="0123456789abcdef",
    )


def stored(**changes: object) -> bytes:
    """Return small valid scores' bytes with some fields changed."""
    document = {
        "v": 1,
        "t": 5,
        "m": "9f2c",
        "n": [["a", 0.5]],
        "r": [["view", None, ["b"], 0.5, 0.25]],
    }
    packed: bytes = msgpack.packb(document | changes)
    return packed


def test_what_is_packed_comes_back_to_the_last_bit() -> None:
    assert unpack_scores("u1", pack_scores(full_scores())) == full_scores()


def test_packing_what_was_unpacked_gives_the_same_bytes() -> None:
    blob = pack_scores(full_scores())
    assert pack_scores(unpack_scores("u1", blob)) == blob


def test_the_stored_form_is_the_documented_map() -> None:
    assert msgpack.unpackb(pack_scores(full_scores())) == {
        "v": 1,
        "t": 1_700_000_000_000,
        "m": "0123456789abcdef",
        "n": [["swimwear", 0.5], ["été 🏖", 0.1], ["tea", 5e-324]],
        "r": [["view", "a-1", ["été 🏖", "beach"], 0.25, 0.1], ["buy", None, ["ski"], 0.0, 1.0]],
    }


def test_a_new_model_predicts_nothing_and_that_comes_back() -> None:
    nothing = Scored("u1", 0, [], [])
    assert unpack_scores("u1", pack_scores(nothing)) == nothing


def test_as_many_as_are_kept_come_back_in_their_order() -> None:
    scores = Scored(
        "u1",
        7,
        [(f"label-{n}", 1 / (n + 1)) for n in range(MAX_SCORES)],
        [Recommendation("view", f"a-{n}", (f"label-{n}",), 1 / (n + 1), 0.0) for n in range(MAX_SCORES)],
        "9f2c",
    )
    assert unpack_scores("u1", pack_scores(scores)) == scores


def test_the_smallest_valid_scores_are_accepted() -> None:
    assert unpack_scores("u7", stored()) == Scored(
        "u7", 5, [("a", 0.5)], [Recommendation("view", None, ("b",), 0.5, 0.25)], "9f2c"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"v": None},
        {"v": "1"},
        {"t": 5.0},
        {"t": None},
        {"t": True},
        {"t": "5"},
        {"m": None},
        {"m": 7},
        {"m": b"9f2c"},
        {"n": None},
        {"n": 7},
        {"n": ""},
        {"n": {}},
        {"n": "ab"},
        {"n": {"ab": 1.0}},
        {"n": ["ab"]},
        {"n": [["a"]]},
        {"n": [["a", 0.5, 0.5]]},
        {"n": [["a", 1]]},
        {"n": [["a", None]]},
        {"n": [["a", "0.5"]]},
        {"n": [["a", math.nan]]},
        {"n": [["a", math.inf], ["b", -math.inf]]},
        {"n": [[b"a", 0.5]]},
        {"n": [[None, 0.5]]},
        {"n": [[1, 0.5]]},
        {"n": [[["a"], 0.5]]},
        {"r": None},
        {"r": 7},
        {"r": ""},
        {"r": {}},
        {"r": "views"},
        {"r": {"views": 1}},
        {"r": [["view", None, ["b"], 0.5]]},
        {"r": [["view", None, ["b"], 0.5, 0.25, 0.1]]},
        {"r": [[None, None, ["b"], 0.5, 0.25]]},
        {"r": [[b"view", None, ["b"], 0.5, 0.25]]},
        {"r": [["view", 7, ["b"], 0.5, 0.25]]},
        {"r": [["view", 0, ["b"], 0.5, 0.25]]},
        {"r": [["view", False, ["b"], 0.5, 0.25]]},
        {"r": [["view", b"", ["b"], 0.5, 0.25]]},
        {"r": [["view", [], ["b"], 0.5, 0.25]]},
        {"r": [["view", None, [], 0.5, 0.25]]},
        {"r": [["view", None, "ab", 0.5, 0.25]]},
        {"r": [["view", None, {"b": 1}, 0.5, 0.25]]},
        {"r": [["view", b"a-1", ["b"], 0.5, 0.25]]},
        {"r": [["view", ["a-1"], ["b"], 0.5, 0.25]]},
        {"r": [["view", None, None, 0.5, 0.25]]},
        {"r": [["view", None, 7, 0.5, 0.25]]},
        {"r": [["view", None, [1], 0.5, 0.25]]},
        {"r": [["view", None, [b"b"], 0.5, 0.25]]},
        {"r": [["view", None, ["b", None], 0.5, 0.25]]},
        {"r": [["view", None, ["b"], 1, 0.25]]},
        {"r": [["view", None, ["b"], 0.5, 0]]},
        {"r": [["view", None, ["b"], math.nan, 0.25]]},
        {"r": [["view", None, ["b"], 0.5, math.inf]]},
        {"r": [["view", None, ["b"], 0.5, -math.inf]]},
        {"r": [["view", None, ["b"], None, 0.25]]},
    ],
    ids=str,
)
def test_a_stored_form_that_is_not_ours_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not scores: "):
        unpack_scores("u1", stored(**changes))


@pytest.mark.parametrize("field", "vtmnr")
def test_scores_without_one_of_the_fields_are_refused(field: str) -> None:
    document = msgpack.unpackb(stored())
    del document[field]
    with pytest.raises(ValueError, match="not scores: "):
        unpack_scores("u1", msgpack.packb(document))


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\xc0",
        b"\xc1",
        b"\x80",
        b"\x93\x01\x02\x03",
        b"\x81\x92\x01\x02\x03",
        stored()[:-1],
        stored() + b"\0",
        b"\x91" * 2_000,
    ],
    ids=lambda blob: blob[:4].hex() + f"-{len(blob)}",
)
def test_bytes_that_are_no_scores_are_refused(blob: bytes) -> None:
    with pytest.raises(ValueError, match="not scores: "):
        unpack_scores("u1", blob)


def test_a_refusal_does_not_name_the_user() -> None:
    with pytest.raises(ValueError, match="not scores: ") as refused:
        unpack_scores("somebody", b"\x80")
    assert "somebody" not in str(refused.value)
