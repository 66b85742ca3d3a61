"""Where things lie: other words for the same file or folder, and names that are still free.

A run's settings hold paths as they were typed, relative ones to the folder in which the command
was started. `remember_start` keeps that folder beside the settings, as an absolute path and as seen
from the run; so the paths still lead where they led after the run was moved, or all of it together.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from scd.common.config import shown
from scd.common.files import read_json, write_file

START_FILE = "start.json"
"""Beside a run's settings: where the command was started."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a command was started that filled a folder."""

    folder: Path
    """Then."""
    now: Path
    """Where that is if it was moved together with what the command filled."""

    def readings(self, path: str) -> list[Path]:
        """Return what a path of that command may mean today."""
        from_there = os.path.relpath(self.folder / path, self.folder)
        return [self.folder / path, self.now / from_there]


def remember_start(folder: Path) -> None:
    """Write down in a folder where the present command was started."""
    here = Path.cwd()
    kept = {"folder": str(here), "from_here": os.path.relpath(here, folder.resolve())}
    write_file(folder / START_FILE, json.dumps(kept, indent=2))


def read_start(folder: Path) -> Start | None:
    """Read what `remember_start` wrote; None: nothing is there, as in older runs.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / START_FILE
    if not path.is_file():
        return None
    kept = read_json(path)
    try:
        return Start(folder=Path(kept["folder"]), now=folder.resolve() / kept["from_here"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: needed folder and from_here, got {kept!r}") from error


def named_by(pointer: Path) -> Path:
    """Return the folder beside a text file that names it, as `last` does a run's newest step.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else than a name.
    """
    data = pointer.read_bytes()
    name = data.decode("utf-8", "replace").strip()
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"{pointer} must name a folder beside it, got {shown(name)}")
    return pointer.parent / name


def in_our_words(theirs: Any, ours: Any, start: Start | None = None) -> Any:
    """Return JSON values with our words wherever both name the same file or folder.

    What is left different means something else.

    Args:
        theirs: settings of before.
        ours: settings of now, relative to the current folder.
        start: where the command of before was started; None: here.
    """
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return {
            key: in_our_words(value, ours[key], start) if key in ours else value
            for key, value in theirs.items()
        }
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        return [in_our_words(a, b, start) for a, b in zip(theirs, ours, strict=True)]
    if isinstance(theirs, str) and isinstance(ours, str) and _same_place(theirs, ours, start):
        return ours
    return theirs


def _same_place(theirs: str, ours: str, start: Start | None) -> bool:
    kind, path, settings = parts_of(theirs)
    our_kind, our_path, our_settings = parts_of(ours)
    if (kind, settings) != (our_kind, our_settings) or not path or not our_path:
        return False
    readings = [Path(path), *(start.readings(path) if start else [])]
    return any(_is_same(reading, Path(our_path)) for reading in readings)


def parts_of(data: str) -> tuple[str, str, str]:
    """Cut KIND:PATH?SETTINGS, as --data takes it, into its parts."""
    found = re.fullmatch(r"(\w+:)?([^?]*)(\?.*)?", data, re.DOTALL)
    assert found is not None
    return found[1] or "", found[2], found[3] or ""


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        # One of them is not there, or is no path at all.
        return False


def free_place(wanted: Path, is_free: Callable[[Path], bool]) -> Path:
    """Return a path, or the first of PATH-2, PATH-3, ... that a function calls free."""
    others = (wanted.with_stem(f"{wanted.stem}-{number}") for number in count(2))
    return next(path for path in chain([wanted], others) if is_free(path))


def listed(differences: Sequence[str], most: int = 6) -> str:
    """Return some differences of settings in one line."""
    more = f" and {len(differences) - most} more" if len(differences) > most else ""
    return "; ".join(differences[:most]) + more


def refuse_another(out: Path, what: str, differences: Sequence[str]) -> None:
    """Refuse a place that holds another result, if it differs at all.

    Raises:
        FileExistsError: it does; says in what.
    """
    if differences:
        raise FileExistsError(
            f"{out} holds another {what}: choose another --out, or remove it (then and now: "
            f"{listed(differences)})"
        )
