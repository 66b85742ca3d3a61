"""The process that decodes one upload: a program of its own, which reads it from standard input.

What strangers send is decoded outside of the server, where a decoder that crashes, hangs or fills
the memory ends nothing but itself: processor time and memory are limited by the system, and no
file can be opened any more. Pixels go to standard output, a refusal as one JSON line.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import math
import os
import pkgutil
import resource
import signal
import sys
from dataclasses import asdict, dataclass

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from scd.data.video import is_sequential, moving_pictures, upright

PICTURES = ("PNG", "JPEG", "WEBP", "BMP")
"""Formats of Pillow that are read; others stay closed, whatever a file claims to be."""

REFUSED = 3
"""Exit status where the upload is refused."""

ROUNDED = 0.01
"""Part of a frame by which the times of a file may be off: they are rounded."""

NICER = 10
"""By how much its priority is lower than the server's."""

MEMORY_BYTES = 3 * 2**30
"""Address space of the process: libraries, and some pictures of the largest size."""


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """What is asked of an upload, and what comes out."""

    height: int
    """Rows of the frames that come out."""
    width: int
    """Columns of the frames that come out."""
    fps: float
    """Frames per second that come out of a video."""
    max_frames: int
    """Frames that come out of a video: its last ones."""
    max_pixels: int
    """Rows times columns of what comes in."""
    max_s: float
    """Seconds of a video."""
    cpu_s: int
    """Seconds of processor time."""
    parent: int = 0
    """Process with which the decoder ends; 0: it goes on alone."""


class Refused(ValueError):
    """An upload that is not taken."""

    def __init__(self, code: str, message: str) -> None:
        """Say why: `code` for machines, `message` for people."""
        super().__init__(message)
        self.code = code


def container_of(data: bytes) -> str | None:
    """Return the name of FFmpeg's reader for a video that begins so; None: it is no video.

    Readers that follow references to other files (playlists, lists of parts) are not among them.
    """
    if data[4:8] == b"ftyp":
        return "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    return "gif" if data[:4] == b"GIF8" else None


def decode(data: bytes, limits: DecodeLimits) -> UInt8[np.ndarray, "t h w 3"]:
    """Turn a picture or a video into frames: cut to shape around the middle, then resized.

    Raises:
        Refused: neither of the two, damaged, or over a limit.
    """
    container = container_of(data)
    return _picture(data, limits) if container is None else _video(data, container, limits)


def _picture(data: bytes, limits: DecodeLimits) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=PICTURES) as picture:
            _check_size(picture.height, picture.width, limits)
            return _fitted(ImageOps.exif_transpose(picture).convert("RGB"), limits)[None]
    except UnidentifiedImageError:
        raise Refused(
            "not_media",
            "an upload is a picture (PNG, JPEG, WebP, BMP) or a video (MP4, MOV, WebM, MKV, AVI, "
            "GIF); this is neither",
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused("damaged", f"the picture cannot be decoded: {error}") from None


def _video(data: bytes, format: str, limits: DecodeLimits) -> np.ndarray:
    try:
        file = io.BytesIO(data)
        with av.open(file, "r", format=format, options={"protocol_whitelist": ""}) as opened:
            stream = moving_pictures(opened)
            if stream is None:
                raise Refused("not_media", "the video has no pictures")
            if stream.codec_context is None:
                raise Refused("damaged", "the video is packed in a way that is not known here")
            stream.codec_context.thread_count = 1
            _check_size(stream.codec_context.height, stream.codec_context.width, limits)
            frames = _paced(opened, stream, limits)
    except FFmpegError as error:
        raise Refused("damaged", f"the video cannot be decoded: {error.strerror}") from None
    if not frames:
        raise Refused("damaged", "the video holds no frame")
    return np.concatenate(frames)


def _paced(
    opened: InputContainer, stream: av.VideoStream, limits: DecodeLimits
) -> list[np.ndarray]:
    """Return the last frames at the pace asked for; a moment shows the newest frame there was."""
    frames: list[np.ndarray] = []
    shown: Image.Image | None = None
    first, last, num_shown, num_frames = 0.0, 0.0, 0, 0
    counted, rate = is_sequential(opened), float(stream.average_rate or 25)

    def show_until(num_moments: int) -> None:
        nonlocal num_shown
        num_new = num_moments - num_shown
        if shown is not None and num_new > 0:
            frames.extend([_fitted(shown, limits)[None]] * min(num_new, limits.max_frames))
            del frames[: -limits.max_frames]
            num_shown = num_moments

    for frame in opened.decode(stream):
        _check_size(frame.height, frame.width, limits)
        # Stored times that do not ascend are no order: then frames follow each other at the rate.
        time = num_frames / rate if counted or frame.time is None else frame.time
        num_frames += 1
        first = time if shown is None else first
        last = time - first
        if last > limits.max_s:
            raise Refused("too_long", f"a video has at most {limits.max_s:g} seconds")
        # All moments before this frame still show the one before it.
        show_until(math.ceil(last * limits.fps - ROUNDED))
        shown = Image.fromarray(upright(frame.to_ndarray(format="rgb24"), frame.rotation))
    show_until(math.floor(last * limits.fps + ROUNDED) + 1)
    return frames


def _check_size(height: int, width: int, limits: DecodeLimits) -> None:
    if height < 1 or width < 1:
        raise Refused("damaged", "the upload has no size")
    if height * width > limits.max_pixels:
        raise Refused(
            "too_many_pixels",
            f"an upload has at most {limits.max_pixels} pixels a frame, got {width}x{height}",
        )


def _fitted(picture: Image.Image, limits: DecodeLimits) -> np.ndarray:
    size = (limits.width, limits.height)
    return np.asarray(ImageOps.fit(picture, size, Image.Resampling.BOX), np.uint8)


def shut_in(cpu_s: int) -> None:
    """Give up what decoding does not need: time, memory, and opening or writing any file."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def end_with(parent: int) -> None:
    """Have this process killed when the one that started it is gone, however that ended."""
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG. Source: prctl(2).
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # Gone before it could be said: then the system has given this process another parent.
    if os.getppid() != parent:
        sys.exit(1)


def main(arguments: list[str]) -> int:
    """Decode standard input within the limits that the first argument holds as JSON."""
    limits = DecodeLimits(**json.loads(arguments[0]))
    if limits.parent:
        end_with(limits.parent)
    # Frames of streams go first.
    os.nice(NICER)
    # Both import parts of themselves when a file wants them, and then no module can be opened.
    Image.init()
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    shut_in(limits.cpu_s)
    data = sys.stdin.buffer.read()
    try:
        frames = decode(data, limits)
    except Refused as refusal:
        answer = {"code": refusal.code, "message": str(refusal)}
    except MemoryError:
        answer = {"code": "too_large", "message": "decoding the upload takes too much memory"}
    else:
        sys.stdout.buffer.write(np.ascontiguousarray(frames).tobytes())
        sys.stdout.buffer.flush()
        return 0
    sys.stdout.write(json.dumps(answer))
    return REFUSED


def command(limits: DecodeLimits) -> list[str]:
    """Return the command that decodes within limits."""
    # -P: the modules beside this file are not on the path, whatever they are called.
    return [sys.executable, "-P", __file__, json.dumps(asdict(limits))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
