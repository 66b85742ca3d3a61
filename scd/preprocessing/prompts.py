"""Prompts of a text file, embedded once and kept in a folder that training reads.

What was embedded before is not embedded again, so the same command goes on after a stop. The text
encoder is loaded only for prompts that are not there, and its memory given back afterwards.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rich.progress import track

from scd.autoencoders.text_encoder import PromptEmbedder, TextConfig
from scd.common.config import to_json
from scd.common.files import take_lock, write_file
from scd.data.prompts import (
    FORMAT,
    INFO_FILE,
    PromptsInfo,
    is_prompts,
    read_lines,
    read_prompts_info,
)

LOCK_FILE = "lock"
"""File of the folder that is locked while it is written."""


def embed_prompts(
    prompts: str, source: str, folder: str, negative_prompt: str, config: TextConfig
) -> PromptsInfo:
    """Embed the prompts of a file into a folder, or see that they are there.

    Args:
        prompts: text file with a prompt in each line; the same one twice counts once.
        source: folder with text_encoder/ and tokenizer/ as diffusers writes them, or its name on
            the hub.
        folder: where the embedded prompts are kept.
        negative_prompt: what guidance leads away from; it may be empty.
        config: how prompts are embedded; its cache is not used, the folder is one.

    Returns:
        What the folder holds.

    Raises:
        FileNotFoundError: no such file, or no text encoder.
        FileExistsError: the folder holds other prompts, or anything else.
        ValueError: the file holds no prompts.
        BlockingIOError: another process is writing the folder.
    """
    lines = list(dict.fromkeys(read_lines(prompts)))
    embedder = PromptEmbedder(source, replace(config, cache=folder))
    wanted = {
        "prompts": tuple(lines),
        "negative": negative_prompt,
        "text": embedder.name,
        "length": config.length,
    }
    if is_prompts(folder):
        info = read_prompts_info(folder)
        different = [name for name, value in wanted.items() if getattr(info, name) != value]
        if different:
            raise FileExistsError(
                f"{folder} holds embedded prompts that differ from {prompts} in "
                f"{', '.join(different)}: name the folder itself, or another one to write"
            )
        return info
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder for the embedded prompts")
    place.mkdir(parents=True, exist_ok=True)
    with take_lock(place / LOCK_FILE):
        dim = embedder.embed([negative_prompt]).shape[-1]
        for line in track(lines, "prompts", disable=len(lines) < 8):
            embedder.embed([line])
        embedder.release()
        *files, negative_file = (_name(embedder, text) for text in (*lines, negative_prompt))
        info = PromptsInfo(
            format=FORMAT, dim=dim, files=tuple(files), negative_file=negative_file, **wanted
        )
        write_file(place / INFO_FILE, json.dumps(to_json(info), ensure_ascii=False))
    return info


def _name(embedder: PromptEmbedder, prompt: str) -> str:
    path = embedder.path_of(prompt)
    assert path is not None
    return path.name
