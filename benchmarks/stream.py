"""A long stream: do memory and seconds per frame stay the same?

    python benchmarks/stream.py RUN --frames 2000

writes docs/results/stream.json. Memory and time are compared from when the model's window is full:
until then attention sees more with every frame.
"""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import tyro

from scd.common.config import to_json
from scd.common.provenance import provenance, write_json
from scd.common.runtime import choose_device, make_generator
from scd.data.clip import Conditions
from scd.evaluation.predict import TIMED, summarize
from scd.models.checkpoint import World, load_world
from scd.streaming.rollout import Rollout, Timing

MEMORY_LIMIT, TIME_LIMIT = 0.05, 0.10
"""How much memory, and seconds per frame, may grow over the stream."""


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """A stream from nothing, steered by random actions."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder or world folder."""
    frames: int = 2000
    """Length of the stream."""
    block: int = 100
    """Frames per point of the curves."""
    steps: int | None = None
    """Denoising steps per frame; None: as the checkpoint says."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of actions and noise."""
    out: str = "docs/results/stream.json"
    """The result."""


def resident_mib() -> float:
    """Return the memory of this process that lies in RAM, in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory_mib(device: torch.device) -> float:
    """Return what a leak would grow: tensors on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    gc.collect()
    return resident_mib()


def random_actions(world: World, num_frames: int, seed: int) -> torch.Tensor | None:
    """Draw an action for each frame of one stream."""
    spec, generator = world.card.conditions, make_generator(seed, "actions")
    if spec.num_actions:
        return torch.randint(spec.num_actions, (1, num_frames), generator=generator)
    if spec.action_dim:
        return torch.rand(1, num_frames, spec.action_dim, generator=generator) * 2 - 1
    return None


def stream(config: StreamConfig) -> dict[str, Any]:
    """Run the stream and return the result."""
    device = choose_device(config.device)
    world = load_world(config.run, device=device)
    rollout = Rollout(world, seed=config.seed)
    if config.steps is not None:
        rollout.num_steps = config.steps
    window = world.model.config.cache.window
    # The first block after the window is full is what the rest is compared with.
    first = -(-window // config.block) * config.block
    if config.frames < first + 4 * config.block:
        raise ValueError(
            f"a window of {window} frames and blocks of {config.block} need a stream of "
            f"{first + 4 * config.block} frames or more, got {config.frames}"
        )
    actions = random_actions(world, config.frames, config.seed)
    labels = torch.zeros(1, dtype=torch.long) if world.card.conditions.num_labels else None
    rollout.begin(None, Conditions(labels=labels))
    timings: list[Timing] = []
    curve: list[dict[str, float]] = []
    for index in range(config.frames):
        rollout.step(None if actions is None else actions[:, index])
        timings.append(rollout.timing)
        if len(timings) % config.block == 0:
            seconds = median(timing.total_s for timing in timings[-config.block :])
            memory = memory_mib(device)
            curve.append({"frame": index + 1, "seconds_per_frame": seconds, "memory_mib": memory})
            print(f"frame {index + 1:6d}  {seconds * 1e3:8.2f} ms  {memory:8.1f} MiB", flush=True)
    steady = curve[first // config.block :]
    quarter = max(1, len(steady) // 4)
    begin_s, end_s = (
        median(point["seconds_per_frame"] for point in points)
        for points in (steady[:quarter], steady[-quarter:])
    )
    memory_growth = max(point["memory_mib"] for point in steady) / steady[0]["memory_mib"] - 1
    time_growth = end_s / begin_s - 1
    return {
        "frames": config.frames,
        "window": window,
        "num_steps": rollout.num_steps,
        "memory_growth": memory_growth,
        "memory_flat": memory_growth <= MEMORY_LIMIT,
        "time_growth": time_growth,
        "time_flat": abs(time_growth) <= TIME_LIMIT,
        "limits": {"memory_growth": MEMORY_LIMIT, "time_growth": TIME_LIMIT},
        "seconds_per_frame": summarize(timings[first:]),
        "curve": curve,
        "timed": f"{TIMED}; one stream; points are medians of {config.block} frames; time_growth "
        "compares the last quarter of the points with the first, memory_growth the largest with "
        f"the first, from frame {first} on; memory is "
        + ("of tensors on the GPU" if device.type == "cuda" else "the resident set"),
        "settings": to_json(config),
    } | provenance(device)


def main() -> None:
    """Run from the command line; the exit status is 1 where something grew."""
    config = tyro.cli(StreamConfig, description=__doc__)
    try:
        result = stream(config)
    except (ValueError, OSError) as error:
        print(f"stream.py: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    write_json(result, Path(config.out))
    for name in ("memory", "time"):
        flat = "flat" if result[f"{name}_flat"] else "NOT FLAT"
        print(f"{name}: {flat} ({result[f'{name}_growth']:+.1%})")
    raise SystemExit(0 if result["memory_flat"] and result["time_flat"] else 1)


if __name__ == "__main__":
    main()
