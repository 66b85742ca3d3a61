"""Video of prompts from run folders: scd sample, scd vbench and the pipeline."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.autoencoders.wan import open_wan_autoencoder
from scd.cli import main
from scd.data.clip import pixels_to_frames
from scd.data.prompts import read_lines
from scd.data.source import DataCard
from scd.data.video import probe_video, read_video
from scd.models.checkpoint import World, save_world
from scd.models.config import SamplingConfig
from scd.sampling.pipeline import SCDPipeline
from scd.sampling.settings import VBenchConfig, VideoConfig, parse_switches
from scd.sampling.text_to_video import TextToVideo, cover, latent_at, read_picture
from scd.sampling.vbench import list_jobs
from tests.tiny import ACTIONS, tiny_dense
from tests.tiny_text_world import write_text_run
from tests.tiny_wan_vae import tiny_decoder, write_tiny_parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("wan")


@pytest.fixture(scope="module")
def source(folder):
    return write_tiny_parts(folder / "parts")


@pytest.fixture(scope="module")
def run(folder, source):
    return write_text_run("separable", source, folder)


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    """No prompt of a test in the cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


@pytest.fixture(scope="module")
def pipe(run):
    return SCDPipeline.from_pretrained(run, torch_dtype=torch.float32, text_cache="")


def sample(run, out, *flags):
    words = ["sample", run, "--out", str(out), "--precision", "fp32", "--seconds", "0.5", *flags]
    assert main(words) == 0
    return json.loads((out / "sample.json").read_text())


