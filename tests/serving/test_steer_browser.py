"""Keys together, mouse, gamepad, touch and the key map, in a real browser; run with -m browser.

What a gamepad does is said by an override of `navigator.getGamepads`: Chromium has no other way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.data.actions import conditions_of
from scd.data.keymap import Binding
from scd.data.source import Source
from scd.models.build import build
from scd.models.checkpoint import World, save_world
from scd.models.config import SamplingConfig, SeparableConfig
from scd.serving.protocol import unpack
from tests.browser import PHONE, in_a_browser
from tests.serving.test_play_browser import Player, address_of, scd_play
from tests.tiny import shaken

pytestmark = in_a_browser

SPACE = spaces.Dict(
    {
        "keys": spaces.MultiBinary(5),
        "mouse": spaces.Box(-1, 1, (2,)),
        "tool": spaces.Discrete(3),
    }
)
SPEC = conditions_of(
    SPACE,
    {
        "keys": ("forward", "left", "back", "right", "jump"),
        "mouse": ("x", "y"),
        "tool": ("none", "hammer", "saw"),
    },
)
IDLE = (0, 0, 0, 0, 0, 0, 0, 0)
PAD = """
window.pad = { id: "Pad", index: 0, connected: true, mapping: "standard", axes: [0, 0, 0, 0],
  buttons: Array.from({ length: 17 }, () => ({ pressed: false, touched: false, value: 0 })) };
navigator.getGamepads = () => [window.pad.connected ? window.pad : null, null, null, null];
"""


WATCHED = """
window.heard = [];
window.Worker = class extends window.Worker {
  constructor(...given) {
    super(...given);
    this.addEventListener("message", ({ data }) =>
      data.type === "frame" && window.heard.push(data.header.action));
  }
};
"""
"""Where a worker of the page makes the frames (`scd export web`), what it says of them."""


def save(config: SeparableConfig, toy: Source, folder: Path, spec: Any, **changes: Any) -> Path:
    """Write a world whose actions are those of a spec."""
    torch.manual_seed(0)
    changes |= {"conditions": spec, "action_names": spec.action_names, "fps": 20.0}
    world = World(
        model=shaken(build(replace(config, conditions=spec))),
        autoencoder=PixelAutoencoder(PixelConfig()),
        card=replace(toy.card, **changes),
        sampling=SamplingConfig(num_steps=2),
        begins_from_nothing=True,
    )
    return save_world(world, folder)


@pytest.fixture(scope="module")
def address(
    separable_config: SeparableConfig, toy_source: Source, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A world with keys, a mouse and a tool."""
    folder = tmp_path_factory.mktemp("steer") / "parts"
    with scd_play(str(save(separable_config, toy_source, folder, SPEC))) as process:
        yield address_of(process, "parts")


def rounded(action: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in action)


class Steered(Player):
    """A page, and the actions that frames say they obey, of a server or of a site's worker."""

    def __init__(self, browser: Any, address: str, **settings: Any) -> None:
        super().__init__(browser, address, **settings)
        self.actions: list[tuple[float, ...]] = []
        self.page.on("websocket", lambda socket: socket.on("framereceived", self._heard))
        self.page.add_init_script(WATCHED)

    def _heard(self, data: Any) -> None:
        if isinstance(data, bytes):
            header, _ = unpack(data)
            self.actions.append(getattr(header, "action", None) or IDLE)

    def comes(self, action: tuple[float, ...]) -> None:
        """Wait for a frame that says that it obeys an action, on the wire and on the page."""
        self.actions.clear()
        self.page.evaluate("() => { window.heard = [] }")

        def has_come() -> bool:
            told = self.page.evaluate("() => window.heard")
            return action in [rounded(one or IDLE) for one in (*self.actions, *told)]

        self.until(has_come, f"a frame of {action}")

    def kept(self) -> Any:
        return json.loads(
            self.page.evaluate("() => localStorage.getItem('scd keys parts')") or "[]"
        )

    def shoot(self, name: str) -> None:
        """Keep a picture of the page, where somebody wants to look at it."""
        if folder := os.environ.get("SCD_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{name}.png")


@pytest.fixture
def steered(browser: Any, address: str) -> Iterator[Steered]:
    player = Steered(browser, address)
    player.page.add_init_script(PAD)
    player.open()
    yield player
    player.context.close()
    assert player.faults == []


