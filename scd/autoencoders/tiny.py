"""Small decoders of Wan's latents: a fraction of the time of Wan's own, and a coarser picture.

Two kinds of weights are read. TAEW, of the TAESD family made for Wan (taew2_1.pth, or the same as
safetensors), knows time and turns a latent frame into four pictures. diffusers' AutoencoderTiny
with 16 channels of latents decodes every latent frame as a picture of its own, a quarter of the
frames. Both read latents at unit scale. Every figure that comes of one of them has to name it:
`name`.

Source: the layers and names of weights of madebyollin/taehv.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from scd.autoencoders.base import StreamDecoder
from scd.autoencoders.config import FRAMES_PER_LATENT
from scd.autoencoders.diffusers import load_network
from scd.common.config import Precision
from scd.common.runtime import DTYPES
from scd.common.weights import read_state_dict

WIDTHS = (256, 128, 64, 64)
"""Channels of TAEW's three stages and of its output."""

TIME_FACTORS = (1, 2, 2)
"""By how much each stage of TAEW multiplies the frames."""


class SoftClamp(nn.Module):
    """Squeezes latents smoothly into -3 .. 3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Remember(nn.Module):
    """Three convolutions over a frame and the one before it, as a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(
        self, frames: Float[Tensor, "b t c h w"], before: Float[Tensor, "b c h w"] | None
    ) -> Float[Tensor, "b t c h w"]:
        """Read each frame beside the one before it; `before` is the first one's, None: zeros."""
        first = frames[:, :1] * 0 if before is None else before[:, None]
        past = torch.cat([first, frames[:, :-1]], dim=1)
        both = torch.cat([frames, past], dim=2).flatten(0, 1)
        return torch.relu(frames + self.conv(both).unflatten(0, frames.shape[:2]))


class Grow(nn.Module):
    """Turns one frame into several."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(width, width * factor, 1, bias=False)

    def forward(self, frames: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t2 c h w"]:
        grown = self.conv(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return rearrange(grown, "b t (n c) h w -> b (t n) c h w", n=self.factor)


class TaewDecoder(nn.Module):
    """TAEW's decoder; its layers stand at the places that its files name."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            SoftClamp(),
            nn.Conv2d(channels, WIDTHS[0], 3, padding=1),
            nn.ReLU(),
        ]
        for width, after, factor in zip(WIDTHS[:-1], WIDTHS[1:], TIME_FACTORS, strict=True):
            layers += [Remember(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, factor)]
            layers += [nn.Conv2d(width, after, 3, padding=1, bias=False)]
        layers += [nn.ReLU(), nn.Conv2d(WIDTHS[-1], 3, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)

    def forward(
        self, latents: Float[Tensor, "b t c h w"], memory: dict[int, Tensor]
    ) -> Float[Tensor, "b t2 3 h2 w2"]:
        """Turn latent frames into four times as many frames in [-1, 1].

        The first three frames of a stream have no meaning. `memory` holds, by layer, the frame
        before; it is empty at first, and changed.
        """
        x = latents
        for place, layer in enumerate(self.decoder):
            if isinstance(layer, Remember):
                before, memory[place] = memory.get(place), x[:, -1]
                x = layer(x, before)
            elif isinstance(layer, Grow):
                x = layer(x)
            else:
                x = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return x.clamp(0, 1) * 2 - 1


class TaewStreamDecoder(StreamDecoder):
    """TAEW as a decoder of streams: one frame of the first latent frame, then four of each."""

    name = "TAEW (tiny)"
    pictures_per_latent = FRAMES_PER_LATENT

    def __init__(self, network: TaewDecoder) -> None:
        self.network = network.eval().requires_grad_(False)
        self.reset()

    def reset(self) -> None:
        self._memory: dict[int, Tensor] = {}

    def fork(self, num: int = 1) -> TaewStreamDecoder:
        twin = TaewStreamDecoder(self.network)
        twin._memory = {
            place: before.repeat_interleave(num, 0) for place, before in self._memory.items()
        }
        return twin

    def remembered(self) -> dict[str, Tensor]:
        return {str(place): before for place, before in self._memory.items()}

    def recall(self, remembered: Mapping[str, Tensor], num_frames: int) -> None:
        self._memory = {int(place): before for place, before in remembered.items()}

    @torch.no_grad()
    def next(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t 3 h2 w2"]:
        skipped = 0 if self._memory else FRAMES_PER_LATENT - 1
        weight = next(self.network.parameters())
        frames = self.network(latent[:, None].to(weight.device, weight.dtype), self._memory)
        return frames[:, skipped:].float()


class ImageStreamDecoder(StreamDecoder):
    """diffusers' AutoencoderTiny as a decoder of streams: one picture per latent frame."""

    name = "AutoencoderTiny (one picture per latent frame)"
    pictures_per_latent = 1

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def reset(self) -> None:
        """Do nothing: there is no past."""

    def fork(self, num: int = 1) -> ImageStreamDecoder:
        """Return the decoder itself: there is no past."""
        return self

    @torch.no_grad()
    def next(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t 3 h2 w2"]:
        weight = next(self.network.parameters())
        network: Any = self.network
        picture = network.decode(latent.to(weight.device, weight.dtype)).sample
        return picture.float().clamp(-1, 1)[:, None]


def open_tiny_decoder(
    path: str | os.PathLike[str],
    channels: int = 16,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
) -> StreamDecoder:
    """Open a small decoder: a file of TAEW's weights, or a folder of an AutoencoderTiny.

    Args:
        path: taew2_1.pth, the same as .safetensors, or a folder as diffusers writes it.
        channels: of a latent frame.
        device: where it runs.
        precision: of its arithmetic.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it holds something else, or a decoder of other latents.
    """
    path = Path(path)
    network: nn.Module
    if path.is_dir():
        network = _load_images(path, channels)
    elif path.is_file():
        network = _load_taew(path, channels)
    else:
        raise FileNotFoundError(f"there is no small decoder at {path}: neither file nor folder")
    nn.Module.to(network, torch.device(device), DTYPES[precision])
    if isinstance(network, TaewDecoder):
        return TaewStreamDecoder(network)
    return ImageStreamDecoder(network)


def _load_images(folder: Path, channels: int) -> nn.Module:
    _, network = load_network(folder, ("AutoencoderTiny",))
    if (found := network.config.latent_channels) != channels:
        raise ValueError(f"{folder} decodes latents of {found} channels, needed {channels}")
    return network


def _load_taew(path: Path, channels: int) -> TaewDecoder:
    state = read_state_dict(path)
    first = state.get("decoder.1.weight")
    if first is None or first.ndim != 4 or first.shape[1] != channels:
        found = "none" if first is None else list(first.shape)
        raise ValueError(
            f"{path}: needed a TAEW decoder of latents with {channels} channels "
            f"(decoder.1.weight of [{WIDTHS[0]}, {channels}, 3, 3]), got {found}"
        )
    network = TaewDecoder(channels)
    wanted = network.state_dict()
    given = {name: value for name, value in state.items() if name.startswith("decoder.")}
    wrong = [
        name for name in wanted if name not in given or given[name].shape != wanted[name].shape
    ]
    wrong += sorted(set(given) - set(wanted))
    wrong += [name for name, value in given.items() if not value.is_floating_point()]
    if wrong:
        raise ValueError(f"{path} is no TAEW of Wan2.1: {len(wrong)} weights differ: {wrong[:5]}")
    network.load_state_dict(given)
    return network
