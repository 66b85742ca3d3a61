"""One function that makes an engine of a model."""

from __future__ import annotations

import copy

import torch

from scd.engine.interface import Engine, EngineKind
from scd.engine.plain import PlainEngine
from scd.model.build import Diffuser
from scd.runtime import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Type of weights and memory at each precision."""


def open_engine(
    model: Diffuser,
    kind: EngineKind = "plain",
    precision: Precision = "fp32",
    release: bool = False,
) -> Engine:
    """Make an engine of a model, on the device where the model is.

    Args:
        model: its weights.
        kind: "plain" runs the model as it is written; "fast" lays its weights out for the machine.
        precision: of weights, memory and products.
        release: let the engine take the weights over, so that they exist once; the model itself
            cannot be used afterwards. False: the model stays as it is.

    Raises:
        ValueError: no such kind of engine, or no such precision.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of {list(DTYPES)}, got {precision!r}")
    dtype = DTYPES[precision]
    changes = next(model.parameters()).dtype != dtype
    if kind == "plain":
        return PlainEngine((model if release or not changes else copy.deepcopy(model)).to(dtype))
    raise ValueError(f"engine must be 'plain' or 'fast', got {kind!r}")
