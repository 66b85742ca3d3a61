"""Video files written from and read as 8-bit RGB pictures.

What a file holds is what its decoder gives: how many frames, in which order, how large and which
way up. Headers are believed only where they and the decoder cannot differ: an index without hidden
frames, in a container that keeps times, and a keyframe at its beginning.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from jaxtyping import Bool, Float, Int64, UInt8

from scd.common.cores import Cores
from scd.common.files import file_aside, refuse_pipe
from scd.data.reduce import TOGETHER, reduce_pictures

KEYFRAME_INTERVAL = 16
# Reading from the middle decodes 7.5 frames in vain on average; keyframes of 64x64 game pictures
# are about twice the size of the frames between them.

EXACT_OPTIONS = {"crf": "0", "preset": "ultrafast", "bf": "0"}
# Lossless RGB. The fastest preset also decodes fastest: it leaves out arithmetic coding.

PLAYABLE_OPTIONS = {"crf": "16", "preset": "veryfast", "bf": "0"}
# Looks the same as the original; a lower value mostly grows the file, the colour is at half size.


RECALLED = 16384
"""Files whose frames' times are kept in memory: 40 MB, at 300 frames each."""

KEPT, KEPT_PIXELS = 4, 640 * 480
"""Files that a thread keeps open, whose index need not be read again, and the largest frames of
these: each has a decoder with its pictures."""

SMALLEST_PART, MOST_PARTS = 4, 8
"""Frames that another thread decodes of a clip, at least, since to hand them over takes as long as
one; and threads of a clip, each of which keeps files open."""

SEQUENTIAL = ("avi", "mpegts", "mpeg", "mpegvideo", "h264", "hevc")
# Formats whose times are those of storage, not of display, or that have none.


@dataclass(frozen=True)
class VideoInfo:
    """What a video file shows."""

    num_frames: int
    height: int
    """Rows of a frame, turned as the file asks for."""
    width: int
    fps: float
    """Frames per second, on average; 0: not said."""


@dataclass(frozen=True)
class PartOfFile:
    """A video that lies inside another file, such as a tar, from a byte on."""

    file: str
    begin: int
    size: int
    """Bytes."""
    name: str
    """Its own, for messages."""

    def __str__(self) -> str:
        return f"{self.file}, {self.name}"


Video = Path | str | PartOfFile
"""Where a video is."""


Opened = tuple[InputContainer, av.VideoStream]
"""An open file and its stream of moving pictures."""


