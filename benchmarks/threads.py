"""Training with the number of CPU threads that it chooses, against numbers set by hand.

    python benchmarks/threads.py --out FILE [PRESET=DATA ...]

trains each preset for some seconds in a process of its own, by default and with each number, one
after another and round by round (A B C A B C), on the machine as it is and beside a process that
keeps one core busy. Ratios are of steps per second within a round: how many times slower the
default is than the best number set by hand, over the whole run, in which it also looks for its
number, and over the steps of the second half.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import tyro

from scd.common.config import at_least, to_json
from scd.common.provenance import provenance, write_json
from scd.common.runlog import read_log

BUSY = "while True: pass"
"""What the busy process does."""

LOADS = {"idle": 0, "busy": 1}
"""Busy processes beside the training."""


@dataclass(frozen=True, kw_only=True)
class ThreadsConfig:
    """One comparison."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ("toy=toy:32", "doom-play=toy:64")
    """PRESET=DATA. A model of doom-play's size learns from the toy world unless a folder of Doom is
    named: its frames are as large, but it is drawn rather than read from video files."""
    out: str
    """The result, a .json file."""
    threads: tuple[int, ...] = (1, os.cpu_count() or 1)
    """Numbers that are set by hand."""
    loads: tuple[str, ...] = tuple(LOADS)
    """idle: nothing beside; busy: a process that keeps a core busy."""
    seconds: int = 60
    """Seconds of each training."""
    rounds: int = 2
    """Rounds."""

    def __post_init__(self) -> None:
        at_least(1, seconds=self.seconds, rounds=self.rounds, threads=min(self.threads, default=0))
        if not set(self.loads) <= set(LOADS) or not self.loads:
            raise ValueError(f"loads must be of {list(LOADS)}, got {list(self.loads)}")


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Keep so many cores busy for the time of a with block."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def train(preset: str, data: str, threads: str, seconds: int) -> dict[str, Any]:
    """Train for some seconds; return steps per second of all and of the second half, and the number
    of threads at the end.

    Raises:
        ValueError: the training failed, with its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [sys.executable, "-m", "scd", "train", preset, "--data", data, "--out", str(out)]
        words += ["--threads", threads, "--max-steps", "1000000", "--log-every", "1"]
        words += ["--validate-every", "0", "--sample-every", "0", "--save-every", "0"]
        # Counted from the start of the process: loading the program is not the matter here.
        words += ["--time-limit-s", str(seconds), "--device", "cpu"]
        # As it was set here it would be the limit.
        environment = {name: one for name, one in os.environ.items() if name != "OMP_NUM_THREADS"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise ValueError(f"scd train {preset}: {done.stderr.strip().splitlines()[-1:]}")
        steps, choices = read_log(out, "step"), read_log(out, "threads")
    times = [event["step_s"] for event in steps]
    half, spent = len(times), 0.0
    while half > 1 and spent < sum(times) / 2:
        half -= 1
        spent += times[half]
    return {
        "steps_per_s": len(times) / sum(times),
        "second_half_steps_per_s": (len(times) - half) / sum(times[half:]),
        "num_threads": steps[-1]["threads"],
        "choices": [{"chosen": one["chosen"], "step_s": one["step_s"]} for one in choices],
    }


def compare(config: ThreadsConfig) -> dict[str, Any]:
    """Train everything in turns and return the result.

    Raises:
        ValueError: a word of another form, or a training that failed.
    """
    pairs = [word.partition("=") for word in config.runs]
    if not pairs or not all(preset and data for preset, _, data in pairs):
        raise ValueError(f"needed PRESET=DATA, got {list(config.runs)}")
    result = []
    for load in config.loads:
        for preset, _, data in pairs:
            before = os.getloadavg()[0]
            rounds = []
            with busy(LOADS[load]):
                for _ in range(config.rounds):
                    numbers = ["auto", *map(str, dict.fromkeys(config.threads))]
                    rounds.append(
                        {number: train(preset, data, number, config.seconds) for number in numbers}
                    )
            about = {"preset": preset, "data": data, "load": load, "load_average_before": before}
            result.append(about | _ratios(rounds) | {"rounds": rounds})
            print(readable(result[-1]), flush=True)
    return {
        "runs": result,
        "timed": f"steps of a training of {config.seconds} s, waiting for data included",
        "settings": to_json(config),
    } | provenance("cpu")


def _ratios(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many times slower the default is than the best number set by hand."""
    found = {}
    for name in ("steps_per_s", "second_half_steps_per_s"):
        ratios = [
            max(one[name] for number, one in trained.items() if number != "auto")
            / trained["auto"][name]
            for trained in rounds
        ]
        found[name.replace("steps_per_s", "time_over_best")] = {
            "median": median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        }
    return found


def readable(one: Mapping[str, Any]) -> str:
    """Return lines for people about one preset beside one load."""
    lines = [f"{one['preset']} on {one['data']}, {one['load']}:"]
    for number in one["rounds"][0]:
        speeds = " ".join(f"{trained[number]['steps_per_s']:6.2f}" for trained in one["rounds"])
        last = one["rounds"][-1][number]["num_threads"]
        lines.append(f"  threads {number:5} {speeds} steps/s (at the end {last})")
    for name in ("time_over_best", "second_half_time_over_best"):
        ratio = one[name]
        lines.append(f"  {name} {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; return the exit status."""
    config = tyro.cli(ThreadsConfig, args=arguments, description=__doc__)
    try:
        write_json(compare(config), Path(config.out))
    except (ValueError, OSError) as error:
        print(f"threads.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
