"""Alignment of pictures and actions is measured: by how much actions are shifted is found."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from scd.cli import main
from scd.data.alignment import LAGS, columns, measure_alignment
from scd.data.clip import Clip, pixels_to_frames
from scd.data.folder import FolderSource
from scd.data.gym import GymRecording
from scd.data.hdf5 import CSGO
from scd.data.manifest import read_manifest, write_card, write_episode, write_manifest
from scd.data.record import record
from scd.data.source import DataCard, open_source
from scd.data.spaces import ConditionSpec
from scd.data.survey import CLIP_FRAMES, action_in_words, count_actions, sample_clips


@pytest.fixture(scope="module")
def toy() -> list[Clip]:
    return [one.clip for one in sample_clips([open_source("toy:32", "train")], 32)[0]]


def shifted(clips, by: int) -> list[Clip]:
    """Let action i become what action i + by was."""
    return [
        dataclasses.replace(one[3:-3], actions=one.actions[3 + by : len(one) - 3 + by])
        for one in clips
    ]


@pytest.mark.parametrize("by", range(-2, 3))
def test_shifted_actions_of_the_toy_world_are_found(toy, by):
    found = measure_alignment(ConditionSpec(num_actions=5), shifted(toy, by))
    assert found.best_lag == -by and list(found.correlations) == list(LAGS)
    assert found.correlations[-by] > 0.3
    others = [value for lag, value in found.correlations.items() if lag != -by]
    assert max(map(abs, others)) < 0.15
    words = {0: "as it should", 1: "later", -1: "earlier"}[int(np.sign(by))]
    assert words in found.message and (f"move actions {abs(by)}" in found.message) == (by != 0)


@pytest.mark.skipif(not importlib.util.find_spec("minigrid"), reason="no extra gym")
def test_shifted_actions_of_a_recording_are_found(tmp_path, capsys):
    out = record(
        GymRecording(
            out=str(tmp_path / "a"), env="MiniGrid-Empty-8x8-v0", register=("minigrid",),
            episodes=6, frames=100, size=(32,), workers=1,
        )
    )  # fmt: skip
    source = FolderSource(out, "train")
    clips = [one.clip for one in sample_clips([source], 64)[0]]
    for by in range(-2, 3):
        assert measure_alignment(source.card.conditions, shifted(clips, by)).best_lag == -by
    # By the command: the same recording whose actions are written one frame late.
    entries = read_manifest(out)
    for entry in entries:
        path = out / str(entry.actions)
        actions = np.load(path)["actions"]
        np.savez(path, actions=np.concatenate([actions[1:], actions[-1:]]))
    assert main(["data", "check", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "note     alignment: frame i shows action i-1" in printed
    assert "move actions 1 frame later" in printed


def moving(velocities: np.ndarray, actions: np.ndarray, seed: int) -> Clip:
    """A pattern that moves across by so many pixels a frame."""
    rng = np.random.default_rng(seed)
    row = np.convolve(rng.normal(size=600), np.ones(9) / 3, "same") * 60 + 128
    places = np.cumsum(velocities)
    picture = np.stack([np.interp(np.arange(32) + 300 + at, np.arange(600), row) for at in places])
    pixels = np.repeat(picture[:, None, :, None], 32, 1).repeat(3, 3).clip(0, 255).astype(np.uint8)
    return Clip(frames=pixels_to_frames(torch.from_numpy(pixels)), actions=torch.tensor(actions))


def test_inertia_does_not_hide_the_first_frame_that_shows_an_action():
    clips = []
    for seed in range(32):
        rng = np.random.default_rng(100 + seed)
        actions = rng.normal(size=(48, 1)).astype(np.float32)
        # Half shows at once, all of it a frame later.
        pushed = 0.5 * actions[:, 0] + np.concatenate([[0], actions[:-1, 0]])
        clips.append(moving(pushed, actions, seed))
    spec = ConditionSpec(action_dim=1)
    found = measure_alignment(spec, clips)
    assert found.correlations[-1] > found.correlations[0] > 0.1
    assert found.best_lag == 0 and "with action i-1" in found.message
    assert measure_alignment(spec, shifted(clips, 1)).best_lag == -1


def test_what_cannot_be_told_is_not_told(toy):
    spec = ConditionSpec(num_actions=5)
    still = [dataclasses.replace(one, frames=one.frames[:1].expand_as(one.frames)) for one in toy]
    found = measure_alignment(spec, still)
    assert found.best_lag is None and found.message == (
        "cannot tell: nothing moves in the clips that were read"
    )
    held = [dataclasses.replace(one, actions=torch.zeros_like(one.actions)) for one in toy]
    assert "the action never changes" in measure_alignment(spec, held).message
    others = [
        dataclasses.replace(one, actions=two.actions)
        for one, two in zip(toy, toy[1:] + toy[:1], strict=True)
    ]
    found = measure_alignment(spec, others)
    assert found.best_lag is None and "cannot tell: no lag stands out" in found.message
    assert "enough frames" in measure_alignment(spec, [one[:8] for one in toy]).message
    assert measure_alignment(spec, []).best_lag is None


def test_parts_of_actions_are_columns_counts_and_words():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2, (40, 13))
    mouse = np.stack([rng.integers(0, 23, 40), rng.integers(0, 15, 40)], 1)
    actions = np.concatenate([keys, mouse], 1).astype(np.float32)
    found = columns(CSGO, actions)
    assert found.shape == (40, 13 + 23 + 15) and (found[:, :13] == keys).all()
    assert (found[:, 13:36].argmax(1) == mouse[:, 0]).all()
    card = DataCard(
        height=8, width=8, fps=16.0, conditions=CSGO, action_names=CSGO.action_names
    )  # fmt: skip
    clip = Clip(frames=torch.zeros(40, 3, 8, 8), actions=torch.from_numpy(actions))
    counts = count_actions(card, [clip, clip])
    assert list(counts) == ["keys", "clicks", "mouse/x", "mouse/y"]
    assert counts["keys"]["space"] == 2 * keys[:, 4].sum()
    assert counts["mouse/x"]["-1000"] == 2 * (mouse[:, 0] == 12).sum()
    names = [name for name, held in zip(CSGO.action_names, keys[7], strict=False) if held]
    words = action_in_words(card, clip, 7)
    assert words[0] == "keys " + "+".join(name for name in names if name not in ("left", "right"))
    assert words[2] == f"mouse/x {CSGO.action_parts[2].names[mouse[7, 0]]}"


def test_a_report_and_a_sheet_are_written(tmp_path, capsys):
    folder, spec = tmp_path / "d", ConditionSpec(action_dim=2)
    rng, entries = np.random.default_rng(0), []
    for number, split in enumerate(("train", "train", "val")):
        pixels = rng.integers(0, 255, (60, 16, 24, 3), np.uint8)
        actions = rng.uniform(-1, 1, (60, 2)).astype(np.float32)
        entries.append(write_episode(folder, f"e{number}", pixels, actions, 10.0, split))
    card = DataCard(
        height=16, width=24, fps=10.0, conditions=spec, action_names=("steer", "gas")
    )  # fmt: skip
    write_card(folder, card)
    write_manifest(folder, entries)
    (folder / "videos/e1.mp4").write_bytes(b"torn")
    out = tmp_path / "new/report.json"
    assert main(["data", "check", str(folder), "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["kind"] == "folder" and report["fps"] == 10 and "commit" in report
    assert report["splits"]["train"] == {
        "episodes": 1, "frames": 60, "hours": 60 / 36000, "shortest": 60, "longest": 60,
    }  # fmt: skip
    assert len(report["left_out"]) == 1 and "e1.mp4: cannot be read" in report["left_out"][0]
    assert sum(report["actions"]["action"]["gas"]["counts"]) == report["sampled_frames"] == 96
    assert report["alignment"]["best_lag"] is None
    assert "cannot tell" in report["alignment"]["message"]
    assert report["sheet"] == str(out.with_suffix(".png"))
    with Image.open(report["sheet"]) as sheet:
        # Eight pictures of a clip beside each other, at six times their size.
        assert sheet.width == 8 * (24 * 6 + 4)
        shown = np.asarray(sheet)[12 : 12 + 96 : 6, 0:144:6]
    first = open_source(str(folder), "train").read(0, (CLIP_FRAMES - 8) // 2, 1).frames[0]
    assert (shown == ((first + 1) * 127.5).round().byte().movedim(0, -1).numpy()).all()
    steer = report["actions"]["action"]["steer"]
    words = f"action: steer {steer['least']:.3g}..{steer['greatest']:.3g}, gas "
    assert words in capsys.readouterr().out
    assert main(["data", "check", "toy:32", "--clips", "2", "--sheet", f"{tmp_path}/t.png"]) == 0
    assert (tmp_path / "t.png").stat().st_size > 1000
    assert "alignment: " in capsys.readouterr().out
    assert main(["data", "check", str(folder), "--clips", "0"]) == 0
    assert "alignment: " not in capsys.readouterr().out
