"""What the page of `scd play` does, done by a site: the same tests at another address."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import scd
from scd.data.clip import frames_to_pixels
from scd.data.source import Source
from scd.models.checkpoint import World
from scd.models.clips import Clips
from scd.streaming.rollout import Rollout
from tests.browser import CHROMIUM, in_a_browser
from tests.export.sites import served_site
from tests.serving import test_play_browser as play

pytestmark = in_a_browser

tiny_world, player = play.tiny_world, play.player

test_keys_and_buttons = play.test_the_stream_runs_and_obeys_keys_and_buttons
test_what_the_world_is = play.test_the_page_says_what_the_world_is_and_its_own_keys
test_a_tap = play.test_a_tap_shorter_than_a_frame_leads_to_one
test_steps = play.test_the_slider_changes_the_steps_of_frames
test_latency = play.test_the_latency_of_actions_and_the_network_are_told
test_rewind = play.test_a_rewound_stream_repeats_itself_and_goes_elsewhere
test_forks = play.test_other_actions_lead_elsewhere_and_forks_keep_both
test_link = play.test_a_moment_is_made_again_from_its_link
test_recording = play.test_a_recording_is_a_video
test_beginnings = play.test_a_stream_begins_with_nothing_a_clip_or_a_picture
test_phone = play.test_a_phone_has_all_at_hand
test_names_of_controls = play.test_every_control_has_a_name


@pytest.fixture(scope="module")
def run(tiny_world: World, toy_source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world with a clip of its own."""
    clip = toy_source.read(0, 0, 16)
    assert clip.actions is not None
    frames = frames_to_pixels(clip.frames).movedim(-1, -3)[None]
    clips = Clips(frames=frames, actions=clip.actions[None], fps=clip.fps)
    world = replace(tiny_world, own_clips=clips)
    folder = world.save_pretrained(tmp_path_factory.mktemp("run") / "tiny-world")
    (folder / "README.md").write_text("| goal | keep to the right |\n")
    return folder


@pytest.fixture(scope="module")
def address(run: Path, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the site, instead of the command."""
    with served_site(run, runtime, tmp_path_factory.mktemp("site")) as address:
        yield address


def played(player: play.Player) -> str:
    """Play some frames behind the clip; return the link to the last of them."""
    page = player.page
    page.locator("#seed").fill("11")
    page.locator("#seed").press("Enter")
    player.pause()
    page.locator("#from-clip").click()
    player.until(lambda: player.frame == 15, "the clip")
    page.locator("#view").focus()
    for key in ("KeyW", "KeyD", "KeyD", "KeyS", "KeyA"):
        player.press(key)
    page.keyboard.press("KeyL")
    player.until(lambda: "#moment=" in page.url, "the link")
    return page.url.split("#moment=")[1]


def shown(player: play.Player) -> np.ndarray:
    """Pixels of the page, [h w 3]."""
    data = player.page.evaluate(
        """() => {
          const view = document.getElementById("view");
          return Array.from(view.getContext("2d").getImageData(0, 0, 32, 32).data);
        }"""
    )
    return np.array(data, int).reshape(32, 32, 4)[..., :3]


def made_again(link: str, run: Path) -> np.ndarray:
    """The moment of a link by the plain engine, [h w 3]."""
    body = link.split(".")[0]
    moment = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    assert moment["begin"]["seed"] == 11 and len(moment["actions"]) == 4
    world = scd.load(run)
    rollout = Rollout(world, seed=moment["begin"]["seed"])
    rollout.begin(world.clips[moment["begin"]["clip"]])
    frame = torch.empty(0)
    for action, count in moment["actions"]:
        for _ in range(count):
            frame = rollout.step(torch.tensor([action]))
    return frames_to_pixels(frame)[0].numpy()


def test_a_link_leads_to_the_same_frames_in_python(browser: Any, address: str, run: Path):
    player = play.Player(browser, address).open()
    link = played(player)
    assert np.abs(made_again(link, run) - shown(player)).max() <= 2
    player.context.close()
    # The page of `scd play` takes the link for one of its own world.
    with play.scd_play(str(run)) as process:
        other = play.Player(browser, play.address_of(process, "tiny-world"))
        other.page.goto(f"{other.address}#moment={link}")
        other.until(lambda: other.frame == 20 and other.text("status") == "paused", "the moment")
        assert "frames are made again as they were" in other.text("words")
        other.context.close()
        assert other.faults == []


def test_webgpu_makes_the_same_frames(browser: Any, run: Path, runtime: Path, tmp_path: Path):
    words = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--no-sandbox"]
    other = browser.browser_type.launch(executable_path=CHROMIUM, args=words)
    with served_site(run, runtime, tmp_path / "site", "fp32") as address:
        player = play.Player(other, f"{address}?backend=webgpu")
        player.page.goto(player.address)
        player.until(lambda: player.frame > 0, "a first frame")
        if player.page.evaluate("async () => !(await navigator.gpu?.requestAdapter())"):
            pytest.skip("this Chromium has no WebGPU")
        assert player.page.evaluate("() => scd.backend") == "webgpu"
        assert np.abs(made_again(played(player), run) - shown(player)).max() <= 2
        player.context.close()
    other.close()
