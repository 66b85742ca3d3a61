"""The frame decoder laid out for speed: contexts in place, one call for frames of any streams.

The plain twin is models/decoder.py; a test compares the two for every join.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scd.data.clip import Conditions
from scd.engine.attention import Attention, Turn
from scd.engine.block import PARTS, FastBlock, blocks_of, norm_weights, split
from scd.engine.embed import FastEmbedder, FastHead
from scd.engine.linear import PackedLinear, release
from scd.engine.modulation import Modulations
from scd.models.attention import frame_positions, rotary_table
from scd.models.decoder import FrameDecoder
from scd.models.flow import CLEAN_TIME


class DecoderRows:
    """Room for the contexts of frames that are denoised side by side, one row each.

    Rows are independent, so frames of different streams, at different steps, share a call. Join
    "prefix" keeps the context's keys and values of each layer, with room behind them for those of
    the noisy tokens; the other joins keep the context's tokens.
    """

    def __init__(self, decoder: FastDecoder, capacity: int) -> None:
        shape, block = decoder.shape, decoder.config_block
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
        """Memory of all rows."""
        tensors = [part for part in vars(self).values() if isinstance(part, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def move(self, source: int, target: int) -> None:
        """Copy the context of one row to another."""
        if hasattr(self, "tokens"):
            self.tokens[target] = self.tokens[source]
        else:
            self.keys[:, target] = self.keys[:, source]
            self.values[:, target] = self.values[:, source]


class FastDecoder:
    """Transformer over one frame at a time: `put` a context in a row, `velocity` at every step."""

    def __init__(self, decoder: FrameDecoder, free: bool) -> None:
        """Lay the weights out.

        Args:
            decoder: the plain one.
            free: give up its weights.
        """
        self.config_block, self.shape = decoder.block, decoder.shape
        self.join = decoder.config.join
        weight = decoder.head.project.weight
        self.dtype, self.device = weight.dtype, weight.device
        num_tokens, blocks = self.shape.num_tokens, blocks_of(decoder.blocks)
        self.joint = self.join in ("token_concat", "token_concat_projected")
        rows = num_tokens * (1 + self.joint)
        rotary = rotary_table(
            frame_positions(
                torch.zeros(1, dtype=torch.long, device=self.device),
                self.shape.rows,
                self.shape.columns,
            ),
            self.config_block.rotary_axes,
            self.config_block.rotary_theta,
        )
        self.attend = Attention()
        weights = norm_weights(blocks)
        self.turn = Turn(weights, rotary)
        # Both halves of the joined sequence have the same places.
        self.turn_joint = Turn(weights, (rotary[0].repeat(2, 1), rotary[1].repeat(2, 1)))
        self.embed = FastEmbedder(decoder.embed_frame, num_tokens, free)
        self.modulations = Modulations(
            decoder.embed_time, decoder.embed_conditions, blocks, decoder.head.modulation, free
        )
        self.blocks = [
            FastBlock(block, rows, fused=not (self.joint and block is blocks[-1]), free=free)
            for block in blocks
        ]
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
        parts = split(self.modulations.at((CLEAN_TIME,), conditions)[0])
        num_tokens, x = self.shape.num_tokens, tokens
        for layer, block in enumerate(self.blocks):
            part = parts[PARTS * layer : PARTS * (layer + 1)]
            last = layer == len(self.blocks) - 1
            if last:
                k, v = block.keys_values(x, part, self.turn, layer)
            else:
                q, k, v = block.queries_keys_values(x, part, self.turn, layer)
                x = block.finish(x, self.attend(q, k, v), part)
            rows.keys[layer, start:stop, :, :num_tokens] = k
            rows.values[layer, start:stop, :, :num_tokens] = v

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
        for layer, block in enumerate(self.blocks):
            part = parts[PARTS * layer : PARTS * (layer + 1)]
            if self.join == "prefix":
                q, k, v = block.queries_keys_values(x, part, self.turn, layer)
                keys, values = rows.keys[layer, :num_frames], rows.values[layer, :num_frames]
                keys[:, :, num_tokens:] = k
                values[:, :, num_tokens:] = v
                k, v = keys, values
            elif self.joint and layer == len(self.blocks) - 1:
                # Nobody reads the context's half after the last block.
                q, k, v = block.queries_keys_values(x, part, self.turn_joint, layer, self.turn)
                x = x[:, num_tokens:]
            else:
                turn = self.turn_joint if self.joint else self.turn
                q, k, v = block.queries_keys_values(x, part, turn, layer)
            x = block.finish(x, self.attend(q, k, v), part)
        return self.head(x, parts, patches, time)

    def _joined(self, context: Tensor, x: Tensor) -> Tensor:
        if self.joint:
            return torch.cat([context, x], dim=1)
        if self.join == "channel_concat":
            return self.merge(torch.cat([x, context], dim=-1))
        return x + context
