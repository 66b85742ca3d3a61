"""What a host of sessions is told, and what it says: starts, frames, states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from scd.streaming.rollout import Guidance

Action = int | tuple[float, ...] | None
"""Id of an action, or its vector; None: of a world without actions."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a session begins with."""

    seed: int = 0
    """Of the noise."""
    frames: UInt8[np.ndarray, "t h w 3"] | None = None
    """Given first frames; None: from nothing."""
    actions: tuple[Action, ...] = ()
    """That led to those frames, one each; empty for a world without actions."""
    label: int | None = None
    """Class of the stream, for worlds with labels."""
    num_steps: int | None = None
    """Denoising steps per frame; None: as the world says."""
    guidance: Guidance | None = None
    """None: none."""


@dataclass(frozen=True, kw_only=True)
class FrameTiming:
    """Wall-clock seconds of one frame by part. Parts are shared: others' frames run beside it."""

    queued_s: float = 0.0
    """From when it could have begun to when it began."""
    encoder_s: float = 0.0
    """Causal pass, of all frames that began with it."""
    decoder_s: float = 0.0
    """From then to the end of its last denoising step."""
    autoencoder_s: float = 0.0
    """Latents to pixels, of all frames that ended with it."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A frame of a session."""

    session_id: str
    """Whose."""
    generation: int
    """In which it was made, or read from the history."""
    index: int
    """In the stream."""
    action: Action
    """That led to it."""
    sequence: int
    """That came with the action; 0: none did."""
    frame: UInt8[np.ndarray, "h w 3"]
    """The picture."""
    num_steps: int
    """Denoising steps that it took; 0: it was given."""
    timing: FrameTiming = FrameTiming()
    """How long it took; zeros where it comes from the history."""


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """A session has ended by a fault, or with the host; its client is detached."""

    session_id: str
    """Which."""
    generation: int
    """Its last."""
    reason: str
    """Why, for people."""


@dataclass(frozen=True, kw_only=True)
class Evicted:
    """An idle session was put on disk; its client is detached, and any call brings it back."""

    session_id: str
    """Which."""
    generation: int
    """Its generation, which it keeps."""


Event = Frame | Stopped | Evicted
"""What a sink is told."""

Sink = Callable[[Event], None]
"""A client's ear. Called on the model thread: it must not block, and must not call the host and
wait. One that raises is detached."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """How a session stands."""

    session_id: str
    """Its name, a secret that lets anybody play it."""
    generation: int
    """Raised whenever frames under way became void: reset and rewind."""
    index: int
    """Of the newest frame; -1: there is none yet."""
    num_given: int
    """Frames that it began with: they have the indices 0 .. num_given - 1."""
    running: bool
    """Whether frames are made until `pause`."""
    fps: float | None
    """Limit that `run` set; None: that of the host."""
    action: Action
    """The one held."""
    sequence: int
    """That came with it."""
    num_steps: int
    """Denoising steps per frame."""
    guidance: Guidance
    """As it is."""
    seed: int
    """Of the noise."""
    label: int | None
    """Class of the stream."""
    history_from: int
    """Oldest frame that `rewind` and `fork` reach; -1: before the first."""
    kept_from: int
    """Oldest frame that `frames` can show: given ones too, while they are kept."""
    attached: bool
    """Whether it has a client."""
    forked_from: str | None = None
    """Session that it is a copy of."""


@dataclass(frozen=True, kw_only=True)
class HostOverview:
    """What a host does, read without waiting for it."""

    healthy: bool
    """Whether the model thread is there."""
    reason: str
    """Why it is not."""
    uptime_s: float = 0.0
    """Seconds since `start`."""
    tick_age_s: float = 0.0
    """Seconds since the model thread last said that it is alive; it does so at least once a second
    unless a call of the network takes longer."""
    num_sessions: int = 0
    """In memory."""
    num_running: int = 0
    """Of these, that make frames until paused."""
    num_attached: int = 0
    """Of these, that have a client."""
    num_evicted: int = 0
    """On disk."""
    max_sessions: int
    """That there may be in memory."""
    reserved_bytes: int = 0
    """Memory promised to sessions, by formula."""
    budget_bytes: int = 0
    """Memory that may be promised."""
    num_commands: int = 0
    """Calls that wait for the model thread."""
    num_frames: int = 0
    """Made so far."""
    num_dropped: int = 0
    """Made or begun for nothing: their generation was over, or their session gone."""
    num_faults: int = 0
    """Sessions stopped by a fault."""
    num_evictions: int = 0
    """Sessions put on disk."""
    num_restores: int = 0
    """Sessions brought back."""
    num_failed_evictions: int = 0
    """That the disk refused; the sessions stayed in memory."""
