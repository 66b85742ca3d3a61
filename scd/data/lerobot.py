"""LeRobot datasets, formats v2.1 and v3.0, read where they lie: `lerobot:PATH?camera=...`.

    meta/info.json            frames per second, features with shapes and names, places of files
    meta/episodes*            length and tasks of each episode; in v3.0 also where its frames are
    meta/tasks*               texts of the tasks
    data/chunk-000/*.parquet  one row a frame: action, state, time since the episode's beginning
    videos/...mp4             frames of one camera: of one episode (v2.1) or of several (v3.0)

Row i holds what was seen at time i / fps and the action that follows it; here an action belongs to
the frame that it leads to, so actions are moved by one row (`scd.data.clip`). A frame of a video is
found by its time, as lerobot finds it: the episode's beginning in the file plus the row's time.

Source: the format as the package lerobot writes it, 0.3.3 (v2.1) and 0.4.4 (v3.0).
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from scd.common.hub import download, is_hub_name
from scd.data.clip import Clip, pixels_to_frames
from scd.data.frame_rate import frames_at, is_same_rate, pool_actions
from scd.data.lerobot_tables import ACTION, INFO_FILE, STATE, Dataset, Episode, Rows
from scd.data.published import Header, read_headers
from scd.data.reduce import reduce_pictures
from scd.data.source import DataCard, Findings, Opening, PictureConfig, Source, leave_out
from scd.data.spaces import ConditionSpec, Split
from scd.data.video import index_frames, probe_video, read_frames

TOLERANCE = 0.1
"""Part of a frame's time by which a row and a picture may miss each other."""


@dataclass(frozen=True, kw_only=True)
class LeRobotConfig(PictureConfig):
    """How a dataset is read."""

    camera: str = ""
    """Feature whose pictures are the frames, such as observation.images.top, or the end of its
    name. Empty: the only one."""
    state: bool = False
    """Steer by the state of the robot too: behind each action comes the state that it was taken
    in."""
    labels: bool = False
    """Steer by the number of the episode's task. Its text is the prompt either way."""


