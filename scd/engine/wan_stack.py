"""Wan's transformer laid out for speed: linear maps packed, modulations in a table, text kept.

The plain twin is models/wan/transformer.py; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from scd.common.runtime import finest
from scd.data.clip import Conditions
from scd.engine.int8_cache import Int8KVCache
from scd.engine.layers import (
    PARTS,
    Attention,
    LinearMap,
    PackedLinear,
    Parts,
    by_halves,
    release,
    rotate_halves,
    split,
    swap_halves,
)
from scd.engine.modulation import Schedule, kept_for
from scd.models.attention import frame_positions, rotary_table
from scd.models.config import CacheConfig, Prediction
from scd.models.embed import to_patches
from scd.models.kv_cache import KVCache
from scd.models.wan.transformer import (
    TextKeysValues,
    WanAttention,
    WanBlock,
    WanFeedForward,
    WanTransformer,
)

Read = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""From a layer, and its queries, keys and values [f k s e], to what attention reads."""

Maps = type[LinearMap]
"""How linear maps are computed: as the weights are, or in 8 bits."""

ReadText = Callable[[int, Tensor], Tensor]
"""From a layer, and its queries [f k s e], to what attention to the text reads."""


class WanNorm:
    """Norm of queries or keys over all heads together, and their rotary embedding.

    The entries of a head lie by halves, as those of the maps before it.
    """

    def __init__(self, norm: nn.RMSNorm, head_dim: int, scale: float, dtype: torch.dtype) -> None:
        """Multiply the norm's weights by a scale, that of the logits for queries."""
        self.head_dim = head_dim
        weight = norm.weight.detach().float() * (scale * norm.weight.numel() ** 0.5)
        self.weight = by_halves(weight.view(-1, head_dim)).flatten().to(dtype)
        # A root mean square is the norm over sqrt(d), and its epsilon is a floor of the norm.
        assert norm.eps is not None
        self.floor = weight.new_tensor((norm.weight.numel() * norm.eps) ** 0.5)

    def __call__(self, x: Tensor, rotary: WanRotary | None = None) -> Tensor:
        """Return heads [f k s e] of tokens [f s d], which may be overwritten."""
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        x = (x * self.weight).div_(size.hypot_(self.floor).to(x.dtype))
        heads = x.unflatten(-1, (-1, self.head_dim))
        if rotary is not None:
            heads = (heads * rotary.straight).addcmul_(swap_halves(heads), rotary.crossed)
        return heads.transpose(1, 2)


