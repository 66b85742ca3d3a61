"""FVD: the distance by hand, TorchScript networks of both kinds, frames through H.264."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from scd.evaluation import frechet, fvd, image, trial


class Scaling(nn.Module):
    """Stands where StyleGAN-V's network stands: scales by itself, gives 400 numbers."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert not rescale and resize and return_features
        return F.adaptive_avg_pool3d(x, (1, 10, 20)).flatten(1)[:, :400]


class Wide(nn.Module):
    """Stands where TF-Hub's network stands: 224 x 224 only, numbers for each place in time."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[3] == 224 and x.shape[4] == 224
        return (
            F.adaptive_avg_pool3d(x, (5, 10, 20))[:, 0].flatten(2).transpose(1, 2).repeat(1, 2, 1)
        )


def network(module, path, kind):
    torch.jit.script(module).save(str(path))
    return fvd.load_i3d(str(path), kind, torch.device("cpu"))


def clips(number=6, seed=0, size=16):
    return (
        torch.rand(number, 10, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    )


def by_hand(one, other):
    """The formula with scipy's root of a matrix."""
    one, other = one.double().numpy(), other.double().numpy()
    covariances = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    apart = ((one.mean(0) - other.mean(0)) ** 2).sum()
    return apart + np.trace(covariances[0] + covariances[1] - 2 * root)


@pytest.mark.parametrize("num", [7, 40])
def test_distance_of_sets_is_the_formula(num):
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(num, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    other = 0.5 + torch.randn(num + 2, 5, generator=generator)
    found = frechet.frechet_of_sets(one, other).item()
    assert found == pytest.approx(by_hand(one, other), rel=1e-9)
    moments = [(side.double().mean(0), torch.cov(side.double().T)) for side in (one, other)]
    twin = frechet.frechet_distance(*moments[0], *moments[1]).item()
    assert found == pytest.approx(twin, rel=1e-9)


def test_distance_of_fewer_samples_than_features_is_the_same():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 6, 20, generator=generator, dtype=torch.float64)
    moments = [(side.mean(0), torch.cov(side.T)) for side in (one, other)]
    found = frechet.frechet_of_sets(one, other)
    torch.testing.assert_close(found, frechet.frechet_distance(*moments[0], *moments[1]))


def test_distance_by_hand():
    # Along one line: (difference of means)^2 + (difference of deviations)^2.
    one, other = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [16.0]])
    expected = (13 - 1) ** 2 + (math.sqrt(18) - math.sqrt(2)) ** 2
    assert frechet.frechet_of_sets(one, other).item() == pytest.approx(expected)
    assert frechet.frechet_of_sets(one, one).item() == pytest.approx(0)
    with pytest.raises(ValueError, match="two samples or more, got 1 and 2"):
        frechet.frechet_of_sets(one[:1], other)


def test_both_networks_give_400_numbers_per_clip(tmp_path):
    frames = clips(2)
    first = network(Scaling(), tmp_path / "a.pt", "stylegan-v").features(frames)
    pooled = F.adaptive_avg_pool3d(frames.transpose(1, 2), (1, 10, 20)).flatten(1)[:, :400]
    torch.testing.assert_close(first, pooled)
    second = network(Wide(), tmp_path / "b.pt", "tf-hub").features(frames)
    assert second.shape == (2, 400)
    half = F.adaptive_avg_pool2d(fvd.at_side(frames)[:, 0], (10, 20)).mean(1).flatten(1)
    torch.testing.assert_close(second, torch.cat([half, half], 1), rtol=1e-4, atol=1e-4)


def test_scaling_keeps_edges_and_means():
    frames = torch.linspace(-1, 1, 32)[None, None, None, None].expand(1, 1, 3, 32, 32).contiguous()
    wide = fvd.at_side(frames)[0, 0, 0, 0]
    assert wide[0] == -1 and wide[-1] == 1 and wide.mean().abs() < 1e-6
    # Pixel centres: place p of 224 lies at (p + 1/2) * 32/224 - 1/2 of 32.
    place = (100 + 0.5) * 32 / 224 - 0.5
    assert wide[100].item() == pytest.approx(-1 + 2 * place / 31, abs=1e-6)


