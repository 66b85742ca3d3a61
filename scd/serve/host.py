"""Sessions behind one thread that owns the model: calls from any thread in, frames out."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from scd.checkpoint import World
from scd.engine.interface import Engine
from scd.rollout import Guidance
from scd.serve.errors import HostStopped, Overloaded
from scd.serve.events import Action, Frame, HostOverview, Info, Sink, Start


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """How many sessions there may be, and how much each may take."""

    max_sessions: int = 8
    """Sessions in memory; those on disk do not count."""
    max_rows: int = 16
    """Frames denoised side by side; a guided one counts twice."""
    memory_gib: float | None = None
    """For sessions and their histories; None: four fifths of what is free at the start."""
    history_frames: int = 300
    """Frames that a session can be rewound by, at least, once it has them."""
    keyframe_every: int = 16
    """Frames between two copies of a session's memory; a rewind replays fewer than that."""
    max_fps: float = 60.0
    """Frames per second of one session."""
    max_steps: int = 64
    """Denoising steps per frame that a client may ask for."""
    max_step_count: int = 256
    """Frames of one `step` or one `frames`."""
    max_start_frames: int = 64
    """Given first frames."""
    queue_frames: int = 4
    """Frames of an attached client that it has not acknowledged; then no more are made for it."""
    queue_commands: int = 1024
    """Calls that wait for the model thread; more are refused."""
    idle_s: float = 120.0
    """After which a session that made no frame and got no call is put on disk."""
    evict_dir: Path | None = None
    """Where idle sessions go; None: they stay in memory."""
    max_evicted: int = 1000
    """Sessions on disk; then idle ones stay in memory."""


class Host:
    """Start it, call it from any thread, stop it.

    Every call but `overview` returns a future that the model thread fulfils, in the order of the
    calls; what is refused is a `PlayError` of the future. A full queue of calls is refused at once.

    A session that is paused, or whose client has not acknowledged `queue_frames` frames, makes no
    frames and costs nothing but its memory.
    """

    def __init__(self, world: World, engine: Engine, config: HostConfig) -> None:
        """Prepare; nothing big is allocated before `start`."""
        self.world, self.engine, self.config = world, engine, config

    def start(self) -> None:
        """Allocate and begin; sessions that lie in `evict_dir` are there again."""
        raise NotImplementedError

    def stop(self, timeout_s: float = 30.0) -> None:
        """End: clients are told, sessions are written to `evict_dir` if there is one."""
        raise NotImplementedError

    def overview(self) -> HostOverview:
        """Say how all stands, without waiting."""
        raise NotImplementedError

    def create(self, start: Start) -> Future[Info]:
        """Open a session, paused and without a client."""
        raise NotImplementedError

    def attach(self, session_id: str, sink: Sink) -> Future[Info]:
        """Let a client hear a session (SessionBusy: another does)."""
        raise NotImplementedError

    def detach(self, session_id: str, sink: Sink) -> Future[None]:
        """Let the client go; the session is paused. Harmless twice, or with a sink replaced."""
        raise NotImplementedError

    def act(self, session_id: str, action: Action, sequence: int = 0) -> Future[None]:
        """Hold an action until the next; obeyed by the next frame that begins."""
        raise NotImplementedError

    def run(self, session_id: str, fps: float | None = None) -> Future[Info]:
        """Make frames for the attached client until `pause`."""
        raise NotImplementedError

    def pause(self, session_id: str) -> Future[Info]:
        """Begin no more frames; one that has begun still comes."""
        raise NotImplementedError

    def step(
        self, session_id: str, action: Action = None, count: int = 1, sequence: int = 0
    ) -> Future[list[Frame]]:
        """Pause, and make some frames; an attached client hears them too, before the future ends.

        Args:
            session_id: with or without a client.
            action: held from now on; None: the one held.
            count: of the frames.
            sequence: with the action.
        """
        raise NotImplementedError

    def acknowledge(self, session_id: str, generation: int, index: int) -> Future[None]:
        """Say that a frame, and all before it, were drawn."""
        raise NotImplementedError

    def change(
        self,
        session_id: str,
        num_steps: int | None = None,
        guidance: Guidance | None = None,
        seed: int | None = None,
    ) -> Future[Info]:
        """Change how frames are made from the next that begins; None: as it is."""
        raise NotImplementedError

    def reset(self, session_id: str, start: Start | None = None) -> Future[Info]:
        """Begin anew, as the session began (None) or as told; one generation later."""
        raise NotImplementedError

    def rewind(self, session_id: str, index: int) -> Future[Info]:
        """Make an earlier frame the newest again, exactly; one generation later."""
        raise NotImplementedError

    def fork(
        self, session_id: str, index: int | None = None, seed: int | None = None
    ) -> Future[Info]:
        """Copy a session as it was at a frame (None: now) into a new one, paused, no client."""
        raise NotImplementedError

    def observe(
        self, session_id: str, frame: UInt8[np.ndarray, "h w 3"], action: Action = None
    ) -> Future[Info]:
        """Put in the next frame of a paused session from outside."""
        raise NotImplementedError

    def frames(self, session_id: str, first: int, count: int = 1) -> Future[list[Frame]]:
        """Show frames of the history again, given ones too while they are kept."""
        raise NotImplementedError

    def snapshot(self, session_id: str, history: bool = True) -> Future[bytes]:
        """Write a session as a file: safetensors with JSON.

        Args:
            session_id: any.
            history: with all frames that it can be rewound to; False: only as it is now.
        """
        raise NotImplementedError

    def restore(self, data: bytes) -> Future[Info]:
        """Open a session, under a new name, from what `snapshot` gave (BadSnapshot)."""
        raise NotImplementedError

    def delete(self, session_id: str) -> Future[None]:
        """End a session; its client hears `Stopped`."""
        raise NotImplementedError

    def info(self, session_id: str) -> Future[Info]:
        """Say how a session stands."""
        raise NotImplementedError
