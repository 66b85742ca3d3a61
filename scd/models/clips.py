"""Clips that a world carries to begin streams from, in a file beside its weights."""

from __future__ import annotations

import io
import operator
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import SupportsIndex, overload

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from scd.data.clip import Clip, check_actions, pixels_to_frames
from scd.data.source import DataCard

CLIPS_FILE = "clips.safetensors"
"""Beside the weights of a world."""

SHEET, SHEET_FORMAT = "sheet", "PNG"
"""Tensor of that file with the bytes of a picture, and what kind of picture. Files that have the
pixels themselves, as "frames", are read too."""

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Types in which ids of actions are stored."""


@dataclass(frozen=True, kw_only=True)
class Clips(Sequence[Clip]):
    """Held-out clips to begin a stream from: a sequence of `Clip`, kept as 8-bit pixels."""

    frames: UInt8[Tensor, "n t 3 h w"]
    """Pixels, 0 to 255."""
    actions: Int[Tensor, "n t"] | Float[Tensor, "n t a"]
    """Action i led to frame i: ids, or vectors."""
    fps: float = 10.0
    """Frames per second at which they are meant to be watched."""

    @staticmethod
    def none(height: int, width: int) -> Clips:
        """Return no clips, of a size."""
        return Clips(
            frames=torch.zeros(0, 0, 3, height, width, dtype=torch.uint8),
            actions=torch.zeros(0, 0, dtype=torch.long),
        )

    def __len__(self) -> int:
        return len(self.frames)

    @overload
    def __getitem__(self, number: SupportsIndex) -> Clip: ...

    @overload
    def __getitem__(self, number: slice) -> Clips: ...

    def __getitem__(self, number: SupportsIndex | slice) -> Clip | Clips:
        """Return one clip, counted from 0, or some of them.

        Raises:
            IndexError: there is no such clip.
        """
        if isinstance(number, slice):
            return replace(self, frames=self.frames[number], actions=self.actions[number])
        place = operator.index(number)
        if not -len(self) <= place < len(self):
            there = f"0 .. {len(self) - 1}" if len(self) else "none: begin from frames of yours"
            raise IndexError(f"this world carries no clip {place}; clips are {there}")
        actions = self.actions[place]
        actions = actions.float() if actions.is_floating_point() else actions.long()
        return Clip(frames=self.pixels(place), actions=actions, fps=self.fps)

    def __iter__(self) -> Iterator[Clip]:
        return (self[number] for number in range(len(self)))

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors of their file: actions, and all frames as one PNG, one below the
        other, which loses nothing and is a fraction of their bytes."""
        rows = self.frames.movedim(-3, -1).flatten(0, 2).contiguous()
        file = io.BytesIO()
        Image.fromarray(rows.numpy()).save(file, SHEET_FORMAT, optimize=True)
        sheet = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        return {SHEET: sheet, "actions": self.actions.contiguous()}

    def pixels(self, number: int, num_frames: int | None = None) -> Float[Tensor, "t 3 h w"]:
        """Return frames of one clip in [-1, 1]; None: all."""
        return pixels_to_frames(self.frames[number, :num_frames].movedim(-3, -1))


def clips_in(folder: Path, card: DataCard) -> Clips | None:
    """Read the clips of a world's own folder; None: it carries none.

    Args:
        folder: of the world.
        card: of the world, which the clips have to fit.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    path = folder / CLIPS_FILE
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        actions = tensors["actions"]
        frames = _unpacked(tensors, card) if SHEET in tensors else tensors["frames"]
        _check(frames, actions, card)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no clips: {error}") from error
    return Clips(frames=frames, actions=actions, fps=card.fps)


def _unpacked(tensors: Mapping[str, Tensor], card: DataCard) -> UInt8[Tensor, "n t 3 h w"]:
    """Return the frames of a sheet (ValueError: it is damaged, or of another size)."""
    sheet, shape = tensors[SHEET], tensors["actions"].shape[:2]
    if sheet.dtype != torch.uint8 or sheet.ndim != 1 or len(shape) != 2:
        raise ValueError(
            f"needed the bytes of a {SHEET_FORMAT} file and actions of clips and frames, got "
            f"{sheet.dtype} {list(sheet.shape)} and {list(tensors['actions'].shape)}"
        )
    wanted = (card.width, shape.numel() * card.height)
    try:
        with Image.open(io.BytesIO(sheet.numpy().tobytes()), formats=[SHEET_FORMAT]) as picture:
            if picture.mode != "RGB" or picture.size != wanted:
                raise ValueError(
                    f"needed an RGB picture of {wanted} pixels for {list(shape)} frames, got "
                    f"{picture.mode} of {picture.size}"
                )
            pixels = np.array(picture)
    except (OSError, SyntaxError, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(f"its {SHEET_FORMAT} is damaged: {error}") from error
    return torch.from_numpy(pixels).unflatten(0, (*shape, card.height)).movedim(-1, -3)


def _check(frames: Tensor, actions: Tensor, card: DataCard) -> None:
    """Refuse what are no clips of a world (ValueError)."""
    size = (3, card.height, card.width)
    if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[2:] != size:
        raise ValueError(
            f"frames must be bytes of shape [n, t, {', '.join(map(str, size))}], got "
            f"{frames.dtype} {list(frames.shape)}"
        )
    spec = card.conditions
    is_kind = actions.is_floating_point() if spec.action_dim else actions.dtype in INTEGERS
    entries = (spec.action_dim,) if spec.action_dim else ()
    if not is_kind or actions.shape != (*frames.shape[:2], *entries):
        wanted = f"{spec.action_dim} numbers" if spec.action_dim else "an integer"
        raise ValueError(
            f"needed {wanted} for each of {list(frames.shape[:2])} frames as its action, got "
            f"{actions.dtype} {list(actions.shape)}"
        )
    if not frames.numel():
        raise ValueError(f"needed one or more, got {list(frames.shape)}")
    if spec.has_actions:
        check_actions(spec, actions.float() if spec.action_dim else actions.long())
