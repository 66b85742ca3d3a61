"""What each message asks of a session: one method per class, on the thread that owns the model.

`Commands.handle` finds the method by the message's `type`. What depends on the world or the limits
is checked here and nowhere else; what does not, by the schema in `scd.serving.messages`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from einops import rearrange

from scd.common.memory import forget_frames
from scd.data.actions import flat
from scd.data.clip import check_actions, frames_to_pixels, pixels_to_frames
from scd.data.spaces import ConditionSpec
from scd.models.config import Guidance
from scd.models.flow import with_num_steps
from scd.models.shipped import Clips
from scd.serving.evictions import Evictions
from scd.serving.messages import (
    Acknowledge,
    Action,
    ActionValue,
    Answer,
    Attach,
    Beginning,
    Close,
    Command,
    Create,
    Detach,
    Detached,
    Fork,
    Frame,
    GuidanceChoice,
    Leave,
    Look,
    Observe,
    Pause,
    Reset,
    Restart,
    Restore,
    Rewind,
    Run,
    ServeError,
    Set,
    Show,
    Sink,
    Snapshot,
    SnapshotHeader,
    Step,
    WorldInfo,
)
from scd.serving.session import (
    KeptFrame,
    Order,
    Session,
    Start,
    as_action,
    as_guidance,
)
from scd.serving.sessions import Sessions
from scd.streaming.rollout import Rollout


@dataclass(eq=False, kw_only=True)
class Call:
    """A message that waits for the model thread, and what goes with it."""

    message: Command | Callable[[Any], Any]
    """Or something that the host itself wants done, which is called with the engine loop."""
    name: str = ""
    """Of the session; empty for messages that open one."""
    sink: Sink | None = None
    """Of the client that says it; None: it does not stay to hear."""
    upload: np.ndarray | None = None
    """Frames [t h w 3] that the message's `upload` names."""
    file: bytes | bytearray = b""
    """Snapshot to restore."""
    future: Future[Any] = field(default_factory=Future)
    """Gets the `Answer`, or what the host's own call returns."""
    num_tries: int = 0
    """How often room was made for it."""

    def settle(self, result: Any = None, error: BaseException | None = None) -> None:
        """Fulfil or refuse the future; nothing happens where it is done."""
        self.upload, self.file = None, b""
        forget_frames(error)
        with suppress(InvalidStateError):
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result(result)


