"""What a network of a run minimises; and flow matching on clips, which trains from scratch.

Source: paper (training), and (teacher forcing) on Wan's noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor

from scd.data.clip import Batch, Conditions
from scd.models.base import Augmentation
from scd.models.flow import CLEAN_TIME, draw_times, interpolate, velocity_between
from scd.models.wan.timesteps import NUM_TIMES, time_table, training_weights

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
    """Strength eta of the noise on the context in training: paper, equation 7. It must be 0 for a
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
class TeacherForcingConfig:
    """Settings of the loss. Where the paper is silent, the defaults are those of Self-Forcing."""

    shift: float = 5.0
    """Timestep shift of the table of times towards noise; 1: none."""
    weighting: Literal["bell", "none"] = "bell"
    """How errors count: by exp(-2 (time - 0.5)^2), less its smallest value, of mean 1 over the
    table, so that pure noise counts nothing; or all alike."""
    num_draws: int = 1
    """Draws of (time, noise) per frame and step; one encoder pass serves them all."""
    history_time: float = 0.0
    """Largest time of noise on the clean history, drawn for each frame from the entries of the
    table up to it; the model is told. 0: the history is clean."""
    context_noise: float = 0.0
    """Strength eta of noise on the context (paper, equation 7); 0 for a dense model, which has no
    context. The paper does not say whether it was used with Wan."""
    condition_dropout: float = 0.1
    """Chance that a clip's text gives way to the embedded empty prompt, so that guidance has an
    unconditional branch."""

    def __post_init__(self) -> None:
        if self.shift <= 0 or self.num_draws < 1:
            raise ValueError(
                "shift must be positive and num_draws 1 or more, got "
                f"{self.shift} and {self.num_draws}"
            )
        if not 0 <= self.history_time <= 1 or not 0 <= self.condition_dropout < 1:
            raise ValueError(
                "history_time must lie in [0, 1] and condition_dropout in [0, 1), got "
                f"{self.history_time} and {self.condition_dropout}"
            )
        if self.context_noise < 0:
            raise ValueError(f"context_noise must be 0 or more, got {self.context_noise}")
        if self.history_time and not self.num_history_times:
            raise ValueError(
                f"history_time must be 0 or at least the table's smallest entry, got "
                f"{self.history_time}"
            )

    @property
    def num_history_times(self) -> int:
        """Entries of the table, its last ones, that are no larger than `history_time`."""
        # The table's formula turned round: time = shift u / (1 + (shift - 1) u).
        unbent = self.history_time / (self.shift - (self.shift - 1) * self.history_time)
        return int(unbent * NUM_TIMES + 1e-9)


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
