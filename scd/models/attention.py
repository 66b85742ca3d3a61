"""Attention over tokens at (frame, row, column): rotary embedding, visibility, kernels.

The only caller of PyTorch's attention kernels but for engine/layers.py, and for
probing/intercept.py, which passes on what it has looked at.

Whole frames see whole frames, so a few numbers say what a mask of tokens squared would. SDPA wants
that mask, for one device; FlexAttention wants a function of two token indices and a list of the
tiles in which there is anything to see. Source: paper (block, encoder).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from scd.common.runtime import finest

MASKED_TOKENS = 16_384
"""Queries beyond which a dense mask is never made: it would take a gigabyte and more."""

Rotary = tuple[Float[Tensor, "s half"], Float[Tensor, "s half"]]
"""Cosines and sines of every token's angles, one for each pair of entries of a head."""

PLAIN_KEYS = 128
"""Up to this many keys, products and a softmax beat the fused kernel's backward pass on a CPU in
bfloat16. Source: measured, docs/log.md."""

FLEX_HEAD_DIMS = (16, 32, 64, 128)
"""Widths of a head for which FlexAttention is used: its kernels need 16 or more, and older ones a
power of two."""


TILE = 128
"""Tokens along each side of a tile of FlexAttention: its own default."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From batch, head, query and key index to whether the query sees the key.

The functions below are lambdas of plain integers: they are compiled, which a decorated function
(the tests' shape checks decorate all that have a `def`) would get in the way of."""

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""From a logit and the four indices to the logit that is used."""


@dataclass(frozen=True, kw_only=True)
class FrameCausal:
    """Every token sees the tokens of its own block of frames and of earlier ones."""

    num_frames: int
    """Frames of the keys."""
    num_past: int = 0
    """Frames in front that are keys only, as in a cache; the queries are of the frames after."""
    tokens_per_frame: int
    """Tokens of a frame."""
    frames_per_block: int = 1
    """Frames that see each other, the later ones too."""
    num_local: int = 0
    """Frames that a block sees, those before it that are newest, its own included. 0: all."""

    @property
    def num_query_frames(self) -> int:
        return self.num_frames - self.num_past

    @property
    def num_key_frames(self) -> int:
        return self.num_frames

    def mask_mod(self) -> MaskMod:
        past, size = self.num_past, self.tokens_per_frame
        if self.frames_per_block == 1 and self.num_local == 0:
            return lambda batch, head, query, key: query // size + past >= key // size
        block, local = self.frames_per_block, self.num_local or self.num_frames
        return lambda batch, head, query, key: (
            ((query // size + past) // block >= (key // size) // block)
            & (((query // size + past) // block + 1) * block - key // size <= local)
        )


@dataclass(frozen=True, kw_only=True)
class TeacherForcing:
    """Tokens of noisy frames see the clean frames before their block, and their own noisy block.

    Queries are the noisy frames; keys are the clean frames 0 .., then the noisy ones.
    """

    num_clean: int
    """Clean frames; may be 0."""
    first_noisy: int
    """Frame position of the first noisy frame."""
    num_noisy: int
    """Noisy frames."""
    tokens_per_frame: int
    """Tokens of a frame."""
    frames_per_block: int = 1
    """Frames that see each other; a block begins with the first noisy frame."""

    @property
    def num_query_frames(self) -> int:
        return self.num_noisy

    @property
    def num_key_frames(self) -> int:
        return self.num_clean + self.num_noisy

    def mask_mod(self) -> MaskMod:
        clean, first, size = self.num_clean, self.first_noisy, self.tokens_per_frame
        block = self.frames_per_block
        if block == 1:
            return lambda batch, head, query, key: (
                ((key // size < clean) & (key // size < query // size + first))
                | (key // size - clean == query // size)
            )
        # Below 0, where the key is a clean frame, the quotient is below that of every query.
        return lambda batch, head, query, key: (
            ((key // size < clean) & (key // size < query // size // block * block + first))
            | ((key // size - clean) // block == query // size // block)
        )


Visibility = FrameCausal | TeacherForcing
"""What the queries of one attention may look at."""


@dataclass(frozen=True, kw_only=True)
class DistanceBias:
    """Slope times (key frame - query frame), added to the attention logits. Source: FAR."""

    slope: float
    """Added to the logit per frame by which the key is later than the query."""
    query_frames: tuple[int, ...]
    """Frame position of each frame of the queries."""
    key_frames: tuple[int, ...]
    """Frame position of each frame of the keys."""
    tokens_per_frame: int
    """Tokens of a frame."""


# Few: a mask of 144 frames of 64 tokens is 85 MB.
@lru_cache(maxsize=4)
def dense_mask(visible: Visibility, device: torch.device) -> Bool[Tensor, "s s2"]:
    """Return what is visible for every pair of tokens (True = visible)."""
    frames = _frame_mask(visible, visible.num_query_frames, visible.num_key_frames).to(device)
    return _per_token(frames, visible.tokens_per_frame)


@lru_cache(maxsize=2)
def dense_bias(bias: DistanceBias, device: torch.device) -> Float[Tensor, "s s2"]:
    """Return the bias of every pair of tokens. Only the last two are kept: streams move on."""
    queries = torch.tensor(bias.query_frames, device=device)
    keys = torch.tensor(bias.key_frames, device=device)
    frames = bias.slope * (keys[None, :] - queries[:, None]).float()
    return _per_token(frames, bias.tokens_per_frame)


@lru_cache(maxsize=32)
def block_mask(visible: Visibility, device: torch.device) -> BlockMask:
    """Return what is visible as FlexAttention's tiles, for lengths `padded` to whole tiles.

    The tiles are counted over frames: PyTorch's own `create_block_mask` goes by way of the dense
    mask, which takes gigabytes at 300 frames.
    """
    some, every = _tiles(visible)
    numbers, indices = _listed(some & ~every, device)
    full_numbers, full_indices = _listed(every, device)
    return BlockMask.from_kv_blocks(
        numbers,
        indices,
        full_numbers,
        full_indices,
        BLOCK_SIZE=TILE,
        mask_mod=visible.mask_mod(),
        seq_lengths=(some.shape[0] * TILE, some.shape[1] * TILE),
    )


@lru_cache(maxsize=32)
def score_mod(bias: DistanceBias, device: torch.device) -> ScoreMod:
    """Return the bias as FlexAttention's change of a logit, for lengths `padded` to whole tiles."""
    query_bias, key_bias = (
        padded((bias.slope * frames).repeat_interleave(bias.tokens_per_frame)[:, None])[:, 0]
        for frames in (
            torch.tensor(bias.query_frames, dtype=torch.float32, device=device),
            torch.tensor(bias.key_frames, dtype=torch.float32, device=device),
        )
    )
    return lambda score, batch, head, query, key: score + (key_bias[key] - query_bias[query])


