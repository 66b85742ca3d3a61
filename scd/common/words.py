"""Words of a command line, before they become settings."""

from __future__ import annotations

from collections.abc import Iterable

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


def first_is(flag: str, words: list[str]) -> list[str]:
    """Let the value of one flag stand first, without the flag."""
    return [flag, *words] if words and not words[0].startswith("-") else words


def run_first(words: list[str], command: str, what: str = "RUN") -> list[str]:
    """Let --run stand first, without the flag, and refuse a command without it."""
    words = first_is("--run", words)
    if value_of(words, "--run") is None and not asks_for_help(words):
        raise ValueError(
            f"scd {command} needs a {what} first: the folder of a run or of a world; "
            f"scd help {command} explains every flag"
        )
    return words


def value_of(words: list[str], flag: str) -> str | None:
    """Return what follows a flag, or what stands behind its "="; None: the flag is not there."""
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word == flag or word.startswith(f"{flag}="):
            return following if word == flag else word.partition("=")[2]
    return None
