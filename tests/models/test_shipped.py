"""Worlds that are passed on with clips, and the first look that scd demo gives at one."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.data.clip import Batch, Conditions
from scd.demo import demo, first_look
from scd.evaluation.predict import choose_windows, read_windows
from scd.models import shipped
from scd.models.build import build
from scd.models.checkpoint import World, load_world, save_world
from scd.models.config import SamplingConfig


@pytest.fixture
def world(separable_config, toy_source) -> World:
    """A separable world of the toy's size."""
    torch.manual_seed(0)
    return World(
        model=build(separable_config).eval(),
        autoencoder=PixelAutoencoder(PixelConfig(mean=-0.3, std=0.3)),
        card=toy_source.card,
        sampling=SamplingConfig(num_steps=2),
    )


def clips_of(source, num_frames: int) -> Batch:
    return read_windows(source, choose_windows(source, 2, num_frames, 0), num_frames)


def test_a_shipped_world_comes_back_with_its_clips(world, toy_source, tmp_path):
    batch = clips_of(toy_source, 20)
    wanted = {name: weight.bfloat16() for name, weight in world.model.state_dict().items()}
    run = save_world(world, tmp_path / "run")
    folder = shipped.ship(run, batch, tmp_path / "shipped")
    kept = load_file(folder / "model.safetensors")
    assert all(torch.equal(kept[name], weight) for name, weight in wanted.items())
    again = load_world(folder)
    assert again.sampling == world.sampling and again.card == world.card
    assert next(again.model.parameters()).dtype == torch.float32
    clips = shipped.read_clips(folder)
    assert clips is not None and torch.equal(clips.actions, batch.conditions.actions)
    # A step of 8-bit pixels is 1 / 127.5.
    assert (clips.pixels(1) - batch.frames[1]).abs().max() < 0.5 / 127.5 + 1e-6
    assert torch.equal(clips.pixels(1, 3), clips.pixels(1)[:3])
    assert shipped.read_clips(run) is None
    with pytest.raises(FileExistsError, match="there already"):
        shipped.ship(run, batch, folder)


def test_what_cannot_be_shipped_is_refused_before_anything_is_written(world, toy_source, tmp_path):
    run = save_world(world, tmp_path / "run")
    batch = clips_of(toy_source, 3)
    with pytest.raises(ValueError, match="action id for each frame"):
        shipped.ship(run, Batch(frames=batch.frames, conditions=Conditions()), tmp_path / "out")
    small = Batch(frames=batch.frames[..., :16, :16], conditions=batch.conditions)
    with pytest.raises(ValueError, match="must be 32x32, got 16x16"):
        shipped.ship(run, small, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        shipped.ship(tmp_path / "nothing", batch, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (run / shipped.CLIPS_FILE).write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="holds no clips"):
        shipped.read_clips(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": torch.zeros(2, 3, 3, 32, 32)}, r"frames must be bytes .* got torch.float32"),
        ({"frames": torch.zeros(2, 3, 3, 16, 16, dtype=torch.uint8)}, r"\[n, t, 3, 32, 32\]"),
        ({"frames": torch.zeros(3, dtype=torch.uint8)}, r"frames must be bytes"),
        ({"actions": torch.zeros(2, 2, dtype=torch.long)}, r"for each of \[2, 3\] frames"),
        ({"actions": torch.zeros(2, 3)}, "needed an integer for each"),
        ({"actions": torch.full((2, 3), -1)}, "action ids must lie in 0"),
    ],
)
def test_clips_that_do_not_fit_their_world_are_refused(world, change, message, tmp_path):
    run = save_world(world, tmp_path / "run")
    right = {
        "frames": torch.zeros(2, 3, 3, 32, 32, dtype=torch.uint8),
        "actions": torch.zeros(2, 3, dtype=torch.int16),
    }
    save_file(right, run / shipped.CLIPS_FILE)
    clips = shipped.read_clips(run)
    assert clips is not None and len(clips) == 2 and clips[0].actions is not None
    save_file(right | change, run / shipped.CLIPS_FILE)
    with pytest.raises(ValueError, match=f"holds no clips: .*{message}"):
        shipped.read_clips(run)
    with pytest.raises(ValueError, match="holds no clips"):
        _ = load_world(run).clips


def test_first_look_streams_each_steering_from_the_same_frame(world, toy_source, tmp_path):
    run = save_world(world, tmp_path / "run")
    batch = clips_of(toy_source, first_look.NUM_GIVEN + 5)
    folder = shipped.ship(run, batch, tmp_path / "shipped")
    out = tmp_path / "out"
    out.mkdir()
    result = first_look.first_look(folder, out, seed=3)
    held = toy_source.card.conditions.num_actions
    assert result["frames"] == 5 + held * first_look.NUM_HELD
    assert result["timed_frames"] == result["frames"] - (1 + held) * first_look.NUM_WARM_UP
    assert json.loads((out / "report.json").read_text())["denoising_steps"] == 2
    page = (out / "report.html").read_text()
    assert page.count("data:video/mp4") == 1 and page.count("data:image/png") == 2
    for name in ("frames.png", "rollout.mp4"):
        assert (out / name).stat().st_size > 1000
    clips, again = shipped.read_clips(folder), load_world(folder)
    assert clips is not None
    start = first_look.begin_stream(again, clips, seed=3)
    frames, _ = first_look.stream(start, clips, again.card.action_names)
    # The stream that the others are copies of stands where it stood.
    assert start.num_frames == first_look.NUM_GIVEN
    alone = first_look.begin_stream(again, clips, seed=3)
    for index, action in enumerate(clips.actions[0, first_look.NUM_GIVEN :]):
        torch.testing.assert_close(frames["its own actions"][index], alone.step(action[None])[0])
    short = shipped.ship(run, clips_of(toy_source, 4), tmp_path / "short")
    with pytest.raises(ValueError, match="more than 16 frames"):
        first_look.first_look(short, out, seed=0)
    with pytest.raises(ValueError, match="carries no clips"):
        first_look.first_look(run, out, seed=0)


def test_demo_says_what_needs_training():
    with pytest.raises(ValueError, match="add --train"):
        demo.DemoConfig(quick=True)
    with pytest.raises(ValueError, match="add --train"):
        demo.DemoConfig(steps=3)


def test_the_example_ships_a_run(world, tmp_path):
    run = save_world(world, tmp_path / "run")
    words = [sys.executable, "examples/ship_world.py", str(run), "--data", "toy:32"]
    words += ["--clips", "2", "--frames", "18", "--out", str(tmp_path / "shipped")]
    subprocess.run(words, check=True, capture_output=True)
    clips = shipped.read_clips(tmp_path / "shipped")
    assert clips is not None and clips.frames.shape[:2] == (2, 18)


@pytest.mark.skipif(not shipped.SHIPPED.is_dir(), reason="no world is shipped yet")
def test_the_shipped_world_is_small_and_complete():
    folder = shipped.shipped_world()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 32 * 2**20
    world, clips = load_world(folder), shipped.read_clips(folder)
    assert world.card.height == world.card.width == 64
    assert clips is not None and clips.frames.shape[1] > first_look.NUM_GIVEN
    assert (folder / "README.md").is_file()
