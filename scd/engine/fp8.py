"""Linear maps with weights and inputs of 8 bits as floating point (e4m3): GPUs with such products.

Weights have one scale per output channel, what is multiplied one per token, found at every call: so
a frame does not depend on which others share a call. Sums are those of the device, scales and bias
are applied inside the product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from scd.engine.layers import Activation, LinearMap

FP8 = torch.float8_e4m3fn
"""Four bits of exponent, three of mantissa; the fourth bit of a number is rounded away."""

LARGEST = torch.finfo(FP8).max
"""448; what rounds to more is no number."""

MULTIPLE = 16
"""Of which the products' widths are; others are filled up with zeros."""


class Fp8Linear(LinearMap):
    """activation(x W^T + b), without gradients; the result has the type of x."""

    def __init__(
        self, weight: Tensor, bias: Tensor, rows: int, activation: Activation = "none"
    ) -> None:
        """Round the weights; the number of rows is not looked at."""
        del rows
        self.out_features, self.in_features = weight.shape
        below, self._beside = -self.out_features % MULTIPLE, -self.in_features % MULTIPLE
        rounded, scale = rounded_by_row(
            functional.pad(weight.detach(), (0, self._beside, 0, below))
        )
        # Read by columns, as the product wants its second factor.
        self.weight, self.scale = rounded.t(), scale.t()
        self.bias, self.activation = functional.pad(bias.detach(), (0, below)), activation

    def __call__(self, x: Tensor) -> Tensor:
        """Map tokens [... in] to [... out]."""
        rows = x.flatten(0, -2)
        if self._beside:
            rows = functional.pad(rows, (0, self._beside))
        rounded, scale = rounded_by_row(rows)
        y = product(rounded, self.weight, scale, self.scale, self.bias.to(x.dtype))
        y = y[:, : self.out_features].view(*x.shape[:-1], self.out_features)
        return functional.gelu(y, approximate="tanh") if self.activation == "gelu" else y


def product(
    rows: Tensor, columns: Tensor, scale: Tensor, other_scale: Tensor, bias: Tensor
) -> Tensor:
    """Return (scale * rows) @ (columns * other_scale) + bias, in the type of the bias.

    Args:
        rows: [s d], in 8 bits, and their `scale` [s 1].
        columns: [d out], in 8 bits, each column in one piece, and their scale [1 out].
    """
    return torch.ops.aten._scaled_mm(
        rows, columns, scale, other_scale, bias=bias, out_dtype=bias.dtype
    )


def rounded_by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [s d] in 8 bits, and the scale of each, [s 1] in float32."""
    exact = x.float()
    # A row of zeros would divide by nothing.
    scale = (exact.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(1e-30)
    return (exact / scale).clamp_(-LARGEST, LARGEST).to(FP8), scale