def picture(path, height=40, width=48):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def test_a_sample_of_a_prompt(run, pipe, tmp_path, capsys):
    result = sample(run, tmp_path / "a", "--prompt", "a red cat", "--seed", "3")
    info = probe_video(tmp_path / "a" / "sample.mp4")
    assert (info.num_frames, info.fps) == (9, 16) == (result["frames"], result["fps"])
    assert (tmp_path / "a" / "sample.png").stat().st_size > 0
    printed = capsys.readouterr().out
    for word in ("denoise-only", "end-to-end", "p50", "p99", "first frame after", "KLWan"):
        assert word in printed
    for name in ("denoise_only", "end_to_end"):
        speed = result["speed"][name]
        assert 0 < speed["step_p50_s"] <= speed["step_p99_s"] and speed["frames_per_second"] > 0
    assert result["speed"]["first_frame_s"] > result["speed"]["first_frame_denoise_only_s"] > 0
    assert result["model"]["decoder"] == "AutoencoderKLWan"
    # The pipeline makes the same frames; the file is enlarged and loses a little.
    generator = torch.Generator().manual_seed(3)
    frames = pipe("a red cat", num_frames=9, generator=generator, output_type="pt").frames[0]
    shown = pixels_to_frames(torch.from_numpy(read_video(tmp_path / "a" / "sample.mp4")))
    factor = shown.shape[-1] // 32
    middle = shown[..., factor // 2 :: factor, factor // 2 :: factor]
    assert (middle - (frames * 2 - 1)).abs().mean() < 0.03


def test_a_sample_with_a_first_picture_a_switch_and_guidance(run, pipe, tmp_path):
    first = picture(tmp_path / "first.png")
    flags = ["--prompt", "a red cat", "--first", first, "--guidance-scale", "2"]
    result = sample(run, tmp_path / "a", *flags, "--prompt-at", "0.3: the dog", "--steps", "2")
    assert result["given_frames"] == 1 and result["frames"] == 9
    assert result["model"]["sampling"]["times"] == [1.0, 0.8333]
    shown = read_video(tmp_path / "a" / "sample.mp4", 0, 1)
    given = read_picture(first, 16, 32)
    expected = pipe.parts.autoencoder.decode(pipe.parts.encode(given))[0, 0]
    factor = shown.shape[1] // 16
    got = pixels_to_frames(torch.from_numpy(shown))[0]
    middle = got[:, factor // 2 :: factor, factor // 2 :: factor]
    assert (middle - expected).abs().mean() < 0.05


def test_small_decoders_are_named(run, folder, tmp_path, capsys):
    tiny_decoder().save_pretrained(folder / "tiny")
    result = sample(run, tmp_path / "a", "--prompt", "the dog", "--tiny", str(folder / "tiny"))
    assert (result["frames"], result["fps"]) == (3, 4)
    assert "AutoencoderTiny" in result["model"]["decoder"]
    assert "AutoencoderTiny (one picture per latent frame)" in capsys.readouterr().out


def test_switches_hold_from_the_latent_frame_that_begins_then():
    assert parse_switches(["2.5: b: c", "1:a"]) == [(1.0, "a"), (2.5, "b: c")]
    for wrong in ("a", "1:", "-1: a", "x: a", "inf: a"):
        with pytest.raises(ValueError, match="needs a second and a prompt"):
            parse_switches([wrong])
    with pytest.raises(ValueError, match="same second"):
        parse_switches(["1: a", "1.0: b"])
    # Frame 32 is shown at 2 s; latent frame 9 begins with frame 33.
    assert [latent_at(second, 16.0) for second in (0.0, 1 / 16, 2 / 16, 2.0)] == [0, 1, 2, 9]


def test_pictures_cover_the_frame():
    frames = torch.linspace(-1, 1, 40).expand(1, 3, 30, 40).clone()
    wide = cover(frames, 10, 40)
    torch.testing.assert_close(wide, frames[..., 10:20, :])
    small = cover(frames, 15, 10)
    assert small.shape == (1, 3, 15, 10)
    assert abs(float(small.mean())) < 0.02 and float(small.max()) < 0.6


def refused(words, capsys):
    assert main(words) == 2
    return capsys.readouterr().err


def test_what_is_refused(run, source, folder, tmp_path, capsys, caplog):
    long = " ".join(["cat"] * 16)
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    # The prompt is refused, or said to be cut, before the weights are read.
    assert "an empty one" in refused(["sample", str(broken), "--prompt", " "], capsys)
    assert "model.safetensors" in refused(["sample", str(broken), "--prompt", long], capsys)
    assert "takes 17 tokens, the text encoder 16" in caplog.messages[0]
    words = ["sample", run, "--prompt", "cat", "--source", str(tmp_path / "none")]
    assert "there is no folder" in refused(words, capsys)
    other = write_tiny_parts(tmp_path / "other")
    shutil.rmtree(other / "vae")
    words = ["sample", run, "--prompt", "cat", "--source", str(other)]
    assert "has no vae/" in refused(words, capsys)
    homeless = write_text_run("dense", "", tmp_path)
    assert "name the folder" in refused(["sample", homeless, "--prompt", "cat"], capsys)
    words = ["sample", run, "--prompt", "cat", "--first", str(tmp_path / "none.png")]
    assert "none.png" in refused(words, capsys)


def test_a_run_without_text_takes_no_prompt(tmp_path, capsys):
    card = DataCard(height=4, width=6, fps=8.0, conditions=ACTIONS, action_names=tuple("abcd"))
    pixels = PixelAutoencoder(PixelConfig())
    world = World(model=tiny_dense(), autoencoder=pixels, card=card, sampling=SamplingConfig())
    steered = str(save_world(world, tmp_path / "world"))
    assert "takes no prompt" in refused(["sample", steered, "--prompt", "cat"], capsys)
    with pytest.raises(ValueError, match="takes no prompt"):
        SCDPipeline.from_pretrained(steered)


@pytest.mark.parametrize("kept", [True, False])
def test_many_prompts_are_embedded_once_and_kept_on_disk(run, kept, tmp_path, monkeypatch):
    cache, prompts = str(tmp_path / "texts") if kept else "", ["cat" + " cat" * n for n in range(5)]
    config = VideoConfig(run=run, precision="fp32", text_cache=cache, device="cpu")
    parts = TextToVideo(config, prompts)
    # A folder keeps them, memory does so only where there is none.
    assert len(parts._embedder._kept) == (0 if kept else 5) and not parts._embedder.is_loaded
    expected = TextToVideo(config).embed(prompts)
    monkeypatch.setattr(
        "scd.autoencoders.text_encoder._load_encoder", lambda *_: pytest.fail("embedded again")
    )
    texts = torch.cat([parts.embed([prompt]) for prompt in prompts])
    assert torch.equal(texts, expected) and not torch.equal(texts[0], texts[1])


def prompts_of(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def vbench_flags(run, prompts, out, *flags):
    words = ["vbench", run, "--prompts", prompts, "--out", str(out), "--precision", "fp32"]
    return [*words, "--seeds", "2", "--seconds", "0.3", *flags]


def test_vbench_renders_what_is_missing_in_its_layout(run, pipe, tmp_path, capsys):
    prompts = prompts_of(tmp_path / "prompts.txt", "a red cat", "the dog, at night", "")
    out = tmp_path / "videos"
    names = [f"{prompt}-{n}.mp4" for prompt in ("a red cat", "the dog, at night") for n in (0, 1)]
    assert main(vbench_flags(run, prompts, out, "--shard", "1/3")) == 0
    assert sorted(path.name for path in out.glob("*.mp4")) == [names[1]]
    before = (out / names[1]).stat().st_mtime_ns
    for shard in ("0/3", "1/3", "2/3"):
        assert main(vbench_flags(run, prompts, out, "--shard", shard)) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "vbench.json"])
    assert (out / names[1]).stat().st_mtime_ns == before
    assert "rendered 0 videos" in capsys.readouterr().out
    # Each video is the pipeline's of its prompt and seed, at full size.
    generator = torch.Generator().manual_seed(1)
    expected = pipe("a red cat", num_frames=5, generator=generator, output_type="pt").frames[0]
    shown = pixels_to_frames(torch.from_numpy(read_video(out / names[1])))
    assert shown.shape == (5, 3, 16, 32)
    assert (shown - (expected * 2 - 1)).abs().mean() < 0.06
    assert read_video(out / names[0]).tobytes() != read_video(out / names[1]).tobytes()
    words = vbench_flags(run, prompts, out, "--steps", "2")
    assert "holds another set of videos" in refused(words, capsys)
    settings = json.loads((out / "vbench.json").read_text())
    assert settings["settings"]["shows"][names[0]] == "a red cat"
    assert settings["model"]["decoder"] == "AutoencoderKLWan" and "commit" in settings


def test_vbench_shows_other_texts_under_the_names_of_the_prompts(tmp_path):
    prompts = prompts_of(tmp_path / "short.txt", "cat", "dog")
    texts = prompts_of(tmp_path / "long.txt", "a cat / in snow", "a dog")
    video = VideoConfig(run="run")
    jobs = list_jobs(VBenchConfig(video=video, prompts=prompts, out="out", texts=texts, seeds=2))
    assert [(job.name, job.text, job.seed) for job in jobs] == [
        ("cat-0.mp4", "a cat / in snow", 0),
        ("cat-1.mp4", "a cat / in snow", 1),
        ("dog-0.mp4", "a dog", 0),
        ("dog-1.mp4", "a dog", 1),
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a/b"], "line 1 of .* cannot name a file"),
        (["cat", ".hidden"], "line 2 of .* cannot name a file"),
        (["x" * 250], "has 250 bytes, a file's name 255 at most"),
        (["cat", "dog", "Cat"], "the same prompt in lines 1 and 3"),
        (["cat", "", "dog"], r"empty are \[2\]"),
        ([], "empty are all"),
    ],
)
def test_prompts_that_cannot_name_a_file(lines, message, tmp_path):
    prompts = prompts_of(tmp_path / "prompts.txt", *lines)
    with pytest.raises(ValueError, match=message):
        list_jobs(VBenchConfig(video=VideoConfig(run="run"), prompts=prompts, out="out"))


