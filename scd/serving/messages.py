"""Messages between clients and the server: dataclasses <-> JSON, and binary frames."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

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


@dataclass(frozen=True, kw_only=True)
class Reset(Beginning):
    """Begin the session anew, as the message says; answered by `state`, one generation later."""

    type: Literal["reset"] = "reset"


@dataclass(frozen=True, kw_only=True)
class Restart(ClientMessage):
    """Begin the session anew as it began before; answered by `state`, one generation later."""

    type: Literal["restart"] = "restart"


@dataclass(frozen=True, kw_only=True)
class Attach(ClientMessage):
    """Take over a session that nobody is attached to; answered by `state`."""

    session: Identity
    """Its id."""
    type: Literal["attach"] = "attach"


@dataclass(frozen=True, kw_only=True)
class Action(ClientMessage):
    """Hold an action from the next frame that begins until another is held; not answered."""

    action: ActionValue
    """Number of the action in the world's list, or a vector."""
    sequence: Count = 0
    """Of the client's choice; frames say by which they were led."""
    type: Literal["action"] = "action"


@dataclass(frozen=True, kw_only=True)
class Run(ClientMessage):
    """Make frames until `pause`; answered by `state`."""

    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    """At most so many frames per second; none: as many as the server allows."""
    type: Literal["run"] = "run"


@dataclass(frozen=True, kw_only=True)
class Pause(ClientMessage):
    """Make no more frames; answered by `state`."""

    type: Literal["pause"] = "pause"


@dataclass(frozen=True, kw_only=True)
class Step(ClientMessage):
    """Make some frames now; they follow, then `state`."""

    action: ActionValue | None = None
    """That leads to them; none: the held one."""
    count: Annotated[int, Field(ge=1, le=1000)] = 1
    """How many."""
    type: Literal["step"] = "step"


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


@dataclass(frozen=True, kw_only=True)
class Rewind(ClientMessage):
    """Go back so that an earlier frame is the newest; answered by `state`, one generation later."""

    frame: Count
    """Its index; no older than `history_from` of the state."""
    type: Literal["rewind"] = "rewind"


@dataclass(frozen=True, kw_only=True)
class Fork(ClientMessage):
    """Copy the session and move this connection to the copy; answered by `state` of the copy."""

    frame: Count | None = None
    """Newest frame of the copy; none: that of the session."""
    seed: Count | None = None
    """Of the copy's noise; none: the same."""
    type: Literal["fork"] = "fork"


@dataclass(frozen=True, kw_only=True)
class Observe(ClientMessage):
    """Put in the next frame from outside; over HTTP only."""

    upload: Identity
    """Whose last frame it is."""
    action: ActionValue | None = None
    """That led to it; none: the held one."""
    type: Literal["observe"] = "observe"


@dataclass(frozen=True, kw_only=True)
class Acknowledge(ClientMessage):
    """Say that a frame, and all before it, were drawn; not answered."""

    generation: Count
    """Of the frame."""
    frame: Count
    """Its index."""
    type: Literal["ack"] = "ack"


@dataclass(frozen=True, kw_only=True)
class Snapshot(ClientMessage):
    """Ask for the session as a file; answered by the binary message `snapshot`."""

    type: Literal["snapshot"] = "snapshot"


@dataclass(frozen=True, kw_only=True)
class Detach(ClientMessage):
    """Let go of the session, which stays, paused; answered by `detached`."""

    type: Literal["detach"] = "detach"


@dataclass(frozen=True, kw_only=True)
class Close(ClientMessage):
    """Delete the session; answered by `detached`. The connection stays."""

    type: Literal["close"] = "close"


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


