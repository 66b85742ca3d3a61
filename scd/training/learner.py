"""What a run trains: its model, and the networks that are trained beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from scd.data.clip import Batch
from scd.models.build import Diffuser
from scd.models.checkpoint import load_companions, load_optimizers
from scd.objectives.distribution_matching import MatchConfig
from scd.optim.optim import OptimConfig, build_optimizers, parameter_groups
from scd.optim.states import in_groups
from scd.training.config import Objective, TrainConfig
from scd.training.sharding import cut_state

Loss = Callable[
    [nn.Module, Batch, torch.Generator, torch.Generator],
    tuple[Tensor, Mapping[str, Tensor | float]],
]
"""From a wrapped network, a batch of pixels, a generator of this process's draws and one of the
draws that all processes share (on the CPU) to a loss and numbers to log."""

MODEL = "train"
"""Name of the learner that the run is about; also what its draws are named after."""

KNOWS_NOTHING = 2.0
"""Loss of a critic that knows nothing, at most: that of velocity 0 for frames and noise of unit
scale; a discriminator that always says 0 has 1.4. A rise that ends below it is no divergence."""


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
    """A loss of more than this times that of its first update stops the run; 0: none does."""

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that train at the encoder's learning rate: those of the diffuser in it."""
        for module in self.network.modules():
            if isinstance(module, Diffuser):
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
    """Largest loss over the first one; 0: any."""
    min_spread: float = 0.0
    """Least spread in its log; 0: any."""
    first_loss: float = 0.0
    """Loss of its first update, before its weights had moved. 0: there was none yet."""

    def refuse(self, step: int, loss: float, logs: Mapping[str, float]) -> None:
        """Stop a run that has gone astray, before the weights move.

        Raises:
            ValueError: the loss has risen far above the first one, or what the network generates
                has collapsed.
        """
        # Not a mean of the losses before: a slow rise takes that along.
        self.first_loss = self.first_loss or loss
        if self.max_rise and loss > max(self.max_rise * self.first_loss, KNOWS_NOTHING):
            raise ValueError(
                f"step {step}: the {self.name} diverges: its loss is {loss:.4g}, more than "
                f"{self.max_rise:g} times that of its first update, {self.first_loss:.4g}; what "
                "was saved before is kept. A lower learning rate of it may help"
            )
        if logs.get("spread", 1.0) < self.min_spread:
            raise ValueError(
                f"step {step}: the generated frames have collapsed: they vary {logs['spread']:.3f} "
                f"times as much as the data's, and {self.min_spread:g} is the least allowed; what "
                "was saved before is kept. A lower learning rate may help"
            )

    def state(self) -> dict[str, Any]:
        """Return all of a companion that a later part of the run needs."""
        return {
            "weights": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "first_loss": self.first_loss,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up a companion's `state`."""
        self.network.load_state_dict(state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(as_grouped(self.network, optimizer, saved, self.optim))
        # Checkpoints from before there was the number begin anew.
        self.first_loss = state.get("first_loss", 0.0)


def as_grouped(
    network: nn.Module, optimizer: Any, saved: Mapping[str, Any], config: OptimConfig
) -> Mapping[str, Any]:
    """Return an optimiser's saved state in the groups that the optimiser has.

    In older checkpoints all weights of a separable Wan model are in the groups of the decoder.
    """
    if len(saved["param_groups"]) == len(optimizer.param_groups):
        return saved
    then = parameter_groups(network, (), config)
    return in_groups(optimizer, saved, [group.parameters for group in then])


def build_learners(
    config: TrainConfig,
    task: Task,
    model: Diffuser,
    accelerator: Accelerator,
    checkpoint: Path | None,
    sharded: bool = False,
) -> list[Learner]:
    """Give each network its optimisers and their saved state, and wrap it: the model comes last.

    A model whose weights were cut up is wrapped already.

    Raises:
        ValueError: the saved state is damaged or incomplete.
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
                state = as_grouped(network, optimizer, state, part.optim)
                optimizer.load_state_dict(cut_state(optimizer, state) if sharded else state)
        elif checkpoint is not None:
            if part.name not in saved:
                raise ValueError(f"{checkpoint} lacks companions.pt, the state of {part.name}")
            learner.load_state(saved[part.name])
        if not sharded:
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
