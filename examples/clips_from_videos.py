"""Turn a folder of videos, with or without actions, into clips that `scd train` reads.

    python examples/clips_from_videos.py --videos my-videos --out my-clips --size 64 \
        --actions discrete --action-names none left right

Beside `drive.mp4` lies `drive.csv` or `drive.npz` with its actions:

    discrete      one line per frame, an id (0, 1, ...) or one of the names; .npz: integers [t]
    continuous    one line per frame, numbers with commas between; .npz: floats [t, entries]

The .npz holds them under the key `actions`. docs/your-clips.md explains what comes out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from rich.progress import track
from torch.nn.functional import interpolate

from scd.common.files import refuse_used
from scd.data.clip import check_actions
from scd.data.manifest import choose_splits, read_actions, write_card, write_episode, write_manifest
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec
from scd.data.video import index_frames, probe_video, read_video

VIDEO_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi")

FRAMES_AT_ONCE = 64
"""Full-size frames in memory at a time: 400 MiB at 1080p."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which videos, what steers them, and what to make of them."""

    videos: Path
    """Folder with the videos, and their actions if there are any."""
    out: Path
    """Folder to write; must not exist, or be empty."""
    size: int = 64
    """Height and width of a frame in pixels: the middle square is cut out and reduced."""
    actions: Literal["none", "discrete", "continuous"] = "none"
    """What stands beside the videos."""
    action_names: tuple[str, ...] = ()
    """Names of the discrete actions by id, or of the entries of a continuous action."""
    action_rows: Literal["led-to-frame", "taken-at-frame"] = "led-to-frame"
    """Row i is what led to frame i, or what was done on seeing frame i, so that it led to i + 1."""
    val_fraction: float = 0.05
    """Share of the videos for validation."""
    test_fraction: float = 0.05
    """Share of the videos for tests."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be 1 or more, got {self.size}")
        if (self.actions == "none") != (not self.action_names):
            raise ValueError(
                f"--action-names are needed for actions, and only then: got {self.actions!r} "
                f"and {list(self.action_names)}"
            )

    @property
    def conditions(self) -> ConditionSpec:
        """What will steer a model of these clips."""
        num_names = len(self.action_names)
        if self.actions == "discrete":
            return ConditionSpec(num_actions=num_names)
        return ConditionSpec(action_dim=num_names)


def convert(config: Config) -> None:
    """Write the folder of clips.

    Raises:
        FileNotFoundError: no videos, or a video without its actions.
        FileExistsError: the folder to write is not empty.
        ValueError: videos that differ in their ending alone, a video that cannot be read, or
            actions that do not fit it.
    """
    videos = sorted(
        path for path in config.videos.glob("*") if path.suffix.lower() in VIDEO_ENDINGS
    )
    if not videos:
        raise FileNotFoundError(f"{config.videos}: no videos ({', '.join(VIDEO_ENDINGS)}) in it")
    names = [path.stem for path in videos]
    twice = [path.name for path in videos if names.count(path.stem) > 1]
    if twice:
        raise ValueError(
            f"{config.videos}: episodes are named after their videos, without the ending, and "
            f"these would have the same name: {', '.join(twice[:6])}"
        )
    refuse_used(config.out)
    splits = choose_splits(len(videos), config.val_fraction, config.test_fraction)
    fps = probe_video(videos[0]).fps or 10.0
    entries = []
    for path, split in zip(track(videos, "converting"), splits, strict=True):
        pixels = read_small(path, config.size)
        actions = None if config.actions == "none" else find_actions(path, config)
        if actions is not None and len(actions) != len(pixels):
            raise ValueError(
                f"{path}: {len(pixels)} frames need as many actions, got {len(actions)}"
            )
        entries.append(write_episode(config.out, path.stem, pixels, actions, fps, split))
    card = DataCard(
        height=config.size,
        width=config.size,
        fps=fps,
        conditions=config.conditions,
        action_names=config.action_names,
    )
    write_card(config.out, card)
    write_manifest(config.out, entries)
    counts = {split: splits.count(split) for split in ("train", "val", "test")}
    print(f"{config.out}: {len(videos)} episodes, {counts}")


def read_small(path: Path, size: int) -> np.ndarray:
    """Decode a video, cut out the middle square and reduce it; uint8 [t, size, size, 3]."""
    index = index_frames(path)
    parts = []
    for start in range(0, index.num_frames, FRAMES_AT_ONCE):
        count = min(FRAMES_AT_ONCE, index.num_frames - start)
        pixels = torch.from_numpy(read_video(path, start, count, index))
        height, width = pixels.shape[1:3]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = pixels[:, top : top + side, left : left + side].permute(0, 3, 1, 2).float()
        small = interpolate(square, (size, size), mode="bilinear", antialias=True)
        parts.append(small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def find_actions(video: Path, config: Config) -> np.ndarray:
    """Read the actions beside a video, as ids [t] or vectors [t, entries]."""
    table, arrays = video.with_suffix(".csv"), video.with_suffix(".npz")
    if table.exists():
        actions = read_table(table, config)
    elif arrays.exists():
        actions = read_actions(arrays)
    else:
        raise FileNotFoundError(f"{video}: neither {table.name} nor {arrays.name} beside it")
    try:
        check_actions(config.conditions, torch.from_numpy(actions))
    except ValueError as error:
        raise ValueError(f"actions of {video}: {error}") from error
    if config.action_rows == "taken-at-frame":
        # What led to the first frame is not known: id 0, or zeros.
        actions = np.concatenate([np.zeros_like(actions[:1]), actions[:-1]])
    return actions


def read_table(path: Path, config: Config) -> np.ndarray:
    """Read one action per line of a .csv file."""
    rows = [line.split(",") for line in path.read_text().splitlines() if line.strip()]
    try:
        if config.actions == "continuous":
            return np.array([[float(entry) for entry in row] for row in rows], np.float32)
        names = {name: index for index, name in enumerate(config.action_names)}
        cells = [row[0].strip() for row in rows]
        return np.array([names[cell] if cell in names else int(cell) for cell in cells], np.int64)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def main() -> None:
    """Run from the command line; wrong input ends with one line and exit status 2."""
    try:
        convert(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
