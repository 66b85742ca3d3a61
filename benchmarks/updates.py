"""What one update of a distillation costs with several teachers, in turns: seconds and memory.

    python benchmarks/updates.py --data DATA --out FILE NAME=TEACHER ...

Each student is its teacher's model, trained for a few updates by `scd distill` in a process of its
own, one teacher after another, round by round, so that whatever else the machine does hits all
alike. Ratios are of the mean seconds of an update within a round; the first updates are left out.
Memory is the peak of the process.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import tyro

from scd.common.config import Precision, to_json
from scd.common.provenance import provenance, write_json
from scd.common.runlog import read_log
from scd.models.build import num_parameters
from scd.models.checkpoint import load_world
from scd.training.presets import Method


@dataclass(frozen=True, kw_only=True)
class UpdatesConfig:
    """One comparison; the first teacher is what the others are compared with."""

    worlds: Annotated[tuple[str, ...], tyro.conf.Positional]
    """NAME=TEACHER, each name once."""
    data: str
    """Clips to learn on, as in `scd distill`."""
    out: str
    """The result, a .json file."""
    method: Method = "dmd"
    """How the students learn."""
    steps: int = 4
    """Denoising steps per frame of the students."""
    updates: int = 12
    """Updates of each student in each round."""
    warm_up: int = 2
    """First updates of each round that are not timed."""
    rounds: int = 3
    """Rounds."""
    precision: Precision = "fp32"
    """Of the products."""

    def __post_init__(self) -> None:
        if not 0 <= self.warm_up < self.updates:
            raise ValueError(f"warm_up must be 0 .. updates - 1, got {self.warm_up}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be 1 or more, got {self.rounds}")


def distil(config: UpdatesConfig, teacher: str, out: Path) -> tuple[float, float]:
    """Train one student for a few updates; return mean seconds of an update, and peak GiB.

    Raises:
        ValueError: the training failed, with its last words.
    """
    words = [sys.executable, "-m", "scd", "distill", teacher, "--data", config.data]
    words += ["--method", config.method, "--steps", str(config.steps), "--out", str(out)]
    words += ["--max-steps", str(config.updates), "--log-every", "1", "--sample-every", "0"]
    words += ["--precision", config.precision]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{teacher}: {done.stderr.strip().splitlines()[-1:]}")
    steps = read_log(out, "step")
    timed = steps[config.warm_up :]
    return fmean(event["step_s"] for event in timed), steps[-1]["memory_gib"]


def compare(config: UpdatesConfig) -> dict[str, Any]:
    """Train all students in turns and return the result.

    Raises:
        ValueError: a name twice, or a training that failed.
        OSError: there is no such teacher.
    """
    pairs = [word.partition("=") for word in config.worlds]
    names = [name for name, _, _ in pairs]
    if not pairs or len(set(names)) < len(names) or not all(n and run for n, _, run in pairs):
        raise ValueError(f"needed NAME=TEACHER, each name once, got {list(config.worlds)}")
    teachers = {name: run for name, _, run in pairs}
    parameters = {name: num_parameters(load_world(run).model) for name, run in teachers.items()}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in teachers}
    for index in range(config.rounds):
        for name, teacher in teachers.items():
            with tempfile.TemporaryDirectory() as folder:
                spent[name].append(distil(config, teacher, Path(folder) / f"round-{index}"))
    first = names[0]
    worlds = {}
    for name, rounds in spent.items():
        ratios = [one[0] / base[0] for one, base in zip(rounds, spent[first], strict=True)]
        worlds[name] = {
            "run": teachers[name],
            "parameters": parameters[name],
            "seconds_per_update": median(seconds for seconds, _ in rounds),
            "peak_gib": median(peak for _, peak in rounds),
            "time_over_first": {"median": median(ratios), "low": min(ratios), "high": max(ratios)},
        }
    return {
        "worlds": worlds,
        "timed": f"an update of student and critic, rollout included: mean of "
        f"{config.updates - config.warm_up} after {config.warm_up} of warm-up, median of "
        f"{config.rounds} rounds in turns",
        "settings": to_json(config),
    } | provenance("cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; return the exit status."""
    config = tyro.cli(UpdatesConfig, args=arguments, description=__doc__)
    try:
        result = compare(config)
    except (ValueError, OSError) as error:
        print(f"updates.py: {error}", file=sys.stderr)
        return 2
    write_json(result, Path(config.out))
    for name, one in result["worlds"].items():
        ratio = one["time_over_first"]
        print(
            f"{name:12} {one['seconds_per_update']:8.3f} s per update, {one['peak_gib']:.2f} GiB, "
            f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] of the first's"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
