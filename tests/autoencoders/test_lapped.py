"""Patches that overlap: the transform of the literature, orthogonal, kept wherever frames go."""

import math

import pytest
import torch
from scipy.fft import dct

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.build import fingerprint
from scd.autoencoders.config import PixelConfig
from scd.autoencoders.lapped import border_mix, lap, lapped_matrix
from scd.cli import main
from scd.common.config import from_json, to_json
from scd.common.files import read_json
from scd.models.checkpoint import load_world


def coding_gain(patch: int, lapped: bool) -> float:
    """Return what a transform of patches gains over none on pixels that correlate by 0.95, dB."""
    length = 5 * patch
    places = torch.arange(length, dtype=torch.float64)
    correlation = 0.95 ** (places[:, None] - places).abs()
    before = (
        lapped_matrix(length, border_mix(patch)).double() if lapped else torch.eye(length).double()
    )
    within = torch.from_numpy(dct(torch.eye(patch).double().numpy(), axis=0, norm="ortho"))
    transform = torch.block_diag(*[within] * 5) @ before
    variances = (transform @ correlation @ transform.T).diag()[2 * patch : 3 * patch]
    return 10 * math.log10(variances.mean() / variances.log().mean().exp())


def test_it_is_the_lapped_transform_of_the_literature():
    # Tran, Liang and Tu (2003), table of coding gains: DCT 8x8 8.83 dB, LOT 8x16 9.22 dB.
    assert coding_gain(8, lapped=False) == pytest.approx(8.83, abs=0.005)
    assert coding_gain(8, lapped=True) == pytest.approx(9.22, abs=0.005)


@pytest.mark.parametrize(("length", "patch"), [(64, 16), (64, 8), (16, 16), (6, 2)])
def test_it_is_orthogonal_and_leaves_an_even_surface(length, patch):
    matrix = lapped_matrix(length, border_mix(patch))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(length))
    torch.testing.assert_close(matrix.sum(1), torch.ones(length))
    # It mixes across borders alone: outer ones have nothing beyond them.
    assert torch.equal(matrix[: patch // 2], torch.eye(length)[: patch // 2])


def test_frames_come_back_and_what_a_patch_draws_fades_into_its_neighbours():
    frames = torch.rand(2, 3, 3, 32, 48) * 2 - 1
    autoencoder = PixelAutoencoder(PixelConfig(mean=0.1, std=0.5, lapped=16))
    latents = autoencoder.encode(frames)
    assert not torch.allclose(
        latents, PixelAutoencoder(PixelConfig(mean=0.1, std=0.5)).encode(frames)
    )
    torch.testing.assert_close(autoencoder.decode(latents), frames, atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(autoencoder.encode(frames), latents, atol=0, rtol=0)
    # A patch that is drawn alone, even all over: without a lap its border is a step of 1.
    latents = torch.zeros(1, 32, 48)
    latents[:, :16, 16:32] = 1
    drawn = lap(latents, border_mix(16), back=True)
    steps = drawn[0, 0].diff().abs()
    assert steps.max() < 0.25 and drawn[0, 0, 15] > 0.3 and drawn[0, 0, 16] < 0.7


def test_latents_of_before_are_still_known():
    """Fingerprints lie beside stored latents: one for a field they had not yet must not change."""
    assert fingerprint(PixelAutoencoder(PixelConfig(mean=0.5, std=0.25))) == (
        "76ad1dfe76dd40890a55124c2eacd8a9"
    )
    lapped = PixelConfig(lapped=8)
    assert fingerprint(PixelAutoencoder(lapped)) != fingerprint(PixelAutoencoder(PixelConfig()))
    assert from_json(PixelConfig, to_json(lapped)) == lapped
    assert from_json(PixelConfig, {"mean": 0.0, "std": 1.0}) == PixelConfig()
    # Nor what else is compared as it was written: latents.json, snapshots, samples.
    assert to_json(PixelConfig()) == {"kind": "PixelConfig", "mean": 0.0, "std": 1.0}


@pytest.mark.parametrize("lapped", [7, -2])
def test_an_odd_patch_is_refused(lapped):
    with pytest.raises(ValueError, match=f"lapped must be .*, got {lapped}"):
        PixelConfig(lapped=lapped)
    with pytest.raises(ValueError, match=f"an even number of pixels, got {lapped}"):
        border_mix(lapped)


def test_frames_of_no_whole_patches_are_refused():
    with pytest.raises(ValueError, match="40 pixels hold no whole number of patches of 16"):
        lapped_matrix(40, border_mix(16))
    with pytest.raises(ValueError, match="frames of 40x48 pixels cannot be cut"):
        PixelAutoencoder(PixelConfig(lapped=16)).latent_shape(40, 48)


def train(out, *words: str) -> int:
    return main(
        [
            *("train", "toy", "--max-steps", "2", "--validate-every", "0", "--sample-every", "0"),
            *("--model.shape.patch-size", "8", "--out", str(out), *words),
        ]
    )


def test_a_run_keeps_it(tmp_path, capsys):
    out = tmp_path / "run"
    assert train(out, "--autoencoder.lapped", "8") == 0
    world = load_world(out)
    assert world.autoencoder.config.lapped == 8
    # The scale is still that of the data.
    assert train(tmp_path / "plain") == 0
    plain = read_json(tmp_path / "plain" / "config.json")["autoencoder"]
    assert to_json(world.autoencoder.config) == plain | {"lapped": 8}
    capsys.readouterr()
    # Another run in its folder is refused.
    assert train(out) == 2
    assert "autoencoder.lapped" in capsys.readouterr().err
    assert train(tmp_path / "other", "--autoencoder.lapped", "24") == 2
    assert "frames of 32x32 pixels cannot be cut into cells of 24x24" in capsys.readouterr().err
