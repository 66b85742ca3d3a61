"""Settings of every kind of model."""

from scd.models.config import DenseConfig, SeparableConfig
from scd.models.wan.config import WanConfig, WanSeparableConfig

ModelConfig = SeparableConfig | DenseConfig | WanConfig | WanSeparableConfig
"""Settings of any model; `scd.models.build` makes it."""
