"""Networks that `scd train-autoencoder` trains, of pictures and of video, by the same functions.

Clips go in and come out; a network of pictures takes each frame by itself. Gradient flows through
both ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from scd.autoencoders.config import VIDEO_NETWORK, NetworkName
from scd.autoencoders.deep_compression import deep_settings
from scd.autoencoders.diffusers import (
    Statistics,
    new_network,
    raw_latents,
    save_network,
    shape_of,
)
from scd.autoencoders.wan import (
    WAN,
    decode_raw_video,
    new_wan_network,
    raw_video_latents,
    wan_shape_of,
)


def network_named(name: NetworkName) -> nn.Module:
    """Build a network with first weights of PyTorch's generator."""
    return new_wan_network() if name == VIDEO_NETWORK else new_network(deep_settings(name))


def cell_size_of(network: Any) -> int:
    """Return the pixels, each way, of a cell of a network's latents."""
    if _is_video(network):
        return wan_shape_of(network.config, "this network")[1]
    return shape_of("AutoencoderDC", network)[1]


def encode_clips(network: Any, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t2 c h2 w2"]:
    """Return what a network makes of clips, before it is brought to unit scale."""
    if _is_video(network):
        return raw_video_latents(network, frames)
    flat = raw_latents("AutoencoderDC", network, frames.flatten(0, 1))
    return flat.unflatten(0, frames.shape[:2])


def decode_clips(network: Any, raw: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t2 3 h2 w2"]:
    """Return the clips of latents of `encode_clips`, pixels outside [-1, 1] among them."""
    if _is_video(network):
        return decode_raw_video(network, raw)
    return network.decode(raw.flatten(0, 1)).sample.unflatten(0, raw.shape[:2])


def last_layer_of(network: nn.Module) -> Tensor:
    """Return the weights of a network's last layer."""
    parameters: Mapping[str, Tensor] = dict(network.named_parameters())
    for name in ("decoder.conv_out.weight", "decoder.conv_out.conv.weight"):
        if name in parameters:
            return parameters[name]
    raise AssertionError("no last layer")


def save_trained(network: Any, folder: Path, statistics: Statistics) -> None:
    """Write a network as diffusers reads it, with the measured scale of its latents."""
    mean, std = statistics
    if _is_video(network):
        # Its own settings have a place for the scale, channel by channel.
        network.register_to_config(latents_mean=list(mean), latents_std=list(std))
        save_network(network, folder)
        return
    power = sum(m**2 + s**2 for m, s in zip(mean, std, strict=True)) / len(mean)
    # What diffusers alone would scale by: one number for all channels.
    network.register_to_config(scaling_factor=float(f"{power**-0.5:.4g}"))
    save_network(network, folder, statistics)


def _is_video(network: Any) -> bool:
    return type(network).__name__ == WAN
