"""Wan's causal video autoencoder, whole clips or one latent frame after another: Wan2.1's, and that
of Wan2.2-TI2V-5B, which works on patches of 2x2 pixels.

The first latent frame stands for one frame of video, each later one for four. Convolutions look
back in time only and remember the last frames they saw; a stream hands that memory on and gives
exactly the frames of the whole clip.

The network is diffusers' AutoencoderKLWan. Needs the extra `wan`: pip install -e ".[wan]".
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from scd.autoencoders.base import NetworkAutoencoder, StreamDecoder
from scd.autoencoders.config import FRAMES_PER_LATENT, WanAutoencoderConfig
from scd.autoencoders.diffusers import find_network, read_network, settings_that_matter
from scd.common.config import Precision
from scd.common.hub import CONFIG_FILE, read_part_config

WAN = "AutoencoderKLWan"
"""Class of diffusers whose settings a folder with Wan's autoencoder names."""

FIRST = "Rep"
"""What diffusers' network puts in the place of a memory where it doubles time, after one frame."""

EXTRA = 'Wan needs diffusers and transformers: pip install -c constraints.txt -e ".[wan]"'
"""What to do where an optional package is missing."""


def num_latent_frames(num_frames: int) -> int:
    """Return how many latent frames stand for 1 + 4n frames of video (others: ValueError)."""
    whole, rest = divmod(num_frames - 1, FRAMES_PER_LATENT)
    if num_frames < 1 or rest:
        raise ValueError(f"Wan's autoencoder takes 1 frame and then 4 at a time, got {num_frames}")
    return 1 + whole


class WanAutoencoder(NetworkAutoencoder):
    """Between frames of video and Wan's latents; the network is diffusers' AutoencoderKLWan."""

    config: WanAutoencoderConfig

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t2 c h2 w2"]:
        """Turn 1 + 4n frames into 1 + n latent frames: the mean of their distribution."""
        num_latent_frames(frames.shape[1])
        self.latent_shape(*frames.shape[-2:])
        # As a stream, so that it is the same: diffusers takes the last layer over all at once.
        stream = WanStreamEncoder(self)
        return torch.stack([stream.next(part) for part in _latent_parts(frames)], dim=1)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t2 3 h2 w2"]:
        """Turn 1 + n latent frames into 1 + 4n frames in [-1, 1]."""
        stream = self.stream_decoder()
        return torch.cat([stream.next(latent) for latent in latents.unbind(1)], dim=1)

    def stream_decoder(self) -> WanStreamDecoder:
        return WanStreamDecoder(self)

    def computes(self) -> tuple[str, dict[str, Tensor]]:
        return settings_that_matter(self.network), self.network.state_dict()

    def _read(self) -> nn.Module:
        if not self.config.source:
            raise FileNotFoundError(
                "this world does not say where Wan's autoencoder lies: name the folder, as "
                "diffusers writes it, that holds vae/"
            )
        return _load_network(self.config.source)

    def _shape_of(self, network: Any) -> tuple[int, int]:
        return wan_shape_of(network.config, "this autoencoder")

    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        settings = self.network.config
        return settings.latents_mean, settings.latents_std


