"""Autoencoders of pictures: latents at unit scale, told apart by what they compute; FAR's weights
by their names; and whatever is missing, damaged or of another kind is said."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file

from scd.autoencoders.build import (
    build_autoencoder,
    fingerprint,
    open_autoencoder,
    refuse_other,
)
from scd.autoencoders.config import ImageAutoencoderConfig
from scd.autoencoders.deep_compression import (
    Stage,
    deep_name,
    deep_settings,
    settings_from,
    settings_of,
)
from scd.autoencoders.diffusers import (
    ImageAutoencoder,
    load_network,
    measure_statistics,
    new_network,
    open_image_autoencoder,
    save_network,
    with_statistics,
)
from scd.autoencoders.residual import ResidualAutoencoder, is_residual
from scd.autoencoders.wan import WanAutoencoder
from scd.cli import main
from scd.common import hub as diffusers_folder
from scd.common.config import from_json, to_json
from scd.convert.reference import ConvertAutoencoderConfig, convert_autoencoder
from tests.tiny_wan_vae import tiny_vae

CHANNELS = 8
"""Of the tiny networks' latents."""


def tiny(kind: str, seed: int = 0, **changes):
    """A network of a few thousand weights, with cells of 4 pixels."""
    torch.manual_seed(seed)
    if kind == "AutoencoderKL":
        given = {
            "block_out_channels": (8, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "norm_num_groups": 4,
            "latent_channels": CHANNELS,
        }
        return AutoencoderKL(**given | changes).eval()
    if kind == "AutoencoderTiny":
        given = {
            "encoder_block_out_channels": (8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8),
            "num_encoder_blocks": (1, 1, 1),
            "num_decoder_blocks": (1, 1, 1),
            "latent_channels": CHANNELS,
        }
        return AutoencoderTiny(**given | changes).eval()
    return AutoencoderDC(**tiny_deep() | changes).eval()


def tiny_deep(norm: str = "rms_norm"):
    last = Stage(32, 1, "rms_norm", attends=True)
    encoder, decoder = (
        [Stage(128, 0, norm), Stage(16, num_blocks, norm), last] for num_blocks in (1, 2)
    )
    return settings_from(encoder, decoder, scale=0.5, latent_channels=CHANNELS)


def frames_of(b=2, t=3, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(b, t, 3, size, size, generator=generator) * 2 - 1


def plain(network, frames):
    """What a network makes of frames, and of that: one frame after another, by diffusers' calls."""
    raw = []
    for frame in frames.flatten(0, 1):
        encoded = network.encode(frame[None])
        for name in ("latent", "latents", "latent_dist"):
            if hasattr(encoded, name):
                found = getattr(encoded, name)
                raw.append(found.mode() if name == "latent_dist" else found)
    again = torch.cat([network.decode(one).sample for one in raw]).clamp(-1, 1)
    return torch.cat(raw).unflatten(0, frames.shape[:2]), again.unflatten(0, frames.shape[:2])


KINDS = {
    "AutoencoderDC": ({}, (0.0, 2.0)),
    "AutoencoderKL": ({"scaling_factor": 0.25, "shift_factor": 0.1}, (0.1, 4.0)),
    "AutoencoderTiny": ({}, (0.0, 1.0)),
}
"""Changed settings, and the mean and deviation that they tell."""


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_latents_and_frames_are_those_of_the_network(kind, tmp_path):
    changes, (mean, std) = KINDS[kind]
    network = tiny(kind, **changes)
    network.save_pretrained(tmp_path / "vae")
    autoencoder = open_autoencoder(str(tmp_path))
    assert isinstance(autoencoder, ImageAutoencoder)
    assert autoencoder.config == replace(
        open_image_autoencoder(tmp_path / "vae").config, source=str(tmp_path)
    )
    assert autoencoder.latent_shape(32, 16) == (CHANNELS, 8, 4)
    raw, again = plain(network, frames_of())
    latents = autoencoder.encode(frames_of())
    torch.testing.assert_close(latents, (raw - mean) / std)
    torch.testing.assert_close(autoencoder.decode(latents), again)
    other = build_autoencoder(from_json(ImageAutoencoderConfig, to_json(autoencoder.config)))
    torch.testing.assert_close(other.encode(frames_of()), latents)
    half = open_autoencoder(str(tmp_path), precision="bf16").encode(frames_of())
    assert half.dtype == torch.float32 and 0 < (half - latents).abs().max() < 0.2


def small_deep(**changes):
    """The smallest network of convolutions alone, with cells of 4 pixels."""
    sides = [
        [Stage(16, 0, "rms_norm"), Stage(16, num_blocks, "rms_norm"), Stage(32, 1, "rms_norm")]
        for num_blocks in (1, 2)
    ]
    return settings_from(*sides, scale=0.5, latent_channels=CHANNELS) | changes


@pytest.mark.parametrize("name", ["tiny", "small-16"])
@torch.no_grad()
def test_networks_of_convolutions_are_run_without_diffusers(name, tmp_path):
    torch.manual_seed(0)
    network = new_network(small_deep() if name == "tiny" else deep_settings(name)).eval()
    for weight in network.parameters():
        weight.add_(0.05 * torch.randn_like(weight))
    save_network(network, tmp_path / "vae")
    _, own = load_network(tmp_path, light=True)
    assert isinstance(own, ResidualAutoencoder)
    frames = frames_of(size=32)
    raw, again = plain(network, frames)
    latents = own.encode(frames.flatten(0, 1)).latent
    torch.testing.assert_close(latents, raw.flatten(0, 1), rtol=2e-5, atol=2e-5)
    made = own.decode(raw.flatten(0, 1)).sample.clamp(-1, 1)
    torch.testing.assert_close(made, again.flatten(0, 1), rtol=2e-5, atol=2e-5)
    _, theirs = load_network(tmp_path)
    assert isinstance(theirs, AutoencoderDC)
    config = open_image_autoencoder(tmp_path).config
    assert fingerprint(ImageAutoencoder(config)) == fingerprint(ImageAutoencoder(config, theirs))


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"]},
        {"decoder_norm_types": ["batch_norm"] * 3},
        {"decoder_act_fns": ["relu"] * 3},
        {"encoder_out_shortcut": False},
        {"upsample_block_type": "interpolate"},
        {"decoder_layers_per_block": [1, 1, 1]},
        {"encoder_block_out_channels": [16, 16, 24]},
        {"encoder_block_out_channels": "wide"},
    ],
)
def test_other_networks_are_left_to_diffusers(changes):
    assert is_residual(small_deep()) and not is_residual(small_deep(**changes))


