"""TECO-Minecraft and DMLab in TECO's layout: folders, lists, splits, and the files of an episode.

    train/0/1234.mp4, train/0/1234.npz     Minecraft: a video, and its `actions` beside it
    train/0/1234.npz                       DMLab: `video` [300 64 64 3] and `actions` [300]
    training/..., minecraft_train.json     FAR's copy: the same files, and lists of them
    training/...pt                         FAR's latents, [t c h w], before they are scaled

Latents may also be .npy, or `latents` in the .npz that holds the actions. Held-out episodes lie
below test/ or validation/; the order of FAR's lists is that of the evaluation.

Action i is taken to have led from frame i-1 to frame i, as FAR takes it.
"""

from __future__ import annotations

import pickle
import zipfile
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8

from scd.common.config import at_least
from scd.common.files import read_json
from scd.data.clip import Clip, check_actions, pixels_to_frames
from scd.data.manifest import DAMAGED, read_actions, read_array
from scd.data.published import Files, Header, PublishedSource
from scd.data.source import DataCard, Findings
from scd.data.spaces import ConditionSpec, Split
from scd.data.video import probe_video, read_video

TRAIN_FOLDERS = ("train", "training")
"""Names of the folder to learn from: TECO's, FAR's."""

HELD_OUT_FOLDERS = ("test", "validation", "val")
"""Names of the folder that is held out."""

LATENT_SCALE = 0.2889
"""By which the published latents are multiplied to be of unit scale. Source: FAR's settings."""

LATENT_ENDINGS = (".pt", ".npy")
"""Files that hold nothing but the latents of an episode."""

LATENT_KEYS = ("latents", "latent")
"""Names of latents in an .npz that holds the actions too."""


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
        at_least(1, size=self.size, frames=self.frames, actions=self.actions)


@dataclass(frozen=True, kw_only=True)
class MinecraftConfig(TecoConfig):
    """What is expected of TECO-Minecraft."""

    size: int = 128
    """Height and width of a frame, in pixels."""


@dataclass(frozen=True, kw_only=True)
class DMLabConfig(TecoConfig):
    """What is expected of DMLab."""

    size: int = 64
    """Height and width of a frame, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The episodes of one folder, if it is there, before any is looked at."""

    folder: Path | None
    list_file: Path | None
    """List that gives the order; None: there is none, and names are sorted."""
    episodes: tuple[Files, ...] = ()
    """Files of each, there or not: pictures first, then actions if they are apart."""


