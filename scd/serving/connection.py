"""One WebSocket: it says hello, its messages are read and obeyed, and it ends with a reason."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from scd.serving.access import Bucket
from scd.serving.admission import Counted
from scd.serving.codec import Encoder, make_encoder
from scd.serving.messages import (
    Acknowledge,
    Action,
    Answer,
    Attach,
    Close,
    Command,
    Create,
    Detach,
    Event,
    Frame,
    FromServer,
    Hello,
    ServeError,
    Snapshot,
    SnapshotHeader,
    State,
    Stopped,
)
from scd.serving.protocol import (
    CLOSE_CODES,
    VERSION,
    pack,
    read_client,
    refusal,
    write,
)
from scd.serving.service import LOG, Service, as_error

MOST_QUEUED = 1024
"""Messages that wait for the network; a client that leaves more unread is let go."""

SMALL_PIXELS = 256 * 256
"""Frames up to this size are packed at once: handing them to another thread takes longer."""


class SendQueue:
    """What one client is sent: text and binary messages, and frames, which are packed here."""

    def __init__(self, service: Service, socket: WebSocket) -> None:
        self._service, self._socket = service, socket
        self._queue: asyncio.Queue[str | bytearray | Frame] = asyncio.Queue(MOST_QUEUED)
        self._sent = ("", -1, -1)
        self._acted: deque[tuple[int, float]] = deque(maxlen=64)
        self.failed: asyncio.Future[ServeError] = asyncio.get_running_loop().create_future()
        """Is done when the connection must end, and says why."""
        self.encoder: Encoder | None = None
        """Of this connection's frames; set by hello."""
        self.session: str | None = None
        """The client's session; frames of others are left out."""
        self.generation = -1
        """The client has been told of; frames of earlier ones are left out."""
        self.is_file_waiting = False
        """Whether a snapshot is on its way; there is one at a time, since they are large."""
        self.num_refused = 0
        """Messages refused in a row."""

    def put(self, message: FromServer | bytearray | Frame) -> None:
        """Send a message, a binary one as it is, or a frame."""
        is_packed = isinstance(message, (bytearray, Frame))
        try:
            self._queue.put_nowait(message if is_packed else write(message))
        except asyncio.QueueFull:
            self.fail(ServeError("too_slow", "what was asked for is not read", fatal=True))

    def refuse(self, error: BaseException, request: int | None = None) -> None:
        """Tell the client that a message was not obeyed, or fail if the connection ends with it."""
        said = as_error(error, request)
        self.num_refused += 1
        if self.num_refused > self._service.config.limits.max_errors:
            many = f"{self.num_refused} refused messages in a row, the last: {said}"
            said = ServeError("too_many_errors", many, fatal=True)
        if said.fatal:
            self.fail(said)
            return
        self._service.metrics.errors.labels(said.code).inc()
        self.put(refusal(said))

    def fail(self, error: ServeError) -> None:
        """End the connection; the first reason stands."""
        if not self.failed.done():
            self.failed.set_result(error)

    def note_action(self, sequence: int) -> None:
        """Remember when an action came, for the latency."""
        self._acted.append((sequence, time.monotonic()))

    def enter(self, session: str | None, generation: int = -1) -> None:
        """Go on with another session, or none."""
        self.session, self.generation = session, generation
        self._acted.clear()

    async def run(self) -> None:
        """Send until the connection ends."""
        with suppress(WebSocketDisconnect):
            while True:
                item = await self._queue.get()
                if isinstance(item, Frame):
                    await self._send_frame(item)
                    continue
                await self._send(item)
                if isinstance(item, bytearray):
                    self.is_file_waiting = False
                # Not while the next one is waited for: it may be large.
                del item

    async def _send(self, data: str | bytes | bytearray) -> None:
        """Wait for the network (WebSocketDisconnect: the client has left)."""
        send = self._socket.send_text if isinstance(data, str) else self._socket.send_bytes
        try:
            await send(data)  # type: ignore[arg-type]
        except RuntimeError as error:
            # How Starlette says that a socket is closed already.
            raise WebSocketDisconnect from error

    async def _send_frame(self, frame: Frame) -> None:
        metrics, encoder, header = self._service.metrics, self.encoder, frame.header
        assert encoder is not None, "frames come after hello"
        place = header.session, header.generation
        is_void = header.session != self.session or header.generation < self.generation
        # One that is shown again may have been overtaken by a new one.
        if is_void or (header.shown and self._sent[:2] == place and self._sent[2] >= header.frame):
            metrics.void_frames.inc()
            return
        if self._sent != (*place, header.frame - 1):
            encoder.restart()
        begin = time.perf_counter()
        if header.height * header.width <= SMALL_PIXELS:
            packed = encoder.encode(frame.pixels)
        else:
            packed = await asyncio.to_thread(encoder.encode, frame.pixels)
        metrics.packing.labels(encoder.codec).observe(time.perf_counter() - begin)
        self._sent = (*place, header.frame)
        how = {"codec": encoder.codec, "key": packed.key, "config": packed.config}
        await self._send(pack(header.model_copy(update=how), packed.payload))
        metrics.sent_frames.labels(encoder.codec).inc()
        metrics.sent_bytes.labels(encoder.codec).inc(len(packed.payload))
        while self._acted and self._acted[0][0] <= header.sequence:
            _, arrived = self._acted.popleft()
            metrics.latency.observe(time.monotonic() - arrived)


