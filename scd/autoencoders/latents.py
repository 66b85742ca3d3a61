"""Latents of an autoencoder: how many cells a frame has, and the scale of each channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class LatentsConfig:
    """What settings of any autoencoder tell of its latents."""

    frames_per_latent = 1
    """Frames of video that a latent frame stands for, but for the first, which stands for one."""
    has_text_encoder = False
    """Whether a text encoder lies beside the autoencoder."""

    def placeless(self) -> Any:
        """Return the settings without where the weights lie, if they may lie anywhere."""
        return self


def cells(height: int, width: int, size: int) -> tuple[int, int]:
    """Return rows and columns of cells of a frame.

    Args:
        height, width: of the frame, in pixels.
        size: rows, and columns, of pixels of a cell.

    Raises:
        ValueError: it cannot be cut into them.
    """
    if height % size or width % size:
        raise ValueError(
            f"frames of {height}x{width} pixels cannot be cut into cells of {size}x{size}"
        )
    return height // size, width // size


def per_channel(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> tuple[Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"]]:
    """Return mean and deviation of each channel as tensors that fit latents [... c h w]."""
    both = torch.tensor([mean, std], device=device)[..., None, None]
    return both[0], both[1]


def check_shape(channels: int, cell_size: int) -> None:
    """Refuse settings of latents that cannot be.

    Raises:
        ValueError: less than one channel, or than one pixel to a cell.
    """
    if min(channels, cell_size) < 1:
        raise ValueError(
            f"channels and cell_size must be 1 or more, got {channels} and {cell_size}"
        )
