"""Worlds by name: those that come with the package, folders and runs, and the hub's.

Finding one by its folder or among those of the package asks no network.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from scd.common.hub import download, is_hub_name
from scd.common.weights import is_stored
from scd.models.clips import CLIPS_FILE
from scd.models.weights import CONFIG_FILE, WEIGHTS_FILE

WORLDS = Path(__file__).resolve().parent.parent / "worlds"
"""Folder of the worlds that come with the package."""

BEST = ("cars", "crafter", "doom")
"""Shipped worlds that are most worth seeing, the best first; others follow by their names."""

CARD_FILE = "README.md"
"""Says what a world is, beside its weights; the hub shows it."""

PICTURE_FILE = "preview.webp"
"""Moving picture of a world, made by itself, beside its weights."""

ON_THE_HUB = (CONFIG_FILE, "model*.safetensors*", CLIPS_FILE, CARD_FILE, PICTURE_FILE, "vae/*")
"""What is downloaded of a world; states of training are not."""


def shipped_names() -> list[str]:
    """Return the names of the worlds that come with this installation, the best first."""
    if not WORLDS.is_dir():
        return []
    names = sorted(path.name for path in WORLDS.iterdir() if is_stored(path / WEIGHTS_FILE))
    return sorted(names, key=lambda name: BEST.index(name) if name in BEST else len(BEST))


def find_world(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the folder of a world: its own, or that of a run.

    A folder that is a world or a run comes before a shipped world of the same name, and that
    before anything else.

    Args:
        name: folder, name of a shipped world, or `owner/name` on the hub.
        revision: branch, tag or commit on the hub; None: the newest.

    Raises:
        FileNotFoundError: none of them is there, or the hub cannot be reached.
        ValueError: not a name, or a revision of what is not on the hub.
    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise ValueError(
            f"a world is named by a text or a path, such as 'doom' or 'runs/out/toy', got {name!r}"
        )
    folder, word = Path(name).expanduser(), os.fspath(name)
    is_folder = (folder / "last").is_file() or is_stored(folder / WEIGHTS_FILE)
    if revision is not None and (is_folder or not is_hub_name(word)):
        raise ValueError(f"revision {revision!r} has a meaning on the hub only, not for {word}")
    if is_folder:
        return folder
    if word in shipped_names():
        return WORLDS / word
    if folder.exists():
        # What lacks is said by whoever reads it.
        return folder
    if is_hub_name(word):
        return download(word, ON_THE_HUB, revision)
    raise FileNotFoundError(unknown(word))


def unknown(name: str) -> str:
    """Say of a name that is no world which there are, the nearest first."""
    names = shipped_names()
    if not names:
        return (
            f"there is no folder {name}, and this installation has no worlds of its own (needed in "
            f"{WORLDS}): install a whole one, or name a world folder or run"
        )
    near = get_close_matches(name, names, n=len(names), cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    listed = ", ".join([*near, *(one for one in names if one not in near)])
    return (
        f"there is no world {name!r}{hint} There are {listed}, folders of worlds and runs by "
        "their path, and owner/name on the hub"
    )
