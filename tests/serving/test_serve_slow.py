"""Slow and silent connections: they end in time, and nobody else waits for them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from scd.serving.settings import ClientLimits
from tests.servers import Serving, serving
from tests.tiny_host import until

LIMITS = ClientLimits(requests_per_s=2000.0, head_s=1.0, body_s=1.5, max_connections=8)
HEAD = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(limits=LIMITS, sessions=4) as running:
        yield running


def connected(server: Serving) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


@contextmanager
def dripping(connection: socket.socket, data: bytes, pause_s: float = 0.05) -> Iterator[None]:
    """Send one byte after the other, again and again, until the other side has enough."""
    over = threading.Event()

    def drip() -> None:
        try:
            while not over.wait(pause_s):
                for number in range(len(data)):
                    connection.sendall(data[number : number + 1])
                    if over.wait(pause_s):
                        return
        except OSError:
            return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def rest_of(connection: socket.socket) -> bytes:
    """All that comes until the other side ends it."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def took_s(connection: socket.socket) -> tuple[float, bytes]:
    began = time.monotonic()
    said = rest_of(connection)
    return time.monotonic() - began, said


def test_silent_connections_end_and_keep_nobody_from_being_served(server: Serving):
    with ExitStack() as stack:
        # More than may wait, of which there are four for each WebSocket.
        silent = [stack.enter_context(connected(server)) for _ in range(80)]
        for _ in range(3):
            assert server.call("GET", "/health")[0] == 200
            assert server.call("GET", "/v1/world")[0] == 200
        assert all(rest_of(one) == b"" for one in silent)
    # One that has asked before may not be silent for longer than others.
    with connected(server) as connection:
        connection.sendall(HEAD + b"\r\n")
        seconds, said = took_s(connection)
        assert said.startswith(b"HTTP/1.1 200") and seconds < 5


def test_heads_that_come_byte_by_byte_end(server: Serving):
    with ExitStack() as stack:
        for _ in range(60):
            one = stack.enter_context(connected(server))
            one.sendall(HEAD)
        slow = stack.enter_context(connected(server))
        slow.sendall(HEAD)
        with dripping(slow, b"X-Slow: " + b"x" * 2000):
            assert server.call("GET", "/health")[0] == 200
            seconds, said = took_s(slow)
        assert seconds < 5 and said.startswith(b"HTTP/1.1 408") and b"too_late" in said
    # The same after an answer, when a byte used to reset the clock.
    with connected(server) as second:
        second.sendall(HEAD + b"\r\n")
        assert second.recv(65536).startswith(b"HTTP/1.1 200")
        with dripping(second, HEAD):
            seconds, said = took_s(second)
        assert seconds < 5 and said.count(b"HTTP/1.1 408") == 1


@pytest.mark.parametrize("path", ["/v1/sessions", "/v1/uploads", "/v1/sessions/restore"])
def test_bodies_that_come_byte_by_byte_end_with_a_reason(server: Serving, path: str):
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5000\r\n\r\n"
    with connected(server) as slow:
        slow.sendall(head.encode())
        # As a snapshot begins: with the size of its head.
        with dripping(slow, b"@" + bytes(7) + b" " * 500):
            assert server.call("GET", "/health")[0] == 200
            seconds, said = took_s(slow)
        assert 1.0 < seconds < 8
        assert said.startswith(b"HTTP/1.1 408") and b"did not come within 1.5 s" in said


def test_a_body_that_nobody_reads_ends_too(server: Serving):
    head = b"POST /v1/nothing HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5000\r\n\r\n"
    with connected(server) as slow:
        slow.sendall(head)
        with dripping(slow, b" "):
            seconds, said = took_s(slow)
        assert seconds < 6 and said.startswith(b"HTTP/1.1 40")


def test_whoever_does_not_read_an_answer_is_let_go():
    with serving(limits=LIMITS) as server, socket.socket() as deaf:
        # Little of what is sent fits into the buffers of the system on either side.
        server.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, port = server.url.removeprefix("http://").split(":")
        deaf.connect((host, int(port)))
        deaf.sendall(b"GET /main.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 60)
        open_now = server.server.server_state.connections
        until(lambda: any(one.transport.get_write_buffer_size() for one in list(open_now)))
        (held,) = [one for one in list(open_now) if one.transport.get_write_buffer_size()]
        assert server.call("GET", "/health")[0] == 200
        until(lambda: held not in open_now)


def test_health_is_told_by_a_server_that_is_full():
    head = b"POST /v1/uploads HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n"
    limits = ClientLimits(requests_per_s=2000.0, max_connections=2)
    with serving(limits=limits) as server, ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connected(server)).sendall(head)
        # Before that, a further connection could take the place of one that has not been read yet.
        until(lambda: len(server.server.server_state.tasks) == 8)
        assert server.call("GET", "/v1/world")[0] == 503
        assert server.call("GET", "/health")[0] == 200
        stack.close()
        until(lambda: server.call("GET", "/v1/world")[0] == 200)
