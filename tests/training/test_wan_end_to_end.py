"""From a folder of diffusers with random weights to videos of prompts, by the commands alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from scd.cli import main
from scd.common.runlog import read_log
from scd.data.manifest import Entry, write_card, write_manifest
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec
from scd.data.video import probe_video, read_video, write_video
from scd.models.checkpoint import load_world
from tests.layouts import moving_pictures
from tests.tiny_wan import write_tiny_transformer
from tests.tiny_wan_vae import write_tiny_parts


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """What Wan2.1 looks like on disk, small."""
    folder = write_tiny_parts(tmp_path_factory.mktemp("wan"))
    return write_tiny_transformer(folder, num_layers=3)


@pytest.mark.parametrize("split", ["2,1+1", "dense"])
def test_convert_sample_and_vbench(split, pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = str(tmp_path / "run")
    words = ["convert", "wan", "--model", str(pretrained), "--split", split, "--out", run]
    sizes = ["--height", "16", "--width", "32", "--text-length", "16", "--num-steps", "2"]
    assert main([*words, *sizes, "--copy-parts"]) == 0
    # The world was moved, and what it was made of is elsewhere.
    moved = str(shutil.move(run, tmp_path / "moved"))
    fast = ["--precision", "fp32"]
    out = tmp_path / "sample"
    words = ["sample", moved, "--prompt", "the red dog runs", "--seconds", "0.5", "--out", str(out)]
    assert main([*words, "--prompt-at", "0.2: snow", *fast]) == 0
    result = json.loads((out / "sample.json").read_text())
    assert result["model"]["sampling"]["num_steps"] == 2
    assert probe_video(out / "sample.mp4").num_frames == 9
    assert read_video(out / "sample.mp4").std() > 1
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the red dog runs\nsnow at night\n")
    words = ["vbench", moved, "--prompts", str(prompts), "--seeds", "1", "--seconds", "0.3"]
    assert main([*words, "--out", str(tmp_path / "videos"), *fast]) == 0
    names = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert names == ["snow at night-0.mp4", "the red dog runs-0.mp4", "vbench.json"]
    assert "rendered 2 videos" in capsys.readouterr().out


def write_clips(folder):
    """Three clips of 17 frames, which are 5 latent ones, the last held out."""
    card = DataCard(height=32, width=32, fps=16.0, conditions=ConditionSpec(), action_names=())
    folder.mkdir()
    write_card(folder, card)
    entries = []
    for number, prompt in enumerate(("the red dog runs", "snow at night", "a blue ball")):
        write_video(
            folder / f"{number}.mp4", moving_pictures(17, 32, 32, number), fps=16.0, lossless=True
        )
        split = "val" if number == 2 else "train"
        entries.append(Entry(video=f"{number}.mp4", num_frames=17, split=split, prompt=prompt))
    write_manifest(folder, entries)
    return str(folder)


def test_the_whole_path(pretrained, tmp_path, monkeypatch):
    """Recompose, encode, train a few steps, distil a few updates, stream, and export; each stage
    reads what the one before wrote."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    world, latents, forced, few, out, back = (
        str(tmp_path / name) for name in ("world", "latents", "forced", "few", "video", "back")
    )

    def scd(*words):
        assert main([str(word) for word in words]) == 0

    sizes = ["--height", 32, "--width", 32, "--text-length", 16, "--window", 5]
    scd("convert", "wan", "--model", pretrained, "--split", "2,1+1", "--out", world, *sizes)
    parts = ["--autoencoder", pretrained, "--text-encoder", pretrained, "--text-length", 16]
    scd("encode", write_clips(tmp_path / "clips"), *parts, "--out", latents, "--device", "cpu")
    common = ["--num-frames", 5, "--batch-size", 1, "--device", "cpu", "--precision", "fp32"]
    common += ["--log-every", 1, "--save-every", 0, "--sample-every", 0, "--max-steps", 2]
    begin = ["--initial", world, "--validate-every", 0, "--optim.warmup-steps", 0]
    scd("train", "wan-tf", "--data", latents, *begin, *common, "--out", forced)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the red dog runs\nsnow at night\n")
    taught = ["--teacher", pretrained, "--prompts", prompts, "--num-accumulation", 1]
    scd("distill", "wan-dmd", forced, *taught, *common, "--out", few)
    # What one stage learnt is where the next one begins.
    models = [load_world(run).model.state_dict() for run in (world, forced, few)]
    for name in models[0]:
        assert not torch.equal(models[0][name], models[1][name]), name
        assert not torch.equal(models[1][name], models[2][name]), name
    assert [len(read_log(tmp_path / run, "step")) for run in ("forced", "few")] == [2, 2]
    speak = ["--prompt", "the red dog runs", "--seconds", 0.5, "--precision", "fp32"]
    scd("sample", few, *speak, "--out", out)
    assert probe_video(f"{out}/sample.mp4").num_frames == 9
    sampling = json.loads((tmp_path / "video/sample.json").read_text())["model"]["sampling"]
    assert (sampling["num_steps"], sampling["solver"]) == (4, "renoise")
    scd("export", "diffusers", few, "--out", back)
    for part in ("encoder", "decoder"):
        theirs = WanTransformer3DModel.from_pretrained(f"{back}/{part}").state_dict()
        ours = {name: w for name, w in models[2].items() if name.startswith(f"{part}.")}
        for name, weight in ours.items():
            assert torch.equal(theirs[name.removeprefix(f"{part}.")], weight), name


@pytest.mark.slow
def test_the_script_for_a_gpu_at_a_tiny_size(tmp_path):
    """Every command of runs/wan_gpu.sh; once more, and nothing is done again."""
    root = Path(__file__).resolve().parents[2]
    command = ["bash", str(root / "runs/wan_gpu.sh"), str(tmp_path / "out")]
    environment = os.environ | {"SMALL": "1", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    results = tmp_path / "out/results"
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (results / "bench.jsonl").read_text().splitlines()]
    assert "step" not in done.stdout
    assert {(row["steps"], row["context"]) for row in rows} == {
        (steps, context) for steps in (2, 4) for context in (1, 5)
    }
    assert len(list(results.glob("video-*/sample.json"))) == 8
    for stage in ("train", "distill"):
        for kind in ("separable", "dense"):
            lines = (results / f"{stage}-{kind}.jsonl").read_text().splitlines()
            steps = [event for event in map(json.loads, lines) if event["event"] == "step"]
            assert all(event["step_s"] > 0 for event in steps) and steps
