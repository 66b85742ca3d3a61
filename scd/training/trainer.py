"""The training loop: one for every task, objective, model and number of processes.

Every random draw comes from a generator made of (seed, purpose, rank, step), and every batch is a
function of its number, so a resumed run repeats the uninterrupted one; on one CPU process, with one
number of threads, bit for bit. Source of the recipe: paper (optimisation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from scd.common.runtime import make_generator, peak_memory_gib
from scd.common.signals import StopRequest
from scd.data.clip import Batch
from scd.optim.optim import lr_multiplier, refuse_non_finite, set_lr
from scd.training.config import RunConfig
from scd.training.state import MODEL, OptimisationGroup, Run, Task, save, start_run


def train_task(
    config: RunConfig, make_task: Callable[[Accelerator], Task], leaves_unused: bool = False
) -> Run:
    """Train until all steps are done or the time limit is over, save, and return the run, closed.

    SIGINT and SIGTERM save and interrupt: whoever needs what was trained must not go on. A run
    folder with the same settings is continued from its last checkpoint. Several processes share the
    work if they are started by `accelerate launch` (GPUs) or `torchrun` (also CPUs, where
    accelerate's launcher starts one process only).

    Args:
        config: the run.
        make_task: builds what is trained.
        leaves_unused: whether a batch may leave a weight without gradient.

    Raises:
        ValueError: settings, data and model do not fit together, or the loss or gradient was not
            finite: then the step's number is named and the weights have not moved.
        FileExistsError: the run folder holds another run, or anything else.
        OSError: the data cannot be read, a checkpoint not be written, or another process trains in
            the run folder.
        Interrupted: a signal came; what was trained is saved.
    """
    with StopRequest(config.time_limit_s) as stop:
        run = start_run(config, make_task, leaves_unused)
        stream = run.task.loader.stream(run.first_batch)
        try:
            reason = _loop(run, stream, stop)
            run.log.event("end", {"step": run.step, "reason": reason or "all steps are done"})
        finally:
            stream.close()
            run.close()
        if stop.signal_name:
            raise stop.interrupted(run.step, run.task.max_steps, run.folder)
    return run


def _loop(run: Run, stream: Generator[Batch, None, None], stop: StopRequest) -> str:
    """Do the steps that are left; return why it stopped before the last one, or nothing."""
    task, config, clock = run.task, run.task.config, run.clock
    values: dict[str, list[float]] = {}
    for step in range(run.step, task.max_steps):
        with run.threads.piece():
            task.begin_step(run)
            reports = list(_step(run, step, stream, stop))
            run.ema.update()
        for report in reports:
            for name, value in report.logs.items():
                values.setdefault(name, []).append(value)
        run.step = step + 1
        clock.count_step()
        loss = next(report.loss for report in reports if report.name == MODEL)
        run.log.advance(run.step, f"loss {loss:.4f}  {clock.steps_per_s:.2f} steps/s")

        # What the last exchange of this step said: all processes know the same.
        reason, hurry = reports[-1].reason, reports[-1].hurry
        last = bool(reason) or run.step == task.max_steps
        if last or is_due(run.step, config.log_every):
            _log_step(run, values, reports)
            values = {}
        with clock.away():
            if last or is_due(run.step, config.save_every):
                save(run)
            if not hurry:
                task.look(run, last)
        if reason:
            return reason
    return ""


def is_due(step: int, every: int) -> bool:
    """Tell whether something that happens at every so many steps, or never, happens after one."""
    return every > 0 and step % every == 0


@dataclass(frozen=True, kw_only=True)
class _Report:
    """What all processes agree on after the gradients of an update."""

    name: str
    """Of the group."""
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


def _step(
    run: Run, step: int, stream: Generator[Batch, None, None], stop: StopRequest
) -> Iterator[_Report]:
    """Move all networks, as often as each is to be moved in a step."""
    batches: list[Batch] = []
    for group in run.groups:
        if step < group.first_step:
            continue
        set_lr(group.optimizers, lr_multiplier(group.optim, step, run.task.max_steps))
        for update in range(group.num_updates):
            if not group.same_batch:
                with run.clock.waiting():
                    batches = [next(stream) for _ in range(run.task.num_accumulation)]
            yield _update(run, group, step, update, batches, stop)


def _update(
    run: Run,
    group: OptimisationGroup,
    step: int,
    update: int,
    batches: list[Batch],
    stop: StopRequest,
) -> _Report:
    """Move one network once, by the gradients of the batches together."""
    task, accelerator = run.task, run.task.accelerator
    number = step * group.num_updates + update
    total = torch.zeros((), device=accelerator.device)
    logs: dict[str, Tensor | float] = {}
    for micro, batch in enumerate(batches):
        place = (task.config.seed, group.name, accelerator.process_index, number, micro)
        generator = make_generator(*place, device=accelerator.device)
        shared = make_generator(place[0], f"{group.name}, all processes", number, micro)
        group.objective.share(shared)
        # Only the last micro-batch exchanges gradients between processes.
        wait = micro < len(batches) - 1
        with accelerator.no_sync(group.wrapped) if wait else nullcontext():
            prepared = task.prepare(batch.to(accelerator.device))
            loss, found = group.objective.loss(group.wrapped, prepared, generator)
            accelerator.backward(loss / len(batches))
        total += loss.detach() / len(batches)
        for name, value in found.items():
            logs[name] = logs.get(name, 0.0) + value / len(batches)
    report = _agree(run, group, total, _clip(run, group), logs, stop)
    whose = "" if group.name == MODEL else f" of the {group.name}"
    refuse_non_finite(step, report.loss, report.norm, whose)
    group.refuse(step, report.loss, report.logs)
    for optimizer in group.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return report


def _clip(run: Run, group: OptimisationGroup) -> Tensor:
    """Scale a long gradient down; return the norm that it had."""
    limit = group.optim.clip_norm or math.inf
    norm = run.task.accelerator.clip_grad_norm_(group.wrapped.parameters(), limit)
    assert norm is not None
    # Of weights that are cut up each process knows a part.
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _agree(
    run: Run,
    group: OptimisationGroup,
    loss: Tensor,
    norm: Tensor,
    logs: dict[str, Tensor | float],
    stop: StopRequest,
) -> _Report:
    """Exchange numbers and wishes to stop: the only wait for the device in an update."""
    reason, hurry = stop.reason, bool(stop.signal_name)
    wishes = [float(bool(reason)), float(hurry)]
    values = [loss, norm, *wishes, *logs.values()]
    numbers = torch.stack([torch.as_tensor(value, device=norm.device).float() for value in values])
    if run.task.accelerator.num_processes > 1:
        numbers = torch.as_tensor(run.task.accelerator.reduce(numbers, "mean"))
    mean_loss, mean_norm, stopping, hurrying, *means = numbers.tolist()
    if stopping and not reason:
        reason = "another process stopped"
    if hurrying and not hurry:
        # A signal to one process interrupts all.
        stop.signal_name = "SIGTERM"
    return _Report(
        name=group.name,
        loss=mean_loss,
        norm=mean_norm,
        logs=dict(zip(logs, means, strict=True)),
        reason=reason,
        hurry=bool(hurrying),
    )


def _log_step(run: Run, values: dict[str, list[float]], reports: list[_Report]) -> None:
    task = run.task
    norms = {
        "grad_norm" if report.name == MODEL else f"{report.name}_grad_norm": report.norm
        for report in reports
    }
    optim = task.config.optim
    run.log.event(
        "step",
        {"step": run.step, "left_s": run.clock.left_s(task.max_steps - run.step)}
        | {name: fmean(found) for name, found in values.items()}
        | norms
        | {"lr": optim.lr * lr_multiplier(optim, run.step - 1, task.max_steps)}
        | {"threads": run.threads.number}
        | run.clock.read()
        | {"memory_gib": peak_memory_gib(task.accelerator.device)},
    )
