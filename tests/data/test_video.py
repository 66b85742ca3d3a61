"""Video files: exact where promised, readable from any frame, damage is noticed."""

import math
import shutil
import struct
from contextlib import suppress
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition

from scd.common.cores import Cores
from scd.data import video
from scd.data.clip import frames_to_pixels
from scd.data.reduce import reduce_pictures
from scd.data.toy import ToyWorld
from scd.data.video import (
    KEPT,
    FrameIndex,
    index_frames,
    probe_video,
    read_frames,
    read_video,
    write_video,
)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """70 pictures, more than four times the distance of keyframes."""
    return frames_to_pixels(ToyWorld(32, "train").read(0, 0, 70).frames).numpy()


def write_foreign(path, pixels: np.ndarray, held: int = 1, faststart: bool = False) -> None:
    """Write as other programs do: reordered frames, rare keyframes, one picture held for longer."""
    options = {"movflags": "+faststart"} if faststart else {}
    with av.open(str(path), "w", format="mp4", container_options=options) as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "3", "crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv444p"
        stream.codec_context.time_base = Fraction(1, 25)
        for index, picture in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index if index < 40 else index + held - 1
            frame.time_base = Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.mean((one.astype(float) - other) ** 2))


def test_lossless_videos_return_every_bit_from_every_frame(tmp_path, pixels):
    path = tmp_path / "clip.mp4"
    write_video(path, pixels, 17.5, lossless=True)
    np.testing.assert_array_equal(read_video(path), pixels)
    for start, count in ((0, 1), (1, 5), (15, 3), (16, 16), (17, 30), (69, 1)):
        np.testing.assert_array_equal(read_video(path, start, count), pixels[start : start + count])
    some = [2, 2, 15, 17, 40, 69]
    np.testing.assert_array_equal(read_frames(path, some), pixels[some])
    info = probe_video(path)
    assert (info.num_frames, info.height, info.width, info.fps) == (70, 32, 32, 17.5)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


def test_the_same_pictures_give_the_same_file(tmp_path, pixels):
    for name in ("one.mp4", "other.mp4"):
        write_video(tmp_path / name, pixels, 10.0, lossless=True)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "other.mp4").read_bytes()


def test_playable_videos_are_what_browsers_take(tmp_path, pixels):
    path = tmp_path / "clip.mp4"
    # Enlarged as on a screen, since colour is kept at half resolution.
    write_video(path, pixels.repeat(4, 1).repeat(4, 2), 10.0, lossless=False)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    assert psnr(read_video(path)[:, 2::4, 2::4], pixels) > 33
    with pytest.raises(ValueError, match="even sizes, got 31 x 32"):
        write_video(path, pixels[:, 1:], 10.0, lossless=False)
    with pytest.raises(ValueError, match="at least one frame"):
        write_video(path, pixels[:0], 10.0, lossless=False)


def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path, pixels):
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(OSError, match="clip.mp4"):
        write_video(tmp_path / "clip.mp4", pixels, 10.0, lossless=True)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("held", [1, 30])
def test_videos_of_other_programs_are_read_frame_by_frame(tmp_path, pixels, held):
    path = tmp_path / "foreign.mp4"
    write_foreign(path, pixels, held)
    whole = read_video(path)
    assert whole.shape == pixels.shape and psnr(whole, pixels) > 40
    assert probe_video(path).num_frames == 70
    for start, count in ((3, 2), (38, 5), (55, 15)):
        np.testing.assert_array_equal(read_video(path, start, count), whole[start : start + count])


def test_frames_beyond_the_end_are_refused(tmp_path, pixels):
    path = tmp_path / "clip.mp4"
    write_video(path, pixels[:10], 10.0, lossless=True)
    for start, count in ((8, 3), (-1, 2), (3, 0), (10, None)):
        with pytest.raises(ValueError, match=r"clip.mp4: frames .* has frames 0 .. 9"):
            read_video(path, start, count)


