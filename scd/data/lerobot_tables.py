"""Tables of LeRobot datasets, formats v2.1 and v3.0: `scd.data.lerobot` says what is where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64

from scd.common.files import parse_json, read_json
from scd.data.source import SPLITS, split_of
from scd.data.spaces import Split

INFO_FILE = "meta/info.json"

VERSIONS = ("v2.1", "v3.0")

ACTION, STATE, TASK = "action", "observation.state", "task_index"

DISCRETE = "ids"
"""Key of an action's `names` under which our own export keeps the names of discrete actions."""

EXTRA = 'LeRobot datasets need pyarrow: pip install -c constraints.txt -e ".[lerobot]"'
"""What to do where the package is missing."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """Where an episode is."""

    number: int
    length: int
    tasks: tuple[str, ...]
    video: Path | None
    """None: pictures lie in the table."""
    begins_s: float
    """When it begins in the video."""
    table: Path


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the table says of the frames of an episode."""

    first: int
    """Its first row in its table."""
    times: Float[np.ndarray, " t"]
    """Seconds since its beginning."""
    values: Float[np.ndarray, "t a"] | Int64[np.ndarray, " t"] | None
    """What was done after each frame was seen: ids, or vectors."""
    label: int
    """Number of its first row's task."""

    def led_to(self) -> torch.Tensor | None:
        """Return the action that led to each frame; to the first its own, as nobody knows."""
        if self.values is None:
            return None
        return torch.from_numpy(np.concatenate([self.values[:1], self.values[:-1]]))


