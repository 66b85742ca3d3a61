"""Hook of mkdocs: what a page says about files outside docs/ becomes their name, not a dead link.

On a code host `[CONTRIBUTING.md](../CONTRIBUTING.md)` opens that file; a site does not have it.
"""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")
"""A link to a file above docs/."""


def on_page_markdown(markdown: str, **given: Any) -> str:
    """Return a page without links that leave docs/."""
    return OUTSIDE.sub(r"`\1`", markdown)
