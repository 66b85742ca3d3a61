"""Frames of many streams on their way from noise, each at its own step, all advanced together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scd.common.config import at_least
from scd.common.runtime import finest
from scd.engine.interface import Engine
from scd.engine.rows import RowEngine
from scd.models.config import Solver
from scd.models.embed import from_patches, to_patches
from scd.models.flow import Evaluation, check_step_noise, evaluations, guide


@dataclass(eq=False, kw_only=True)
class PoolFrame:
    """One frame on its way from noise."""

    context: Any
    """Of the engine: for one frame, or for [unconditional ; conditional]."""
    times: Sequence[float]
    """Of its steps, descending from 1 to 0."""
    calls: Sequence[Evaluation]
    """All calls of the network that it takes."""
    scale: float | None
    """Of the guidance; None: none."""
    step_noise: Tensor | None
    """Noise of its steps, as patches [steps n p]; None: they need none."""
    rows: list[int]
    """Its rows of the pool now: one, or [unconditional, conditional]."""
    num_done: int = 0
    """Calls that were made."""
    modulations: Tensor | None = None
    """At each time, [times r parts d], where calls are shared."""

    @property
    def is_done(self) -> bool:
        return self.num_done == len(self.calls)

    @property
    def call(self) -> Evaluation:
        return self.calls[self.num_done]

    @property
    def time(self) -> float:
        return self.times[self.call.index]


@dataclass(frozen=True, kw_only=True)
class NewFrame:
    """What a pool needs to know of a frame; as the arguments of interface.Engine.denoise."""

    context: Any
    """Of the engine: for one frame, or for [unconditional ; conditional]."""
    noise: Tensor
    """Where it starts, [1 c h w]."""
    times: Sequence[float]
    """Of its steps, descending from 1 to 0."""
    solver: Solver = "euler"
    """Integrator."""
    scale: float | None = None
    """Of the guidance; None: none."""
    step_noise: Tensor | None = None
    """Noise of its steps, [steps 1 c h w]; None: they need none."""

    @property
    def num_rows(self) -> int:
        return 1 if self.scale is None else 2


Owner = tuple[PoolFrame, int]
"""Whose row it is: a frame, and which of its branches."""


class FramePool:
    """Rows of frames on their way from noise; `advance` makes the next call of the network for all.

    With a fast separable engine that is one call for all frames together: its decoder sees a
    frame and its context, no past. Every other engine reads a stream's past in each call, so each
    frame has a call of its own: the same frames, later.

    A frame takes the next free row, or two with guidance. When it leaves, the last row moves into
    its place, so the rows in use are always the first ones.
    """

    def __init__(self, engine: Engine, max_rows: int) -> None:
        """Allocate all rows; `pool_bytes` says beforehand how much that is.

        Raises:
            ValueError: max_rows below 1.
        """
        at_least(1, max_rows=max_rows)
        self.engine, self.max_rows = engine, max_rows
        shared = isinstance(engine, RowEngine)
        self._calls = _SharedCalls(engine, max_rows) if shared else _SingleCalls(engine)
        size = (max_rows, engine.shape.num_tokens, engine.shape.token_dim)
        # Between calls frames are float32, as in the fast engines' own loop.
        self._frames = torch.empty(size, device=engine.device)
        self._starts = torch.empty_like(self._frames)
        self._before = torch.empty_like(self._frames)
        self._owners: list[Owner] = []

    @property
    def num_rows(self) -> int:
        return len(self._owners)

    @property
    def num_bytes(self) -> int:
        held = 3 * self._frames.numel() * self._frames.element_size()
        return held + self._calls.num_bytes

    @torch.no_grad()
    def add(self, new: Sequence[NewFrame]) -> list[PoolFrame]:
        """Put in frames, all or, after an error, none.

        Raises:
            ValueError: there are not enough free rows, or another number of step noises than the
                steps need.
        """
        patch_size = self.engine.shape.patch_size
        start, needed = self.num_rows, sum(one.num_rows for one in new)
        if start + needed > self.max_rows:
            raise ValueError(f"{needed} rows are needed, {self.max_rows - start} are free")
        frames, row = [], start
        for one in new:
            check_step_noise(one.step_noise, one.times, one.solver)
            step_noise = (
                None
                if one.step_noise is None
                else to_patches(one.step_noise[:, 0].float(), patch_size)
            )
            frame = PoolFrame(
                context=one.context,
                times=one.times,
                calls=evaluations(one.times, one.solver),
                scale=one.scale,
                step_noise=step_noise,
                rows=list(range(row, row + one.num_rows)),
            )
            self._frames[frame.rows] = to_patches(one.noise.float(), patch_size)
            frames.append(frame)
            row += one.num_rows
        self._calls.put(frames, start)
        used = slice(start, row)
        self._starts[used] = self._frames[used]
        # Its weight is 0 where no call came before, but 0 * NaN is NaN.
        self._before[used] = 0
        self._owners += [(frame, branch) for frame in frames for branch in range(len(frame.rows))]
        return frames

    @torch.no_grad()
    def advance(self) -> None:
        """Make the next call of every frame. There must be none that is done."""
        if not self._owners:
            return
        used = slice(0, self.num_rows)
        velocity = self._guided(self._calls.velocity(self._frames[used], self._owners))
        calls = [frame.call for frame, _ in self._owners]
        numbers = [
            [call.keep, call.gain, call.gain_before, call.step_noise, call.ends_step]
            for call in calls
        ]
        weights = torch.tensor(numbers, device=self.engine.device)
        keep, gain, gain_before, step_noise, ends_step = weights.t()[:, :, None, None]
        # As in flow.solve, for all rows at once.
        frames = keep * self._starts[used] + gain * velocity + gain_before * self._before[used]
        renoised = [row for row, call in enumerate(calls) if call.step_noise]
        if renoised:
            noise = torch.stack([_step_noise_of(self._owners[row][0]) for row in renoised])
            frames[renoised] += step_noise[renoised] * noise
        self._frames[used] = frames
        self._before[used] = velocity
        self._starts[used] = torch.where(ends_step.bool(), frames, self._starts[used])
        for frame in dict.fromkeys(frame for frame, _ in self._owners):
            frame.num_done += 1

    def latents(self, frames: Sequence[PoolFrame]) -> Tensor:
        """Return some frames as they are now, [f c h w]."""
        patches = self._frames[[frame.rows[-1] for frame in frames]]
        return from_patches(patches, self.engine.shape).to(self.engine.dtype)

    def remove(self, frame: PoolFrame) -> None:
        for row in sorted(frame.rows, reverse=True):
            last = self.num_rows - 1
            if row != last:
                self._calls.move(last, row)
                for tensor in (self._frames, self._starts, self._before):
                    tensor[row] = tensor[last]
                self._owners[row] = self._owners[last]
                owner, branch = self._owners[row]
                owner.rows[branch] = row
            self._owners.pop()
        frame.rows = []

    def _guided(self, velocity: Tensor) -> Tensor:
        if all(frame.scale is None for frame, _ in self._owners):
            return velocity
        unconditional, conditional, scales = zip(
            *[
                (frame.rows[0], frame.rows[-1], 1.0 if frame.scale is None else frame.scale)
                for frame, _ in self._owners
            ],
            strict=True,
        )
        scale = torch.tensor(scales, device=velocity.device)[:, None, None]
        return guide(velocity[list(unconditional)], velocity[list(conditional)], scale)


def _step_noise_of(frame: PoolFrame) -> Tensor:
    assert frame.step_noise is not None
    return frame.step_noise[frame.call.index]


class _SharedCalls:
    """One call of the network for all frames."""

    def __init__(self, engine: RowEngine, max_rows: int) -> None:
        self.engine = engine
        self.rows = engine.new_rows(max_rows)

    @property
    def num_bytes(self) -> int:
        return self.rows.num_bytes

    def put(self, frames: Sequence[PoolFrame], start: int) -> None:
        self.engine.put(self.rows, start, [frame.context for frame in frames])
        for frame in frames:
            frame.modulations = self.engine.modulations_at(frame.times[:-1], frame.context)
            frame.context = None

    def move(self, source: int, target: int) -> None:
        self.rows.move(source, target)

    def velocity(self, patches: Tensor, owners: Sequence[Owner]) -> Tensor:
        modulation = torch.stack([_modulation(*owner) for owner in owners])
        times = [frame.time for frame, _ in owners]
        time = torch.tensor(times, device=patches.device)[:, None, None]
        return self.engine.decoder.velocity(self.rows, patches, modulation, time)


def _modulation(frame: PoolFrame, branch: int) -> Tensor:
    assert frame.modulations is not None
    now = frame.modulations[frame.call.index]
    return now[min(branch, now.shape[0] - 1)]


class _SingleCalls:
    """One call of any engine for each frame."""

    num_bytes = 0

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def put(self, frames: Sequence[PoolFrame], start: int) -> None:
        pass

    def move(self, source: int, target: int) -> None:
        pass

    def velocity(self, patches: Tensor, owners: Sequence[Owner]) -> Tensor:
        velocity = torch.empty_like(patches)
        for frame in dict.fromkeys(frame for frame, _ in owners):
            noisy = from_patches(patches[frame.rows], self.engine.shape).to(self.engine.dtype)
            # In float64: the time embedding shows the rounding of a float32 time.
            time = noisy.new_full((len(frame.rows),), frame.time, dtype=finest(noisy.device))
            found = self.engine.velocity(frame.context, noisy, time)
            velocity[frame.rows] = to_patches(found.float(), self.engine.shape.patch_size)
        return velocity


def pool_bytes(engine: Engine, max_rows: int) -> int:
    """Return the memory of the rows of a pool: frames, and contexts where calls are shared.

    A frame is held 3 times in float32. A context is its tokens, n * d; with the join "prefix" keys
    and values of both halves in each layer, 4 * layers * n * d; of a Wan model with l tokens of
    text in each layer besides, 2 * layers * l * d. Each frame under way adds its
    modulations, steps * parts * d, and the noise of its steps, if they need any, which are not
    counted: the steps are not known here.
    """
    shape = engine.shape
    held = 3 * 4 * shape.num_tokens * shape.token_dim
    if isinstance(engine, RowEngine):
        held += engine.row_bytes
    return max_rows * held
