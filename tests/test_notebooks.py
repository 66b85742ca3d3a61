"""The notebooks of examples/, executed cell by cell with small numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scd.training import fit

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

SMALL = {
    "play_and_steer": {"play": ["forward", "left"], "futures": 2, "ahead": 2},
    "probe_your_model": {
        "steps": 2,
        "batch": 2,
        "measured": {"num_steps": 3, "reuse_depths": 1, "reuse_steps": 1, "frame_steps": 3},
        "num_clips": 2,
    },
    "train_on_clips": {"episodes": 20, "frames": 20, "steps": 2, "batch": 2, "measured": 1},
}
"""Notebook -> values in place of those of its cell that is tagged `parameters`."""


def cells(name: str) -> list[dict[str, Any]]:
    """Code cells of a notebook."""
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text("utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_every_notebook_is_run_and_kept_without_output():
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(SMALL)
    for name in SMALL:
        assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells(name))
        for page in ("README.md", "docs/index.md"):
            text = (EXAMPLES.parent / page).read_text("utf-8")
            assert f"examples/{name}.ipynb" in text, f"{page} does not name the notebook {name}"


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "NUM_MEASURED_BATCHES", 1)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells(name)):
        exec(compile("".join(cell["source"]), f"{name}, code cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(SMALL[name]) <= set(names)
            names.update(SMALL[name])
    if name == "play_and_steer":
        assert names["shown"].shape == (2, 2, 3, 64, 64) and names["fast"].shape == (1, 3, 64, 64)
        assert (tmp_path / "played.mp4").stat().st_size > 1000
    if name == "probe_your_model":
        page = (tmp_path / "my-probe" / "report.html").read_text("utf-8")
        assert "A Network of 6 layers" in page and len(names["result"]["attention"]) == 6
        # Two steps teach nothing, and the page says so.
        assert names["result"]["warnings"] and not names["split"]["is_recommended"]
    if name == "train_on_clips":
        assert names["streamed"].shape == (8, 3, 32, 32)
        assert (tmp_path / "run" / "last").read_text().strip() == "step_000002"
