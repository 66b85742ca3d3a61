"""`scd data export lerobot`: clips of any source as a LeRobot dataset of format v3.0.

Frames become one camera, H.264 videos of up to `VIDEO_BYTES` with several episodes each; actions
move from the frame that they lead to to the frame that they follow (`scd.data.lerobot`), where the
last one of an episode is repeated, as nothing followed. Prompts become tasks. Episodes of train,
val and test follow each other, and meta/info.json says where each split lies.

Source: the format as the package lerobot 0.4.4 reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import tyro
from rich.progress import track

from scd.common.files import refuse_used, written_aside
from scd.data.clip import Clip, frames_to_pixels
from scd.data.lerobot_tables import ACTION, DISCRETE, INFO_FILE, TASK, arrow
from scd.data.source import DataCard, EmptySplit, Source, open_source
from scd.data.spaces import Split
from scd.data.video import VideoWriter

CAMERA = "observation.images.scd"
"""Name of the only camera, unless another is asked for."""

VIDEO_BYTES = 200_000_000
"""Size of a video at which the next episode begins another one."""

FILES_PER_CHUNK = 1000
"""Files of a folder."""

KEYFRAMES = 2
"""Frames from one keyframe to the next, as lerobot has it: random frames are read at once."""

DEFAULT_TASK = "play"
"""Task of episodes that no prompt describes."""

VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write clips of any source as a LeRobot dataset, format v3.0."""

    data: Annotated[str, tyro.conf.Positional]
    """What to write: as --data of scd train."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder to write; it must not exist, or be empty."""
    feature: str = CAMERA
    """Name of the feature that holds the frames."""
    lossless: bool = False
    """Keep every bit of the frames (RGB, several times larger, and no browser shows it); otherwise
    colour is kept at half size, so rows and columns must be even."""


@dataclass
class _Tables:
    """Rows that were written so far."""

    rows: dict[str, list[Any]] = field(default_factory=dict)
    episodes: dict[str, list[Any]] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)
    num_frames: int = 0

    def add(self, table: dict[str, list[Any]], **values: Any) -> None:
        for name, value in values.items():
            table.setdefault(name, []).append(value)


