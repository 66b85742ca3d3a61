"""What an encoding is made of: its episodes, its autoencoder, what embeds its prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from scd.autoencoders.build import (
    Autoencoder,
    AutoencoderConfig,
    build_autoencoder,
    open_autoencoder,
)
from scd.autoencoders.pictures import PictureAutoencoder, with_statistics
from scd.autoencoders.pixels import PixelAutoencoder, PixelConfig
from scd.autoencoders.text_encoder import PromptEmbedder, TextConfig, default_cache
from scd.data.latents import is_latents
from scd.data.loader import Loader
from scd.data.source import EmptySplit, Source, Split, open_source
from scd.models.checkpoint import read_world_parts, resolve
from scd.preprocessing.settings import EncodeConfig

PIXELS = "pixels"
"""Name of the autoencoder that only standardises."""

MEASURED_BATCHES, MEASURED_CLIPS, MEASURED_FRAMES = 16, 4, 8
"""Clips on which mean and deviation of pixels or latents are measured."""

logger = logging.getLogger(__name__)


def open_sources(config: EncodeConfig) -> dict[Split, Source]:
    """Open the splits that there are.

    Raises:
        FileNotFoundError: no such data.
        ValueError: a world that is made while it is read, latents, or no episodes.
    """
    if config.data.startswith("toy:"):
        raise ValueError(f"{config.data} is made while it is read: record it first (scd record)")
    if is_latents(config.data):
        raise ValueError(f"{config.data} holds latents already: name the videos")
    sources: dict[Split, Source] = {}
    for split in config.splits:
        try:
            sources[split] = open_source(config.data, split, config.strict, whole=True)
        except EmptySplit as error:
            logger.warning("%s", error)
    if not sources:
        raise ValueError(f"{config.data} has no episodes in {', '.join(config.splits)}")
    return sources


def choose_autoencoder(
    config: EncodeConfig, sources: dict[Split, Source], device: torch.device
) -> Autoencoder:
    """Open the autoencoder, at the scale that is asked for.

    Raises:
        FileNotFoundError: it is not there, or the hub cannot be reached.
        ValueError: it cannot be read, has no scale to measure, or no arithmetic to choose.
    """
    settings = _settings_of_world(config)
    if config.precision != "fp32" and isinstance(settings, PixelConfig):
        raise ValueError(
            f"precision {config.precision} has no effect: {config.autoencoder} has pixels for "
            "latents, which are only brought to mean 0 and deviation 1"
        )
    if config.autoencoder == PIXELS:
        measured = PixelAutoencoder.measure(_measured_frames(sources))
        # Rounded, so that another machine has the same settings to the last digit.
        return PixelAutoencoder(
            replace(measured, mean=round(measured.mean, 3), std=round(measured.std, 3))
        )
    if settings is None:
        autoencoder = open_autoencoder(config.autoencoder, device, config.precision)
    else:
        autoencoder = build_autoencoder(settings, device, config.precision)
    if config.statistics == "measured":
        if not isinstance(autoencoder, PictureAutoencoder):
            raise ValueError(
                f"{config.autoencoder} is no autoencoder of pictures: its latents have the "
                "statistics that belong to it, --statistics given"
            )
        return with_statistics(autoencoder, _measured_frames(sources))
    return autoencoder


def _settings_of_world(config: EncodeConfig) -> AutoencoderConfig | None:
    """Return the autoencoder's settings that a world states; None: it is no world."""
    if config.autoencoder == PIXELS:
        return PixelConfig()
    try:
        folder = resolve(config.autoencoder)
    except FileNotFoundError:
        return None
    return read_world_parts(folder)["autoencoder"]


def _measured_frames(sources: dict[Split, Source]) -> Iterator[Float[Tensor, "b t 3 h w"]]:
    """Draw the clips on which statistics are measured: the same in every process."""
    source = next(iter(sources.values()))
    lengths = [source.num_frames(episode) for episode in range(source.num_episodes)]
    loader = Loader(source, MEASURED_CLIPS, min(MEASURED_FRAMES, max(lengths)), seed=0)
    for index in range(MEASURED_BATCHES):
        yield loader.batch(index).frames


def choose_texts(
    config: EncodeConfig, device: torch.device
) -> tuple[PromptEmbedder | None, Tensor | None]:
    """Return what embeds prompts, and the embedded empty prompt."""
    if not config.text_encoder:
        return None, None
    settings = TextConfig(length=config.text_length, device=str(device), cache=default_cache())
    embedder = PromptEmbedder(config.text_encoder, settings)
    return embedder, embed(embedder, "")


def embed(embedder: PromptEmbedder, prompt: str) -> Float[Tensor, "l d"]:
    """Embed one prompt, without what fills it up."""
    return embedder.embed([prompt])[0, : len(embedder.tokens(prompt))]
