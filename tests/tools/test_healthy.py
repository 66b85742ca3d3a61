"""Curves of good and bad runs: actions one frame late, and a table of where each ended."""

import json
import shutil

import numpy as np
import pytest

from scd.data.source import open_source
from tools import healthy


def test_late_actions_are_those_of_the_frame_before(folder, tmp_path):
    healthy.late(healthy.Path(folder), tmp_path / "late")
    before, after = (open_source(str(place), "val") for place in (folder, tmp_path / "late"))
    one, other = before.read(0, 0, 6), after.read(0, 0, 6)
    assert np.array_equal(other.actions[1:], one.actions[:-1])
    assert np.array_equal(one.frames, other.frames)


@pytest.fixture
def model_config(separable_config):
    return separable_config


def test_runs_side_by_side(run, folder, tmp_path, capsys):
    runs = {}
    for number, name in enumerate(("good", "late")):
        events = [{"event": "machine", "commit": "c", "command": f"train {name}"}]
        for step in (1, 2, 3):
            loss = {"step": step, "loss": 1 / step}
            events += [loss | {"event": "step"}, loss | {"event": "validation"}]
            events[-1]["action_gap"] = 0.25 * (1 - number)
        runs[name] = tmp_path / name
        for step in (2, 3):
            checkpoint = runs[name] / f"step_{step:06d}"
            shutil.copytree(run, checkpoint)
            (checkpoint / "optimizer.pt").touch()
        lines = "".join(json.dumps(event) + "\n" for event in events)
        (runs[name] / "log.jsonl").write_text(lines)
    for place in ("images", "results"):
        (tmp_path / "docs" / place).mkdir(parents=True)
    table = healthy.draw(folder, runs, tmp_path / "docs").splitlines()
    assert [line.split("|")[1:4] for line in table[2:]] == [
        [f" {name} ", f" {step} ", f" {1 / step:.3f} "] for name in runs for step in (2, 3)
    ]
    assert " 0.333 | 0.2500 | 75.0 % |" in table[3] and " 0.333 | 0.0000 | 0.0 % |" in table[5]
    kept = json.loads((tmp_path / "docs/results/healthy.json").read_text())
    assert kept["runs"]["good"]["training"] == [[1, 1.0], [2, 0.5], [3, 1 / 3]]
    psnr = kept["runs"]["late"]["psnr"][1]
    assert psnr["step"] == 3
    assert f"{psnr['model, +1']:.1f} ({psnr['shuffled_actions, +1']:.1f})" in table[5]
    for name in ("healthy", "healthy-samples", "healthy-steps"):
        assert (tmp_path / f"docs/images/{name}.png").stat().st_size > 1000
    shutil.rmtree(runs["good"] / "step_000002")
    shutil.rmtree(runs["good"] / "step_000003")
    assert healthy.main(["draw", folder, f"good={runs['good']}"]) == 2
    assert "good: needed a run with a checkpoint, found none" in capsys.readouterr().err
    (runs["late"] / "log.jsonl").write_text(lines.splitlines()[0] + "\n")
    assert healthy.main(["draw", folder, f"late={runs['late']}"]) == 2
    assert "late: needed a run with a validation" in capsys.readouterr().err
    assert healthy.main(["draw", folder, f"x={tmp_path}"]) == 2
    assert "holds no log.jsonl" in capsys.readouterr().err
