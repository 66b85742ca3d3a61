"""LPIPS on AlexNet: how far two pictures are apart for a network that learnt to see.

Two ways to feed it are in use, and their numbers differ: "signed" is the standard call, pixels in
[-1, 1]; "unit" gives it pixels in [0, 1] as if they were that, which comes out lower. Source: Zhang
et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", version 0.1.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scd.common.published_weights import read_state
from scd.evaluation.protocols import LPIPS_SMALLEST

InputRange = Literal["signed", "unit"]
"""What the network is given: pixels in [-1, 1], or in [0, 1] as if they were that."""

METRICS: dict[InputRange, str] = {"signed": "lpips", "unit": "lpips_unit"}
"""Name of the metric by what the network is given."""

LAYERS = (
    (0, 3, 64, 11, 4, 2),
    (3, 64, 192, 5, 1, 2),
    (6, 192, 384, 3, 1, 1),
    (8, 384, 256, 3, 1, 1),
    (10, 256, 256, 3, 1, 1),
)
"""Number in torchvision's `features`, channels in and out, kernel, stride, padding of each
convolution. A ReLU follows each, and what it gives is compared."""

POOLED_BEFORE = (3, 6)
"""Numbers of the convolutions before which 3 x 3 maxima are taken at every second place."""


SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and deviation of the colours of photographs in [-1, 1], as LPIPS takes them off."""

EPSILON = 1e-10
"""Keeps features that are all zero from a division by zero; the value of the published metric."""

NUM_AT_ONCE = 64
"""Pairs of frames that go through the network together, so that long clips fit into memory."""


class Lpips(nn.Module):
    """The five stages of AlexNet, and a weight for each of their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Conv2d(given, made, kernel, stride, padding)
            for _, given, made, kernel, stride, padding in LAYERS
        )
        self.heads = nn.ParameterList(torch.zeros(made) for _, _, made, *_ in LAYERS)
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(
        self,
        predicted: Float[Tensor, "*b 3 h w"],
        true: Float[Tensor, "*b 3 h w"],
        given: InputRange = "signed",
    ) -> Float[Tensor, "*b"]:
        """Return the distance, 0 or more, of each pair of frames of 31 x 31 pixels or more."""
        *batch, _, height, width = predicted.shape
        if min(height, width) < LPIPS_SMALLEST:
            raise ValueError(
                f"LPIPS needs frames of at least {LPIPS_SMALLEST}x{LPIPS_SMALLEST}, "
                f"got {height}x{width}"
            )
        sides = [
            frames.reshape(-1, 3, height, width).split(NUM_AT_ONCE) for frames in (predicted, true)
        ]
        found = [self.distances(one, other, given) for one, other in zip(*sides, strict=True)]
        return torch.cat(found).reshape(batch)

    def distances(self, predicted: Tensor, true: Tensor, given: InputRange) -> Tensor:
        """Return the distance of each pair of pictures [f 3 h w] at once; gradient flows."""
        pixels = torch.cat([predicted, true]).to(self.scale).float()
        if given == "unit":
            pixels = (pixels + 1) / 2
        features = (pixels - self.shift) / self.scale
        total = torch.zeros(len(predicted), device=pixels.device)
        for (number, *_), stage, head in zip(LAYERS, self.stages, self.heads, strict=True):
            if number in POOLED_BEFORE:
                features = F.max_pool2d(features, 3, 2)
            features = F.relu(stage(features))
            length = features.square().sum(1, keepdim=True).sqrt()
            one, other = (features / (length + EPSILON)).chunk(2)
            apart = torch.einsum("fchw,c->fhw", (one - other).square(), head)
            total = total + apart.mean((1, 2))
        return total


def load_lpips(alexnet: str, heads: str, device: torch.device | str = "cpu") -> Lpips:
    """Read the network from a state dict of torchvision's AlexNet and one of LPIPS's heads."""
    stages: dict[str, tuple[int, ...]] = {}
    for number, given, made, kernel, *_ in LAYERS:
        stages[f"features.{number}.weight"] = (made, given, kernel, kernel)
        stages[f"features.{number}.bias"] = (made,)
    named = {
        f"lin{index}.model.1.weight": (1, layer[2], 1, 1) for index, layer in enumerate(LAYERS)
    }
    convolutions, weights = read_state(alexnet, stages), read_state(heads, named)
    network = Lpips()
    state = {f"heads.{index}": weight.flatten() for index, weight in enumerate(weights.values())}
    for index, (number, *_) in enumerate(LAYERS):
        for part in ("weight", "bias"):
            state[f"stages.{index}.{part}"] = convolutions[f"features.{number}.{part}"]
    network.load_state_dict(state)
    return network.requires_grad_(False).eval().to(device)
