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
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar

HOST: Final = "127.0.0.1"
CHUNK_BYTES: Final = 64 * 1024
#: Chunks of a connection that may be on their way at a time.
READ_AHEAD: Final = 256
#: SO_LINGER with no time to linger: the kernel answers with RST instead of FIN.
RESET: Final = struct.pack("ii", 1, 0)

#: A part of a request's bytes, or what tells whether bytes are it; one chunk must hold what is looked for.
Request: TypeAlias = bytes | Callable[[bytes], bool]
T = TypeVar("T")


def _matching(to: Request) -> Callable[[bytes], bool]:
    return (lambda chunk: to in chunk) if isinstance(to, bytes) else to


def _raised() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(eq=False, slots=True)
class _Link:
    """One client's connection and the one to the server that belongs to it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    #: Its next reply is swallowed and the client is cut off.
    loses_reply: bool = False
    #: The server's side was closed without the client being told.
    is_half_open: bool = False
    #: Cleared: what its client sends stays here.
    sends: asyncio.Event = field(default_factory=_raised)
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
        #: Faults that have begun with a request.
        self.begun = 0
        #: Bytes forwarded in both directions.
        self.forwarded = 0
        self._latency_s = 0.0
        self._refuses = False
        self._lose_after: list[Callable[[bytes], bool]] = []
        self._at_request: tuple[Callable[[bytes], bool], Callable[[], None]] | None = None
        #: Requests that `stick` has kept from the server.
        self.stuck = 0
        self._sticks: Callable[[bytes], bool] | None = None
        self._unstuck = asyncio.Event()
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._flows = _raised()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    @property
    def links(self) -> int:
        """Connections that there are."""
        return len(self._links)

    @property
    def address(self) -> str:
        """``host:port`` for the client."""
        return f"{HOST}:{self.port}"

    # What goes wrong.

    def aim(self, server_port: int) -> None:
        """Forward new connections to another port."""
        self._do(lambda: setattr(self, "_server_port", server_port))

    def latency(self, seconds: float) -> None:
        """Let everything arrive so much later, in both directions: a round trip takes twice as long."""
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

    def stall(self) -> None:
        """Keep what clients send on the connections that there are now; new ones are well, nobody is told.

        `heal` delivers it, however late, and although its client has given up.
        """

        def stall() -> None:
            for link in self._links:
                link.sends.clear()

        self._do(stall)

    def lose_reply(self, to: Request) -> None:
        """Swallow the reply to the next request that is, or contains, `to`, and cut its client off.

        The server has then done what it was asked, and the client does not know. `lost_replies` tells when it
        has happened. Asked for several, it loses one reply for each.
        """
        self._do(lambda: self._lose_after.append(_matching(to)))

    def at_request(self, to: Request, fault: Callable[[], None]) -> None:
        """Let one of the other faults begin with the next request that is, or contains, `to`.

        That request is the first to meet it: ``proxy.at_request(b"EVALSHA", proxy.blackhole)``.
        """
        self._do(lambda: setattr(self, "_at_request", (_matching(to), fault)))

    def stick(self, on: Request) -> None:
        """Take every request that is, or contains, `on` out of the world, and its connection with it.

        The server never sees it and the client hears nothing; connections on which nobody asks for that are
        well. As if one of a broker's topics did not answer. `heal` resets what is stuck.
        """

        def stick() -> None:
            self._sticks = _matching(on)
            self._unstuck.clear()

        self._do(stick)

    def heal(self) -> None:
        """End what goes wrong; what was half open stays so until its client gives up."""

        def heal() -> None:
            self._latency_s, self._refuses, self._at_request = 0.0, False, None
            self._lose_after.clear()
            self._sticks = None
            self._unstuck.set()
            self._flows.set()
            for link in self._links:
                link.sends.set()

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
        if threading.current_thread() is self._thread:  # a fault that begins with a request
            change()
            return

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
        async with contextlib.aclosing(self._chunks(reader)) as chunks:
            async for chunk, came_s in chunks:
                lost = next((is_it for is_it in self._lose_after if is_it(chunk)), None)
                if lost is not None:
                    self._lose_after.remove(lost)
                    link.loses_reply = True
                if self._at_request is not None and self._at_request[0](chunk):
                    begin, self._at_request = self._at_request[1], None
                    begin()
                    self.begun += 1
                if self._sticks is not None and self._sticks(chunk):
                    self.stuck += 1
                    await self._unstuck.wait()
                    _reset(link.client)
                    break
                await link.sends.wait()
                await self._pass(link, link.server, chunk, came_s)
        if not link.is_half_open:
            link.server.close()

    async def _forward_replies(self, link: _Link, reader: asyncio.StreamReader) -> None:
        async with contextlib.aclosing(self._chunks(reader)) as chunks:
            async for chunk, came_s in chunks:
                if link.loses_reply:
                    self.lost_replies += 1
                    _reset(link.client)
                    link.server.close()
                    return
                await self._pass(link, link.client, chunk, came_s)
        if not link.is_half_open:
            link.client.close()

    async def _pass(self, link: _Link, to: asyncio.StreamWriter, chunk: bytes, came_s: float) -> None:
        await asyncio.sleep(came_s + self._latency_s - self._loop.time())
        await self._flows.wait()
        if link.is_half_open or to.is_closing():
            return
        with contextlib.suppress(OSError):
            self.forwarded += len(chunk)  # first: who has been answered finds it counted
            to.write(chunk)
            await to.drain()

    async def _chunks(self, reader: asyncio.StreamReader) -> AsyncGenerator[tuple[bytes, float], None]:
        """Yield what comes, and when it came; it is read on while the last of it waits for its turn."""
        came: asyncio.Queue[tuple[bytes, float]] = asyncio.Queue(READ_AHEAD)

        async def read() -> None:
            with contextlib.suppress(OSError):
                while chunk := await reader.read(CHUNK_BYTES):
                    await came.put((chunk, self._loop.time()))
            await came.put((b"", 0.0))

        reading = asyncio.create_task(read())
        try:
            while (chunk := await came.get())[0]:
                yield chunk
        finally:
            reading.cancel()

    def _reset_all(self) -> None:
        for link in self._links:
            _reset(link.client)
            _reset(link.server)


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