def test_files_and_clips_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match="text.pt is not a TorchScript file"):
        fvd.load_i3d(str(tmp_path / "text.pt"), "stylegan-v", torch.device("cpu"))
    wrong = network(Wide(), tmp_path / "wide.pt", "stylegan-v")
    with pytest.raises(ValueError, match="not an I3D of kind stylegan-v"):
        wrong.features(clips(1))
    with pytest.raises(ValueError, match="at least 10 frames, got 9"):
        wrong.features(clips(1)[:, :9])
    flat = network(nn.Flatten(), tmp_path / "flat.pt", "tf-hub")
    with pytest.raises(ValueError, match=r"gives \[1, 400\] for one clip, got \[1, 1505280\]"):
        flat.features(clips(1))


def test_trajectories_are_measured_each_or_together():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(8, 1, 4, generator=generator).expand(8, 2, 4)
    predicted = true + torch.randn(8, 2, 4, generator=generator)
    each = [by_hand(predicted[:, j], true[:, j]) for j in range(2)]
    assert fvd.fvd(predicted, true, "each") == pytest.approx(np.mean(each))
    together = by_hand(predicted.flatten(0, 1), true[:, 0])
    assert fvd.fvd(predicted, true, "pooled") == pytest.approx(together)
    found = fvd.fvd_estimate(predicted, true)
    assert found.ci_low < found.mean == pytest.approx(np.mean(each)) and found.mean < found.ci_high
    assert found == fvd.fvd_estimate(predicted, true) != fvd.fvd_estimate(predicted, true, seed=1)
    with pytest.raises(ValueError, match="two clips or more, got 1"):
        fvd.fvd_estimate(predicted[:1], true[:1])


def test_h264_changes_both_sides_a_little_and_always_alike():
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(2, 6, 3, 4, 4, generator=generator) * 2 - 1
    predicted, true = small.repeat_interleave(8, -1).repeat_interleave(8, -2)
    read, *_, again = (trial.through_h264(predicted, true) for _ in range(8))
    for side, whole, twin in zip(read, (predicted, true), again, strict=True):
        assert side.shape == whole.shape and torch.equal(side, twin)
        error = image.psnr_of(image.mse(side, whole).mean()).item()
        assert 15 < error < 45
        swapped = image.psnr_of(image.mse(side, predicted + true - whole).mean()).item()
        assert swapped < error - 5
    with pytest.raises(ValueError, match="multiples of 16, got 12x24"):
        trial.through_h264(torch.zeros(2, 3, 12, 12), torch.zeros(2, 3, 12, 12))


def test_psnr_and_ssim_are_those_of_scikit_image():
    generator = torch.Generator().manual_seed(0)
    true = F.interpolate(
        torch.rand(3, 3, 6, 8, generator=generator), scale_factor=5, mode="bicubic"
    )
    true = true.clamp(0, 1)
    predicted = (true + 0.1 * torch.randn(true.shape, generator=generator)).clamp(0, 1)
    found = image.frame_values(predicted * 2 - 1, true * 2 - 1)
    for index in range(3):
        pair = [side[index].permute(1, 2, 0).double().numpy() for side in (true, predicted)]
        psnr = peak_signal_noise_ratio(*pair, data_range=1)
        assert found["psnr_per_frame"][index].item() == pytest.approx(psnr, rel=1e-5)
        # At the edges a frame goes on as its mirror image; scikit-image leaves its edges out.
        wide = [np.pad(side, ((5, 5), (5, 5), (0, 0)), mode="reflect") for side in pair]
        ssim = structural_similarity(
            *wide,
            data_range=1,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert found["ssim"][index].item() == pytest.approx(ssim, rel=1e-4)
