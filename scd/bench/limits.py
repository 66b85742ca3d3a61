"""The most that a device can do, measured: matrix products and copied bytes per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from scd.common.runtime import DTYPES, Precision

MATMUL_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
"""Sides of the square matrices; the fastest counts."""

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Size of what is copied: far more than any cache holds."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The best rates that a device reached, at one precision."""

    precision: Precision
    """Of the matrix products."""
    matmul_flops_per_s: float
    """Operations per second of a large square product, the best of several."""
    copy_bytes_per_s: float
    """Bytes read plus bytes written per second of a large copy, the best of several."""

    def seconds(self, flops: int, num_bytes: int) -> float:
        """Return the least time that this work takes at these rates."""
        return max(flops / self.matmul_flops_per_s, num_bytes / self.copy_bytes_per_s)


def measure_limits(device: torch.device, precision: Precision, seconds: float) -> Limits:
    """Measure a device.

    Args:
        device: CPU or CUDA.
        precision: of the matrix products; products in float32 stay float32 (no TF32).
        seconds: that each of the measurements takes, about.
    """
    flops_per_s = max(
        _matmul_rate(device, DTYPES[precision], size, seconds / 2)
        for size in MATMUL_SIZES[device.type]
    )
    return Limits(
        precision=precision,
        matmul_flops_per_s=flops_per_s,
        copy_bytes_per_s=_copy_rate(device, seconds),
    )


def _matmul_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _best_s(lambda: torch.mm(left, right, out=result), device, seconds)


def _copy_rate(device: torch.device, seconds: float) -> float:
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _best_s(lambda: target.copy_(source), device, seconds)


@torch.no_grad()
def _best_s(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the fewest seconds that a piece of work took, over some time."""
    # A GPU is given several pieces at once, so that starting them does not count.
    pieces = 1 if device.type == "cpu" else 10
    work()
    synchronize(device)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        for _ in range(pieces):
            work()
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / pieces)
    return best


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
