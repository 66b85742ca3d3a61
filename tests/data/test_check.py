"""`scd data check` says what is there, what is missing and where it comes from."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from scd.cli import main
from scd.data.check import CheckConfig, check
from scd.data.manifest import read_manifest, write_episode, write_manifest
from scd.training.presets import PRESETS
from tests.layouts import (
    CLASSES,
    moving_pictures,
    write_dmlab,
    write_lossy,
    write_minecraft,
    write_ucf101,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def found(path, layout: str):
    return check(CheckConfig(path=str(path), layout=layout))


def test_a_folder_of_episodes(folder, tmp_path, capsys):
    assert main(["data", "check", folder]) == 0
    out = capsys.readouterr().out
    assert "there    val: 3 episodes, 60 frames (20 each), shown at 32 x 32" in out
    assert "note     train: no episodes" in out
    (tmp_path / "data/videos/e1.mp4").write_bytes(b"torn")
    assert any("left out 1 of 3 val" in note for note in found(folder, "folder").notes)
    (tmp_path / "data/manifest.jsonl").unlink()
    assert main(["data", "check", folder]) == 2
    captured = capsys.readouterr()
    assert "missing  " in captured.out and "manifest.jsonl" in captured.err
    assert captured.err.count("\n") == 1 and "scd record" in captured.err


def test_episodes_that_are_too_short_are_named(folder, tmp_path, capsys):
    words = ["data", "check", folder]
    assert main([*words, "--num-frames", "20"]) == 0
    assert "shorter" not in capsys.readouterr().out
    assert main([*words, "--preset", "toy"]) == 0
    assert "shorter" not in capsys.readouterr().out
    assert main([*words, "--preset", "scd-m"]) == 2
    printed = capsys.readouterr()
    assert f"missing  val: 3 of 3 episodes are shorter than {PRESETS['scd-m'].num_frames}" in (
        printed.out
    )
    assert "e0" in printed.err and printed.err.count("\n") == 1
    pixels, actions = np.zeros((26, 32, 32, 3), np.uint8), np.zeros(26, np.int64)
    path = Path(folder)
    long = write_episode(path, "long", pixels, actions, 10.0, "val")
    write_manifest(path, [*read_manifest(path), long])
    assert main([*words, "--num-frames", "26"]) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "shorter" in line]
    assert "3 of 4 episodes are shorter than 26 frames and give no clip" in note
    assert "e0" in note and "e2" in note and "has 20" in note and "long" not in note
    assert main([*words, "--preset", "tou"]) == 2
    assert "unknown preset 'tou'; did you mean 'toy'?" in capsys.readouterr().err


def test_frames_that_cannot_be_decoded_are_named_on_request(folder, tmp_path, capsys):
    path = tmp_path / "data/videos/e1.mp4"
    data = bytearray(path.read_bytes())
    begin, stop = len(data) // 3, len(data) // 2
    data[begin:stop] = bytes(stop - begin)
    path.write_bytes(data)
    assert main(["data", "check", folder]) == 0
    assert main(["data", "check", folder, "--decode"]) == 2
    printed = capsys.readouterr()
    assert "damaged  val episode 1: " in printed.out and "e1.mp4: frames 0 .. 19" in printed.err
    assert "--data.on-error skip" in printed.err and "get it" not in printed.out
    assert "e0.mp4" not in printed.out and printed.err.count("\n") == 1


def test_lengths_that_contradict_each_other_are_refused(folder):
    with pytest.raises(ValueError, match="preset and num_frames both"):
        CheckConfig(path=folder, preset="toy", num_frames=3)
    with pytest.raises(ValueError, match="num_frames must be 1 or more, got 0"):
        CheckConfig(path=folder, num_frames=0)


def test_minecraft_and_dmlab(tmp_path, capsys):
    root = write_minecraft(tmp_path / "minecraft")
    words = ["data", "check", f"{root}?size=32&frames=20", "--as", "minecraft"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "train: 3 episodes" in out and "test: 6 episodes" in out and "val: 2 episodes" in out
    assert "3 episodes, FAR learnt from 194,051" in out and "no minecraft_val.json" in out
    # Of the published size none is left.
    assert main(["data", "check", str(root), "--as", "minecraft"]) == 2
    captured = capsys.readouterr()
    assert "frames are 32 x 32, needed 128" in captured.err
    assert "archive.org/details/minecraft_marsh_dataset_aa" in captured.err
    (root / "train/0/0.npz").unlink()
    assert main(words) == 0
    assert "1 files are not there; the first belongs to a video" in capsys.readouterr().out
    shutil.rmtree(root / "test")
    assert any(
        "no folder test/ or validation/" in line for line in found(root, "minecraft").missing
    )
    dmlab = write_dmlab(tmp_path / "dmlab")
    findings = found(f"{dmlab}?size=16&frames=20", "dmlab")
    assert not findings.missing and "train: 2 episodes" in findings.there[0]
    np.savez(dmlab / "test/0/3.npz", video=np.zeros((9, 16, 16, 3), np.uint8), actions=[0] * 9)
    findings = found(f"{dmlab}?size=16&frames=20", "dmlab")
    assert any("3.npz: has 9 frames, needed 20" in line for line in findings.missing)
    assert found(tmp_path / "nowhere", "dmlab").missing == [
        f"{tmp_path / 'nowhere'}: no such folder"
    ]


def test_ucf101(tmp_path, capsys):
    root = write_ucf101(tmp_path / "ucf101")
    assert main(["data", "check", f"{root}?size=16", "--as", "ucf101"]) == 0
    out = capsys.readouterr().out
    assert "train: 6 episodes" in out and "trainlist03.txt names 6 videos, not 9,624" in out
    assert "classInd.txt names 3 classes of 101" in out
    odd = root / f"UCF-101/{CLASSES[0]}/v_{CLASSES[0]}_g03_c01.avi"
    write_lossy(odd, moving_pictures(22, 64, 40), "mpeg4", 29.97)
    notes = found(f"{root}?size=16", "ucf101").notes
    assert any("several frame rates" in note and "29.97: 1" in note for note in notes), notes
    assert any("several sizes ((64, 40): 1, (48, 64): 1)" in note for note in notes), notes
    odd.unlink()
    (root / "UCF-101/BabyCrawling").rename(root / "UCF-101/BabyCrawl")
    missing = found(root, "ucf101").missing
    assert any("BabyCrawling: no such class folder: is it BabyCrawl?" in line for line in missing)
    assert any("of 12 videos of testlist03.txt, the first is" in line for line in missing)
    (root / "ucfTrainTestlist/trainlist03.txt").unlink()
    assert main(["data", "check", str(root), "--as", "ucf101"]) == 2
    err = capsys.readouterr().err
    assert "trainlist03.txt: no such list" in err and "www.crcv.ucf.edu" in err


def test_wrong_usage_is_refused(tmp_path, capsys):
    assert main(["data"]) == 2 and main(["data", "clean"]) == 2
    assert "unknown action 'clean'" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["data", "check", f"{tmp_path / 'empty'}?colour=1", "--as", "dmlab"]) == 2
    assert "unknown fields ['colour']" in capsys.readouterr().err
