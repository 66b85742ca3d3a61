"""AdamW whose two averages per weight take little memory of the GPU: on the CPU, or in 8 bits.

8 bits need the extra `small`: pip install -e ".[small]".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

AVERAGES = ("exp_avg", "exp_avg_sq")
"""PyTorch's names of AdamW's averages of the gradient and of its square."""

EIGHT_BIT_BLOCK, EIGHT_BIT_LEAST = 256, 4096
"""Entries that share a scale; entries of the smallest weight whose averages are rounded, if these
are whole blocks. Source: torchao."""

EXTRA = 'optimiser states in 8 bits need torchao: pip install -c constraints.txt -e ".[small]"'
"""What to do where the package is missing."""


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW that keeps its averages on the CPU and computes its updates there, weight by weight.

    Each step takes a weight and its gradient to the CPU and the weight back: no more than one of
    them is there at a time. Its state dict is that of AdamW.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(list(groups), betas=betas)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move the weights along their gradients."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group)

    def _move(self, weight: Tensor, group: dict[str, Any]) -> None:
        here, state = weight.detach().cpu(), self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= {name: torch.zeros_like(here) for name in AVERAGES}
        adamw(
            [here],
            [weight.grad.cpu()],  # type: ignore[union-attr]
            *([state[name]] for name in AVERAGES),
            max_exp_avg_sqs=[],
            state_steps=[state["step"]],
            # One pass over memory instead of one per operation.
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        weight.copy_(here)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state dict; PyTorch brings it to the weights' device, and it goes back."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({name: value.cpu() for name, value in state.items()})


def eight_bit_adamw(groups: Sequence[dict[str, Any]], betas: tuple[float, float]) -> Any:
    """Return AdamW whose averages are rounded to 8 bits, in blocks with a scale each.

    Small weights, and those that are no whole blocks, keep them in 32 bits. Its updates are
    compiled on a GPU, and run as they are written on a CPU.

    Raises:
        ValueError: torchao is not installed.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(EXTRA) from error

    class EightBitAdamW(AdamW8bit):
        """torchao's, which compiles an update for every shape: too slow for a CPU."""

        def step(self, closure: Callable[[], Any] | None = None) -> None:
            on_gpu = all(part.is_cuda for group in self.param_groups for part in group["params"])
            with torch.compiler.set_stance("default" if on_gpu else "force_eager"):
                super().step(closure)

    return EightBitAdamW(list(groups), betas=betas, block_size=EIGHT_BIT_BLOCK)
