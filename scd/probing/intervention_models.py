"""The models of a comparison: the run, the run changed, and what is trained from them.

A folder holds `settings.json`, the worlds `untouched` and `before`, and a run folder for each of
`after`, `control` and `scratch`. What is trained is not trained again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from scd.common.config import differences, from_json, to_json
from scd.common.files import read_json
from scd.common.provenance import write_json
from scd.common.weights import digest_of
from scd.data.source import open_source
from scd.evaluation.predict import check_fit
from scd.models.checkpoint import (
    World,
    last_step,
    load_progress,
    load_world,
    resolve,
    save_world,
)
from scd.models.pretrained import WEIGHTS_FILE
from scd.objectives.denoise import DenoiseConfig
from scd.probing.interventions import Comparison, Intervention, RecomposeConfig
from scd.training.config import TrainConfig
from scd.training.plan import plan
from scd.training.trainer import train

SETTINGS_FILE = "settings.json"
"""What the folder's intervention is, and from which step of which run."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What an intervention starts from."""

    base: TrainConfig
    """Settings of the run."""
    steps: int
    """Its optimiser steps so far."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One model of the comparison."""

    world: World
    """Averaged weights."""
    steps: int
    """Optimiser steps in all: of the run, and of its own."""
    train_flops: int
    """Operations of those steps."""


def claim(intervention: Intervention, out: Path) -> Start:
    """Take the folder: write down what starts from where, or find that it is the same.

    Raises:
        ValueError, FileNotFoundError: as `Intervention.change_world` and `read_start`.
        FileExistsError: the folder holds another intervention, or something else.
    """
    ours = to_json(intervention)
    path = out / SETTINGS_FILE
    if path.is_file():
        theirs = read_json(path)
        different = differences(theirs.get("intervention"), ours)
        if different:
            raise FileExistsError(
                f"{out} holds another intervention (its value, then the one given): "
                + "; ".join(different)
            )
        base = from_json(TrainConfig, theirs["base"], f"{path}: base")
        return Start(base=base, steps=theirs["steps"])
    # A folder with nothing but the worlds is ours, interrupted before it was claimed.
    if out.exists() and not (
        out.is_dir() and {entry.name for entry in out.iterdir()} <= {"untouched", "before"}
    ):
        raise FileExistsError(f"{out} exists and holds no intervention: choose another out")
    start, world = read_start(intervention.comparison)
    changed = intervention.change_world(world)
    source = open_source(start.base.data, "val", start.base.strict)
    check_fit(world, source.card, start.base.data)
    save_world(world, out / "untouched")
    save_world(changed, out / "before")
    settings = {"intervention": ours, "base": to_json(start.base), "steps": start.steps}
    write_json(settings, path)
    return start


def read_start(common: Comparison) -> tuple[Start, World]:
    """Read the run that an intervention starts from: its settings, and its averaged weights.

    Raises:
        ValueError: a world without the settings of its training, or not trained by denoising.
        FileNotFoundError: no such run.
    """
    step = resolve(common.run)
    path = step.parent / "config.json"
    if not (step / "progress.json").is_file() or not path.is_file():
        raise ValueError(
            f"{common.run} is a world without the settings of its training: give the run folder"
        )
    base = from_json(TrainConfig, read_json(path), str(path))
    if not isinstance(base.objective, DenoiseConfig):
        raise ValueError(
            f"{common.run} was not trained by denoising: an intervention finetunes as the run was "
            "trained, so it needs the one that this one came from"
        )
    base = replace(base, data=common.data or base.data, device=common.device)
    return Start(base=base, steps=load_progress(step).step), load_world(step)


def finetuning(start: Start, common: Comparison, world: World, initial: Path) -> TrainConfig:
    """Return the run that finetunes a world's model with the settings of the run it came from."""
    base, optim = start.base, start.base.optim
    config = replace(
        base,
        model=world.model.config,
        initial=str(initial),
        max_steps=common.max_steps,
        seed=base.seed + 1 if common.seed is None else common.seed,
        optim=replace(
            optim,
            lr=common.lr_factor * optim.lr,
            muon_lr=common.lr_factor * optim.muon_lr,
            warmup_steps=common.warmup_steps,
            decay_fraction=0.0,
        ),
    )
    return _unattended(config)


