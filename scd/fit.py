"""Fitting a run to its data: what the data decides, so that nobody has to type it."""

from __future__ import annotations

from dataclasses import replace

from scd.autoencoder.pixels import PixelAutoencoder
from scd.data.folder import open_source
from scd.data.loader import Loader
from scd.run import TrainConfig

NUM_MEASURED_BATCHES = 16
"""Batches whose pixels are measured; with 2 clips of 16 frames that is 512 frames, where the mean
and deviation no longer move by a hundredth."""


def fit_to_data(config: TrainConfig) -> TrainConfig:
    """Return the run with frame size, conditions and pixel statistics of its data.

    Raises:
        FileNotFoundError: no such data.
        ValueError: the frames cannot be cut into the model's patches, or the model does not work
            on pixels.
    """
    source = open_source(config.data, "train", strict=config.strict)
    card = source.card
    if config.model.shape.channels != 3:
        raise ValueError(
            f"pixels have 3 channels, but this model works on latents of "
            f"{config.model.shape.channels}: it needs an autoencoder that is not in this version"
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
