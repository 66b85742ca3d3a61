"""One WebSocket: it says hello, its messages are read and obeyed, and it ends with a reason."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from scd.serving.access import Bucket
from scd.serving.codec import Encoder, Packed, make_encoder
from scd.serving.errors import HostStopped
from scd.serving.events import Event, Evicted, Frame, Info, Stopped
from scd.serving.messages import (
    CLOSE_CODES,
    VERSION,
    Acknowledge,
    Action,
    Attach,
    Close,
    Codec,
    Create,
    Detach,
    Detached,
    Error,
    Fork,
    FrameHeader,
    FromClient,
    FromServer,
    Hello,
    Pause,
    ProtocolError,
    Reset,
    Restart,
    Rewind,
    Run,
    Set,
    Snapshot,
    SnapshotHeader,
    Step,
    pack,
    read_client,
    write,
)
from scd.serving.messages import Evicted as EvictedMessage
from scd.serving.messages import Stopped as StoppedMessage
from scd.serving.service import LOG, Service, answer, as_error, check_known

MOST_QUEUED = 1024
"""Messages that wait for the network; a client that leaves more unread is let go."""

SMALL_PIXELS = 256 * 256
"""Frames up to this size are packed at once: handing them to another thread takes longer."""


class Outlet:
    """What one client is sent; see the module."""

    def __init__(self, service: Service, socket: WebSocket) -> None:
        """Begin empty."""
        self._service, self._socket = service, socket
        self._queue: asyncio.Queue[str | bytes | tuple[Frame, bool]] = asyncio.Queue(MOST_QUEUED)
        self._sent = ("", -1, -1)
        self._acted: deque[tuple[int, float]] = deque(maxlen=64)
        self.failed: asyncio.Future[ProtocolError] = asyncio.get_running_loop().create_future()
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

    def put(self, message: FromServer | bytes) -> None:
        """Send a message, or a binary one as it is."""
        self._put(message if isinstance(message, bytes) else write(message))

    def put_frame(self, frame: Frame, is_shown: bool) -> None:
        """Send a frame; `is_shown`: one that there was before."""
        self._put((frame, is_shown))

    def refuse(self, error: BaseException, request: int | None = None) -> None:
        """Tell the client that a message was not obeyed, or fail if the connection ends with it."""
        said = as_error(error, request)
        self.num_refused += 1
        if self.num_refused > self._service.config.limits.max_errors:
            many = f"{self.num_refused} refused messages in a row, the last: {said}"
            said = ProtocolError("too_many_errors", many, fatal=True)
        if said.fatal:
            self.fail(said)
            return
        self._service.statistics.errors.labels(said.code).inc()
        self.put(refusal(said))

    def fail(self, error: ProtocolError) -> None:
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

    def _put(self, item: str | bytes | tuple[Frame, bool]) -> None:
        try:
            self._queue.put_nowait(item)
        except asyncio.QueueFull:
            self.fail(ProtocolError("too_slow", "what was asked for is not read", fatal=True))

    async def run(self) -> None:
        """Send until the connection ends."""
        with suppress(WebSocketDisconnect):
            while True:
                item = await self._queue.get()
                if isinstance(item, tuple):
                    await self._send_frame(*item)
                    continue
                await self._send(item)
                if isinstance(item, bytes):
                    self.is_file_waiting = False

    async def _send(self, data: str | bytes) -> None:
        """Wait for the network (WebSocketDisconnect: the client has left)."""
        send = self._socket.send_text if isinstance(data, str) else self._socket.send_bytes
        try:
            await send(data)  # type: ignore[arg-type]
        except RuntimeError as error:
            # How Starlette says that a socket is closed already.
            raise WebSocketDisconnect from error

    async def _send_frame(self, frame: Frame, is_shown: bool) -> None:
        statistics, encoder = self._service.statistics, self.encoder
        assert encoder is not None, "frames come after hello"
        place = frame.session_id, frame.generation
        is_void = frame.session_id != self.session or frame.generation < self.generation
        # One that is shown again may have been overtaken by a new one.
        if is_void or (is_shown and self._sent[:2] == place and self._sent[2] >= frame.index):
            statistics.void_frames.inc()
            return
        if self._sent != (*place, frame.index - 1):
            encoder.restart()
        begin = time.perf_counter()
        if frame.frame.shape[0] * frame.frame.shape[1] <= SMALL_PIXELS:
            packed = encoder.encode(frame.frame)
        else:
            packed = await asyncio.to_thread(encoder.encode, frame.frame)
        statistics.packing.labels(encoder.codec).observe(time.perf_counter() - begin)
        self._sent = (*place, frame.index)
        await self._send(pack(frame_header(frame, is_shown, encoder.codec, packed), packed.payload))
        statistics.sent_frames.labels(encoder.codec).inc()
        statistics.sent_bytes.labels(encoder.codec).inc(len(packed.payload))
        while self._acted and self._acted[0][0] <= frame.sequence:
            _, arrived = self._acted.popleft()
            statistics.latency.observe(time.monotonic() - arrived)


def refusal(error: ProtocolError) -> Error:
    """Return an error as a message."""
    return Error(code=error.code, message=str(error), fatal=error.fatal, request=error.request)


def frame_header(frame: Frame, is_shown: bool, codec: Codec, packed: Packed) -> FrameHeader:
    """Return what is said of a frame; `is_shown`: one that there was before."""
    timing = frame.timing
    return FrameHeader(
        session=frame.session_id,
        generation=frame.generation,
        frame=frame.index,
        action=None if frame.num_steps == 0 else frame.action,
        sequence=frame.sequence,
        steps=frame.num_steps,
        encoder_ms=round(1000 * timing.encoder_s, 3),
        decoder_ms=round(1000 * timing.decoder_s, 3),
        autoencoder_ms=round(1000 * timing.autoencoder_s, 3),
        queued_ms=round(1000 * timing.queued_s, 3),
        codec=codec,
        key=packed.key,
        config=packed.config,
        width=frame.frame.shape[1],
        height=frame.frame.shape[0],
        shown=is_shown,
    )


MOST_PENDING = 64
"""Calls of one connection that wait for the host; more are refused."""


class Seat:
    """One client's place; see the module."""

    def __init__(self, service: Service, outlet: Outlet) -> None:
        """Begin without a session."""
        self._service, self._host, self._outlet = service, service.host, outlet
        self._checks = service.checks
        self._loop = asyncio.get_running_loop()
        self._num_pending = 0
        self._sink = self._hear

    async def obey(self, message: FromClient) -> None:
        """Ask the host for what a message says.

        Raises:
            ProtocolError, PlayError: it cannot be obeyed; all is as it was.
        """
        # Acknowledgements are let through: they are what others may wait for.
        if self._num_pending >= MOST_PENDING and not isinstance(message, Acknowledge):
            raise ProtocolError("overloaded", f"{MOST_PENDING} messages wait: send fewer")
        match message:
            case Action() | Acknowledge() | Step() | Snapshot():
                self._obey_often(message, self._mine())
            case Create():
                self._check_free()
                asked = self._host.create(self._checks.beginning(message))
                await self._join_new(asked, message.request)
            case Attach():
                self._check_free()
                check_known(message.session)
                await self._service.find(message.session)
                await self._join(message.session, message.request)
            case Fork():
                mine = self._mine()
                asked = self._host.fork(mine, message.frame, message.seed)
                await self._join_new(asked, message.request, forked_from=mine)
                await answer(self._host.detach(mine, self._sink))
            case Detach() | Close():
                await self._end(message)
            case Hello():
                raise ProtocolError("bad_message", "hello was said already")
            case _:
                self._obey_change(message, self._mine())

    def _obey_often(self, message: Action | Acknowledge | Step | Snapshot, session: str) -> None:
        match message:
            case Action(action=action, sequence=sequence):
                action = self._checks.action(action)
                self._outlet.note_action(sequence)
                self._ask(self._host.act(session, action, sequence), message)
            case Acknowledge(generation=generation, frame=frame):
                self._ask(self._host.acknowledge(session, generation, frame), message)
            case Step(action=action, count=count):
                action, count = (
                    self._checks.action(action),
                    self._checks.count(count),
                )
                asked = self._host.step(session, action, count)
                self._ask(asked, message, lambda _: self._tell_state(session, message.request))
            case Snapshot():
                if self._outlet.is_file_waiting:
                    raise ProtocolError("overloaded", "a snapshot is on its way")
                self._outlet.is_file_waiting = True
                header = SnapshotHeader(session=session, request=message.request)
                asked = self._host.snapshot(session)
                asked.add_done_callback(lambda done: self._call(self._note_file, done))
                self._ask(asked, message, lambda data: self._outlet.put(pack(header, data)))

    def _obey_change(self, message: FromClient, session: str) -> None:
        host, request = self._host, message.request

        def state(info: Info) -> None:
            self._put_state(info, request)

        def state_and_newest(info: Info) -> None:
            self._put_state(info, request)
            self._show_newest(info)

        match message:
            case Run(fps=fps):
                self._ask(host.run(session, fps), message, state)
            case Pause():
                self._ask(host.pause(session), message, state)
            case Set(steps=steps, guidance=guidance, seed=seed):
                steps = self._checks.steps(steps)
                asked = host.change(session, steps, self._checks.guidance(guidance), seed)
                self._ask(asked, message, state)
            case Reset():
                asked = host.reset(session, self._checks.beginning(message))
                self._ask(asked, message, state_and_newest)
            case Restart():
                self._ask(host.reset(session), message, state_and_newest)
            case Rewind(frame=frame):
                self._ask(host.rewind(session, frame), message, state_and_newest)
            case _:
                raise AssertionError(f"nothing obeys {message.type}")

    def _mine(self) -> str:
        if self._outlet.session is None:
            raise ProtocolError("no_session", "create or attach a session first")
        return self._outlet.session

    def _check_free(self) -> None:
        if self._outlet.session is not None:
            raise ProtocolError(
                "has_session", "this connection has a session: detach or close it first"
            )

    # The session of this connection

    async def _join_new(
        self, made: Future[Info], request: int | None, forked_from: str | None = None
    ) -> None:
        """Attach to a session that is being made, or delete it."""
        try:
            info = await answer(made)
            await self._join(info.session_id, request, forked_from)
        except BaseException:
            made.add_done_callback(self._delete_made)
            raise

    def _delete_made(self, made: Future[Info]) -> None:
        if not made.cancelled() and made.exception() is None:
            self._host.delete(made.result().session_id)

    async def _join(
        self, session: str, request: int | None, forked_from: str | None = None
    ) -> None:
        before = self._outlet.session, self._outlet.generation
        # Before the host is asked: the first frame may be here before its answer.
        self._outlet.enter(session)
        try:
            info = await answer(self._host.attach(session, self._sink))
        except BaseException:
            self._outlet.enter(*before)
            self._host.detach(session, self._sink)
            raise
        self._put_state(info, request, forked_from)
        self._show_newest(info)

    async def _end(self, message: Detach | Close) -> None:
        mine = self._mine()
        self._outlet.enter(None)
        await answer(self._host.detach(mine, self._sink))
        if isinstance(message, Close):
            await answer(self._host.delete(mine))
        self._outlet.put(Detached(session=mine, request=message.request))

    def leave(self) -> None:
        """Let go of the session, which stays."""
        if self._outlet.session is not None:
            self._host.detach(self._outlet.session, self._sink)
            self._outlet.enter(None)

    # What the host says

    def _ask(
        self,
        future: Future[Any],
        message: FromClient,
        then: Callable[[Any], None] = lambda result: None,
    ) -> None:
        """Go on when the host has answered, in the order of its answers."""
        self._num_pending += 1

        def done(settled: Future[Any]) -> None:
            self._call(self._settle, settled, message.request, then)

        future.add_done_callback(done)

    def _call(self, function: Callable[..., None], *words: Any) -> None:
        # The loop is closed once the server has stopped: then nobody is there to be told.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *words)

    def _settle(
        self, future: Future[Any], request: int | None, then: Callable[[Any], None]
    ) -> None:
        self._num_pending -= 1
        error = ProtocolError("superseded", "given up") if future.cancelled() else None
        error = error or future.exception()
        if error is None:
            then(future.result())
        else:
            self._outlet.refuse(error, request)

    def _hear(self, event: Event) -> None:
        """Be told by the model thread."""
        self._call(self._on_event, event)

    def _on_event(self, event: Event) -> None:
        if event.session_id != self._outlet.session:
            return
        match event:
            case Frame():
                self._service.statistics.note_frame(event)
                self._outlet.put_frame(event, is_shown=False)
            case Stopped():
                self._outlet.enter(None)
                self._outlet.put(StoppedMessage(session=event.session_id, reason=event.reason))
                if not self._host.overview().healthy:
                    self._outlet.fail(as_error(HostStopped(event.reason)))
            case Evicted():
                self._outlet.enter(None)
                self._outlet.put(EvictedMessage(session=event.session_id))

    def _note_file(self, done: Future[bytes]) -> None:
        """Expect no file any more, where there will be none."""
        if done.cancelled() or done.exception() is not None:
            self._outlet.is_file_waiting = False

    def _tell_state(self, session: str, request: int | None) -> None:
        asked = self._host.info(session)
        asked.add_done_callback(lambda done: self._call(self._settle_state, done, request))

    def _settle_state(self, done: Future[Info], request: int | None) -> None:
        self._num_pending += 1
        self._settle(done, request, lambda info: self._put_state(info, request))

    def _put_state(self, info: Info, request: int | None, forked_from: str | None = None) -> None:
        if info.session_id == self._outlet.session:
            self._outlet.generation = info.generation
        self._outlet.put(self._service.state(info, request, forked_from))

    def _show_newest(self, info: Info) -> None:
        """Send the newest frame again, for a picture to be there before the next one is made."""
        if info.index < max(0, info.kept_from):
            return

        def show(done: Future[list[Frame]]) -> None:
            if not done.cancelled() and done.exception() is None:
                self._call(self._show, done.result())

        self._host.frames(info.session_id, info.index).add_done_callback(show)

    def _show(self, frames: list[Frame]) -> None:
        for frame in frames:
            if frame.session_id == self._outlet.session:
                self._outlet.put_frame(frame, is_shown=True)


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
