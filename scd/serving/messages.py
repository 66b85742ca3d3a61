"""Messages of clients and server: one schema for WebSocket, HTTP, host and snapshots.

docs/serving.md is the page that explains them.

Each `Command` is obeyed by the method of `scd.serving.commands.Commands` that its `type` names. Its
class says how it is reached: over HTTP by its `route`, over a WebSocket unless `over_socket` is
False.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import UInt8
from pydantic import (
    ConfigDict,
    Field,
    JsonValue,
    model_validator,
)
from pydantic_core import PydanticCustomError

from scd.serving.given import SAFE, ActionValue, Count, GivenAction
from scd.serving.info import Limits, Message, WorldInfo

Index = Annotated[int, Field(ge=-1, le=SAFE)]
"""Of a frame; -1: before the first."""
Identity = Annotated[str, Field(max_length=64)]
"""Id of a session or an upload."""
Steps = Annotated[int, Field(ge=1, le=1000)]
"""Denoising steps per frame."""
Prompt = Annotated[str, Field(min_length=1, max_length=4000)]
"""What a stream shows, in words; the text encoder takes a number of tokens."""
Codec = Literal["jpeg", "h264"]
"""How frames are packed: each a picture of its own, or a video stream."""


class ServeError(ValueError):
    """A message or a request that is not obeyed; the session, if there is one, is as it was."""

    def __init__(
        self, code: str, message: str, fatal: bool = False, request: int | None = None
    ) -> None:
        """Say what was needed and what came.

        Args:
            code: short name for machines; docs/serving.md lists them.
            message: one sentence for people.
            fatal: whether the connection ends with it.
            request: number of the message that is refused, where it had one.
        """
        super().__init__(message)
        self.code, self.fatal, self.request = code, fatal, request


class Numbered(Message):
    """A message of a client, or the answer to one."""

    request: Count | None = None
    """Number of the client's choice; the answer carries it."""


# What a client says. Unknown fields are refused: a typing error would else go unnoticed.


class Command(Numbered):
    """What a client asks for."""

    model_config = ConfigDict(extra="forbid")

    route: ClassVar[str] = ""
    """Method and path of the HTTP request; empty: there is none."""
    status: ClassVar[int] = 200
    """Of the HTTP answer."""
    over_socket: ClassVar[bool] = True
    """Whether it can be said over a WebSocket."""
    wakes: ClassVar[bool] = True
    """Whether a session that is on disk is brought back for it."""
    needs_session: ClassVar[bool] = True
    """Whether it is refused where its session is not in memory."""
    moves: ClassVar[bool] = False
    """Whether the connection has another session afterwards, or none."""

    @property
    def verb(self) -> str:
        """Its type."""
        return vars(self)["type"]


class GuidanceChoice(Message):
    """How frames are pushed away from an unconditional branch; as in `scd.streaming.rollout`."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["none", "conditions", "context_noise"] = "none"
    """The branch."""
    scale: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Strength; 1 means no push."""
    context_noise: Annotated[float, Field(gt=0, le=10)] = 0.05
    """Strength of the noise in the branch "context_noise"."""
    parts: Annotated[tuple[str, ...], Field(max_length=1024)] = ()
    """Parts of actions that the branch "conditions" hides, and nothing else; empty: everything."""


class Hello(Command):
    """First message of a connection; answered by `welcome`."""

    type: Literal["hello"] = "hello"
    version: Count
    """Of the protocol that the client speaks."""
    token: Annotated[str, Field(max_length=256)] | None = None
    """Of the server, where it wants one."""
    codec: Codec = "jpeg"
    """Of this connection's frames."""
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """Of JPEG frames."""