def padded(x: Float[Tensor, "*b s e"]) -> Float[Tensor, "*b s2 e"]:
    """Fill up to whole tiles with zeros. No token sees a key that was filled in.

    FlexAttention takes other lengths too, but its backward pass has given NaN where they meet a
    mask and a bias. Source: github.com/pytorch/pytorch/issues/153799.
    """
    missing = -x.shape[-2] % TILE
    return functional.pad(x, (0, 0, 0, missing)) if missing else x


def forget() -> None:
    """Drop all that is kept; for who has built masks without numbers."""
    for kept in (dense_mask, dense_bias, block_mask, score_mod):
        kept.cache_clear()


def _frame_mask(visible: Visibility, num_queries: int, num_keys: int) -> Bool[Tensor, "t t2"]:
    size, none = visible.tokens_per_frame, torch.zeros((), dtype=torch.long)
    queries, keys = torch.arange(num_queries) * size, torch.arange(num_keys) * size
    return visible.mask_mod()(none, none, queries[:, None], keys[None, :])


def _per_token(frames: Tensor, tokens_per_frame: int) -> Tensor:
    return frames.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)


def _tiles(visible: Visibility) -> tuple[Bool[Tensor, "i j"], Bool[Tensor, "i j"]]:
    """Tell in which tiles some pair of tokens is visible, and in which every pair is.

    By the sums of all frame pairs above and left of a corner, so that four of them count the
    frame pairs that a tile touches.
    """
    size = visible.tokens_per_frame
    spans = []
    for num_frames in (visible.num_query_frames, visible.num_key_frames):
        starts = torch.arange(0, num_frames * size, TILE)
        spans.append((starts // size, (starts + TILE - 1) // size + 1))
    (top, bottom), (left, right) = spans
    frames = _frame_mask(visible, int(bottom[-1]), int(right[-1]))
    sums = functional.pad(frames.long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    touched = (bottom - top)[:, None] * (right - left)[None, :]
    count = sums[bottom][:, right] - sums[top][:, right] - sums[bottom][:, left]
    count = count + sums[top][:, left]
    return count > 0, count == touched


def _listed(tiles: Bool[Tensor, "i j"], device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of True in each row, and the columns with those of the True ones first."""
    order = tiles.long().argsort(dim=-1, descending=True, stable=True)
    counts, order = (part.to(device, torch.int32)[None, None] for part in (tiles.sum(-1), order))
    return counts, order


def rotary_table(positions: Int[Tensor, "s 3"], axes: tuple[int, int, int], theta: float) -> Rotary:
    """Tabulate the rotary angles of tokens at integer (frame, row, column) positions.

    Args:
        positions: of each token; any integer, negative ones too.
        axes: entries of a head given to frame, row and column; each even.
        theta: longest wavelength of each axis over 2 pi.

    Returns:
        Float32 cosines and sines; the angles themselves are computed in float64, because float32
        merges neighbouring frames of a long stream.
    """
    angles = [
        positions[:, axis, None] * _frequencies(size, theta, positions.device)
        for axis, size in enumerate(axes)
    ]
    joined = torch.cat(angles, dim=-1)
    return joined.cos().float(), joined.sin().float()


def _frequencies(size: int, theta: float, device: torch.device) -> Tensor:
    exponents = torch.arange(0, size, 2, dtype=finest(device), device=device) / max(size, 1)
    return theta**-exponents


def frame_positions(frames: Int[Tensor, " t"], rows: int, columns: int) -> Int[Tensor, "s 3"]:
    """List the (frame, row, column) of every token, frame by frame, row by row."""
    grid = torch.cartesian_prod(
        frames,
        torch.arange(rows, device=frames.device),
        torch.arange(columns, device=frames.device),
    )
    return grid.view(-1, 3)


def rotate(x: Float[Tensor, "b k s e"], rotary: Rotary) -> Float[Tensor, "b k s e"]:
    """Turn each interleaved pair of entries by its token's angle, in float32 or, if x is, finer."""
    cosine, sine = rotary
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = exact.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def attend(
    q: Float[Tensor, "b k s e"],
    k: Float[Tensor, "b k s2 e"],
    v: Float[Tensor, "b k s2 e"],
    visible: Visibility | None = None,
    bias: DistanceBias | None = None,
) -> Float[Tensor, "b k s e"]:
    """Attend with logits q k / sqrt(e) + bias, over the visible keys.

    Args:
        q: queries; rows that see no key at all are not allowed.
        k: keys, already rotated.
        v: values.
        visible: where a query may look; None: everywhere. No mask is the fastest path, so callers
            pass None wherever all is visible.
        bias: added to the logits of visible keys; None: nothing.
    """
    dtype = v.dtype
    q, k = q.to(dtype), k.to(dtype)
    if visible is not None and _trains_on_tiles(q):
        return _flex(q, k, v, visible, bias, _compiled_flex())
    mask = None if visible is None else dense_mask(visible, q.device)
    if bias is not None:
        added = dense_bias(bias, q.device).to(dtype)
        mask = added if mask is None else added.masked_fill(~mask, float("-inf"))
    short = k.shape[-2] <= PLAIN_KEYS and q.device.type == "cpu" and dtype == torch.bfloat16
    if short and q.requires_grad:
        return explicit_attention(q, k, v, mask)
    # A two-axis mask is passed with four axes: the CPU's fused kernel refuses other ranks.
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=None if mask is None else mask[None, None]
    )


def _trains_on_tiles(q: Tensor) -> bool:
    """Whether FlexAttention is used where there is a mask: on a GPU, in training.

    Without gradients only for very many tokens: a stream begins with any number of frames, and each
    number would be compiled anew. Not where there is no Triton to compile with, as on Windows.
    """
    can = q.device.type == "cuda" and q.shape[-1] in FLEX_HEAD_DIMS
    wants = torch.is_grad_enabled() or q.shape[-2] > MASKED_TOKENS
    return can and wants and find_spec("triton") is not None


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    """FlexAttention, compiled at its first call for each visibility and size.

    After 8 of them in one process (PyTorch's recompile_limit) PyTorch warns and computes all
    logits instead.
    """
    return torch.compile(flex_attention, dynamic=False)


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visibility,
    bias: DistanceBias | None,
    kernel: Callable[..., Any],
) -> Tensor:
    """Attend by FlexAttention, which skips tiles where nothing is visible and keeps no mask.

    Lengths that are no multiple of its tiles are filled up, see `padded`. Tests compare it with the
    plain formula: forwards on a CPU; its gradients only those marked `gpu`, it has none on a CPU.
    """
    read = kernel(
        padded(q),
        padded(k),
        padded(v),
        score_mod=None if bias is None else score_mod(bias, q.device),
        block_mask=block_mask(visible, q.device),
    )
    return read[:, :, : q.shape[-2]]


def explicit_attention(
    q: Float[Tensor, "b k s e"],
    k: Float[Tensor, "b k s2 e"],
    v: Float[Tensor, "b k s2 e"],
    mask: Bool[Tensor, "s s2"] | Float[Tensor, "s s2"] | None,
) -> Float[Tensor, "b k s e"]:
    """Attend by two products and a float32 softmax: the plain twin of the fused kernel."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        logits = logits + mask
    return logits.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def split_heads(x: Float[Tensor, "b s d"], head_dim: int) -> Float[Tensor, "b k s e"]:
    return rearrange(x, "b s (k e) -> b k s e", e=head_dim)


def join_heads(x: Float[Tensor, "b k s e"]) -> Float[Tensor, "b s d"]:
    return rearrange(x, "b k s e -> b s (k e)")
