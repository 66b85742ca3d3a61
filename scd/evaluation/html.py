"""Pages of reports: one HTML file that needs nothing else, light or dark, wide or narrow.

A page is a jinja2 template beside the module that fills it in. It extends evaluation/page.html,
which holds the style, the heading and where the numbers come from, and takes tables, cards, videos
and plots from evaluation/parts.html. What is put in is escaped unless it is Markup.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from scd.common.provenance import hardware_line, write_text
from scd.evaluation.media import Ink

PARTS = "evaluation/parts.html"
"""Macros of tables, cards, videos and plots."""


def write_page(template: str, path: Path, **values: Any) -> None:
    """Fill a template in and write the page.

    Args:
        template: its place in the package, such as "demo/report.html".
        path: an .html file, replaced if it exists.
        values: what the template needs; every page needs `title`, `result` (with command, commit,
            hardware and settings) and `not_claimed` (sentences).
    """
    write_text(_environment.get_template(template).render(values), path)


def fragment(template: str, **values: Any) -> Markup:
    """Fill in a template given as text and return it as part of a page."""
    return Markup(_environment.from_string(template).render(values))


def interval(row: Mapping[str, Any], digits: int = 2) -> Markup:
    """Return a cell of a table: a mean with its interval below it."""
    mean, low, high = (f"{row[name]:.{digits}f}" for name in ("mean", "ci_low", "ci_high"))
    return Markup(f"{mean}<small>{low} .. {high}</small>")


def plot(draw: Callable[[Path, Ink], None], text: str, size: str = "grid") -> Markup:
    """Draw a plot for light and for dark pages and return it as part of a page.

    Args:
        draw: draws it to a file, for one kind of page.
        text: what is seen, for those who do not see it.
        size: how wide, a class of the style: "one", "two" or "grid".
    """
    addresses = []
    with tempfile.TemporaryDirectory() as folder:
        for ink in ("on light", "on dark"):
            file = Path(folder) / f"{ink}.png"
            draw(file, ink)
            addresses.append(inline(file))
    parts: Any = _environment.get_template(PARTS).module
    return parts.plot(*addresses, text, size)


def inline(path: Path) -> str:
    """Return a picture or video as an address that holds all of it."""
    kind = {".png": "image/png", ".mp4": "video/mp4"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


_environment = Environment(
    loader=FileSystemLoader(Path(__file__).resolve().parents[1]),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters |= {
    "hardware_line": hardware_line,
    "inline": inline,
    "interval": interval,
    "json": json.dumps,
}
