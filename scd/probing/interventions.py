"""Changes to a trained dense model: layers skipped, layers made diagonal, or made separable.

Each changes the model's settings and keeps its weights. The changed model is trained and measured
like any other (scd/probing/compare.py).
Source: paper, figures 3 and 5, and (composition).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from torch import nn

from scd.common.config import Threads, added, at_least, check_threads
from scd.common.files import read_json
from scd.models.checkpoint import World
from scd.models.config import (
    DecoderConfig,
    EncoderConfig,
    EngineKind,
    Join,
    SamplingConfig,
    SeparableConfig,
)
from scd.models.dense import DenseDiffuser
from scd.models.separable import SeparableDiffuser
from scd.models.stack import skip_after

Layers = tuple[int, ...]
"""Numbers of layers, from 1."""

Module = TypeVar("Module", bound=nn.Module)


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
class Intervention(ABC):
    """One change of a dense model, and the comparison that it is put to."""

    comparison: Annotated[Comparison, tyro.conf.arg(name="")]
    """Start, finetuning and measurement."""

    @abstractmethod
    def change(self, model: DenseDiffuser, sampling: SamplingConfig) -> nn.Module:
        """Return the changed model; the given one stays as it is.

        Raises:
            ValueError: the model was changed in this way before, or has not the layers or steps.
            OSError: the split of a probe cannot be read.
        """

    def change_world(self, world: World) -> World:
        """Return a world with the changed model; refuse a model that is not dense (ValueError)."""
        if not isinstance(world.model, DenseDiffuser):
            raise ValueError(
                "an intervention needs a dense model, but this one is separable: it is split "
                "already"
            )
        model: Any = self.change(world.model, world.sampling)
        return replace(world, model=model.eval())


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

    def change(self, model: DenseDiffuser, sampling: SamplingConfig) -> nn.Module:
        return skipping(model, self.span, self.full_steps, sampling)


@dataclass(frozen=True, kw_only=True)
class DiagonalConfig(Intervention):
    """Let a frame see only itself in the last layers. Source: paper, figure 5."""

    last: int
    """How many last layers."""

    def change(self, model: DenseDiffuser, sampling: SamplingConfig) -> nn.Module:
        return diagonal(model, self.last)


@dataclass(frozen=True, kw_only=True)
class RecomposeConfig(Intervention):
    """Make a separable model of a dense one's layers. Source: paper (composition)."""

    encoder: int = 0
    """How many first layers the encoder gets."""
    decoder: str = ""
    """How many first and last layers the decoder gets: "2+4"."""
    split: str = ""
    """A probe.json, for its recommended split in place of encoder and decoder."""
    join: Join = "prefix"
    """How the decoder is given the context."""
    context_noise: float = 0.05
    """Strength of the noise on the context in training: paper, equation 7."""
    scratch: bool = True
    """Train the same separable model from scratch too, with as many operations as the dense
    training and the finetuning took together."""

    def change(self, model: DenseDiffuser, sampling: SamplingConfig) -> nn.Module:
        return recompose(model, split_of(self, model.config.num_layers), self.join)


def skipping(
    model: DenseDiffuser, span: tuple[int, int], full_steps: int, sampling: SamplingConfig
) -> DenseDiffuser:
    """Copy a model so that it skips layers `span`, from 1, in all steps but the first ones."""
    first, last = span
    num_layers = model.config.num_layers
    if model.config.skip is not None:
        raise ValueError("this model skips layers already")
    if not 1 <= first <= last <= num_layers or last - first + 1 == num_layers:
        raise ValueError(
            f"layers must lie in 1 .. {num_layers} and leave some, got {first} .. {last}"
        )
    if not 1 <= full_steps < sampling.num_steps:
        raise ValueError(
            f"full_steps must be 1 or more and fewer than the {sampling.num_steps} steps of a "
            f"frame, got {full_steps}"
        )
    skip = skip_after(first - 1, last, full_steps, sampling)
    return _copied(model, DenseDiffuser(replace(model.config, skip=skip)))


def diagonal(model: DenseDiffuser, last: int) -> DenseDiffuser:
    """Copy a model so that in its last layers a frame sees itself only."""
    if model.config.num_diagonal:
        raise ValueError(f"the last {model.config.num_diagonal} layers are diagonal already")
    if not 1 <= last < model.config.num_layers:
        raise ValueError(
            f"last must lie in 1 .. {model.config.num_layers - 1}, so that a layer sees the past, "
            f"got {last}"
        )
    return _copied(model, DenseDiffuser(replace(model.config, num_diagonal=last)))


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which layers of a dense model become encoder and decoder."""

    encoder: Layers
    """Its first layers."""
    decoder: Layers
    """Layers in rising order; those of the encoder may be among them, as copies."""


def recompose(model: DenseDiffuser, split: Split, join: Join) -> SeparableDiffuser:
    """Make a separable model of a dense one's layers; those in both parts are copied.

    Embeddings of frames, times and conditions go to both parts, the head to the decoder. The
    modulation of the encoder's output starts as no change, the start frame as a grey frame.
    """
    config = model.config
    if config.skip is not None or config.num_diagonal:
        raise ValueError(
            "a model that skips layers or has diagonal ones cannot be recomposed: take the run "
            "that it came from"
        )
    separable = SeparableDiffuser(
        SeparableConfig(
            shape=config.shape,
            block=config.block,
            encoder=EncoderConfig(num_layers=len(split.encoder)),
            decoder=DecoderConfig(num_layers=len(split.decoder), join=join, predict=config.predict),
            conditions=config.conditions,
            cache=config.cache,
        )
    )
    encoder, decoder = separable.encoder, separable.decoder
    for part, layers in ((encoder, split.encoder), (decoder, split.decoder)):
        for name in ("embed_frame", "embed_time", "embed_conditions"):
            _copied(getattr(model, name), getattr(part, name))
        for block, layer in zip(part.blocks, layers, strict=True):
            _copied(model.blocks[layer - 1], block)
    _copied(model.head, decoder.head)
    assert encoder.start is not None
    with torch.no_grad():
        grey = torch.zeros(1, 1, *config.shape.shape, dtype=encoder.start.dtype)
        encoder.start.copy_(encoder.embed_frame(grey)[0, 0])
    return separable


def split_of(config: RecomposeConfig, num_layers: int) -> Split:
    """Read the split that is given as numbers or by a probe's result."""
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
    """Read the split that a probe recommends: depth of the encoder, layers of the decoder."""
    result: Any = read_json(path)
    try:
        split = result["proposed_split"]
        encoder, decoder = split["encoder_layers"], split["decoder_layers"]
        return int(encoder), tuple(int(layer) for layer in decoder)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no proposed_split of encoder_layers and decoder_layers"
        ) from error


def _copied(source: nn.Module, target: Module) -> Module:
    target.load_state_dict(source.state_dict())
    return target
