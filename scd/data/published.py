"""Published collections, read in the files as they come: `KIND:PATH?setting=value&...`.

They come as hundreds of thousands of files that nobody changes. So every file is looked at once,
many side by side, and what was found out is kept in this user's cache under the file's size and
time of change.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from rich.progress import track

from scd.common.files import file_aside, read_json
from scd.common.runtime import cache_folder
from scd.data.source import DataCard, Opening, Source, leave_out
from scd.data.spaces import Split

WORKERS = 8
"""Files read side by side: most of the time goes into waiting for the disk."""

SHOWN_FROM = 2000
"""Files above which a bar shows how far the reading is."""

Files = tuple[Path, ...]
"""The files of one episode."""

Looked = TypeVar("Looked", bound=Any)
"""What is found out about files."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What was found out about an episode."""

    num_frames: int = 0
    height: int = 0
    width: int = 0
    fps: float = 0.0
    """Frames per second, on average; 0: not said."""
    error: str = ""
    """Why it cannot be used. Empty: it can."""


class PublishedSource(Source):
    """Episodes of one split; opening looks at each file once, and recalls it after.

    Args:
        root: the collection.
        split: which episodes.
        config: how it is read; None: as the settings' defaults say.
        strict: stop at the first episode that cannot be used, instead of leaving it out.
        whole: episodes as they are: nothing cut out at random, published latents not scaled.

    Raises:
        FileNotFoundError: no such folder, or a list is missing.
        ValueError: no episodes are left, or one cannot be used under `strict`.
    """

    header_depends_on_settings: ClassVar[bool] = True
    """Whether what `_look` finds out is another thing under other settings."""

    def __init__(
        self,
        root: Path,
        split: Split,
        config: Any = None,
        strict: bool = False,
        whole: bool = False,
    ) -> None:
        self.root, self.whole = root, whole
        self.config = self.settings() if config is None else config
        name = f"{self.kind}:{root.absolute()}"
        chosen = self._find(split)
        store = f"{name} {self.config}" if self.header_depends_on_settings else name
        headers = read_headers(store, chosen, self._look)
        errors = [header.error for header in headers]
        self.left_out = leave_out(name, split, errors, strict)
        kept = [pair for pair in zip(chosen, headers, strict=True) if not pair[1].error]
        self.episodes = [files for files, _ in kept]
        self.headers = [header for _, header in kept]
        super().__init__(name, split, self._card(), [self._length(one) for one in self.headers])

    @classmethod
    def open(cls, data: str, split: Split, how: Opening) -> PublishedSource:
        root, config = cls.parse(data)
        return cls(root, split, config, how.strict, how.whole)

    def title(self, episode: int) -> str:
        return str(self.episodes[episode][0])

    def identity(self, episode: int) -> tuple[str, dict[str, Any]]:
        file, *others = self.episodes[episode]
        parts = {"file": file} | {f"file {place}": one for place, one in enumerate(others, 2)}
        return os.path.relpath(file, self.root), parts

    @abstractmethod
    def _find(self, split: Split) -> Sequence[Files]:
        """List the files of each episode of a split, there or not."""

    @abstractmethod
    def _look(self, files: Files) -> Header:
        """Find out about an episode; ValueError or OSError: it cannot be used."""

    @abstractmethod
    def _card(self) -> DataCard:
        """Say what all episodes share."""

    def _length(self, header: Header) -> int:
        """Return how many frames of an episode are used."""
        return header.num_frames


def read_headers(
    name: str,
    episodes: Sequence[Files],
    look: Callable[[Files], Looked],
    kind: type[Looked] = Header,
) -> list[Looked]:
    """Find out about every episode, or recall it under this name.

    What is found out is a dataclass of what JSON can hold, with an `error`. What was found wrong is
    looked at again each time: the next one may find the disk well again.
    """
    digest = hashlib.blake2b(f"1 {name}".encode(), digest_size=16).hexdigest()
    store = cache_folder("headers") / f"{digest}.json"
    try:
        known: dict[str, Any] = read_json(store)
    except (OSError, ValueError):
        known = {}
    stamps = [[_stamp(file) for file in files] for files in episodes]
    keys = [str(files[0].absolute()) for files in episodes]
    todo = [
        index
        for index, (key, stamp) in enumerate(zip(keys, stamps, strict=True))
        if known.get(key, {}).get("stamp") != stamp or known[key]["header"]["error"]
    ]

    def find_out(index: int) -> Looked:
        try:
            return look(episodes[index])
        except (ValueError, OSError) as error:
            return kind(error=str(error))

    with ThreadPoolExecutor(WORKERS, "headers") as pool:
        found = pool.map(find_out, todo)
        if len(todo) >= SHOWN_FROM:
            found = track(found, f"reading the headers of {name}", total=len(todo))
        for index, header in zip(todo, found, strict=True):
            known[keys[index]] = {"stamp": stamps[index], "header": asdict(header)}
    if todo:
        _remember(store, known)
    return [kind(**known[key]["header"]) for key in keys]


def _stamp(file: Path) -> list[int]:
    try:
        status = file.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _remember(store: Path, known: dict[str, Any]) -> None:
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        with file_aside(store) as aside:
            aside.write_text(json.dumps(known), encoding="utf-8")
    except OSError:
        # A home that cannot be written costs time at the next start, nothing else.
        return
