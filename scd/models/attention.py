"""Attention over tokens at (frame, row, column): rotary positions and the attention itself.

The only caller of PyTorch's attention kernels but for engine/attention.py, and for
probe/intercept.py, which passes on what it has looked at.
Source: paper, sections 1.2 and 1.3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention

from scd.models.visibility import (
    DistanceBias,
    Visibility,
    block_mask,
    dense_bias,
    dense_mask,
    padded,
    score_mod,
)

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
    """Cut the width into heads."""
    return rearrange(x, "b s (k e) -> b k s e", e=head_dim)


def join_heads(x: Float[Tensor, "b k s e"]) -> Float[Tensor, "b s d"]:
    """Undo split_heads."""
    return rearrange(x, "b k s e -> b s (k e)")
