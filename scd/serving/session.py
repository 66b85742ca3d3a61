"""One session as it is played: what it holds, what it can go back to, who hears it."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from scd.data.actions import in_names
from scd.data.clip import frames_to_pixels
from scd.models.config import Guidance
from scd.serving.messages import (
    ActionValue,
    Answer,
    Beginning,
    Event,
    Frame,
    FrameHeader,
    GuidanceChoice,
    ServeError,
    Sink,
    State,
)
from scd.streaming.rollout import Rollout
from scd.streaming.sessions import Finished
from scd.streaming.sessions import Session as Stream


def as_action(action: ActionValue | None, batch: bool = False) -> Tensor | None:
    """Return an action as a tensor: of one session, or of a batch of one."""
    if action is None:
        return None
    dtype = torch.long if isinstance(action, int) else torch.float32
    value = torch.tensor(action, dtype=dtype)
    return value[None] if batch else value


def as_guidance(choice: GuidanceChoice | None) -> Guidance | None:
    """Return guidance as a stream takes it (ValueError: values that have no effect)."""
    return None if choice is None else Guidance(**vars(choice))


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a session began with."""

    message: Beginning
    """Seed, label, steps and guidance."""
    frames: UInt8[np.ndarray, "t h w 3"] | None = None
    """Given first frames; None: from nothing."""
    actions: tuple[ActionValue, ...] = ()
    """That led to those frames, one each; empty for a world without actions."""


@dataclass(frozen=True, kw_only=True)
class KeptFrame:
    """One frame of the history."""

    latent: Float[Tensor, "1 c h w"]
    """As the model made it, or saw it."""
    action: ActionValue | None
    """That led to it."""
    sequence: int = 0
    """That came with the action."""
    steps: int = 0
    """Denoising steps that it took; 0: it was given."""
    text: Tensor | None = None
    """Embedded prompt under which it was made; None: no text steers the world."""
    picture: UInt8[np.ndarray, "rows columns 3"] | None = None
    """Its last picture, where its latent alone does not tell it; None: it does."""


class History:
    """The newest frames of one session, and every few frames a copy of its KV cache.

    `add` after each frame; `at` returns the stream as it was when a frame was the newest: the copy
    before it, to which the frames since then are shown again. Copies are never stepped themselves,
    so histories of forks share them.

    Frames that are no longer reached are forgotten, a copy at a time: at least `reach` frames back
    can be reached, and fewer than `reach + every`.
    """

    def __init__(
        self,
        copies: Sequence[Rollout],
        frames: Sequence[KeptFrame],
        first: int,
        reach: int,
        every: int,
    ) -> None:
        """Put together what is kept; `begin` makes the history of a stream that has just begun.

        Args:
            copies: of the stream, oldest first; not to be stepped.
            frames: the newest ones, the last one last.
            first: index of the first of these.
            reach: frames that can at least be gone back, 1 or more.
            every: frames from one copy to the next, 1 or more.
        """
        self.reach, self.every = reach, every
        self._frames, self._first = list(frames), first
        # By the number of frames that the stream had.
        self._copies = {copy.num_frames: copy for copy in copies}
        self._forget()

    @staticmethod
    def begin(rollout: Rollout, given: Sequence[KeptFrame], reach: int, every: int) -> History:
        """Return the history of a stream; given frames can be shown, not gone back to."""
        given = given[-reach:]
        return History([rollout.fork()], given, rollout.num_frames - len(given), reach, every)

    @property
    def oldest(self) -> int:
        """Oldest frame that can be the newest again; -1: before the first."""
        return min(self._copies) - 1

    @property
    def newest(self) -> int:
        """Newest frame; -1: there is none."""
        return self._first + len(self._frames) - 1

    @property
    def kept_from(self) -> int:
        """Oldest frame that can be shown; newest + 1: none can."""
        return self._first

    @property
    def kept(self) -> tuple[KeptFrame, ...]:
        return tuple(self._frames)

    @property
    def copies(self) -> tuple[Rollout, ...]:
        """Copies of the stream, oldest first; not to be stepped."""
        return tuple(self._copies.values())

    def add(self, rollout: Rollout, frame: KeptFrame) -> None:
        """Keep the frame that the stream has just got."""
        self._frames.append(frame)
        assert rollout.num_frames == self.newest + 1
        if rollout.num_frames - max(self._copies) >= self.every:
            self._copies[rollout.num_frames] = rollout.fork()
        self._forget()

    def frame(self, index: int) -> KeptFrame:
        """Return a frame (ServeError out_of_history: it is not kept)."""
        if not self._first <= index <= self.newest:
            raise ServeError(
                "out_of_history",
                f"frames {self._first} to {self.newest} are kept, frame {index} was asked for",
            )
        return self._frames[index - self._first]

    def at(self, index: int) -> Rollout:
        """Return a copy of the stream as it was when a frame was the newest.

        Raises:
            ServeError: out_of_history: it is older than what is kept, or not there yet.
        """
        if not self.oldest <= index <= self.newest:
            raise ServeError(
                "out_of_history",
                f"frames {self.oldest} to {self.newest} can be gone back to, frame {index} was "
                "asked for",
            )
        counts = sorted(self._copies)
        start = counts[bisect_right(counts, index + 1) - 1]
        rollout = self._copies[start].fork()
        for number in range(start, index + 1):
            frame = self.frame(number)
            if frame.text is not None and frame.text is not rollout.text:
                rollout.change_text(frame.text)
            rollout.replay(frame.latent, as_action(frame.action, batch=True))
        return rollout

    def upto(self, index: int) -> History:
        """Return a history of its own that ends with a frame which `at` can return."""
        copies = [copy for num, copy in self._copies.items() if num <= index + 1]
        frames = self._frames[: index + 1 - self._first]
        return History(copies, frames, self._first, self.reach, self.every)

    def _forget(self) -> None:
        counts = sorted(self._copies)
        while len(counts) > 1 and counts[1] - 1 <= self.newest - self.reach:
            del self._copies[counts.pop(0)]
        # Given frames stand before the first copy, and stay as long as there is room.
        surplus = len(self._frames) - (self.reach + self.every)
        if surplus > 0:
            del self._frames[:surplus]
            self._first += surplus


