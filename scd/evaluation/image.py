"""Distance between predicted and true frames, and how sure a mean over clips is.

Every number is first computed per clip and frame and then averaged over clips. PSNR exists in two
aggregations that differ by many dB on videos with static frames, so each has its name: `psnr` is
the PSNR of the mean squared error over clips, `psnr_per_frame` the mean of each frame's PSNR.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

DATA_RANGE = 2.0
"""Distance from black to white: pixels are in [-1, 1]."""

MAX_PSNR = 20 * math.log10(255) + 10 * math.log10(12)
"""Upper end of PSNR in dB, about 58.9: the error that rounding to 8 bits makes by itself (uniform
over one grey level: its variance is 1/12). Identical frames get this instead of infinity, which
would swallow every mean."""

SSIM_WINDOW = 11
"""Rows and columns of SSIM's Gaussian window: frames must be at least as large.
Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity"."""

SSIM_SIGMA = 1.5
"""Deviation of that window in pixels. Source: the same."""

SSIM_CONSTANTS = (0.01**2, 0.03**2)
"""What keeps SSIM's ratios of means and of variances defined, for pixels in [0, 1]. Source: the
same."""

HIGHER_IS_BETTER = frozenset({"psnr_per_frame", "ssim"})
"""Metrics of frames of which more is better; of the others less is."""

NUM_RESAMPLES = 1000
"""Resamplings of the clips from which an interval is read."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number measured on some clips and where it would fall on other clips of the same kind."""

    mean: float
    ci_low: float
    ci_high: float
    """Ends of the 95 % interval."""


def mse(
    predicted: Float[Tensor, "*b 3 h w"], true: Float[Tensor, "*b 3 h w"]
) -> Float[Tensor, "*b"]:
    """Mean squared error of each frame, pixels in [-1, 1] (four times that of [0, 1])."""
    return (predicted.float() - true.float()).square().mean(dim=(-3, -2, -1))