@dataclass(frozen=True, kw_only=True)
class WorldInfo:
    """What is played."""

    name: str
    """Of the world's folder."""
    height: int
    """Rows of a frame."""
    width: int
    """Columns of a frame."""
    actions: tuple[str, ...]
    """Name of each action, or of each entry of the vector; empty: nothing steers this world."""
    action_dim: int
    """Entries of an action that is a vector; 0: actions are numbers."""
    num_labels: int
    """Classes of streams; 0: none."""
    separable: bool
    """Whether it is a separable model."""
    default_steps: int
    """Denoising steps per frame unless told otherwise."""
    fps: float
    """Frames per second at which it is meant to be watched."""
    clips: int
    """Clips that it carries to begin from."""
    needs_start: bool
    """Whether a stream must begin with given frames."""
    guidance: tuple[str, ...]
    """Kinds of guidance that it can give, "none" among them."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server allows."""

    max_message_bytes: int
    """Of one message of a client."""
    messages_per_s: float
    """Messages of one connection, on average."""
    max_steps: int
    """Denoising steps per frame."""
    max_step_count: int
    """Frames of one `step`."""
    max_fps: float
    """Frames per second of one session."""
    queue_frames: int
    """Frames under way that are not acknowledged; then no more are made."""
    history_frames: int
    """Frames that a session can be rewound by, about."""
    max_upload_bytes: int
    """Of one upload."""
    max_upload_pixels: int
    """Rows times columns of an uploaded picture or video."""
    max_upload_s: float
    """Length of an uploaded video."""
    max_snapshot_bytes: int
    """Of a snapshot that is sent to be restored."""


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """First message of the server: what is played, and within which limits."""

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
    request: int | None = None
    """Of the message that this answers."""
    type: Literal["welcome"] = "welcome"


@dataclass(frozen=True, kw_only=True)
class State:
    """How a session stands."""

    session: str
    """Its id."""
    generation: int
    """Raised whenever frames under way became void: reset, restart, rewind."""
    frame: int
    """Index of the newest frame; -1: there is none yet."""
    num_given: int
    """Frames that it began with; they have the indices 0 .. num_given - 1."""
    running: bool
    """Whether frames are made until `pause`."""
    fps: float | None
    """Limit that `run` set; none: none."""
    action: int | tuple[float, ...] | None
    """The one held; none: the world has no actions."""
    steps: int
    """Denoising steps per frame."""
    guidance: GuidanceChoice
    """As it is."""
    seed: int
    """Of the noise."""
    history_from: int
    """Oldest frame that `rewind` and `fork` reach."""
    forked_from: str | None = None
    """Session of which this one was forked just now."""
    request: int | None = None
    """Of the message that this answers."""
    type: Literal["state"] = "state"


@dataclass(frozen=True, kw_only=True)
class FrameHeader:
    """Header of a frame; the picture follows."""

    session: str
    """Whose frame it is."""
    generation: int
    """In which it was made."""
    frame: int
    """Its index in the session."""
    action: int | tuple[float, ...] | None
    """That led to it; none: the world has none, or the frame was given."""
    sequence: int
    """That came with the action; 0: none did."""
    steps: int
    """Denoising steps that it took; 0: it was given."""
    encoder_ms: float
    """Causal pass."""
    decoder_ms: float
    """All denoising steps."""
    autoencoder_ms: float
    """Latent to pixels."""
    queued_ms: float
    """From the moment at which it could have begun to the one at which it began."""
    codec: Codec
    """Of the payload."""
    key: bool
    """Whether it can be decoded without an earlier one."""
    config: str | None
    """Codec string for a WebCodecs decoder, with key frames of H.264."""
    width: int
    """Columns of the frame; an H.264 picture may have one more."""
    height: int
    """Rows of the frame; an H.264 picture may have one more."""
    shown: bool = False
    """Whether it is sent to be seen again, or was given: not new, not to be acknowledged."""
    type: Literal["frame"] = "frame"


@dataclass(frozen=True, kw_only=True)
class SnapshotHeader:
    """Header of a snapshot; the file follows."""

    session: str
    """Whose."""
    request: int | None = None
    """Of the message that this answers."""
    type: Literal["snapshot"] = "snapshot"


@dataclass(frozen=True, kw_only=True)
class Detached:
    """The connection has no session any more, because it said so."""

    session: str
    """That it had."""
    request: int | None = None
    """Of the message that this answers."""
    type: Literal["detached"] = "detached"


@dataclass(frozen=True, kw_only=True)
class Error:
    """A message was not obeyed; the session is as it was."""

    code: str
    """For machines."""
    message: str
    """For people."""
    fatal: bool
    """Whether the connection is closed now."""
    request: int | None = None
    """Of the message that this answers."""
    type: Literal["error"] = "error"


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """The session has ended without being asked to; the connection has none any more."""

    session: str
    """Which."""
    reason: str
    """Why."""
    type: Literal["stopped"] = "stopped"


@dataclass(frozen=True, kw_only=True)
class Evicted:
    """The idle session was put on disk; the connection has none now, `attach` brings it back."""

    session: str
    """Which."""
    type: Literal["evicted"] = "evicted"


FromServer = Welcome | State | Detached | Error | Stopped | Evicted
"""Every text message of the server."""
Header = FrameHeader | SnapshotHeader
"""Every header of a binary one."""


