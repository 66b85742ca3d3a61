"""A new kind of source is one module: nothing else names it, and every command finds it."""

import subprocess
import sys
from pathlib import Path

import pytest

import scd.data
from scd.cli import main
from scd.data.loader import Loader
from scd.data.source import Source, find_kinds, open_source

MODULE = '''
"""Counted pictures: frame t of `gray:PATH` is as bright as PATH/levels.txt says in line t."""

from pathlib import Path

import torch

from scd.data.clip import Clip, ConditionSpec
from scd.data.source import DataCard, Opening, Source, Split
from scd.data.spaces import ConditionSpec


class GraySource(Source):
    """Episodes of one split."""

    kind = "gray"
    origin = "a text editor"

    def __init__(self, path: Path, split: Split) -> None:
        self.levels = torch.tensor([float(line) for line in (path / "levels.txt").open()])
        card = DataCard(
            height=4, width=4, fps=2.0, conditions=ConditionSpec(), action_names=()
        )
        super().__init__(f"gray:{path}", split, card, [len(self.levels)])

    @classmethod
    def open(cls, data: str, split: Split, how: Opening) -> "GraySource":
        return cls(Path(data.removeprefix("gray:")), split)

    def _read(self, episode: int, start: int, num_frames: int) -> Clip:
        levels = self.levels[start : start + num_frames]
        return Clip(frames=levels[:, None, None, None].expand(-1, 3, 4, 4), fps=self.card.fps)
'''


@pytest.fixture
def gray(tmp_path, monkeypatch) -> Path:
    """The module beside those of scd/data, and a collection."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/gray_levels.py").write_text(MODULE)
    monkeypatch.setattr(scd.data, "__path__", [*scd.data.__path__, str(tmp_path / "modules")])
    yield tmp_path
    sys.modules.pop("scd.data.gray_levels")


def test_a_module_is_all_that_a_new_kind_of_source_takes(gray, capsys):
    (gray / "levels.txt").write_text("\n".join(str(level / 8) for level in range(8)))
    source = open_source(f"gray:{gray}", "val")
    assert source.read(0, 2, 3).frames[:, 0, 0, 0].tolist() == [2 / 8, 3 / 8, 4 / 8]
    assert Loader(source, 2, 4, seed=0).batch(0).frames.shape == (2, 4, 3, 4, 4)
    with pytest.raises(ValueError, match="val episode 0: frames 6 .. 9 were asked for, .* has 8"):
        source.read(0, 6, 4)
    with pytest.raises(ValueError, match="episodes are 0 .. 0, got 1"):
        source.read(1, 0, 4)
    assert main(["data", "check", str(gray), "--as", "gray"]) == 0
    assert "there    test: 1 episodes, 8 frames (8 each), shown at 4 x 4" in capsys.readouterr().out
    (gray / "levels.txt").unlink()
    assert main(["data", "check", str(gray), "--as", "gray"]) == 2
    assert "levels.txt" in (err := capsys.readouterr().err) and "a text editor" in err


def test_kinds_are_found_without_optional_packages():
    assert {"folder", "latents", "toy", "minecraft", "dmlab", "ucf101"} <= set(find_kinds(Source))
    code = "import sys, scd.data.source as s; s.open_source('toy:32', 'val');" + "; ".join(
        f"assert {name!r} not in sys.modules, {name!r}"
        for name in ("vizdoom", "diffusers", "transformers", "pyarrow", "minigrid", "ale_py")
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_an_unknown_kind_is_answered_with_all_of_them(tmp_path, capsys):
    assert main(["data", "check", str(tmp_path), "--as", "grey"]) == 2
    err = capsys.readouterr().err
    assert "--as must be one of dmlab, folder, " in err and "got 'grey'" in err
