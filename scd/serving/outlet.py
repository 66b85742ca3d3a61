"""The way out of one connection: messages and frames in one bounded queue, sent in turn.

Everything is `put` in the order in which it was made and leaves in that order; `run` packs frames
and waits for the network. Frames of a generation that is over are left out. A client that does not
read fills its own queue and nothing else, until the outlet `failed`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress

from starlette.websockets import WebSocket, WebSocketDisconnect

from scd.serving.client_messages import Codec
from scd.serving.events import Frame
from scd.serving.picture import Encoder, Packed
from scd.serving.protocol import ProtocolError, pack, write
from scd.serving.server_messages import Error, FrameHeader, FromServer
from scd.serving.service import Service, as_error

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