class LeRobotSource(Source):
    """Episodes of one split; the tables are read at opening, pictures when they are asked for.

    Args:
        root: the dataset.
        split: which episodes.
        config: how it is read.
        strict: stop at the first episode that cannot be used, instead of leaving it out.

    Raises:
        FileNotFoundError: no such folder, or a table is missing.
        ValueError: a format of another version, no such camera, rows that do not fit the format, or
            no episode is left.
    """

    kind = "lerobot"
    origin = "a dataset as lerobot records it, or its name on the hub: lerobot:OWNER/NAME"
    settings = LeRobotConfig
    flags = ("camera",)

    def __init__(
        self,
        root: Path,
        split: Split,
        config: LeRobotConfig | None = None,
        strict: bool = False,
    ) -> None:
        self.config = config or LeRobotConfig()
        self.dataset = dataset = Dataset(root)
        self.camera = dataset.camera(self.config.camera)
        name = f"{self.kind}:{root.absolute()}"
        episodes = dataset.episodes(self.camera)
        parts = dataset.splits(len(episodes))
        chosen = [one for one, part in zip(episodes, parts, strict=True) if part == split]
        rows = dataset.rows([one.table for one in chosen], self._columns())
        errors = self._check(chosen, rows)
        self.left_out = leave_out(name, split, errors, strict)
        self._episodes = [one for one, error in zip(chosen, errors, strict=True) if not error]
        self._rows = rows
        rated = [self._rated(one) for one in self._episodes]
        self._frames = [frames for frames, _ in rated]
        self._actions = [actions for _, actions in rated]
        super().__init__(name, split, self._card(), [len(frames) for frames in self._frames])

    @classmethod
    def open(cls, data: str, split: Split, how: Opening) -> LeRobotSource:
        path, config = cls.parse(data)
        return cls(_local(path), split, config, how.strict)

    @classmethod
    def inspect(cls, data: str) -> Findings:
        path, config = cls.parse(data)
        try:
            dataset = Dataset(_local(path))
            episodes = dataset.episodes(dataset.camera(config.camera))
        except (ValueError, OSError) as error:
            return Findings(missing=[str(error)])
        tasks = Counter(task for one in episodes for task in one.tasks)
        return Findings(
            there=[
                f"LeRobot {dataset.version}: {len(episodes)} episodes at {dataset.fps:g} frames/s",
                f"cameras: {', '.join(dataset.cameras)}",
                f"tasks: {', '.join(f'{task} ({n})' for task, n in tasks.most_common(5))}",
            ]
        )

    def title(self, episode: int) -> str:
        one = self._episodes[episode]
        return f"{one.video or one.table}, episode {one.number}"

    def identity(self, episode: int) -> tuple[str, dict[str, Any]]:
        one = self._episodes[episode]
        parts = {"video": one.video or one.table, "actions": self._actions[episode]}
        return f"episode {one.number}", parts | {"label": self._rows[one.number].label}

    def prompt(self, episode: int) -> str:
        """Return the text of the episode's task."""
        tasks = self._episodes[episode].tasks
        if not tasks:
            raise ValueError(f"{self.title(episode)} has no task")
        return tasks[0]

    def _read(self, episode: int, start: int, num_frames: int) -> Clip:
        one = self._episodes[episode]
        rows = self._rows[one.number]
        chosen = self._frames[episode][start : start + num_frames]
        if one.video is None:
            pixels = self._stored(one, chosen)
        else:
            pixels = self._decoded(one, one.begins_s + rows.times[chosen])
        actions = self._actions[episode]
        return Clip(
            frames=pixels_to_frames(torch.from_numpy(pixels)),
            actions=None if actions is None else actions[start : start + num_frames],
            label=rows.label if self.config.labels else None,
            fps=self.card.fps,
        )

    def _decoded(self, one: Episode, times: np.ndarray) -> UInt8[np.ndarray, "t h w 3"]:
        assert one.video is not None
        numbers = index_frames(one.video).numbers_at(times, TOLERANCE / self.dataset.fps)
        if numbers is None:
            raise ValueError(
                f"{one.video}, episode {one.number}: needed frames from {times[0]:.4f} s to "
                f"{times[-1]:.4f} s, at the times of the rows, but the video has its own at others"
            )
        return read_frames(one.video, numbers.tolist(), self.config.shape)

    def _stored(self, one: Episode, chosen: np.ndarray) -> UInt8[np.ndarray, "t h w 3"]:
        first = self._rows[one.number].first + int(chosen[0])
        files = self.dataset.stored(one.table, self.camera, first, int(np.ptp(chosen)) + 1)
        pictures = []
        for number in chosen - chosen[0]:
            image = Image.open(io.BytesIO(files[number])).convert("RGB")
            pictures.append(reduce_pictures(np.asarray(image)[None], self.config.shape))
        return np.concatenate(pictures)

    def _rated(self, one: Episode) -> tuple[np.ndarray, torch.Tensor | None]:
        """Return the numbers of the frames to use of an episode, and the actions that led there."""
        fps, actions = self.dataset.fps, self._rows[one.number].led_to()
        if not self.config.fps or is_same_rate(fps, self.config.fps):
            return np.arange(one.length), actions
        chosen = frames_at(one.length, fps, self.config.fps)
        if actions is not None:
            actions = torch.from_numpy(pool_actions(actions.numpy(), chosen))
        return chosen, actions

    def _columns(self) -> list[str]:
        features = self.dataset.features
        wanted = [ACTION, STATE] if self.config.state else [ACTION]
        if self.config.state and STATE not in features:
            raise ValueError(f"{self.dataset.root} has no {STATE}: leave state=1 out")
        return [name for name in wanted if name in features]

    def _check(self, chosen: Sequence[Episode], rows: Mapping[int, Rows]) -> list[str]:
        """Say why each episode cannot be used; empty: it can."""
        videos = sorted({one.video for one in chosen if one.video is not None})
        name = f"{self.kind}:{self.dataset.root.absolute()}"
        headers = read_headers(name, [(video,) for video in videos], _look)
        by_video = dict(zip(videos, headers, strict=True))
        return [
            self._error(one, rows.get(one.number), by_video.get(one.video) if one.video else None)
            for one in chosen
        ]

    def _error(self, one: Episode, rows: Rows | None, header: Header | None) -> str:
        fps, where = self.dataset.fps, f"{one.table}, episode {one.number}"
        if rows is None or len(rows.times) != one.length:
            got = 0 if rows is None else len(rows.times)
            return f"{where}: has {got} rows, {INFO_FILE}'s episodes say {one.length}"
        off = np.abs(rows.times - np.arange(one.length) / fps)
        if off.max() > TOLERANCE / fps:
            worst = int(off.argmax())
            return (
                f"{where}: frame {worst} is at {rows.times[worst]:.4f} s, where {fps:g} frames/s "
                f"put it at {worst / fps:.4f} s"
            )
        if rows.values is not None and not np.isfinite(rows.values).all():
            bad = int(np.argwhere(~np.isfinite(rows.values))[0][0])
            return f"{where}: the action or state of frame {bad} is not finite"
        if header is None:
            return ""
        if header.error:
            return header.error
        if header.fps and not is_same_rate(header.fps, fps):
            return f"{one.video}: has {header.fps:g} frames/s, {INFO_FILE} says {fps:g}"
        if round((one.begins_s) * fps) + one.length > header.num_frames:
            return (
                f"{one.video}: has {header.num_frames} frames, episode {one.number} needs "
                f"{one.length} from {one.begins_s:.3f} s on"
            )
        return ""

    def _card(self) -> DataCard:
        dataset = self.dataset
        height, width = self.config.shape or dataset.size(self.camera)
        names = dataset.discrete_names
        labels = len(dataset.tasks) if self.config.labels else 0
        if names:
            spec = ConditionSpec(num_actions=len(names), num_labels=labels)
        else:
            names = [name for column in self._columns() for name in dataset.names(column)]
            spec = ConditionSpec(action_dim=len(names), num_labels=labels)
        return DataCard(
            height=height,
            width=width,
            fps=self.config.fps or dataset.fps,
            conditions=spec,
            action_names=tuple(names),
        )


def _local(path: Path) -> Path:
    """Return a folder, or the local copy of a dataset on the hub."""
    if path.is_dir() or not is_hub_name(str(path)):
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder")
        return path
    return download(str(path), ["meta/*", "data/*", "videos/*"], repo_type="dataset")


def _look(files: tuple[Path, ...]) -> Header:
    return Header(**vars(probe_video(files[0])))
