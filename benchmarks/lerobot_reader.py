"""Reads clips of a LeRobot dataset when it is told to: the half of `benchmarks/lerobot_reading.py`
that runs in this project's environment, or in one of lerobot's own, so it imports little at first.

    lerobot_reader.py KIND FORM ROOT NUM_FRAMES SIZE BACKEND

Every line of its input is JSON, and so is the answer: the seconds that the clips took. In the form
"clips" a line is a list of [episode, first frame], and a file's name if the clips are to be kept
there, 8-bit; in the form "training" it is a number of batches, which the usual reader ahead yields.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

Read = Callable[[int, int], torch.Tensor]
"""From an episode and its first frame to frames [t, 3, h, w]."""

BATCH_SIZE, LEROBOT_WORKERS = 8, 4
"""What `lerobot-train` has if nothing is said."""


def lerobot_dataset(root: str, num_frames: int, size: int, backend: str):
    """Open with the dataset class of the package lerobot, which reduces pictures by means."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset  # type: ignore[import-not-found]

    plain = LeRobotDataset("scd/fixture", root=root)
    (camera,) = plain.meta.camera_keys
    times = [frame / plain.fps for frame in range(num_frames)]
    dataset = LeRobotDataset(
        "scd/fixture",
        root=root,
        delta_timestamps={camera: times, "action": times},
        image_transforms=lambda frames: torch.nn.functional.interpolate(
            frames, (size, size), mode="area"
        ),
        video_backend=backend or None,
    )
    return dataset, camera


def clips_by_lerobot(root: str, num_frames: int, size: int, backend: str) -> Read:
    """Read clip by clip with lerobot's class: values 0 .. 1."""
    dataset, camera = lerobot_dataset(root, num_frames, size, backend)
    begins = [int(value) for value in dataset.meta.episodes["dataset_from_index"]]

    def read(episode: int, start: int) -> torch.Tensor:
        row = dataset[begins[episode] + start]
        assert row["action"].shape[0] == num_frames
        return row[camera]

    return read


def batches_by_lerobot(root: str, num_frames: int, size: int, backend: str) -> Iterator:
    """Read batches as `lerobot-train` does."""
    dataset, camera = lerobot_dataset(root, num_frames, size, backend)
    loader = torch.utils.data.DataLoader(
        dataset, BATCH_SIZE, shuffle=True, num_workers=LEROBOT_WORKERS, drop_last=True
    )
    while True:
        for batch in loader:
            yield batch[camera], batch["action"]


def clips_by_scd(root: str, num_frames: int, size: int, backend: str) -> Read:
    """Read clip by clip with this project's source: values -1 .. 1."""
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
        return clip.frames

    return read


def batches_by_scd(root: str, num_frames: int, size: int, backend: str) -> Iterator:
    """Read batches as `scd train` does."""
    from scd.data.loader import Loader
    from scd.data.source import open_source

    source = open_source(f"lerobot:{root}?size={size}", "train")
    for batch in Loader(source, BATCH_SIZE, num_frames, seed=0).stream():
        yield batch.frames, batch.conditions.actions


def main(kind: str, form: str, root: str, num_frames: str, size: str, backend: str = "") -> None:
    """Answer line by line."""
    kinds = {
        ("scd", "clips"): clips_by_scd,
        ("scd", "training"): batches_by_scd,
        ("lerobot", "clips"): clips_by_lerobot,
        ("lerobot", "training"): batches_by_lerobot,
    }
    reader = kinds[kind, form](root, int(num_frames), int(size), backend)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if form == "training":
            assert not callable(reader)
            began = time.perf_counter()
            for _ in range(asked):
                frames, actions = next(reader)
                assert frames.shape[:2] == actions.shape[:2] == (BATCH_SIZE, int(num_frames))
            seconds = time.perf_counter() - began
        else:
            assert callable(reader)
            places, out = asked
            began = time.perf_counter()
            kept = []
            for place in places:
                clip = reader(*place)
                if out:
                    kept.append(clip)
            seconds = time.perf_counter() - began
            if out:
                read = torch.stack(kept).float()
                np.save(Path(out), ((read + 1) * 127.5 if kind == "scd" else read * 255).numpy())
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
