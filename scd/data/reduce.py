"""Pictures made smaller: by the mean of the pixels that become one."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image

TOGETHER = 4
"""Pictures that are reduced in one call, which saves half of what a call takes beside its sums;
more of them leave the cache."""


def reduce_pictures(
    pictures: UInt8[np.ndarray, "t h w c"], size: tuple[int, int] | None
) -> UInt8[np.ndarray, "t h2 w2 3"]:
    """Reduce pictures, by the mean of the pixels that become one, until they just cover a size, and
    cut out their middle; without a size return them as they are.

    Args:
        pictures: 8-bit RGB; a fourth value of each pixel is left out, and saves two copies.
        size: rows and columns that are wanted.
    """
    height, width = pictures.shape[1:3]
    if size is None or (height, width) == size:
        return pictures[..., :3]
    scale = max(size[0] / height, size[1] / width)
    rows, columns = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    top, left = (rows - size[0]) // 2, (columns - size[1]) // 2
    is_whole = height % rows == width % columns == 0
    reduced = np.empty((len(pictures), *size, 3), np.uint8)
    # By whole factors no mean crosses from one picture into the next.
    together = TOGETHER if is_whole else 1
    for first in range(0, len(pictures), together):
        some = pictures[first : first + together]
        image = _image(some.reshape(-1, width, pictures.shape[3]))
        if is_whole:
            image = image.reduce((width // columns, height // rows))
        else:
            image = image.resize((columns, rows), Image.Resampling.BOX)
        small = np.asarray(image).reshape(len(some), rows, columns, -1)
        reduced[first : first + together] = small[:, top : top + size[0], left : left + size[1], :3]
    return reduced


def _image(pixels: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    if pixels.shape[2] == 3:
        return Image.fromarray(pixels)
    height, width = pixels.shape[:2]
    return Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)
