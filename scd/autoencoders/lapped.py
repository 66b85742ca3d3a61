"""Pixels in patches that overlap: a lapped orthogonal transform.

Patches that are drawn each by itself show their borders. Here the pixels beside a border are
first mixed across it, by an orthogonal matrix, so that what a patch draws fades into its
neighbours. Being orthogonal, it leaves white noise white and squared errors as they are: a model
learns the same task on another basis. Within a patch nothing is changed, since a linear map of the
whole patch would undo it.

Source: Malvar, "Signal Processing with Lapped Transforms" (1992), in the form of Tran, Liang and
Tu, "Lapped Transform via Time-Domain Pre- and Post-Filtering" (2003): sums of pixels that mirror
each other in a border stay, so that an even surface does, and their differences are turned.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def border_mix(patch: int) -> Float[Tensor, "patch patch"]:
    """Return the orthogonal matrix that mixes a line of pixels about a border, half on either side.

    Args:
        patch: pixels of a patch (ValueError: not an even number).
    """
    if patch < 2 or patch % 2:
        raise ValueError(f"patches that overlap have an even number of pixels, got {patch}")
    half = patch // 2
    # Sums and differences of mirrored pixels, the differences turned, and back.
    identity, mirror = torch.eye(half, dtype=torch.float64), torch.eye(half).flip(0).double()
    butterfly = torch.cat(
        [torch.cat([identity, mirror], 1), torch.cat([mirror, -identity], 1)]
    ) / math.sqrt(2)
    turned = torch.block_diag(identity, mirror @ _cosines(half, 2).T @ _cosines(half, 4) @ mirror)
    return (butterfly @ turned @ butterfly).float()


def lapped_matrix(length: int, mix: Float[Tensor, "patch patch"]) -> Float[Tensor, "length length"]:
    """Return the matrix that mixes pixels of a line about each border of its patches.

    Args:
        length: pixels of the line (ValueError: no whole patches).
        mix: of one border, as `border_mix` returns it.
    """
    patch = len(mix)
    if length % patch:
        raise ValueError(f"{length} pixels hold no whole number of patches of {patch}")
    outer = torch.eye(patch // 2, dtype=mix.dtype, device=mix.device)
    return torch.block_diag(outer, *[mix] * (length // patch - 1), outer)


def lap(
    frames: Float[Tensor, "*b c h w"], mix: Float[Tensor, "patch patch"], back: bool = False
) -> Float[Tensor, "*b c h w"]:
    """Mix the pixels of frames about the borders of patches, each way, or undo that.

    Args:
        frames: of whole patches (ValueError else).
        mix: of one border, as `border_mix` returns it.
        back: whether to undo it.
    """
    rows, columns = (lapped_matrix(size, mix.to(frames)) for size in frames.shape[-2:])
    # Pixels keep their digits, whatever the arithmetic of the network.
    with torch.autocast(frames.device.type, enabled=False):
        return rows.T @ frames @ columns if back else rows @ frames @ columns.T


def _cosines(size: int, kind: int) -> Float[Tensor, "size size"]:
    """Return the orthonormal discrete cosine transform of a kind, 2 or 4; a row per frequency."""
    places = torch.arange(size, dtype=torch.float64) + 0.5
    frequencies = torch.arange(size, dtype=torch.float64) + (0.5 if kind == 4 else 0)
    matrix = torch.cos(math.pi / size * frequencies[:, None] * places) * math.sqrt(2 / size)
    if kind == 2:
        matrix[0] /= math.sqrt(2)
    return matrix
