"""All sessions in memory, on the thread that owns the model: how they come, change and go."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from scd.data.clip import Conditions, pixels_to_frames
from scd.models.config import Guidance
from scd.models.flow import with_num_steps
from scd.serving.admission import (
    Admission,
    HostConfig,
    SessionBytes,
    UnderWay,
    budget_bytes,
    fitting_history,
    for_under_way,
    session_bytes,
)
from scd.serving.messages import Evicted, ServeError, Stopped
from scd.serving.prompts import Prompts
from scd.serving.session import (
    History,
    KeptFrame,
    Session,
    Start,
    as_action,
    as_guidance,
)
from scd.serving.snapshot import Image
from scd.streaming.rollout import Rollout
from scd.streaming.sessions import Session as Stream
from scd.streaming.sessions import Streams

UNKNOWN = "there is no session of this name, or it has expired"
"""What is said of a session that is nowhere."""

REMEMBERED = 256
"""Stopped sessions whose reason is still known."""


class Sessions:
    """The sessions in memory, by name. Calls raise ValueError and leave all as it was then."""

    def __init__(
        self,
        streams: Streams,
        config: HostConfig,
        clock: Callable[[], float],
        report: Callable[[str], None],
        under_way: UnderWay,
        prompts: Prompts,
    ) -> None:
        """Begin with none.

        Args:
            streams: of the world.
            config: limits.
            clock: seconds.
            report: told what a person should know.
            under_way: gets its part of the memory.
            prompts: embedded ones, of a world that a text steers.

        Raises:
            OutOfMemory: not even one session fits.
        """
        self.streams, self.config, self.clock, self.report = streams, config, clock, report
        self.prompts = prompts
        self.num_dropped = self.num_faults = 0
        self.playing: dict[str, Session] = {}
        self.stopped: dict[str, str] = {}
        whole = budget_bytes(streams.engine, config.memory_gib, config.max_rows)
        under_way.budget = for_under_way(whole, config.max_sessions)
        self.under_way, budget = under_way, whole - under_way.budget
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

    def file_bytes(self) -> int:
        """Return the bytes of a session's file, at the most."""
        spec, frames = self.streams.world.card.conditions, self.reach + self.every
        guidance = None
        if spec.has_actions or spec.num_labels:
            guidance = Guidance(kind="conditions", scale=2.0)
        tensors = self._needed(guidance).with_history(self.reach, self.every)
        # Beside them the JSON: its settings, and a line for each frame with its action.
        return tensors + 2**15 + frames * (256 + 25 * spec.action_dim)

    def get(self, name: str) -> Session:
        """Return a session, and note that it is used.

        Raises:
            ServeError: unknown_session, session_stopped.
        """
        if name not in self.playing:
            raise self.missing(name)
        session = self.playing[name]
        session.use(self.clock())
        return session

    def missing(self, name: str) -> ServeError:
        """Return what is said of a session that is not in memory."""
        if name in self.stopped:
            return ServeError("session_stopped", self.stopped[name])
        return ServeError("unknown_session", UNKNOWN)

    @contextmanager
    def _promised(self, name: str, guidance: Guidance | None) -> Iterator[None]:
        """Promise memory while a session is made; if that fails, as it was before."""
        before = self.admission.promised(name)
        needed = self._needed(guidance).with_history(self.reach, self.every)
        self.admission.admit(name, needed)
        try:
            yield
        except BaseException:
            self.admission.restore(name, before)
            raise

    def create(self, start: Start) -> Session:
        """Open a session: paused, without a client."""
        name = secrets.token_urlsafe(16)
        stream, history = self._open(name, start)
        return self._join(Session(name, stream, start, history, self.clock()))

    def _join(self, session: Session) -> Session:
        session.prompt_cut = self.prompts.cut(session.prompt)
        self.playing[session.name] = session
        return session

    def _open(self, name: str, start: Start) -> tuple[Stream, History]:
        streams, message = self.streams, start.message
        guidance = as_guidance(message.guidance)
        sampling = None
        if message.steps is not None:
            sampling = with_num_steps(streams.sampling, message.steps)
        frames = _frames_of(start)
        with self._promised(name, guidance):
            conditions = replace(
                _conditions_of(start),
                text=self.prompts.text(message.prompt),
                null_text=self.prompts.nothing,
            )
            stream = streams.open(frames, conditions, message.seed, sampling, guidance)
            try:
                given = self._given(start, frames)
                return stream, History.begin(stream.rollout, given, self.reach, self.every)
            except BaseException:
                streams.close(stream)
                raise

    def _given(self, start: Start, frames: Tensor | None) -> list[KeptFrame]:
        if frames is None:
            return []
        engine = self.streams.engine
        encode = self.streams.world.autoencoder.encode
        latents = encode(frames[None].to(engine.device)).to(engine.dtype)[0]
        # Of video the newest picture of each latent frame, and the action that led to it.
        per_latent = self.streams.world.autoencoder.config.frames_per_latent
        actions = (start.actions or (None,) * len(frames))[::per_latent]
        pictures = (None,) * len(latents)
        if self.streams.world.autoencoder.config.is_video:
            assert start.frames is not None
            pictures = tuple(start.frames[::per_latent])
        text = self.prompts.text(start.message.prompt)
        return [
            KeptFrame(latent=latent[None], action=action, text=text, picture=picture)
            for latent, action, picture in zip(latents, actions, pictures, strict=True)
        ]

    def restart(self, session: Session, start: Start) -> None:
        stream, history = self._open(session.name, start)
        session.start, session.prompt = start, start.message.prompt
        session.prompt_cut = self.prompts.cut(session.prompt)
        self._replace(session, stream, history)

    def rewind(self, session: Session, index: int) -> None:
        """Make an earlier frame the newest, one generation later."""
        stream = self.streams.adopt(self._stream_at(session, index))
        self._replace(session, stream, session.history.upto(index))

    def _stream_at(self, session: Session, index: int) -> Rollout:
        """Return the stream as it was at a frame, with the settings of now."""
        now = session.rollout
        if index == session.index:
            return now.fork()
        twin = session.history.at(index)
        twin.seed, twin.sampling, twin.guidance = now.seed, now.sampling, now.guidance
        if now.text is not None and now.text is not twin.text:
            twin.change_text(now.text)
        return twin

    def change_prompt(self, session: Session, prompt: str, recompute: bool) -> None:
        """Let the frames of a session show something else from here on."""
        text = self.prompts.text(prompt)
        assert text is not None
        if recompute:
            self.drop(session)
        session.rollout.change_text(text, recompute=recompute)
        session.prompt, session.prompt_cut = prompt, self.prompts.cut(prompt)
        if recompute:
            # What was kept of the memory before is of another one.
            kept = session.history.kept
            session.history = History.begin(session.rollout, kept, self.reach, self.every)

    def _replace(self, session: Session, stream: Stream, history: History) -> None:
        """Let a session go on as another stream, one generation later."""
        self.drop(session)
        self.streams.close(session.stream)
        session.stream, session.history = stream, history
        session.generation += 1
        session.go_on_from(self.clock())
        reason = "the session was reset or rewound meanwhile"
        session.refuse_orders(ServeError("superseded", reason))

    def drop(self, session: Session) -> None:
        """Drop the frame that a session waits for, if there is one."""
        self.num_dropped += self.streams.cancel(session.stream)
        session.begun = None

    def fork(self, source: Session, index: int, seed: int | None) -> Session:
        """Copy a session as it was at a frame: paused, without a client."""
        name = secrets.token_urlsafe(16)
        with self._promised(name, source.rollout.guidance):
            rollout = self._stream_at(source, index)
            rollout.seed = rollout.seed if seed is None else seed
            stream = self.streams.adopt(rollout)
        history = source.history.upto(index)
        twin = Session(name, stream, source.start, history, self.clock())
        twin.action, twin.sequence, twin.prompt = source.action, source.sequence, source.prompt
        return self._join(twin)

    def image(self, session: Session, history: bool = True) -> Image:
        """Return all of a session as it is now, for a snapshot; without the frames before, too."""
        live = session.rollout.fork()
        past = session.history.upto(session.index)
        if not history:
            past = History.begin(live, past.kept[-1:], self.reach, self.every)
        return Image(state=session.state(), start=session.start, live=live, history=past)

    def adopt(self, image: Callable[[], Image], guidance: Guidance, name: str | None) -> Session:
        """Go on with a session of a snapshot: paused, without a client.

        Args:
            image: makes it, once its memory is promised.
            guidance: of it.
            name: under which it goes on; None: under a new one, its generations beginning anew.
        """
        own = name or secrets.token_urlsafe(16)
        with self._promised(own, guidance):
            made = image()
            stream = self.streams.adopt(made.live)
        session = Session(own, stream, made.start, made.history, self.clock())
        session.generation = made.state.generation if name else 0
        session.action, session.sequence = made.state.action, made.state.sequence
        session.prompt = made.state.prompt
        return self._join(session)

    def stop(self, session: Session, error: ServeError) -> None:
        """End a session; its client hears why, and so does whoever asks for it after a fault."""
        self.leave(session, error, Stopped(session=session.name, reason=str(error)))
        if error.code == "session_stopped":
            self.num_faults += 1
            self.stopped[session.name] = str(error)
            while len(self.stopped) > REMEMBERED:
                self.stopped.pop(next(iter(self.stopped)))

    def leave(self, session: Session, error: ServeError, event: Stopped | Evicted) -> None:
        """Take a session out of memory; its client hears an event, and orders get the error."""
        del self.playing[session.name]
        self.num_dropped += session.stream.status in ("waiting", "denoising")
        self.streams.close(session.stream)
        self.admission.release(session.name)
        self.note_fault(session.tell(event))
        session.let_go()
        session.refuse_orders(error)

    def note_fault(self, fault: Exception | None) -> None:
        """Say that a client was let go because it raised; None: it did not."""
        if fault is not None:
            self.report(f"a client was detached, it raised {type(fault).__name__}: {fault}")


def _frames_of(start: Start) -> Tensor | None:
    """Return the given frames [t 3 h w] in [-1, 1]; None: there are none."""
    # Copied: a picture may come from memory that cannot be written.
    return None if start.frames is None else pixels_to_frames(torch.from_numpy(start.frames.copy()))


def _conditions_of(start: Start) -> Conditions:
    """Return the actions [1 t] of the given frames, and the label [1]."""
    actions = [as_action(action) for action in start.actions]
    known = [action for action in actions if action is not None]
    label = start.message.label
    return Conditions(
        actions=torch.stack(known)[None] if known else None,
        labels=None if label is None else torch.tensor([label]),
    )
