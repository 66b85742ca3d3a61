"""The demo: a first look at the shipped world, or a small world and its dense twin trained here.

With `train` both are trained, measured, streamed and reported in one run on one machine, so that
they can be compared. After an interruption the same command continues.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from scd.common.config import to_json
from scd.common.provenance import provenance, write_json
from scd.common.runtime import choose_device, cpu_threads
from scd.common.threads import ThreadChoice
from scd.data.source import open_source
from scd.data.toy import ToyWorld
from scd.demo.first_look import claim_folder, first_look
from scd.demo.report import write_report
from scd.demo.settings import HORIZONS, DemoConfig
from scd.demo.side_by_side import (
    NUM_GIVEN,
    NUM_STREAMED,
    NUM_WARM_UP,
    SHOWN,
    measure_memory,
    stream_in_turns,
    write_stream,
)
from scd.engine.open import advised_threads
from scd.evaluation.metrics import find_row
from scd.evaluation.predict import TIMED, choose_windows, read_windows, summarize
from scd.evaluation.trial import Measurement, measure
from scd.models.build import num_parameters
from scd.models.checkpoint import World, last_step, load_world, resolve, save_world
from scd.models.progress import load_progress
from scd.models.shipped import shipped_world
from scd.streaming.rollout import Timing
from scd.training.fit import fit_to_data
from scd.training.presets import preset
from scd.training.world import train

STREAMED = ("separable", "dense")
"""Models that are streamed, timed and whose memory is measured."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model of the demo and what its training took."""

    folder: Path
    steps: int
    seconds: float
    """Of training, without evaluation; of an interrupted one those of all its parts."""


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo and return what its report.json holds.

    Raises:
        FileExistsError: the folder holds something else than an earlier demo.
        FileNotFoundError: without train: there is no such world, or no shipped one.
        ValueError: the world carries no clips to begin from, or is one of training.
        KeyboardInterrupt: it was interrupted; the training is saved.
    """
    if config.train and config.world:
        raise ValueError(f"a demo trains its own worlds: {config.world!r} has no effect on train")
    out = Path(config.out)
    if config.train:
        claim_folder(out)
        return train_and_compare(config, out)
    world = resolve(config.world or shipped_world())
    return first_look(world, out, config.seed, config.threads)


def train_and_compare(config: DemoConfig, out: Path) -> dict[str, Any]:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    kind = "quick" if config.quick else "full"
    runs = out / "runs" / f"{kind}-{config.num_steps}-steps-seed-{config.seed}"

    console.print(f"[bold]1/5[/] training the separable model: {config.num_steps} steps")
    separable = train_one("toy", runs / "separable", config.num_steps, config)
    console.print(f"[bold]2/5[/] training the dense model: as many steps, {config.num_steps}")
    dense = train_one("toy-dense", runs / "dense", config.num_steps, config)
    equal_steps = max(1, round(separable.seconds / dense.seconds * dense.steps))
    console.print(
        f"[bold]3/5[/] training the dense model: as many seconds, {separable.seconds:.0f}, "
        f"which are {equal_steps} steps"
    )
    equal_time = train_one("toy-dense", runs / "dense_equal_time", equal_steps, config)
    trained = {"separable": separable, "dense": dense, "dense_equal_time": equal_time}

    began = time.perf_counter()
    device = choose_device()
    worlds = {name: load_world(one.folder, device=device) for name, one in trained.items()}
    for name in STREAMED:
        save_world(worlds[name], out / name)
    console.print("[bold]4/5[/] measuring all three on held-out clips")
    source = open_source("toy:32", "val")
    assert isinstance(source, ToyWorld)
    streamed = {name: worlds[name] for name in STREAMED}
    with ThreadChoice(config.threads, active=device.type == "cpu") as threads:
        measured = {
            name: measure(world, source, config.protocol, threads=threads)
            for name, world in worlds.items()
        }
        fewer = replace(config.protocol, num_clips=8 if config.quick else 48)
        memory = measure_memory(streamed, source, fewer, threads)
    measured_s = time.perf_counter() - began

    console.print("[bold]5/5[/] streaming separable and dense in turns, frame by frame")
    length = NUM_GIVEN + NUM_STREAMED
    batch = read_windows(source, choose_windows(source, 1, length, config.seed + 1), length)
    advised = max(advised_threads(world.model.config) for world in streamed.values())
    with cpu_threads(advised if config.threads == "auto" else config.threads):
        frames, timings = stream_in_turns(streamed, batch, config.seed)
    true = batch.frames[0].cpu()
    draw = write_stream(true, frames, NUM_GIVEN, SHOWN, source.card.fps, out)

    result = summarize_demo(trained, worlds, measured, memory, timings)
    result |= add_up(trained, measured_s, time.perf_counter() - began - measured_s)
    result |= {"settings": to_json(config) | {"protocol": to_json(config.protocol)}}
    result |= provenance(device)
    write_report(result, {name: one.folder for name, one in trained.items()}, draw, out)
    write_json(result, out / "report.json")
    _say(result, out, console)
    return result


def train_one(name: str, folder: Path, num_steps: int, demo: DemoConfig) -> Trained:
    """Train a preset, or continue where it was interrupted."""
    config = replace(
        fit_to_data(replace(preset(name), seed=demo.seed, threads=demo.threads)),
        out=str(folder),
        max_steps=num_steps,
        validate_every=0,
        sample_every=0,
        save_every=200,
        log_every=max(1, num_steps // 20),
    )
    checkpoint = last_step(train(config))
    assert checkpoint is not None
    progress = load_progress(checkpoint)
    return Trained(folder=folder, steps=progress.step, seconds=progress.elapsed_s)


def add_up(
    trained: Mapping[str, Trained], measuring_s: float, streaming_s: float
) -> dict[str, Any]:
    """Return the seconds of each stage and of all, earlier parts of the trainings included."""
    training_s = sum(one.seconds for one in trained.values())
    stages = {"training": training_s, "measuring": measuring_s, "streaming": streaming_s}
    return {"stages_s": stages, "total_s": sum(stages.values())}


def summarize_demo(
    trained: Mapping[str, Trained],
    worlds: Mapping[str, World],
    measured: Mapping[str, Measurement],
    memory: Mapping[str, Any],
    timings: Mapping[str, list[Timing]],
) -> dict[str, Any]:
    gains = {
        f"psnr_gain_db_h{horizon}": find_row(measured["separable"].rows, "psnr_gain", horizon)[
            "mean"
        ]
        for horizon in HORIZONS
    }
    timing = {name: summarize(of_frames[NUM_WARM_UP:]) for name, of_frames in timings.items()}
    seconds = {name: parts["total"]["mean"] for name, parts in timing.items()}
    num_frames = len(timings["separable"])
    return gains | {
        "seconds_per_frame": seconds,
        "ratio_dense_over_separable": seconds["dense"] / seconds["separable"],
        "frames": num_frames,
        "timed_frames": num_frames - NUM_WARM_UP,
        "timing": timing,
        "timed": f"{TIMED}; one stream of each model, frame by frame in turns, the first "
        f"{NUM_WARM_UP} generated frames left out; seconds_per_frame is the mean total",
        "models": {
            name: {
                "kind": type(worlds[name].model).__name__,
                "parameters": num_parameters(worlds[name].model),
                "denoising_steps": worlds[name].sampling.num_steps,
                "steps": one.steps,
                "train_seconds": one.seconds,
            }
            for name, one in trained.items()
        },
        "quality": {name: {"rows": one.rows} for name, one in measured.items()},
        "memory": dict(memory),
    }


def _say(result: Mapping[str, Any], out: Path, console: Console) -> None:
    seconds = result["seconds_per_frame"]
    gains = " / ".join(f"{result[f'psnr_gain_db_h{horizon}']:+.2f}" for horizon in HORIZONS)
    horizons = ", ".join(map(str, HORIZONS))
    console.print(f"separable over repeating the last frame: {gains} dB PSNR at {horizons} frames")
    console.print(
        f"seconds per frame: separable {seconds['separable']:.4f}, dense {seconds['dense']:.4f}, "
        f"ratio {result['ratio_dense_over_separable']:.2f}"
    )
    console.print(f"{result['total_s']:.0f} s of training, measuring and streaming")
    console.print(f"report: {out / 'report.html'}")
