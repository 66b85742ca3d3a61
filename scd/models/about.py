"""What a world is in a line, for people: from its card (README.md) and the run that made it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from scd.common.files import read_json, read_text
from scd.models.names import CARD_FILE
from scd.models.progress import PROGRESS_FILE, load_progress

LONGEST = 120
"""Characters that are read of a title or a row; a card may hold any text."""


@dataclass(frozen=True, kw_only=True)
class About:
    """Lines of text, each empty where nobody has said it."""

    title: str = ""
    """What it is: the first heading of its card."""
    trained: str = ""
    """How, in words that go on after "trained", such as "4,000 steps on doom-64 in 65 min": the row
    "trained" of the card's table, or what the run folder says."""
    goal: str = ""
    """What a player may try, and what the game paid for it: the row "goal" of the card's table. No
    world predicts a score."""


def read_about(folder: Path) -> About:
    """Read what a world folder, or a step of a run, says of itself.

    Raises:
        ValueError: the files of the run are damaged, or the card is no text.
    """
    card = _read_card(folder / CARD_FILE)
    return card if card.trained else replace(card, trained=_read_run(folder))


def _read_card(path: Path) -> About:
    if not path.is_file():
        return About()
    text = read_text(path)
    # Metadata between dashes stands first in cards of a hub, and may hold comments.
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    title = re.search(r"^# +(\S.*)$", text, flags=re.MULTILINE)
    rows = {
        name: _short(re.search(rf"^\| *{name} *\| *([^|]*\S) *\|", text, flags=re.MULTILINE))
        for name in ("trained", "goal")
    }
    return About(title=_short(title), **rows)


def _short(found: re.Match[str] | None) -> str:
    return found[1].strip()[:LONGEST] if found else ""


def _read_run(folder: Path) -> str:
    settings = folder.parent / "config.json"
    if not (folder / PROGRESS_FILE).is_file() or not settings.is_file():
        return ""
    progress = load_progress(folder)
    values = read_json(settings)
    data = str(values.get("data", "")) if isinstance(values, dict) else ""
    # Clients of a server need not know where this machine keeps its files.
    name = Path(data).name if "/" in data else data
    on = f" on {name}" if name else ""
    return f"{progress.step:,} steps{on} in {duration(progress.elapsed_s)}"[:LONGEST]


def duration(seconds: float) -> str:
    """Write a duration as people say it: "40 s", "65 min", "2.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
