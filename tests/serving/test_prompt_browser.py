"""A world of words and keys in a real browser, by `scd play`; run with -m browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from scd.models.build import build
from scd.models.checkpoint import save_world
from tests.browser import in_a_browser
from tests.serving.test_play_browser import Player, scd_play
from tests.tiny import shaken
from tests.tiny_text_world import KINDS, TEXT, text_world
from tests.tiny_wan_vae import write_tiny_parts

pytestmark = in_a_browser

KEYS = replace(TEXT, num_actions=3, actions_per_frame=4)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the page of a world that nobody gave a prompt."""
    folder = tmp_path_factory.mktemp("play")
    world = text_world("separable", write_tiny_parts(folder / "wan"))
    torch.manual_seed(0)
    model = shaken(build(replace(KINDS["separable"], conditions=KEYS)))
    card = replace(world.card, conditions=KEYS, action_names=("nothing", "left", "right"))
    run = save_world(replace(world, model=model, card=card), folder / "words")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        with scd_play(str(run)) as process:
            assert process.stdout is not None
            # Packages of the text encoder may say something first.
            lines = iter(process.stdout.readline, "")
            found = (re.match(r"words: play at (\S+) ", line) for line in lines)
            yield next(one[1] for one in found if one)


def test_words_begin_a_stream_and_change_it(browser: Any, address: str) -> None:
    player = Player(browser, address)
    page = player.page
    page.goto(address)
    player.until(lambda: "type what it shows" in player.text("veil"), "the wish for words")
    # A key that is pressed before there is anything to steer is no fault.
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(300)
    assert player.text("words") == ""
    page.locator("#prompt").fill("the red dog runs")
    page.keyboard.press("Enter")
    player.until(lambda: player.frame > 1, "frames of the words")
    page.locator("#view").focus()
    page.keyboard.down("ArrowLeft")
    player.obeys("left")
    page.keyboard.up("ArrowLeft")
    page.locator("#prompt").fill("snow at night")
    page.locator("#recompute").check(force=True)
    page.locator("#prompt-send").click()
    player.more(2)
    # Typing steers nothing, and the box shows what the server says.
    assert page.locator("#prompt").input_value() == "snow at night"
    last = player.pause()
    pictures = page.evaluate("() => document.getElementById('view').toDataURL()")
    page.locator("#step").click()
    player.until(lambda: player.frame == last + 1, "one more frame")
    assert page.evaluate("() => document.getElementById('view').toDataURL()") != pictures
    page.locator("#restart").click()
    player.until(lambda: player.text("frame") == "–" or player.frame < last, "the beginning")
    assert page.locator("#prompt").input_value() == "snow at night"
    page.locator("#prompt").fill("the red dog " * 60)
    page.locator("#prompt-send").click()
    player.until(lambda: "cut off" in player.text("prompt-cut"), "what of it is not read")
    assert not player.faults
    player.context.close()
