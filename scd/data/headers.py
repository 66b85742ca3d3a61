"""What many files say about themselves: read once, side by side, and remembered.

Published collections come as hundreds of thousands of files that nobody changes. What was found out
about a file is kept in this user's cache, under the file's size and time of change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from scd.common.files import file_aside
from scd.common.runtime import cache_folder

WORKERS = 8
"""Files read side by side: most of the time goes into waiting for the disk."""

SHOWN_FROM = 2000
"""Files above which a bar shows how far the reading is."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What was found out about an episode."""

    num_frames: int = 0
    """Frames of the episode."""
    height: int = 0
    """Rows of a frame, in pixels."""
    width: int = 0
    """Columns of a frame, in pixels."""
    fps: float = 0.0
    """Frames per second, on average; 0: not said."""
    error: str = ""
    """Why it cannot be used. Empty: it can."""


Files = tuple[Path, ...]
"""The files of one episode."""


def read_headers(
    name: str, episodes: Sequence[Files], read: Callable[[Files], Header]
) -> list[Header]:
    """Find out about every episode, or recall it.

    What was found wrong is looked at again each time: the next one may find the disk well again.

    Args:
        name: of the collection and of what is read; other names are remembered apart.
        episodes: files of each.
        read: finds out about one; raises ValueError or OSError where it cannot be used.
    """
    store = _store(name)
    known: dict[str, Any] = _recall(store)
    stamps = [_stamp(files) for files in episodes]
    keys = [str(files[0].absolute()) for files in episodes]
    todo = [
        index
        for index, (key, stamp) in enumerate(zip(keys, stamps, strict=True))
        if known.get(key, {}).get("stamp") != stamp or known[key]["header"]["error"]
    ]

    def find_out(index: int) -> Header:
        try:
            return read(episodes[index])
        except (ValueError, OSError) as error:
            return Header(error=str(error))

    with ThreadPoolExecutor(WORKERS, "headers") as pool:
        found = pool.map(find_out, todo)
        if len(todo) >= SHOWN_FROM:
            found = track(found, f"reading the headers of {name}", total=len(todo))
        for index, header in zip(todo, found, strict=True):
            known[keys[index]] = {"stamp": stamps[index], "header": asdict(header)}
    if todo:
        _remember(store, known)
    return [Header(**known[key]["header"]) for key in keys]


def _store(name: str) -> Path:
    digest = hashlib.blake2b(f"1 {name}".encode(), digest_size=16).hexdigest()
    return cache_folder("headers") / f"{digest}.json"


def _stamp(files: Files) -> list[list[int]]:
    stamps = []
    for file in files:
        try:
            status = file.stat()
            stamps.append([status.st_size, status.st_mtime_ns])
        except OSError:
            stamps.append([])
    return stamps


def _recall(store: Path) -> dict[str, Any]:
    try:
        return json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _remember(store: Path, known: dict[str, Any]) -> None:
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        with file_aside(store) as aside:
            aside.write_text(json.dumps(known), encoding="utf-8")
    except OSError:
        # A home that cannot be written costs time at the next start, nothing else.
        return
