"""One function that builds any model from its settings."""

from __future__ import annotations

import torch
from torch import nn

from scd.models.cost import FrameCost, Load
from scd.models.dense import DenseConfig, DenseDiffuser
from scd.models.separable import SeparableConfig, SeparableDiffuser
from scd.models.wan.config import WanConfig, WanSeparableConfig
from scd.models.wan.dense import WanDiffuser
from scd.models.wan.separable import WanSeparableDiffuser

ModelConfig = SeparableConfig | DenseConfig | WanConfig | WanSeparableConfig
Diffuser = SeparableDiffuser | DenseDiffuser | WanDiffuser | WanSeparableDiffuser


def build(config: ModelConfig) -> Diffuser:
    """Build the model that a configuration describes, with fresh weights."""
    if isinstance(config, SeparableConfig):
        return SeparableDiffuser(config)
    if isinstance(config, WanSeparableConfig):
        return WanSeparableDiffuser(config)
    if isinstance(config, WanConfig):
        return WanDiffuser(config)
    return DenseDiffuser(config)


def num_parameters(module: nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def frame_cost(config: ModelConfig, load: Load) -> FrameCost:
    """Count one frame of the model that a configuration describes, without its weights."""
    with torch.device("meta"):
        return build(config).frame_cost(load)
