"""Names that somebody typed, and the nearest ones that there are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from typing import Any


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


def refuse_unknown(
    words: Collection[str], call: Callable[..., Any], more: Iterable[str] = ()
) -> None:
    """Refuse named arguments that a call does not have (ValueError, with the nearest name).

    Args:
        words: what was given besides the arguments that it has.
        call: whose arguments are looked at.
        more: names that it takes, too.
    """
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    own = [one.name for one in inspect.signature(call).parameters.values() if one.kind not in kinds]
    for word in words:
        known(word, f"argument of {call.__name__}", [*own, *more])
