"""Several worlds in turns: seconds per frame that can be compared.

    python benchmarks/turns.py --data DATA --out FILE NAME=RUN[@STEPS] ...

streams the same held-out clip from each, one frame of each after another, so that whatever else the
machine does meanwhile hits all of them alike. STEPS are denoising steps per frame, in place of the
checkpoint's. Ratios are of the median seconds of a block of frames, block by block.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import tyro

from scd.common.config import Precision, to_json
from scd.common.provenance import provenance, write_json
from scd.common.runtime import choose_device, cpu_threads
from scd.data.source import open_source
from scd.engine.open import advised_threads, open_engine
from scd.evaluation.predict import TIMED, check_fit, choose_windows, read_windows, summarize
from scd.models.build import num_parameters
from scd.models.checkpoint import load_world
from scd.models.config import EngineKind
from scd.streaming.rollout import Rollout, Timing


@dataclass(frozen=True, kw_only=True)
class TurnsConfig:
    """One comparison; the first world is what the others are compared with."""

    worlds: Annotated[tuple[str, ...], tyro.conf.Positional]
    """NAME=RUN or NAME=RUN@STEPS, each name once."""
    data: str
    """Where the clip is from: "toy:32", "toy:64", or a folder of episodes."""
    out: str
    """The result, a .json file."""
    frames: int = 100
    """Frames that each makes and that are timed."""
    given: int = 8
    """Frames of the clip that they are given."""
    warm_up: int = 8
    """Frames that each makes before: until its memory is full and all is set up."""
    block: int = 10
    """Frames of a block."""
    engine: EngineKind = "fast"
    """What runs the models."""
    precision: Precision = "fp32"
    """Of weights, memory and products."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of the choice of the clip and of the noise."""

    def __post_init__(self) -> None:
        for name in ("frames", "given", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.frames % self.block:
            raise ValueError(f"frames must be blocks of {self.block}, got {self.frames}")


def parse(word: str) -> tuple[str, str, int | None]:
    """Read NAME=RUN[@STEPS].

    Raises:
        ValueError: it is of another form.
    """
    name, equals, run = word.partition("=")
    run, at, steps = run.partition("@")
    if not (name and equals and run) or (at and not steps.isdecimal()):
        raise ValueError(f"needed NAME=RUN or NAME=RUN@STEPS, got {word!r}")
    return name, run, int(steps) if at else None


def turns(config: TurnsConfig) -> dict[str, Any]:
    """Stream all worlds in turns and return the result.

    Raises:
        ValueError: a name twice, worlds of other data, or no episode that is long enough.
        OSError: there is no such run or data.
    """
    words = [parse(word) for word in config.worlds]
    if not words or len({name for name, _, _ in words}) < len(words):
        raise ValueError(f"needed one world or more, each name once, got {list(config.worlds)}")
    device = choose_device(config.device)
    source = open_source(config.data, "val")
    length = config.given + config.warm_up + config.frames
    batch = read_windows(source, choose_windows(source, 1, length, config.seed), length)
    rollouts: dict[str, Rollout] = {}
    result: dict[str, Any] = {}
    threads = 1
    for name, run, steps in words:
        world = load_world(run, device=device)
        check_fit(world, source.card, config.data)
        result[name] = {"run": run, "parameters": num_parameters(world.model)}
        threads = max(threads, advised_threads(world.model.config))
        engine = open_engine(world.model, config.engine, config.precision, release=True)
        rollout = rollouts[name] = Rollout(world, seed=config.seed, engine=engine)
        if steps is not None:
            rollout.num_steps = steps
        result[name]["sampling"] = to_json(rollout.sampling)
        given = batch.conditions.frames(0, config.given)
        rollout.begin(batch.frames[:, : config.given], given)
    timings: dict[str, list[Timing]] = {name: [] for name in rollouts}
    steering, names = batch.conditions.actions, list(rollouts)
    with cpu_threads(threads):
        for index in range(config.given, length):
            # Whoever is first in a round changes: it meets whatever happened between the rounds.
            first = index % len(names)
            for name in names[first:] + names[:first]:
                rollouts[name].step(None if steering is None else steering[:, index])
                timings[name].append(rollouts[name].timing)
    blocks = {}
    for name, spent in timings.items():
        timed = spent[config.warm_up :]
        seconds = [one.total_s for one in timed]
        blocks[name] = [
            median(seconds[start : start + config.block])
            for start in range(0, config.frames, config.block)
        ]
        ratios = [one / base for one, base in zip(blocks[name], blocks[names[0]], strict=True)]
        result[name]["seconds_per_frame"] = summarize(timed)
        result[name]["time_over_first"] = {
            "median": median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        }
    return {
        "worlds": result,
        "timed": f"{TIMED}; one stream each, in turns, one frame of each after another",
        "settings": to_json(config),
    } | provenance(device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; return the exit status."""
    config = tyro.cli(TurnsConfig, args=arguments, description=__doc__)
    try:
        result = turns(config)
    except (ValueError, OSError) as error:
        print(f"turns.py: {error}", file=sys.stderr)
        return 2
    out = Path(config.out)
    write_json(result, out)
    for name, one in result["worlds"].items():
        ratio = one["time_over_first"]
        print(
            f"{name:20} {1000 * one['seconds_per_frame']['total']['p50']:9.2f} ms per frame, "
            f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] of the first's"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
