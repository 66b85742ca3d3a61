"""Which keys a query may look at, told frame by frame; as a dense mask and as tiles.

Whole frames see whole frames, so a few numbers say what a mask of tokens squared would. SDPA wants
that mask, for one device; FlexAttention wants a function of two token indices and a list of the
tiles in which there is anything to see. Source: paper, section 1.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

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
        """Frames of the queries."""
        return self.num_frames - self.num_past

    @property
    def num_key_frames(self) -> int:
        """Frames of the keys."""
        return self.num_frames

    def mask_mod(self) -> MaskMod:
        """Return what is visible as a function of token indices."""
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
        """Frames of the queries."""
        return self.num_noisy

    @property
    def num_key_frames(self) -> int:
        """Frames of the keys."""
        return self.num_clean + self.num_noisy

    def mask_mod(self) -> MaskMod:
        """Return what is visible as a function of token indices."""
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
