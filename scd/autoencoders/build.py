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
from scd.autoencoders.wan import WAN, WanAutoencoder, open_wan_autoencoder
from scd.common.config import Precision, to_json
from scd.common.hub import class_of
from scd.data.clip import Batch
from scd.data.latents import PLACE

VERSION = 2
"""Of the rule by which fingerprints cover a network's settings. 1, which stood nowhere: some of
them, of each kind; 2: all but a few."""


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
    """Name what an autoencoder computes, wherever its weights lie.

    Returns:
        32 hexadecimal digits; of a network, after the version of the rule by which its settings
        are covered, and a hyphen.
    """
    settings = {name: value for name, value in to_json(autoencoder.config).items() if name != PLACE}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    text, weights = autoencoder.computes()
    digest.update(text.encode())
    for name, weight in sorted(weights.items()):
        values = weight.detach().float().cpu().contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return f"{VERSION}-{digest.hexdigest()}" if text else digest.hexdigest()


def refuse_other(stored: str, found: str, where: str) -> None:
    """Refuse latents whose fingerprint is not that of the autoencoder at hand.

    Args:
        stored: beside the latents.
        found: of the autoencoder.
        where: the latents are.

    Raises:
        ValueError: they differ; says so if they cannot be compared.
    """
    if stored == found:
        return
    if found.startswith(f"{VERSION}-") and not stored.startswith(f"{VERSION}-"):
        raise ValueError(
            f"{where} holds latents of an earlier scd, whose fingerprint {stored} did not cover "
            "all settings of an autoencoder and cannot be compared: encode again (scd encode)"
        )
    raise ValueError(
        f"{where} holds latents of an autoencoder with other weights or settings: it was encoded "
        f"by {stored}, the one that the settings name is now {found}"
    )


def latents_of(autoencoder: Autoencoder, batch: Batch) -> Float[Tensor, "b t c h w"]:
    """Return the latents of a batch: what it holds if they were stored, else encoded now."""
    return batch.frames if batch.encoded else autoencoder.encode(batch.frames)
