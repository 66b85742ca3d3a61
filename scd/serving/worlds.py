"""The worlds of the package that a player may choose from while `scd play` runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scd.models.names import WORLDS, shipped_names
from scd.models.shelf import as_json, moving_picture, shipped_worlds
from scd.serving.messages import ServeError


class Choice:
    """Which worlds there are, and which one comes next; one of each world that is played."""

    def __init__(self, current: str, asked: bool) -> None:
        """Begin with a world.

        Args:
            current: its name.
            asked: whether somebody has asked for it, so that the page need not offer others first.
        """
        self.current, self.asked = current, asked
        self.chosen = ""
        """World that is to be played next; empty: none was chosen."""
        self.stop: Callable[[], None] = lambda: None
        """Ends the server of the current world, so that the next one can begin."""

    def listing(self) -> dict[str, Any]:
        """Return what the page offers.

        Raises:
            OSError, ValueError: a world of the package is damaged.
        """
        worlds = [{k: v for k, v in one.items() if k != "folder"} for one in listed()]
        return {"worlds": worlds, "current": self.current, "asked": self.asked}

    def choose(self, name: str) -> None:
        """Let another world be played; the server of this one ends.

        Raises:
            ServeError: unknown_world.
        """
        self.chosen = check_name(name)
        self.stop()


def listed() -> list[dict[str, Any]]:
    """Return the worlds of the package; whether one has a picture, not where it lies."""
    worlds = as_json(shipped_worlds())
    return [one | {"picture": bool(one["picture"])} for one in worlds]


def picture(name: str) -> bytes:
    """Return the moving picture of a world of the package, as WebP.

    Raises:
        ServeError: unknown_world, or it has none.
    """
    found = moving_picture(WORLDS / check_name(name))
    if found is None:
        raise ServeError("unknown_world", f"the world {name} has no picture")
    return found


def check_name(name: str) -> str:
    """Return the name of a world of the package (ServeError unknown_world: it is none)."""
    names = shipped_names()
    if name not in names:
        raise ServeError("unknown_world", f"there is no such world; there are {', '.join(names)}")
    return name
