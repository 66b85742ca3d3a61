"""Settings of autoencoders."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from scd.common.config import MAX_SIZE, added, within


class LatentsConfig:
    """What the settings of any autoencoder tell of its latents."""

    frames_per_latent: ClassVar[int] = 1
    """Frames of video that a latent frame stands for, but for the first, which stands for one."""
    has_text_encoder: ClassVar[bool] = False
    """Whether a text encoder lies beside the autoencoder."""

    @property
    def is_video(self) -> bool:
        """Whether a latent frame stands for several frames of video, which those before it decide
        too."""
        return self.frames_per_latent > 1

    def placeless(self) -> Any:
        """Return the settings without where the weights lie, if they may lie anywhere."""
        return self

    def beside(self, folder: Path) -> Any:
        """Return the settings with the weights of a world's folder, if they lie in it."""
        return self


@dataclass(frozen=True, kw_only=True)
class PixelConfig(LatentsConfig):
    """Mean and spread of the pixels of a dataset."""

    mean: float = 0.0
    """Mean of the pixels in [-1, 1]."""
    std: float = 1.0
    """Standard deviation of the pixels in [-1, 1]."""
    lapped: int = added(0, unwritten=True)
    """Rows, and columns, of patches that overlap by half of it each way, so that no borders show:
    an even number, that of the model's patches. 0: they do not overlap."""

    def __post_init__(self) -> None:
        within(0, MAX_SIZE, lapped=self.lapped)
        if self.lapped % 2:
            raise ValueError(f"lapped must be an even number of pixels, got {self.lapped}")
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(
                f"mean must be finite and std positive, got mean={self.mean}, std={self.std}"
            )


FRAMES_PER_LATENT = 4
"""Frames of video that a latent frame stands for, but for the first, which stands for one."""


@dataclass(frozen=True, kw_only=True)
class WanAutoencoderConfig(LatentsConfig):
    """Where a Wan world's autoencoder and text encoder lie, and the shape of its latents."""

    frames_per_latent = FRAMES_PER_LATENT
    has_text_encoder = True

    source: str
    """Folder with vae/, text_encoder/ and tokenizer/ as diffusers writes them, or its name on the
    hub. Empty: it must be named whenever pixels or a text encoder are needed."""
    channels: int = 16
    """Channels of a latent frame."""
    cell_size: int = 8
    """Rows, and columns, of pixels that one latent cell stands for."""

    def __post_init__(self) -> None:
        within(1, MAX_SIZE, channels=self.channels, cell_size=self.cell_size)

    def placeless(self) -> WanAutoencoderConfig:
        """Return the settings without the folder: weights are compared where they are opened."""
        return replace(self, source="")

    def beside(self, folder: Path) -> WanAutoencoderConfig:
        """Return the settings with the weights of a world's folder, if they lie in it."""
        return replace(self, source=str(folder)) if (folder / "vae").is_dir() else self


ImageKind = Literal["AutoencoderDC", "AutoencoderKL", "AutoencoderTiny"]
"""Classes of diffusers."""


@dataclass(frozen=True, kw_only=True)
class ImageAutoencoderConfig(LatentsConfig):
    """Where an image autoencoder lies, and the shape and scale of its latents."""

    source: str
    """Folder as diffusers writes it, or its name on the hub. Empty: it lies in the world's vae/."""
    network: ImageKind
    """Class of diffusers."""
    channels: int
    """Channels of a latent frame."""
    cell_size: int
    """Rows, and columns, of pixels that one latent cell stands for."""
    mean: tuple[float, ...]
    """Mean of each channel of what the network makes."""
    std: tuple[float, ...]
    """Standard deviation of each channel."""

    def __post_init__(self) -> None:
        within(1, MAX_SIZE, channels=self.channels, cell_size=self.cell_size)
        if {len(self.mean), len(self.std)} != {self.channels}:
            raise ValueError(
                f"{self.channels} channels need as many entries of mean and std, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise ValueError("mean must be finite and std positive and finite")

    def placeless(self) -> ImageAutoencoderConfig:
        """Return the settings without the folder: weights are compared where they are opened."""
        return replace(self, source="")

    def beside(self, folder: Path) -> ImageAutoencoderConfig:
        """Return the settings with the weights of a world's folder, if they lie in it
        (FileNotFoundError: they belong there, and do not)."""
        if (folder / "vae").is_dir():
            return replace(self, source=str(folder))
        if not self.source:
            raise FileNotFoundError(
                f"{folder} lacks vae/, the autoencoder of its latents: copy it from where the "
                "world is from"
            )
        return self


FAR_SCALE = 0.2889
"""What FAR multiplies its latents by, for every collection."""

DeepName = Literal["deep-8", "deep-16", "deep-32", "small-8", "small-16"]
"""Networks by name; the number is how many pixels, each way, a cell of the latents stands for."""


VIDEO_NETWORK = "small-wan"
"""Network of Wan's kind that a CPU can train."""

NetworkName = Literal[DeepName, "small-wan"]
"""Networks that can be trained from nothing."""


AutoencoderConfig = PixelConfig | WanAutoencoderConfig | ImageAutoencoderConfig
"""Settings of every kind of autoencoder."""
