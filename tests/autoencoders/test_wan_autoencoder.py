"""Wan's autoencoder: streamed = whole, statistics, small decoders, folders that do not fit."""

import json
import shutil

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch.nn import functional

from scd.autoencoders.config import WanAutoencoderConfig
from scd.autoencoders.tiny import WIDTHS, TaewDecoder, open_tiny_decoder
from scd.autoencoders.wan import (
    WanAutoencoder,
    WanStreamDecoder,
    WanStreamEncoder,
    num_latent_frames,
    open_wan_autoencoder,
)
from scd.common.hub import find_part, fingerprint
from tests.tiny_wan_vae import tiny_decoder, tiny_vae


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    tiny_vae().save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def autoencoder(source):
    return open_wan_autoencoder(source)


def latents_of(batch=2, num=4, seed=0):
    return torch.randn(batch, num, 16, 3, 4, generator=torch.Generator().manual_seed(seed))


def clip_of(batch=2, num=9, seed=0):
    noise = torch.rand(batch, num, 3, 16, 24, generator=torch.Generator().manual_seed(seed))
    return 2 * noise - 1


def test_numbers_of_frames():
    assert [num_latent_frames(num) for num in (1, 5, 81)] == [1, 2, 21]
    for wrong in (0, 2, 4, 80):
        with pytest.raises(ValueError, match="4 at a time"):
            num_latent_frames(wrong)


def test_latents_are_diffusers_mean_at_unit_scale(autoencoder):
    clip = clip_of()
    latents = autoencoder.encode(clip)
    assert latents.shape == (2, 3, 16, 2, 3)
    mean = autoencoder.network.encode(clip.transpose(1, 2)).latent_dist.mean.transpose(1, 2)
    settings = autoencoder.network.config
    for channel in (0, 7, 15):
        expected = mean[:, :, channel] - settings.latents_mean[channel]
        expected = expected / settings.latents_std[channel]
        torch.testing.assert_close(latents[:, :, channel], expected)
    torch.testing.assert_close(autoencoder.from_unit_scale(latents), mean)


def test_decoding_is_that_of_diffusers(autoencoder):
    latents = latents_of()
    frames = autoencoder.decode(latents)
    assert frames.shape == (2, 13, 3, 24, 32) and frames.std() > 0.01
    raw = autoencoder.from_unit_scale(latents).transpose(1, 2)
    theirs = autoencoder.network.decode(raw).sample.transpose(1, 2)
    # Its first layer takes all latent frames at once, which rounds otherwise on some processors.
    torch.testing.assert_close(frames, theirs, atol=1e-6, rtol=1e-5)


def test_streamed_frames_are_those_of_the_whole_clip(autoencoder):
    latents = latents_of()
    whole = autoencoder.decode(latents)
    stream = WanStreamDecoder(autoencoder)
    for _ in range(2):
        parts = [stream.next(latent) for latent in latents.unbind(1)]
        assert [part.shape[1] for part in parts] == [1, 4, 4, 4]
        assert torch.equal(torch.cat(parts, dim=1), whole)
        stream.reset()


def test_a_fork_of_the_decoder_goes_its_own_way(autoencoder):
    latents, others = latents_of(), latents_of(seed=1)
    stream = WanStreamDecoder(autoencoder)
    stream.next(latents[:, 0])
    stream.next(latents[:, 1])
    twin = stream.fork()
    other = twin.next(others[:, 2])
    bytes_before = stream.memory_bytes
    assert torch.equal(stream.next(latents[:, 2]), autoencoder.decode(latents)[:, 5:9])
    assert stream.memory_bytes == bytes_before > 0
    mixed = torch.cat([latents[:, :2], others[:, 2:3]], dim=1)
    assert torch.equal(other, autoencoder.decode(mixed)[:, 5:])


def test_streamed_latents_are_those_of_the_whole_clip(autoencoder):
    clip = clip_of()
    stream = WanStreamEncoder(autoencoder)
    parts = [stream.next(part) for part in (clip[:, :1], clip[:, 1:5], clip[:, 5:])]
    assert torch.equal(torch.stack(parts, dim=1), autoencoder.encode(clip))
    with pytest.raises(ValueError, match="needed 4, got 1"):
        stream.next(clip[:, :1])
    stream.reset()
    assert torch.equal(stream.next(clip[:, :1]), parts[0])


def test_half_precision_is_near(source, autoencoder):
    half = open_wan_autoencoder(source, precision="bf16")
    assert next(half.network.parameters()).dtype == torch.bfloat16
    frames, exact = half.decode(latents_of()), autoencoder.decode(latents_of())
    assert frames.dtype == torch.float32
    assert 0 < (frames - exact).abs().max() < 0.1 * exact.abs().max()


def test_weights_are_read_when_they_are_needed(source, autoencoder):
    away = WanAutoencoder(WanAutoencoderConfig(source=str(source / "nowhere")))
    assert away.latent_shape(480, 832) == (16, 60, 104)
    with pytest.raises(ValueError, match="cells of 8x8"):
        away.latent_shape(480, 830)
    with pytest.raises(FileNotFoundError, match="no name on the hub"):
        away.decode(latents_of())
    with pytest.raises(FileNotFoundError, match="does not say where"):
        WanAutoencoder(WanAutoencoderConfig(source="")).encode(clip_of())
    here = WanAutoencoder(WanAutoencoderConfig(source=str(source)))
    assert torch.equal(here.decode(latents_of()), autoencoder.decode(latents_of()))
    with pytest.raises(ValueError, match="8 channels and cells .* have 16 and 8"):
        WanAutoencoder(WanAutoencoderConfig(source=str(source), channels=8)).decode(latents_of())


