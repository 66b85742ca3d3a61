"""What a run takes over from a trained world: its weights, and of Wan's all else too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scd.common.config import differences, to_json
from scd.models.build import Diffuser
from scd.models.checkpoint import read_world_parts, resolve
from scd.models.shipped import parts_beside
from scd.models.weights import WEIGHTS_FILE, load_weights
from scd.training.config import TrainConfig

FREE_SETTINGS = (
    "model.cache",
    "model.skip",
    "model.num_diagonal",
    "model.block.initial_gate",
    "model.block.initial_condition_std",
)
"""Settings in which a run may differ from the world it starts from: none has to do with what a
weight is for."""

FREE_WAN_SETTINGS = (
    *FREE_SETTINGS,
    "model.encoder.noise",
    "model.encoder.lowest_time",
    "model.encoder.shift",
    "model.decoder.join",
    "model.decoder.context_time",
    "model.frames_per_block",
    "model.num_local_frames",
    "autoencoder.source",
)
"""Likewise of a Wan model: what the paper leaves open is decided by the training, not by the
conversion."""


def load_initial(model: Diffuser, config: TrainConfig) -> None:
    """Give a run's model the averaged weights of `config.initial`.

    Raises:
        FileNotFoundError: no world is there.
        ValueError: its weights are for another model or other latents: names the first difference.
    """
    folder = resolve(config.initial)
    world = read_world_parts(folder)
    different = [
        line
        for line in differences(
            _settings(world["model"], world["autoencoder"]),
            _settings(config.model, config.autoencoder),
        )
        if not any(
            f"{line.split(':')[0]}.".startswith(f"{free}.")
            for free in (FREE_WAN_SETTINGS if config.model.takes_text else FREE_SETTINGS)
        )
    ]
    if different:
        # Another kind of model has other settings altogether: then the kind says it all.
        first = min(different, key=lambda line: ".kind:" not in line)
        raise ValueError(
            f"the weights of {config.initial} are for another model (its setting, then the run's): "
            f"{first}"
        )
    load_weights(model, folder / WEIGHTS_FILE)


def _settings(model: Any, autoencoder: Any) -> Any:
    return {"model": to_json(model), "autoencoder": to_json(autoencoder)}


def like_initial(config: TrainConfig, initial: str) -> TrainConfig:
    """Return a run of a Wan model with model, autoencoder and schedule of the world it starts from.

    Args:
        config: a run of any Wan model.
        initial: world, run or step folder.

    Raises:
        FileNotFoundError: no world is there.
        ValueError: it is damaged, or not of Wan.
    """
    folder = resolve(initial)
    world = read_world_parts(folder)
    autoencoder = world["autoencoder"]
    if not world["model"].takes_text:
        raise ValueError(f"{initial} is not a Wan world (scd convert wan writes one)")
    # A world that was moved together with its parts still names the place where it was made.
    autoencoder = replace(autoencoder, source=parts_beside(initial) or autoencoder.source)
    return replace(
        config,
        initial=initial,
        model=world["model"],
        autoencoder=autoencoder,
        sampling=world["sampling"],
    )
