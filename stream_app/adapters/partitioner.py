"""Which partition a user's records belong in.

Kafka's default partitioner, so that any producer with its client's default (Java's, or librdkafka set to
`murmur2_random`) agrees. It decides nothing else, knows no topic, and imports no Kafka client: apps that look
users up import it.

Source: `org.apache.kafka.clients.producer.internals.BuiltInPartitioner` and `Utils.murmur2` of Apache Kafka.
"""

from __future__ import annotations

import struct
from functools import lru_cache

__all__ = ["partition_of"]

_MASK = 0xFFFFFFFF
_M = 0x5BD1E995
_SEED = 0x9747B28C


# The hash is plain Python, 1 to 5 µs a key, and the same users come again and again.
@lru_cache(maxsize=200_000)
def partition_of(key: bytes, partitions: int) -> int:
    """Return the partition of a key.

    Parameters
    ----------
    key
        The record's key: the user_id in UTF-8.
    partitions
        How many the topic has, at least 1.

    Returns
    -------
    int
        From 0 to `partitions` - 1.

    Examples
    --------
    >>> partition_of(b"h1228", 4)
    0
    """
    return (_murmur2(key) & 0x7FFFFFFF) % partitions


def _murmur2(data: bytes) -> int:
    length = len(data)
    words = length // 4
    hashed = _SEED ^ length
    for word in struct.unpack_from(f"<{words}I", data):
        word = (word * _M) & _MASK
        word ^= word >> 24
        hashed = ((hashed * _M) ^ (word * _M)) & _MASK
    if rest := data[4 * words :]:
        hashed = ((hashed ^ int.from_bytes(rest, "little")) * _M) & _MASK
    hashed ^= hashed >> 13
    hashed = (hashed * _M) & _MASK
    return hashed ^ (hashed >> 15)
