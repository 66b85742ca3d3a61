"""The dense baseline laid out for speed, with every saving that the separable one has on a CPU.

On a GPU its steps are not captured as a graph: see docs/engine.md.
The plain twin is models/dense.py, run by engine/plain.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scd.data.clip import Conditions
from scd.engine.interface import Engine
from scd.engine.layers import FastHead, NormedRotary, split
from scd.engine.stack import FastStack, Read
from scd.models.base import State
from scd.models.config import DenseConfig, Solver
from scd.models.dense import DenseDiffuser
from scd.models.embed import from_patches, to_patches
from scd.models.flow import guided, solve
from scd.models.kv_cache import KVCache


@dataclass(frozen=True, kw_only=True)
class FastDenseContext:
    """What a denoising step needs: the KV cache, and the frame's place in it."""

    cache: KVCache
    """What it attends to; the noisy frame's place in it is overwritten at each step."""
    rotary: NormedRotary
    """Positions of the frame's tokens."""
    bias: Tensor | None
    """Over the distance of frames."""
    conditions: Conditions
    """Of the frame."""


class FastDense(Engine):
    """All layers at every step, each over the whole KV cache."""

    config: DenseConfig

    def __init__(self, model: DenseDiffuser, free: bool = False) -> None:
        """Lay the weights out.

        Args:
            model: the plain one.
            free: give up its weights; it cannot be used afterwards.
        """
        model.eval()
        self.config, self.shape = model.config, model.shape
        self.num_seeing, self.skip = model.num_seeing, model.skip
        self.needs_first_frame = model.needs_first_frame
        with torch.no_grad():
            self.stack = FastStack(model, model.head.modulation, free)
            self.head = FastHead(model.head, model.shape.num_tokens, free)
        self.device, self.dtype = self.stack.device, self.stack.dtype

    @torch.no_grad()
    def begin(
        self,
        clean: Tensor | None,
        conditions: Conditions,
        batch: int = 1,
        window: int | None = None,
    ) -> State:
        batch = batch if clean is None else clean.shape[0]
        config = self.config.cache.with_window(window)
        cache = self.stack.new_cache(config, batch, self.num_seeing)
        state = State(cache=cache, next_position=0)
        for frame in range(0 if clean is None else clean.shape[1]):
            assert clean is not None
            self.observe(state, clean[:, frame], conditions.frames(frame, frame + 1))
        return state

    @torch.no_grad()
    def context(
        self, state: State, conditions: Conditions, noise: Tensor | None = None
    ) -> FastDenseContext:
        state.cache.make_room()
        return self._place(state, conditions)

    def _place(self, state: State, conditions: Conditions) -> FastDenseContext:
        return FastDenseContext(
            cache=state.cache,
            rotary=self.stack.rotary([state.next_position]),
            bias=self.stack.distance_bias(state.next_position, state.cache),
            conditions=conditions,
        )

    @torch.no_grad()
    def denoise(
        self,
        context: FastDenseContext,
        noise: Tensor,
        times: Sequence[float],
        solver: Solver = "euler",
        scale: float | None = None,
        step_noise: Tensor | None = None,
    ) -> Tensor:
        """Turn noise into frames; see interface.Engine. Between steps frames are float32."""
        modulations = self.stack.modulations.at(times[:-1], context.conditions)
        step = {time: index for index, time in enumerate(times)}

        def predicted_at(patches: Tensor, time: float) -> Tensor:
            return self._predicted(context, patches, modulations[step[time]], time)

        patches = to_patches(noise.float(), self.shape.patch_size)
        new = None if step_noise is None else to_patches(step_noise.float(), self.shape.patch_size)
        field, predicts = guided(predicted_at, scale), self.head.predict
        patches = solve(field, patches, times, solver, new, predicts)
        return from_patches(patches, self.shape).to(self.dtype)

    @torch.no_grad()
    def velocity(self, context: FastDenseContext, noisy: Tensor, time: Tensor) -> Tensor:
        modulation = self.stack.modulations.of_each(time, context.conditions)
        patches = to_patches(noisy.float(), self.shape.patch_size)
        each = time.float()[:, None, None]
        predicted = self._predicted(context, patches, modulation, each)
        velocity = self.head.velocity(predicted, patches, each)
        return from_patches(velocity, self.shape).to(noisy.dtype)

    def _predicted(
        self, context: FastDenseContext, patches: Tensor, modulation: Tensor, time: float | Tensor
    ) -> Tensor:
        parts, stack = split(modulation), self.stack
        x, read = stack.embed(patches), self._read(context)
        for layer in range(len(stack.blocks)):
            skipped = self._skipped(layer, time)
            if skipped is True:
                continue
            after = stack.run_layer(layer, x, parts, context.rotary, read)
            x = after if skipped is False else torch.where(skipped, x, after)
        return self.head(x, parts)

    def _skipped(self, layer: int, time: float | Tensor) -> bool | Tensor:
        """Tell whether frames skip a layer: all, none, or which [f 1 1]."""
        if self.skip is None or layer not in self.skip.layers:
            return False
        skipped = time < self.skip.below
        return bool(skipped.all()) or skipped if isinstance(skipped, Tensor) else skipped

    def _read(self, context: FastDenseContext) -> Read:
        def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layer < self.num_seeing:
                return self.stack.attend(q, *context.cache.write(layer, k, v), context.bias)
            return self.stack.attend(q, k, v)

        return read

    @torch.no_grad()
    def observe(self, state: State, clean: Tensor, conditions: Conditions) -> None:
        """Make frames part of the past: one pass over them writes the KV cache."""
        state.cache.make_room()
        context, stack = self._place(state, conditions), self.stack
        parts, x, read = stack.clean_parts(conditions), stack.tokens(clean), self._read(context)
        last = self.num_seeing - 1
        for layer in range(last):
            x = stack.run_layer(layer, x, parts, context.rotary, read)
        state.cache.write(last, *stack.keys_values(last, x, parts, context.rotary))
        state.cache.advance([state.next_position])
        state.next_position += 1
