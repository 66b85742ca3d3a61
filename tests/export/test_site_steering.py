"""Keys together, a gamepad and touch, in a site: the tests of the served page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scd.data.source import Source
from scd.models.config import SeparableConfig
from tests.browser import in_a_browser
from tests.export.sites import served_site
from tests.serving import test_steer_browser as steer

pytestmark = in_a_browser

steered = steer.steered

test_keys_together = steer.test_keys_that_are_held_together_are_in_one_action
test_old_frames = steer.test_the_strip_says_of_old_frames_what_they_obeyed
test_gamepad = steer.test_a_gamepad_is_one_more_pair_of_hands
test_touch = steer.test_on_a_phone_fingers_hold_keys_and_pull_the_picture


@pytest.fixture(scope="module")
def address(
    separable_config: SeparableConfig,
    toy_source: Source,
    runtime: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """Of the site, instead of the command."""
    folder = tmp_path_factory.mktemp("steer")
    run = steer.save(separable_config, toy_source, folder / "parts", steer.SPEC)
    with served_site(run, runtime, folder / "site") as address:
        yield address
