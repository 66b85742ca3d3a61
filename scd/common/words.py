"""Words of a command line, before they become settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from scd.common.names import known


def asks_for_help(words: list[str]) -> bool:
    """Tell whether -h or --help is among the words."""
    return any(word in ("-h", "--help") for word in words)


def split_name(
    words: list[str], command: str, what: str, choices: Iterable[str]
) -> tuple[str | None, list[str]]:
    """Take the leading name off; None if help is asked for without one."""
    if words and not words[0].startswith("-"):
        return known(words[0], what, choices), words[1:]
    if asks_for_help(words):
        return None, words
    raise ValueError(f"scd {command} needs a {what} first: {', '.join(choices)}")


def to_front(words: list[str], find: Callable[[], str | None]) -> list[str]:
    """Move the word that `find` tells to the front if a flag stands there."""
    if not words or not words[0].startswith("-") or asks_for_help(words):
        return words
    word, rest = find(), list(words)
    if word is None:
        return words
    rest.remove(word)
    return [word, *rest]


def name_among(loose: list[str]) -> str | None:
    """Return the word that is most likely no value of a flag that nobody knows.

    Args:
        loose: words that settings do not know; they stay, and reading the settings names them.
    """
    pairs = zip(["", *loose], loose, strict=False)
    words = [(before.startswith("-"), word) for before, word in pairs if not word.startswith("-")]
    return min(words, key=lambda one: one[0])[1] if words else None


def value_of(words: list[str], flag: str) -> str | None:
    """Return what follows a flag, or what stands behind its "="; None: the flag is not there."""
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word == flag or word.startswith(f"{flag}="):
            return following if word == flag else word.partition("=")[2]
    return None
