"""Wide or tall frames made small and square."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float


def square(
    frames: Float[torch.Tensor, "t 3 h w"], size: int, place: float = 0.5
) -> Float[torch.Tensor, "t 3 {size} {size}"]:
    """Reduce frames so that the shorter side fits, by antialiased bilinear weights, and cut.

    Args:
        frames: in [-1, 1].
        size: height and width of the result.
        place: where to cut along the longer side: 0 its beginning, 0.5 the middle, 1 its end.
    """
    height, width = frames.shape[-2:]
    scale = size / min(height, width)
    reduced = (max(size, int(height * scale)), max(size, int(width * scale)))
    if reduced != (height, width):
        frames = F.interpolate(frames, size=reduced, mode="bilinear", antialias=True)
    top, left = (round((side - size) * place) for side in reduced)
    return frames[..., top : top + size, left : left + size].clamp(-1, 1)
