"""A training run that is going on: what it trains, its folder, its clock, its checkpoints."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from scd.common.provenance import command
from scd.common.runlog import RunLog
from scd.common.runtime import (
    choose_precision,
    describe_hardware,
    explain_precision,
    git_commit,
)
from scd.common.threads import ThreadChoice
from scd.common.weights import LARGEST_WEIGHT, wild_weights
from scd.data.clip import Batch
from scd.data.loader import Loader
from scd.models.build import num_parameters
from scd.models.checkpoint import (
    RAW_FILE,
    load_auxiliary,
    load_optimizers,
    save_step,
)
from scd.models.progress import Progress, load_progress
from scd.models.weights import WEIGHTS_FILE, load_weights
from scd.objectives.denoise import Objective
from scd.optim.config import OptimConfig
from scd.optim.optim import EMA, build_optimizers, fitting_state, parameter_groups
from scd.training.config import RunConfig
from scd.training.folder import enter_folder, find_checkpoint, older_named
from scd.training.machine import open_accelerator, settle
from scd.training.sharding import cut_state, gathered, load_parts

MODEL = "train"
"""Name of the group of the network that the run is about; also what its draws are named after."""

Settings = TypeVar("Settings", bound=RunConfig)

KNOWS_NOTHING = 2.0
"""Loss of a critic that knows nothing, at most: that of velocity 0 for frames and noise of unit
scale; a discriminator that always says 0 has 1.4. A rise that ends below it is no divergence."""


@dataclass(kw_only=True)
class OptimisationGroup:
    """A network of a run with what it minimises and its optimisers."""

    name: str = MODEL
    """MODEL, or that of an auxiliary network: of its draws, its numbers in the log and its part of
    a checkpoint."""
    network: nn.Module
    """Unwrapped, on its device."""
    wrapped: nn.Module
    """What the objective calls: as accelerate wraps it for several processes and the precision."""
    objective: Objective
    """What it minimises."""
    optim: OptimConfig
    """How its weights move."""
    optimizers: list[Any] = field(default_factory=list)
    """AdamW, and Muon if asked for."""
    num_updates: int = 1
    """Updates per step of the run, each on a batch of its own."""
    first_step: int = 0
    """Step of the run in which it begins to move."""
    same_batch: bool = False
    """Whether it learns from the batch of the group before it."""
    max_rise: float = 0.0
    """Largest loss over that of its first update; more stops the run. 0: any."""
    min_spread: float = 0.0
    """Least "spread" in its log, deviation of what it generates over that of the data; less stops
    the run. 0: any."""
    first_loss: float = 0.0
    """Loss of its first update, before its weights had moved. 0: there was none yet."""

    @staticmethod
    def of(
        network: nn.Module,
        objective: Objective,
        optim: OptimConfig,
        *,
        encoder: Iterable[nn.Parameter] = (),
        matrices: Iterable[Tensor] | None = None,
        wrapped: nn.Module | None = None,
        **more: Any,
    ) -> OptimisationGroup:
        """Build the group of a network with new optimisers; `encoder` and `matrices` as
        `parameter_groups` takes them."""
        return OptimisationGroup(
            network=network,
            wrapped=wrapped or network,
            objective=objective,
            optim=optim,
            optimizers=build_optimizers(parameter_groups(network, encoder, optim, matrices), optim),
            **more,
        )

    def refuse(self, step: int, loss: float, logs: Mapping[str, float]) -> None:
        """Stop a run that has gone astray, before the weights move: its loss has risen far above
        the first one, or what it generates has collapsed (ValueError)."""
        # Not a mean of the losses before: a slow rise takes that along.
        self.first_loss = self.first_loss or loss
        if self.max_rise and loss > max(self.max_rise * self.first_loss, KNOWS_NOTHING):
            raise ValueError(
                f"step {step}: the {self.name} diverges: its loss is {loss:.4g}, more than "
                f"{self.max_rise:g} times that of its first update, {self.first_loss:.4g}; what "
                "was saved before is kept. A lower learning rate of it may help"
            )
        if logs.get("spread", 1.0) < self.min_spread:
            raise ValueError(
                f"step {step}: the generated frames have collapsed: they vary {logs['spread']:.3f} "
                f"times as much as the data's, and {self.min_spread:g} is the least allowed; what "
                "was saved before is kept. A lower learning rate may help"
            )

    def state(self) -> dict[str, Any]:
        """Return all of an auxiliary network that a later part of the run needs."""
        return {
            "weights": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "first_loss": self.first_loss,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned."""
        self.network.load_state_dict(state["weights"])
        self.load_optimizers(state["optimizers"])
        self.first_loss = state["first_loss"]

    def load_optimizers(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Take up the saved states of the optimisers, whose tensors are whole."""
        states = list(states)
        if len(states) != len(self.optimizers):
            raise ValueError(f"needed {len(self.optimizers)} optimisers, got {len(states)}")
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(cut_state(optimizer, fitting_state(optimizer, state)))


class Task(ABC):
    """What a run trains: its parts, what becomes of a batch, how it is looked at, what is saved.

    The trainer knows nothing else of it. Order of the calls: `begin` (a new run) or
    `restore`, `shard`, `make_groups`; then for each step `begin_step` and `prepare`, and `write`
    and `look` as they fall due.
    """

    config: RunConfig
    accelerator: Accelerator
    loader: Loader
    """Batches of this process."""
    model: nn.Module
    """The network that the run is about, in this process's memory."""
    max_steps: int
    num_accumulation: int = 1
    """Micro-batches whose gradients are averaged into one update."""
    weights_file = WEIGHTS_FILE
    """Name of the averaged weights in a checkpoint."""
    sharded = False
    """Whether each process holds a part of the weights only; then all of them run a model
    together."""
    is_wrapped = False
    """Whether the groups' networks need no wrapper of accelerate's."""
    is_small = True
    """Whether on a CPU one thread may be the fastest: then it is tried first."""

    def begin(self) -> None:  # noqa: B027
        """Give the model of a new run its first weights, if they are not those of the seed."""

    def restore(self, checkpoint: Path) -> None:
        """Give the model the averaged weights of a checkpoint, to go on."""
        load_weights(self.model, checkpoint / self.weights_file)

    def shard(self) -> None:
        """Cut the model's weights up among the processes."""
        raise NotImplementedError

    @abstractmethod
    def make_groups(self, ema: EMA) -> list[OptimisationGroup]:
        """Return the networks in the order in which a step trains them, with new optimisers."""

    def facts(self) -> dict[str, Any]:
        """Return what the log tells about the start besides what all runs have in common."""
        return {}

    def begin_step(self, run: Run) -> None:  # noqa: B027
        """Do what comes before the updates of a step."""

    def prepare(self, batch: Batch) -> Batch:
        """Return a batch as the objectives take it."""
        return batch

    def look(self, run: Run, last: bool) -> None:  # noqa: B027
        """Measure and draw what is due after a step."""

    def write(self, run: Run, folder: Path, averaged: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Write what the run makes into a checkpoint, of the averaged weights."""


class Clock:
    """Times of steps since the last line of the log: `waiting`, `away`, `count_step`, `read`."""

    def __init__(self, earlier_s: float) -> None:
        """Start; `earlier_s` seconds were trained before."""
        self._start = time.perf_counter() - earlier_s
        self._since = time.perf_counter()
        self._computed = time.process_time()
        self._waited_s = 0.0
        self._num_steps = 0
        self._begun = self._since
        self._num_all = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of a with block as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - begin

    @contextmanager
    def away(self) -> Iterator[None]:
        """Do not count the time of a with block as training steps."""
        begin, computed = time.perf_counter(), time.process_time()
        yield
        self._since += time.perf_counter() - begin
        self._computed += time.process_time() - computed

    def count_step(self) -> None:
        """Note that a step is done."""
        self._num_steps += 1
        self._num_all += 1

    @property
    def total_s(self) -> float:
        """Seconds of all parts of the run so far, saving and validation included."""
        return time.perf_counter() - self._start

    @property
    def steps_per_s(self) -> float:
        """Steps per second since the last `read`."""
        return self._num_steps / max(time.perf_counter() - self._since, 1e-9)

    def left_s(self, num_steps: int) -> float:
        """Return the seconds that some more steps will take, if they go on as since the start."""
        return num_steps * (time.perf_counter() - self._begun) / max(self._num_all, 1)

    def read(self) -> dict[str, float]:
        """Return seconds per step, by the clock, by processors, and waiting; begin anew."""
        steps = max(self._num_steps, 1)
        values = {
            "step_s": (time.perf_counter() - self._since) / steps,
            # Of all threads; beside other work it says what a step costs, as `step_s` does not.
            "processor_s": (time.process_time() - self._computed) / steps,
            "data_s": self._waited_s / steps,
            "elapsed_s": self.total_s,
        }
        self._since, self._computed = time.perf_counter(), time.process_time()
        self._num_steps, self._waited_s = 0, 0.0
        return values


@dataclass
class Run:
    """A task that is being trained."""

    task: Task
    groups: list[OptimisationGroup]
    """In the order in which a step trains them."""
    ema: EMA
    """Averaged weights of the model."""
    folder: Path | None
    """Where the run is kept; None: nowhere."""
    lock: TextIO | None
    """Keeps other processes out of the folder until it is closed; in the first process only."""
    log: RunLog
    """Log of this process; silent in all but the first."""
    clock: Clock
    threads: ThreadChoice
    """Of the CPU."""
    step: int
    """Steps done."""

    @property
    def main(self) -> OptimisationGroup:
        """The group of the model."""
        return next(group for group in self.groups if group.name == MODEL)

    @property
    def first_batch(self) -> int:
        """Number of the batch with which the next step begins."""
        updates = sum(group.num_updates for group in self.groups if not group.same_batch)
        return self.step * self.task.num_accumulation * updates

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the model, in eval mode, for the time of a with block."""
        self.task.model.eval()
        try:
            with self.ema.swap():
                yield
        finally:
            self.task.model.train()

    def close(self) -> None:
        """Let go of the log, the processes and the folder."""
        self.threads.close()
        self.log.close()
        self.task.accelerator.end_training()
        if self.lock is not None:
            self.lock.close()


def start_run(
    config: Settings,
    make_task: Callable[[Settings, Accelerator], Task],
    leaves_unused: bool = False,
) -> Run:
    """Build all parts of a run, or take up the one in `config.out`."""
    asked, config = config, settle(config)
    checkpoint = find_checkpoint(config)
    accelerator = open_accelerator(config, leaves_unused)
    task = make_task(config, accelerator)
    progress = Progress(
        step=0, num_ema_updates=0, num_processes=accelerator.num_processes, elapsed_s=0.0
    )
    if checkpoint is None:
        task.begin()
    else:
        with older_named(checkpoint.parent, checkpoint):
            progress = load_progress(checkpoint)
            task.restore(checkpoint)
    task.model.to(accelerator.device)
    if task.sharded:
        task.shard()
    ema = EMA(task.model, config.ema_decay, progress.num_ema_updates)
    if checkpoint is not None:
        with older_named(checkpoint.parent, checkpoint):
            load_parts(task.model, checkpoint / RAW_FILE)
    groups = task.make_groups(ema)
    if checkpoint is not None:
        with older_named(checkpoint.parent, checkpoint):
            _load_groups(groups, checkpoint)
    if not task.is_wrapped:
        for group in groups:
            group.wrapped = accelerator.prepare(group.wrapped)
    folder, lock, changed = enter_folder(config, accelerator, checkpoint, task.loader.source)
    log = _open_log(asked, config, task, progress, folder, checkpoint is not None)
    if changed:
        log.event("data changed", {"step": progress.step, "how": "; ".join(changed)})
    threads = _choose_threads(config, task, progress, log)
    return Run(
        task=task,
        groups=groups,
        ema=ema,
        folder=folder,
        lock=lock,
        log=log,
        clock=Clock(progress.elapsed_s),
        threads=threads,
        step=progress.step,
    )


def _open_log(
    asked: RunConfig,
    config: RunConfig,
    task: Task,
    progress: Progress,
    folder: Path | None,
    is_resumed: bool,
) -> RunLog:
    """Open the log and tell how the run starts, `asked` being its settings as they were given."""
    accelerator = task.accelerator
    log = RunLog(
        folder,
        total_steps=task.max_steps,
        first_step=progress.step,
        tracker=config.tracker,
        active=accelerator.is_main_process,
    )
    facts = {
        "step": progress.step,
        "num_processes": accelerator.num_processes,
        "num_processes_before": progress.num_processes,
        "device": str(accelerator.device),
        "precision": config.precision,
        "parameters": num_parameters(task.model),
    }
    log.event("resume" if is_resumed else "start", facts | task.facts())
    _tell_precision(asked, config, accelerator.device, log)
    machine = {"command": command(), "commit": git_commit()} | describe_hardware()
    log.event("machine", machine, show=False)
    return log


def _tell_precision(asked: RunConfig, config: RunConfig, device: torch.device, log: RunLog) -> None:
    """Log which precision was chosen and why, or that the one asked for is slow here."""
    best = choose_precision("auto", device)
    if asked.precision == "auto" or (config.precision == "bf16") > (best == "bf16"):
        why = explain_precision(best, device)
        log.event("precision", {"chosen": config.precision, "fastest": why})


def _choose_threads(config: RunConfig, task: Task, progress: Progress, log: RunLog) -> ThreadChoice:
    """Return the choice of threads, which goes on at the number of the run's earlier parts."""

    def report(step_s: Mapping[int, float], number: int) -> None:
        by_number = {str(threads): seconds for threads, seconds in step_s.items()}
        log.event("threads", {"chosen": number, "step_s": by_number})

    accelerator = task.accelerator
    return ThreadChoice(
        config.threads,
        active=accelerator.device.type == "cpu" and accelerator.num_processes == 1,
        small=task.is_small,
        known=(progress.num_threads, progress.measured_step_s),
        report=report,
    )


def _load_groups(groups: list[OptimisationGroup], checkpoint: Path) -> None:
    saved, main = load_auxiliary(checkpoint), load_optimizers(checkpoint)
    for group in groups:
        file = checkpoint / ("optimizer.pt" if group.name == MODEL else "auxiliary.pt")
        if not file.exists():
            raise ValueError(f"{checkpoint} lacks {file.name}, the state of {group.name}")
        try:
            if group.name == MODEL:
                group.load_optimizers(main)
            elif group.name in saved:
                group.load_state(saved[group.name])
            else:
                raise ValueError(f"it lacks the state of {group.name}")
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{file} is not the state of this training: {reason}") from error


def _refuse_wild(step: int, *weights: Mapping[str, Tensor]) -> None:
    """Refuse to save what nobody could go on from, in the place of what was saved before."""
    wild = [name for state in weights for name in wild_weights(state)]
    if wild:
        raise ValueError(
            f"step {step}: {len(wild)} weights are not finite, or above {LARGEST_WEIGHT:g}, the "
            f"first is {wild[0]}: they are not saved, and what was saved before is kept. A lower "
            "learning rate or weight decay may help"
        )


def save(run: Run) -> None:
    """Write a checkpoint and remove old ones; only the first process writes, all wait.

    Raises:
        ValueError: weights are not finite; the earlier ones are untouched.
        OSError: it could not be written, e.g. the disk is full; the earlier ones are untouched.
    """
    if run.folder is None:
        return
    task, accelerator = run.task, run.task.accelerator
    is_main = accelerator.is_main_process
    states = gathered([part.state_dict() for part in run.main.optimizers], is_main)
    raw, averaged = gathered((task.model.state_dict(), run.ema.state_dict()), is_main)
    if is_main:
        others = [group.network.state_dict() for group in run.groups if group.name != MODEL]
        _refuse_wild(run.step, raw, averaged, *others)
        progress = Progress(
            step=run.step,
            num_ema_updates=run.ema.num_updates,
            num_processes=accelerator.num_processes,
            elapsed_s=run.clock.total_s,
            num_threads=run.threads.chosen if run.threads.piece_s else 0,
            measured_step_s=run.threads.piece_s,
        )
        folder = save_step(
            run.folder,
            lambda aside: task.write(run, aside, {**raw, **averaged}),
            raw,
            states,
            progress,
            task.config.keep_checkpoints,
            {group.name: group.state() for group in run.groups if group.name != MODEL},
        )
        run.log.event("checkpoint", {"step": run.step, "folder": str(folder)})
    accelerator.wait_for_everyone()
