"""Videos and pictures are read back and compared with what was asked for."""

import av
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image

from scd.data.clip import frames_to_pixels
from scd.evaluation import grids, media, plots


def moving_square(num_frames: int, height: int = 32, width: int = 32) -> torch.Tensor:
    frames = torch.full((num_frames, 3, height, width), -1.0)
    for index in range(num_frames):
        frames[index, :, 8:16, 2 + index : 10 + index] = torch.tensor([1.0, -0.5, 0.2])[
            :, None, None
        ]
    return frames


def picture(path) -> np.ndarray:
    return (imread(path)[..., :3] * 255).round().astype(np.uint8)


def test_video_is_h264_for_browsers_with_the_frames_that_went_in(tmp_path):
    frames = moving_square(6)
    media.write_video(frames, tmp_path / "deep" / "a.mp4", fps=10.0)
    with av.open(tmp_path / "deep" / "a.mp4") as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == 10.0
        decoded = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
    assert decoded.shape == (6, 256, 256, 3)
    small = torch.from_numpy(decoded[:, 4::8, 4::8]).movedim(-1, 1).float() / 127.5 - 1
    assert (small - frames).abs().mean() < 0.05
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.mp4"]


def test_video_of_odd_sides_is_padded_to_even_ones(tmp_path):
    media.write_video(moving_square(2, 33, 35), tmp_path / "a.mp4", fps=5.0, size=1)
    with av.open(tmp_path / "a.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width) == (34, 36)


def test_grid_holds_every_frame_in_its_cell_enlarged(tmp_path):
    truth, predicted = moving_square(3), -moving_square(4)
    rows = [
        grids.PictureRow(name="truth", frames=truth),
        grids.PictureRow(name="prediction", frames=predicted),
    ]
    grid = grids.grid_pixels(rows)
    cell, gap = 96, grids.GAP
    assert grid.shape == (2 * cell + 3 * gap, 4 * cell + 5 * gap, 3)
    for down, row in enumerate((truth, predicted)):
        for right, frame in enumerate(row):
            top, left = gap + down * (cell + gap), gap + right * (cell + gap)
            shown = grid[top : top + cell : 3, left : left + cell : 3]
            expected = ((frame + 1) * 127.5).round().byte().movedim(0, -1)
            assert torch.equal(shown, expected)
    # The truth is one frame shorter: its last cell stays empty.
    assert (grid[gap : gap + cell, gap + 3 * (cell + gap) :] == grids.EMPTY).all()

    grids.write_grid(rows, ["+1", "+2", "+3", "+4"], tmp_path / "grid.png")
    written = picture(tmp_path / "grid.png")
    height, width = grid.shape[:2]
    inside = written[-8 - height : -8, -8 - width : -8]
    assert np.array_equal(inside, grid.numpy())
    assert (written[: -8 - height] < 100).any(), "labels above the columns"


@pytest.mark.parametrize("ink", ["on light", "on dark"])
def test_a_grid_for_a_page_shows_the_page_between_its_frames(tmp_path, ink):
    rows = [
        grids.PictureRow(name="white", frames=torch.ones(2, 3, 16, 16)),
        grids.PictureRow(name="grey", frames=torch.full((1, 3, 16, 16), 2 * 235 / 255 - 1)),
    ]
    grids.write_grid(rows, ["+1", "+2"], tmp_path / "page.png", ink)
    with Image.open(tmp_path / "page.png") as image:
        written = np.asarray(image.convert("RGBA"))
    cell, gap = 96, grids.GAP
    inside = written[-8 - 2 * cell - 3 * gap : -8, -8 - 2 * cell - 3 * gap : -8]
    frames = np.zeros(inside.shape[:2], bool)
    for down, right in ((0, 0), (0, 1), (1, 0)):
        top, left = gap + down * (cell + gap), gap + right * (cell + gap)
        frames[top : top + cell, left : left + cell] = True
        # A frame of the grey of empty cells is still a frame.
        assert (inside[top : top + cell, left : left + cell, :3] == (255, 235)[down]).all()
    assert (inside[frames, 3] == 255).all() and (inside[~frames, 3] == 0).all()
    around = written[: -8 - inside.shape[0]]
    ink_pixels = around[around[..., 3] > 250][:, :3]
    assert len(ink_pixels) > 10
    assert (ink_pixels > 150).all() if ink == "on dark" else (ink_pixels < 100).all()
    assert (around[..., 3] == 0).mean() > 0.8


def test_grid_refuses_what_does_not_fit(tmp_path):
    row = grids.PictureRow(name="a", frames=moving_square(2))
    other = grids.PictureRow(name="b", frames=moving_square(2, 16, 16))
    with pytest.raises(ValueError, match="one size"):
        grids.grid_pixels([row, other])
    with pytest.raises(ValueError, match="needs frames"):
        grids.grid_pixels([grids.PictureRow(name="a", frames=moving_square(2)[:0])])
    with pytest.raises(ValueError, match="2 columns need as many labels, got 1"):
        grids.write_grid([row], ["+1"], tmp_path / "grid.png")


def test_spread_keeps_both_ends():
    assert media.spread(3, 8) == [0, 1, 2]
    assert media.spread(64, 4) == [0, 21, 42, 63]


def test_metric_plot_draws_each_curve_in_its_colour(tmp_path):
    rows = [
        {"metric": "psnr", "horizon": horizon, "mean": 20.0 - shift - horizon, "baseline": name}
        | {"ci_low": 19.0 - shift - horizon, "ci_high": 21.0 - shift - horizon}
        for shift, name in enumerate(["model", "repeat_last", "shuffled_actions"])
        for horizon in (1, 2, 3)
    ]
    plots.plot_metrics(rows, ["psnr"], tmp_path / "a.png")
    pixels = picture(tmp_path / "a.png").reshape(-1, 3)
    for name in ("model", "repeat_last", "shuffled_actions"):
        colour = [int(plots.COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == colour).all(axis=1).sum() > 100
    with pytest.raises(ValueError, match=r"no rows of \['ssim'\]; measured: \['psnr'\]"):
        plots.plot_metrics(rows, ["ssim"], tmp_path / "b.png")


def test_loss_plot_on_a_dark_page_is_transparent(tmp_path):
    curves = {"separable": ([1, 10, 100], [1.0, 0.5, 0.1])}
    plots.plot_loss(curves, tmp_path / "loss.png", ink="on dark")
    assert imread(tmp_path / "loss.png")[0, 0, 3] == 0


def test_frames_of_one_stream_are_taken_in_whichever_way_they_come():
    frames = torch.rand(3, 3, 6, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = frames_to_pixels(frames)
    pixels = wanted.numpy()
    for given in (
        frames,
        frames[None],
        list(frames),
        [frame[None] for frame in frames],
        frames.movedim(1, -1),
        frames.numpy(),
        wanted,
        wanted.movedim(-1, 1),
        pixels,
        list(pixels),
    ):
        assert torch.equal(media.as_pixels(given), wanted)
    # Of a side of three pixels the type decides.
    tall = torch.zeros(2, 3, 5, 3)
    assert media.as_pixels(tall).shape == (2, 5, 3, 3)
    assert media.as_pixels(tall.to(torch.uint8)).shape == (2, 3, 5, 3)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "got none"),
        (torch.zeros(0, 3, 4, 4), r"got \[0, 3, 4, 4\]"),
        (torch.zeros(3, 4, 4), r"one stream, \[t 3 h w\] or \[t h w 3\], got \[3, 4, 4\]"),
        (torch.zeros(2, 5, 3, 4, 4), r"of one stream.*got \[2, 5, 3, 4, 4\]"),
        ([torch.zeros(2, 3, 4, 4)], r"of one stream.*got \[2, 3, 4, 4\]"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 4, 6)], r"all of one size, got \[3, 4, 4\], \[3, 4"),
        (torch.zeros(2, 4, 4, 4), r"got \[2, 4, 4, 4\]"),
        (torch.full((2, 3, 4, 4), torch.nan), "frames must be finite"),
        (torch.full((2, 3, 4, 4), 255.0), "convert them by frames / 127.5 - 1"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.long), "convert them by scd.pixels_to_frames"),
    ],
)
def test_what_is_no_video_is_refused_and_nothing_is_written(tmp_path, frames, words):
    with pytest.raises(ValueError, match=words):
        media.write_video(frames, tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_a_video_has_a_name_and_a_speed(tmp_path):
    frames = moving_square(3, 6, 8)
    media.write_video(frames, str(tmp_path / "a.mp4"))
    assert (tmp_path / "a.mp4").is_file()
    with pytest.raises(ValueError, match="written as .mp4, got 'a.gif'"):
        media.write_video(frames, tmp_path / "a.gif")
    for fps in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="fps must be a finite number above 0"):
            media.write_video(frames, tmp_path / "b.mp4", fps=fps)
