"""Cells and layout of the generated tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def interval(row: Mapping[str, Any]) -> str:
    """Return a number and its interval with a sensible number of digits."""
    digits = 2 if abs(row["mean"]) >= 1 or row["metric"].startswith("psnr") else 3
    return f"{row['mean']:.{digits}f} [{row['ci_low']:.{digits}f}, {row['ci_high']:.{digits}f}]"


def difference(row: Mapping[str, Any]) -> str:
    """Return a difference with its interval."""
    places = digits(row["metric"])
    low, high = (f"{row[end]:+.{places}f}" for end in ("ci_low", "ci_high"))
    return f"{row['difference']:+.{places}f} [{low}, {high}]"


def digits(metric: str) -> int:
    """Return how many decimals of a metric are shown."""
    return 2 if metric in ("psnr", "fvd") else 3


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
