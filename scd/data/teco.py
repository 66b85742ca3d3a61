"""What TECO's two collections have in common: folders, lists, splits, reading.

As TECO published them an episode is a file, or a video with its actions beside it, somewhere below
train/ or test/. FAR's copies say training/ and validation/ and come with lists,
<name>_train.json and <name>_val.json, whose order is that of the evaluation.

Action i is taken to have led from frame i-1 to frame i, as FAR takes it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scd.data.clip import Clip, ConditionSpec, check_actions
from scd.data.headers import Files, Header, read_headers
from scd.data.manifest import read_actions
from scd.data.source import DataCard, EmptySplit, Split

TRAIN_FOLDERS = ("train", "training")
"""Names of the folder to learn from: TECO's, FAR's."""

HELD_OUT_FOLDERS = ("test", "validation", "val")
"""Names of the folder that is held out."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TecoConfig:
    """What is expected of a collection in TECO's layout."""

    size: int
    """Height and width of a frame, in pixels."""
    frames: int = 300
    """Frames of an episode; longer ones are used in full, shorter ones are left out."""
    actions: int = 4
    """Number of discrete actions. Source: FAR's settings for both collections."""
    fps: float = 20.0
    """Frames per second at which clips are shown; frames are taken one by one as they are."""

    def __post_init__(self) -> None:
        for name in ("size", "frames", "actions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")

    @property
    def card(self) -> DataCard:
        """What all episodes share."""
        return DataCard(
            height=self.size,
            width=self.size,
            fps=self.fps,
            conditions=ConditionSpec(num_actions=self.actions),
            action_names=tuple(f"action {index}" for index in range(self.actions)),
        )


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The episodes of one folder, before any is looked at."""

    folder: Path | None
    """Folder of the part; None: there is none."""
    list_file: Path | None
    """List that gives the order; None: there is none, and names are sorted."""
    episodes: tuple[Files, ...]
    """Files of each, there or not: pictures first, then actions if they are apart."""

    @property
    def missing(self) -> list[Path]:
        """Files of episodes that are not there."""
        return [file for files in self.episodes for file in files if not file.is_file()]


def find_folder(root: Path, names: Sequence[str]) -> Path | None:
    """Return the first folder of these names."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def read_list(root: Path, name: str, keys: Sequence[str]) -> tuple[Path, list[list[str]]] | None:
    """Read a list in FAR's format: objects whose values are paths; None: there is no such list.

    Args:
        root: the collection.
        name: file name of the list.
        keys: names of the values, of which entry by entry some may be absent.

    Raises:
        ValueError: it is not such a list.
    """
    path = root / name
    if not path.is_file():
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    if not isinstance(entries, list):
        entries = [None]
    found = [
        [entry[key] for key in keys if isinstance(entry.get(key), str)]
        if isinstance(entry, dict)
        else []
        for entry in entries
    ]
    if not all(found):
        raise ValueError(f"{path}: needed a list of objects with {' or '.join(keys)}")
    return path, found


def locate(root: Path, written: str) -> Path:
    """Find a file that a list names from some folder above the collection.

    The longest end of the written path that exists below the collection is taken; if there is
    none, the longest whose folder does.
    """
    parts = Path(written).parts
    parts = parts[1:] if Path(written).is_absolute() else parts
    ends = [root.joinpath(*parts[first:]) for first in range(len(parts))]
    there = [end for end in ends if end.is_file()] or [end for end in ends if end.parent.is_dir()]
    return (there or ends)[0]


