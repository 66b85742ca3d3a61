"""Attention of the fast path: norm and rotation in few passes, products chosen by length.

The plain twin is models/attention.py; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from scd.models.attention import Rotary, frame_positions, rotary_table
from scd.models.block import LAYER_NORM_EPS
from scd.models.config import BlockConfig, FrameShape
from scd.models.kv_cache import KVCache

SCRATCH_ENTRIES = 2**20
"""Logits held at a time: what stays in a CPU's cache. Source: measured, docs/log.md."""


def by_halves(x: Tensor) -> Tensor:
    """Reorder the entries of heads [... e] from rotated pairs (2i, 2i + 1) to (i, i + e/2).

    Products of queries and keys do not care for the order, and halves are swapped six times faster
    than neighbours.
    """
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def rotate_halves(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair of entries i and i + e/2 by its token's angle, in float32."""
    cosine, sine = rotary
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return turned.to(x.dtype)


class Turn:
    """Norm and rotation of queries and keys at their positions, for a stack of layers.

    The learned weights of the norm and the scale of the logits are factors of the same entries, so
    they are multiplied into the cosines and sines: turned = (x * straight + swapped(x) * crossed)
    / |x|, where swapped exchanges the halves of a head.
    """

    def __init__(self, norm_weights: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        """Tabulate.

        Args:
            norm_weights: [l 2 e]: of queries (times the logits' scale) and keys, in each layer, by
                halves.
            rotary: cosines and sines of the tokens, [n e/2], or [f 1 n e/2] for frames side by side
                at places of their own.
        """
        cosine, sine = rotary
        size = norm_weights.shape[-1]
        # A root mean square is the norm over sqrt(e), and its epsilon is a floor of the norm.
        self.floor = norm_weights.new_tensor((size * LAYER_NORM_EPS) ** 0.5)
        weights = size**0.5 * norm_weights.float()[:, :, None, None, None]
        self.straight = (weights * torch.cat((cosine, cosine), -1)).to(norm_weights.dtype)
        crossed = swap_halves(weights) * torch.cat((-sine, sine), -1)
        self.crossed = crossed.to(norm_weights.dtype)

    @property
    def num_tokens(self) -> int:
        """Tokens whose positions are tabulated."""
        return self.straight.shape[-2]

    def both(self, layer: int, x: Tensor) -> Tensor:
        """Normalise and turn queries and keys [2 f k n e]."""
        return self._turned(layer, x, slice(0, 2))

    def queries(self, layer: int, x: Tensor) -> Tensor:
        """Normalise and turn queries alone, [1 f k n e]."""
        return self._turned(layer, x, slice(0, 1))

    def keys(self, layer: int, x: Tensor) -> Tensor:
        """Normalise and turn keys alone, [1 f k n e]."""
        return self._turned(layer, x, slice(1, 2))

    def _turned(self, layer: int, x: Tensor, used: slice) -> Tensor:
        x = x.contiguous()
        # PyTorch's own rms_norm is a chain of passes on a CPU; the norm of each head is one.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor)
        turned = x * self.straight[layer, used]
        return turned.addcmul_(swap_halves(x), self.crossed[layer, used]).div_(norm)


def swap_halves(x: Tensor) -> Tensor:
    """Exchange the halves of the last axis."""
    return x.roll(x.shape[-1] // 2, -1)


class Attention:
    """Attention of new tokens to all keys, by kernels chosen for the machine.

    On a CPU in bfloat16, two products and a softmax in place beat the fused kernel by 2, as long as
    their logits stay in the cache: so they are made for some heads at a time, in memory that is
    kept between calls. Logits are bfloat16 there; softmax is float32 inside.
    """

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attend from scaled queries [f k n e] to all keys and values [f k s e].

        Args:
            q: already times the logits' scale.
            k: rotated; streams and heads may lie apart in memory, as in a ring.
            v: like k.
            bias: added to the logits, [1 s]; None: nothing.
        """
        if q.device.type != "cpu" or q.dtype != torch.bfloat16 or bias is not None:
            mask = None if bias is None else bias.to(q.dtype)[None, None]
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        num_keys, num_queries = k.shape[2], q.shape[2]
        streams, heads = q.shape[:2]
        num_heads = streams * heads
        # A batched product copies a ring that is not full; one per head reads it in place.
        together = max(1, min(SCRATCH_ENTRIES // (num_queries * num_keys), num_heads))
        if not k.is_contiguous() and num_queries * num_keys * num_heads > SCRATCH_ENTRIES:
            together = 1
        scratch = self._room(together * num_queries * num_keys, q)
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        read = torch.empty_like(q, memory_format=torch.contiguous_format)
        for start in range(0, num_heads, together):
            stop = min(start + together, num_heads)
            size = (stop - start) * num_queries * num_keys
            logits = scratch[:size].view(stop - start, num_queries, num_keys)
            if together == 1:
                torch.mm(q[start], k[start].t(), out=logits[0])
                torch.softmax(logits, -1, out=logits)
                torch.mm(logits[0], v[start], out=read[start])
                continue
            torch.bmm(q[start:stop], k[start:stop].transpose(1, 2), out=logits)
            torch.softmax(logits, -1, out=logits)
            torch.bmm(logits, v[start:stop], out=read[start:stop])
        return read.unflatten(0, (streams, heads))

    def _room(self, entries: int, like: Tensor) -> Tensor:
        if self._scratch.numel() < entries or self._scratch.dtype != like.dtype:
            self._scratch = like.new_empty(entries)
        return self._scratch


def frame_turn(norm_weights: Tensor, frame: int, shape: FrameShape, block: BlockConfig) -> Turn:
    """Tabulate the turn of all tokens of one frame of a stream."""
    # Not torch.tensor, which would wait for a GPU.
    frames = torch.full((1,), frame, dtype=torch.long, device=norm_weights.device)
    positions = frame_positions(frames, shape.rows, shape.columns)
    return Turn(norm_weights, rotary_table(positions, block.rotary_axes, block.rotary_theta))


def frames_turn(
    norm_weights: Tensor, frames: Sequence[int], shape: FrameShape, block: BlockConfig
) -> Turn:
    """Tabulate the turn of all tokens of frames side by side, each at its place in its stream."""
    places = torch.tensor(frames, dtype=torch.long).to(norm_weights.device, non_blocking=True)
    positions = frame_positions(places, shape.rows, shape.columns)
    cosine, sine = (
        table.unflatten(0, (len(frames), 1, -1))
        for table in rotary_table(positions, block.rotary_axes, block.rotary_theta)
    )
    return Turn(norm_weights, (cosine, sine))


def key_bias(block: BlockConfig, frame: int, cache: KVCache, num_tokens: int) -> Tensor | None:
    """Return the bias over frame distance of a new frame to all in memory, [1 s]; or None."""
    if block.distance_bias == 0:
        return None
    distance = torch.tensor(cache.positions_with([frame]), device=cache.keys.device) - frame
    return (block.distance_bias * distance.float()).repeat_interleave(num_tokens)[None]
