"""Many streams at once, each with its own past and pace, that share the calls of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from scd.common.memory import OutOfMemory, check_free, out_of_memory_named
from scd.data.clip import Conditions
from scd.engine.interface import Engine
from scd.engine.plain import PlainEngine
from scd.engine.pool import FramePool, NewFrame, PoolFrame, pool_bytes
from scd.models.build import frame_cost
from scd.models.checkpoint import World
from scd.models.config import Guidance, SamplingConfig
from scd.models.cost import Load
from scd.models.flow import evaluations
from scd.models.kinds import ModelConfig
from scd.streaming.draft import Draft, draft_all
from scd.streaming.finite import finite_streams
from scd.streaming.rollout import Rollout

Status = Literal["idle", "waiting", "denoising", "closed", "stopped"]
"""No frame asked for; asked for but not begun; begun; closed by its owner; stopped by a fault."""


@dataclass(eq=False)
class Session:
    """One of many streams: made by `Streams.open`, used through the methods of `Streams`."""

    number: int
    """Of the session among all that were opened."""
    rollout: Rollout
    """Its past, conditions, seed, sampling and guidance. `rollout.sampling` may be changed at any
    time and holds for frames that begin after that; only `Streams` may step it."""
    status: Status = "idle"
    """What it is doing."""
    reason: str = ""
    """Why it was stopped."""

    @property
    def num_frames(self) -> int:
        """Frames so far, given ones included."""
        return self.rollout.num_frames

    @property
    def is_open(self) -> bool:
        """Whether it was neither closed nor stopped."""
        return self.status not in ("closed", "stopped")

    @property
    def window(self) -> int:
        """Frames that it remembers."""
        return self.rollout.window or self.rollout.engine.config.cache.window

    @property
    def title(self) -> str:
        """The session in words, for people."""
        return f"session {self.number}, which remembers {self.window} frames,"

    @property
    def num_rows(self) -> int:
        """Rows that one of its frames takes: 1, or 2 with guidance."""
        return 1 if self.rollout.guidance_scale is None else 2

    @property
    def num_calls(self) -> int:
        """Calls of the network that its next frame takes."""
        return len(evaluations(self.rollout.times, self.rollout.sampling.solver))

    def as_batch(self, action: Tensor | None) -> Tensor | None:
        """Return the action as that of a batch of one stream.

        Raises:
            ValueError: it is not one id, or one vector.
        """
        if action is None:
            return None
        axes = 1 if self.rollout.engine.config.conditions.action_dim else 0
        if action.ndim != axes:
            kind = "a vector" if axes else "one id"
            raise ValueError(f"an action is {kind}, got shape {tuple(action.shape)}")
        return action[None]

    @property
    def bytes_needed(self) -> int:
        """Memory for the keys and values of its window, by formula: see model.cost.

        Guidance by conditions has a second memory.
        """
        engine = self.rollout.engine
        load = Load(
            num_context_frames=self.window,
            branches=self.num_rows,
            memories=2 if self.rollout.guidance.kind == "conditions" else 1,
            bytes_per_value=engine.dtype.itemsize,
        )
        return _cache_bytes(engine.config, load)

    @property
    def bytes_untouched(self) -> int:
        """Part of its memory that was allocated but never written.

        A CPU's system hands memory out when it is written, so that part still counts as free.
        """
        memory = self.rollout.state.cache
        if memory.keys.device.type != "cpu":
            return 0
        unwritten = memory.config.window - len(memory.slots)
        return memory.num_bytes * unwritten // memory.config.window


@cache
def _cache_bytes(config: ModelConfig, load: Load) -> int:
    # Counting builds the model without its weights: tens of milliseconds, so once.
    return frame_cost(config, load).cache_bytes


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A frame that is ready, or the end of its session by a fault."""

    session: Session
    """Whose frame it is."""
    index: int
    """Of the frame in its stream."""
    frames: Float[Tensor, "t 3 h w"] | None
    """In [-1, 1]: one, or all that a latent frame stands for; None: the session was stopped."""
    error: str | None = None
    """What stopped it: session and frame by number, and the fault."""

    @property
    def frame(self) -> Float[Tensor, "3 h w"] | None:
        """The newest of them."""
        return None if self.frames is None else self.frames[-1]


Lap = Callable[[str], None]
"""Is told by name that a part of a frame, or of a tick, has ended."""


