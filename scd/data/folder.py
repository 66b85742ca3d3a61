"""Clips from a folder of videos and actions on disk."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import get_args

import torch

from scd.data.clip import Clip, check_actions, pixels_to_frames
from scd.data.manifest import (
    CARD_FILE,
    MANIFEST_FILE,
    Entry,
    read_actions,
    read_card,
    read_manifest,
)
from scd.data.source import EmptySplit, Findings, Opening, Source
from scd.data.spaces import Split
from scd.data.video import FrameIndex, index_frames, probe_video, read_video

logger = logging.getLogger(__name__)


class FolderSource(Source):
    """Episodes of one split of a folder; opening reads all headers and actions, no pictures.

    Args:
        path: the folder.
        split: which episodes.
        strict: stop at the first video that cannot be read, instead of leaving it out.

    Raises:
        FileNotFoundError: no such folder, or its card or manifest is missing.
        ValueError: a card, manifest or actions file that does not hold what it must, frames of
            another size than the card's, an unreadable video under `strict`, or no episodes left.
    """

    kind = "folder"
    origin = "scd record, scd encode, or docs/your-clips.md"

    def __init__(self, path: Path | str, split: Split, strict: bool = False) -> None:
        self.path = Path(path)
        self.card = read_card(self.path)
        manifest = read_manifest(self.path)
        chosen = [entry for entry in manifest if entry.split == split]
        self._entries: list[Entry] = []
        self._actions: list[torch.Tensor | None] = []
        broken: list[str] = []
        for entry in chosen:
            try:
                self._check_video(entry)
            except _Unreadable as error:
                if strict:
                    raise ValueError(str(error)) from error
                broken.append(entry.video)
                continue
            self._entries.append(entry)
            self._actions.append(self._read_actions(entry))
            self._check_label(entry)
        if broken:
            logger.warning(
                "%s: left out %d of %d %s episodes whose video cannot be read: %s",
                *(self.path, len(broken), len(chosen), split, ", ".join(broken)),
            )
        if not self._entries:
            counts = {
                name: sum(entry.split == name for entry in manifest) for name in get_args(Split)
            }
            raise (ValueError if chosen else EmptySplit)(
                f"{self.path}: split {split!r} has no readable episodes; in the manifest: {counts}"
            )
        self._indices: dict[int, FrameIndex] = {}
        lengths = [entry.num_frames for entry in self._entries]
        super().__init__(str(self.path), split, self.card, lengths)

    @classmethod
    def recognises(cls, data: str) -> bool:
        return (Path(data) / CARD_FILE).is_file()

    @classmethod
    def open(cls, data: str, split: Split, how: Opening) -> FolderSource:
        return cls(data, split, how.strict)

    @classmethod
    def inspect(cls, data: str) -> Findings:
        needed = (Path(data) / CARD_FILE, Path(data) / MANIFEST_FILE)
        return Findings(missing=[str(path) for path in needed if not path.is_file()])

    def title(self, episode: int) -> str:
        return str(self.path / self._entries[episode].video)

    def _read(self, episode: int, start: int, num_frames: int) -> Clip:
        entry, actions = self._entries[episode], self._actions[episode]
        video = self.path / entry.video
        if episode not in self._indices:
            self._indices[episode] = index_frames(video)
        pixels = read_video(video, start, num_frames, self._indices[episode])
        return Clip(
            frames=pixels_to_frames(torch.from_numpy(pixels)),
            actions=None if actions is None else actions[start : start + num_frames],
            label=entry.label,
            fps=self.card.fps,
        )

    def prompt(self, episode: int) -> str:
        """Return the `prompt` of the manifest, or the .txt beside the video."""
        entry = self._entries[episode]
        beside = (self.path / entry.video).with_suffix(".txt")
        if entry.prompt is not None:
            return entry.prompt
        if not beside.is_file():
            raise ValueError(
                f"{self.path / entry.video} has no prompt: needed the field prompt in "
                f"{MANIFEST_FILE}, or {beside.name} beside it"
            )
        return beside.read_text(encoding="utf-8").strip()

    def _check_video(self, entry: Entry) -> None:
        try:
            info = probe_video(self.path / entry.video)
        except (ValueError, FileNotFoundError) as error:
            raise _Unreadable(str(error)) from error
        if info.num_frames < entry.num_frames:
            raise _Unreadable(
                f"{self.path / entry.video}: has {info.num_frames} frames, "
                f"the manifest says {entry.num_frames}"
            )
        if (info.height, info.width) != (self.card.height, self.card.width):
            raise ValueError(
                f"{self.path / entry.video}: frames are {info.height} x {info.width}, "
                f"{CARD_FILE} says {self.card.height} x {self.card.width}"
            )

    def _read_actions(self, entry: Entry) -> torch.Tensor | None:
        spec = self.card.conditions
        if not spec.has_actions:
            return None
        if entry.actions is None:
            raise ValueError(
                f"{self.path / MANIFEST_FILE}: {entry.video} has no actions, "
                f"but {CARD_FILE} says that frames have actions"
            )
        path = self.path / entry.actions
        actions = read_actions(path)
        if len(actions) != entry.num_frames:
            raise ValueError(
                f"{path}: {entry.num_frames} frames need {entry.num_frames} actions, "
                f"got {len(actions)}"
            )
        if actions.ndim != (1 if spec.num_actions else 2):
            raise ValueError(
                f"{path}: actions must be integers [t] or floats [t, {spec.action_dim}], "
                f"got {actions.dtype} {list(actions.shape)}"
            )
        try:
            tensor = torch.from_numpy(actions)
            check_actions(spec, tensor)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return tensor

    def _check_label(self, entry: Entry) -> None:
        num_labels = self.card.conditions.num_labels
        if (entry.label is None) != (num_labels == 0) or not (
            0 <= (entry.label or 0) < max(num_labels, 1)
        ):
            raise ValueError(
                f"{self.path / MANIFEST_FILE}: {entry.video} has label {entry.label}, "
                f"{CARD_FILE} says num_labels = {num_labels}"
            )


class _Unreadable(Exception):
    """A video that is missing, cut off, or no video at all."""
