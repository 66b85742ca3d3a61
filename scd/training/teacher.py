"""A teacher beside the model that learns from it: what it is, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scd.common.weights import is_stored
from scd.data.clip import Conditions
from scd.models.build import Diffuser
from scd.models.checkpoint import load_world, read_world_parts, resolve
from scd.models.embed import Field
from scd.models.wan.config import WanConfig
from scd.models.wan.dense import WanDiffuser
from scd.models.wan.source import WanSource, open_source
from scd.models.weights import WEIGHTS_FILE, check_shapes, load_weights
from scd.objectives.denoise import Network
from scd.objectives.distill import Path
from scd.training.config import TrainConfig

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
    parts = read_world_parts(resolve(path))
    check_teacher(config, parts["model"], parts["autoencoder"], path)
    model = load_world(path).model
    # Scores may have gradient to their input, and a critic begins as a copy of its teacher.
    model.gradient_checkpointing = config.gradient_checkpointing
    return model.to(device).requires_grad_(False)


def check_teacher(config: TrainConfig, theirs: Any, autoencoder: Any, path: str) -> None:
    """Refuse a teacher of other latents or conditions (ValueError, with both).

    Args:
        config: the run.
        theirs: settings of the teacher's model.
        autoencoder: settings of its autoencoder.
        path: where it lies, for errors.
    """
    ours = config.model
    _same(path, "latent frames (channels, rows, columns)", theirs.shape.shape, ours.shape.shape)
    _same(
        path, "latents of the autoencoder", autoencoder.placeless(), config.autoencoder.placeless()
    )
    _same(path, "conditions", theirs.conditions, ours.conditions)


def _same(path: str, what: str, their: Any, our: Any) -> None:
    if their != our:
        raise ValueError(
            f"the teacher {path} and the student must work on the same {what}: "
            f"got {their} and {our}"
        )


class Bidirectional(nn.Module):
    """A dense Wan model as it was published, behind the call of a teacher or a critic: all noisy
    frames of a clip see each other, and the history is not looked at."""

    def __init__(self, model: WanDiffuser) -> None:
        super().__init__()
        self.model = model

    @property
    def window(self) -> int:
        """Frames that it was trained on."""
        return self.model.config.cache.window

    def forward(
        self,
        history: Tensor,
        noisy: Float[Tensor, "b r m c h w"],
        time: Float[Tensor, "b r m"],
        conditions: Conditions,
    ) -> Float[Tensor, "b r m c h w"]:
        """Return the velocity of noisy frames, each draw by itself."""
        texts = conditions.repeat(noisy.shape[1])
        velocity = self.model.bidirectional(noisy.flatten(0, 1), time.flatten(0, 1), texts)
        return velocity.view(noisy.shape)


def load_bidirectional(
    config: TrainConfig, path: str, device: torch.device, dtype: torch.dtype | None = None
) -> Bidirectional:
    """Load a bidirectional Wan model as teacher, or as what a critic begins as.

    Args:
        config: the run.
        path: world or run of a dense Wan model, folder of diffusers, or its name on the hub.
        device: where it goes.
        dtype: of its weights; None: as they are stored.

    Raises:
        FileNotFoundError, ValueError: as `find_bidirectional`.
    """
    theirs, source = find_bidirectional(config, path)
    with torch.device("meta"):
        model = WanDiffuser(theirs)
    if source is None:
        load_weights(model, resolve(path) / WEIGHTS_FILE)
    else:
        with source.weights as weights:
            shapes = {name: weights.shape(there) for name, there in source.names.items()}
            check_shapes(model, shapes, path)
            for name, there in source.names.items():
                model.load_state_dict({name: weights.get(there)}, strict=False, assign=True)
    model.gradient_checkpointing = config.gradient_checkpointing
    return Bidirectional(model.to(device, dtype).eval().requires_grad_(False))


def find_bidirectional(config: TrainConfig, path: str) -> tuple[WanConfig, WanSource | None]:
    """Find a bidirectional Wan model and see that it fits a run; no weights are read.

    Returns:
        Settings of the model; and where its weights lie, None if in a world.

    Raises:
        FileNotFoundError: nothing is there, or not all of it.
        ValueError: it is no dense Wan model, or works on other latents or texts than the student.
    """
    if not path:
        raise ValueError("objective.teacher must name the Wan model to learn from")
    folder = FilePath(path)
    if (folder / "last").is_file() or is_stored(folder / WEIGHTS_FILE):
        parts = read_world_parts(resolve(path))
        theirs = parts["model"]
        if not theirs.takes_text or theirs.is_separable:
            raise ValueError(
                f"{path} holds a {type(theirs).__name__}: a bidirectional teacher is a dense Wan "
                "model (scd convert wan --split dense, or a folder of diffusers)"
            )
        check_teacher(config, theirs, parts["autoencoder"], path)
        return theirs, None
    ours, source = config.model, open_source(path)
    theirs = WanConfig(
        shape=replace(ours.shape, channels=source.channels, patch_size=source.patch_size),
        block=source.block,
        num_layers=source.num_layers,
        conditions=source.conditions(ours.conditions.text_length),
    )
    check_teacher(config, theirs, config.autoencoder, path)
    return theirs, source


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Let gradient pass through a network but not into its weights, for a with block."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
