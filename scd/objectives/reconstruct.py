"""What an autoencoder of pictures minimises: absolute and perceptual distance, then a GAN's loss.

First pixels and a perceptual distance. Then, with the encoder frozen, also the hinge loss against a
discriminator of patches (PatchGAN), weighted so that both pull equally hard at the decoder's last
layer. Source: FAR; the adaptive weight: Esser et al., "Taming Transformers". The decoder may also
learn then how neighbouring pixels differ, and what to make of latents that are not exact: a world's
never are.

Where no weights of LPIPS are at hand, the perceptual distance is that of pictures in a normalised
Laplacian pyramid. A picture is split into bands of ever coarser detail; each value of a band is
divided by the amplitude around it, as the eye judges contrast by its surroundings; the distance is
the root mean square of what differs, averaged over bands. Source: Laparra et al., "Perceptual image
quality assessment using a normalized Laplacian pyramid" (2016); its filters are fitted to eyes,
those here are one small bell, and every colour is a channel of its own. It is no LPIPS: it knows
edges and contrast and nothing of textures or objects, and its numbers compare with nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scd.autoencoders.trained import decode_clips, encode_clips, last_layer_of
from scd.data.clip import Batch
from scd.objectives.denoise import Logs, Objective
from scd.objectives.distill import frozen

Distance = Callable[[Tensor, Tensor], Tensor]
"""From predicted and true pictures [f 3 h w] in [-1, 1] to a distance of each pair [f]."""

DISCRIMINATOR_WIDTH = 64
"""Channels after the discriminator's first layer, doubled by each of the next three."""

SMALLEST_PICTURE = 24
"""Rows and columns that a picture needs for the discriminator to see a patch."""

LEAK = 0.2
"""Slope of the discriminator's activations below 0."""

MAX_WEIGHT = 1e4
"""Largest adaptive weight. Source: as that weight itself."""

BELL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
"""Weights of the blur, each way. Source: Burt and Adelson, the Laplacian pyramid."""

SMALLEST = 8
"""Rows and columns down to which a picture is halved."""

MAX_BANDS = 5
"""Bands of detail at most, the coarsest rest not counted."""

SURROUNDINGS = 0.1
"""Added to the amplitude around a value, pixels in [-1, 1]: differences in what is flat stay
small."""

EPSILON = 1e-6
"""Under the root, whose slope at 0 is infinite."""


class PatchDiscriminator(nn.Module):
    """Pictures -> how real each patch looks; a patch is 70 x 70 pixels, less at the border."""

    def __init__(self, width: int = DISCRIMINATOR_WIDTH) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(LEAK)]
        for factor, stride in ((1, 2), (2, 2), (4, 1)):
            layers += [
                nn.Conv2d(factor * width, 2 * factor * width, 4, stride, 1, bias=False),
                nn.BatchNorm2d(2 * factor * width),
                nn.LeakyReLU(LEAK),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, pictures: Float[Tensor, "f 3 h w"]) -> Float[Tensor, "f h2 w2"]:
        """Return a logit per patch, above 0 for real."""
        return self.layers(pictures)[:, 0]


