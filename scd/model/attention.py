"""Attention over tokens at (frame, row, column): rotary positions, masks, the attention itself.

The only caller of PyTorch's attention kernels. Source: paper, sections 1.2 and 1.3.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

Rotary = tuple[Float[Tensor, "s half"], Float[Tensor, "s half"]]
"""Cosines and sines of every token's angles, one for each pair of entries of a head."""

PLAIN_KEYS = 128
"""Up to this many keys, products and a softmax beat the fused kernel's backward pass on a CPU in
bfloat16. Source: measured, docs/log.md."""


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
        positions[:, axis, None].double() * _frequencies(size, theta, positions.device)
        for axis, size in enumerate(axes)
    ]
    joined = torch.cat(angles, dim=-1)
    return joined.cos().float(), joined.sin().float()


def _frequencies(size: int, theta: float, device: torch.device) -> Tensor:
    exponents = torch.arange(0, size, 2, dtype=torch.float64, device=device) / max(size, 1)
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
    """Turn each interleaved pair of entries by its token's angle, in float32."""
    cosine, sine = rotary
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).to(x.dtype)


@lru_cache(maxsize=32)
def frame_causal_mask(
    num_frames: int, tokens_per_frame: int, device: torch.device
) -> Bool[Tensor, "s s2"]:
    """Allow every token the tokens of its own and of earlier frames (True = visible)."""
    frame = torch.arange(num_frames, device=device).repeat_interleave(tokens_per_frame)
    return frame[:, None] >= frame[None, :]


@lru_cache(maxsize=32)
def teacher_forcing_mask(
    num_clean: int, first_noisy: int, num_noisy: int, tokens_per_frame: int, device: torch.device
) -> Bool[Tensor, "s s2"]:
    """Allow tokens of noisy frames the clean frames before their own, and their own noisy frame.

    Rows are the noisy frames first_noisy ..; columns are clean frames 0 .., then the noisy ones.
    """
    clean = torch.arange(num_clean, device=device)
    noisy = torch.arange(first_noisy, first_noisy + num_noisy, device=device)
    visible = torch.cat([noisy[:, None] > clean[None, :], noisy[:, None] == noisy[None, :]], dim=1)
    return visible.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)


def distance_bias(
    slope: float,
    query_frames: Int[Tensor, " t"],
    key_frames: Int[Tensor, " t2"],
    tokens_per_frame: int,
) -> Float[Tensor, "s s2"]:
    """Return slope * (key frame - query frame), added to the attention logits. Source: FAR."""
    bias = slope * (key_frames[None, :] - query_frames[:, None]).float()
    return bias.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)


def attend(
    q: Float[Tensor, "b k s e"],
    k: Float[Tensor, "b k s2 e"],
    v: Float[Tensor, "b k s2 e"],
    visible: Bool[Tensor, "s s2"] | None = None,
    bias: Float[Tensor, "s s2"] | None = None,
) -> Float[Tensor, "b k s e"]:
    """Attend with logits q k / sqrt(e) + bias, over the visible keys.

    Args:
        q: queries; rows that see no key at all are not allowed.
        k: keys, already rotated.
        v: values.
        visible: True where a query may look; None: everywhere. No mask is the fastest path, so
            callers pass None wherever all is visible.
        bias: added to the logits of visible keys; None: nothing.
    """
    dtype = v.dtype
    q, k = q.to(dtype), k.to(dtype)
    mask = visible
    if bias is not None:
        mask = bias.to(dtype)
        if visible is not None:
            mask = mask.masked_fill(~visible, float("-inf"))
    short = k.shape[-2] <= PLAIN_KEYS and q.device.type == "cpu" and dtype == torch.bfloat16
    if short and q.requires_grad:
        return explicit_attention(q, k, v, mask)
    # A two-axis mask is passed with four axes: the CPU's fused kernel refuses other ranks.
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=None if mask is None else mask[None, None]
    )


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
    """Cut the width into heads."""
    return rearrange(x, "b s (k e) -> b k s e", e=head_dim)


def join_heads(x: Float[Tensor, "b k s e"]) -> Float[Tensor, "b s d"]:
    """Undo split_heads."""
    return rearrange(x, "b k s e -> b s (k e)")
