"""What stands beside measured numbers: machine, versions, limits; and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from scd import __version__
from scd.bench.limits import Limits, measure_limits
from scd.common.provenance import hardware_line, provenance
from scd.common.runtime import Precision, describe_hardware

ON_THE_CARD = ("hardware", "versions", "timed", "command", "limits")
"""What all rows have in common and the screen shows once."""


LIMIT_SECONDS = 1.0
"""That each measurement of a limit takes, about."""


class LimitsOfDevice:
    """The limits of one device, measured once per precision, when they are first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._measured: dict[Precision, Limits] = {}

    def at(self, precision: Precision) -> Limits:
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
    card: Mapping[str, Any], limits: LimitsOfDevice, precisions: list[Precision]
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
            OSError: it cannot be written.
        """
        self._file: TextIO | None = None
        if path:
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
