"""What a client may say to the server, and within which bounds: one dataclass per message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

SAFE = 2**53 - 1
"""Largest integer of a message: the largest that JavaScript counts to without a gap."""

Count = Annotated[int, Field(ge=0, le=SAFE)]
"""A whole number from 0 on."""
ActionValue = Count | Annotated[tuple[float, ...], Field(min_length=1, max_length=1024)]
"""An action: its number in the world's list, or a vector where the world wants vectors."""
Identity = Annotated[str, Field(max_length=64)]
"""Id of a session or an upload."""
Codec = Literal["jpeg", "h264"]
"""How frames are packed: each a picture of its own, or a video stream."""
StartKind = Literal["nothing", "clip", "upload"]
"""What a stream begins from: no frame; a clip that the world carries; a picture or video that the
client has sent before."""

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class GuidanceChoice:
    """How frames are pushed away from an unconditional branch; as in `scd.streaming.rollout`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["none", "conditions", "context_noise"] = "none"
    """The branch."""
    scale: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Strength; 1 means no push."""
    context_noise: Annotated[float, Field(gt=0, le=10)] = 0.05
    """Strength of the noise in the branch "context_noise"."""


@dataclass(frozen=True, kw_only=True)
class ClientMessage:
    """What every message of a client may carry."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    request: Count | None = None
    """Number of the client's choice; the answer carries it."""


@dataclass(frozen=True, kw_only=True)
class Hello(ClientMessage):
    """First message of a connection; answered by `welcome`."""

    version: Count
    """Of the protocol that the client speaks."""
    token: Annotated[str, Field(max_length=256)] | None = None
    """Of the server, where it wants one."""
    codec: Codec = "jpeg"
    """Of this connection's frames."""
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """Of JPEG frames."""
    type: Literal["hello"] = "hello"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Beginning(ClientMessage):
    """What a stream begins with."""

    seed: Count = 0
    """Of the noise."""
    start: StartKind = "nothing"
    """Where the first frames come from."""
    clip: Count | None = None
    """Number of the clip, for start "clip"."""
    upload: Identity | None = None
    """Id of the upload, for start "upload"."""
    action: ActionValue | None = None
    """That is said to have led to the frames of an upload; none: action 0, or a vector of zeros."""
    label: Count | None = None
    """Class of the stream, for worlds with labels."""
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Denoising steps per frame; none: as the world says."""
    guidance: GuidanceChoice | None = None
    """None: none."""


@dataclass(frozen=True, kw_only=True)
class Create(Beginning):
    """Open a session and attach to it; answered by `state`."""

    type: Literal["create"] = "create"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Reset(Beginning):
    """Begin the session anew, as the message says; answered by `state`, one generation later."""

    type: Literal["reset"] = "reset"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Restart(ClientMessage):
    """Begin the session anew as it began before; answered by `state`, one generation later."""

    type: Literal["restart"] = "restart"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Attach(ClientMessage):
    """Take over a session that nobody is attached to; answered by `state`."""

    session: Identity
    """Its id."""
    type: Literal["attach"] = "attach"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Action(ClientMessage):
    """Hold an action from the next frame that begins until another is held; not answered."""

    action: ActionValue
    """Number of the action in the world's list, or a vector."""
    sequence: Count = 0
    """Of the client's choice; frames say by which they were led."""
    type: Literal["action"] = "action"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Run(ClientMessage):
    """Make frames until `pause`; answered by `state`."""

    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    """At most so many frames per second; none: as many as the server allows."""
    type: Literal["run"] = "run"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Pause(ClientMessage):
    """Make no more frames; answered by `state`."""

    type: Literal["pause"] = "pause"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Step(ClientMessage):
    """Make some frames now; they follow, then `state`."""

    action: ActionValue | None = None
    """That leads to them; none: the held one."""
    count: Annotated[int, Field(ge=1, le=1000)] = 1
    """How many."""
    type: Literal["step"] = "step"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Set(ClientMessage):
    """Change how frames are made, from the next that begins; answered by `state`."""

    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Denoising steps per frame; none: as they are."""
    guidance: GuidanceChoice | None = None
    """None: as it is. Another kind may need another memory: then only `reset` can change it."""
    seed: Count | None = None
    """Of the noise from here on; none: as it is."""
    type: Literal["set"] = "set"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Rewind(ClientMessage):
    """Go back so that an earlier frame is the newest; answered by `state`, one generation later."""

    frame: Count
    """Its index; no older than `history_from` of the state."""
    type: Literal["rewind"] = "rewind"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Fork(ClientMessage):
    """Copy the session and move this connection to the copy; answered by `state` of the copy."""

    frame: Count | None = None
    """Newest frame of the copy; none: that of the session."""
    seed: Count | None = None
    """Of the copy's noise; none: the same."""
    type: Literal["fork"] = "fork"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Observe(ClientMessage):
    """Put in the next frame from outside; over HTTP only."""

    upload: Identity
    """Whose last frame it is."""
    action: ActionValue | None = None
    """That led to it; none: the held one."""
    type: Literal["observe"] = "observe"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Acknowledge(ClientMessage):
    """Say that a frame, and all before it, were drawn; not answered."""

    generation: Count
    """Of the frame."""
    frame: Count
    """Its index."""
    type: Literal["ack"] = "ack"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Snapshot(ClientMessage):
    """Ask for the session as a file; answered by the binary message `snapshot`."""

    type: Literal["snapshot"] = "snapshot"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Detach(ClientMessage):
    """Let go of the session, which stays, paused; answered by `detached`."""

    type: Literal["detach"] = "detach"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Close(ClientMessage):
    """Delete the session; answered by `detached`. The connection stays."""

    type: Literal["close"] = "close"
    """Of the message."""


FromClient = (
    Hello
    | Create
    | Attach
    | Action
    | Run
    | Pause
    | Step
    | Set
    | Reset
    | Restart
    | Rewind
    | Fork
    | Acknowledge
    | Snapshot
    | Detach
    | Close
)
"""Every message of a client."""
