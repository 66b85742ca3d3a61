"""Names that somebody typed, and the nearest ones that there are."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the end of a message that suggests the nearest name; empty if none is near."""
    near = get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def known(name: str, what: str, choices: Iterable[str]) -> str:
    """Return a name that is there; refuse any other, with the nearest that is (ValueError).

    Args:
        what: the name is of, for the message.
    """
    names = list(choices)
    if name in names:
        return name
    raise ValueError(
        f"unknown {what} {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}"
    )
