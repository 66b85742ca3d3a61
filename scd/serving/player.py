"""One session as it is played: what it holds, when its next frame may begin, who hears it."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from scd.data.clip import frames_to_pixels
from scd.serving.events import Action, Event, Frame, FrameTiming, Info, Sink, Start
from scd.serving.history import History, Kept
from scd.streaming.session import Finished, Session


@dataclass(kw_only=True)
class Order:
    """Frames that somebody waits for."""

    future: Future[list[Frame]]
    """Gets them all."""
    count: int
    """How many."""
    frames: list[Frame] = field(default_factory=list)
    """Made so far."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A frame under way."""

    action: Action
    """That leads to it."""
    sequence: int
    """That came with the action."""
    num_steps: int
    """Denoising steps that it takes."""
    queued_s: float
    """From when it could have begun to when it did."""
    encoder_s: float
    """Causal pass, of all that began with it."""
    encoded_at: float
    """When that was done."""


class Player:
    """The state of one session between its frames; for the model thread alone.

    Of a frame: `could_begin_at` says when to ask for it, `begin` notes that it has begun, `finish`
    keeps it and makes the event of it, `hand_out` delivers that.
    """

    def __init__(
        self, session_id: str, session: Session, start: Start, history: History, now: float
    ) -> None:
        """Play a session that has begun: paused, with no client."""
        self.session_id, self.session = session_id, session
        self.start, self.history = start, history
        self.generation = 0
        self.action: Action = None
        self.sequence = 0
        self.running = False
        self.fps: float | None = None
        self.sink: Sink | None = None
        self.forked_from: str | None = None
        self.orders: deque[Order] = deque()
        self.begun: Begun | None = None
        # Of its last frame among those of all sessions; a new one comes first.
        self.num_turn = 0
        self.last_used = now
        # Raised by every use: an eviction under way that finds it raised is off.
        self.uses = 0
        # While it is written, which one at a time does.
        self.is_on_its_way = False
        self.written, self.written_at = (-1, -1, -1), float("-inf")
        self._due = self._free_at = now
        self._heard = self._acknowledged = session.num_frames - 1

    @property
    def index(self) -> int:
        """Newest frame; -1: there is none."""
        return self.session.num_frames - 1

    @property
    def mark(self) -> tuple[int, int, int]:
        """Is another one once there is something new to be written."""
        return self.generation, self.index, self.uses

    def use(self, now: float) -> None:
        """Note that somebody wants the session."""
        self.last_used, self.uses = now, self.uses + 1

    def is_idle(self, now: float, idle_s: float) -> bool:
        """Whether nothing has happened for so long, and nothing is about to."""
        waits = self.session.status == "idle" and not self.orders and not self.is_on_its_way
        return waits and now - self.last_used >= idle_s

    def could_begin_at(self, queue_frames: int) -> float:
        """When to ask for a frame if nothing is said until then; infinity: never."""
        asked = (self.running and self.sink is not None) or self.orders
        if not asked or not self.is_heard(queue_frames) or self.session.status != "idle":
            return float("inf")
        return self._due

    def is_heard(self, queue_frames: int) -> bool:
        """Whether the client has acknowledged enough for one frame more."""
        return self.sink is None or self._heard - self._acknowledged < queue_frames

    def refuse_orders(self, error: Exception) -> None:
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
            num_steps=self.session.rollout.num_steps,
            queued_s=max(began - max(self._due, self._free_at), 0.0),
            encoder_s=encoded - began,
            encoded_at=encoded,
        )
        fps = max_fps if self.fps is None or self.orders else min(self.fps, max_fps)
        # A frame that was late by less than a period does not delay those after it.
        self._due = max(self._due + 1 / fps, began)

    def finish(self, ended: Finished, denoised: float, decoded: float) -> Frame:
        """Keep the frame that is done.

        Args:
            ended: the frame.
            denoised: when its last step was done.
            decoded: when its pixels were there.
        """
        begun, rollout = self.begun, self.session.rollout
        assert begun is not None and ended.frame is not None and rollout.newest is not None
        self.begun = None
        kept = Kept(
            latent=rollout.newest,
            action=begun.action,
            sequence=begun.sequence,
            num_steps=begun.num_steps,
        )
        self.history.add(rollout, kept)
        timing = FrameTiming(
            queued_s=begun.queued_s,
            encoder_s=begun.encoder_s,
            decoder_s=denoised - begun.encoded_at,
            autoencoder_s=decoded - denoised,
        )
        return Frame(
            session_id=self.session_id,
            generation=self.generation,
            index=ended.index,
            action=begun.action,
            sequence=begun.sequence,
            frame=frames_to_pixels(ended.frame).cpu().numpy(),
            num_steps=begun.num_steps,
            timing=timing,
        )

    def hand_out(self, frame: Frame, now: float) -> Exception | None:
        """Deliver a frame to the client, and to whoever waits for it; return the client's fault."""
        self._heard = frame.index
        if self.sink is None:
            self._acknowledged = frame.index
        fault = self.tell(frame)
        self.last_used, self._free_at = now, now
        if self.orders:
            order = self.orders[0]
            order.frames.append(frame)
            if len(order.frames) == order.count:
                self.orders.popleft()
                order.future.set_result(order.frames)
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

    def info(self) -> Info:
        """Say how it stands."""
        rollout = self.session.rollout
        return Info(
            session_id=self.session_id,
            generation=self.generation,
            index=self.index,
            num_given=rollout.num_given,
            running=self.running,
            fps=self.fps,
            action=self.action,
            sequence=self.sequence,
            num_steps=rollout.num_steps,
            guidance=rollout.guidance,
            seed=rollout.seed,
            label=self.start.label,
            history_from=self.history.oldest,
            kept_from=self.history.kept_from,
            attached=self.sink is not None,
            forked_from=self.forked_from,
        )
