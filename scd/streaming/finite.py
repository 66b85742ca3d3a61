"""Frames that are none: NaN or infinity, which stop a stream before anybody is shown them."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from scd.common.runtime import finest
from scd.models.checkpoint import World


class NotFinite(ValueError):
    """Frames of a stream, or latents of them, that hold NaN or infinity; says of which world."""


def finite_streams(*tensors: Tensor) -> Bool[Tensor, " b"]:
    """Tell of each stream, the first axis of all tensors, whether its numbers are finite."""
    # NaN and infinity stay in a sum, and in float64 no sum of float32 numbers becomes one. It is
    # four times as fast as to ask each number.
    sums = [tensor.flatten(1).sum(1, dtype=finest(tensor.device)) for tensor in tensors]
    return torch.stack(sums).isfinite().all(0)


def refuse_not_finite(world: World, number: int, *tensors: Tensor) -> None:
    """Refuse what a world made at frame `number` of its streams, if it is not finite.

    Raises:
        NotFinite: it is not.
    """
    if not bool(finite_streams(*tensors).all()):
        where = "the world" if world.folder is None else str(world.folder)
        raise NotFinite(
            f"{where} makes frames that are not finite, the first is frame {number} of the stream: "
            "its weights are damaged, or its training went wrong"
        )
