"""One stream among many: what is asked of it, what comes back, and the memory that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from scd.models.build import ModelConfig, frame_cost
from scd.models.cost import Load
from scd.models.flow import evaluations
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
    frame: Float[Tensor, "3 h w"] | None
    """In [-1, 1]; None: the session was stopped."""
    error: str | None = None
    """What stopped it: session and frame by number, and the fault."""
