"""Name what a partition asks of Kafka, and nothing of how it is done.

`stream_app.adapters.transport.Log`, `stream_app.adapters.log_ends.LogProbe` and
`stream_app.adapters.publisher.Publisher` do it in the worker; the simulation does it in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from stream_app.adapters.codec import Outgoing
from stream_app.adapters.log_ends import LogEnds

__all__ = ["AsksLogEnds", "PublishesMessages", "ReadsLog"]


class ReadsLog(Protocol):
    """The input topic as a member of the group reads it."""

    async def rewind(self, partition: int, offset: int) -> None:
        """Fetch a partition from `offset` on."""

    async def position(self, partition: int) -> int | None:
        """Return the next offset to be fetched, ``None`` if there is none yet."""

    async def generation_is_current(self) -> bool:
        """Make sure with Kafka that this member still belongs to the group as it is now."""

    async def committed(self, partition: int) -> int | None:
        """Return the group's committed offset of a partition, ``None`` if Kafka knows none."""

    def processed(self, partition: int, next_offset: int) -> None:
        """Let Kafka know, when it suits, that everything below `next_offset` is processed."""


class AsksLogEnds(Protocol):
    """Where a partition's log begins and ends, asked of Kafka each time."""

    async def ends(self, partition: int) -> LogEnds:
        """Return where a partition begins and ends, as asked after this call began."""


class PublishesMessages(Protocol):
    """The output topics."""

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        """Send messages in order and return when Kafka has them."""
