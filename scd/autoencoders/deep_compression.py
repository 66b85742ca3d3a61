"""Deep-compression networks: the sizes of FAR, a small one, and settings read off a state dict.

Stages of residual convolutions, the later ones of linear attention; between them pixels move into
channels (down) or channels into pixels (up), with shortcuts that only rearrange and average. The
network itself is diffusers' AutoencoderDC. Source: paper, section 8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

DeepName = Literal["deep-8", "deep-16", "deep-32", "small-8", "small-16"]
"""Networks by name; the number is how many pixels, each way, a cell of the latents stands for."""

LATENT_CHANNELS = 32
"""Channels of a latent frame of all of them."""

FAR_SCALE = 0.2889
"""What FAR multiplies its latents by, for every collection."""

HEAD_DIM = 32
"""Width of an attention head; no weight tells it."""

WIDTHS = (128, 256, 512, 512, 1024, 1024)
"""Channels of the stages, the largest frames first; networks with fewer stages have the first."""

ENCODER_LAYERS, DECODER_LAYERS = (0, 4, 8, 2, 2, 2), (0, 5, 10, 2, 2, 2)
"""Blocks of each stage. The first stage has none: pixels move into channels at once."""

NUM_CONVOLVED = 3
"""First stages whose blocks are convolutions; those of the others are linear attention."""


def deep_settings(name: DeepName) -> dict[str, Any]:
    """Return the settings of a network as diffusers' AutoencoderDC takes them.

    FAR publishes the settings of 8 and 32; those of 16, with one stage less than 32, are inferred.

    Args:
        name: which.
    """
    if name == "small-8":
        # Norms that do not look at the batch: a short run has no time for running means.
        return _settings((32, 32, 64, 128), (0, 1, 1, 1), (0, 2, 1, 1), first="rms_norm")
    if name == "small-16":
        return _settings(
            (16, 16, 32, 64, 256), (0, 1, 1, 1, 1), (0, 1, 1, 1, 1), first="rms_norm", convolved=5
        )
    num_stages = {"deep-8": 4, "deep-16": 5, "deep-32": 6}[name]
    return _settings(WIDTHS[:num_stages], ENCODER_LAYERS[:num_stages], DECODER_LAYERS[:num_stages])


def deep_name(height: int, width: int) -> DeepName:
    """Return the network whose latents of such frames have 8 rows or columns, the shorter side.

    Raises:
        ValueError: there is none.
    """
    side = min(height, width)
    names: dict[int, DeepName] = {64: "deep-8", 128: "deep-16", 256: "deep-32"}
    if side not in names:
        raise ValueError(
            f"frames of {height}x{width}: networks are chosen for a side of "
            f"{', '.join(map(str, names))} pixels; name one by --network"
        )
    return names[side]


def _settings(
    widths: tuple[int, ...],
    encoder_layers: tuple[int, ...],
    decoder_layers: tuple[int, ...],
    first: str = "batch_norm",
    convolved: int = NUM_CONVOLVED,
) -> dict[str, Any]:
    later = len(widths) - convolved
    types = ["ResBlock"] * convolved + ["EfficientViTBlock"] * later
    norms = [first] * convolved + ["rms_norm"] * later
    return settings_from(
        types=(types, types),
        widths=(widths, widths),
        layers=(encoder_layers, decoder_layers),
        scales=([()] * len(widths), [()] * len(widths)),
        norms=norms,
        scale=1.0,
    )


def settings_from(
    types: tuple[list[str], list[str]],
    widths: tuple[tuple[int, ...], tuple[int, ...]],
    layers: tuple[tuple[int, ...], tuple[int, ...]],
    scales: tuple[list[tuple[int, ...]], list[tuple[int, ...]]],
    norms: list[str],
    scale: float,
    latent_channels: int = LATENT_CHANNELS,
) -> dict[str, Any]:
    """Put the settings of encoder and decoder, in pairs, under diffusers' names.

    Args:
        types: blocks of each stage.
        widths: channels of each stage.
        layers: blocks of each stage.
        scales: sizes of the convolutions over queries, keys and values of each stage.
        norms: of the decoder's stages; convolutions after batch norm have ReLU, others SiLU.
        scale: what latents are multiplied by to be of unit scale.
        latent_channels: channels of a latent frame.
    """
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
    for index, side in enumerate(("encoder", "decoder")):
        settings[f"{side}_block_types"] = list(types[index])
        settings[f"{side}_block_out_channels"] = list(widths[index])
        settings[f"{side}_layers_per_block"] = list(layers[index])
        settings[f"{side}_qkv_multiscales"] = [list(sizes) for sizes in scales[index]]
    return settings


def settings_of(state: Mapping[str, Tensor], scale: float = FAR_SCALE) -> dict[str, Any]:
    """Read the settings of a deep-compression network off the names and shapes of its weights.

    FAR's weights have the names of diffusers' AutoencoderDC. What no weight tells is as in FAR's
    settings: heads of 32, ReLU after batch norm and SiLU elsewhere, pixels moved into channels.

    Raises:
        ValueError: not the weights of such a network.
    """
    found = {side: _read_side(state, side) for side in ("encoder", "decoder")}
    encoder, decoder = found["encoder"], found["decoder"]
    if len(encoder["widths"]) != len(decoder["widths"]):
        raise ValueError(
            f"the encoder has {len(encoder['widths'])} stages and the decoder "
            f"{len(decoder['widths'])}: not a deep-compression autoencoder"
        )
    return settings_from(
        types=(encoder["types"], decoder["types"]),
        widths=(tuple(encoder["widths"]), tuple(decoder["widths"])),
        layers=(tuple(encoder["layers"]), tuple(decoder["layers"])),
        scales=(encoder["scales"], decoder["scales"]),
        norms=decoder["norms"],
        scale=scale,
        latent_channels=state["encoder.conv_out.weight"].shape[0],
    )


def _read_side(state: Mapping[str, Tensor], side: str) -> dict[str, list[Any]]:
    """Read the stages of the encoder or the decoder."""
    stem = {"encoder": "encoder.down_blocks", "decoder": "decoder.up_blocks"}[side]
    needed = [f"{side}.conv_in.weight", f"{side}.conv_in.conv.weight"]
    last = f"{side}.conv_out.weight" if side == "encoder" else "decoder.conv_in.weight"
    numbers = sorted(
        {
            int(match.group(1))
            for name in state
            if (match := re.match(rf"{re.escape(stem)}\.(\d+)\.\d+\.", name))
        }
    )
    if not numbers or not any(name in state for name in needed) or last not in state:
        raise ValueError(
            f"not a state dict of a deep-compression autoencoder: it lacks {last!r} or {stem!r}; "
            f"it holds {sorted(state)[:4]} ..."
        )
    read: dict[str, list[Any]] = {
        name: [] for name in ("types", "widths", "layers", "scales", "norms")
    }
    for number in range(max(numbers) + 1):
        stage = _read_stage(state, f"{stem}.{number}.")
        for name, value in stage.items():
            read[name].append(value)
    if read["layers"][0] == 0:
        # Nothing has the width of a first stage without blocks, or its norm.
        read["widths"][0], read["norms"][0] = WIDTHS[0], read["norms"][1]
    return read


def _read_stage(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Read one stage by the names inside its blocks; what is between stages counts as no block."""
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if number.isdigit():
                blocks.setdefault(int(number), {})[rest] = tensor
    convolved = [block for block in blocks.values() if "conv1.weight" in block]
    attending = [block for block in blocks.values() if "attn.to_q.weight" in block]
    stage: dict[str, Any] = {
        "types": "EfficientViTBlock" if attending else "ResBlock",
        "layers": len(attending) or len(convolved),
        "scales": (),
        "norms": "rms_norm",
        "widths": 0,
    }
    if attending:
        block = attending[0]
        stage["widths"] = block["attn.to_q.weight"].shape[1]
        places = [
            name for name in block if re.match(r"attn\.to_qkv_multiscale\.\d+\.proj_in", name)
        ]
        stage["scales"] = tuple(block[name].shape[-1] for name in sorted(places))
    elif convolved:
        block = convolved[0]
        stage["widths"] = block["conv1.weight"].shape[0]
        stage["norms"] = "batch_norm" if "norm.running_mean" in block else "rms_norm"
    return stage