def find_split(root: Path, split: Split, name: str, keys: Sequence[str], origin: str) -> Listing:
    """Find the folder that holds a split, and its episodes if a list of FAR's names them.

    Args:
        root: the collection.
        split: `val` and `test` share the held-out folder.
        name: of the collection, as its lists are called.
        keys: names of the paths in a list.
        origin: where the collection comes from.

    Returns:
        The folder, and the episodes of the list; without a list there are none yet.

    Raises:
        FileNotFoundError: no such collection.
        ValueError: the list is damaged.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; {origin}")
    is_train = split == "train"
    folder = find_folder(root, TRAIN_FOLDERS if is_train else HELD_OUT_FOLDERS)
    found = read_list(root, f"{name}_{'train' if is_train else 'val'}.json", keys)
    if found is None:
        return Listing(folder=folder, list_file=None, episodes=())
    path, entries = found
    episodes = tuple(tuple(locate(root, written) for written in entry) for entry in entries)
    return Listing(folder=folder, list_file=path, episodes=episodes)


def part_of(held_out: Sequence[Any], split: Split) -> Sequence[Any]:
    """Share the held-out episodes: the last quarter is `val`, all before it `test`, in order."""
    num_test = len(held_out) - len(held_out) // 4
    return held_out[:num_test] if split == "test" else held_out[num_test:]


def check_header(header: Header, config: TecoConfig, name: Path) -> Header:
    """Return a header, with an error if the episode is not as expected."""
    size = (header.height, header.width)
    if size != (config.size, config.size):
        return Header(error=f"{name}: frames are {size[0]} x {size[1]}, needed {config.size}")
    if header.num_frames < config.frames:
        return Header(error=f"{name}: has {header.num_frames} frames, needed {config.frames}")
    return header


def read_ids(path: Path, config: TecoConfig) -> np.ndarray:
    """Read the actions of an episode and see that they are ids of this collection.

    Raises:
        ValueError: missing, damaged, or other actions.
    """
    actions = read_actions(path)
    if actions.ndim != 1:
        raise ValueError(f"{path}: needed one action per frame, got {list(actions.shape)}")
    try:
        check_actions(config.card.conditions, torch.from_numpy(actions))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; ?actions=N says how many there are") from error
    return actions


ReadFrames = Callable[[Files, int, int], torch.Tensor]
"""From an episode's files, a first frame and a number of frames to [t c h w]."""


class TecoSource:
    """Episodes of one split; opening looks at each file once, and recalls it after.

    Args:
        name: of the collection, with its path.
        listing: of the part that holds the split.
        split: which episodes.
        config: what is expected of them.
        find_out: reads the header of an episode.
        read_frames: reads frames of an episode.
        encoded: whether these are latents.
        strict: stop at the first episode that cannot be used, instead of leaving it out.

    Raises:
        ValueError: no episodes are left, or one cannot be used under `strict`.
    """

    def __init__(
        self,
        name: str,
        listing: Listing,
        split: Split,
        config: TecoConfig,
        find_out: Callable[[Files], Header],
        read_frames: ReadFrames,
        encoded: bool = False,
        strict: bool = False,
    ) -> None:
        self.name, self.split, self.config = name, split, config
        self.encoded = encoded
        self._read_frames = read_frames
        chosen = listing.episodes if split == "train" else part_of(listing.episodes, split)
        headers = read_headers(f"{name} {config}", chosen, find_out)
        wrong = [header.error for header in headers if header.error]
        if wrong and strict:
            raise ValueError(wrong[0])
        if wrong:
            logger.warning(
                "%s: left out %d of %d %s episodes, the first: %s",
                *(name, len(wrong), len(chosen), split, wrong[0]),
            )
        kept = [pair for pair in zip(chosen, headers, strict=True) if not pair[1].error]
        self.episodes = [files for files, _ in kept]
        self._headers = [header for _, header in kept]
        if not self.episodes:
            why = f"; the first was left out because {wrong[0]}" if wrong else ""
            raise (ValueError if wrong else EmptySplit)(
                f"{name}: split {split!r} has no episodes{why}"
            )

    @property
    def card(self) -> DataCard:
        """Size, speed and steering of the episodes."""
        return self.config.card

    @property
    def num_episodes(self) -> int:
        """Number of episodes of the split that can be used."""
        return len(self.episodes)

    def num_frames(self, episode: int) -> int:
        """Return the length of an episode in frames."""
        return self._headers[episode].num_frames

    def read(self, episode: int, start: int, num_frames: int) -> Clip:
        """Read some frames of an episode.

        Raises:
            ValueError: the episode has no such frames, or is damaged.
        """
        files, length = self.episodes[episode], self.num_frames(episode)
        if not 0 <= start < start + num_frames <= length:
            raise ValueError(
                f"{files[0]}: frames {start} .. {start + num_frames - 1} were asked for, but the "
                f"episode has {length}"
            )
        actions = read_ids(files[-1], self.config)[start : start + num_frames]
        return Clip(
            frames=self._read_frames(files, start, num_frames),
            actions=torch.from_numpy(actions),
            fps=self.config.fps,
            encoded=self.encoded,
        )
