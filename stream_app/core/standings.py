"""A user's standings in base segments, between their stored form and the profile's.

Decides what of them is valid, and nothing else. Apart from `profile` so that it can be compiled: a user who
was in many segments has many of them, and they are read and written with every event.
"""

__all__ = ["from_stored", "to_stored"]


def from_stored(stored: dict[str, tuple[int, int | None]]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the transitions so far and, of those who are in, the instants of leaving, by segment id.

    Raises
    ------
    ValueError
        If a number contradicts its instant.

    Examples
    --------
    >>> from_stored({"swim": (3, 1_700_000_500_000), "ski": (2, None)})
    ({'swim': 3, 'ski': 2}, {'swim': 1700000500000})
    """
    seqs: dict[str, int] = {}
    exits_at_ms: dict[str, int] = {}
    for segment_id, (seq, exit_ms) in stored.items():
        seqs[segment_id] = seq
        if exit_ms is None:
            valid = seq > 0 and seq & 1 == 0
        else:
            exits_at_ms[segment_id] = exit_ms
            valid = seq > 0 and seq & 1 == 1
        if not valid:
            raise ValueError(
                f"expected in m an odd seq with an instant or an even one without, got {(seq, exit_ms)!r}"
            )
    return seqs, exits_at_ms


def to_stored(seqs: dict[str, int], exits_at_ms: dict[str, int]) -> dict[str, tuple[int, int | None]]:
    """Return the stored form of what `from_stored` gave.

    Examples
    --------
    >>> to_stored({"swim": 3, "ski": 2}, {"swim": 1_700_000_500_000})
    {'swim': (3, 1700000500000), 'ski': (2, None)}
    """
    return {segment_id: (seq, exits_at_ms.get(segment_id)) for segment_id, seq in seqs.items()}
