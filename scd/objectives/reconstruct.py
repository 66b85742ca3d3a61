"""What an autoencoder of pictures minimises: absolute and perceptual distance, then a judge too.

First pixels and a perceptual distance. Then, with the encoder frozen, also the loss against a
judge of patches (PatchGAN) by the hinge, weighted so that both pull equally hard at the decoder's
last layer. Source: paper, section 8; the adaptive weight: Esser et al., "Taming Transformers".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Distance = Callable[[Tensor, Tensor], Tensor]
"""From predicted and true pictures [f 3 h w] in [-1, 1] to a distance of each pair [f]."""

JUDGE_WIDTH = 64
"""Channels after the judge's first layer, doubled by each of the next three."""

JUDGE_SMALLEST = 24
"""Rows and columns that a picture needs for the judge to see a patch."""

LEAK = 0.2
"""Slope of the judge's activations below 0."""

MAX_WEIGHT = 1e4
"""Largest adaptive weight. Source: as that weight itself."""


class PatchJudge(nn.Module):
    """Pictures -> how real each patch looks; a patch is 70 x 70 pixels, less at the border."""

    def __init__(self, width: int = JUDGE_WIDTH) -> None:
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


def reconstruction_loss(
    made: Float[Tensor, "f 3 h w"],
    true: Float[Tensor, "f 3 h w"],
    distance: Distance,
    weight: float,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return absolute plus weighted perceptual distance, and both for the log.

    Args:
        made: what the autoencoder makes of `true`.
        true: pictures in [-1, 1].
        distance: the perceptual one.
        weight: of it.
    """
    pixels = (made - true).abs().mean()
    perceptual = distance(made, true).mean()
    return pixels + weight * perceptual, {"pixels": pixels, "perceptual": perceptual}


def deception_loss(
    judge: Callable[[Tensor], Tensor],
    made: Float[Tensor, "f 3 h w"],
    reconstruction: Float[Tensor, ""],
    last_layer: Tensor,
    weight: float,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return the loss of a decoder whose pictures a judge tells from recorded ones.

    Args:
        judge: of patches, with frozen weights.
        made: pictures, with gradient.
        reconstruction: the other loss of the same pictures.
        last_layer: weights of the decoder's last layer, at which the two are weighed.
        weight: of this loss where both pull equally hard.
    """
    fooled = -judge(made).mean()
    pull = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    push = torch.autograd.grad(fooled, last_layer, retain_graph=True)[0].norm()
    adaptive = (pull / (push + 1e-4)).clamp(0, MAX_WEIGHT).detach()
    return weight * adaptive * fooled, {"deception": fooled, "adaptive": adaptive}


def judgement_loss(
    judge: Callable[[Tensor], Tensor],
    made: Float[Tensor, "f 3 h w"],
    true: Float[Tensor, "f 3 h w"],
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return the judge's hinge loss: 1 if it says 0 of everything, 0 if it is sure and right."""
    of_true, of_made = judge(true), judge(made.detach())
    loss = (F.relu(1 - of_true).mean() + F.relu(1 + of_made).mean()) / 2
    return loss, {"judge": loss, "judge_true": of_true.mean(), "judge_made": of_made.mean()}


def last_layer_of(network: nn.Module) -> Tensor:
    """Return the weights of an AutoencoderDC's last layer."""
    parameters: Mapping[str, Tensor] = dict(network.named_parameters())
    for name in ("decoder.conv_out.weight", "decoder.conv_out.conv.weight"):
        if name in parameters:
            return parameters[name]
    raise AssertionError("no last layer")
