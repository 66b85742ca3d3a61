"""One WebSocket: it says hello, its messages are read and obeyed, and it ends with a reason."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from scd.serving.client_messages import Hello
from scd.serving.outlet import Outlet, refusal
from scd.serving.picture import make_encoder
from scd.serving.protocol import CLOSE_CODES, VERSION, ProtocolError, read_client, write
from scd.serving.rate import Bucket
from scd.serving.seat import Seat
from scd.serving.service import LOG, Service

PARTING_S = 5.0
"""Seconds that a last message may take."""


async def serve_client(service: Service, socket: WebSocket) -> None:
    """Serve one client until one side ends it."""
    await socket.accept()
    with service.statistics.connections.track_inprogress():
        service.num_connections += 1
        try:
            error = await Connection(service, socket).until_end()
        finally:
            service.num_connections -= 1
        if error is not None:
            await _part(service, socket, error)


async def _part(service: Service, socket: WebSocket, error: ProtocolError) -> None:
    """Say why the connection ends, and end it."""
    code = CLOSE_CODES.get(error.code, CLOSE_CODES["bad_message"])
    service.statistics.errors.labels(error.code).inc()
    service.statistics.closes.labels(str(code)).inc()
    # A reason has at most 123 bytes. Source: RFC 6455, section 5.5.
    reason = f"{error.code}: {error}".encode()[:120].decode(errors="ignore")
    with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
        async with asyncio.timeout(PARTING_S):
            await socket.send_text(write(refusal(error)))
            await socket.close(code, reason)


class Connection:
    """What reads one client."""

    def __init__(self, service: Service, socket: WebSocket) -> None:
        """Prepare; `until_end` does the rest."""
        limits = service.config.limits
        self._service, self._socket, self._limits = service, socket, limits
        self._bucket = Bucket(limits.messages_per_s, 2 * limits.messages_per_s)
        self._outlet = Outlet(service, socket)
        self._seat = Seat(service, self._outlet)

    async def until_end(self) -> ProtocolError | None:
        """Read and write until one side ends it; return why we do, None if the client does."""
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._outlet.run())
        tasks: set[asyncio.Future[Any]] = {reader, writer, self._outlet.failed}
        error, ended = None, []
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self._outlet.failed.done():
                error = self._outlet.failed.result()
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(reader, writer, return_exceptions=True)
            self._seat.leave()
        for fault in ended:
            # One that was cancelled, as we have just done, is no Exception.
            if isinstance(fault, Exception):
                LOG.error("a connection ends by a fault of the server", exc_info=fault)
                said = f"fault of the server: {type(fault).__name__}"
                error = error or ProtocolError("fault", said, fatal=True)
        return error

    async def _read(self) -> None:
        try:
            if self._service.num_connections > self._limits.max_connections:
                raise ProtocolError("too_many_connections", "this server is full", fatal=True)
            text = await self._greet()
            while text is not None and (text := await self._next()) is not None:
                await self._obey(text)
        except ProtocolError as error:
            self._outlet.fail(error)

    async def _obey(self, text: str) -> None:
        request = None
        try:
            message = read_client(text)
            request = message.request
            self._service.statistics.messages.labels(message.type).inc()
            await self._seat.obey(message)
            self._outlet.num_refused = 0
        except Exception as error:
            self._outlet.refuse(error, request)

    async def _greet(self) -> str | None:
        """Wait for hello, answer it and return it; None: the client left."""
        limit_s = self._limits.hello_s
        try:
            async with asyncio.timeout(limit_s):
                text = await self._next()
        except TimeoutError:
            raise ProtocolError("too_late", f"no hello within {limit_s:g} s", fatal=True) from None
        if text is None:
            return None
        try:
            hello = read_client(text)
        except ProtocolError as error:
            raise ProtocolError("bad_message", f"hello comes first: {error}", True) from None
        if not isinstance(hello, Hello):
            raise ProtocolError("bad_message", f"hello comes first, got {hello.type}", True)
        if hello.version != VERSION:
            raise ProtocolError(
                "wrong_version", f"this server speaks version {VERSION}, not {hello.version}", True
            )
        self._service.check_token(hello.token)
        self._service.statistics.messages.labels("hello").inc()
        world = self._service.world
        self._outlet.encoder = make_encoder(hello.codec, hello.quality, world.height, world.width)
        self._outlet.put(self._service.welcome(hello.request))
        return text

    async def _next(self) -> str | None:
        """Return the next message; None: the client left."""
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            return None
        if not self._bucket.take():
            rate = self._limits.messages_per_s
            raise ProtocolError("too_many_messages", f"at most {rate:g} messages a second", True)
        text, most = message.get("text"), self._limits.max_message_bytes
        if text is None:
            raise ProtocolError("bad_message", "messages of a client are text", fatal=True)
        if len(text) > most or len(text.encode()) > most:
            raise ProtocolError("too_large", f"a message has at most {most} bytes", fatal=True)
        return text
