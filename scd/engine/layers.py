"""What the fast engines are made of: linear maps, attention, transformer blocks, frames to tokens.

Projections are fused, weights lie as the machine reads them, a frame is modulated at once. The
plain twins are attention, block and embed of scd/models; tests compare the two.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from scd.common.runtime import return_freed_memory
from scd.models.attention import Rotary
from scd.models.block import LAYER_NORM_EPS, Block
from scd.models.config import Prediction
from scd.models.embed import FrameHead, TokenEmbedder
from scd.models.flow import SMALLEST_TIME

Activation = Literal["none", "gelu"]

Map = TypeVar("Map", bound="LinearMap")

PACKED_WEIGHTS = 2**18
"""From this many float32 weights on, there is only the packed layout on a CPU. Below, many rows
are multiplied by it and few by the plain matrix, which is kept too. Source: measured, docs/log.md.
"""

PACKED_PRODUCT = 2**19
"""Rows times weights of a float32 product from which on the packed layout is faster: it costs 9
microseconds more at each call, and then half the time. Source: measured, docs/log.md."""


class LinearMap:
    """What `activation(x W^T + b)` is computed by, without gradients."""

    in_features: int
    out_features: int

    def __init__(
        self, weight: Tensor, bias: Tensor, rows: int, activation: Activation = "none"
    ) -> None:
        """Lay the weights out.

        Args:
            weight: [out in], on the device and in the type of the products.
            bias: [out].
            rows: rows that a call will have; a hint for the layout, any number works.
            activation: "gelu" is the tanh approximation.
        """
        raise NotImplementedError

    @classmethod
    def stacked(
        cls: type[Map], *pairs: tuple[Tensor, Tensor], rows: int, activation: Activation = "none"
    ) -> Map:
        """Stack weights [out in] and biases [out] on top of each other."""
        weight = torch.cat([weight.detach() for weight, _ in pairs])
        bias = torch.cat([bias.detach() for _, bias in pairs])
        return cls(weight, bias, rows, activation)

    def __call__(self, x: Tensor) -> Tensor:
        """Map tokens [f s in] of frames to [f s out]."""
        raise NotImplementedError


class PackedLinear(LinearMap):
    """activation(x W^T + b), without gradients.

    On a CPU the weights are reordered once into the blocks that oneDNN's kernels read; a plain
    matrix would be reordered at every call, which costs a fifth of the time of a frame of 64
    tokens. Small float32 weights lie both ways, and the size of the product chooses. The activation
    is applied inside the product. Elsewhere it is an ordinary product.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, rows: int, activation: Activation = "none"
    ) -> None:
        """Reorder the weights."""
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.bias, self.activation = bias, activation
        packs = weight.device.type == "cpu" and _can_pack(weight)
        self.packed = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows) if packs else None
        )
        is_small = weight.dtype == torch.float32 and weight.numel() < PACKED_WEIGHTS
        self.plain = weight if is_small or not packs else None
        # Products of fewer entries of x take the plain matrix.
        self._few = -(-PACKED_PRODUCT // self.out_features) if is_small else 0
        self._fused = ("gelu", [], "tanh") if activation == "gelu" else ("none", [], "")

    @staticmethod
    def of(*layers: nn.Linear, rows: int, activation: Activation = "none") -> PackedLinear:
        pairs = [(layer.weight, layer.bias) for layer in layers]
        return PackedLinear.stacked(*pairs, rows=rows, activation=activation)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is not None and x.numel() >= self._few:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *self._fused)
        assert self.plain is not None
        y = functional.linear(x, self.plain, self.bias)
        return functional.gelu(y, approximate="tanh") if self.activation == "gelu" else y


def _can_pack(weight: Tensor) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        # Other processors have no instructions for it, and oneDNN refuses.
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def release(module: nn.Module) -> None:
    """Give up the weights of a module, so that a copy of them is the only one."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
    return_freed_memory()


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
    rotated = torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return rotated.to(x.dtype)


class NormedRotary:
    """Norm and rotary embedding of queries and keys at their positions, for a stack of layers.

    The learned weights of the norm and the scale of the logits are factors of the same entries, so
    they are multiplied into the cosines and sines: rotated = (x * straight + swapped(x) * crossed)
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
        return self.straight.shape[-2]

    def repeated(self, num: int) -> NormedRotary:
        """Return the same for `num` times the tokens, each time at the same places."""
        twin = copy.copy(self)
        twin.straight, twin.crossed = (
            table.repeat(1, 1, 1, 1, num, 1) for table in (self.straight, self.crossed)
        )
        return twin

    def both(self, layer: int, x: Tensor) -> Tensor:
        return self._rotated(layer, x, slice(0, 2))

    def queries(self, layer: int, x: Tensor) -> Tensor:
        return self._rotated(layer, x, slice(0, 1))

    def keys(self, layer: int, x: Tensor) -> Tensor:
        return self._rotated(layer, x, slice(1, 2))

    def _rotated(self, layer: int, x: Tensor, used: slice) -> Tensor:
        x = x.contiguous()
        # PyTorch's own rms_norm is a chain of passes on a CPU; the norm of each head is one.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor)
        rotated = x * self.straight[layer, used]
        return rotated.addcmul_(swap_halves(x), self.crossed[layer, used]).div_(norm)


