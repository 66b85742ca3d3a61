"""Run log: one JSON line per event on disk, a readable line on screen, trackers if asked for."""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from scd.common.files import text_lines

Tracker = Literal["none", "tensorboard", "wandb"]
"""Where numbers go besides the log file."""


class RunLog:
    """Log of one run: `event` per thing that happened, `advance` per step, `close` at the end.

    Every process makes one; only the one with `active=True` writes and prints.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        total_steps: int,
        first_step: int = 0,
        tracker: Tracker = "none",
        active: bool = True,
        console: Console | None = None,
    ) -> None:
        """Open `log.jsonl` in the run folder; what an earlier part of the run wrote is kept.

        Args:
            folder: the run folder; it exists. None: lines go to the screen only.
            total_steps: where the progress bar ends; readable lines say it beside a step.
            first_step: where it begins: steps that were done before.
            tracker: a service that gets every number too.
            active: whether this process is the one that writes.
            console: where lines and the bar go; the terminal's standard error if None.

        Raises:
            ValueError: the tracker's package is not installed.
        """
        path = folder / "log.jsonl" if folder else Path(os.devnull)
        self._file = None
        self._tracker = None
        self._bar: Progress | None = None
        self._total_steps = total_steps
        if not active:
            return
        self._tracker = _open_tracker(tracker, folder or Path())
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:
            # The last line of a run that was killed while it wrote.
            self._file.write("\n")
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=total_steps, completed=first_step)
            self._bar.start()

    def event(self, name: str, values: Mapping[str, Any], *, show: bool = True) -> None:
        """Write one event.

        Args:
            name: what happened, e.g. "step" or "validation".
            values: numbers, texts or nested mappings of them; non-finite numbers become null. The
                numbers go to the tracker, at `values["step"]` if that is given.
            show: whether a readable line goes on screen as well.
        """
        if self._file is None:
            return
        record = {"event": name, "time": round(time.time(), 3)} | _plain(values)
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if show:
            self.console.print(readable(name, values, self._total_steps), markup=False)
        if self._tracker is not None:
            self._tracker.log(name, _flat_numbers(values), int(values.get("step", 0)))

    def advance(self, step: int, text: str) -> None:
        """Move the progress bar to a step and put a text beside it; off a terminal nothing."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)

    def close(self) -> None:
        """Finish the bar, the file and the tracker; more calls do nothing."""
        for part in (self._bar, self._file, self._tracker):
            if isinstance(part, Progress):
                part.stop()
            elif part is not None:
                part.close()
        self._bar = self._file = self._tracker = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_log(folder: Path, name: str | None = None) -> list[dict[str, Any]]:
    """Return the events of a run in order, all of them or those of one name.

    A line that a killed process left unfinished is skipped.

    Raises:
        FileNotFoundError: the folder has no log.
    """
    path = folder / "log.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no log.jsonl: not the folder of a run")
    events = []
    for line in text_lines(path):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if name is None or record.get("event") == name:
            events.append(record)
    return events


def read_curve(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the events of one name by ascending step: what the run that went on has behind it.

    A killed run goes on from its last checkpoint; the steps that it then makes anew count once,
    and what it had logged beyond the checkpoint is dropped.

    Raises:
        FileNotFoundError: the folder has no log.
    """
    kept: list[dict[str, Any]] = []
    for event in read_log(folder):
        if event.get("event") == "resume":
            kept = [earlier for earlier in kept if earlier["step"] <= event["step"]]
        elif event.get("event") == name:
            kept = [earlier for earlier in kept if earlier["step"] < event["step"]] + [event]
    return kept


def readable(name: str, values: Mapping[str, Any], total_steps: int = 0) -> str:
    """Return one line for people: the event, then each value with four significant digits.

    A step is told with the number of all (0: unknown), and `left_s` in words.
    """
    numbers = _flat(values)
    if total_steps and "step" in numbers:
        numbers["step"] = f"{numbers['step']} of {total_steps}"
    if "left_s" in numbers:
        left = {"left": duration(numbers.pop("left_s"))}
        numbers = {"step": numbers.pop("step", "")} | left | numbers
    parts = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in numbers.items()
    ]
    return f"{name:>10}  " + "  ".join(parts)


def duration(seconds: float) -> str:
    """Say a time for people: "8 s", "3 min", "5 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _flat_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in _flat(values).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step"
    }


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"))

    def log(self, event: str, numbers: Mapping[str, float], step: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(f"{event}/{key}", value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path) -> None:
        module = _import("wandb", "wandb")
        # Each part of an interrupted run is a run of its own there; the group holds them together.
        self._run = module.init(project="scd", group=folder.name, dir=str(folder))

    def log(self, event: str, numbers: Mapping[str, float], step: int) -> None:
        self._run.log({f"{event}/{key}": value for key, value in numbers.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def _open_tracker(tracker: Tracker, folder: Path) -> _TensorBoard | _Wandb | None:
    if tracker == "tensorboard":
        return _TensorBoard(folder)
    if tracker == "wandb":
        return _Wandb(folder)
    return None


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f'tracker "{package}" needs the package {package}, which is not installed: '
            'pip install -e ".[track]", or choose tracker "none"'
        ) from error
