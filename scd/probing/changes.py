"""Changes to a trained dense model: layers skipped, layers made diagonal, or made separable.

Each changes the model's settings and keeps its weights. The changed model is trained and measured
like any other (scd/probing/compare.py).
Source: paper, figures 3 and 5, and (composition).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from scd.models.checkpoint import World
from scd.models.config import DecoderConfig, EncoderConfig, Join, SamplingConfig, SeparableConfig
from scd.models.dense import DenseDiffuser
from scd.models.separable import SeparableDiffuser
from scd.models.stack import skip_after
from scd.probing.interventions import (
    DiagonalConfig,
    Intervention,
    RecomposeConfig,
    SkipConfig,
    Split,
    split_of,
)

Module = TypeVar("Module", bound=nn.Module)


def change(
    config: Intervention, model: DenseDiffuser, sampling: SamplingConfig
) -> DenseDiffuser | SeparableDiffuser:
    """Return the changed model; the given one stays as it is.

    Raises:
        ValueError: the model was changed in this way before, or has not the layers or steps.
        OSError: the split of a probe cannot be read.
    """
    if isinstance(config, SkipConfig):
        return skipping(model, config.span, config.full_steps, sampling)
    if isinstance(config, DiagonalConfig):
        return diagonal(model, config.last)
    assert isinstance(config, RecomposeConfig), config
    return recompose(model, split_of(config, model.config.num_layers), config.join)


def change_world(config: Intervention, world: World) -> World:
    """Return a world with the changed model; refuse a model that is not dense (ValueError)."""
    if not isinstance(world.model, DenseDiffuser):
        raise ValueError(
            "an intervention needs a dense model, but this one is separable: it is split already"
        )
    return replace(world, model=change(config, world.model, world.sampling).eval())


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


def _copied(source: nn.Module, target: Module) -> Module:
    target.load_state_dict(source.state_dict())
    return target
