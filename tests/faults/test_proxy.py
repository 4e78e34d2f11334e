"""What the fault proxy does to a plain client and a plain server, mode by mode."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.faults.proxy import HOST, Proxy
from tests.integration.stage import wait_until

TIMEOUT_S = 10.0
#: How long nothing must come before it counts as silence.
SILENCE_S = 0.3


class Echo(socketserver.ThreadingTCPServer):
    """Answers every request in capitals, and remembers all that it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__((HOST, 0), _Answer)
        self.heard = b""

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Answer(socketserver.BaseRequestHandler):
    server: Echo

    def handle(self) -> None:
        try:
            while said := self.request.recv(1024):
                self.server.heard += said
                self.request.sendall(said.upper())
        except OSError:
            return


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as proxy:
        yield proxy


@pytest.fixture
def connect(proxy: Proxy) -> Iterator[Callable[[], socket.socket]]:
    """Open a connection that the test closes."""
    opened: list[socket.socket] = []

    def connect() -> socket.socket:
        connection = socket.create_connection((HOST, proxy.port), TIMEOUT_S)
        opened.append(connection)
        return connection

    yield connect
    for connection in opened:
        connection.close()


Connect = Callable[[], socket.socket]


def ask(connection: socket.socket, said: bytes) -> bytes:
    connection.sendall(said)
    answer = b""
    while len(answer) < len(said):
        more = connection.recv(len(said))
        if not more:
            raise ConnectionError("the end")
        answer += more
    return answer


def hears_nothing(connection: socket.socket) -> bool:
    connection.settimeout(SILENCE_S)
    try:
        return connection.recv(1024) is None
    except TimeoutError:
        return True
    finally:
        connection.settimeout(TIMEOUT_S)


def test_what_is_well_is_forwarded_both_ways_and_counted(proxy: Proxy, connect: Connect) -> None:
    first, second = connect(), connect()
    assert ask(first, b"one") == b"ONE"
    assert ask(second, b"another") == b"ANOTHER"
    assert ask(first, b"more") == b"MORE"
    assert proxy.forwarded == 2 * len(b"oneanothermore")
    large = b"x" * 300_000
    assert ask(first, large) == large.upper()


def test_a_round_trip_takes_twice_the_latency_however_large_it_is(proxy: Proxy, connect: Connect) -> None:
    connection = connect()
    ask(connection, b"warm")
    proxy.latency(0.2)
    for said in (b"small", b"x" * 3_000_000):
        began_s = time.monotonic()
        assert ask(connection, said) == said.upper()
        # Fifty pieces each way: none of them may wait until the one before has arrived.
        assert 0.4 <= time.monotonic() - began_s < 8.0
    proxy.heal()
    assert ask(connection, b"quick") == b"QUICK"


def test_a_blackhole_tells_nobody_and_what_it_held_arrives_when_it_ends(
    proxy: Proxy, echo: Echo, connect: Connect
) -> None:
    before = connect()
    ask(before, b"warm")
    proxy.blackhole()
    before.sendall(b"old")
    after = connect()
    after.sendall(b"new")
    assert hears_nothing(before)
    assert hears_nothing(after)
    assert echo.heard == b"warm"
    proxy.heal()
    assert before.recv(3) == b"OLD"
    assert after.recv(3) == b"NEW"


def test_a_reset_is_told_to_both_sides_and_new_connections_are_well(proxy: Proxy, connect: Connect) -> None:
    connection = connect()
    ask(connection, b"warm")
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        ask(connection, b"again")
    assert ask(connect(), b"new") == b"NEW"


def test_who_is_refused_is_reset_at_once_until_it_ends(proxy: Proxy, echo: Echo, connect: Connect) -> None:
    connection = connect()
    ask(connection, b"warm")
    proxy.refuse()
    with pytest.raises(ConnectionError):
        ask(connection, b"no")
    with pytest.raises(ConnectionError):
        ask(connect(), b"no")  # on connecting or on asking: whichever the reset meets
    assert echo.heard == b"warm"
    proxy.heal()
    assert ask(connect(), b"new") == b"NEW"


def test_half_open_swallows_what_is_sent_and_the_client_is_not_told(
    proxy: Proxy, echo: Echo, connect: Connect
) -> None:
    connection = connect()
    ask(connection, b"warm")
    proxy.half_open()
    connection.sendall(b"void")
    assert hears_nothing(connection)
    assert ask(connect(), b"new") == b"NEW"
    proxy.heal()
    assert hears_nothing(connection)
    assert echo.heard == b"warmnew"


def test_a_stalled_request_arrives_late_although_its_client_has_given_up(
    proxy: Proxy, echo: Echo, connect: Connect
) -> None:
    connection = connect()
    ask(connection, b"warm")
    proxy.stall()
    connection.sendall(b"late")
    assert hears_nothing(connection)
    connection.close()
    assert ask(connect(), b"new") == b"NEW"
    assert echo.heard == b"warmnew"
    proxy.heal()
    wait_until(lambda: echo.heard == b"warmnewlate", TIMEOUT_S, "delivered")


def test_what_sticks_never_arrives_and_its_client_alone_is_cut_off_when_it_ends(
    proxy: Proxy, echo: Echo, connect: Connect
) -> None:
    asking, other = connect(), connect()
    proxy.stick(b"this")
    asking.sendall(b"this")
    assert hears_nothing(asking)
    assert proxy.stuck == 1
    assert ask(other, b"that") == b"THAT"
    proxy.heal()
    with pytest.raises(ConnectionError):
        asking.recv(1024)
    assert ask(other, b"this") == b"THIS"
    assert echo.heard == b"thatthis"


def test_a_lost_reply_is_to_what_the_server_has_done_and_it_is_the_only_one(
    proxy: Proxy, echo: Echo, connect: Connect
) -> None:
    proxy.lose_reply(b"write")
    connection = connect()
    assert ask(connection, b"read") == b"READ"
    with pytest.raises(ConnectionError):
        ask(connection, b"write")
    assert echo.heard == b"readwrite"
    assert proxy.lost_replies == 1
    assert ask(connect(), b"write") == b"WRITE"
    assert proxy.lost_replies == 1


@pytest.mark.parametrize("mode", ["blackhole", "reset", "refuse", "half_open", "stall"])
def test_a_fault_may_begin_with_a_request_which_is_the_first_to_meet_it(
    mode: str, proxy: Proxy, echo: Echo, connect: Connect
) -> None:
    connection = connect()
    proxy.at_request(lambda chunk: chunk.startswith(b"w"), getattr(proxy, mode))
    assert ask(connection, b"read") == b"READ"
    if mode in ("reset", "refuse"):
        with pytest.raises(ConnectionError):
            ask(connection, b"write")
    else:
        connection.sendall(b"write")
        assert hears_nothing(connection)
    assert echo.heard == b"read"
    proxy.heal()
    assert ask(connect(), b"w") == b"W"


def test_it_may_be_aimed_at_a_server_that_comes_later(echo: Echo) -> None:
    with Proxy() as proxy:
        with (
            pytest.raises(ConnectionError),
            socket.create_connection((HOST, proxy.port), TIMEOUT_S) as early,
        ):
            ask(early, b"early")
        proxy.aim(echo.port)
        with socket.create_connection((HOST, proxy.port), TIMEOUT_S) as connection:
            assert ask(connection, b"now") == b"NOW"
