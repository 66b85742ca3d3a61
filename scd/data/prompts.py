"""Prompts without videos: what a model learns from that is trained on its own rollouts.

    prompts.json                  the prompts, which text encoder embedded them, and their files
    0f3a...c1.safetensors         the embedded tokens of one prompt, without filling

A clip of such a collection has a text and no frames: those are the model's to make. The folder is
written by scd/preprocessing/prompts.py, and training needs no text encoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scd.common.config import at_least, from_json
from scd.common.files import file_aside, read_json, text_lines
from scd.common.weights import save_tensors
from scd.data.clip import Clip
from scd.data.source import DataCard, Source
from scd.data.spaces import ConditionSpec

INFO_FILE = "prompts.json"
"""What a folder of embedded prompts says about itself."""

FORMAT = 1
"""Version of the layout."""

WORDS = "words"
"""Name of the tensor in the file of a prompt."""


@dataclass(frozen=True, kw_only=True)
class PromptsInfo:
    """What a folder of embedded prompts holds."""

    format: int
    text: str
    """What tells this text encoder from another."""
    length: int
    """Tokens of an embedded prompt, those that fill it up included."""
    dim: int
    """Entries of an embedded token."""
    prompts: tuple[str, ...]
    """In the order of the list that they came from."""
    files: tuple[str, ...]
    """Of the same prompts."""
    negative: str
    """What guidance leads away from; may be the empty prompt."""
    negative_file: str

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.files):
            raise ValueError(
                f"needed prompts and as many files, got {len(self.prompts)} and {len(self.files)}"
            )
        at_least(1, length=self.length, dim=self.dim)

    @property
    def conditions(self) -> ConditionSpec:
        """What the prompts steer."""
        return ConditionSpec(text_length=self.length, text_dim=self.dim)


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of a text file, without the empty ones at its end.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has no lines, an empty one between others, or is no text.
    """
    lines = [line.strip() for line in text_lines(path)]
    while lines and not lines[-1]:
        lines.pop()
    empty = [number for number, line in enumerate(lines, start=1) if not line]
    if not lines or empty:
        raise ValueError(f"{path} needs a prompt in every line, empty are {empty[:5] or 'all'}")
    return lines


def is_prompts(path: Path | str) -> bool:
    return (Path(path) / INFO_FILE).is_file()


def read_prompts_info(path: Path | str) -> PromptsInfo:
    """Read what a folder of embedded prompts says about itself."""
    file = Path(path) / INFO_FILE
    if not file.is_file():
        raise FileNotFoundError(f"needed a folder of embedded prompts, there is no {file}")
    return from_json(PromptsInfo, read_json(file, FORMAT), str(file))


class PromptSource(Source):
    """A folder of embedded prompts, as a collection of clips that nobody has recorded."""

    def __init__(
        self, path: Path | str, card: DataCard, shape: tuple[int, int, int], num_frames: int
    ) -> None:
        """Open a folder.

        Args:
            path: the folder.
            card: of the world that is to make the clips; what steers them the folder knows.
            shape: channels, rows and columns of its latent frames.
            num_frames: latent frames that are to be made of each prompt.
        """
        self.path = Path(path)
        self.info = read_prompts_info(path)
        self._no_frames = torch.zeros(0, *shape)
        self._null_text = self._words(self.info.negative_file)
        card = replace(card, conditions=self.info.conditions)
        super().__init__(str(path), "train", card, [num_frames] * len(self.info.prompts))

    @property
    def frame_size(self) -> int:
        return self._no_frames.numel()

    def identity(self, episode: int) -> tuple[str, dict[str, Any]]:
        info = self.info
        parts = {
            "text": self.path / info.files[episode],
            "negative": self.path / info.negative_file,
        }
        return info.prompts[episode], parts

    def _read(self, episode: int, start: int, num_frames: int) -> Clip:
        return Clip(
            frames=self._no_frames,
            encoded=True,
            text=self._words(self.info.files[episode]),
            null_text=self._null_text,
            fps=self.card.fps,
        )

    def _words(self, name: str) -> Float[Tensor, "l c"]:
        file, info = self.path / name, self.info
        words = read_words(file)
        if words is None:
            raise FileNotFoundError(
                f"{file} is gone, which {INFO_FILE} beside it names: embed the prompts again"
            )
        if words.ndim != 2 or len(words) > info.length or words.shape[1] != info.dim:
            raise ValueError(
                f"{file}: needed up to {info.length} tokens of {info.dim} entries, "
                f"got {list(words.shape)}"
            )
        return fill_up(words, info.length)


def read_words(file: Path) -> Tensor | None:
    """Read what a text encoder made of a prompt (ValueError: damaged); None: it is not there."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(WORDS)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, remove it: {error}") from error


def write_words(file: Path, words: Float[Tensor, "s d"], about: Mapping[str, str]) -> None:
    """Write what a text encoder made of a prompt, and what it is about."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file_aside(file) as aside:
        save_tensors({WORDS: words.contiguous()}, aside, {"scd": json.dumps(dict(about))})


def fill_up(words: Float[Tensor, "s d"], length: int) -> Float[Tensor, "l d"]:
    """Fill an embedded text up with zeros."""
    return torch.cat([words, words.new_zeros(length - len(words), words.shape[1])])
