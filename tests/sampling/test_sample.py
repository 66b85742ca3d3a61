"""A stream from a tiny real world: what is written, and where the truth ends."""

import json
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file, save_file

from scd.data.source import open_source
from scd.evaluation import grids, predict
from scd.models import shipped
from scd.models.checkpoint import load_world
from scd.sampling import sample
from scd.sampling.settings import SampleConfig
from scd.streaming.rollout import Rollout


@pytest.fixture
def model_config(separable_config):
    """One kind is enough: a stream is stepped the same way."""
    return separable_config


def settings(run, data, tmp_path, **changes):
    values = dict(run=run, data=data, context=3, frames=5, device="cpu", out=str(tmp_path / "s"))
    return SampleConfig(**{**values, **changes})


def test_video_picture_and_result(run, tmp_path):
    result = sample.sample(settings(run, "toy:32", tmp_path, steps=3))
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        "sample.mp4",
        "sample.png",
        "sample.json",
    }
    with av.open(tmp_path / "s" / "sample.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert sum(1 for _ in container.decode(stream)) == 3 + 5
    written = json.loads((tmp_path / "s" / "sample.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert {"command", "commit", "hardware", "timed", "settings"} <= set(written)
    assert written["model"]["sampling"]["num_steps"] == 3
    for part in ("encoder", "decoder", "autoencoder", "total"):
        seconds = written["seconds_per_frame"][part]
        assert 0 < seconds["p50"] <= seconds["p99"]
    assert written["time_to_first_frame_s"] >= written["first_frame_s"]["total_s"] > 0
    assert (written["true_frames"], written["frames_steered_by_the_episode"]) == (5, 5)


def test_stream_is_the_rollout_of_the_clip(tiny_world, toy_source):
    clip = sample.choose_clip(toy_source, 2, 4, seed=1)
    stream = sample.run_stream(Rollout(tiny_world, seed=1), clip, 2, 4)
    again = Rollout(tiny_world, seed=1)
    assert clip.actions is not None
    batch = sample.Conditions(actions=clip.actions[None, :2])
    again.begin(clip.frames[None, :2], batch)
    expected = again.generate(clip.actions[None, 2:], 4)[0]
    assert torch.equal(stream.frames, expected)
    assert len(stream.timings) == 4


def test_stream_longer_than_the_episode(tiny_world, run, folder, tmp_path):
    result = sample.sample(settings(run, folder, tmp_path, frames=30))
    assert (result["true_frames"], result["frames_steered_by_the_episode"]) == (17, 17)
    # Where the episode's actions end they start over.
    clip = sample.choose_clip(open_source(folder, "val"), 3, 30, seed=0)
    assert len(clip) == 20 and clip.actions is not None
    stream = sample.run_stream(Rollout(tiny_world), clip, 3, 30)
    again = Rollout(tiny_world)
    again.begin(clip.frames[None, :3], sample.Conditions(actions=clip.actions[None, :3]))
    actions = torch.cat([clip.actions, clip.actions[:13]])[None, 3:]
    assert torch.equal(stream.frames, again.generate(actions, 30)[0])
    # Truth above prediction, its last cells empty.
    picture = imread(tmp_path / "s" / "sample.png")[..., :3]
    height, cell, gap = picture.shape[0], 96, grids.GAP
    assert height == 28 + 2 * (cell + gap) + gap + 8
    top, right = 28 + gap, picture.shape[1] - 8 - gap
    assert (picture[top : top + cell, right - cell : right] * 255 == grids.EMPTY).all()
    below = top + cell + gap
    assert (picture[below : below + cell, right - cell : right] * 255 != grids.EMPTY).any()


def test_stream_from_nothing_has_no_truth(run, tmp_path):
    result = sample.sample(settings(run, "toy:32", tmp_path, context=0))
    assert result["true_frames"] == 0
    with av.open(tmp_path / "s" / "sample.mp4") as container:
        assert sum(1 for _ in container.decode(container.streams.video[0])) == 5
    assert imread(tmp_path / "s" / "sample.png").shape[0] == 28 + 96 + 2 * grids.GAP + 8


def test_a_world_with_clips_needs_no_data(run, folder, tmp_path):
    source = open_source(folder, "val")
    batch = predict.read_windows(source, [(0, 0), (0, 6)], 10)
    shipped.ship(run, batch, tmp_path / "shipped")
    world = str(tmp_path / "shipped")
    config = settings(world, "", tmp_path, seed=3, frames=12)
    result = sample.sample(config)
    # The second of two clips; its seven frames after the context are shown, and then none.
    assert (result["true_frames"], result["frames_steered_by_the_episode"]) == (7, 7)
    clip = sample._given_clip(config, load_world(world))
    actions = batch.conditions.actions
    assert clip.actions is not None and actions is not None
    assert torch.equal(clip.actions, actions[1])
    torch.testing.assert_close(clip.frames, batch.frames[1], atol=1 / 255, rtol=0)
    other = {"out": str(tmp_path / "other")}
    with pytest.raises(ValueError, match="context of 11 frames was asked for, the clips of .* 10"):
        sample.sample(settings(world, "", tmp_path, context=11, **other))
    with pytest.raises(ValueError, match="carries no clips to begin from: name some --data"):
        sample.sample(settings(run, "", tmp_path, **other))


def test_samples_lie_in_the_run_and_none_is_lost(run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def place(data=folder, **changes):
        values = {"frames": 2, "out": "", **changes}
        return sample.sample(settings(run, data, tmp_path, **values))["settings"]["out"]

    assert place() == f"{run}/sample" and (Path(run) / "sample" / "sample.mp4").is_file()
    before = (Path(run) / "sample" / "sample.json").read_text()
    assert place(seed=1) == f"{run}/sample-2" == place(seed=1, threads=1)
    # Other words for the same clips.
    assert place(seed=1, data="data") == f"{run}/sample-2"
    assert place(context=2) == f"{run}/sample-3"
    assert (Path(run) / "sample" / "sample.json").read_text() == before
    assert json.loads(before)["settings"]["seed"] == 0
    # Other weights are another sample.
    torch.manual_seed(1)
    moved = Path(run).rename(tmp_path / "moved")
    for path in moved.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, path)
    moved.rename(run)
    assert place() == f"{run}/sample-4"
    # So is another autoencoder.
    config = Path(run) / "config.json"
    values = json.loads(config.read_text())
    values["autoencoder"]["std"] *= 2
    config.write_text(json.dumps(values))
    assert place() == f"{run}/sample-5"


def test_a_folder_with_another_sample_is_left_alone(run, folder, tmp_path):
    config = settings(run, folder, tmp_path, frames=2)
    sample.sample(config)
    before = (tmp_path / "s" / "sample.mp4").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match=r"holds another sample: .*then and now: seed: 0, 5"):
        sample.sample(replace(config, seed=5))
    assert (tmp_path / "s" / "sample.mp4").stat().st_mtime_ns == before
    (tmp_path / "s" / "sample.json").unlink()
    with pytest.raises(FileExistsError, match="sample.mp4 and sample.png of unknown settings"):
        sample.sample(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 21}, "a context of 21 frames was asked for, the longest episode has 20"),
        ({"context": -1}, "context must be 0 or more, got -1"),
        ({"frames": 0}, "frames must be 1 or more, got 0"),
        ({"steps": 0}, "num_steps must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_sampled_is_refused(run, folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        sample.sample(settings(run, folder, tmp_path, **changes))
    assert not (tmp_path / "s").exists()


def test_engines_sample_the_same_frames(run, tmp_path):
    pictures = {}
    for engine, precision in (("plain", "fp32"), ("fast", "fp32"), ("fast", "bf16")):
        out = tmp_path / f"{engine}-{precision}"
        changes = {"out": str(out), "engine": engine, "precision": precision}
        sample.sample(settings(run, "toy:32", tmp_path, **changes))
        pictures[out.name] = imread(out / "sample.png").astype(float)
    difference = abs(pictures["fast-fp32"] - pictures["plain-fp32"])
    # A rounded pixel may fall to either side.
    assert difference.max() <= 1.01 / 255
    assert 0 < abs(pictures["fast-bf16"] - pictures["plain-fp32"]).mean() < 0.02
