"""A separable model laid out for speed, behind the interface of an engine.

The plain twin is models/separable.py, run by engine/plain.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scd.data.clip import Conditions
from scd.engine.decoder import DecoderRows, FastDecoder
from scd.engine.encoder import FastEncoder
from scd.engine.graph import LoopGraphs, can_compile, compiled
from scd.engine.interface import Engine
from scd.engine.modulation import Schedule, kept_for
from scd.models.config import Solver
from scd.models.embed import from_patches, to_patches
from scd.models.flow import guided_velocity, solve
from scd.models.separable import SeparableDiffuser, SeparableState


@dataclass(frozen=True, kw_only=True)
class FastContext:
    """What the encoder gave for one frame of each stream."""

    tokens: Tensor
    """Context tokens [f n d]."""
    norm_scale: Tensor
    """Factor of the encoder's last norm, [r 1 d] for 1 or f frames: noise enters before it."""
    conditions: Conditions
    """Of the frames."""


class FastSeparable(Engine):
    """Encoder once per frame, then all steps of the decoder in place."""

    def __init__(
        self,
        model: SeparableDiffuser,
        free: bool = False,
        compile_step: bool | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        """Lay the weights out.

        Args:
            model: the plain one.
            free: give up its weights; it cannot be used afterwards.
            compile_step: compile the decoder's step, seconds to a minute at the first frame; None:
                where there is a GPU and Triton.
            report: told what takes long, and how long it took.
        """
        model.eval()
        self.config, self.shape = model.config, model.shape
        self.needs_first_frame = model.needs_first_frame
        weight = model.decoder.head.project.weight
        self.device, self.dtype = weight.device, weight.dtype
        with torch.no_grad():
            self.encoder = FastEncoder(model.encoder, free)
            self.decoder = FastDecoder(model.decoder, free)
        self._rows = DecoderRows(self.decoder, 0)
        self._graphs = LoopGraphs(report) if self.device.type == "cuda" else None
        self._step = self.decoder.velocity
        if can_compile(self.device) if compile_step is None else compile_step:
            self._step = compiled(self.decoder.velocity)
        self._times: dict[Schedule, Tensor] = {}

    @torch.no_grad()
    def begin(
        self,
        clean: Tensor | None,
        conditions: Conditions,
        batch: int = 1,
        window: int | None = None,
    ) -> SeparableState:
        if clean is None:
            clean = torch.empty(batch, 0, *self.shape.shape, dtype=self.dtype, device=self.device)
        num_given = clean.shape[1]
        if num_given == 0 and self.needs_first_frame:
            raise ValueError("this model has no start frame: it needs 1 or more first frames")
        config = self.config.cache.with_window(window)
        cache = self.encoder.new_cache(config, clean.shape[0])
        first = self.encoder.first_row
        # The row of the last given frame waits: it carries an action that is not known yet.
        for row in range(first, num_given - 1):
            frame = clean[:, max(row, 0) : row + 1]
            self.encoder.extend([cache], [frame], conditions.frames(row + 1, row + 2), [row])
            cache.advance([row])
        row = max(first, num_given - 1)
        return SeparableState(cache=cache, newest=clean[:, max(row, 0) :], next_position=row)

    @torch.no_grad()
    def context(
        self, state: SeparableState, conditions: Conditions, noise: Tensor | None = None
    ) -> FastContext:
        return self.contexts([state], [conditions], [noise])[0]

    @torch.no_grad()
    def contexts(
        self,
        states: Sequence[SeparableState],
        conditions: Sequence[Conditions],
        noises: Sequence[Tensor | None],
    ) -> list[FastContext]:
        found = self.encoder.extend(
            [state.cache for state in states],
            [state.newest for state in states],
            conditions[0] if len(conditions) == 1 else side_by_side(conditions),
            [state.next_position for state in states],
        )
        for state, condition in zip(states, conditions, strict=True):
            state.encoded_for = condition
        return [
            FastContext(tokens=tokens, norm_scale=norm_scale, conditions=condition)
            for (tokens, norm_scale), condition in zip(found, conditions, strict=True)
        ]

    @torch.no_grad()
    def with_noisy_branch(
        self, context: FastContext, strength: float, noise: Tensor
    ) -> FastContext:
        noisy = context.tokens + strength * noise.to(self.dtype) * context.norm_scale
        norm_scale = context.norm_scale.expand(context.tokens.shape[0], -1, -1)
        return FastContext(
            tokens=torch.cat([noisy, context.tokens]),
            norm_scale=torch.cat([norm_scale, norm_scale]),
            conditions=context.conditions.concat(context.conditions),
        )

    @torch.no_grad()
    def denoise(
        self,
        context: FastContext,
        noise: Tensor,
        times: Sequence[float],
        solver: Solver = "euler",
        scale: float | None = None,
        step_noise: Tensor | None = None,
    ) -> Tensor:
        """Turn noise into frames; see interface.Engine. Between steps frames are float32."""
        rows = self._put(context)
        modulations = self.decoder.modulations.at(times[:-1], context.conditions)
        step = {time: index for index, time in enumerate(times)}
        tensors = self._as_tensors(tuple(times))

        def loop(patches: Tensor, modulations: Tensor, new: Tensor) -> Tensor:
            def velocity_at(patches: Tensor, time: float) -> Tensor:
                index = step[time]
                return self._step(rows, patches, modulations[index], tensors[index])

            return solve(guided_velocity(velocity_at, scale), patches, times, solver, new)

        step_noise = noise.new_empty(0, *noise.shape) if step_noise is None else step_noise
        patches, new = (
            to_patches(one.float(), self.shape.patch_size) for one in (noise, step_noise)
        )
        if self._graphs is None:
            patches = loop(patches, modulations, new)
        else:
            key = (context.tokens.shape[0], tuple(times), solver, scale)
            patches = self._graphs.run(key, loop, patches, modulations, new)
        return from_patches(patches, self.shape).to(self.dtype)

    def _as_tensors(self, times: Schedule) -> Tensor:
        """Return times as [times 1 1 1]: a step would be compiled anew for every number.

        They are kept, because making them would wait for the GPU at every frame.
        """

        def make() -> Tensor:
            return torch.tensor(times, device=self.device)[:, None, None, None]

        return kept_for(times, self._times, make)

    @torch.no_grad()
    def velocity(self, context: FastContext, noisy: Tensor, time: Tensor) -> Tensor:
        rows = self._put(context)
        modulation = self.decoder.modulations.of_each(time, context.conditions)
        patches = to_patches(noisy.float(), self.shape.patch_size)
        velocity = self.decoder.velocity(rows, patches, modulation, time.float()[:, None, None])
        return from_patches(velocity, self.shape).to(noisy.dtype)

    @torch.no_grad()
    def observe(self, state: SeparableState, clean: Tensor, conditions: Conditions) -> None:
        if state.encoded_for is not conditions:
            self.context(state, conditions)
        state.keep(clean)

    def _put(self, context: FastContext) -> DecoderRows:
        num_frames = context.tokens.shape[0]
        if self._rows.capacity < num_frames:
            self._rows = DecoderRows(self.decoder, num_frames)
            if self._graphs is not None:
                self._graphs.clear()
        self.decoder.put(self._rows, 0, context.tokens, context.conditions)
        return self._rows


def side_by_side(conditions: Sequence[Conditions]) -> Conditions:
    """Join conditions of one frame, of which only some may hide something."""

    def joined(name: str, shown_like: str) -> Tensor | None:
        values = [getattr(one, name) for one in conditions]
        if all(value is None for value in values):
            return None
        likes = [getattr(one, shown_like) for one in conditions]
        return torch.cat(
            [
                torch.zeros(like.shape[:2], dtype=torch.bool, device=like.device)
                if value is None
                else value
                for value, like in zip(values, likes, strict=True)
            ]
        )

    return Conditions(
        actions=joined("actions", "actions"),
        labels=joined("labels", "labels"),
        null_actions=joined("null_actions", "actions"),
        null_labels=joined("null_labels", "labels"),
    )
