"""A site of the world of the package, played by Chromium, and held against the plain engine."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import scd
from scd.data.clip import frames_to_pixels
from scd.export.serve_site import site_server
from scd.export.settings import WebConfig
from scd.export.site import export_web
from scd.streaming.rollout import Rollout
from tests.browser import DESKTOP, in_a_browser

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
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("npm") is None:
        pytest.skip("needs npm, which fetches onnxruntime-web")
    folder = tmp_path_factory.mktemp("site") / "doom"
    export_web(WebConfig(run="doom", out=str(folder)))
    return folder


@contextmanager
def served(folder: Path) -> Iterator[str]:
    server = site_server(folder, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://localhost:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


def opened(context: Any, address: str) -> Any:
    """A page whose stream has begun, paused."""
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(address)
    page.wait_for_function("() => window.scd?.frame > 48")
    page.keyboard.press("KeyP")
    page.wait_for_function("() => document.getElementById('status').innerText === 'paused'")
    return page


def pressed(page: Any, key: str) -> np.ndarray:
    """Press a key of a paused stream; return the frame that it leads to, [h w 3]."""
    frame = int(page.locator("#frame").inner_text())
    page.keyboard.press(key)
    page.wait_for_function(f"() => document.getElementById('frame').innerText === '{frame + 1}'")
    return picture(page)


def picture(page: Any) -> np.ndarray:
    return np.array(page.evaluate(PIXELS), np.uint8).reshape(64, 64, 4)[..., :3]


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
            frame = pressed(page, key)
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
            assert (pressed(page, key) == seen[FIRST + number]).all(), number
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
