"""Pixels as latents: standardise, nothing more. For small frames that need no autoencoder."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from scd.autoencoders.latents import LatentsConfig


@dataclass(frozen=True, kw_only=True)
class PixelConfig(LatentsConfig):
    """Mean and spread of the pixels of a dataset."""

    mean: float = 0.0
    """Mean of the pixels in [-1, 1]."""
    std: float = 1.0
    """Standard deviation of the pixels in [-1, 1]."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(
                f"mean must be finite and std positive, got mean={self.mean}, std={self.std}"
            )


class PixelAutoencoder:
    """Latents are the pixels themselves at zero mean and unit scale."""

    def __init__(self, config: PixelConfig) -> None:
        self.config = config

    @staticmethod
    def measure(batches: Iterable[Float[Tensor, "b t 3 h w"]]) -> PixelConfig:
        """Measure the mean and standard deviation of some frames (at least one batch)."""
        count, total, squares = 0, 0.0, 0.0
        for frames in batches:
            count += frames.numel()
            total += float(frames.double().sum())
            squares += float(frames.double().square().sum())
        if count == 0:
            raise ValueError("needed at least one batch of frames to measure, got none")
        mean = total / count
        return PixelConfig(mean=mean, std=math.sqrt(max(squares / count - mean**2, 1e-8)))

    def load(self) -> None:
        """Read the weights: there are none."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return channels, rows and columns of the latent of a height x width frame."""
        return 3, height, width

    def encode(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t 3 h w"]:
        """Turn frames in [-1, 1] into latents."""
        return (frames - self.config.mean) / self.config.std

    def decode(self, latents: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t 3 h w"]:
        """Turn latents into frames in [-1, 1]; values outside are clipped."""
        return (latents * self.config.std + self.config.mean).clamp(-1, 1)