class TecoSource(PublishedSource):
    """Episodes in TECO's layout; `val` and `test` share the held-out folder, whose last quarter
    is `val`."""

    list_keys: ClassVar[tuple[str, ...]]
    """Names of the paths in FAR's lists, pictures first."""
    num_published: ClassVar[dict[Split, int]] = {}
    """Episodes of the published collection, where they are known."""

    @classmethod
    def list_episodes(cls, root: Path, split: Split) -> Listing:
        """Find the folder that holds a split, and its episodes, by FAR's list if there is one."""
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; {cls.origin}")
        is_train = split == "train"
        names = TRAIN_FOLDERS if is_train else HELD_OUT_FOLDERS
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        path = root / f"{cls.kind}_{'train' if is_train else 'val'}.json"
        if path.is_file():
            listed = tuple(_read_list(root, path, cls.list_keys))
            return Listing(folder=folder, list_file=path, episodes=listed)
        found = () if folder is None else tuple(cls._in_folder(sorted(folder.rglob("*"))))
        return Listing(folder=folder, list_file=None, episodes=found)

    @classmethod
    def inspect(cls, data: str) -> Findings:
        findings = Findings()
        root, _ = cls.parse(data)
        parts: tuple[tuple[Split, str], ...] = (
            ("train", "train/ or training/"),
            ("test", "test/ or validation/"),
        )
        for split, folders in parts:
            try:
                listing = cls.list_episodes(root, split)
            except (ValueError, OSError) as error:
                findings.missing.append(str(error))
                continue
            if listing.folder is None and not listing.episodes:
                findings.missing.append(f"{root}: no folder {folders}")
            elif not listing.episodes:
                findings.missing.append(f"{listing.folder}: holds no episodes with their actions")
            gone = [file for files in listing.episodes for file in files if not file.is_file()]
            if gone:
                where = "is in the list" if listing.list_file else "belongs to a video"
                findings.notes.append(
                    f"{len(gone)} files are not there; the first {where}: {gone[0]}"
                )
            if listing.list_file is None and split == "test":
                findings.notes.append(
                    f"no {cls.kind}_val.json: held-out episodes are sorted by name, so the first "
                    "256 are other ones than FAR's"
                )
            expected = cls.num_published.get(split, len(listing.episodes))
            if listing.episodes and len(listing.episodes) != expected:
                findings.notes.append(
                    f"{split}: {len(listing.episodes):,} episodes, FAR learnt from {expected:,}"
                )
        return findings

    @classmethod
    @abstractmethod
    def _in_folder(cls, files: Sequence[Path]) -> Sequence[Files]:
        """Pick the files of each episode out of all files of a folder."""

    @abstractmethod
    def _frames(self, files: Files, start: int, num_frames: int) -> Float[torch.Tensor, "t c h w"]:
        """Read frames of an episode."""

    def _is_encoded(self, files: Files) -> bool:
        """Tell whether an episode is latents."""
        return False

    def _find(self, split: Split) -> Sequence[Files]:
        episodes = self.list_episodes(self.root, split).episodes
        num_test = len(episodes) - len(episodes) // 4
        return {"train": episodes, "test": episodes[:num_test], "val": episodes[num_test:]}[split]

    def _card(self) -> DataCard:
        return DataCard(
            height=self.config.size,
            width=self.config.size,
            fps=self.config.fps,
            conditions=ConditionSpec(num_actions=self.config.actions),
            action_names=tuple(f"action {index}" for index in range(self.config.actions)),
        )

    def _checked(self, header: Header, files: Files) -> Header:
        """Return a header, with an error if the episode is not as expected."""
        size, num_actions = self.config.size, len(self._actions(files[-1]))
        if num_actions < header.num_frames:
            return Header(
                error=f"{files[-1]}: {header.num_frames} frames need as many actions, "
                f"got {num_actions}"
            )
        if (header.height, header.width) != (size, size):
            return Header(
                error=f"{files[0]}: frames are {header.height} x {header.width}, needed {size}"
            )
        if header.num_frames < self.config.frames:
            return Header(
                error=f"{files[0]}: has {header.num_frames} frames, needed {self.config.frames}"
            )
        return header

    def _actions(self, path: Path) -> np.ndarray:
        actions = read_actions(path)
        if actions.ndim != 1:
            raise ValueError(f"{path}: needed one action per frame, got {list(actions.shape)}")
        try:
            check_actions(ConditionSpec(num_actions=self.config.actions), torch.from_numpy(actions))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; ?actions=N says how many there are") from error
        return actions

    def _read(self, episode: int, start: int, num_frames: int) -> Clip:
        files = self.episodes[episode]
        actions = self._actions(files[-1])[start : start + num_frames]
        return Clip(
            frames=self._frames(files, start, num_frames),
            actions=torch.from_numpy(actions),
            fps=self.config.fps,
            encoded=self._is_encoded(files),
        )


class MinecraftSource(TecoSource):
    """Videos of TECO-Minecraft; or published latents, which only `scd encode` can use (`whole`)."""

    kind = "minecraft"
    origin = (
        "videos: https://archive.org/details/minecraft_marsh_dataset_aa .. _ak (TECO, 210 GB), or "
        "the data set guyuchao/Minecraft on huggingface.co, its shard-*.tar unpacked; latents: "
        "guyuchao/Minecraft_Latent"
    )
    settings = MinecraftConfig
    list_keys = ("video_path", "latent_path", "action_path")
    num_published: ClassVar[dict[Split, int]] = {"train": 194_051}
    """Source: paper (evaluation)."""

    @classmethod
    def _in_folder(cls, files: Sequence[Path]) -> Sequence[Files]:
        pictures = [file for file in files if file.suffix == ".mp4"]
        pictures = pictures or [file for file in files if file.suffix in LATENT_ENDINGS]
        if pictures:
            return [(file, file.with_suffix(".npz")) for file in pictures]
        return [(file,) for file in files if file.suffix == ".npz"]

    def _is_encoded(self, files: Files) -> bool:
        return files[0].suffix != ".mp4"

    def _find(self, split: Split) -> Sequence[Files]:
        episodes = super()._find(split)
        if episodes and self._is_encoded(episodes[0]) and not self.whole:
            raise ValueError(
                f"{self.root} holds published latents, which do not say of which autoencoder: "
                f"make them usable by scd encode minecraft:{self.root} --autoencoder PATH "
                f"--latent-scale {LATENT_SCALE} --out LATENTS"
            )
        return episodes

    def _look(self, files: Files) -> Header:
        if self._is_encoded(files):
            size, length = self.config.size, len(read_latents(files[0]))
            return self._checked(Header(num_frames=length, height=size, width=size), files)
        return self._checked(Header(**vars(probe_video(files[0]))), files)

    def _frames(self, files: Files, start: int, num_frames: int) -> Float[torch.Tensor, "t c h w"]:
        if self._is_encoded(files):
            return read_latents(files[0])[start : start + num_frames].float()
        return pixels_to_frames(torch.from_numpy(read_video(files[0], start, num_frames)))


