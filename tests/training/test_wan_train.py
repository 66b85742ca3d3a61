"""Stage one of Wan: what diffusers wrote is recomposed, clips are encoded, and teacher forcing
trains on latents and prompts, by the commands alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scd.cli import main
from scd.common.runlog import read_log
from scd.data.clip import Conditions
from scd.data.latents import LatentSource
from scd.models.checkpoint import load_world
from scd.models.flow import velocity_between
from scd.models.wan.config import WanEncoderConfig
from scd.models.wan.timesteps import time_table, training_weights
from scd.objectives.config import TeacherForcingConfig
from tests.tiny import teacher_forced_loss
from tests.tiny_wan import random_text, tiny_wan, tiny_wan_separable, wan_clips
from tests.tiny_wan_run import PROMPTS, encode_with, words_of, write_clips, write_world
from tests.tiny_wan_vae import write_tiny_parts


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Prompts are embedded once, in a place of our own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def made(cache, tmp_path_factory) -> tuple[str, str]:
    """What Wan2.1 looks like on disk, small; and it recomposed."""
    return write_world(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def wan(made) -> str:
    return made[0]


@pytest.fixture(scope="module")
def world(made) -> str:
    return made[1]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> str:
    return write_clips(tmp_path_factory.mktemp("clips") / "all")


@pytest.fixture(scope="module")
def latents(clips, world, cache, tmp_path_factory) -> str:
    """The clips, encoded by the world's own parts."""
    return encode_with(world, clips, tmp_path_factory.mktemp("latents") / "all")


def newest(run: Path) -> dict[str, bytes]:
    """Contents of the newest checkpoint, without the time it took."""
    folder = run / (run / "last").read_text().strip()
    files = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    progress = json.loads(files.pop("progress.json"))
    progress.pop("elapsed_s")
    return files | {"progress": json.dumps(progress).encode()}


def test_train_validate_picture_and_go_on_bit_for_bit(latents, world, tmp_path):
    looks = ["--validate-every", "2", "--sample-every", "4", "--num-accumulation", "2"]
    changed = ["--model.decoder.context-time", "clean", "--gradient-checkpointing"]
    assert main(words_of(latents, world, tmp_path / "whole", *looks, *changed)) == 0
    whole = tmp_path / "whole"
    assert len(read_log(whole, "validation")) == 2
    assert (whole / "samples/step_000004.png").read_bytes()[:4] == b"\x89PNG"
    assert len({event["plain_loss"] for event in read_log(whole, "step")}) == 4
    # A time limit of nearly nothing stops after each step: the run is made of four parts.
    part = words_of(latents, world, tmp_path / "parts", *looks, *changed, "--save-every", "1")
    for _ in range(4):
        assert main([*part, "--time-limit-s", "0.001"]) == 0
    assert read_log(tmp_path / "parts", "resume")[-1]["step"] == 3
    assert newest(tmp_path / "parts") == newest(whole)
    trained = load_world(whole)
    assert trained.model.config.decoder.context_time == "clean"
    assert trained.sampling == load_world(world).sampling
    # What was trained streams by the parts of the world that it came from.
    out = tmp_path / "sample"
    words = ["sample", str(whole), "--prompt", PROMPTS[0], "--seconds", "0.3", "--out", str(out)]
    assert main([*words, "--precision", "fp32"]) == 0


def test_a_world_that_was_moved_without_its_parts_trains_without_pictures(
    latents, world, tmp_path, caplog
):
    moved = tmp_path / "moved"
    shutil.copytree(world, moved, ignore=shutil.ignore_patterns("vae", "text_encoder", "tokenizer"))
    settings = json.loads((moved / "config.json").read_text())
    settings["autoencoder"]["source"] = str(tmp_path / "gone")
    (moved / "config.json").write_text(json.dumps(settings))
    changes = ["--max-steps", "1", "--sample-every", "1", "--validate-every", "1"]
    assert main(words_of(latents, str(moved), tmp_path / "run", *changes)) == 0
    assert "gone" in read_log(tmp_path / "run", "sample")[0]["skipped"]
    assert "whether the run's autoencoder made" in caplog.text


