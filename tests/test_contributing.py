"""The examples of CONTRIBUTING.md, run as they stand there."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from scd.cli import main
from scd.data.source import open_source

ROOT = Path(__file__).resolve().parent.parent


def example(path: str) -> str:
    """Return the block of CONTRIBUTING.md that begins with the name of a file."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(rf"```python\n# {re.escape(path)}[^\n]*\n(.*?)```", text, re.DOTALL)
    assert found, f"CONTRIBUTING.md shows no {path}"
    return found[1]


@pytest.fixture
def added(tmp_path, monkeypatch):
    """Put an example beside the modules of its package for the length of a test."""
    names = []

    def add(path: str) -> None:
        name = path.removesuffix(".py").replace("/", ".")
        package = import_module(name.rpartition(".")[0])
        folder = tmp_path / "modules" / package.__name__
        folder.mkdir(parents=True)
        (folder / Path(path).name).write_text(example(path))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        names.append(name)

    yield add
    for name in names:
        sys.modules.pop(name, None)


def write_episodes(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), np.uint8)
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
        np.savez(folder / split / "a.npz", frames=pixels, actions=np.arange(6) % 3)


def test_a_source_of_clips_is_one_file(added, tmp_path, capsys):
    added("scd/data/npz.py")
    write_episodes(tmp_path / "clips")
    clip = open_source(f"npz:{tmp_path / 'clips'}", "train").read(0, 2, 3)
    stored = np.load(tmp_path / "clips/train/a.npz")
    assert clip.actions is not None and clip.actions.tolist() == [2, 0, 1]
    assert clip.frames[0, 1, 3, 5].item() == pytest.approx(stored["frames"][2, 3, 5, 1] / 127.5 - 1)
    assert main(["data", "check", f"npz:{tmp_path / 'clips'}"]) == 0
    assert "1 episodes, 6 frames" in capsys.readouterr().out
    (tmp_path / "clips/val/a.npz").unlink()
    assert main(["data", "check", f"npz:{tmp_path / 'clips'}"]) == 2
    assert "needed .npz files, found none" in capsys.readouterr().err


def test_a_measurement_of_the_probe_is_one_file(added, tmp_path):
    added("scd/probing/measurements/norms.py")
    run = tmp_path / "run"
    tiny = "--model.shape.patch-size 16 --model.block.width 16 --model.block.head-dim 8".split()
    tiny += "--model.block.rotary-axes 4 2 2 --model.num-layers 2 --num-frames 4".split()
    tiny += "--max-steps 1 --batch-size 2 --num-validation-clips 2".split()
    assert main(["train", "toy-dense", "--out", str(run), "--device", "cpu", *tiny]) == 0
    options = "--measurements norms --data toy:32 --num-clips 2 --context 2 --num-steps 3".split()
    out = tmp_path / "probe"
    assert main(["probe", str(run), "--out", str(out), "--device", "cpu", *options]) == 0
    layers = json.loads((out / "probe.json").read_text())["norms"]
    assert [one["layer"] for one in layers] == [1, 2]
    assert all(len(one["by_step"]) == 3 and min(one["by_step"]) > 0 for one in layers)
    assert "How large are features?" in (out / "report.html").read_text()


def test_a_verb_of_the_server_is_two_files(tmp_path):
    """In a copy of the package: the message listed, its method in place, a host that obeys it."""
    copy = tmp_path / "scd"
    shutil.copytree(ROOT / "scd", copy, ignore=shutil.ignore_patterns("worlds", "__pycache__"))
    messages, commands = copy / "serving/messages.py", copy / "serving/commands.py"
    text = messages.read_text()
    end = text.index("COMMANDS: tuple")
    text = text[:end] + example("scd/serving/messages.py") + "\n\n" + text[end:]
    messages.write_text(text.replace("Hello, Create,", "Hello, Create, Undo,", 1))
    text = commands.read_text().replace("    Snapshot,\n", "    Snapshot,\n    Undo,\n", 1)
    before = text.index("    def _moved(")
    commands.write_text(text[:before] + example("scd/serving/commands.py") + "\n" + text[before:])
    program = """
from scd.serving import messages
from tests.tiny_host import done, hosting

with hosting() as host:
    name = done(host.create()).session
    frames = done(host.step(name, action=1, count=3))
    state = done(host.say(messages.Undo, name, count=2))
    again = done(host.step(name, action=1, count=2))
print(state.frame, [f.header.frame for f in again], (again[1].pixels == frames[2].pixels).all())
"""
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 [1, 2] True\n"
