"""Clips per second of a LeRobot dataset: this project's source against lerobot's own class.

    python tools/lerobot_fixtures.py DATA --vcodec h264 --episodes 64 --frames 197 --size 256 256 \\
        --cameras 1 --texture 12                # by the Python of an environment with lerobot
    python benchmarks/lerobot_reading.py DATA --lerobot PYTHON --out FILE

Random clips, the same for both, are read in turns (A B B A), each side in a process of its own:
its videos are decoded, actions are read, and frames are reduced to `size` by means. First both give
some clips, and it is said by how much they differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import tyro

from scd.common.config import at_least, to_json
from scd.common.provenance import provenance, write_json
from scd.data.lerobot_tables import Dataset

READER = Path(__file__).with_name("lerobot_reader.py")


@dataclass(frozen=True, kw_only=True)
class LeRobotReadingConfig:
    """One comparison."""

    data: Annotated[str, tyro.conf.Positional]
    """Folder of the dataset, with one camera."""
    lerobot: str
    """Python of an environment in which lerobot is installed."""
    backend: str = ""
    """What lerobot decodes with: torchcodec or pyav; empty: what it chooses."""
    out: str
    """The result, a .json file."""
    num_frames: int = 16
    """Frames of a clip."""
    size: int = 64
    """Rows and columns of a frame."""
    clips: int = 40
    """Clips of one turn."""
    rounds: int = 5
    """Turns of each side; one more before them is not counted."""

    def __post_init__(self) -> None:
        at_least(1, num_frames=self.num_frames, size=self.size, clips=self.clips)
        at_least(2, rounds=self.rounds)


class Reader:
    """One side, in a process of its own."""

    def __init__(self, kind: str, python: str, config: LeRobotReadingConfig) -> None:
        words = [python, str(READER), kind, config.data, str(config.num_frames), str(config.size)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        if kind == "scd":
            environment["PYTHONPATH"] = str(READER.parents[1])
        else:
            words.append(config.backend)
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        if self._answer() != "ready":
            raise ValueError(f"{kind}: could not begin")

    def read(self, places: Sequence[tuple[int, int]], out: str = "") -> float:
        """Read clips, keep them if a file is named, and return the seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([places, out]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        # Libraries say this and that before the answer.
        for line in self._process.stdout:
            if line.startswith(('"ready"', *"0123456789")):
                return json.loads(line)
        raise ValueError(f"{READER.name} ended with status {self._process.wait()}")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def compare(config: LeRobotReadingConfig) -> dict[str, Any]:
    """Read by both sides in turns and return the result."""
    dataset = Dataset(Path(config.data))
    episodes = dataset.episodes(dataset.camera(""))
    generator = np.random.default_rng(0)

    def places() -> list[tuple[int, int]]:
        chosen = generator.integers(len(episodes), size=config.clips)
        return [
            (int(at), int(generator.integers(episodes[at].length - config.num_frames + 1)))
            for at in chosen
        ]

    sides = {
        "scd": Reader("scd", sys.executable, config),
        "lerobot": Reader("lerobot", config.lerobot, config),
    }
    try:
        difference = _difference(sides, places())
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(config.rounds + 1):
            wanted = places()
            for name in sorted(sides, reverse=bool(turn % 2)):
                taken = sides[name].read(wanted)
                if turn:
                    seconds[name].append(taken)
    finally:
        for side in sides.values():
            side.close()
    ratios = [b / a for a, b in zip(seconds["scd"], seconds["lerobot"], strict=True)]
    return {
        "clips_per_s": {name: config.clips / median(found) for name, found in seconds.items()},
        "ratio": {"median": median(ratios), "low": min(ratios), "high": max(ratios)},
        "mean_difference_of_255": difference,
        "timed": "reading clips of random places: opening, decoding, reducing, actions",
        "settings": to_json(config),
    } | provenance("cpu")


def _difference(sides: dict[str, Reader], wanted: Sequence[tuple[int, int]]) -> float:
    """Return the mean absolute difference of both sides' frames, of 255."""
    with tempfile.TemporaryDirectory() as folder:
        kept = []
        for name, side in sides.items():
            path = f"{folder}/{name}.npy"
            side.read(wanted[:8], path)
            kept.append(np.load(path))
    return float(np.abs(kept[0] - kept[1]).mean())


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; return the exit status."""
    config = tyro.cli(LeRobotReadingConfig, args=arguments, description=__doc__)
    try:
        result = compare(config)
        write_json(result, Path(config.out))
    except (ValueError, OSError) as error:
        print(f"lerobot_reading.py: {error}", file=sys.stderr)
        return 2
    ratio = result["ratio"]
    speeds = ", ".join(f"{name} {speed:.1f}" for name, speed in result["clips_per_s"].items())
    print(
        f"clips/s: {speeds}; ratio {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    )
    print(f"mean difference {result['mean_difference_of_255']:.3f} of 255")
    return 0


if __name__ == "__main__":
    sys.exit(main())
