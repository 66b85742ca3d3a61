"""More of Wan's family by configuration: Wan2.2-TI2V-5B and 14B, against diffusers' own classes at
tiny size, by the commands, and at full size on paper."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from PIL import Image

from scd.autoencoders.wan import open_wan_autoencoder
from scd.cli import main
from scd.data.clip import Conditions
from scd.models.checkpoint import load_world
from scd.streaming.rollout import Rollout
from tests.tiny_wan import (
    SHAPE,
    random_text,
    tiny_transformer,
    tiny_wan,
    write_tiny_transformer,
)
from tests.tiny_wan_vae import tiny_text_encoder, tiny_tokenizer, write_tiny_parts

TI2V = {"in_channels": 48, "out_channels": 48}
CLASS = {"_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "text_dim": 4096}
FULL = {
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "in_channels": 16},
    "14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "in_channels": 16},
    "5B": {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48},
}
"""As in the repositories' transformer/config.json."""


def residual_vae() -> AutoencoderKLWan:
    """Wan2.2's autoencoder with few channels: latents of 48 channels, cells of 16 pixels."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=6,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=torch.randn(48, generator=generator).tolist(),
        latents_std=(1 + torch.rand(48, generator=generator)).tolist(),
    ).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What Wan2.2-TI2V-5B looks like on disk, small."""
    folder = tmp_path_factory.mktemp("ti2v")
    write_tiny_transformer(folder, num_layers=3, **TI2V)
    residual_vae().save_pretrained(folder / "vae")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    tiny_text_encoder(len(tokenizer)).save_pretrained(folder / "text_encoder")
    index = json.loads((folder / "model_index.json").read_text()) | {"expand_timesteps": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


# Against diffusers' classes.


@torch.no_grad()
def test_a_given_first_frame_stands_at_time_zero_as_diffusers_tokens_do():
    """Its model of latents of 48 channels, with a time for each token."""
    theirs = tiny_transformer(num_layers=3, **TI2V).eval()
    ours = tiny_wan(num_layers=3, shape=replace(SHAPE, channels=48))
    ours.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(2, 4, 48, 4, 6, generator=generator)
    time = torch.tensor([[0.0, 0.8, 0.8, 0.8], [0.0, 0.3, 0.3, 0.3]])
    text = random_text()
    found = ours.bidirectional(frames, time, Conditions(text=text))
    expected = theirs(
        hidden_states=frames.movedim(1, 2),
        timestep=1000 * time.repeat_interleave(ours.shape.num_tokens, 1),
        encoder_hidden_states=text,
    ).sample
    torch.testing.assert_close(found, expected.movedim(2, 1), rtol=1e-3, atol=2e-4)
    # One time for all is another answer: it is the time that tells a given frame.
    other = ours.bidirectional(frames, time[:, 1:2].expand(2, 4), Conditions(text=text))
    assert (other - found).abs().max() > 1e-2


@torch.no_grad()
def test_the_autoencoder_of_larger_cells_is_diffusers_and_streams(source):
    autoencoder = open_wan_autoencoder(source)
    assert (autoencoder.config.channels, autoencoder.config.cell_size) == (48, 16)
    noise = torch.rand(2, 9, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    clip = 2 * noise - 1
    latents = autoencoder.encode(clip)
    assert latents.shape == (2, 3, 48, 2, 3)
    network = autoencoder.network
    mean, std = (
        torch.tensor(getattr(network.config, name)).view(1, 48, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    raw = network.encode(clip.transpose(1, 2)).latent_dist.mean
    torch.testing.assert_close(latents.transpose(1, 2), (raw - mean) / std, rtol=1e-4, atol=1e-5)
    shown = autoencoder.decode(latents)
    assert shown.shape == clip.shape
    expected = network.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2)
    torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-5)
    stream = autoencoder.stream_decoder()
    parts = [stream.next(latent) for latent in latents.unbind(1)]
    assert torch.equal(torch.cat(parts, dim=1), shown)


# By the commands.


def test_convert_stream_from_a_picture_and_export(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    world, out = tmp_path / "world", tmp_path / "video"
    words = ["convert", "wan", "--model", str(source), "--out", str(world), "--split", "2,1+1"]
    words += ["--height", "64", "--width", "64", "--text-length", "16", "--num-steps", "2"]
    assert main([*words, "--window", "5", "--copy-parts"]) == 0
    made = load_world(world)
    assert made.card.fps == 24 and made.model.shape.shape == (48, 4, 4)
    picture = tmp_path / "first.png"
    Image.new("RGB", (64, 64), (200, 40, 40)).save(picture)
    words = ["sample", str(world), "--prompt", "the red dog runs", "--first", str(picture)]
    words += ["--seconds", "0.3", "--precision", "fp32", "--device", "cpu", "--out", str(out)]
    assert main(words) == 0
    told = json.loads((out / "sample.json").read_text())
    assert told["given_frames"] == 1 and told["fps"] == 24 and told["frames"] == 9
    dense, back = tmp_path / "dense", tmp_path / "back"
    words = ["convert", "wan", "--model", str(source), "--out", str(dense), "--split", "dense"]
    words += ["--height", "64", "--width", "64", "--text-length", "16"]
    assert main(words) == 0
    assert main(["export", "diffusers", str(dense), "--out", str(back)]) == 0
    exported = WanTransformer3DModel.from_pretrained(back / "transformer")
    assert exported.config.in_channels == 48
    assert json.loads((back / "model_index.json").read_text())["expand_timesteps"] is True


@torch.no_grad()
def test_the_shape_of_14b_converts_streams_and_comes_back(tmp_path):
    """An eighth of its heads and of their width, a tenth of its layers; 1.3B's MLP is wider."""
    full = FULL["14B"]
    shape = {"num_attention_heads": 5, "attention_head_dim": 16, "num_layers": 4, "ffn_dim": 216}
    width = shape["num_attention_heads"] * shape["attention_head_dim"]
    assert width / shape["ffn_dim"] == 128 * full["num_attention_heads"] / full["ffn_dim"]
    theirs = tiny_transformer(**shape).eval()
    source = write_tiny_transformer(write_tiny_parts(tmp_path / "wan"), theirs)
    words = ["convert", "wan", "--model", str(source), "--height", "32", "--width", "48"]
    words += ["--text-length", "8", "--num-steps", "2", "--window", "4"]
    dense, separable = tmp_path / "dense", tmp_path / "separable"
    assert main([*words, "--split", "dense", "--out", str(dense)]) == 0
    assert main([*words, "--split", "3,1+1", "--out", str(separable)]) == 0
    generator, text = torch.Generator().manual_seed(0), random_text()
    frames = torch.randn(2, 3, 16, 4, 6, generator=generator)
    ours = load_world(dense).model
    found = ours.bidirectional(frames, torch.full((2, 3), 0.7), Conditions(text=text))
    expected = theirs(frames.movedim(1, 2), torch.full((2,), 700.0), text).sample
    torch.testing.assert_close(found, expected.movedim(2, 1), rtol=1e-3, atol=2e-4)
    for folder in (dense, separable):
        world = load_world(folder)
        assert world.model.config.block.num_heads == 5 and world.model.config.block.ffn_dim == 216
        made = []
        for engine in ("plain", "fast"):
            rollout = Rollout(world, seed=1, engine=engine)
            rollout.begin(conditions=Conditions(text=text[:1]))
            made.append(torch.stack([rollout.step_latents() for _ in range(5)]))
        torch.testing.assert_close(*made, atol=2e-5, rtol=1e-5)
    back = tmp_path / "back"
    assert main(["export", "diffusers", str(dense), "--out", str(back)]) == 0
    again = WanTransformer3DModel.from_pretrained(back / "transformer").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in theirs.state_dict().items())


@pytest.mark.parametrize("name", FULL)
def test_a_plan_at_full_size_needs_settings_alone(name, tmp_path, capsys):
    """Its weights are as many as diffusers' class has; nothing is written."""
    settings = CLASS | FULL[name] | {"attention_head_dim": 128, "freq_dim": 256}
    settings["out_channels"] = settings["in_channels"]
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text(json.dumps(settings))
    size = ["704", "1280"] if name == "5B" else ["480", "832"]
    words = ["convert", "wan", "--model", str(tmp_path), "--split", "dense", "--dry-run"]
    assert main([*words, "--height", size[0], "--width", size[1]]) == 0
    told = json.loads(capsys.readouterr().out)
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(settings)
    number = sum(weight.numel() for weight in model.parameters())
    assert told["parameters"] == number
    assert told["bf16_gib"]["weights"] == pytest.approx(2 * number / 2**30)
    layers, width = model.config.num_layers, 128 * settings["num_attention_heads"]
    tokens = told["tokens_per_latent_frame"]
    assert tokens == int(size[0]) * int(size[1]) // (32 if name == "5B" else 16) ** 2
    frames = 2 * layers * (21 * tokens + 512) * width * 2
    assert told["bf16_gib"]["keys_and_values_of_a_stream"] == pytest.approx(frames / 2**30)
    assert told["flops_per_latent_frame"]["50 steps"] > told["flops_per_latent_frame"]["4 steps"]
    assert told["fps"] == (24 if name == "5B" else 16)
    assert main([*words, "--height", "100"]) == 2
    assert "must be multiples of" in capsys.readouterr().err


def test_another_family_is_refused_with_the_fields_that_differ(tmp_path, capsys):
    (tmp_path / "transformer").mkdir()
    path = tmp_path / "transformer/config.json"
    words = ["convert", "wan", "--model", str(tmp_path), "--split", "dense", "--dry-run"]

    def refused(**changes):
        settings = CLASS | FULL["14B"] | {"attention_head_dim": 128, "out_channels": 16}
        path.write_text(json.dumps(settings | changes))
        assert main(words) == 2
        return capsys.readouterr().err

    said = refused(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
    assert "in_channels=36, out_channels=16, image_dim=1280 and added_kv_proj_dim=5120" in said
    assert "CogVideoXTransformer3DModel" in refused(_class_name="CogVideoXTransformer3DModel")
    assert "qk_norm='rms_norm_across_heads', got 'layer_norm'" in refused(qk_norm="layer_norm")
    vae = residual_vae().config | {"_class_name": "AutoencoderKLWan"}
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text(json.dumps(dict(vae)))
    assert "latents of 16 channels, its vae/ makes latents of 48" in refused()
    (tmp_path / "vae/config.json").write_text(json.dumps(dict(vae) | {"in_channels": 3}))
    assert "patch_size=2, in_channels=3, out_channels=12" in refused()
