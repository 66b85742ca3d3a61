"""Networks of diffusers that encode single pictures: found, built, read, written, and their scale.

AutoencoderDC, AutoencoderKL and AutoencoderTiny. Needs diffusers, which the extra `wan` brings:
pip install -e ".[wan]".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from scd.common.hub import class_of, find_part

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel of latents."""

PictureKind = Literal["AutoencoderDC", "AutoencoderKL", "AutoencoderTiny"]
"""Classes of diffusers."""

KINDS: tuple[PictureKind, ...] = ("AutoencoderDC", "AutoencoderKL", "AutoencoderTiny")
"""The same, to look through."""

STATISTICS_FILE = "statistics.json"
"""Mean and deviation of each channel of the latents, measured; beside the weights."""

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
"""Weights of a network, as diffusers names them."""

LAST_FILE = "last"
"""Names the newest step in the folder of a training."""

EXTRA = 'this autoencoder needs diffusers: pip install -c constraints.txt -e ".[wan]"'
"""What to do where the optional package is missing."""

TOLD_APART_BY: dict[PictureKind, tuple[str, ...]] = {
    "AutoencoderDC": (
        "attention_head_dim",
        "decoder_act_fns",
        "decoder_norm_types",
        "downsample_block_type",
        "upsample_block_type",
    ),
    "AutoencoderKL": ("act_fn", "norm_num_groups"),
    "AutoencoderTiny": ("act_fn", "upsampling_scaling_factor"),
}
"""Settings of a network that change what it computes, and that no weight shows."""


def find_network(
    source: str | os.PathLike[str],
    classes: tuple[str, ...] = KINDS,
    what: str = "picture autoencoder",
) -> Path:
    """Return the folder of an autoencoder; of a training, its newest step.

    Raises:
        FileNotFoundError: it is not there, or the hub cannot be reached.
        ValueError: another kind of model.
    """
    last = Path(source) / LAST_FILE
    place = Path(source) / last.read_text().strip() if last.is_file() else source
    return find_part(place, "vae", classes, what, at_root=True)


def load_network(source: str | os.PathLike[str]) -> tuple[PictureKind, Any]:
    """Read a network: its class's name and itself.

    Raises:
        FileNotFoundError: it is not there, or the hub cannot be reached.
        ValueError: another kind of model, damaged weights, or diffusers is not installed.
    """
    folder = find_network(source)
    name = class_of(folder)
    kind: PictureKind = next(one for one in KINDS if one == name)
    try:
        network, report = _class(kind).from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the weights in {folder} are missing or damaged: {reason}") from error
    # Diffusers only warns of these.
    missing, unknown = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unknown:
        raise ValueError(
            f"the weights in {folder} are not those of its config.json: {len(missing)} are missing "
            f"({missing[:2]}), {len(unknown)} are unknown ({unknown[:2]})"
        )
    return kind, network


def new_network(settings: Mapping[str, Any]) -> nn.Module:
    """Build diffusers' AutoencoderDC with first weights of PyTorch's generator.

    Raises:
        ValueError: diffusers is not installed.
    """
    return _class("AutoencoderDC")(**settings)


def save_network(network: Any, folder: Path, statistics: Statistics | None = None) -> None:
    """Write a network as diffusers reads it, and the scale of its latents if it was measured."""
    network.save_pretrained(folder, safe_serialization=True)
    if statistics is not None:
        values = {"mean": list(statistics[0]), "std": list(statistics[1])}
        (folder / STATISTICS_FILE).write_text(json.dumps(values, indent=2) + "\n")


def shape_of(kind: PictureKind, network: Any) -> tuple[int, int]:
    """Return channels of a latent frame, and pixels of a cell each way."""
    settings = network.config
    stages = "block_out_channels" if kind == "AutoencoderKL" else "encoder_block_out_channels"
    return settings["latent_channels"], 2 ** (len(settings[stages]) - 1)


def raw_latents(
    kind: PictureKind, network: Any, frames: Float[Tensor, "f 3 h w"]
) -> Float[Tensor, "f c h2 w2"]:
    """Return what a network makes of frames; gradient flows."""
    encoded = network.encode(frames)
    if kind == "AutoencoderKL":
        return encoded.latent_dist.mode()
    return encoded.latents if kind == "AutoencoderTiny" else encoded.latent


def measure_statistics(
    parts: Iterable[Float[Tensor, "*b c h w"]],
) -> Statistics:
    """Measure mean and deviation of each channel, rounded: other machines get the same numbers.

    Raises:
        ValueError: no part, values that are not finite, or a channel that never changes.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        values = part.double().cpu().movedim(-3, 0).flatten(1)
        count += values.shape[1]
        total, squares = total + values.sum(1), squares + values.square().sum(1)
    if count == 0:
        raise ValueError("needed at least one batch of frames to measure, got none")
    mean = total / count
    std = (squares / count - mean**2).clamp(min=0).sqrt()
    if not torch.isfinite(std).all() or float(std.min()) <= 1e-6:
        raise ValueError(
            "the autoencoder makes latents that are not finite, or a channel that never changes"
        )
    return tuple(_rounded(mean)), tuple(_rounded(std))


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def given_statistics(folder: Path, kind: PictureKind, settings: Any) -> Statistics:
    """Return the scale that comes with the weights: ours, per channel, or one for all."""
    channels = settings["latent_channels"]
    if (folder / STATISTICS_FILE).is_file():
        return read_statistics(folder / STATISTICS_FILE)
    if kind == "AutoencoderKL" and settings["latents_mean"] and settings["latents_std"]:
        return tuple(settings["latents_mean"]), tuple(settings["latents_std"])
    shift = settings.get("shift_factor") or 0.0
    return (float(shift),) * channels, (1 / settings["scaling_factor"],) * channels


def read_statistics(path: Path) -> Statistics:
    """Read the mean and deviation of each channel.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return tuple(map(float, values["mean"])), tuple(map(float, values["std"]))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): needed mean and std, numbers") from error


def _class(kind: PictureKind) -> Any:
    try:
        from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    except ImportError as error:
        raise ValueError(EXTRA) from error
    return {
        "AutoencoderDC": AutoencoderDC,
        "AutoencoderKL": AutoencoderKL,
        "AutoencoderTiny": AutoencoderTiny,
    }[kind]
