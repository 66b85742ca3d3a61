"""A site of the world of the package, played by Chromium, and held against the plain engine."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import scd
from scd.data.clip import frames_to_pixels
from scd.export.settings import WebConfig
from scd.export.site import export_web
from scd.models.names import shipped_names
from scd.streaming.rollout import Rollout
from tests.browser import CHROMIUM, DESKTOP, in_a_browser
from tests.export.sites import served, served_site

pytestmark = in_a_browser

WAIT_MS = 120_000
"""For what takes a second or two on an idle machine."""

FIRST = 48
"""Frame that is made first: a clip of the world has as many."""

PIXELS = """() => {
  const view = document.getElementById("view");
  const { data } = view.getContext("2d").getImageData(0, 0, view.width, view.height);
  return Array.from(data);
}"""


@pytest.fixture(scope="module")
def site(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "doom"
    export_web(WebConfig(run="doom", out=str(folder), ort=str(runtime)))
    return folder


def opened(context: Any, address: str, first: int = FIRST) -> Any:
    """A page whose stream has begun, paused."""
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(address)
    page.wait_for_function(f"() => window.scd?.frame > {first}")
    page.keyboard.press("KeyP")
    page.wait_for_function("() => document.getElementById('status').innerText === 'paused'")
    return page


def pressed(page: Any, key: str) -> None:
    """Press a key of a paused stream, and wait for the frame that it leads to."""
    frame = int(page.locator("#frame").inner_text())
    page.keyboard.press(key)
    page.wait_for_function(f"() => document.getElementById('frame').innerText === '{frame + 1}'")


def picture(page: Any, height: int = 64, width: int = 64) -> np.ndarray:
    return np.array(page.evaluate(PIXELS), np.uint8).reshape(height, width, 4)[..., :3]


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_world_is_played(name: str, runtime: Path, tmp_path: Path, browser: Any):
    world = scd.load(name)
    height, width = world.card.height, world.card.width
    bound = [one for one in world.card.keys if one.control.startswith(("Key", "Arrow"))]
    keys = {one.control: int(one.value) for one in bound}
    rollout = Rollout(world, seed=0)
    rollout.begin(world.clips[0])
    first = rollout.num_frames
    with served_site(Path(name), runtime, tmp_path / "site") as address:
        context = browser.new_context(viewport=DESKTOP)
        page = opened(context, address, first)
        page.keyboard.press("KeyR")
        page.wait_for_function(
            f"() => document.getElementById('frame').innerText === '{first - 1}'"
        )
        assert len(keys) >= 3
        for key, action in list(keys.items()) * 4:
            pressed(page, key)
            (wanted,) = frames_to_pixels(rollout.step(torch.tensor([action])))
            shown = picture(page, height, width)
            assert np.abs(shown.astype(int) - wanted.numpy()).max() <= 2, (name, key)
        context.close()


def test_a_site_plays_the_frames_of_the_plain_engine(site: Path, browser: Any):
    world = scd.load("doom")
    rollout = Rollout(world, seed=0)
    with served(site) as address:
        context = browser.new_context(viewport=DESKTOP)
        page = opened(context, address)
        assert page.evaluate("() => scd.backend").startswith("wasm-")
        assert "WebAssembly" in page.evaluate("() => document.getElementById('made-by').innerText")
        page.keyboard.press("KeyR")
        page.wait_for_function("() => document.getElementById('frame').innerText === '47'")
        rollout.begin(world.clips[0])
        seen, worst = {}, 0
        for number in range(64):
            key, action = [("KeyW", 1), ("KeyA", 2), ("KeyD", 3)][number // 6 % 3]
            pressed(page, key)
            frame = picture(page)
            seen[FIRST + number] = frame
            (wanted,) = frames_to_pixels(rollout.step(torch.tensor([action])))
            worst = max(worst, int(np.abs(frame.astype(int) - wanted.numpy()).max()))
        assert worst <= 2
        # Looked back at, and gone on from: the very frames again.
        for _ in range(9):
            page.keyboard.press("Comma")
        page.wait_for_function("() => document.getElementById('frame').innerText === '102'")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.getElementById('looking').hidden")
        assert (picture(page) == seen[102]).all()
        for number in range(103 - FIRST, 64):
            key = ["KeyW", "KeyA", "KeyD"][number // 6 % 3]
            pressed(page, key)
            assert (picture(page) == seen[FIRST + number]).all(), number
        context.close()


def test_a_site_plays_without_a_network_and_takes_pictures(site: Path, browser: Any):
    with served(site) as address:
        context = browser.new_context(viewport=DESKTOP)
        page = opened(context, address)
        context.set_offline(True)
        page.reload()
        page.wait_for_function("() => window.scd?.frame > 48")
        assert page.evaluate("() => window.crossOriginIsolated")
        image = io.BytesIO()
        Image.new("RGB", (200, 100), (90, 60, 30)).save(image, "PNG")
        choose = page.locator("#file")
        choose.set_input_files(
            {"name": "mine.png", "mimeType": "image/png", "buffer": image.getvalue()}
        )
        page.wait_for_function(
            "() => document.getElementById('words').innerText.includes('Begun from mine.png')"
        )
        choose.set_input_files({"name": "no.png", "mimeType": "image/png", "buffer": b"no picture"})
        page.wait_for_function(
            "() => document.getElementById('words').innerText.includes('no picture that')"
        )
        context.close()


def test_a_file_of_another_hash_is_told(site: Path, browser: Any, tmp_path: Path):
    copy = shutil.copytree(site, tmp_path / "copy")
    weights = copy / json.loads((copy / "world.json").read_text("utf-8"))["model_files"][0]
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    with served(copy) as address:
        context = browser.new_context(viewport=DESKTOP)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(address)
        page.wait_for_function(
            "() => document.getElementById('veil').innerText.includes('is not the file of this')"
        )
        weights.unlink()
        page.locator("#retry").click()
        page.wait_for_function(
            "() => document.getElementById('veil').innerText.includes('did not arrive (404)')"
        )
        context.close()


def veil(page: Any, text: str) -> None:
    """Wait until the page says why nothing is played."""
    page.wait_for_function(
        "(text) => document.getElementById('veil').innerText.includes(text)", arg=text
    )


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("WebAssembly.validate = () => false", "no WebAssembly with SIMD"),
        ("delete window.WebAssembly", "no WebAssembly with SIMD"),
        ("delete window.Worker", "no workers that draw"),
        ("delete window.OffscreenCanvas", "no workers that draw"),
    ],
)
def test_a_browser_that_lacks_something_is_told(without: str, said: str, site: Path, browser: Any):
    with served(site) as address:
        context = browser.new_context(viewport=DESKTOP)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        # Once as it is: the second time all is kept, and the model begins before the page.
        page.goto(address)
        page.wait_for_function("() => window.scd?.frame > 48")
        page.add_init_script(without)
        page.reload()
        veil(page, f"This browser has {said}")
        assert page.locator("#retry").is_visible()
        assert faults == []
        context.close()


def test_where_a_site_must_be_opened_is_told(site: Path, browser: Any):
    page = browser.new_page()
    page.goto((site / "index.html").as_uri())
    veil(page, "python -m http.server 8000")
    page.close()
    # A name that is not this machine's, on http.
    words = ["--no-sandbox", "--host-resolver-rules=MAP site.test 127.0.0.1"]
    other = browser.browser_type.launch(executable_path=CHROMIUM, args=words)
    with served(site) as address:
        page = other.new_page()
        page.goto(address.replace("localhost", "site.test"))
        veil(page, "on https and on localhost alone")
    other.close()


def test_a_site_that_was_replaced_is_played_anew(
    site: Path, runtime: Path, browser: Any, tmp_path: Path
):
    """Whoever was there before gets the new version, and keeps what both of them have."""
    folder = shutil.copytree(site, tmp_path / "site")
    with served(folder) as address:
        context = browser.new_context(viewport=DESKTOP)
        page = opened(context, address)
        export_web(WebConfig(run="doom-teacher", out=str(folder), ort=str(runtime)))
        page.goto(address)
        page.wait_for_function(
            "() => window.scd?.frame > 0"
            " && document.getElementById('world').innerText === 'doom-teacher'"
        )
        kept = page.evaluate(
            """async () => {
              const files = (await caches.keys()).find((key) => key.endsWith(" files"));
              return (await (await caches.open(files)).keys()).map((one) => one.url);
            }"""
        )
        listed = json.loads((folder / "world.json").read_text("utf-8"))["files"]
        hashes = {piece["sha256"] for file in listed.values() for piece in file["pieces"]}
        assert kept and {url.split("sha256=")[1] for url in kept} <= hashes
        context.close()
