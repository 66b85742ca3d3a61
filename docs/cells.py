"""Cells and layout of the generated tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def interval(row: Mapping[str, Any]) -> str:
    """Return a number and its interval with a sensible number of digits."""
    digits = 2 if abs(row["mean"]) >= 1 or row["metric"].startswith("psnr") else 3
    return f"{row['mean']:.{digits}f} [{row['ci_low']:.{digits}f}, {row['ci_high']:.{digits}f}]"


def milliseconds(seconds: float) -> str:
    """Return a duration with three digits that count."""
    return f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"


def millions(parameters: int) -> str:
    """Return a number of weights in millions."""
    return f"{parameters / 1e6:.1f} M"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay a table out; all columns but the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
