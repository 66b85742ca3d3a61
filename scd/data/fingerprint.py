"""What tells the data of a run from other data, found out without decoding it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scd.common.config import differences, from_json, shown, to_json
from scd.common.files import read_json, refuse_pipe
from scd.data.source import DataCard, Source

FORMAT = 1
"""Of the file that keeps a fingerprint."""

END_BYTES = 2**14
"""Bytes of a file that are hashed at each of its ends, beside its size: containers keep the sizes
of all their frames at one of them, so that hardly anything changes without a trace."""

NUM_SHOWN = 3
"""Episodes that a message names."""


def fingerprint(source: Source, prompts: bool = False) -> dict[str, Any]:
    """Return what tells the episodes of a source from others, as JSON; the same wherever they lie.

    Args:
        source: of the episodes.
        prompts: whether their prompts count (ValueError: one has none).

    Returns:
        The card; and of each episode, in order, its name and marks: its length, and what
        `Source.identity` says.
    """
    known: dict[Any, str] = {}
    episodes = []
    for episode in range(source.num_episodes):
        name, parts = source.identity(episode)
        marks = {"frames": str(source.num_frames(episode))}
        for what, part in parts.items():
            # Several episodes may lie in one file.
            mark = known.get(part) if isinstance(part, Path) else None
            marks[what] = mark or _mark(part)
            if isinstance(part, Path):
                known[part] = marks[what]
        if prompts:
            marks["prompt"] = _mark(source.prompt(episode))
        episodes.append([name, marks])
    return {"format": FORMAT, "card": to_json(source.card), "episodes": episodes}


def _mark(part: Path | Tensor | str | int | None) -> str:
    if isinstance(part, Path):
        try:
            refuse_pipe(part)
            with part.open("rb") as file:
                size = part.stat().st_size
                data = file.read(END_BYTES)
                file.seek(max(size - END_BYTES, 0))
                return _digest(f"{size} ".encode() + data + file.read(END_BYTES))
        except (OSError, ValueError):
            return "unreadable"
    if isinstance(part, Tensor):
        data = part.detach().cpu().contiguous().numpy().tobytes()
        return _digest(f"{part.dtype} {list(part.shape)} ".encode() + data)
    return "" if part is None else _digest(str(part).encode())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()


@dataclass(frozen=True)
class Kept:
    """A fingerprint as it was written."""

    card: Mapping[str, Any]
    episodes: Sequence[tuple[str, Mapping[str, str]]]


def read_fingerprint(path: Path) -> Kept:
    """Read what `fingerprint` returned (ValueError: the file is damaged)."""
    values = read_json(path, FORMAT)
    try:
        episodes = [(str(name), dict(marks)) for name, marks in values["episodes"]]
        # Read as a card, so that what a newer scd says of every card is in this one too.
        card = from_json(DataCard, values["card"], f"{path}: card")
        return Kept(to_json(card), episodes)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: needed card and episodes, got {shown(values)}") from error


def changes(before: Kept, now: Mapping[str, Any]) -> list[str]:
    """Say in words in what data differs from that of a fingerprint; nothing: in nothing.

    Args:
        before: what was kept.
        now: what `fingerprint` returns.
    """
    found = [f"its card ({one})" for one in differences(before.card, now["card"])[:1]]
    old, new = _numbered(before.episodes), _numbered(now["episodes"])
    if len(old) != len(new):
        found.append(f"it has {len(new)} episodes and had {len(old)}")
    changed = [
        f"{name} ({', '.join(sorted(_differing(old[name], new[name])))})"
        for name in old
        if name in new and old[name] != new[name]
    ]
    for words, names in (
        ("gone or unreadable", [name for name in old if name not in new]),
        ("new", [name for name in new if name not in old]),
        ("changed", changed),
    ):
        if names:
            more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
            found.append(f"{words}: {', '.join(names[:NUM_SHOWN])}{more}")
    if not found and list(old) != list(new):
        found.append("its episodes are in another order")
    return found


def _numbered(episodes: Sequence[Any]) -> dict[str, Mapping[str, str]]:
    """Return marks by names, of which those that come again are told apart."""
    seen: Counter[str] = Counter()
    named = {}
    for name, marks in episodes:
        seen[name] += 1
        named[name if seen[name] == 1 else f"{name} (again, {seen[name]})"] = marks
    return named


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> set[str]:
    return {what for what in {*one, *other} if one.get(what) != other.get(what)}
