"""Files that hold episodes of anybody's making, read in place: HDF5, tars of videos.

Every file is looked at once, and what was found is kept (`scd.data.published`): the episodes, how
long and large they are, and of which kind their actions. Actions tell their kind by their numbers:
one whole number a frame is an id, several are keys (0 and 1) or choices, anything else is a vector.
"""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8

from scd.data.clip import Clip, check_actions, pixels_to_frames
from scd.data.frame_rate import count_rates, frames_at, is_same_rate, pool_actions
from scd.data.published import read_headers
from scd.data.source import (
    SPLITS,
    DataCard,
    Findings,
    Opening,
    PictureConfig,
    Source,
    leave_out,
    split_of,
)
from scd.data.spaces import ActionPart, ConditionSpec, Split

Rows = Literal["taken-at-frame", "led-to-frame"]
"""Which frame an action stands beside: the one that it was taken at, or the one that it led to."""


@dataclass(frozen=True, kw_only=True)
class ShardConfig(PictureConfig):
    """How such files are read."""

    action_rows: Rows = "taken-at-frame"
    """What row i of the actions is: what was done on seeing frame i and led to frame i + 1
    (taken-at-frame, as simulators write it), or what led to frame i (led-to-frame)."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found out about an episode."""

    name: str
    """In its file; empty: it is the file's only one."""
    num_frames: int = 0
    height: int = 0
    width: int = 0
    fps: float = 0.0
    """Frames per second; 0: not said."""
    place: Sequence[int] = ()
    """Where in the file it is, as its kind counts."""
    entries: int | None = None
    """Entries of an action, 0: an id. None: it has no actions."""
    most: Sequence[int] = ()
    """Greatest value of each entry where all are whole numbers from 0 on; empty: they are not."""
    label: int | None = None
    prompt: str | None = None
    error: str = ""
    """Why it cannot be used. Empty: it can."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What was found out about a file."""

    episodes: list[dict[str, Any]] = field(default_factory=list)
    """A `Found` each."""
    error: str = ""
    """Why nothing of it can be used. Empty: it can."""


