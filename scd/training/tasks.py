"""Settings of an objective -> what a run minimises, with the networks that this takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call

from scd.autoencoders.build import Autoencoder, build_autoencoder, latents_of
from scd.data.clip import Batch, Conditions
from scd.models.build import Diffuser, build
from scd.models.flow import schedule
from scd.objectives.denoise import DenoiseConfig, denoise
from scd.objectives.distill import (
    ConsistencyConfig,
    RegressionConfig,
    consistency_loss,
    guided_path,
    regression_loss,
)
from scd.objectives.distribution_matching import MatchConfig
from scd.objectives.teacher_forcing import TeacherForcingConfig, teacher_forced_loss
from scd.optim.optim import EMA
from scd.training.config import Objective, TrainConfig
from scd.training.learner import Loss, Task, alone
from scd.training.matching import matching
from scd.training.teacher import Autocast, load_bidirectional, load_teacher, path_of, running


def build_task(config: TrainConfig, model: Diffuser, ema: EMA, accelerator: Accelerator) -> Task:
    """Return what a run minimises.

    Args:
        config: the run.
        model: its model, on its device.
        ema: the model's averaged weights.
        accelerator: device and precision.

    Raises:
        FileNotFoundError: there is no teacher.
        ValueError: the teacher works on other latents or conditions than the model, or has no
            conditions to be guided by.
    """
    objective = config.objective
    if isinstance(objective, DenoiseConfig):
        return alone(denoising(config, accelerator.device))
    if isinstance(objective, TeacherForcingConfig):
        return alone(forcing(config, objective, accelerator.device))
    if isinstance(objective, RegressionConfig):
        return alone(regressing(config, objective, accelerator.device))
    spec = config.model.conditions
    if objective.guidance > 1 and not spec.is_steered:
        raise ValueError("guidance by conditions needs a teacher with actions, labels or text")
    if isinstance(objective, MatchConfig) and objective.view == "bidirectional":
        # It stays as it is, and products are made in 16 bits either way.
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        whole = load_bidirectional(config, objective.teacher, accelerator.device, dtype)
        return matching(config, objective, model, whole, lambda: accelerator.autocast())
    teacher = load_teacher(config, objective.teacher, accelerator.device)
    if isinstance(objective, MatchConfig):
        return matching(config, objective, model, teacher, lambda: accelerator.autocast())
    return Task(
        loss=following(config, objective, model, ema, teacher, lambda: accelerator.autocast()),
        min_spread=objective.min_spread,
    )


def denoising(config: TrainConfig, device: torch.device | str = "cpu") -> Objective:
    """Return the objective of `config.objective`: denoising of encoded frames."""
    objective = config.objective
    assert isinstance(objective, DenoiseConfig)
    autoencoder, needs_first_frame = _frames_of(config, device)

    def loss(
        model: nn.Module, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        clean = latents_of(autoencoder, batch)
        return denoise(model, clean, batch.conditions, objective, generator, needs_first_frame)

    return loss


def forcing(
    config: TrainConfig, objective: TeacherForcingConfig, device: torch.device | str = "cpu"
) -> Objective:
    """Return teacher forcing of a Wan model on encoded frames."""
    if not config.model.takes_text:
        raise ValueError("teacher forcing on Wan's noise levels is for Wan models: see denoise")
    autoencoder = build_autoencoder(config.autoencoder, device)
    size = config.model.frames_per_block

    def loss(
        model: nn.Module, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        clean = latents_of(autoencoder, batch)
        return teacher_forced_loss(model, clean, batch.conditions, objective, generator, size)

    return loss


def regressing(
    config: TrainConfig, objective: RegressionConfig, device: torch.device | str = "cpu"
) -> Objective:
    """Return the regression of encoded frames at the times of the run's own schedule."""
    autoencoder, needs_first_frame = _frames_of(config, device)
    times = schedule(config.sampling).tolist()[:-1]

    def loss(
        model: nn.Module, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        clean = latents_of(autoencoder, batch)
        return regression_loss(
            model, clean, batch.conditions, times, objective, generator, needs_first_frame
        )

    return loss


def following(
    config: TrainConfig,
    objective: ConsistencyConfig,
    model: Diffuser,
    ema: EMA,
    teacher: Diffuser,
    autocast: Autocast,
) -> Loss:
    """Return consistency with the teacher's path."""
    autoencoder, needs_first_frame = _frames_of(config, next(model.parameters()).device)
    leader = guided_path(path_of(teacher, autocast), objective.guidance)

    def averaged(*inputs: Tensor | Conditions) -> Tensor:
        return functional_call(model, ema.state_dict(), inputs)

    target = running(averaged if objective.target == "average" else model, autocast)

    def loss(
        student: nn.Module, batch: Batch, own: torch.Generator, _shared: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        return consistency_loss(
            student,
            target,
            leader,
            latents_of(autoencoder, batch),
            batch.conditions,
            objective,
            own,
            needs_first_frame,
        )

    return loss


def _frames_of(config: TrainConfig, device: torch.device | str) -> tuple[Autoencoder, bool]:
    """Return the autoencoder, and whether the model must be given a first frame."""
    with torch.device("meta"):
        needs_first_frame = build(config.model).needs_first_frame
    return build_autoencoder(config.autoencoder, device), needs_first_frame