VERSION = 1
"""Of the protocol; raised when an older client could misunderstand a message."""

CLOSE_CODES = {
    "too_large": 1009,
    "fault": 1011,
    "bad_message": 4000,
    "wrong_version": 4001,
    "unauthorised": 4003,
    "too_many_errors": 4004,
    "too_late": 4008,
    "too_many_messages": 4009,
    "too_slow": 4010,
    "too_many_connections": 4013,
    "model_stopped": 4500,
}
"""Codes with which a WebSocket is closed, by the code of the error that says why."""


class ProtocolError(ValueError):
    """A message or a request that cannot be obeyed."""

    def __init__(
        self, code: str, message: str, fatal: bool = False, request: int | None = None
    ) -> None:
        """Say what was needed and what came.

        Args:
            code: short name for machines.
            message: one sentence for people.
            fatal: whether the connection ends with it.
            request: number of the message that is refused, where it had one.
        """
        super().__init__(message)
        self.code, self.fatal, self.request = code, fatal, request


_CLIENT = TypeAdapter(Annotated[FromClient, Field(discriminator="type")])
_SERVER = TypeAdapter(Annotated[FromServer, Field(discriminator="type")])
_REQUEST = TypeAdapter(TypedDict("Request", {"request": NotRequired[Count]}))
_HEADER = TypeAdapter(Annotated[Header, Field(discriminator="type")])


def read_client(text: str | bytes) -> FromClient:
    """Read a message of a client.

    Raises:
        ProtocolError: bad_message (fatal), unknown_type, or unknown_field or bad_field with the
            field's name.
    """
    try:
        return _CLIENT.validate_json(text)
    except ValidationError as error:
        raise _refused(error, _request(text)) from None


def read_server(text: str | bytes) -> FromServer:
    """Read a text message of the server (ProtocolError as `read_client`)."""
    try:
        return _SERVER.validate_json(text)
    except ValidationError as error:
        raise _refused(error) from None


def write(message: Any) -> str:
    """Write any message as one JSON object."""
    return json.dumps(asdict(message), separators=(",", ":"), allow_nan=False)


def pack(header: Header, payload: bytes) -> bytes:
    """Join a header and its payload to a binary message."""
    text = write(header).encode()
    return len(text).to_bytes(4, "little") + text + payload


def unpack(data: bytes) -> tuple[Header, bytes]:
    """Split a binary message.

    Raises:
        ProtocolError: it is cut off, or its header is not one of ours.
    """
    end = 4 + int.from_bytes(data[:4], "little")
    if len(data) < 4 or len(data) < end:
        raise ProtocolError("bad_message", f"needed {end} bytes of header, got {len(data)}", True)
    try:
        return _HEADER.validate_json(data[4:end]), data[end:]
    except ValidationError as error:
        raise _refused(error) from None


def read_fields(kind: Any, text: bytes) -> Any:
    """Read the JSON body of an HTTP request as one of the dataclasses; no body: all defaults.

    Raises:
        ProtocolError: bad_message, unknown_field or bad_field.
    """
    try:
        return TypeAdapter(kind).validate_json(text or b"{}")
    except ValidationError as error:
        raise _refused(error) from None


def _request(text: str | bytes) -> int | None:
    """Return the number that a refused message had, if it can be read."""
    try:
        return _REQUEST.validate_json(text, strict=True).get("request")
    except ValidationError:
        return None


def _refused(error: ValidationError, request: int | None = None) -> ProtocolError:
    first = error.errors(include_url=False, include_input=False, include_context=True)[0]
    kind, says = first["type"], first["msg"]
    where = ".".join(str(part) for part in first["loc"])
    if kind == "json_invalid" or (not where and not kind.startswith("union_tag")):
        code, fatal, message = "bad_message", True, f"a message is one JSON object: {says}"
    elif kind.startswith("union_tag"):
        context = first.get("ctx", {})
        tag = str(context["tag"])[:40] if "tag" in context else None
        code, fatal, message = "unknown_type", False, "a message needs a type"
        if tag is not None:
            message = f"unknown type {tag!r}; there are {context['expected_tags']}"
    elif kind == "unexpected_keyword_argument":
        code, fatal, message = "unknown_field", False, f"no such field: {where}"
    else:
        code, fatal, message = "bad_field", False, f"{where}: {says}"
    return ProtocolError(code, message[:400], fatal, request)
