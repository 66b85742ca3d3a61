"""Result files: JSON that says which command, commit and hardware made its numbers."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scd.common.files import write_file
from scd.common.runtime import describe_hardware, git_commit


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Say where numbers come from: command, commit, hardware, and the device of the model."""
    return {
        "command": command(),
        "commit": git_commit(),
        "hardware": describe_hardware() | {"device": str(device)},
    }


def command() -> str:
    program = Path(sys.argv[0]).name
    if program == "__main__.py":
        program = "python -m scd"
    elif program.endswith(".py"):
        program = f"python {sys.argv[0]}"
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])


def hardware_line(hardware: Mapping[str, Any]) -> str:
    """Say the hardware of a result file in one line for people."""
    processor = hardware["gpus"] if str(hardware["device"]).startswith("cuda") else hardware["cpu"]
    return f"{processor}, {hardware['num_threads']} CPU threads, torch {hardware['torch']}"


def write_text(text: str, path: Path) -> None:
    """Write a text that ends with one line break, so that a reader never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.removesuffix("\n"))


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """Write a result file.

    Raises:
        ValueError: NaN or infinity somewhere in `values`, named by its place: not JSON.
    """
    _refuse_non_finite(values, path.name)
    write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", path)


def _refuse_non_finite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: a result must be a finite number")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _refuse_non_finite(entry, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            _refuse_non_finite(entry, f"{where}[{index}]")