def export_lerobot(config: ExportConfig) -> dict[str, Any]:
    """Write the dataset; return its meta/info.json.

    Raises:
        FileExistsError: the folder holds something.
        ValueError: no episodes, frames of odd size, or a package is missing.
    """
    out = Path(config.out)
    refuse_used(out)
    sources: dict[Split, Source] = {}
    for split in get_args(Split):
        try:
            sources[split] = open_source(config.data, split, whole=True)
        except EmptySplit:
            continue
    if not sources:
        raise ValueError(f"{config.data}: has no episodes")
    card = next(iter(sources.values())).card
    if not config.lossless and (card.height % 2 or card.width % 2):
        raise ValueError(
            f"{config.data}: frames are {card.height} x {card.width}; needed even rows and "
            "columns, or --lossless"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(out) as folder:
        return _write(folder, sources, card, config)


def _write(
    folder: Path, sources: dict[Split, Source], card: DataCard, config: ExportConfig
) -> dict[str, Any]:
    tables, spans, total = _Tables(), {}, sum(one.num_episodes for one in sources.values())
    videos = _Videos(folder, card, config)
    try:
        clips = track(_episodes(sources), f"writing {config.out}", total=total)
        for number, (split, clip, task) in enumerate(clips):
            start, _ = spans.get(split, (number, number))
            spans[split] = (start, number + 1)
            _add_episode(tables, number, clip, task, card, videos.write(clip))
    finally:
        videos.close()
    info = _info(folder, card, config, tables, spans)
    _write_tables(folder, tables, card)
    (folder / INFO_FILE).write_text(json.dumps(info, indent=4), encoding="utf-8")
    return info


def _episodes(sources: dict[Split, Source]) -> Iterator[tuple[Split, Clip, str]]:
    for split, source in sources.items():
        for episode in range(source.num_episodes):
            try:
                task = source.prompt(episode)
            except ValueError:
                task = DEFAULT_TASK
            yield split, source.read(episode, 0, source.num_frames(episode)), task


class _Videos:
    """Writes episodes one after another into videos of bounded size."""

    def __init__(self, folder: Path, card: DataCard, config: ExportConfig) -> None:
        self._folder, self._card, self._config = folder, card, config
        self._file, self._num_frames = -1, 0
        self._writer: VideoWriter | None = None
        self._path = folder

    def write(self, clip: Clip) -> dict[str, Any]:
        """Write an episode; return where it is, by the names of the table of episodes."""
        if self._writer is None or self._path.stat().st_size > VIDEO_BYTES:
            self.close()
            self._file, self._num_frames = self._file + 1, 0
            self._path = self._folder / VIDEO_PATH.format(
                video_key=self._config.feature,
                chunk_index=self._file // FILES_PER_CHUNK,
                file_index=self._file % FILES_PER_CHUNK,
            )
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = VideoWriter(
                self._path,
                (self._card.height, self._card.width),
                self._card.fps,
                lossless=self._config.lossless,
                keyframe_interval=KEYFRAMES,
            )
        self._writer.write(frames_to_pixels(clip.frames).numpy())
        begins, self._num_frames = self._num_frames, self._num_frames + len(clip)
        where = f"videos/{self._config.feature}/"
        return {
            where + "chunk_index": self._file // FILES_PER_CHUNK,
            where + "file_index": self._file % FILES_PER_CHUNK,
            where + "from_timestamp": begins / self._card.fps,
            where + "to_timestamp": self._num_frames / self._card.fps,
        }

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _add_episode(
    tables: _Tables, number: int, clip: Clip, task: str, card: DataCard, place: dict[str, Any]
) -> None:
    length, first = len(clip), tables.num_frames
    index = tables.tasks.setdefault(task, len(tables.tasks))
    columns: dict[str, Any] = {
        "timestamp": np.arange(length, dtype=np.float64) / card.fps,
        "frame_index": np.arange(length),
        "episode_index": np.full(length, number),
        "index": np.arange(first, first + length),
        TASK: np.full(length, index),
    }
    if clip.actions is not None:
        actions = clip.actions.numpy()
        columns[ACTION] = np.concatenate([actions[1:], actions[-1:]])
    for name, values in columns.items():
        tables.rows.setdefault(name, []).append(values)
    tables.add(
        tables.episodes,
        episode_index=number,
        tasks=[task],
        length=length,
        dataset_from_index=first,
        dataset_to_index=first + length,
        **{"data/chunk_index": 0, "data/file_index": 0},
        **{"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0},
        **place,
    )
    tables.num_frames += length


def _info(
    folder: Path, card: DataCard, config: ExportConfig, tables: _Tables, spans: dict[Split, Any]
) -> dict[str, Any]:
    plain = {name: {"dtype": "int64", "shape": [1], "names": None} for name in tables.rows}
    features: dict[str, Any] = {
        config.feature: {
            "dtype": "video",
            "shape": [card.height, card.width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": card.height,
                "video.width": card.width,
                "video.codec": "h264",
                "video.pix_fmt": "gbrp" if config.lossless else "yuv420p",
                "video.is_depth_map": False,
                "video.fps": card.fps,
                "video.channels": 3,
                "has_audio": False,
            },
        },
        **plain,
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    }
    if ACTION in tables.rows:
        names = list(card.action_names)
        dim = card.conditions.action_dim
        features[ACTION] = {
            "dtype": "float32" if dim else "int64",
            "shape": [dim or 1],
            "names": names if dim else {DISCRETE: names},
        }
    return {
        "codebase_version": "v3.0",
        "robot_type": None,
        "total_episodes": len(tables.episodes["length"]),
        "total_frames": tables.num_frames,
        "total_tasks": len(tables.tasks),
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": VIDEO_BYTES // 10**6,
        # lerobot's own are whole numbers.
        "fps": int(card.fps) if card.fps == int(card.fps) else card.fps,
        "splits": {split: f"{start}:{stop}" for split, (start, stop) in spans.items()},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features,
    }


def _write_tables(folder: Path, tables: _Tables, card: DataCard) -> None:
    pyarrow = arrow()

    joined = {name: np.concatenate(parts) for name, parts in tables.rows.items()}
    columns: dict[str, Any] = {
        name: pyarrow.array(values) for name, values in joined.items() if values.ndim == 1
    }
    columns["timestamp"] = pyarrow.array(joined["timestamp"].astype(np.float32))
    dim = card.conditions.action_dim
    if dim:
        flat = pyarrow.array(joined[ACTION].astype(np.float32).reshape(-1))
        columns[ACTION] = pyarrow.FixedSizeListArray.from_arrays(flat, dim)
    data = folder / DATA_PATH.format(chunk_index=0, file_index=0)
    for path, table in {
        data: pyarrow.table(columns),
        folder / EPISODES_PATH: pyarrow.table(tables.episodes),
        folder / "meta/tasks.parquet": _tasks(tables.tasks),
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, path)
    stats = {name: _stats(joined[name]) for name in joined}
    (folder / "meta/stats.json").write_text(json.dumps(stats, indent=4), encoding="utf-8")


def _tasks(tasks: dict[str, int]) -> Any:
    """Return the table of tasks, whose texts pandas shall take for its index."""
    pyarrow = arrow()

    index = "__index_level_0__"
    pandas = {
        "index_columns": [index],
        "column_indexes": [],
        "columns": [
            {"name": TASK, "field_name": TASK, "pandas_type": "int64", "numpy_type": "int64"},
            {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object"},
        ],
    }
    table = pyarrow.table({TASK: list(tasks.values()), index: list(tasks)})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _stats(values: np.ndarray) -> dict[str, Any]:
    """Return what lerobot keeps of a column: by entry, over all frames."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    found = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    return {name: one.tolist() for name, one in found.items()} | {"count": [len(rows)]}


def readable(info: dict[str, Any], out: str) -> str:
    return (
        f"{out}: {info['total_episodes']} episodes, {info['total_frames']} frames at "
        f"{info['fps']} frames/s; read by lerobot {info['codebase_version']}, and as lerobot:{out}"
    )
