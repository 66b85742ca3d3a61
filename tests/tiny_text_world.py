"""Worlds of tiny Wan models that a text steers, as run folders, over tests/tiny_wan_vae.py."""

from pathlib import Path

import torch

from scd.autoencoders.config import WanAutoencoderConfig
from scd.autoencoders.wan import WanAutoencoder
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec
from scd.models.build import build
from scd.models.checkpoint import World, save_world
from scd.models.config import CacheConfig, FrameShape, SamplingConfig
from scd.models.wan.config import (
    WanBlockConfig,
    WanConfig,
    WanDecoderConfig,
    WanEncoderConfig,
    WanSeparableConfig,
)
from tests.tiny import shaken
from tests.tiny_wan_vae import TEXT_DIM

TEXT = ConditionSpec(text_length=16, text_dim=TEXT_DIM)
SHAPE = FrameShape(channels=16, height=2, width=4, patch_size=2)
BLOCK = WanBlockConfig(num_heads=2, head_dim=12, ffn_dim=48, freq_dim=16)
CACHE = CacheConfig(window=6, num_sinks=0, rebase_sinks=False)

FOUR_STEPS = SamplingConfig(
    num_steps=4, schedule="listed", times=(1.0, 0.9375, 0.8333, 0.625), solver="renoise"
)
"""Steps of a distilled model. Source: paper (distillation)."""

KINDS = {
    "separable": WanSeparableConfig(
        shape=SHAPE,
        block=BLOCK,
        encoder=WanEncoderConfig(num_layers=2),
        decoder=WanDecoderConfig(num_first=1, num_last=1),
        conditions=TEXT,
        cache=CACHE,
    ),
    "dense": WanConfig(shape=SHAPE, block=BLOCK, num_layers=2, conditions=TEXT, cache=CACHE),
    "blocks": WanConfig(
        shape=SHAPE, block=BLOCK, num_layers=2, conditions=TEXT, cache=CACHE, frames_per_block=3
    ),
}
"""Settings of a small model of each kind."""


def text_world(kind: str, source: Path | str) -> World:
    """A world of 16x32 pixels at 16 frames per second, whose weights are off their zeros."""
    torch.manual_seed(0)
    return World(
        model=shaken(build(KINDS[kind])),
        autoencoder=WanAutoencoder(WanAutoencoderConfig(source=str(source))),
        card=DataCard(height=16, width=32, fps=16.0, conditions=TEXT, action_names=()),
        sampling=FOUR_STEPS,
    )


def write_text_run(kind: str, source: Path | str, folder: Path) -> str:
    """The world as a folder."""
    return str(save_world(text_world(kind, source), folder / kind))
