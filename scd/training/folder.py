"""The folder of a run: which checkpoint it goes on from, with which settings, on which data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator

from scd.common.config import differences, from_json, to_json
from scd.common.files import TEMPORARY, read_json, remove_leftovers, take_lock, write_file
from scd.common.places import in_our_words, named_by, parts_of, read_start, remember_start
from scd.data.fingerprint import changes, fingerprint, read_fingerprint
from scd.data.source import Source
from scd.models.weights import CONFIG_FILE
from scd.training.config import RunConfig

LAST_FILE, LOCK_FILE, DATA_FILE = "last", "lock", "data.json"
"""Files of a run folder, besides those of its settings and its log; the last one holds the
fingerprint of the data."""


def find_checkpoint(config: RunConfig) -> Path | None:
    """Return the checkpoint to continue from, or None for a new run.

    Raises:
        FileExistsError: `config.out` holds a run with other settings, or no run at all.
        FileNotFoundError: the checkpoint asked for is not there, or the newest is not whole.
        ValueError: the run's settings, or what names the newest checkpoint, are damaged.
    """
    folder = Path(config.out)
    # A run that was killed before its settings were written has only begun to write them.
    if not config.out or not folder.exists() or (folder.is_dir() and not _entries(folder)):
        if config.from_step:
            raise FileNotFoundError(f"{folder} holds no run yet, so there is no {config.from_step}")
        return None
    if not (folder / CONFIG_FILE).is_file():
        raise FileExistsError(f"{folder} exists and is not the folder of a run: choose another out")
    if config.resume == "never":
        raise FileExistsError(f"{folder} holds a run already, and resume is 'never'")
    different = _differing(config, folder)
    if different:
        raise FileExistsError(
            f"{folder} holds a run with other settings (its value, then the one given): "
            + "; ".join(different)
        )
    if config.from_step:
        return _asked(folder, config.from_step)
    if not (folder / LAST_FILE).is_file():
        return None
    with older_named(folder, None):
        checkpoint = named_by(folder / LAST_FILE)
    if not _is_whole(checkpoint):
        with older_named(folder, checkpoint):
            raise FileNotFoundError(f"{checkpoint}, which {folder / LAST_FILE} names, is not whole")
    return checkpoint


def _entries(folder: Path) -> list[str]:
    """Return the names of what is in a run folder besides its lock and what was being written."""
    names = [entry.name for entry in folder.iterdir()]
    return [name for name in names if name != LOCK_FILE and not name.startswith(TEMPORARY)]


def _differing(config: RunConfig, folder: Path) -> list[str]:
    """Say in which settings a run differs from the one in its folder."""
    theirs, ours = _settings(type(config), folder / CONFIG_FILE), to_json(config)
    lines = differences(in_our_words(theirs, ours, read_start(folder)), ours)
    free = config.free_fields
    is_trained = (folder / DATA_FILE).is_file() and (folder / LAST_FILE).is_file()
    if is_trained and isinstance(theirs, dict):
        kind, _, settings = parts_of(str(theirs.get("data")))
        if (kind, settings) == parts_of(config.data)[::2]:
            # What lies at another place is compared by its fingerprint.
            free = (*free, "data")
    return [line for line in lines if line.split(":")[0].split(".")[0] not in free]


def _settings(kind: type[RunConfig], path: Path) -> Any:
    """Read a run's settings; a field that came after the run was started has its default."""
    values = read_json(path)
    try:
        return to_json(from_json(kind, values, str(path)))
    except ValueError:
        # Told field by field, with all else that differs.
        return values


def _asked(folder: Path, name: str) -> Path:
    """Return the checkpoint of a run that is asked for by name."""
    number = re.fullmatch(r"(?:step_)?0*(\d+)", name)
    steps = checkpoints(folder)
    if number is None or int(number[1]) not in steps:
        there = ", ".join(path.name for path in steps.values()) or "none"
        raise FileNotFoundError(f"{folder} has no whole checkpoint {name}: there are {there}")
    return steps[int(number[1])]


def _is_whole(checkpoint: Path) -> bool:
    return (checkpoint / "optimizer.pt").is_file()


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by their steps, in order."""
    found = {}
    for path in folder.glob("step_*"):
        number = path.name.removeprefix("step_")
        if number.isdecimal() and _is_whole(path):
            found[int(number)] = path
    return dict(sorted(found.items()))


@contextmanager
def older_named(folder: Path, checkpoint: Path | None) -> Iterator[None]:
    """Add to an error of a checkpoint from which one a run can go on, and what that costs.

    Args:
        folder: of the run.
        checkpoint: that is read; None: it is not known which one is the newest.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        steps = checkpoints(folder)
        newest = max(steps, default=0)
        if checkpoint is not None:
            with suppress(ValueError):
                newest = int(checkpoint.name.removeprefix("step_"))
            steps = {step: path for step, path in steps.items() if step < newest}
        if not steps:
            advice = f"{folder} has no older checkpoint, so begin again with another out"
        else:
            step, path = next(reversed(steps.items()))
            advice = f"--from {path.name} goes on from that checkpoint"
            if step < newest:
                advice += f", and steps {step + 1} to {newest} are trained again"
        kind = ValueError if isinstance(error, ValueError) else type(error)
        raise kind(f"{str(error).rstrip('.')}; {advice}") from error


def enter_folder(
    config: RunConfig, accelerator: Accelerator, checkpoint: Path | None, source: Source
) -> tuple[Path | None, TextIO | None, list[str]]:
    """Lock the run folder in the first process, and write the settings into it.

    Returns:
        The folder; its lock; and in what the data differs from that of the run's earlier parts,
        which is refused unless the settings allow it.
    """
    if not config.out:
        return None, None, []
    folder, lock, changed = Path(config.out), None, []
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder / LOCK_FILE)
        if find_checkpoint(config) != checkpoint:
            raise BlockingIOError(f"{folder} was trained by another process meanwhile: start again")
        marks = fingerprint(source)
        if checkpoint is not None:
            changed = _check_data(config, folder, marks)
        remove_leftovers(folder)
        write_file(folder / CONFIG_FILE, json.dumps(to_json(config), indent=2))
        remember_start(folder)
        write_file(folder / DATA_FILE, json.dumps(marks))
    accelerator.wait_for_everyone()
    return folder, lock, changed


def _check_data(config: RunConfig, folder: Path, marks: dict[str, Any]) -> list[str]:
    """Say in what the data is not that of the run, or refuse it (ValueError)."""
    if not (folder / DATA_FILE).is_file():
        # As in older runs.
        return []
    try:
        found = changes(read_fingerprint(folder / DATA_FILE), marks)
    except ValueError:
        if not config.data_changed:
            raise
        found = [f"{DATA_FILE} was damaged"]
    if found and not config.data_changed:
        raise ValueError(
            f"{config.data} is not the data that {folder} was trained on: {'; '.join(found)}. "
            "--data-changed goes on with it as it is now"
        )
    return found
