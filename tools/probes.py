"""Results of several probes: do the paper's two regularities appear, and from which layer on?

    python tools/probes.py NAME LABEL=FOLDER LABEL=FOLDER ...

FOLDER is that of a `scd probe`, with attention, similarity and leave_one_out among its
measurements; the order is that of the table. A label may be "MODEL, CHECKPOINT". It writes
docs/results/NAME.json, a few numbers per layer of each probe, and docs/images/NAME.png, curves
over their layers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import markdown
from matplotlib.figure import Figure

from scd.common.provenance import write_json
from scd.evaluation.grids import write_figure

DOCS = Path(__file__).resolve().parent.parent / "docs"

EARLY = 0.8
"""Share of the steps that counts as early. Source: paper, figure 2a: 40 of 50."""

INKS = ("#3b7dd8", "#c2568f", "#2f8f5b", "#d98a2b")
"""Colours of the models in the plot."""

SIMILARITIES = ("cosine", "centred", "centred_by_step")
"""Kinds of similarity that are kept."""


def gather(probes: Mapping[str, Any]) -> dict[str, Any]:
    """Keep a few numbers per layer of each probe.

    Args:
        probes: probe.json by label.

    Raises:
        ValueError: a probe lacks a measurement, or they were not of the same clips and steps.
    """
    needed = ("step_similarity", "attention", "leave_one_out")
    lacking = {
        label: missing
        for label, probe in probes.items()
        if (missing := [name for name in needed if not probe.get(name)])
    }
    if lacking or not probes:
        raise ValueError(f"needed probes with {', '.join(needed)}; lacking: {lacking}")
    keys = ("num_clips", "context", "num_noises", "num_steps", "seed")
    protocols = {json.dumps([probe["settings"][key] for key in keys]) for probe in probes.values()}
    if len(protocols) > 1:
        raise ValueError(f"the probes differ in {', '.join(keys)}: {sorted(protocols)}")
    first = next(iter(probes.values()))
    return {
        "protocol": {key: first["settings"][key] for key in keys},
        "probes": [summary(label, probe) for label, probe in probes.items()],
        "lines": [
            {key: probe[key] for key in ("command", "commit", "hardware")}
            for probe in probes.values()
        ],
    }


def summary(label: str, probe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of one probe."""
    layers = []
    for similar, attention, without in zip(
        probe["step_similarity"], probe["attention"], probe["leave_one_out"], strict=True
    ):
        layer: dict[str, Any] = {"layer": similar["layer"], "name": similar["name"]}
        for kind in SIMILARITIES:
            layer[kind] = early_and_late(np.array(similar[kind]))
        layer["cka_first_last"] = similar["cka"][0][-1]
        layer["past_mass"] = float(np.mean(attention["past_mass"]))
        layer["past_mass_heads"] = [min(attention["past_mass"]), max(attention["past_mass"])]
        layer["uniform"] = float(np.mean(attention["uniform"]))
        layer |= {key: without[key] for key in ("relative_loss", "ci_low", "ci_high")}
        layers.append(layer)
    found = {"label": label, "layers": layers, "loss": float(np.mean(probe["loss"]["mean"]))}
    if "proposed_split" in probe:
        found["proposed_split"] = probe["proposed_split"]
        found["candidates"] = probe["candidates"]
        found["reuse"] = probe.get("reuse")
    return found


def early_and_late(matrix: np.ndarray) -> dict[str, float]:
    """Average a step by step matrix among the early steps, and between early and late ones."""
    num_steps = len(matrix)
    num_early = round(EARLY * num_steps)
    early = matrix[:num_early, :num_early]
    between = early[~np.eye(num_early, dtype=bool)]
    return {"early": float(between.mean()), "late": float(matrix[:num_early, num_early:].mean())}


def probes(results: Mapping[str, Any]) -> str:
    """One row per probe and per first, middle and last layer: what it says of both regularities."""
    (result,) = results.values()
    rows = []
    for probe in result["probes"]:
        layers = probe["layers"]
        for layer in (layers[0], layers[(len(layers) - 1) // 2], layers[-1]):
            similar = [
                f"{layer[kind]['early']:.2f} / {layer[kind]['late']:.2f}" for kind in SIMILARITIES
            ]
            low, high = (f"{100 * layer[bound]:+.0f}" for bound in ("ci_low", "ci_high"))
            without = f"{100 * layer['relative_loss']:+.0f} % [{low}, {high}]"
            mass = f"{layer['past_mass']:.2f} ({layer['uniform']:.2f})"
            rows.append([f"{probe['label']}, {layer['name']}", *similar, mass, without])
    head = ["probe, layer", "cosine", "centred", "centred by step"]
    return markdown([*head, "mass on the past (uniform)", "loss without the layer"], rows)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw similarity, attention on the past and leave-one-out over the depth of the layers."""
    panels = (
        ("centred cosine, early against late steps", lambda one: one["centred"]["late"]),
        ("the same, each step centred", lambda one: one["centred_by_step"]["late"]),
        ("attention on the past over uniform", lambda one: one["past_mass"] / one["uniform"]),
        ("relative loss without the layer", lambda one: one["relative_loss"]),
    )
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    strokes = styles([probe["label"] for probe in result["probes"]])
    for (title, value), axis in zip(panels, axes.flat, strict=True):
        for probe in result["probes"]:
            # Models of different depth share an axis: 0 is the first layer and 1 the last.
            depth = np.linspace(0, 1, len(probe["layers"]))
            curve = [value(layer) for layer in probe["layers"]]
            colour, alpha = strokes[probe["label"]]
            axis.plot(
                depth, curve, marker="o", ms=3, color=colour, alpha=alpha, label=probe["label"]
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("depth: first layer 0, last layer 1")
        axis.grid(alpha=0.3)
    axes[1, 1].set_yscale("symlog", linthresh=0.01)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9
    )
    write_figure(figure, path)


def styles(labels: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Give each model, the part of a label before the comma, a colour; later probes stand out."""
    models = [label.partition(",")[0] for label in labels]
    colours = dict(zip(dict.fromkeys(models), INKS * len(models), strict=False))
    return {
        label: (colours[model], (models[: place + 1].count(model)) / models.count(model))
        for place, (label, model) in enumerate(zip(labels, models, strict=True))
    }


def main(arguments: Sequence[str]) -> int:
    """Gather the named probes; return the exit status."""
    pairs = [argument.partition("=") for argument in arguments[1:]]
    if not pairs or not all(label and equals and folder for label, equals, folder in pairs):
        print(__doc__)
        return 2
    try:
        probes = {
            label: json.loads((Path(folder) / "probe.json").read_text(encoding="utf-8"))
            for label, _, folder in pairs
        }
        result = gather(probes)
    except (ValueError, OSError) as error:
        print(f"probes.py: {error}", file=sys.stderr)
        return 2
    write_json(result, DOCS / f"results/{arguments[0]}.json")
    draw(result, DOCS / f"images/{arguments[0]}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
