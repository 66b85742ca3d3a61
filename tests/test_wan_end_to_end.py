"""From a folder of diffusers with random weights to videos of prompts, by the commands alone."""

import json
import shutil

import pytest

from scd.cli import main
from scd.data.video import probe_video, read_video
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