class Beginning(Command):
    """What a stream begins with."""

    seed: Count = 0
    """Of the noise."""
    start: Literal["nothing", "clip", "upload"] = "nothing"
    """Where the first frames come from: there are none; a clip that the world carries; a picture or
    video that the client has sent before."""
    clip: Count | None = None
    """Number of the clip, for start "clip"."""
    upload: Identity | None = None
    """Id of the upload, for start "upload"."""
    action: GivenAction | None = None
    """That is said to have led to the frames of an upload; none: action 0, or a vector of zeros."""
    label: Count | None = None
    """Class of the stream, for worlds with labels."""
    prompt: Prompt | None = None
    """What it shows, for worlds that a text steers; none: as the server says, if it does."""
    steps: Steps | None = None
    """Denoising steps per frame; none: as the world says."""
    guidance: GuidanceChoice | None = None
    """None: none."""

    @model_validator(mode="after")
    def _check_start(self) -> Beginning:
        for name in ("clip", "upload"):
            if (getattr(self, name) is not None) != (self.start == name):
                raise PydanticCustomError("start", f"{name}: goes with start {name!r}, and only so")
        if self.action is not None and self.start != "upload":
            raise PydanticCustomError("start", "action: goes with start 'upload', and only so")
        return self


class Create(Beginning):
    """Open a session and attach to it; answered by `state`."""

    route = "POST /v1/sessions"
    status = 201
    moves = True
    type: Literal["create"] = "create"


class Restore(Command):
    """Open a session, under a new name, from a snapshot: the body of the request."""

    route = "POST /v1/sessions/restore"
    status = 201
    over_socket = False
    type: Literal["restore"] = "restore"


class Attach(Command):
    """Take over a session that nobody is attached to; answered by `state`."""

    moves = True
    type: Literal["attach"] = "attach"
    session: Identity
    """Its id."""


class Look(Command):
    """Ask how a session stands; answered by `state`."""

    route = "GET /v1/sessions/{session}"
    over_socket = False
    type: Literal["look"] = "look"


class Show(Command):
    """Ask for frames of the history, given ones too while they are kept."""

    over_socket = False
    type: Literal["show"] = "show"
    frame: Count
    """The first one."""
    count: Count = 1
    """How many."""


class Action(Command):
    """Hold an action from the next frame that begins until another is held; not answered."""

    wakes = False
    type: Literal["action"] = "action"
    action: GivenAction
    """Number of the action in the world's list, a vector, or its parts by name."""
    sequence: Count = 0
    """Of the client's choice; frames say by which they were led."""


class Run(Command):
    """Make frames until `pause`; answered by `state`."""

    type: Literal["run"] = "run"
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    """At most so many frames per second; none: as many as the server allows."""


class Pause(Command):
    """Begin no more frames, one that has begun still comes; answered by `state`."""

    type: Literal["pause"] = "pause"


class Step(Command):
    """Pause, and make some frames; they follow, then `state`."""

    route = "POST /v1/sessions/{session}/step"
    type: Literal["step"] = "step"
    action: GivenAction | None = None
    """That leads to them; none: the held one."""
    count: Annotated[int, Field(ge=1, le=1000)] = 1
    """How many."""


class Set(Command):
    """Change how frames are made, from the next that begins; answered by `state`."""

    route = "POST /v1/sessions/{session}/set"
    type: Literal["set"] = "set"
    steps: Steps | None = None
    """Denoising steps per frame; none: as they are."""
    guidance: GuidanceChoice | None = None
    """None: as it is. Another kind may need another memory: then only `reset` can change it."""
    seed: Count | None = None
    """Of the noise from here on; none: as it is."""
    prompt: Prompt | None = None
    """What frames show from here on, in a world that a text steers; none: as it is."""
    recompute: bool = False
    """With a prompt: let the frames in memory be seen anew under it, a pass for each, before which
    the session cannot go back; else they stay as they were seen."""

    @model_validator(mode="after")
    def _check_recompute(self) -> Set:
        if self.recompute and self.prompt is None:
            raise PydanticCustomError("recompute", "recompute: goes with a prompt")
        return self


class Reset(Beginning):
    """Begin the session anew, as the message says; answered by `state`, one generation later."""

    route = "POST /v1/sessions/{session}/reset"
    type: Literal["reset"] = "reset"


class Restart(Command):
    """Begin anew as before, with the seed, steps and guidance of now; answered by `state`."""

    route = "POST /v1/sessions/{session}/restart"
    type: Literal["restart"] = "restart"


