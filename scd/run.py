"""A training run: its settings, its parts, and its folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from scd.autoencoder.pixels import PixelAutoencoder, PixelConfig
from scd.checkpoint import (
    RAW_FILE,
    Progress,
    World,
    last_step,
    load_optimizers,
    load_progress,
    read_json,
    remove_leftovers,
    save_step,
    write_file,
)
from scd.clip import Batch
from scd.config import to_json
from scd.data.folder import open_source
from scd.data.loader import Loader
from scd.data.source import DataCard
from scd.flow import SamplingConfig
from scd.model.build import Diffuser, ModelConfig, SeparableConfig, build, num_parameters
from scd.model.pretrained import WEIGHTS_FILE, load_weights
from scd.objective.denoise import DenoiseConfig
from scd.optim import EMA, OptimConfig, build_optimizers, parameter_groups
from scd.runlog import RunLog, Tracker
from scd.runtime import Precision, derive_seed, describe_hardware, git_commit

Objective = Callable[
    [nn.Module, Batch, torch.Generator], tuple[Tensor, Mapping[str, Tensor | float]]
]
"""From the model, a batch of pixels and a generator of all draws to a loss and numbers to log."""

FREE_FIELDS = (
    "out",
    "max_steps",
    "validate_every",
    "sample_every",
    "save_every",
    "keep_checkpoints",
    "log_every",
    "num_validation_clips",
    "tracker",
    "time_limit_s",
    "resume",
    "strict",
)
"""Fields of TrainConfig that may change when a run is continued."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    data: str = "toy:32"
    """What to learn: "toy:32", "toy:64", or a folder of episodes."""
    out: str = "runs/train"
    """Run folder: checkpoints, log and sample pictures go there."""
    max_steps: int = 1000
    """Optimiser steps of the whole run; the learning rate's decay ends there."""
    batch_size: int = 2
    """Clips per process and micro-batch."""
    num_frames: int = 16
    """Frames of a clip."""
    num_accumulation: int = 1
    """Micro-batches whose gradients are averaged into one step."""
    seed: int = 0
    """Seed of the initial weights, the batches and all noise."""
    precision: Precision = "fp32"
    """Arithmetic of the network; its weights are kept in 32 bits either way."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU where there is one (accelerate chooses which)."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more
    time."""
    ema_decay: float = 0.9999
    """Weight of the past in the averaged weights, in [0, 1); rises to this from 0.1."""
    validate_every: int = 1000
    """Steps between measurements of the loss on held-out clips. 0: never."""
    sample_every: int = 1000
    """Steps between sample pictures, truth above prediction. 0: never."""
    save_every: int = 1000
    """Steps between checkpoints; the end of a run is saved anyway. 0: only the end."""
    log_every: int = 10
    """Steps between lines of the log."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    num_validation_clips: int = 16
    """Held-out clips on which the loss is measured."""
    validation_times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Noise levels at which it is measured, in (0, 1]."""
    tracker: Tracker = "none"
    """Where numbers go besides the run folder's log.jsonl."""
    strict: bool = False
    """Stop at the first episode that cannot be read, instead of leaving it out."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue the run in `out` if it has the same settings. never: refuse to."""
    time_limit_s: float = 0.0
    """Seconds after which to save and stop; counted from the start of the command. 0: none."""
    num_loader_workers: int = 2
    """Threads that read clips ahead."""
    model: ModelConfig = field(default_factory=SeparableConfig)
    """The network."""
    objective: DenoiseConfig = field(default_factory=DenoiseConfig)
    """What it learns to do."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How its weights move."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How frames are denoised in sample pictures, and by whoever loads the result."""
    autoencoder: PixelConfig = field(default_factory=PixelConfig)
    """Between pixels and latents."""

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "batch_size",
            "num_frames",
            "num_accumulation",
            "log_every",
            "keep_checkpoints",
            "num_validation_clips",
            "num_loader_workers",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("validate_every", "sample_every", "save_every", "time_limit_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if not self.validation_times or not all(0 < time <= 1 for time in self.validation_times):
            raise ValueError(f"validation_times must lie in (0, 1], got {self.validation_times}")


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
    objective: Objective
    """What it minimises."""
    accelerator: Accelerator
    """Devices and processes."""
    folder: Path
    """Where it is kept."""
    loader: Loader
    """Its batches."""
    world: World
    """What is being made; `world.model` is the unwrapped network."""
    model: nn.Module
    """The network as accelerate wraps it."""
    optimizers: list[Any]
    """AdamW, and Muon if asked for."""
    ema: EMA
    """Averaged weights."""
    log: RunLog
    """Log of this process; silent in all but the first."""
    clock: Clock
    """Times since the last line of the log."""
    step: int
    """Optimiser steps done."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.accelerator.process_index


def start_run(config: TrainConfig, objective: Objective) -> Run:
    """Build all parts of a run, or take up the one in `config.out`.

    Raises:
        ValueError, FileExistsError, OSError: as `train`.
    """
    folder = Path(config.out)
    checkpoint = check_folder(config)
    # Accelerate keeps its settings between runs of one Python process.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        cpu=config.device == "cpu",
    )
    num_processes = accelerator.num_processes
    loader = open_loader(config, accelerator.process_index, num_processes)
    model = build_model(config, loader.source.card).to(accelerator.device)
    progress = Progress(step=0, num_ema_updates=0, num_processes=num_processes, elapsed_s=0.0)
    if checkpoint is not None:
        progress = load_progress(checkpoint)
        load_weights(model, checkpoint / WEIGHTS_FILE, str(accelerator.device))
    ema = EMA(model, config.ema_decay, progress.num_ema_updates)
    if checkpoint is not None:
        load_weights(model, checkpoint / RAW_FILE, str(accelerator.device))
    groups = parameter_groups(model, model.encoder_parameters(), config.optim)
    optimizers = build_optimizers(groups, config.optim)
    if checkpoint is not None:
        for optimizer, state in zip(optimizers, load_optimizers(checkpoint), strict=True):
            optimizer.load_state_dict(state)
    model.gradient_checkpointing = config.gradient_checkpointing
    wrapped, *optimizers = accelerator.prepare(model, *optimizers)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        write_file(folder / "config.json", json.dumps(to_json(config), indent=2))
    accelerator.wait_for_everyone()
    run = Run(
        config=config,
        objective=objective,
        accelerator=accelerator,
        folder=folder,
        loader=loader,
        world=World(
            model=model,
            autoencoder=PixelAutoencoder(config.autoencoder),
            card=loader.source.card,
            sampling=config.sampling,
        ),
        model=wrapped,
        optimizers=optimizers,
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
            "commit": git_commit(),
            "hardware": describe_hardware(),
        },
    )
    return run


def save(run: Run) -> None:
    """Write a checkpoint; only the first process writes, all wait."""
    if run.accelerator.is_main_process:
        progress = Progress(
            step=run.step,
            num_ema_updates=run.ema.num_updates,
            num_processes=run.accelerator.num_processes,
            elapsed_s=run.clock.total_s,
        )
        states = [optimizer.state_dict() for optimizer in run.optimizers]
        averaged, keep = run.ema.state_dict(), run.config.keep_checkpoints
        folder = save_step(run.folder, run.world, averaged, states, progress, keep)
        run.log.event("checkpoint", {"step": run.step, "folder": str(folder)})
    run.accelerator.wait_for_everyone()


def check_folder(config: TrainConfig) -> Path | None:
    """Return the checkpoint to continue from, or None for a new run.

    Raises:
        FileExistsError: `config.out` holds a run with other settings, or no run at all.
        ValueError: its config or checkpoint is damaged.
    """
    folder = Path(config.out)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / "config.json").is_file():
        raise FileExistsError(f"{folder} exists and is not the folder of a run: choose another out")
    if config.resume == "never":
        raise FileExistsError(f"{folder} holds a run already, and resume is 'never'")
    theirs, ours = read_json(folder / "config.json"), to_json(config)
    different = [
        line
        for line in differences(theirs, json.loads(json.dumps(ours)))
        if line.split(":")[0].split(".")[0] not in FREE_FIELDS
    ]
    if different:
        raise FileExistsError(
            f"{folder} holds a run with other settings (its value, then the one given): "
            + "; ".join(different)
        )
    return last_step(folder)


def differences(theirs: Any, ours: Any, where: str = "") -> list[str]:
    """List the leaves in which two JSON values differ, as "a.b: theirs, ours"."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [
            line
            for key in sorted(set(theirs) | set(ours))
            for line in differences(
                theirs.get(key, "nothing"), ours.get(key, "nothing"), f"{where}{key}."
            )
        ]
    return [] if theirs == ours else [f"{where.removesuffix('.')}: {theirs!r}, {ours!r}"]