@dataclass(kw_only=True)
class Order:
    """Frames that somebody waits for."""

    future: Future[Answer]
    """Gets them all, with the state then."""
    count: int
    """How many."""
    frames: list[Frame] = field(default_factory=list)
    """Made so far, each picture by itself."""

    @property
    def num_whole(self) -> int:
        """Frames of which all pictures are there."""
        return sum(frame.header.is_last for frame in self.frames)


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A frame under way."""

    action: ActionValue | None
    """That leads to it."""
    sequence: int
    """That came with the action."""
    steps: int
    """Denoising steps that it takes."""
    queued_s: float
    """From when it could have begun to when it did."""
    encoder_s: float
    """Causal pass, of all that began with it."""
    encoded_at: float
    """When that was done."""


class Session:
    """The state of one session between its frames; for the model thread alone.

    Of a frame: `could_begin_at` says when to ask for it, `begin` notes that it has begun, `finish`
    keeps it, `hand_out` delivers it.
    """

    def __init__(
        self, name: str, stream: Stream, start: Start, history: History, now: float
    ) -> None:
        """Play a stream that has begun: paused, with no client."""
        self.name, self.stream = name, stream
        self.start, self.history = start, history
        self.generation = 0
        self.action: ActionValue | None = None
        self.prompt = start.message.prompt
        self.prompt_cut: str | None = None
        self.sequence = 0
        self.running = False
        self.fps: float | None = None
        self.sink: Sink | None = None
        self.orders: deque[Order] = deque()
        self.begun: Begun | None = None
        # Of its last frame among those of all sessions; a new one comes first.
        self.num_turn = 0
        self.last_used = now
        # Its page said goodbye, and nobody has attached it since then.
        self.has_left = False
        # Raised by every use: an eviction under way that finds it raised is off.
        self.uses = 0
        # While it is written, which one at a time does.
        self.is_being_written = False
        self.written, self.written_at = (-1, -1, -1), float("-inf")
        self._due = self._free_at = now
        self._heard = self._acknowledged = self.index

    @property
    def rollout(self) -> Rollout:
        """The stream's past, conditions, seed, steps and guidance."""
        return self.stream.rollout

    @property
    def index(self) -> int:
        """Newest frame; -1: there is none."""
        return self.stream.num_frames - 1

    @property
    def version(self) -> tuple[int, int, int]:
        """Is another one once there is something new to be written."""
        return self.generation, self.index, self.uses

    def state(self) -> State:
        """Say how it stands."""
        return State(
            session=self.name,
            generation=self.generation,
            frame=self.index,
            num_given=self.rollout.num_given,
            running=self.running,
            attached=self.sink is not None,
            fps=self.fps,
            action=self.action,
            sequence=self.sequence,
            steps=self.rollout.num_steps,
            guidance=GuidanceChoice(**vars(self.rollout.guidance)),
            seed=self.rollout.seed,
            prompt=self.prompt,
            prompt_cut=self.prompt_cut,
            history_from=self.history.oldest,
            kept_from=self.history.kept_from,
        )

    def use(self, now: float) -> None:
        self.last_used, self.uses = now, self.uses + 1

    def is_idle(self, now: float, idle_s: float) -> bool:
        """Whether nothing has happened for so long, and nothing is about to."""
        waits = self.stream.status == "idle" and not self.orders and not self.is_being_written
        return waits and now - self.last_used >= idle_s

    def could_begin_at(self, queue_frames: int) -> float:
        """When to ask for a frame if nothing is said until then; infinity: never."""
        asked = (self.running and self.sink is not None) or self.orders
        if not asked or not self.is_heard(queue_frames) or self.stream.status != "idle":
            return float("inf")
        return self._due

    def is_heard(self, queue_frames: int) -> bool:
        """Whether the client has acknowledged enough for one frame more."""
        return self.sink is None or self._heard - self._acknowledged < queue_frames

    def refuse_orders(self, error: ServeError) -> None:
        """Tell all who wait for frames that none will come."""
        while self.orders:
            self.orders.popleft().future.set_exception(error)

    def free(self, now: float) -> None:
        """Note that from now on, as far as the client goes, a frame could begin."""
        self._free_at = now

    def begin(self, began: float, encoded: float, max_fps: float) -> None:
        """Note that the frame asked for has begun, and when its causal pass was done."""
        self.begun = Begun(
            action=self.action,
            sequence=self.sequence,
            steps=self.rollout.num_steps,
            queued_s=max(began - max(self._due, self._free_at), 0.0),
            encoder_s=encoded - began,
            encoded_at=encoded,
        )
        fps = max_fps if self.fps is None or self.orders else min(self.fps, max_fps)
        # A frame that was late by less than a period does not delay those after it.
        pictures = self.rollout.world.autoencoder.config.frames_per_latent
        self._due = max(self._due + pictures / fps, began)

    def finish(self, ended: Finished, denoised: float, decoded: float) -> list[Frame]:
        """Keep the frame that is done, and return it: each of its pictures by itself.

        Args:
            ended: the frame.
            denoised: when its last step was done.
            decoded: when its pixels were there.
        """
        begun, rollout = self.begun, self.rollout
        assert begun is not None and ended.frames is not None and rollout.newest is not None
        self.begun = None
        pixels = frames_to_pixels(ended.frames).cpu().numpy()
        kept = KeptFrame(
            latent=rollout.newest,
            action=begun.action,
            sequence=begun.sequence,
            steps=begun.steps,
            text=rollout.text,
            picture=pixels[-1].copy() if rollout.world.autoencoder.config.is_video else None,
        )
        self.history.add(rollout, kept)
        times = {
            "queued_ms": begun.queued_s,
            "encoder_ms": begun.encoder_s,
            "decoder_ms": denoised - begun.encoded_at,
            "autoencoder_ms": decoded - denoised,
        }
        more = {name: round(1000 * s, 3) for name, s in times.items()} | {
            "num_pictures": len(pixels)
        }
        return [
            self.frame(ended.index, kept, picture, picture_index=place, **more)
            for place, picture in enumerate(pixels)
        ]

    def frame(self, index: int, kept: KeptFrame, pixels: np.ndarray, **more: Any) -> Frame:
        """Return a frame as a client is told of it; `more`: further fields of its header."""
        spec, action = self.rollout.world.card.conditions, kept.action if kept.steps else None
        header = FrameHeader(
            session=self.name,
            generation=self.generation,
            frame=index,
            action=action,
            parts=in_names(spec, action) if action is not None and spec.is_composite else None,
            sequence=kept.sequence,
            steps=kept.steps,
            width=pixels.shape[1],
            height=pixels.shape[0],
            **more,
        )
        return Frame(header=header, pixels=pixels)

    def hand_out(self, frame: Frame, now: float) -> Exception | None:
        """Deliver a frame to the client, and to whoever waits for it; return the client's fault."""
        self._heard = frame.header.frame
        if self.sink is None:
            self._acknowledged = self._heard
        fault = self.tell(frame)
        self.last_used, self._free_at = now, now
        if self.orders:
            order = self.orders[0]
            order.frames.append(frame)
            if order.num_whole == order.count:
                self.orders.popleft()
                order.future.set_result(Answer(message=self.state(), frames=order.frames))
        return fault

    def acknowledge(self, index: int) -> None:
        """Note that the client has drawn a frame of this generation, and all before it."""
        self._acknowledged = max(self._acknowledged, min(index, self._heard))

    def tell(self, event: Event) -> Exception | None:
        """Let the client hear; one that cannot is let go, and its fault returned."""
        if self.sink is None:
            return None
        try:
            self.sink(event)
        except Exception as error:
            self.let_go()
            return error
        return None

    def let_go(self) -> None:
        """Play without a client: paused."""
        self.sink, self.running = None, False
        self._acknowledged = self._heard

    def go_on_from(self, now: float) -> None:
        """Note that the newest frame is another one now, which nobody has to acknowledge."""
        self._heard = self._acknowledged = self.index
        self._free_at = now
