"""Fitting a run to its data: what the data decides, so that nobody has to type it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.build import AutoencoderConfig
from scd.common.config import from_json
from scd.data.latents import INFO_FILE, LatentSource, is_latents
from scd.data.loader import Loader
from scd.data.source import Source, open_source
from scd.training.config import TrainConfig, check_window

NUM_MEASURED_BATCHES = 16
"""Batches whose pixels are measured; with 2 clips of 16 frames that is 512 frames, where the mean
and deviation no longer move by a hundredth."""


def fit_window(config: TrainConfig, base: TrainConfig | None = None) -> TrainConfig:
    """Return the run with a memory as long as its clips, unless its window was changed.

    Args:
        config: the run.
        base: the run before anybody changed its fields; None: nobody did.

    Raises:
        ValueError: the window was changed to more than the frames of a clip.
    """
    cache = config.model.cache
    if base is not None and cache.window != base.model.cache.window:
        check_window(config)
        return config
    cache = replace(cache, window=config.num_frames)
    return replace(config, model=replace(config.model, cache=cache))


def fit_to_data(config: TrainConfig, base: TrainConfig | None = None) -> TrainConfig:
    """Return the run with frame size, conditions and pixel statistics of its data.

    Stored latents decide on the shape of the latents and on the autoencoder instead. The memory
    becomes as long as the clips: `fit_window`.

    Args:
        config: the run.
        base: the run before anybody changed its fields; None: nobody did.

    Raises:
        FileNotFoundError: no such data.
        ValueError: the frames cannot be cut into the model's patches, the model does not work on
            pixels, or a field was changed from `base` to another value than that of the data.
    """
    source = open_source(config.data, "train", strict=config.strict, latents=True)
    if isinstance(source, LatentSource):
        fitted = _fit_to_latents(config, source)
    else:
        fitted = _fit_to_frames(config, source)
    given, found = _decided(config), _decided(fitted)
    before = given if base is None else _decided(base)
    for name, value in given.items():
        if value != before.get(name) and value != found.get(name):
            raise ValueError(
                f"{name} is {value}, but {config.data} says {found.get(name)}: leave it to the data"
            )
    return fit_window(fitted, base)


def decides(config: TrainConfig) -> bool:
    """Tell whether the run's data decides on its frames: pixels do, and stored latents."""
    return config.model.shape.channels == 3 or is_latents(config.data)


def _fit_to_latents(config: TrainConfig, source: LatentSource) -> TrainConfig:
    info = source.info
    if config.model.takes_text and not info.card.conditions.has_text:
        raise ValueError(
            f"{config.data} holds latents without prompts, but a text steers a Wan model: "
            "write them with scd encode --text-encoder"
        )
    channels, height, width = info.shape
    shape = replace(config.model.shape, channels=channels, height=height, width=width)
    model = replace(config.model, shape=shape, conditions=info.card.conditions)
    where = f"{source.path / INFO_FILE}: autoencoder"
    autoencoder = from_json(AutoencoderConfig, info.autoencoder, where)
    if autoencoder.placeless() == config.autoencoder.placeless():
        # The same settings elsewhere: weights are compared where they are opened.
        autoencoder = config.autoencoder
    return replace(config, model=model, autoencoder=autoencoder)


def _fit_to_frames(config: TrainConfig, source: Source) -> TrainConfig:
    card = source.card
    if config.model.shape.channels != 3:
        raise ValueError(
            f"pixels have 3 channels, but this model works on latents of "
            f"{config.model.shape.channels}: encode {config.data} first (scd encode)"
        )
    shape = replace(config.model.shape, height=card.height, width=card.width)
    model = replace(config.model, shape=shape, conditions=card.conditions)
    loader = Loader(source, config.batch_size, config.num_frames, config.seed)
    measured = PixelAutoencoder.measure(
        loader.batch(index).frames for index in range(NUM_MEASURED_BATCHES)
    )
    # Rounded, so that a rerun on another machine has the same settings to the last digit.
    measured = replace(measured, mean=round(measured.mean, 3), std=round(measured.std, 3))
    return replace(config, model=model, autoencoder=measured)


def _decided(config: TrainConfig) -> dict[str, Any]:
    """Return the fields that the data decides, by name."""
    parts = {
        "model.shape": (config.model.shape, ("height", "width")),
        "model.conditions": (config.model.conditions, None),
        "autoencoder": (config.autoencoder, None),
    }
    return {
        f"{where}.{name}": getattr(part, name)
        for where, (part, names) in parts.items()
        for name in names or [field.name for field in fields(part)]
    }
