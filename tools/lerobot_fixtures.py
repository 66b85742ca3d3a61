"""Small datasets written by the real `lerobot` package, and what its own class reads from them.

    python tools/lerobot_fixtures.py OUT [--vcodec h264|libsvtav1] [--episodes 3] [--size 48 64]
    python tools/lerobot_fixtures.py --read FOLDER          # what lerobot reads, as one JSON line

It runs in an environment of lerobot's own, whose pins (torch < 2.11, av < 16, torchvision) do not
fit those of this project: `pip install lerobot==0.4.4` writes format v3.0; with the sources of
`lerobot==0.3.3` before it on PYTHONPATH it writes v2.1. Pictures are smooth, so that a codec keeps
them nearly as they were; every frame's colour says its episode and number.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

FPS = 10
TASKS = ("push the block", "open the drawer")
CAMERAS = ("observation.images.top", "observation.images.wrist")


def picture(episode: int, frame: int, height: int, width: int, camera: int) -> np.ndarray:
    """Return 8-bit RGB [h, w, 3]: a bright disc that moves over a slope of colour."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    x = width * (0.2 + 0.6 * ((frame * 0.05 + episode * 0.3) % 1))
    disc = ((columns - x) ** 2 + (rows - height / 2) ** 2) < (height / 5) ** 2
    slope = np.stack([columns / width, rows / height, np.full_like(rows, episode / 8)], -1) * 120
    slope[..., camera] += 60
    slope[disc] = 230
    return slope.astype(np.uint8)


def textured(pixels: np.ndarray, episode: int, frame: int, strength: float) -> np.ndarray:
    """Lay a rough pattern over a picture, which moves by three columns a frame: what costs a codec
    as much as real pictures do."""
    pattern = np.random.default_rng(episode).normal(0, strength, pixels.shape[:2])
    pattern = (pattern + np.roll(pattern, 1, 0) + np.roll(pattern, 1, 1)) / 1.7
    moved = np.roll(pattern, 3 * frame, 1)[..., None]
    return (pixels + moved).clip(0, 255).astype(np.uint8)


def length(episode: int, base: int) -> int:
    """Return how many frames an episode has: they differ."""
    return base + 3 * (episode % 3)


def write(out: Path, given: argparse.Namespace) -> None:
    """Write a dataset as the command line says."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset  # type: ignore[import-not-found]

    height, width = given.size
    if out.exists():
        shutil.rmtree(out)
    shown = {
        "dtype": "video",
        "shape": (height, width, 3),
        "names": ["height", "width", "channels"],
    }
    features: dict[str, dict] = dict.fromkeys(CAMERAS[: given.cameras], shown)
    features["action"] = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
    features["observation.state"] = {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]}
    chosen = {} if given.vcodec == "default" else {"vcodec": given.vcodec}
    dataset = LeRobotDataset.create("scd/fixture", FPS, features, root=out, **chosen)
    for episode in range(given.episodes):
        task = TASKS[episode % len(TASKS)]
        for frame in range(length(episode, given.frames)):
            one: dict[str, np.ndarray] = {
                name: picture(episode, frame, height, width, at)
                for at, name in enumerate(CAMERAS[: given.cameras])
            }
            if given.texture:
                one = {
                    name: textured(pixels, episode, frame, given.texture)
                    for name, pixels in one.items()
                }
            one["action"] = np.array([frame + 0.5, -10.0 * episode - frame], np.float32)
            one["observation.state"] = np.array([frame, episode, 7], np.float32)
            try:
                dataset.add_frame(one | {"task": task})
            except (TypeError, ValueError):
                # Format v2.1 takes the task apart from the frame.
                dataset.add_frame(one, task=task)
        dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()


def read(root: Path, out: Path | None) -> None:
    """Say what lerobot's own class reads; with `out`, keep frames and actions as .npz."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset  # type: ignore[import-not-found]

    dataset = LeRobotDataset("scd/fixture", root=root, video_backend="pyav")
    rows = [dataset[index] for index in range(len(dataset))]
    camera = dataset.meta.camera_keys[0]
    pixels = np.stack([(row[camera].numpy() * 255).round().astype(np.uint8) for row in rows])
    actions = np.stack([row["action"].numpy() for row in rows])
    said = {
        "version": dataset.meta.info["codebase_version"],
        "fps": dataset.fps,
        "episodes": dataset.num_episodes,
        "frames": len(dataset),
        "cameras": sorted(dataset.meta.camera_keys),
        "tasks": sorted({row["task"] for row in rows}),
        "action": actions.shape,
        "episode_index": [int(row["episode_index"]) for row in rows],
        "timestamp": [round(float(row["timestamp"]), 6) for row in rows],
    }
    print(json.dumps(said))
    if out is not None:
        np.savez_compressed(
            out,
            action=actions,
            episode_index=np.array(said["episode_index"]),
            task=np.array([row["task"] for row in rows]),
            pixels=pixels.transpose(0, 2, 3, 1),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--read", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--vcodec", default="default")
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--size", type=int, nargs=2, default=(32, 48))
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--texture", type=float, default=0.0)
    given = parser.parse_args()
    if given.read:
        read(given.folder, given.out)
    else:
        write(given.folder, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
