"""HDF5 files of any layout, read in place: `hdf5:PATH?frames_key=...&actions_key=...`.

A key is the path of a dataset. In it `*` stands for the names of episodes, and `{}` for the numbers
of frames that are datasets of their own:

    observations              frames [t, h, w, 3] or [t, 3, h, w], 8 bits: one episode a file
    data/*/obs/agentview      the same, of every group in data: several episodes a file
    frame_{}_x                one frame [h, w, 3] a dataset: frame_0_x, frame_1_x, ...

`layout=csgo` is that of the Counter-Strike recordings that world models are trained on: 1,000
frames a file at 16 frames/s, blue before red, and of each frame `frame_i_y`, 51 numbers: 11 keys, 2
buttons of the mouse, and how far the mouse went, one of 23 steps across and one of 15 down.

Source: Pearce and Zhu, Counter-Strike Deathmatch with Large-Scale Behavioural Cloning,
arXiv 2104.04258, and the description of the files that they published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt8

from scd.data.reduce import reduce_pictures
from scd.data.shards import Found, Shard, ShardConfig, ShardSource, look_at_actions
from scd.data.spaces import ActionPart, ConditionSpec

EXTRA = 'HDF5 files need h5py: pip install -c constraints.txt -e ".[hdf5]"'
"""What to do where the package is missing."""

MAX_NAMED = 12
"""Datasets that are named where a key fits none."""

KEYS = ("w", "a", "s", "d", "space", "ctrl", "shift", "1", "2", "3", "r")
BUTTONS = ("left", "right")
ACROSS = (-1000, -500, -300, -200, -100, -60, -30, -20, -10, -4, -2, 0)
DOWN = (-200, -100, -50, -20, -10, -4, -2, 0)
# Pixels that the mouse went, up to the middle; beyond it they mirror.


def _csgo_step(half: tuple[int, ...]) -> tuple[int, ...]:
    return (*half, *(-one for one in half[-2::-1]))


def _csgo_mouse(name: str, steps: tuple[int, ...]) -> ActionPart:
    """Return one direction of the mouse, whose choice 0 is to rest: then follow the steps to the
    right or down, then those to the left or up from the largest."""
    rest = steps.index(0)
    names = tuple(str(one) for one in (*steps[rest:], *steps[:rest]))
    return ActionPart(
        name=f"mouse/{name}", space="Discrete", choices=(len(steps),), dtype="int64", names=names
    )


CSGO = ConditionSpec(
    action_dim=len(KEYS) + len(BUTTONS) + 2,
    action_parts=(
        ActionPart(name="keys", space="MultiBinary", shape=(11,), dtype="int8", names=KEYS),
        ActionPart(name="clicks", space="MultiBinary", shape=(2,), dtype="int8", names=BUTTONS),
        _csgo_mouse("x", _csgo_step(ACROSS)),
        _csgo_mouse("y", _csgo_step(DOWN)),
    ),
)
"""What steers Counter-Strike: the parts of its 51 numbers."""

LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "csgo": {"frames_key": "frame_{}_x", "actions_key": "frame_{}_y", "bgr": True, "rate": 16.0}
}
"""Settings that go by a name."""


@dataclass(frozen=True, kw_only=True)
class Hdf5Config(ShardConfig):
    """How HDF5 files are read."""

    frames_key: str = ""
    """Path of the frames in a file, 8-bit [t, h, w, 3] or [t, 3, h, w]. `*` stands for the names
    of episodes, `{}` for the numbers of frames that are datasets of their own."""
    actions_key: str = ""
    """Path of the actions, [t] or [t, entries], likewise; with `*`, of the same names. Empty: they
    are not read."""
    layout: Literal["", "csgo"] = ""
    """A layout that has a name, instead of both keys: csgo, of Counter-Strike."""
    bgr: bool = False
    """Whether blue comes before red, as OpenCV has it."""
    rate: float = 0.0
    """Frames per second of the files; 0: as the attribute fps of a file says, else 10."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rate < float("inf"):
            raise ValueError(f"rate must be a finite number of 0 or more, got {self.rate}")
        if self.layout and (self.frames_key or self.actions_key):
            raise ValueError(f"layout {self.layout} says the keys: give one or the other")
        if self.actions_key.count("*") > self.frames_key.count("*") and not self.layout:
            raise ValueError("actions_key has more * than frames_key")
        for key in (self.frames_key, self.actions_key):
            if key.count("{}") > 1 or "{}" in key.rpartition("/")[0]:
                raise ValueError(f"{{}} stands once, in the last part of a key, got {key!r}")

    @property
    def resolved(self) -> Hdf5Config:
        """These settings with what the layout's name means."""
        return replace(self, **LAYOUTS[self.layout], layout="") if self.layout else self


