"""Where things stand in packed profiles, and how to write them: msgpack, as far as profiles are made of it.

Decides nothing: `profile.pack` says what is stored and in which order, `patch` what becomes of it. Bytes that
are something else, or end early, raise IndexError. Written for mypyc: numbers of the machine, no objects.
"""

from typing import Final

from librt.strings import BytesWriter, read_f64_be, read_i64_be, write_f64_be, write_i64_be
from mypy_extensions import i64, u8

__all__ = [
    "NIL",
    "after_int",
    "after_sums",
    "after_text",
    "check_sum",
    "find_sum",
    "first_key",
    "is_field",
    "is_same",
    "map_size",
    "packed_text",
    "read_int",
    "write_int",
    "write_map_size",
    "write_sums",
]

NIL: Final = 0xC0
FLOAT64: Final = 0xCB
UINT64: Final = 0xCF


def packed_text(text: str) -> bytes:
    r"""Return a string in msgpack.

    Examples
    --------
    >>> packed_text("swim"), len(packed_text("s" * 40)), len(packed_text("s" * 300))
    (b'\xa4swim', 42, 303)
    """
    raw = text.encode()
    size = len(raw)
    if size < 32:
        return bytes([0xA0 | size]) + raw
    if size < 256:
        return bytes([0xD9, size]) + raw
    return bytes([0xDA, size >> 8, size & 0xFF]) + raw


def is_field(b: bytes, i: i64, name: i64) -> bool:
    """Tell whether a field of this one letter begins here."""
    return b[i] == 0xA1 and b[i + 1] == name


def is_same(b: bytes, at: i64, end: i64, wire: bytes) -> bool:
    """Tell whether this part of a profile is these bytes.

    From the end, where names differ that have a beginning in common, and eight bytes at a time: among names
    of 55 bytes that end alike one is found in a third of the time that single bytes took.
    """
    k = i64(len(wire))
    if end - at != k:
        return False
    while k >= 8:
        k -= 8
        if read_i64_be(b, at + k) != read_i64_be(wire, k):
            return False
    while k > 0:
        k -= 1
        if b[at + k] != wire[k]:
            return False
    return True


def after_text(b: bytes, i: i64) -> i64:
    """Return where a string ends; one written longer than need be would not be found by its bytes."""
    first: i64 = b[i]
    if 0xA0 <= first <= 0xBF:
        return i + 1 + (first & 31)
    if first == 0xD9:
        size: i64 = b[i + 1]
        if size >= 32:
            return i + 2 + size
    elif first == 0xDA:
        high: i64 = b[i + 1]
        low: i64 = b[i + 2]
        if high > 0:
            return i + 3 + (high << 8 | low)
    raise IndexError


def after_int(b: bytes, i: i64) -> i64:
    """Return where a number that is not negative ends."""
    first: i64 = b[i]
    if first < 0x80:
        return i + 1
    if 0xCC <= first <= 0xCF:
        return i + 1 + (1 << (first - 0xCC))
    raise IndexError


def read_int(b: bytes, i: i64) -> i64:
    """Return a number that is not negative."""
    first: i64 = b[i]
    if first < 0x80:
        return first
    if first == UINT64:
        found = read_i64_be(b, i + 1)
        if found < 0:
            raise IndexError
        return found
    end = after_int(b, i)
    found = 0
    i += 1
    while i < end:
        found = found << 8 | i64(b[i])
        i += 1
    return found


def write_int(out: BytesWriter, number: i64) -> None:
    """Write a number that is not negative, as short as can be."""
    if number < 0x80:
        out.append(u8(number))
    elif number >= 0x1_0000_0000:
        out.append(UINT64)
        write_i64_be(out, number)
    else:
        if number < 0x100:
            out.append(0xCC)
        elif number < 0x1_0000:
            out.append(0xCD)
            out.append(u8(number >> 8))
        else:
            out.append(0xCE)
            out.append(u8(number >> 24))
            out.append(u8(number >> 16 & 0xFF))
            out.append(u8(number >> 8 & 0xFF))
        out.append(u8(number & 0xFF))


def map_size(b: bytes, i: i64) -> i64:
    """Return how many pairs a map has."""
    first: i64 = b[i]
    if 0x80 <= first <= 0x8F:
        return first & 15
    if first == 0xDE:
        high: i64 = b[i + 1]
        low: i64 = b[i + 2]
        return high << 8 | low
    raise IndexError


def first_key(b: bytes, i: i64) -> i64:
    """Return where the first key of a map stands."""
    return i + 3 if b[i] == 0xDE else i + 1


def write_map_size(out: BytesWriter, size: i64) -> None:
    """Write the head of a map."""
    if size < 16:
        out.append(u8(0x80 | size))
    else:
        out.append(0xDE)
        out.append(u8(size >> 8))
        out.append(u8(size & 0xFF))


def check_sum(b: bytes, i: i64) -> None:
    """Refuse what is no number of 64 bits, and from 2**1009 on: below, any sum of a profile's is finite."""
    if b[i] != FLOAT64 or (b[i + 1] & 0x7F) == 0x7F:
        raise IndexError


def after_sums(b: bytes, at: i64) -> i64:
    """Return where a map of name to sum ends."""
    size = map_size(b, at)
    i = first_key(b, at)
    while size > 0:
        i = after_text(b, i)
        check_sum(b, i)
        i += 9
        size -= 1
    return i


def find_sum(b: bytes, at: i64, wire: bytes) -> i64:
    """Return where the sum of a name stands in such a map, -1 if it is not there."""
    size = map_size(b, at)
    i = first_key(b, at)
    while size > 0:
        end = after_text(b, i)
        if is_same(b, i, end, wire):
            return end + 1
        i = end + 9
        size -= 1
    return -1


def write_sums(out: BytesWriter, b: bytes, at: i64, end: i64, wires: list[bytes], amount: float) -> None:
    """Write a map of name to sum with an amount added to some, new ones at the end."""
    if not wires:
        out.write(b[at:end])
        return
    there: list[int] = []
    missing: list[bytes] = []
    for wire in wires:
        found = find_sum(b, at, wire)
        if found < 0:
            missing.append(wire)
        else:
            there.append(found)
    i = at
    if missing:
        write_map_size(out, map_size(b, at) + len(missing))
        i = first_key(b, at)
    if len(there) > 1:
        there.sort()
    for found in there:
        out.write(b[i:found])
        write_f64_be(out, read_f64_be(b, found) + amount)
        i = found + 8
    out.write(b[i:end])
    for wire in missing:
        out.write(wire)
        out.append(FLOAT64)
        write_f64_be(out, amount)
