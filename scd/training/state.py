"""A training run that is going on: its parts, its folder, its clock."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from scd.autoencoders.build import build_autoencoder
from scd.common.config import from_json, to_json
from scd.common.files import read_json, remove_leftovers, take_lock, write_file
from scd.common.provenance import command
from scd.common.runlog import RunLog
from scd.common.runtime import describe_hardware, git_commit
from scd.data.loader import Loader
from scd.models.build import num_parameters
from scd.models.checkpoint import (
    RAW_FILE,
    Progress,
    World,
    last_step,
    load_progress,
    save_step,
)
from scd.models.weights import WEIGHTS_FILE, load_weights
from scd.optim.optim import EMA
from scd.training.config import FREE_FIELDS, Objective, TrainConfig, build_model, open_loader
from scd.training.initial import load_initial
from scd.training.learner import Learner, alone, build_learners, may_leave_unused
from scd.training.run_folder import LOCK_FILE, goes_on
from scd.training.sharding import (
    fsdp_version,
    gathered,
    gathered_state,
    is_sharded,
    load_parts,
    shard,
)
from scd.training.tasks import build_task


class Clock:
    """Times of steps since the last line of the log: `waiting`, `away`, `count_step`, `read`."""

    def __init__(self, earlier_s: float) -> None:
        """Start; `earlier_s` seconds were trained before."""
        self._start = time.perf_counter() - earlier_s
        self._since = time.perf_counter()
        self._waited_s = 0.0
        self.num_steps = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of a with block as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - begin

    @contextmanager
    def away(self) -> Iterator[None]:
        """Do not count the time of a with block as training steps."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    def count_step(self) -> None:
        """Note that a step is done."""
        self.num_steps += 1

    @property
    def total_s(self) -> float:
        """Seconds of all parts of the run so far, saving and validation included."""
        return time.perf_counter() - self._start

    @property
    def steps_per_s(self) -> float:
        """Steps per second since the last `read`."""
        return self.num_steps / max(time.perf_counter() - self._since, 1e-9)

    def read(self) -> dict[str, float]:
        """Return seconds per step and of it waiting for data, and begin anew."""
        steps = max(self.num_steps, 1)
        values = {
            "step_s": (time.perf_counter() - self._since) / steps,
            "data_s": self._waited_s / steps,
            "elapsed_s": self.total_s,
        }
        self._since, self.num_steps, self._waited_s = time.perf_counter(), 0, 0.0
        return values


