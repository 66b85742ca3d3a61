"""Video files: exact where promised, readable from any frame, damage is noticed."""

import math
from fractions import Fraction

import av
import numpy as np
import pytest

from scd.data.clip import frames_to_pixels
from scd.data.toy import ToyWorld
from scd.data.video import frame_times, probe_video, read_video, write_video


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
    times = frame_times(path)
    for start, count in ((0, 1), (1, 5), (15, 3), (16, 16), (17, 30), (69, 1)):
        np.testing.assert_array_equal(
            read_video(path, start, count, times), pixels[start : start + count]
        )
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
    for use in (probe_video, read_video, frame_times):
        with pytest.raises(ValueError, match="text.mp4: cannot be read as a video"):
            use(path)
        with pytest.raises(FileNotFoundError, match="gone.mp4"):
            use(tmp_path / "gone.mp4")
