"""`scd export onnx`: a separable world as ONNX graphs, their weights and a description.

The folder holds a graph for each part of a frame (`scd.export.graphs`), `weights.bin`, which all of
them read, and `world.json`: which inputs and outputs there are, how the world is steered, the
schedule of every number of steps, and hashes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scd import __version__
from scd.common.config import to_json
from scd.common.files import refuse_used, written_aside
from scd.export.graphs import graphs_of, prepared_names
from scd.export.onnx_files import OPSET, WeightsFile, described, interface, traced
from scd.export.settings import OnnxConfig, WeightType
from scd.models.checkpoint import World, load
from scd.models.config import SamplingConfig, SeparableConfig
from scd.models.flow import evaluations, num_step_noises, schedule, with_num_steps

FORMAT = "scd-onnx-1"
"""Of the folder; another one where a reader of this could misunderstand it."""

DESCRIPTION = "world.json"
"""Name of the description."""

MOST_STEPS = 16
"""Denoising steps per frame up to which schedules are described, or twice the world's own."""


def export_onnx(config: OnnxConfig) -> dict[str, Any]:
    """Write a world; return the description.

    Raises:
        FileNotFoundError: no such world.
        FileExistsError: the folder holds something.
        ValueError: a kind of world that cannot be exported; says why.
    """
    target = Path(config.out)
    refuse_used(target)
    world = load(config.run)
    refuse_others(world, config.run)
    with written_aside(target) as aside:
        return write_onnx(world, world_name(config.run), config.weights, aside)


def world_name(run: str) -> str:
    """Return the name of a world by its folder."""
    return Path(run).resolve().name


def refuse_others(world: World, run: str) -> None:
    """Refuse a world of which there are no graphs (ValueError)."""
    model = world.model.config
    if model.takes_text or world.autoencoder.config.is_video:
        raise ValueError(
            f"{run} is a world of Wan: its weights take gigabytes, and its steps and decoder keep "
            "memories of several frames, which these graphs do not. Separable worlds of "
            "`scd train` can be exported"
        )
    if not isinstance(model, SeparableConfig):
        raise ValueError(
            f"{run} is a dense world, which runs all its layers over its memory at every step: "
            "only separable ones, whose steps are light, are exported"
        )


def write_onnx(world: World, name: str, weights: WeightType, folder: Path) -> dict[str, Any]:
    """Write graphs, weights and description into a folder; return the description."""
    file = WeightsFile(weights)
    graphs = {}
    for part, graph in graphs_of(world).items():
        proto = traced(graph)
        file.take(proto)
        data = proto.SerializeToString()
        (folder / f"{part}.onnx").write_bytes(data)
        graphs[part] = {**described(data, f"{part}.onnx"), **interface(proto)}
    description = {
        "format": FORMAT,
        "scd": __version__,
        "name": name,
        "opset": OPSET,
        "weights": file.write(folder),
        "graphs": graphs,
        "prepared": list(prepared_names(world.model.config)),
        "model": to_json(world.model.config),
        "autoencoder": to_json(world.autoencoder.config.placeless()),
        "card": to_json(world.card),
        "sampling": to_json(world.sampling),
        "begins_from_nothing": world.begins_from_nothing,
        "idle_action": list(world.card.conditions.idle_action),
        "schedules": schedules(world.sampling),
        "noise": (
            "of frame i of a stream with seed s: torch.randn of a CPU generator, seeded by the "
            "first 8 bytes, little-endian, of BLAKE2b (8 bytes) of 's/noise of a frame/i', "
            "shifted right by one; noises of the steps in a row from 's/noise of a step/i', of a "
            "corrupted context from 's/noise of a context/i'"
        ),
    }
    text = json.dumps(description, indent=2, allow_nan=False)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    return description


def readable(description: dict[str, Any]) -> str:
    """Say in a line how large the graphs and their weights are."""
    weights = description["weights"]
    graphs = sum(graph["bytes"] for graph in description["graphs"].values())
    return (
        f"{len(description['graphs'])} graphs of {graphs / 1e3:.0f} kB, opset "
        f"{description['opset']}; weights of {weights['bytes'] / 1e6:.1f} MB ({weights['type']})"
    )


def schedules(sampling: SamplingConfig) -> dict[str, Any]:
    """Say, by number of steps, at which times a frame is denoised and what becomes of each call."""
    if sampling.first_times:
        raise ValueError(
            "exported graphs denoise all frames alike: this world's first frame has times of its "
            f"own, {list(sampling.first_times)}"
        )
    described = {}
    for number in range(1, max(MOST_STEPS, 2 * sampling.num_steps) + 1):
        chosen = with_num_steps(sampling, number)
        times = schedule(chosen).tolist()
        described[str(number)] = {
            "times": times,
            "num_noises": num_step_noises(times, chosen.solver),
            "calls": [asdict(call) for call in evaluations(times, chosen.solver)],
        }
    return described
