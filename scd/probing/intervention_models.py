"""The models of a comparison: the run, the changed run, and the runs trained from them.

A folder holds `settings.json`, the worlds `untouched` and `before`, and a run folder for each of
`after`, `control` and `scratch`, which is trained once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scd.common.config import differences, from_json, to_json
from scd.common.files import read_json
from scd.common.provenance import write_json
from scd.common.weights import digest_of
from scd.data.source import open_source
from scd.evaluation.predict import check_fit
from scd.models.checkpoint import (
    World,
    load_world,
    resolve,
    save_world,
)
from scd.models.progress import load_progress
from scd.models.weights import WEIGHTS_FILE
from scd.objectives.config import DenoiseConfig
from scd.probing.changes import change_world
from scd.probing.interventions import Comparison, Intervention, RecomposeConfig
from scd.training.config import TrainConfig
from scd.training.plan import plan
from scd.training.world import train

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True, kw_only=True)
class Start:
    """What an intervention starts from."""

    base: TrainConfig
    steps: int
    """Optimiser steps of the run so far."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One model of the comparison."""

    world: World
    """Averaged weights."""
    steps: int
    """Optimiser steps, those of the run it started from included."""
    train_flops: int


def claim(intervention: Intervention, out: Path) -> Start:
    """Write the settings and the first two worlds into a new folder, or continue the same there.

    Raises:
        FileExistsError: the folder holds another intervention, or something else.
    """
    ours = to_json(intervention)
    path = out / SETTINGS_FILE
    if path.is_file():
        theirs = read_json(path)
        different = [
            line
            for line in differences(theirs.get("intervention"), ours)
            if not line.startswith("comparison.threads: ")
        ]
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
    changed = change_world(intervention, world)
    source = open_source(start.base.data, "val", start.base.strict)
    check_fit(world, source.card, start.base.data)
    save_world(world, out / "untouched")
    save_world(changed, out / "before")
    settings = {"intervention": ours, "base": to_json(start.base), "steps": start.steps}
    write_json(settings, path)
    return start


def read_start(common: Comparison) -> tuple[Start, World]:
    """Read the run that an intervention starts from: its settings and its averaged weights."""
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
    return replace(
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


def runs_of(
    intervention: Intervention, start: Start, untouched: World, before: World, out: Path
) -> dict[str, TrainConfig]:
    """Return the trainings of a comparison by name."""
    common = intervention.comparison
    runs = {"after": finetuning(start, common, before, out / "before")}
    if common.control:
        runs["control"] = finetuning(start, common, untouched, out / "untouched")
    if isinstance(intervention, RecomposeConfig):
        # A dense model has no context to corrupt, the separable one made of it has.
        noise = intervention.context_noise
        objective = replace(start.base.objective, context_noise=noise)
        after = runs["after"] = replace(runs["after"], objective=objective)
        if intervention.scratch:
            step_flops = plan(after).flops_per_step
            total = _flops(start.base, start.steps) + common.max_steps * step_flops
            num_steps = max(1, round(total / step_flops))
            runs["scratch"] = replace(
                start.base, model=after.model, objective=objective, max_steps=num_steps
            )
    unattended: dict[str, Any] = dict(
        validate_every=0,
        sample_every=0,
        save_every=100,
        keep_checkpoints=1,
        time_limit_s=0.0,
        resume="auto",
        threads=common.threads,
    )
    return {name: replace(run, out=str(out / name), **unattended) for name, run in runs.items()}


def _flops(run: TrainConfig, num_steps: int) -> int:
    return num_steps * plan(run).flops_per_step


def candidates(
    intervention: Intervention, start: Start, untouched: World, out: Path
) -> dict[str, Candidate]:
    """Train the models that are not trained yet, and return all by name."""
    device = next(untouched.model.parameters()).device
    before = load_world(out / "before", device=device)
    runs = runs_of(intervention, start, untouched, before, out)
    folders = {}
    if intervention.comparison.control_from:
        # Told before anything is trained.
        other = Path(intervention.comparison.control_from)
        folders["control"] = same_control(runs["control"], other)
    spent = _flops(start.base, start.steps)
    models = {
        name: Candidate(world=world, steps=start.steps, train_flops=spent)
        for name, world in (("untouched", untouched), ("before", before))
    }
    for name, run in runs.items():
        folder = folders.get(name) or train(run)
        steps, flops = (start.steps, spent) if run.initial else (0, 0)
        models[name] = Candidate(
            world=load_world(folder, device=device),
            steps=steps + run.max_steps,
            train_flops=flops + _flops(run, run.max_steps),
        )
    return models


def same_control(config: TrainConfig, other: Path) -> Path:
    """Return the control of another intervention; refuse one that differs (ValueError)."""
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
