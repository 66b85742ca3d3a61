"""Videos to look at: MP4 for browsers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from scd.data import video
from scd.data.clip import frames_to_pixels
from scd.data.given import as_frames

Ink = Literal["on light", "on dark", "on white"]
"""What a picture is drawn for: a transparent one on a light or a dark page, or a white file."""

SHOWN_SIZE = 256
"""Pixels that the shorter side of a video is enlarged to, at least: 32x32 is a stamp."""

SHOWN_FPS = 15.0
"""Frames per second of a video unless it is said otherwise."""

Frames = Tensor | np.ndarray | Sequence[Tensor | np.ndarray]
"""A stream's frames, together or one by one."""


def enlarge(pixels: UInt8[Tensor, "t h w 3"], size: int) -> UInt8[Tensor, "t _ _ 3"]:
    """Repeat pixels (nearest neighbour) by the smallest factor that makes both sides `size`."""
    factor = max(1, -(-size // min(pixels.shape[1:3])))
    return pixels.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def write_video(
    frames: Frames, path: str | os.PathLike[str], fps: float = SHOWN_FPS, size: int = SHOWN_SIZE
) -> None:
    """Write H.264 in yuv420p, which every browser plays.

    Small frames are enlarged until the shorter side has `size` pixels at least.

    Args:
        frames: floats in [-1, 1] or 8-bit pixels, [t 3 h w] or [t h w 3]; or a list of single
            frames, such as what `Rollout.step` of one stream and `WorldEnv.step` return.
        path: of the file; its folder is made if need be.
        fps: frames per second; a world's own are `world.card.fps`.
        size: in pixels.

    Raises:
        ValueError: no frames, several streams, other shapes, frames of several sizes, floats beyond
            [-1, 1] or values that are not finite; or the name of a file of another kind.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".mp4", ".m4v", ".mov"):
        raise ValueError(f"a video is written as .mp4, got {path.name!r}")
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps must be a finite number above 0, got {fps}")
    pixels = enlarge(as_pixels(frames), size)
    # yuv420p halves the colour planes: odd sides would be refused.
    height, width = pixels.shape[1:3]
    pixels = torch.cat([pixels, pixels[:, -1:]], dim=1) if height % 2 else pixels
    pixels = torch.cat([pixels, pixels[:, :, -1:]], dim=2) if width % 2 else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    video.write_video(path, pixels.numpy(), fps, lossless=False)


def as_pixels(frames: Frames) -> UInt8[Tensor, "t h w 3"]:
    """Return the frames of one stream as 8-bit pixels, in whichever way they are given.

    Raises:
        ValueError: as of `write_video`.
    """
    if isinstance(frames, (Tensor, np.ndarray)):
        video = torch.as_tensor(frames).cpu()
        video = video[0] if video.ndim == 5 and len(video) == 1 else video
    else:
        # A step gives the frames of all streams, and there is one.
        parts = [torch.as_tensor(frame).cpu() for frame in _checked(frames)]
        parts = [part[0] if part.ndim == 4 and len(part) == 1 else part for part in parts]
        shapes = sorted({tuple(part.shape) for part in parts})
        if len(shapes) != 1 or len(shapes[0]) != 3:
            raise ValueError(
                "a video needs frames [3 h w] or [h w 3] of one stream, all of one size, got "
                f"{', '.join(str(list(shape)) for shape in shapes) or 'none'}"
            )
        video = torch.stack(parts)
    if video.ndim != 4 or 0 in video.shape or 3 not in (video.shape[1], video.shape[3]):
        raise ValueError(
            "a video needs the frames of one stream, [t 3 h w] or [t h w 3], got "
            f"{list(video.shape)}"
        )
    is_last = video.shape[3] == 3 and (video.shape[1] != 3 or video.dtype == torch.uint8)
    if video.dtype == torch.uint8:
        return video if is_last else video.movedim(1, -1)
    video = video.movedim(-1, 1) if is_last else video
    return frames_to_pixels(as_frames(video, "frames", (video.shape[2], video.shape[3])))


def _checked(frames: Sequence[Tensor | np.ndarray]) -> Sequence[Tensor | np.ndarray]:
    is_list = isinstance(frames, Sequence)
    if not is_list or not all(isinstance(frame, (Tensor, np.ndarray)) for frame in frames):
        raise ValueError(f"a video needs frames, together or a list of them, got {frames!r}")
    return frames


def spread(num_frames: int, num_shown: int) -> list[int]:
    """Choose at most `num_shown` of `num_frames` indices, evenly, both ends included."""
    if num_frames <= num_shown:
        return list(range(num_frames))
    return [round(i * (num_frames - 1) / (num_shown - 1)) for i in range(num_shown)]
