"""All sessions in memory, on the thread that owns the model: how they come, turn and go."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from scd.data.clip import Conditions, pixels_to_frames
from scd.data.spaces import ConditionSpec
from scd.models.checkpoint import World
from scd.models.flow import with_num_steps
from scd.serving.admission import (
    Admission,
    HostConfig,
    SessionBytes,
    budget_bytes,
    fitting_history,
    session_bytes,
)
from scd.serving.errors import BadRequest, PlayError, SessionStopped, Superseded, UnknownSession
from scd.serving.events import Action, Event, Evicted, Info, Start, Stopped
from scd.serving.session import History, Kept, Player, as_action
from scd.serving.snapshot import Image
from scd.streaming.rollout import Guidance, Rollout
from scd.streaming.sessions import Session, Streams


def check_start(start: Start, world: World, spec: ConditionSpec, config: HostConfig) -> None:
    """Refuse a start that does not fit the world or the limits (BadRequest)."""
    frames = start.frames
    if start.num_steps is not None:
        check_steps(start.num_steps, config.max_steps)
    check_seed(start.seed)
    if frames is None:
        if start.actions:
            raise BadRequest("actions lead to given frames, but none were given")
        return
    check_picture(frames, (*frames.shape[:1], world.card.height, world.card.width, 3))
    if not 1 <= len(frames) <= config.max_start_frames:
        raise BadRequest(f"1 to {config.max_start_frames} frames can be given, got {len(frames)}")
    wanted = len(frames) if spec.has_actions else 0
    if len(start.actions) != wanted:
        raise BadRequest(
            f"{len(frames)} frames of this world need {wanted} actions, got {len(start.actions)}"
        )


def check_steps(num_steps: int, max_steps: int) -> None:
    """Refuse a number of denoising steps (BadRequest)."""
    if not 1 <= num_steps <= max_steps:
        raise BadRequest(f"steps must lie in 1 .. {max_steps}, got {num_steps}")


def check_seed(seed: int) -> None:
    """Refuse a seed that a snapshot could not hold (BadRequest)."""
    if not 0 <= seed < 2**53:
        raise BadRequest(f"a seed must be 0 or more and below 2**53, got {seed}")


def check_picture(picture: np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuse pixels of another kind or size (BadRequest)."""
    if picture.dtype != np.uint8 or picture.shape != shape:
        raise BadRequest(
            f"pictures must be bytes of shape {shape}, got {picture.dtype} of {picture.shape}"
        )


def frames_of(start: Start) -> Tensor | None:
    """Return the given frames [t 3 h w] in [-1, 1]; None: there are none."""
    # Copied: a picture may come from memory that cannot be written.
    return None if start.frames is None else pixels_to_frames(torch.from_numpy(start.frames.copy()))


def conditions_of(start: Start) -> Conditions:
    """Return the actions [1 t] of the given frames, and the label [1]."""
    actions = [as_action(action) for action in start.actions]
    known = [action for action in actions if action is not None]
    if len(known) != len(actions) or len({action.shape for action in known}) > 1:
        raise BadRequest("each given frame needs an action of the same kind")
    return Conditions(
        actions=torch.stack(known)[None] if known else None,
        labels=None if start.label is None else torch.tensor([start.label]),
    )


def given_frames(start: Start, world: World, rollout: Rollout) -> list[Kept]:
    """Return the given frames as a history keeps them."""
    frames = frames_of(start)
    if frames is None:
        return []
    engine = rollout.engine
    latents = world.autoencoder.encode(frames[None].to(engine.device)).to(engine.dtype)[0]
    actions: tuple[Action, ...] = start.actions or (None,) * len(latents)
    return [
        Kept(latent=latent[None], action=action)
        for latent, action in zip(latents, actions, strict=True)
    ]


REMEMBERED = 256
"""Stopped sessions whose reason is still known."""


