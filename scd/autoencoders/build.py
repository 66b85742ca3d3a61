"""Settings of an autoencoder -> the autoencoder, and what tells one from another."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from scd.autoencoders.networks import KINDS, find_network
from scd.autoencoders.pictures import (
    PictureAutoencoder,
    PictureAutoencoderConfig,
    computed_by,
    open_picture_autoencoder,
)
from scd.autoencoders.pixels import PixelAutoencoder, PixelConfig
from scd.autoencoders.wan import (
    WanAutoencoder,
    WanAutoencoderConfig,
    open_wan_autoencoder,
)
from scd.common.config import to_json
from scd.common.hub import class_of
from scd.common.runtime import Precision
from scd.data.clip import Batch
from scd.data.latents import PLACE

AutoencoderConfig = PixelConfig | WanAutoencoderConfig | PictureAutoencoderConfig
"""Settings of every kind of autoencoder."""

WAN = "AutoencoderKLWan"
"""Class of diffusers whose settings a folder with Wan's autoencoder names."""


@runtime_checkable
class Autoencoder(Protocol):
    """Between frames in [-1, 1] and latents of unit scale."""

    @property
    def config(self) -> Any:
        """Settings from which `build_autoencoder` makes it again."""
        ...

    def load(self) -> None:
        """Read the weights, if there are any, which else are read when they are first needed."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return channels, rows and columns of the latent of a height x width frame."""
        ...

    def encode(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t2 c h2 w2"]:
        """Turn frames in [-1, 1] into latents."""
        ...

    def decode(self, latents: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t2 3 h2 w2"]:
        """Turn latents into frames in [-1, 1]."""
        ...


def build_autoencoder(
    config: AutoencoderConfig,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
) -> Autoencoder:
    """Build what the settings describe; weights may be read later, when they are first needed."""
    if isinstance(config, PixelConfig):
        return PixelAutoencoder(config)
    if isinstance(config, PictureAutoencoderConfig):
        return PictureAutoencoder(config).place(device, precision)
    return WanAutoencoder(config).place(device, precision)


def open_autoencoder(
    source: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
) -> Autoencoder:
    """Open an autoencoder's own folder, a training of one, or its name on the hub.

    Raises:
        FileNotFoundError: it is not there, or the hub cannot be reached.
        ValueError: a kind that is not known, or a package is missing.
    """
    folder = find_network(source, (*KINDS, WAN), "picture or video autoencoder")
    if class_of(folder) in KINDS:
        return open_picture_autoencoder(source, device, precision)
    return open_wan_autoencoder(source, device, precision)


def fingerprint(autoencoder: Autoencoder) -> str:
    """Name what an autoencoder computes, wherever its weights lie: 32 hexadecimal digits.

    Raises:
        FileNotFoundError, ValueError: its weights cannot be read.
    """
    settings = {name: value for name, value in to_json(autoencoder.config).items() if name != PLACE}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    if isinstance(autoencoder, WanAutoencoder):
        settings = dict(autoencoder.vae.config)
        for name in ("latents_mean", "latents_std"):
            digest.update(f"{name} {list(settings[name])}\n".encode())
        _add_weights(digest, autoencoder.vae.state_dict())
    elif isinstance(autoencoder, PictureAutoencoder):
        digest.update(json.dumps(computed_by(autoencoder), sort_keys=True).encode())
        _add_weights(digest, autoencoder.network.state_dict())
    return digest.hexdigest()


def _add_weights(digest: Any, state: Mapping[str, Tensor]) -> None:
    for name, weight in sorted(state.items()):
        values = weight.detach().float().cpu().contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())


def latents_of(autoencoder: Autoencoder, batch: Batch) -> Float[Tensor, "b t c h w"]:
    """Return the latents of a batch: what it holds if they were stored, else encoded now."""
    return batch.frames if batch.encoded else autoencoder.encode(batch.frames)