@pytest.mark.parametrize("faststart", [False, True])
def test_cut_off_files_are_noticed(tmp_path, pixels, faststart):
    path = tmp_path / "cut.mp4"
    write_foreign(path, pixels, faststart=faststart)
    assert probe_video(path).num_frames == 70
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ValueError, match="cut.mp4"):
        probe_video(path)


def test_what_is_no_video_is_refused_by_name(tmp_path):
    path = tmp_path / "text.mp4"
    path.write_text("not a video at all")
    for use in (probe_video, read_video, index_frames):
        with pytest.raises(ValueError, match="text.mp4: cannot be read as a video"):
            use(path)
        with pytest.raises(FileNotFoundError, match="gone.mp4"):
            use(tmp_path / "gone.mp4")


def numbered(num: int, height: int = 64, width: int = 80) -> np.ndarray:
    """Pictures whose upper half tells their number, red and blue below."""
    made = np.zeros((num, height, width, 3), np.uint8)
    made[:, : height // 2] = (20 + 3 * np.arange(num))[:, None, None, None]
    made[:, height // 2 :, : width // 2], made[:, height // 2 :, width // 2 :] = 200, 60
    made[:, height // 2 :, : width // 2, 1:], made[:, height // 2 :, width // 2 :, 2] = 30, 220
    return made


def numbers(pixels) -> list[int]:
    return [round((float(one[: len(one) // 2].mean()) - 20) / 3) for one in pixels]


def write_as(path, pixels, codec="libx264", form=None, **options) -> None:
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        stream.codec_context.gop_size = 24
        stream.codec_context.max_b_frames = int(options.get("bf", 0))
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def packets_of(path) -> list[av.Packet]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def write_packed(path, pixels, tmp_path) -> None:
    """Write AVI as XviD does: a B picture lies in the chunk of the one after it, then a placeholder
    takes its place."""
    write_as(tmp_path / "plain.avi", pixels, "mpeg4", bf="1", b_strategy="0", qscale="3")
    data = [bytes(packet) for packet in packets_of(tmp_path / "plain.avi")]
    kinds = ["IPBS"[one[one.find(b"\0\0\1\xb6") + 4] >> 6] for one in data]
    chunks, place = [], 0
    while place < len(data):
        packed = kinds[place + 1 : place + 2] == ["B"]
        chunks.append((b"".join(data[place : place + 1 + packed]), kinds[place] == "I"))
        if packed:
            chunks.append((b"\0\0\1\xb6\x51\x4f", False))
        place += 1 + packed
    mark = chunks[0][0].find(b"\0\0\1\xb6")
    name = b"\0\0\1\xb2DivX503b1393p"
    chunks[0] = (chunks[0][0][:mark] + name + chunks[0][0][mark:], True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        container.start_encoding()
        for number, (chunk, is_keyframe) in enumerate(chunks):
            packet = av.Packet(chunk)
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.pts = packet.dts = number
            packet.is_keyframe = is_keyframe
            container.mux(packet)


@pytest.mark.parametrize("kind", ["packed.avi", "h264.avi", "h264.ts", "h264.mkv"])
def test_frames_come_in_the_order_of_the_decoder(tmp_path, kind):
    path, pixels = tmp_path / kind, numbered(60)
    if kind == "packed.avi":
        write_packed(path, pixels, tmp_path)
    else:
        write_as(path, pixels, bf="2", form="mpegts" if kind.endswith("ts") else None)
    with av.open(str(path)) as container:
        shown = numbers([one.to_ndarray(format="rgb24") for one in container.decode(video=0)])
    assert len(shown) == probe_video(path).num_frames == 60
    for start, count in ((0, 16), (23, 10), (44, 16)):
        assert numbers(read_video(path, start, count)) == shown[start : start + count]


def test_hidden_and_undecodable_frames_are_not_counted(tmp_path):
    """A trimmed mp4, whose edit list hides its lead-in, and a file that begins without keyframe."""
    write_as(tmp_path / "whole.mkv", numbered(60))
    for name, first, shown, options in (
        ("trimmed.mp4", 24, 30, {"use_editlist": "1"}),
        ("midway.mkv", 10, 10, {}),
    ):
        path = tmp_path / name
        with (
            av.open(str(tmp_path / "whole.mkv")) as source,
            av.open(str(path), "w", options=options) as target,
        ):
            stream = target.add_stream_from_template(source.streams.video[0])
            packets = [packet for packet in source.demux(video=0) if packet.size]
            begin = packets[shown].pts or 0
            for packet in packets[first:]:
                assert packet.pts is not None and packet.dts is not None
                packet.pts, packet.dts = packet.pts - begin, packet.dts - begin
                packet.stream = stream
                target.mux(packet)
        with av.open(str(path)) as container:
            wanted = numbers([one.to_ndarray(format="rgb24") for one in container.decode(video=0)])
        assert wanted == list(range(30 if name == "trimmed.mp4" else 24, 60))
        assert probe_video(path).num_frames == len(wanted)
        assert numbers(read_video(path)) == wanted
        assert numbers(read_video(path, 5, 7)) == wanted[5:12]


def test_pictures_are_turned_as_the_file_asks_for(tmp_path):
    path = tmp_path / "phone.mp4"
    pixels = numbered(20, 48, 80)
    write_as(path, pixels)
    data = bytearray(path.read_bytes())
    # The matrix of a track's header, past its version, flags, times and numbers.
    matrix = data.find(b"tkhd") + 4 + 4 + 20 + 16
    turn = (0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", *turn)
    path.write_bytes(data)
    info = probe_video(path)
    assert (info.height, info.width) == (80, 48)
    read = read_video(path, 3, 2)
    assert read.shape == (2, 80, 48, 3)
    upright = np.rot90(pixels[3:5], -1, axes=(1, 2))
    assert np.abs(read.astype(int) - upright).mean() < 4


def test_an_unknown_codec_is_refused_by_name(tmp_path):
    path = tmp_path / "clip.mp4"
    write_as(path, numbered(10))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"avc1", b"zzz9").replace(b"isomiso2zzz9", b"isomiso2avc1"))
    for use in (probe_video, read_video, index_frames):
        with pytest.raises(ValueError, match=r"clip.mp4: is of a codec"):
            use(path)


def test_frames_that_the_decoder_made_up_are_refused(tmp_path):
    path = tmp_path / "damaged.mp4"
    noise = np.random.default_rng(0).integers(-20, 20, (60, 64, 80, 3))
    write_as(path, np.clip(numbered(60) + noise, 0, 255).astype(np.uint8))
    shutil.copy(path, tmp_path / "sound.mp4")
    data = bytearray(path.read_bytes())
    begin = data.find(b"mdat")
    middle = begin + (len(data) - begin) // 2
    data[middle : middle + 4000] = bytes(4000)
    path.write_bytes(data)
    assert numbers(read_video(path, 0, 10)) == list(range(10))
    with pytest.raises(ValueError, match=r"damaged.mp4: frames 20 .. 39 cannot be decoded"):
        read_video(path, 20, 20)
    # Those made from a damaged one are as wrong as it is, though the decoder does not mark them: up
    # to the next keyframe each is refused, and those after it are right.
    sound = read_video(tmp_path / "sound.mp4")
    marked, given = [], {}
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            with suppress(av.error.InvalidDataError):
                marked += [one for one in packet.decode() if one.is_corrupt]
    for number in range(60):
        with suppress(ValueError):
            given[number] = read_video(path, number, 1)[0]
    assert 0 < len(marked) < 60 - len(given) < 40 and {0, 23, 58, 59} <= set(given)
    for number, picture in given.items():
        np.testing.assert_array_equal(picture, sound[number])


def test_a_file_that_changes_is_looked_at_again(tmp_path, pixels):
    path = tmp_path / "clip.mp4"
    write_video(path, pixels[:10], 10.0, lossless=True)
    assert index_frames(path).num_frames == 10
    assert index_frames(path) is index_frames(path)
    write_video(path, pixels[:12], 10.0, lossless=True)
    assert index_frames(path).num_frames == 12


def test_frames_that_change_size_are_refused(tmp_path):
    path = tmp_path / "switch.ts"
    parts = []
    for height in (64, 48):
        write_as(tmp_path / "part.ts", numbered(10, height), form="mpegts")
        parts.append((tmp_path / "part.ts").read_bytes())
    path.write_bytes(b"".join(parts))
    with pytest.raises(ValueError, match=r"switch.ts: its frames change size, from 64 x 80 to 48"):
        read_video(path)


def test_a_cover_picture_is_no_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as target:
        cover = target.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        sound = target.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 8000
        picture = av.VideoFrame.from_ndarray(numbered(1, 32, 32)[0], "rgb24")
        for packets in (cover.encode(picture), cover.encode(None), sound.encode(frame)):
            target.mux(packets)
        target.mux(sound.encode(None))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(ValueError, match=r"song.mp4: has no video stream"):
        probe_video(path)


def test_files_that_are_kept_open_give_the_frames_of_fresh_ones(tmp_path):
    generator = np.random.default_rng(0)
    files = {tmp_path / f"{number}.mp4": generator.integers(0, 255, (40, 16, 16, 3), np.uint8)
             for number in range(KEPT + 2)}  # fmt: skip
    for path, pixels in files.items():
        write_video(path, pixels, 10.0, lossless=True)
    for _ in range(60):
        path = list(files)[generator.integers(len(files))]
        start = int(generator.integers(35))
        assert (read_video(path, start, 5) == files[path][start : start + 5]).all()
    # Another file of the same name, and one that is damaged in its middle.
    path = next(iter(files))
    write_video(path, files[path][::-1], 10.0, lossless=True)
    assert (read_video(path, 3, 5) == files[path][::-1][3:8]).all()
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be"):
        read_video(path)
    assert (read_video(path, 0, 5) == files[path][::-1][:5]).all()


@pytest.mark.parametrize("codec", ["h264", "libsvtav1", "mpeg4"])
def test_clips_read_by_several_threads_are_those_of_one(tmp_path, monkeypatch, codec):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as target:
        options = {"g": "7", "bf": "2"} if codec != "libsvtav1" else {"g": "7", "preset": "12"}
        stream = target.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        noise = np.random.default_rng(0).integers(0, 255, (45, 64, 64, 3), np.uint8)
        for picture in noise:
            target.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        target.mux(stream.encode(None))
    index = index_frames(path)
    with av.open(str(path)) as container:
        plain = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        container.seek(0)
        keys = [frame.key_frame for frame in container.decode(video=0)]
    assert index.is_keyframe is not None and index.is_keyframe.tolist() == keys
    assert sum(keys) > 4
    shares = {}
    for number in (1, 2, 3):
        cores = Cores(number)
        monkeypatch.setattr(video, "_cores", cores)
        shares[number] = len(index.parts(list(range(45)), number))
        for start in range(0, 30):
            np.testing.assert_array_equal(read_video(path, start, 15), plain[start : start + 15])
        some = [2, 2, 5, 9, 20, 21, 30, 30, 31, 40, 44]
        np.testing.assert_array_equal(read_frames(path, some), plain[some])
        np.testing.assert_array_equal(
            read_frames(path, some, (16, 16)),
            reduce_pictures(plain[some], (16, 16)),
        )
    assert shares == {1: 1, 2: 2, 3: 3}


def test_parts_begin_at_keyframes_and_take_about_as_long(tmp_path):
    keys = np.zeros(100, bool)
    keys[::10] = True
    index = FrameIndex(100, "mp4", np.arange(100), 0.1, keys, (0, 0))
    wanted = list(range(25, 65))
    # The decoder begins at 20: 45 frames, in the middle of which 42.5 lies.
    assert [part[0] for part in index.parts(wanted, 2)] == [25, 40]
    assert sum(index.parts(wanted, 5), []) == wanted
    assert all(part[0] in (25, *range(0, 100, 10)) for part in index.parts(wanted, 5))
    assert index.parts(wanted, 1) == [wanted]
    assert index.parts(wanted[:7], 4) == [wanted[:7]]
    assert index.parts(list(range(21, 29)), 2) == [list(range(21, 29))]
    spread = list(range(3, 100, 6))
    assert [part[0] for part in index.parts(spread, 2)] == [3, 51]
