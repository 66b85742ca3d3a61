"""Clips that turn out damaged while a run trains cost the run nothing but themselves."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scd.cli import main
from scd.common.runlog import read_log
from scd.data.clip import frames_to_pixels
from scd.data.latents import LatentSource
from scd.data.loader import Loader, UnreadableClip
from scd.data.manifest import write_card, write_episode, write_manifest
from scd.data.source import open_source
from scd.data.toy import ToyWorld
from scd.models.config import (
    BlockConfig,
    CacheConfig,
    DecoderConfig,
    EncoderConfig,
    SamplingConfig,
    SeparableConfig,
)
from scd.models.progress import load_progress
from scd.optim.config import OptimConfig
from scd.training.config import TrainConfig
from scd.training.world import train

NUM_FRAMES = 16


def damage(path: Path) -> None:
    """Zero a part of the middle, past which nothing of it can be decoded."""
    data = bytearray(path.read_bytes())
    begin, stop = len(data) // 3, len(data) // 2
    data[begin:stop] = bytes(stop - begin)
    path.write_bytes(data)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """A run on six episodes, one of which, met in the third step, is damaged; two to validate."""
    source = ToyWorld(32, "train")
    data, entries = tmp_path / "data", []
    for number, split in enumerate(["train"] * 6 + ["val"] * 2):
        clip = source.read(number, 0, 20)
        pixels, name = frames_to_pixels(clip.frames).numpy(), f"e{number}"
        entries.append(write_episode(data, name, pixels, clip.actions.numpy(), 10.0, split))
    write_card(data, source.card)
    write_manifest(data, entries)
    config = TrainConfig(
        data=str(data),
        out=str(tmp_path / "run"),
        max_steps=6,
        num_frames=NUM_FRAMES,
        batch_size=2,
        log_every=1,
        validate_every=0,
        sample_every=0,
        save_every=0,
        num_validation_clips=3,
        threads=1,
        device="cpu",
        model=SeparableConfig(
            block=BlockConfig(width=16, head_dim=16, rotary_axes=(4, 6, 6), initial_gate=0.5),
            encoder=EncoderConfig(num_layers=1),
            decoder=DecoderConfig(num_layers=1),
            conditions=source.card.conditions,
            cache=CacheConfig(window=4),
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        sampling=SamplingConfig(num_steps=1),
    )
    loader = Loader(open_source(str(data), "train"), 2, NUM_FRAMES, config.seed)
    path = data / f"videos/e{loader._order(0)[4]}.mp4"
    shutil.copy(path, tmp_path / "sound.mp4")
    damage(path)
    path.rename(data / "videos/damaged.mp4")
    entries = [
        replace(one, video="videos/damaged.mp4") if one.video.endswith(path.name) else one
        for one in entries
    ]
    write_manifest(data, entries)
    return config


def step_files(run: Path) -> dict[str, bytes]:
    """Contents of the newest checkpoint but for the times that it took."""
    folder = run / (run / "last").read_text().strip()
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.name != "progress.json"}


def test_by_default_a_run_saves_and_stops_with_the_name_of_the_file(config, tmp_path):
    with pytest.raises(UnreadableClip) as refused:
        train(config)
    message = str(refused.value)
    assert "damaged.mp4: frames" in message and "add" not in message
    assert "--data.on-error skip" in message and "Stopped after step 2 of 6" in message
    run = tmp_path / "run"
    assert load_progress(run / (run / "last").read_text().strip()).step == 2
    assert read_log(run, "end")[0] == read_log(run, "end")[0] | {
        "step": 2,
        "reason": "a clip cannot be read",
    }
    # Met again at once, nothing of what was saved is lost.
    with pytest.raises(UnreadableClip, match=r"damaged.mp4.*Stopped after step 2 of 6"):
        train(config)
    shutil.copy(tmp_path / "sound.mp4", tmp_path / "data/videos/damaged.mp4")
    with pytest.raises(ValueError, match=r"changed: videos/damaged.mp4 \(video\).*--data-changed"):
        train(config)
    train(replace(config, data_changed=True))
    whole = train(replace(config, out=str(tmp_path / "whole")))
    assert step_files(run) == step_files(whole)


def test_skipping_is_logged_once_and_resumes_bit_for_bit(config, tmp_path):
    config = replace(config, data_on_error="skip")
    whole = train(config)
    (event,) = read_log(whole, "left out")
    assert event["file"].endswith("damaged.mp4") and "cannot be decoded" in event["reason"]
    # The damaged clip is met in the steps 3 and, in the second pass, 4 to 6.
    for first in (1, 3):
        parts = replace(config, out=str(tmp_path / f"parts{first}"), num_loader_workers=first)
        stopped = replace(parts, time_limit_s=1e-9)
        for _ in range(first):
            train(stopped)
        assert load_progress(Path(parts.out) / f"step_{first:06d}").step == first
        train(parts)
        assert step_files(Path(parts.out)) == step_files(whole)
    # A run that stopped at the clip goes on without it, as if it had never stopped.
    stopped = replace(config, out=str(tmp_path / "stopped"))
    with pytest.raises(UnreadableClip):
        train(replace(stopped, data_on_error="stop"))
    assert step_files(train(stopped)) == step_files(whole)


def test_held_out_clips_are_named_or_left_out(config, tmp_path):
    damage(tmp_path / "data/videos/e6.mp4")
    config = replace(config, validate_every=2, max_steps=2)
    with pytest.raises(UnreadableClip, match=r"e6.mp4: frames .*--data.on-error skip"):
        train(config)
    run = train(replace(config, data_on_error="skip"))
    assert len(read_log(run, "validation")) == 1


COMMAND = "--num-frames 16 --batch-size 2 --max-steps 6 --validate-every 0 --sample-every 0 "
COMMAND += "--device cpu --log-every 1 --model.block.width 64 --model.encoder.num-layers 1 "
COMMAND += "--model.decoder.num-layers 1"


def test_the_command_ends_with_one_message(config, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["train", "toy", "--data", config.data, "--out", str(run), *COMMAND.split()]
    # Statistics of the pixels are measured on clips of the whole split, before anything is trained.
    assert main(words) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("scd: ") and "damaged.mp4: frames" in printed
    assert main([*words, "--data.on-error", "skip"]) == 0
    assert (run / "step_000006").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_two_processes_stop_together_or_go_on(config, tmp_path, on_error):
    import json

    from scd.common.config import to_json

    config = replace(config, batch_size=1, data_on_error=on_error)
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, json\n"
        "from scd.common.config import from_json\n"
        "from scd.training.config import TrainConfig\n"
        "from scd.training.world import train\n"
        "train(from_json(TrainConfig, json.load(open(sys.argv[1]))))\n"
    )
    settings = tmp_path / "config.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", str(script), str(settings)]

    def launch(run: TrainConfig) -> subprocess.CompletedProcess[str]:
        settings.write_text(json.dumps(to_json(run)))
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = launch(config)
    run = tmp_path / "run"
    if on_error == "stop":
        assert done.returncode and "damaged.mp4" in done.stderr
        assert load_progress(run / (run / "last").read_text().strip()).step == 2
        return
    assert done.returncode == 0, done.stderr
    assert [event["step"] for event in read_log(run, "step")] == list(range(1, 7))
    (event,) = read_log(run, "left out")
    assert event["file"].endswith("damaged.mp4")


def test_encoding_names_what_it_cannot_read_or_passes_it_over(config, tmp_path, capsys):
    out = tmp_path / "latents"
    words = ["encode", config.data, "--autoencoder", "pixels", "--out", str(out)]
    words += ["--episodes-per-file", "2", "--splits", "train", "--device", "cpu"]
    assert main(words) == 2
    assert "damaged.mp4: frames" in capsys.readouterr().err
    assert main([*words, "--data.on-error", "skip"]) == 0
    assert "1 episodes could not be read and are left out" in capsys.readouterr().out
    latents = LatentSource(out, "train")
    videos = open_source(config.data, "train")
    lengths = [latents.num_frames(episode) for episode in range(6)]
    (gone,) = [episode for episode, length in enumerate(lengths) if not length]
    assert videos.title(gone).endswith("damaged.mp4") and sorted(lengths) == [0] + [20] * 5
    assert latents.oddities() == [f"1 episodes could not be read when they were encoded: {gone}"]
    other = next(episode for episode in range(6) if episode != gone)
    np.testing.assert_array_equal(
        latents.read(other, 3, 4).actions, videos.read(other, 3, 4).actions
    )
    assert len(Loader(latents, 5, 16, seed=0).batch(0).frames) == 5
