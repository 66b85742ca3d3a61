"""Linear maps whose weights lie in memory as the machine reads them fastest."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from scd.common.runtime import return_freed_memory

Activation = Literal["none", "gelu"]

PACKED_WEIGHTS = 2**18
"""From this many float32 weights on, a packed layout is faster on a CPU. Source: measured,
docs/log.md."""


class PackedLinear:
    """activation(x W^T + b), without gradients.

    On a CPU the weights are reordered once into the blocks that oneDNN's kernels read; a plain
    matrix would be reordered at every call, which costs a fifth of the time of a frame of 64
    tokens. The activation is applied inside the product. Elsewhere it is an ordinary product.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, rows: int, activation: Activation = "none"
    ) -> None:
        """Lay the weights out.

        Args:
            weight: [out in], on the device and in the type of the products.
            bias: [out].
            rows: rows that a call will have; a hint for the layout, any number works.
            activation: "gelu" is the tanh approximation.
        """
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.bias, self.activation = bias, activation
        self.packed = weight.device.type == "cpu" and _pays(weight)
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self.weight = weight
        self._fused = ("gelu", [], "tanh") if activation == "gelu" else ("none", [], "")

    @staticmethod
    def of(*layers: nn.Linear, rows: int, activation: Activation = "none") -> PackedLinear:
        """Stack linear layers of the same input on top of each other."""
        pairs = [(layer.weight, layer.bias) for layer in layers]
        return PackedLinear.stacked(*pairs, rows=rows, activation=activation)

    @staticmethod
    def stacked(
        *pairs: tuple[Tensor, Tensor], rows: int, activation: Activation = "none"
    ) -> PackedLinear:
        """Stack weights [out in] and biases [out] on top of each other."""
        weight = torch.cat([weight.detach() for weight, _ in pairs])
        bias = torch.cat([bias.detach() for _, bias in pairs])
        return PackedLinear(weight, bias, rows, activation)

    def __call__(self, x: Tensor) -> Tensor:
        """Map [... in] to [... out]."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self._fused)
        y = functional.linear(x, self.weight, self.bias)
        return functional.gelu(y, approximate="tanh") if self.activation == "gelu" else y


def _pays(weight: Tensor) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        # Other processors have no instructions for it, and oneDNN refuses.
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.numel() >= PACKED_WEIGHTS


def release(module: nn.Module) -> None:
    """Give up the weights of a module, so that a copy of them is the only one."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
    return_freed_memory()
