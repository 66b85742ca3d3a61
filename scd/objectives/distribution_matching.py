"""Few-step students whose own rollouts are to be distributed as a teacher's frames are.

The student generates clips from its own frames; teacher and critic then look at the noised
generated frames, each with the frames before it as clean history: the score of one frame given its
past, in one parallel pass. The critic learns what the student generates; where it and the teacher
disagree, the student is pushed. Source: Self-Forcing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from scd.common.config import added, at_least
from scd.data.clip import Conditions
from scd.models.base import Augmentation
from scd.models.flow import clean_from_velocity, interpolate, velocity_between
from scd.objectives.denoise import Network
from scd.optim.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """Settings of the matching of distributions."""

    teacher: str = ""
    """World, run or step folder of the teacher; its latents and conditions are the student's."""
    view: Literal["causal", "bidirectional"] = added("causal")
    """What teacher and critic see when they look at a frame: the clean frames before it; or all
    scored frames of the clip, as noisy as it is, as the published Wan does. Of dense Wan models
    only, with time_per "clip"."""
    critic_model: str = added("")
    """View "bidirectional": world of a dense Wan model, or folder of diffusers, that the critic
    begins as; empty: the teacher's. A smaller one saves memory."""
    method: Literal["dmd", "sid", "gan"] = "dmd"
    """How the student is pushed: by the difference of the scores, a constant (distribution
    matching); by score identity, with gradient through both networks; or by a discriminator on the
    critic's features."""
    guidance: float = 1.0
    """Strength with which the teacher's clean estimate is pushed away from that with hidden
    conditions; 1: none. Self-Forcing's 3 counts from the conditional one: it is 4 here."""
    num_given_frames: int = 4
    """Frames of each clip that are given; the others are generated. 0: from nothing."""
    num_scored_frames: int = 0
    """Last generated frames that carry gradient and are scored. 0: all."""
    num_draws: int = 2
    """Draws of (time, noise) per scored frame; one encoder pass serves them all."""
    score_shift: float = 5.0
    """Timestep shift of the uniform times of the scores towards noise; 1: none."""
    lowest_time: float = 0.02
    """Smallest time of a score."""
    highest_time: float = 0.98
    """Largest time of a score."""
    time_per: Literal["frame", "clip"] = "frame"
    """Whether each frame has its own time, and is normalised by itself, or all frames of a clip
    together as in Self-Forcing."""
    critic: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=2e-5, decoder_lr_ratio=1.0, betas=(0.0, 0.999), warmup_steps=0, clip_norm=10.0
        )
    )
    """How the critic's weights move."""
    num_critic_updates: int = 5
    """Updates of the critic before each of the student, each on a rollout of its own."""
    critic_start: Literal["teacher", "student"] = "teacher"
    """Whose weights the critic starts from, and whose model it is."""
    max_rise: float = 10.0
    """Stop if the critic's loss is more than this times that of its first update, and worse than
    knowing nothing. 0: never."""
    min_spread: float = 0.2
    """Stop if what the student generates varies less than this times as much as the data."""
    alpha: float = 1.0
    """Method "sid": weight of the squared difference of the scores. 1 elsewhere."""
    relativistic: bool = False
    """Method "gan": only the difference of a real and a generated frame's logits counts."""
    roughness: float = 0.0
    """Method "gan": weight of the penalty on logits that change fast, around real and around
    generated frames (R1 and R2). 0: none."""

    def __post_init__(self) -> None:
        if not 0 < self.lowest_time < self.highest_time < 1 or self.score_shift <= 0:
            raise ValueError(
                "times of scores must rise from lowest_time to highest_time inside (0, 1) and "
                f"score_shift be above 0, got {self.lowest_time}, {self.highest_time} and "
                f"{self.score_shift}"
            )
        at_least(
            1,
            num_draws=self.num_draws,
            num_critic_updates=self.num_critic_updates,
            guidance=self.guidance,
        )
        at_least(
            0,
            num_given_frames=self.num_given_frames,
            num_scored_frames=self.num_scored_frames,
            max_rise=self.max_rise,
            min_spread=self.min_spread,
            roughness=self.roughness,
        )
        if self.view == "bidirectional":
            found = (self.time_per, self.critic_start, self.num_given_frames)
            if found != ("clip", "teacher", 0) or self.method == "gan":
                raise ValueError(
                    "view='bidirectional' needs time_per='clip', critic_start='teacher', "
                    "num_given_frames=0 and method 'dmd' or 'sid', got "
                    f"{', '.join(map(repr, found))} and {self.method!r}"
                )
        elif self.critic_model:
            raise ValueError("critic_model has no effect on view='causal'")
        if self.method == "gan" and self.guidance != 1:
            raise ValueError(f"guidance={self.guidance} has no effect on method='gan'")
        if self.method != "sid" and self.alpha != 1:
            raise ValueError(f"alpha={self.alpha} has no effect on method={self.method!r}")
        if self.method != "gan" and (self.relativistic or self.roughness):
            raise ValueError(f"relativistic, roughness have no effect on method={self.method!r}")

    @property
    def needs_clips(self) -> bool:
        """Whether it learns from recorded frames, not from prompts alone."""
        return self.method == "gan" or self.num_given_frames > 0

    def num_scored(self, num_frames: int, window: int) -> int:
        """Return how many frames of a clip, given and generated, are scored by teacher and critic
        that were trained on `window` frames; ValueError if none is generated or more than that are
        scored."""
        num_generated = num_frames - self.num_given_frames
        num_scored = self.num_scored_frames or num_generated
        if num_generated < 1 or num_scored > num_generated:
            raise ValueError(
                f"clips of {num_frames} frames, {self.num_given_frames} of them given, leave "
                f"{num_generated} to generate, of which {num_scored} are to be scored"
            )
        # What is scored must not look like the beginning of a clip where it is none.
        num_before = int(num_scored < num_frames and self.view == "causal")
        if num_scored + num_before > window:
            raise ValueError(
                f"{num_scored} scored frames and what they follow are more than the {window} "
                "frames that the teacher was trained on: set num_scored_frames lower"
            )
        return num_scored


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

    Gradient reaches `generated`, and the noised input of both estimates, the teacher's and the
    critic's; `alpha` weighs their squared difference. Source: Self-Forcing (SiD, GAN).
    """
    difference = real - fake
    product = difference * ((real - generated) - alpha * difference)
    return (product / mean_distance(generated, real)).double().mean()


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
