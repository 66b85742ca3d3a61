"""Video whose model and autoencoder are in memory one after the other."""

import json
import weakref

import pytest
import torch
from PIL import Image

from scd.autoencoders.base import LaterDecoder
from scd.cli import main
from scd.data.video import read_video
from scd.sampling.pipeline import SCDPipeline
from scd.sampling.settings import VideoConfig
from scd.sampling.text_to_video import Script, TextToVideo, read_picture
from tests.tiny_text_world import write_text_run
from tests.tiny_wan_vae import tiny_decoder, write_tiny_parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("wan")


@pytest.fixture(scope="module")
def run(folder):
    return write_text_run("separable", write_tiny_parts(folder / "parts"), folder)


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


def parts_of(run, offload, **settings):
    made = {"precision": "fp32", "device": "cpu", "offload": offload} | settings
    return TextToVideo(VideoConfig(run=run, **made))


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_frames_are_the_same_bit_for_bit(run, folder, tmp_path, first, tiny):
    small = folder / "tiny"
    tiny_decoder().save_pretrained(small)
    picture = tmp_path / "first.png"
    if first:
        Image.new("RGB", (40, 20), (200, 30, 60)).save(picture)
    made = {}
    for offload in (False, True):
        parts = parts_of(run, offload, tiny=str(small) if tiny else "")
        card = parts.world.card
        given = None
        if first:
            given = parts.encode(read_picture(picture, card.height, card.width))
        text = parts.embed(["the red dog runs"])
        made[offload] = parts.video(3, Script(text=text, num_latents=4, given=given))
    one, two = made[False], made[True]
    assert torch.equal(one.given, two.given) and len(one.given) == int(first)
    assert torch.equal(one.frames, two.frames) and len(one.frames) > 2
    counts = [[timing.num_frames for timing in each.timings] for each in (one, two)]
    assert counts[0] == counts[1] and min(timing.autoencoder_s for timing in two.timings) > 0
    assert two.first_frame_s > sum(timing.denoise_only_s for timing in two.timings)


def test_never_are_both_in_memory(run, monkeypatch):
    parts = parts_of(run, True)
    assert isinstance(parts.decoder, LaterDecoder) and parts.autoencoder._network is None
    parts.encode(torch.zeros(1, 1, 3, parts.world.card.height, parts.world.card.width))
    assert parts.autoencoder._network is None
    text, held = parts.embed(["snow at night"]), weakref.ref(parts.engine)
    there = []
    read = type(parts.autoencoder)._read

    def watched(autoencoder):
        there.append(held() is not None)
        return read(autoencoder)

    monkeypatch.setattr(type(parts.autoencoder), "_read", watched)
    script = Script(text=text, num_latents=3)
    first = parts.video(1, script)
    assert there == [True] and parts.autoencoder._network is None
    again = parts.video(1, script, is_last=True)
    assert there == [True, False] and torch.equal(first.frames, again.frames)
    assert not hasattr(parts, "engine") and parts.autoencoder._network is None


def test_by_the_commands(run, tmp_path, capsys):
    words = ["--precision", "fp32", "--seconds", "0.5"]
    videos = []
    for number, more in enumerate(([], ["--offload"])):
        out = tmp_path / str(number)
        said = ["sample", run, "--prompt", "the dog", "--out", str(out), *words, *more]
        assert main(said) == 0
        videos.append(read_video(out / "sample.mp4"))
        result = json.loads((out / "sample.json").read_text())
        assert result["model"]["decoder"] == "AutoencoderKLWan" and result["frames"] == 9
    assert (videos[0] == videos[1]).all()
    (tmp_path / "prompts.txt").write_text("the dog\n")
    bench = ["vbench", run, "--prompts", str(tmp_path / "prompts.txt"), "--seeds", "1", *words]
    rendered = []
    for number, more in enumerate(([], ["--offload"])):
        folder = tmp_path / f"videos{number}"
        assert main([*bench, "--out", str(folder), *more]) == 0
        rendered.append((folder / "the dog-0.mp4").read_bytes())
    assert rendered[0] == rendered[1]
    # What changes nothing in the videos may differ from process to process.
    assert main([*bench, "--out", str(tmp_path / "videos1")]) == 0
    assert "rendered 0 videos" in capsys.readouterr().out
    with pytest.raises(ValueError, match="offload is for scd sample"):
        SCDPipeline.from_pretrained(run, offload=True)