def psnr_of(error: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Return the peak signal-to-noise ratio of mean squared errors, in dB, at most MAX_PSNR."""
    floor = DATA_RANGE**2 / 10 ** (MAX_PSNR / 10)
    return 10 * torch.log10(DATA_RANGE**2 / error.clamp(min=floor))


def ssim(
    predicted: Float[Tensor, "*b 3 h w"], true: Float[Tensor, "*b 3 h w"]
) -> Float[Tensor, "*b"]:
    """Structural similarity of each frame, at most 1; 11 x 11 Gaussian window, sigma 1.5.

    Pixels are in [-1, 1]; they are measured as [0, 1]. Frames must not be smaller than the window.
    """
    *batch, channels, height, width = predicted.shape
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs frames of at least {SSIM_WINDOW}x{SSIM_WINDOW}, got {height}x{width}"
        )
    # Unlike PSNR, SSIM compares means by their ratio: it is defined for black at 0. It takes small
    # variances as differences of squares, for which single precision is too rough on flat pictures.
    seen, wanted = ((frames.double() + 1) / 2 for frames in (predicted, true))
    rows, columns = (_window(side).to(seen) for side in (height, width))

    def blurred(values: Tensor) -> Tensor:
        return rows @ values @ columns.T

    means, products = (blurred(seen), blurred(wanted)), blurred(seen * wanted)
    squares = means[0].square(), means[1].square()
    variances = sum(
        (blurred(values.square()) - square).clamp(min=0)
        for values, square in zip((seen, wanted), squares, strict=True)
    )
    both = means[0] * means[1]
    low, high = SSIM_CONSTANTS
    likeness = (2 * both + low) * (2 * (products - both) + high)
    values = likeness / ((squares[0] + squares[1] + low) * (variances + high))
    return values.mean(dim=(-3, -2, -1)).float()


@lru_cache
def _window(side: int) -> Float[Tensor, "side side"]:
    """Return SSIM's window along rows or columns as a matrix: each line averages around a pixel.

    The Gaussian is a product of one along rows and one along columns. As products of matrices it
    takes a fortieth of the time of a convolution in double precision, and no memory to speak of.
    Beyond its borders a picture goes on as its mirror image, as in torchmetrics and the paper.
    """
    places = torch.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = torch.exp(-places.double().square() / (2 * SSIM_SIGMA**2))
    around = (torch.arange(side)[:, None] + places).abs()
    around = torch.minimum(around, 2 * (side - 1) - around)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add(1, around, (weights / weights.sum()).expand(side, -1))


def bootstrap(
    per_clip: Float[Tensor, "b ..."],
    statistic: Callable[[Tensor], Tensor] = lambda mean: mean,
    seed: int = 0,
) -> Estimate:
    """Estimate a function of the mean over clips and its 95 % percentile bootstrap interval.

    Clips, not frames, are resampled: the frames of one clip are not independent. With one clip the
    interval has no width.

    Args:
        per_clip: numbers of each clip; two numbers per clip keep a comparison paired.
        statistic: turns means [r ...] into the numbers wanted [r], one per resampling.
        seed: of the resampling.
    """
    mean, drawn = bootstrap_draws(per_clip, statistic, seed)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Estimate(mean=mean, ci_low=low, ci_high=high)


def centred_estimate(distance: float, drawn: Float[Tensor, " r"]) -> Estimate:
    """Estimate a distance of sets by those of resampled sets, with their median moved to it.

    A resampled set holds clips twice and is therefore narrower than a fresh one, which moves its
    distances up.
    """
    levels = torch.tensor([0.025, 0.5, 0.975], dtype=drawn.dtype)
    low, middle, high = torch.quantile(drawn, levels).tolist()
    low, high = max(0.0, distance + low - middle), distance + high - middle
    return Estimate(mean=distance, ci_low=low, ci_high=high)


def bootstrap_draws(
    per_clip: Float[Tensor, "b ..."], statistic: Callable[[Tensor], Tensor], seed: int = 0
) -> tuple[float, Float[Tensor, " r"]]:
    """Return a function of the mean over clips, and of the means over resampled clips."""
    num_clips = per_clip.shape[0]
    if num_clips == 0:
        raise ValueError("an estimate needs at least one clip, got none")
    values = per_clip.double().reshape(num_clips, -1)
    weights = _resampled(num_clips, NUM_RESAMPLES, seed)
    shape = per_clip.shape[1:]
    drawn = statistic((weights @ values).reshape(NUM_RESAMPLES, *shape))
    return statistic(values.mean(0).reshape(1, *shape)).item(), drawn


@lru_cache(maxsize=4)
def _resampled(num_clips: int, num_draws: int, seed: int) -> Float[Tensor, "r b"]:
    """Draw clips with replacement and return each one's share; kept, for rows by the hundred."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(num_clips, (num_draws, num_clips), generator=generator)
    share = torch.full(chosen.shape, 1 / num_clips, dtype=torch.float64)
    return torch.zeros_like(share).scatter_add(1, chosen, share)


def psnr_gain(
    error: Float[Tensor, " b"], reference: Float[Tensor, " b"], seed: int = 0
) -> Estimate:
    """Estimate by how many dB the PSNR of the mean error exceeds that of a reference, paired."""
    both = torch.stack([error, reference], dim=1)
    return bootstrap(both, lambda means: psnr_of(means[:, 0]) - psnr_of(means[:, 1]), seed)


def frame_values(
    predicted: Float[Tensor, "*b 3 h w"], true: Float[Tensor, "*b 3 h w"]
) -> dict[str, Float[Tensor, "*b"]]:
    """Measure each frame by itself: mse, psnr_per_frame and ssim.

    SSIM is left out for frames smaller than its window.
    """
    error = mse(predicted, true)
    values = {"mse": error, "psnr_per_frame": psnr_of(error)}
    if min(predicted.shape[-2:]) >= SSIM_WINDOW:
        values["ssim"] = ssim(predicted, true)
    return values


def estimates(values: Mapping[str, Float[Tensor, " b"]], seed: int = 0) -> dict[str, Estimate]:
    """Average over clips, with intervals; beside mse stands psnr, that of the mean error."""
    found = {name: bootstrap(of_clips, seed=seed) for name, of_clips in values.items()}
    return found | {"psnr": bootstrap(values["mse"], psnr_of, seed)}