def test_keys_that_are_held_together_are_in_one_action(steered: Steered):
    keyboard = steered.page.keyboard
    steered.comes(IDLE)
    keyboard.down("KeyW")
    keyboard.down("KeyD")
    steered.comes((1, 0, 0, 1, 0, 0, 0, 0))
    steered.until(lambda: "forward right" in steered.text("obeyed"), "the chip")
    # The space bar is this world's, and a choice goes with keys.
    keyboard.down("Space")
    keyboard.down("Digit1")
    steered.comes((1, 0, 0, 1, 1, 0, 0, 1))
    steered.shoot("steer-desktop")
    assert steered.text("status") == "live"
    # The picture comes after the message.
    obeyed = steered.page.locator("[data-part='keys'] .obeyed")
    steered.until(lambda: obeyed.count() == 3, "three keys that a frame obeyed")
    keyboard.up("KeyW")
    steered.comes((0, 0, 0, 1, 1, 0, 0, 1))
    # Whoever leaves the page holds nothing there.
    steered.page.evaluate("() => window.dispatchEvent(new Event('blur'))")
    steered.comes(IDLE)
    for key in ("KeyD", "Space", "Digit1"):
        keyboard.up(key)
    keyboard.press("KeyP")
    steered.until(lambda: steered.text("status") == "paused", "the pause")


def test_the_strip_says_of_old_frames_what_they_obeyed(steered: Steered):
    page = steered.page
    page.keyboard.down("KeyA")
    page.keyboard.down("KeyS")
    steered.comes((0, 1, 1, 0, 0, 0, 0, 0))
    page.keyboard.up("KeyA")
    page.keyboard.up("KeyS")
    steered.comes(IDLE)
    steered.pause()
    page.locator("#strip").press("ArrowLeft")
    for _ in range(200):
        if "left back" in steered.text("obeyed"):
            break
        page.locator("#strip").press("ArrowLeft")
    told = "keys left back · mouse 0.00 0.00 · tool do nothing"
    described = page.locator("#strip")
    steered.until(lambda: told in described.get_attribute("aria-valuetext"), "its description")


def test_a_locked_mouse_looks(steered: Steered):
    page = steered.page
    assert "click looks with the mouse" in steered.hints
    box = page.locator("#view").bounding_box()
    across, down = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.click(across, down)
    steered.until(
        lambda: page.evaluate("() => document.pointerLockElement?.id") == "view", "the lock"
    )
    steered.until(lambda: steered.hints == ["esc frees the mouse"], "the hint")
    page.keyboard.down("KeyW")
    steered.comes((1, 0, 0, 0, 0, 0, 0, 0))
    steered.actions.clear()
    page.mouse.move(across + 25, down - 10)
    moved = [0.5, -0.2]

    def turned() -> bool:
        looks = [one[5:7] for one in steered.actions if any(one[5:7])]
        return bool(looks) and [round(value, 4) for value in looks[0]] == moved

    steered.until(turned, f"a turn; {steered.actions}")
    assert all(one[0] == 1 for one in steered.actions)
    # What was moved counts once; the key stays.
    steered.comes((1, 0, 0, 0, 0, 0, 0, 0))
    page.keyboard.up("KeyW")
    page.evaluate("() => document.exitPointerLock()")
    steered.until(lambda: "click looks with the mouse" in steered.hints, "the free mouse")


def test_a_gamepad_is_one_more_pair_of_hands(steered: Steered):
    page = steered.page
    page.evaluate(
        "() => window.dispatchEvent(Object.assign(new Event('gamepadconnected'), {gamepad: pad}))"
    )
    steered.until(lambda: "Gamepad: Pad" in steered.text("words"), "the words")
    # A stick that rests within the dead zone does nothing.
    page.evaluate("() => { pad.axes = [0.1, -1, 0.1, 0] }")
    steered.comes((1, 0, 0, 0, 0, 0, 0, 0))
    page.evaluate("() => { pad.axes = [1, -1, -1, 0.575]; pad.buttons[0].value = 1; }")
    steered.comes((1, 0, 0, 1, 1, -1, 0.5, 0))
    page.evaluate("() => { pad.connected = false }")
    steered.comes(IDLE)


def test_a_changed_key_stays_after_a_reload_and_goes_back(steered: Steered):
    page = steered.page
    page.locator("#keys-card summary").click()
    forward = page.get_by_role("button", name="forward: W")
    forward.click()
    page.keyboard.press("KeyR")
    assert "page's" in page.locator(".listening").inner_text()
    page.keyboard.press("KeyI")
    steered.until(lambda: page.get_by_role("button", name="forward: ").count() > 0, "the key")
    steered.shoot("steer-panel")
    assert {"control": "KeyI", "part": "keys", "entry": 0, "value": 1} in steered.kept()
    page.reload()
    steered.until(lambda: steered.frame > 0, "the stream")
    page.keyboard.down("KeyW")
    page.keyboard.down("KeyI")
    steered.comes((1, 0, 0, 0, 0, 0, 0, 0))
    page.keyboard.up("KeyI")
    steered.comes(IDLE)
    page.keyboard.up("KeyW")
    assert "I forward" in steered.hints or steered.page.locator("#hint.seen").count()
    page.locator("#keys-card summary").click()
    page.locator("#binds-reset").click()
    assert steered.kept() == []
    page.locator("#view").focus()
    page.keyboard.down("KeyW")
    steered.comes((1, 0, 0, 0, 0, 0, 0, 0))
    page.keyboard.up("KeyW")