class Players:
    """The sessions in memory, by name. Calls raise ValueError and leave all as it was then."""

    def __init__(
        self,
        streams: Streams,
        config: HostConfig,
        clock: Callable[[], float],
        report: Callable[[str], None],
    ) -> None:
        """Begin with nobody.

        Args:
            streams: of the world.
            config: limits.
            clock: seconds.
            report: told what a person should know.

        Raises:
            OutOfMemory: not even one session fits.
        """
        self.streams, self.config, self.clock, self.report = streams, config, clock, report
        self.spec = streams.engine.config.conditions
        self.num_dropped = self.num_faults = 0
        self.playing: dict[str, Player] = {}
        self._stopped: dict[str, str] = {}
        budget = budget_bytes(streams.engine, config.memory_gib, config.max_rows)
        self.admission = Admission(config.max_sessions, budget)
        self.reach, self.every = self._plan_history(budget)

    def _plan_history(self, budget: int) -> tuple[int, int]:
        config = self.config
        needed = self._needed(None)
        # One stream more: a rewind builds the new one beside the old.
        room = budget // config.max_sessions - needed.stream
        wanted = config.history_frames, min(config.keyframe_every, config.history_frames)
        reach, every = fitting_history(needed, room, *wanted)
        if (reach, every) != wanted:
            self.report(
                f"memory for {config.max_sessions} sessions: each keeps {reach} frames, and a copy "
                f"of its stream every {every}, instead of {wanted[0]} and {wanted[1]}"
            )
        # As much as one session needs with the shortest history; raises if it is not there.
        Admission(1, budget).admit("one", needed.with_history(reach, every))
        return reach, every

    def _needed(self, guidance: Guidance | None) -> SessionBytes:
        streams = self.streams
        return session_bytes(
            streams.world, streams.engine, streams.window, guidance, self.config.max_start_frames
        )

    def player(self, session_id: str) -> Player:
        """Return a session, and note that it is used (UnknownSession, SessionStopped)."""
        if session_id not in self.playing:
            if session_id in self._stopped:
                raise SessionStopped(self._stopped[session_id])
            raise UnknownSession("there is no session of this name")
        player = self.playing[session_id]
        player.use(self.clock())
        return player

    @contextmanager
    def _promised(self, session_id: str, guidance: Guidance | None) -> Iterator[None]:
        """Promise memory while a session is made; if that fails, as it was before."""
        before = self.admission.promised(session_id)
        needed = self._needed(guidance).with_history(self.reach, self.every)
        self.admission.admit(session_id, needed)
        try:
            yield
        except BaseException:
            self.admission.restore(session_id, before)
            raise

    def _open(self, start: Start) -> tuple[Session, History]:
        streams = self.streams
        check_start(start, streams.world, self.spec, self.config)
        sampling = None
        if start.num_steps is not None:
            sampling = with_num_steps(streams.sampling, start.num_steps)
        conditions = conditions_of(start)
        session = streams.open(frames_of(start), conditions, start.seed, sampling, start.guidance)
        try:
            given = given_frames(start, streams.world, session.rollout)
            return session, History(session.rollout, given, self.reach, self.every)
        except BaseException:
            streams.close(session)
            raise

    def create(self, start: Start) -> Info:
        """Open a session."""
        session_id = secrets.token_urlsafe(16)
        with self._promised(session_id, start.guidance):
            session, history = self._open(start)
        player = Player(session_id, session, start, history, self.clock())
        player.action = self._first_action()
        self.playing[session_id] = player
        return player.info()

    def _first_action(self) -> Action:
        if self.spec.action_dim:
            return (0.0,) * self.spec.action_dim
        return 0 if self.spec.num_actions else None

    def reset(self, session_id: str, start: Start | None) -> Info:
        """Begin anew."""
        player = self.player(session_id)
        rollout = player.session.rollout
        if start is None:
            start = replace(
                player.start,
                seed=rollout.seed,
                num_steps=rollout.num_steps,
                guidance=rollout.guidance,
            )
        with self._promised(session_id, start.guidance):
            session, history = self._open(start)
        player.start = start
        self._replace(player, session, history)
        return player.info()

    def rewind(self, session_id: str, index: int) -> Info:
        """Make an earlier frame the newest."""
        player = self.player(session_id)
        session = self.streams.adopt(self._stream_at(player, index))
        self._replace(player, session, player.history.upto(index))
        return player.info()

    def _stream_at(self, player: Player, index: int) -> Rollout:
        """Return the stream as it was at a frame, with the settings of now."""
        now = player.session.rollout
        if index == player.index:
            return now.fork()
        twin = player.history.at(index)
        twin.seed, twin.sampling, twin.guidance = now.seed, now.sampling, now.guidance
        return twin

    def _replace(self, player: Player, session: Session, history: History) -> None:
        """Let a session go on as another stream, one generation later."""
        self.drop(player)
        self.streams.close(player.session)
        player.session, player.history = session, history
        player.generation += 1
        player.go_on_from(self.clock())
        player.refuse_orders(Superseded("the session was reset or rewound meanwhile"))

    def drop(self, player: Player) -> None:
        """Drop the frame that a session waits for, if there is one."""
        self.num_dropped += self.streams.cancel(player.session)
        player.begun = None

    def fork(self, session_id: str, index: int | None, seed: int | None) -> Info:
        """Copy a session."""
        source = self.player(session_id)
        index = source.index if index is None else index
        if seed is not None:
            check_seed(seed)
        twin_id = secrets.token_urlsafe(16)
        with self._promised(twin_id, source.session.rollout.guidance):
            rollout = self._stream_at(source, index)
            rollout.seed = rollout.seed if seed is None else seed
            session = self.streams.adopt(rollout)
        history = source.history.upto(index)
        twin = Player(twin_id, session, source.start, history, self.clock())
        twin.action, twin.sequence, twin.forked_from = source.action, source.sequence, session_id
        self.playing[twin_id] = twin
        return twin.info()

    def image(self, player: Player, history: bool = True) -> Image:
        """Return all of a session as it is now, for a snapshot."""
        live = player.session.rollout.fork()
        past = player.history.upto(player.index)
        if not history:
            past = History(live, past.kept[-1:], self.reach, self.every)
        return Image(
            session_id=player.session_id,
            generation=player.generation,
            start=player.start,
            live=live,
            history=past,
            action=player.action,
            sequence=player.sequence,
        )

    def adopt(self, image: Callable[[], Image], guidance: Guidance, name: str | None) -> Info:
        """Go on with a session of a snapshot.

        Args:
            image: makes it, once its memory is promised.
            guidance: of it.
            name: under which it goes on; None: under a new one, its generations beginning anew.
        """
        session_id = name or secrets.token_urlsafe(16)
        with self._promised(session_id, guidance):
            made = image()
            session = self.streams.adopt(made.live)
        player = Player(session_id, session, made.start, made.history, self.clock())
        player.generation = made.generation if name else 0
        player.action, player.sequence = made.action, made.sequence
        self.playing[session_id] = player
        return player.info()

    def forget(self, player: Player) -> None:
        """Take a session out of memory, which nobody has heard of."""
        del self.playing[player.session_id]
        self.streams.close(player.session)
        self.admission.release(player.session_id)

    def stop(self, player: Player, why: PlayError) -> None:
        """End a session; its client hears why, and so does whoever asks for it after a fault."""
        name, reason = player.session_id, str(why)
        stopped = Stopped(session_id=name, generation=player.generation, reason=reason)
        self.leave(player, why, stopped)
        if isinstance(why, SessionStopped):
            self.num_faults += 1
            self._stopped[name] = reason
            while len(self._stopped) > REMEMBERED:
                self._stopped.pop(next(iter(self._stopped)))

    def leave(self, player: Player, error: Exception, event: Stopped | Evicted) -> None:
        """Take a session out of memory; its client hears an event, and orders get the error."""
        del self.playing[player.session_id]
        self.num_dropped += player.session.status in ("waiting", "denoising")
        self.streams.close(player.session)
        self.admission.release(player.session_id)
        self.tell(player, event)
        player.let_go()
        player.refuse_orders(error)

    def tell(self, player: Player, event: Event) -> None:
        """Let a client hear; one that raises is let go, and said."""
        fault = player.tell(event)
        if fault is not None:
            self.report(f"a client was detached, it raised {type(fault).__name__}: {fault}")
