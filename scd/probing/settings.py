"""Settings of `scd probe`."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from scd.common.config import Threads, at_least, check_threads
from scd.data.spaces import Split as DataSplit
from scd.models.config import Join

MIN_PAST = 2
"""Given frames before the one that is denoised: one would not show how far back attention goes."""

PACKAGE = "scd.probing.measurements"
"""Where measurements are: one module each, whose name is the measurement's."""


def measurement_names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(import_module(PACKAGE).__path__)]


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What a probe measures, of any model on any clips."""

    measurements: tuple[str, ...] = tuple(measurement_names())
    """What to measure. `splits` recommends a split, beside which the results of attention,
    leave_one_out and reuse are shown if they are measured too."""
    num_noises: int = 1
    """Draws of noise for each clip."""
    num_steps: int = 50
    """Denoising steps of the trajectories whose features are compared."""
    layers: tuple[int, ...] | None = None
    """Numbers, from 1, of the layers for similarity, colours and leave_one_out; None: all."""
    tokens: tuple[int, ...] | None = None
    """Tokens, from 0, row after row, whose attention maps are shown; None: the one in the middle
    of the frame."""
    reuse_depths: int = 6
    """Numbers of first layers in the map of feature reuse; as many as there are layers or more:
    all."""
    reuse_steps: int = 5
    """Steps of the map of feature reuse, more of them early; num_steps - 1 or more: all."""
    levels: tuple[float, ...] | None = None
    """Times at which losses are taken; None: the quantiles .1 .3 .5 .7 .9 of the density of times
    that the model was trained on, or of the paper's where that is not known."""
    frame_steps: int | None = None
    """Denoising steps of the frame whose seconds are predicted; None: as the checkpoint says, or
    num_steps where there is none."""
    join: Join = "prefix"
    """How a split's decoder gets its context, for the prediction of its seconds."""
    tolerance: float = 0.05
    """Relative loss, without training, that the recommended split may add."""
    seed: int = 0
    """Seed of the choice of clips and of the noise."""

    def __post_init__(self) -> None:
        least = {"num_noises": 1, "num_steps": 2, "reuse_depths": 1, "reuse_steps": 1}
        for name, smallest in least.items():
            at_least(smallest, **{name: getattr(self, name)})
        if self.levels is not None and not (
            self.levels and all(0 < level <= 1 for level in self.levels)
        ):
            raise ValueError(f"levels are times in (0, 1], one or more, got {self.levels}")
        at_least(1, frame_steps=self.frame_steps)
        known, given = set(measurement_names()), self.measurements
        if not given or len(set(given)) < len(given) or not known.issuperset(given):
            raise ValueError(
                f"needed different measurements of {', '.join(sorted(known))}, got {given}"
            )
        if self.tolerance < 0:
            raise ValueError(f"tolerance must not be negative, got {self.tolerance}")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(MeasureConfig):
    """One probe of one checkpoint."""

    run: str
    """Run folder, one of its step folders, or a world folder."""
    data: str
    """"toy:32", "toy:64", or a folder of episodes."""
    out: str = "probe"
    """Folder for probe.json, report.html and the parts that are done."""
    num_clips: int = 16
    """Held-out clips, which do not overlap."""
    context: int = 8
    """Given frames of each clip; the frame after them is denoised."""
    split: DataSplit = "val"
    """Part of the data that the clips are from."""
    weights: Literal["ema", "raw"] = "ema"
    """The averaged weights, or those the optimiser moved."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: Threads = "auto"
    """CPU threads. auto: one where all products are small, else all, or OMP_NUM_THREADS."""
    strict: bool = False
    """Stop at the first episode that cannot be read, instead of leaving it out."""

    def __post_init__(self) -> None:
        at_least(1, num_clips=self.num_clips)
        at_least(MIN_PAST, context=self.context)
        check_threads(self.threads)
        super().__post_init__()
