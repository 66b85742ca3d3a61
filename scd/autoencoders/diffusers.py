"""Networks of diffusers that encode single images: AutoencoderDC, AutoencoderKL, AutoencoderTiny.

Every frame by itself. Latents are brought to unit scale, channel by channel, by a mean and a
deviation that belong to the settings: those that come with the weights, or those measured on data.
A folder that `scd train-autoencoder` or `scd convert autoencoder` wrote is one of these too.

Needs diffusers, which the extra `wan` brings: pip install -e ".[wan]".
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from scd.autoencoders.base import NetworkAutoencoder
from scd.autoencoders.config import ImageAutoencoderConfig, ImageKind
from scd.common.config import Precision
from scd.common.files import read_json
from scd.common.hub import class_of, find_part
from scd.common.places import named_by

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel of latents."""


KINDS: tuple[ImageKind, ...] = get_args(ImageKind)
"""The same, to look through."""

STATISTICS_FILE = "statistics.json"
"""Mean and deviation of each channel of the latents, measured; beside the weights."""

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
"""Weights of a network, as diffusers names them."""

LAST_FILE = "last"
"""Names the newest step in the folder of a training."""

EXTRA = 'this autoencoder needs diffusers: pip install -c constraints.txt -e ".[wan]"'
"""What to do where the optional package is missing."""

