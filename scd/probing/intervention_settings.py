"""What can be asked for: an intervention in a trained dense model, and what it is compared with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from scd.common.files import read_json
from scd.engine.interface import EngineKind
from scd.models.decoder import Join

Layers = tuple[int, ...]
"""Numbers of layers, counted from 1 as in all names and flags."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What an intervention starts from, how long it is finetuned, and how all is measured."""

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
    """Finetune the untouched model equally long too: so what mere training gives is told apart."""
    control_from: str = ""
    """Out folder of another intervention in the same run: its control is taken, not trained
    again."""
    context: int = 8
    """Frames of each held-out clip that a model is given."""
    horizon: int = 8
    """Frames that it predicts after them."""
    num_clips: int | None = None
    """Held-out clips, the same for all models; None: 64, or all there are if they are fewer."""
    batch_size: int = 16
    """Clips side by side in the evaluation."""
    timed_frames: int = 40
    """Frames that each model streams, one of each in turn, to be timed."""
    engine: EngineKind = "fast"
    """How models run while they are timed."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "context", "horizon", "batch_size", "timed_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.warmup_steps < 0 or self.lr_factor <= 0:
            raise ValueError(
                "warmup_steps must be 0 or more and lr_factor above 0, got "
                f"{self.warmup_steps} and {self.lr_factor}"
            )
        if self.control_from and not self.control:
            raise ValueError("control_from has no effect without control")
        if not self.run or not self.out:
            raise ValueError("an intervention needs a run to start from and a folder for its out")


Shared = Annotated[Comparison, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class SkipConfig:
    """Skip middle layers in all steps but the first ones. Source: paper, section 5.4."""

    layers: str
    """First and last layer that is skipped, counted from 1: "4-8"."""
    full_steps: int
    """First steps of each frame that run all layers; fewer than the run's steps per frame."""
    comparison: Shared
    """Start, finetuning and measurement."""

    @property
    def span(self) -> tuple[int, int]:
        """First and last skipped layer, from 1."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.layers.strip())
        if found is None:
            raise ValueError(f'layers must be given as "4-8", got {self.layers!r}')
        return int(found[1]), int(found[2] or found[1])


@dataclass(frozen=True, kw_only=True)
class DiagonalConfig:
    """Let a frame see only itself in the last layers. Source: paper, section 5.5."""

    last: int
    """How many last layers."""
    comparison: Shared
    """Start, finetuning and measurement."""


@dataclass(frozen=True, kw_only=True)
class RecomposeConfig:
    """Make a separable model of a dense one's layers. Source: paper, section 6.1."""

    comparison: Shared
    """Start, finetuning and measurement."""
    encoder: int = 0
    """How many first layers the encoder gets."""
    decoder: str = ""
    """How many first and last layers the decoder gets: "2+4"."""
    split: str = ""
    """A probe.json whose proposed split is taken, in place of encoder and decoder."""
    join: Join = "prefix"
    """How the decoder meets the context."""
    context_noise: float = 0.05
    """Strength of the noise on the context in training: paper, section 2.3."""
    scratch: bool = True
    """Train the same separable model from scratch too, with as many operations as the dense
    training and the finetuning took together."""


Intervention = SkipConfig | DiagonalConfig | RecomposeConfig
"""One of the three."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which layers of a dense model become encoder and decoder."""

    encoder: Layers
    """Its first layers."""
    decoder: Layers
    """Layers in rising order; those of the encoder may be among them, as copies."""


def split_of(config: RecomposeConfig, num_layers: int) -> Split:
    """Return the split that is asked for.

    Raises:
        ValueError: none or two are given, they cannot be read, or name layers that are not there.
        OSError: the probe's result cannot be read.
    """
    if bool(config.split) == bool(config.encoder or config.decoder):
        raise ValueError("a split is given by encoder and decoder, or by a probe.json, not by both")
    if config.split:
        encoder, decoder = proposed_layers(Path(config.split))
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


def proposed_layers(path: Path) -> tuple[int, Layers]:
    """Read the split that a probe proposes: depth of the encoder, layers of the decoder.

    Raises:
        OSError: there is no such file.
        ValueError: it holds no such proposal.
    """
    result: Any = read_json(path)
    try:
        split = result["proposed_split"]
        encoder, decoder = split["encoder_layers"], split["decoder_layers"]
        return int(encoder), tuple(int(layer) for layer in decoder)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no proposed_split of encoder_layers and decoder_layers"
        ) from error
