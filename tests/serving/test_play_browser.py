"""The page of `scd play` in a real browser, served by the real command; run with -m browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.data.source import Source
from scd.models.build import build, num_parameters
from scd.models.checkpoint import World, save_world
from scd.models.config import SamplingConfig, SeparableConfig
from scd.models.names import shipped_names
from tests.browser import DESKTOP, PHONE, in_a_browser
from tests.servers import serving
from tests.tiny import shaken

pytestmark = in_a_browser

WAIT_S = 30.0
"""For what comes within a second unless something is broken."""


@pytest.fixture(scope="module")
def tiny_world(separable_config: SeparableConfig, toy_source: Source) -> World:
    """A world of a few thousand weights, of pixel art."""
    torch.manual_seed(0)
    return World(
        model=shaken(build(separable_config)),
        autoencoder=PixelAutoencoder(PixelConfig()),
        card=replace(toy_source.card, pixel_art=True),
        sampling=SamplingConfig(num_steps=2),
        begins_from_nothing=True,
    )


@contextmanager
def scd_play(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command; what it prints is its `stdout`."""
    words = [sys.executable, "-m", "scd", "play", *arguments, "--no-browser", "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def canvas_of(page: Any, name: str) -> Image.Image:
    """Return what a canvas of the page holds."""
    read = "(name) => document.getElementById(name).toDataURL('image/png').split(',')[1]"
    return Image.open(io.BytesIO(base64.b64decode(page.evaluate(read, name)))).convert("RGB")


def address_of(process: subprocess.Popen[str], name: str) -> str:
    """Where the page of a world is, as the command says."""
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(rf"{name}: play at (http://127\.0\.0\.1:\d+/) .*\n", line)
    assert found is not None, line + process.stdout.read()
    return found[1]


@pytest.fixture(scope="module")
def command(
    tiny_world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[str]]:
    """`scd play` with the tiny world; its address is in `address`."""
    run = save_world(tiny_world, tmp_path_factory.mktemp("play") / "tiny-world")
    (run / "README.md").write_text("| goal | keep to the right |\n")
    with scd_play(str(run), "--data", "toy:32") as process:
        yield process


@pytest.fixture(scope="module")
def address(command: subprocess.Popen[str]) -> str:
    return address_of(command, "tiny-world")


class Player:
    """A page that has begun, and what can be seen of it."""

    def __init__(self, browser: Any, address: str, **settings: Any) -> None:
        self.context = browser.new_context(**({"viewport": DESKTOP} | settings))
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on(
            "console",
            lambda said: said.type == "error" and self.faults.append(said.text),
        )
        self.address = address

    def open(self) -> Player:
        self.page.goto(self.address)
        self.until(lambda: self.frame > 0, "a first frame")
        return self

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """Wait; the page's policy forbids Playwright's own way, which evaluates text."""
        deadline = time.monotonic() + WAIT_S
        while not holds():
            assert time.monotonic() < deadline, f"{what} did not come: {self.seen()}"
            self.page.wait_for_timeout(20)

    @property
    def hints(self) -> list[str]:
        """What is told below the picture."""
        return self.page.locator("#hint > span").all_inner_texts()

    def text(self, name: str) -> str:
        return self.page.locator(f"#{name}").inner_text()

    def seen(self) -> str:
        shown = {name: self.text(name) for name in ("status", "frame", "words", "veil", "obeyed")}
        return f"{shown}, faults {self.faults}"

    @property
    def frame(self) -> int:
        text = self.text("frame")
        return int(text) if text.isdecimal() else -1

    @property
    def picture(self) -> str:
        return self.page.evaluate("() => document.getElementById('view').toDataURL()")

    def more(self, frames: int = 3) -> None:
        begun = self.frame
        self.until(lambda: self.frame >= begun + frames, f"{frames} frames")

    def obeys(self, action: str) -> None:
        self.until(lambda: self.text("obeyed") == action, f"a frame that obeys {action!r}")

    def pause(self) -> int:
        self.page.locator("#run").click()
        self.until(lambda: self.text("status") == "paused", "the pause")
        # A frame that had begun still comes.
        before = -1
        while before != self.frame:
            before = self.frame
            self.page.wait_for_timeout(200)
        return before

    def press(self, key: str) -> None:
        """Press a key in a paused stream: it makes one frame."""
        begun = self.frame
        self.page.keyboard.press(key)
        self.until(lambda: self.frame == begun + 1, f"the frame of {key}")


@pytest.fixture
def player(browser: Any, address: str) -> Iterator[Player]:
    """A page that runs; at the end it must have complained of nothing."""
    player = Player(browser, address).open()
    yield player
    player.page.locator("#view").focus()
    player.context.close()
    assert player.faults == []


def test_the_stream_runs_and_obeys_keys_and_buttons(player: Player):
    page = player.page
    assert page.title() == "tiny-world · scd play"
    player.more()
    player.obeys("do nothing")
    page.keyboard.down("KeyW")
    player.obeys("up")
    assert "obeyed" in page.locator("[data-action='1']").get_attribute("class")
    page.keyboard.down("ArrowLeft")
    player.obeys("left")
    page.keyboard.up("ArrowLeft")
    player.obeys("up")
    page.keyboard.up("KeyW")
    player.obeys("do nothing")
    box = page.locator("[data-way='right']").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    player.obeys("right")
    page.mouse.up()
    player.obeys("do nothing")
    box = page.locator("#view").bounding_box()
    page.mouse.move(box["x"] + 90, box["y"] + 90)
    page.mouse.down()
    page.mouse.move(box["x"] + 90, box["y"] + 140, steps=3)
    player.obeys("down")
    page.mouse.up()
    player.obeys("do nothing")


def test_the_page_says_what_the_world_is_and_its_own_keys(player: Player, tiny_world: World):
    page = player.page
    parameters = f"{num_parameters(tiny_world.model) / 1000:.1f} k parameters"
    line = f"a separable world model · 32 × 32 pixels · {parameters} · 2 steps a frame"
    assert player.text("facts") == line
    assert player.hints == ["W up", "A left", "S down", "D right"]
    assert "nothing" not in page.locator("#view").get_attribute("aria-label")
    page.keyboard.press("?")
    assert page.locator("#help-keys dd").all_inner_texts() == ["up", "left", "down", "right"]
    assert player.text("world-facts") == line
    assert player.text("goal") == "Goal: keep to the right."
    page.locator("#help-close").click()
    # Pixel art keeps its edges, unless the player wants them smooth.
    rendering = "() => document.getElementById('view').style.imageRendering"
    assert page.evaluate(rendering) == "pixelated"
    assert page.locator("#large").is_hidden()
    page.get_by_text("smooth pixels").click()
    assert page.evaluate(rendering) == "auto"
    assert page.locator("#large").is_visible()
    idle = page.locator(".others .key")
    assert idle.inner_text().startswith("do nothing")
    assert idle.get_attribute("aria-label") == "do nothing, key 1"
    card = page.locator("#begin-card").inner_text()
    assert re.search(r"start from\s+a recorded clip", card)


def test_the_world_of_the_package_has_three_keys_a_card_and_smooth_pixels(browser: Any):
    with scd_play("doom") as process:
        player = Player(browser, address_of(process, "doom")).open()
        assert player.text("facts") == (
            "A small separable world of Doom · 64 × 64 pixels · 4.8 M parameters · 4 steps a frame"
            " · trained in 2.5 hours on one core of a CPU"
        )
        assert player.hints == ["W forward", "A left", "D right"]
        assert player.page.locator("#smooth").is_checked()
        # It has clips, and was never taught to begin without one.
        assert player.page.locator("#from-clip").is_visible()
        assert player.page.locator("#from-nothing").is_hidden()
        rendering = "() => document.getElementById('view').style.imageRendering"
        assert player.page.evaluate(rendering) == "auto"
        player.pause()
        # Few pixels are enlarged as Pillow would, both while they stream and afterwards.
        frame, shown = canvas_of(player.page, "view"), canvas_of(player.page, "large")
        assert frame.size == (64, 64) and shown.width == shown.height == 256
        error = {
            way: np.abs(np.float32(frame.resize(shown.size, way)) - np.float32(shown)).mean()
            for way in (Image.Resampling.LANCZOS, Image.Resampling.BILINEAR)
        }
        assert error[Image.Resampling.LANCZOS] < 0.5 < error[Image.Resampling.BILINEAR], error
        assert player.hints == ["Paused: a key makes one frame, space runs"]
        player.page.locator("#view").focus()
        # No action of this world goes back: the key does nothing.
        begun = player.frame
        player.page.keyboard.press("KeyS")
        player.press("KeyW")
        assert (player.frame, player.text("obeyed")) == (begun + 1, "forward")
        player.context.close()
        assert player.faults == []


def test_a_player_who_names_no_world_chooses_one_by_its_moving_picture(browser: Any):
    best, other = shipped_names()[0], shipped_names()[-1]
    with scd_play() as process:
        player = Player(browser, address_of(process, best)).open()
        page = player.page
        entries = page.locator("#worlds-list .world")
        player.until(lambda: entries.count() == len(shipped_names()), "the start screen")
        assert page.locator("#worlds").is_visible()
        assert page.locator("[aria-current]").get_attribute("data-world") == best
        wide = "() => [...document.querySelectorAll('.world img')].every((one) => one.naturalWidth)"
        player.until(lambda: page.evaluate(wide), "the pictures")
        page.locator(f"[data-world={other}]").click()
        player.until(lambda: player.text("world") == other and player.frame > 0, "the other world")
        assert not page.locator("#worlds").is_visible()
        page.locator("#worlds-open").click()
        assert page.locator("[aria-current]").get_attribute("data-world") == other
        # At the same address, and nothing else can be opened there.
        refused = page.request.post(f"{player.address}v1/worlds/none")
        assert refused.status == 404 and "there are " in refused.json()["error"]["message"]
        player.context.close()


def test_a_world_of_vectors_hints_at_the_pairs_of_keys_that_move_them(
    tiny_world: World, browser: Any, tmp_path: Path
):
    spec = replace(tiny_world.card.conditions, num_actions=0, action_dim=2)
    names = ("turn_rate", "throttle")
    model = shaken(build(replace(tiny_world.model.config, conditions=spec)))
    card = replace(tiny_world.card, conditions=spec, action_names=names)
    run = save_world(replace(tiny_world, model=model, card=card), tmp_path / "drive")
    with scd_play(str(run)) as process:
        player = Player(browser, address_of(process, "drive")).open()
        assert player.hints == ["A D turn rate", "S W throttle"]
        player.page.keyboard.down("KeyD")
        player.obeys("1.00 0.00")
        player.context.close()
        assert player.faults == []


def test_a_tap_shorter_than_a_frame_leads_to_one(player: Player):
    page = player.page
    page.locator("#speed").select_option("5")
    player.more(2)
    page.locator("#view").focus()
    page.keyboard.press("KeyD")
    player.obeys("right")
    player.obeys("do nothing")


def test_the_slider_changes_the_steps_of_frames(player: Player):
    page = player.page
    steps = page.locator("[data-number='steps']")
    player.until(lambda: steps.inner_text() == "2", "frames of 2 steps")
    page.locator("#steps").fill("7")
    player.until(lambda: steps.inner_text() == "7", "frames of 7 steps")
    assert player.text("steps-out") == "7"
    numbers = {
        cell.get_attribute("data-number"): cell.inner_text()
        for cell in page.locator("[data-number]").all()
    }
    for part in ("encoder", "decoder", "autoencoder", "queue", "browser", "fps"):
        assert float(numbers[part]) >= 0, part


def test_the_latency_of_actions_and_the_network_are_told(player: Player):
    page = player.page
    for _ in range(2):
        page.keyboard.down("KeyA")
        player.obeys("left")
        page.keyboard.up("KeyA")
        player.obeys("do nothing")
    for name in ("p50", "p99", "network"):
        cell = page.locator(f"[data-number='{name}']")
        player.until(lambda cell=cell: cell.inner_text() != "–", name)
        assert float(cell.inner_text()) > 0
    assert float(page.locator("[data-number='p50']").inner_text()) <= float(
        page.locator("[data-number='p99']").inner_text()
    )


def test_a_rewound_stream_repeats_itself_and_goes_elsewhere(player: Player):
    page = player.page
    player.more()
    begun = player.pause()
    here = player.picture
    page.locator("#view").focus()
    player.press("KeyW")
    up = player.picture
    assert player.text("obeyed") == "up"
    player.press("KeyW")
    page.keyboard.press("Comma")
    page.keyboard.press("Comma")
    player.until(lambda: player.frame == begun, "the earlier frame")
    player.until(lambda: player.picture == here, "its picture")
    assert f"Frame {begun} of {begun + 2}" in player.text("looking")
    page.keyboard.press("Enter")
    player.until(lambda: not page.locator("#looking").is_visible(), "the rewound stream")
    assert (player.frame, player.picture) == (begun, here)
    player.press("KeyW")
    assert player.picture == up
    page.keyboard.press("Comma")
    page.locator("#go-on").click()
    player.until(lambda: player.text("status") == "live", "the stream that goes on")
    player.pause()
    page.locator("#strip").press("Home")
    page.locator("#strip").press("ArrowRight")
    page.keyboard.press("Escape")
    player.until(lambda: not page.locator("#looking").is_visible(), "now")


def test_other_actions_lead_elsewhere_and_forks_keep_both(player: Player):
    page = player.page
    begun = player.pause()
    page.locator("#view").focus()
    player.press("KeyW")
    up = player.picture
    page.keyboard.press("Comma")
    page.locator("#fork-here").click()
    player.until(lambda: page.locator(".take").count() == 2, "the second take")
    player.until(lambda: player.frame == begun, "the fork's frame")
    page.locator("#view").focus()
    player.press("KeyS")
    assert player.text("obeyed") == "down"
    assert player.picture != up
    page.locator(".take").first.click()
    player.until(lambda: player.picture == up, "the first take")
    assert page.locator(".take").first.get_attribute("aria-current") == "true"
    page.get_by_label("Delete take 2").click()
    player.until(lambda: page.locator("#takes").is_hidden(), "one take")


def test_a_moment_is_made_again_from_its_link(browser: Any, address: str):
    player = Player(browser, address).open()
    page = player.page
    player.pause()
    page.locator("#view").focus()
    for key in ("KeyW", "KeyD", "KeyD", "KeyS"):
        player.press(key)
    frame, picture = player.frame, player.picture
    page.keyboard.press("KeyL")
    player.until(lambda: "#moment=" in page.url, "the link")
    link = page.url
    player.context.close()
    # Another player, who has none of the frames.
    other = Player(browser, link)
    other.page.goto(link)
    other.until(lambda: other.frame == frame and other.text("status") == "paused", "the moment")
    other.until(lambda: other.picture == picture, "its picture")
    assert "frames are made again as they were" in other.text("words")
    other.context.close()
    place = link.index("#moment=") + 40
    changed = link[:place] + ("A" if link[place] != "A" else "B") + link[place + 1 :]
    for bad in (changed, link[:-30], link + "x"):
        third = Player(browser, bad)
        third.page.goto(bad)
        third.until(lambda one=third: "link" in one.text("words"), "a refusal")
        assert "changed" in third.text("words") and "#moment" not in third.page.url
        third.context.close()
    # Who changes a link can make its sum too: no billion of frames, and no other message.
    for change in (
        {"actions": [[1, 10**9]]},
        {"actions": [[1, 2.5]]},
        {"actions": 3},
        {"begin": {"type": "pause"}},
        {"begin": None},
    ):
        forged = Player(browser, address)
        forged.page.goto(f"{address}#{forged_link(link, change)}")
        forged.until(lambda one=forged: "needed 1 to 3000" in one.text("words"), "a refusal")
        forged.context.close()


def forged_link(link: str, change: dict[str, Any]) -> str:
    """Return the part of a moment's address after #, with other contents and a sum of its own."""
    body = link.split("#moment=")[1].split(".")[0]
    moment = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    text = json.dumps(moment | change).encode()
    parts = (text, hashlib.sha256(text).digest()[:12])
    return "moment=" + ".".join(base64.urlsafe_b64encode(one).decode().rstrip("=") for one in parts)


def test_a_recording_is_a_video(player: Player, tmp_path: Path):
    page = player.page
    page.locator("#record").click()
    player.more(8)
    with page.expect_download() as saved:
        page.keyboard.press("KeyV")
    path = tmp_path / saved.value.suggested_filename
    assert re.fullmatch(r"tiny-world-\d+-frames\.mp4", path.name)
    saved.value.save_as(path)
    with av.open(path) as video:
        pictures = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert video.streams.video[0].codec_context.name == "h264"
    assert len(pictures) >= 5
    assert pictures[0].shape == (384, 384, 3)
    assert pictures[0].std() > 0


def test_where_the_browser_makes_no_mp4_the_server_does(browser: Any, address: str, tmp_path: Path):
    player = Player(browser, address)
    player.page.add_init_script(
        """const asked = MediaRecorder.isTypeSupported;
        MediaRecorder.isTypeSupported = (kind) => !kind.includes("mp4") && asked(kind);"""
    )
    player.open()
    player.page.locator("#record").click()
    player.more(3)
    last = player.pause()
    with player.page.expect_download() as saved:
        player.page.locator("#record").click()
    assert saved.value.suggested_filename == "tiny-world-stream.mp4"
    saved.value.save_as(tmp_path / "stream.mp4")
    with av.open(tmp_path / "stream.mp4") as video:
        assert sum(1 for _ in video.decode(video=0)) == last + 1
    player.context.close()
    assert player.faults == []


def test_a_stream_begins_with_nothing_a_clip_or_a_picture(player: Player):
    page = player.page
    page.locator("#run").click()
    page.locator("#from-clip").click()
    player.until(lambda: player.frame == 15, "the clip")
    page.locator("#from-nothing").click()
    player.until(lambda: player.frame == -1, "nothing")
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (20, 200, 60)).save(file, "PNG")
    picture = {"name": "green.png", "mimeType": "image/png", "buffer": file.getvalue()}
    page.locator("#file").set_input_files([picture])
    player.until(lambda: player.frame == 0, "the upload")
    player.until(lambda: "Begun from green.png" in player.text("words"), "the words")
    pixel = "() => [...view.getContext('2d').getImageData(9, 9, 1, 1).data].slice(0, 3)"
    green = (20, 200, 60)

    def is_green() -> bool:
        return all(abs(a - b) < 8 for a, b in zip(page.evaluate(pixel), green, strict=True))

    player.until(is_green, "the picture")
    text = {"name": "words.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    page.locator("#file").set_input_files([text])
    player.until(lambda: "words.txt could not be used" in player.text("words"), "the refusal")
    player.faults = [fault for fault in player.faults if "415" not in fault]


WATCHED = """
window.asked = [];
window.got = [];
const { isConfigSupported } = VideoDecoder;
const { configure } = VideoDecoder.prototype;
VideoDecoder.isConfigSupported = (config) => {
  window.asked.push(config.codec);
  return isConfigSupported.call(VideoDecoder, config);
};
VideoDecoder.prototype.configure = function (config) {
  window.got.push(config.codec);
  return configure.call(this, config);
};
"""
"""Notes which codecs the page asks the browser for, and which the streams then have."""


def test_h264_where_there_are_webcodecs_and_jpeg_where_not(browser: Any, address: str):
    player = Player(browser, address)
    player.page.add_init_script(WATCHED)
    player.open()
    session = player.page.evaluate("() => sessionStorage.getItem('scd session')")
    player.page.locator("#codec").select_option("h264")
    player.until(lambda: player.text("status") == "live", "the connection")
    player.more(8)
    assert session == player.page.evaluate("() => sessionStorage.getItem('scd session')")
    assert player.page.locator("#codec").input_value() == "h264", player.seen()
    asked, got = player.page.evaluate("() => [window.asked, window.got]")
    assert asked == got == ["avc1.42c00a"]
    player.context.close()
    assert player.faults == []

    player = Player(browser, address)
    player.page.add_init_script("delete window.VideoDecoder")
    player.open()
    assert player.page.locator("#codec").is_disabled()
    assert "no WebCodecs" in player.text("codec-note")
    player.context.close()


def test_a_lost_connection_comes_back_to_the_same_stream(browser: Any, address: str):
    player = Player(browser, address)
    routes: list[Any] = []

    def between(route: Any) -> None:
        routes.append((route, route.connect_to_server()))

    player.page.route_web_socket(re.compile("/v1/stream$"), between)
    player.open()
    player.more(5)
    session, before = (
        player.page.evaluate("() => sessionStorage.getItem('scd session')"),
        player.frame,
    )
    page_side, server_side = routes[-1]
    page_side.close(code=1011, reason="lost")
    player.until(lambda: player.text("status") != "live", "the loss")
    # Until now the server knew nothing of it.
    server_side.close()
    player.until(lambda: len(routes) == 2, "a second connection")
    player.until(lambda: player.frame > before and player.text("status") == "live", "the stream")
    player.more(3)
    assert session == player.page.evaluate("() => sessionStorage.getItem('scd session')")
    player.page.reload()
    player.until(lambda: player.frame > before, "the same stream after a reload")
    assert session == player.page.evaluate("() => sessionStorage.getItem('scd session')")
    player.page.locator("#run").click()
    player.page.locator("#strip").press("Home")
    player.until(lambda: player.frame < before, "a frame of before the reload")
    player.context.close()
    assert player.faults == []


def test_a_page_that_is_left_says_goodbye_and_one_that_is_loaded_anew_plays_on(browser: Any):
    with serving(left_s=1000.0) as server:

        def left() -> list[bool]:
            """Of each session: whether its page has left it."""
            told = server.service.host.call(
                lambda loop: [one.has_left for one in loop.sessions.playing.values()]
            )
            return told.result(WAIT_S)

        player = Player(browser, server.url + "/").open()
        player.page.locator("#fork").click()
        player.until(lambda: left() == [False, False], "a second take")
        player.page.reload()
        player.until(lambda: sorted(left()) == [False, True], "the take that is played on")
        player.more(3)
        assert sorted(left()) == [False, True]
        player.page.goto("about:blank")
        deadline = time.monotonic() + WAIT_S
        while left() != [True, True]:
            assert time.monotonic() < deadline, left()
            time.sleep(0.02)
        player.context.close()
        assert player.faults == []


def test_a_phone_has_all_at_hand(browser: Any, address: str):
    player = Player(
        browser, address, viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2
    ).open()
    page = player.page
    assert player.hints == ["Hold a key, or press the picture and pull"]
    assert page.locator("#facts").is_visible()
    width = page.evaluate("() => document.documentElement.scrollWidth")
    assert width <= PHONE["width"]
    for name in ("view", "run", "step", "record", "pad", "strip"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= PHONE["height"], name
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"], name
    for button in page.locator(".transport button, .key").all():
        box = button.bounding_box()
        assert box["width"] >= 40 and box["height"] >= 40, button
    scale = page.evaluate("() => document.getElementById('view').clientWidth * 2 / 32")
    assert scale == int(scale) > 8
    page.locator("[data-way='left']").tap()
    player.obeys("left")
    player.obeys("do nothing")
    page.locator("summary", has_text="Begin anew").tap()
    assert page.locator("#from-file").is_visible()
    player.context.close()
    assert player.faults == []


def test_every_control_has_a_name(player: Player):
    nameless = player.page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, [role=slider], canvas")]
        .filter((one) => !one.closest("[aria-hidden=true]") && !one.closest("[role=slider] *"))
        .filter((one) => !(one.getAttribute("aria-label") || one.textContent.trim()
          || [...(one.labels ?? [])].some((label) => label.textContent.trim())))
        .map((one) => one.outerHTML)"""
    )
    assert nameless == []


def test_the_command_tells_of_the_first_frame_and_ends_by_a_signal(
    command: subprocess.Popen[str], address: str, browser: Any
):
    player = Player(browser, address).open()
    assert command.stdout is not None
    line = command.stdout.readline()
    assert re.fullmatch(r"first frame on the screen \d+\.\d s after .*\n", line), line
    command.send_signal(signal.SIGINT)
    assert command.wait(WAIT_S) == 130
    assert "stopped by SIGINT" in command.stdout.read()
    player.until(lambda: player.text("status") == "reconnecting", "the loss")
    assert "connection was lost" in player.text("veil") or "does not answer" in player.text("veil")
    player.context.close()