class Rewind(Command):
    """Go back so that an earlier frame is the newest; answered by `state`, one generation later."""

    route = "POST /v1/sessions/{session}/rewind"
    type: Literal["rewind"] = "rewind"
    frame: Count
    """Its index; no older than `history_from` of the state."""


class Fork(Command):
    """Copy the session and move this connection to the copy; answered by `state` of the copy."""

    route = "POST /v1/sessions/{session}/fork"
    status = 201
    moves = True
    type: Literal["fork"] = "fork"
    frame: Count | None = None
    """Newest frame of the copy; none: that of the session."""
    seed: Count | None = None
    """Of the copy's noise; none: the same."""


class Observe(Command):
    """Put in the next frame of a paused session from outside; over HTTP only."""

    route = "POST /v1/sessions/{session}/observe"
    over_socket = False
    type: Literal["observe"] = "observe"
    upload: Identity
    """Whose last frame it is."""
    action: GivenAction | None = None
    """That led to it; none: the held one."""


class Acknowledge(Command):
    """Say that a frame, and all before it, were drawn; not answered."""

    wakes = False
    type: Literal["ack"] = "ack"
    generation: Count
    """Of the frame."""
    frame: Count
    """Its index."""


class Snapshot(Command):
    """Ask for the session as a file; answered by the binary message `snapshot`."""

    route = "POST /v1/sessions/{session}/snapshot"
    type: Literal["snapshot"] = "snapshot"


class Detach(Command):
    """Let go of the session, which stays, paused; answered by `detached`."""

    wakes = False
    needs_session = False
    moves = True
    type: Literal["detach"] = "detach"


class Close(Command):
    """Delete the session; answered by `detached`. The connection stays."""

    route = "DELETE /v1/sessions/{session}"
    status = 204
    wakes = False
    needs_session = False
    moves = True
    type: Literal["close"] = "close"


class Leave(Command):
    """Say that the session's page is left, which may only be reloaded: unless somebody attaches it
    within `left_s`, it is deleted. Over HTTP only; who knows the id needs no token."""

    route = "POST /v1/sessions/{session}/leave"
    status = 204
    over_socket = False
    wakes = False
    needs_session = False
    type: Literal["leave"] = "leave"


COMMANDS: tuple[type[Command], ...] = (
    Hello, Create, Restore, Attach, Look, Show, Action, Run, Pause, Step, Set, Reset, Restart,
    Rewind, Fork, Observe, Acknowledge, Snapshot, Detach, Close, Leave,
)  # fmt: skip
"""Every message of a client."""
SPOKEN = tuple(kind for kind in COMMANDS if kind.over_socket)
"""Messages that can be said over a WebSocket."""


# What the server says. A client ignores what it does not know, so that more can be said later.


class Welcome(Numbered):
    """First message of the server: what is played, and within which limits."""

    type: Literal["welcome"] = "welcome"
    version: int
    """Of the protocol."""
    server: str
    """Version of the program."""
    world: WorldInfo
    """What is played."""
    limits: Limits
    """What is allowed."""
    codecs: tuple[str, ...]
    """Codecs that this server has."""
    h264: str
    """Codec string of WebCodecs that its H.264 streams have."""


class State(Numbered):
    """How a session stands."""

    type: Literal["state"] = "state"
    session: Identity
    """Its id, a secret that lets anybody play it."""
    generation: Count
    """Raised whenever frames under way became void: reset, restart, rewind."""
    frame: Index
    """Index of the newest frame; -1: there is none yet."""
    num_given: Count
    """Frames that it began with; they have the indices 0 .. num_given - 1."""
    running: bool
    """Whether frames are made until `pause`."""
    attached: bool
    """Whether it has a client."""
    fps: float | None
    """Limit that `run` set; none: none."""
    action: ActionValue | None
    """The one held; none: the world has no actions."""
    sequence: Count
    """That came with it."""
    steps: Steps
    """Denoising steps per frame."""
    guidance: GuidanceChoice
    """As it is."""
    seed: Count
    """Of the noise."""
    prompt: str | None = None
    """What it shows; none: no text steers this world."""
    prompt_cut: str | None = None
    """What of it is not read because it is too long, in a sentence; none: all of it is."""
    history_from: Index
    """Oldest frame that `rewind` and `fork` reach; -1: before the first."""
    kept_from: Count
    """Oldest frame that can be shown: given ones too, while they are kept."""
    forked_from: Identity | None = None
    """Session of which this one was forked just now."""


