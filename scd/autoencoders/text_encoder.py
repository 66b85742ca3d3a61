"""Prompts as Wan reads them: what UMT5 makes of their tokens, filled up with zeros.

The text encoder is transformers' UMT5EncoderModel, 11 GiB in bfloat16 for Wan. So what it made of a
prompt is kept in a small file, and it is loaded only for prompts that were never seen. Needs the
extra `wan`: pip install -e ".[wan]".
"""

from __future__ import annotations

import hashlib
import html
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scd.autoencoders.wan import EXTRA
from scd.common.config import Precision, at_least
from scd.common.hub import find_part, fingerprint
from scd.common.runtime import DTYPES, cache_folder
from scd.common.weights import FLOATS, Weights, find_weights, headers
from scd.data.prompts import fill_up, read_words, write_words

logger = logging.getLogger(__name__)

TEXT_LENGTH = 512
"""Tokens that Wan reads, those that fill up included. Source: the configuration of Wan2.1."""

ENCODERS = ("UMT5EncoderModel", "UMT5ForConditionalGeneration")
"""Classes that hold Wan's text encoder."""

NUM_SAID = 3
"""Prompts of one text encoder that are too long of which each is told."""

PROBLEMS = ("missing_keys", "mismatched_keys")
"""What transformers tells of weights that do not fit; others in the file are left alone, such as
those of a decoder."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How prompts are embedded."""

    length: int = TEXT_LENGTH
    """Tokens of an embedded prompt, those that fill it up included."""
    precision: Precision = "bf16"
    """Arithmetic of the text encoder: bf16 takes 11 GiB for Wan's, fp32 twice that."""
    device: str = "cpu"
    """Where the text encoder runs."""
    cache: str = ""
    """Folder in which embedded prompts are kept. Empty: nowhere."""

    def __post_init__(self) -> None:
        at_least(1, length=self.length)


class PromptEmbedder:
    """Prompts to embeddings; the text encoder is loaded when it is first needed.

    `embed` any number of times; `release` gives the text encoder's memory back. Of a prompt that
    is too long the end is cut off, as diffusers does it, and a warning says so.
    """

    def __init__(self, source: str | os.PathLike[str], config: TextConfig) -> None:
        """Find tokenizer and text encoder, and load the tokenizer.

        Args:
            source: folder with text_encoder/ and tokenizer/ as diffusers writes them, or its name
                on the hub.
            config: how prompts are embedded.

        Raises:
            FileNotFoundError: they are not there, or the hub cannot be reached.
            ValueError: a text encoder of another kind, or transformers is not installed.
        """
        self.config = config
        self._words, self._weights = _find(source)
        self._tokenizer = _load_tokenizer(self._words)
        self._encoder: Any = None
        self._name = ""
        self._kept: dict[str, Tensor] = {}
        self._said: set[str] = set()

    @property
    def name(self) -> str:
        """Fingerprint of tokenizer, text encoder and its arithmetic."""
        self._name = self._name or fingerprint(self._words, self._weights)
        return f"{self._name}-{self.config.precision}"

    def tokens(self, prompt: str) -> list[int]:
        """Return the ids of a prompt's tokens, the end token included, as many as are read."""
        ids = self._tokenizer(clean_prompt(prompt)).input_ids
        return ids if len(ids) <= self.config.length else [*ids[: self.config.length - 1], ids[-1]]

    def cut(self, prompt: str) -> str:
        """Say what of a prompt is cut off, in a sentence; empty: nothing is."""
        ids, most = self._tokenizer(clean_prompt(prompt)).input_ids, self.config.length
        if len(ids) <= most:
            return ""
        kept = self._tokenizer.decode(ids[: most - 1])
        return (
            f"the prompt takes {len(ids)} tokens, the text encoder {most}: its last "
            f"{len(ids) - most} are cut off, and what is read ends with ...{kept[-40:]!r}"
        )

    def _warn(self, prompt: str) -> None:
        """Tell once of a prompt that is cut, and of many only that there are more."""
        if prompt in self._said or len(self._said) > NUM_SAID or not (cut := self.cut(prompt)):
            return
        self._said.add(prompt)
        logger.warning(cut if len(self._said) <= NUM_SAID else "more prompts are cut: not told")

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "b l c"]:
        """Embed prompts, in the text encoder's arithmetic."""
        return torch.stack([self._embed(prompt) for prompt in prompts])

    def prepare(self, prompts: Sequence[str]) -> None:
        """Embed prompts one after another, so that `embed` finds them, and give the memory back.

        Filled up they may take more memory than there is: only what their words became is kept, in
        the cache, or in memory where there is none.
        """
        for prompt in prompts:
            self.embed([prompt])
        self.release()

    @property
    def is_loaded(self) -> bool:
        return self._encoder is not None

    def release(self) -> None:
        self._encoder = None

    def _embed(self, prompt: str) -> Tensor:
        self._warn(prompt)
        path = self.path_of(prompt)
        words = self._kept.get(prompt) if path is None else read_words(path)
        if words is None:
            words = self._encode(self.tokens(prompt))
            if path is None:
                self._kept[prompt] = words
            else:
                write_words(path, words, {"prompt": clean_prompt(prompt), "encoder": self.name})
        return fill_up(words, self.config.length)

    def _encode(self, ids: list[int]) -> Tensor:
        """Return the embedded tokens [words c]; without filling, which would be masked anyway."""
        if self._encoder is None:
            self._encoder = _load_encoder(self._weights, self.config)
        given = torch.tensor([ids], device=self.config.device)
        return self._encoder(input_ids=given).last_hidden_state[0].cpu()

    def path_of(self, prompt: str) -> Path | None:
        """Return the file in which what was made of a prompt is kept; None: nowhere."""
        if not self.config.cache:
            return None
        key = f"{self.name}\n{clean_prompt(prompt)}"
        if self.cut(prompt):
            # Another length cuts it elsewhere.
            key += f"\n{self.config.length}"
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return Path(self.config.cache) / f"{digest}.safetensors"


