"""A transformer block laid out for speed: fused projections, modulation of a whole frame at once.

The plain twin is models/block.py; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from scd.engine.attention import Turn, by_halves
from scd.engine.linear import PackedLinear, release
from scd.models.block import LAYER_NORM_EPS, Block

PARTS = 6
"""Modulation of a block: shift, 1 + scale and gate of its attention, then of its MLP."""


Parts = tuple[Tensor, ...]
"""Modulations one by one, in the order of `Modulations`."""


class FastBlock:
    """The weights of one block, and its two halves on either side of attention.

    Rows f are frames side by side. A modulation is a block's six parts, each [d] for all frames or
    [f 1 d]: see `split`.
    """

    def __init__(self, block: Block, rows: int, fused: bool = True, free: bool = False) -> None:
        """Lay the weights out.

        Args:
            block: the plain one.
            rows: tokens of a call, a hint.
            fused: queries, keys and values in one product. False: queries apart, for a block in
                which not every token asks.
            free: give up the plain block's weights.
        """
        attention = block.attention
        self.head_dim = attention.head_dim
        q = _rows_by_halves(attention.to_q, self.head_dim)
        k = _rows_by_halves(attention.to_k, self.head_dim)
        v = attention.to_v.weight, attention.to_v.bias
        if fused:
            self.to_qkv = PackedLinear.stacked(q, k, v, rows=rows)
        else:
            self.to_q = PackedLinear.stacked(q, rows=rows)
            self.to_kv = PackedLinear.stacked(k, v, rows=rows)
        self.fused = fused
        self.to_out = PackedLinear.of(attention.to_out, rows=rows)
        if free:
            for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out):
                release(layer)
        rise, _, fall = block.mlp
        assert isinstance(rise, nn.Linear) and isinstance(fall, nn.Linear)
        self.rise = PackedLinear.of(rise, rows=rows, activation="gelu")
        self.fall = PackedLinear.of(fall, rows=rows)
        if free:
            release(block.mlp)

    def queries_keys_values(
        self, x: Tensor, modulation: Parts, turn: Turn, layer: int, asking: Turn | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return turned queries and keys, and values, each [f k n e], of tokens [f n d].

        Args:
            x: tokens.
            modulation: of this block.
            turn: positions of the tokens.
            layer: of this block in `turn`.
            asking: positions of the last tokens of each frame, those that ask; None: all ask.
                Only for a block not fused.
        """
        normed = modulate(x, modulation[0], modulation[1])
        if self.fused:
            projected = self._heads(self.to_qkv(normed), 3)
            q, k = turn.both(layer, projected[:2])
            return q, k, projected[2]
        projected = self._heads(self.to_kv(normed), 2)
        keys = turn.keys(layer, projected[:1])[0]
        asking = asking or turn
        asked = self._heads(self.to_q(normed[:, -asking.num_tokens :]), 1)
        return asking.queries(layer, asked)[0], keys, projected[1]

    def keys_values(
        self, x: Tensor, modulation: Parts, turn: Turn, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Return only turned keys and values. Only for a fused block."""
        projected = self._heads(self.to_qkv(modulate(x, modulation[0], modulation[1])), 3)
        return turn.keys(layer, projected[1:2])[0], projected[2]

    def finish(self, x: Tensor, read: Tensor, modulation: Parts) -> Tensor:
        """Add what attention read [f k n e], then the MLP, to the tokens [f n d] that asked."""
        read = read.transpose(1, 2).flatten(-2)
        x = torch.addcmul(x, modulation[2], self.to_out(read))
        hidden = self.rise(modulate(x, modulation[3], modulation[4]))
        return x.addcmul_(modulation[5], self.fall(hidden))

    def _heads(self, projected: Tensor, parts: int) -> Tensor:
        """Cut [f n (parts k e)] into [parts f k n e]."""
        cut = projected.unflatten(-1, (parts, -1, self.head_dim))
        return cut.permute(2, 0, 3, 1, 4)


def split(modulation: Tensor) -> Parts:
    """Cut modulations [r parts d] into parts: each [d] for one row, else [r 1 d]."""
    if modulation.shape[0] == 1:
        return modulation[0].unbind(0)
    return modulation[:, :, None].unbind(1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise tokens [f n d], multiply by `scale`, add `shift`; each [d] or [f 1 d]."""
    if shift.dim() == 1:
        # One modulation for all tokens is what a norm's own weights are for: one pass over x.
        return functional.layer_norm(x, x.shape[-1:], scale, shift, LAYER_NORM_EPS)
    normed = functional.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
    return torch.addcmul(shift, normed, scale)


def blocks_of(layers: nn.ModuleList) -> list[Block]:
    """Return the plain blocks of a stack."""
    return [layer for layer in layers if isinstance(layer, Block)]


def norm_weights(blocks: Sequence[Block]) -> Tensor:
    """Stack the norms' weights of queries, times the scale of the logits, and of keys: [l 2 e]."""
    weights = [
        torch.stack(
            [block.attention.q_norm * block.attention.head_dim**-0.5, block.attention.k_norm]
        )
        for block in blocks
    ]
    return by_halves(torch.stack(weights).detach())


def _rows_by_halves(layer: nn.Linear, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a projection to heads whose entries are reordered by halves."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    heads = weight.t().unflatten(-1, (-1, head_dim))
    return by_halves(heads).flatten(-2).t(), by_halves(bias.unflatten(-1, (-1, head_dim))).flatten()
