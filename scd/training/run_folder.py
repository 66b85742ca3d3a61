"""The folder of a run: may a command begin in it, or go on?"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from scd.common.config import differences, to_json
from scd.common.files import read_json

LOCK_FILE = "lock"
"""File of a run folder that is locked while the run is going on."""

CONFIG_FILE = "config.json"
"""File of a run folder with the settings of the run."""


@runtime_checkable
class Settings(Protocol):
    """What settings of a run say of its folder; a dataclass."""

    @property
    def out(self) -> str:
        """Folder of the run."""
        ...

    @property
    def resume(self) -> Literal["auto", "never"]:
        """Whether a run that is there goes on, or is refused."""
        ...


def goes_on(
    config: Settings, free: Collection[str], settings_of: Callable[[Path], Any] = read_json
) -> bool:
    """Tell whether `config.out` holds the run of these settings, begun earlier.

    Args:
        config: the run.
        free: names of settings in which the two may differ.
        settings_of: reads the settings in a file.

    Raises:
        FileExistsError: it holds a run with other settings, or no run at all.
        ValueError: its settings are damaged.
    """
    folder = Path(config.out)
    if not folder.exists():
        return False
    if folder.is_dir() and {entry.name for entry in folder.iterdir()} <= {LOCK_FILE}:
        return False
    if not (folder / CONFIG_FILE).is_file():
        raise FileExistsError(f"{folder} exists and is not the folder of a run: choose another out")
    if config.resume == "never":
        raise FileExistsError(f"{folder} holds a run already, and resume is 'never'")
    different = [
        line
        for line in differences(settings_of(folder / CONFIG_FILE), to_json(config))
        if line.split(":")[0].split(".")[0] not in free
    ]
    if different:
        raise FileExistsError(
            f"{folder} holds a run with other settings (its value, then the one given): "
            + "; ".join(different)
        )
    return True
