"""Writing a folder of latents: whole files only, and never over another encoding."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from scd.common.config import differences, to_json
from scd.common.files import TEMPORARY, file_aside
from scd.data.latents import (
    DTYPES,
    INFO_FILE,
    METADATA,
    NULL_TEXT_FILE,
    PLACE,
    LatentsInfo,
    expected_metadata,
    key_of,
    open_file,
    read_info,
    read_null_text,
)
from scd.data.source import Split

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodedEpisode:
    """One episode as it is stored."""

    latents: Float[Tensor, "t c h w"]
    """Of unit scale."""
    actions: Int[Tensor, " t"] | Float[Tensor, "t a"] | None
    """Action i led from latent frame i-1 to latent frame i."""
    label: int | None
    """Class of the whole episode."""
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
    ours = (INFO_FILE, NULL_TEXT_FILE, TEMPORARY, "train-", "val-", "test-")
    if out.exists() and not all(
        any(entry.name.startswith(name) for name in ours) for entry in out.iterdir()
    ):
        raise FileExistsError(f"{out} holds other things than latents")
    out.mkdir(parents=True, exist_ok=True)
    write_info(out, info)


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
        save_tensors(out / NULL_TEXT_FILE, {"text": null_text.contiguous()}, {"text": info.text})


def is_whole(out: Path, info: LatentsInfo, split: Split, number: int) -> bool:
    """Tell whether a file is there; one that is damaged is written again."""
    try:
        open_file(out, info, split, number)
    except FileNotFoundError:
        return False
    except (ValueError, SafetensorError) as error:
        logger.warning("%s", error)
        return False
    return True


def remove_leftovers(out: Path, name: str) -> None:
    """Remove what a killed process left of a file that only this one writes."""
    for path in out.glob(f"{TEMPORARY}{name}-*"):
        path.unlink(missing_ok=True)


def write_info(path: Path, info: LatentsInfo) -> None:
    """Write what a folder of latents says about itself."""
    with file_aside(path / INFO_FILE) as aside:
        aside.write_text(json.dumps(to_json(info)) + "\n", encoding="utf-8")


def write_episodes(
    path: Path, info: LatentsInfo, split: Split, number: int, episodes: Sequence[EncodedEpisode]
) -> None:
    """Write one file of a split: it appears whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for episode, encoded in zip(info.episodes(split, number), episodes, strict=True):
        assert len(encoded.latents) == info.lengths(split)[episode]
        kept = {"latents": encoded.latents.to(DTYPES[info.stored]), "actions": encoded.actions}
        kept |= {"text": encoded.text}
        if encoded.label is not None:
            kept["label"] = torch.tensor(encoded.label)
        for name, tensor in kept.items():
            if tensor is not None:
                tensors[key_of(episode, name)] = tensor.cpu().contiguous()
    save_tensors(
        path / info.file_name(split, number), tensors, expected_metadata(info, split, number)
    )


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors aside, then rename.

    Raises:
        OSError: they cannot be written.
    """
    with file_aside(path) as aside:
        try:
            save_file(dict(tensors), aside, metadata={METADATA: json.dumps(dict(metadata))})
            # The library makes files that only their owner can read.
            aside.chmod(0o644)
        except SafetensorError as error:
            raise OSError(f"could not write {path}: {error}") from error
