"""Few-step students whose own rollouts are to be distributed as a teacher's frames are.

The student generates clips from its own frames; teacher and critic then look at the noised
generated frames, each with the frames before it as clean history: the score of one frame given its
past, in one parallel pass. The critic learns what the student generates; where it and the teacher
disagree, the student is pushed. Source: Self-Forcing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from scd.common.runtime import finest
from scd.data.clip import Conditions
from scd.models.base import Augmentation
from scd.models.flow import clean_from_velocity, interpolate, velocity_between
from scd.objectives.config import MatchConfig
from scd.objectives.denoise import Network


@dataclass(frozen=True, kw_only=True)
class Rolled:
    """Clips that a student has generated, as teacher and critic see them."""

    history: Float[Tensor, "b t c h w"]
    """The last frames of the clips, given and generated, without gradient."""
    frames: Float[Tensor, "b m c h w"]
    """The scored ones among them, the last m, perhaps with gradient."""
    conditions: Conditions
    """Of the t frames."""

    @staticmethod
    def of(
        given: Float[Tensor, "b t2 c h w"],
        generated: Float[Tensor, "b t3 c h w"],
        conditions: Conditions,
        num_scored: int,
        window: int,
    ) -> Rolled:
        """Put given and generated frames together; only the last `window` of them count."""
        clip = torch.cat([given, generated.detach()], dim=1)
        num_frames = clip.shape[1]
        first = max(0, num_frames - window)
        return Rolled(
            history=clip[:, first:],
            frames=generated[:, -num_scored:],
            conditions=conditions.frames(first, num_frames),
        )


@dataclass(frozen=True, kw_only=True)
class Noised:
    """Frames at the times of their scores."""

    frames: Float[Tensor, "b r m c h w"]
    """Before noise."""
    noise: Float[Tensor, "b r m c h w"]
    time: Float[Tensor, "b r m"]

    @property
    def noisy(self) -> Float[Tensor, "b r m c h w"]:
        """Frames with their noise."""
        return interpolate(self.frames, self.noise, self.time)


def noised(
    frames: Float[Tensor, "b m c h w"], config: MatchConfig, generator: torch.Generator
) -> Noised:
    """Draw times and noise for frames that are to be scored."""
    repeated = frames[:, None].expand(-1, config.num_draws, *[-1] * 4)
    shape = repeated.shape[:3]
    time = draw_score_times(
        (*shape[:2], shape[2] if config.time_per == "frame" else 1),
        generator,
        config.score_shift,
        config.lowest_time,
        config.highest_time,
        frames.device,
    )
    noise = Augmentation(generator=generator).noise_like(repeated)
    return Noised(frames=repeated, noise=noise, time=time.expand(shape).to(frames.dtype))


def score_time(
    uniform: Float[Tensor, "..."], shift: float, lowest: float, highest: float
) -> Float[Tensor, "..."]:
    """Shift uniform numbers in [0, 1] towards noise (1: not at all, 5: Self-Forcing's), and keep
    them off the ends, where scores say nothing. Source: Self-Forcing (DMD)."""
    return (shift * uniform / (1 + (shift - 1) * uniform)).clamp(lowest, highest)


def draw_score_times(
    shape: Sequence[int],
    generator: torch.Generator,
    shift: float,
    lowest: float,
    highest: float,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "..."]:
    """Draw independent times at which frames are scored: `score_time` of a uniform draw."""
    uniform = torch.rand(*shape, generator=generator, device=generator.device).to(device)
    return score_time(uniform, shift, lowest, highest)


def mean_distance(
    generated: Float[Tensor, "b ..."], real: Float[Tensor, "b ..."]
) -> Float[Tensor, "b ..."]:
    """Return the mean absolute distance of each entry of the first axis, with all axes kept.

    The scale of the scores at its time: dividing by it makes all times pull about as hard.
    """
    axes = tuple(range(1, generated.ndim))
    return (generated - real).detach().abs().mean(axes, keepdim=True)


def dmd_gradient(
    generated: Float[Tensor, "b ..."],
    real: Float[Tensor, "b ..."],
    fake: Float[Tensor, "b ..."],
    normalise: bool = True,
) -> Float[Tensor, "b ..."]:
    """Return the direction away from the student's distribution towards the teacher's, negated:
    (fake - real) / mean |generated - real|; what is not finite becomes 0.

    Args:
        generated: frames of the student, before they were noised.
        real: the teacher's clean estimates of the noised frames (where the data is). With
            guidance, `flow.guide` of the two branches; Self-Forcing writes c + g (c - u), so its g
            is our scale - 1.
        fake: the critic's clean estimates of the same (where the student's frames are).
        normalise: divide by the teacher's mean distance, over all axes but the first.

    Source: Self-Forcing (DMD).
    """
    gradient = fake - real
    if normalise:
        gradient = gradient / mean_distance(generated, real)
    return torch.nan_to_num(gradient.detach(), nan=0.0, posinf=0.0, neginf=0.0)


def dmd_loss(
    generated: Float[Tensor, "b ..."],
    gradient: Float[Tensor, "b ..."],
    counted: Bool[Tensor, "b ..."] | None = None,
) -> Float[Tensor, ""]:
    """Return a loss whose gradient by `generated` is `gradient` / its number of entries (of those
    `counted`, if given).

    It is half the mean squared distance to generated - gradient, in float64 as in the reference,
    so that the difference of two near numbers keeps its digits.
    """
    frames = generated.to(finest(generated.device))
    target = (frames - gradient.to(frames)).detach()
    if counted is not None:
        frames, target = frames[counted], target[counted]
    return 0.5 * functional.mse_loss(frames, target)


def sid_loss(
    generated: Float[Tensor, "b ..."],
    real: Float[Tensor, "b ..."],
    fake: Float[Tensor, "b ..."],
    alpha: float = 1.0,
) -> Float[Tensor, ""]:
    """Return the loss of score identity distillation, normalised as DMD's gradient is.

    Gradient reaches `generated`, and the noised input of both estimates, the teacher's and the
    critic's; `alpha` weighs their squared difference. Source: Self-Forcing (SiD, GAN).
    """
    difference = real - fake
    product = difference * ((real - generated) - alpha * difference)
    return (product / mean_distance(generated, real)).mean(dtype=finest(product.device))


def score_loss(
    teacher: Network,
    critic: Network,
    rolled: Rolled,
    config: MatchConfig,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Return the student's loss by the scores of its frames: method "dmd" or "sid".

    Teacher (guided if need be) and critic, with frozen weights, say (history, noisy, time,
    conditions) -> velocity; the frames carry gradient.
    """
    drawn = noised(rolled.frames, config, generator)
    noisy, time = drawn.noisy, drawn.time
    with torch.set_grad_enabled(config.method == "sid"):
        real, fake = (
            clean_from_velocity(noisy, net(rolled.history, noisy, time, rolled.conditions), time)
            for net in (teacher, critic)
        )
    pattern = "(b r m) c h w" if config.time_per == "frame" else "(b r) m c h w"
    frames, real, fake = (
        rearrange(part, f"b r m c h w -> {pattern}") for part in (drawn.frames, real, fake)
    )
    if config.method == "sid":
        return sid_loss(frames, real, fake, config.alpha)
    return dmd_loss(frames, dmd_gradient(frames, real, fake))


def critic_loss(
    critic: Network, rolled: Rolled, config: MatchConfig, generator: torch.Generator
) -> Float[Tensor, ""]:
    """Return the flow-matching loss of the critic on frames of the student, unweighted.

    Source: Self-Forcing (critic).
    """
    drawn = noised(rolled.frames, config, generator)
    velocity = critic(rolled.history, drawn.noisy, drawn.time, rolled.conditions)
    return (velocity - velocity_between(drawn.frames, drawn.noise)).square().mean()