def _unattended(config: TrainConfig) -> TrainConfig:
    return replace(
        config,
        validate_every=0,
        sample_every=0,
        save_every=100,
        keep_checkpoints=1,
        time_limit_s=0.0,
        resume="auto",
    )


def _with_context_noise(config: TrainConfig, intervention: Intervention) -> TrainConfig:
    """A dense model has no context to corrupt, the separable one made of it has."""
    if not isinstance(intervention, RecomposeConfig):
        return config
    assert isinstance(config.objective, DenoiseConfig)
    objective = replace(config.objective, context_noise=intervention.context_noise)
    return replace(config, objective=objective)


def candidates(
    intervention: Intervention, start: Start, untouched: World, out: Path
) -> dict[str, Candidate]:
    """Train what is not trained yet; return all models of the comparison by name."""
    common = intervention.comparison
    before = load_world(out / "before", device=next(untouched.model.parameters()).device)
    after = finetuning(start, common, before, out / "before")
    after = _with_context_noise(after, intervention)
    runs = {"after": after}
    if common.control:
        runs["control"] = finetuning(start, common, untouched, out / "untouched")
    if common.control_from:
        # Told before anything is trained.
        same_control(runs["control"], Path(common.control_from))
    # Operations of one step. Noise on a context, and the seed, cost nothing.
    step_flops = {"after": plan(after).flops_per_step, "control": plan(start.base).flops_per_step}
    spent = start.steps * step_flops["control"]
    if isinstance(intervention, RecomposeConfig) and intervention.scratch:
        scratch = replace(_unattended(start.base), model=before.model.config)
        total = spent + common.max_steps * step_flops["after"]
        num_steps = max(1, round(total / step_flops["after"]))
        scratch = _with_context_noise(replace(scratch, max_steps=num_steps), intervention)
        runs["scratch"], step_flops["scratch"] = scratch, step_flops["after"]
    models = {
        name: Candidate(world=world, steps=start.steps, train_flops=spent)
        for name, world in (("untouched", untouched), ("before", before))
    }
    device = next(before.model.parameters()).device
    for name, run in runs.items():
        run = replace(run, out=str(out / name))
        is_there = name == "control" and common.control_from
        folder = same_control(run, Path(common.control_from)) if is_there else trained(run)
        from_start = bool(run.initial)
        own = run.max_steps * step_flops[name]
        models[name] = Candidate(
            world=load_world(folder, device=device),
            steps=run.max_steps + (start.steps if from_start else 0),
            train_flops=own + (spent if from_start else 0),
        )
    return models


def same_control(config: TrainConfig, other: Path) -> Path:
    """Return the control of another intervention, if it is what this one's would be.

    Raises:
        ValueError: it has other settings, started from other weights, or is not finished.
        FileNotFoundError: there is none.
    """
    step = resolve(other / "control")
    theirs = from_json(TrainConfig, read_json(other / "control" / "config.json"))
    same = replace(theirs, out=config.out, initial=config.initial)
    different = differences(to_json(same), to_json(config))
    if different:
        raise ValueError(
            f"the control of {other} has other settings (its value, then this one's): "
            + "; ".join(different)
        )
    initial = (Path(run.initial) / WEIGHTS_FILE for run in (theirs, config))
    if len({digest_of(path, "sha256") for path in initial}) > 1:
        raise ValueError(f"the control of {other} started from other weights than this run's")
    if load_progress(step).step < config.max_steps:
        raise ValueError(f"the control of {other} is not trained to its end")
    return other / "control"


def trained(config: TrainConfig) -> Path:
    """Train a run to its end, unless it is there already; return its folder."""
    folder = Path(config.out)
    step = last_step(folder) if folder.is_dir() else None
    if step is None or load_progress(step).step < config.max_steps:
        train(config)
    return folder