def test_the_scale_of_each_channel_is_given_or_measured(tmp_path):
    mean, std = [float(n) / 4 for n in range(CHANNELS)], [1.0 + n for n in range(CHANNELS)]
    tiny("AutoencoderKL", latents_mean=mean, latents_std=std).save_pretrained(tmp_path / "kl")
    given = open_image_autoencoder(tmp_path / "kl")
    assert (given.config.mean, given.config.std) == (tuple(mean), tuple(std))
    clips = [frames_of(seed=seed, size=32) for seed in range(8)]
    measured = with_statistics(given, clips)
    latents = torch.cat([measured.encode(clip) for clip in clips]).movedim(2, 0).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(CHANNELS), atol=1e-2, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(CHANNELS), atol=1e-2, rtol=0)
    assert fingerprint(measured) != fingerprint(given)
    # The scale stays with the folder, and beside weights that know another one.
    save_network(given.network, tmp_path / "kept", (measured.config.mean, measured.config.std))
    kept = open_image_autoencoder(tmp_path / "kept")
    assert replace(kept.config, source="") == replace(measured.config, source="")
    assert fingerprint(kept) == fingerprint(measured)
    (tmp_path / "kept/statistics.json").write_text('{"mean": [0.0]}')
    with pytest.raises(ValueError, match="statistics.json is damaged"):
        open_image_autoencoder(tmp_path / "kept")


