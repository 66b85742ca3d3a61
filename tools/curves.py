"""The loss curve of a run, as a picture and a result file.

    python tools/curves.py RUN NAME

NAME is the preset that was trained. It writes docs/images/NAME-loss.png and
docs/results/NAME_training.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from scd.common.provenance import write_json
from scd.common.runlog import read_curve, read_log
from scd.evaluation.plots import plot_loss

DOCS = Path(__file__).resolve().parent.parent / "docs"

HARDWARE = ("cpu", "num_cores", "num_threads", "gpus", "platform", "python", "torch")
"""What a log's line "machine" says besides the commit."""


def draw(run: Path, name: str, docs: Path = DOCS) -> None:
    """Draw the training loss and the loss on held-out clips, and keep their numbers.

    Args:
        run: the run's folder.
        name: the preset that was trained.
        docs: where images/ and results/ lie.

    Raises:
        FileNotFoundError: the folder is not a run's.
        ValueError: the run has no step in its log yet.
    """
    steps, held_out = read_curve(run, "step"), read_curve(run, "validation")
    if not steps:
        raise ValueError(f"{run} has not logged a step yet")
    curves = {
        "training": ([event["step"] for event in steps], [event["loss"] for event in steps]),
        "held out": ([event["step"] for event in held_out], [event["loss"] for event in held_out]),
    }
    plot_loss(curves, docs / f"images/{name}-loss.png", title=name)
    start, machine = read_log(run, "start")[0], read_log(run, "machine")[-1]
    result = {
        "run": name,
        "steps": steps[-1]["step"],
        "seconds": steps[-1]["elapsed_s"],
        "memory_gib": max(event["memory_gib"] for event in steps),
        "curves": {which: {"steps": at, "loss": losses} for which, (at, losses) in curves.items()},
        "parameters": start["parameters"],
        "command": machine.get("command", "not recorded"),
        "commit": machine["commit"],
        "hardware": {key: machine[key] for key in HARDWARE} | {"device": start["device"]},
        "timed": "wall-clock seconds of the whole run, whatever else the machine did meanwhile",
    }
    write_json(result, docs / f"results/{name}_training.json")


def main(arguments: Sequence[str]) -> int:
    """Draw one run; return the exit status."""
    if len(arguments) != 2:
        print(__doc__)
        return 2
    try:
        draw(Path(arguments[0]), arguments[1])
    except (ValueError, OSError) as error:
        print(f"curves.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
