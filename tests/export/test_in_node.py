"""Every world of the package, exported, and played by what a browser runs, without a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import scd
from scd.data.clip import frames_to_pixels
from scd.export.onnx_engine import OnnxEngine
from scd.export.onnx_world import DESCRIPTION
from scd.export.settings import WebConfig
from scd.export.site import export_web
from scd.models.checkpoint import save_world
from scd.models.names import shipped_names
from scd.streaming.rollout import Rollout
from tests.export.test_onnx import world_of

HOST_BYTES = 25e6
"""Of a file, as many hosts take at most."""

NUM_FRAMES = 6
"""Played behind a clip, which has filled the window by then."""

IN_NODE = Path(__file__).with_name("site_in_node.mjs")


def played_in_node(site: Path, plan: dict[str, Any]) -> dict[str, Any]:
    words = ["node", str(IN_NODE), str(site), json.dumps(plan)]
    run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def picture(encoded: str, height: int, width: int) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(encoded), np.uint8)
    return data.reshape(height, width, 4)[..., :3].astype(int)


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_world_is_exported_and_played(name: str, runtime: Path, tmp_path: Path):
    site = tmp_path / "site"
    export_web(WebConfig(run=name, out=str(site), ort=str(runtime)))
    about = json.loads((site / "world.json").read_text("utf-8"))
    pieces = [piece for file in about["files"].values() for piece in file["pieces"]]
    for piece in pieces:
        data = (site / piece["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == piece["sha256"]
    assert max(file.stat().st_size for file in site.rglob("*") if file.is_file()) < HOST_BYTES

    world = scd.load(name)
    actions = [number % len(world.card.action_names) for number in range(1, NUM_FRAMES + 1)]
    (site / "model" / DESCRIPTION).write_text(
        json.dumps(about["model"]).replace('"model/', '"'), encoding="utf-8"
    )
    engines = None, OnnxEngine(site / "model")
    plain, graphs = (Rollout(world, seed=5, engine=engine) for engine in engines)
    for rollout in (plain, graphs):
        rollout.begin(world.clips[0])
    wanted = []
    for action in actions:
        frame, other = (rollout.step(torch.tensor([action])) for rollout in (plain, graphs))
        assert float((frame - other).abs().max()) < 1e-3
        wanted.append(frames_to_pixels(frame)[0].numpy())
    played = played_in_node(site, {"start": {"clip": 0, "seed": 5}, "actions": actions})
    for shown, frame in zip(played["frames"], wanted, strict=True):
        assert np.abs(picture(shown, *frame.shape[:2]) - frame).max() <= 2


@pytest.mark.slow
def test_any_of_the_last_2000_frames_is_gone_back_to(runtime: Path, tmp_path: Path):
    run = save_world(world_of(join="prefix", num_steps=1), tmp_path / "tiny-world")
    site = tmp_path / "site"
    export_web(WebConfig(run=str(run), out=str(site), ort=str(runtime)))
    actions = [number // 5 % 3 for number in range(2300)]
    # From the newest to the oldest: what is gone back to drops what comes behind it.
    rewinds = [2297, 2240, 1111, 300]
    played = played_in_node(site, {"start": {"seed": 1}, "actions": actions, "rewinds": rewinds})
    frames = played["frames"]
    assert len(set(frames)) > 2000
    for frame, found in zip(rewinds, played["again"], strict=True):
        assert found["shown"] == frames[frame]
        assert found["next"] == frames[frame + 1 : frame + 3]
    assert played["again"][0]["newest"] - played["again"][0]["oldest"] >= 2000
    # Older ones are forgotten, so that memory does not grow.
    assert played["again"][0]["kept"] <= 2048 + 64
