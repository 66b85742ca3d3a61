"""The dense baseline laid out for speed, with every saving that the separable one has on a CPU.

On a GPU its steps are not captured as a graph: see docs/engine.md.
The plain twin is models/dense.py, run by engine/plain.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scd.data.clip import Conditions
from scd.engine.attention import Attention, Turn, frame_turn, key_bias, rotate_halves
from scd.engine.block import PARTS, FastBlock, Parts, blocks_of, norm_weights, split
from scd.engine.embed import FastEmbedder, FastHead
from scd.engine.interface import Engine
from scd.engine.modulation import Modulations
from scd.models.base import State
from scd.models.config import DenseConfig, Solver
from scd.models.dense import DenseDiffuser
from scd.models.embed import from_patches, to_patches
from scd.models.flow import CLEAN_TIME, guided_velocity, solve
from scd.models.kv_cache import KVCache


@dataclass(frozen=True, kw_only=True)
class FastDenseContext:
    """What a denoising step needs: the memory, and the frame's place in it."""

    cache: KVCache
    """Memory; the noisy frame's place in it is overwritten at each step."""
    turn: Turn
    """Positions of the frame's tokens."""
    bias: Tensor | None
    """Over the distance of frames."""
    conditions: Conditions
    """Of the frame."""


class FastDense(Engine):
    """All layers at every step, each over the whole memory."""

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
        self.like = model.head.project.weight.detach().new_empty(0)
        self.device, self.dtype = self.like.device, self.like.dtype
        blocks, rows = blocks_of(model.blocks), model.shape.num_tokens
        self.attend = Attention()
        with torch.no_grad():
            self.norm_weights = norm_weights(blocks)
            self.embed = FastEmbedder(model.embed_frame, rows, free)
            self.modulations = Modulations(
                model.embed_time, model.embed_conditions, blocks, model.head.modulation, free
            )
            self.blocks = [FastBlock(block, rows, free=free) for block in blocks]
            self.head = FastHead(model.head, rows, free)

    @torch.no_grad()
    def begin(
        self,
        clean: Tensor | None,
        conditions: Conditions,
        batch: int = 1,
        window: int | None = None,
    ) -> State:
        """Start a batch of streams; see interface.Engine."""
        cache = KVCache(
            self.config.cache.with_window(window),
            self.config.block,
            num_layers=self.num_seeing,
            batch=batch if clean is None else clean.shape[0],
            tokens_per_frame=self.shape.num_tokens,
            like=self.like,
            rotate=rotate_halves,
        )
        state = State(cache=cache, next_position=0)
        for frame in range(0 if clean is None else clean.shape[1]):
            assert clean is not None
            self.observe(state, clean[:, frame], conditions.frames(frame, frame + 1))
        return state

    @torch.no_grad()
    def context(
        self, state: State, conditions: Conditions, noise: Tensor | None = None
    ) -> FastDenseContext:
        """Return what every step of the next frame needs; see interface.Engine."""
        state.cache.make_room()
        return self._place(state, conditions)

    def _place(self, state: State, conditions: Conditions) -> FastDenseContext:
        frame, block = state.next_position, self.config.block
        return FastDenseContext(
            cache=state.cache,
            turn=frame_turn(self.norm_weights, frame, self.shape, block),
            bias=key_bias(block, frame, state.cache, self.shape.num_tokens),
            conditions=conditions,
        )

    def with_noisy_branch(self, context: Any, strength: float, noise: Tensor) -> Any:
        """Refuse: this model has no context to corrupt."""
        raise ValueError("guidance by context noise needs a separable model")

    @torch.no_grad()
    def denoise(
        self,
        context: FastDenseContext,
        noise: Tensor,
        times: Sequence[float],
        solver: Solver = "euler",
        scale: float | None = None,
        fresh: Tensor | None = None,
    ) -> Tensor:
        """Turn noise into frames; see interface.Engine. Between steps frames are float32."""
        modulations = self.modulations.at(times[:-1], context.conditions)
        step = {time: index for index, time in enumerate(times)}

        def velocity_at(patches: Tensor, time: float) -> Tensor:
            return self._velocity(context, patches, modulations[step[time]], time)

        patches = to_patches(noise.float(), self.shape.patch_size)
        new = None if fresh is None else to_patches(fresh.float(), self.shape.patch_size)
        patches = solve(guided_velocity(velocity_at, scale), patches, times, solver, new)
        return from_patches(patches, self.shape).to(self.dtype)

    @torch.no_grad()
    def velocity(self, context: FastDenseContext, noisy: Tensor, time: Tensor) -> Tensor:
        """Return the velocity of noisy frames; see interface.Engine."""
        modulation = self.modulations.of_each(time, context.conditions)
        patches = to_patches(noisy.float(), self.shape.patch_size)
        velocity = self._velocity(context, patches, modulation, time.float()[:, None, None])
        return from_patches(velocity, self.shape).to(noisy.dtype)

    def _velocity(
        self, context: FastDenseContext, patches: Tensor, modulation: Tensor, time: float | Tensor
    ) -> Tensor:
        parts = split(modulation)
        x = self.embed(patches)
        for layer, block in enumerate(self.blocks):
            skipped = self._skipped(layer, time)
            if skipped is True:
                continue
            after = self._run(block, layer, x, parts, context)
            x = after if skipped is False else torch.where(skipped, x, after)
        return self.head(x, parts, patches, time)

    def _skipped(self, layer: int, time: float | Tensor) -> bool | Tensor:
        """Tell whether frames skip a layer: all, none, or which [f 1 1]."""
        if self.skip is None or layer not in self.skip.layers:
            return False
        skipped = time < self.skip.below
        return bool(skipped.all()) or skipped if isinstance(skipped, Tensor) else skipped

    def _run(
        self,
        block: FastBlock,
        layer: int,
        x: Tensor,
        parts: Parts,
        context: FastDenseContext,
    ) -> Tensor:
        part = parts[PARTS * layer : PARTS * (layer + 1)]
        q, k, v = block.queries_keys_values(x, part, context.turn, layer)
        if layer < self.num_seeing:
            read = self.attend(q, *context.cache.write(layer, k, v), context.bias)
        else:
            read = self.attend(q, k, v)
        return block.finish(x, read, part)

    @torch.no_grad()
    def observe(self, state: State, clean: Tensor, conditions: Conditions) -> None:
        """Make frames part of the past: one pass over them writes the memory."""
        state.cache.make_room()
        context = self._place(state, conditions)
        parts = split(self.modulations.at((CLEAN_TIME,), conditions)[0])
        x = self.embed(to_patches(clean.float(), self.shape.patch_size))
        last = self.num_seeing - 1
        for layer, block in enumerate(self.blocks[: last + 1]):
            if layer < last:
                x = self._run(block, layer, x, parts, context)
                continue
            part = parts[PARTS * layer : PARTS * (layer + 1)]
            state.cache.write(layer, *block.keys_values(x, part, context.turn, layer))
        state.cache.advance([state.next_position])
        state.next_position += 1
