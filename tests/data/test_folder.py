"""Folders of videos: what is written is read back, and what does not fit is refused by name."""

import json
import logging
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from scd.data.clip import frames_to_pixels, pixels_to_frames
from scd.data.folder import FolderSource
from scd.data.loader import Loader
from scd.data.manifest import (
    choose_splits,
    read_actions,
    read_manifest,
    write_card,
    write_episode,
    write_manifest,
)
from scd.data.record import record
from scd.data.source import DataCard, open_source
from scd.data.spaces import ConditionSpec
from scd.data.toy import ToyRecording, ToyWorld
from scd.data.video import write_video

SCRIPT = Path(__file__).resolve().parents[2] / "examples/clips_from_videos.py"


def toy_episode(episode: int, num_frames: int = 12) -> tuple[np.ndarray, np.ndarray]:
    clip = ToyWorld(32, "train").read(episode, 0, num_frames)
    return frames_to_pixels(clip.frames).numpy(), clip.actions.numpy()


def write_folder(
    path: Path, conditions: ConditionSpec | None = None, num_labels: int = 0
) -> DataCard:
    """Two train episodes and one val episode of the toy world."""
    conditions = conditions or ConditionSpec(num_actions=5, num_labels=num_labels)
    num_names = conditions.num_actions or conditions.action_dim
    card = DataCard(
        height=32,
        width=32,
        fps=12.0,
        conditions=conditions,
        action_names=tuple(f"action {i}" for i in range(num_names)),
    )
    entries = []
    for episode, split in enumerate(("train", "val", "train")):
        pixels, actions = toy_episode(episode)
        if conditions.action_dim:
            actions = np.eye(5, conditions.action_dim, dtype=np.float32)[actions]
        if not conditions.has_actions:
            actions = None
        label = episode if conditions.num_labels else None
        entries.append(
            write_episode(path, f"{episode:03d}", pixels, actions, card.fps, split, label)
        )
    write_card(path, card)
    write_manifest(path, entries)
    return card


def test_what_is_written_is_read_back(tmp_path):
    card = write_folder(tmp_path)
    source = FolderSource(tmp_path, "train", strict=True)
    assert source.card == card and source.num_episodes == 2 and source.num_frames(1) == 12
    pixels, actions = toy_episode(2)
    clip = source.read(1, 5, 4)
    assert torch.equal(clip.frames, pixels_to_frames(torch.from_numpy(pixels[5:9])))
    assert clip.actions.tolist() == actions[5:9].tolist()
    assert (clip.fps, clip.label) == (12.0, None)
    assert open_source(str(tmp_path), "val").num_episodes == 1
    with pytest.raises(ValueError, match=r"002.mp4: frames 10 .. 13 .* has 12"):
        source.read(1, 10, 4)


def test_continuous_actions_labels_and_bare_videos(tmp_path):
    write_folder(tmp_path / "vectors", ConditionSpec(action_dim=2))
    actions = FolderSource(tmp_path / "vectors", "train").read(0, 2, 3).actions
    assert actions.shape == (3, 2) and actions.dtype == torch.float32
    write_folder(tmp_path / "labels", ConditionSpec(num_labels=3))
    clip = FolderSource(tmp_path / "labels", "train").read(1, 0, 3)
    assert clip.label == 2 and clip.actions is None
    batch = Loader(FolderSource(tmp_path / "labels", "train"), 2, 6, seed=0).batch(0)
    assert sorted(batch.conditions.labels.tolist()) == [0, 2]


def test_toy_worlds_are_opened_by_name(tmp_path):
    assert open_source("toy:64", "val").card.height == 64
    with pytest.raises(ValueError, match="'toy:32' and 'toy:64'"):
        open_source("toy:48", "train")
    with pytest.raises(FileNotFoundError, match="nowhere: no such data folder"):
        open_source(str(tmp_path / "nowhere"), "train")


def break_video(folder: Path, how: str) -> None:
    video = folder / "videos/000.mp4"
    if how == "cut off":
        video.write_bytes(video.read_bytes()[:-300])
    elif how == "no video":
        video.write_text("words")
    elif how == "missing":
        video.unlink()
    else:
        write_video(video, toy_episode(0)[0][:8], 12.0, lossless=True)


@pytest.mark.parametrize("how", ["cut off", "no video", "missing", "too short"])
def test_unreadable_videos_are_left_out_with_a_count(tmp_path, caplog, how):
    write_folder(tmp_path)
    break_video(tmp_path, how)
    with caplog.at_level(logging.WARNING):
        source = FolderSource(tmp_path, "train")
    assert "left out 1 of 2 train episodes" in caplog.text and "videos/000.mp4" in caplog.text
    assert source.num_episodes == 1 and len(source.read(0, 0, 12)) == 12
    with pytest.raises(ValueError, match="000.mp4"):
        FolderSource(tmp_path, "train", strict=True)