class Streams:
    """Sessions that come and go; `request` asks for a frame, `tick` brings all a call further.

    Until its frame begins a session can be steered otherwise; until it is done, the frame can be
    cancelled.

    A session's frames are those of a `Rollout` of its own with the same seed, whoever else is
    there. With the fast separable engine, whose decoder sees no past, all frames under way share
    one call per tick; with every other engine they are called one by one: the same frames, later.

    Fairness: every frame under way advances by one call in every tick, whoever waits. Requests
    begin in the order they came, when rows are free. Frames that begin in one tick share their
    causal pass where the engine can; it holds up those under way: so beside them no more frames
    begin in a tick than bring `max_rows` calls in all, which is what a full pool works off in a
    tick. Rows never lie idle for long, a crowd at once is spread over some ticks, and nobody waits
    for ever. Where no frame is under way, all begin together.

    A fault of a session's own pass, or a frame that is not finite, stops that session alone. A
    device that is full in a call that all share is an error of `tick`: nothing is lost, and once
    somebody has left it can be tried again.

    Not for several threads at once.
    """

    def __init__(
        self,
        world: World,
        engine: Engine | None = None,
        sampling: SamplingConfig | None = None,
        max_rows: int = 16,
        window: int | None = None,
    ) -> None:
        """Allocate the rows.

        Args:
            world: model, autoencoder and what they expect.
            engine: what runs the model; None: the model as it is written.
            sampling: of sessions that bring none; None: as the checkpoint says.
            max_rows: frames that are denoised side by side, guided ones count twice; further
                requests wait.
            window: frames in the memory of each session; None: as the model was trained.

        Raises:
            OutOfMemory: the rows need more than is free; nothing was allocated.
            ValueError: max_rows below 1, or a model that makes blocks of frames.
        """
        self.world, self.engine = world, engine or PlainEngine(world.model)
        if self.engine.config.frames_per_block > 1:
            raise ValueError(
                "streams that share calls are made latent frame by latent frame, this model makes "
                f"blocks of {self.engine.config.frames_per_block}: scd sample and Rollout do"
            )
        self.sampling, self.window = sampling or world.sampling, window
        needed = pool_bytes(self.engine, max_rows)
        what, device = f"room for {max_rows} frames side by side", self.engine.device
        check_free(what, needed, device)
        with out_of_memory_named(what, needed, device):
            self._pool = FramePool(self.engine, max_rows)
        self._sessions: dict[int, Session] = {}
        # Both in the order of requests; a waiting session has its action.
        self._waiting: dict[Session, Tensor | None] = {}
        self._denoising: dict[Session, tuple[PoolFrame, Draft]] = {}
        self._ended: list[Finished] = []
        self._num_opened = 0

    @property
    def sessions(self) -> list[Session]:
        """Open sessions, in the order they came."""
        return list(self._sessions.values())

    @property
    def is_busy(self) -> bool:
        """Whether `tick` has anything to do."""
        return bool(self._waiting or self._denoising)

    def open(
        self,
        frames: Float[Tensor, "t 3 h w"] | None = None,
        conditions: Conditions | None = None,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        guidance: Guidance | None = None,
    ) -> Session:
        """Let a stream join, at any time.

        Args:
            frames: given first frames in [-1, 1]; None: from nothing.
            conditions: the actions [1 t] that led to those frames, and the label [1].
            seed: of the noise.
            sampling: steps per frame and the like; None: as all.
            guidance: None: none.

        Raises:
            OutOfMemory: its memory needs more than is free; nothing was allocated.
            ValueError: frames that do not fit or are not finite, conditions that do not fit,
                guidance that this model cannot give or that needs more rows than there are.
        """
        sampling = sampling or self.sampling
        rollout = Rollout(self.world, sampling, guidance, seed, self.window, self.engine)
        session = self._checked(Session(self._num_opened, rollout))
        given = None if frames is None else frames[None]
        with self._memory_for(session, session.title):
            # Where a session begins its client has said.
            rollout.begin(given, conditions, can_reset=False, from_nothing=True)
        return self._join(session)

    def fork(self, session: Session, seed: int | None = None) -> Session:
        """Return a copy of a session, to try another future; a frame it waits for is not copied.

        Args:
            session: any open one.
            seed: of the copy's noise from here on; None: the same.

        Raises:
            OutOfMemory: as for `open`.
            ValueError: the session is not open here.
        """
        self._check_open(session)
        with self._memory_for(session, f"a copy of {session.title}"):
            rollout = session.rollout.fork()
        rollout.seed = rollout.seed if seed is None else seed
        return self._join(Session(self._num_opened, rollout))

    def adopt(self, rollout: Rollout) -> Session:
        """Let a stream of this engine join that has begun, and that nobody steps any more.

        Its memory is there already, so it is not checked.

        Raises:
            ValueError: a guided frame needs more rows than there are.
        """
        return self._join(self._checked(Session(self._num_opened, rollout)))

    def request(self, session: Session, action: Tensor | None = None) -> None:
        """Ask for the next frame of a session; a later `tick` returns it.

        Args:
            session: an idle one.
            action: that leads to the frame: an id [], or a vector [a]; None for a model without
                actions.

        Raises:
            ValueError: the session is not open here, its last frame is still under way, or the
                action does not fit.
        """
        self._check_idle(session)
        session.rollout.check(session.as_batch(action))
        self._waiting[session] = action
        session.status = "waiting"

    def steer(self, session: Session, action: Tensor | None = None) -> None:
        """Change the action of a frame that was asked for and has not begun.

        Raises:
            ValueError: the session does not wait, or the action does not fit.
        """
        if session.status != "waiting":
            raise ValueError(f"session {session.number} does not wait for a frame")
        session.rollout.check(session.as_batch(action))
        self._waiting[session] = action

    def cancel(self, session: Session) -> bool:
        """Drop the frame that a session waits for, begun or not; return whether there was one.

        Raises:
            ValueError: the session is not open here.
        """
        self._check_open(session)
        was_asked = session.status != "idle"
        self._waiting.pop(session, None)
        self._drop_frame(session)
        session.status = "idle"
        return was_asked

    def observe(
        self, session: Session, frame: Float[Tensor, "3 h w"], action: Tensor | None = None
    ) -> None:
        """Put in the next frame of an idle session from outside, and the action that led to it.

        Raises:
            ValueError: as for `request`, or the frame does not fit or is not finite.
        """
        self._check_idle(session)
        session.rollout.observe(frame[None], session.as_batch(action))

    def close(self, session: Session) -> None:
        """Let a session go, at any time; a frame under way is dropped. Harmless twice.

        Raises:
            ValueError: it is none of these streams' sessions.
        """
        if session.is_open:
            self._check_open(session)
            self._leave(session, "closed")

    @torch.no_grad()
    def tick(self, lap: Lap = lambda part: None) -> list[Finished]:
        """Begin frames that wait, make one call for all under way, and return those that end.

        Args:
            lap: is called after each part with its name: encoder (of all that begin), decoder,
                autoencoder, memory.
        """
        self._begin_frames()
        lap("encoder")
        if not self._done():
            with self._full_device_named():
                self._pool.advance()
        lap("decoder")
        self._finish_frames(lap)
        # Kept until here, so that a fault of one part loses no frame of another.
        ended, self._ended = self._ended, []
        return ended

    def _begin_frames(self) -> None:
        chosen = self._that_begin()
        if len(chosen) > 1:
            try:
                self._begin(chosen)
                return
            except Exception:
                # Whose fault it is shows when each is alone.
                pass
        for session in chosen:
            with self._fault_stops(session):
                self._begin([session])

    def _that_begin(self) -> list[Session]:
        """Choose of those who wait, in their order."""
        chosen: list[Session] = []
        rows, brought = self._pool.num_rows, 0
        for session in self._waiting:
            rows += session.num_rows
            held_up = self._denoising and brought >= self._pool.max_rows
            if held_up or rows > self._pool.max_rows:
                break
            chosen.append(session)
            brought += session.num_rows * session.num_calls
        return chosen

    def _begin(self, sessions: list[Session]) -> None:
        actions = [one.as_batch(self._waiting[one]) for one in sessions]
        drafts = draft_all([one.rollout for one in sessions], actions)
        frames = self._pool.add(
            [
                NewFrame(
                    context=draft.context,
                    noise=draft.noise,
                    times=one.rollout.times,
                    solver=one.rollout.sampling.solver,
                    scale=one.rollout.guidance_scale,
                    step_noise=draft.step_noise,
                )
                for one, draft in zip(sessions, drafts, strict=True)
            ]
        )
        # Only now: a pass that is interrupted leaves the requests where they were.
        for session, frame, draft in zip(sessions, frames, drafts, strict=True):
            del self._waiting[session]
            self._denoising[session] = frame, draft
            session.status = "denoising"

    def _done(self) -> list[Session]:
        return [session for session, (frame, _) in self._denoising.items() if frame.is_done]

    def _finish_frames(self, lap: Lap) -> None:
        done = self._done()
        if not done:
            return
        latents = self._pool.latents([self._denoising[session][0] for session in done])
        with self._full_device_named():
            frames = self._decoded(done, latents)
        lap("autoencoder")
        rows = zip(latents.split(1), frames, strict=True)
        finite = torch.cat([finite_streams(latent, made[None]) for latent, made in rows]).tolist()
        for row, (session, is_finite) in enumerate(zip(done, finite, strict=True)):
            if not is_finite:
                self._stop(session, "it is not finite (NaN or infinity)")
                continue
            with self._fault_stops(session):
                index, draft = session.num_frames, self._denoising[session][1]
                session.rollout.keep(draft, latents[row : row + 1].clone())
                self._drop_frame(session)
                session.status = "idle"
                ended = Finished(session=session, index=index, frames=frames[row].clone())
                self._ended.append(ended)
        lap("memory")

    def _decoded(self, sessions: list[Session], latents: Tensor) -> list[Tensor]:
        """Return the frames [t 3 h w] of a latent frame of each session."""
        autoencoder = self.world.autoencoder
        if not autoencoder.config.is_video:
            return list(autoencoder.decode(latents[:, None]).float())
        # Each has a decoder of its own, which remembers what it saw.
        each = zip(sessions, latents.split(1), strict=True)
        return [session.rollout.decoder.next(latent)[0] for session, latent in each]

    @contextmanager
    def _fault_stops(self, session: Session) -> Iterator[None]:
        """Stop a session, and nobody else, when its own pass fails; an interruption goes on."""
        try:
            with out_of_memory_named(
                session.title, lambda: session.bytes_needed, self.engine.device
            ):
                yield
        except OutOfMemory as error:
            self._stop(session, str(error))
        except Exception as error:
            self._stop(session, f"{type(error).__name__}: {error}")

    def _full_device_named(self) -> AbstractContextManager[None]:
        what = f"one call for {self._pool.num_rows} frames side by side"
        return out_of_memory_named(what, self._pool.num_bytes, self.engine.device)

    def _stop(self, session: Session, fault: str) -> None:
        index = session.num_frames
        session.reason = f"session {session.number} was stopped at frame {index}: {fault}"
        self._leave(session, "stopped")
        self._ended.append(
            Finished(session=session, index=index, frames=None, error=session.reason)
        )

    def _checked(self, session: Session) -> Session:
        if session.num_rows > self._pool.max_rows:
            raise ValueError(f"a guided frame takes 2 rows, max_rows is {self._pool.max_rows}")
        return session

    def _join(self, session: Session) -> Session:
        self._sessions[session.number] = session
        self._num_opened += 1
        return session

    def _leave(self, session: Session, status: Status) -> None:
        del self._sessions[session.number]
        self._waiting.pop(session, None)
        self._drop_frame(session)
        session.rollout.end()
        session.status = status

    def _drop_frame(self, session: Session) -> None:
        if session in self._denoising:
            frame, _ = self._denoising.pop(session)
            self._pool.remove(frame)

    def _check_open(self, session: Session) -> None:
        if not session.is_open:
            raise ValueError(session.reason or f"session {session.number} is closed")
        if self._sessions.get(session.number) is not session:
            raise ValueError(f"session {session.number} belongs to other streams")

    def _check_idle(self, session: Session) -> None:
        self._check_open(session)
        if session.status != "idle":
            raise ValueError(
                f"frame {session.num_frames} of session {session.number} is still under way"
            )

    @contextmanager
    def _memory_for(self, session: Session, what: str) -> Iterator[None]:
        """Refuse a session before its memory is allocated, or name it when that fails."""
        device, needed = self.engine.device, session.bytes_needed
        promised = sum(other.bytes_untouched for other in self.sessions)
        check_free(what, needed, device, promised)
        with out_of_memory_named(what, needed, device):
            yield
