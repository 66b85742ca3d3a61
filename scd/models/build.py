"""One function that builds any model from its settings, and one that counts what it costs."""

from __future__ import annotations

from torch import nn

from scd.models.config import SeparableConfig
from scd.models.cost import FrameCost, Load, dense_cost, separable_cost
from scd.models.dense import DenseDiffuser
from scd.models.kinds import ModelConfig
from scd.models.separable import SeparableDiffuser
from scd.models.wan.config import WanConfig, WanSeparableConfig
from scd.models.wan.cost import wan_cost, wan_separable_cost
from scd.models.wan.dense import WanDiffuser
from scd.models.wan.separable import WanSeparableDiffuser

Diffuser = SeparableDiffuser | DenseDiffuser | WanDiffuser | WanSeparableDiffuser


def build(config: ModelConfig) -> Diffuser:
    """Build the model that a configuration describes, with fresh weights.

    Raises:
        ValueError: frames that cannot be cut into its patches.
    """
    config.shape.check_cut()
    if isinstance(config, SeparableConfig):
        return SeparableDiffuser(config)
    if isinstance(config, WanSeparableConfig):
        return WanSeparableDiffuser(config)
    if isinstance(config, WanConfig):
        return WanDiffuser(config)
    return DenseDiffuser(config)


def frame_cost(config: ModelConfig, load: Load) -> FrameCost:
    """Count one frame of the model that a configuration describes."""
    if isinstance(config, SeparableConfig):
        return separable_cost(config, load)
    if isinstance(config, WanSeparableConfig):
        return wan_separable_cost(config, load)
    if isinstance(config, WanConfig):
        return wan_cost(config, load)
    return dense_cost(config, load)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
