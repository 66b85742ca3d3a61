"""How fast an environment of Gymnasium is recorded, files included, against the environment alone.

    python benchmarks/record_gym.py CarRacing-v3 --make continuous=False --frames-from observation
    python benchmarks/record_gym.py ALE/Breakout-v5 --frames-from observation

adds to docs/results/record_gym.json. Each turn records some episodes in this process and takes as
many steps of the environment by hand, made in the same way, with the same seeds and as many
actions at random; with `render`, it is drawn after each step.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from scd.common.config import to_json
from scd.common.provenance import provenance, write_json
from scd.data.environments.making import FramesFrom, make
from scd.data.gym import GymRecording
from scd.data.record import record


@dataclass(frozen=True, kw_only=True)
class RecordGymConfig:
    """What is recorded, thrown away afterwards."""

    env: Annotated[str, tyro.conf.Positional]
    """Name under which Gymnasium makes the environment."""
    make: tuple[str, ...] = ()
    """Arguments of the environment, each as KEY=VALUE."""
    frames_from: FramesFrom = "render"
    """Which pictures are the frames."""
    size: int = 64
    """Height and width of a frame, in pixels."""
    episodes: int = 2
    """Episodes of a turn."""
    frames: int = 300
    """Frames per episode."""
    turns: int = 6
    """Pairs of measurements."""
    out: str = "docs/results/record_gym.json"
    """The results, by environment."""


def timed(work: Callable[[], int]) -> tuple[float, float]:
    """Return frames per second of wall-clock and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    num_frames = work()
    return (
        num_frames / (time.perf_counter() - wall),
        num_frames / (time.process_time() - cpu),
    )


def main() -> None:
    """Run from the command line."""
    config = tyro.cli(RecordGymConfig, description=__doc__)
    try:
        result = measure(config)
    except (ValueError, OSError) as error:
        print(f"record_gym.py: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    out = Path(config.out)
    known = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    write_json(known | {config.env: result}, out)
    print(
        f"{config.env}: {result['frames_per_second']:.0f} frames/s, {result['ratio']:.3f} of alone"
    )


def measure(config: RecordGymConfig) -> dict[str, object]:
    """Record and play in turns."""
    env = make(config.env, config.frames_from, config.make, ())

    def alone() -> int:
        count = 0
        for episode in range(config.episodes):
            generator = np.random.default_rng((0, episode, 0))
            env.reset(seed=int(generator.integers(2**31)))
            env.action_space.seed(int(generator.integers(2**31)))
            for _ in range(config.frames):
                *_, terminated, truncated, _ = env.step(env.action_space.sample())
                count += 1
                if config.frames_from == "render":
                    env.render()
                if terminated or truncated:
                    break
        return count

    with tempfile.TemporaryDirectory() as folder:

        def recorded(turn: int) -> tuple[float, float]:
            given = GymRecording(
                out=str(Path(folder) / str(turn)),
                env=config.env,
                make=config.make,
                frames_from=config.frames_from,
                size=(config.size,),
                episodes=config.episodes,
                frames=config.frames,
                policy="random",
                workers=1,
            )
            # The environment is made before, as the other one is.
            assert given.card.height == config.size
            return timed(lambda: sum(map(len_of, record(given).glob("actions/*.npz"))))

        pairs = [(recorded(turn), timed(alone)) for turn in range(config.turns)]
    env.close()
    walls = [one[0] / other[0] for one, other in pairs]
    cpus = [one[1] / other[1] for one, other in pairs]
    return {
        "frames_per_second": statistics.median(one[0] for one, _ in pairs),
        "alone_per_second": statistics.median(other[0] for _, other in pairs),
        "ratio": statistics.median(walls),
        "cpu_ratio": statistics.median(cpus),
        "settings": to_json(config),
        "timed": "frames per second, recorded over alone, median of turns; cpu_ratio: of CPU time",
    } | provenance()


def len_of(path: Path) -> int:
    """Return how many actions a file holds."""
    return len(np.load(path)["actions"])


if __name__ == "__main__":
    main()
