"""What was hidden: the smallest world in which only memory can tell what comes back."""

import json

import numpy as np
import pytest
import torch

from scd.data.clip import pixels_to_frames
from scd.data.source import open_source
from tools import remembered
from tools.remembered import CLOSED, COLOURS, CURTAIN, OPEN, pictures, right


def test_fields_count_one_by_one():
    colours = np.array([[0, 1, 2, 7], [3, 4, 5, 6]])
    shown = np.stack([pictures(one, [OPEN])[0] for one in colours])
    assert right(pixels_to_frames(torch.from_numpy(shown)), colours).tolist() == [1, 1]
    shown[0, :8, 8:] = COLOURS[6]
    shown[1, 8:] = COLOURS[1]
    # Blurred by a quarter, a colour is still the nearest.
    blurred = (0.75 * shown + 0.25 * CURTAIN).astype(np.uint8)
    assert right(pixels_to_frames(torch.from_numpy(blurred)), colours).tolist() == [0.75, 0.5]


def test_clips_show_what_their_actions_say(tmp_path):
    remembered.record(tmp_path, episodes=40, longest=5)
    source = open_source(str(tmp_path), "train")
    clip = source.read(0, 0, source.num_frames(0))
    closed = clip.actions == CLOSED
    grey = pixels_to_frames(torch.tensor([[[CURTAIN] * 3]], dtype=torch.uint8)).flatten()[0]
    assert (clip.frames[closed] == grey).all() and 0 < closed.sum() < len(closed)
    seen = clip.frames[~closed]
    assert (seen == seen[0]).all() and (seen != grey).all()
    spells = "".join(map(str, clip.actions.tolist())).strip("0").split("0")
    assert max(map(len, spells)) == 5


def test_both_kinds_are_trained_and_asked(tmp_path, capsys):
    out = tmp_path / "remembered.json"
    words = ["--out", str(out), "--runs", str(tmp_path / "runs"), "--steps", "2", "--seeds", "1"]
    words += ["--hidden", "1", "3", "--clips", "4", "--episodes", "40"]
    assert remembered.main(words) == 0
    result = json.loads(out.read_text())
    again = [*words, "--out", str(tmp_path / "again.json"), "--kinds", "dense", "--caches"]
    assert remembered.main([*again, "24/1", "2/0"]) == 0
    rows = json.loads((tmp_path / "again.json").read_text())["rows"]
    names = ["dense, 2 steps, window 24, sinks 1"] * 2 + ["dense, 2 steps, window 2, sinks 0"] * 2
    assert [row["baseline"] for row in rows] == names
    # As they were trained.
    assert [row["mean"] for row in rows[:2]] == [row["mean"] for row in result["rows"][2:]]
    asked = [(row["baseline"], row["horizon"]) for row in result["rows"]]
    kinds = ("separable, 2 steps", "dense, 2 steps")
    assert asked == [(kind, hidden) for kind in kinds for hidden in (1, 3)]
    for row in result["rows"]:
        assert row["mean"] == pytest.approx(np.mean(row["by_seed"]), abs=1e-3)
        assert row["ci_low"] <= row["mean"] <= row["ci_high"] and len(row["by_seed"]) == 1
    assert out.with_suffix(".png").stat().st_size > 1000
    head, _, first, second, *others = remembered.remembered_table(result).splitlines()
    assert head == "| hidden for, frames | 1 | 3 |" and len(others) == 2
    seen = result["rows"][0]
    assert first.startswith(f"| separable, 2 steps | {seen['mean']:.2f} [{seen['ci_low']:.2f}, ")
    assert second.startswith(f"| by seed | {seen['by_seed'][0]:.2f} |")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hidden", "0"], "hidden must be 1 or more"),
        (["--seeds", "0"], "seeds"),
        (["--episodes", "5"], "episodes"),
        (["--caches", "24"], "caches must be WINDOW/SINKS"),
        (["--kinds"], "one or more of each of kinds"),
        (["--out", "a.txt"], "a .json file, got a.txt"),
    ],
)
def test_settings_out_of_range_are_refused(words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        remembered.main(["--out", "a.json", *words])
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