MOST_PENDING = 64
"""Messages of one connection that wait for the host; more are refused."""


class Conversation:
    """What one client says, passed on to the host, and what comes back, put into its queue."""

    def __init__(self, service: Service, queue: SendQueue) -> None:
        self._service, self._queue = service, queue
        self._loop = asyncio.get_running_loop()
        self._num_pending = 0
        self._has_left = False

    async def obey(self, message: Command) -> None:
        """Ask the host for what a message says; wait where the connection changes its session.

        Raises:
            ServeError: it cannot be obeyed; all is as it was.
        """
        # Acknowledgements are let through: they are what others may wait for.
        if self._num_pending >= MOST_PENDING and not isinstance(message, Acknowledge):
            raise ServeError("overloaded", f"{MOST_PENDING} messages wait: send fewer")
        session = await self._session_of(message)
        if isinstance(message, Action):
            self._queue.note_action(message.sequence)
        if isinstance(message, Snapshot):
            if self._queue.is_file_waiting:
                raise ServeError("overloaded", "a snapshot is on its way")
            self._queue.is_file_waiting = True
        asked = self._service.ask(message, session, self._hear)
        self._num_pending += 1
        settled = self._loop.create_future()

        def done(future: Future[Answer]) -> None:
            # The loop is closed once the server has stopped: then nobody is there to be told.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._settle, future, message, settled)

        asked.add_done_callback(done)
        if message.moves:
            await settled

    async def _session_of(self, message: Command) -> str:
        """Return the session that a message is about; empty for one that opens one."""
        mine = self._queue.session
        if isinstance(message, Hello):
            raise ServeError("bad_message", "hello was said already")
        if not isinstance(message, (Create, Attach)):
            if mine is None:
                raise ServeError("no_session", "create or attach a session first")
            return mine
        if mine is not None:
            raise ServeError(
                "has_session", "this connection has a session: detach or close it first"
            )
        if isinstance(message, Create):
            return ""
        await self._service.reach(message.session)
        return message.session

    def leave(self) -> None:
        """Let go of the session, which stays."""
        self._has_left = True
        if self._queue.session is not None:
            self._service.host.ask(Detach(), self._queue.session, self._hear)
            self._queue.enter(None)

    # What the host says

    def _settle(
        self, future: Future[Answer], message: Command, settled: asyncio.Future[None]
    ) -> None:
        """Pass on what comes of a message, in the order in which the host obeyed them."""
        self._num_pending -= 1
        if not settled.done():
            settled.set_result(None)
        error = future.exception()
        if error is not None:
            if isinstance(message, Snapshot):
                self._queue.is_file_waiting = False
            self._queue.refuse(error, message.request)
        elif self._has_left:
            self._take_back(message, future.result())
        else:
            self._pass_on(message, future.result())

    def _take_back(self, message: Command, answer: Answer) -> None:
        """Leave no session behind that the client has not heard of."""
        state = answer.message
        if isinstance(state, State) and message.moves:
            gone = Detach() if isinstance(message, Attach) else Close()
            self._service.host.ask(gone, state.session, self._hear)

    def _pass_on(self, message: Command, answer: Answer) -> None:
        queue, said = self._queue, answer.message
        if message.moves:
            queue.enter(said.session if isinstance(said, State) else None)
        if isinstance(said, State) and said.session == queue.session:
            queue.generation = said.generation
        if said is not None:
            said = said.model_copy(update={"request": message.request})
            if isinstance(said, SnapshotHeader):
                self._put_file(pack(said, b""), answer.file or b"", message.request)
            else:
                queue.put(said)
        for frame in answer.frames:
            # New ones were heard as they were made.
            if frame.header.shown:
                queue.put(frame)

    def _put_file(self, header: bytes, file: bytes | bytearray, request: int | None) -> None:
        queue = self._queue
        try:
            # What sends it has a copy of its own.
            data = Counted(self._service.host.under_way, len(header) + len(file), weight=2)
        except ServeError as error:
            queue.is_file_waiting = False
            queue.refuse(error, request)
            return
        data[: len(header)], data[len(header) :] = header, file
        queue.put(data)

    def _hear(self, event: Event) -> None:
        """Be told by the model thread."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._on_event, event)

    def _on_event(self, event: Event) -> None:
        queue = self._queue
        if isinstance(event, Frame):
            if event.header.session == queue.session:
                self._service.metrics.note_frame(event.header)
                queue.put(event)
        elif event.session == queue.session:
            queue.enter(None)
            queue.put(event)
            overview = self._service.host.overview()
            if not overview.healthy and isinstance(event, Stopped):
                queue.fail(ServeError("model_stopped", event.reason, fatal=True))


PARTING_S = 5.0
"""Seconds that a last message may take."""


async def serve_client(service: Service, socket: WebSocket) -> None:
    """Serve one client until one side ends it."""
    await socket.accept()
    with service.metrics.connections.track_inprogress():
        service.num_connections += 1
        try:
            error = await Connection(service, socket).until_end()
        finally:
            service.num_connections -= 1
        if error is not None:
            await _part(service, socket, error)


async def _part(service: Service, socket: WebSocket, error: ServeError) -> None:
    code = CLOSE_CODES.get(error.code, CLOSE_CODES["bad_message"])
    service.metrics.errors.labels(error.code).inc()
    service.metrics.closes.labels(str(code)).inc()
    # A reason has at most 123 bytes. Source: RFC 6455, section 5.5.
    reason = f"{error.code}: {error}".encode()[:120].decode(errors="ignore")
    with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
        async with asyncio.timeout(PARTING_S):
            await socket.send_text(write(refusal(error)))
            await socket.close(code, reason)


class Connection:
    """What reads one client."""

    def __init__(self, service: Service, socket: WebSocket) -> None:
        limits = service.config.limits
        self._service, self._socket, self._limits = service, socket, limits
        self._bucket = Bucket(limits.messages_per_s, 2 * limits.messages_per_s)
        self._queue = SendQueue(service, socket)
        self._conversation = Conversation(service, self._queue)

    async def until_end(self) -> ServeError | None:
        """Read and write until one side ends it; return why we do, None if the client does."""
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._queue.run())
        tasks: set[asyncio.Future[Any]] = {reader, writer, self._queue.failed}
        error, ended = None, []
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self._queue.failed.done():
                error = self._queue.failed.result()
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(reader, writer, return_exceptions=True)
            self._conversation.leave()
        for fault in ended:
            # One that was cancelled, as we have just done, is no Exception.
            if isinstance(fault, Exception):
                LOG.error("a connection ends by a fault of the server", exc_info=fault)
                said = f"fault of the server: {type(fault).__name__}"
                error = error or ServeError("fault", said, fatal=True)
        return error

    async def _read(self) -> None:
        try:
            if self._service.num_connections > self._limits.max_connections:
                raise ServeError("too_many_connections", "this server is full", fatal=True)
            text = await self._greet()
            while text is not None and (text := await self._next()) is not None:
                await self._obey(text)
        except ServeError as error:
            self._queue.fail(error)

    async def _obey(self, text: str) -> None:
        request = None
        try:
            message = read_client(text)
            request = message.request
            self._service.metrics.messages.labels(message.verb).inc()
            await self._conversation.obey(message)
            self._queue.num_refused = 0
        except Exception as error:
            self._queue.refuse(error, request)

    async def _greet(self) -> str | None:
        """Wait for hello, answer it and return it; None: the client left."""
        limit_s = self._limits.hello_s
        try:
            async with asyncio.timeout(limit_s):
                text = await self._next()
        except TimeoutError:
            raise ServeError("too_late", f"no hello within {limit_s:g} s", fatal=True) from None
        if text is None:
            return None
        try:
            hello = read_client(text)
        except ServeError as error:
            raise ServeError("bad_message", f"hello comes first: {error}", True) from None
        if not isinstance(hello, Hello):
            raise ServeError("bad_message", f"hello comes first, got {hello.verb}", True)
        if hello.version != VERSION:
            raise ServeError(
                "wrong_version", f"this server speaks version {VERSION}, not {hello.version}", True
            )
        self._service.check_token(hello.token)
        self._service.metrics.messages.labels("hello").inc()
        world = self._service.host.info
        size, fps = (world.height, world.width), self._service.limits.max_fps
        self._queue.encoder = make_encoder(hello.codec, hello.quality, *size, fps)
        self._queue.put(self._service.welcome(hello.request))
        return text

    async def _next(self) -> str | None:
        """Return the next message; None: the client left."""
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            return None
        if not self._bucket.take():
            rate = self._limits.messages_per_s
            raise ServeError("too_many_messages", f"at most {rate:g} messages a second", True)
        text, most = message.get("text"), self._limits.max_message_bytes
        if text is None:
            raise ServeError("bad_message", "messages of a client are text", fatal=True)
        if len(text) > most or len(text.encode()) > most:
            raise ServeError("too_large", f"a message has at most {most} bytes", fatal=True)
        return text
