"""Chromium without a window, for tests of pages; they are run with -m browser."""

from __future__ import annotations

import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)

in_a_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium in the PATH"),
]
"""Marks of a module whose tests need it."""

DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
