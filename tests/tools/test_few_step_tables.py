"""The few-step tables: real evaluations of a tiny world, timed in turns, put together."""

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import turns, updates
from scd.cli import main
from scd.data.source import open_source
from scd.evaluation.inverse_dynamics import (
    InverseDynamics,
    InverseDynamicsConfig,
    TrainedInverseDynamics,
    save_inverse_dynamics,
)
from tools import few_steps, tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model_config(separable_config):
    """One kind is enough."""
    return separable_config


@pytest.fixture
def gathered(run, folder, tmp_path, no_pictures):
    """A folder as runs/few_steps.sh leaves it: one world at two numbers of steps."""
    card = open_source(folder, "val").card
    torch.manual_seed(0)
    config = InverseDynamicsConfig(conditions=card.conditions, width=16, feature_dim=2)
    network = InverseDynamics(config, 32, 32).eval()
    save_inverse_dynamics(
        TrainedInverseDynamics(network=network, card=card, held_out={}), tmp_path / "judge", {}
    )
    out = tmp_path / "few"
    out.mkdir()
    flags = ["--data", folder, "--judge", str(tmp_path / "judge"), "--context", "2"]
    flags += ["--num-clips", "4", "--batch-size", "4", "--device", "cpu"]
    for name, steps in (("dmd-1", "1"), ("teacher-3", "3")):
        for horizon, ending in (("2", ""), ("8", "-long")):
            words = ["--num-steps", steps, "--horizon", horizon]
            assert (
                main(["evaluate", run, *flags, *words, "--out", f"{out}/{name}{ending}.json"]) == 0
            )
    words = [f"teacher-3={run}@3", f"dmd-1={run}@1", "--frames", "4", "--block", "2"]
    words += ["--given", "2", "--warm-up", "1", "--device", "cpu"]
    assert turns.main([*words, "--data", folder, "--out", f"{out}/turns.json"]) == 0
    return out


def test_tables_hold_what_was_measured(gathered, tmp_path):
    assert few_steps.main(["few", str(gathered)], tmp_path) == 0
    result = json.loads((tmp_path / "results/few.json").read_text())
    assert [(row["name"], row["steps"]) for row in result["rows"]] == [("teacher", 3), ("dmd", 1)]
    teacher, student = result["rows"]
    assert teacher["against_first"] == {"control": 0, "frechet_own": 1}
    short = json.loads((gathered / "dmd-1.json").read_text())
    (control,) = [
        row["mean"]
        for row in short["overall"]
        if (row["metric"], row["baseline"]) == ("control", "model")
    ]
    assert student["quality"]["control"]["model"]["mean"] == control
    ours, theirs = (row["quality"]["control"]["model"]["mean"] for row in (student, teacher))
    assert student["against_first"]["control"] == pytest.approx(ours - theirs)
    assert [(part["first"], part["last"]) for part in student["drift"]] == [
        (1, 2), (3, 4), (5, 6), (7, 8)
    ]  # fmt: skip
    long = json.loads((gathered / "dmd-1-long.json").read_text())
    sharp = [
        row["mean"]
        for row in long["rows"]
        if (row["metric"], row["baseline"]) == ("sharpness", "model") and row["horizon"] >= 7
    ]
    assert student["drift"][-1]["sharpness"] == pytest.approx(sum(sharp) / 2)
    assert student["seconds_per_frame"]["total"]["p50"] > 0
    assert teacher["time_over_first"] == {"median": 1, "low": 1, "high": 1}

    page = tables.table("few_steps of few", tmp_path / "results")
    assert f"| {student['quality']['psnr']['1']['mean']:.2f} |" in page
    for label in ("teacher, 3", "dmd, 1", "real frames, actions of another clip"):
        assert f"| {label} |" in page
    width = {line.count("|") for line in page.splitlines()}
    assert len(width) == 1
    page = tables.table("drift of few", tmp_path / "results")
    assert "frames +1..2 to +7..8" in page
    parts = [student["drift"][part]["sharpness"] for part in (0, -1)]
    assert f"| {parts[0]:.3f} to {parts[1]:.3f} |" in page
    refuses_what_cannot_be_compared(*few_steps.read(gathered))


