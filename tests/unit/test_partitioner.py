"""The partition of a user is the one that Kafka's own producers choose."""

from __future__ import annotations

import pytest
from aiokafka.partitioner import murmur2

from stream_app.adapters.partitioner import partition_of

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
def test_the_hash_is_murmur2_as_kafka_tests_it(key: bytes, signed_hash: int) -> None:
    assert murmur2(key) == signed_hash % 2**32


@pytest.mark.parametrize(("key", "signed_hash"), KAFKAS_OWN.items())
def test_the_partition_is_the_positive_hash_modulo_the_partitions(key: bytes, signed_hash: int) -> None:
    assert partition_of(key, 7) == (signed_hash & 0x7FFFFFFF) % 7
