"""Pages of reports in a real browser: dark ones are dark, narrow ones say what scrolls."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from scd.demo.first_look import first_look
from scd.models.shipped import shipped_world
from tests.browser import DESKTOP, PHONE, in_a_browser

pytestmark = in_a_browser

BRIGHT = 170
"""Level of red, green and blue that in the dark only letters and what is filmed may have."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Page of `scd demo`: a video, a picture of frames, cards and a table."""
    out = tmp_path_factory.mktemp("demo")
    first_look(shipped_world(), out, seed=0)
    return out / "report.html"


def open_page(browser: Any, report: Path, scheme: Literal["light", "dark"], **settings: Any) -> Any:
    context = browser.new_context(color_scheme=scheme, **settings)
    page = context.new_page()
    page.goto(report.as_uri())
    page.wait_for_function("() => [...document.images].every((one) => one.complete)")
    return page


def pixels(locator: Any) -> np.ndarray:
    with Image.open(io.BytesIO(locator.screenshot())) as image:
        return np.asarray(image.convert("RGB"))


def test_a_dark_page_has_no_white_boxes(browser: Any, report: Path):
    page = open_page(browser, report, "dark", viewport=DESKTOP)
    for figure in page.locator("figure, .card, .scroll, .warning").all():
        # At the edge is the page, not the ground of the picture.
        seen = pixels(figure)
        rim = np.concatenate([seen[:3].reshape(-1, 3), seen[-3:].reshape(-1, 3)])
        assert (rim.min(axis=-1) > BRIGHT).mean() < 0.02, figure.inner_html()[:80]
    frames = pixels(page.locator("figure img"))
    assert (frames.min(axis=-1) > BRIGHT).mean() < 0.05
    # Names of the rows are light letters.
    assert (frames[:, :60].min(axis=-1) > BRIGHT).any()
    page.context.close()


def test_a_light_page_has_dark_letters_on_light(browser: Any, report: Path):
    page = open_page(browser, report, "light", viewport=DESKTOP)
    names = pixels(page.locator("figure img"))[:, :60]
    assert (names.min(axis=-1) > BRIGHT).mean() > 0.8 and (names.max(axis=-1) < 100).any()
    page.context.close()


def test_a_phone_says_that_the_frames_scroll(browser: Any, report: Path):
    page = open_page(browser, report, "light", viewport=PHONE, has_touch=True, is_mobile=True)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]
    note = page.get_by_text("Scroll it sideways to see the rest.")
    assert note.is_visible()
    widths = page.evaluate(
        """() => [...document.querySelectorAll("figure .wide")]
        .map((one) => [one.clientWidth, one.scrollWidth])"""
    )
    assert all(seen < whole for seen, whole in widths)
    page.context.close()
    page = open_page(browser, report, "light", viewport=DESKTOP)
    assert page.get_by_text("Scroll it sideways to see the rest.").is_hidden()
    page.context.close()
