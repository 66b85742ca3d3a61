"""Wrong inputs of every kind, put to the public commands: a part of what tools/fuzz.py runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tools import fuzz, fuzz_mutations

ROOT = Path(__file__).resolve().parent.parent


def test_a_part_of_the_cases_ends_as_it_should(tmp_path):
    # In a process of its own, without threads that a fork would lose and without checks of types.
    words = [sys.executable, "tools/fuzz.py", "--seed", "1", "--count", "60"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["cases"] == 60 and not found["failed"]
    assert found["kinds"].keys() == fuzz.KINDS.keys()
    outcomes = found["kinds"].values()
    assert sum(one["accepted"] for one in outcomes) >= 5
    assert sum(one["refused"] for one in outcomes) >= 20
    assert found["slowest_s"] <= fuzz.LIMIT_S and found["peak_gib"] <= fuzz.LIMIT_GIB


@pytest.mark.parametrize(
    ("status", "said", "why"),
    [
        (0, "", ""),
        (2, "scd: clips/dataset.json: is not JSON\n", ""),
        (2, "step 1 of 2\nscd: clips/dataset.json is damaged. Write it again.\n", ""),
        (0, "Traceback (most recent call last):\n  ...\nKeyError: 'a'\n", "traceback: KeyError"),
        (0, "x.py:3: RuntimeWarning: overflow in cast\n", "warning: x.py"),
        (1, "killed\n", "status 1: killed"),
        (-9, "", "status -9"),
        (2, "", "no message"),
        (2, "scd: clips/dataset.json is\nof two lines\n", "several lines"),
        (2, "scd: clips/dataset.json " + "x" * 1200, "characters"),
        (2, "scd: clips/dataset.json. One. Two. Three.\n", "more than two sentences"),
        (2, "scd: 'utf-8' codec can't decode byte 0xff\n", "does not name"),
    ],
)
def test_what_is_a_failure(status, said, why):
    found = fuzz.judge(status, said, ["clips/dataset.json"])
    assert why in found and bool(why) == bool(found)


def test_results_that_are_not_finite_are_failures(tmp_path):
    right, wrong = tmp_path / "a.json", tmp_path / "b.json"
    right.write_text('{"a": 1.5}')
    wrong.write_text('{"a": NaN}')
    fuzz.check_results([right])
    with pytest.raises(fuzz.Wrong, match="NaN"):
        fuzz.check_results([right, wrong])
    weights = tmp_path / "c.safetensors"
    save_file({"w": torch.tensor([1.0, float("inf")])}, weights)
    with pytest.raises(fuzz.Wrong, match="w is not finite"):
        fuzz.check_results([weights])


def make_files(folder: Path) -> list[str]:
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps({"size": 3, "names": ["x", "y"], "of": {"b": 1.5}}))
    (folder / "b.jsonl").write_text('{"video": "v.mp4", "num_frames": 8}\n' * 3)
    np.savez(folder / "c.npz", actions=np.arange(8))
    state = {"w": torch.ones(2, 3), "v": torch.zeros(4)}
    save_file(state, folder / "d.safetensors")
    torch.save(state, folder / "e.pt")
    return ["a.json", "b.jsonl", "c.npz", "d.safetensors", "e.pt"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_case_depends_on_its_seed_alone_and_changes_what_it_says(tmp_path):
    words = set()
    for number in range(120):
        folders = [tmp_path / f"{number}-{name}" for name in "ab"]
        found = []
        for folder in folders:
            files = make_files(folder)
            before = contents(folder)
            changed, how = fuzz_mutations.mutate(random.Random(number), folder, files)
            others = set(files) - set(changed)
            assert all((folder / name).read_bytes() == before[name] for name in others)
            found.append((changed, how))
        # An archive of numpy holds the time at which it was written, and a file in the old format
        # of torch its tensors in the order of their addresses.
        first, second = (
            {name: data for name, data in contents(folder).items() if name[0] not in "ce"}
            for folder in folders
        )
        assert found[0] == found[1] and first == second
        words.add(found[0][1])
    assert len(words) > 60
