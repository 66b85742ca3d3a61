"""Settings of optimisers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scd.common.config import added, at_least, within

FASTEST = 1e4
"""Largest learning rate, ratio of two or weight decay: above what any training uses, and small
enough for the arithmetic of an optimiser."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the weights are moved along their gradients."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW for all. muon: Muon for the attention and MLP matrices of the blocks, AdamW for
    the rest (embeddings, heads, norms, biases, tables); several times faster in short runs."""
    lr: float = 1e-4
    """Learning rate of the encoder under AdamW, after warm-up."""
    decoder_lr_ratio: float = 2.0
    """Learning rate of the decoder over that of the encoder, for both optimisers. A dense model
    is all decoder."""
    muon_lr: float = 1e-2
    """Learning rate of the encoder's block matrices under Muon, after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's averages of the gradient and of its square, each in [0, 1)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices, per unit of learning rate; vectors have none."""
    warmup_steps: int = 10_000
    """Steps over which the learning rate rises linearly from near 0. 0: none."""
    decay_fraction: float = 0.0
    """Last fraction of max_steps over which the learning rate falls linearly to 0, in [0, 1].
    0: constant after warm-up."""
    state: Literal["fp32", "8bit", "offload"] = added("fp32")
    """Where AdamW keeps its two averages per weight. fp32: beside the weights, 8 bytes. 8bit: 2
    bytes, which rounds them (needs torchao). offload: in the memory of the CPU, where the update is
    computed too; slower by what has to travel."""
    clip_norm: float = 1.0
    """Largest norm of the gradient of all weights together; longer ones are scaled down. 0: no
    clipping."""

    def __post_init__(self) -> None:
        for name in ("lr", "decoder_lr_ratio", "muon_lr"):
            if not 0 < getattr(self, name) <= FASTEST:
                raise ValueError(
                    f"{name} must be above 0 and {FASTEST:g} at most, got {getattr(self, name)}"
                )
        within(0, FASTEST, weight_decay=self.weight_decay)
        at_least(0, warmup_steps=self.warmup_steps, clip_norm=self.clip_norm)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if self.optimizer == "muon" and self.state != "fp32":
            raise ValueError(f"state is for adamw: muon needs state fp32, got {self.state}")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction must lie in [0, 1], got {self.decay_fraction}")
