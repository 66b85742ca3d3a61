"""How near do students come to where their teacher's path ends?

    python benchmarks/path_end.py --teacher RUN --students START --data LATENTS --frames 13

leads held-out clips, each frame from noise with the recorded frames before it, down the teacher's
path in many small steps, and compares with that end, from the same noise: the teacher itself in a
few steps, and each student in one. Printed is the mean squared distance, over the variance of the
ends. Wan worlds and small ones; latents, as `scd encode` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from scd.common.provenance import provenance
from scd.common.runtime import make_generator
from scd.data.clip import Batch
from scd.data.loader import read_clips
from scd.data.source import open_source
from scd.models.checkpoint import load_world
from scd.models.config import SamplingConfig
from scd.models.embed import Field
from scd.models.flow import schedule


@dataclass(frozen=True, kw_only=True)
class PathEndConfig:
    """One comparison."""

    teacher: str
    """World, run or step folder."""
    students: tuple[str, ...]
    """Likewise."""
    data: str
    """Latents."""
    frames: int = 16
    """Frames of a clip."""
    clips: int = 16
    """Held-out clips, one of an episode, from its start."""
    steps: int = 48
    """Of the path that counts as the teacher's."""
    shift: float = 5.0
    """Timestep shift of all steps of the teacher."""
    few: tuple[int, ...] = (1, 2, 4, 8)
    """Steps of the teacher that are compared."""
    seed: int = 0
    """Of the noise."""


def end_of(
    field: Field, noise: Float[Tensor, "b 1 t c h w"], times: Sequence[float]
) -> Float[Tensor, "b 1 t c h w"]:
    """Follow a field from noise to the last time by Euler's steps."""
    frames = noise
    for time, after in pairwise(times):
        now = torch.full(frames.shape[:3], time)
        frames = frames + (after - time) * field(frames, now)
    return frames


@torch.no_grad()
def distances(config: PathEndConfig) -> dict[str, float]:
    """Return the distance of each way from the teacher's end, over the variance of the ends."""
    source = open_source(config.data, "val", latents=True)
    long = [e for e in range(source.num_episodes) if source.num_frames(e) >= config.frames]
    clips = read_clips(source, [(e, 0) for e in long[: config.clips]], config.frames, "stop")
    teacher = load_world(config.teacher).model.eval()
    students = {name: load_world(name).model.eval() for name in config.students}

    def grid(number: int) -> list[float]:
        kind = "shifted" if config.shift != 1 else "uniform"
        sampling = SamplingConfig(num_steps=number, schedule=kind, shift=config.shift)
        return schedule(sampling).tolist()

    sums: dict[str, float] = {}
    spread = 0.0
    for number, clip in enumerate(clips):
        batch = Batch.of([clip])
        frames, conditions = batch.frames, batch.conditions
        generator = make_generator(config.seed, "path", number)
        noise, read = torch.randn(2, *frames[:, None].shape, generator=generator)
        path = teacher.field(frames, conditions, config.frames, 1, read)
        end = end_of(path, noise, grid(config.steps))
        spread += end.var().item()
        ways = {f"teacher, {few} steps": end_of(path, noise, grid(few)) for few in config.few}
        for name, student in students.items():
            field = student.field(frames, conditions, config.frames, 1, read)
            ways[f"{name}, 1 step"] = end_of(field, noise, [1.0, 0.0])
        for way, found in ways.items():
            sums[way] = sums.get(way, 0.0) + (found - end).square().mean().item()
    return {way: total / spread for way, total in sums.items()} | {"clips": len(clips)}


def main() -> None:
    """Compare and print JSON."""
    config = tyro.cli(PathEndConfig, description=__doc__)
    print(json.dumps({"distance": distances(config)} | provenance(), indent=2))


if __name__ == "__main__":
    main()