class WanRotary:
    """Rotary embedding of tokens at their positions."""

    def __init__(self, rotary: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        """Take cosines and sines, [s e/2] or [f s e/2] for frames at places of their own."""
        cosine, sine = (part[..., :, None, :] for part in rotary)
        self.straight = torch.cat((cosine, cosine), -1).to(dtype)
        self.crossed = torch.cat((-sine, sine), -1).to(dtype)

    @property
    def num_tokens(self) -> int:
        return self.straight.shape[-3]

    def repeated(self, num: int) -> WanRotary:
        """Return the same for `num` times the tokens, each time at the same places."""
        twin = object.__new__(WanRotary)
        twin.straight, twin.crossed = (
            part.repeat(*[1] * (part.dim() - 3), num, 1, 1)
            for part in (self.straight, self.crossed)
        )
        return twin


def _by_halves_rows(layer: nn.Linear, head_dim: int) -> tuple[Tensor, Tensor]:
    weight, bias = layer.weight.detach(), layer.bias.detach()
    rows = torch.arange(len(bias), device=bias.device).view(-1, head_dim)
    order = by_halves(rows).flatten()
    return weight[order], bias[order]


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Normalise tokens [f s d], multiply by `scale`, add `shift`.

    Each is [d] or [f 1 d]; or [f m 1 d], where the tokens are m parts of their own modulation.
    """
    if shift.dim() == 1:
        # One modulation for all tokens is what a norm's own weights are for: one pass over x.
        return functional.layer_norm(x, x.shape[-1:], scale, shift, eps)
    normed = functional.layer_norm(x, x.shape[-1:], eps=eps)
    if shift.dim() == 3:
        return torch.addcmul(shift, normed, scale)
    return torch.addcmul(shift, _in_parts(normed, scale), scale).flatten(1, 2)


def _gated(x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    """Return x + gate * change; a gate as in `_modulate`."""
    if gate.dim() == 4:
        return torch.addcmul(_in_parts(x, gate), gate, _in_parts(change, gate)).flatten(1, 2)
    return torch.addcmul(x, gate, change)


def _in_parts(x: Tensor, modulation: Tensor) -> Tensor:
    return x.unflatten(1, (modulation.shape[1], -1))


class FastWanBlock:
    """The weights of one block, and its two halves on either side of self-attention."""

    def __init__(
        self,
        block: WanBlock,
        dtype: torch.dtype,
        rows: int,
        fused: bool,
        free: bool,
        maps: Maps = PackedLinear,
    ) -> None:
        """Lay the weights out.

        Args:
            block: the plain one.
            dtype: of the products.
            rows: tokens of a call, a hint.
            fused: queries, keys and values in one product. False: queries apart, for a block in
                which not every token has one.
            free: give up the plain block's weights.
            maps: how the linear maps are computed.
        """
        self.eps, self.fused = block.eps, fused
        own, words = block.attn1, block.attn2
        scale = own.head_dim**-0.5
        self.norm_q = WanNorm(own.norm_q, own.head_dim, scale, dtype)
        self.norm_k = WanNorm(own.norm_k, own.head_dim, 1.0, dtype)
        self.norm_text_q = WanNorm(words.norm_q, own.head_dim, scale, dtype)
        self.norm_text_k = WanNorm(words.norm_k, own.head_dim, 1.0, dtype)
        self.norm_before_text = None
        if block.norm2 is not None:
            norm = block.norm2.weight.detach(), block.norm2.bias.detach()
            self.norm_before_text = tuple(part.to(dtype) for part in norm)

        def packed(*pairs: tuple[Tensor, Tensor], rows: int = rows) -> LinearMap:
            return maps.stacked(*pairs, rows=rows)

        q, k = (_by_halves_rows(layer, own.head_dim) for layer in (own.to_q, own.to_k))
        v = own.to_v.weight, own.to_v.bias
        if fused:
            self.to_qkv = packed(q, k, v)
        else:
            self.to_q, self.to_kv = packed(q), packed(k, v)
        self.to_out = packed(_pair(own.to_out[0]))
        self._release(free, own)
        q, k = (_by_halves_rows(layer, own.head_dim) for layer in (words.to_q, words.to_k))
        self.text_q = packed(q)
        self.text_kv = packed(k, (words.to_v.weight, words.to_v.bias), rows=TEXT_ROWS)
        self.text_out = packed(_pair(words.to_out[0]))
        self._release(free, words)
        self.rise = maps.stacked(_pair(block.ffn.net[0].proj), rows=rows, activation="gelu")
        self.fall = packed(_pair(block.ffn.net[2]))
        self._release(free, block.ffn)

    @staticmethod
    def _release(free: bool, part: WanAttention | WanFeedForward) -> None:
        if free:
            release(part)

    def queries_keys_values(
        self, x: Tensor, parts: Parts, rotary: WanRotary, of_queries: WanRotary | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values, each [f k s e], of tokens [f s d].

        Args:
            x: tokens.
            parts: modulation of this block.
            rotary: positions of the tokens.
            of_queries: positions of the last tokens of each frame, where only those query; None:
                all do. Only for a block not fused.
        """
        normed = _modulate(x, parts[0], parts[1], self.eps)
        if self.fused:
            q, k, v = self.to_qkv(normed).chunk(3, dim=-1)
        else:
            k, v = self.to_kv(normed).chunk(2, dim=-1)
            if of_queries is not None:
                normed = normed[:, -of_queries.num_tokens :]
            q = self.to_q(normed)
        return self.norm_q(q, of_queries or rotary), self.norm_k(k, rotary), self._heads(v)

    def keys_values(self, x: Tensor, parts: Parts, rotary: WanRotary) -> tuple[Tensor, Tensor]:
        """Return only rotated keys, and values. Only for a block that is not fused."""
        k, v = self.to_kv(_modulate(x, parts[0], parts[1], self.eps)).chunk(2, dim=-1)
        return self.norm_k(k, rotary), self._heads(v)

    def text_keys_values(self, words: Tensor) -> TextKeysValues:
        """Return keys and values of an embedded text [b l d], each [b k l e]."""
        k, v = self.text_kv(words).chunk(2, dim=-1)
        return self.norm_text_k(k).contiguous(), self._heads(v).contiguous()

    def finish(
        self, x: Tensor, read: Tensor, parts: Parts, read_text: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Add what attention read [f k s e], then what the text says, then the MLP, to tokens."""
        x = _gated(x, parts[2], self.to_out(_joined(read)))
        normed = x
        if self.norm_before_text is not None:
            weight, bias = self.norm_before_text
            normed = functional.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        q = self.norm_text_q(self.text_q(normed))
        x.add_(self.text_out(_joined(read_text(q))))
        hidden = self.rise(_modulate(x, parts[3], parts[4], self.eps))
        return _gated(x, parts[5], self.fall(hidden))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.norm_k.head_dim)).transpose(1, 2)


TEXT_ROWS = 512
"""Tokens of a text, a hint for the layout of the maps that read it."""

TEXT_PIECE = 32
"""Tokens of a text are kept in pieces of so many: few shapes, and rows that kernels like."""


def tokens_kept(text: Tensor) -> int:
    """Return how many tokens of texts [b l c] are kept, the last of them for all after it.

    A text is filled up with zeros, which all have the same key and the same value: one of them,
    counted as often as it stands there, is read as they all would be. On a GPU all are kept, where
    that count would take attention off its fused kernels.
    """
    length = text.shape[1]
    if text.device.type != "cpu":
        return length
    filled = (text != 0).any(-1).any(0).nonzero()
    num_words = int(filled[-1]) + 1 if len(filled) else 0
    return min(-(-(num_words + 1) // TEXT_PIECE) * TEXT_PIECE, length)


def _pair(layer: nn.Module | Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, nn.Linear)
    return layer.weight, layer.bias


def _joined(read: Tensor) -> Tensor:
    return read.transpose(1, 2).flatten(-2)


class WanModulations:
    """Modulations of a stack of blocks and of the head: [parts d] per time, kept per schedule.

    Parts: of each block shift, 1 + scale and gate of attention, the same of its MLP; then of the
    head, where there is one, 1 + scale and shift.
    """

    def __init__(self, stack: WanTransformer, dtype: torch.dtype) -> None:
        """Take the tables of a stack; its small maps of times stay the plain ones."""
        self.embedder, self.dtype = stack.condition_embedder, dtype
        tables = [block.scale_shift_table.detach() for block in stack.blocks]  # type: ignore[union-attr]
        self.tables = torch.cat(tables).float()
        head = getattr(stack, "scale_shift_table", None)
        self.head = None if head is None else head.detach().float()
        self._kept: dict[Schedule, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(table.numel() * table.element_size() for table in self._kept.values())

    def at(self, times: Sequence[float], steering: Tensor | None = None) -> Tensor:
        """Return the modulations at each time, [times r parts d].

        Args:
            times: of the steps.
            steering: embedded actions of f frames [f d], for which nothing is kept; None: none.

        Returns:
            r is 1, or f with actions.
        """
        schedule = tuple(times)

        def make() -> Tensor:
            # In float64: the embedding shows the rounding of a float32 time.
            device = self.tables.device
            time = torch.tensor(schedule, dtype=finest(device), device=device)
            if steering is None:
                return self.of_each(time)[:, None]
            num = len(steering)
            each = self.of_each(time.repeat_interleave(num), steering.repeat(len(time), 1))
            return each.unflatten(0, (-1, num))

        return kept_for(schedule, self._kept, make) if steering is None else make()

    def of_each(self, time: Tensor, steering: Tensor | None = None) -> Tensor:
        """Return the modulation of frames at any times [f], [f parts d]: nothing is kept."""
        added = None if steering is None else steering[:, None]
        embedding, modulation = (part[:, 0] for part in self.embedder.times(time[:, None], added))
        blocks = self.tables + modulation.float()[:, None]
        blocks[:, :, 1::3] += 1
        parts = [blocks.flatten(1, 2)]
        if self.head is not None:
            shift, scale = (self.head + embedding.float()[:, None]).unbind(1)
            parts.append(torch.stack((1 + scale, shift), dim=1))
        return torch.cat(parts, dim=1).to(self.dtype)


class FastWanStack:
    """Embedders, modulations and blocks of a plain stack; rows f are frames side by side."""

    def __init__(
        self,
        stack: WanTransformer,
        free: bool,
        tokens: int,
        text_length: int,
        maps: Maps = PackedLinear,
    ) -> None:
        """Lay the weights out.

        Args:
            stack: the plain one: encoder, decoder or dense model.
            free: give up the plain weights.
            tokens: of a frame in the blocks, a hint.
            text_length: tokens of a text.
            maps: how the linear maps of the blocks are computed.
        """
        self.shape, self.block, self.text_length = stack.shape, stack.block, text_length
        self.like = stack.like.detach().new_empty(0)
        self.device, self.dtype = self.like.device, self.like.dtype
        self.attend = Attention()
        self.cache_kind: type[KVCache] = KVCache if maps is PackedLinear else Int8KVCache
        patch = stack.patch_embedding
        assert patch.bias is not None
        embed = patch.weight.detach().flatten(1), patch.bias.detach()
        self.embed_patches = PackedLinear.stacked(embed, rows=stack.shape.num_tokens)
        self.embed_text = stack.condition_embedder.text_embedder
        self.modulations = WanModulations(stack, self.dtype)
        # Of the last block somebody may read only some tokens, or only keys and values.
        last = len(stack.blocks) - 1
        self.blocks = [
            FastWanBlock(block, self.dtype, tokens, layer < last, free, maps)  # type: ignore[arg-type]
            for layer, block in enumerate(stack.blocks)
        ]

    def new_cache(self, config: CacheConfig, batch: int, frames_per_block: int = 1) -> KVCache:
        """Allocate the KV cache of a batch of streams."""
        return self.cache_kind(
            config.in_blocks(frames_per_block),
            self.block,
            num_layers=len(self.blocks),
            batch=batch,
            tokens_per_frame=self.shape.num_tokens * frames_per_block,
            like=self.like,
            rotate=rotate_halves,
        )

    def rotary(self, frames: Sequence[Sequence[int]]) -> WanRotary:
        """Tabulate the positions of frames, those of one stream in a row, of one or more streams.

        Streams that all stand at the same places share one table.
        """
        same = all(list(each) == list(frames[0]) for each in frames)
        places = [list(each) for each in (frames[:1] if same else frames)]
        positions = frame_positions(
            torch.tensor([place for each in places for place in each]).to(self.device),
            self.shape.rows,
            self.shape.columns,
        )
        tables = rotary_table(positions, self.block.rotary_axes, self.block.rotary_theta)
        if not same:
            cosine, sine = (part.unflatten(0, (len(places), -1)) for part in tables)
            tables = cosine, sine
        return WanRotary(tables, self.dtype)

    def embed(self, patches: Tensor) -> Tensor:
        return self.embed_patches(patches.to(self.dtype))

    def tokens(self, frames: Tensor) -> Tensor:
        """Cut frames [f *m c h w] into tokens [f s d]."""
        patches = to_patches(frames.float(), self.shape.patch_size)
        return self.embed(patches.flatten(1, -2))

    def text_keys_values(self, text: Tensor) -> list[TextKeysValues]:
        """Embed a text [b l c]; return keys and values in every layer of what `tokens_kept` says.

        They are read by `attend_to_text`.
        """
        words = self.embed_text(text[:, : tokens_kept(text)].to(self.dtype))
        return [block.text_keys_values(words) for block in self.blocks]

    def attend_to_text(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to a text, the last of whose keys [f k s e] stands for all that are not kept."""
        return self.attend(q, k, v, copies=self.text_length - k.shape[2] + 1)

    def steering(self, conditions: Conditions) -> Tensor | None:
        """Embed the actions of frames, [f m d]; None: no actions steer the model."""
        return self.modulations.embedder.steering(conditions)

    def parts_at(self, time: float, steering: Tensor | None = None) -> Parts:
        """Return the modulation of frames at a time; `steering` as by `steering`."""
        return self.parts_of(self.modulations_at((time,), steering)[0], steering)

    def modulations_at(self, times: Sequence[float], steering: Tensor | None) -> Tensor:
        """Return the modulations at each time, [times r parts d]; r is 1 or f * m."""
        return self.modulations.at(times, None if steering is None else steering.flatten(0, 1))

    @staticmethod
    def parts_of(modulation: Tensor, steering: Tensor | None) -> Parts:
        """Cut modulations [r parts d] of frames that are steered so into parts."""
        if steering is None or steering.shape[1] == 1:
            return split(modulation)
        by_frame = modulation.unflatten(0, steering.shape[:2])
        return by_frame[:, :, :, None].unbind(2)

    def run_layer(
        self,
        layer: int,
        x: Tensor,
        parts: Parts,
        rotary: WanRotary,
        read: Read,
        read_text: ReadText,
    ) -> Tensor:
        """Run one layer over tokens [f s d]; `parts` are the modulations of all layers."""
        block, part = self.blocks[layer], part_of(parts, layer)
        q, k, v = block.queries_keys_values(x, part, rotary)
        return block.finish(x, read(layer, q, k, v), part, lambda q: read_text(layer, q))

    def keys_values(
        self, layer: int, x: Tensor, parts: Parts, rotary: WanRotary
    ) -> tuple[Tensor, Tensor]:
        """Return only keys and values of the last layer: all that is needed of it."""
        return self.blocks[layer].keys_values(x, part_of(parts, layer), rotary)


def part_of(parts: Parts, layer: int) -> Parts:
    """Return the modulation of one block."""
    return parts[PARTS * layer : PARTS * (layer + 1)]


class FastWanHead:
    """Tokens to velocities, as patches in the order of `to_patches`."""

    predict: Prediction = "velocity"

    def __init__(self, stack: WanTransformer, free: bool) -> None:
        shape, self.eps = stack.shape, stack.block.eps
        weight, bias = stack.proj_out.weight.detach(), stack.proj_out.bias.detach()
        # The channel stands last within a patch there, and first in `to_patches`.
        order = rearrange(
            torch.arange(shape.token_dim, device=bias.device),
            "(p q c) -> (c p q)",
            p=shape.patch_size,
            q=shape.patch_size,
        )
        self.project = PackedLinear(weight[order], bias[order], shape.num_tokens)
        if free:
            release(stack.proj_out)

    def __call__(self, x: Tensor, parts: Parts) -> Tensor:
        """Map tokens [f s d] to velocities [f s p], float32."""
        return self.project(_modulate(x, parts[-1], parts[-2], self.eps)).float()
