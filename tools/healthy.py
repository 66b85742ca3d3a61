"""What a good run and three bad ones look like: their curves side by side.

    python tools/healthy.py late DATA OUT
    python tools/healthy.py draw DATA NAME=RUN ...

`late` copies recordings with every action one frame too late, the most common fault of one's own
clips. `draw` evaluates all checkpoints of the runs on held-out clips of DATA, writes their curves
(docs/images/healthy.png), what each makes of one clip (docs/images/healthy-samples.png), what the
first one makes of it at each checkpoint (docs/images/healthy-steps.png) and
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
from scd.evaluation.plots import curve_panels, finish, legend
from scd.evaluation.predict import choose_windows, predict, read_windows
from scd.evaluation.protocols import Protocol
from scd.evaluation.trial import measure
from scd.models.checkpoint import World, load_world
from scd.training.folder import checkpoints

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
    """Return the losses and the action gap of a run by step (ValueError: it has no validation)."""
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


def worlds_of(run: Path) -> dict[int, World]:
    """Return what a run was at each of its checkpoints, by step (ValueError: it has none)."""
    worlds = {step: load_world(path) for step, path in checkpoints(run).items()}
    if not worlds:
        raise ValueError(f"{run}: needed a run with a checkpoint, found none")
    return worlds


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
    """Draw losses, action gap and PSNR at +1 of all runs by step; dashed: by another's actions."""
    figure, panels = curve_panels(4, "on white")
    for axes, (key, label) in zip(
        panels,
        [
            ("training", "training loss"),
            ("held_out", "loss on held-out clips"),
            ("action_gap", "action gap"),
            ("psnr", "PSNR at +1, dB (dashed: another's actions)"),
        ],
        strict=True,
    ):
        for number, (name, curves) in enumerate(found.items()):
            look = {"color": f"C{number}", "linewidth": 1.2}
            if key == "psnr":
                steps = [at["step"] for at in curves[key]]
                dashed = [at["shuffled_actions, +1"] for at in curves[key]]
                axes.plot(steps, dashed, linestyle="dashed", **look)
                values = [at["model, +1"] for at in curves[key]]
            else:
                steps, values = zip(*curves[key], strict=True)
            axes.plot(steps, values, label=name, **look)
        axes.set_xlabel("steps")
        axes.set_ylabel(label)
        if key in ("training", "held_out"):
            axes.set_yscale("log")
        legend(axes, "on white")
    finish(figure, path, "", "on white")


def draw(data: str, runs: Mapping[str, Path], docs: Path = DOCS) -> str:
    """Measure and draw all runs; return the table of what each was at its checkpoints."""
    source = open_source(data, "val")
    found = {name: curves_of(run) for name, run in runs.items()}
    worlds = {name: worlds_of(run) for name, run in runs.items()}
    for name, by_step in worlds.items():
        found[name]["psnr"] = [
            {"step": step} | measured(world, source) for step, world in by_step.items()
        ]
    images = docs / "images"
    draw_curves(found, images / "healthy.png")
    ends = {name: by_step[max(by_step)] for name, by_step in worlds.items()}
    draw_samples(ends, source, images / "healthy-samples.png")
    first, *_ = worlds.values()
    by_step = {f"{step} steps": world for step, world in first.items()}
    draw_samples(by_step, source, images / "healthy-steps.png")
    result = {"runs": found} | provenance()
    write_json(result, docs / "results" / "healthy.json")
    return checkpoint_table(result)


def checkpoint_table(result: Mapping[str, Any]) -> str:
    """Return the table of what each run was at its checkpoints."""
    head = ["run", "steps", "loss, held out", "action gap", "gap over loss"]
    head += ["PSNR at +1, dB (another's actions)", f"at +{PREDICTED}"]
    runs = result["runs"].items()
    return markdown(head, [row for name, curves in runs for row in rows_of(name, curves)])


def rows_of(name: str, curves: Mapping[str, Any]) -> list[list[str]]:
    """Return the lines of one run, one for each checkpoint; no validation there: no losses."""
    losses, gaps = dict(curves["held_out"]), dict(curves["action_gap"])
    rows = []
    for psnr in curves["psnr"]:
        step = psnr["step"]
        cells = [name, str(step), "", "", ""]
        if step in losses:
            loss, gap = losses[step], gaps[step]
            cells[2:] = [f"{loss:.3f}", f"{gap:.4f}", f"{100 * gap / loss:.1f} %"]
        both = [
            f"{psnr[f'model, +{at}']:.1f} ({psnr[f'shuffled_actions, +{at}']:.1f})"
            for at in (1, PREDICTED)
        ]
        rows.append(cells + both)
    return rows


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