def test_folders_that_hold_no_autoencoder_of_wan(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no vae/"):
        open_wan_autoencoder(tmp_path)
    with pytest.raises(FileNotFoundError, match="hf download some-owner/some-model"):
        open_wan_autoencoder("some-owner/some-model")
    pictures = AutoencoderKL(block_out_channels=(32,), norm_num_groups=32)
    pictures.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="AutoencoderKLWan.*it holds AutoencoderKL$"):
        open_wan_autoencoder(tmp_path)
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    part = tmp_path / "torn"
    shutil.copytree(source / "vae", part)
    (part / "x.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="lacks 2 of the files"):
        find_part(part, "vae", ("AutoencoderKLWan",))
    assert find_part(source / "vae", "vae") == source / "vae"


def test_a_fingerprint_follows_the_contents(source, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source / "vae", copy)
    assert fingerprint(copy) == fingerprint(source / "vae")
    weights = copy / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["decoder.conv_out.bias"] += 1e-3
    save_file(state, weights, metadata={"format": "pt"})
    assert fingerprint(copy) != fingerprint(source / "vae")


def taew_state():
    torch.manual_seed(0)
    return {
        name: torch.randn_like(value) * 0.02 for name, value in TaewDecoder().state_dict().items()
    }


def plain_taew(state, latents):
    """TAEW's decoder of one stream by its names of weights, layer by layer, frame by frame."""

    def conv(x, name):
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        return functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    frames = [functional.relu(conv(torch.tanh(x / 3) * 3, "decoder.1")) for x in latents]
    for stage, place in enumerate((3, 9, 15)):
        for layer in range(place, place + 3):
            pasts, frames_after = [torch.zeros_like(frames[0]), *frames[:-1]], []
            for now, past in zip(frames, pasts, strict=True):
                x = functional.relu(conv(torch.cat([now, past], 1), f"decoder.{layer}.conv.0"))
                x = functional.relu(conv(x, f"decoder.{layer}.conv.2"))
                frames_after.append(functional.relu(now + conv(x, f"decoder.{layer}.conv.4")))
            frames = frames_after
        frames = [functional.interpolate(x, scale_factor=2) for x in frames]
        frames = [
            piece
            for x in frames
            for piece in conv(x, f"decoder.{place + 4}.conv").split(WIDTHS[stage], dim=1)
        ]
        frames = [conv(x, f"decoder.{place + 5}") for x in frames]
    frames = [conv(functional.relu(x), "decoder.22").clamp(0, 1) * 2 - 1 for x in frames]
    return torch.cat(frames[3:])


def test_taew_streams_what_its_layers_compute(tmp_path):
    state = taew_state()
    extra = {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}
    torch.save(state | extra, tmp_path / "taew2_1.pth")
    save_file(state, tmp_path / "taew2_1.safetensors")
    latents = latents_of(num=3)
    for name in ("taew2_1.pth", "taew2_1.safetensors"):
        decoder = open_tiny_decoder(tmp_path / name)
        assert decoder.name == "TAEW (tiny)" and decoder.pictures_per_latent == 4
        parts = [decoder.next(latent) for latent in latents.unbind(1)]
        assert [part.shape[1] for part in parts] == [1, 4, 4]
        streamed = torch.cat(parts, dim=1)
        expected = torch.stack([plain_taew(state, one[:, None]) for one in latents])
        assert streamed.shape == (2, 9, 3, 24, 32)
        torch.testing.assert_close(streamed, expected)
        assert streamed.std() > 0.01
        twin = decoder.fork()
        twin.next(latents[:, 0])
        both = parts[0].shape[0] * 2
        decoder.reset()
        decoder.next(latents[:, 0])
        twice = decoder.fork(2).next(latents[:, 1].repeat_interleave(2, 0))
        assert twice.shape[0] == both
        torch.testing.assert_close(twice, parts[1].repeat_interleave(2, 0), atol=1e-6, rtol=0)
        decoder.reset()
        assert torch.equal(decoder.next(latents[:, 0]), parts[0])


def test_pictures_of_an_autoencoder_tiny(tmp_path):
    network = tiny_decoder()
    network.save_pretrained(tmp_path / "tiny")
    decoder = open_tiny_decoder(tmp_path / "tiny")
    assert "one picture per latent frame" in decoder.name and decoder.pictures_per_latent == 1
    latent = latents_of()[:, 0]
    picture = decoder.next(latent)
    assert picture.shape == (2, 1, 3, 24, 32)
    assert torch.equal(picture[:, 0], network.decode(latent).sample.clamp(-1, 1))
    with pytest.raises(ValueError, match="of 16 channels, needed 4"):
        open_tiny_decoder(tmp_path / "tiny", channels=4)


def test_what_is_no_small_decoder(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither file nor folder"):
        open_tiny_decoder(tmp_path / "none.pth")
    with pytest.raises(
        ValueError, match=r"needed .*\(AutoencoderTiny\), it holds AutoencoderKLWan"
    ):
        open_tiny_decoder(source / "vae")
    state = taew_state()
    save_file(state, tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match="4 channels"):
        open_tiny_decoder(tmp_path / "whole.safetensors", channels=4)
    del state["decoder.9.conv.0.bias"]
    save_file(state, tmp_path / "torn.safetensors")
    with pytest.raises(ValueError, match="1 weights differ"):
        open_tiny_decoder(tmp_path / "torn.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="cannot be read"):
        open_tiny_decoder(tmp_path / "junk.safetensors")
