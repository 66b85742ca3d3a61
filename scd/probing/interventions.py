"""Settings of changes to a trained dense model: layers skipped, made diagonal, or made separable.

What each does to a model is in scd/probing/changes.py. Source: paper, figures 3 and 5, and
(composition).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from scd.common.config import Threads, added, at_least, check_threads
from scd.common.files import read_json
from scd.models.config import EngineKind, Join

Layers = tuple[int, ...]
"""Numbers of layers, from 1."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Start, finetuning and measurement of an intervention."""

    run: str
    """Run folder of a trained dense model, or one of its step folders."""
    out: str
    """Folder for the runs, the evaluations, intervention.json, table.md and a plot."""
    data: str = ""
    """Clips to finetune and measure on. Empty: those of the run."""
    max_steps: int = 300
    """Optimiser steps of finetuning."""
    lr_factor: float = 0.3
    """Learning rates of finetuning over those of the run; constant after the warm-up."""
    warmup_steps: int = 20
    """Steps over which the learning rates rise from 0."""
    seed: int | None = None
    """Of the finetuning's batches and noise. None: one more than the run's, for other batches."""
    control: bool = True
    """Finetune the unchanged model equally long too, to tell the effect of training apart."""
    control_from: str = ""
    """Out folder of another intervention in the same run, whose control is used."""
    context: int = 8
    """Frames of each held-out clip that a model is given."""
    horizon: int = 8
    """Frames that it predicts after them."""
    num_clips: int | None = None
    """Held-out clips, the same for all models; None: 64, or all there are if they are fewer."""
    batch_size: int = 16
    """Clips side by side in the evaluation."""
    timed_frames: int = 40
    """Frames that each model streams, in turns, to be timed."""
    engine: EngineKind = "fast"
    """How models run while they are timed."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU where there is one."""
    threads: Threads = added("auto")
    """CPU threads. auto: as many as the first steps of the trainings, and the first clips of the
    evaluations, are fastest with; what suits the size of the models while they are timed."""

    def __post_init__(self) -> None:
        check_threads(self.threads)
        at_least(
            1,
            max_steps=self.max_steps,
            context=self.context,
            horizon=self.horizon,
            batch_size=self.batch_size,
            timed_frames=self.timed_frames,
        )
        if self.warmup_steps < 0 or self.lr_factor <= 0:
            raise ValueError(
                "warmup_steps must be 0 or more and lr_factor above 0, got "
                f"{self.warmup_steps} and {self.lr_factor}"
            )
        if self.control_from and not self.control:
            raise ValueError("control_from has no effect without control")
        if not self.run or not self.out:
            raise ValueError("an intervention needs a run to start from and a folder for its out")


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """One change of a dense model, and the comparison that it is put to."""

    comparison: Annotated[Comparison, tyro.conf.arg(name="")]
    """Start, finetuning and measurement."""


@dataclass(frozen=True, kw_only=True)
class SkipConfig(Intervention):
    """Skip middle layers in all steps but the first ones. Source: paper, figure 3."""

    layers: str
    """First and last layer that is skipped, counted from 1: "4-8"."""
    full_steps: int
    """First steps of each frame that run all layers; fewer than the run's steps per frame."""

    @property
    def span(self) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.layers.strip())
        if found is None:
            raise ValueError(f'layers must be given as "4-8", got {self.layers!r}')
        return int(found[1]), int(found[2] or found[1])


@dataclass(frozen=True, kw_only=True)
class DiagonalConfig(Intervention):
    """Let a frame see only itself in the last layers. Source: paper, figure 5."""

    last: int
    """How many last layers."""


@dataclass(frozen=True, kw_only=True)
class RecomposeConfig(Intervention):
    """Make a separable model of a dense one's layers. Source: paper (composition)."""

    encoder: int = 0
    """How many first layers the encoder gets."""
    decoder: str = ""
    """How many first and last layers the decoder gets: "2+4"."""
    split: str = ""
    """A probe.json, for its recommended split in place of encoder and decoder."""
    unrecommended: bool = False
    """Take the split of a probe that recommends none, because its model predicts too little."""
    join: Join = "prefix"
    """How the decoder is given the context."""
    context_noise: float = 0.05
    """Strength of the noise on the context in training: paper, equation 7."""
    scratch: bool = True
    """Train the same separable model from scratch too, with as many operations as the dense
    training and the finetuning took together."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which layers of a dense model become encoder and decoder."""

    encoder: Layers
    """Its first layers."""
    decoder: Layers
    """Layers in rising order; those of the encoder may be among them, as copies."""


def split_of(config: RecomposeConfig, num_layers: int) -> Split:
    """Read the split that is given as numbers or by a probe's result."""
    if bool(config.split) == bool(config.encoder or config.decoder):
        raise ValueError("a split is given by encoder and decoder, or by a probe.json, not by both")
    if config.unrecommended and not config.split:
        raise ValueError("unrecommended has no effect without the split of a probe")
    if config.split:
        encoder, decoder = proposed_layers(Path(config.split), config.unrecommended)
    else:
        found = re.fullmatch(r"(\d+)\+(\d+)", config.decoder.strip())
        if found is None:
            raise ValueError(
                f'decoder must be given as first+last layers, like "2+4", got {config.decoder!r}'
            )
        first, last = int(found[1]), int(found[2])
        encoder = config.encoder
        if first + last > num_layers:
            raise ValueError(f"{config.decoder} are more layers than the model's {num_layers}")
        decoder = (*range(1, first + 1), *range(num_layers - last + 1, num_layers + 1))
    if not 1 <= encoder <= num_layers:
        raise ValueError(f"encoder must have 1 .. {num_layers} layers, got {encoder}")
    if not decoder or list(decoder) != sorted({*decoder} & {*range(1, num_layers + 1)}):
        raise ValueError(
            f"decoder must be rising numbers of layers in 1 .. {num_layers}, got {list(decoder)}"
        )
    return Split(encoder=tuple(range(1, encoder + 1)), decoder=decoder)


def proposed_layers(path: Path, unrecommended: bool = False) -> tuple[int, Layers]:
    """Read the split that a probe recommends: depth of the encoder, layers of the decoder.

    Raises:
        ValueError: there is none, or, but for `unrecommended`, the probe warns of its own model.
        OSError: it cannot be read.
    """
    result: Any = read_json(path)
    try:
        split = result["proposed_split"]
        encoder, decoder = int(split["encoder_layers"]), split["decoder_layers"]
        layers = tuple(int(layer) for layer in decoder)
        # Probes before the warnings recommended every split.
        is_recommended, warnings = split.get("is_recommended", True), result.get("warnings", [])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no proposed_split of encoder_layers and decoder_layers"
        ) from error
    if not is_recommended and not unrecommended:
        reason = f": {warnings[0]}" if isinstance(warnings, list) and warnings else ""
        raise ValueError(
            f"{path} recommends no split{reason}. Probe a model that was trained longer, or take "
            "the split all the same with --unrecommended"
        )
    return encoder, layers
