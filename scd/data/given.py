"""Numbers and frames as people hand them in -> as the package takes them.

What is of another type, order or range is refused with the call that converts it.
"""

from __future__ import annotations

import operator
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Frames = Tensor | np.ndarray
"""Frames [... 3 h w] in [-1, 1], as they are handed in: `as_frames` looks at them."""

Whole = SupportsIndex
"""A whole number of Python, numpy, or a tensor without axes: `as_whole` looks at it."""

LIMIT = 1.01
"""Frames lie in [-1, 1]; half precision and a change of size may go a little beyond."""


def as_whole(value: Any, name: str, least: int | None = None) -> int:
    """Return a whole number of any type: of Python, numpy, or a tensor without axes.

    Args:
        value: the number; a truth value is none.
        name: of the argument, for the message.
        least: smallest that is allowed; None: any.

    Raises:
        ValueError: no whole number, or a smaller one.
    """
    is_truth = type(value) in (bool, np.bool_) or getattr(value, "dtype", None) == torch.bool
    # An integer array of one entry would pass as its entry.
    is_one = hasattr(value, "__index__") and not is_truth and not getattr(value, "ndim", 0)
    try:
        number = operator.index(value) if is_one else None
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be {least} or more, got {number}")
    return number


def as_ids(ids: object, name: str) -> Tensor:
    """Return ids of any integer type as int64; floats stay as they are.

    Raises:
        ValueError: they are truth values, or no tensor or array.
    """
    given = torch.tensor(ids) if isinstance(ids, np.ndarray) else ids
    if not isinstance(given, Tensor) or given.dtype == torch.bool or given.is_complex():
        came = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"{name} are a tensor of integers or floats, got {came}")
    return given if given.is_floating_point() else given.long()


def as_frames(frames: object, axes: str, size: tuple[int, int]) -> Float[Tensor, "*t 3 h w"]:
    """Return frames that somebody hands in, floats in [-1, 1], as float32.

    One pass over the frames; on a GPU it waits for them.

    Args:
        frames: a tensor or an array.
        axes: names of those in front of [3, rows, columns], such as "streams, frames".
        size: rows and columns that are needed.

    Raises:
        ValueError: another type, order of axes, size or range, NaN or infinity; the message has
            the call that converts them, where one does.
    """
    needed = f"frames are floats [{axes}, 3, rows, columns] in [-1, 1]"
    if not isinstance(frames, (Tensor, np.ndarray)):
        raise ValueError(f"{needed}, got {type(frames).__name__} {str(frames)[:40]!r}")
    given, shape = _tensor(frames), list(frames.shape)
    came = f"{needed}, got {str(given.dtype).removeprefix('torch.')} {shape}"
    missing = axes.count(",") + 4 - given.ndim
    if given.ndim < 3 or missing < 0 or 3 not in (shape[-3], shape[-1]) or given.is_complex():
        raise ValueError(came)
    # Not every type of integer has a minimum in PyTorch.
    values = given if given.is_floating_point() else given.long()
    low, high = (float(one) for one in values.aminmax()) if given.numel() else (0.0, 0.0)
    # NaN is passed on by both.
    if not abs(low) + abs(high) < float("inf"):
        raise ValueError(f"{came}; frames must be finite, there is NaN or infinity among them")
    call = "frames" + (f"[{', '.join(['None'] * missing)}]" if missing else "")
    is_last, is_array = shape[-3] != 3, isinstance(frames, np.ndarray)
    if given.is_floating_point():
        call = _moved(call, -1, -3, is_array) if is_last else call
        if low < -LIMIT or high > LIMIT:
            call += " / 127.5 - 1" if low >= 0 and 2 < high <= 255 else ".clip(-1, 1)"
    elif given.dtype == torch.bool or low < 0 or high > 255:
        raise ValueError(f"{came} in {low:g} .. {high:g}")
    else:
        call = call if is_last else _moved(call, -3, -1, is_array)
        if given.dtype != torch.uint8:
            call += ".astype(np.uint8)" if is_array else ".byte()"
        call = f"scd.pixels_to_frames({call})"
    if call != "frames":
        raise ValueError(f"{came} in {low:.4g} .. {high:.4g}: convert them by {call}")
    if tuple(shape[-2:]) != size:
        raise ValueError(f"frames must be {size[0]}x{size[1]}, got {shape[-2]}x{shape[-1]}")
    return given.float()


def _tensor(frames: Frames) -> Tensor:
    try:
        # A copy where numpy lets nobody write, or has its axes run backwards.
        return frames if isinstance(frames, Tensor) else torch.tensor(frames)
    except TypeError as error:
        raise ValueError(f"frames are floats or 8-bit pixels, got {frames.dtype}") from error


def _moved(frames: str, source: int, target: int, is_array: bool) -> str:
    """Return the call that moves an axis."""
    if is_array:
        return f"np.moveaxis({frames}, {source}, {target})"
    return f"{frames}.movedim({source}, {target})"
