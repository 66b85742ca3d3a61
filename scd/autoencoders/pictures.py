"""Autoencoders of single pictures: diffusers' AutoencoderDC, AutoencoderKL and AutoencoderTiny.

Every frame by itself. Latents are brought to unit scale, channel by channel, by a mean and a
deviation that belong to the settings: those that come with the weights, or those measured on data.
A folder that `scd train-autoencoder` or `scd convert autoencoder` wrote is one of these too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scd.autoencoders.latents import LatentsConfig, cells, check_shape, per_channel
from scd.autoencoders.networks import (
    TOLD_APART_BY,
    PictureKind,
    find_network,
    given_statistics,
    load_network,
    measure_statistics,
    raw_latents,
    shape_of,
)
from scd.common.runtime import DTYPES, Precision

NUM_AT_ONCE = 64
"""Frames that go through the network at once."""


@dataclass(frozen=True, kw_only=True)
class PictureAutoencoderConfig(LatentsConfig):
    """Where an autoencoder of pictures lies, and the shape and scale of its latents."""

    source: str
    """Folder as diffusers writes it, or its name on the hub."""
    network: PictureKind
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
        check_shape(self.channels, self.cell_size)
        if {len(self.mean), len(self.std)} != {self.channels}:
            raise ValueError(
                f"{self.channels} channels need as many entries of mean and std, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise ValueError("mean must be finite and std positive and finite")


class PictureAutoencoder:
    """Between frames and latents of unit scale, each frame by itself.

    The weights are read when they are first needed: a world can be loaded, and its latents be
    streamed, where there are none.
    """

    def __init__(self, config: PictureAutoencoderConfig, network: nn.Module | None = None) -> None:
        """Describe the autoencoder.

        Args:
            config: where it lies, and the scale of its latents.
            network: diffusers' network, where it is at hand already.
        """
        self.config = config
        self._network: Any = None
        self._device, self._dtype = torch.device("cpu"), torch.float32
        if network is not None:
            self._take(network)

    def place(
        self, device: torch.device | str, precision: Precision = "fp32"
    ) -> PictureAutoencoder:
        """Choose where, and in which arithmetic, it runs; return itself."""
        self._device, self._dtype = torch.device(device), DTYPES[precision]
        if self._network is not None:
            self._take(self._network)
        return self

    def load(self) -> None:
        """Read the weights now, not when they are first needed; raises as `network` does."""
        _ = self.network

    @property
    def network(self) -> Any:
        """Diffusers' network.

        Raises:
            FileNotFoundError, ValueError: it is not where the settings say, or of another kind.
        """
        if self._network is None:
            kind, network = load_network(self.config.source)
            if kind != self.config.network:
                raise ValueError(
                    f"{self.config.source} holds an {kind}, needed the {self.config.network} "
                    "that the settings name"
                )
            self._take(network)
        return self._network

    def _take(self, network: nn.Module) -> None:
        found = shape_of(self.config.network, network)
        if found != (self.config.channels, self.config.cell_size):
            raise ValueError(
                f"the settings name latents of {self.config.channels} channels and cells of "
                f"{self.config.cell_size} pixels, this autoencoder's have {found[0]} and {found[1]}"
            )
        # Not diffusers' own `to`, which warns of layers in 32 bits although these have none.
        nn.Module.to(network, self._device, self._dtype)
        self._network = network.eval().requires_grad_(False)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return channels, rows and columns of the latent of a height x width frame.

        Raises:
            ValueError: the frame cannot be cut into cells.
        """
        return self.config.channels, *cells(height, width, self.config.cell_size)

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t c h2 w2"]:
        """Turn frames in [-1, 1] into latents; of a distribution, its mean.

        Raises:
            ValueError: frames that cannot be cut into cells.
        """
        self.latent_shape(*frames.shape[-2:])
        raw = self._in_parts(frames, self._raw)
        mean, std = self._statistics()
        return (raw - mean) / std

    def encode_raw(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t c h2 w2"]:
        """Turn frames into what the network makes, before it is brought to unit scale."""
        with torch.no_grad():
            return self._in_parts(frames, self._raw)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t 3 h2 w2"]:
        """Turn latents into frames in [-1, 1]; values outside are clipped."""
        mean, std = self._statistics()
        raw = latents.to(self._device).float() * std + mean
        return self._in_parts(raw, lambda part: self.network.decode(part).sample).clamp(-1, 1)

    def _in_parts(self, tensor: Float[Tensor, "b t c h w"], call: Any) -> Tensor:
        flat = tensor.flatten(0, 1).to(self._device, self._dtype)
        made = torch.cat([call(part).float() for part in flat.split(NUM_AT_ONCE)])
        return made.unflatten(0, tensor.shape[:2])

    def _raw(self, frames: Float[Tensor, "f 3 h w"]) -> Float[Tensor, "f c h2 w2"]:
        return raw_latents(self.config.network, self.network, frames)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        return per_channel(self.config.mean, self.config.std, self._device)


def with_statistics(
    autoencoder: PictureAutoencoder, batches: Iterable[Float[Tensor, "b t 3 h w"]]
) -> PictureAutoencoder:
    """Return the same autoencoder at the scale that its latents have on some frames."""
    mean, std = measure_statistics(autoencoder.encode_raw(frames) for frames in batches)
    twin = PictureAutoencoder(replace(autoencoder.config, mean=mean, std=std))
    twin._device, twin._dtype = autoencoder._device, autoencoder._dtype
    twin._network = autoencoder.network
    return twin


def open_picture_autoencoder(
    source: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
) -> PictureAutoencoder:
    """Open an autoencoder of pictures: its folder, a pipeline with its vae/, a training, the hub.

    Raises:
        FileNotFoundError: it is not there, or the hub cannot be reached.
        ValueError: another kind of model, or diffusers is not installed.
    """
    folder = find_network(source)
    kind, network = load_network(folder)
    channels, cell_size = shape_of(kind, network)
    mean, std = given_statistics(folder, kind, network.config)
    config = PictureAutoencoderConfig(
        source=str(source),
        network=kind,
        channels=channels,
        cell_size=cell_size,
        mean=mean,
        std=std,
    )
    return PictureAutoencoder(config, network).place(device, precision)


def computed_by(autoencoder: PictureAutoencoder) -> dict[str, Any]:
    """Return the settings of its network that change what it computes."""
    settings = dict(autoencoder.network.config)
    return {name: settings.get(name) for name in TOLD_APART_BY[autoencoder.config.network]}
