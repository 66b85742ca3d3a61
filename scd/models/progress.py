"""How far a run has come, in the folder of each of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scd.common.config import added, from_json
from scd.common.files import read_json

PROGRESS_FILE = "progress.json"
"""Beside the weights of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come: with its config and seed, all that its random draws depend on."""

    step: int
    """Optimiser steps done; the next batch and the next draws follow from it."""
    num_ema_updates: int
    """Updates of the averaged weights, for the ramp of their decay."""
    num_processes: int
    """Processes that trained; another number continues on other batches."""
    elapsed_s: float
    """Seconds of training so far, over all parts of the run."""
    num_threads: int = added(0)
    """CPU threads that were found fastest. 0: none were looked for."""
    measured_step_s: float = added(0.0)
    """Seconds of a step with so many."""


def load_progress(step_folder: Path) -> Progress:
    """Read how far the run was at a checkpoint.

    Raises:
        ValueError: the file is damaged.
    """
    path = step_folder / PROGRESS_FILE
    return from_json(Progress, read_json(path), str(path))
