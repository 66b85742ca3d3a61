"""Clips per second of a LeRobot dataset: this project's source against lerobot's own class.

    python tools/lerobot_fixtures.py DATA --vcodec h264 --episodes 64 --frames 197 --size 256 256 \\
        --cameras 1 --texture 12                # by the Python of an environment with lerobot
    python benchmarks/lerobot_reading.py DATA --lerobot PYTHON --out FILE

Random clips are read in turns (A B B A), each side in a process of its own with as many threads and
processes as it takes by itself: videos are decoded, actions are read, and frames are reduced to
`size` by means. First both give some clips, the same, and it is said by how much they differ.

`--form clips`: one after the other, the same for both, as evaluating, watching or a notebook reads
them. `--form training`: batches of 8 from what reads ahead in training, `scd`'s loader (2 threads)
and PyTorch's with 4 processes, as `lerobot-train` has it; batches that lie ready are not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from scd.common.config import at_least, to_json
from scd.common.provenance import provenance, write_json
from scd.data.lerobot_tables import Dataset

NUM_AHEAD = 8
"""Batches that may lie ready when a turn begins: two for each of PyTorch's processes."""

READER = Path(__file__).with_name("lerobot_reader.py")


@dataclass(frozen=True, kw_only=True)
class LeRobotReadingConfig:
    """One comparison."""

    data: Annotated[str, tyro.conf.Positional]
    """Folder of the dataset, with one camera."""
    lerobot: str
    """Python of an environment in which lerobot is installed."""
    form: Literal["clips", "training"] = "clips"
    """Whether clips are read one by one, or batches ahead of a training."""
    backend: str = ""
    """What lerobot decodes with: torchcodec or pyav; empty: what it chooses."""
    out: str
    """The result, a .json file."""
    num_frames: int = 16
    """Frames of a clip."""
    size: int = 64
    """Rows and columns of a frame."""
    clips: int = 128
    """Clips of one turn; a multiple of 8."""
    rounds: int = 5
    """Turns of each side; one more before them is not counted."""

    def __post_init__(self) -> None:
        at_least(1, num_frames=self.num_frames, size=self.size, clips=self.clips)
        at_least(2, rounds=self.rounds)
        if self.clips % 8:
            raise ValueError(f"clips must be a multiple of 8, got {self.clips}")


class Reader:
    """One side, in a process of its own."""

    def __init__(self, kind: str, form: str, config: LeRobotReadingConfig) -> None:
        python = sys.executable if kind == "scd" else config.lerobot
        words = [python, str(READER), kind, form, config.data, str(config.num_frames)]
        words += [str(config.size), config.backend]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = str(READER.parents[1]) if kind == "scd" else ""
        # Nobody's choice of threads but their own.
        environment.pop("OMP_NUM_THREADS", None)
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        if self._answer() != "ready":
            raise ValueError(f"{kind}: could not begin")

    def ask(self, what: Any) -> float:
        """Have clips or batches read, and return the seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
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
        assert self._process.stdin is not None
        # Processes of its own end with it if it ends by itself.
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def compare(config: LeRobotReadingConfig) -> dict[str, Any]:
    """Read by both sides in turns and return the result."""
    dataset = Dataset(Path(config.data))
    episodes = dataset.episodes(dataset.camera(""))
    generator = np.random.default_rng(0)

    def places(number: int) -> list[tuple[int, int]]:
        chosen = generator.integers(len(episodes), size=number)
        return [
            (int(at), int(generator.integers(episodes[at].length - config.num_frames + 1)))
            for at in chosen
        ]

    with _readers("clips", config) as sides:
        difference = _difference(sides, places(8))
    seconds: dict[str, list[float]] = {"scd": [], "lerobot": []}
    with _readers(config.form, config) as sides:
        for turn in range(config.rounds + 1):
            wanted = places(config.clips)
            for name in sorted(sides, reverse=bool(turn % 2)):
                if config.form == "training":
                    sides[name].ask(NUM_AHEAD)
                    taken = sides[name].ask(config.clips // 8)
                else:
                    taken = sides[name].ask([wanted, ""])
                if turn:
                    seconds[name].append(taken)
    ratios = [b / a for a, b in zip(seconds["scd"], seconds["lerobot"], strict=True)]
    return {
        "clips_per_s": {name: config.clips / median(found) for name, found in seconds.items()},
        "ratio": {"median": median(ratios), "low": min(ratios), "high": max(ratios)},
        "mean_difference_of_255": difference,
        "timed": "reading clips of random places: opening, decoding, reducing, actions",
        "settings": to_json(config),
    } | provenance("cpu")


@contextmanager
def _readers(form: str, config: LeRobotReadingConfig) -> Iterator[dict[str, Reader]]:
    """Start both sides, and end them at the end of a with block."""
    sides: dict[str, Reader] = {}
    try:
        for kind in ("scd", "lerobot"):
            sides[kind] = Reader(kind, form, config)
        yield sides
    finally:
        for side in sides.values():
            side.close()


def _difference(sides: dict[str, Reader], wanted: Sequence[tuple[int, int]]) -> float:
    """Return the mean absolute difference of both sides' frames, of 255."""
    with tempfile.TemporaryDirectory() as folder:
        kept = []
        for name, side in sides.items():
            path = f"{folder}/{name}.npy"
            side.ask([wanted, path])
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
