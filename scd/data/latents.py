"""Latents of a collection, written once and read through memory maps.

    latents.json                          what was encoded, by which autoencoder, how long it is
    train-00003-of-00013.safetensors      latents, actions, labels and texts of some episodes
    null_text.safetensors                 what stands in for a hidden text, if there are texts

Every file is written aside and renamed, so one that is there is whole; only a copy can be cut off,
and is refused. `scd encode` writes such a folder (scd/preprocessing/encode.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scd.common.config import from_json
from scd.data.clip import Clip
from scd.data.source import DataCard, EmptySplit, Split

INFO_FILE = "latents.json"
"""What a folder of latents says about itself."""

NULL_TEXT_FILE = "null_text.safetensors"
"""The embedded empty prompt."""

FORMAT = 1
"""Version of the layout."""

METADATA = "scd"
"""The one entry of a file's metadata: several would be written in a random order."""

PLACE = "source"
"""Field of an autoencoder's settings that only says where weights lie: equal ones are the same."""

Stored = Literal["fp16", "bf16", "fp32"]
"""Arithmetic in which latents are kept."""

DTYPES: dict[Stored, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
"""Types of tensors by name."""


@dataclass(frozen=True, kw_only=True)
class LatentsInfo:
    """What a folder of latents holds."""

    format: int
    """Version of the layout."""
    data: str
    """Name or path of the videos, as `open_source` takes it."""
    card: DataCard
    """Size, speed and steering of the videos, texts included."""
    autoencoder: dict
    """Settings of the autoencoder, as JSON."""
    fingerprint: str
    """What tells this autoencoder from another, its weights included."""
    shape: tuple[int, int, int]
    """Channels, rows and columns of a latent frame."""
    frames_per_latent: int
    """Frames that a latent frame stands for, the first of an episode apart."""
    stored: Stored
    """Arithmetic in which latents are kept."""
    text: str
    """What tells this text encoder from another. Empty: no texts."""
    episodes_per_file: int
    """Episodes of a file; the last one of a split may hold fewer."""
    train: tuple[int, ...]
    """Latent frames of each episode of the split."""
    val: tuple[int, ...]
    """Likewise."""
    test: tuple[int, ...]
    """Likewise."""

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"this version reads latents of format {FORMAT}, got {self.format}")
        if self.episodes_per_file < 1:
            raise ValueError(f"episodes_per_file must be 1 or more, got {self.episodes_per_file}")

    def lengths(self, split: Split) -> tuple[int, ...]:
        """Return the latent frames of each episode of a split."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def num_files(self, split: Split) -> int:
        """Return how many files a split takes."""
        return -(-len(self.lengths(split)) // self.episodes_per_file)

    def episodes(self, split: Split, number: int) -> range:
        """Return the episodes of a file of a split."""
        first = number * self.episodes_per_file
        return range(first, min(first + self.episodes_per_file, len(self.lengths(split))))

    def file_name(self, split: Split, number: int) -> str:
        """Return the name of a file of a split."""
        return f"{split}-{number:05d}-of-{self.num_files(split):05d}.safetensors"


def is_latents(path: Path | str) -> bool:
    """Tell whether a folder holds latents."""
    return (Path(path) / INFO_FILE).is_file()


def read_info(path: Path) -> LatentsInfo:
    """Read what a folder of latents says about itself.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: not JSON, or a missing, unknown or wrong field.
    """
    where = path / INFO_FILE
    try:
        values = json.loads(where.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: is not JSON ({error})") from error
    return from_json(LatentsInfo, values, str(where))


def open_file(path: Path, info: LatentsInfo, split: Split, number: int) -> Any:
    """Map a file of a split into memory and see that it is what the folder says.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is cut off, damaged, or of another encoding.
    """
    file_path = path / info.file_name(split, number)
    try:
        file = safe_open(file_path, framework="pt")
        found = json.loads((file.metadata() or {}).get(METADATA, "null"))
        keys = set(file.keys())
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file_path} is cut off or damaged ({error}): the same scd encode command writes it "
            "again"
        ) from error
    expected = expected_metadata(info, split, number)
    if found != expected:
        raise ValueError(
            f"{file_path} is not of this encoding: needed {expected}, it says {found}; remove it, "
            "and the same scd encode command writes it again"
        )
    missing = [
        key
        for index in info.episodes(split, number)
        if (key := key_of(index, "latents")) not in keys
    ]
    if missing:
        raise ValueError(f"{file_path} lacks {len(missing)} episodes, the first is {missing[0]}")
    return file


def expected_metadata(info: LatentsInfo, split: Split, number: int) -> dict[str, Any]:
    """Return what a file of a split says about itself."""
    episodes = info.episodes(split, number)
    return {
        "split": split,
        "episodes": [episodes.start, episodes.stop],
        "frames": sum(info.lengths(split)[episodes.start : episodes.stop]),
        "fingerprint": info.fingerprint,
        "text": info.text,
        "stored": info.stored,
    }


def key_of(episode: int, name: str) -> str:
    """Return the name of a tensor of an episode."""
    return f"{episode:06d}.{name}"


class LatentSource:
    """Stored latents of one split: a clip's frames are latents.

    Args:
        path: the folder.
        split: which episodes.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the encoding is not finished, a file is cut off or of another autoencoder, or
            the split is empty.
    """

    def __init__(self, path: Path | str, split: Split) -> None:
        self.path = Path(path)
        self.split: Split = split
        self.info = read_info(self.path)
        self._lengths = self.info.lengths(split)
        if not self._lengths:
            raise EmptySplit(f"{self.path}: split {split!r} has no episodes")
        names = [self.info.file_name(split, number) for number in range(self.info.num_files(split))]
        missing = [name for name in names if not (self.path / name).is_file()]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} of {len(names)} files of split {split!r} are not "
                f"there, the first is {missing[0]}: the same scd encode command goes on, for every "
                "--shard"
            )
        self._files = [
            open_file(self.path, self.info, split, number) for number in range(len(names))
        ]
        self._has = [set(file.keys()) for file in self._files]
        self._null_text = read_null_text(self.path, self.info)

    @property
    def card(self) -> DataCard:
        """Size, speed and steering of the videos; their frames are those of pixels."""
        return self.info.card

    @property
    def num_episodes(self) -> int:
        """Number of episodes of the split."""
        return len(self._lengths)

    def num_frames(self, episode: int) -> int:
        """Return the length of an episode in latent frames."""
        return self._lengths[episode]

    def read(self, episode: int, start: int, num_frames: int) -> Clip:
        """Read some latent frames of an episode, in 32 bits.

        Raises:
            ValueError: the episode has no such frames.
        """
        length = self._lengths[episode]
        if not 0 <= start < start + num_frames <= length:
            raise ValueError(
                f"{self.path}: latent frames {start} .. {start + num_frames - 1} of episode "
                f"{episode} were asked for, but it has {length}"
            )
        number = episode // self.info.episodes_per_file
        file, names = self._files[number], self._has[number]
        part = slice(start, start + num_frames)

        def stored(name: str) -> Any:
            key = key_of(episode, name)
            return file.get_slice(key) if key in names else None

        actions, text = stored("actions"), stored("text")
        has_label = key_of(episode, "label") in names
        return Clip(
            frames=stored("latents")[part].float(),
            actions=None if actions is None else actions[part].clone(),
            label=int(file.get_tensor(key_of(episode, "label"))) if has_label else None,
            fps=self.info.card.fps / self.info.frames_per_latent,
            encoded=True,
            text=None if text is None else self._filled_up(text[:]),
            null_text=self._null_text,
        )

    def _filled_up(self, words: Tensor) -> Tensor:
        return fill_up(words, self.info.card.conditions.text_length)


def fill_up(words: Float[Tensor, "s d"], length: int) -> Float[Tensor, "l d"]:
    """Fill an embedded text up with zeros, in 32 bits."""
    return torch.cat([words, words.new_zeros(length - len(words), words.shape[1])]).float()


def read_null_text(path: Path, info: LatentsInfo) -> Float[Tensor, "l d"] | None:
    """Read the embedded empty prompt; None: these latents have no texts.

    Raises:
        ValueError: it is missing, damaged, or of another text encoder.
    """
    if not info.text:
        return None
    try:
        with safe_open(path / NULL_TEXT_FILE, framework="pt") as file:
            if json.loads((file.metadata() or {}).get(METADATA, "null")) != {"text": info.text}:
                raise ValueError("of another text encoder")
            return fill_up(file.get_tensor("text"), info.card.conditions.text_length)
    except (SafetensorError, FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{path / NULL_TEXT_FILE} is missing or damaged ({error}): the same scd encode command "
            "writes it again"
        ) from error
