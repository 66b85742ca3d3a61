"""Networks of diffusers that encode single images: AutoencoderDC, AutoencoderKL, AutoencoderTiny.

Every frame by itself. Latents are brought to unit scale, channel by channel, by a mean and a
deviation that belong to the settings: those that come with the weights, or those measured on data.
A folder that `scd train-autoencoder` or `scd convert autoencoder` wrote is one of these too.

Needs diffusers, which the extra `wan` brings: pip install -e ".[wan]". A network of convolutions
alone is run without it (`scd.autoencoders.residual`).
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scd.autoencoders.base import NetworkAutoencoder
from scd.autoencoders.config import ImageAutoencoderConfig, ImageKind
from scd.autoencoders.residual import ResidualAutoencoder, is_residual
from scd.common.config import MAX_SIZE, Precision, shown
from scd.common.files import read_json
from scd.common.hub import CONFIG_FILE, class_of, find_part, read_part_config
from scd.common.places import named_by
from scd.common.runtime import without_weights
from scd.common.weights import Weights, check_fit, guarded, save_tensors

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

NO_MATTER = ("sample_size", "force_upcast", "dropout", "scaling_factor", "shift_factor")
"""Settings of a network that change nothing of what it computes here: hints for pipelines, what
acts in training only, and the scale, which belongs to our own settings."""

OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Parts of an attention layer as diffusers named them before 0.16, in files that are still in
use, and as it names them now."""

MAX_REPEATS = 1000
"""Largest number of blocks in a stage, or stages in a network, that settings may name."""

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
        network = self.network
        if isinstance(network, ResidualAutoencoder):
            # What may be left out of the settings is what diffusers has as its defaults.
            _, network = load_network(self.config.source)
        return settings_that_matter(network), network.state_dict()

    def _in_parts(
        self, tensor: Float[Tensor, "b t c h w"], call: Callable[[Tensor], Tensor]
    ) -> Tensor:
        flat = tensor.flatten(0, 1).to(self._device, self._dtype)
        made = torch.cat([call(part).float() for part in flat.split(NUM_AT_ONCE)])
        return made.unflatten(0, tensor.shape[:2])

    def _read(self) -> nn.Module:
        if not self.config.source:
            raise FileNotFoundError(
                "the settings name no folder of the autoencoder: needed its vae/ beside the weights"
            )
        kind, network = load_network(self.config.source, light=True)
        if kind != self.config.network:
            raise ValueError(
                f"{self.config.source} holds an {kind}, needed the {self.config.network} "
                "that the settings name"
            )
        return network

    def carried(self, folder: Path, dtype: torch.dtype | None = None) -> ImageAutoencoder:
        """Write the network into `vae/`, as diffusers reads it; see base.Autoencoder."""
        place = folder / "vae"
        place.mkdir()
        shutil.copyfile(find_network(self.config.source) / CONFIG_FILE, place / CONFIG_FILE)
        weights = self.network.state_dict().items()
        save_tensors(
            {name: weight.to(dtype=dtype).contiguous() for name, weight in weights},
            place / WEIGHTS_FILE,
        )
        twin = copy(self)
        twin.config = replace(self.config, source="")
        return twin

    def _shape_of(self, network: Any) -> tuple[int, int]:
        return shape_of(self.config.network, network)

    def statistics(self) -> Statistics:
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
    source: str | os.PathLike[str], classes: tuple[ImageKind, ...] = KINDS, light: bool = False
) -> tuple[ImageKind, Any]:
    """Read a network of one of these classes: its class's name and itself.

    Args:
        source: as `find_network` takes it.
        classes: that will do.
        light: take a network of our own that computes the same, without diffusers, if there is one.

    Raises:
        FileNotFoundError: it is not there, or the hub cannot be reached.
        ValueError: another kind of model, damaged weights, or diffusers is not installed.
    """
    folder = find_network(source, classes)
    name = class_of(folder)
    kind: ImageKind = next(one for one in classes if one == name)
    if light and kind == "AutoencoderDC" and is_residual(read_part_config(folder)):
        return kind, read_network(ResidualAutoencoder, folder)
    return kind, read_network(_class(kind), folder)


def read_network(kind: Any, folder: Path) -> Any:
    """Read a network of diffusers from a part's folder, in float32.

    Args:
        kind: class of diffusers.
        folder: with config.json and weights in any form.

    Raises:
        FileNotFoundError: there are no settings or no weights.
        ValueError: they are damaged, do not fit each other, or a number is not finite.
    """
    path = folder / CONFIG_FILE
    settings = read_part_config(folder)
    with Weights(folder) as weights:
        _refuse_sizes(settings, len(weights.names()), str(path))
        try:
            with without_weights():
                network = kind.from_config(settings)
        except Exception as error:
            # Whatever the network stumbles over: settings are checked nowhere else.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path} holds no settings of {kind.__name__}: {reason}") from error
        names = {_today(name): name for name in weights.names()}
        given = {ours: weights.header(there) for ours, there in names.items()}
        check_fit(
            network,
            given,
            str(folder),
            lambda name: weights.stored_name(names[name]) if name in names else name,
        )
        state = weights.state_dict()
    network.load_state_dict({ours: state[there] for ours, there in names.items()}, assign=True)
    assert not any(one.is_meta for one in (*network.parameters(), *network.buffers()))
    return network


def _refuse_sizes(value: Any, num_weights: int, where: str) -> None:
    """Refuse sizes of which anything built would be huge (ValueError)."""
    if isinstance(value, dict):
        for name, entry in value.items():
            repeats = any(word in name for word in ("layers", "num_"))
            _refuse_sizes(entry, num_weights if repeats else 0, f"{where}: {name}")
    elif isinstance(value, list):
        if len(value) > MAX_REPEATS:
            raise ValueError(f"{where} has {len(value)} entries, the most is {MAX_REPEATS}")
        for entry in value:
            _refuse_sizes(entry, num_weights, where)
    elif isinstance(value, (int, float)):
        # No stage has more blocks than the file has weights.
        most = num_weights or MAX_SIZE
        if not abs(value) <= most:
            raise ValueError(f"{where} must be {most} at most, got {shown(value)}")


def _today(name: str) -> str:
    return ".".join(OLD_NAMES.get(part, part) for part in name.split("."))


def settings_that_matter(network: Any) -> str:
    """Write the settings on which depends what a network of diffusers computes, for a fingerprint.

    Those at their defaults are left out, so that a newer diffusers, which knows more settings,
    writes the same.
    """
    signature = inspect.signature(type(network).__init__).parameters
    told = {
        name: value
        for name, value in network.config.items()
        if name in signature
        and name not in NO_MATTER
        and json.dumps(value) != json.dumps(signature[name].default)
    }
    return json.dumps({"class": type(network).__name__} | told, sort_keys=True)


def new_network(settings: Mapping[str, Any]) -> nn.Module:
    """Build diffusers' AutoencoderDC with first weights of PyTorch's generator."""
    return _class("AutoencoderDC")(**settings)


def save_network(network: Any, folder: Path, statistics: Statistics | None = None) -> None:
    """Write a network as diffusers reads it, and the scale of its latents if it was measured."""
    guarded(
        lambda path: network.save_pretrained(path.parent, safe_serialization=True),
        folder / WEIGHTS_FILE,
    )
    if statistics is not None:
        values = {"mean": list(statistics[0]), "std": list(statistics[1])}
        (folder / STATISTICS_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


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
