"""A TCP proxy that fails on request: what stands between a client and a server when the network is at fault.

It forwards bytes and knows nothing of what they mean. One thread with an event loop of its own; every method
may be called from any other thread and has taken effect when it returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

HOST: Final = "127.0.0.1"
CHUNK_BYTES: Final = 64 * 1024
#: SO_LINGER with no time to linger: the kernel answers with RST instead of FIN.
RESET: Final = struct.pack("ii", 1, 0)

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Link:
    """One client's connection and the one to the server that belongs to it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    #: Its next reply is swallowed and the client is cut off.
    loses_reply: bool = False
    #: The server's side was closed without the client being told.
    is_half_open: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class Proxy:
    """Forwards from a port of its own to a server, until told to do it badly.

    Parameters
    ----------
    server_port : int
        Where the server listens on 127.0.0.1; it may come later, see `aim`.
    port : int
        Where to listen; 0 means any free port.
    """

    def __init__(self, server_port: int = 0, port: int = 0) -> None:
        self._server_port = server_port
        self.port = port
        #: Replies that were swallowed.
        self.lost_replies = 0
        #: Bytes forwarded in both directions.
        self.forwarded = 0
        self._latency_s = 0.0
        self._refuses = False
        self._lose_after: Callable[[bytes], bool] | None = None
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._flows = asyncio.Event()
        self._flows.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    @property
    def address(self) -> str:
        """``host:port`` for the client."""
        return f"{HOST}:{self.port}"

    # What goes wrong.

    def aim(self, server_port: int) -> None:
        """Forward new connections to another port."""
        self._do(lambda: setattr(self, "_server_port", server_port))

    def latency(self, seconds: float) -> None:
        """Let every chunk wait, in both directions; they stay in order."""
        self._do(lambda: setattr(self, "_latency_s", seconds))

    def blackhole(self) -> None:
        """Forward nothing; connections stay, new ones are taken, nobody is told."""
        self._do(self._flows.clear)

    def refuse(self) -> None:
        """Reset all connections, and every new one at once."""

        def refuse() -> None:
            self._refuses = True
            self._reset_all()

        self._do(refuse)

    def reset(self) -> None:
        """Reset all connections, once; new ones are well."""
        self._do(self._reset_all)

    def half_open(self) -> None:
        """Close the server's side of all connections; clients are not told and shout into the void."""

        def close() -> None:
            for link in self._links:
                link.is_half_open = True
                _reset(link.server)

        self._do(close)

    def lose_reply(self, to: bytes) -> None:
        """Swallow the reply to the next request that contains `to`, and cut its client off.

        The server has then done what it was asked, and the client does not know. `lost_replies` tells when it
        has happened.
        """
        self._do(lambda: setattr(self, "_lose_after", lambda chunk: to in chunk))

    def heal(self) -> None:
        """End latency, blackhole, refusal; what was half open stays so until its client gives up."""

        def heal() -> None:
            self._latency_s, self._refuses, self._lose_after = 0.0, False, None
            self._flows.set()

        self._do(heal)

    # Its life.

    def __enter__(self) -> Proxy:
        self._thread.start()
        server = self._wait(asyncio.start_server(self._accept, HOST, self.port))
        self.port = int(server.sockets[0].getsockname()[1])
        self._server = server
        return self

    def __exit__(self, *exc: object) -> None:
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        tasks = [task for link in self._links for task in link.tasks]
        self._reset_all()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def _do(self, change: Callable[[], object]) -> None:
        async def do() -> None:
            change()

        self._wait(do())

    # Forwarding.

    async def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if self._refuses:
            _reset(client)
            return
        try:
            answers, server = await asyncio.open_connection(HOST, self._server_port)
        except OSError:
            _reset(client)
            return
        link = _Link(client, server)
        self._links.add(link)
        link.tasks = [
            asyncio.create_task(self._forward_requests(link, reader)),
            asyncio.create_task(self._forward_replies(link, answers)),
        ]
        await asyncio.wait(link.tasks)
        for writer in (link.client, link.server):
            writer.close()
        self._links.discard(link)

    async def _forward_requests(self, link: _Link, reader: asyncio.StreamReader) -> None:
        async for chunk in _chunks(reader):
            if self._lose_after is not None and self._lose_after(chunk):
                self._lose_after = None
                link.loses_reply = True
            await self._pass(link, link.server, chunk)
        if not link.is_half_open:
            link.server.close()

    async def _forward_replies(self, link: _Link, reader: asyncio.StreamReader) -> None:
        async for chunk in _chunks(reader):
            if link.loses_reply:
                self.lost_replies += 1
                _reset(link.client)
                link.server.close()
                return
            await self._pass(link, link.client, chunk)
        if not link.is_half_open:
            link.client.close()

    async def _pass(self, link: _Link, to: asyncio.StreamWriter, chunk: bytes) -> None:
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        await self._flows.wait()
        if link.is_half_open:
            return
        with contextlib.suppress(OSError):
            to.write(chunk)
            await to.drain()
            self.forwarded += len(chunk)

    def _reset_all(self) -> None:
        for link in self._links:
            _reset(link.client)
            _reset(link.server)


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(CHUNK_BYTES):
            yield chunk


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