class DMLabSource(TecoSource):
    """Episodes of DMLab, each an .npz with pictures and actions."""

    kind = "dmlab"
    origin = (
        "https://archive.org/details/dmlab_dataset_aa .. _ac (TECO, 54 GB), or the data set "
        "guyuchao/DMLab on huggingface.co, its shard-*.tar unpacked"
    )
    settings = DMLabConfig
    list_keys = ("video_path",)

    @classmethod
    def _in_folder(cls, files: Sequence[Path]) -> Sequence[Files]:
        return [(file,) for file in files if file.suffix == ".npz"]

    def _look(self, files: Files) -> Header:
        length, height, width = _video_shape(files[0])
        return self._checked(Header(num_frames=length, height=height, width=width), files)

    def _frames(self, files: Files, start: int, num_frames: int) -> Float[torch.Tensor, "t c h w"]:
        pixels: UInt8[np.ndarray, "t h w 3"] = read_array(files[0], "video")
        _check_pixels(files[0], pixels.dtype, pixels.shape)
        return pixels_to_frames(torch.from_numpy(pixels[start : start + num_frames]))


def _read_list(root: Path, path: Path, keys: Sequence[str]) -> list[Files]:
    """Read a list in FAR's format: objects whose values are paths, of which some may be absent."""
    entries = read_json(path)
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
    return [tuple(_locate(root, written) for written in entry) for entry in found]


def _locate(root: Path, written: str) -> Path:
    """Find a file that a list names from some folder above the collection.

    The longest end of the written path that exists below the collection is taken; if there is
    none, the longest whose folder does.
    """
    parts = Path(written).parts
    parts = parts[1:] if Path(written).is_absolute() else parts
    ends = [root.joinpath(*parts[first:]) for first in range(len(parts))]
    there = [end for end in ends if end.is_file()] or [end for end in ends if end.parent.is_dir()]
    return (there or ends)[0]


def read_latents(path: Path) -> torch.Tensor:
    """Read the published latents of an episode, [t c h w]."""
    try:
        if path.suffix == ".pt":
            latents: Any = torch.load(path, map_location="cpu", weights_only=True)
        elif path.suffix == ".npy":
            latents = torch.from_numpy(np.load(path))
        else:
            with np.load(path) as arrays:
                latents = torch.from_numpy(arrays[next(k for k in LATENT_KEYS if k in arrays)])
    except (*DAMAGED, StopIteration, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: holds no latents that can be read ({error!r})") from error
    if not isinstance(latents, torch.Tensor) or latents.ndim != 4:
        found = list(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ValueError(f"{path}: needed latents [t, c, h, w], got {found}")
    return latents


def _video_shape(path: Path) -> tuple[int, int, int]:
    """Return frames, rows and columns of an .npz without reading the pictures."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("video.npy") as file:
            major, _ = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0
            shape, _, dtype = (read if major == 1 else np.lib.format.read_array_header_2_0)(file)
    except DAMAGED as error:
        raise ValueError(f"{path}: is no .npz file with the key 'video' ({error})") from error
    _check_pixels(path, dtype, shape)
    return shape[0], shape[1], shape[2]


def _check_pixels(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
        raise ValueError(f"{path}: video must be 8-bit [t, h, w, 3], got {dtype} {list(shape)}")