def swap_halves(x: Tensor) -> Tensor:
    return x.roll(x.shape[-1] // 2, -1)


class Attention:
    """Attention of new tokens to all keys, by kernels chosen for the machine.

    On a CPU in bfloat16, two products and a softmax in place beat the fused kernel by 2, as long as
    their logits stay in the cache: so they are made for some heads at a time, in memory that is
    kept between calls. Logits are bfloat16 there; softmax is float32 inside.
    """

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, copies: int = 1
    ) -> Tensor:
        """Attend from scaled queries [f k n e] to all keys and values [f k s e].

        Args:
            q: already times the logits' scale.
            k: rotated; streams and heads may lie apart in memory, as in a ring.
            v: like k.
            bias: added to the logits, [1 s]; None: nothing.
            copies: how often the last key counts, where it stands for others like it; then there
                is no bias.
        """
        if copies > 1 and (q.device.type != "cpu" or q.dtype != torch.bfloat16):
            bias = torch.zeros(1, k.shape[2], device=q.device)
            bias[:, -1] = math.log(copies)
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
                if copies > 1:
                    logits[..., -1:].add_(math.log(copies))
                torch.softmax(logits, -1, out=logits)
                torch.mm(logits[0], v[start], out=read[start])
                continue
            torch.bmm(q[start:stop], k[start:stop].transpose(1, 2), out=logits)
            if copies > 1:
                logits[..., -1:].add_(math.log(copies))
            torch.softmax(logits, -1, out=logits)
            torch.bmm(logits, v[start:stop], out=read[start:stop])
        return read.unflatten(0, (streams, heads))

    def _room(self, entries: int, like: Tensor) -> Tensor:
        if self._scratch.numel() < entries or self._scratch.dtype != like.dtype:
            self._scratch = like.new_empty(entries)
        return self._scratch


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
                which not every token has one.
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
        self,
        x: Tensor,
        modulation: Parts,
        rotary: NormedRotary,
        layer: int,
        of_queries: NormedRotary | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values, each [f k n e], of tokens [f n d].

        Args:
            x: tokens.
            modulation: of this block.
            rotary: positions of the tokens.
            layer: of this block in `rotary`.
            of_queries: positions of the last tokens of each frame, where only those query; None:
                all do. Only for a block not fused.
        """
        normed = modulate(x, modulation[0], modulation[1])
        if self.fused:
            projected = self._heads(self.to_qkv(normed), 3)
            q, k = rotary.both(layer, projected[:2])
            return q, k, projected[2]
        projected = self._heads(self.to_kv(normed), 2)
        keys = rotary.keys(layer, projected[:1])[0]
        of_queries = of_queries or rotary
        queries = self._heads(self.to_q(normed[:, -of_queries.num_tokens :]), 1)
        return of_queries.queries(layer, queries)[0], keys, projected[1]

    def keys_values(
        self, x: Tensor, modulation: Parts, rotary: NormedRotary, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Return only rotated keys and values. Only for a fused block."""
        projected = self._heads(self.to_qkv(modulate(x, modulation[0], modulation[1])), 3)
        return rotary.keys(layer, projected[1:2])[0], projected[2]

    def finish(self, x: Tensor, read: Tensor, modulation: Parts) -> Tensor:
        """Add what attention read [f k n e], then the MLP, to the tokens [f n d] that queried."""
        read = read.transpose(1, 2).flatten(-2)
        x = torch.addcmul(x, modulation[2], self.to_out(read))
        hidden = self.rise(modulate(x, modulation[3], modulation[4]))
        return x.addcmul_(modulation[5], self.fall(hidden))

    def _heads(self, projected: Tensor, parts: int) -> Tensor:
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
    weight, bias = layer.weight.detach(), layer.bias.detach()
    heads = weight.t().unflatten(-1, (-1, head_dim))
    return by_halves(heads).flatten(-2).t(), by_halves(bias.unflatten(-1, (-1, head_dim))).flatten()


class FastEmbedder:
    """Patches of frames to tokens."""

    def __init__(self, embed: TokenEmbedder, rows: int, free: bool) -> None:
        self.project = PackedLinear.of(embed.project, rows=rows)
        self.positions = None if embed.positions is None else embed.positions.detach()
        if free:
            release(embed.project)

    def __call__(self, patches: Tensor) -> Tensor:
        tokens = self.project(patches.to(self.project.bias.dtype))
        return tokens if self.positions is None else tokens + self.positions


class FastHead:
    """Tokens to what the model predicts of noisy frames: their velocity, or the clean frames."""

    def __init__(self, head: FrameHead, rows: int, free: bool) -> None:
        self.project = PackedLinear.of(head.project, rows=rows)
        self.predict: Prediction = head.predict
        if free:
            release(head.project)

    def __call__(self, x: Tensor, modulation: Parts) -> Tensor:
        """Map tokens [f n d] after the last block to predictions [f n p], float32.

        The last two parts of the modulation are those of the norm: 1 + scale, shift.
        """
        return self.project(modulate(x, modulation[-1], modulation[-2])).float()

    def velocity(self, predicted: Tensor, patches: Tensor, time: Tensor) -> Tensor:
        """Turn a prediction for noisy frames [f n p], at times [f 1 1], into their velocity."""
        if self.predict == "velocity":
            return predicted
        return (patches - predicted) / time.clamp(SMALLEST_TIME)
