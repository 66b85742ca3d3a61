"""The log of a run on disk and on screen."""

import importlib.util
import io
import json

import pytest
from rich.console import Console

from scd.common.runlog import RunLog, duration, read_log, readable


def quiet() -> Console:
    return Console(file=io.StringIO(), soft_wrap=True)


def test_events_are_on_disk_at_once_and_in_order(tmp_path):
    with RunLog(tmp_path, total_steps=2, console=quiet()) as log:
        log.event("step", {"step": 1, "loss": 0.5})
        assert read_log(tmp_path)[0]["loss"] == 0.5
        log.event("validation", {"step": 1, "loss": {"at 0.1": 0.25}})
    names = [event["event"] for event in read_log(tmp_path)]
    assert names == ["step", "validation"]
    assert read_log(tmp_path, "validation")[0]["loss"] == {"at 0.1": 0.25}


def test_a_continued_log_keeps_what_was_there_even_after_a_torn_line(tmp_path):
    with RunLog(tmp_path, total_steps=2, console=quiet()) as log:
        log.event("step", {"step": 1})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    with RunLog(tmp_path, total_steps=2, first_step=1, console=quiet()) as log:
        log.event("step", {"step": 2})
    assert [event["step"] for event in read_log(tmp_path)] == [1, 2]


def test_every_line_is_strict_json_even_for_nan(tmp_path):
    with RunLog(tmp_path, total_steps=1, console=quiet()) as log:
        log.event("step", {"loss": float("nan"), "norms": [float("inf"), 1.0], "path": tmp_path})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = (tmp_path / "log.jsonl").read_text()
    record = json.loads(line, parse_constant=refuse)
    assert record["loss"] is None and record["norms"] == [None, 1.0]
    assert record["path"] == str(tmp_path)


def test_a_process_that_is_not_first_writes_nothing(tmp_path):
    with RunLog(tmp_path, total_steps=1, active=False) as log:
        log.event("step", {"step": 1})
        log.advance(1, "loss 1")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="log.jsonl"):
        read_log(tmp_path)


def test_screen_shows_a_readable_line_and_no_more_when_told(tmp_path):
    screen = io.StringIO()
    with RunLog(tmp_path, total_steps=90, console=Console(file=screen, soft_wrap=True)) as log:
        log.event("step", {"step": 7, "loss": 0.123456, "left_s": 4801.0})
        log.event("checkpoint", {"step": 7}, show=False)
    assert screen.getvalue().split() == "step step 7 of 90 left 80 min loss 0.1235".split()
    assert len(read_log(tmp_path)) == 2


def test_progress_bar_on_a_terminal_shows_steps_and_text(tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with RunLog(tmp_path, total_steps=20, first_step=3, console=console) as log:
        log.advance(12, "loss 0.5")
    assert "12/20" in screen.getvalue() and "loss 0.5" in screen.getvalue()


def test_time_left_is_told_in_words():
    told = [duration(seconds) for seconds in (0.4, 80.0, 100.0, 5000.0, 5500.0, 90_000.0)]
    assert told == ["0 s", "80 s", "2 min", "83 min", "1 h 32 min", "25 h 0 min"]


def test_readable_joins_nested_names():
    assert readable("validation", {"loss": {"at": 0.5}, "step": 3}).split() == [
        *("validation", "loss/at", "0.5", "step", "3")
    ]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, total_steps=5, tracker="tensorboard", console=quiet()) as log:
        log.event("step", {"step": 4, "loss": 0.25, "note": "a text"})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("step/loss")] == [(4, 0.25)]
    assert events.Tags()["scalars"] == ["step/loss"]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(ValueError, match=r'needs the package wandb.*pip install -e "\.\[track\]"'):
        RunLog(tmp_path, total_steps=1, tracker="wandb", console=quiet())
