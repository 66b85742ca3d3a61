"""Muon for kernels of convolutions: each is a matrix, of one row per output channel.

PyTorch's Muon takes matrices only. Here it moves views of the kernels that are. Source: Jordan et
al., "Muon: an optimizer for hidden layers in neural networks" (2024), which treats kernels so too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def muon(groups: Sequence[dict[str, Any]]) -> Any:
    """Return PyTorch's Muon for matrices, or one that takes kernels too.

    Its updates are as large as AdamW's: without that the same rates learnt three times slower in
    short runs (docs/log.md).

    Raises:
        ValueError: this PyTorch has none.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"optimizer muon needs torch 2.9 or newer, got {torch.__version__}; choose adamw"
        )
    if all(weight.ndim == 2 for group in groups for weight in group["params"]):
        return torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw")
    return KernelMuon(groups)


class KernelMuon:
    """Muon whose weights may be kernels [out in *sizes], taken as matrices [out in*sizes].

    Weights must stay where they are in memory while it lives: written into, not exchanged.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._weights = [weight for group in groups for weight in group["params"]]
        self._matrices = [nn.Parameter(weight.detach().flatten(1)) for weight in self._weights]
        for matrix, weight in zip(self._matrices, self._weights, strict=True):
            assert matrix.data_ptr() == weight.data_ptr(), "a copy would move, not the weight"
        matrices = iter(self._matrices)
        as_matrices = [
            group | {"params": [next(matrices) for _ in group["params"]]} for group in groups
        ]
        self._muon = torch.optim.Muon(as_matrices, adjust_lr_fn="match_rms_adamw")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Rates and settings of each group; its params are the matrices."""
        return self._muon.param_groups

    def step(self) -> None:
        """Move the weights along their gradients; one without a gradient stays."""
        for matrix, weight in zip(self._matrices, self._weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        self._muon.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        assert set_to_none
        for holder in (*self._matrices, *self._weights):
            holder.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state, that of PyTorch's Muon on matrices."""
        return self._muon.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state."""
        self._muon.load_state_dict(state)


def kernels(network: nn.Module) -> Iterable[Tensor]:
    """Yield the kernels and matrices of a network of convolutions that mix all channels.

    Kernels of single channels or groups are left out: they are many small matrices, not one.
    """
    for part in network.modules():
        if isinstance(part, nn.Linear):
            yield part.weight
        elif isinstance(part, (nn.Conv2d, nn.Conv3d)) and part.groups == 1:
            yield part.weight