class Commands:
    """Obeys messages; raises ValueError and leaves the session as it was then."""

    def __init__(
        self, sessions: Sessions, evictions: Evictions, clips: Clips | None, world: WorldInfo
    ) -> None:
        """Obey for sessions in memory and on disk, of a world with clips to begin from."""
        self.sessions, self._evictions = sessions, evictions
        self._clips, self._world, self._config = clips, world, sessions.config

    def handle(self, session: Session | None, message: Command, call: Call) -> Any:
        """Obey a message; return its `Answer`, or a future of it."""
        if session is None and call.name and message.needs_session:
            raise self.sessions.missing(call.name)
        return getattr(self, message.verb)(session, message, call)

    # Sessions come and go

    def create(self, _: None, message: Create, call: Call) -> Answer:
        session = self.sessions.create(self._start(message, call.upload))
        session.action = self._idle if self._world.actions else None
        return self._joined(session, call.sink)

    def restore(self, _: None, message: Restore, call: Call) -> Future[Answer]:
        restored = self._evictions.restore(call.file)
        return _then(restored, lambda session: Answer(message=session.state()))

    def attach(self, session: Session, message: Attach, call: Call) -> Answer:
        if session.sink not in (None, call.sink):
            raise ServeError("session_busy", "another client is attached to this session")
        session.has_left = False
        return self._joined(session, call.sink)

    def _joined(self, session: Session, sink: Sink | None, source: str | None = None) -> Answer:
        if sink is not None:
            session.sink = sink
            session.go_on_from(self.sessions.clock())
        return self._moved(session, sink, source)

    def _moved(self, session: Session, sink: Sink | None, source: str | None = None) -> Answer:
        """Answer with the state, and for a client the newest frame, to have a picture at once."""
        frames: list[Frame] = []
        if sink is not None and session.index >= max(0, session.history.kept_from):
            # A device that is full now fails when the next frame is made, and says so then.
            with suppress(Exception):
                frames = self._shown(session, session.index, 1)
        state = session.state()
        return Answer(
            message=state if source is None else state.model_copy(update={"forked_from": source}),
            frames=frames,
        )

    def fork(self, session: Session, message: Fork, call: Call) -> Answer:
        index = session.index if message.frame is None else message.frame
        twin = self.sessions.fork(session, index, message.seed)
        if call.sink is not None:
            self._let_go(session, call.sink)
        return self._joined(twin, call.sink, source=session.name)

    def detach(self, session: Session | None, message: Detach, call: Call) -> Answer:
        if session is not None:
            self._let_go(session, call.sink)
        return Answer(message=Detached(session=call.name))

    def _let_go(self, session: Session, sink: Sink | None) -> None:
        """Let a client go; nothing happens if it is not there."""
        if sink is not None and session.sink == sink:
            session.use(self.sessions.clock())
            session.let_go()

    def close(self, session: Session | None, message: Close, call: Call) -> Any:
        answer = Answer(message=Detached(session=call.name))

        def said(was_on_disk: bool) -> Answer:
            if session is None and not was_on_disk:
                raise self.sessions.missing(call.name)
            return answer

        deleted = self._evictions.delete(call.name)
        if session is None:
            return _then(deleted, said)
        self._let_go(session, call.sink)
        self.sessions.stop(session, ServeError("unknown_session", "the session was deleted"))
        return answer

    def leave(self, session: Session | None, message: Leave, call: Call) -> Any:
        if session is not None:
            session.has_left = True
            return Answer(message=session.state())

        def said(was_on_disk: bool) -> Answer:
            if not was_on_disk:
                raise self.sessions.missing(call.name)
            return Answer(message=Detached(session=call.name))

        return _then(self._evictions.leave(call.name), said)

    # What a session is told

    def look(self, session: Session, message: Look, call: Call) -> Answer:
        return Answer(message=session.state())

    def action(self, session: Session, message: Action, call: Call) -> Answer:
        self._hold(session, self._action(message.action), message.sequence)
        return Answer()

    def _hold(self, session: Session, action: ActionValue | None, sequence: int) -> None:
        session.action, session.sequence = action, sequence
        if session.stream.status == "waiting":
            self.sessions.streams.steer(session.stream, as_action(action))

    def run(self, session: Session, message: Run, call: Call) -> Answer:
        if session.sink is None:
            raise ServeError(
                "bad_request", "only a session with a client runs: attach first, or step it"
            )
        if not session.running:
            session.free(self.sessions.clock())
        session.running, session.fps = True, message.fps
        return Answer(message=session.state())

    def pause(self, session: Session, message: Pause, call: Call) -> Answer:
        session.running = False
        return Answer(message=session.state())

    def step(self, session: Session, message: Step, call: Call) -> Future[Answer]:
        self._check_count(message.count)
        if len(session.orders) >= self._config.max_orders:
            raise ServeError(
                "bad_request", f"{len(session.orders)} steps of this session wait already"
            )
        if message.action is not None:
            self._hold(session, self._action(message.action), 0)
        session.running = False
        if not session.orders:
            session.free(self.sessions.clock())
        order = Order(future=Future(), count=message.count)
        session.orders.append(order)
        return order.future

    def ack(self, session: Session, message: Acknowledge, call: Call) -> Answer:
        if message.generation == session.generation:
            was_full = not session.is_heard(self._config.queue_frames)
            session.acknowledge(message.frame)
            if was_full:
                session.free(self.sessions.clock())
        return Answer()

    def set(self, session: Session, message: Set, call: Call) -> Answer:
        rollout, sampling = session.rollout, None
        if message.steps is not None:
            # Of those of the world, as after a reset or an eviction: listed times there and back
            # would be others.
            sampling = with_num_steps(rollout.world.sampling, self._steps(message.steps))
        if message.guidance is not None:
            guidance = self._guidance(message.guidance)
            self._check_change(rollout, guidance)
            rollout.guidance = guidance
        if message.prompt is not None:
            self._check_prompt(message.prompt)
            self.sessions.change_prompt(session, message.prompt, message.recompute)
        rollout.sampling = sampling or rollout.sampling
        rollout.seed = rollout.seed if message.seed is None else message.seed
        return Answer(message=session.state())

    def _check_change(self, rollout: Rollout, guidance: Guidance) -> None:
        now = rollout.guidance
        if "conditions" in (guidance.kind, now.kind) and (guidance.kind, guidance.parts) != (
            now.kind,
            now.parts,
        ):
            raise ServeError(
                "bad_request", "guidance by conditions has a memory of its own: reset with it"
            )
        if guidance.kind != "none" and self._config.max_rows < 2:
            raise ServeError("bad_request", "a guided frame takes 2 rows, max_rows is 1")

    def reset(self, session: Session, message: Reset, call: Call) -> Answer:
        self.sessions.restart(session, self._start(message, call.upload))
        return self._moved(session, call.sink)

    def restart(self, session: Session, message: Restart, call: Call) -> Answer:
        state, start = session.state(), session.start
        now = {
            "seed": state.seed,
            "steps": state.steps,
            "guidance": state.guidance,
            "prompt": state.prompt,
        }
        begun = start.message.model_copy(update=now)
        self.sessions.restart(
            session, Start(message=begun, frames=start.frames, actions=start.actions)
        )
        return self._moved(session, call.sink)

    def rewind(self, session: Session, message: Rewind, call: Call) -> Answer:
        self.sessions.rewind(session, message.frame)
        return self._moved(session, call.sink)

    def observe(self, session: Session, message: Observe, call: Call) -> Answer:
        if session.running or session.orders:
            raise ServeError("bad_request", "pause the session before a frame is put in")
        if session.rollout.world.autoencoder.config.is_video:
            raise ServeError("bad_request", "this world makes video: no single frame can be put in")
        assert call.upload is not None
        (frame,) = self._pictures(call.upload[-1:])
        action = session.action if message.action is None else self._action(message.action)
        self.sessions.drop(session)
        self.sessions.streams.observe(
            session.stream, pixels_to_frames(torch.from_numpy(frame.copy())), as_action(action)
        )
        rollout = session.rollout
        assert rollout.newest is not None
        session.history.add(rollout, KeptFrame(latent=rollout.newest, action=action))
        session.go_on_from(self.sessions.clock())
        return Answer(message=session.state())

    def show(self, session: Session, message: Show, call: Call) -> Answer:
        self._check_count(message.count)
        return Answer(frames=self._shown(session, message.frame, message.count))

    def _shown(self, session: Session, first: int, count: int) -> list[Frame]:
        kept = [session.history.frame(index) for index in range(first, first + count)]
        pixels = [frame.picture for frame in kept if frame.picture is not None]
        if len(pixels) < len(kept):
            latents = torch.cat([frame.latent for frame in kept])
            decode = self.sessions.streams.world.autoencoder.decode
            pixels = list(frames_to_pixels(decode(latents[:, None])[:, 0].float()).cpu().numpy())
        return [
            session.frame(first + place, frame, picture, shown=True)
            for place, (frame, picture) in enumerate(zip(kept, pixels, strict=True))
        ]

    def snapshot(self, session: Session, message: Snapshot, call: Call) -> Future[Answer]:
        header = SnapshotHeader(session=session.name)
        written = self._evictions.snapshot(session)
        return _then(written, lambda file: Answer(message=header, file=file))

    # What depends on the world and the limits

    @property
    def _spec(self) -> ConditionSpec:
        return self.sessions.streams.world.card.conditions

    @property
    def _idle(self) -> ActionValue:
        return self._spec.idle_action if self._world.action_dim else 0

    def _action(self, given: Any) -> ActionValue:
        world, spec = self._world, self._spec
        try:
            # Parts of a world without any are refused by what an action of it is.
            by_part = spec.is_composite and _has_parts(given)
            action = tuple(flat(spec, given).tolist()) if by_part else given
            fits = isinstance(action, tuple) and len(action) == world.action_dim
            if fits and spec.action_parts:
                check_actions(spec, torch.tensor(action))
        except ValueError as error:
            raise ServeError("unknown_action", str(error)) from None
        if not world.actions:
            message = "nothing steers this world: send no action"
        elif _has_parts(action):
            message = f"an action of this world is {self._wanted}, got parts"
        elif isinstance(action, tuple) != bool(world.action_dim):
            message = f"an action of this world is {self._wanted}"
        elif isinstance(action, tuple) and len(action) != world.action_dim:
            message = f"needed {world.action_dim} entries, got {len(action)}"
        elif isinstance(action, int) and action >= len(world.actions):
            message = f"actions are 0 .. {len(world.actions) - 1}, got {action}"
        else:
            return action
        raise ServeError("unknown_action", message)

    @property
    def _wanted(self) -> str:
        """What an action of this world is, in words."""
        world, spec = self._world, self._spec
        if not world.action_dim:
            return f"a number from 0 to {len(world.actions) - 1}"
        parts = f", or its parts: {', '.join(part.name for part in spec.action_parts)}"
        return f"a vector of {world.action_dim} numbers" + (parts if spec.is_composite else "")

    def _steps(self, steps: int) -> int:
        most = self._config.max_steps
        if steps > most:
            raise ServeError("bad_field", f"steps: must lie in 1 .. {most} here, got {steps}")
        return steps

    def _check_count(self, count: int) -> None:
        most = self._config.max_step_count
        if not 1 <= count <= most:
            raise ServeError("bad_field", f"count: must lie in 1 .. {most} here, got {count}")

    def _guidance(self, choice: GuidanceChoice) -> Guidance:
        if choice.kind not in self._world.guidance:
            raise ServeError("bad_field", f"guidance: this world has {list(self._world.guidance)}")
        try:
            guidance = as_guidance(choice)
            assert guidance is not None
            guidance.hides(self._spec)
        except ValueError as error:
            raise ServeError("bad_field", f"guidance: {error}") from None
        return guidance

    def _check_prompt(self, prompt: str | None) -> None:
        takes = self._world.takes_prompt
        if takes == (prompt is None):
            wanted = "this world wants one" if takes else "no text steers this world"
            raise ServeError("bad_field", f"prompt: {wanted}, got {prompt!r}"[:200])

    def _whole(self, frames: np.ndarray) -> np.ndarray:
        """Return the given frames that latent frames stand for: of video one, then so many each."""
        return frames[: len(frames) - (len(frames) - 1) % self._world.pictures_per_frame]

    def _start(self, asked: Beginning, upload: np.ndarray | None) -> Start:
        if self._world.takes_prompt and asked.prompt is None and self._world.prompt:
            asked = asked.model_copy(update={"prompt": self._world.prompt})
        self._check_prompt(asked.prompt)
        if asked.steps is not None:
            self._steps(asked.steps)
        if asked.guidance is not None:
            self._guidance(asked.guidance)
        num_labels = self._world.num_labels
        if (asked.label is None) == bool(num_labels) or (asked.label or 0) >= max(1, num_labels):
            wanted = f"one of 0 .. {num_labels - 1}" if num_labels else "none"
            raise ServeError("bad_field", f"label: this world wants {wanted}, got {asked.label}")
        if asked.start == "clip":
            return self._clip(asked)
        if asked.start == "upload":
            assert upload is not None
            frames = self._whole(self._pictures(upload))
            return Start(message=asked, frames=frames, actions=self._led_to(asked, len(frames)))
        if self._world.needs_start:
            raise ServeError("bad_field", "start: this world cannot begin from nothing")
        return Start(message=asked)

    def _clip(self, asked: Beginning) -> Start:
        clips, number = self._clips, asked.clip or 0
        if clips is None or number >= len(clips.frames):
            raise ServeError("unknown_clip", f"this world has {self._world.clips} clips")
        frames = self._whole(rearrange(clips.frames[number].numpy(), "t c h w -> t h w c"))
        rows = clips.actions[number, : len(frames)].tolist() if self._world.actions else []
        actions = tuple(tuple(row) if isinstance(row, list) else row for row in rows)
        return Start(message=asked, frames=np.ascontiguousarray(frames), actions=actions)

    def _led_to(self, asked: Beginning, num_frames: int) -> tuple[ActionValue, ...]:
        world = self._world
        if not world.actions and asked.action is None:
            return ()
        action = self._idle if asked.action is None else asked.action
        return (self._action(action),) * num_frames

    def _pictures(self, frames: np.ndarray) -> np.ndarray:
        world, most = self._world, self._config.max_start_frames
        shape = (world.height, world.width, 3)
        if frames.dtype != np.uint8 or frames.shape[1:] != shape:
            raise ServeError(
                "bad_request",
                f"pictures must be bytes of shape {shape}, got {frames.dtype} of "
                f"{frames.shape[1:]}",
            )
        if not 1 <= len(frames) <= most:
            raise ServeError("bad_request", f"1 to {most} frames can be given, got {len(frames)}")
        return frames


def _has_parts(given: Any) -> bool:
    """Whether an action is given by parts, not as a number or a vector."""
    if isinstance(given, tuple):
        return not all(isinstance(entry, (int, float)) for entry in given)
    return isinstance(given, dict)


def _then(future: Future[Any], make: Callable[[Any], Answer]) -> Future[Answer]:
    """Return the future of an answer that follows from another one."""
    answer: Future[Answer] = Future()

    def done(settled: Future[Any]) -> None:
        try:
            answer.set_result(make(settled.result()))
        except Exception as error:
            answer.set_exception(error)

    future.add_done_callback(done)
    return answer