def test_frames_of_another_size_are_refused(tmp_path):
    write_folder(tmp_path)
    write_video(tmp_path / "videos/002.mp4", toy_episode(0)[0][:, :16], 12.0, lossless=True)
    with pytest.raises(ValueError, match=r"002.mp4: frames are 16 x 32, .* says 32 x 32"):
        FolderSource(tmp_path, "train")


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros(11, np.int64), "12 frames need 12 actions, got 11"),
        (np.zeros(13, np.int64), "12 frames need 12 actions, got 13"),
        (np.full(12, 5), "0 .. 4, got 5"),
        (np.full(12, -1), "0 .. 4, got -1"),
        (np.zeros((12, 1), np.int64), r"got int64 \[12, 1\]"),
        (np.zeros(12, np.float32), "integers, got torch.float32"),
        (np.array(["left"] * 12), "integers or floats"),
    ],
)
def test_wrong_actions_are_refused(tmp_path, actions, message):
    write_folder(tmp_path)
    np.savez(tmp_path / "actions/002.npz", actions=actions)
    with pytest.raises(ValueError, match=f"002.npz: .*{message}"):
        FolderSource(tmp_path, "train")
    assert FolderSource(tmp_path, "val").num_episodes == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_actions_that_are_not_finite_are_refused(tmp_path, value):
    write_folder(tmp_path, ConditionSpec(action_dim=2))
    actions = np.zeros((12, 2), np.float32)
    actions[7, 1] = value
    np.savez(tmp_path / "actions/002.npz", actions=actions)
    with pytest.raises(ValueError, match="002.npz: .*finite, got NaN or infinity"):
        FolderSource(tmp_path, "train")


