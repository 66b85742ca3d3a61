"""A stack of transformer blocks laid out for speed, behind encoder, decoder and dense engine.

The plain twin is models/stack.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scd.data.clip import Conditions
from scd.engine.layers import (
    PARTS,
    Attention,
    FastBlock,
    FastEmbedder,
    NormedRotary,
    Parts,
    blocks_of,
    norm_weights,
    rotate_halves,
    split,
)
from scd.engine.modulation import Modulations
from scd.models.attention import frame_positions, rotary_table
from scd.models.block import Modulation
from scd.models.config import CacheConfig
from scd.models.embed import to_patches
from scd.models.flow import CLEAN_TIME
from scd.models.kv_cache import KVCache

Read = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""From a layer, and its queries, keys and values [f k n e], to what attention reads."""


class FastStack:
    """Embedder, modulations and blocks of a plain stack; rows f are frames side by side."""

    def __init__(
        self,
        stack: Any,
        last: Modulation | None,
        free: bool,
        tokens: int = 0,
        fused_last: bool = True,
    ) -> None:
        """Lay the weights out.

        Args:
            stack: the plain one: encoder, decoder or dense model.
            last: modulation of the norm after its blocks; None: that has none.
            free: give up the plain weights.
            tokens: of a frame in the blocks, a hint; 0: those of a frame.
            fused_last: queries, keys and values of the last block are one product.
        """
        self.shape, self.block = stack.shape, stack.block
        self.like = stack.like.detach().new_empty(0)
        self.device, self.dtype = self.like.device, self.like.dtype
        plain, tokens = blocks_of(stack.blocks), tokens or stack.shape.num_tokens
        self.attend = Attention()
        self.norm_weights = norm_weights(plain)
        self.embed = FastEmbedder(stack.embed_frame, stack.shape.num_tokens, free)
        self.modulations = Modulations(stack.embed_time, stack.embed_conditions, plain, last, free)
        self.blocks = [
            FastBlock(block, tokens, fused=fused_last or block is not plain[-1], free=free)
            for block in plain
        ]

    def new_cache(self, config: CacheConfig, batch: int, num_layers: int | None = None) -> KVCache:
        """Allocate the KV cache of a batch of streams, for the first layers; None: all."""
        return KVCache(
            config,
            self.block,
            num_layers=len(self.blocks) if num_layers is None else num_layers,
            batch=batch,
            tokens_per_frame=self.shape.num_tokens,
            like=self.like,
            rotate=rotate_halves,
        )

    def rotary(self, frames: Sequence[int]) -> NormedRotary:
        """Tabulate the positions of frames side by side, each at its place in its stream."""
        if len(set(frames)) == 1:
            # Not torch.tensor, which would wait for a GPU.
            places = torch.full((1,), frames[0], dtype=torch.long, device=self.device)
        else:
            places = torch.tensor(frames).to(self.device, non_blocking=True)
        positions = frame_positions(places, self.shape.rows, self.shape.columns)
        cosine, sine = rotary_table(positions, self.block.rotary_axes, self.block.rotary_theta)
        if len(places) > 1:
            cosine, sine = (one.unflatten(0, (len(places), 1, -1)) for one in (cosine, sine))
        return NormedRotary(self.norm_weights, (cosine, sine))

    def distance_bias(self, frame: int, cache: KVCache) -> Tensor | None:
        """Return the bias over distance of a new frame to all in the cache, [1 s]; or None."""
        if self.block.distance_bias == 0:
            return None
        distance = torch.tensor(cache.positions_with([frame]), device=self.device) - frame
        bias = self.block.distance_bias * distance.float()
        return bias.repeat_interleave(self.shape.num_tokens)[None]

    def tokens(self, frames: Tensor) -> Tensor:
        """Cut frames [f c h w] into tokens [f n d]."""
        return self.embed(to_patches(frames.float(), self.shape.patch_size))

    def clean_parts(self, conditions: Conditions) -> Parts:
        return split(self.modulations.at((CLEAN_TIME,), conditions)[0])

    def run_layer(
        self,
        layer: int,
        x: Tensor,
        parts: Parts,
        rotary: NormedRotary,
        read: Read,
        of_queries: NormedRotary | None = None,
    ) -> Tensor:
        """Run one layer over tokens [f n d].

        Args:
            layer: its number, from 0.
            x: tokens.
            parts: modulations of all layers.
            rotary: positions of the tokens.
            read: attention.
            of_queries: positions of the last tokens, where only those go on; None: all do.
        """
        block, part = self.blocks[layer], self._part(parts, layer)
        q, k, v = block.queries_keys_values(x, part, rotary, layer, of_queries)
        if of_queries is not None:
            x = x[:, -of_queries.num_tokens :]
        return block.finish(x, read(layer, q, k, v), part)

    def keys_values(
        self, layer: int, x: Tensor, parts: Parts, rotary: NormedRotary
    ) -> tuple[Tensor, Tensor]:
        """Return only keys and values of a layer: all that is needed of the last one."""
        return self.blocks[layer].keys_values(x, self._part(parts, layer), rotary, layer)

    @staticmethod
    def _part(parts: Parts, layer: int) -> Parts:
        return parts[PARTS * layer : PARTS * (layer + 1)]
