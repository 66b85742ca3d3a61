"""What a run trains: its model, and the networks that are trained beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from scd.checkpoint import load_companions, load_optimizers
from scd.clip import Batch
from scd.model.build import Diffuser
from scd.model.separable import SeparableDiffuser
from scd.objective.match import MatchConfig
from scd.optim import OptimConfig, build_optimizers, parameter_groups
from scd.run import Objective, TrainConfig

Loss = Callable[
    [nn.Module, Batch, torch.Generator, torch.Generator],
    tuple[Tensor, Mapping[str, Tensor | float]],
]
"""From a wrapped network, a batch of pixels, a generator of this process's draws and one of the
draws that all processes share (on the CPU) to a loss and numbers to log."""

MODEL = "train"
"""Name of the learner that the run is about; also what its draws are named after."""


@dataclass(frozen=True, kw_only=True)
class Companion:
    """A network that is trained beside the model and helps to train it."""

    name: str
    """Short and unique: of its numbers in the log and its part of a checkpoint."""
    network: nn.Module
    """Its first weights are already in place; it is moved to the device and wrapped."""
    loss: Loss
    """What it minimises."""
    optim: OptimConfig
    """How its weights move."""
    num_updates: int
    """Updates before each of the model, each on a batch of its own."""
    max_rise: float
    """A loss of more than this times its running level stops the run; 0: none does."""

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that train at the encoder's learning rate: those of the diffuser in it."""
        for module in self.network.modules():
            if isinstance(module, SeparableDiffuser):
                yield from module.encoder_parameters()


def unchanged(model: Diffuser) -> nn.Module:
    """Return the model itself."""
    return model


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a run minimises, and all that it needs for it."""

    loss: Loss
    """Of the model."""
    companions: tuple[Companion, ...] = ()
    """Networks trained beside it."""
    entrance: Callable[[Diffuser], nn.Module] = unchanged
    """What is wrapped for several processes and passed to the loss: the model, or a module around
    it where the loss needs other methods than its forward."""
    min_spread: float = 0.0
    """Least value of "spread" in the model's log, deviation of what it generates over that of the
    data: below it the run stops."""


def alone(objective: Objective) -> Task:
    """Return the task of a model that needs no other network."""

    def loss(
        model: nn.Module, batch: Batch, own: torch.Generator, _shared: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        return objective(model, batch, own)

    return Task(loss=loss)


@dataclass(kw_only=True)
class Level:
    """Running mean of a loss, against which a sudden rise is told."""

    value: float = 0.0
    """Mean of the finite losses so far, the newest counting for a twentieth."""
    num_seen: int = 0
    """Losses so far."""

    def rises(self, loss: float, factor: float) -> bool:
        """Take a loss in; return whether it is more than `factor` times the level before.

        The first twenty losses set the level.
        """
        rises = self.num_seen >= 20 and loss > factor * self.value
        weight = max(1 / (self.num_seen + 1), 0.05)
        self.value += weight * (loss - self.value)
        self.num_seen += 1
        return rises


@dataclass(kw_only=True)
class Learner:
    """A network with its loss and its optimisers, in a run that is going on."""

    name: str
    """MODEL, or that of the companion."""
    network: nn.Module
    """Unwrapped."""
    model: nn.Module
    """As accelerate wraps it."""
    optimizers: list[Any]
    """AdamW, and Muon if asked for."""
    loss: Loss
    """What it minimises."""
    optim: OptimConfig
    """How its weights move."""
    num_updates: int = 1
    """Updates per step of the run."""
    max_rise: float = 0.0
    """Largest loss over its level; 0: any."""
    min_spread: float = 0.0
    """Least spread in its log; 0: any."""
    level: Level = field(default_factory=Level)
    """Of its loss."""

    def refuse(self, step: int, loss: float, logs: Mapping[str, float]) -> None:
        """Stop a run that has gone astray, before the weights move.

        Raises:
            ValueError: the loss has risen far above its level, or what the network generates has
                collapsed.
        """
        before = self.level.value
        if self.max_rise and self.level.rises(loss, self.max_rise):
            raise ValueError(
                f"step {step}: the {self.name} diverges: its loss is {loss:.4g}, more than "
                f"{self.max_rise:g} times its running level of {before:.4g}; the last checkpoint "
                "is kept. A lower learning rate of it, or more of its updates per step, may help"
            )
        if logs.get("spread", 1.0) < self.min_spread:
            raise ValueError(
                f"step {step}: the generated frames have collapsed: they vary {logs['spread']:.3f} "
                f"times as much as the data's, and {self.min_spread:g} is the least allowed; the "
                "last checkpoint is kept. A lower learning rate may help"
            )

    def state(self) -> dict[str, Any]:
        """Return all of a companion that a later part of the run needs."""
        return {
            "weights": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "level": [self.level.value, self.level.num_seen],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up a companion's `state`."""
        self.network.load_state_dict(state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        value, num_seen = state["level"]
        self.level = Level(value=value, num_seen=num_seen)


def build_learners(
    config: TrainConfig,
    task: Task,
    model: Diffuser,
    accelerator: Accelerator,
    checkpoint: Path | None,
) -> list[Learner]:
    """Give each network its optimisers and their saved state, and wrap it: the model comes last.

    Raises:
        ValueError: the saved state is damaged.
    """
    itself = Companion(
        name=MODEL, network=model, loss=task.loss, optim=config.optim, num_updates=1, max_rise=0.0
    )
    saved = {} if checkpoint is None else load_companions(checkpoint)
    learners = []
    for part in (*task.companions, itself):
        network = part.network.to(accelerator.device)
        groups = parameter_groups(network, part.encoder_parameters(), part.optim)
        optimizers = build_optimizers(groups, part.optim)
        learner = Learner(
            name=part.name,
            network=network,
            model=task.entrance(model) if part is itself else network,
            optimizers=optimizers,
            loss=part.loss,
            optim=part.optim,
            num_updates=part.num_updates,
            max_rise=part.max_rise,
            min_spread=task.min_spread if part is itself else 0.0,
        )
        if checkpoint is not None and part is itself:
            for optimizer, state in zip(optimizers, load_optimizers(checkpoint), strict=True):
                optimizer.load_state_dict(state)
        elif checkpoint is not None:
            learner.load_state(saved[part.name])
        learner.model, *learner.optimizers = accelerator.prepare(learner.model, *optimizers)
        learners.append(learner)
    return learners


def may_leave_unused(config: TrainConfig) -> bool:
    """Tell whether a batch may leave a weight of the run without gradient."""
    # A rollout begins without gradient, and a discriminator has an output nobody reads.
    if isinstance(config.objective, MatchConfig):
        return True
    # Without dropout of conditions no batch reaches the null vector of continuous actions.
    return config.model.conditions.action_dim > 0 and config.objective.condition_dropout == 0
