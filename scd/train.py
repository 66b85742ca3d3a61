"""The training loop: one for every objective, model and number of processes.

Every random draw comes from a generator made of (seed, purpose, rank, step), and every batch is a
function of its number, so a resumed run repeats the uninterrupted one; on one CPU process bit for
bit. Source of the recipe: paper, section 2.5.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scd.autoencoder.pixels import PixelAutoencoder
from scd.clip import Batch
from scd.held_out import read_held_out, sample, validate
from scd.model.build import build
from scd.objective.denoise import denoise
from scd.optim import lr_multiplier, set_lr
from scd.run import Objective, TrainConfig
from scd.running import Run, save, start_run
from scd.runtime import make_generator, peak_memory_gib
from scd.stopping import Interrupted, StopRequest


def train(config: TrainConfig, objective: Objective | None = None) -> Path:
    """Train until `max_steps` or the time limit, save, and return the run.

    SIGINT and SIGTERM save and interrupt: whoever needs the trained model must not go on.

    A run folder with the same settings is continued from its last checkpoint. Several processes
    share the work if they are started by `accelerate launch` (GPUs) or `torchrun` (also CPUs, where
    accelerate's launcher starts one process only).

    Args:
        config: the run.
        objective: what to minimise; denoising by `config.objective` if None.

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
        run = start_run(config, objective or denoising(config))
        stream = run.loader.stream(run.step * config.num_accumulation)
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
            raise Interrupted(
                stop.signal_name,
                f"{stop.signal_name} after step {run.step} of {config.max_steps}: saved "
                f"{run.folder}, and the same command goes on from there",
            )
    return run.folder


def _loop(
    run: Run, stream: Generator[Batch, None, None], held_out: list[Batch], stop: StopRequest
) -> str:
    """Do the steps that are left; return why it stopped before the last one, or nothing."""
    config, clock = run.config, run.clock
    sums: dict[str, Any] = {}
    for step in range(run.step, config.max_steps):
        multiplier = lr_multiplier(config.optim, step, config.max_steps)
        set_lr(run.optimizers, multiplier)
        step_loss = torch.zeros((), device=run.accelerator.device)
        for micro in range(config.num_accumulation):
            with clock.waiting():
                batch = next(stream).to(run.accelerator.device)
            generator = make_generator(
                config.seed, "train", run.rank, step, micro, device=run.accelerator.device
            )
            # Only the last micro-batch exchanges gradients between processes.
            wait = micro < config.num_accumulation - 1
            with run.accelerator.no_sync(run.model) if wait else nullcontext():
                loss, logs = run.objective(run.model, batch, generator)
                run.accelerator.backward(loss / config.num_accumulation)
            step_loss += loss.detach() / config.num_accumulation
            for name, value in logs.items():
                sums[name] = sums.get(name, 0.0) + value / config.num_accumulation
        report = _agree(run, step_loss, _clip(run), stop)
        _refuse_non_finite(step, report)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        run.ema.update()
        run.step = step + 1
        clock.count_step()
        run.log.advance(run.step, f"loss {report.loss:.4f}  {clock.steps_per_s:.2f} steps/s")

        last = bool(report.reason) or run.step == config.max_steps
        if last or _due(run.step, config.log_every):
            _log_step(run, sums, report.norm, multiplier)
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


def denoising(config: TrainConfig) -> Objective:
    """Return the objective of `config.objective`: denoising of encoded frames."""
    autoencoder = PixelAutoencoder(config.autoencoder)
    with torch.device("meta"):
        needs_first_frame = build(config.model).needs_first_frame

    def objective(
        model: nn.Module, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        clean = autoencoder.encode(batch.frames)
        return denoise(
            model, clean, batch.conditions, config.objective, generator, needs_first_frame
        )

    return objective


def _clip(run: Run) -> Tensor:
    """Scale a long gradient down; return the norm that it had."""
    limit = run.config.optim.clip_norm or math.inf
    norm = run.accelerator.clip_grad_norm_(run.model.parameters(), limit)
    assert norm is not None
    return norm


@dataclass(frozen=True, kw_only=True)
class _StepReport:
    """What all processes agree on after the gradients of a step."""

    loss: float
    """Mean over processes."""
    norm: float
    """Of the gradient, before clipping."""
    reason: str
    """Why to stop after this step; empty if not."""
    hurry: bool
    """Whether to stop at once, with no more than a checkpoint."""


def _agree(run: Run, loss: Tensor, norm: Tensor, stop: StopRequest) -> _StepReport:
    """Exchange loss and wishes to stop: the only wait for the device in a step."""
    reason, hurry = stop.reason, bool(stop.signal_name)
    wishes = norm.new_tensor([float(bool(reason)), float(hurry)])
    numbers = torch.cat([torch.stack([loss, norm]).float(), wishes])
    if run.accelerator.num_processes > 1:
        numbers = torch.as_tensor(run.accelerator.reduce(numbers, "mean"))
    mean_loss, mean_norm, stopping, hurrying = numbers.tolist()
    if stopping and not reason:
        reason = "another process stopped"
    if hurrying and not hurry:
        # A signal to one process interrupts all.
        stop.signal_name = "SIGTERM"
    return _StepReport(loss=mean_loss, norm=mean_norm, reason=reason, hurry=bool(hurrying))


def _refuse_non_finite(step: int, report: _StepReport) -> None:
    if not (math.isfinite(report.loss) and math.isfinite(report.norm)):
        raise ValueError(
            f"step {step}: the loss is {report.loss} and the norm of the gradient {report.norm}, "
            "but both must be finite: stopped before the weights moved"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _log_step(run: Run, sums: dict[str, Any], norm: float, multiplier: float) -> None:
    run.log.event(
        "step",
        {"step": run.step}
        | {name: float(total) / run.clock.num_steps for name, total in sums.items()}
        | {"grad_norm": norm, "lr": run.config.optim.lr * multiplier}
        | run.clock.read()
        | {"memory_gib": peak_memory_gib(run.accelerator.device)},
    )