@dataclass(kw_only=True)
class Reconstruct(Objective):
    """Of a network: the distances, and in the second part what the decoder learns alone."""

    distance: Distance
    perceptual_weight: float
    adversarial_weight: float
    """Of the discriminator's verdict, in the second part; 0: it is not asked."""
    edge_weight: float
    """Of the distance of differences between neighbouring pixels, in the second part."""
    border_weight: float
    """Of those differences that lie across a border of cells, over the others' weight."""
    cell_size: int
    """Rows, and columns, of pixels of a cell."""
    latent_noise: float
    """On latents, over the deviation of each channel, in the second part."""
    discriminator: PatchDiscriminator
    autocast: Callable[..., AbstractContextManager[None]]
    """Makes a context in which the network runs at the run's precision."""
    decoder_alone: bool = False
    """Whether the second part has begun, in which the encoder stays as it is."""
    made: Tensor | None = None
    """What the network made of the last batch."""

    def loss(
        self, model: Any, batch: Batch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Logs]:
        """Return the loss on frames of clips."""
        true = batch.frames.flatten(0, 1)
        with self.autocast():
            latents = self._latents(model, batch.frames, generator)
            made = decode_clips(model, latents).flatten(0, 1).float()
        self.made = made.detach()
        loss, logs = reconstruction_loss(made, true, self.distance, self.perceptual_weight)
        if self.decoder_alone and self.edge_weight:
            edges = edge_distance(made, true, self.cell_size, self.border_weight)
            loss, logs = loss + self.edge_weight * edges, logs | {"edges": edges}
        if self.decoder_alone and self.adversarial_weight:
            with frozen(self.discriminator):
                adversarial, found = adversarial_loss(
                    self.discriminator, made, loss, last_layer_of(model), self.adversarial_weight
                )
            loss, logs = loss + adversarial, logs | found
        return loss, {"loss": loss.detach()} | {name: one.detach() for name, one in logs.items()}

    def _latents(self, model: Any, frames: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latents of clips; in the second part no gradient reaches them, and there is
        noise on them."""
        with torch.set_grad_enabled(not self.decoder_alone):
            latents = encode_clips(model, frames)
            if self.decoder_alone and self.latent_noise:
                spread = latents.float().std((0, 1, 3, 4), keepdim=True)
                noise = torch.randn(latents.shape, generator=generator, device=latents.device)
                latents = latents + (self.latent_noise * spread * noise).to(latents.dtype)
        return latents


@dataclass(frozen=True, kw_only=True)
class Discriminate(Objective):
    """Of the discriminator: to tell what the network made from what was recorded."""

    reconstruct: Reconstruct

    def loss(
        self, model: Any, batch: Batch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Logs]:
        """Return the loss on the batch that the network has learnt from just now."""
        assert self.reconstruct.made is not None
        return discriminator_loss(model, self.reconstruct.made, batch.frames.flatten(0, 1))


def reconstruction_loss(
    made: Float[Tensor, "f 3 h w"],
    true: Float[Tensor, "f 3 h w"],
    distance: Distance,
    weight: float,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return absolute plus weighted perceptual distance of pictures in [-1, 1], and both for the
    log."""
    pixels = (made - true).abs().mean()
    perceptual = distance(made, true).mean()
    return pixels + weight * perceptual, {"pixels": pixels, "perceptual": perceptual}


def edge_distance(
    made: Float[Tensor, "f 3 h w"],
    true: Float[Tensor, "f 3 h w"],
    cell_size: int = 1,
    border_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Return by how much the differences of neighbouring pixels, across and down, are off.

    Those across a border of cells count `border_weight` times: they are few, and seen as a grid.
    """
    found = []
    for dim in (-1, -2):
        apart = (made - true).diff(dim=dim).abs().movedim(dim, -1)
        weights = torch.ones(apart.shape[-1], device=apart.device)
        weights[cell_size - 1 :: cell_size] = border_weight
        found.append((apart * weights).mean())
    return torch.stack(found).mean()


def adversarial_loss(
    discriminator: Callable[[Tensor], Tensor],
    made: Float[Tensor, "f 3 h w"],
    reconstruction: Float[Tensor, ""],
    last_layer: Tensor,
    weight: float,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return the loss of a decoder whose pictures a discriminator, with frozen weights, tells from
    recorded ones. It is weighed against `reconstruction`, the other loss of the same pictures, at
    the decoder's last layer: `weight` where both pull equally hard."""
    adversarial = -discriminator(made).mean()
    pull = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    push = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    adaptive = (pull / (push + 1e-4)).clamp(0, MAX_WEIGHT).detach()
    return weight * adaptive * adversarial, {"adversarial": adversarial, "adaptive": adaptive}


def discriminator_loss(
    discriminator: Callable[[Tensor], Tensor],
    made: Float[Tensor, "f 3 h w"],
    true: Float[Tensor, "f 3 h w"],
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return the hinge loss: 1 of a discriminator that says 0 of everything, 0 of one that is sure
    and right."""
    of_true, of_made = discriminator(true), discriminator(made.detach())
    loss = (F.relu(1 - of_true).mean() + F.relu(1 + of_made).mean()) / 2
    return loss, {
        "discriminator": loss.detach(),
        "discriminator_true": of_true.detach().mean(),
        "discriminator_made": of_made.detach().mean(),
    }


def pyramid_distance(
    predicted: Float[Tensor, "f 3 h w"], true: Float[Tensor, "f 3 h w"]
) -> Float[Tensor, " f"]:
    """Return the distance of each pair of pictures in [-1, 1], 0 (up to 0.001) or more."""
    bands = [_normalised(band) for band in _bands(torch.cat([predicted.float(), true.float()]))]
    apart = [(one - other).square().mean((1, 2, 3)) for one, other in (b.chunk(2) for b in bands)]
    return torch.stack([(each + EPSILON).sqrt() for each in apart]).mean(0)


def _bands(pictures: Float[Tensor, "f 3 h w"]) -> list[Tensor]:
    """Split pictures into detail, from the finest, and the coarse rest; their sum is the whole."""
    found: list[Tensor] = []
    while min(pictures.shape[-2:]) >= 2 * SMALLEST and len(found) < MAX_BANDS:
        coarse = _blurred(pictures)[..., ::2, ::2]
        size = (pictures.shape[-2], pictures.shape[-1])
        again = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        found.append(pictures - again)
        pictures = coarse
    return [*found, pictures]


def _normalised(band: Float[Tensor, "f 3 h w"]) -> Float[Tensor, "f 3 h w"]:
    return band / (SURROUNDINGS + _blurred(band.abs()))


def _blurred(pictures: Float[Tensor, "f c h w"]) -> Float[Tensor, "f c h w"]:
    channels = pictures.shape[1]
    bell = torch.tensor(BELL, device=pictures.device, dtype=pictures.dtype)
    padded = F.pad(pictures, (2, 2, 2, 2), mode="reflect")
    across = F.conv2d(padded, bell.expand(channels, 1, 1, 5), groups=channels)
    return F.conv2d(across, bell[:, None].expand(channels, 1, 5, 1), groups=channels)
