"""The documentation as a site: built strictly, complete, and nothing comes from other hosts."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_structure import ROOT, parsed, source_files


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_every_page_is_there_and_reached_from_the_first(site):
    pages = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.name for path in site.glob("*.html")}
    first = (site / "index.html").read_text("utf-8")
    assert pages <= set(re.findall(r'href="([\w-]+\.html)"', first)) | {"index.html"}


def test_nothing_is_loaded_from_other_hosts(site):
    loaded = re.compile(
        r'<(?:script|img|iframe|source)[^>]* src="?(https?:[^" >]+)'
        r'|<link(?![^>]*rel="?canonical)[^>]* href="?(https?:[^" >]+)'
    )
    for page in site.glob("*.html"):
        assert not loaded.findall(page.read_text("utf-8")), page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import", sheet.read_text("utf-8")), sheet.name


def test_the_reference_holds_docstrings_and_signatures(site):
    page = (site / "reference.html").read_text("utf-8")
    text = re.sub(r"<[^>]+>", "", page)
    assert "Start the streams." in text and "given first frames in [-1, 1]" in text
    assert 'id="scd.streaming.rollout.Rollout.begin"' in page
    # Every `::: name` of the page found something to show.
    asked = re.findall(r"^::: (scd[\w.]+)", (ROOT / "docs/reference.md").read_text("utf-8"), re.M)
    assert asked and all(f'id="{name}' in page for name in asked)


def said() -> str:
    """All texts of the package's code, the changing parts of each as `...`."""
    parts = []
    for path in source_files():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.JoinedStr):
                parts.append(
                    "".join(
                        one.value if isinstance(one, ast.Constant) else "..." for one in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(node.value)
    return "\n".join(parts)


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) >= 20
    texts = said()
    for message in messages:
        for part in (part.strip(" :,") for part in message.split("...")):
            assert part in texts, f"no message says {part!r}"


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 220 and len(text.encode()) <= 12 * 1024
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 1 and (ROOT / pictures[0]).stat().st_size < 3 * 2**20
