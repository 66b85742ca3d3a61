"""Results of an evaluation's units in a folder, written by any process and found again later."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from scd.common.config import differences
from scd.common.files import file_aside, read_json
from scd.common.provenance import write_json

ABOUT_FILE = "about.json"
"""All that the parts depend on."""

ENDING = ".safetensors"
"""How the names of parts end."""

logger = logging.getLogger(__name__)


class Parts:
    """A folder of parts that all depend on the same. Phases: `open`; `missing`, `write`; `read`."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is written yet."""
        self.folder = folder

    def open(self, about: Mapping[str, Any]) -> None:
        """Make the folder, or go on with one that was left.

        Args:
            about: all that the parts depend on, as JSON.

        Raises:
            ValueError: the folder holds parts that depend on something else, or other things.
        """
        file = self.folder / ABOUT_FILE
        about = json.loads(json.dumps(about))
        if not file.is_file():
            if self.folder.exists() and any(self.folder.glob(f"*{ENDING}")):
                raise ValueError(f"{self.folder} holds parts, but no {ABOUT_FILE}: remove it")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(about, file)
            return
        try:
            found = read_json(file)
        except ValueError as error:
            raise ValueError(f"{error}: remove {self.folder}") from error
        other = differences(found, about)
        if other:
            raise ValueError(
                f"{self.folder} holds parts of another evaluation; then and now: "
                f"{'; '.join(other[:6])}. Remove it, or choose another --out"
            )

    def missing(self, names: Sequence[str]) -> list[str]:
        """Return the parts that are not there; a damaged one counts as missing, with a warning."""
        return [name for name in names if not self._is_whole(self._file(name))]

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a part, which appears whole or not at all."""
        with file_aside(self._file(name)) as aside:
            save_file(dict(tensors), aside)

    def read(self, name: str) -> dict[str, Tensor]:
        """Read a part."""
        return load_file(self._file(name))

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}{ENDING}"

    def _is_whole(self, file: Path) -> bool:
        if not file.is_file():
            return False
        try:
            with safe_open(str(file), framework="pt") as opened:
                return bool(list(opened.keys()))
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged and is measured again: %s", file, error)
            return False
