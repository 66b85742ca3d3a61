"""What a network of a run minimises; and flow matching on clips, which trains from scratch.

Source: paper (training), and (teacher forcing) on Wan's noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor

from scd.data.clip import Batch, Conditions
from scd.models.base import Augmentation
from scd.models.flow import CLEAN_TIME, draw_times, interpolate, velocity_between
from scd.models.wan.timesteps import time_table, training_weights
from scd.objectives.config import DenoiseConfig, TeacherForcingConfig

Network = Callable[..., Tensor]
"""A model, also when a trainer has wrapped it: (clean, noisy, time, conditions, augment) to the
velocity of the noisy frames, as in `scd.models.separable.SeparableDiffuser.forward`."""

Logs = Mapping[str, Tensor | float]
"""Numbers of a loss for the log."""


class Objective:
    """What a network minimises, with all that it needs for it besides the network."""

    def share(self, generator: torch.Generator) -> None:
        """Draw what all processes must agree on in the next call of `loss`, from a generator that
        is the same on all of them: nothing."""

    def loss(
        self, model: Network, batch: Batch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Logs]:
        """Return what to minimise, and numbers for the log.

        Args:
            model: the network, or a trainer's wrapper of it.
            batch: clips of latents.
            generator: source of this process's draws, the model's augmentations included.

        Raises:
            ValueError: clips that are too short or cannot be cut as the model needs them.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Denoise(Objective):
    """Teacher-forced flow matching: the mean over draws and clips of the mean squared error of the
    velocity over the denoised frames of a clip."""

    config: DenoiseConfig
    needs_first_frame: bool = False
    """Whether the model cannot denoise a first frame, which is then only given."""

    def loss(
        self, model: Network, batch: Batch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Logs]:
        """Return the loss of clips of latents."""
        config, clean, conditions = self.config, batch.frames, batch.conditions
        num_frames = clean.shape[1]
        available = num_frames - self.needs_first_frame
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
        time = draw_times(
            target.shape[:3], generator, config.time_mean, config.time_std, clean.device
        )
        noise = augment.noise_like(target)
        noisy = interpolate(target, noise, time)
        if config.history == "clean":
            history = noisy_history(clean, config.history_noise, augment)
            velocity = model(history, noisy, time, conditions, augment)
            given = torch.zeros_like(time, dtype=torch.bool)
        else:
            given = torch.rand(time.shape, generator=generator, device=generator.device)
            given = (given < config.clean_fraction).to(clean.device)
            if self.needs_first_frame:
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

    Source: paper (objective).
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


@dataclass(frozen=True, kw_only=True)
class TeacherForcing(Objective):
    """Flow matching on Wan's noise levels, for a model that was pretrained on them.

    Times come from Wan's table and errors are weighed by a bell around its middle. What the encoder
    of a separable model reads, clean history and the frame to come at high noise, is the model's
    own. The loss is the mean over draws, frames and clips of the squared error of the velocity
    times the weight of its time; the mean without weights is logged besides.
    """

    config: TeacherForcingConfig
    frames_per_block: int = 1
    """Frames that are denoised together and share their time."""

    def loss(
        self, model: Network, batch: Batch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Logs]:
        """Return the loss of clips of latents with texts."""
        config, clean = self.config, batch.frames
        (batch_size, num_frames), block_size = clean.shape[:2], self.frames_per_block
        if num_frames % block_size:
            raise ValueError(f"needed whole blocks of {block_size} frames, got {num_frames}")
        augment = Augmentation(
            generator=generator,
            condition_dropout=config.condition_dropout,
            context_noise=config.context_noise,
        )
        table = time_table(config.shift).to(clean.device)
        target = clean[:, None].expand(-1, config.num_draws, -1, -1, -1, -1)
        blocks = (batch_size, config.num_draws, num_frames // block_size)
        drawn = _drawn(table, blocks, generator)
        time = repeat(drawn, "b r blocks -> b r (blocks size)", size=block_size)
        noise = augment.noise_like(target)
        history, given = clean, {}
        if config.history_time > 0:
            least = table[-config.num_history_times :]
            given = {"clean_time": _drawn(least, clean.shape[:2], generator)}
            history = interpolate(clean, augment.noise_like(clean), given["clean_time"])
        noisy = interpolate(target, noise, time)
        velocity = model(history, noisy, time, batch.conditions, augment, **given)
        difference = velocity.float() - velocity_between(target, noise).float()
        errors = difference.square().mean(dim=(-3, -2, -1))
        plain = errors.mean()
        loss = plain
        if config.weighting == "bell":
            loss = (errors * training_weights(time, table).to(errors)).mean()
        return loss, {"loss": loss.detach(), "plain_loss": plain.detach()}


def _drawn(
    table: Float[Tensor, " times"], shape: Sequence[int], generator: torch.Generator
) -> Float[Tensor, "..."]:
    """Draw entries of a table, in float32."""
    places = torch.randint(len(table), tuple(shape), generator=generator, device=generator.device)
    return table[places.to(table.device)].float()
