"""What a good run and three bad ones look like: their curves side by side.

    python tools/healthy.py late DATA OUT
    python tools/healthy.py draw DATA NAME=RUN ...

`late` copies recordings with every action one frame too late, the most common fault of one's own
clips. `draw` evaluates the runs on held-out clips of DATA, writes their curves
(docs/images/healthy.png), what each makes of one clip (docs/images/healthy-samples.png) and
docs/results/healthy.json, and prints their table; the runs are those of runs/healthy.sh.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import markdown

from scd.common.files import written_aside
from scd.common.provenance import provenance, write_json
from scd.common.runlog import read_curve, read_log
from scd.data.source import Source, open_source
from scd.evaluation.grids import PictureRow, write_grid
from scd.evaluation.plots import COLOURS, curve_panels, finish, legend
from scd.evaluation.predict import choose_windows, predict, read_windows
from scd.evaluation.protocols import Protocol
from scd.evaluation.trial import measure
from scd.models.checkpoint import World, load_world

DOCS = Path(__file__).resolve().parent.parent / "docs"

GIVEN, PREDICTED = 4, 8
"""Frames of the clips that runs are measured on and shown by."""


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
    if not held_out:
        raise ValueError(f"{run}: needed a run with a validation, got {len(steps)} logged steps")
    return {
        "training": [[event["step"], event["loss"]] for event in steps],
        "held_out": [[event["step"], event["loss"]] for event in held_out],
        "action_gap": [[event["step"], event["action_gap"]] for event in held_out],
        "command": read_log(run, "machine")[-1].get("command", "not recorded"),
        "commit": read_log(run, "machine")[-1]["commit"],
    }


def measured(world: World, source: Source) -> dict[str, float]:
    """Return PSNR at the first and the last horizon, by its own and by another clip's actions."""
    protocol = Protocol(context=GIVEN, horizon=PREDICTED, batch_size=32, memory=False)
    rows = measure(world, source, protocol).rows
    return {
        f"{row['baseline']}, +{row['horizon']}": row["mean"]
        for row in rows
        if row["metric"] == "psnr" and row["horizon"] in (1, PREDICTED)
    }


def draw_samples(worlds: Mapping[str, World], source: Source, path: Path) -> None:
    """Show what each world makes of one clip, below the clip."""
    num_frames = GIVEN + PREDICTED
    clip = read_windows(source, choose_windows(source, 1, num_frames, 0), num_frames)
    rows = [PictureRow(name="truth", frames=clip.frames[0])]
    for name, world in worlds.items():
        made = predict(world, clip, GIVEN).frames
        rows.append(PictureRow(name=name, frames=torch.cat([clip.frames[:, :GIVEN], made], 1)[0]))
    labels = ["given"] * GIVEN + [f"+{number + 1}" for number in range(PREDICTED)]
    write_grid(rows, labels, path)


def draw_curves(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the losses and the action gap of all runs by step."""
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
        if key != "action_gap":
            axes.set_yscale("log")
        legend(axes, "on white")
    finish(figure, path, "", "on white")


def draw(data: str, runs: Mapping[str, Path], docs: Path = DOCS) -> str:
    """Measure and draw all runs; return the table of where each ended."""
    source = open_source(data, "val")
    found = {name: curves_of(run) for name, run in runs.items()}
    worlds = {name: load_world(run) for name, run in runs.items()}
    for name, world in worlds.items():
        found[name]["psnr"] = measured(world, source)
    draw_curves(found, docs / "images" / "healthy.png")
    draw_samples(worlds, source, docs / "images" / "healthy-samples.png")
    write_json({"runs": found} | provenance(), docs / "results" / "healthy.json")
    rows = []
    for name, curves in found.items():
        step, last = curves["held_out"][-1]
        gap, psnr = curves["action_gap"][-1][1], curves["psnr"]
        cells = [name, str(step), f"{last:.3f}", f"{gap:.4f}", f"{100 * gap / last:.0f} %"]
        both = [
            f"{psnr[f'model, +{at}']:.1f} ({psnr[f'shuffled_actions, +{at}']:.1f})"
            for at in (1, PREDICTED)
        ]
        rows.append(cells + both)
    head = ["run", "steps", "loss, held out", "action gap", "gap over loss"]
    return markdown([*head, "PSNR at +1, dB (another's actions)", f"at +{PREDICTED}"], rows)


def main(arguments: Sequence[str]) -> int:
    """Copy or draw; return the exit status."""
    try:
        if arguments[:1] == ["late"] and len(arguments) == 3:
            late(Path(arguments[1]), Path(arguments[2]))
        elif arguments[:1] == ["draw"] and len(arguments) > 2:
            pairs = (word.partition("=") for word in arguments[2:])
            runs = {name.replace("_", " "): Path(run) for name, _, run in pairs}
            print(draw(arguments[1], runs))
        else:
            print(__doc__)
            return 2
    except (ValueError, OSError) as error:
        print(f"healthy.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
