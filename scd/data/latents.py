"""Latents of a collection, written once and read through memory maps.

    latents.json                          what was encoded, by which autoencoder, how long it is
    train-00003-of-00013.safetensors      latents, actions, labels and texts of some episodes
    null_text.safetensors                 what stands in for a hidden text, if there are texts
    data-train.json                       what tells the episodes that are encoded from others

Every file is written aside and renamed, so one that is there is whole; only a copy can be cut off,
and is refused. `scd encode` writes such a folder (scd/preprocessing/encode.py): `begin`,
`write_null_text`, then `write_episodes` for every file that is not `is_whole` yet.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scd.common import runtime
from scd.common.config import at_least, differences, from_json, shown, to_json
from scd.common.files import TEMPORARY, file_aside, read_json, write_file
from scd.common.weights import save_tensors
from scd.data.clip import Clip, check_actions
from scd.data.prompts import fill_up
from scd.data.source import DataCard, EmptySplit, Findings, Opening, Source, open_source
from scd.data.spaces import Split, Stored

INFO_FILE = "latents.json"
"""What a folder of latents says about itself."""

NULL_TEXT_FILE = "null_text.safetensors"
"""The embedded empty prompt."""

DATA_FILE = "data-{}.json"
"""Of each split, the fingerprint of its episodes (scd/data/fingerprint.py)."""

FORMAT = 1
"""Version of the layout."""

UNREADABLE = "unreadable"
"""Stands for the latents of an episode that could not be read when it was to be encoded."""

METADATA = "scd"
"""The one entry of a file's metadata: several would be written in a random order."""

PLACE = "source"
"""Field of an autoencoder's settings that only says where weights lie: equal ones are the same."""

DTYPES: dict[str, torch.dtype] = runtime.DTYPES | {"fp16": torch.float16}
"""Types of tensors by name."""

DAMAGED = (SafetensorError, ValueError, TypeError, LookupError, RuntimeError)
"""What reading an episode raises that is damaged."""

logger = logging.getLogger(__name__)


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
    """Latent frames of each episode of the split; likewise of the others."""
    val: tuple[int, ...]
    test: tuple[int, ...]

    def __post_init__(self) -> None:
        at_least(
            1, episodes_per_file=self.episodes_per_file, frames_per_latent=self.frames_per_latent
        )
        least = min((0, *self.train, *self.val, *self.test))
        if min(self.shape) < 1 or least < 0:
            raise ValueError(f"a shape {self.shape}, or lengths from {least} on, cannot be")

    def lengths(self, split: Split) -> tuple[int, ...]:
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def num_files(self, split: Split) -> int:
        return -(-len(self.lengths(split)) // self.episodes_per_file)

    def episodes(self, split: Split, number: int) -> range:
        """Return the episodes of a file of a split."""
        first = number * self.episodes_per_file
        return range(first, min(first + self.episodes_per_file, len(self.lengths(split))))

    def file_name(self, split: Split, number: int) -> str:
        return f"{split}-{number:05d}-of-{self.num_files(split):05d}.safetensors"


def is_latents(path: Path | str) -> bool:
    return (Path(path) / INFO_FILE).is_file()


def read_info(path: Path) -> LatentsInfo:
    """Read what a folder of latents says about itself."""
    return from_json(LatentsInfo, read_json(path / INFO_FILE, FORMAT), str(path / INFO_FILE))


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
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"{file_path} is cut off or damaged ({error}): the same scd encode command writes it "
            "again"
        ) from error
    expected = _metadata(info, split, number)
    if found != expected:
        raise ValueError(
            f"{file_path} is not of this encoding: needed {expected}, it says {shown(found)}; "
            "remove it, and the same scd encode command writes it again"
        )
    missing = [
        key
        for index in info.episodes(split, number)
        if (key := _key(index, "latents")) not in keys and _key(index, UNREADABLE) not in keys
    ]
    if missing:
        raise ValueError(f"{file_path} lacks {len(missing)} episodes, the first is {missing[0]}")
    return file


def _metadata(info: LatentsInfo, split: Split, number: int) -> dict[str, Any]:
    episodes = info.episodes(split, number)
    return {
        "split": split,
        "episodes": [episodes.start, episodes.stop],
        "frames": sum(info.lengths(split)[episodes.start : episodes.stop]),
        "fingerprint": info.fingerprint,
        "text": info.text,
        "stored": info.stored,
    }


def _key(episode: int, name: str) -> str:
    return f"{episode:06d}.{name}"


