"""A teacher beside the model that learns from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from scd.checkpoint import World, load_world
from scd.clip import Conditions
from scd.model.build import Diffuser
from scd.model.embed import Field
from scd.objective.denoise import Network
from scd.objective.distill import Path
from scd.run import TrainConfig

Autocast = Callable[[], AbstractContextManager[None]]
"""Makes a context in which networks run at the run's precision."""


def running(network: Network, autocast: Autocast) -> Network:
    """Return a network that is not wrapped, run at the run's precision as if it were.

    Each call has a context of its own: copies of weights that a context made without gradient
    must not serve a later call with gradient.
    """

    def run(*inputs: Tensor | Conditions) -> Tensor:
        with autocast():
            return network(*inputs).float()

    return run


def path_of(model: Diffuser, autocast: Autocast) -> Path:
    """Return a model's `field` at the run's precision."""

    def begin(history: Tensor, conditions: Conditions, num_noisy: int, num_draws: int) -> Field:
        with autocast():
            field = model.field(history, conditions, num_noisy, num_draws)

        def velocity(noisy: Tensor, time: Tensor) -> Tensor:
            with autocast():
                return field(noisy, time).float()

        return velocity

    return begin


def load_teacher(config: TrainConfig, path: str, device: torch.device) -> Diffuser:
    """Load a teacher whose weights stay as they are.

    Raises:
        FileNotFoundError: no world is there.
        ValueError: it works on other latents or conditions than the run's model.
    """
    if not path:
        raise ValueError("objective.teacher must name the run or world to learn from")
    world = load_world(path)
    check_teacher(config, world, path)
    # Scores may have gradient to their input, and a critic begins as a copy of its teacher.
    world.model.gradient_checkpointing = config.gradient_checkpointing
    return world.model.to(device).requires_grad_(False)


def check_teacher(config: TrainConfig, teacher: World, path: str) -> None:
    """Refuse a teacher of other latents or conditions (ValueError, with both)."""
    theirs, ours = teacher.model.config, config.model
    for what, their, our in (
        ("latent frames (channels, rows, columns)", theirs.shape.shape, ours.shape.shape),
        ("latents of the autoencoder", teacher.autoencoder.config, config.autoencoder),
        ("conditions", theirs.conditions, ours.conditions),
    ):
        if their != our:
            raise ValueError(
                f"the teacher {path} and the student must work on the same {what}: "
                f"got {their} and {our}"
            )


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Let gradient pass through a network but not into its weights, for a with block."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
