"""Linear maps with weights of 8 bits, multiplied as whole numbers: CPUs with VNNI.

Weights have one scale per output channel and are laid out once. What is multiplied is quantised at
every call, with one scale and zero point for each frame: so a frame does not depend on which others
share a call. Sums are exact, in 32 bits; scales, bias and GELU are applied inside the product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scd.engine.layers import Activation, LinearMap

LEVELS = 254
"""Steps of what is multiplied: unsigned, because oneDNN has no fast product of signed 8-bit numbers
on AVX512-VNNI, see findings/onednn_int8_signed.sh. One less than there are, so that nothing has to
be cut where the zero point is rounded up."""

SCRATCH = 2**19
"""Numbers rounded at a time: what stays in a CPU's cache. Source: measured, docs/log.md."""

LARGEST_WEIGHT = 127


class Int8Linear(LinearMap):
    """activation(x W^T + b), without gradients; the result has the type of x."""

    def __init__(
        self, weight: Tensor, bias: Tensor, rows: int, activation: Activation = "none"
    ) -> None:
        """Round the weights and lay them out."""
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        rounded, self.scale = rounded_by_channel(weight)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, [rows, self.in_features])
        self.zero_points = torch.zeros(self.out_features, dtype=torch.int32)
        self.bias, self.activation = bias.float(), activation
        self._fused = ("gelu", [], "tanh") if activation == "gelu" else ("none", [], "")

    def __call__(self, x: Tensor) -> Tensor:
        """Map tokens [f s in] of frames to [f s out]."""
        frames = [self._product(frame) for frame in x.unbind(0)]
        return frames[0][None] if len(frames) == 1 else torch.stack(frames)

    def _product(self, x: Tensor) -> Tensor:
        levels, scale, zero = quantised(x)
        return torch.ops.onednn.qlinear_pointwise(
            levels,
            scale,
            zero,
            self.packed,
            self.scale,
            self.zero_points,
            self.bias,
            1.0,
            0,
            x.dtype,
            *self._fused,
        )


def rounded_by_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights [out in] as whole numbers of -127 .. 127, and the scale of each output."""
    exact = weight.detach().float()
    # A channel of zeros would divide by nothing.
    scale = (exact.abs().amax(dim=1) / LARGEST_WEIGHT).clamp_min(torch.finfo(torch.float32).tiny)
    return (exact / scale[:, None]).round_().to(torch.int8), scale


def quantised(x: Tensor) -> tuple[Tensor, float, int]:
    """Return x [s d] as whole numbers of 0 .. 255, their scale and zero point.

    x = scale * (n - zero), to half a step; its range is that of x with 0 in it, so that 0 stays 0.
    """
    low, high = (float(end) for end in torch.aminmax(x))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / LEVELS or 1.0
    zero = math.ceil(-low / scale)
    # From 1,024 to 2,047 float16 holds whole numbers alone, and rounds to them; their low byte is
    # what is asked for. Straight from float32 to uint8 PyTorch converts one by one, see
    # findings/torch_uint8_cast.sh.
    offset = torch.tensor(1024.0 + zero)
    levels = torch.empty(x.shape, dtype=torch.uint8)
    rows = max(1, SCRATCH // x.shape[-1])
    exact = torch.empty(min(rows, len(x)), x.shape[-1])
    for part, found in zip(x.split(rows), levels.split(rows), strict=True):
        whole = exact[: len(part)].copy_(part)
        whole = torch.add(offset, whole, alpha=1 / scale, out=whole).to(torch.float16)
        found.copy_(whole.view(torch.int16))
    return levels, scale, zero