class LatentSource(Source):
    """Stored latents of one split: a clip's frames are latents.

    Args:
        path: the folder.
        split: which episodes.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the encoding is not finished, a file is cut off or of another autoencoder, or
            the split is empty.
    """

    kind = "latents"
    origin = "scd encode"
    frames_are = "latent frames"

    def __init__(self, path: Path | str, split: Split) -> None:
        self.path = Path(path)
        self.info = info = read_info(self.path)
        if not info.lengths(split):
            raise EmptySplit(f"{self.path}: split {split!r} has no episodes")
        names = [info.file_name(split, number) for number in range(info.num_files(split))]
        missing = [name for name in names if not (self.path / name).is_file()]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} of {len(names)} files of split {split!r} are not "
                f"there, the first is {missing[0]}: the same scd encode command goes on, for every "
                "--shard"
            )
        self._files = [open_file(self.path, info, split, number) for number in range(len(names))]
        self._has = [set(file.keys()) for file in self._files]
        self._null_text = read_null_text(self.path, info)
        lengths = [
            0 if _key(episode, UNREADABLE) in self._has[episode // info.episodes_per_file] else one
            for episode, one in enumerate(info.lengths(split))
        ]
        super().__init__(str(self.path), split, info.card, lengths)

    @classmethod
    def recognises(cls, data: str) -> bool:
        return is_latents(data.partition("?")[0])

    @classmethod
    def open(cls, data: str, split: Split, how: Opening) -> Source:
        path, _, settings = data.partition("?")
        if settings:
            raise ValueError(
                f"{data}: {path} holds latents, which are as they were encoded: scd encode takes "
                f"CLIPS?{settings}"
            )
        if how.latents:
            return cls(data, split)
        videos = read_info(Path(data)).data
        try:
            return open_source(videos, split, how.strict)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{data} holds latents of {videos}, and this needs the videos: {error}"
            ) from error

    @property
    def frame_size(self) -> int:
        return math.prod(self.info.shape)

    @classmethod
    def inspect(cls, data: str) -> Findings:
        return Findings(there=[f"{INFO_FILE}: stored latents"])

    def oddities(self) -> list[str]:
        left_out = [number for number, length in enumerate(self._lengths) if not length]
        if not left_out:
            return []
        numbers = ", ".join(map(str, left_out[:6]))
        return [f"{len(left_out)} episodes could not be read when they were encoded: {numbers}"]

    def identity(self, episode: int) -> tuple[str, dict[str, Any]]:
        number = episode // self.info.episodes_per_file
        file, names = self._files[number], self._has[number]
        parts: dict[str, Any] = {"encoding": f"{self.info.fingerprint} {self.info.text}"}
        try:
            if self._lengths[episode]:
                stored = file.get_slice(_key(episode, "latents"))
                # All of them would be gigabytes.
                parts["latents"] = torch.stack([stored[0], stored[-1]]).float()
            for name in ("actions", "label"):
                if _key(episode, name) in names:
                    parts[name] = file.get_tensor(_key(episode, name))
        except DAMAGED:
            parts["latents"] = "damaged"
        return f"episode {episode}", parts

    def _read(self, episode: int, start: int, num_frames: int) -> Clip:
        try:
            return self._stored(episode, start, num_frames)
        except DAMAGED as error:
            file = self.info.file_name(self.split, episode // self.info.episodes_per_file)
            raise ValueError(
                f"{self.path / file}: episode {episode} is damaged ({error}): remove the file, and "
                "the same scd encode command writes it again"
            ) from error

    def _check(
        self, frames: Tensor, actions: Tensor | None, label: int | None, num_frames: int
    ) -> None:
        """Refuse what scd encode cannot have written (ValueError)."""
        spec, wanted = self.card.conditions, (num_frames, *self.info.shape)
        if frames.shape != wanted or not torch.isfinite(frames).all():
            raise ValueError(
                f"needed finite latents of shape {list(wanted)}, got {list(frames.shape)}"
            )
        if spec.has_actions != (actions is not None):
            raise ValueError("actions are there, or are missing, against what latents.json says")
        if actions is not None:
            if actions.ndim != 1 + spec.action_axes:
                raise ValueError(f"actions have the shape {list(actions.shape)}")
            check_actions(spec, actions)
        if label not in (range(spec.num_labels) if spec.num_labels else (None,)):
            raise ValueError(f"there are {spec.num_labels} labels, got {label}")

    def _stored(self, episode: int, start: int, num_frames: int) -> Clip:
        number = episode // self.info.episodes_per_file
        file, names = self._files[number], self._has[number]
        part = slice(start, start + num_frames)

        def stored(name: str) -> Any:
            key = _key(episode, name)
            return file.get_slice(key) if key in names else None

        actions, text = stored("actions"), stored("text")
        has_label = _key(episode, "label") in names
        text_length = self.info.card.conditions.text_length
        frames = stored("latents")[part].float()
        actions = None if actions is None else actions[part].clone()
        label = int(file.get_tensor(_key(episode, "label"))) if has_label else None
        self._check(frames, actions, label, num_frames)
        return Clip(
            frames=frames,
            actions=actions,
            label=label,
            fps=self.info.card.fps / self.info.frames_per_latent,
            encoded=True,
            text=None if text is None else fill_up(text[:], text_length).float(),
            null_text=self._null_text,
        )


def read_null_text(path: Path, info: LatentsInfo) -> Float[Tensor, "l d"] | None:
    """Read the embedded empty prompt (ValueError: it cannot be read); None: there are no texts."""
    if not info.text:
        return None
    try:
        with safe_open(path / NULL_TEXT_FILE, framework="pt") as file:
            if json.loads((file.metadata() or {}).get(METADATA, "null")) != {"text": info.text}:
                raise ValueError("of another text encoder")
            return fill_up(file.get_tensor("text"), info.card.conditions.text_length).float()
    except (SafetensorError, FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{path / NULL_TEXT_FILE} is missing or damaged ({error}): the same scd encode command "
            "writes it again"
        ) from error


@dataclass(frozen=True, kw_only=True)
class EncodedEpisode:
    """One episode as it is stored."""

    latents: Float[Tensor, "t c h w"]
    """Of unit scale."""
    actions: Int[Tensor, "t ..."] | Float[Tensor, "t ... a"] | None
    """Action i led from latent frame i-1 to latent frame i; as of `scd.data.clip.Conditions`."""
    label: int | None
    text: Float[Tensor, "l d"] | None
    """Embedded text, without what fills it up."""


def begin(out: Path, info: LatentsInfo) -> None:
    """Write what the folder says about itself, or check that an old one says the same.

    Raises:
        FileExistsError: it holds another encoding, or something else.
    """
    if (out / INFO_FILE).is_file():
        different = differences(_comparable(read_info(out)), _comparable(info))
        if different:
            raise FileExistsError(
                f"{out} holds another encoding (what it says, then what was asked for): "
                + "; ".join(different[:5])
            )
        return
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: needed a folder to write")
    # Another process may be about to say the same.
    ours = (INFO_FILE, NULL_TEXT_FILE, TEMPORARY, "train-", "val-", "test-", DATA_FILE[:5])
    if out.exists() and not all(
        any(entry.name.startswith(name) for name in ours) for entry in out.iterdir()
    ):
        raise FileExistsError(f"{out} holds other things than latents")
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / INFO_FILE, json.dumps(to_json(info)))


