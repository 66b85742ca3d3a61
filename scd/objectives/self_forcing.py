"""A student's rollouts on its own frames, and their matching to a teacher.

Each frame is denoised as in streaming: from noise, estimate and fresh noise in turns, with the
memory of the clean frames before. But the loop is left at one drawn step, whose estimate is the
frame; only that step, and the encoder pass that made the frame's context, carry gradient. Source:
Self-Forcing (rollout).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scd.data.clip import Batch, Conditions
from scd.models.build import Diffuser
from scd.models.flow import clean_from_velocity
from scd.objectives.config import MatchConfig
from scd.objectives.denoise import Logs, Network, Objective
from scd.objectives.discriminator import discriminator_gan_loss, student_gan_loss
from scd.objectives.distill import Autocast, frozen, running, spread
from scd.objectives.distribution_matching import Rolled, critic_loss, score_loss


class DDPWrapper(nn.Module):
    """A model whose forward is whatever is to be done with it, so that what wraps it for several
    processes and for the run's precision also holds for its other methods."""

    def __init__(self, model: Diffuser) -> None:
        super().__init__()
        self.model = model

    def forward(self, use: Callable[[Diffuser], Tensor]) -> Tensor:
        """Return what `use` makes of the model."""
        return use(self.model)


@dataclass(kw_only=True)
class Matching(Objective):
    """What student and critic share: the student's rollouts, and who looks at them."""

    config: MatchConfig
    student: Diffuser
    """Unwrapped."""
    critic: nn.Module
    """A diffuser, or a discriminator on one; unwrapped."""
    teacher: Network
    """Guided if need be, at the run's precision."""
    times: list[float]
    """Of the student's steps."""
    first_times: list[float]
    """Of its first frame, or block, where it begins from nothing."""
    num_frames: int
    """Frames of a clip, given and generated."""
    num_scored: int
    """Last frames of a clip that carry gradient and are scored."""
    window: int
    """Frames that teacher and critic look at, at most."""
    autocast: Autocast
    exit_step: int = 0
    """Index of the time at which the frames of the next rollout are finished."""
    first_exit: int = 0
    """Likewise of its first frame, among the times of that one."""

    def share(self, generator: torch.Generator) -> None:
        """Draw the steps at which all processes leave the loop."""
        self.exit_step = self.first_exit = draw_exit(len(self.times), generator)
        if self.first_times != self.times:
            self.first_exit = draw_exit(len(self.first_times), generator)

    def roll(
        self,
        wrapper: Callable[[Callable[[Diffuser], Tensor]], Tensor],
        batch: Batch,
        generator: torch.Generator,
        num_with_gradient: int,
    ) -> tuple[Rolled, Rolled]:
        """Return clips as the student goes on with them, and as they were recorded, if they were:
        a prompt is a clip without frames."""
        num_given = self.config.num_given_frames
        given, recorded = batch.frames[:, :num_given], batch.frames[:, num_given:]

        def use(student: Diffuser) -> Tensor:
            return self_forced(
                student,
                given,
                batch.conditions,
                self.num_frames - num_given,
                self.times,
                self.exit_step,
                generator,
                num_with_gradient,
                self.first_times[: self.first_exit + 1],
            )

        rolled, real = (
            Rolled.of(given, frames, batch.conditions, self.num_scored, self.window)
            for frames in (wrapper(use), recorded)
        )
        return rolled, real


class StudentMatching(Matching):
    """What pushes the student, the critic's weights frozen."""

    def loss(
        self, model: Network, batch: Batch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Logs]:
        """Return the loss of a rollout; the model is a DDPWrapper of the student."""
        rolled, real = self.roll(model, batch, generator, self.num_scored)
        critic = running(self.critic, self.autocast)
        with frozen(self.critic):
            if self.config.method == "gan":
                loss = student_gan_loss(critic, rolled, real, self.config, generator)
            else:
                loss = score_loss(self.teacher, critic, rolled, self.config, generator)
        found = spread(rolled.frames.detach(), real.frames)
        return loss, {"loss": loss.detach(), "spread": found}


