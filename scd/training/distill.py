"""A distillation run from a trained teacher: what the teacher decides, and named sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import tyro

from scd.models.checkpoint import read_world_parts, resolve
from scd.models.flow import SamplingConfig
from scd.objectives.distill import ConsistencyConfig, RegressionConfig
from scd.objectives.distribution_matching import MatchConfig
from scd.optim.optim import OptimConfig
from scd.training.config import ObjectiveConfig, TrainConfig

Method = Literal["dmd", "sid", "gan", "consistency", "regression"]
"""How a student learns: see `scd.objectives.distribution_matching` (the first three) and
`scd.objectives.distill`."""
Size = Literal["toy", "doom"]
"""Named sizes of a distillation."""


@dataclass(frozen=True, kw_only=True)
class DistillChoice:
    """What a distillation run is made from, before any of its fields is changed."""

    teacher: tyro.conf.Positional[str]
    """World, run or step folder to learn from."""
    data: str = "toy:32"
    """Clips to learn on, as in `scd train`."""
    initial: str = ""
    """Run or world whose weights the student starts from, and whose model it is; empty: the
    teacher."""
    steps: int = 4
    """Denoising steps per frame of the student."""
    method: Method = "consistency"
    """How it learns. On recorded clips: consistency with the teacher's path; regression, the plain
    baseline. On its own rollouts, best from a student of consistency (`initial`): dmd, distribution
    matching; sid, score identity; gan, against a discriminator."""
    preset: Size | None = None
    """Sizes of clips, batches and steps; None: toy for the toy world, doom for any other data."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}")

    @property
    def size(self) -> Size:
        """The preset that is meant."""
        return self.preset or ("toy" if self.data.startswith("toy:") else "doom")


def distillation(choice: DistillChoice) -> TrainConfig:
    """Return the run that a choice means: an ordinary run, whose every field may be changed.

    Raises:
        FileNotFoundError: there is no teacher, or nothing to start from.
        ValueError: a folder is damaged.
    """
    start = choice.initial or choice.teacher
    world = read_world_parts(resolve(start))
    run = TrainConfig(
        data=choice.data,
        out=f"runs/out/{choice.method}-{choice.steps}",
        initial=start,
        precision="bf16",
        ema_decay=0.99,
        validate_every=0,
        model=world["model"],
        autoencoder=world["autoencoder"],
        objective=_objective(choice),
        sampling=SamplingConfig(num_steps=choice.steps, solver="renoise"),
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


MUON = OptimConfig(
    optimizer="muon", decoder_lr_ratio=1.0, warmup_steps=20, decay_fraction=0.5, clip_norm=1.0
)
"""Optimiser of students, as of the small models that they come from."""

CLIPS: dict[Size, dict[str, int]] = {
    "toy": {"max_steps": 400, "batch_size": 4, "num_frames": 16, "sample_every": 400},
    "doom": {"max_steps": 350, "batch_size": 4, "num_frames": 16, "sample_every": 350},
}
"""Fields of a run on recorded clips by preset: about eight minutes on one CPU core."""

ROLLOUTS: dict[Size, dict[str, int]] = {
    "toy": {"max_steps": 400, "batch_size": 4, "num_frames": 12, "sample_every": 400},
    "doom": {"max_steps": 400, "batch_size": 4, "num_frames": 12, "sample_every": 400},
}
"""Fields of a run on the student's rollouts by preset: ten to fifteen minutes on one CPU core."""