class ShardSource(Source):
    """Episodes of one split; files are looked at once, pictures read when they are asked for.

    A folder or file whose name begins with train, val or test belongs to that split, where two of
    these occur; otherwise every tenth episode is kept for tests and another one is watched.

    Args:
        path: a file, a folder of them, or a pattern with {000..012} in its name.
        split: which episodes.
        config: how they are read.
        strict: stop at the first episode that cannot be used, instead of leaving it out.

    Raises:
        FileNotFoundError: no such file or folder, or none of this kind in it.
        ValueError: no episode is left, or one cannot be used under `strict`.
    """

    of_files = True
    suffixes: ClassVar[tuple[str, ...]]
    """Endings of the names of its files."""
    config: ShardConfig

    def __init__(
        self, path: Path, split: Split, config: ShardConfig | None = None, strict: bool = False
    ) -> None:
        self.path = path
        self.config = config or self.settings()
        name = f"{self.kind}:{path.absolute()}"
        everything = list(self.look_at_all(path, self.config))
        usable = [one for _, one in everything if not one.error]
        self.spec = self._spec(usable) if usable else ConditionSpec()
        shape, fps = self._shape(usable), self._fps(usable)
        parts = _splits(path, [file for file, _ in everything])
        chosen = [one for one, part in zip(everything, parts, strict=True) if part == split]
        errors = [self._error(file, one, shape, fps) for file, one in chosen]
        self.left_out = leave_out(name, split, errors, strict)
        self.episodes = [one for one, error in zip(chosen, errors, strict=True) if not error]
        wanted = self.config.fps or fps
        self._frames = [
            frames_at(one.num_frames, one.fps or fps, wanted) for _, one in self.episodes
        ]
        card = DataCard(
            height=shape[0],
            width=shape[1],
            fps=wanted,
            conditions=self.spec,
            action_names=self._action_names(),
        )
        super().__init__(name, split, card, [len(frames) for frames in self._frames])

    @classmethod
    def open(cls, data: str, split: Split, how: Opening) -> ShardSource:
        path, config = cls.parse(data)
        return cls(path, split, config, how.strict)

    @classmethod
    def look_at_all(cls, path: Path, config: Any) -> Iterator[tuple[Path, Found]]:
        """Yield all episodes with their files; a file that cannot be read counts as one."""
        files = find_files(path, cls.suffixes)
        name = f"{cls.kind}:{path.absolute()} {config}"
        shards = read_headers(
            name, [(file,) for file in files], lambda pair: cls.look(pair[0], config), Shard
        )
        for file, shard in zip(files, shards, strict=True):
            for one in shard.episodes:
                yield file, Found(**one)
            if shard.error:
                yield file, Found(name="", error=shard.error)

    @classmethod
    def inspect(cls, data: str) -> Findings:
        path, config = cls.parse(data)
        try:
            found = list(cls.look_at_all(path, config))
        except (ValueError, OSError) as error:
            return Findings(missing=[str(error)])
        wrong = [one.error for _, one in found if one.error]
        good = [one for _, one in found if not one.error]
        files = len({file for file, _ in found})
        there = [f"{files} files, {len(good)} episodes that can be read"] if good else []
        missing = [] if good else wrong[:1] or [f"{path}: no episodes"]
        notes = [f"cannot be read: {error}" for error in wrong]
        if good and not config.fps and not any(one.fps for one in good):
            rate = cls.default_fps(config)
            notes.append(f"no file says its frames per second: taken as {rate:g}")
        return Findings(there=there, missing=missing, notes=notes)

    @classmethod
    def default_fps(cls, config: Any) -> float:
        """Return the frames per second of episodes that do not say them."""
        return 10.0

    @classmethod
    @abstractmethod
    def look(cls, file: Path, config: Any) -> Shard:
        """Find out about the episodes of a file; ValueError or OSError: it cannot be read."""

    @abstractmethod
    def _pixels(
        self, file: Path, one: Found, numbers: Int[np.ndarray, " t"]
    ) -> UInt8[np.ndarray, "t h w 3"]:
        """Read frames, reduced to the size that was asked for."""

    @abstractmethod
    def _rows(self, file: Path, one: Found, start: int, stop: int) -> np.ndarray:
        """Read the rows start .. stop - 1 of an episode's actions."""

    def title(self, episode: int) -> str:
        return titled(*self.episodes[episode])

    def identity(self, episode: int) -> tuple[str, dict[str, Any]]:
        file, one = self.episodes[episode]
        parts: dict[str, Any] = {"file": file, "label": one.label}
        if self.spec.has_actions:
            try:
                parts["actions"] = self._led_to(episode, 0, np.asarray(self._frames[episode]))
            except (ValueError, OSError):
                parts["actions"] = "damaged"
        place = os.path.relpath(file, self.path if self.path.is_dir() else self.path.parent)
        return f"{place} {one.name}".strip(), parts

    def prompt(self, episode: int) -> str:
        """Return the text that stands beside the episode."""
        text = self.episodes[episode][1].prompt
        if text is None:
            raise ValueError(f"{self.title(episode)} has no prompt")
        return text

    def _read(self, episode: int, start: int, num_frames: int) -> Clip:
        file, one = self.episodes[episode]
        chosen = self._frames[episode][start : start + num_frames]
        return Clip(
            frames=pixels_to_frames(torch.from_numpy(self._pixels(file, one, chosen))),
            actions=self._led_to(episode, start, chosen) if self.spec.has_actions else None,
            label=one.label if self.spec.num_labels else None,
            fps=self.card.fps,
        )

    def _led_to(self, episode: int, start: int, chosen: np.ndarray) -> torch.Tensor:
        """Return the action that led to each frame; to an episode's first its own, as nobody knows
        another."""
        file, one = self.episodes[episode]
        # Of a frame that stands for several, the actions since the one before count.
        before = self._frames[episode][max(start - 1, 0) : start][-1:]
        frames = np.concatenate([before, chosen])
        shift = 1 if self.config.action_rows == "taken-at-frame" else 0
        first, stop = max(int(frames[0]) - shift, 0), int(frames[-1]) + 1 - shift
        rows = self._rows(file, one, first, max(stop, first + 1))
        led = rows[np.maximum(np.arange(frames[0], frames[-1] + 1) - shift, 0) - first]
        values = led.astype(np.int64 if self.spec.num_actions else np.float32)
        values = values.reshape(len(led), *([] if self.spec.num_actions else [-1]))
        pooled = pool_actions(values, frames - frames[0], self.spec.counts)
        actions = torch.from_numpy(pooled[len(before) :])
        try:
            check_actions(self.spec, actions)
        except ValueError as error:
            raise ValueError(f"{self.title(episode)}: {error}") from error
        return actions

    def _spec(self, usable: Sequence[Found]) -> ConditionSpec:
        """Say what steers episodes, by the greatest values that occur in any of them."""
        labels = [one.label for one in usable if one.label is not None]
        num_labels = 1 + max(labels) if len(labels) == len(usable) else 0
        entries = Counter(one.entries for one in usable).most_common(1)[0][0]
        fitting = [one for one in usable if one.entries == entries]
        if entries is None:
            return ConditionSpec(num_labels=num_labels)
        if not all(one.most for one in fitting):
            return ConditionSpec(action_dim=max(entries, 1), num_labels=num_labels)
        most = np.max([one.most for one in fitting], axis=0)
        if entries == 0:
            return ConditionSpec(num_actions=1 + int(most[0]), num_labels=num_labels)
        keys = bool((most <= 1).all())
        part = ActionPart(
            name="",
            space="MultiBinary" if keys else "MultiDiscrete",
            shape=(entries,),
            choices=() if keys else tuple(1 + int(one) for one in most),
            dtype="int8" if keys else "int64",
        )
        return ConditionSpec(action_dim=entries, action_parts=(part,), num_labels=num_labels)

    def _action_names(self) -> tuple[str, ...]:
        """Return a name for each action."""
        if self.spec.action_parts:
            return self.spec.action_names
        return tuple(f"action {n}" for n in range(self.spec.num_actions or self.spec.action_dim))

    def _shape(self, usable: Sequence[Found]) -> tuple[int, int]:
        sizes = Counter((one.height, one.width) for one in usable)
        return self.config.shape or (sizes.most_common(1)[0][0] if sizes else (1, 1))

    def _fps(self, usable: Sequence[Found]) -> float:
        rates = Counter(round(one.fps, 3) for one in usable if one.fps)
        return rates.most_common(1)[0][0] if rates else self.default_fps(self.config)

    def _error(self, file: Path, one: Found, shape: tuple[int, int], fps: float) -> str:
        """Say why an episode cannot be used, for itself or beside the others; empty: it can."""
        if one.error:
            return one.error
        title = titled(file, one)
        if not self.config.size and (one.height, one.width) != shape:
            return (
                f"{title}: frames are {one.height} x {one.width}, most are {shape[0]} x "
                f"{shape[1]}: ?size={shape[0]}x{shape[1]} brings all to one size"
            )
        if not self.config.fps and one.fps and not is_same_rate(one.fps, fps):
            return (
                f"{title}: has {count_rates([one.fps])} frames/s, most have {fps:g}: ?fps={fps:g} "
                "brings all to one rate"
            )
        has = one.entries is not None
        if has != self.spec.has_actions or (has and max(one.entries or 0, 1) != self._entries):
            return f"{title}: has actions of {one.entries} entries, most have {self._entries}"
        if bool(self.spec.num_actions) and one.entries:
            return f"{title}: its actions are vectors, those of most are ids"
        return ""

    @property
    def _entries(self) -> int:
        return 1 if self.spec.num_actions else self.spec.action_dim