class Hdf5Source(ShardSource):
    """Episodes of one split of HDF5 files.

    A file is opened for each clip and closed after it: handles would neither survive a fork of the
    process nor tell when a file is replaced. h5py lets one thread in at a time.
    """

    kind = "hdf5"
    origin = "a simulator or robot's log that wrote HDF5; docs/datasets.md"
    settings = Hdf5Config
    flags = ("frames_key", "actions_key", "layout")
    suffixes = (".hdf5", ".h5")
    config: Hdf5Config

    @classmethod
    def look(cls, file: Path, config: Hdf5Config) -> Shard:
        resolved = config.resolved
        with _opened(file) as root:
            if not resolved.frames_key:
                raise ValueError(
                    f"{file}: needed --frames-key NAME, or ?frames_key=NAME behind its name; "
                    f"{_named(root)}"
                )
            found = []
            for name in _expand(root, resolved.frames_key):
                try:
                    found.append(asdict(_look(file, root, config, name)))
                except ValueError as error:
                    found.append(asdict(Found(name=name, error=str(error))))
            if not found:
                raise ValueError(_absent(file, root, resolved.frames_key))
        return Shard(episodes=found)

    @classmethod
    def default_fps(cls, config: Hdf5Config) -> float:
        return config.resolved.rate or 10.0

    def _pixels(
        self, file: Path, one: Found, numbers: Int[np.ndarray, " t"]
    ) -> UInt8[np.ndarray, "t h w 3"]:
        config = self.config.resolved
        key = _filled(config.frames_key, one.name)
        with _opened(file) as root:
            pixels = _read(file, root, key, numbers + one.place[0])
        if pixels.shape[-1] != 3:
            pixels = np.moveaxis(pixels, -3, -1)
        if config.bgr:
            pixels = pixels[..., ::-1]
        return reduce_pictures(np.ascontiguousarray(pixels), config.shape)

    def _rows(self, file: Path, one: Found, start: int, stop: int) -> np.ndarray:
        key = _filled(self.config.resolved.actions_key, one.name)
        with _opened(file) as root:
            return _actions(file, root, key, one.place[1], start, stop, self.config.layout)

    def _spec(self, usable: Sequence[Found]) -> ConditionSpec:
        return CSGO if self.config.layout == "csgo" else super()._spec(usable)


def h5py() -> Any:
    """Return the optional package h5py (ValueError: it is not installed)."""
    try:
        import h5py as package
    except ImportError as error:
        raise ValueError(EXTRA) from error
    return package


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a file to read; what HDF5 refuses is a ValueError."""
    package = h5py()
    try:
        # Without a lock: many file systems have none, and several processes read at once.
        with package.File(file, "r", locking=False) as root:
            yield root
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: no such file") from error
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file}: cannot be read as HDF5 ({error})") from error


def _look(file: Path, root: Any, config: Hdf5Config, name: str) -> Found:
    resolved = config.resolved
    key = _filled(resolved.frames_key, name)
    shape, dtype, first = _layout(file, root, key)
    picture = shape[1:]
    is_last = len(picture) == 3 and picture[2] == 3
    if dtype != np.uint8 or len(picture) != 3 or 0 in shape or not (is_last or picture[0] == 3):
        raise ValueError(
            f"{file}, {key}: frames must be 8-bit [t, h, w, 3] or [t, 3, h, w], got {dtype} "
            f"{list(shape)}"
        )
    place, actions = [first, 0], {}
    if resolved.actions_key:
        key = _filled(resolved.actions_key, name)
        rows, _, place[1] = _layout(file, root, key)
        values = _actions(file, root, key, place[1], 0, rows[0], config.layout)
        actions = look_at_actions(values, shape[0], config.action_rows, f"{file}, {key}")
    height, width = picture[:2] if is_last else picture[1:]
    said = np.asarray(resolved.rate or root.attrs.get("fps", 0))
    is_rate = said.size == 1 and said.dtype.kind in "iuf" and 0 < said.item() < float("inf")
    return Found(
        name=name,
        num_frames=int(shape[0]),
        height=int(height),
        width=int(width),
        fps=float(said.item()) if is_rate else 0.0,
        place=place,
        **actions,
    )


def _expand(root: Any, key: str) -> list[str]:
    """List the names of the episodes that a key means, parts for several `*` joined by /; an empty
    one where it has no `*`."""
    found = [("", root)]
    for part in key.split("/"):
        pattern = re.compile(re.escape(part).replace(r"\*", "(.+)"))
        grown = []
        for names, group in found:
            if "*" not in part:
                grown.append((names, group.get(part) if hasattr(group, "keys") else None))
                continue
            inner = sorted(group, key=_natural) if hasattr(group, "keys") else []
            grown += [
                (f"{names}/{match[1]}".lstrip("/"), group.get(one))
                for one in inner
                if (match := pattern.fullmatch(one))
            ]
        found = grown
    return [names for names, _ in found]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort numbers in names as numbers."""
    words = re.split(r"(\d+)", name)
    return [(int(word) if word.isdigit() else -1, word) for word in words]


