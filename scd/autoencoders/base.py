"""What every autoencoder offers, and the simplest one: pixels at zero mean and unit scale."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scd.autoencoders.config import PixelConfig
from scd.autoencoders.lapped import border_mix, lap
from scd.common.config import Precision
from scd.common.runtime import DTYPES

Network = TypeVar("Network", bound="NetworkAutoencoder")


class Autoencoder(ABC):
    """Between frames in [-1, 1] and latents of unit scale."""

    config: Any
    """Settings from which `build_autoencoder` makes it again."""

    def load(self) -> None:  # noqa: B027
        """Read the weights, if there are any, which else are read when they are first needed."""

    def computes(self) -> tuple[str, dict[str, Tensor]]:
        """Return what its results depend on besides the settings: some text, and its weights."""
        return "", {}

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return channels, rows and columns of a frame's latent (ValueError: no whole cells)."""

    @abstractmethod
    def encode(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t2 c h2 w2"]:
        """Turn frames in [-1, 1] into latents (ValueError: of another size or number)."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t2 3 h2 w2"]:
        """Turn latents into frames in [-1, 1]; values outside are clipped."""

    def carried(self, folder: Path, dtype: torch.dtype | None = None) -> Autoencoder:
        """Write what a world's folder must hold of it, and return it as it is from there.

        Args:
            folder: is there; nothing is written where the settings say all.
            dtype: of the weights; None: as they are.
        """
        return self

    def stream_decoder(self) -> StreamDecoder:
        """Return what decodes the latents of streams, one latent frame after another."""
        return FrameDecoder(self)


class StreamDecoder(ABC):
    """Latent frames of a batch of streams to frames of video, one after another.

    `next` once per latent frame, from the first one on; `reset` begins anew; `fork` copies the
    streams as they are, each `num` times in a row.
    """

    name: str
    """Of the decoder, for whoever reports a figure."""
    pictures_per_latent: int
    """Frames that a latent frame becomes; the first one always becomes one."""

    @abstractmethod
    def next(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t 3 h2 w2"]:
        """Return the frames in [-1, 1] of the next latent frame."""

    @abstractmethod
    def reset(self) -> None:
        """Forget the stream: the next latent frame is a first one."""

    @abstractmethod
    def fork(self, num: int = 1) -> StreamDecoder:
        """Return an independent copy, each stream `num` times in a row; the weights are shared."""

    def remembered(self) -> dict[str, Tensor]:
        """Return what it keeps of the streams, by name; without a past nothing."""
        return {}

    def recall(self, remembered: Mapping[str, Tensor], num_frames: int) -> None:  # noqa: B027
        """Go on from what another one remembered after so many latent frames."""


class FrameDecoder(StreamDecoder):
    """An autoencoder that knows no time: one frame per latent frame."""

    pictures_per_latent = 1

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder
        self.name = type(autoencoder).__name__

    def next(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 3 h2 w2"]:
        return self.autoencoder.decode(latent[:, None]).float()

    def reset(self) -> None:
        """Do nothing: there is no past."""

    def fork(self, num: int = 1) -> FrameDecoder:
        """Return the decoder itself: there is no past."""
        return self


class LaterDecoder(StreamDecoder):
    """Decodes nothing: keeps the latent frames of streams for whoever decodes them later, when the
    model has given its memory back."""

    def __init__(self, name: str, pictures_per_latent: int, size: tuple[int, int]) -> None:
        """Stand in for a decoder of that name, whose frames have `size` rows and columns."""
        self.name, self.pictures_per_latent, self.size = name, pictures_per_latent, size
        self.reset()

    def next(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 0 3 h2 w2"]:
        """Keep a latent frame and return no frames."""
        self.kept.append(latent)
        return latent.new_zeros(len(latent), 0, 3, *self.size)

    def reset(self) -> None:
        self.kept: list[Tensor] = []

    def fork(self, num: int = 1) -> LaterDecoder:
        twin = LaterDecoder(self.name, self.pictures_per_latent, self.size)
        twin.kept = [latent.repeat_interleave(num, 0) for latent in self.kept]
        return twin


class NetworkAutoencoder(Autoencoder):
    """An autoencoder that is a network of diffusers, read when it is first needed.

    So a world can be loaded, and its latents be streamed, where there are no weights. Latents are
    at unit scale, channel by channel; settings have `channels` and `cell_size`.
    """

    def __init__(self, config: Any, network: nn.Module | None = None) -> None:
        """Describe the autoencoder; diffusers' network may be at hand already."""
        self.config = config
        self._network: Any = None
        self._device, self._dtype = torch.device("cpu"), torch.float32
        if network is not None:
            self._take(network)

    def place(self: Network, device: torch.device | str, precision: Precision = "fp32") -> Network:
        """Choose where, and in which arithmetic, it runs; return itself."""
        self._device, self._dtype = torch.device(device), DTYPES[precision]
        if self._network is not None:
            self._take(self._network)
        return self

    @property
    def network(self) -> Any:
        """Diffusers' network.

        Raises:
            FileNotFoundError, ValueError: it is not where the settings say, or of another kind.
        """
        if self._network is None:
            self._take(self._read())
        return self._network

    def load(self) -> None:
        _ = self.network

    def release(self) -> None:
        """Give the weights back; they are read again when they are next needed."""
        self._network = None

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        size = self.config.cell_size
        return self.config.channels, *cells(height, width, size)

    def to_unit_scale(self, raw: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
        """Turn what the network makes into latents."""
        mean, std = self._scale()
        return (raw.float() - mean) / std

    def from_unit_scale(self, latents: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
        """Turn latents into what the network reads, on its device and in its arithmetic."""
        mean, std = self._scale()
        return (latents.to(self._device).float() * std + mean).to(self._dtype)

    def _scale(self) -> Float[Tensor, "2 c 1 1"]:
        return torch.tensor(self.statistics(), device=self._device)[..., None, None]

    def _take(self, network: nn.Module) -> None:
        found = self._shape_of(network)
        if found != (self.config.channels, self.config.cell_size):
            raise ValueError(
                f"the settings name latents of {self.config.channels} channels and cells of "
                f"{self.config.cell_size} pixels, this autoencoder's have {found[0]} and {found[1]}"
            )
        # Not diffusers' own `to`, which warns of layers in 32 bits although these have none.
        nn.Module.to(network, self._device, self._dtype)
        self._network = network.eval().requires_grad_(False)

    @abstractmethod
    def _read(self) -> nn.Module:
        """Read the network that the settings name."""

    @abstractmethod
    def _shape_of(self, network: Any) -> tuple[int, int]:
        """Return channels of a network's latent frame and pixels of a cell each way."""

    @abstractmethod
    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return mean and deviation of each channel of what the network makes."""


class PixelAutoencoder(Autoencoder):
    """Latents are the pixels themselves, standardised: for small frames. Those of patches that
    overlap are mixed across their borders."""

    def __init__(self, config: PixelConfig) -> None:
        self.config: PixelConfig = config
        self.mix = border_mix(config.lapped) if config.lapped else None

    @staticmethod
    def measure(batches: Iterable[Float[Tensor, "b t 3 h w"]]) -> PixelConfig:
        """Measure the mean and standard deviation of some frames (at least one batch)."""
        count, total, squares = 0, 0.0, 0.0
        for frames in batches:
            count += frames.numel()
            total += float(frames.double().sum())
            squares += float(frames.double().square().sum())
        if count == 0:
            raise ValueError("needed at least one batch of frames to measure, got none")
        mean = total / count
        return PixelConfig(mean=mean, std=math.sqrt(max(squares / count - mean**2, 1e-8)))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        if self.config.lapped:
            cells(height, width, self.config.lapped)
        return 3, height, width

    def encode(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t 3 h w"]:
        latents = (frames - self.config.mean) / self.config.std
        return latents if self.mix is None else lap(latents, self.mix)

    def decode(self, latents: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t 3 h w"]:
        if self.mix is not None:
            latents = lap(latents, self.mix, back=True)
        return (latents * self.config.std + self.config.mean).clamp(-1, 1)


def cells(height: int, width: int, size: int) -> tuple[int, int]:
    """Return rows and columns of cells of size x size pixels in a frame (ValueError: none fit)."""
    if height % size or width % size:
        raise ValueError(
            f"frames of {height}x{width} pixels cannot be cut into cells of {size}x{size}"
        )
    return height // size, width // size
