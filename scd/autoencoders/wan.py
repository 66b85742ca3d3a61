"""Wan2.1's causal video autoencoder, whole clips or one latent frame after another.

The first latent frame stands for one frame of video, each later one for four. Convolutions look
back in time only and remember the last frames they saw; a stream hands that memory on and gives
exactly the frames of the whole clip.

The network is diffusers' AutoencoderKLWan. Needs the extra `wan`: pip install -e ".[wan]".
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from scd.autoencoders.latents import LatentsConfig, cells, check_shape, per_channel
from scd.common.hub import find_part
from scd.common.runtime import DTYPES, Precision

FRAMES_PER_LATENT = 4
"""Frames of video that a latent frame stands for, but for the first, which stands for one."""

EXTRA = 'Wan needs diffusers and transformers: pip install -c constraints.txt -e ".[wan]"'
"""What to do where an optional package is missing."""


@dataclass(frozen=True, kw_only=True)
class WanAutoencoderConfig(LatentsConfig):
    """Where a Wan world's autoencoder and text encoder lie, and the shape of its latents."""

    frames_per_latent = FRAMES_PER_LATENT
    has_text_encoder = True

    source: str
    """Folder with vae/, text_encoder/ and tokenizer/ as diffusers writes them, or its name on the
    hub. Empty: it must be named whenever pixels or a text encoder are needed."""
    channels: int = 16
    """Channels of a latent frame."""
    cell_size: int = 8
    """Rows, and columns, of pixels that one latent cell stands for."""

    def __post_init__(self) -> None:
        check_shape(self.channels, self.cell_size)

    def placeless(self) -> WanAutoencoderConfig:
        """Return the settings without the folder: weights are compared where they are opened."""
        return replace(self, source="")


def num_latent_frames(num_frames: int) -> int:
    """Return how many latent frames stand for a number of frames of video.

    Raises:
        ValueError: it is not 1 and some whole fours.
    """
    whole, rest = divmod(num_frames - 1, FRAMES_PER_LATENT)
    if num_frames < 1 or rest:
        raise ValueError(f"Wan's autoencoder takes 1 frame and then 4 at a time, got {num_frames}")
    return 1 + whole


def num_pixel_frames(num_latents: int) -> int:
    """Return how many frames of video a number of latent frames stands for; 0 for 0."""
    return max(0, 1 + FRAMES_PER_LATENT * (num_latents - 1))


