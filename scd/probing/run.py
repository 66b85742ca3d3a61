"""`scd probe`: every measurement of one trained model on held-out clips, its JSON and its page.

Each measurement is written when it is done; after an interruption the same command continues.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from scd.common.config import to_json
from scd.common.files import read_json, refuse_used, remove_leftovers, take_lock
from scd.common.memory import PeakMemory, check_free, readable
from scd.common.provenance import provenance, write_json
from scd.common.runtime import choose_device
from scd.common.weights import digest_of
from scd.evaluation.html import write_page
from scd.models.build import num_parameters
from scd.models.checkpoint import RAW_FILE, World, load_world, resolve
from scd.models.weights import WEIGHTS_FILE
from scd.probing.measurement import Measurement, Parts, as_measured, find_measurements
from scd.probing.models import subject_of
from scd.probing.settings import Plan, ProbeConfig, make_plan, memory_needed, open_clips

SETTINGS = "settings.json"
"""File of a probe's folder with the settings that all its parts share."""

NOT_CLAIMED = (
    "That similar features are redundant: a later layer may need just their small difference. The "
    "map of feature reuse tests that directly.",
    "That a layer with little effect alone could be left out together with others.",
    "That attention weights show what a layer takes from earlier frames: values count too, and "
    "tokens keep what an earlier layer took from them.",
    "What a split would lose after training. Nothing is trained here: the losses rank splits, and "
    "finetuning reduces them much.",
    "That other clips, other training or another size would show the same: this is one checkpoint. "
    "The intervals say how the numbers vary over clips.",
)
"""Shown at the end of the page."""


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Measure what is not measured yet, write probe.json and report.html, and return the former.

    Raises:
        FileNotFoundError: no such run or data.
        FileExistsError: the folder holds something else than a probe.
        ValueError: a probe of other settings is there, data of another kind than the model's,
            layers or tokens that it has not, fewer clips than asked for, or too little memory.
    """
    device = choose_device(config.device)
    world = load_world(config.run, config.weights, device)
    source = open_clips(config, world)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    needed = memory_needed(config, subject_of(world.model))
    console.print(f"memory: {readable(needed)} beside the weights, on {device}")
    check_free("the probe", needed, device)
    plan = make_plan(config, world, source)
    measurements = find_measurements()
    asked = {name: one for name, one in measurements.items() if name in config.measurements}
    out = Path(config.out)
    with _claimed(out, _settings(config)):
        peak = PeakMemory(device)
        parts = measure(plan, asked, out / "parts", console)
        result = summarize(plan, world, asked, parts)
        result["memory"] = {"stated_bytes": needed, "peak_bytes": peak.bytes()}
        result |= {"settings": to_json(config)} | provenance(device)
        write_json(result, out / "probe.json")
        write_report(result, asked, parts, out / "report.html")
    console.print(f"saved {out / 'probe.json'} and {out / 'report.html'}")
    return result


def measure(
    plan: Plan, measurements: Mapping[str, Measurement], folder: Path, console: Console
) -> dict[str, dict[str, Any]]:
    """Run measurements, each unless its part is in the folder, and return all parts by name."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, dict[str, Any]] = {}
    for name, measurement in measurements.items():
        path = folder / f"{name}.json"
        if path.exists():
            parts[name] = read_json(path)
            console.print(f"{name}: done before")
            continue
        began = time.perf_counter()
        with _bar(name, console) as progress:
            part = measurement.measure(plan, progress)
        part["seconds"] = time.perf_counter() - began
        write_json(part, path)
        parts[name] = part
        console.print(part.get("left_out") or f"{name}: {part['seconds']:.1f} s")
    return parts


def summarize(
    plan: Plan, world: World, measurements: Mapping[str, Measurement], parts: Parts
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, part in parts.items():
        conclude = measurements[name].conclude
        if conclude is None or "left_out" in part:
            result |= as_measured(part)
        else:
            result |= conclude(plan, parts)
    subject, config = plan.subject, plan.config
    return result | {
        "left_out": {name: part["left_out"] for name, part in parts.items() if "left_out" in part},
        "model": {
            "kind": type(world.model).__name__,
            "parameters": num_parameters(world.model),
            "layers": plan.names,
            "once": [layer.once for layer in subject.layers],
            "width": subject.width,
            "heads": subject.num_heads,
            "tokens_per_frame": subject.tokens_per_frame,
        },
        "measured_on": {
            "clips": config.num_clips,
            "noises_per_clip": config.num_noises,
            "given_frames": config.context,
            "steps": config.num_steps,
            "levels": list(plan.levels),
            "sampling": to_json(plan.sampling),
        },
        "seconds": {name: part["seconds"] for name, part in parts.items()},
    }


def write_report(
    result: Mapping[str, Any], measurements: Mapping[str, Measurement], parts: Parts, path: Path
) -> None:
    """Write the page: cards and a section of each measurement that the model allowed."""
    shown = sorted(
        (one.place, name) for name, one in measurements.items() if "left_out" not in parts[name]
    )
    names = [name for _, name in shown]
    write_page(
        "probing/report.html",
        path,
        title="What the layers of a causal video diffuser do",
        result=result,
        cards=[card for name in names for card in measurements[name].cards(result)],
        sections=[
            measurements[name].section(result, parts[name].get("pictures", {})) for name in names
        ],
        memory={key: readable(value) for key, value in result["memory"].items()},
        not_claimed=NOT_CLAIMED,
    )


def _settings(config: ProbeConfig) -> dict[str, Any]:
    free = ("out", "measurements", "device", "tolerance", "join", "frame_steps", "strict", "run")
    settings = {key: value for key, value in to_json(config).items() if key not in free}
    folder = resolve(config.run)
    weights = folder / (WEIGHTS_FILE if config.weights == "ema" else RAW_FILE)
    return settings | {"weights_hash": digest_of(weights, "blake2b")}


@contextmanager
def _claimed(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Hold a probe's folder, new or of the same settings, as long as the block runs."""
    path = out / SETTINGS
    if path.is_file():
        there = read_json(path)
        other = {
            key: f"{there.get(key)} there, {settings.get(key)} asked for"
            for key in sorted(there.keys() | settings.keys())
            if there.get(key) != settings.get(key)
        }
        if other:
            raise ValueError(
                f"{out} holds a probe with other settings: choose another --out "
                f"({'; '.join(f'{key}: {values}' for key, values in other.items())})"
            )
    else:
        refuse_used(out, "a probe")
    out.mkdir(parents=True, exist_ok=True)
    with take_lock(out / "lock"):
        remove_leftovers(out)
        write_json(settings, path)
        yield


@contextmanager
def _bar(name: str, console: Console) -> Iterator[Callable[[float], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(name.replace("_", " "), total=1.0)
        yield lambda share: progress.update(task, completed=share)
