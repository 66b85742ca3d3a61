"""Settings of an autoencoder -> the autoencoder, and what tells one from another."""

from __future__ import annotations

import hashlib
import json
import os

import torch
from jaxtyping import Float
from torch import Tensor

from scd.autoencoders.base import Autoencoder, PixelAutoencoder
from scd.autoencoders.config import AutoencoderConfig, ImageAutoencoderConfig, PixelConfig
from scd.autoencoders.diffusers import KINDS, ImageAutoencoder, find_network, open_image_autoencoder
from scd.autoencoders.wan import WanAutoencoder, open_wan_autoencoder
from scd.common.config import Precision, to_json
from scd.common.hub import class_of
from scd.data.clip import Batch
from scd.data.latents import PLACE

WAN = "AutoencoderKLWan"
"""Class of diffusers whose settings a folder with Wan's autoencoder names."""


def build_autoencoder(
    config: AutoencoderConfig,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
) -> Autoencoder:
    """Build what the settings describe; weights may be read later, when they are first needed."""
    if isinstance(config, PixelConfig):
        return PixelAutoencoder(config)
    if isinstance(config, ImageAutoencoderConfig):
        return ImageAutoencoder(config).place(device, precision)
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
    folder = find_network(source, (*KINDS, WAN), "single-image or video autoencoder")
    if class_of(folder) in KINDS:
        return open_image_autoencoder(source, device, precision)
    return open_wan_autoencoder(source, device, precision)


def fingerprint(autoencoder: Autoencoder) -> str:
    """Name what an autoencoder computes, wherever its weights lie: 32 hexadecimal digits."""
    settings = {name: value for name, value in to_json(autoencoder.config).items() if name != PLACE}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    text, weights = autoencoder.computes()
    digest.update(text.encode())
    for name, weight in sorted(weights.items()):
        values = weight.detach().float().cpu().contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def latents_of(autoencoder: Autoencoder, batch: Batch) -> Float[Tensor, "b t c h w"]:
    """Return the latents of a batch: what it holds if they were stored, else encoded now."""
    return batch.frames if batch.encoded else autoencoder.encode(batch.frames)