@dataclass(frozen=True)
class FrameIndex:
    """Where the frames of a file are."""

    num_frames: int
    format: str
    """FFmpeg's name of the container: to find it out again takes as long as a few frames."""
    times: Int64[np.ndarray, " all_frames"] | None
    """When each is shown, ascending, in the file's own unit of time. None: times are missing or do
    not ascend in the decoder's order, so frames are counted from the beginning."""
    unit_s: float
    """Seconds of that unit."""
    is_keyframe: Bool[np.ndarray, " all_frames"] | None
    """From which frames one may decode; None: the file cannot be believed."""
    stamp: tuple[int, int]
    """Bytes of the file and its time of change, which tell whether it is still the same."""

    def numbers_at(
        self, seconds: Float[np.ndarray, " t"], tolerance_s: float
    ) -> Int64[np.ndarray, " t"] | None:
        """Return the numbers of the frames that are shown at these times; None: there is none at
        one of them."""
        times = self.times
        if times is None:
            return None
        sought = seconds / self.unit_s
        after = np.searchsorted(times, sought).clip(1, max(1, len(times) - 1))
        before = after - 1
        after = after.clip(max=len(times) - 1)
        numbers = np.where(sought - times[before] < times[after] - sought, before, after)
        off = np.abs(times[numbers] - sought)
        return numbers if (off <= tolerance_s / self.unit_s).all() else None

    def parts(self, wanted: list[int], most: int) -> list[list[int]]:
        """Cut frames that are wanted, ascending, into up to so many parts whose decoding takes
        about as long: at keyframes, since a decoder begins there."""
        if most < 2 or self.is_keyframe is None or len(wanted) < 2 * SMALLEST_PART:
            return [wanted]
        first, last = wanted[0], wanted[-1]
        before = np.flatnonzero(self.is_keyframe[: first + 1])
        begin = int(before[-1]) if len(before) else 0
        keys = first + 1 + np.flatnonzero(self.is_keyframe[first + 1 : last + 1])
        cuts = [0]
        most = min(most, len(wanted) // SMALLEST_PART)
        for part in range(1, most):
            if not len(keys):
                break
            even = begin + (last + 1 - begin) * part / most
            cut = bisect_left(wanted, int(keys[np.abs(keys - even).argmin()]))
            if min(cut - cuts[-1], len(wanted) - cut) >= SMALLEST_PART:
                cuts.append(cut)
        return [wanted[a:b] for a, b in pairwise([*cuts, len(wanted)])]


def write_video(
    path: Path | str, pixels: UInt8[np.ndarray, "t h w 3"], fps: float, lossless: bool
) -> None:
    """Write pictures as an H.264 mp4 file, aside first and then renamed.

    Lossless keeps every bit (H.264 4:4:4 RGB, for training data), and the same pictures always give
    the same bytes. Otherwise colour is at half resolution, so sides must be even, and there is a
    small loss: what browsers can play; of sides below 64 pixels its bytes may differ.
    """
    path = Path(path)
    if not len(pixels):
        raise ValueError(f"{path}: a video needs at least one frame")
    with file_aside(path) as aside:
        writer = VideoWriter(aside, pixels.shape[1:3], fps, lossless=lossless)
        try:
            writer.write(pixels)
        finally:
            writer.close()


class VideoWriter:
    """Writes pictures into an H.264 mp4 file as they come; close it at the end.

    Args:
        path: the file.
        size: rows and columns of the pictures.
        fps: at which it is meant to be watched.
        lossless: as `write_video` has it.
        keyframe_interval: frames from one keyframe to the next.

    Raises:
        ValueError: sizes that a playable video cannot have.
    """

    def __init__(
        self,
        path: Path,
        size: Sequence[int],
        fps: float,
        *,
        lossless: bool,
        keyframe_interval: int = KEYFRAME_INTERVAL,
    ) -> None:
        height, width = size
        if not lossless and (height % 2 or width % 2):
            raise ValueError(f"{path}: a playable video needs even sizes, got {height} x {width}")
        options = {} if lossless else {"movflags": "+faststart"}
        self._container = av.open(str(path), "w", format="mp4", container_options=options)
        stream = self._container.add_stream(
            "libx264rgb" if lossless else "libx264",
            rate=Fraction(fps).limit_denominator(1001),
            options=EXACT_OPTIONS if lossless else PLAYABLE_OPTIONS,
        )
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = height, width
        stream.pix_fmt = "rgb24" if lossless else "yuv420p"
        stream.codec_context.gop_size = keyframe_interval
        stream.codec_context.thread_count = 1
        self._stream = stream

    def write(self, pixels: UInt8[np.ndarray, "t h w 3"]) -> None:
        """Add pictures."""
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what is left, and the index of the file."""
        try:
            self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()


def probe_video(path: Video) -> VideoInfo:
    """Say what a video shows, from its index and its first frame; the rest is decoded only if its
    header cannot be believed.

    Raises:
        ValueError: not a video, of a codec that is not built in, or cut off before its end.
        FileNotFoundError: no such file.
    """
    with _opened(path) as (container, stream):
        height, width = _first_size(container, stream, path)
        if _header_counts(container, stream):
            num_frames = stream.frames
        else:
            num_frames = index_frames(path).num_frames
        _check_end(container, stream, path)
        return VideoInfo(
            num_frames=num_frames,
            height=height,
            width=width,
            fps=float(stream.average_rate or 0),
        )


def index_frames(path: Video) -> FrameIndex:
    """Find the frames that the decoder gives; recalled for the files that were looked at last, as
    long as they stay as they are.

    Raises:
        ValueError: not a video, or nothing of it can be decoded.
        FileNotFoundError: no such file.
    """
    where = path if isinstance(path, PartOfFile) else os.fspath(path)
    try:
        status = os.stat(where.file if isinstance(where, PartOfFile) else where)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    return _index(where, status.st_size, status.st_mtime_ns)


@lru_cache(RECALLED)
def _index(path: str | PartOfFile, size: int, changed: int) -> FrameIndex:
    """Find the frames of a file; its size and time of change tell when to look again."""
    with _opened(path) as (container, stream):
        format = container.format.name.partition(",")[0]
        # Not the packets themselves: they hold the whole file.
        found = [
            (packet.pts, packet.is_keyframe, packet.is_discard)
            for packet in container.demux(stream)
            if packet.size
        ]
        unit_s = float(stream.time_base or 0)
        times = [time for time, _, _ in found]
        believed = (
            bool(found)
            and not is_sequential(container)
            and found[0][1]
            and not any(hidden for _, _, hidden in found)
            and None not in times
            and len(set(times)) == len(times)
        )
    if not believed:
        with _opened(path) as (container, stream):
            times = [frame.pts for frame in container.decode(stream)]
        if not times:
            raise ValueError(f"{path}: no frame of it can be decoded")
        if None in times or (np.diff(np.array(times, np.int64)) <= 0).any():
            return FrameIndex(len(times), format, None, unit_s, None, (size, changed))
    shown = np.array(times, np.int64)
    order = np.argsort(shown)
    keys = np.array([key for _, key, _ in found], bool)[order] if believed else None
    return FrameIndex(len(times), format, shown[order], unit_s, keys, (size, changed))


def read_video(
    path: Video,
    start: int = 0,
    num_frames: int | None = None,
) -> UInt8[np.ndarray, "t h w 3"]:
    """Decode some consecutive frames, beginning at the last keyframe before them, and turn them as
    the file asks for.

    Raises:
        ValueError: not a video, or it has fewer frames, or one of these is damaged, or made from a
            damaged one.
        FileNotFoundError: no such file.
    """
    stop = index_frames(path).num_frames if num_frames is None else start + num_frames
    return read_frames(path, range(start, stop))


def read_frames(
    path: Video, numbers: Sequence[int], size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "t h w 3"]:
    """Decode the frames of these numbers, which ascend and may come several times, as `read_video`
    does; with a size, reduced to these rows and columns by `reduce_pictures`."""
    index = index_frames(path)
    wanted = sorted(set(numbers))
    if not wanted or wanted[0] < 0 or wanted[-1] >= index.num_frames:
        raise ValueError(
            f"{path}: frames {min(numbers, default=0)} .. {max(numbers, default=-1)} were asked "
            f"for, but it has frames 0 .. {index.num_frames - 1}"
        )
    with _cores.take(min(MOST_PARTS, len(wanted) // SMALLEST_PART)) as number:
        parts = index.parts(wanted, number)
        name = f"{path}: frames {wanted[0]} .. {wanted[-1]}"
        read = _cores.run([partial(_read, path, index, part, size, name) for part in parts])
    pixels = np.concatenate(read) if len(read) > 1 else read[0]
    return pixels if len(wanted) == len(numbers) else pixels[np.searchsorted(wanted, numbers)]


def _read(
    path: Video, index: FrameIndex, wanted: list[int], size: tuple[int, int] | None, name: str
) -> UInt8[np.ndarray, "t h w 3"]:
    """Decode frames in this thread; `name` is what cannot be decoded if they cannot."""
    times, why = index.times, ""
    # A seek may land after its target: then the file is decoded from its beginning.
    for begin in (None,) if times is None else (int(times[wanted[0]]), None):
        opened = _opened(path, index.format) if begin is None else _kept_open(path, index)
        with opened as (container, stream):
            if begin is None:
                frames = container.decode(stream)
            else:
                container.seek(begin, stream=stream)
                frames = _decoded_until(container, stream, index, wanted[-1])
            try:
                pixels = _decode(_choose(frames, wanted, times), len(wanted), path, size)
            except FFmpegError as error:
                pixels, why = None, f" ({error.strerror})"
        if pixels is not None:
            return pixels
        # Who knows in which state a decoder is that gave up.
        _thread.files.clear()
    raise ValueError(f"{name} cannot be decoded{why}")


def _decoded_until(
    container: InputContainer, stream: av.VideoStream, index: FrameIndex, last: int
) -> Iterator[av.VideoFrame]:
    """Decode from where a container is; what shows up to frame `last` is all that the decoder gets,
    which would otherwise hold frames back until it has seen more of them."""
    assert index.times is not None
    end, needed, sent = int(index.times[last]), -1, 0
    for packet in container.demux(stream):
        yield from packet.decode()
        if packet.pts is None:
            # The end of the file, which has made the decoder give everything.
            return
        if needed < 0:
            needed = last + 1 - int(np.searchsorted(index.times, packet.pts))
        sent += packet.pts <= end
        if sent == needed:
            break
    yield from stream.codec_context.decode(None)


def upright(
    pixels: UInt8[np.ndarray, "*t h w 3"], rotation: int
) -> UInt8[np.ndarray, "*t h2 w2 3"]:
    """Turn pictures as their file asks for.

    Args:
        pixels: as they are stored.
        rotation: `av.VideoFrame.rotation`: degrees, counterclockwise.
    """
    return np.rot90(pixels, round(rotation / 90), axes=(-3, -2)) if rotation else pixels


def _choose(
    frames: Iterable[av.VideoFrame], wanted: list[int], times: np.ndarray | None
) -> Iterator[av.VideoFrame]:
    """Pick frames by their numbers; end early where one is missing or rests on a damaged one.

    A frame that is damaged, or that the decoder gives up, spoils those after it, which are made
    from it, up to the next keyframe, though the decoder says so of none of them.
    """
    found, number, is_whole, begins = 0, -1, True, True
    for frame in frames:
        number += 1
        if times is not None and not (number < len(times) and times[number] == frame.pts):
            # After a seek, or where frames are missing.
            if frame.pts is None:
                number -= 1
                continue
            number, is_whole = int(np.searchsorted(times, frame.pts)), begins
        begins = False
        is_whole = (is_whole or frame.key_frame) and not frame.is_corrupt
        if number < wanted[found]:
            continue
        if number > wanted[found] or not is_whole:
            return
        yield frame
        found += 1
        if found == len(wanted):
            return


def _decode(
    frames: Iterable[av.VideoFrame], num_frames: int, path: Video, size: tuple[int, int] | None
) -> np.ndarray | None:
    """Turn frames into pictures; None where one is missing."""
    pixels: np.ndarray | None = None
    rotation = found = 0
    stored = ""
    reformatter, held = VideoReformatter(), list[np.ndarray]()
    form, together = ("rgb24", 1) if size is None else ("rgba", TOGETHER)
    for frame in frames:
        now = f"{frame.height} x {frame.width}"
        if not stored:
            stored, rotation = now, frame.rotation
            if size is not None and round(rotation / 90) % 2:
                size = size[1], size[0]
        elif now != stored:
            raise ValueError(f"{path}: its frames change size, from {stored} to {now}")
        # Starting threads takes longer than turning a small frame into RGB.
        held.append(reformatter.reformat(frame, format=form, threads=1).to_ndarray())
        if len(held) < together and found + len(held) < num_frames:
            continue
        some = reduce_pictures(held[0][None] if len(held) == 1 else np.stack(held), size)
        if pixels is None:
            pixels = np.empty((num_frames, *some.shape[1:]), np.uint8)
        pixels[found : found + len(some)] = some
        found += len(some)
        held.clear()
    if pixels is None or found < num_frames:
        return None
    return np.ascontiguousarray(upright(pixels, rotation))


@contextmanager
def _opened(path: Video, format: str | None = None) -> Iterator[Opened]:
    """Open a file, of a container that may be known, at its first stream of moving pictures; what
    FFmpeg refuses is a ValueError."""
    with _named_errors(path), _open(path, format) as container:
        yield container, _video_stream(container, path)


@contextmanager
def _kept_open(path: Video, index: FrameIndex) -> Iterator[Opened]:
    """Open a file as `_opened` does; this thread keeps it open for the next time, unless something
    went wrong or its frames are large."""
    # Who was forked would move the position in the file of who forked it.
    files, key = _thread.files, (path, os.getpid(), index.stamp)
    with _named_errors(path):
        opened = files.pop(key, None)
        if opened is None:
            container = _open(path, index.format)
            opened = container, _video_stream(container, path)
        yield opened
    files[key] = opened
    while len(files) > (KEPT if opened[1].height * opened[1].width <= KEPT_PIXELS else 0):
        files.pop(next(iter(files)))


class _Thread(threading.local):
    """Files that a thread keeps open, the latest last."""

    def __init__(self) -> None:
        self.files: dict[tuple[object, ...], Opened] = {}


_thread = _Thread()

_cores = Cores()


def _open(path: Video, format: str | None) -> InputContainer:
    url = str(path)
    if isinstance(path, PartOfFile):
        # FFmpeg's own protocol: as fast as a file, where calls back into Python are not.
        url = f"subfile,,start,{path.begin},end,{path.begin + path.size},,:{path.file}"
    refuse_pipe(path.file if isinstance(path, PartOfFile) else path)
    return av.open(url, format=format)


@contextmanager
def _named_errors(path: Video) -> Iterator[None]:
    try:
        yield
    except FFmpegError as error:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{path}: no such file") from error
        raise ValueError(f"{path}: cannot be read as a video ({error.strerror})") from error


def _video_stream(container: InputContainer, path: Video) -> av.VideoStream:
    stream = moving_pictures(container)
    if stream is None:
        raise ValueError(f"{path}: has no video stream")
    if stream.codec_context is None:
        raise ValueError(f"{path}: is of a codec that this build of FFmpeg does not know")
    # Clips are read by several threads at once: more of them per file only get in each other's way.
    stream.codec_context.thread_count = 1
    return stream


def moving_pictures(container: InputContainer) -> av.VideoStream | None:
    """Return the first stream of pictures that is not a cover; None: there is none."""
    cover = Disposition.attached_pic
    return next((one for one in container.streams.video if not one.disposition & cover), None)


def is_sequential(container: InputContainer) -> bool:
    """Tell whether the format's times are those of storage, so that frames are to be counted."""
    return not set(SEQUENTIAL).isdisjoint(container.format.name.split(","))


def _header_counts(container: InputContainer, stream: av.VideoStream) -> bool:
    """Whether the header's number of frames is what the decoder gives."""
    entries = stream.index_entries
    return (
        not is_sequential(container)
        and 0 < stream.frames == len(entries)
        and entries[0].is_keyframe
        and not any(entry.is_discard for entry in entries)
    )


def _first_size(container: InputContainer, stream: av.VideoStream, path: Video) -> tuple[int, int]:
    """Return rows and columns of the first frame, upright."""
    frame = next(container.decode(stream), None)
    if frame is None:
        raise ValueError(f"{path}: no frame of it can be decoded")
    if round(frame.rotation / 90) % 2:
        return frame.width, frame.height
    return frame.height, frame.width


def _check_end(container: InputContainer, stream: av.VideoStream, path: Video) -> None:
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