TOLD_APART_BY: dict[ImageKind, tuple[str, ...]] = {
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

NUM_AT_ONCE = 64
"""Frames that go through the network at once."""


class ImageAutoencoder(NetworkAutoencoder):
    """Between frames and latents of unit scale, each frame by itself."""

    config: ImageAutoencoderConfig

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t c h2 w2"]:
        """Turn frames in [-1, 1] into latents; of a distribution, its mean."""
        self.latent_shape(*frames.shape[-2:])
        return self.to_unit_scale(self.encode_raw(frames))

    @torch.no_grad()
    def encode_raw(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t c h2 w2"]:
        """Turn frames into what the network makes, before it is brought to unit scale."""
        kind, network = self.config.network, self.network
        return self._in_parts(frames, lambda part: raw_latents(kind, network, part))

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t 3 h2 w2"]:
        raw, network = self.from_unit_scale(latents), self.network
        return self._in_parts(raw, lambda part: network.decode(part).sample).clamp(-1, 1)

    def computes(self) -> tuple[str, dict[str, Tensor]]:
        settings = dict(self.network.config)
        told = {name: settings.get(name) for name in TOLD_APART_BY[self.config.network]}
        return json.dumps(told, sort_keys=True), self.network.state_dict()

    def _in_parts(
        self, tensor: Float[Tensor, "b t c h w"], call: Callable[[Tensor], Tensor]
    ) -> Tensor:
        flat = tensor.flatten(0, 1).to(self._device, self._dtype)
        made = torch.cat([call(part).float() for part in flat.split(NUM_AT_ONCE)])
        return made.unflatten(0, tensor.shape[:2])

    def _read(self) -> nn.Module:
        kind, network = load_network(self.config.source)
        if kind != self.config.network:
            raise ValueError(
                f"{self.config.source} holds an {kind}, needed the {self.config.network} "
                "that the settings name"
            )
        return network

    def _shape_of(self, network: Any) -> tuple[int, int]:
        return shape_of(self.config.network, network)

    def _statistics(self) -> Statistics:
        return self.config.mean, self.config.std


def with_statistics(
    autoencoder: ImageAutoencoder, batches: Iterable[Float[Tensor, "b t 3 h w"]]
) -> ImageAutoencoder:
    """Return the same autoencoder at the scale that its latents have on some frames."""
    mean, std = measure_statistics(autoencoder.encode_raw(frames) for frames in batches)
    twin = copy(autoencoder)
    twin.config = replace(autoencoder.config, mean=mean, std=std)
    return twin


def open_image_autoencoder(
    source: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
) -> ImageAutoencoder:
    """Open an image autoencoder: its folder, a pipeline with its vae/, a training, the hub."""
    folder = find_network(source)
    kind, network = load_network(folder)
    channels, cell_size = shape_of(kind, network)
    mean, std = given_statistics(folder, kind, network.config)
    config = ImageAutoencoderConfig(
        source=str(source),
        network=kind,
        channels=channels,
        cell_size=cell_size,
        mean=mean,
        std=std,
    )
    return ImageAutoencoder(config, network).place(device, precision)


def find_network(
    source: str | os.PathLike[str],
    classes: tuple[str, ...] = KINDS,
    what: str = "single-image autoencoder",
) -> Path:
    """Return the folder of an autoencoder; of a training, its newest step."""
    last = Path(source) / LAST_FILE
    place = named_by(last) if last.is_file() else source
    return find_part(place, "vae", classes, what, at_root=True)


def load_network(
    source: str | os.PathLike[str], classes: tuple[ImageKind, ...] = KINDS
) -> tuple[ImageKind, Any]:
    """Read a network of one of these classes: its class's name and itself.

    Raises:
        FileNotFoundError: it is not there, or the hub cannot be reached.
        ValueError: another kind of model, damaged weights, or diffusers is not installed.
    """
    folder = find_network(source, classes)
    name = class_of(folder)
    kind: ImageKind = next(one for one in classes if one == name)
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
    """Build diffusers' AutoencoderDC with first weights of PyTorch's generator."""
    return _class("AutoencoderDC")(**settings)


def save_network(network: Any, folder: Path, statistics: Statistics | None = None) -> None:
    """Write a network as diffusers reads it, and the scale of its latents if it was measured."""
    network.save_pretrained(folder, safe_serialization=True)
    if statistics is not None:
        values = {"mean": list(statistics[0]), "std": list(statistics[1])}
        (folder / STATISTICS_FILE).write_text(json.dumps(values, indent=2) + "\n")


def shape_of(kind: ImageKind, network: Any) -> tuple[int, int]:
    """Return channels of a latent frame, and pixels of a cell each way."""
    settings = network.config
    stages = "block_out_channels" if kind == "AutoencoderKL" else "encoder_block_out_channels"
    return settings["latent_channels"], 2 ** (len(settings[stages]) - 1)


def raw_latents(
    kind: ImageKind, network: Any, frames: Float[Tensor, "f 3 h w"]
) -> Float[Tensor, "f c h2 w2"]:
    """Return what a network makes of frames; gradient flows."""
    encoded = network.encode(frames)
    if kind == "AutoencoderKL":
        return encoded.latent_dist.mode()
    return encoded.latents if kind == "AutoencoderTiny" else encoded.latent


def measure_statistics(
    parts: Iterable[Float[Tensor, "*b c h w"]],
) -> Statistics:
    """Measure mean and deviation of each channel, rounded: other machines get the same numbers."""
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


def given_statistics(folder: Path, kind: ImageKind, settings: Any) -> Statistics:
    """Return the scale that comes with the weights: ours, per channel, or one for all."""
    channels = settings["latent_channels"]
    if (folder / STATISTICS_FILE).is_file():
        return read_statistics(folder / STATISTICS_FILE)
    if kind == "AutoencoderKL" and settings["latents_mean"] and settings["latents_std"]:
        return tuple(settings["latents_mean"]), tuple(settings["latents_std"])
    shift = settings.get("shift_factor") or 0.0
    return (float(shift),) * channels, (1 / settings["scaling_factor"],) * channels


def read_statistics(path: Path) -> Statistics:
    """Read the mean and deviation of each channel (ValueError: the file is damaged)."""
    try:
        values = read_json(path)
        return tuple(map(float, values["mean"])), tuple(map(float, values["std"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): needed mean and std, numbers") from error


def _class(kind: ImageKind) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(EXTRA) from error
    return getattr(diffusers, kind)
