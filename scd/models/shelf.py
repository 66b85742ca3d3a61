"""The worlds that come with the package, as `scd worlds` lists them: what each is, and its size."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from scd.common.config import to_json
from scd.models.about import read_about
from scd.models.checkpoint import read_world_parts
from scd.models.clips import clips_in
from scd.models.names import PICTURE_FILE, WORLDS, shipped_names

LOOPS = 0
"""Of a moving picture: for ever."""


@dataclass(frozen=True, kw_only=True)
class ShippedWorld:
    """One of them."""

    name: str
    """By which commands find it."""
    title: str
    """What it is, by its card."""
    trained: str
    """How, in words that go on after "trained"."""
    folder: str
    """Where it lies."""
    picture: str
    """File of its moving picture; empty: it has none."""
    megabytes: float
    """Of all its files, in millions of bytes."""
    height: int
    """Rows of a frame."""
    width: int
    """Columns of a frame."""
    fps: float
    """Frames per second at which it is meant to be watched."""
    num_steps: int
    """Denoising steps per frame."""
    actions: tuple[str, ...]
    """Names of its actions."""


def shipped_worlds() -> list[ShippedWorld]:
    """Return the worlds of this installation, the best first.

    Raises:
        OSError, ValueError: one of them has a part that is missing, damaged or of another version.
    """
    return [read_shipped(WORLDS / name) for name in shipped_names()]


def read_shipped(folder: Path) -> ShippedWorld:
    """Read what a world's folder says of it; arguments and errors as `shipped_worlds`."""
    parts, about = read_world_parts(folder), read_about(folder)
    card, picture = parts["card"], folder / PICTURE_FILE
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return ShippedWorld(
        name=folder.name,
        title=about.title,
        trained=about.trained,
        folder=str(folder),
        picture=str(picture) if picture.is_file() else "",
        megabytes=round(num_bytes / 1e6, 1),
        height=card.height,
        width=card.width,
        fps=card.fps,
        num_steps=parts["sampling"].num_steps,
        actions=tuple(card.action_names),
    )


def listing(worlds: list[ShippedWorld]) -> str:
    """Say for people which worlds there are."""
    if not worlds:
        return f"this installation has no worlds of its own (they would be in {WORLDS})"
    lines = []
    for one in worlds:
        size = f"{one.width}x{one.height}, {one.num_steps} steps a frame"
        lines += [
            f"{one.name:<14}{one.title}",
            f"{'':<14}{one.megabytes:.1f} MB, {size}; {', '.join(one.actions)}",
            *([f"{'':<14}trained {one.trained}"] if one.trained else []),
            *([f"{'':<14}{one.picture}"] if one.picture else []),
        ]
    return "\n".join([*lines, "", "scd play NAME opens one, scd demo NAME streams it and reports"])


def as_json(worlds: list[ShippedWorld]) -> list[dict[str, object]]:
    """Return the same for programs."""
    return [{k: v for k, v in to_json(one).items() if k != "kind"} for one in worlds]


def moving_picture(folder: Path) -> bytes | None:
    """Return a world's moving picture as WebP: its file, or a clip that it carries; None: neither.

    Raises:
        OSError, ValueError: its clips are damaged.
    """
    path = folder / PICTURE_FILE
    if path.is_file():
        return path.read_bytes()
    clips = clips_in(folder, read_world_parts(folder)["card"])
    return None if clips is None else animated(clips.frames[0], clips.fps)


def animated(frames: torch.Tensor, fps: float) -> bytes:
    """Write 8-bit frames [t 3 h w] as a lossy moving WebP."""
    pictures = [Image.fromarray(one.movedim(0, -1).contiguous().numpy()) for one in frames]
    file = io.BytesIO()
    pictures[0].save(
        file,
        "WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / fps),
        loop=LOOPS,
        quality=80,
        method=4,
    )
    return file.getvalue()
