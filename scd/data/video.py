"""Video files written from and read as 8-bit RGB pictures."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from jaxtyping import Int64, UInt8

from scd.common.files import file_aside

KEYFRAME_INTERVAL = 16
# Reading from the middle decodes 7.5 frames in vain on average; keyframes of 64x64 game pictures
# are about twice the size of the frames between them.

EXACT_OPTIONS = {"crf": "0", "preset": "ultrafast", "bf": "0"}
# Lossless RGB. The fastest preset also decodes fastest: it leaves out arithmetic coding.

PLAYABLE_OPTIONS = {"crf": "16", "preset": "veryfast", "bf": "0"}
# Looks the same as the original; a lower value mostly grows the file, the colour is at half size.


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a video file says."""

    num_frames: int
    height: int
    width: int
    fps: float
    """Frames per second, on average; 0: not said."""


def write_video(
    path: Path | str, pixels: UInt8[np.ndarray, "t h w 3"], fps: float, lossless: bool
) -> None:
    """Write pictures as an H.264 mp4 file, aside first and then renamed.

    The same pictures always give the same bytes. Lossless keeps every bit (H.264 4:4:4 RGB, for
    training data); otherwise colour is at half resolution, so sides must be even, and there is a
    small loss: what browsers can play.
    """
    path = Path(path)
    num_frames, height, width, _ = pixels.shape
    if num_frames == 0:
        raise ValueError(f"{path}: a video needs at least one frame")
    if not lossless and (height % 2 or width % 2):
        raise ValueError(f"{path}: a playable video needs even sizes, got {height} x {width}")
    options = {} if lossless else {"movflags": "+faststart"}
    with (
        file_aside(path) as aside,
        av.open(str(aside), "w", format="mp4", container_options=options) as container,
    ):
        stream = container.add_stream(
            "libx264rgb" if lossless else "libx264",
            rate=Fraction(fps).limit_denominator(1001),
            options=EXACT_OPTIONS if lossless else PLAYABLE_OPTIONS,
        )
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = height, width
        stream.pix_fmt = "rgb24" if lossless else "yuv420p"
        stream.codec_context.gop_size = KEYFRAME_INTERVAL
        stream.codec_context.thread_count = 1
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def probe_video(path: Path | str) -> VideoInfo:
    """Read the header of a video and its last frame's data, without decoding any.

    Raises:
        ValueError: not a video, or cut off before its end.
        FileNotFoundError: no such file.
    """
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            num_frames = stream.frames or len(_frame_times(container, stream, path))
            _check_end(container, stream, path)
            return VideoInfo(
                num_frames=num_frames,
                height=stream.height,
                width=stream.width,
                fps=float(stream.average_rate or 0),
            )
    except FFmpegError as error:
        raise _unreadable(path, error) from error


def frame_times(path: Path | str) -> Int64[np.ndarray, " all_frames"]:
    """Return when each frame is shown, in ascending order and in the file's own time unit."""
    try:
        with av.open(str(path)) as container:
            return _frame_times(container, _video_stream(container, path), path)
    except FFmpegError as error:
        raise _unreadable(path, error) from error


def read_video(
    path: Path | str,
    start: int = 0,
    num_frames: int | None = None,
    times: Int64[np.ndarray, " all_frames"] | None = None,
) -> UInt8[np.ndarray, "t h w 3"]:
    """Decode some consecutive frames, beginning at the last keyframe before them.

    What `frame_times` returned for this file, given as `times`, saves one pass over it.

    Raises:
        ValueError: not a video, damaged, or it has fewer frames.
        FileNotFoundError: no such file.
    """
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            if times is None:
                times = _frame_times(container, stream, path)
            stop = len(times) if num_frames is None else start + num_frames
            if not 0 <= start < stop <= len(times):
                raise ValueError(
                    f"{path}: frames {start} .. {stop - 1} were asked for, "
                    f"but it has frames 0 .. {len(times) - 1}"
                )
            wanted = times[start:stop]
            # With reordered frames a seek may land after its target: then decode from the start.
            for origin in dict.fromkeys((int(wanted[0]), int(times[0]))):
                container.seek(origin, stream=stream)
                pixels = _decode(container, stream, wanted)
                if pixels is not None:
                    return pixels
    except FFmpegError as error:
        raise _unreadable(path, error) from error
    raise ValueError(f"{path}: frames {start} .. {stop - 1} cannot be decoded")


def _decode(
    container: InputContainer, stream: av.VideoStream, wanted: np.ndarray
) -> np.ndarray | None:
    """Decode from the current position; None where a wanted frame is missing."""
    pixels = np.empty((len(wanted), stream.height, stream.width, 3), np.uint8)
    reformatter = VideoReformatter()
    found = 0
    for frame in container.decode(stream):
        if frame.pts is None or frame.pts < wanted[found]:
            continue
        if frame.pts > wanted[found]:
            return None
        # Starting threads takes longer than turning a small frame into RGB.
        pixels[found] = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        found += 1
        if found == len(wanted):
            return pixels
    return None


def _video_stream(container: InputContainer, path: Path | str) -> av.VideoStream:
    if not container.streams.video:
        raise ValueError(f"{path}: has no video stream")
    stream = container.streams.video[0]
    # Clips are read by several threads at once: more of them per file only get in each other's way.
    stream.codec_context.thread_count = 1
    return stream


def _frame_times(container: InputContainer, stream: av.VideoStream, path: Path | str) -> np.ndarray:
    times = [
        packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard
    ]
    if not times or None in times:
        raise ValueError(f"{path}: its frames carry no times")
    return np.sort(np.array(times, np.int64))


def _check_end(container: InputContainer, stream: av.VideoStream, path: Path | str) -> None:
    """Refuse a file whose header promises more than it holds."""
    if stream.duration is None or not stream.frames:
        return
    end = (stream.start_time or 0) + stream.duration
    container.seek(end, stream=stream)
    ends = [
        packet.pts + (packet.duration or 0)
        for packet in container.demux(stream)
        if packet.size and packet.pts is not None and not packet.is_corrupt
    ]
    if max(ends, default=-1) < end - stream.duration // stream.frames:
        raise ValueError(f"{path}: is cut off before its end")


def _unreadable(path: Path | str, error: FFmpegError) -> Exception:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{path}: no such file")
    return ValueError(f"{path}: cannot be read as a video ({error.strerror})")
