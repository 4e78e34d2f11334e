"""Packed profiles of the users who came last, so that a slice need not ask Redis for them.

Decides who is kept, within a bound of bytes. Whether what is kept is true is for its owner to know: a cache
belongs to one claim of one partition, learns only what Redis has confirmed, and is thrown away with the
claim when anything fails. While the claim holds nobody else may write, since every commit is fenced:
whatever changes a profile must be a commit, or raise the epoch.

Packed, not as objects: 200 bytes and the profile's own a user, where objects take kilobytes and are slower,
being spread over more memory than a processor keeps at hand.
"""

from __future__ import annotations

from typing import Final

__all__ = ["ProfileCache"]

#: About what Python takes for a user beside the bytes of id and profile.
OVERHEAD_BYTES: Final = 200


class ProfileCache:
    """Users and their packed profiles, the least recently seen forgotten first, about.

    Two generations: who is asked for moves to the young one, and when that holds half of the bound it becomes
    the old one, whose users are forgotten.

    Parameters
    ----------
    most_bytes : int
        Bound of all that is kept; 0 keeps nothing.

    Examples
    --------
    >>> cache = ProfileCache(most_bytes=1_000)
    >>> for user in ("u1", "u2", "u3", "u4", "u5", "u6"):
    ...     cache.put(user, b"packed")
    >>> cache.get("u6"), cache.get("u1"), len(cache)
    (b'packed', None, 3)
    """

    __slots__ = ("_most_bytes", "_old", "_young", "_young_bytes")

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._young: dict[str, bytes] = {}
        self._old: dict[str, bytes] = {}
        self._young_bytes = 0

    def __len__(self) -> int:
        return len(self._young) + sum(user not in self._young for user in self._old)

    def get(self, user_id: str) -> bytes | None:
        """Return a user's packed profile, ``None`` if it is not kept."""
        blob = self._young.get(user_id)
        if blob is None:
            blob = self._old.get(user_id)
            if blob is not None:
                self.put(user_id, blob)
        return blob

    def put(self, user_id: str, blob: bytes) -> None:
        """Keep what Redis holds of a user."""
        before = self._young.get(user_id)
        if before is None:
            self._young_bytes += OVERHEAD_BYTES + len(user_id) + len(blob)
        else:
            self._young_bytes += len(blob) - len(before)
        self._young[user_id] = blob
        if 2 * self._young_bytes > self._most_bytes:
            # In this order, that a bound of 0 keeps nothing.
            self._old = self._young if self._most_bytes else {}
            self._young, self._young_bytes = {}, 0

    def clear(self) -> None:
        """Forget everybody."""
        self._young, self._old, self._young_bytes = {}, {}, 0
