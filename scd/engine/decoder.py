"""The frame decoder laid out for speed: contexts in place, one call for frames of any streams.

The plain twin is models/decoder.py; a test compares the two for every join.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scd.data.clip import Conditions
from scd.engine.layers import FastHead, PackedLinear, release, split
from scd.engine.stack import FastStack
from scd.models.decoder import FrameDecoder


class DecoderRows:
    """Room for the contexts of frames that are denoised side by side, one row each.

    Rows are independent, so frames of different streams, at different steps, share a call. Join
    "prefix" keeps the context's keys and values of each layer, with room behind them for those of
    the noisy tokens; the other joins keep the context's tokens.
    """

    def __init__(self, decoder: FastDecoder, capacity: int) -> None:
        shape, block = decoder.shape, decoder.block
        self.capacity = capacity
        like = {"dtype": decoder.dtype, "device": decoder.device}
        if decoder.join == "prefix":
            size = (capacity, block.num_heads, 2 * shape.num_tokens, block.head_dim)
            self.keys = torch.empty(len(decoder.blocks), *size, **like)
            self.values = torch.empty_like(self.keys)
        else:
            self.tokens = torch.empty(capacity, shape.num_tokens, block.width, **like)

    @property
    def num_bytes(self) -> int:
        tensors = [part for part in vars(self).values() if isinstance(part, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def move(self, source: int, target: int) -> None:
        if hasattr(self, "tokens"):
            self.tokens[target] = self.tokens[source]
        else:
            self.keys[:, target] = self.keys[:, source]
            self.values[:, target] = self.values[:, source]


class FastDecoder(FastStack):
    """Transformer over one frame at a time: `put` a context in a row, `velocity` at every step."""

    def __init__(self, decoder: FrameDecoder, free: bool) -> None:
        self.join = decoder.config.join
        self.joint = self.join in ("token_concat", "token_concat_projected")
        num_tokens = decoder.shape.num_tokens
        super().__init__(
            decoder,
            decoder.head.modulation,
            free,
            tokens=num_tokens * (1 + self.joint),
            fused_last=not self.joint,
        )
        # Within one frame only differences of positions matter, so every frame is frame 0. Both
        # halves of the joined sequence have the same places.
        self.rotary_alone = self.rotary([0])
        self.rotary_joint = self.rotary_alone.repeated(1 + self.joint)
        self.head = FastHead(decoder.head, num_tokens, free)
        if self.join == "channel_concat":
            self.merge = PackedLinear.of(decoder.merge, rows=num_tokens)
        if self.join == "token_concat_projected":
            self.align_norm = decoder.align_norm
            self.align = PackedLinear.of(decoder.align, rows=num_tokens)
        if free:
            for name in ("merge", "align"):
                if hasattr(decoder, name):
                    release(getattr(decoder, name))

    def put(self, rows: DecoderRows, start: int, tokens: Tensor, conditions: Conditions) -> None:
        """Put the contexts of frames [f n d] and their conditions into rows from `start` on."""
        stop = start + tokens.shape[0]
        if self.join == "token_concat_projected":
            tokens = self.align(self.align_norm(tokens))
        if self.join != "prefix":
            rows.tokens[start:stop] = tokens
            return
        parts, num_tokens, x = self.clean_parts(conditions), self.shape.num_tokens, tokens

        def keep(layer: int, k: Tensor, v: Tensor) -> None:
            rows.keys[layer, start:stop, :, :num_tokens] = k
            rows.values[layer, start:stop, :, :num_tokens] = v

        def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keep(layer, k, v)
            return self.attend(q, k, v)

        last = len(self.blocks) - 1
        for layer in range(last):
            x = self.run_layer(layer, x, parts, self.rotary_alone, read)
        keep(last, *self.keys_values(last, x, parts, self.rotary_alone))

    def velocity(
        self, rows: DecoderRows, patches: Tensor, modulation: Tensor, time: Tensor
    ) -> Tensor:
        """Return the velocity of noisy frames, as patches.

        Args:
            rows: contexts of the first f rows belong to the f frames.
            patches: noisy frames [f n p], float32.
            modulation: at the times and conditions of the frames, [r parts d] for 1 or f.
            time: of all frames [1 1 1], or of each [f 1 1].
        """
        num_frames, num_tokens = patches.shape[0], self.shape.num_tokens
        parts = split(modulation)
        x = self.embed(patches)
        if self.join != "prefix":
            x = self._joined(rows.tokens[:num_frames], x)

        def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.join == "prefix":
                keys, values = rows.keys[layer, :num_frames], rows.values[layer, :num_frames]
                keys[:, :, num_tokens:] = k
                values[:, :, num_tokens:] = v
                k, v = keys, values
            return self.attend(q, k, v)

        for layer in range(len(self.blocks)):
            # Nobody reads the context's half after the last block.
            alone = self.joint and layer == len(self.blocks) - 1
            of_queries = self.rotary_alone if alone else None
            x = self.run_layer(layer, x, parts, self.rotary_joint, read, of_queries)
        return self.head(x, parts, patches, time)

    def _joined(self, context: Tensor, x: Tensor) -> Tensor:
        if self.joint:
            return torch.cat([context, x], dim=1)
        if self.join == "channel_concat":
            return self.merge(torch.cat([x, context], dim=-1))
        return x + context
