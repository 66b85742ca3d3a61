"""A discriminator of frames on the features of a diffuser, and the losses of both sides.

Source: Self-Forcing (heads on blocks of the critic); the heads are ours: one learned query
per block, which pools the tokens of a frame, and a small MLP.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from scd.data.clip import Conditions
from scd.models.base import Augmentation
from scd.models.build import Diffuser
from scd.models.separable import SeparableDiffuser
from scd.objectives.config import MatchConfig
from scd.objectives.denoise import Network
from scd.objectives.distribution_matching import Noised, Rolled, noised

DISTANCE = 0.05
"""Step of the finite differences of R1 and R2. Source: Self-Forcing (SiD, GAN)."""


class Head(nn.Module):
    """Tokens of a frame -> how real it looks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, 1)
        self.rise = nn.Linear(width, width)
        self.logit = nn.Linear(width, 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)

    def forward(self, tokens: Float[Tensor, "f n d"]) -> Float[Tensor, " f"]:
        """Return a logit per frame, 0 before training."""
        x = self.norm(tokens)
        weight = self.query(x).softmax(dim=1)
        pooled = (weight * x).sum(dim=1)
        return self.logit(functional.silu(self.rise(pooled)))[:, 0]


class Discriminator(nn.Module):
    """A diffuser with a head on some of the blocks that see the noisy frames.

    Its forward takes what the diffuser's takes and returns one logit per noisy frame.
    """

    def __init__(self, network: Diffuser) -> None:
        super().__init__()
        self.network = network
        blocks = network.denoising_blocks()
        last = len(blocks) - 1
        # The middle and the end, as the paper's 13, 21 and 29 of 30 blocks.
        self.places = sorted({last // 2, (3 * last) // 4, last})
        self.heads = nn.ModuleDict(
            {str(place): Head(network.config.block.width) for place in self.places}
        )
        self._features: dict[int, Tensor] = {}
        for place in self.places:
            blocks[place].register_forward_hook(self._keeper(place))

    def _keeper(self, place: int):
        def keep(_block: nn.Module, _inputs: object, output: Tensor) -> None:
            self._features[place] = output

        return keep

    def forward(
        self,
        history: Float[Tensor, "b t c h w"],
        noisy: Float[Tensor, "b r m c h w"],
        time: Float[Tensor, "b r m"],
        conditions: Conditions,
    ) -> Float[Tensor, "b r m"]:
        """Return how real each noisy frame looks after its history, the mean over the heads."""
        self.network(history, noisy, time, conditions)
        num_tokens = self.network.shape.num_tokens
        logits = torch.zeros(noisy.shape[:3], device=noisy.device)
        for place in self.places:
            tokens = self._noisy(self._features.pop(place), num_tokens)
            logits = logits + self._placed(self.heads[str(place)](tokens), logits.shape)
        return logits / len(self.places)

    def _noisy(self, features: Tensor, num_tokens: int) -> Tensor:
        """Return the tokens [f n d] of noisy frames; joined with context, they are the last."""
        if self.network.config.is_separable:
            return features.flatten(1, 2)[:, -num_tokens:]
        return features.flatten(0, 1)

    def _placed(self, logits: Tensor, shape: torch.Size) -> Tensor:
        b, r, m = shape
        if isinstance(self.network, SeparableDiffuser):
            return rearrange(logits, "(b m r) -> b r m", b=b, r=r)
        return rearrange(logits, "(b r m) -> b r m", b=b, r=r, m=m)


def student_gan_loss(
    discriminator: Network,
    rolled: Rolled,
    real: Rolled,
    config: MatchConfig,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Return the student's loss against a discriminator with frozen weights: of its own frames,
    with gradient, beside recorded frames of the same clips."""
    drawn = noised(rolled.frames, config, generator)
    fake = discriminator(rolled.history, drawn.noisy, drawn.time, rolled.conditions)
    truth = fake.detach()
    if config.relativistic:
        with torch.no_grad():
            noisy = _like(drawn, real.frames).noisy
            truth = discriminator(real.history, noisy, drawn.time, real.conditions)
    return adversarial_loss(truth, fake, config.relativistic)


def discriminator_gan_loss(
    discriminator: Network,
    rolled: Rolled,
    real: Rolled,
    config: MatchConfig,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Return the discriminator's loss on generated and recorded frames, in one pass over all."""
    drawn = noised(rolled.frames, config, generator)
    both = [_like(drawn, real.frames).noisy, drawn.noisy]
    histories, conditions = [real.history, rolled.history], [real.conditions, rolled.conditions]
    if config.roughness:
        move = DISTANCE * Augmentation(generator=generator).noise_like(drawn.noise)
        both = [*both, both[0] + move, both[1] + move]
        histories, conditions = histories * 2, conditions * 2
    steering = conditions[0]
    for more in conditions[1:]:
        steering = steering.concat(more)
    logits = discriminator(
        torch.cat(histories), torch.cat(both), drawn.time.repeat(len(both), 1, 1), steering
    ).chunk(len(both))
    loss = discriminator_loss(logits[0], logits[1], config.relativistic)
    if config.roughness:
        for moved, at in zip(logits[2:], logits[:2], strict=True):
            loss = loss + config.roughness * roughness(moved, at, DISTANCE)
    return loss


def discriminator_loss(
    real: Float[Tensor, "..."], fake: Float[Tensor, "..."], relativistic: bool = False
) -> Float[Tensor, ""]:
    """Return the loss of a discriminator from its logits of real and of generated frames.

    Args:
        real: above 0 means taken for real.
        fake: of generated frames, paired with `real` if relativistic.
        relativistic: only the difference of a pair counts, not each logit by itself.
    """
    if relativistic:
        return functional.softplus(fake - real).mean()
    return functional.softplus(fake).mean() + functional.softplus(-real).mean()


def adversarial_loss(
    real: Float[Tensor, "..."], fake: Float[Tensor, "..."], relativistic: bool = False
) -> Float[Tensor, ""]:
    """Return the loss of the student from the discriminator's logits; see `discriminator_loss`.

    `real` counts only if relativistic.
    """
    return functional.softplus(real - fake if relativistic else -fake).mean()


def roughness(
    moved: Float[Tensor, "..."], logits: Float[Tensor, "..."], distance: float
) -> Float[Tensor, ""]:
    """Estimate how fast a discriminator's logits change: R1 on real frames, R2 on generated ones.

    A finite difference in a random direction, so that no second derivative is needed.

    Args:
        moved: logits of the frames + distance * standard normal noise.
        logits: those of the frames themselves.
        distance: 0.05 in Self-Forcing.

    Returns:
        The mean square of the slope: of something linear, the square of its gradient's length.
    """
    return ((moved - logits) / distance).square().mean()


def _like(drawn: Noised, frames: Tensor) -> Noised:
    """Return other frames at the times and with the noise of a draw."""
    return replace(drawn, frames=frames[:, None].expand_as(drawn.noise))
