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
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor


@lru_cache(maxsize=8)
def lapped_matrix(length: int, patch: int) -> Float[Tensor, "length length"]:
    """Return the orthogonal matrix that mixes pixels of a line across the borders of its patches.

    Args:
        length: pixels of the line, a multiple of `patch`.
        patch: pixels of a patch, an even number. Half of them on either side of a border mix.

    Raises:
        ValueError: the line holds no whole number of patches, or the patch is odd.
    """
    if patch < 2 or patch % 2 or length % patch:
        raise ValueError(
            "patches that overlap need an even number of pixels, and lines of whole patches: got "
            f"patches of {patch} in a line of {length}"
        )
    half = patch // 2
    # Sums and differences of mirrored pixels, the differences turned, and back.
    identity, mirror = torch.eye(half, dtype=torch.float64), torch.eye(half).flip(0).double()
    butterfly = torch.cat(
        [torch.cat([identity, mirror], 1), torch.cat([mirror, -identity], 1)]
    ) / math.sqrt(2)
    turned = torch.block_diag(identity, mirror @ _cosines(half, 2).T @ _cosines(half, 4) @ mirror)
    across = butterfly @ turned @ butterfly
    matrix = torch.eye(length, dtype=torch.float64)
    for border in range(patch, length, patch):
        place = slice(border - half, border + half)
        matrix[place, place] = across
    return matrix.float()


def lap(
    frames: Float[Tensor, "*b c h w"], patch: int, back: bool = False
) -> Float[Tensor, "*b c h w"]:
    """Mix the pixels of frames across the borders of patches, each way, or undo that.

    Args:
        frames: of whole patches (ValueError else).
        patch: rows, and columns, of a patch.
        back: whether to undo it.
    """
    rows, columns = (lapped_matrix(size, patch).to(frames) for size in frames.shape[-2:])
    return rows.T @ frames @ columns if back else rows @ frames @ columns.T


def _cosines(size: int, kind: int) -> Float[Tensor, "size size"]:
    """Return the orthonormal discrete cosine transform of a kind, 2 or 4; a row per frequency."""
    places = torch.arange(size, dtype=torch.float64) + 0.5
    frequencies = torch.arange(size, dtype=torch.float64) + (0.5 if kind == 4 else 0)
    matrix = torch.cos(math.pi / size * frequencies[:, None] * places) * math.sqrt(2 / size)
    if kind == 2:
        matrix[0] /= math.sqrt(2)
    return matrix
