"""Frames through H.264 and back, as published evaluations of this family have done.

They write prediction and truth side by side into an mp4 file by imageio and measure what they read
back, so their numbers hold the losses of the compression on both sides.
"""

from __future__ import annotations

import io

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from jaxtyping import Float
from torch import Tensor

from scd.data.clip import frames_to_pixels, pixels_to_frames

FPS = 8
"""Frames per second of those files."""

CRF = 25
"""Constant rate factor of imageio's default quality, 5 of 10: int((1 - 5/10) * 51)."""

PLAIN_CODE = "asm=0"
"""x264 without assembler code, whose choices for small pictures differed from call to call."""

MULTIPLE = 16
"""imageio scales pictures whose sides are no multiples of this, which is not done here."""


def through_h264(
    predicted: Float[Tensor, "t 3 h w"], true: Float[Tensor, "t 3 h w"]
) -> tuple[Float[Tensor, "t 3 h w"], Float[Tensor, "t 3 h w"]]:
    """Return both sides as they are read back; pixels in [-1, 1].

    The same frames always give the same result: one thread encodes, in plain code.

    Raises:
        ValueError: two frames side by side have sides that are no multiples of 16.
    """
    width = predicted.shape[-1]
    both = torch.cat([predicted, true], dim=-1)
    if both.shape[-2] % MULTIPLE or both.shape[-1] % MULTIPLE:
        raise ValueError(
            f"side by side in H.264, frames need sides that are multiples of {MULTIPLE}, "
            f"got {both.shape[-2]}x{both.shape[-1]}"
        )
    pixels = _decoded(_encoded(frames_to_pixels(both).cpu().numpy()))
    found = pixels_to_frames(torch.from_numpy(pixels)).to(predicted.device)
    return found[..., :width], found[..., width:]


def _encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"crf": str(CRF), "x264-params": PLAIN_CODE}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        reformatter = VideoReformatter()
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = reformatter.reformat(frame, format="yuv420p", threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def _decoded(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data), "r") as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(shown)