class Dataset:
    """Tables of a dataset.

    Raises:
        FileNotFoundError: no such folder, or it has no meta/info.json.
        ValueError: another version, or info that lacks what it must say.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        path = root / INFO_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{root} is no LeRobot dataset: it has no {INFO_FILE}")
        self.info: dict[str, Any] = read_json(path)
        try:
            self.version = str(self.info["codebase_version"])
            self.fps = float(self.info["fps"])
            self.features: dict[str, dict[str, Any]] = dict(self.info["features"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: needed codebase_version, fps and features, got {error!r}"
            ) from error
        if self.version not in VERSIONS:
            raise ValueError(
                f"{path}: is of format {self.version}, readable are {' and '.join(VERSIONS)}; "
                "the package lerobot converts between its formats"
            )
        if not 0 < self.fps < float("inf"):
            raise ValueError(f"{path}: fps must be above 0, got {self.fps}")

    @property
    def cameras(self) -> list[str]:
        return [name for name, one in self.features.items() if one["dtype"] in ("video", "image")]

    def camera(self, wanted: str) -> str:
        """Return the feature that is meant (ValueError: none, or several)."""
        end = f".{wanted}" if wanted else ""
        fitting = [name for name in self.cameras if name == wanted or name.endswith(end)]
        if len(fitting) != 1:
            problem = f"{len(fitting)} cameras fit {wanted!r}" if wanted else "which camera"
            raise ValueError(
                f"{self.root}: {problem}: there are {', '.join(self.cameras) or 'none'}; needed "
                "?camera=NAME behind its name, or --camera NAME"
            )
        return fitting[0]

    def size(self, camera: str) -> tuple[int, int]:
        """Return rows and columns of a camera's pictures."""
        one = self.features[camera]
        shape, names = list(one["shape"]), [str(name) for name in one.get("names") or ()]
        if len(names) == 3 and names[0].startswith("channel"):
            shape = shape[1:]
        return int(shape[0]), int(shape[1])

    def names(self, column: str) -> list[str]:
        """Return a name for each entry of a vector."""
        names = self.features[column].get("names")
        while isinstance(names, dict):
            names = next(iter(names.values()), None)
        size = int(np.prod(self.features[column]["shape"]))
        if not isinstance(names, list) or len(names) != size:
            names = [f"{column}.{index}" for index in range(size)]
        return [str(name) for name in names]

    @property
    def discrete_names(self) -> list[str]:
        """Names of discrete actions, where the action is an id; empty: it is a vector."""
        one = self.features.get(ACTION, {})
        names = one.get("names")
        return [str(name) for name in names.get(DISCRETE, ())] if isinstance(names, dict) else []

    @cached_property
    def tasks(self) -> list[str]:
        """Texts of the tasks by number."""
        if self.version == "v2.1":
            lines = self._lines("meta/tasks.jsonl")
            found = {int(one["task_index"]): str(one["task"]) for one in lines}
        else:
            table = _read_table(self.root / "meta/tasks.parquet")
            # pandas keeps the texts as its index: under this name, or under the index' own.
            (text,) = [name for name in table if name != TASK] or [""]
            found = dict(zip(map(int, table[TASK]), map(str, table[text]), strict=True))
        return [found[number] for number in sorted(found)]

    def episodes(self, camera: str) -> list[Episode]:
        """List all episodes, in the order of their numbers."""
        is_video = self.features[camera]["dtype"] == "video"
        if self.version == "v2.1":
            lines = self._lines("meta/episodes.jsonl")
            found = [self._old_episode(one, camera, is_video) for one in lines]
        else:
            where = f"videos/{camera}/"
            columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
            if is_video:
                columns += [where + end for end in ("chunk_index", "file_index", "from_timestamp")]
            paths = sorted((self.root / "meta/episodes").glob("*/*.parquet"))
            if not paths:
                raise FileNotFoundError(f"{self.root}: has no meta/episodes/*/*.parquet")
            found = [
                self._episode(dict(zip(columns, row, strict=True)), camera, is_video)
                for path in paths
                for row in zip(*_read_table(path, columns).values(), strict=True)
            ]
        return sorted(found, key=lambda one: one.number)

    def _old_episode(self, one: dict[str, Any], camera: str, is_video: bool) -> Episode:
        number = int(one["episode_index"])
        place = {
            "episode_chunk": number // int(self.info.get("chunks_size", 1000)),
            "episode_index": number,
            "video_key": camera,
        }
        return Episode(
            number=number,
            length=int(one["length"]),
            tasks=tuple(map(str, one.get("tasks", ()))),
            video=self.root / self.info["video_path"].format(**place) if is_video else None,
            begins_s=0.0,
            table=self.root / self.info["data_path"].format(**place),
        )

    def _episode(self, one: dict[str, Any], camera: str, is_video: bool) -> Episode:
        def place(prefix: str) -> dict[str, Any]:
            places = {end: int(one[f"{prefix}/{end}"]) for end in ("chunk_index", "file_index")}
            return places | {"video_key": camera}

        videos = f"videos/{camera}"
        return Episode(
            number=int(one["episode_index"]),
            length=int(one["length"]),
            tasks=tuple(map(str, one["tasks"])),
            video=self.root / self.info["video_path"].format(**place(videos)) if is_video else None,
            begins_s=float(one[f"{videos}/from_timestamp"]) if is_video else 0.0,
            table=self.root / self.info["data_path"].format(**place("data")),
        )

    def splits(self, num_episodes: int) -> list[Split]:
        """Return the split of each episode: as info says if it names more than one, else ours."""
        said = self.info.get("splits") or {}
        if len(set(said) & set(SPLITS)) < 2:
            return [split_of(index, num_episodes) for index in range(num_episodes)]
        parts: list[Split] = ["train"] * num_episodes
        for name, span in said.items():
            start, _, stop = str(span).partition(":")
            if not (start + stop).isdigit() or name not in SPLITS:
                raise ValueError(
                    f"{self.root / INFO_FILE}: splits must be {', '.join(SPLITS)}, each as "
                    f"FIRST:LAST+1 of its episodes, got {name!r}: {span!r}"
                )
            for index in range(int(start or 0), min(int(stop or num_episodes), num_episodes)):
                parts[index] = SPLITS[name]
        return parts

    def rows(self, tables: Iterable[Path], columns: Sequence[str]) -> dict[int, Rows]:
        """Read the rows of all episodes of some tables, by the episode's number."""
        found = {}
        for path in dict.fromkeys(tables):
            if not path.is_file():
                # The episodes that lie there are left out by name.
                continue
            table = _read_table(path, ["episode_index", "timestamp", TASK, *columns])
            numbers = np.asarray(table["episode_index"], np.int64)
            values = _joined([table[name] for name in columns], bool(self.discrete_names))
            borders = np.flatnonzero(np.diff(numbers)) + 1
            for first, stop in zip([0, *borders], [*borders, len(numbers)], strict=True):
                if first == stop:
                    continue
                found[int(numbers[first])] = Rows(
                    first=int(first),
                    times=np.asarray(table["timestamp"][first:stop], np.float64),
                    values=None if values is None else values[first:stop],
                    label=int(table[TASK][first]),
                )
        return found

    def stored(self, path: Path, camera: str, first: int, num_frames: int) -> list[bytes]:
        """Read pictures that lie in the table itself."""
        with arrow().parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)]
            starts = np.cumsum([0, *sizes])
            groups = [
                at
                for at in range(len(sizes))
                if starts[at] < first + num_frames and first < starts[at + 1]
            ]
            table = file.read_row_groups(groups, columns=[camera])
        rows = table.slice(first - int(starts[groups[0]]), num_frames)[camera].to_pylist()
        found = []
        for row in rows:
            if row["bytes"] is None:
                found.append((self.root / row["path"]).read_bytes())
            else:
                found.append(row["bytes"])
        return found

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(f"{self.root}: has no {name}")
        lines = path.read_text(encoding="utf-8").split("\n")
        return [
            parse_json(line, f"{path} line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]


def _joined(columns: Sequence[Any], discrete: bool) -> np.ndarray | None:
    """Put columns beside each other: ids [t], or vectors [t, a]."""
    if not columns:
        return None
    if discrete:
        return np.asarray(columns[0], np.int64).reshape(-1)
    flat = [np.asarray(column, np.float32) for column in columns]
    return np.concatenate([one.reshape(len(one), -1) for one in flat], axis=1)


def arrow() -> Any:
    """Return the optional package pyarrow, with its parquet (ValueError: it is not installed)."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(EXTRA) from error
    return pyarrow


def _read_table(path: Path, columns: Sequence[str] | None = None) -> dict[str, Any]:
    """Read a table's columns in their order: arrays of numbers, lists of anything else.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no table, or it lacks a column.
    """
    pyarrow = arrow()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        # Of one file: read_table would take names of its folders for further columns.
        with arrow().parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            missing = [name for name in columns or () if name not in there]
            if missing:
                raise ValueError(f"{path}: has no column {missing[0]}, there are {there[:12]}")
            table = file.read(columns=list(columns or there))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: cannot be read as a table ({error})") from error
    return {name: _values(table[name]) for name in columns or there}


def _values(column: Any) -> Any:
    """Turn a column into an array [rows, ...] where it holds numbers, else into a list."""
    pyarrow = arrow()

    values, shape = column.combine_chunks(), [len(column)]
    if isinstance(values, pyarrow.ChunkedArray):
        values = values.chunk(0) if values.num_chunks else pyarrow.array([], column.type)
    while pyarrow.types.is_list(values.type) or pyarrow.types.is_fixed_size_list(values.type):
        values = values.flatten()
        shape.append(-1)
    if len(shape) > 2 or not pyarrow.types.is_primitive(values.type):
        return column.to_pylist()
    return values.to_numpy(zero_copy_only=False).reshape(shape if len(column) else [0])
