"""Distances under known damage: what each damage does, the bias, and features that are kept."""

import pytest
import torch

from tools import distances


def clips(seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(3, 5, 3, size // 4, size // 4, generator=generator) * 2 - 1
    return small.repeat_interleave(4, -1).repeat_interleave(4, -2)


def test_every_damage_keeps_the_shape_and_does_what_it_says():
    whole = clips()
    made = {name: damage(whole) for name, damage in distances.damages(seed=0).items()}
    assert all(one.shape == whole.shape for one in made.values())
    apart = {name: (one - whole).square().mean().item() for name, one in made.items()}
    assert apart["rounded to 8 bits"] < 1e-4
    assert apart["blur of 0.5 pixels"] < apart["blur of 1 pixel"] < apart["blur of 2 pixels"]
    assert apart["noise of 0.05"] < 0.05**2 < apart["noise of 0.2"] < 0.2**2
    assert apart["H.264, rate factor 18"] < apart["H.264, rate factor 35"]
    assert torch.equal(made["first frame frozen"][:, 4], whole[:, 0])
    for one, other in zip(made["frames shuffled"], whole, strict=True):
        assert sorted(one.mean((1, 2, 3)).tolist()) == sorted(other.mean((1, 2, 3)).tolist())
    assert {tuple(one.flatten().tolist()) for one in made["another clip"]} == {
        tuple(one.flatten().tolist()) for one in whole
    }
    assert not any(torch.equal(*both) for both in zip(made["another clip"], whole, strict=True))


def test_blur_keeps_flat_frames_and_means():
    flat = torch.full((1, 1, 3, 9, 9), 0.25)
    torch.testing.assert_close(distances.blurred(flat, 2.0), flat)
    dot = torch.zeros(1, 1, 1, 21, 21)
    dot[..., 10, 10] = 1
    blurred = distances.blurred(dot.expand(1, 1, 3, 21, 21).contiguous(), 1.0)[0, 0, 0]
    assert blurred.sum().item() == pytest.approx(1, abs=1e-4)
    # A Gaussian of one pixel, at its centre: (1 / sqrt(2 pi))^2.
    assert blurred[10, 10].item() == pytest.approx(1 / (2 * torch.pi), rel=0.01)


def test_bias_falls_with_the_number_of_clips_and_goes_to_nothing():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 256, 40, generator=generator)
    rows = distances.bias(one, other, seed=0)
    sizes, values = zip(*((row["clips"], row["fvd"]) for row in rows), strict=True)
    assert sizes == (8, 16, 32, 64, 128, 256, 0)
    assert list(values[:-1]) == sorted(values[:-1], reverse=True)
    # The line through the last two is far nearer to the true distance, which is 0.
    assert abs(values[-1]) < values[-2] / 2


def test_rows_and_the_table():
    whole = clips()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 4, generator=generator)
    row = distances.row_of("nothing", whole, whole, {"fvd": (features, features)})
    assert row["psnr"] > 50 and row["ssim"] == pytest.approx(1) and abs(row["fvd"]) < 1e-6
    result = {"rows": [row], "other_real_clips": {"all": 12.34, "half": 23.45}}
    head, _, first, second, third = distances.table(result).splitlines()
    assert head == "| damage | FVD | PSNR | SSIM |"
    assert first.startswith("| nothing | 0.0 [")
    assert second == "| other real clips (all) | 12.3 |  |  |" and "23.4" in third


def test_features_are_computed_once(tmp_path):
    kept = distances.Kept(tmp_path / "kept")
    made = kept.get("Blur of 1 pixel", lambda: torch.arange(3.0))
    again = kept.get("Blur of 1 pixel", lambda: 1 / 0)
    assert torch.equal(made, again) and made.tolist() == [0, 1, 2]