def text_fingerprint(source: str | os.PathLike[str]) -> str:
    """Name a source's tokenizer and text encoder, wherever they lie; none of them is loaded."""
    if not str(source):
        raise FileNotFoundError("no folder of a text encoder is named")
    return fingerprint(*_find(source))


def _find(source: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the folders of tokenizer and text encoder."""
    words = find_part(source, "tokenizer")
    return words, find_part(source, "text_encoder", ENCODERS, "text encoder of Wan")


def refuse_empty(prompts: Sequence[str]) -> None:
    """Refuse no prompt at all, or one without words (ValueError)."""
    if not prompts:
        raise ValueError("needed one prompt or more, got none")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("a prompt must have words, got an empty one")


def clean_prompt(prompt: str) -> str:
    """Mend broken characters, turn HTML's names of characters into them, and join white space.

    Source: what diffusers' pipeline of Wan does to a prompt.
    """
    try:
        import ftfy
    except ImportError as error:
        raise ValueError(EXTRA) from error
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def default_cache() -> str:
    return str(cache_folder("prompts"))


def _load_tokenizer(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(EXTRA) from error
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder} holds no tokenizer that can be read: {reason}") from error


def _load_encoder(folder: Path, config: TextConfig) -> Any:
    from transformers import UMT5EncoderModel

    with Weights(folder) as weights:
        wrong = [name for name, one in headers(weights).items() if one.dtype not in FLOATS.values()]
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} weights are no floating-point numbers of 16 bits or more, "
            f"such as {wrong[0]!r}: needed fp32, fp16 or bf16, not quantised weights"
        )
    found = find_weights(folder)
    try:
        both: Any = UMT5EncoderModel.from_pretrained(
            str(folder),
            local_files_only=True,
            dtype=DTYPES[config.precision],
            variant=found.variant or None,
            use_safetensors=found.is_safe,
            output_loading_info=True,
        )
    except Exception as error:
        # Whatever transformers stumbles over, after what was read here.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} holds no text encoder that can be read: {reason}") from error
    encoder, loaded = both
    problems = {kind: sorted(map(str, loaded.get(kind) or ())) for kind in PROBLEMS}
    for kind, names in problems.items():
        if names:
            what = kind.removesuffix("_keys")
            raise ValueError(f"{folder}: {len(names)} weights of UMT5 are {what}: {names[:5]}")
    if not all(weight.isfinite().all() for weight in encoder.parameters()):
        raise ValueError(f"{folder}: the weights must be finite, got NaN or infinity")
    return encoder.to(config.device).eval().requires_grad_(False)