def test_separators_within_a_prompt_make_no_second_one(tmp_path):
    prompts = ["a red cat\u2028runs over snow", "the\x85sea", "größer"]
    for mark, end in (("", "\n"), ("\ufeff", "\r\n")):
        (tmp_path / "prompts.txt").write_bytes((mark + end.join([*prompts, "", ""])).encode())
        assert read_lines(tmp_path / "prompts.txt") == prompts


def test_files_and_shards_that_are_none(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        read_lines(tmp_path / "bytes")
    with pytest.raises(FileNotFoundError):
        read_lines(tmp_path / "none")
    two, one = prompts_of(tmp_path / "2", "a", "b"), prompts_of(tmp_path / "1", "a")
    with pytest.raises(ValueError, match="has 1 lines, .* has 2"):
        list_jobs(VBenchConfig(video=VideoConfig(run="run"), prompts=two, texts=one, out="out"))
    with pytest.raises(ValueError, match="shard must be i/n with i in 0 .. n - 1, got '8/8'"):
        VBenchConfig(video=VideoConfig(run="run"), prompts=two, out="out", shard="8/8")


def test_the_pipelines_outputs_agree(pipe, source):
    generator = torch.Generator().manual_seed(0)
    kinds = {
        kind: pipe("the cat", num_frames=7, generator=generator, output_type=kind).frames
        for kind in ("np", "pt", "pil", "latent")
    }
    assert kinds["np"].shape == (1, 7, 16, 32, 3) and kinds["np"].dtype == np.float32
    assert kinds["pt"].shape == (1, 7, 3, 16, 32)
    assert 0 <= kinds["pt"].min() < kinds["pt"].max() <= 1
    np.testing.assert_array_equal(kinds["np"], kinds["pt"].permute(0, 1, 3, 4, 2).numpy())
    assert len(kinds["pil"][0]) == 7 and kinds["pil"][0][0].size == (32, 16)
    assert np.abs(np.asarray(kinds["pil"][0][3]) / 255 - kinds["np"][0, 3]).max() < 0.6 / 255
    assert kinds["latent"].shape == (1, 3, 16, 2, 4)
    whole = open_wan_autoencoder(source).decode(kinds["latent"])
    torch.testing.assert_close((whole[:, :7] + 1) / 2, kinds["pt"])
    streamed = list(pipe.stream("the cat", num_frames=7, generator=generator))
    assert [len(frames) for frames in streamed] == [1, 4, 4]
    assert torch.equal(torch.cat(streamed)[:7], kinds["pt"][0])


def test_the_pipeline_takes_batches_embeddings_and_pictures(pipe, tmp_path):
    two = pipe(["the cat", "a dog"], num_frames=5, output_type="pt").frames
    assert two.shape[0] == 2
    text = pipe.parts.embed(["a dog"])
    generator = torch.Generator().manual_seed(1)
    (alone,) = pipe(
        prompt_embeds=text, num_frames=5, generator=generator, output_type="pt", return_dict=False
    )
    assert torch.equal(alone[0], two[1])
    image = Image.open(picture(tmp_path / "first.png", 16, 32))
    given = pipe("the cat", num_frames=5, image=image, output_type="pt").frames[0]
    tensor = torch.from_numpy(np.asarray(image) / 255).float().permute(2, 0, 1)
    again = pipe("the cat", num_frames=5, image=tensor, output_type="pt").frames[0]
    for wrong in (tensor * 255, tensor * float("nan")):
        with pytest.raises(ValueError, match=r"floats \[3, rows, columns\] in \[0, 1\], got "):
            pipe("the cat", num_frames=5, image=wrong)
    torch.testing.assert_close(given, again, atol=1e-4, rtol=0)
    assert not torch.allclose(given[1:], two[0, 1:], atol=1e-3)
    guided = pipe("the cat", negative_prompt="the dog", guidance_scale=3.0, num_frames=5)
    assert not np.allclose(guided.frames[0], two[0].permute(0, 2, 3, 1).numpy(), atol=1e-3)


def test_another_number_of_steps_is_of_the_custom_times_of_the_checkpoint(run, pipe):
    four = pipe.parts.stream(0).times
    assert len(four) == 5 and four == pipe.parts.stream(0, num_steps=4).times
    assert pipe.parts.stream(0, num_steps=2).times == [four[0], four[2], 0.0]
    two = SCDPipeline.from_pretrained(run, torch_dtype=torch.float32, text_cache="", steps=2)
    # Of the checkpoint's own times, whatever the settings chose of them.
    assert two.parts.stream(0, num_steps=4).times == four


def test_what_the_pipeline_refuses(pipe, run, tmp_path):
    assert pipe.to("cpu") is pipe and pipe.fps == 16
    for words, message in (
        ({}, "either prompt or prompt_embeds"),
        ({"prompt": "cat", "height": 480}, "makes frames of 16x32, got 480x"),
        ({"prompt": "cat", "output_type": "gif"}, "output_type must be one of"),
        ({"prompt": ["cat", ""]}, "an empty one"),
        ({"prompt": []}, "one prompt or more, got none"),
        ({"prompt_embeds": torch.zeros(0, 8, 12)}, "one embedded prompt or more, got none"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            pipe(**words)
    with pytest.raises(ValueError, match="unknown argument of from_pretrained 'num_steps'"):
        SCDPipeline.from_pretrained(run, num_steps=3)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        SCDPipeline.from_pretrained(run, torch_dtype=torch.float16)
    with pytest.raises(ValueError, match="did you mean 'torch_dtype'"):
        SCDPipeline.from_pretrained(run, torch_dtyp=torch.float32)
    with pytest.raises(ValueError, match="a meaning on the hub only"):
        SCDPipeline.from_pretrained(run, revision="main")
    assert SCDPipeline.from_pretrained(run, dtype="float32").config.precision == "fp32"
    with pytest.raises(FileNotFoundError):
        SCDPipeline.from_pretrained(tmp_path / "none")
