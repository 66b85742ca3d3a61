"""The curve and result file of a run come from its log alone, also after a kill."""

import json

import pytest
from matplotlib.image import imread

from scd.common.runlog import RunLog, read_curve
from scd.common.runtime import describe_hardware
from tools import curves


def write_log(run, parts):
    """Log parts of a run; each begins at a step with a command and logs steps with a loss."""
    run.mkdir()
    for begin, command, losses in parts:
        with RunLog(run, total_steps=10) as log:
            values = {"step": begin, "device": "cpu", "parameters": 7}
            log.event("start" if begin == 0 else "resume", values, show=False)
            machine = {"commit": f"commit at {begin}"} | describe_hardware()
            machine |= {"command": command} if command else {}
            log.event("machine", machine, show=False)
            for step, loss in losses.items():
                values = {"step": step, "loss": loss, "elapsed_s": 2.0 * step, "memory_gib": 0.5}
                log.event("step", values, show=False)
                log.event("validation", {"step": step, "loss": loss + 1}, show=False)


def test_steps_made_twice_count_once(tmp_path):
    write_log(tmp_path / "run", [(0, None, {2: 5.0, 4: 4.0, 6: 3.0}), (3, None, {4: 4.5})])
    found = [(event["step"], event["loss"]) for event in read_curve(tmp_path / "run", "step")]
    assert found == [(2, 5.0), (4, 4.5)]


def test_what_a_resumed_run_has_not_made_again_is_dropped(tmp_path):
    write_log(tmp_path / "run", [(0, None, {2: 5.0, 4: 4.0, 6: 3.0}), (4, None, {})])
    assert [event["step"] for event in read_curve(tmp_path / "run", "validation")] == [2, 4]


def test_result_says_the_command_of_the_last_part(tmp_path):
    first, second = "scd train toy --max-steps 4", "scd train toy --max-steps 9"
    write_log(tmp_path / "run", [(0, first, {2: 5.0, 4: 4.0}), (2, second, {4: 4.5})])
    for folder in ("images", "results"):
        (tmp_path / folder).mkdir()
    curves.draw(tmp_path / "run", "toy", tmp_path)
    result = json.loads((tmp_path / "results/toy_training.json").read_text())
    assert (result["command"], result["commit"]) == (second, "commit at 2")
    assert (result["steps"], result["seconds"], result["parameters"]) == (4, 8.0, 7)
    assert result["curves"]["training"] == {"steps": [2, 4], "loss": [5.0, 4.5]}
    assert result["curves"]["held out"] == {"steps": [2, 4], "loss": [6.0, 5.5]}
    assert imread(tmp_path / "images/toy-loss.png").shape[0] > 100


def test_a_command_that_was_not_logged_is_not_made_up(tmp_path):
    write_log(tmp_path / "run", [(0, None, {2: 5.0})])
    curves.draw(tmp_path / "run", "toy", tmp_path)
    result = json.loads((tmp_path / "results/toy_training.json").read_text())
    assert result["command"] == "not recorded"


def test_a_run_without_steps_is_refused(tmp_path):
    write_log(tmp_path / "run", [(0, None, {})])
    with pytest.raises(ValueError, match="has not logged a step yet"):
        curves.draw(tmp_path / "run", "toy", tmp_path)
