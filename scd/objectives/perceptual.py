"""Distance of pictures in a normalised Laplacian pyramid: what a picture looks like, by no weights.

A picture is split into bands of ever coarser detail; each value of a band is divided by the
amplitude around it, as the eye judges contrast by its surroundings; the distance is the root mean
square of what differs, averaged over bands. Source: Laparra et al., "Perceptual image quality
assessment using a normalized Laplacian pyramid" (2016); its filters are fitted to eyes, those here
are one small bell, and every colour is a channel of its own.

It stands in for LPIPS where no weights of LPIPS are at hand. It is no LPIPS: it knows edges and
contrast and nothing of textures or objects, and its numbers compare with nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

BELL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
"""Weights of the blur, each way. Source: Burt and Adelson, the Laplacian pyramid."""

SMALLEST = 8
"""Rows and columns down to which a picture is halved."""

MAX_BANDS = 5
"""Bands of detail at most, the coarsest rest not counted."""

SURROUNDINGS = 0.1
"""Added to the amplitude around a value, pixels in [-1, 1]: differences in what is flat stay
small."""

EPSILON = 1e-6
"""Under the root, whose slope at 0 is infinite."""


def pyramid_distance(
    predicted: Float[Tensor, "f 3 h w"], true: Float[Tensor, "f 3 h w"]
) -> Float[Tensor, " f"]:
    """Return the distance of each pair of pictures in [-1, 1], 0 (up to 0.001) or more."""
    bands = [_normalised(band) for band in _bands(torch.cat([predicted.float(), true.float()]))]
    apart = [(one - other).square().mean((1, 2, 3)) for one, other in (b.chunk(2) for b in bands)]
    return torch.stack([(each + EPSILON).sqrt() for each in apart]).mean(0)


def _bands(pictures: Float[Tensor, "f 3 h w"]) -> list[Tensor]:
    """Split pictures into detail, from the finest, and the coarse rest; their sum is the whole."""
    found: list[Tensor] = []
    while min(pictures.shape[-2:]) >= 2 * SMALLEST and len(found) < MAX_BANDS:
        coarse = _blurred(pictures)[..., ::2, ::2]
        size = (pictures.shape[-2], pictures.shape[-1])
        again = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        found.append(pictures - again)
        pictures = coarse
    return [*found, pictures]


def _normalised(band: Float[Tensor, "f 3 h w"]) -> Float[Tensor, "f 3 h w"]:
    return band / (SURROUNDINGS + _blurred(band.abs()))


def _blurred(pictures: Float[Tensor, "f c h w"]) -> Float[Tensor, "f c h w"]:
    channels = pictures.shape[1]
    bell = torch.tensor(BELL, device=pictures.device, dtype=pictures.dtype)
    padded = F.pad(pictures, (2, 2, 2, 2), mode="reflect")
    across = F.conv2d(padded, bell.expand(channels, 1, 1, 5), groups=channels)
    return F.conv2d(across, bell[:, None].expand(channels, 1, 5, 1), groups=channels)
