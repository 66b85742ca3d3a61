"""Teacher forcing on Wan's noise levels: the first stage of a model that was pretrained on them.

Times come from Wan's table and errors are weighed by a bell around its middle. What the encoder of
a separable model reads, clean history and the frame to come at high noise, is the model's own.
Source: paper, section 6.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from scd.data.clip import Conditions
from scd.models.base import Augmentation
from scd.models.flow import interpolate, velocity_between
from scd.models.wan.timesteps import NUM_TIMES, time_table, training_weights
from scd.objectives.denoise import Network


@dataclass(frozen=True, kw_only=True)
class TeacherForcingConfig:
    """Settings of the loss. Where the paper is silent, the defaults are those of Self-Forcing."""

    shift: float = 5.0
    """Bend of the table of times towards noise; 1: none."""
    weighting: Literal["bell", "none"] = "bell"
    """How errors count: by exp(-2 (time - 0.5)^2), less its smallest value, of mean 1 over the
    table, so that pure noise counts nothing; or all alike."""
    num_draws: int = 1
    """Draws of (time, noise) per frame and step; one encoder pass serves them all."""
    history_time: float = 0.0
    """Largest time of noise on the clean history, drawn for each frame from the entries of the
    table up to it; the model is told. 0: the history is clean."""
    context_noise: float = 0.0
    """Strength eta of noise on the context (paper, section 2.3); 0 for a dense model, which has no
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


def teacher_forced_loss(
    model: Network,
    clean: Float[Tensor, "b t c h w"],
    conditions: Conditions,
    config: TeacherForcingConfig,
    generator: torch.Generator,
    frames_per_block: int = 1,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Compute the weighted flow-matching loss of all frames of some clips.

    Args:
        model: a Wan model, or a trainer's wrapper of it.
        clean: latent frames.
        conditions: texts of the clips.
        config: settings.
        generator: source of all draws, the model's augmentations included.
        frames_per_block: frames that are denoised together and share their time.

    Returns:
        The mean over draws, frames and clips of the squared error of the velocity times the weight
        of its time; and what to log: it, and the mean without weights.

    Raises:
        ValueError: clips that are no whole blocks.
    """
    batch, num_frames = clean.shape[:2]
    if num_frames % frames_per_block:
        raise ValueError(f"needed whole blocks of {frames_per_block} frames, got {num_frames}")
    augment = Augmentation(
        generator=generator,
        condition_dropout=config.condition_dropout,
        context_noise=config.context_noise,
    )
    table = time_table(config.shift).to(clean.device)
    target = clean[:, None].expand(-1, config.num_draws, -1, -1, -1, -1)
    blocks = (batch, config.num_draws, num_frames // frames_per_block)
    drawn = _drawn(table, blocks, generator)
    time = repeat(drawn, "b r blocks -> b r (blocks size)", size=frames_per_block)
    noise = augment.noise_like(target)
    history, history_time = clean, None
    if config.history_time > 0:
        least = table[-config.num_history_times :]
        history_time = _drawn(least, clean.shape[:2], generator)
        history = interpolate(clean, augment.noise_like(clean), history_time)
    given = {} if history_time is None else {"clean_time": history_time}
    velocity = model(history, interpolate(target, noise, time), time, conditions, augment, **given)
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
