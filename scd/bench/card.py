"""What stands beside measured numbers: machine, versions, limits; and the file that keeps them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from scd import __version__
from scd.common.config import StreamPrecision
from scd.common.provenance import hardware_line, provenance
from scd.common.runtime import STREAM_DTYPES, describe_hardware, synchronize
from scd.engine.fp8 import product, rounded_by_row

ON_THE_CARD = ("hardware", "versions", "timed", "command", "limits")
"""What all rows have in common and the screen shows once."""

LIMIT_SECONDS = 1.0
"""That each measurement of a limit takes, about."""

MATMUL_SIZES = {"cpu": (1024, 2048), "mps": (2048, 4096), "cuda": (4096, 8192)}
"""Sides of the square matrices; the fastest counts."""

COPY_BYTES = {"cpu": 2**28, "mps": 2**28, "cuda": 2**30}
"""Size of what is copied: far more than any cache holds."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The best rates that a device reached, at one precision."""

    precision: StreamPrecision
    """Of the matrix products."""
    matmul_flops_per_s: float
    """Operations per second of a large square product, the best of several."""
    copy_bytes_per_s: float
    """Bytes read plus bytes written per second of a large copy, the best of several."""

    def seconds(self, flops: int, num_bytes: int) -> float:
        """Return the least time that this work takes at these rates."""
        return max(flops / self.matmul_flops_per_s, num_bytes / self.copy_bytes_per_s)


def measure_limits(device: torch.device, precision: StreamPrecision, seconds: float) -> Limits:
    """Measure a device.

    Args:
        device: of any kind.
        precision: of the matrix products; products in float32 stay float32 (no TF32).
        seconds: that each of the measurements takes, about.
    """
    flops_per_s = max(
        _matmul_rate(device, precision, size, seconds / 2) for size in MATMUL_SIZES[device.type]
    )
    return Limits(
        precision=precision,
        matmul_flops_per_s=flops_per_s,
        copy_bytes_per_s=_copy_rate(device, seconds),
    )


def _matmul_rate(
    device: torch.device, precision: StreamPrecision, size: int, seconds: float
) -> float:
    if precision == "int8":
        whole = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
        return 2 * size**3 / _best_s(lambda: torch.ops.aten._int_mm(whole, whole), device, seconds)
    dtype = STREAM_DTYPES[precision]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    if precision == "fp8":
        (left, scale), (right, other) = rounded_by_row(left), rounded_by_row(right)
        factors = left, right.t(), scale, other.t(), torch.zeros(size, device=device, dtype=dtype)
        return 2 * size**3 / _best_s(lambda: product(*factors), device, seconds)
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


class LimitsOfDevice:
    """The limits of one device, measured once per precision, when they are first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._measured: dict[StreamPrecision, Limits] = {}

    def at(self, precision: StreamPrecision) -> Limits:
        """Return the limits at a precision."""
        if precision not in self._measured:
            self._measured[precision] = measure_limits(self.device, precision, LIMIT_SECONDS)
        return self._measured[precision]


def card(device: torch.device, timed: str) -> dict[str, Any]:
    """Return what all rows of a run have in common.

    Args:
        device: that is timed.
        timed: what the numbers mean.
    """
    hardware = describe_hardware()
    return provenance(device) | {
        "device": str(device),
        "versions": {
            "scd": __version__,
            "torch": str(hardware["torch"]),
            "python": str(hardware["python"]),
            "cuda": torch.version.cuda or "none",
        },
        "timed": timed,
    }


def print_card(
    card: Mapping[str, Any], limits: LimitsOfDevice, precisions: list[StreamPrecision]
) -> None:
    """Print the card for people, and the limits that it measures for it."""
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    print(f"hardware  {hardware_line(card['hardware'])}, {card['hardware']['platform']}")
    print(f"versions  {versions}")
    print(f"commit    {card['commit']}")
    for precision in precisions:
        found = limits.at(precision)
        print(
            f"limits    {precision}: {found.matmul_flops_per_s / 1e9:.0f} GFLOP/s of matrix "
            f"products, {found.copy_bytes_per_s / 1e9:.1f} GB/s copied (read and written)"
        )
    print(f"timed     {card['timed']}", flush=True)


class RowFile:
    """A file of one JSON object per line, each on the disk as soon as it is written.

    Opened before the first measurement, so that a place that cannot be written is known early.
    """

    def __init__(self, path: str, append: bool) -> None:
        """Open the file, or none at all for an empty path.

        Raises:
            FileExistsError: without `append`, it holds something.
            OSError: it cannot be written.
        """
        self._file: TextIO | None = None
        if path:
            if not append and Path(path).is_file() and Path(path).stat().st_size:
                raise FileExistsError(
                    f"{path} holds other rows: keep them with --append, or name another file"
                )
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = Path(path).open("a" if append else "w", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Keep a row, and print it without what the card says."""
        shown = {name: value for name, value in row.items() if name not in ON_THE_CARD}
        print(json.dumps(shown, allow_nan=False), flush=True)
        if self._file is not None:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
