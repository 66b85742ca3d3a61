"""The training loop: one for every objective, model and number of processes.

Every random draw comes from a generator made of (seed, purpose, rank, step), and every batch is a
function of its number, so a resumed run repeats the uninterrupted one; on one CPU process bit for
bit. Source of the recipe: paper, section 2.5.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from scd.common.runtime import make_generator, peak_memory_gib
from scd.common.signals import StopRequest
from scd.data.clip import Batch
from scd.optim.optim import lr_multiplier, refuse_non_finite, set_lr
from scd.training.config import Objective, TrainConfig
from scd.training.held_out import read_held_out, sample, validate
from scd.training.learner import MODEL, Learner
from scd.training.state import Run, save, start_run


def train(config: TrainConfig, objective: Objective | None = None) -> Path:
    """Train until `max_steps` or the time limit, save, and return the run.

    SIGINT and SIGTERM save and interrupt: whoever needs the trained model must not go on.

    A run folder with the same settings is continued from its last checkpoint. Several processes
    share the work if they are started by `accelerate launch` (GPUs) or `torchrun` (also CPUs, where
    accelerate's launcher starts one process only).

    Args:
        config: the run.
        objective: what to minimise; as `config.objective` says if None.

    Returns:
        The run folder.

    Raises:
        ValueError: settings, data and model do not fit together, or the loss or gradient was not
            finite: then the step's number is named and the weights have not moved.
        FileExistsError: the run folder holds another run, or anything else.
        OSError: the data cannot be read, a checkpoint not be written, or another process trains in
            the run folder.
        Interrupted: a signal came; what was trained is saved.
    """
    with StopRequest(config.time_limit_s) as stop:
        held_out = read_held_out(config)
        run = start_run(config, objective)
        stream = run.loader.stream(run.step * config.num_accumulation * run.updates_per_step)
        try:
            reason = _loop(run, stream, held_out, stop)
            run.log.event("end", {"step": run.step, "reason": reason or "all steps are done"})
        finally:
            stream.close()
            run.log.close()
            run.accelerator.end_training()
            if run.lock is not None:
                run.lock.close()
        if stop.signal_name:
            raise stop.interrupted(run.step, config.max_steps, run.folder)
    return run.folder


def _loop(
    run: Run, stream: Generator[Batch, None, None], held_out: list[Batch], stop: StopRequest
) -> str:
    """Do the steps that are left; return why it stopped before the last one, or nothing."""
    config, clock = run.config, run.clock
    sums: dict[str, float] = {}
    for step in range(run.step, config.max_steps):
        for learner in run.learners:
            set_lr(learner.optimizers, lr_multiplier(learner.optim, step, config.max_steps))
            for update in range(learner.num_updates):
                report = _update(run, learner, step, update, stream, stop)
                for name, value in report.logs.items():
                    sums[name] = sums.get(name, 0.0) + value / learner.num_updates
        run.ema.update()
        run.step = step + 1
        clock.count_step()
        run.log.advance(run.step, f"loss {report.loss:.4f}  {clock.steps_per_s:.2f} steps/s")

        last = bool(report.reason) or run.step == config.max_steps
        if last or _due(run.step, config.log_every):
            _log_step(run, sums, report.norm)
            sums = {}
        with clock.away():
            if last or _due(run.step, config.save_every):
                save(run)
            if report.hurry:
                return report.reason
            if _due(run.step, config.validate_every) or (last and config.validate_every):
                losses = validate(run, held_out)
                run.log.event("validation", {"step": run.step} | losses)
            if _due(run.step, config.sample_every) or (last and config.sample_every):
                sample(run, held_out)
        if report.reason:
            return report.reason
    return ""


def _update(
    run: Run,
    learner: Learner,
    step: int,
    update: int,
    stream: Generator[Batch, None, None],
    stop: StopRequest,
) -> _StepReport:
    """Move one network once, by the gradients of as many batches as are accumulated."""
    config, accelerator = run.config, run.accelerator
    number = step * learner.num_updates + update
    total = torch.zeros((), device=accelerator.device)
    logs: dict[str, Tensor | float] = {}
    for micro in range(config.num_accumulation):
        with run.clock.waiting():
            batch = next(stream).to(accelerator.device)
        place = (learner.name, run.rank, number, micro)
        own = make_generator(config.seed, *place, device=accelerator.device)
        shared = make_generator(config.seed, f"{learner.name}, all processes", number, micro)
        # Only the last micro-batch exchanges gradients between processes.
        wait = micro < config.num_accumulation - 1
        with accelerator.no_sync(learner.model) if wait else nullcontext():
            loss, found = learner.loss(learner.model, batch, own, shared)
            accelerator.backward(loss / config.num_accumulation)
        total += loss.detach() / config.num_accumulation
        for name, value in found.items():
            logs[name] = logs.get(name, 0.0) + value / config.num_accumulation
    report = _agree(run, total, _clip(run, learner), logs, stop)
    whose = "" if learner.name == MODEL else f" of the {learner.name}"
    refuse_non_finite(step, report.loss, report.norm, whose)
    learner.refuse(step, report.loss, report.logs)
    for optimizer in learner.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return report


def _clip(run: Run, learner: Learner) -> Tensor:
    """Scale a long gradient down; return the norm that it had."""
    limit = learner.optim.clip_norm or math.inf
    norm = run.accelerator.clip_grad_norm_(learner.model.parameters(), limit)
    assert norm is not None
    # Of weights that are cut up each process knows a part.
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@dataclass(frozen=True, kw_only=True)
class _StepReport:
    """What all processes agree on after the gradients of a step."""

    loss: float
    """Mean over processes."""
    norm: float
    """Of the gradient, before clipping."""
    logs: dict[str, float]
    """Numbers to log, means over processes."""
    reason: str
    """Why to stop after this step; empty if not."""
    hurry: bool
    """Whether to stop at once, with no more than a checkpoint."""


def _agree(
    run: Run, loss: Tensor, norm: Tensor, logs: dict[str, Tensor | float], stop: StopRequest
) -> _StepReport:
    """Exchange numbers and wishes to stop: the only wait for the device in an update."""
    reason, hurry = stop.reason, bool(stop.signal_name)
    wishes = [float(bool(reason)), float(hurry)]
    values = [loss, norm, *wishes, *logs.values()]
    numbers = torch.stack([torch.as_tensor(value, device=norm.device).float() for value in values])
    if run.accelerator.num_processes > 1:
        numbers = torch.as_tensor(run.accelerator.reduce(numbers, "mean"))
    mean_loss, mean_norm, stopping, hurrying, *means = numbers.tolist()
    if stopping and not reason:
        reason = "another process stopped"
    if hurrying and not hurry:
        # A signal to one process interrupts all.
        stop.signal_name = "SIGTERM"
    return _StepReport(
        loss=mean_loss,
        norm=mean_norm,
        logs=dict(zip(logs, means, strict=True)),
        reason=reason,
        hurry=bool(hurrying),
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _log_step(run: Run, sums: dict[str, float], norm: float) -> None:
    multiplier = lr_multiplier(run.config.optim, run.step - 1, run.config.max_steps)
    run.log.event(
        "step",
        {"step": run.step}
        | {name: total / run.clock.num_steps for name, total in sums.items()}
        | {"grad_norm": norm, "lr": run.config.optim.lr * multiplier}
        | run.clock.read()
        | {"memory_gib": peak_memory_gib(run.accelerator.device)},
    )
