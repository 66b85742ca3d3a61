"""Deep-compression networks of residual convolutions alone, without diffusers.

The small networks of `scd train-autoencoder` are among them. diffusers trains and writes them and
computes the same, which a test compares; but it is an optional package and takes seconds to import,
and who only plays a world should need neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

EPSILON = 1e-5
"""Added under the root of a norm."""


class ChannelNorm(nn.Module):
    """Root-mean-square norm of each place's channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "f c h w"]) -> Float[Tensor, "f c h w"]:
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + EPSILON).to(x.dtype)
        return x * scale * self.weight[:, None, None] + self.bias[:, None, None]


class Residual(nn.Module):
    """Two convolutions and a norm, added to what they were given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = ChannelNorm(width)

    def forward(self, x: Float[Tensor, "f c h w"]) -> Float[Tensor, "f c h w"]:
        return x + self.norm(self.conv2(functional.silu(self.conv1(x))))


class Down(nn.Module):
    """Half the rows and columns: pixels move into channels. Beside it their averages."""

    def __init__(self, width: int, after: int, shortcut: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, after // 4, 3, padding=1)
        self.group = width * 4 // after if shortcut else 0

    def forward(self, x: Float[Tensor, "f c h w"]) -> Float[Tensor, "f c2 h2 w2"]:
        made = functional.pixel_unshuffle(self.conv(x), 2)
        if not self.group:
            return made
        return made + functional.pixel_unshuffle(x, 2).unflatten(1, (-1, self.group)).mean(2)


class Up(nn.Module):
    """Twice the rows and columns: channels move into pixels. Beside it their copies."""

    def __init__(self, width: int, after: int, shortcut: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, after * 4, 3, padding=1)
        self.repeats = after * 4 // width if shortcut else 0

    def forward(self, x: Float[Tensor, "f c h w"]) -> Float[Tensor, "f c2 h2 w2"]:
        made = functional.pixel_shuffle(self.conv(x), 2)
        if not self.repeats:
            return made
        return made + functional.pixel_shuffle(x.repeat_interleave(self.repeats, 1), 2)


class Encoder(nn.Module):
    """Frames to latents; parts stand where diffusers' names of weights say."""

    def __init__(self, widths: list[int], layers: list[int], channels: int) -> None:
        super().__init__()
        self.conv_in = Down(3, widths[1], shortcut=False)
        self.down_blocks = nn.ModuleList([nn.Sequential()])
        for place in range(1, len(widths)):
            blocks: list[nn.Module] = [Residual(widths[place]) for _ in range(layers[place])]
            if place + 1 < len(widths):
                blocks.append(Down(widths[place], widths[place + 1]))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)
        self.group = widths[-1] // channels

    def forward(self, frames: Float[Tensor, "f 3 h w"]) -> Float[Tensor, "f c h2 w2"]:
        x = self.conv_in(frames)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(x) + x.unflatten(1, (-1, self.group)).mean(2)


class Decoder(nn.Module):
    """Latents to frames; parts stand where diffusers' names of weights say."""

    def __init__(self, widths: list[int], layers: list[int], channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.repeats = widths[-1] // channels
        self.up_blocks = nn.ModuleList([nn.Sequential()])
        for place in range(1, len(widths)):
            blocks: list[nn.Module] = [Residual(widths[place]) for _ in range(layers[place])]
            if place + 1 < len(widths):
                blocks.insert(0, Up(widths[place + 1], widths[place]))
            self.up_blocks.append(nn.Sequential(*blocks))
        self.norm_out = ChannelNorm(widths[1])
        self.conv_out = Up(widths[1], 3, shortcut=False)

    def forward(self, latents: Float[Tensor, "f c h w"]) -> Float[Tensor, "f 3 h2 w2"]:
        x = self.conv_in(latents) + latents.repeat_interleave(self.repeats, 1)
        for block in reversed(self.up_blocks):
            x = block(x)
        return self.conv_out(functional.relu(self.norm_out(x)))


class Encoded(NamedTuple):
    """Result of `encode`, under diffusers' name."""

    latent: Tensor


class Decoded(NamedTuple):
    """Result of `decode`, under diffusers' name."""

    sample: Tensor


class ResidualAutoencoder(nn.Module):
    """An AutoencoderDC whose blocks are all convolutions, with the calls that are used here."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Build the network of settings that `is_residual`."""
        super().__init__()
        self.config = dict(settings)
        channels = settings["latent_channels"]
        sides = [
            (settings[f"{side}_block_out_channels"], settings[f"{side}_layers_per_block"])
            for side in ("encoder", "decoder")
        ]
        self.encoder = Encoder(*sides[0], channels)
        self.decoder = Decoder(*sides[1], channels)

    @classmethod
    def from_config(cls, settings: Mapping[str, Any]) -> ResidualAutoencoder:
        """Build it as diffusers builds a network."""
        return cls(settings)

    def encode(self, frames: Float[Tensor, "f 3 h w"]) -> Encoded:
        return Encoded(self.encoder(frames))

    def decode(self, latents: Float[Tensor, "f c h w"]) -> Decoded:
        return Decoded(self.decoder(latents))


def is_residual(settings: Mapping[str, Any]) -> bool:
    """Tell whether settings of an AutoencoderDC are those of a network that is built here."""
    same = {
        "in_channels": 3,
        "downsample_block_type": "pixel_unshuffle",
        "upsample_block_type": "pixel_shuffle",
        "decoder_conv_act_fn": "relu",
        "encoder_out_shortcut": True,
        "decoder_in_shortcut": True,
    }
    if any(settings.get(name, value) != value for name, value in same.items()):
        return False
    named = {
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
    }
    if any(set(settings.get(name, ())) != {value} for name, value in named.items()):
        return False
    channels = settings.get("latent_channels")
    return all(
        _are_stages(settings.get(f"{side}_block_out_channels"),
                    settings.get(f"{side}_layers_per_block"), channels)
        for side in ("encoder", "decoder")
    )  # fmt: skip


def _are_stages(widths: Any, layers: Any, channels: Any) -> bool:
    """Tell whether stages begin with one that has no blocks, and have widths that divide."""
    if not (isinstance(widths, list) and isinstance(layers, list) and isinstance(channels, int)):
        return False
    if not 2 < len(widths) == len(layers) or layers[0] != 0 or min(layers[1:], default=0) < 1:
        return False
    if not all(isinstance(one, int) and one > 0 for one in [*widths, *layers[1:], channels]):
        return False
    steps = zip(widths[1:], widths[2:], strict=False)
    divide = all(after % 4 == 0 and 4 * width % after == 0 for width, after in steps)
    return divide and widths[1] % 4 == 0 and widths[-1] % channels == 0
