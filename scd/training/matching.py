"""A student's rollouts matched to a teacher: the task, with its critic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scd.autoencoders.build import Autoencoder, build_autoencoder, latents_of
from scd.common.runtime import derive_seed
from scd.data.clip import Batch
from scd.models.build import Diffuser
from scd.models.flow import schedule
from scd.objectives.denoise import Network
from scd.objectives.discriminator import Discriminator, adversary_loss, judge_loss
from scd.objectives.distill import guided, spread
from scd.objectives.distribution_matching import MatchConfig, Rolled, critic_loss, score_loss
from scd.objectives.self_forcing import draw_exit, self_forced
from scd.training.config import TrainConfig
from scd.training.learner import Companion, Task
from scd.training.teacher import Autocast, Bidirectional, frozen, load_bidirectional, running


class Entrance(nn.Module):
    """A model whose forward is whatever is to be done with it, so that its other methods too run
    at the run's precision and have their gradients averaged over processes."""

    def __init__(self, model: Diffuser) -> None:
        super().__init__()
        self.model = model

    def forward(self, use: Callable[[Diffuser], Tensor]) -> Tensor:
        """Return what `use` makes of the model."""
        return use(self.model)


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Student, teacher and critic of a run, and the losses of those that move."""

    settings: MatchConfig
    """Of the losses."""
    model: Diffuser
    """The student, unwrapped."""
    critic: nn.Module
    """A diffuser, or a discriminator on one; unwrapped."""
    teacher: Network
    """Guided if need be, at the run's precision."""
    autoencoder: Autoencoder
    """Of all three."""
    times: list[float]
    """Of the student's steps."""
    num_frames: int
    """Frames of a clip, given and generated."""
    num_scored: int
    """Last frames of a clip that carry gradient and are scored."""
    window: int
    """Frames that teacher and critic look at, at most."""
    autocast: Autocast
    """Precision of the run."""

    def roll(
        self,
        enter: Callable[[Callable[[Diffuser], Tensor]], Tensor],
        batch: Batch,
        own: torch.Generator,
        shared: torch.Generator,
        num_with_gradient: int,
    ) -> tuple[Rolled, Rolled]:
        """Return clips as the student goes on with them, and as they were recorded, if they were:
        a prompt is a clip without frames."""
        clean = latents_of(self.autoencoder, batch)
        num_given = self.settings.num_given_frames
        given, recorded = clean[:, :num_given], clean[:, num_given:]
        exit_step = draw_exit(len(self.times), shared)

        def use(student: Diffuser) -> Tensor:
            return self_forced(
                student,
                given,
                batch.conditions,
                self.num_frames - num_given,
                self.times,
                exit_step,
                own,
                num_with_gradient,
            )

        rolled, real = (
            Rolled.of(given, frames, batch.conditions, self.num_scored, self.window)
            for frames in (enter(use), recorded)
        )
        return rolled, real

    def student_loss(
        self, entrance: nn.Module, batch: Batch, own: torch.Generator, shared: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Return what pushes the student, the critic's weights frozen."""
        rolled, real = self.roll(entrance, batch, own, shared, self.num_scored)
        critic = running(self.critic, self.autocast)
        with frozen(self.critic):
            if self.settings.method == "gan":
                loss = adversary_loss(critic, rolled, real, self.settings, own)
            else:
                loss = score_loss(self.teacher, critic, rolled, self.settings, own)
        found = spread(rolled.frames.detach(), real.frames)
        return loss, {"loss": loss.detach(), "spread": found}

    def critic_loss(
        self, critic: nn.Module, batch: Batch, own: torch.Generator, shared: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Return what the critic learns from a rollout without gradient."""

        @torch.no_grad()
        def enter(use: Callable[[Diffuser], Tensor]) -> Tensor:
            with self.autocast():
                return use(self.model).float()

        rolled, real = self.roll(enter, batch, own, shared, 0)
        if self.settings.method == "gan":
            loss = judge_loss(critic, rolled, real, self.settings, own)
        else:
            loss = critic_loss(critic, rolled, self.settings, own)
        return loss, {"critic_loss": loss.detach()}


def matching(
    config: TrainConfig,
    settings: MatchConfig,
    model: Diffuser,
    teacher: Diffuser | Bidirectional,
    autocast: Autocast,
) -> Task:
    """Return the matching of the student's rollouts, with its critic as a companion.

    Raises:
        ValueError: the rollout leaves nothing to score, or more than the teacher's window allows;
            or the student cannot be rolled out so.
    """
    whole = isinstance(teacher, Bidirectional)
    window = teacher.window if whole else teacher.config.cache.window
    if model.needs_first_frame and settings.num_given_frames == 0:
        raise ValueError("this model must be given a first frame: num_given_frames is 0")
    check_rollout(config)
    parts = Matching(
        settings=settings,
        model=model,
        critic=_bidirectional_critic(config, settings, model)
        if whole
        else _critic(config, settings, model, teacher),
        teacher=guided(running(teacher, autocast), settings.guidance),
        autoencoder=build_autoencoder(config.autoencoder, next(model.parameters()).device),
        times=schedule(config.sampling).tolist()[:-1],
        num_frames=config.num_frames,
        num_scored=settings.num_scored(config.num_frames, window),
        window=window,
        autocast=autocast,
    )
    companion = Companion(
        name="critic",
        network=parts.critic,
        loss=parts.critic_loss,
        optim=settings.critic,
        num_updates=settings.num_critic_updates,
        max_rise=settings.max_rise,
    )
    return Task(
        loss=parts.student_loss,
        companions=(companion,),
        entrance=Entrance,
        min_spread=settings.min_spread,
    )


def check_rollout(config: TrainConfig) -> None:
    """Refuse rollouts that a Wan student cannot do (ValueError); its settings tell."""
    model = config.model
    size = model.frames_per_block
    if size != 1:
        raise ValueError(
            f"rollouts with gradient go frame by frame: frames_per_block must be 1, got {size}"
        )
    window = model.cache.window
    recomputes = model.recomputes_streams and config.gradient_checkpointing
    if recomputes and config.num_frames > window:
        raise ValueError(
            f"a rollout of {config.num_frames} frames leaves the student's window of {window}, and "
            "what has left it cannot be recomputed: lengthen model.cache.window, or set "
            "gradient_checkpointing off"
        )


def _bidirectional_critic(
    config: TrainConfig, settings: MatchConfig, model: Diffuser
) -> Bidirectional:
    """Return a critic that sees whole clips, with its first weights, which move."""
    path, device = settings.critic_model or settings.teacher, next(model.parameters()).device
    critic = load_bidirectional(config, path, device, torch.float32).requires_grad_(True)
    critic.model.gradient_checkpointing = config.gradient_checkpointing and settings.method == "dmd"
    return critic


def _critic(
    config: TrainConfig, settings: MatchConfig, model: Diffuser, teacher: Diffuser
) -> nn.Module:
    """Return the critic with its first weights, which move."""
    start = teacher if settings.critic_start == "teacher" else model
    critic = copy.deepcopy(start).requires_grad_(True)
    # Where the student's gradient passes through the critic, blocks that are recomputed in the
    # backward pass would find their weights no longer frozen.
    critic.gradient_checkpointing = config.gradient_checkpointing and settings.method == "dmd"
    if settings.method != "gan":
        return critic
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "initial weights of the discriminator"))
        return Discriminator(critic)
