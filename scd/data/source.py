"""Sources of clips: what every collection of episodes offers, and how it is found by its name.

A source is a subclass of `Source` in a module of this folder; nothing else need know of it. It
says by which names it goes (`kind`, `recognises`), opens a split (`open`), and reads frames
(`_read`). `scd data check` asks it what is there (`inspect`, `oddities`) and where it comes from
(`origin`).
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import sys
import typing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import parse_qsl, quote

from torch import Tensor

from scd.common.config import MAX_SIZE, added, at_least, from_json, within
from scd.data.clip import Clip
from scd.data.keymap import KeyMap, check_key_map, derive_key_map
from scd.data.spaces import ConditionSpec, Split

WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
"""Ways to say whether."""

DEFAULT_KIND = "folder"
"""What a path is taken for that no kind of source recognises."""

MAX_FPS = 1000
"""Most frames per second that files and players can have."""

HELD_OUT = 10
"""Episodes of which one is kept for tests and one is watched in training."""

SPLITS: dict[str, Split] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test",
}  # fmt: skip
"""Splits by the names that people give them."""

Kind = TypeVar("Kind")

logger = logging.getLogger(__name__)


class EmptySplit(ValueError):
    """A split to which no episode of the collection belongs."""


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """Size, speed and steering that all episodes of a collection share."""

    height: int
    """Rows of a frame, in pixels."""
    width: int
    """Columns of a frame, in pixels."""
    fps: float
    """Frames per second at which the episodes are meant to be watched."""
    conditions: ConditionSpec
    action_names: tuple[str, ...]
    """Name of each discrete action id, or of each entry of a vector of actions."""
    pixel_art: bool = added(False)
    """Whether frames are drawn in hard-edged pixels, which a player should not smooth."""
    key_map: KeyMap = added(())
    """Which keys, mouse, gamepad and touch do what on the page of `scd play`; empty: by the names
    of the actions."""

    def __post_init__(self) -> None:
        within(1, MAX_SIZE, height=self.height, width=self.width)
        if not 0 < self.fps <= MAX_FPS:
            raise ValueError(f"fps must be above 0 and {MAX_FPS} at most, got {self.fps}")
        num_names = self.conditions.num_actions or self.conditions.action_dim
        if len(self.action_names) != num_names:
            raise ValueError(
                f"{num_names} actions need as many action_names, got {list(self.action_names)}"
            )
        check_key_map(self.key_map, self.conditions, self.action_names)

    @property
    def keys(self) -> KeyMap:
        """The key map that it has, or that the names of its actions suggest."""
        return self.key_map or derive_key_map(self.conditions, self.action_names)


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """How the pictures of others are brought to one size and rate."""

    size: str = ""
    """Rows and columns of a frame in pixels, as 64 or 48x64: pictures are reduced until they just
    cover it, and their middle is taken. Empty: as they are stored."""
    fps: float = 0.0
    """Frames per second to bring episodes to, by the frames nearest in time and their actions
    pooled (docs/your-clips.md); 0: as they are."""

    @property
    def shape(self) -> tuple[int, int] | None:
        """Rows and columns that were asked for."""
        if not self.size:
            return None
        words = self.size.split("x")
        if len(words) > 2 or not all(word.isdigit() and int(word) for word in words):
            raise ValueError(f"size must be as 64 or 48x64 (rows x columns), got {self.size!r}")
        return int(words[0]), int(words[-1])

    def __post_init__(self) -> None:
        at_least(1, size=min(self.shape or (1,)))
        if not 0 <= self.fps < float("inf"):
            raise ValueError(f"fps must be a finite number of 0 or more, got {self.fps}")


@dataclass(kw_only=True)
class Findings:
    """What a look at a collection found."""

    there: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is odd, but does not keep anybody from using it."""
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    """Episodes that are there, but cannot be read to their end."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How a source is opened; a kind passes over what has no meaning for it."""

    strict: bool = False
    """Stop at the first episode that cannot be used, instead of leaving it out."""
    latents: bool = False
    """Give stored latents as they are, instead of the videos that they were made of."""
    whole: bool = False
    """Episodes as they are: nothing cut out at random, published latents not scaled."""