def test_missing_or_foreign_action_files_are_refused(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "actions/002.npz"
    np.savez(path, moves=np.zeros(12, np.int64))
    with pytest.raises(ValueError, match="002.npz: is no .npz file with the key 'actions'"):
        FolderSource(tmp_path, "train")
    path.write_text("words")
    with pytest.raises(ValueError, match="002.npz: is no .npz file with the key 'actions'"):
        FolderSource(tmp_path, "train")
    path.unlink()
    with pytest.raises(ValueError, match="002.npz: no such actions file"):
        FolderSource(tmp_path, "train")
    np.savez(path, actions=np.int64(3))
    with pytest.raises(ValueError, match="002.npz: 'actions' must be an array .* a single int64"):
        FolderSource(tmp_path, "train")
    np.savez(path, actions=np.zeros(12, np.int64))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x93NUMPY", bytes(6)))
    with pytest.raises(ValueError, match="002.npz: "):
        FolderSource(tmp_path, "train")


def test_every_damage_of_an_action_file_names_it(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, actions=np.arange(12))
    whole = path.read_bytes()
    num_refused = 0
    for position in range(len(whole)):
        for flipped in (0x01, 0xFF):
            damaged = bytearray(whole)
            damaged[position] ^= flipped
            path.write_bytes(damaged)
            try:
                # Some bytes of an archive, such as its times, mean nothing to the array.
                assert read_actions(path).tolist() == list(range(12))
            except ValueError as error:
                assert str(error).startswith(f"{path}: is no .npz file"), position
                num_refused += 1
        path.write_bytes(whole[:position])
        with pytest.raises(ValueError, match="a.npz: is no .npz file"):
            read_actions(path)
    assert num_refused > len(whole) / 2


def test_wrong_cards_are_refused(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "dataset.json"
    card = json.loads(path.read_text())
    for changed, message in (
        ({name: card[name] for name in card if name != "fps"}, r"missing fields \['fps'\]"),
        (card | {"colour": "red"}, r"unknown fields \['colour'\]"),
        (card | {"height": "32"}, "height: needed int, got '32'"),
        (card | {"fps": 0.0}, "fps must be above 0"),
        (card | {"action_names": ["one"]}, "5 actions need as many action_names"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"dataset.json.*{message}"):
            FolderSource(tmp_path, "train")
    path.write_text("{")
    with pytest.raises(ValueError, match="dataset.json: is not JSON"):
        FolderSource(tmp_path, "train")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="dataset.json"):
        FolderSource(tmp_path, "train")


def test_wrong_manifests_are_refused(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "manifest.jsonl"
    lines = path.read_text().splitlines()
    for changed, message in (
        (lines[0].replace('"train"', '"training"'), "line 1.split: must be one of"),
        (lines[0].replace('"num_frames": 12, ', ""), r"missing fields \['num_frames'\]"),
        (lines[0].replace("12", "0"), "num_frames must be 1 or more"),
        (lines[0][:20], "line 1: is not JSON"),
        (json.dumps({k: v for k, v in json.loads(lines[0]).items() if k != "actions"}),
         "000.mp4 has no actions"),
        (lines[0].replace("}", ', "label": 3}'), "has label 3"),
    ):  # fmt: skip
        path.write_text("\n".join([changed, *lines[1:]]))
        with pytest.raises(ValueError, match=f"manifest.jsonl.*{message}"):
            FolderSource(tmp_path, "train")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_separators_within_a_prompt_end_no_line(mark, tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "manifest.jsonl"
    prompts = ["a red cat\u2028runs\u2029over\x85snow", "größer", "plain"]
    values = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    lines = [
        json.dumps(one | {"prompt": prompt}, ensure_ascii=False)
        for one, prompt in zip(values, prompts, strict=True)
    ]
    path.write_bytes((mark + "\r\n".join(lines) + "\r\n").encode())
    source = FolderSource(tmp_path, "train")
    assert [source.prompt(episode) for episode in range(2)] == prompts[::2]
    assert [entry.prompt for entry in read_manifest(tmp_path)] == prompts


def test_an_empty_split_is_refused_with_what_there_is(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(ValueError, match="'test' has no readable episodes.*'train': 2, 'val': 1"):
        FolderSource(tmp_path, "test")


def test_damage_in_the_middle_is_named_when_it_is_met(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "videos/000.mp4"
    data = bytearray(path.read_bytes())
    # The first frame stays whole, so opening sees nothing.
    begin, stop = len(data) // 3, len(data) // 2
    data[begin:stop] = bytes(stop - begin)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="000.mp4"):
        FolderSource(tmp_path, "train").read(0, 0, 12)


def test_splits_follow_their_shares_and_never_change():
    splits = choose_splits(400, 0.05, 0.1)
    assert [splits.count(name) for name in ("train", "val", "test")] == [340, 20, 40]
    assert choose_splits(37, 0.05, 0.1) == splits[:37]
    assert choose_splits(3, 0.0, 0.0) == ["train"] * 3
    for num_episodes in range(4, 400):
        assert splits[:num_episodes].count("train") >= num_episodes / 2
    for wrong in ((-0.1, 0.1), (0.5, 0.5)):
        with pytest.raises(ValueError, match="leave episodes for training"):
            choose_splits(3, *wrong)


def test_small_collections_have_held_out_episodes():
    assert choose_splits(1, 0.05, 0.05) == ["train"]
    assert choose_splits(2, 0.05, 0.05) == ["train", "val"]
    assert choose_splits(6, 0.05, 0.05) == ["train", "val", "test", "train", "train", "train"]
    assert choose_splits(3, 0.05, 0.0) == ["train", "val", "train"]
    assert choose_splits(3, 0.0, 0.05) == ["train", "test", "train"]


def test_the_toy_world_is_recorded(tmp_path):
    config = ToyRecording(
        out=str(tmp_path / "toy"), episodes=3, frames=20, seed=2, test_fraction=0.0, workers=1
    )
    source = FolderSource(record(config), "train", strict=True)
    assert source.card == ToyWorld(32, "train").card
    assert [entry.split for entry in read_manifest(tmp_path / "toy")] == ["train", "val", "train"]
    seen, made = source.read(1, 3, 9), ToyWorld(32, "train", seed=2).read(2, 3, 9)
    assert torch.equal(frames_to_pixels(seen.frames), frames_to_pixels(made.frames))
    assert torch.equal(seen.actions, made.actions)


def test_the_example_script_makes_a_folder(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    rows = ["none", "2", "right", "0"] * 3
    for index in range(10):
        pixels, _ = toy_episode(index)
        wide = np.pad(pixels, [(0, 0), (0, 0), (6, 6), (0, 0)])
        write_video(videos / f"{index}.mp4", wide, 8.0, lossless=True)
        (videos / f"{index}.csv").write_text("\n".join(rows))
    command = [sys.executable, SCRIPT, "--videos", videos, "--out", tmp_path / "clips"]
    command += ["--size", "16", "--actions", "discrete", "--action-names", "none", "left", "right"]
    command += ["--action-rows", "taken-at-frame"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    source = FolderSource(tmp_path / "clips", "train", strict=True)
    assert (source.card.height, source.card.fps, source.num_episodes) == (16, 8.0, 8)
    assert source.card.action_names == ("none", "left", "right")
    clip = source.read(0, 0, 12)
    assert clip.actions.tolist() == [0, *([0, 2, 2, 0] * 3)][:12]
    plain = pixels_to_frames(torch.from_numpy(toy_episode(0)[0]))
    assert (clip.frames - torch.nn.functional.avg_pool2d(plain, 2)).abs().mean() < 0.05


def test_the_example_script_refuses_what_does_not_fit(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    config = script["Config"](
        videos=tmp_path, out=tmp_path / "out", actions="discrete", action_names=("none", "left")
    )
    with pytest.raises(FileNotFoundError, match="no videos"):
        script["convert"](config)
    write_video(tmp_path / "a.mp4", toy_episode(0)[0], 8.0, lossless=True)
    with pytest.raises(FileNotFoundError, match="neither a.csv nor a.npz"):
        script["convert"](config)
    shutil.copyfile(tmp_path / "a.mp4", tmp_path / "a.MOV")
    with pytest.raises(ValueError, match="the same name: a.MOV, a.mp4"):
        script["convert"](config)
    (tmp_path / "a.MOV").unlink()
    for rows, message in (
        ("0\n" * 11, "12 frames need as many actions, got 11"),
        ("0\n" * 11 + "2", "0 .. 1, got 0 .. 2"),
        ("0\n" * 11 + "right", "a.csv line 12: needed an id, or one of none, left, got 'right'"),
        ("action\n" + "0\n" * 12, "a.csv line 1: needed an id.* got 'action'.* no header"),
    ):
        (tmp_path / "a.csv").write_text(rows)
        with pytest.raises(ValueError, match=message):
            script["convert"](config)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        script["convert"](config)
    with pytest.raises(ValueError, match="only then"):
        script["Config"](videos=tmp_path, out=tmp_path, actions="discrete")


def test_the_example_script_names_lines_that_are_no_vectors(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    config = script["Config"](
        videos=tmp_path, out=tmp_path, actions="continuous", action_names=("steering", "gas")
    )
    table = tmp_path / "a.csv"
    table.write_text("\ufeff0.5,1\n\n-1, 0\n", encoding="utf-8")
    assert script["read_table"](table, config).tolist() == [[0.5, 1.0], [-1.0, 0.0]]
    for text, message in (
        ("steering,gas\n0,1\n", "line 1: needed numbers, got 'steering,gas'"),
        ("0,1\n0\n", "line 2: needed 2 numbers, for steering, gas, got 1"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            script["read_table"](table, config)


def test_the_example_script_brings_videos_to_one_rate(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    (tmp_path / "v").mkdir()
    for number, rate in enumerate((10.0, 30.0)):
        pixels = toy_episode(number, 12)[0]
        write_video(tmp_path / f"v/{number}.mp4", pixels, rate, lossless=True)
        (tmp_path / f"v/{number}.csv").write_text("\n".join(map(str, range(12))))
    names = tuple(map(str, range(12)))
    ours = {"videos": tmp_path / "v", "size": 32, "actions": "discrete", "action_names": names}
    config = script["Config"](out=tmp_path / "out", **ours)
    with pytest.raises(
        ValueError, match=r"several frame rates \(1 of 10, 1 of 30 frames/s\).*--fps"
    ):
        script["convert"](config)
    script["convert"](script["Config"](out=tmp_path / "out", fps=10.0, val_fraction=0.0,
                                       test_fraction=0.0, **ours))  # fmt: skip
    source = FolderSource(tmp_path / "out", "train", strict=True)
    assert source.card.fps == 10 and [source.num_frames(i) for i in range(2)] == [12, 4]
    clip = source.read(1, 0, 4)
    assert clip.actions.tolist() == [0, 3, 6, 9]
    every_third = pixels_to_frames(torch.from_numpy(toy_episode(1, 12)[0][::3]))
    assert torch.equal(clip.frames, every_third)


def test_the_example_script_leaves_nothing_half_done(tmp_path, capsys):
    script = runpy.run_path(str(SCRIPT))
    videos, out = tmp_path / "v", tmp_path / "out"
    videos.mkdir()
    for number in range(3):
        write_video(videos / f"{number}.mp4", toy_episode(number, 20)[0], 10.0, lossless=True)
    # What macOS keeps beside a file on a foreign disk.
    (videos / "._0.mp4").write_bytes(b"\0\5\x16\7" + bytes(100))
    data = bytearray((videos / "2.mp4").read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    (videos / "2.mp4").write_bytes(data)
    with pytest.raises(ValueError, match=r"2.mp4: frames .* cannot be decoded"):
        script["convert"](script["Config"](videos=videos, out=out))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["v"]
    script["convert"](script["Config"](videos=videos, out=out, on_error="skip"))
    assert "left out" in capsys.readouterr().err
    assert [entry.video for entry in read_manifest(out)] == ["videos/0.mp4", "videos/1.mp4"]
