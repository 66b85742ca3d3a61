"""Worlds that are passed on with clips, and the first look that scd demo gives at one."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.autoencoders.deep_compression import deep_settings
from scd.autoencoders.diffusers import new_network, open_image_autoencoder, save_network
from scd.cli import main
from scd.data.clip import Batch, Conditions
from scd.demo import demo, first_look
from scd.evaluation.predict import choose_windows, read_windows
from scd.models import names, shelf, shipped
from scd.models.build import build
from scd.models.checkpoint import World, load_world, save_world
from scd.models.config import FrameShape, SamplingConfig
from scd.models.names import WORLDS, shipped_names


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


WITHOUT_DIFFUSERS = """
import sys
sys.modules["diffusers"] = None
import scd
world = scd.load(sys.argv[1])
rollout = scd.Rollout(world)
rollout.begin(world.clips[0])
assert rollout.step(1).shape == (1, 3, 32, 32)
"""


def test_a_world_of_latents_is_shipped_with_its_autoencoder(separable_config, toy_source, tmp_path):
    torch.manual_seed(0)
    save_network(new_network(deep_settings("small-16")), tmp_path / "autoencoder")
    autoencoder = open_image_autoencoder(tmp_path / "autoencoder")
    shape = FrameShape(channels=32, height=2, width=2, patch_size=1)
    world = World(
        model=build(replace(separable_config, shape=shape)).eval(),
        autoencoder=autoencoder,
        card=toy_source.card,
        sampling=SamplingConfig(num_steps=2),
    )
    batch = clips_of(toy_source, 5)
    made = shipped.ship(save_world(world, tmp_path / "run"), batch, tmp_path / "shipped")
    saved = world.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "autoencoder")
    moved = made.rename(tmp_path / "moved")
    again = load_world(moved)
    assert str(tmp_path) not in (moved / "config.json").read_text()
    latents = autoencoder.encode(batch.frames)
    assert torch.equal(load_world(saved).autoencoder.encode(batch.frames), latents)
    # Weights of 8 bits of mantissa.
    assert (again.autoencoder.encode(batch.frames) - latents).std() < 0.05 * latents.std()
    words = [sys.executable, "-c", WITHOUT_DIFFUSERS, str(moved)]
    subprocess.run(words, check=True)
    shutil.rmtree(moved / "vae")
    with pytest.raises(FileNotFoundError, match="moved lacks vae/, the autoencoder of its latents"):
        load_world(moved)
    # One of as many numbers a cell, and of another build.
    save_network(new_network(deep_settings("small-8")), moved)
    with pytest.raises(ValueError, match="moved"):
        load_world(moved).autoencoder.load()


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


def test_clips_are_one_picture_and_lose_nothing(world, toy_source, tmp_path):
    folder = shipped.ship(
        save_world(world, tmp_path / "run"), clips_of(toy_source, 5), tmp_path / "a"
    )
    file = folder / shipped.CLIPS_FILE
    kept, clips = load_file(file), shipped.read_clips(folder)
    assert clips is not None and kept["sheet"].numel() < clips.frames.numel() / 4
    with Image.open(io.BytesIO(kept["sheet"].numpy().tobytes())) as sheet:
        assert (sheet.format, sheet.size) == ("PNG", (32, 2 * 5 * 32))
    # What is there from before holds the pixels.
    save_file({"frames": clips.frames.contiguous(), "actions": clips.actions}, tmp_path / "frames")
    (tmp_path / "frames").replace(file)
    older = shipped.read_clips(folder)
    assert older is not None and torch.equal(older.frames, clips.frames)
    assert torch.equal(older.actions, clips.actions)
    data = bytearray(kept["sheet"].numpy().tobytes())
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 255
    grey = io.BytesIO()
    Image.new("L", (32, 2 * 5 * 32)).save(grey, "PNG")
    other = io.BytesIO()
    Image.new("RGB", (32, 2 * 5 * 32)).save(other, "WEBP", lossless=True)
    for sheet, message in (
        (data[: len(data) // 2], "PNG is damaged"),
        (flipped, "PNG is damaged"),
        (b"", "PNG is damaged"),
        (other.getvalue(), "PNG is damaged"),
        (grey.getvalue(), "got L of"),
    ):
        damaged = torch.frombuffer(bytearray(sheet) or bytearray(1), dtype=torch.uint8)
        save_file(kept | {"sheet": damaged[: len(sheet)]}, file)
        with pytest.raises(ValueError, match=f"holds no clips: .*{message}"):
            shipped.read_clips(folder)
    for change, message in (
        ({"actions": clips.actions[:, :4].contiguous()}, r"for \[2, 4\] frames, got RGB of"),
        ({"actions": clips.actions[0].contiguous()}, "actions of clips and frames"),
        ({"sheet": kept["sheet"].float()}, "needed the bytes of a PNG file"),
    ):
        save_file(kept | change, file)
        with pytest.raises(ValueError, match=f"holds no clips: .*{message}"):
            shipped.read_clips(folder)


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
    with pytest.raises(ValueError, match="'doom' has no effect on train"):
        demo.demo(demo.DemoConfig(world="doom", train=True))


def test_the_example_ships_a_run(world, tmp_path):
    run = save_world(world, tmp_path / "run")
    words = [sys.executable, "examples/ship_world.py", str(run), "--data", "toy:32"]
    words += ["--clips", "2", "--frames", "18", "--shown", "3", "--out", str(tmp_path / "shipped")]
    subprocess.run(words, check=True, capture_output=True)
    clips = shipped.read_clips(tmp_path / "shipped")
    assert clips is not None and clips.frames.shape[:2] == (2, 18)


@pytest.mark.parametrize("name", shipped_names())
def test_the_shipped_worlds_are_small_and_complete(name):
    assert shelf.read_shipped(WORLDS / name).title
    files = [path for path in (WORLDS / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    world, clips = load_world(WORLDS / name), shipped.read_clips(WORLDS / name)
    assert min(world.card.height, world.card.width) >= 64
    assert clips is not None and clips.frames.shape[1] > first_look.NUM_GIVEN
    assert (WORLDS / name / "README.md").is_file()


def test_the_worlds_of_the_package_are_listed_the_best_first(capsys):
    assert main(["worlds", "--json"]) == 0
    worlds = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in worlds] == shipped_names()
    doom = next(one for one in worlds if one["name"] == "doom")
    assert doom["title"] == "A small separable world of Doom"
    assert doom["actions"] == ["none", "forward", "left", "right"]
    size = sum(path.stat().st_size for path in Path(doom["folder"]).rglob("*") if path.is_file())
    assert doom["megabytes"] == round(size / 1e6, 1) and doom["num_steps"] == 4
    assert all(one["picture"] == "" or Path(one["picture"]).is_file() for one in worlds)
    assert main(["worlds"]) == 0
    said = capsys.readouterr().out
    assert all(one["name"] in said and f"{one['megabytes']:.1f} MB" in said for one in worlds)
    assert main(["worlds", "--all"]) == 2
    assert "takes --json or nothing, got --all" in capsys.readouterr().err


def test_a_moving_picture_is_the_file_or_a_clip(world, toy_source, tmp_path):
    batch = clips_of(toy_source, 5)
    folder = shipped.ship(save_world(world, tmp_path / "run"), batch, tmp_path / "shipped")
    made = shelf.moving_picture(folder)
    assert made is not None
    with Image.open(io.BytesIO(made)) as picture:
        assert picture.size == (32, 32) and getattr(picture, "n_frames", 1) == 5
    (folder / names.PICTURE_FILE).write_bytes(b"of its own")
    assert shelf.moving_picture(folder) == b"of its own"
    assert shelf.read_shipped(folder).picture == str(folder / names.PICTURE_FILE)
    assert shelf.moving_picture(tmp_path / "run") is None


def test_a_demo_is_of_the_world_that_is_named(world, toy_source, tmp_path, capsys):
    batch = clips_of(toy_source, first_look.NUM_GIVEN + 3)
    folder = shipped.ship(save_world(world, tmp_path / "run"), batch, tmp_path / "mine")
    assert main(["demo", str(folder), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["world"] == "mine" and report["frames_per_second"] > 0
    assert report["first_frame_s"] > report["seconds_to_first_frame"] > 0
    capsys.readouterr()
    assert main(["demo", "dom", "--out", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "did you mean 'doom'?" in said and all(one in said for one in shipped_names())
    assert main(["play", "nowhere", "--port", "0", "--no-browser"]) == 2
    assert f"The package has {', '.join(shipped_names())}" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "file",
    [
        *("model.safetensors", "clips.safetensors", "config.json"),
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_demo_of_a_damaged_world_leaves_no_folder(file, tmp_path, capsys):
    folder = shutil.copytree(WORLDS / "cars", tmp_path / "mine")
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    assert main(["demo", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert file in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