class Source(ABC):
    """Episodes of one split, numbered from 0, that any number of threads can read at once.

    Args:
        name: of the collection, for messages.
        split: which part of it.
        card: what all episodes share.
        lengths: frames of each episode.
    """

    kind: ClassVar[str] = ""
    """Its name: `KIND:...` opens it, `scd data check --as KIND` looks at it. Empty: it is a base
    of others, or is opened in another way."""
    origin: ClassVar[str] = ""
    """Where to get such a collection."""
    settings: ClassVar[type[Any]]
    """Dataclass of what may follow the `?` of its name; all of its fields have defaults."""
    flags: ClassVar[tuple[str, ...]] = ()
    """Which of them the command line also takes as flags of their own, such as --camera."""
    of_files: ClassVar[bool] = False
    """Whether a file, or a pattern of files, is a collection as well as a folder."""
    left_out: Sequence[str] = ()
    """Why episodes of the split cannot be used, one by one, by their names."""
    frames_are: ClassVar[str] = "frames"
    """What its frames are, for messages."""

    def __init__(self, name: str, split: Split, card: DataCard, lengths: Sequence[int]) -> None:
        self.name = name
        self.split: Split = split
        self.card = card
        self._lengths = lengths

    @classmethod
    def recognises(cls, data: str) -> bool:
        """Tell whether a name, or what lies at a path, is of this kind."""
        return data.startswith(f"{cls.kind}:")

    @classmethod
    def parse(cls, data: str) -> tuple[Path, Any]:
        """Read a name such as `ucf101:PATH?size=128&labels=1`: the folder, and the settings."""
        path, config = parse_settings(cls.settings, data.removeprefix(f"{cls.kind}:"))
        if not path:
            raise ValueError(
                f"{data!r}: needed {cls.kind}:PATH, or {cls.kind}:PATH?setting=value&..."
            )
        return Path(path), config

    @classmethod
    def open(cls, data: str, split: Split, how: Opening) -> Source:
        """Open a split of what it recognises; every kind that has a name does it in its own way."""
        raise ValueError(f"{data} cannot be opened by its name")

    @classmethod
    def inspect(cls, data: str) -> Findings:
        """Say what is there, odd or missing, before any split is opened."""
        return Findings()

    def oddities(self) -> list[str]:
        """Say what is odd about the episodes, but keeps nobody from using them."""
        return []

    @property
    def num_episodes(self) -> int:
        return len(self._lengths)

    @property
    def frame_size(self) -> int:
        """Numbers of a frame."""
        return 3 * self.card.height * self.card.width

    def num_frames(self, episode: int) -> int:
        return self._lengths[episode]

    def title(self, episode: int) -> str:
        """Name an episode, for messages."""
        return f"{self.name}, {self.split} episode {episode}"

    def identity(self, episode: int) -> tuple[str, dict[str, Path | Tensor | str | int | None]]:
        """Return what tells an episode from another, for the fingerprint of a run's data.

        Returns:
            Its name, the same wherever the collection lies; and by the name of each part its file,
            or its numbers as they are read. By default its length alone counts.
        """
        return f"episode {episode}", {}

    def prompt(self, episode: int) -> str:
        """Return what an episode shows, in words (ValueError: nobody has said it)."""
        raise ValueError(f"{self.name} has no prompts: only folders of episodes can have them")

    def read(self, episode: int, start: int, num_frames: int) -> Clip:
        """Return frames start .. start + num_frames - 1 of an episode.

        Raises:
            ValueError: there is no such episode, it has no such frames, or they cannot be decoded.
        """
        if not 0 <= episode < self.num_episodes:
            raise ValueError(f"episodes are 0 .. {self.num_episodes - 1}, got {episode}")
        length, stop = self.num_frames(episode), start + num_frames
        if not 0 <= start < stop <= length:
            raise ValueError(
                f"{self.title(episode)}: {self.frames_are} {start} .. {stop - 1} were asked for, "
                f"but it has {length}"
            )
        clip = self._read(episode, start, num_frames)
        height, width = clip.frames.shape[-2:]
        if not clip.encoded and (height, width) != (self.card.height, self.card.width):
            raise ValueError(
                f"{self.title(episode)}: frames {start} .. {stop - 1} are {height} x {width}, "
                f"those of {self.name} are {self.card.height} x {self.card.width}"
            )
        return clip

    @abstractmethod
    def _read(self, episode: int, start: int, num_frames: int) -> Clip:
        """Read frames that are there."""