def build_model(config: TrainConfig, card: DataCard) -> Diffuser:
    """Build the run's model with its first weights, which depend on the seed alone.

    Raises:
        ValueError: the model does not fit the data.
    """
    check_fit(config, card)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "initial weights"))
        return build(config.model)


def check_fit(config: TrainConfig, card: DataCard) -> None:
    """Refuse a model for other frames or conditions than those of the data (ValueError)."""
    shape = PixelAutoencoder(config.autoencoder).latent_shape(card.height, card.width)
    if config.model.shape.shape != shape:
        raise ValueError(
            f"{config.data} gives latent frames of {shape} (channels, rows, columns), "
            f"but model.shape is {config.model.shape.shape}"
        )
    if config.model.conditions != card.conditions:
        raise ValueError(
            f"{config.data} is steered by {card.conditions}, "
            f"but model.conditions is {config.model.conditions}"
        )


def open_loader(config: TrainConfig, rank: int, num_processes: int) -> Loader:
    """Open the training split as a stream of this process's batches.

    Raises:
        ValueError, OSError: no episode is long enough, fewer episodes than processes, or the data
            cannot be read.
    """
    source = open_source(config.data, "train", config.strict)
    return Loader(
        source,
        config.batch_size,
        config.num_frames,
        config.seed,
        rank=rank,
        num_ranks=num_processes,
        workers=config.num_loader_workers,
    )
