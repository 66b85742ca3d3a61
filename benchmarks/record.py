"""How fast Doom is recorded, the video files included.

    python benchmarks/record.py --episodes 60 --size 64

writes docs/results/record.json. Starting the games is part of the time.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from scd.common.config import to_json
from scd.common.provenance import provenance, write_json
from scd.data.doom import DoomRecording
from scd.data.record import record


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """One timed recording, thrown away afterwards."""

    episodes: int = 60
    """Number of episodes."""
    frames: int = 300
    """Frames per episode."""
    size: Literal[32, 64, 128] = 64
    """Height and width of a frame, in pixels."""
    scenario: Literal["my_way_home", "map01"] = "my_way_home"
    """Where the games are played."""
    out: str = "docs/results/record.json"
    """The result."""


def main() -> None:
    """Run from the command line."""
    config = tyro.cli(RecordConfig, description=__doc__)
    try:
        with tempfile.TemporaryDirectory() as folder:
            recording = DoomRecording(
                out=str(Path(folder) / "data"),
                episodes=config.episodes,
                frames=config.frames,
                size=config.size,
                scenario=config.scenario,
            )
            began = time.perf_counter()
            record(recording)
            seconds = time.perf_counter() - began
    except (ValueError, OSError) as error:
        print(f"record.py: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    num_frames = config.episodes * config.frames
    result = {
        "scenario": config.scenario,
        "size": config.size,
        "frames": num_frames,
        "seconds": seconds,
        "frames_per_second": num_frames / seconds,
        "workers": recording.workers,
        "timed": "wall-clock seconds from the start of the games to the last video file",
        "settings": to_json(config),
    } | provenance()
    write_json(result, Path(config.out))
    print(f"{result['frames_per_second']:.0f} frames/s")


if __name__ == "__main__":
    main()