def split_of(index: int, num_episodes: int) -> Split:
    """Return the split of an episode of a collection that names none: of ten, the fifth is watched
    in training and the tenth kept for tests; of fewer, the last but one and the last."""
    if num_episodes >= HELD_OUT:
        places: dict[int, Split] = {HELD_OUT // 2 - 1: "val", HELD_OUT - 1: "test"}
        return places.get(index % HELD_OUT, "train")
    from_end: dict[int, Split] = {1: "test", 2: "val"}
    return from_end.get(num_episodes - index, "train") if index else "train"


def find_kinds(base: type[Kind]) -> dict[str, type[Kind]]:
    """Find the classes of a base that have a `kind`, by that name, in all modules of this folder.

    Who writes a new one touches no list of them. Modules must load without optional packages.
    """
    package = sys.modules[__name__.rpartition(".")[0]]
    found: dict[str, type[Any]] = {}
    for entry in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for value in vars(importlib.import_module(entry.name)).values():
            if isinstance(value, type) and issubclass(value, base) and vars(value).get("kind"):
                found[vars(value)["kind"]] = value
    return found


def leave_out(name: str, split: Split, errors: Sequence[str], strict: bool) -> list[str]:
    """Warn of the episodes of a split that cannot be used, and return why, one by one.

    Args:
        name: of the collection.
        split: which part of it.
        errors: why each episode cannot be used; empty: it can.
        strict: stop at the first one.

    Raises:
        EmptySplit: the split has no episodes.
        ValueError: none of them can be used, or under `strict` one cannot.
    """
    wrong = [error for error in errors if error]
    if wrong and strict:
        raise ValueError(wrong[0])
    if wrong:
        logger.warning(
            "%s: left out %d of %d %s episodes, the first: %s",
            *(name, len(wrong), len(errors), split, wrong[0]),
        )
    if len(wrong) == len(errors):
        why = f"; the first was left out because {wrong[0]}" if wrong else ""
        raise (ValueError if wrong else EmptySplit)(f"{name}: split {split!r} has no episodes{why}")
    return wrong


def flags_to_name(words: Sequence[str]) -> list[str]:
    """Put flags that belong to a kind of clips into its name: of `lerobot:PATH --camera top` make
    `lerobot:PATH?camera=top`.

    Args:
        words: of a command line, in which one word is KIND:PATH or --data=KIND:PATH.
    """
    kinds, found = find_kinds(Source), list(words)
    for place, word in enumerate(words):
        kind = kinds.get(word.removeprefix("--data=").partition(":")[0])
        for name in kind.flags if kind else ():
            flag = f"--{name.replace('_', '-')}"
            at = next((i for i, one in enumerate(found) if one.partition("=")[0] == flag), None)
            if at is None:
                continue
            _, has_value, value = found[at].partition("=")
            if not has_value:
                value = found[at + 1] if at + 1 < len(found) else ""
            mark = "&" if "?" in found[place] else "?"
            found[place] += f"{mark}{name}={quote(value, safe='/:,.')}"
            # Left empty for now, so that places stay.
            found[at : at + 2 - bool(has_value)] = [""] * (2 - bool(has_value))
    return [word for word, before in zip(found, words, strict=False) if word or not before]


def parse_settings(settings: type[Any], data: str) -> tuple[str, Any]:
    """Read a name such as `PATH?size=128&labels=1`: the path, and what follows as settings.

    Args:
        settings: dataclass of what may follow; all of its fields have defaults.
        data: the name, without the kind before it.

    Raises:
        ValueError: it is not of this form, or the settings do not have it so.
    """
    path, _, query = data.partition("?")
    blank, hints = settings(), typing.get_type_hints(settings)
    values = {field.name: getattr(blank, field.name) for field in fields(settings)}
    try:
        given = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ValueError(f"{data!r}: needed ?setting=value&... ({error})") from error
    values |= {name: _value(hints.get(name, str), word) for name, word in given}
    return path, from_json(settings, values, data)


def _value(hint: Any, word: str) -> Any:
    try:
        if hint is bool:
            return WORDS[word.lower()]
        return hint(word) if hint in (int, float) else word
    except (ValueError, KeyError):
        # Refused with the setting's name and type.
        return word


def kind_of(data: str) -> type[Source]:
    """Return the kind of source that recognises a name or path."""
    kinds = find_kinds(Source)
    return next((kind for kind in kinds.values() if kind.recognises(data)), kinds[DEFAULT_KIND])


def open_source(
    data: str, split: Split, strict: bool = False, latents: bool = False, whole: bool = False
) -> Source:
    """Open a toy world, a folder of episodes, a published collection, or stored latents.

    Stored latents are opened as the videos that they were made of, unless `latents` says otherwise:
    only training reads them, everything else wants pixels.

    Args:
        data: "toy:32", "toy:64", path of a folder of episodes or of their latents, or
            "lerobot:PATH", "hdf5:PATH", "wds:PATH", "minecraft:PATH", "ucf101:PATH", "dmlab:PATH".
        split: which episodes.
        strict: stop at the first episode that cannot be used, instead of leaving it out.
        latents: give stored latents as they are.
        whole: episodes as they are: nothing cut out at random, published latents not scaled.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a name or folder that does not hold what it must.
    """
    return kind_of(data).open(data, split, Opening(strict=strict, latents=latents, whole=whole))