def _comparable(info: LatentsInfo) -> dict[str, Any]:
    """Return what makes two encodings the same, wherever videos and weights lie."""
    values = to_json(info) | {"data": ""}
    values["autoencoder"] = {k: v for k, v in info.autoencoder.items() if k != PLACE}
    return values


def write_null_text(out: Path, info: LatentsInfo, null_text: Float[Tensor, "l d"]) -> None:
    """Write the embedded empty prompt, unless it is there."""
    try:
        read_null_text(out, info)
    except ValueError:
        _save(out / NULL_TEXT_FILE, {"text": null_text.contiguous()}, {"text": info.text})


def is_whole(out: Path, info: LatentsInfo, split: Split, number: int) -> bool:
    """Tell whether a file is there; one that is damaged is written again."""
    try:
        open_file(out, info, split, number)
    except FileNotFoundError:
        return False
    except ValueError as error:
        logger.warning("%s", error)
        return False
    return True


def write_episodes(
    path: Path,
    info: LatentsInfo,
    split: Split,
    number: int,
    episodes: Sequence[EncodedEpisode | None],
) -> None:
    """Write a file of a split whole; None: an episode that could not be read."""
    tensors: dict[str, Tensor] = {}
    for episode, encoded in zip(info.episodes(split, number), episodes, strict=True):
        if encoded is None:
            tensors[_key(episode, UNREADABLE)] = torch.zeros(1)
            continue
        assert len(encoded.latents) == info.lengths(split)[episode]
        kept = {"latents": encoded.latents.to(DTYPES[info.stored]), "actions": encoded.actions}
        kept |= {"text": encoded.text}
        if encoded.label is not None:
            kept["label"] = torch.tensor(encoded.label)
        for name, tensor in kept.items():
            if tensor is not None:
                tensors[_key(episode, name)] = tensor.cpu().contiguous()
    _save(path / info.file_name(split, number), tensors, _metadata(info, split, number))


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    with file_aside(path) as aside:
        save_tensors(tensors, aside, {METADATA: json.dumps(dict(metadata))})
