"""Many futures of one state: in one batch, against one after another.

    python benchmarks/planning.py [RUN] --out FILE

begins a stream of a world from one of its clips, forks it, and steps all futures by random actions.
Both ways make the same frames, which is checked, and are timed in turns (A B A B): `fork(n)` with
all futures in one batch, and n times `fork()`, each stepped alone. The time of the forks counts.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from scd.common.config import Precision, at_least, to_json
from scd.common.provenance import provenance, write_json
from scd.common.runtime import choose_device, cpu_threads, make_generator
from scd.data.clip import Conditions
from scd.engine.open import open_engine
from scd.models.checkpoint import load_world
from scd.models.config import EngineKind
from scd.models.names import find_world
from scd.models.shipped import read_clips
from scd.streaming.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class PlanningConfig:
    """One comparison."""

    run: Annotated[str, tyro.conf.Positional] = ""
    """World or run folder with clips; empty: the shipped world of Doom."""
    futures: int = 64
    """Of one state."""
    frames: int = 8
    """Of each future."""
    given: int = 16
    """Frames of the clip that the stream is given."""
    rounds: int = 5
    """How often each way is timed."""
    steps: int | None = None
    """Denoising steps per frame; None: as the checkpoint says."""
    engine: EngineKind = "fast"
    """What runs the model, in both ways."""
    precision: Precision = "fp32"
    """Of weights, memory and products, in both ways."""
    threads: tuple[int, int] = (2, 1)
    """CPU threads of the batch, and of the futures one after another."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Of actions and noise."""
    out: str = ""
    """The result, a .json file; empty: it is only shown."""

    def __post_init__(self) -> None:
        at_least(1, futures=self.futures, frames=self.frames, given=self.given, rounds=self.rounds)
        at_least(1, threads=min(self.threads))


def begun(config: PlanningConfig, device: torch.device) -> Rollout:
    """Begin a stream from the first clip of a world.

    Raises:
        ValueError: the world has no clips, or is not steered by actions by id.
        OSError: there is no such world.
    """
    folder = find_world(config.run or "doom")
    world, clips = load_world(folder, device=device), read_clips(folder)
    if clips is None or not world.card.conditions.num_actions:
        raise ValueError(f"{folder}: needed a world with clips, steered by actions by id")
    engine = open_engine(world.model, config.engine, config.precision)
    rollout = Rollout(world, seed=config.seed, engine=engine)
    if config.steps is not None:
        rollout.num_steps = config.steps
    frames = clips.pixels(0, config.given)[None]
    rollout.begin(frames, Conditions(actions=clips.actions[:1, : frames.shape[1]]), can_reset=False)
    return rollout


def in_one_batch(rollout: Rollout, plans: Tensor) -> Tensor:
    """Return the frames of all futures, [futures t 3 h w], for actions [futures t]."""
    return rollout.fork(len(plans)).generate(plans, plans.shape[1])


def one_by_one(rollout: Rollout, plans: Tensor, seeds: tuple[int, ...]) -> Tensor:
    """Return the same, each future from a fork of its own."""
    frames = []
    for plan, seed in zip(plans, seeds, strict=True):
        twin = rollout.fork()
        twin.seed = seed
        frames.append(twin.generate(plan[None], len(plan)))
    return torch.cat(frames)


def compare(config: PlanningConfig) -> dict[str, Any]:
    """Time both ways in turns and return the result."""
    device = choose_device(config.device)
    rollout = begun(config, device)
    size = (config.futures, config.frames)
    generator = make_generator(config.seed, "plans")
    plans = torch.randint(rollout.world.card.conditions.num_actions, size, generator=generator)
    seeds = rollout.fork(config.futures).seeds
    ways = {
        "batch": lambda: in_one_batch(rollout, plans),
        "one_by_one": lambda: one_by_one(rollout, plans, seeds),
    }
    threads = dict(zip(ways, config.threads, strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    frames: dict[str, Tensor] = {}
    for number in range(config.rounds + 1):
        for name, make in ways.items():
            with cpu_threads(threads[name]):
                began = time.perf_counter()
                frames[name] = make()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                spent = time.perf_counter() - began
            # The first round sets everything up.
            if number:
                seconds[name].append(spent)
    made = config.futures * config.frames
    pairs = zip(seconds["one_by_one"], seconds["batch"], strict=True)
    ratios = [alone / batch for alone, batch in pairs]
    return {
        "frames_per_s": {name: made / median(spent) for name, spent in seconds.items()},
        "times_faster": {"median": median(ratios), "low": min(ratios), "high": max(ratios)},
        "largest_difference": float((frames["batch"] - frames["one_by_one"]).abs().max()),
        "timed": f"fork and {config.frames} frames of each of {config.futures} futures, pixels "
        f"included; {config.rounds} rounds in turns after one more",
        "threads": threads,
        "settings": to_json(config),
    } | provenance(device)


def main() -> int:
    """Compare; return the exit status."""
    try:
        config = tyro.cli(PlanningConfig, description=__doc__)
        result = compare(config)
    except (ValueError, OSError) as error:
        print(f"planning.py: {error}", file=sys.stderr)
        return 2
    if config.out:
        write_json(result, Path(config.out))
    for name, rate in result["frames_per_s"].items():
        print(f"{name:12} {rate:8.1f} frames/s, {result['threads'][name]} threads")
    times = result["times_faster"]
    print(
        f"in one batch {times['median']:.2f} [{times['low']:.2f}, {times['high']:.2f}] times as "
        f"many; frames differ by {result['largest_difference']:.1e} at most"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