class CriticMatching(Matching):
    """What the critic learns from rollouts without gradient."""

    def loss(
        self, model: Network, batch: Batch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Logs]:
        """Return the loss on a rollout; the model is the critic."""

        @torch.no_grad()
        def wrapper(use: Callable[[Diffuser], Tensor]) -> Tensor:
            with self.autocast():
                return use(self.student).float()

        rolled, real = self.roll(wrapper, batch, generator, 0)
        if self.config.method == "gan":
            loss = discriminator_gan_loss(model, rolled, real, self.config, generator)
        else:
            loss = critic_loss(model, rolled, self.config, generator)
        return loss, {"critic_loss": loss.detach()}


def draw_exit(num_steps: int, generator: torch.Generator) -> int:
    """Draw the step at which all frames of a rollout leave the loop, in 0 .. num_steps - 1."""
    return int(torch.randint(num_steps, (), generator=generator, device=generator.device))


def self_forced(
    model: Diffuser,
    given: Float[Tensor, "b t c h w"],
    conditions: Conditions,
    num_generated: int,
    times: Sequence[float],
    exit_step: int,
    generator: torch.Generator,
    num_with_gradient: int | None = None,
    first_times: Sequence[float] = (),
) -> Float[Tensor, "b t2 c h w"]:
    """Roll a student out after given frames.

    Args:
        model: student; its own window holds for the memory, whatever the length of the rollout.
        given: clean first frames, 0 or more; whole blocks, where it denoises several together.
        conditions: of all frames, given and generated.
        num_generated: frames to generate, 1 or more; whole blocks likewise.
        times: of the student's steps, descending, all above 0.
        exit_step: index of the time at which each frame is finished.
        generator: of all noise.
        num_with_gradient: how many of the last frames carry gradient; None: all, 0: none. A block
            carries it if any of its frames does.
        first_times: of the steps of the first frame or block, up to the one at which it is
            finished, where nothing is given; empty: as of the others.

    Returns:
        The generated frames. Nothing of a frame's gradient reaches the frames before.
    """
    num_given, size = given.shape[1], model.config.frames_per_block
    if num_with_gradient is None:
        num_with_gradient = num_generated
    first_with_gradient = num_given + num_generated - num_with_gradient
    shape = (given.shape[0], *([size] if size > 1 else []), *given.shape[2:])

    def noise() -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=generator.device)
        return drawn.to(given.device, given.dtype)

    with torch.no_grad():
        past = conditions.frames(0, num_given)
        state: Any = model.begin(given if num_given else None, past, given.shape[0])
    generated = []
    for index in range(num_given, num_given + num_generated, size):
        now = conditions.frames(index, index + size)
        carries = torch.is_grad_enabled() and index + size > first_with_gradient
        if carries and index <= first_with_gradient:
            _forget_copies()
        steps = first_times if first_times and index == 0 else times[: exit_step + 1]
        noisy = noise()
        with torch.set_grad_enabled(carries):
            context: Any = _context(model, state, now, noisy, noise)
        clean = noisy
        for step, moment in enumerate(steps):
            exits = step == len(steps) - 1
            if carries and exits and step > 0:
                _forget_copies()
            with torch.set_grad_enabled(carries and exits):
                time = noisy.new_full(shape[:1], moment)
                velocity = model.velocity(context, noisy, time)
                clean = clean_from_velocity(noisy, velocity, time.view(-1, *[1] * (size > 1)))
            if not exits:
                noisy = (1 - steps[step + 1]) * clean + steps[step + 1] * noise()
        with torch.no_grad():
            model.observe(state, clean.detach(), now)
        generated.append(clean if size > 1 else clean[:, None])
    return torch.cat(generated, dim=1)


def _context(
    model: Diffuser,
    state: Any,
    now: Conditions,
    start: Tensor,
    noise: Callable[[], Tensor],
) -> Any:
    """Return the context of a frame, of a model whose encoder may read noise."""
    if model.encoder_noise != "none":
        return model.context(state, now, start if model.encoder_noise == "same" else noise())
    return model.context(state, now)


def _forget_copies() -> None:
    """Drop autocast's copies of weights: those made without gradient must not be used with it."""
    torch.clear_autocast_cache()
