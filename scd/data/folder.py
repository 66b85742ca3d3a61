"""Clips from a folder of videos and actions on disk: `PATH`, or `PATH?fps=16` at another rate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from scd.common.files import read_text
from scd.data.clip import Clip, check_actions, pixels_to_frames
from scd.data.frame_rate import count_rates, frames_at, is_same_rate, pool_actions
from scd.data.manifest import (
    CARD_FILE,
    MANIFEST_FILE,
    Entry,
    read_actions,
    read_card,
    read_manifest,
)
from scd.data.source import EmptySplit, Findings, Opening, Source, parse_settings
from scd.data.spaces import Split
from scd.data.video import VideoInfo, probe_video, read_frames

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """How a folder is read: what may follow the `?` of its name."""

    fps: float = 0.0
    """Frames per second to which every video and its actions are brought, as
    `scd.data.frame_rate` tells; 0: all frames, of videos at the rate that the card says."""

    def __post_init__(self) -> None:
        if not 0 <= self.fps < float("inf"):
            raise ValueError(f"fps must be a finite number of 0 or more, got {self.fps}")


class FolderSource(Source):
    """Episodes of one split of a folder; opening reads all headers and actions, no pictures.

    Args:
        path: the folder.
        split: which episodes.
        strict: stop at the first video that cannot be read, instead of leaving it out.
        fps: as in `FolderConfig`.

    Raises:
        FileNotFoundError: no such folder, or its card or manifest is missing.
        ValueError: a card, manifest or actions file that does not hold what it must, frames of
            another size or rate than the card's, an unreadable video under `strict`, or no episodes
            left.
    """

    kind = "folder"
    origin = "scd record, scd encode, or docs/your-clips.md"

    def __init__(
        self, path: Path | str, split: Split, strict: bool = False, fps: float = 0.0
    ) -> None:
        self.path = Path(path)
        self.card = read_card(self.path)
        manifest = read_manifest(self.path)
        chosen = [entry for entry in manifest if entry.split == split]
        self._entries: list[Entry] = []
        self._actions: list[torch.Tensor | None] = []
        self._rates: list[float] = []
        broken: list[str] = []
        self.left_out = unreadable = []
        for entry in chosen:
            try:
                # A rate that no file says is taken to be the card's.
                rate = self._check_video(entry).fps or self.card.fps
            except _Unreadable as error:
                if strict:
                    raise ValueError(str(error)) from error
                broken.append(entry.video)
                unreadable.append(str(error))
                continue
            self._entries.append(entry)
            self._rates.append(rate)
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
        if not fps:
            self._refuse_other_rates()
        self._frames = [self._frames_of(number, fps) for number in range(len(self._entries))]
        name = f"{self.path}?fps={fps:g}" if fps else str(self.path)
        card = replace(self.card, fps=fps or self.card.fps)
        super().__init__(name, split, card, [len(frames) for frames in self._frames])

    @classmethod
    def recognises(cls, data: str) -> bool:
        return (Path(data.partition("?")[0]) / CARD_FILE).is_file()

    @classmethod
    def open(cls, data: str, split: Split, how: Opening) -> FolderSource:
        path, config = parse_settings(FolderConfig, data)
        return cls(path, split, how.strict, config.fps)

    @classmethod
    def inspect(cls, data: str) -> Findings:
        path = Path(data.partition("?")[0])
        needed = (path / CARD_FILE, path / MANIFEST_FILE)
        return Findings(missing=[str(file) for file in needed if not file.is_file()])

    def oddities(self) -> list[str]:
        changed = [rate for rate in self._rates if not is_same_rate(rate, self.card.fps)]
        if not changed:
            return []
        held = sum(rate < self.card.fps for rate in changed)
        again = f", {held} of them by showing frames again" if held else ""
        return [
            f"{len(changed)} of {len(self._rates)} videos ({count_rates(changed)} frames/s) are "
            f"brought to {self.card.fps:g} frames/s{again}"
        ]

    def title(self, episode: int) -> str:
        return str(self.path / self._entries[episode].video)

    def identity(self, episode: int) -> tuple[str, dict[str, Any]]:
        entry = self._entries[episode]
        parts = {"video": self.path / entry.video, "actions": self._actions[episode]}
        return entry.video, parts | {"label": entry.label}

    def _read(self, episode: int, start: int, num_frames: int) -> Clip:
        entry, actions = self._entries[episode], self._actions[episode]
        video, numbers = self.path / entry.video, self._frames[episode][start : start + num_frames]
        pixels = read_frames(video, numbers)
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
        return read_text(beside).strip()

    def _refuse_other_rates(self) -> None:
        other = [
            (rate, entry.video)
            for rate, entry in zip(self._rates, self._entries, strict=True)
            if not is_same_rate(rate, self.card.fps)
        ]
        if other:
            raise ValueError(
                f"{self.path}: {CARD_FILE} says {self.card.fps:g} frames/s, but of "
                f"{len(self._rates)} videos {count_rates(rate for rate, _ in other)} frames/s, the "
                f"first is {other[0][1]}. Correct the card, or bring all to one rate by the name "
                f"'{self.path}?fps={self.card.fps:g}'"
            )

    def _frames_of(self, episode: int, fps: float) -> Sequence[int]:
        """Return the numbers of the frames to use of an episode, and pool its actions likewise."""
        length, rate = self._entries[episode].num_frames, self._rates[episode]
        if not fps or is_same_rate(rate, fps):
            return range(length)
        frames, actions = frames_at(length, rate, fps), self._actions[episode]
        if actions is not None:
            pooled = pool_actions(actions.numpy(), frames, self.card.conditions.counts)
            self._actions[episode] = torch.from_numpy(pooled)
        return frames.tolist()

    def _check_video(self, entry: Entry) -> VideoInfo:
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
        return info

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
