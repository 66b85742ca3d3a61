"""A client of `scd serve`: connect, create, then step or play; frames come as arrays of pixels.

Needs neither a model nor a GPU. Not for several threads at once.
"""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, SupportsIndex, TypeVar

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError, to_json
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

from scd.serving.codec import Decoder
from scd.serving.messages import (
    Acknowledge,
    Action,
    Attach,
    Close,
    Codec,
    Command,
    Create,
    Detach,
    Detached,
    Error,
    Evicted,
    Fork,
    Frame,
    FrameHeader,
    FromServer,
    Hello,
    Pause,
    Reset,
    Restart,
    Rewind,
    Run,
    ServeError,
    Set,
    Snapshot,
    SnapshotHeader,
    State,
    Step,
    Stopped,
    Welcome,
)
from scd.serving.protocol import VERSION, read_server, refused, unpack, write

Said = TypeVar("Said")
Made = TypeVar("Made", bound=Command)

MAX_BYTES = 2**30
"""Of one message of the server; a snapshot is the largest."""


class Refused(ServeError):
    """The server did not obey; `code` says why, the session is as it was."""


class SessionEnded(ConnectionError):
    """The session has stopped or was put on disk, or the connection is closed."""


class Client:
    """One connection, with at most one session.

    `create` or `attach` first. Then either `step`, which returns its frames, or `run` and iterate
    over `frames` while `act` steers; a frame is acknowledged when the next one is asked for, so the
    server makes no more than are looked at. `close` deletes the session; leaving without it keeps
    the session, paused, for a later `attach`.
    """

    def __init__(
        self,
        url: str = "ws://127.0.0.1:8000",
        token: str | None = None,
        codec: Codec = "jpeg",
        quality: int = 90,
        timeout_s: float = 60.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Connect and say hello.

        Args:
            url: of the server, beginning with ws, wss, http or https.
            token: that the server wants, if it does.
            codec: of the frames.
            quality: of JPEG frames, 1 to 100.
            timeout_s: longest silence of the server that is not an error.
            tls: for wss; None: the system's certificates.

        Raises:
            ConnectionError: nobody answers there, or somebody else.
            Refused: the server does not want this client.
            TimeoutError: the server says nothing.
        """
        address = "ws" + url.rstrip("/").removeprefix("http").removeprefix("ws") + "/v1/stream"
        try:
            # Servers on this machine are reached without a proxy, whatever the environment says.
            self._socket = connect(
                address, max_size=MAX_BYTES, compression=None, ssl=tls, proxy=None
            )
        except (OSError, InvalidHandshake, TimeoutError) as error:
            raise ConnectionError(f"no scd server answers at {url}: {error}") from error
        self._timeout_s = timeout_s
        self._frames: deque[Frame] = deque()
        self._decoder = Decoder()
        self._num_requests = 0
        self._shown: tuple[int, int] | None = None
        self.state: State | None = None
        """Of the session, as of the last answer; None: there is no session."""
        hello = Hello(version=VERSION, token=token, codec=codec, quality=quality)
        try:
            self.welcome = self._ask(hello, Welcome)
            """What is played, and within which limits."""
        except BaseException:
            self.disconnect()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        """End the connection; the session stays, paused."""
        self._socket.close()

    def create(self, **beginning: Any) -> State:
        """Open a session; arguments are the fields of `scd.serving.messages.Beginning`."""
        return self._change(_made(Create, beginning))

    def attach(self, session: str) -> State:
        """Take over a session that nobody is attached to."""
        return self._change(Attach(session=session))

    def step(self, action: Any = None, count: SupportsIndex = 1) -> list[Frame]:
        """Make some frames and return them; of video each picture by itself.

        Args:
            action: number or vector, of Python, numpy or torch, or what the world's action space
                has: its parts by name, or by place; None: the held one.
            count: number of frames.
        """
        message = _made(Step, {"action": action, "count": count})
        self._frames.clear()
        request, wanted = self._send(message), message.count
        kept: list[Frame] = []
        while wanted > 0 or self.state is None or self.state.request != request:
            message = self._receive()
            if isinstance(message, Frame) and not message.header.shown:
                kept.append(message)
                wanted -= message.header.is_last
                self._acknowledge(message.header)
        return kept

    def run(self, fps: float | None = None) -> State:
        """Let frames come; read them with `frames`."""
        return self._change(_made(Run, {"fps": fps}))

    def pause(self) -> State:
        """Let no more frames come; those under way still do."""
        return self._change(Pause())

    def act(self, action: Any, sequence: SupportsIndex = 0) -> None:
        """Hold an action, as `step` takes it, from the next frame that begins."""
        self._send(_made(Action, {"action": action, "sequence": sequence}))

    def frames(self) -> Iterator[Frame]:
        """Return frames as they come, without end; each is acknowledged when the next is asked for.

        Raises:
            SessionEnded: the session or the connection is over.
            Refused: an action was not obeyed.
            TimeoutError: no frame came in time, as of a paused session.
        """
        while True:
            if self._shown is not None:
                generation, index = self._shown
                self._shown = None
                self._send(Acknowledge(generation=generation, frame=index))
            if not self._frames:
                message = self._receive()
                if isinstance(message, Frame):
                    self._frames.append(message)
                continue
            frame = self._frames.popleft()
            if not frame.header.shown:
                self._shown = frame.header.generation, frame.header.frame
            yield frame

    def set(self, **changes: Any) -> State:
        """Change `steps`, `guidance`, `seed` or `prompt` (with `recompute`) from the next frame
        on."""
        return self._change(_made(Set, changes))

    def reset(self, **beginning: Any) -> State:
        """Begin the session anew, with the arguments of `create`."""
        return self._change(_made(Reset, beginning))

    def restart(self) -> State:
        """Begin the session anew as it began before."""
        return self._change(Restart())

    def rewind(self, frame: int) -> State:
        """Make an earlier frame the newest one."""
        return self._change(_made(Rewind, {"frame": frame}))

    def fork(self, frame: int | None = None, seed: int | None = None) -> State:
        """Copy the session and go on with the copy; the state says what it was forked from."""
        return self._change(_made(Fork, {"frame": frame, "seed": seed}))

    def snapshot(self) -> bytes:
        """Return the session as a file, for POST /v1/sessions/restore."""
        self._send(Snapshot())
        while True:
            message = self._receive()
            if isinstance(message, bytes):
                return message

    def detach(self) -> None:
        """Let go of the session, which stays, paused."""
        self._ask(Detach(), Detached)
        self.state = None

    def close(self) -> None:
        """Delete the session; the connection stays."""
        self._ask(Close(), Detached)
        self.state = None

    def _change(self, message: Command) -> State:
        state = self._ask(message, State)
        if isinstance(message, (Create, Attach, Reset, Restart, Rewind, Fork)):
            # Also those that came while the server had not answered.
            self._frames.clear()
            self._shown = None
        return state

    def _ask(self, message: Command, kind: type[Said]) -> Said:
        request = self._send(message)
        while True:
            answer = self._receive()
            if isinstance(answer, kind) and getattr(answer, "request", None) == request:
                return answer
            if isinstance(answer, Frame):
                self._frames.append(answer)

    def _send(self, message: Command) -> int:
        self._num_requests += 1
        numbered = message.model_copy(update={"request": self._num_requests})
        try:
            self._socket.send(write(numbered))
        except ConnectionClosed as error:
            raise _ended(error) from error
        return self._num_requests

    def _acknowledge(self, header: FrameHeader) -> None:
        self._send(Acknowledge(generation=header.generation, frame=header.frame))

    def _receive(self) -> Frame | FromServer | bytes:
        """Return the next message; what refuses a request, or ends the session, is raised."""
        try:
            data = self._socket.recv(timeout=self._timeout_s)
        except ConnectionClosed as error:
            raise _ended(error) from error
        if isinstance(data, bytes):
            header, payload = unpack(data)
            if isinstance(header, SnapshotHeader):
                return payload
            pixels = self._decoder.decode(payload, header.codec, header.key)
            return Frame(header=header, pixels=pixels[: header.height, : header.width])
        message = read_server(data)
        if isinstance(message, State):
            self.state = message
        if isinstance(message, Error):
            raise Refused(message.code, message.message, message.fatal, message.request)
        if isinstance(message, (Stopped, Evicted)):
            self.state = None
            why = message.reason if isinstance(message, Stopped) else "it was idle, and is on disk"
            raise SessionEnded(f"session {message.session} has ended: {why}")
        return message


def _made(kind: type[Made], fields: Mapping[str, Any]) -> Made:
    """Make a message of numbers of Python, numpy or torch (ServeError: a field does not fit)."""
    try:
        # As the server reads it, to which a list is as good as a tuple.
        return kind.model_validate_json(
            to_json({name: _plain(one) for name, one in fields.items()})
        )
    except ValidationError as error:
        raise refused(error) from None
    except PydanticSerializationError as error:
        raise ServeError("bad_field", f"a message is made of numbers and texts: {error}") from None


def _plain(value: Any) -> Any:
    """Return numbers, lists and objects of whatever has them, as Gymnasium's actions."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _ended(error: ConnectionClosed) -> SessionEnded:
    closed = error.rcvd
    why = "without a word" if closed is None else f"{closed.code} {closed.reason}".strip()
    return SessionEnded(f"the server closed the connection: {why}")