class WanStreamDecoder(StreamDecoder):
    """Latent frames of a batch of streams to frames, exactly as `WanAutoencoder.decode`."""

    name = WAN
    pictures_per_latent = FRAMES_PER_LATENT

    def __init__(self, autoencoder: WanAutoencoder) -> None:
        self.autoencoder = autoencoder
        self._num_memories = _num_memories(autoencoder.network.decoder)
        self.reset()

    def reset(self) -> None:
        self._memory: list[Any] = [None] * self._num_memories
        self._is_first = True

    def fork(self, num: int = 1) -> WanStreamDecoder:
        twin = WanStreamDecoder(self.autoencoder)
        # Besides tensors there are words. The network puts new tensors into the list and never
        # writes into an old one, so that one copy can share them.
        twin._memory = [
            kept.repeat_interleave(num, 0) if num > 1 and isinstance(kept, Tensor) else kept
            for kept in self._memory
        ]
        twin._is_first = self._is_first
        return twin

    def remembered(self) -> dict[str, Tensor]:
        memory = enumerate(self._memory)
        return {str(place): kept for place, kept in memory if isinstance(kept, Tensor)}

    def recall(self, remembered: Mapping[str, Tensor], num_frames: int) -> None:
        self.reset()
        if num_frames:
            # Where time is doubled the first frame leaves a word, and no tensor.
            places = map(str, range(self._num_memories))
            self._memory = [remembered.get(place, FIRST) for place in places]
            self._is_first = False

    @torch.no_grad()
    def next(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t 3 h2 w2"]:
        """Return the frames in [-1, 1] of the next latent frame: one of the first, then four."""
        raw = self.autoencoder.from_unit_scale(latent)
        frames = _decoded(self.autoencoder.network, raw, self._memory, self._is_first)
        self._is_first = False
        return frames.float().clamp(-1, 1)

    @property
    def memory_bytes(self) -> int:
        """Memory that the stream takes between two latent frames."""
        kept = [entry for entry in self._memory if isinstance(entry, Tensor)]
        return sum(entry.nbytes for entry in kept)


class WanStreamEncoder:
    """Frames of video of a batch of streams to latent frames, exactly as `WanAutoencoder.encode`.

    `next` with the first frame, then with four frames at a time; `reset` begins anew.
    """

    def __init__(self, autoencoder: WanAutoencoder) -> None:
        self.autoencoder = autoencoder
        self._num_memories = _num_memories(autoencoder.network.encoder)
        self.reset()

    def reset(self) -> None:
        self._memory: list[Any] = [None] * self._num_memories
        self._is_first = True

    @torch.no_grad()
    def next(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return the latent frame of the next frames in [-1, 1]: 1 at first, then 4 at a time."""
        needed = 1 if self._is_first else FRAMES_PER_LATENT
        if frames.shape[1] != needed:
            raise ValueError(
                f"a latent frame is made of 1 frame at first and then of {FRAMES_PER_LATENT}: "
                f"needed {needed}, got {frames.shape[1]}"
            )
        self.autoencoder.latent_shape(*frames.shape[-2:])
        network = self.autoencoder.network
        weight = next(network.parameters())
        raw = _encoded(network, frames.to(weight.device, weight.dtype), self._memory)
        self._is_first = False
        return self.autoencoder.to_unit_scale(raw)


def raw_video_latents(
    network: Any, frames: Float[Tensor, "b t 3 h w"]
) -> Float[Tensor, "b t2 c h2 w2"]:
    """Return what a network makes of 1 + 4n frames, before it is brought to unit scale; gradient
    flows."""
    memory: list[Any] = [None] * _num_memories(network.encoder)
    return torch.stack([_encoded(network, part, memory) for part in _latent_parts(frames)], dim=1)


def decode_raw_video(
    network: Any, raw: Float[Tensor, "b t c h w"]
) -> Float[Tensor, "b t2 3 h2 w2"]:
    """Return the frames of 1 + n latent frames as a network makes them; gradient flows, also of
    what lies outside [-1, 1]."""
    memory: list[Any] = [None] * _num_memories(network.decoder)
    parts = [
        _decoded(network, latent, memory, place == 0) for place, latent in enumerate(raw.unbind(1))
    ]
    return torch.cat(parts, dim=1)


def new_wan_network() -> nn.Module:
    """Build a small network of Wan's kind with first weights of PyTorch's generator: cells of 8
    pixels, 16 channels, on patches of 2x2 pixels as that of Wan2.2, so that a CPU can train it."""
    return _module().AutoencoderKLWan(
        base_dim=32,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
    )


def open_wan_autoencoder(
    source: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
) -> WanAutoencoder:
    """Open the autoencoder of a folder as diffusers writes it, of its vae/, or of the hub."""
    network = _load_network(str(source))
    channels, cell_size = wan_shape_of(network.config, str(source))
    config = WanAutoencoderConfig(source=str(source), channels=channels, cell_size=cell_size)
    return WanAutoencoder(config, network).place(device, precision)


def wan_shape_of(settings: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Return channels of a latent frame, and pixels of a cell each way, by some settings.

    Args:
        settings: of diffusers' AutoencoderKLWan; what lacks is as in Wan2.1.
        where: they are of, for errors.

    Raises:
        ValueError: they are not those of an autoencoder of Wan.
    """
    multiples, halves = settings.get("dim_mult"), settings.get("temperal_downsample")
    multiples = [1, 2, 4, 4] if multiples is None else multiples
    halves = [False, True, True] if halves is None else halves
    channels = settings.get("z_dim", 16)
    is_int = isinstance(channels, int) and not isinstance(channels, bool)
    if not (isinstance(multiples, (list, tuple)) and isinstance(halves, (list, tuple)) and is_int):
        raise ValueError(
            f"{where}: needed z_dim, a number, dim_mult and temperal_downsample, lists, got "
            f"{channels!r}, {multiples!r} and {halves!r}"
        )
    patch = settings.get("patch_size")
    side = 1 if patch is None else patch
    is_side = isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= 64
    cell_size = 2 ** (len(multiples) - 1) * (side if is_side else 1)
    pixels = [settings.get(name, 3) for name in ("in_channels", "out_channels")]
    found = {
        "patch_size": patch,
        "in_channels": pixels[0],
        "out_channels": pixels[1],
        "temperal_downsample": list(halves),
        "scale_factor_spatial": settings.get("scale_factor_spatial"),
    }
    if (
        not is_side
        or pixels != [3 * side**2] * 2
        or sum(map(bool, halves)) != 2
        # diffusers writes 8 whatever the size is, and 16 for Wan2.2.
        or found["scale_factor_spatial"] not in (None, 8, cell_size)
    ):
        told = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(
            f"{where}: needed an autoencoder of Wan, which shortens time by 4 and works on pixels "
            f"or on square patches of them (cells of {cell_size} pixels by its other settings); "
            f"got {told}"
        )
    return channels, cell_size


def _load_network(source: str) -> Any:
    folder = find_network(source, (WAN,), "video autoencoder of Wan")
    wan_shape_of(read_part_config(folder), str(folder / CONFIG_FILE))
    return read_network(_module().AutoencoderKLWan, folder)


def _module() -> Any:
    """Return diffusers' module of the network, and of pixels into patches and back."""
    try:
        from diffusers.models.autoencoders import autoencoder_kl_wan
    except ImportError as error:
        raise ValueError(EXTRA) from error
    return autoencoder_kl_wan


def _latent_parts(frames: Tensor) -> list[Tensor]:
    """Cut frames [b t 3 h w] into those of each latent frame: 1, then 4 at a time."""
    num_latent_frames(frames.shape[1])
    later = frames[:, 1:]
    return [frames[:, :1], *(later.split(FRAMES_PER_LATENT, dim=1) if later.shape[1] else ())]


def _encoded(network: Any, frames: Tensor, memory: list[Any]) -> Tensor:
    """Return the mean [b c h w] of the latent frame of the next frames [b t 3 h w]."""
    pixels = rearrange(frames, "b t c h w -> b c t h w")
    if network.config.patch_size is not None:
        pixels = _module().patchify(pixels, network.config.patch_size)
    moments = network.quant_conv(network.encoder(pixels, feat_cache=memory, feat_idx=[0]))
    mean, _ = moments.chunk(2, dim=1)
    return mean[:, :, 0]


def _decoded(network: Any, raw: Tensor, memory: list[Any], is_first: bool) -> Tensor:
    """Return the frames [b t 3 h w] of the next latent frame [b c h w]."""
    frames = network.decoder(
        network.post_quant_conv(raw[:, :, None]),
        feat_cache=memory,
        feat_idx=[0],
        first_chunk=is_first,
    )
    if network.config.patch_size is not None:
        frames = _module().unpatchify(frames, network.config.patch_size)
    return rearrange(frames, "b c t h w -> b t c h w")


def _num_memories(network: nn.Module) -> int:
    """Count the convolutions that remember frames: each has a place in the network's memory."""
    return sum(type(module).__name__ == "WanCausalConv3d" for module in network.modules())
