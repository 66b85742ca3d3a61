"""What a world says of itself in a line: by its card, or by the run that made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scd.models.about import LONGEST, About, duration, read_about
from scd.models.names import WORLDS
from scd.models.weights import WEIGHTS_FILE

CARD = """---
license: mit
# not a heading
---

# A world of dunes

| what | |
| --- | --- |
| training | much more than fits into a line |
| trained | in a day on one GPU |
"""


def world_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / WEIGHTS_FILE).touch()
    return path


def run_folder(path: Path, data: str, step: int = 12_000, elapsed_s: float = 3900.0) -> Path:
    folder = world_folder(path / "step_012000")
    (path / "last").write_text(folder.name)
    (path / "config.json").write_text(json.dumps({"kind": "TrainConfig", "data": data}))
    progress = {"step": step, "num_ema_updates": 1, "num_processes": 1, "elapsed_s": elapsed_s}
    (folder / "progress.json").write_text(json.dumps(progress))
    return path


def test_the_card_says_what_it_is_and_how_it_was_trained(tmp_path: Path):
    folder = world_folder(tmp_path / "dunes")
    assert read_about(folder) == About()
    (folder / "README.md").write_text(CARD)
    assert read_about(folder) == About(title="A world of dunes", trained="in a day on one GPU")
    (folder / "README.md").write_text(CARD + "| goal | find the oasis |\n")
    assert read_about(folder).goal == "find the oasis"
    (folder / "README.md").write_text(f"words\n\n# {'long ' * 100}\n")
    assert len(read_about(folder).title) == LONGEST
    (folder / "README.md").write_bytes(b"\xff\xfe# no text")
    with pytest.raises(ValueError, match=r"README\.md line 1: is no text in UTF-8"):
        read_about(folder)


def test_a_run_says_steps_data_and_time_but_no_path(tmp_path: Path):
    run = run_folder(tmp_path / "run", str(tmp_path / "dunes-64"))
    step = run / "step_012000"
    assert read_about(step).trained == "12,000 steps on dunes-64 in 65 min"
    toy = run_folder(tmp_path / "toy", "toy:32", step=40, elapsed_s=9.4)
    step_of_toy = toy / "step_012000"
    assert read_about(step_of_toy) == About(trained="40 steps on toy:32 in 9 s")
    (step_of_toy / "README.md").write_text(CARD)
    assert read_about(step_of_toy).trained == "in a day on one GPU"
    (step / "progress.json").write_text("{}")
    with pytest.raises(ValueError, match="missing fields"):
        read_about(step)


def test_a_moved_step_has_no_run_to_ask(tmp_path: Path):
    run = run_folder(tmp_path / "run", "toy:32")
    moved = (run / "step_012000").rename(tmp_path / "elsewhere")
    assert read_about(moved) == About()


@pytest.mark.parametrize("world", ["doom", "doom-teacher"])
def test_the_worlds_of_the_package_say_both(world: str):
    about = read_about(WORLDS / world)
    assert "Doom" in about.title
    assert about.trained.startswith("in 2.") and about.trained.endswith("one core of a CPU")


def test_durations_are_said_in_the_unit_that_fits():
    assert [duration(seconds) for seconds in (0.4, 99.4, 99.6, 5999.0, 9000.0, 360000.0)] == [
        "0 s", "99 s", "2 min", "100 min", "2.5 h", "100.0 h",
    ]  # fmt: skip
