"""Reads clips of a LeRobot dataset when it is told to: the half of `benchmarks/lerobot_reading.py`
that runs in this project's environment, or in one of lerobot's own, so it imports little at first.

Every line of its input is a JSON list of [episode, first frame]; the answer is the seconds that the
clips took. With a file's name behind it, the clips are also kept there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

Read = Callable[[int, int], torch.Tensor]
"""From an episode and its first frame to frames [t, 3, h, w] of values 0 .. 255."""


def by_lerobot(root: str, num_frames: int, size: int, backend: str) -> Read:
    """Read with the dataset class of the package lerobot, and reduce by means."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset  # type: ignore[import-not-found]

    plain = LeRobotDataset("scd/fixture", root=root)
    (camera,) = plain.meta.camera_keys
    times = [frame / plain.fps for frame in range(num_frames)]
    dataset = LeRobotDataset(
        "scd/fixture",
        root=root,
        delta_timestamps={camera: times, "action": times},
        video_backend=backend or None,
    )
    begins = [int(value) for value in dataset.meta.episodes["dataset_from_index"]]

    def read(episode: int, start: int) -> torch.Tensor:
        row = dataset[begins[episode] + start]
        assert row["action"].shape[0] == num_frames
        return torch.nn.functional.interpolate(row[camera], (size, size), mode="area") * 255

    return read


def by_scd(root: str, num_frames: int, size: int, backend: str) -> Read:
    """Read with this project's source."""
    from scd.data.source import open_source, split_of

    data = f"lerobot:{root}?size={size}"
    sources = {split: open_source(data, split) for split in ("train", "val", "test")}
    total = sum(one.num_episodes for one in sources.values())
    places, counts = {}, dict.fromkeys(sources, 0)
    for episode in range(total):
        split = split_of(episode, total)
        places[episode] = (sources[split], counts[split])
        counts[split] += 1

    def read(episode: int, start: int) -> torch.Tensor:
        source, number = places[episode]
        clip = source.read(number, start, num_frames)
        assert clip.actions is not None and len(clip.actions) == num_frames
        return (clip.frames + 1) * 127.5

    return read


def main(kind: str, root: str, num_frames: int, size: int, backend: str = "") -> None:
    """Answer line by line."""
    read = {"scd": by_scd, "lerobot": by_lerobot}[kind](root, num_frames, size, backend)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        places, out = json.loads(line)
        began = time.perf_counter()
        clips = [read(*place) for place in places]
        seconds = time.perf_counter() - began
        if out:
            np.save(Path(out), torch.stack(clips).numpy())
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