def test_on_a_phone_fingers_hold_keys_and_pull_the_picture(browser: Any, address: str):
    player = Steered(
        browser, address, viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2
    ).open()
    page = player.page
    assert player.hints == ["Hold a key, or press the picture and pull"]
    cdp = player.context.new_cdp_session(page)
    box = page.locator("#view").bounding_box()
    key = page.locator("[data-part='keys'] [data-way='up']").bounding_box()
    middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "id": 1}
    pulled = {"x": middle["x"] + 28, "y": middle["y"] - 56, "id": 1}
    finger = {"x": key["x"] + 20, "y": key["y"] + 20, "id": 2}

    def touch(kind: str, *points: dict[str, float]) -> None:
        cdp.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [*points]})

    touch("touchStart", middle)
    touch("touchMove", pulled)
    player.comes((0, 0, 0, 0, 0, 0.5, -1, 0))
    # A second finger holds a key meanwhile.
    touch("touchStart", pulled, finger)
    player.comes((1, 0, 0, 0, 0, 0.5, -1, 0))
    player.shoot("steer-phone")
    touch("touchEnd")
    player.comes(IDLE)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]
    for button in page.locator(".key").all():
        size = button.bounding_box()
        assert size["width"] >= 40 and size["height"] >= 40
    player.context.close()
    assert player.faults == []


def test_dials_and_the_map_that_a_card_carries(
    separable_config: SeparableConfig, toy_source: Source, browser: Any, tmp_path: Path
):
    space = spaces.Dict(dials=spaces.MultiDiscrete([3, 20]), wheel=spaces.Box(0, 9, (1,), np.int32))
    spec = conditions_of(space)
    key_map = (
        Binding(control="KeyQ", part="dials", entry=0, value=2.0),
        Binding(control="KeyQ", part="dials", entry=1, value=11.0),
        Binding(control="StickX", part="wheel", value=9.0),
    )
    run = save(separable_config, toy_source, tmp_path / "dials", spec, key_map=key_map)
    with scd_play(str(run)) as process:
        player = Steered(browser, address_of(process, "dials")).open()
        page = player.page
        # One key may do several things; those of a map from the names do nothing here.
        page.keyboard.down("Digit1")
        page.keyboard.down("KeyQ")
        player.comes((2, 11, 0))
        page.keyboard.up("KeyQ")
        player.comes((0, 0, 0))
        # The picture is a stick, for the mouse too; what counts comes in whole numbers.
        box = page.locator("#view").bounding_box()
        page.mouse.move(box["x"] + 90, box["y"] + 90)
        page.mouse.down()
        page.mouse.move(box["x"] + 90 + 28, box["y"] + 90)
        player.until(lambda: any(one in player.actions for one in [(0, 0, 4), (0, 0, 5)]), "a turn")
        page.mouse.up()
        player.comes((0, 0, 0))
        # Kept, what a key on the page did stays until another one is pressed.
        page.get_by_text("keep held").click()
        page.locator("[data-part='dials'] .key", has_text="1").click()
        player.comes((1, 0, 0))
        page.locator("[data-part='dials'] input").fill("17")
        player.comes((1, 17, 0))
        player.context.close()
        assert player.faults == []


def test_arrows_that_stand_for_directions_make_a_cross(browser: Any):
    with scd_play("crafter") as process:
        player = Steered(browser, address_of(process, "crafter")).open()
        page = player.page
        assert player.hints == ["↑ up", "← left", "↓ down", "→ right", "space dig", "X place"]
        across, down = {}, {}
        for way in ("up", "left", "down", "right"):
            box = page.locator(f"[data-way='{way}']").bounding_box()
            assert box is not None
            across[way], down[way] = box["x"], box["y"]
        assert across["left"] < across["up"] == across["down"] < across["right"]
        assert down["up"] < down["left"] == down["down"] == down["right"]
        # The letters are in no map of this world.
        player.pause()
        page.locator("#view").focus()
        page.keyboard.press("KeyW")
        player.press("ArrowUp")
        assert player.text("obeyed") == "up"
        player.context.close()
        assert player.faults == []
