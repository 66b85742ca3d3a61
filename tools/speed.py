"""Seconds per frame over context and steps, as a picture.

    python tools/speed.py NAME

reads the rows of `scd bench` in docs/results/NAME.jsonl and writes docs/images/NAME.png.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from scd.common.provenance import hardware_line
from scd.evaluation.plots import plot_speed

DOCS = Path(__file__).resolve().parent.parent / "docs"


def draw(name: str, docs: Path = DOCS) -> None:
    """Draw the rows of a result file.

    Args:
        name: of the file, without its ending.
        docs: where images/ and results/ lie.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no rows.
    """
    with (docs / f"results/{name}.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    title = hardware_line(rows[0]["hardware"]) if rows else ""
    plot_speed(rows, docs / f"images/{name}.png", title=title)


def main(arguments: Sequence[str]) -> int:
    """Draw the named result; return the exit status."""
    if len(arguments) != 1:
        print(__doc__)
        return 2
    try:
        draw(arguments[0])
    except (ValueError, OSError) as error:
        print(f"speed.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