def titled(file: Path, one: Found) -> str:
    """Name an episode, for messages."""
    return f"{file}, {one.name}" if one.name else str(file)


def look_at_actions(values: np.ndarray, num_frames: int, rows: Rows, where: str) -> dict[str, Any]:
    """Return the fields of `Found` that tell of which kind an episode's actions are.

    Nothing follows the last frame, so its action may lack where actions stand beside the frames
    that they were taken at.

    Raises:
        ValueError: not one number or some numbers a frame, not finite, or none for some frames.
    """
    if values.dtype.kind not in "biuf" or values.ndim not in (1, 2) or 0 in values.shape:
        raise ValueError(
            f"{where}: actions must be numbers [t] or [t, entries], got {values.dtype} "
            f"{list(values.shape)}"
        )
    if len(values) not in (num_frames, num_frames - (rows == "taken-at-frame")):
        raise ValueError(f"{where}: {num_frames} frames need as many actions, got {len(values)}")
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        raise ValueError(f"{where}: the action of frame {wrong[0][0]} is not finite")
    whole = values.dtype.kind in "biu" and int(values.min()) >= 0
    columns = values.reshape(len(values), -1)
    is_one = columns.shape[1] == 1
    return {
        "entries": 0 if is_one and whole else columns.shape[1],
        "most": [int(one) for one in columns.max(axis=0)] if whole else [],
    }


def find_files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """List the files that a path means: itself, those in a folder, or those of a pattern.

    Raises:
        FileNotFoundError: there is none.
    """
    begin, brace, rest = str(path).partition("{")
    span, _, end = rest.partition("}")
    first, dots, last = span.partition("..")
    if brace and dots and first.isdigit() and last.isdigit():
        width = len(first) if first.startswith("0") else 0
        numbers = range(int(first), int(last) + 1)
        files = [Path(f"{begin}{number:0{width}d}{end}") for number in numbers]
        missing = [file for file in files if not file.is_file()]
        if missing or not files:
            raise FileNotFoundError(f"{(missing or [path])[0]}: no such file, of {path}")
        return files
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = sorted(file for end in suffixes for file in path.rglob(f"*{end}") if file.is_file())
    if not files:
        raise FileNotFoundError(f"{path}: holds no files that end in {', '.join(suffixes)}")
    return files


def _splits(path: Path, files: Sequence[Path]) -> list[Split]:
    """Return the split of each episode, by the names of folders and files, else by its number."""
    names = []
    for file in files:
        inner = file.relative_to(path).parts if path.is_dir() else (file.name,)
        words = [re.split(r"[-_.]", part)[0].lower() for part in inner]
        names.append(next((SPLITS[word] for word in words if word in SPLITS), None))
    if len(set(names) - {None}) > 1:
        return [name or "train" for name in names]
    return [split_of(index, len(files)) for index in range(len(files))]
