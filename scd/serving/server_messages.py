"""What the server says to a client: one dataclass per message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scd.serving.client_messages import Codec, GuidanceChoice


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
    """Of the message."""


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
    """Of the message."""


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
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class SnapshotHeader:
    """Header of a snapshot; the file follows."""

    session: str
    """Whose."""
    request: int | None = None
    """Of the message that this answers."""
    type: Literal["snapshot"] = "snapshot"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Detached:
    """The connection has no session any more, because it said so."""

    session: str
    """That it had."""
    request: int | None = None
    """Of the message that this answers."""
    type: Literal["detached"] = "detached"
    """Of the message."""


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
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """The session has ended without being asked to; the connection has none any more."""

    session: str
    """Which."""
    reason: str
    """Why."""
    type: Literal["stopped"] = "stopped"
    """Of the message."""


@dataclass(frozen=True, kw_only=True)
class Evicted:
    """The idle session was put on disk; the connection has none now, `attach` brings it back."""

    session: str
    """Which."""
    type: Literal["evicted"] = "evicted"
    """Of the message."""


FromServer = Welcome | State | Detached | Error | Stopped | Evicted
"""Every text message of the server."""
Header = FrameHeader | SnapshotHeader
"""Every header of a binary one."""
