"""Tiny Wan models: ours, diffusers' own class, and a folder as diffusers writes it."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from scd.data.clip import Conditions
from scd.data.spaces import ConditionSpec
from scd.models.build import build
from scd.models.config import CacheConfig, FrameShape
from scd.models.wan.config import (
    WanBlockConfig,
    WanConfig,
    WanDecoderConfig,
    WanEncoderConfig,
    WanSeparableConfig,
)
from tests.tiny import shaken

SHAPE = FrameShape(channels=16, height=4, width=6, patch_size=2)
BLOCK = WanBlockConfig(num_heads=2, head_dim=12, ffn_dim=40, freq_dim=16)
TEXT = ConditionSpec(text_length=8, text_dim=32)
CACHE = CacheConfig(window=8, num_sinks=0, rebase_sinks=False)
NUM_LAYERS = 6


STEERED = replace(TEXT, num_actions=3, actions_per_frame=4)
"""A text, and an action of each frame of video that a latent frame stands for."""


def tiny_wan(num_layers=NUM_LAYERS, cache=CACHE, conditions=TEXT, shape=SHAPE, **settings):
    config = WanConfig(
        shape=shape,
        block=BLOCK,
        num_layers=num_layers,
        conditions=conditions,
        cache=cache,
        **settings,
    )
    torch.manual_seed(0)
    return shaken(build(config))


def tiny_wan_separable(encoder=None, decoder=None, cache=CACHE, conditions=TEXT):
    config = WanSeparableConfig(
        shape=SHAPE,
        block=BLOCK,
        encoder=encoder or WanEncoderConfig(num_layers=4),
        decoder=decoder or WanDecoderConfig(num_first=2, num_last=1),
        conditions=conditions,
        cache=cache,
    )
    torch.manual_seed(0)
    return shaken(build(config))


def tiny_transformer(seed=0, num_layers=NUM_LAYERS, **settings):
    """Diffusers' own class, of the size of the models above."""
    torch.manual_seed(seed)
    values = {
        "num_attention_heads": BLOCK.num_heads,
        "attention_head_dim": BLOCK.head_dim,
        "in_channels": SHAPE.channels,
        "out_channels": SHAPE.channels,
        "text_dim": TEXT.text_dim,
        "freq_dim": BLOCK.freq_dim,
        "ffn_dim": BLOCK.ffn_dim,
        "num_layers": num_layers,
        "rope_max_seq_len": 64,
    }
    return shaken(WanTransformer3DModel(**values | settings))


def write_tiny_transformer(folder, transformer=None, max_shard_size="20KB", **settings):
    """Write transformer/, in several files unless told otherwise, scheduler/ and the index."""
    folder = Path(folder)
    transformer = transformer or tiny_transformer(**settings)
    transformer.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
    UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0).save_pretrained(
        folder / "scheduler"
    )
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def random_text(batch=2, seed=0):
    """Embedded prompts of five tokens, filled up with zeros."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, TEXT.text_length, TEXT.text_dim, generator=generator)
    text[:, 5:] = 0
    return text


def wan_clips(batch=2, num_frames=5, num_draws=1, seed=0):
    """Clean frames, noisy frames, their times, conditions, and noise for an encoder."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(batch, num_frames, *SHAPE.shape, generator=generator)
    noisy = torch.randn(batch, num_draws, num_frames, *SHAPE.shape, generator=generator)
    time = torch.rand(batch, num_draws, num_frames, generator=generator)
    noise = torch.randn(batch, 1, num_frames, *SHAPE.shape, generator=generator)
    return clean, noisy, time, Conditions(text=random_text(batch, seed)), noise
