"""The training loop: one for every task, objective, model and number of processes.

Every random draw comes from a generator made of (seed, purpose, rank, step), and every batch is a
function of its number, so a resumed run repeats the uninterrupted one; on one CPU process, with one
number of threads, bit for bit. Source of the recipe: paper (optimisation).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from scd.common.runtime import make_generator, peak_memory_gib
from scd.common.signals import StopRequest
from scd.data.clip import Batch
from scd.data.loader import UnreadableClip
from scd.optim.optim import lr_multiplier, refuse_non_finite, set_lr
from scd.training.state import MODEL, OptimisationGroup, Run, Settings, Task, save, start_run


def train_task(
    config: Settings,
    make_task: Callable[[Settings, Accelerator], Task],
    leaves_unused: bool = False,
) -> Run:
    """Train until all steps are done or the time limit is over, save, and return the run, closed.

    SIGINT and SIGTERM save and interrupt: whoever needs what was trained must not go on. A run
    folder with the same settings is continued from its last checkpoint. Several processes share the
    work if they are started by `accelerate launch` (GPUs) or `torchrun` (also CPUs, where
    accelerate's launcher starts one process only).

    Args:
        config: the run.
        make_task: builds what is trained, of settings that leave nothing to the machine any more.
        leaves_unused: whether a batch may leave a weight without gradient.

    Raises:
        UnreadableClip: data is damaged, or gone; what was trained is saved.
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
            course = _Course(run, stream, stop)
            reason = _loop(run, course)
            run.log.event("end", {"step": run.step, "reason": reason or "all steps are done"})
        finally:
            stream.close()
            run.close()
        if stop.signal_name:
            raise stop.interrupted(run.step, run.task.max_steps, run.folder)
        if course.lacks_data:
            raise course.refusal()
    return run


class _Course:
    """What a run goes on with: the batches of the coming step, or a reason to stop.

    They are read while the device computes the step before, so that all processes learn in its last
    exchange whether one of them has met a clip that it cannot read; an exchange of its own would
    make every step wait.
    """

    def __init__(self, run: Run, stream: Generator[Batch, None, None], stop: StopRequest) -> None:
        """Read the batches of the first step."""
        self.run, self.stream, self.stop = run, stream, stop
        self._batches: deque[list[Batch]] = deque()
        self._error: UnreadableClip | None = None
        self._num_told = 0
        self.read(run.step)
        self.lacks_data = self._error is not None
        """Whether the coming step lacks a batch, in any of the processes."""
        accelerator = run.task.accelerator
        if accelerator.num_processes > 1:
            lacking = torch.tensor(float(self.lacks_data), device=accelerator.device)
            self.lacks_data = bool(torch.as_tensor(accelerator.reduce(lacking, "mean")))

    @property
    def reason(self) -> str:
        """Why to stop, in words; empty while there is no reason."""
        return self.stop.reason or ("a clip cannot be read" if self.lacks_data else "")

    def jobs(self, step: int) -> list[tuple[OptimisationGroup, int]]:
        """Return the updates of a step: whose, and which of its own."""
        groups = [group for group in self.run.groups if step >= group.first_step]
        return [(group, update) for group in groups for update in range(group.num_updates)]

    def read(self, step: int) -> None:
        """Read all batches of a step, if the run has it."""
        if step == self.run.task.max_steps:
            return
        try:
            with self.run.clock.waiting():
                for group, _ in self.jobs(step):
                    if not group.same_batch:
                        count = self.run.task.num_accumulation
                        self._batches.append([next(self.stream) for _ in range(count)])
        except UnreadableClip as error:
            self._error = error
            self.lacks_data = True

    def take(self) -> list[Batch]:
        """Return the batches of the next update."""
        return self._batches.popleft()

    def tell(self) -> None:
        """Log what clips were left out since the last time."""
        run = self.run
        found = list(run.task.loader.left_out.items())[self._num_told :]
        self._num_told += len(found)
        if run.task.accelerator.num_processes > 1:
            found = gather_object(found)
        for title, reason in dict(found).items():
            run.log.event("left out", {"step": run.step, "file": title, "reason": reason})

    def refusal(self) -> UnreadableClip:
        """Return what a training raises that lacks data after it was saved."""
        run = self.run
        met = self._error or "another process cannot read a clip, and says which"
        steps = f"Stopped after step {run.step} of {run.task.max_steps}"
        if run.step and run.folder:
            return UnreadableClip(f"{met}. {steps}, {run.folder} is saved and can be continued")
        return UnreadableClip(f"{met}. {steps}")


def _loop(run: Run, course: _Course) -> str:
    """Do the steps that are left; return why it stopped before the last one, or nothing."""
    task, config, clock = run.task, run.task.config, run.clock
    values: dict[str, list[float]] = {}
    if course.lacks_data:
        return course.reason
    for step in range(run.step, task.max_steps):
        with run.threads.piece():
            task.begin_step(run)
            reports = list(_step(run, step, course))
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
            if config.data_on_error == "skip":
                course.tell()
            values = {}
        with clock.away():
            saves = last or is_due(run.step, config.save_every)
            if saves:
                save(run)
            if not hurry and not course.lacks_data:
                _look(run, last, saves)
        if reason:
            return reason
    return ""


def _look(run: Run, last: bool, saved: bool) -> None:
    """Measure and draw what is due; held-out clips that cannot be read cost nothing trained."""
    try:
        run.task.look(run, last)
    except UnreadableClip:
        if not saved:
            save(run)
        raise


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


def _step(run: Run, step: int, course: _Course) -> Iterator[_Report]:
    """Move all networks, as often as each is to be moved in a step."""
    batches: list[Batch] = []
    jobs = course.jobs(step)
    for place, (group, update) in enumerate(jobs, start=1):
        set_lr(group.optimizers, lr_multiplier(group.optim, step, run.task.max_steps))
        if not group.same_batch:
            batches = course.take()
        yield _update(run, group, step, update, batches, course, place == len(jobs))


def _update(
    run: Run,
    group: OptimisationGroup,
    step: int,
    update: int,
    batches: list[Batch],
    course: _Course,
    is_last: bool,
) -> _Report:
    """Move one network once, by the gradients of the batches together; in the last update of a step
    read what the next one needs."""
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
    norm = _clip(run, group)
    if is_last:
        course.read(step + 1)
    report = _agree(run, group, total, norm, logs, course)
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
    course: _Course,
) -> _Report:
    """Exchange numbers and wishes to stop: the only wait for the device in an update."""
    stop, reason = course.stop, course.reason
    hurry = bool(stop.signal_name)
    wishes = [float(bool(reason)), float(hurry), float(course.lacks_data)]
    values = [loss, norm, *wishes, *logs.values()]
    numbers = torch.stack([torch.as_tensor(value, device=norm.device).float() for value in values])
    if run.task.accelerator.num_processes > 1:
        numbers = torch.as_tensor(run.task.accelerator.reduce(numbers, "mean"))
    mean_loss, mean_norm, stopping, hurrying, lacking, *means = numbers.tolist()
    course.lacks_data = bool(lacking)
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