def refuses_what_cannot_be_compared(evaluations, timed):
    with pytest.raises(ValueError, match=r"missing \['dmd-1'\]"):
        worlds = {"teacher-3": timed["worlds"]["teacher-3"]}
        few_steps.gather(evaluations, timed | {"worlds": worlds})
    for change in (
        lambda one: one["settings"].update(seed=1),
        lambda one: one["judge"].update(digest="other"),
        lambda one: one["settings"].update(horizon=3),
    ):
        other = copy.deepcopy(evaluations)
        change(other["dmd-1"][0])
        with pytest.raises(ValueError, match="differ in data, clips, judge or horizon"):
            few_steps.gather(other, timed)
    other = copy.deepcopy(evaluations)
    other["dmd-1"][0]["model"]["sampling"]["num_steps"] = 2
    with pytest.raises(ValueError, match="dmd-1 was timed with other steps"):
        few_steps.gather(other, timed)


def test_a_folder_without_evaluations_is_refused(tmp_path, capsys):
    assert few_steps.main(["few", str(tmp_path)], tmp_path) == 2
    assert "holds no evaluation" in capsys.readouterr().err
    assert few_steps.main([]) == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [("run", "NAME=RUN"), ("a=", "NAME=RUN"), ("a=run@", "NAME=RUN"), ("a=run@x", "NAME=RUN")],
)
def test_words_of_another_form_are_refused(word, message):
    with pytest.raises(ValueError, match=message):
        turns.parse(word)
    assert turns.parse("a=b/c@4") == ("a", "b/c", 4)
    assert turns.parse("a=b/c") == ("a", "b/c", None)


def test_worlds_of_one_name_or_none_are_refused(run, folder, tmp_path, capsys):
    end = ["--data", folder, "--out", str(tmp_path / "t.json")]
    assert turns.main([f"a={run}", f"a={run}@1", *end]) == 2
    assert "each name once" in capsys.readouterr().err
    assert turns.main([f"a={run}", *end]) == 2
    assert "needed 1 clips of 116 frames" in capsys.readouterr().err


STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> calls
while [ "$#" -gt 0 ]; do
  if [ "$1" = --out ]; then mkdir -p "$(dirname "$2")"; touch "$2"; fi
  shift
done
"""


def test_the_script_does_each_part_once(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "bin").mkdir()
    script = tmp_path / "runs/few_steps.sh"
    for name in ("few_steps.sh", "start.sh"):
        (tmp_path / "runs" / name).write_text((ROOT / "runs" / name).read_text())
    for program in ("scd", "python"):
        (tmp_path / "bin" / program).write_text(STAND_IN)
        (tmp_path / "bin" / program).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for again in (False, True):
        subprocess.run(
            ["bash", script, "out", "t", "d", "n"], env=environment, check=True, timeout=60
        )
        calls = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        kinds = [call.split()[1] for call in calls if call.startswith("scd")]
        # Distillation itself goes on or finds itself done.
        assert kinds.count("distill") == 7
        assert kinds.count("evaluate") == (0 if again else 2 * 16)
        assert sum("benchmarks/turns.py" in call for call in calls) == (0 if again else 1)
        assert [call.split()[1] for call in calls[-2:]] == ["tools/few_steps.py", "tools/tables.py"]
        if not again:
            (timed,) = [call for call in calls if "benchmarks/turns.py" in call]
            assert "teacher-50=t@50" in timed and "dmd-1=out/runs/dmd-1@1" in timed
            assert "consistency-2=out/runs/consistency@2" in timed


@pytest.mark.slow
def test_updates_of_two_teachers_are_timed_in_turns(run, folder, tmp_path):
    out = tmp_path / "updates.json"
    words = [f"one={run}", f"two={run}", "--data", "toy:32", "--out", str(out)]
    assert updates.main([*words, "--updates", "2", "--warm-up", "1", "--rounds", "2"]) == 0
    result = json.loads(out.read_text())
    one, two = result["worlds"].values()
    assert one["parameters"] == two["parameters"] and one["time_over_first"]["median"] == 1
    assert 0 < two["time_over_first"]["low"] <= two["time_over_first"]["high"]
    table = few_steps.updates({"updates": result})
    assert table.count("\n| ") == 3 and f"{one['peak_gib']:.2f}" in table


def test_updates_refuse_what_cannot_be_compared(run, folder, tmp_path, capsys):
    for words in (["one"], [f"one={run}", f"one={run}"], [f"one={tmp_path / 'nothing'}"]):
        assert updates.main([*words, "--data", folder, "--out", str(tmp_path / "u.json")]) == 2
        assert "updates.py: " in capsys.readouterr().err
    flags = ["--data", folder, "--out", str(tmp_path / "u.json"), "--updates", "2"]
    with pytest.raises(SystemExit, match="2"):
        updates.main([f"one={run}", *flags, "--warm-up", "2"])
    assert not (tmp_path / "u.json").exists()
