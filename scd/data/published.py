"""Published collections by name: `minecraft:PATH`, `ucf101:PATH?protocol=latte`, `dmlab:PATH`."""

from __future__ import annotations

import typing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from scd.common.config import from_json
from scd.data.dmlab import DMLabConfig, open_dmlab
from scd.data.minecraft import MinecraftConfig, open_minecraft
from scd.data.source import Source, Split
from scd.data.ucf101 import UCF101Config, UCF101Source

PublishedConfig = MinecraftConfig | UCF101Config | DMLabConfig

KINDS: dict[str, type[Any]] = {
    "minecraft": MinecraftConfig,
    "ucf101": UCF101Config,
    "dmlab": DMLabConfig,
}
"""Settings of each collection by name."""

WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
"""Ways to say whether."""


@dataclass(frozen=True)
class Published:
    """A published collection on disk."""

    root: Path
    """Its folder."""
    config: PublishedConfig
    """How it is read."""


def parse_published(data: str) -> Published | None:
    """Read a name such as `ucf101:PATH?size=128&labels=1`; None: it names something else.

    Raises:
        ValueError: no path, or a setting that this collection does not have.
    """
    kind, colon, rest = data.partition(":")
    if not colon or kind not in KINDS:
        return None
    path, _, query = rest.partition("?")
    if not path:
        raise ValueError(f"{data!r}: needed {kind}:PATH, or {kind}:PATH?setting=value&...")
    chosen = KINDS[kind]
    blank = chosen()
    values = {field.name: getattr(blank, field.name) for field in fields(chosen)}
    hints = typing.get_type_hints(chosen)
    try:
        given = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ValueError(f"{data!r}: needed ?setting=value&... ({error})") from error
    for name, word in given:
        values[name] = _value(hints.get(name, str), word)
    return Published(root=Path(path), config=from_json(chosen, values, data))


def _value(hint: Any, word: str) -> Any:
    try:
        if hint is bool:
            return WORDS[word.lower()]
        return hint(word) if hint in (int, float) else word
    except (ValueError, KeyError):
        # Refused with the setting's name and type.
        return word


def open_published(
    published: Published, split: Split, strict: bool = False, whole: bool = False
) -> Source:
    """Open a split.

    Args:
        published: the collection.
        split: which episodes.
        strict: stop at the first episode that cannot be used, instead of leaving it out.
        whole: episodes as they are: nothing cut out at random, published latents not scaled.

    Raises:
        FileNotFoundError: no such folder, or a list is missing.
        ValueError: nothing that can be used.
    """
    config = published.config
    if isinstance(config, MinecraftConfig):
        return open_minecraft(published.root, split, config, strict, raw=whole)
    if isinstance(config, DMLabConfig):
        return open_dmlab(published.root, split, config, strict)
    if whole:
        config = replace(config, augment=False)
    return UCF101Source(published.root, split, config, strict)