@dataclass
class Run:
    """All parts of a run that is going on."""

    config: TrainConfig
    """Its settings."""
    accelerator: Accelerator
    """Devices and processes."""
    folder: Path
    """Where it is kept."""
    lock: TextIO | None
    """Keeps other processes out of the folder until it is closed; in the first process only."""
    loader: Loader
    """Its batches."""
    world: World
    """What is being made; `world.model` is the unwrapped network."""
    learners: list[Learner]
    """Networks in the order in which a step trains them: companions, then the model."""
    ema: EMA
    """Averaged weights."""
    log: RunLog
    """Log of this process; silent in all but the first."""
    clock: Clock
    """Times since the last line of the log."""
    step: int
    """Optimiser steps done."""
    sharded: bool
    """Whether each process holds a part of the weights only; then all of them run a model
    together."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.accelerator.process_index

    @property
    def updates_per_step(self) -> int:
        """Updates of all networks in one step."""
        return sum(learner.num_updates for learner in self.learners)

    @property
    def learner(self) -> Learner:
        """The model with its loss and optimisers."""
        return self.learners[-1]


def start_run(config: TrainConfig, objective: Objective | None = None) -> Run:
    """Build all parts of a run, or take up the one in `config.out`.

    Args:
        config: the run.
        objective: what to minimise; None: what `config.objective` says.

    Raises:
        ValueError, FileExistsError, OSError: as `train`.
    """
    folder = Path(config.out)
    checkpoint = check_folder(config)
    # Accelerate keeps its settings between runs of one Python process.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        cpu=config.device == "cpu",
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=may_leave_unused(config))
        ],
    )
    num_processes = accelerator.num_processes
    sharded = is_sharded(config, num_processes, fsdp_version(accelerator))
    loader = open_loader(config, accelerator.process_index, num_processes)
    model = build_model(config, loader.source.card)
    progress = Progress(step=0, num_ema_updates=0, num_processes=num_processes, elapsed_s=0.0)
    if checkpoint is not None:
        progress = load_progress(checkpoint)
        load_weights(model, checkpoint / WEIGHTS_FILE)
    elif config.initial:
        load_initial(model, config)
    model.to(accelerator.device)
    if sharded:
        shard(model, accelerator)
    ema = EMA(model, config.ema_decay, progress.num_ema_updates)
    if checkpoint is not None and sharded:
        load_parts(model, checkpoint / RAW_FILE)
    elif checkpoint is not None:
        load_weights(model, checkpoint / RAW_FILE, str(accelerator.device))
    model.gradient_checkpointing = config.gradient_checkpointing
    task = alone(objective) if objective else build_task(config, model, ema, accelerator)
    learners = build_learners(config, task, model, accelerator, checkpoint, sharded)
    accelerator.wait_for_everyone()
    lock = None
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder / LOCK_FILE)
        if check_folder(config) != checkpoint:
            raise BlockingIOError(f"{folder} was trained by another process meanwhile: start again")
        remove_leftovers(folder)
        write_file(folder / "config.json", json.dumps(to_json(config), indent=2))
    accelerator.wait_for_everyone()
    run = Run(
        config=config,
        accelerator=accelerator,
        folder=folder,
        lock=lock,
        loader=loader,
        world=World(
            model=model,
            autoencoder=build_autoencoder(config.autoencoder, accelerator.device),
            card=loader.source.card,
            sampling=config.sampling,
        ),
        learners=learners,
        ema=ema,
        log=RunLog(
            folder,
            total_steps=config.max_steps,
            first_step=progress.step,
            tracker=config.tracker,
            active=accelerator.is_main_process,
        ),
        clock=Clock(progress.elapsed_s),
        step=progress.step,
        sharded=sharded,
    )
    run.log.event(
        "start" if checkpoint is None else "resume",
        {
            "step": run.step,
            "num_processes": num_processes,
            "num_processes_before": progress.num_processes,
            "device": str(accelerator.device),
            "precision": config.precision,
            "parameters": num_parameters(model),
            "sharded": sharded,
        },
    )
    machine = {"command": command(), "commit": git_commit()} | describe_hardware()
    run.log.event("machine", machine, show=False)
    return run


def save(run: Run) -> None:
    """Write a checkpoint; only the first process writes, all wait."""
    states = [optimizer.state_dict() for optimizer in run.learner.optimizers]
    averaged, raw = run.ema.state_dict(), run.world.model.state_dict()
    if run.sharded:
        states = [gathered_state(part, run.accelerator) for part in run.learner.optimizers]
        averaged, raw = (gathered(part, run.accelerator) for part in (averaged, raw))
    if run.accelerator.is_main_process:
        progress = Progress(
            step=run.step,
            num_ema_updates=run.ema.num_updates,
            num_processes=run.accelerator.num_processes,
            elapsed_s=run.clock.total_s,
        )
        keep = run.config.keep_checkpoints
        beside = {learner.name: learner.state() for learner in run.learners[:-1]}
        folder = save_step(run.folder, run.world, averaged, states, progress, keep, beside, raw)
        run.log.event("checkpoint", {"step": run.step, "folder": str(folder)})
    run.accelerator.wait_for_everyone()


def check_folder(config: TrainConfig) -> Path | None:
    """Return the checkpoint to continue from, or None for a new run.

    Raises:
        FileExistsError: `config.out` holds a run with other settings, or no run at all.
        ValueError: its config or checkpoint is damaged.
    """
    if not goes_on(config, FREE_FIELDS, _settings):
        return None
    return last_step(Path(config.out))


def _settings(path: Path) -> Any:
    """Read a run's settings; a field that came after the run was started has its default."""
    values = read_json(path)
    try:
        return to_json(from_json(TrainConfig, values, str(path)))
    except ValueError:
        # Told field by field, with all else that differs.
        return values
