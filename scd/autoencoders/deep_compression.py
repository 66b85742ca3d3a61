"""Deep-compression networks: the sizes of FAR, a small one, and settings read off a state dict.

Stages of residual convolutions, the later ones of linear attention; between them pixels move into
channels (down) or channels into pixels (up), with shortcuts that only rearrange and average. The
network itself is diffusers' AutoencoderDC. Source: FAR.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from scd.autoencoders.config import FAR_SCALE, DeepName

LATENT_CHANNELS = 32
"""Channels of a latent frame of all of them."""

HEAD_DIM = 32
"""Width of an attention head; no weight tells it."""

WIDTHS = (128, 256, 512, 512, 1024, 1024)
"""Channels of the stages, the largest frames first; networks with fewer stages have the first."""

LAYERS = ((0, 4, 8, 2, 2, 2), (0, 5, 10, 2, 2, 2))
"""Blocks of each stage of encoder and decoder. The first stage has none: pixels move into channels
at once."""

NUM_CONVOLVED = 3
"""First stages whose blocks are convolutions; those of the others are linear attention."""


class Stage(NamedTuple):
    """Blocks of an encoder or decoder that see frames of one size."""

    width: int
    """Channels."""
    num_blocks: int
    norm: str
    """Of the decoder; convolutions after batch norm have ReLU, others SiLU."""
    attends: bool = False
    """Whether its blocks are linear attention."""
    scales: tuple[int, ...] = ()
    """Sizes of the convolutions over queries, keys and values."""


def deep_settings(name: DeepName) -> dict[str, Any]:
    """Return the settings of a network as diffusers' AutoencoderDC takes them.

    FAR publishes the settings of 8 and 32; those of 16, with one stage less than 32, are inferred.
    """
    norm, num_convolved = "rms_norm", NUM_CONVOLVED
    if name == "small-8":
        # Norms that do not look at the batch: a short run has no time for running means.
        widths, layers = (32, 32, 64, 128), ((0, 1, 1, 1), (0, 2, 1, 1))
    elif name == "small-16":
        widths, layers, num_convolved = (16, 16, 32, 64, 256), ((0, 1, 1, 1, 1),) * 2, 5
    else:
        num_stages = {"deep-8": 4, "deep-16": 5, "deep-32": 6}[name]
        widths, layers, norm = WIDTHS[:num_stages], LAYERS, "batch_norm"
    encoder, decoder = (
        [
            Stage(width, num_blocks, norm if place < num_convolved else "rms_norm",
                  attends=place >= num_convolved)
            for place, (width, num_blocks) in enumerate(zip(widths, side, strict=False))
        ]
        for side in layers
    )  # fmt: skip
    return settings_from(encoder, decoder, scale=1.0)


def deep_name(height: int, width: int) -> DeepName:
    """Return the network whose latents of such frames have 8 rows or columns, the shorter side."""
    side = min(height, width)
    names: dict[int, DeepName] = {64: "deep-8", 128: "deep-16", 256: "deep-32"}
    if side not in names:
        raise ValueError(
            f"frames of {height}x{width}: networks are chosen for a side of "
            f"{', '.join(map(str, names))} pixels; name one by --network"
        )
    return names[side]


def settings_from(
    encoder: Sequence[Stage],
    decoder: Sequence[Stage],
    scale: float,
    latent_channels: int = LATENT_CHANNELS,
) -> dict[str, Any]:
    """Put the stages of encoder and decoder, the largest frames first, under diffusers' names."""
    norms = [stage.norm for stage in decoder]
    settings: dict[str, Any] = {
        "in_channels": 3,
        "latent_channels": latent_channels,
        "attention_head_dim": HEAD_DIM,
        "downsample_block_type": "pixel_unshuffle",
        "upsample_block_type": "pixel_shuffle",
        "decoder_norm_types": norms,
        "decoder_act_fns": ["relu" if norm == "batch_norm" else "silu" for norm in norms],
        "scaling_factor": scale,
    }
    for side, stages in (("encoder", encoder), ("decoder", decoder)):
        settings[f"{side}_block_types"] = [
            "EfficientViTBlock" if stage.attends else "ResBlock" for stage in stages
        ]
        settings[f"{side}_block_out_channels"] = [stage.width for stage in stages]
        settings[f"{side}_layers_per_block"] = [stage.num_blocks for stage in stages]
        settings[f"{side}_qkv_multiscales"] = [list(stage.scales) for stage in stages]
    return settings


def settings_of(state: Mapping[str, Tensor], scale: float = FAR_SCALE) -> dict[str, Any]:
    """Read the settings of a deep-compression network off the names and shapes of its weights.

    FAR's weights have the names of diffusers' AutoencoderDC. What no weight tells is as in FAR's
    settings: heads of 32, ReLU after batch norm and SiLU elsewhere, pixels moved into channels.
    """
    encoder, decoder = (_read_side(state, side) for side in ("encoder", "decoder"))
    if len(encoder) != len(decoder):
        raise ValueError(
            f"the encoder has {len(encoder)} stages and the decoder {len(decoder)}: not a "
            "deep-compression autoencoder"
        )
    latent_channels = state["encoder.conv_out.weight"].shape[0]
    return settings_from(encoder, decoder, scale, latent_channels)


def _read_side(state: Mapping[str, Tensor], side: str) -> list[Stage]:
    stem = {"encoder": "encoder.down_blocks", "decoder": "decoder.up_blocks"}[side]
    needed = [f"{side}.conv_in.weight", f"{side}.conv_in.conv.weight"]
    last = f"{side}.conv_out.weight" if side == "encoder" else "decoder.conv_in.weight"
    matches = (re.match(rf"{re.escape(stem)}\.(\d+)\.\d+\.", name) for name in state)
    numbers = {int(match.group(1)) for match in matches if match}
    if not numbers or not any(name in state for name in needed) or last not in state:
        raise ValueError(
            f"not a state dict of a deep-compression autoencoder: it lacks {last!r} or {stem!r}; "
            f"it holds {sorted(state)[:4]} ..."
        )
    stages = [_read_stage(state, f"{stem}.{number}.") for number in range(max(numbers) + 1)]
    if not stages[0].num_blocks:
        # Nothing has the width of a first stage without blocks, or its norm.
        stages[0] = stages[0]._replace(width=WIDTHS[0], norm=stages[1].norm)
    return stages


def _read_stage(state: Mapping[str, Tensor], prefix: str) -> Stage:
    """Read one stage by the names inside its blocks; what is between stages counts as no block."""
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdigit():
            blocks.setdefault(int(number), {})[rest] = tensor
    convolved = [block for block in blocks.values() if "conv1.weight" in block]
    attending = [block for block in blocks.values() if "attn.to_q.weight" in block]
    if attending:
        block = attending[0]
        scales = sorted(
            name for name in block if re.match(r"attn\.to_qkv_multiscale\.\d+\.proj_in", name)
        )
        return Stage(
            block["attn.to_q.weight"].shape[1],
            len(attending),
            "rms_norm",
            attends=True,
            scales=tuple(block[name].shape[-1] for name in scales),
        )
    if not convolved:
        return Stage(0, 0, "rms_norm")
    norm = "batch_norm" if "norm.running_mean" in convolved[0] else "rms_norm"
    return Stage(convolved[0]["conv1.weight"].shape[0], len(convolved), norm)
