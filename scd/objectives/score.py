"""Losses that pull what a student generates towards what a teacher would: pure functions.

A noised frame of the student has two clean estimates: the teacher's (`real`: where the data is) and
the critic's (`fake`: where the student's own frames are). Their difference is the direction in
which the student's distribution must move. Source: paper, section 7.2 to 7.4 (DMD, SiD, GAN).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def score_time(
    uniform: Float[Tensor, "..."], shift: float, lowest: float, highest: float
) -> Float[Tensor, "..."]:
    """Bend uniform numbers towards noise and keep them off the ends, where scores say nothing.

    Args:
        uniform: in [0, 1].
        shift: of the bend; 1 leaves them uniform, 5 is Self-Forcing's.
        lowest: smallest time, above 0.
        highest: largest time, below 1.

    Source: paper, section 7.2.
    """
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
    """Return the direction away from the student's distribution towards the teacher's, negated.

    Args:
        generated: frames of the student, before they were noised.
        real: the teacher's clean estimates of the noised frames. With guidance, `flow.guide` of
            the two branches; Self-Forcing writes c + g (c - u), so its g is our scale - 1.
        fake: the critic's clean estimates of the same.
        normalise: divide by the teacher's mean distance, over all axes but the first.

    Returns:
        (fake - real) / mean |generated - real|; what is not finite becomes 0. Source: paper,
        section 7.2.
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
    """Return a loss whose gradient by `generated` is `gradient` / its number of entries.

    Args:
        generated: frames of the student, with gradient.
        gradient: of `dmd_gradient`.
        counted: entries that count; None: all.

    Returns:
        Half the mean squared distance to generated - gradient, in float64 as in the reference, so
        that the difference of two near numbers keeps its digits.
    """
    frames = generated.double()
    target = (frames - gradient.double()).detach()
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

    Args:
        generated: frames of the student, with gradient.
        real: the teacher's clean estimates, with gradient to their noised input.
        fake: the critic's clean estimates, likewise.
        alpha: weight of the squared difference of the two.

    Source: paper, section 7.4.
    """
    difference = real - fake
    product = difference * ((real - generated) - alpha * difference)
    return (product / mean_distance(generated, real)).double().mean()


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
        The mean square of the slope: of a linear judge, the square of its gradient's length.
    """
    return ((moved - logits) / distance).square().mean()