@pytest.mark.parametrize("kind", ["separable", "dense"])
def test_the_loss_of_one_batch_falls(kind):
    model = tiny_wan_separable() if kind == "separable" else tiny_wan(num_layers=3)
    clean, _, _, conditions, _ = wan_clips(num_frames=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        # The same draws in every step.
        generator = torch.Generator().manual_seed(0)
        config = TeacherForcingConfig(condition_dropout=0.0)
        loss, _ = teacher_forced_loss(model, clean, conditions, config, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_loss_is_the_weighted_error_at_times_of_the_table():
    clean = wan_clips(num_frames=4)[0]
    conditions = Conditions(text=random_text())
    seen = {}

    def network(history, noisy, time, conditions, augment, clean_time=None):
        seen.update(history=history, noisy=noisy, time=time, clean_time=clean_time)
        return torch.zeros_like(noisy)

    def draw(**settings):
        config = TeacherForcingConfig(condition_dropout=0.0, num_draws=2, **settings)
        generator = torch.Generator().manual_seed(3)
        return teacher_forced_loss(network, clean, conditions, config, generator, 2)

    loss, logs = draw()
    table, time = time_table(), seen["time"]
    assert torch.equal(seen["history"], clean) and seen["clean_time"] is None
    assert torch.isin(time, table.float()).all()
    # Frames of a block share their time, draws do not.
    assert torch.equal(time[..., ::2], time[..., 1::2]) and len(time.unique()) == 8
    noise = (seen["noisy"] - (1 - time[..., None, None, None]) * clean[:, None]) / time[
        ..., None, None, None
    ]
    errors = velocity_between(clean[:, None], noise).square().mean((-3, -2, -1))
    expected = (errors * training_weights(time, table)).mean()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(logs["plain_loss"], errors.mean().float(), rtol=1e-4, atol=0)
    assert torch.equal(draw(weighting="none")[0], logs["plain_loss"])
    draw(history_time=0.1)
    assert 0 < seen["clean_time"].min() and seen["clean_time"].max() <= 0.1
    assert not torch.equal(seen["history"], clean)


def test_the_encoder_reads_the_frame_at_the_upper_fifth_of_noise_beside_clean_history():
    clean, noisy, time, conditions, _ = wan_clips(num_frames=3)
    seen = []
    model = tiny_wan_separable(encoder=WanEncoderConfig(num_layers=4))
    tokens, forced, read = model.encoder.tokens, model.encoder.run_teacher_forced, []

    def cut(frames):
        read.append(frames)
        return tokens(frames)

    def look(past, past_modulation, frames, modulation, text):
        assert torch.equal(past, tokens(read[-2])) and torch.equal(frames, tokens(read[-1]))
        seen.append((*read[-2:], modulation))
        return forced(past, past_modulation, frames, modulation, text)

    model.encoder.tokens, model.encoder.run_teacher_forced = cut, look
    config = TeacherForcingConfig(condition_dropout=0.0)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        teacher_forced_loss(model, clean, conditions, config, generator)
    for past, frames, modulation in seen:
        # The last frame is no frame's past.
        assert torch.equal(past, clean[:, :-1])
        # The time that the frame was told: where it is searched on a fine grid.
        grid = torch.linspace(0.9, 1, 1001)
        told = model.encoder.condition_embedder.times(grid[None])[1][0]
        nearest = (modulation[:, :, None] - told).square().sum((-1, -2)).argmin(-1)
        assert grid[nearest].min() >= 0.95 - 2e-4
        # The noise that stands in it has unit scale.
        at = grid[nearest][..., None, None, None]
        noise = (frames - (1 - at) * clean) / at
        assert 0.8 < noise.std() < 1.2 and len(nearest.unique()) > 1


def test_hidden_prompts_are_the_embedded_empty_one(latents):
    clip = LatentSource(latents, "train").read(0, 0, 5)
    conditions = Conditions(text=clip.text[None], null_text=clip.null_text[None])
    assert not torch.equal(clip.text, clip.null_text)
    seen = []

    def network(history, noisy, time, conditions, augment):
        seen.append(augment.drop(conditions).text)
        return torch.zeros_like(noisy)

    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        config = TeacherForcingConfig(condition_dropout=0.25)
        teacher_forced_loss(network, clip.frames[None], conditions, config, generator)
    hidden = [torch.equal(text, conditions.null_text) for text in seen]
    shown = [torch.equal(text, conditions.text) for text in seen]
    assert all(a != b for a, b in zip(hidden, shown, strict=True))
    assert 25 < sum(hidden) < 80


def refusal(words: list[str], capsys) -> str:
    assert main(words) == 2
    return capsys.readouterr().err


def test_what_does_not_fit_is_refused_before_anything_is_made(
    latents, world, wan, clips, tmp_path, capsys
):
    out = tmp_path / "run"
    base = words_of(latents, world, out)
    without = base[:4] + base[6:]
    assert "needs --initial RUN, a Wan world" in refusal(without, capsys)
    assert "holds no latents: write them first" in refusal(words_of(clips, world, out), capsys)
    gone = words_of(str(tmp_path / "gone"), world, out)
    assert "no such data folder" in refusal(gone, capsys)
    bare = encode_with(world, clips, tmp_path / "bare", text="")
    assert "latents without prompts" in refusal(words_of(bare, world, out), capsys)
    long = [*base, "--num-frames", "9"]
    assert "longest of 4 episodes has 5" in refusal(long, capsys)
    other = tmp_path / "other"
    write_tiny_parts(other, seed=1)
    by_other = encode_with(str(other), clips, tmp_path / "by_other", text=wan)
    message = refusal(words_of(by_other, world, out), capsys)
    assert "latents of an autoencoder with other weights" in message
    by_other = encode_with(world, clips, tmp_path / "other_text", text=str(other))
    message = refusal(words_of(by_other, world, out), capsys)
    assert "prompts that another text encoder embedded" in message
    torn = replace_width(world, tmp_path / "torn", model=2)
    message = refusal(words_of(latents, torn, out), capsys)
    assert "frames of 32x32 have latents [16, 4, 4], the model works on [16, 4, 2]" in message
    smaller = replace_width(world, tmp_path / "smaller", model=2, card=16)
    message = refusal(words_of(latents, smaller, out), capsys)
    assert "for another model" in message and "model.shape.width: 2, 4" in message
    assert not out.exists()


def replace_width(world: str, folder: Path, *, model: int, card: int = 32) -> str:
    """The same world, but for latents and frames of another width."""
    shutil.copytree(world, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["model"]["shape"]["width"] = model
    settings["card"]["width"] = card
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": 0.0}, "shift must be positive"),
        ({"num_draws": 0}, "num_draws must be 1 or more, got 0"),
        ({"history_time": 0.001}, "at least the table's smallest entry"),
        ({"history_time": 1.5}, r"history_time must lie in \[0, 1\]"),
        ({"condition_dropout": 1.0}, "condition_dropout in"),
        ({"context_noise": -1.0}, "context_noise must be 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(TeacherForcingConfig(), **settings)