class WanAutoencoder:
    """Between frames of video and Wan's latents of unit scale, channel by channel.

    The weights are read when they are first needed: a world can be loaded, and its latents be
    streamed, where there are none.
    """

    def __init__(self, config: WanAutoencoderConfig, vae: nn.Module | None = None) -> None:
        """Describe the autoencoder.

        Args:
            config: where it lies.
            vae: diffusers' AutoencoderKLWan, where it is at hand already.
        """
        self.config = config
        self._vae: Any = None
        self._device, self._dtype = torch.device("cpu"), torch.float32
        if vae is not None:
            self._take(vae)

    def place(self, device: torch.device | str, precision: Precision = "fp32") -> WanAutoencoder:
        """Choose where, and in which arithmetic, it runs; return itself."""
        self._device, self._dtype = torch.device(device), DTYPES[precision]
        if self._vae is not None:
            self._take(self._vae)
        return self

    def load(self) -> None:
        """Read the weights now, not when they are first needed; raises as `vae` does."""
        _ = self.vae

    @property
    def vae(self) -> Any:
        """The network, diffusers' AutoencoderKLWan.

        Raises:
            FileNotFoundError, ValueError: it is not where the settings say, or of another kind.
        """
        if self._vae is None:
            if not self.config.source:
                raise FileNotFoundError(
                    "this world does not say where Wan's autoencoder lies: name the folder, as "
                    "diffusers writes it, that holds vae/"
                )
            self._take(_load_vae(self.config.source))
        return self._vae

    def _take(self, vae: nn.Module) -> None:
        settings: Any = vae.config
        down = 2 ** (len(settings.dim_mult) - 1)
        if settings.patch_size is not None or sum(settings.temperal_downsample) != 2:
            raise ValueError(
                "needed the autoencoder of Wan2.1, which shortens time by 4 and has no patches, "
                f"got patch_size={settings.patch_size} and "
                f"temperal_downsample={settings.temperal_downsample}"
            )
        if (settings.z_dim, down) != (self.config.channels, self.config.cell_size):
            raise ValueError(
                f"the world's latents have {self.config.channels} channels and cells of "
                f"{self.config.cell_size} pixels, this autoencoder's {settings.z_dim} and {down}"
            )
        # Not diffusers' own `to`, which warns of layers in 32 bits although this class has none.
        nn.Module.to(vae, self._device, self._dtype)
        self._vae = vae.eval().requires_grad_(False)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return channels, rows and columns of the latent of a height x width frame.

        Raises:
            ValueError: the frame cannot be cut into cells.
        """
        return self.config.channels, *cells(height, width, self.config.cell_size)

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t2 c h2 w2"]:
        """Turn 1 + 4n frames in [-1, 1] into 1 + n latent frames: the mean of their distribution.

        Raises:
            ValueError: another number of frames, or frames that cannot be cut into cells.
        """
        num_latent_frames(frames.shape[1])
        self.latent_shape(*frames.shape[-2:])
        # As a stream, so that it is the same: diffusers takes the last layer over all at once.
        stream = WanStreamEncoder(self)
        parts = [frames[:, :1], *frames[:, 1:].split(FRAMES_PER_LATENT, dim=1)]
        return torch.stack([stream.next(part) for part in parts if part.shape[1]], dim=1)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t2 3 h2 w2"]:
        """Turn 1 + n latent frames into 1 + 4n frames in [-1, 1]."""
        stream = WanStreamDecoder(self)
        return torch.cat([stream.next(latent) for latent in latents.unbind(1)], dim=1)

    def to_unit_scale(self, raw: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
        """Turn what the network makes into latents, by the statistics that come with it."""
        mean, std = self._statistics()
        return (raw.float() - mean) / std

    def from_unit_scale(self, latents: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
        """Turn latents into what the network reads, on its device and in its arithmetic."""
        mean, std = self._statistics()
        return (latents.to(self._device).float() * std + mean).to(self._dtype)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        settings: Any = self.vae.config
        return per_channel(settings.latents_mean, settings.latents_std, self._device)


class WanStreamDecoder:
    """Latent frames of a batch of streams to frames of video, exactly as `WanAutoencoder.decode`.

    `next` once per latent frame, from the first one on; `reset` begins anew; `fork` copies.
    """

    name = "AutoencoderKLWan"
    """Of the decoder, for whoever reports a figure."""
    pictures_per_latent = FRAMES_PER_LATENT
    """Frames that a latent frame becomes, but for the first, which becomes one."""

    def __init__(self, autoencoder: WanAutoencoder) -> None:
        self.autoencoder = autoencoder
        self._num_memories = _num_memories(autoencoder.vae.decoder)
        self.reset()

    def reset(self) -> None:
        """Forget the stream: the next latent frame is a first one."""
        self._memory: list[Any] = [None] * self._num_memories
        self._is_first = True

    def fork(self) -> WanStreamDecoder:
        """Return an independent copy of the stream as it is; the weights are shared."""
        twin = WanStreamDecoder(self.autoencoder)
        # The network puts new tensors into the list and never writes into an old one.
        twin._memory, twin._is_first = list(self._memory), self._is_first
        return twin

    @torch.no_grad()
    def next(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t 3 h2 w2"]:
        """Return the frames in [-1, 1] of the next latent frame: one of the first, then four."""
        vae = self.autoencoder.vae
        raw = self.autoencoder.from_unit_scale(latent)[:, :, None]
        frames = vae.decoder(
            vae.post_quant_conv(raw),
            feat_cache=self._memory,
            feat_idx=[0],
            first_chunk=self._is_first,
        )
        self._is_first = False
        return rearrange(frames.float().clamp(-1, 1), "b c t h w -> b t c h w")

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
        self._num_memories = _num_memories(autoencoder.vae.encoder)
        self.reset()

    def reset(self) -> None:
        """Forget the stream: the next frame is a first one."""
        self._memory: list[Any] = [None] * self._num_memories
        self._is_first = True

    @torch.no_grad()
    def next(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return the latent frame of the next frames in [-1, 1].

        Raises:
            ValueError: another number of frames than 1 at first and then 4, or frames that cannot
                be cut into cells.
        """
        needed = 1 if self._is_first else FRAMES_PER_LATENT
        if frames.shape[1] != needed:
            raise ValueError(
                f"a latent frame is made of 1 frame at first and then of {FRAMES_PER_LATENT}: "
                f"needed {needed}, got {frames.shape[1]}"
            )
        self.autoencoder.latent_shape(*frames.shape[-2:])
        vae = self.autoencoder.vae
        weight = next(vae.parameters())
        pixels = rearrange(frames, "b t c h w -> b c t h w").to(weight.device, weight.dtype)
        moments = vae.quant_conv(vae.encoder(pixels, feat_cache=self._memory, feat_idx=[0]))
        self._is_first = False
        mean, _ = moments.chunk(2, dim=1)
        return self.autoencoder.to_unit_scale(mean[:, :, 0])


def open_wan_autoencoder(
    source: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
) -> WanAutoencoder:
    """Open the autoencoder of a folder as diffusers writes it, of its vae/, or of the hub.

    Raises:
        FileNotFoundError: it is not there, or the hub cannot be reached.
        ValueError: another kind of model, or diffusers is not installed.
    """
    vae = _load_vae(str(source))
    settings: Any = vae.config
    config = WanAutoencoderConfig(
        source=str(source),
        channels=settings.z_dim,
        cell_size=2 ** (len(settings.dim_mult) - 1),
    )
    return WanAutoencoder(config, vae).place(device, precision)


def _load_vae(source: str) -> Any:
    folder = find_part(source, "vae", ("AutoencoderKLWan",), "video autoencoder of Wan")
    try:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    except ImportError as error:
        raise ValueError(EXTRA) from error
    return AutoencoderKLWan.from_pretrained(str(folder), local_files_only=True)


def _num_memories(network: nn.Module) -> int:
    """Count the convolutions that remember frames: each has a place in the network's memory."""
    return sum(type(module).__name__ == "WanCausalConv3d" for module in network.modules())