def _filled(key: str, name: str) -> str:
    """Return a key with the episode's names in place of its `*`."""
    for part in name.split("/") if name else ():
        key = key.replace("*", part, 1)
    return key


def _layout(file: Path, root: Any, key: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return shape and type of a key's rows, and the number of the first of numbered ones."""
    if "{}" not in key:
        dataset = _dataset(file, root, key)
        return dataset.shape, dataset.dtype, 0
    where, _, last = key.rpartition("/")
    group = root.get(where) if where else root
    pattern = re.compile(re.escape(last).replace(r"\{\}", r"(0|[1-9]\d*)"))
    names = group if hasattr(group, "keys") else ()
    numbers = sorted(int(match[1]) for one in names if (match := pattern.fullmatch(one)))
    if not numbers:
        raise ValueError(_absent(file, root, key))
    gap = next((at for at, one in enumerate(numbers, numbers[0]) if one != at), None)
    if gap is not None:
        raise ValueError(
            f"{file}: has no {key.format(gap)}, though there are some up to {numbers[-1]}"
        )
    dataset = _dataset(file, root, key.format(numbers[0]))
    return (len(numbers), *dataset.shape), dataset.dtype, numbers[0]


def _read(file: Path, root: Any, key: str, numbers: np.ndarray) -> np.ndarray:
    """Read rows by their numbers, which ascend and may come several times."""
    unique = np.unique(numbers)
    if "{}" in key:
        rows = [_dataset(file, root, key.format(number))[()] for number in unique]
        shapes = {row.shape for row in rows}
        if len(shapes) > 1:
            raise ValueError(f"{file}, {key}: needed one shape, got {sorted(shapes)}")
        found = np.stack(rows)
    else:
        span = _dataset(file, root, key)[int(unique[0]) : int(unique[-1]) + 1]
        found = span[unique - unique[0]]
    return found if len(unique) == len(numbers) else found[np.searchsorted(unique, numbers)]


def _actions(
    file: Path, root: Any, key: str, first: int, start: int, stop: int, layout: str
) -> np.ndarray:
    """Read rows of actions; `first` is the number of row 0."""
    rows = _read(file, root, key, np.arange(start, stop) + first)
    if layout != "csgo":
        return rows
    ends = np.cumsum([len(KEYS) + len(BUTTONS), 2 * len(ACROSS) - 1, 2 * len(DOWN) - 1])
    if rows.ndim != 2 or rows.shape[1] != ends[-1]:
        raise ValueError(f"{file}, {key}: needed {ends[-1]} numbers, got {list(rows.shape[1:])}")
    held, *steps = np.split(rows, ends[:-1], axis=1)
    for one in steps:
        wrong = np.flatnonzero((np.isin(one, (0, 1)).sum(1) < one.shape[1]) | (one.sum(1) != 1))
        if len(wrong):
            raise ValueError(
                f"{file}, {key}: the mouse of frame {start + wrong[0]} is not one step of "
                f"{one.shape[1]}"
            )
    if not np.isin(held, (0, 1)).all():
        raise ValueError(f"{file}, {key}: keys are 0 or 1, got {held.min():g} .. {held.max():g}")
    chosen = [(one.argmax(1) - one.shape[1] // 2) % one.shape[1] for one in steps]
    return np.column_stack([held, *chosen]).astype(np.int64)


def _dataset(file: Path, root: Any, key: str) -> Any:
    """Return a dataset (ValueError: there is none of this name)."""
    try:
        found = root[key]
    except KeyError:
        found = None
    if not isinstance(found, h5py().Dataset):
        raise ValueError(_absent(file, root, key))
    return found


def _absent(file: Path, root: Any, key: str) -> str:
    """Say that there is no such dataset."""
    return f"{file}: has no dataset {key!r}; {_named(root)}"


def _named(root: Any) -> str:
    """Say which datasets there are, numbered ones as one."""
    found: dict[str, None] = {}

    def visit(name: str, one: Any) -> bool | None:
        if isinstance(one, h5py().Dataset):
            found[re.sub(r"\d+", "{}", name) if name.count("/") == 0 else name] = None
        return True if len(found) > MAX_NAMED else None

    root.visititems(visit)
    named = ", ".join(list(found)[:MAX_NAMED]) + (", ..." if len(found) > MAX_NAMED else "")
    return f"there are {named or 'none'}"
