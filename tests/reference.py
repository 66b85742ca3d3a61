"""Where the golden tensors lie, and how a case is read."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(os.environ.get("SCD_REFERENCE", Path(__file__).parents[2] / "shared" / "reference"))


def reference_folder():
    """Return the folder, or skip the test with a reason that can be seen."""
    if not FOLDER.is_dir():
        pytest.skip(f"no golden tensors at {FOLDER}; set SCD_REFERENCE")
    return FOLDER


def load_tables(name):
    """Read a file of tables, or skip where this set of golden tensors has none."""
    path = reference_folder() / name
    if not path.is_file():
        pytest.skip(f"no tables at {path}")
    return load_file(path)


def grid_of(name):
    """Read frames, rows and columns off a name like ids_3x4x4."""
    frames, rows, columns = map(int, name.removeprefix("ids_").split("x"))
    return torch.arange(frames), rows, columns


def cases(subfolder, kind):
    """Name the cases of one kind; one that skips where the folder is absent."""
    found = []
    for path in sorted((FOLDER / subfolder).glob("*.json")):
        case = json.loads(path.read_text())
        if isinstance(case, dict) and case.get("kind") == kind:
            found.append(path.stem)
    return found or [pytest.param("", marks=pytest.mark.skip(f"no golden tensors at {FOLDER}"))]


def load_case(subfolder, name):
    """Read a case: its description, its tensors, and the weights it names."""
    folder = FOLDER / subfolder
    case = json.loads((folder / f"{name}.json").read_text())
    state = {}
    for weights in case["weights"]:
        state |= load_file(folder / weights)
    state = {key: value.float() for key, value in state.items() if key not in case.get("drop", [])}
    data = load_file(folder / case["data"])
    for key, file in case.get("tensors_stored_elsewhere", {}).items():
        data[key] = load_file(folder / file)[key]
    return case, data, state
