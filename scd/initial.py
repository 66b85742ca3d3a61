"""Weights that a run starts from, taken from a trained world."""

from __future__ import annotations

from typing import Any

from scd.checkpoint import load_world
from scd.config import differences, to_json
from scd.model.build import Diffuser
from scd.run import TrainConfig

FREE_SETTINGS = (
    "model.cache",
    "model.skip",
    "model.num_diagonal",
    "model.block.initial_gate",
    "model.block.initial_condition_std",
)
"""Settings in which a run may differ from the world it starts from: none has to do with what a
weight is for."""


def load_initial(model: Diffuser, config: TrainConfig) -> None:
    """Give a run's model the averaged weights of `config.initial`.

    Raises:
        FileNotFoundError: no world is there.
        ValueError: its weights are for another model or other latents: names the first difference.
    """
    world = load_world(config.initial)
    theirs = _settings(world.model.config, world.autoencoder.config)
    different = [
        line
        for line in differences(theirs, _settings(config.model, config.autoencoder))
        if not any(f"{line.split(':')[0]}.".startswith(f"{free}.") for free in FREE_SETTINGS)
    ]
    if different:
        # Another kind of model has other settings altogether: then the kind says it all.
        first = min(different, key=lambda line: ".kind:" not in line)
        raise ValueError(
            f"the weights of {config.initial} are for another model (its setting, then the run's): "
            f"{first}"
        )
    model.load_state_dict(world.model.state_dict())


def _settings(model: Any, autoencoder: Any) -> Any:
    return {"model": to_json(model), "autoencoder": to_json(autoencoder)}
