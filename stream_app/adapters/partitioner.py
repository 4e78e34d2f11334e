"""Which partition a user's records belong in.

Kafka's default partitioner, so that any producer with its client's default (Java's, or librdkafka set to
`murmur2_random`) agrees. It decides nothing else, and knows no topic.

Source: `org.apache.kafka.clients.producer.internals.BuiltInPartitioner` and `Utils.murmur2` of Apache Kafka;
the hash itself is aiokafka's.
"""

from __future__ import annotations

from functools import lru_cache

from aiokafka.partitioner import murmur2


# aiokafka's hash is plain Python, 2 to 10 µs a key, and the same users come again and again.
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
    return int((murmur2(key) & 0x7FFFFFFF) % partitions)
