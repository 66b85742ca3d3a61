"""The look of a report: one HTML file that needs nothing else, light or dark, wide or narrow."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from scd.common.provenance import hardware_line

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --ink: #22252a; --soft: #666c75;
  --line: #dcdfe4; --card: #ffffff; --accent: #2f6bbf; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --ink: #e4e6ea; --soft: #9aa1ab;
  --line: #333840; --card: #1e2126; --accent: #7fb0f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, li { max-width: 44rem; } .soft, figcaption { color: var(--soft); font-size: .88rem; }
.warning { border: 1px solid var(--accent); border-radius: .5rem; padding: .6rem .9rem; }
.cards { display: grid; gap: .75rem; margin: 1.25rem 0;
  grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem .9rem; }
.card b { display: block; font-size: 1.5rem; line-height: 1.2; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .92rem; }
th, td { padding: .45rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
thead th { color: var(--soft); font-weight: 600; }
tbody tr { border-top: 1px solid var(--line); }
td small { display: block; color: var(--soft); font-size: .76rem; line-height: 1.2; }
figure { margin: 1rem 0; } video, figure img { width: 100%; height: auto; display: block;
  border-radius: .4rem; }
figure .grid { min-width: 44rem; } figure .two { min-width: 34rem; }
figure .one { max-width: 30rem; } figure .wide { overflow-x: auto; border-radius: .4rem; }
video { image-rendering: pixelated; background: #ccc; }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
@media (max-width: 32rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""


def page_of(title: str, body: str) -> str:
    """Return a whole page in the style of all reports."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def origin(result: Mapping[str, Any]) -> str:
    """Return the section that says where a result's numbers come from.

    Args:
        result: with command, commit, hardware and settings.
    """
    entries = {
        "command": f"<code>{escape(result['command'])}</code>",
        "commit": f"<code>{escape(result['commit'])}</code>",
        "hardware": escape(hardware_line(result["hardware"])),
        "settings": f"<code>{escape(json.dumps(result['settings']))}</code>",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in entries.items())
    return f"<h2>Where the numbers come from</h2><dl>{listed}</dl>"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table; its cells may hold markup, its header may not."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def show_plot(files: tuple[Path, Path], text: str, size: str) -> str:
    """Return a plot for light and dark pages, described by `text`; `size` is a class of STYLE."""
    light, dark = map(inline, files)
    return (
        '<figure><div class="wide"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img class="{size}" alt="{escape(text)}" src="{light}"></picture></div></figure>'
    )


def inline(path: Path) -> str:
    """Return a picture or video as an address that holds all of it."""
    kind = {".png": "image/png", ".mp4": "video/mp4"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
