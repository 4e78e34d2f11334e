"""The partition of a user is the one that Kafka's own producers choose."""

from __future__ import annotations

import random

import pytest
from aiokafka.partitioner import murmur2

from stream_app.core.partitioner import partition_of

# From Apache Kafka's UtilsTest.testMurmur2.
KAFKAS_OWN = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


@pytest.mark.parametrize(("key", "signed_hash"), KAFKAS_OWN.items())
def test_the_partition_is_the_positive_hash_modulo_the_partitions(key: bytes, signed_hash: int) -> None:
    assert partition_of(key, 7) == (signed_hash & 0x7FFFFFFF) % 7


def test_the_producers_client_comes_to_the_same_partition() -> None:
    rng = random.Random(20260102)
    for length in [*range(20), 128, 512] * 20:
        key, partitions = rng.randbytes(length), rng.randrange(1, 200)
        assert partition_of(key, partitions) == (murmur2(key) & 0x7FFFFFFF) % partitions
