"""What a good run and three bad ones look like: their curves side by side.

    python tools/healthy.py late DATA OUT
    python tools/healthy.py draw NAME=RUN ...

`late` copies recordings with every action one frame too late, the most common fault of one's own
clips. `draw` writes docs/images/healthy.png, docs/results/healthy.json and prints their table; the
runs are those of runs/healthy.sh.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import markdown

from scd.common.files import written_aside
from scd.common.provenance import command, write_json
from scd.common.runlog import read_curve, read_log
from scd.evaluation.plots import COLOURS, curve_panels, finish, legend

DOCS = Path(__file__).resolve().parent.parent / "docs"


def late(data: Path, out: Path) -> None:
    """Copy recordings with actions one frame late; the first one stays twice."""
    with written_aside(out) as aside:
        shutil.copytree(data, aside, dirs_exist_ok=True)
        for path in sorted((aside / "actions").glob("*.npz")):
            with np.load(path) as kept:
                arrays = {name: np.concatenate([one[:1], one[:-1]]) for name, one in kept.items()}
            np.savez(path, allow_pickle=False, **arrays)


def curves_of(run: Path) -> dict[str, Any]:
    """Return the losses and the action gap of a run by step."""
    steps, held_out = read_curve(run, "step"), read_curve(run, "validation")
    return {
        "training": [[event["step"], event["loss"]] for event in steps],
        "held_out": [[event["step"], event["loss"]] for event in held_out],
        "action_gap": [[event["step"], event["action_gap"]] for event in held_out],
        "command": read_log(run, "machine")[-1].get("command", "not recorded"),
        "commit": read_log(run, "machine")[-1]["commit"],
    }


def draw(runs: dict[str, Path], docs: Path = DOCS) -> str:
    """Draw all runs; return the table of their last validations."""
    found = {name: curves_of(run) for name, run in runs.items()}
    figure, panels = curve_panels(3, "on white")
    for axes, (key, label) in zip(
        panels,
        [
            ("training", "training loss"),
            ("held_out", "loss on held-out clips"),
            ("action_gap", "action gap"),
        ],
        strict=True,
    ):
        for name, curves in found.items():
            steps, values = zip(*curves[key], strict=True)
            axes.plot(steps, values, label=name, color=COLOURS.get(name), linewidth=1.2)
        axes.set_xlabel("steps")
        axes.set_ylabel(label)
        if key == "action_gap":
            axes.set_yscale("symlog", linthresh=0.01)
        else:
            axes.set_yscale("log")
        legend(axes, "on white")
    finish(figure, docs / "images" / "healthy.png", "", "on white")
    write_json({"runs": found, "command": command()}, docs / "results" / "healthy.json")
    rows = []
    for name, curves in found.items():
        step, last = curves["held_out"][-1]
        gap = curves["action_gap"][-1][1]
        share = f"{100 * gap / last:.0f} %"
        rows.append([name, str(step), f"{last:.3f}", f"{gap:.3f}", share])
    return markdown(["run", "steps", "loss, held out", "action gap", "gap over loss"], rows)


def main(arguments: Sequence[str]) -> int:
    """Copy or draw; return the exit status."""
    try:
        if arguments[:1] == ["late"] and len(arguments) == 3:
            late(Path(arguments[1]), Path(arguments[2]))
        elif arguments[:1] == ["draw"] and len(arguments) > 1:
            pairs = (word.partition("=") for word in arguments[1:])
            print(draw({name.replace("_", " "): Path(run) for name, _, run in pairs}))
        else:
            print(__doc__)
            return 2
    except (ValueError, OSError) as error:
        print(f"healthy.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
