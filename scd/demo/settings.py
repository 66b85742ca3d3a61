"""Settings of `scd demo`."""

from __future__ import annotations

from dataclasses import dataclass

from scd.common.config import Threads, at_least, check_threads
from scd.evaluation.protocols import Protocol
from scd.training.presets import preset

HORIZONS = (1, 4, 8)
"""Predicted frames of the report."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """One demo."""

    world: str = ""
    """World that is streamed: the name of a shipped one (scd worlds), a folder or a run with clips;
    empty: the best one that comes with the package."""
    train: bool = False
    """Train a small world and its dense twin here, in minutes, and compare them; without it the
    world that comes with the package is streamed and steered, in seconds."""
    quick: bool = False
    """Train and measure a little only, to see that everything works: the numbers mean nothing."""
    out: str = "demo"
    """Folder for the report; a new one, or that of an earlier demo."""
    seed: int = 0
    """Seed of weights, data, noise and the choice of clips."""
    steps: int | None = None
    """Optimiser steps of the separable model; None: those of the preset, or 60 if quick."""

    threads: Threads = "auto"
    """CPU threads that compute. auto: what suits the size of the model; in training, as many as the
    first steps are fastest with; at most OMP_NUM_THREADS."""

    def __post_init__(self) -> None:
        if not self.train and (self.quick or self.steps is not None):
            raise ValueError("quick and steps have no effect without train: add --train")
        check_threads(self.threads)
        at_least(1, steps=self.steps)

    @property
    def num_steps(self) -> int:
        return self.steps or (60 if self.quick else preset("toy").max_steps)

    @property
    def protocol(self) -> Protocol:
        return Protocol(
            context=8,
            horizon=max(HORIZONS),
            num_clips=16 if self.quick else 64,
            batch_size=32,
            seed=self.seed,
            memory=False,
        )
