"""Sessions behind one thread that owns the model: calls from any thread in, frames out."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from threading import Thread
from typing import Any

import numpy as np
from jaxtyping import UInt8

from scd.engine.interface import Engine
from scd.models.checkpoint import World
from scd.serving.admission import HostConfig
from scd.serving.events import Action, Frame, HostOverview, Info, Sink, Start
from scd.serving.scheduler import Call, Inbox, Stage
from scd.streaming.rollout import Guidance


class Host:
    """Start it, call it from any thread, stop it.

    Every call but `overview` returns a future that the model thread fulfils, in the order of the
    calls; what is refused is a `PlayError` of the future. A full queue of calls is refused at once.

    A session that is paused, or whose client has not acknowledged `queue_frames` frames, makes no
    frames and costs nothing but its memory.
    """

    def __init__(
        self,
        world: World,
        engine: Engine,
        config: HostConfig | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        """Prepare; nothing big is allocated before `start`.

        Args:
            world: that is played.
            engine: of its model; nobody else may use it from `start` to `stop`.
            config: limits.
            report: told on the model thread what a person should know; must not block.
        """
        self.world, self.engine, self.config = world, engine, config or HostConfig()
        self._report = report
        self._inbox = Inbox(self.config.queue_commands)
        self._thread = Thread(target=self._live, name="scd-serve-model", daemon=True)
        self._ready: Future[None] = Future()
        self._began = time.monotonic()
        self._stopping = False
        self._stage: Stage | None = None
        self._alive_at = self._began

    def start(self) -> None:
        """Allocate and begin; sessions that lie in `evict_dir` are there again. Once only.

        Raises:
            ValueError: not even one session fits into memory, or limits that do not fit together.
            OSError: `evict_dir` cannot be made.
        """
        self._began = self._alive_at = time.monotonic()
        self._thread.start()
        self._ready.result()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End: clients are told, sessions are written to `evict_dir` if there is one.

        Harmless twice. After `timeout_s` seconds it returns, done or not.
        """
        self._stopping = True
        self._inbox.ring()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def overview(self) -> HostOverview:
        """Say how all stands now, without waiting for the model thread."""
        now, inbox, stage = time.monotonic(), self._inbox, self._stage
        healthy = self._thread.is_alive() and not inbox.reason
        if stage is None:
            reason = inbox.reason or "it has not started"
            return HostOverview(healthy=False, reason=reason, max_sessions=self.config.max_sessions)
        return replace(
            stage.overview(),
            healthy=healthy,
            reason="" if healthy else inbox.reason or "the model thread is gone",
            uptime_s=now - self._began,
            tick_age_s=now - self._alive_at,
            num_commands=len(inbox),
        )

    def create(self, start: Start) -> Future[Info]:
        """Open a session, paused and without a client."""
        return self._ask(lambda stage: stage.players.create(start))

    def attach(self, session_id: str, sink: Sink) -> Future[Info]:
        """Let a client hear a session (SessionBusy: another does)."""
        return self._ask(lambda stage: stage.commands.attach(session_id, sink), session_id)

    def detach(self, session_id: str, sink: Sink) -> Future[None]:
        """Let the client go; the session is paused. Harmless twice, or with a sink replaced."""
        return self._ask(lambda stage: stage.commands.detach(session_id, sink))

    def act(self, session_id: str, action: Action, sequence: int = 0) -> Future[None]:
        """Hold an action until the next; obeyed by the next frame that begins."""
        return self._ask(lambda stage: stage.commands.act(session_id, action, sequence))

    def run(self, session_id: str, fps: float | None = None) -> Future[Info]:
        """Make frames for the attached client until `pause`."""
        return self._ask(lambda stage: stage.commands.run(session_id, fps), session_id)

    def pause(self, session_id: str) -> Future[Info]:
        """Begin no more frames; one that has begun still comes."""
        return self._ask(lambda stage: stage.commands.pause(session_id), session_id)

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
        return self._ask(
            lambda stage: stage.commands.step(session_id, action, count, sequence), session_id
        )

    def acknowledge(self, session_id: str, generation: int, index: int) -> Future[None]:
        """Say that a frame, and all before it, were drawn."""
        return self._ask(lambda stage: stage.commands.acknowledge(session_id, generation, index))

    def change(
        self,
        session_id: str,
        num_steps: int | None = None,
        guidance: Guidance | None = None,
        seed: int | None = None,
    ) -> Future[Info]:
        """Change how frames are made from the next that begins; None: as it is."""
        return self._ask(
            lambda stage: stage.commands.change(session_id, num_steps, guidance, seed), session_id
        )

    def reset(self, session_id: str, start: Start | None = None) -> Future[Info]:
        """Begin anew, one generation later.

        Args:
            session_id: any.
            start: None: as the session began, with the seed, steps and guidance that it has now.
        """
        return self._ask(lambda stage: stage.players.reset(session_id, start), session_id)

    def rewind(self, session_id: str, index: int) -> Future[Info]:
        """Make an earlier frame the newest again, exactly; one generation later."""
        return self._ask(lambda stage: stage.players.rewind(session_id, index), session_id)

    def fork(
        self, session_id: str, index: int | None = None, seed: int | None = None
    ) -> Future[Info]:
        """Copy a session as it was at a frame (None: now) into a new one, paused, no client."""
        return self._ask(lambda stage: stage.players.fork(session_id, index, seed), session_id)

    def observe(
        self, session_id: str, frame: UInt8[np.ndarray, "h w 3"], action: Action = None
    ) -> Future[Info]:
        """Put in the next frame of a paused session from outside."""
        return self._ask(
            lambda stage: stage.commands.observe(session_id, frame, action), session_id
        )

    def frames(self, session_id: str, first: int, count: int = 1) -> Future[list[Frame]]:
        """Show frames of the history again, given ones too while they are kept."""
        return self._ask(lambda stage: stage.commands.frames(session_id, first, count), session_id)

    def snapshot(self, session_id: str, history: bool = True) -> Future[bytes]:
        """Write a session as a file: safetensors with JSON.

        Args:
            session_id: any.
            history: with all frames that it can be rewound to; False: only as it is now.
        """
        return self._ask(lambda stage: stage.snapshot(session_id, history), session_id)

    def restore(self, data: bytes) -> Future[Info]:
        """Open a session, under a new name, from what `snapshot` gave (BadSnapshot)."""
        return self._ask(lambda stage: stage.restore(data))

    def delete(self, session_id: str) -> Future[None]:
        """End a session; its client hears `Stopped`."""
        return self._ask(lambda stage: stage.delete(session_id))

    def names(self) -> Future[list[str]]:
        """Return the sessions in memory."""
        return self._ask(lambda stage: list(stage.players.playing))

    def is_here(self, session_id: str) -> Future[bool]:
        """Say whether a session is in memory or in `evict_dir`; its use is not noted."""
        return self._ask(lambda stage: stage.is_here(session_id))

    def release(self, session_id: str) -> Future[bool]:
        """Put a session without a client on disk, for another host; False: not at this moment.

        The future is an UnknownSession where it is not in memory, a SessionBusy if it has a client.
        """
        return self._ask(lambda stage: stage.evictions.release(session_id))

    def info(self, session_id: str) -> Future[Info]:
        """Say how a session stands."""
        return self._ask(lambda stage: stage.commands.info(session_id), session_id)

    def _ask(self, do: Callable[[Stage], Any], wakes: str | None = None) -> Future[Any]:
        """Let the model thread do something; a session that it wakes is brought back from disk."""
        return self._inbox.put(Call(do=do, wakes=wakes))

    def _live(self) -> None:
        """Be the model thread."""
        stage = None
        try:
            stage = Stage(self.world, self.engine, self.config, self._inbox, self._report)
            self._stage = stage
            self._ready.set_result(None)
            while not self._stopping:
                self._alive_at = time.monotonic()
                stage.turn()
            reason = "the server is stopping"
            self._end(stage, reason, tell_evicted=True)
        except BaseException as error:
            reason = f"the model thread has ended: {type(error).__name__}: {error}"
            if not self._ready.done():
                self._inbox.close(reason)
                self._ready.set_exception(error)
                return
            self._report(reason)
            self._end(stage, reason, tell_evicted=False)

    def _end(self, stage: Stage | None, reason: str, tell_evicted: bool) -> None:
        # First of all, so that nobody who asks from now on waits in vain.
        self._inbox.close(reason)
        try:
            if stage is not None:
                stage.end(reason, tell_evicted)
        except BaseException as error:
            self._report(f"while ending: {type(error).__name__}: {error}")
        finally:
            self._inbox.refuse_all(reason)
