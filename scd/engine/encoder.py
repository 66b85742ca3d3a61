"""The causal encoder laid out for speed: one row of a stream at a time, over its memory.

The plain twin is models/encoder.py; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scd.data.clip import Conditions
from scd.engine.attention import Attention, frame_turn, frames_turn, key_bias, rotate_halves
from scd.engine.block import PARTS, FastBlock, Parts, blocks_of, modulate, norm_weights, split
from scd.engine.embed import FastEmbedder
from scd.engine.modulation import Modulations
from scd.models.block import layer_norm
from scd.models.config import CacheConfig
from scd.models.embed import to_patches
from scd.models.encoder import CausalEncoder
from scd.models.flow import CLEAN_TIME
from scd.models.kv_cache import KVCache


class FastEncoder:
    """Clean frame and coming action to the context of the next frame."""

    def __init__(self, encoder: CausalEncoder, free: bool) -> None:
        """Lay the weights out.

        Args:
            encoder: the plain one.
            free: give up its weights.
        """
        self.encoder = encoder
        self.shape, self.config_block = encoder.shape, encoder.block
        blocks, num_tokens = blocks_of(encoder.blocks), encoder.shape.num_tokens
        self.attend = Attention()
        self.norm_weights = norm_weights(blocks)
        self.embed = FastEmbedder(encoder.embed_frame, num_tokens, free)
        self.modulations = Modulations(
            encoder.embed_time, encoder.embed_conditions, blocks, encoder.output_modulation, free
        )
        self.blocks = [FastBlock(block, num_tokens, free=free) for block in blocks]

    def new_cache(self, batch: int, config: CacheConfig) -> KVCache:
        """Allocate the memory of a batch of streams."""
        weight = self.encoder.embed_frame.project.weight
        num_layers, num_tokens = len(self.blocks), self.shape.num_tokens
        return KVCache(
            config,
            self.config_block,
            num_layers=num_layers,
            batch=batch,
            tokens_per_frame=num_tokens,
            like=weight,
            rotate=rotate_halves,
        )

    def extend(
        self, cache: KVCache, clean: Tensor, upcoming: Conditions, row: int
    ) -> tuple[Tensor, Tensor]:
        """Write one row into the cache, without keeping it, and return its context.

        Args:
            cache: has room for the row afterwards.
            clean: the row's frame [b 1 c h w], or [b 0 c h w] for the start frame.
            upcoming: conditions of the frame after it.
            row: its frame position.

        Returns:
            Context tokens [b n d] and the gain [r 1 d] of the last norm, for 1 or b streams.
        """
        x = self._tokens(clean)
        cache.make_room()
        parts = split(self.modulations.at((CLEAN_TIME,), upcoming)[0])
        turn = frame_turn(self.norm_weights, row, self.shape, self.config_block)
        bias = key_bias(self.config_block, row, cache, self.shape.num_tokens)
        for layer, block in enumerate(self.blocks):
            part = parts[PARTS * layer : PARTS * (layer + 1)]
            q, k, v = block.queries_keys_values(x, part, turn, layer)
            x = block.finish(x, self.attend(q, *cache.write(layer, k, v), bias), part)
        return self._finished(x, parts)

    def extend_all(
        self,
        caches: Sequence[KVCache],
        clean: Sequence[Tensor],
        upcoming: Conditions,
        rows: Sequence[int],
    ) -> list[tuple[Tensor, Tensor]]:
        """Do what `extend` does for streams with memories of their own.

        All products with weights are made once for all; each stream attends to its own memory,
        however full that is.

        Args:
            caches: one for each batch of streams.
            clean: the frames of each.
            upcoming: conditions of the frames after them, of all streams in order.
            rows: frame position of each.

        Returns:
            For each batch what `extend` returns.
        """
        sizes = [len(frames) for frames in clean]
        if all(frames.shape[1] for frames in clean):
            x = self._tokens(torch.cat(list(clean)))
        else:
            x = torch.cat([self._tokens(frames) for frames in clean])
        for cache in caches:
            cache.make_room()
        parts = split(self.modulations.at((CLEAN_TIME,), upcoming)[0])
        places = [row for row, size in zip(rows, sizes, strict=True) for _ in range(size)]
        turn = frames_turn(self.norm_weights, places, self.shape, self.config_block)
        biases = [
            key_bias(self.config_block, row, cache, self.shape.num_tokens)
            for row, cache in zip(rows, caches, strict=True)
        ]
        for layer, block in enumerate(self.blocks):
            part = parts[PARTS * layer : PARTS * (layer + 1)]
            each = [one.split(sizes) for one in block.queries_keys_values(x, part, turn, layer)]
            read = [
                self.attend(q, *cache.write(layer, k, v), bias)
                for q, k, v, cache, bias in zip(*each, caches, biases, strict=True)
            ]
            x = block.finish(x, torch.cat(read), part)
        tokens, gain = self._finished(x, parts)
        gains = gain.split(sizes) if len(gain) == len(tokens) else [gain] * len(sizes)
        return list(zip(tokens.split(sizes), gains, strict=True))

    def _tokens(self, clean: Tensor) -> Tensor:
        if clean.shape[1]:
            return self.embed(to_patches(clean[:, 0].float(), self.shape.patch_size))
        assert self.encoder.start is not None
        return self.encoder.start.expand(clean.shape[0], -1, -1)

    def _finished(self, x: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
        if self.encoder.output_modulation is None:
            return layer_norm(x), torch.ones_like(x[:1, :1])
        return modulate(x, parts[-1], parts[-2]), parts[-2].view(-1, 1, parts[-2].shape[-1])
