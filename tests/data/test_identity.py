"""What tells the episodes of each kind of collection from others, for a run that is continued."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from scd.common.config import to_json
from scd.data.fingerprint import Kept, changes, fingerprint
from scd.data.prompts import FORMAT, INFO_FILE, PromptsInfo, PromptSource, write_words
from scd.data.source import DataCard, Source, open_source
from scd.data.spaces import ConditionSpec
from tests.data.test_lerobot import WRITTEN, change_table, parquet
from tests.data.test_shards import write_h5, write_tar
from tests.layouts import (
    moving_pictures,
    write_dmlab,
    write_lossy,
    write_minecraft,
    write_ucf101,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lossy(path: Path, like: int) -> None:
    write_lossy(path, moving_pictures(20, 32, 32, like), "libx264", 20)


def copied(name: str) -> Callable[[Path], object]:
    return lambda root: shutil.copytree(WRITTEN / name, root)


def other_actions(table: str) -> Callable[[Path], None]:
    """Change one number in the middle of a table of LeRobot."""

    def change(root: Path) -> None:
        actions = parquet.read_table(root / table, partitioning=None)["action"].to_pylist()
        actions[4] = [one + 1 for one in actions[4]]
        change_table(root / table, action=actions)

    return change


def write_shard(root: Path, said: int = 1) -> None:
    rows = [(f"e{n}", moving_pictures(20, 16, 24, n), {"cls": said * n}) for n in range(2)]
    write_tar(root / "train/a.tar", rows)


def write_prompts(root: Path, last: float = 1.0, negative: float = 0.0) -> None:
    root.mkdir(exist_ok=True)
    files = {"a": 0.5, "b": last, "negative": negative}
    for name, value in files.items():
        write_words(root / f"{name}.safetensors", torch.full((2, 4), value), {"text": name})
    info = PromptsInfo(
        format=FORMAT,
        text="some encoder",
        length=3,
        dim=4,
        prompts=("a dog", "a cat"),
        files=("a.safetensors", "b.safetensors"),
        negative="",
        negative_file="negative.safetensors",
    )
    (root / INFO_FILE).write_text(json.dumps(to_json(info)))


def opened_prompts(name: str) -> Source:
    card = DataCard(height=16, width=16, fps=10.0, conditions=ConditionSpec(), action_names=())
    return PromptSource(Path(name), card, (3, 2, 2), 2)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A collection, what is changed in it, and in which words that is told."""

    write: Callable[[Path], object]
    change: Callable[[Path], object]
    words: str
    name: str = "{}"
    opened: Callable[[str], Source] = lambda name: open_source(name, "train")


LEROBOT_3 = {"name": "lerobot:{}?camera=top", "write": copied("v30_h264")}
LEROBOT_2 = {"name": "lerobot:{}?camera=top", "write": copied("v21")}
MINECRAFT = {"name": "minecraft:{}?size=32&frames=20", "write": write_minecraft}
CHUNK = "chunk-000"
TOP = f"videos/{CHUNK}/observation.images.top/episode_000000.mp4"
H5 = {
    "name": "hdf5:{}?frames_key=seen&actions_key=done",
    "write": lambda root: write_h5(
        root / "train/e0.h5", seen=moving_pictures(20, 16, 24), done=np.arange(20) % 3
    ),
}

KINDS = {
    "lerobot 3, actions": Kind(
        **LEROBOT_3,
        change=other_actions(f"data/{CHUNK}/file-000.parquet"),
        words="changed: episode 0 (actions)",
    ),
    "lerobot 2, actions": Kind(
        **LEROBOT_2,
        change=other_actions(f"data/{CHUNK}/episode_000000.parquet"),
        words="changed: episode 0 (actions)",
    ),
    "lerobot 2, video": Kind(
        **LEROBOT_2,
        change=lambda root: shutil.copy(root / TOP.replace("top", "wrist"), root / TOP),
        words="changed: episode 0 (video)",
    ),
    "minecraft, video": Kind(
        **MINECRAFT,
        change=lambda root: lossy(root / "train/1/1.mp4", 7),
        words="changed: train/1/1.mp4 (file)",
    ),
    "minecraft, actions": Kind(
        **MINECRAFT,
        change=lambda root: np.savez(root / "train/0/0.npz", actions=np.arange(1, 21) % 4),
        words="changed: train/0/0.mp4 (file 2)",
    ),
    "minecraft, episode": Kind(
        **MINECRAFT,
        change=lambda root: (root / "train/0/2.mp4").unlink(),
        words="it has 2 episodes and had 3; gone or unreadable: train/0/2.mp4",
    ),
    "dmlab": Kind(
        name="dmlab:{}?size=16&frames=20",
        write=write_dmlab,
        change=lambda root: shutil.copy(root / "train/0/1.npz", root / "train/0/0.npz"),
        words="changed: train/0/0.npz (file)",
    ),
    "ucf101": Kind(
        name="ucf101:{}?size=32",
        write=lambda root: write_ucf101(root, num_train=1, num_test=1),
        change=lambda root: write_lossy(
            next((root / "UCF-101").glob("*/*_g01_c01.avi")),
            moving_pictures(20, 48, 64, 9),
            "mpeg4",
            25,
        ),
        words="changed: UCF-101/",
    ),
    "hdf5": Kind(
        **H5,
        change=lambda root: write_h5(
            root / "train/e0.h5", seen=moving_pictures(20, 16, 24), done=np.arange(1, 21) % 3
        ),
        words="changed: train/e0.h5 (actions",
    ),
    "tar": Kind(
        name="wds:{}",
        write=write_shard,
        change=lambda root: write_shard(root, 2),
        words="changed: train/a.tar e0.mp4 (file)",
    ),
    "prompts": Kind(
        write=write_prompts,
        change=lambda root: write_prompts(root, last=2.0),
        words="changed: a cat (text)",
        opened=opened_prompts,
    ),
    "prompts, negative": Kind(
        write=write_prompts,
        change=lambda root: write_prompts(root, negative=2.0),
        words="changed: a dog (negative), a cat (negative)",
        opened=opened_prompts,
    ),
}


def marks_of(kind: Kind, root: Path) -> dict:
    # As it is written down and read again.
    return json.loads(json.dumps(fingerprint(kind.opened(kind.name.format(root)))))


@pytest.mark.parametrize("name", KINDS)
def test_what_changed_is_told_and_the_place_is_not(name, tmp_path):
    kind, root = KINDS[name], tmp_path / "here"
    kind.write(root)
    marks = marks_of(kind, root)
    kept = Kept(marks["card"], [(one, said) for one, said in marks["episodes"]])
    assert kept.episodes and all(len(one) > 1 for _, one in kept.episodes)
    elsewhere = shutil.copytree(root, tmp_path / "else/where")
    assert changes(kept, marks_of(kind, elsewhere)) == []
    kind.change(root)
    found = "; ".join(changes(kept, marks_of(kind, root)))
    assert found.startswith(kind.words), found
    assert changes(kept, marks_of(kind, elsewhere)) == []
