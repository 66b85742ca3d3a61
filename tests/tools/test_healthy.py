"""Curves of good and bad runs: actions one frame late, and a table of where each ended."""

import json

import numpy as np

from scd.data.source import open_source
from tools import healthy


def test_late_actions_are_those_of_the_frame_before(folder, tmp_path):
    healthy.late(healthy.Path(folder), tmp_path / "late")
    before, after = (open_source(str(place), "val") for place in (folder, tmp_path / "late"))
    one, other = before.read(0, 0, 6), after.read(0, 0, 6)
    assert np.array_equal(other.actions[1:], one.actions[:-1])
    assert np.array_equal(one.frames, other.frames)


def test_runs_side_by_side(tmp_path, capsys):
    for number, name in enumerate(("good", "late")):
        events = [{"event": "machine", "commit": "c", "command": f"train {name}"}]
        for step in (1, 2, 3):
            loss = {"step": step, "loss": 1 / step}
            events += [loss | {"event": "step"}, loss | {"event": "validation"}]
            events[-1]["action_gap"] = 0.25 * (1 - number)
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(event) + "\n" for event in events)
        (tmp_path / name / "log.jsonl").write_text(lines)
    for folder in ("images", "results"):
        (tmp_path / "docs" / folder).mkdir(parents=True)
    runs = {name: tmp_path / name for name in ("good", "late")}
    table = healthy.draw(runs, tmp_path / "docs").splitlines()
    assert table[2] == "| good | 3 | 0.333 | 0.250 | 75 % |"
    assert table[3] == "| late | 3 | 0.333 | 0.000 | 0 % |"
    kept = json.loads((tmp_path / "docs/results/healthy.json").read_text())
    assert kept["runs"]["good"]["training"] == [[1, 1.0], [2, 0.5], [3, 1 / 3]]
    assert (tmp_path / "docs/images/healthy.png").stat().st_size > 1000
    assert healthy.main(["draw", f"x={tmp_path}"]) == 2
    assert "holds no log.jsonl" in capsys.readouterr().err
