"""Frames packed for the wire, and unpacked: JPEG pictures, or one H.264 stream."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.codec.context import Flags
from av.error import FFmpegError
from av.video.frame import PictureType
from jaxtyping import UInt8
from PIL import Image

from scd.serving.messages import Codec

KEY_INTERVAL = 60
"""Frames from one key frame of H.264 to the next, at most."""

LOW_LATENCY = {
    "preset": "veryfast",
    "tune": "zerolatency",
    "profile": "baseline",
    "crf": "18",
    "forced-idr": "1",
}
# Zero latency: a picture comes out of the call that it went into. The baseline profile has no B
# frames and is what every WebCodecs decoder takes.

FASTEST = 1000
"""Frames per second that a stream is announced for at the most."""

BASELINE = "42c0"
"""Profile of the stream and the promises of its parameter set, as a codec string has them."""

LEVELS = {
    10: (1485, 99),
    11: (3000, 396),
    12: (6000, 396),
    13: (11880, 396),
    21: (19800, 792),
    22: (20250, 1620),
    30: (40500, 1620),
    31: (108000, 3600),
    32: (216000, 5120),
    40: (245760, 8192),
    42: (522240, 8704),
    50: (589824, 22080),
    51: (983040, 36864),
    52: (2073600, 36864),
    60: (4177920, 139264),
    61: (8355840, 139264),
    62: (16711680, 139264),
}
"""Level, times ten -> macroblocks per second and per frame, at the most. Levels 2 and 4.1 allow
more bits only, which a stream of constant quality does not promise. Source: ISO/IEC 14496-10, table
A-1."""

BT601, VIDEO_RANGE = 6, 1
# ISO/IEC 23091-2 numbers of what the conversion to YUV computes; told in the stream, since
# browsers take large pictures without it for BT.709.


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A frame as it is sent."""

    payload: bytes
    """A JPEG file or an H.264 access unit."""
    key: bool
    """Whether it can be decoded without an earlier one."""
    config: str | None = None
    """Codec string of WebCodecs, for key frames of H.264."""


class JpegEncoder:
    """Each frame a picture of its own; colours at full resolution, since frames are small."""

    codec: Codec = "jpeg"

    def __init__(self, quality: int = 90) -> None:
        self.quality = quality

    def restart(self) -> None:
        """Do nothing: every picture stands alone."""

    def encode(self, frame: UInt8[np.ndarray, "h w 3"]) -> Packed:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=self.quality, subsampling=0)
        return Packed(payload=file.getvalue(), key=True)


class H264Encoder:
    """One Annex B stream: `encode` gives each frame's access unit at once, parameter sets in it."""

    codec: Codec = "h264"

    def __init__(self, height: int, width: int, fps: float) -> None:
        """Open the encoder; odd sides are made even by repeating an edge.

        Args:
            height: of the frames.
            width: of the frames.
            fps: frames per second that come at the most.
        """
        self._padding = ((0, height % 2), (0, width % 2), (0, 0))
        context = av.CodecContext.create("libx264", "w")
        assert isinstance(context, av.VideoCodecContext)
        context.height, context.width = height + height % 2, width + width % 2
        context.pix_fmt = "yuv420p"
        rate = _announced(fps)
        context.framerate, context.time_base = Fraction(rate), Fraction(1, rate)
        context.gop_size, context.max_b_frames = KEY_INTERVAL, 0
        # Threads of the encoder hold frames back, and small ones gain nothing.
        context.thread_count = 1
        context.colorspace = context.color_primaries = context.color_trc = BT601
        context.color_range = VIDEO_RANGE
        context.options = LOW_LATENCY | {"level": str(level_of(height, width, fps))}
        self._context, self._num_frames, self._next_is_key = context, 0, True

    def restart(self) -> None:
        """Make the next frame a key frame."""
        self._next_is_key = True

    def encode(self, frame: UInt8[np.ndarray, "h w 3"]) -> Packed:
        padded = np.pad(frame, self._padding, mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
        # The times mean nothing to the viewer, who draws what comes.
        picture.pts, picture.time_base = self._num_frames, self._context.time_base
        picture.pict_type = PictureType.I if self._next_is_key else PictureType.NONE
        packets = self._context.encode(picture)
        assert len(packets) == 1, f"a frame gave {len(packets)} packets"
        self._num_frames, self._next_is_key = self._num_frames + 1, False
        payload = bytes(packets[0])
        config = codec_string(payload) if packets[0].is_keyframe else None
        return Packed(payload=payload, key=config is not None, config=config)


Encoder = JpegEncoder | H264Encoder
"""Either, one per connection."""


def make_encoder(codec: Codec, quality: int, height: int, width: int, fps: float) -> Encoder:
    """Open the encoder of one connection, on which `fps` frames a second come at the most."""
    return JpegEncoder(quality) if codec == "jpeg" else H264Encoder(height, width, fps)


def level_of(height: int, width: int, fps: float) -> int:
    """Return the lowest level of H.264, times ten, for frames of a size at a rate; 62: the highest.

    Source: ISO/IEC 14496-10, section A.3.1: macroblocks of 16 x 16 pixels are counted, and neither
    side may have more of them than the root of 8 times the most of a frame.
    """
    rows, columns = math.ceil(height / 16), math.ceil(width / 16)
    of_frame = rows * columns
    for level, (per_second, most) in LEVELS.items():
        fits = of_frame <= most and max(rows, columns) ** 2 <= 8 * most
        if fits and of_frame * _announced(fps) <= per_second:
            return level
    return max(LEVELS)


def announced_codec(height: int, width: int, fps: float) -> str:
    """Return what WebCodecs wants to know of an H264Encoder's stream before it begins."""
    return f"avc1.{BASELINE}{level_of(height, width, fps):02x}"


def _announced(fps: float) -> int:
    return min(math.ceil(fps), FASTEST)


class Decoder:
    """Frames of one connection, unpacked in their order."""

    def __init__(self) -> None:
        self._context: av.VideoCodecContext | None = None

    def decode(self, payload: bytes, codec: str, key: bool) -> UInt8[np.ndarray, "_ _ 3"]:
        """Unpack one frame; an H.264 picture may have a row and a column more than the frame.

        Raises:
            ValueError: it is damaged, or no key frame came before it.
        """
        try:
            if codec == "jpeg":
                return np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
            if key:
                context = av.CodecContext.create("h264", "r")
                assert isinstance(context, av.VideoCodecContext)
                # Every picture comes out at once: there are no B frames to wait for.
                context.flags |= Flags.low_delay
                context.thread_count = 1
                self._context = context
            if self._context is None:
                raise ValueError("a key frame comes first")
            frames = self._context.decode(av.Packet(payload))
        except (FFmpegError, OSError) as error:
            raise ValueError(f"the picture is damaged: {error}") from error
        if len(frames) != 1:
            raise ValueError(f"one picture was needed, {len(frames)} came")
        return frames[0].to_ndarray(format="rgb24")


def codec_string(unit: bytes) -> str:
    """Return what WebCodecs wants to know of a key frame: profile and level of its parameter set.

    Source: RFC 6381, section 3.3; ISO/IEC 14496-10, sections 7.3.1 and 7.3.2.1, annex B.

    Raises:
        ValueError: the access unit carries no parameter set.
    """
    position = unit.find(b"\0\0\1")
    while position >= 0:
        kind = unit[position + 3] & 31
        if kind == 7:
            return f"avc1.{unit[position + 4 : position + 7].hex()}"
        position = unit.find(b"\0\0\1", position + 3)
    raise ValueError("the access unit carries no sequence parameter set")