class FrameHeader(Message):
    """Header of a frame; the picture follows."""

    type: Literal["frame"] = "frame"
    session: Identity
    """Whose frame it is."""
    generation: Count
    """In which it was made."""
    frame: Count
    """Its index in the session."""
    picture_index: Count = 0
    """Which of its pictures this is, where a latent frame stands for several of video."""
    num_pictures: Annotated[int, Field(ge=1)] = 1
    """How many it has; each comes by itself, in order, and the last one stays."""
    action: ActionValue | None
    """That led to it; none: the world has none, or the frame was given."""
    parts: JsonValue = None
    """The same by part, where an action has parts: held keys and choices by their names."""
    sequence: Count
    """That came with the action; 0: none did."""
    steps: Count
    """Denoising steps that it took; 0: it was given."""
    encoder_ms: float = 0.0
    """Causal pass, of all frames that began with it."""
    decoder_ms: float = 0.0
    """From then to the end of its last denoising step."""
    autoencoder_ms: float = 0.0
    """Latents to pixels, of all frames that ended with it."""
    queued_ms: float = 0.0
    """From the moment at which it could have begun to the one at which it began."""
    codec: Codec | Literal["png"] = "jpeg"
    """Of the payload."""
    key: bool = True
    """Whether it can be decoded without an earlier one."""
    config: str | None = None
    """Codec string for a WebCodecs decoder, with key frames of H.264."""
    width: Count
    """Columns of the frame; an H.264 picture may have one more."""
    height: Count
    """Rows of the frame; an H.264 picture may have one more."""
    shown: bool = False
    """Whether it is sent to be seen again, or was given: not new, not to be acknowledged."""

    @property
    def is_last(self) -> bool:
        """Whether it has the last picture of its frame."""
        return self.picture_index + 1 == self.num_pictures


class SnapshotHeader(Numbered):
    """Header of a snapshot; the file follows."""

    type: Literal["snapshot"] = "snapshot"
    session: Identity
    """Whose."""


class Detached(Numbered):
    """The connection has no session any more, because it said so."""

    type: Literal["detached"] = "detached"
    session: str
    """That it had."""


class Error(Numbered):
    """A message was not obeyed; the session is as it was."""

    type: Literal["error"] = "error"
    code: str
    """For machines."""
    message: str
    """For people."""
    fatal: bool
    """Whether the connection is closed now."""


class Stopped(Message):
    """The session has ended without being asked to; the connection has none any more."""

    type: Literal["stopped"] = "stopped"
    session: str
    """Which."""
    reason: str
    """Why, for people."""


class Evicted(Message):
    """The idle session was put on disk; the connection has none now, `attach` brings it back."""

    type: Literal["evicted"] = "evicted"
    session: str
    """Which."""


FromServer = Welcome | State | Detached | Error | Stopped | Evicted
"""Every text message of the server."""
Header = FrameHeader | SnapshotHeader
"""Every header of a binary one."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A frame, unpacked."""

    header: FrameHeader
    """Index, generation, action and times."""
    pixels: UInt8[np.ndarray, "h w 3"]
    """The picture."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What comes of a command."""

    message: State | Detached | SnapshotHeader | None = None
    """For the client; None: it is not told."""
    frames: list[Frame] = field(default_factory=list)
    """That were made, or that are shown again."""
    file: bytes | bytearray | None = None
    """A snapshot, whose header is the message."""


Event = Frame | Stopped | Evicted
"""What an attached client is told without asking."""

Sink = Callable[[Event], None]
"""A client's ear. Called on the model thread: it must not block, and must not call the host and
wait. One that raises is detached."""
