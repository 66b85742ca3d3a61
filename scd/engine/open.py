"""One function that makes an engine of a model."""

from __future__ import annotations

import copy

import torch

from scd.common.config import IN_8_BITS, Threads
from scd.common.runtime import STREAM_DTYPES, choose_stream_precision
from scd.engine.dense import FastDense
from scd.engine.fp8 import Fp8Linear
from scd.engine.int8 import Int8Linear
from scd.engine.interface import Engine
from scd.engine.layers import PackedLinear
from scd.engine.plain import PlainEngine
from scd.engine.separable import FastSeparable
from scd.engine.wan import FastWanDense, FastWanSeparable
from scd.engine.wan_stack import Maps
from scd.models.build import Diffuser
from scd.models.config import ENGINES
from scd.models.kinds import ModelConfig
from scd.models.separable import SeparableDiffuser
from scd.models.wan.dense import WanDiffuser
from scd.models.wan.separable import WanSeparableDiffuser

SMALL_PRODUCT = 2**26
"""Operations of a frame's largest product up to which a second CPU thread gains nothing, and loses
tenfold when something else wants its core. Source: measured, docs/log.md."""


LARGE_PRODUCT = 2**33
"""Operations of the largest product from which on one CPU thread need not be tried: a pass through
the model then takes seconds on it."""


MAPS: dict[str, Maps] = {"int8": Int8Linear, "fp8": Fp8Linear}
"""Linear maps of the precisions in 8 bits."""


def largest_product(config: ModelConfig, num_frames: int = 1) -> int:
    """Return the operations of the largest product of a model with so many frames at once."""
    width = config.block.width
    return 2 * num_frames * config.shape.num_tokens * width * 4 * width


def advised_threads(config: ModelConfig, num_frames: int = 1) -> int:
    """Return how many CPU threads a stream of one such model should have here, or as many streams
    at once as there are frames."""
    small = largest_product(config, num_frames) <= SMALL_PRODUCT
    return 1 if small else torch.get_num_threads()


def stream_threads(threads: Threads, config: ModelConfig, num_frames: int = 1) -> int:
    """Return the CPU threads of streams: a number that was given, or for "auto" the advised one."""
    return advised_threads(config, num_frames) if threads == "auto" else threads


def open_engine(
    model: Diffuser,
    kind: str = "plain",
    precision: str = "fp32",
    release: bool = False,
) -> Engine:
    """Make an engine of a model, on the device where the model is.

    Args:
        model: its weights.
        kind: "plain" runs the model as it is written; "fast" lays its weights out for the machine.
        precision: of weights, KV cache and products; auto: what the device has instructions for;
            int8, fp8: weights of the blocks, their products, and keys and values of the past in 8
            bits, the rest in bfloat16.
        release: let the engine take the weights over, so that they exist once; the model itself
            cannot be used afterwards. False: its weights stay as they are. Either way it is put in
            eval mode.

    Raises:
        ValueError: no such kind of engine or precision, or one that the model or the device lacks.
    """
    if kind not in ENGINES:
        raise ValueError(f"engine must be one of {list(ENGINES)}, got {kind!r}")
    device = next(model.parameters()).device
    chosen = choose_stream_precision(precision, device)
    if chosen in IN_8_BITS and (kind != "fast" or not model.config.takes_text):
        raise ValueError(f"precision {chosen} is for the fast engine of Wan models: give bf16")
    dtype = STREAM_DTYPES[chosen]
    maps = MAPS.get(chosen, PackedLinear)
    changes = next(model.parameters()).dtype != dtype
    mine = release or changes
    if changes:
        model = (model if release else copy.deepcopy(model)).to(dtype)
    if kind == "plain":
        return PlainEngine(model)
    if isinstance(model, SeparableDiffuser):
        return FastSeparable(model, free=mine)
    if isinstance(model, WanSeparableDiffuser):
        return FastWanSeparable(model, free=mine, maps=maps)
    if isinstance(model, WanDiffuser):
        return FastWanDense(model, free=mine, maps=maps)
    return FastDense(model, free=mine)
