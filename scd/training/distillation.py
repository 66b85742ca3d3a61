"""The run that a choice of teacher, method and number of steps means."""

from __future__ import annotations

from dataclasses import replace

from scd.models.checkpoint import read_world_parts, resolve
from scd.models.config import SamplingConfig
from scd.objectives.config import ConsistencyConfig, MatchConfig, ObjectiveConfig, RegressionConfig
from scd.training.config import TrainConfig
from scd.training.presets import (
    CLIPS,
    MUON,
    ROLLOUTS,
    DistillChoice,
    WanConsistencyChoice,
    WanDmdChoice,
)
from scd.training.wan import wan_consistency, wan_distillation


def distillation(choice: DistillChoice | WanConsistencyChoice | WanDmdChoice) -> TrainConfig:
    """Return the run that a choice means: an ordinary run, whose every field may be changed.

    Raises:
        FileNotFoundError: there is no teacher, or nothing to start from.
        ValueError: a folder is damaged, or what is needed is not named.
    """
    if isinstance(choice, WanConsistencyChoice):
        return wan_consistency(choice)
    if isinstance(choice, WanDmdChoice):
        return wan_distillation(choice)
    start = choice.initial or choice.teacher
    world = read_world_parts(resolve(start))
    sampling = world["sampling"]
    if sampling.solver != "renoise" or sampling.num_steps != choice.steps:
        # A student of as many steps keeps its own times.
        sampling = SamplingConfig(num_steps=choice.steps, solver="renoise")
    run = TrainConfig(
        data=choice.data,
        out=f"runs/out/{choice.method}-{choice.steps}",
        initial=start,
        precision="auto",
        ema_decay=0.99,
        validate_every=0,
        model=world["model"],
        autoencoder=world["autoencoder"].beside(resolve(start)),
        objective=_objective(choice),
        sampling=sampling,
    )
    if choice.method in ("consistency", "regression"):
        run = replace(run, optim=replace(MUON, lr=3e-4, muon_lr=2e-3), **CLIPS[choice.size])
    else:
        run = replace(run, optim=replace(MUON, lr=1e-4, muon_lr=5e-4), **ROLLOUTS[choice.size])
    return run


def _objective(choice: DistillChoice) -> ObjectiveConfig:
    if choice.method == "regression":
        return RegressionConfig()
    # One step of a run, so that the teacher stays the same when its own training goes on.
    teacher = str(resolve(choice.teacher))
    if choice.method == "consistency":
        return ConsistencyConfig(teacher=teacher)
    # A critic that moves fast needs fewer updates than the published five.
    return MatchConfig(
        teacher=teacher,
        method=choice.method,
        num_critic_updates=2,
        score_shift=3.0,
        critic=replace(MUON, lr=2e-4, muon_lr=2e-3, decay_fraction=0.0),
    )
