"""Turn a folder of videos, with or without actions, into clips that `scd train` reads.

    python examples/clips_from_videos.py --videos my-videos --out my-clips --size 64 \
        --actions discrete --action-names none left right

Beside `drive.mp4` lies `drive.csv` or `drive.npz` with its actions:

    discrete      one line per frame, an id (0, 1, ...) or one of the names; .npz: integers [t]
    continuous    one line per frame, numbers with commas between; .npz: floats [t, entries]

The .npz holds them under the key `actions`. Videos of several frame rates need --fps, the one to
bring them to. Nothing is written if a video or its actions cannot be read: --on-error skip leaves
it out. docs/your-clips.md explains what comes out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import tyro
from rich.progress import track
from torch.nn.functional import interpolate

from scd.common.files import refuse_used, text_lines, written_aside
from scd.data.clip import check_actions
from scd.data.frame_rate import count_rates, frames_at, is_same_rate, pool_actions
from scd.data.manifest import choose_splits, read_actions, write_card, write_episode, write_manifest
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec, OnError
from scd.data.video import index_frames, probe_video, read_frames

VIDEO_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi")

FRAMES_AT_ONCE = 64
"""Full-size frames in memory at a time: 400 MiB at 1080p."""

Made = TypeVar("Made")


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
    fps: float = 0.0
    """Frames per second of the clips; frames and actions in between are passed over and pooled as
    scd.data.frame_rate tells. 0: as many as the videos have, all alike."""
    on_error: OnError = "stop"
    """What becomes of a video that cannot be read, or whose actions do not fit: everything stops,
    and nothing is written; or it is named and left out."""
    val_fraction: float = 0.05
    """Share of the videos for validation."""
    test_fraction: float = 0.05
    """Share of the videos for tests."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be 1 or more, got {self.size}")
        if not 0 <= self.fps < float("inf"):
            raise ValueError(f"fps must be a finite number of 0 or more, got {self.fps}")
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


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video that can be opened."""

    path: Path
    rate: float
    """Frames per second; 0: the file does not say."""
    actions: np.ndarray | None
    """One per frame of the video."""


def convert(config: Config) -> None:
    """Write the folder of clips, whole or not at all.

    Raises:
        FileNotFoundError: no videos, or a video without its actions.
        FileExistsError: the folder to write is not empty.
        ValueError: videos that differ in their ending alone, or in their rate; a video that cannot
            be read, or actions that do not fit it.
    """
    refuse_used(config.out)
    videos = [found for path in find_videos(config) if (found := attempt(config, look, path))]
    if not videos:
        raise ValueError(f"{config.videos}: none of its videos can be read")
    fps = config.fps or common_rate(config, videos)
    entries = []
    with written_aside(config.out) as aside:
        splits = choose_splits(len(videos), config.val_fraction, config.test_fraction)
        for video, split in zip(track(videos, "converting"), splits, strict=True):
            made = attempt(config, resample, video, fps)
            if made is not None:
                entries.append(write_episode(aside, video.path.stem, *made, fps, split))
        if not entries:
            raise ValueError(f"{config.videos}: none of its videos can be read")
        card = DataCard(
            height=config.size,
            width=config.size,
            fps=fps,
            conditions=config.conditions,
            action_names=config.action_names,
        )
        write_card(aside, card)
        write_manifest(aside, entries)
    splits = [entry.split for entry in entries]
    counts = {split: splits.count(split) for split in ("train", "val", "test")}
    print(f"{config.out}: {len(entries)} episodes, {counts}")


def find_videos(config: Config) -> list[Path]:
    """List the videos; what macOS keeps beside them (`._drive.mp4`) is hidden, and none."""
    videos = sorted(
        path
        for path in config.videos.glob("*")
        if path.suffix.lower() in VIDEO_ENDINGS and not path.name.startswith(".")
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
    return videos


def attempt(config: Config, work: Callable[..., Made], *inputs: Any) -> Made | None:
    """Do a piece of work for a video; None: it cannot be done, and the video is left out."""
    try:
        return work(config, *inputs)
    except (ValueError, OSError) as error:
        if config.on_error == "stop":
            raise
        print(f"left out: {error}", file=sys.stderr)
        return None


def look(config: Config, path: Path) -> Video:
    """Open a video and read its actions, before anything is written."""
    info = probe_video(path)
    actions = None if config.actions == "none" else find_actions(path, config)
    if actions is not None and len(actions) != info.num_frames:
        raise ValueError(
            f"{path}: {info.num_frames} frames need as many actions, got {len(actions)}"
        )
    return Video(path=path, rate=info.fps, actions=actions)


def common_rate(config: Config, videos: list[Video]) -> float:
    """Return the frames per second of all videos (ValueError: they differ)."""
    rates = [video.rate for video in videos if video.rate]
    if not rates:
        return 10.0
    if not all(is_same_rate(rate, rates[0]) for rate in rates):
        raise ValueError(
            f"{config.videos}: videos of several frame rates ({count_rates(rates)} frames/s); "
            "choose the one to bring them to by --fps"
        )
    return rates[0]


def resample(config: Config, video: Video, fps: float) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode a video at a rate, cut out the middle square of each frame and reduce it.

    Returns:
        Pictures as uint8 [t, size, size, 3], and their actions.
    """
    index = index_frames(video.path)
    numbers = frames_at(index.num_frames, video.rate or fps, fps)
    parts = []
    for start in range(0, len(numbers), FRAMES_AT_ONCE):
        some = numbers[start : start + FRAMES_AT_ONCE].tolist()
        pixels = torch.from_numpy(read_frames(video.path, some))
        height, width = pixels.shape[1:3]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = pixels[:, top : top + side, left : left + side].permute(0, 3, 1, 2).float()
        small = interpolate(square, (config.size,) * 2, mode="bilinear", antialias=True)
        parts.append(small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())
    actions = None if video.actions is None else pool_actions(video.actions, numbers)
    return np.concatenate(parts), actions


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
    """Read one action per line of a .csv file; ValueError: names the line that is none."""
    ids = {name: index for index, name in enumerate(config.action_names)}
    continuous, rows = config.actions == "continuous", []
    for number, line in enumerate(text_lines(path), start=1):
        cells = [cell.strip() for cell in line.split(",")]
        if not line.strip():
            continue
        try:
            if continuous:
                rows.append([float(cell) for cell in cells])
            else:
                rows.append(ids[cells[0]] if cells[0] in ids else int(cells[0]))
        except ValueError as error:
            wanted = "numbers" if continuous else f"an id, or one of {', '.join(ids)}"
            raise ValueError(
                f"{path} line {number}: needed {wanted}, got {line.strip()!r}: one action for each "
                "frame, and no header"
            ) from error
        if continuous and len(cells) != len(ids):
            raise ValueError(
                f"{path} line {number}: needed {len(ids)} numbers, for {', '.join(ids)}, got "
                f"{len(cells)}"
            )
    return np.array(rows, np.float32 if continuous else np.int64)


def main() -> None:
    """Run from the command line; wrong input ends with one line and exit status 2."""
    try:
        convert(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
