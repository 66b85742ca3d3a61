"""Teacher-forced flow matching, the loss that trains every model of this package from scratch.

Source: paper, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from scd.data.clip import Conditions
from scd.models.base import Augmentation
from scd.models.flow import CLEAN_TIME, draw_times, interpolate, velocity_between

Network = Callable[..., Tensor]
"""A model, also when a trainer has wrapped it: (clean, noisy, time, conditions, augment) to the
velocity of the noisy frames, as in `scd.models.separable.SeparableDiffuser.forward`."""


@dataclass(frozen=True, kw_only=True)
class DenoiseConfig:
    """Settings of the denoising objective."""

    history: Literal["clean", "noisy"] = "clean"
    """What the model sees of earlier frames: the clean frames (teacher forcing, as in the paper),
    or the noisy frames themselves, some of them clean (the release's default for the separable
    model; FAR's training of the dense one)."""
    clean_fraction: float = 0.0
    """Share of frames that are given clean among the noisy ones and are left out of the loss, with
    history "noisy"; 0.1 in the release. The first frame of a model that must be given one is
    always among them."""
    num_draws: int = 2
    """Draws of (time, noise) per frame and step; one encoder pass serves them all: paper, section
    2.4."""
    num_target_frames: int = 0
    """Frames of each clip that are denoised, the last ones. 0: all that have a context."""
    time_mean: float = 0.0
    """Mean of the logit of time; 0 in the paper, above 0 gives more noise."""
    time_std: float = 1.0
    """Standard deviation of the logit of time."""
    context_noise: float = 0.05
    """Strength eta of the noise on the context in training: paper, section 2.3. It must be 0 for a
    dense model, which has no context."""
    history_noise: float = 0.0
    """Largest deviation of noise on the clean history in training, drawn anew for each frame from
    0 to this (ours; 0 in the paper). Against drift: a stream reads its own imperfect frames."""
    condition_dropout: float = 0.1
    """Chance that an action or label is hidden, so that guidance has an unconditional branch."""

    def __post_init__(self) -> None:
        if self.num_draws < 1 or self.num_target_frames < 0:
            raise ValueError(
                "num_draws must be 1 or more and num_target_frames 0 or more, got "
                f"{self.num_draws} and {self.num_target_frames}"
            )
        for name in ("clean_fraction", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if min(self.context_noise, self.history_noise) < 0 or self.time_std <= 0:
            raise ValueError(
                "context_noise and history_noise must not be negative and time_std must be "
                f"positive, got {self.context_noise}, {self.history_noise} and {self.time_std}"
            )
        if self.history == "clean" and self.clean_fraction > 0:
            raise ValueError("clean_fraction has no effect on history='clean'")
        if self.history == "noisy" and self.history_noise > 0:
            raise ValueError("history_noise has no effect on history='noisy'")


def denoise(
    model: Network,
    clean: Float[Tensor, "b t c h w"],
    conditions: Conditions,
    config: DenoiseConfig,
    generator: torch.Generator,
    needs_first_frame: bool = False,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Compute the flow-matching loss of some clips.

    Args:
        model: network, or a trainer's wrapper of it.
        clean: latent frames.
        conditions: of the same frames.
        config: settings.
        generator: source of all draws, the model's augmentations included.
        needs_first_frame: the model cannot denoise a first frame, which is then only given.

    Returns:
        The mean over draws and clips of the mean squared error of the velocity over the denoised
        frames of a clip; and what to log.

    Raises:
        ValueError: clips too short for the frames to denoise.
    """
    num_frames = clean.shape[1]
    available = num_frames - needs_first_frame
    num_targets = config.num_target_frames or available
    if num_targets > available or num_targets < 1:
        raise ValueError(f"needed clips of more than {num_targets} frames, got {num_frames}")
    augment = Augmentation(
        generator=generator,
        condition_dropout=config.condition_dropout,
        context_noise=config.context_noise,
    )
    frames = clean if config.history == "noisy" else clean[:, -num_targets:]
    target = frames[:, None].expand(-1, config.num_draws, -1, -1, -1, -1)
    time = draw_times(target.shape[:3], generator, config.time_mean, config.time_std, clean.device)
    noise = augment.noise_like(target)
    noisy = interpolate(target, noise, time)
    if config.history == "clean":
        history = noisy_history(clean, config.history_noise, augment)
        velocity = model(history, noisy, time, conditions, augment)
        given = torch.zeros_like(time, dtype=torch.bool)
    else:
        given = torch.rand(time.shape, generator=generator, device=generator.device)
        given = (given < config.clean_fraction).to(clean.device)
        if needs_first_frame:
            given[:, :, 0] = True
        noisy = torch.where(given[..., None, None, None], target, noisy)
        time = time.masked_fill(given, CLEAN_TIME)
        velocity = model(None, noisy, time, conditions, augment)
    loss = velocity_loss(
        velocity[:, :, -num_targets:],
        velocity_between(target, noise)[:, :, -num_targets:],
        given[:, :, -num_targets:],
    )
    return loss, {"loss": loss.detach()}


def noisy_history(
    clean: Float[Tensor, "b t c h w"], strength: float, augment: Augmentation
) -> Float[Tensor, "b t c h w"]:
    """Add noise to a clean history, of a deviation that is drawn for each frame from 0 to this."""
    if strength == 0:
        return clean
    generator = augment.generator
    amount = torch.rand(clean.shape[:2], generator=generator, device=generator.device)
    amount = strength * amount.to(clean.device)[..., None, None, None]
    return clean + amount * augment.noise_like(clean)


def velocity_loss(
    velocity: Float[Tensor, "b r m c h w"],
    target: Float[Tensor, "b r m c h w"],
    given: Bool[Tensor, "b r m"],
) -> Float[Tensor, ""]:
    """Average the squared error over a frame, the frames of a clip that were not given, all clips.

    Source: paper, section 2.1.
    """
    errors = (velocity.float() - target.float()).square().mean(dim=(-3, -2, -1))
    counted = (~given).float()
    # A clip whose frames were all given has no error to average: it counts as 0.
    per_clip = (errors * counted).sum(-1) / (counted.sum(-1) + 1e-9)
    return per_clip.mean()


@torch.no_grad()
def validation_loss(
    model: Network,
    clean: Float[Tensor, "b t c h w"],
    conditions: Conditions,
    times: Sequence[float],
    seed: int,
    needs_first_frame: bool = False,
) -> dict[str, float]:
    """Measure the velocity loss at chosen times, with clean history and the same noise each call.

    Returns:
        The loss by time, as "loss_at_0.5", and their mean as "loss".
    """
    generator = torch.Generator(clean.device).manual_seed(seed)
    target = clean[:, None, int(needs_first_frame) :]
    losses = {}
    for value in times:
        noise = torch.randn(target.shape, generator=generator, device=clean.device)
        time = torch.full(target.shape[:3], value, device=clean.device)
        velocity = model(clean, interpolate(target, noise, time), time, conditions)
        given = torch.zeros_like(time, dtype=torch.bool)
        loss = velocity_loss(velocity, velocity_between(target, noise), given)
        losses[f"loss_at_{value:g}"] = float(loss)
    losses["loss"] = sum(losses.values()) / len(losses)
    return losses
