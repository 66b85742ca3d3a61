"""Optimisers over parameter groups, the learning-rate schedule, and the average of the weights.

The paper trains encoder and decoder with AdamW at 1e-4 and 2e-4, no weight decay, a linear
warm-up and gradients clipped to norm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scd.models.block import Modulation
from scd.optim.config import OptimConfig
from scd.optim.muon import muon
from scd.optim.states import OffloadedAdamW, eight_bit_adamw


def lr_multiplier(config: OptimConfig, step: int, max_steps: int) -> float:
    """Return the factor on every learning rate at a step (from 0) of `max_steps`, where the decay
    ends; in (0, 1]."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = config.decay_fraction * max_steps
    decay = min(1.0, max(max_steps - step, 1) / decay_steps) if decay_steps >= 1 else 1.0
    return warmup * decay


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that share an optimiser and a learning rate."""

    name: str
    """Side and kind, e.g. "encoder/matrix"."""
    parameters: list[nn.Parameter]
    """They belong to no other group."""
    optimizer: Literal["adamw", "muon"]
    """Which optimiser moves them."""
    lr: float
    """Learning rate before the schedule's factor."""
    weight_decay: float
    """Decoupled weight decay."""


def parameter_groups(
    model: nn.Module,
    encoder: Iterable[nn.Parameter],
    config: OptimConfig,
    matrices: Iterable[Tensor] | None = None,
) -> list[ParameterGroup]:
    """Split a model's trainable parameters by side (encoder, decoder) and kind, each exactly once.

    Kinds: "matrix" is what Muon may move, "vector" any parameter with fewer than two dimensions,
    "other" the rest (embeddings, heads, tables).

    Args:
        model: the unwrapped model.
        encoder: the parameters of its encoder; every other one counts as decoder.
        config: rates and decay.
        matrices: those that Muon may move; None: two-dimensional weights of Linears in lists of
            blocks.
    """
    encoder_ids = {id(parameter) for parameter in encoder}
    chosen = _block_matrices(model) if matrices is None else set(map(id, matrices))
    split: dict[str, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        side = "encoder" if id(parameter) in encoder_ids else "decoder"
        kind = "vector" if parameter.ndim < 2 else "other"
        kind = "matrix" if id(parameter) in chosen else kind
        split.setdefault(f"{side}/{kind}", []).append(parameter)
    groups = []
    for name, parameters in split.items():
        use_muon = config.optimizer == "muon" and name.endswith("/matrix")
        ratio = config.decoder_lr_ratio if name.startswith("decoder") else 1.0
        groups.append(
            ParameterGroup(
                name=name,
                parameters=parameters,
                optimizer="muon" if use_muon else "adamw",
                lr=(config.muon_lr if use_muon else config.lr) * ratio,
                weight_decay=0.0 if name.endswith("/vector") else config.weight_decay,
            )
        )
    _assert_covered(model, groups)
    return groups


def _block_matrices(model: nn.Module) -> set[int]:
    """Ids of the Linear weights of attention and MLP inside the lists of transformer blocks.

    Modulations stay with AdamW: they read one vector per frame, start at zero, and learn as well
    there at a third less time per step (docs/log.md).
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    matrices = {
        id(layer.weight)
        for blocks in lists
        for layer in blocks.modules()
        if isinstance(layer, nn.Linear)
    }
    modulations = {
        id(part.linear.weight) for part in model.modules() if isinstance(part, Modulation)
    }
    return matrices - modulations


def _assert_covered(model: nn.Module, groups: Iterable[ParameterGroup]) -> None:
    grouped = [id(parameter) for group in groups for parameter in group.parameters]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) == set(trainable), "the groups do not cover the trainable parameters"


def build_optimizers(groups: list[ParameterGroup], config: OptimConfig) -> list[Any]:
    """Build one optimiser per kind that the groups need: AdamW, Muon, or both.

    Each of their param_groups remembers its rate before the schedule as `base_lr`.
    """
    optimizers: list[Any] = []
    for kind in ("adamw", "muon"):
        chosen = [
            {
                "params": group.parameters,
                "lr": group.lr,
                "base_lr": group.lr,
                "weight_decay": group.weight_decay,
            }
            for group in groups
            if group.optimizer == kind
        ]
        if not chosen:
            continue
        if kind == "adamw" and config.state == "offload":
            optimizers.append(OffloadedAdamW(chosen, config.betas))
        elif kind == "adamw" and config.state == "8bit":
            optimizers.append(eight_bit_adamw(chosen, config.betas))
        elif kind == "adamw":
            on_gpu = all(p.is_cuda for group in chosen for p in group["params"])
            optimizers.append(torch.optim.AdamW(chosen, betas=config.betas, fused=on_gpu or None))
        else:
            optimizers.append(muon(chosen))
    return optimizers


def fitting_state(optimizer: Any, saved: Any) -> dict[str, Any]:
    """Return a saved state as one that was just built can take it up.

    What it remembers of each weight is as saved; rates and all else are those of the run's
    settings.

    Raises:
        ValueError: it is no state of an optimiser of these weights.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    states = saved.get("state") if isinstance(saved, Mapping) else None
    if not isinstance(states, Mapping):
        raise ValueError(f"needed the state of an optimiser, got {type(saved).__name__}")
    for place, state in states.items():
        if place not in range(len(weights)) or not isinstance(state, Mapping):
            raise ValueError(f"there are {len(weights)} weights, got a state of {place!r}")
        for name, value in state.items():
            _check_entry(f"{name} of weight {place}", value, weights[place])
    if len({frozenset(state) for state in states.values()}) > 1:
        raise ValueError("what is remembered differs from weight to weight")
    # Weights are remembered by their places, which mean the same only in the same groups.
    needed, got = _group_sizes(optimizer.param_groups), _group_sizes(saved.get("param_groups"))
    if got != needed:
        raise ValueError(f"needed parameter groups of {needed} weights, got {got}")
    return {"state": dict(states), "param_groups": optimizer.state_dict()["param_groups"]}


def _group_sizes(groups: Any) -> list[int] | None:
    """Return the number of weights of each parameter group; None: these are no groups."""
    try:
        return [len(group["params"]) for group in groups]
    except (TypeError, KeyError, IndexError):
        return None


def _check_entry(name: str, value: Any, weight: Tensor) -> None:
    if isinstance(value, Tensor):
        if value.ndim and value.shape != weight.shape:
            raise ValueError(
                f"{name} must have the shape {list(weight.shape)}, got {list(value.shape)}"
            )
        # Rounded ones are of classes of their own, whose scales stand elsewhere.
        is_plain = type(value) is Tensor and value.is_floating_point()
        if is_plain and not torch.isfinite(value).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    elif not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a tensor or a number, got {type(value).__name__}")


def refuse_non_finite(step: int, loss: float, norm: float, whose: str = "") -> None:
    """Refuse to move weights along a gradient that is none (ValueError). `whose` follows "the
    loss", for networks beside the model."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ValueError(
            f"step {step}: the loss{whose} is {loss} and the norm of the gradient {norm}, but both "
            "must be finite: stopped before the weights moved"
        )


def set_lr(optimizers: Iterable[Any], multiplier: float) -> None:
    """Set every learning rate to its base times a factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            lr = group["base_lr"] * multiplier
            if isinstance(group["lr"], Tensor):
                # What is compiled must not see another number at every step.
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


class EMA:
    """Exponential moving average of a model's trainable weights, in float32.

    Phases: `update` after each optimiser step; `with ema.swap():` while something is to see the
    average in the model. The decay ramps up as min(decay, (1 + n) / (10 + n)) after n updates, so
    that a short run is not dominated by its random start.
    """

    def __init__(self, model: nn.Module, decay: float, num_updates: int = 0) -> None:
        """Begin at the present weights of an unwrapped model, as the average of `num_updates`
        updates."""
        self.decay = decay
        self.num_updates = num_updates
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._averages = [weight.detach().float().clone() for weight in self._weights]
        self._swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights."""
        assert not self._swapped, "EMA.update inside EMA.swap"
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = [weight.detach().float() for weight in self._weights]
        # One kernel for all tensors; the optimisers of PyTorch call it the same way.
        torch._foreach_lerp_(self._averages, weights, 1 - decay)  # pyright: ignore
        self.num_updates += 1

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Exchange the average and the model's weights for the time of a with block."""
        assert not self._swapped, "EMA.swap inside EMA.swap"
        self._exchange()
        self._swapped = True
        try:
            yield
        finally:
            self._exchange()
            self._swapped = False

    @torch.no_grad()
    def _exchange(self) -> None:
        # In place and one tensor at a time: no second copy of the model, no changed addresses.
        for weight, average in zip(self._weights, self._averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by parameter name."""
        assert not self._swapped, "EMA.state_dict inside EMA.swap"
        return dict(zip(self._names, self._averages, strict=True))
