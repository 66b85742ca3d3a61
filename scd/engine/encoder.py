"""The causal encoder laid out for speed: one row of each stream at a time, over its KV cache.

The plain twin is models/encoder.py; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scd.data.clip import Conditions
from scd.engine.layers import Parts, modulate
from scd.engine.stack import FastStack
from scd.models.block import layer_norm
from scd.models.encoder import CausalEncoder
from scd.models.kv_cache import KVCache


class FastEncoder(FastStack):
    """Clean frame and coming action to the context of the next frame."""

    def __init__(self, encoder: CausalEncoder, free: bool) -> None:
        super().__init__(encoder, encoder.output_modulation, free)
        self.start, self.first_row = encoder.start, encoder.first_row
        self.modulates_output = encoder.output_modulation is not None

    def extend(
        self,
        caches: Sequence[KVCache],
        clean: Sequence[Tensor],
        upcoming: Conditions,
        rows: Sequence[int],
    ) -> list[tuple[Tensor, Tensor]]:
        """Write one row into each cache, without keeping it, and return its context.

        All products with weights are made once for all; each batch of streams attends to its own
        cache, however full that is.

        Args:
            caches: one for each batch of streams; has room for the row afterwards.
            clean: the row's frames of each, [b 1 c h w], or [b 0 c h w] for the start frame.
            upcoming: conditions of the frames after them, of all streams in order.
            rows: frame position of each.

        Returns:
            For each batch context tokens [b n d] and the norm scale [r 1 d] of the last norm, for 1
            or b streams.
        """
        sizes = [len(frames) for frames in clean]
        if len({frames.shape[1] for frames in clean}) == 1:
            x = self._rows(_together(clean))
        else:
            x = _together([self._rows(frames) for frames in clean])
        for cache in caches:
            cache.make_room()
        parts = self.clean_parts(upcoming)
        places = [row for row, size in zip(rows, sizes, strict=True) for _ in range(size)]
        rotary = self.rotary(places)
        biases = [self.distance_bias(row, cache) for row, cache in zip(rows, caches, strict=True)]

        def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if len(caches) == 1:
                return self.attend(q, *caches[0].write(layer, k, v), biases[0])
            qs, ks, vs = (one.split(sizes) for one in (q, k, v))
            return torch.cat(
                [
                    self.attend(q, *cache.write(layer, k, v), bias)
                    for q, k, v, cache, bias in zip(qs, ks, vs, caches, biases, strict=True)
                ]
            )

        for layer in range(len(self.blocks)):
            x = self.run_layer(layer, x, parts, rotary, read)
        tokens, scale = self._finished(x, parts)
        scales = scale.split(sizes) if len(scale) == len(tokens) else [scale] * len(sizes)
        return list(zip(tokens.split(sizes), scales, strict=True))

    def _rows(self, clean: Tensor) -> Tensor:
        if clean.shape[1]:
            return self.tokens(clean[:, 0])
        assert self.start is not None
        return self.start.expand(clean.shape[0], -1, -1)

    def _finished(self, x: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
        if not self.modulates_output:
            return layer_norm(x), torch.ones_like(x[:1, :1])
        return modulate(x, parts[-1], parts[-2]), parts[-2].view(-1, 1, parts[-2].shape[-1])


def _together(batches: Sequence[Tensor]) -> Tensor:
    return batches[0] if len(batches) == 1 else torch.cat(list(batches))