def test_statistics_by_hand():
    parts = [torch.tensor([[[1.0, 3.0]], [[0.0, 4.0]]]), torch.tensor([[[5.0, 7.0]], [[8.0, 4.0]]])]
    mean, std = measure_statistics(parts)
    assert mean == (4.0, 4.0)
    assert std == pytest.approx((5.0**0.5, 8.0**0.5), rel=1e-3)
    with pytest.raises(ValueError, match="a channel that never changes"):
        measure_statistics([torch.ones(2, 3, 3)])
    with pytest.raises(ValueError, match="at least one batch"):
        measure_statistics([])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("AutoencoderDC", {"encoder_out_shortcut": False}),
        ("AutoencoderDC", {"decoder_in_shortcut": False}),
        ("AutoencoderDC", {"decoder_conv_act_fn": "silu"}),
        ("AutoencoderTiny", {"upsample_fn": "bilinear"}),
        ("AutoencoderKL", {"norm_num_groups": 2}),
    ],
)
def test_settings_that_no_weight_shows_change_the_fingerprint(kind, changes, tmp_path):
    network = tiny(kind)
    network.save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    path = tmp_path / "other/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    one, other = (open_autoencoder(tmp_path / name) for name in ("one", "other"))
    assert fingerprint(one) != fingerprint(other)
    # What pipelines alone read, and settings at their defaults, change nothing.
    same = json.loads((tmp_path / "one/config.json").read_text()) | {"sample_size": 99}
    path.write_text(json.dumps({name: same[name] for name in same if name != "act_fn"}))
    assert fingerprint(open_autoencoder(tmp_path / "other")) == fingerprint(one)
    with pytest.raises(ValueError, match=r"of an earlier scd.*encode again"):
        refuse_other("0" * 32, fingerprint(one), "latents")
    with pytest.raises(ValueError, match="with other weights or settings"):
        refuse_other(fingerprint(other := open_autoencoder(tmp_path / "one")) + "0",
                     fingerprint(other), "latents")  # fmt: skip


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"latent_channels": 10**9}, "latent_channels must be 65536 at most"),
        (
            {"decoder_layers_per_block": [0, 10**6, 1]},
            "decoder_layers_per_block must be .* at most",
        ),
        ({"encoder_block_out_channels": "wide"}, "no settings of AutoencoderDC"),
        ({"upsample_block_type": ["a"] * 2000}, "2000 entries"),
    ],
)
def test_settings_of_a_network_are_refused_before_it_is_built(values, said, tmp_path):
    tiny("AutoencoderDC").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ValueError, match=said):
        open_autoencoder(tmp_path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds no settings"):
        open_autoencoder(tmp_path)


def test_old_names_of_attention_are_read(tmp_path):
    network = tiny("AutoencoderKL")
    network.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    new, old = ["to_q", "to_k", "to_v", "to_out.0"], ["query", "key", "value", "proj_attn"]
    state = {}
    for name, value in network.state_dict().items():
        for today, before in zip(new, old, strict=True):
            name = name.replace(f".{today}.", f".{before}.")
        state[name] = value
    assert any(".proj_attn." in name for name in state)
    save_file(state, path)
    raw, _ = plain(network, frames_of())
    torch.testing.assert_close(open_autoencoder(tmp_path).encode_raw(frames_of()), raw)


def test_what_changes_the_pictures_changes_the_fingerprint(tmp_path):
    networks = {
        "one": tiny("AutoencoderDC"),
        "copy": tiny("AutoencoderDC"),
        "weights": tiny("AutoencoderDC", seed=1),
        "activation": tiny("AutoencoderDC", decoder_act_fns=["relu", "relu", "silu"]),
    }
    for name, network in networks.items():
        network.save_pretrained(tmp_path / name)
    prints = {name: fingerprint(open_autoencoder(str(tmp_path / name))) for name in networks}
    assert prints["one"] == prints["copy"]
    assert len(set(prints.values())) == 3
    # The same weights, so nothing but the settings tells these two apart.
    states = [networks[name].state_dict() for name in ("one", "activation")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_weights_are_read_when_they_are_needed(tmp_path):
    tiny("AutoencoderTiny").save_pretrained(tmp_path / "here")
    config = open_autoencoder(str(tmp_path / "here")).config
    away = build_autoencoder(replace(config, source=str(tmp_path / "gone")))
    assert away.latent_shape(16, 16) == (CHANNELS, 4, 4)
    with pytest.raises(ValueError, match="18x16 pixels cannot be cut into cells of 4x4"):
        away.latent_shape(18, 16)
    with pytest.raises(FileNotFoundError, match="there is no folder .*gone"):
        away.encode(frames_of())
    with pytest.raises(ValueError, match="20x18 pixels cannot be cut"):
        build_autoencoder(config).encode(torch.zeros(1, 1, 3, 20, 18))
    changed = replace(config, cell_size=8)
    with pytest.raises(ValueError, match="cells of 8 pixels, this autoencoder's have 8 and 4"):
        build_autoencoder(changed).encode(frames_of())
    tiny("AutoencoderDC").save_pretrained(tmp_path / "deep")
    with pytest.raises(ValueError, match="holds an AutoencoderDC, needed the AutoencoderTiny"):
        build_autoencoder(replace(config, source=str(tmp_path / "deep"))).encode(frames_of())


def test_what_is_no_whole_autoencoder_is_refused(tmp_path):
    network = tiny("AutoencoderDC")
    network.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut.*is not a whole safetensors file"):
        open_autoencoder(str(tmp_path / "cut"))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model weights in .*cut.*config\.json"):
        open_autoencoder(str(tmp_path / "cut"))
    network.save_pretrained(tmp_path / "other")
    settings = json.loads((tmp_path / "other/config.json").read_text())
    settings["decoder_layers_per_block"] = [0, 3, 1]
    (tmp_path / "other/config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="another architecture: [1-9]* missing weights"):
        open_autoencoder(str(tmp_path / "other"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text/config.json").write_text('{"_class_name": "CLIPTextModel"}')
    with pytest.raises(ValueError, match="needed a single-image or video .*it holds CLIPText"):
        open_autoencoder(str(tmp_path / "text"))
    with pytest.raises(FileNotFoundError, match="hf download some-owner/some-autoencoder"):
        open_autoencoder("some-owner/some-autoencoder")
    tiny_vae().save_pretrained(tmp_path / "wan/vae")
    assert isinstance(open_autoencoder(str(tmp_path / "wan")), WanAutoencoder)
    with pytest.raises(ValueError, match="needed a single-image autoencoder .*it holds .*KLWan"):
        load_network(tmp_path / "wan")


def test_a_repository_may_be_the_autoencoder_itself(tmp_path, monkeypatch):
    tiny("AutoencoderDC").save_pretrained(tmp_path / "hub")
    (tmp_path / "hub/other.bin").write_bytes(b"large")
    copy, asked = tmp_path / "copy", []

    def snapshot(source, allow_patterns, etag_timeout, revision=None):
        """A hub that is a folder."""
        asked.append(allow_patterns)
        copy.mkdir(exist_ok=True)
        for path in (tmp_path / "hub").iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, copy)
        return str(copy)

    monkeypatch.setattr(diffusers_folder, "snapshot_download", snapshot)
    monkeypatch.setattr(diffusers_folder.HfApi, "model_info", lambda *_, **__: None)
    assert open_autoencoder("owner/deep").encode(frames_of()).shape[2] == CHANNELS
    # Settings first: nobody waits for the weights of another kind of model.
    assert asked[0][:2] == ["vae/*", "config.json"]
    assert not any("safetensors" in pattern for pattern in asked[0])
    assert not (copy / "other.bin").exists()
    shutil.rmtree(copy)
    (tmp_path / "hub/config.json").write_text('{"_class_name": "WanModel"}')
    with pytest.raises(ValueError, match="it holds WanModel"):
        open_autoencoder("owner/deep")
    assert {path.name for path in copy.iterdir()} == {"config.json"}


@pytest.mark.parametrize("size", [64, 128, 256])
def test_deep_networks_make_latents_of_8_by_8(size):
    with torch.device("meta"):
        network = new_network(deep_settings(deep_name(size, size)))
        latent = network.encoder(torch.zeros(1, 3, size, size))
    assert latent.shape == (1, 32, 8, 8)
    # FAR's published settings, where there are some.
    widths, encoder = network.config["encoder_block_out_channels"], [0, 4, 8, 2, 2, 2]
    assert list(widths) == [128, 256, 512, 512, 1024, 1024][: len(widths)]
    assert list(network.config["encoder_layers_per_block"]) == encoder[: len(widths)]
    assert settings_of(network.state_dict(), 1.0) == deep_settings(deep_name(size, size))


def test_there_is_no_deep_network_for_other_sizes():
    assert deep_name(64, 96) == "deep-8"
    with pytest.raises(ValueError, match="frames of 96x100: .* name one by --network"):
        deep_name(96, 100)


def far_shapes():
    """Names and shapes of FAR's weights, written down stage by stage for a narrow network."""
    shapes = {"encoder.conv_in.conv.weight": (4, 3, 3, 3), "encoder.conv_in.conv.bias": (4,)}

    def convolution(name, made, given, size, bias=True):
        shapes[f"{name}.weight"] = (made, given, size, size)
        if bias:
            shapes[f"{name}.bias"] = (made,)

    def norm(name, width, batch=False):
        shapes.update({f"{name}.{part}": (width,) for part in ("weight", "bias")})
        if batch:
            shapes.update({f"{name}.running_{part}": (width,) for part in ("mean", "var")})
            shapes[f"{name}.num_batches_tracked"] = ()

    def residual(name, width, batch):
        convolution(f"{name}.conv1", width, width, 3)
        convolution(f"{name}.conv2", width, width, 3, bias=False)
        norm(f"{name}.norm", width, batch)

    def attention(name, width):
        for part in ("q", "k", "v"):
            shapes[f"{name}.attn.to_{part}.weight"] = (width, width)
        shapes[f"{name}.attn.to_out.weight"] = (width, width)
        norm(f"{name}.attn.norm_out", width)
        convolution(f"{name}.conv_out.conv_inverted", 8 * width, width, 1)
        shapes[f"{name}.conv_out.conv_depth.weight"] = (8 * width, 1, 3, 3)
        shapes[f"{name}.conv_out.conv_depth.bias"] = (8 * width,)
        convolution(f"{name}.conv_out.conv_point", width, 4 * width, 1, bias=False)
        norm(f"{name}.conv_out.norm", width)

    residual("encoder.down_blocks.1.0", 16, batch=False)
    convolution("encoder.down_blocks.1.1.conv", 8, 16, 3)
    attention("encoder.down_blocks.2.0", 32)
    convolution("encoder.conv_out", CHANNELS, 32, 3)
    convolution("decoder.conv_in", 32, CHANNELS, 3)
    convolution("decoder.up_blocks.1.0.conv", 64, 32, 3)
    residual("decoder.up_blocks.1.1", 16, batch=True)
    residual("decoder.up_blocks.1.2", 16, batch=True)
    attention("decoder.up_blocks.2.0", 32)
    norm("decoder.norm_out", 16)
    convolution("decoder.conv_out.conv", 12, 16, 3)
    return shapes


def far_values():
    """Random values under FAR's names."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, generator=generator) + 0.5
        if name.endswith("running_var")
        else torch.randn(shape, generator=generator) * 0.1
        for name, shape in far_shapes().items()
    }


@pytest.fixture(scope="module")
def far_state():
    return far_values()


def test_far_weights_become_a_folder(far_state, tmp_path, capsys):
    torch.save(far_state, tmp_path / "DCAE.pth")
    out = str(tmp_path / "ae")
    assert main(["convert", "autoencoder", str(tmp_path / "DCAE.pth"), "--out", out]) == 0
    assert "saved" in capsys.readouterr().out
    autoencoder = open_autoencoder(out)
    network = tiny("AutoencoderDC", **tiny_deep("batch_norm"))
    network.load_state_dict(far_state)
    raw, again = plain(network.eval(), frames_of())
    latents = autoencoder.encode(frames_of())
    torch.testing.assert_close(latents, raw * 0.2889)
    torch.testing.assert_close(autoencoder.decode(latents), again)
    assert set(autoencoder.config.std) == {1 / 0.2889}
    assert main(["convert", "autoencoder", str(tmp_path / "DCAE.pth"), "--out", out]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_other_state_dicts_are_refused(far_state, tmp_path):
    def convert(state, **changes):
        torch.save(state, tmp_path / "file.pth")
        config = ConvertAutoencoderConfig(
            file=str(tmp_path / "file.pth"), out=str(tmp_path / "ae"), **changes
        )
        return convert_autoencoder(config)

    without = {name: value for name, value in far_state.items() if "norm_out" not in name}
    with pytest.raises(ValueError, match="missing weights such as 'decoder.norm_out.bias'"):
        convert(without)
    with pytest.raises(ValueError, match="1 unknown weights such as 'quant_conv.weight'"):
        convert(far_state | {"quant_conv.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="'decoder.conv_in.bias' of shape"):
        convert(far_state | {"decoder.conv_in.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="not a state dict of a deep-compression autoencoder"):
        convert({"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="has no 'ema'"):
        convert(far_state, key="ema")
    with pytest.raises(ValueError, match="scale must be above 0"):
        convert(far_state, scale=0.0)
    with pytest.raises(FileNotFoundError, match="no model weights at gone"):
        convert_autoencoder(ConvertAutoencoderConfig(file="gone", out=str(tmp_path / "ae")))
    assert not Path(tmp_path / "ae").exists()
    assert convert({"ema": far_state}, key="ema", scale=0.5).is_dir()
