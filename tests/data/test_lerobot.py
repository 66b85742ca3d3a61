"""LeRobot datasets: what the real package wrote is read as it reads it, and written so that it can.

The folders under tests/data/lerobot were written, and the arrays beside them read, by
tools/lerobot_fixtures.py in an environment of lerobot's own (0.3.3 for v2.1, 0.4.4 for v3.0).
"""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scd.cli import main
from scd.data.clip import frames_to_pixels
from scd.data.lerobot import LeRobotConfig, LeRobotSource
from scd.data.lerobot_export import ExportConfig, export_lerobot
from scd.data.lerobot_tables import Dataset
from scd.data.source import EmptySplit, open_source, split_of
from scd.data.video import index_frames
from tests.tiny_hub import on_hub, running_hub

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

WRITTEN = Path(__file__).parent / "lerobot"
FORMATS = ("v21", "v30_h264", "v30_av1")
SPLITS = ("train", "val", "test")


def everything(data: str):
    """Yield every episode of all splits: the source, its number there, and its whole clip."""
    for split in SPLITS:
        try:
            source = open_source(data, split)
        except EmptySplit:
            continue
        for episode in range(source.num_episodes):
            yield source, episode, source.read(episode, 0, source.num_frames(episode))


def a_copy(tmp_path, name="v30_h264") -> Path:
    return Path(shutil.copytree(WRITTEN / name, tmp_path / name))


def change_info(root: Path, **values) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_table(path: Path, **columns) -> None:
    """Replace columns of a table."""
    table = parquet.read_table(path, partitioning=None)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pyarrow.array(
            values, table.schema.field(place).type))  # fmt: skip
    parquet.write_table(table, path)


@pytest.mark.parametrize("name", FORMATS)
def test_frames_and_actions_are_those_that_lerobot_reads(name):
    truth = np.load(WRITTEN / f"{name}.npz")
    found = list(everything(f"lerobot:{WRITTEN / name}?camera=top"))
    assert [source.split for source, _, _ in found] == list(SPLITS)
    for number, (source, episode, clip) in enumerate(found):
        mine = truth["episode_index"] == number
        assert (frames_to_pixels(clip.frames).numpy() == truth["pixels"][mine]).all()
        # What lerobot calls the action of a row leads to the next frame.
        assert (clip.actions[1:].numpy() == truth["action"][mine][:-1]).all()
        assert (clip.actions[0].numpy() == truth["action"][mine][0]).all()
        assert source.prompt(episode) == truth["task"][mine][0]
        assert source.card.fps == 10 and source.card.action_names == ("x", "y")


@pytest.mark.parametrize("name", FORMATS)
def test_a_part_of_an_episode_is_that_part(name):
    source, episode, whole = list(everything(f"lerobot:{WRITTEN / name}?camera=wrist"))[-1]
    part = source.read(episode, 3, 5)
    assert torch.equal(part.frames, whole.frames[3:8])
    assert torch.equal(part.actions, whole.actions[3:8])


def test_state_labels_and_rate_are_settings():
    root = WRITTEN / "v30_h264"
    _, _, plain = list(everything(f"lerobot:{root}?camera=top"))[1]
    source, _, clip = list(everything(f"lerobot:{root}?camera=top&state=1&labels=1&fps=5"))[1]
    assert source.card.action_names == ("x", "y", "a", "b", "c")
    assert (source.card.conditions.action_dim, source.card.conditions.num_labels) == (5, 2)
    assert clip.label == 1 and source.card.fps == clip.fps == 5
    assert torch.equal(clip.frames, plain.frames[::2])
    assert torch.equal(clip.actions[1:, :2], (plain.actions[1:-1:2] + plain.actions[2::2]) / 2)
    assert (clip.actions[:, 4] == 7).all()


@pytest.mark.parametrize("size", ["16", "16x24", "16x16"])
def test_frames_are_reduced_to_the_mean_of_what_they_cover(size):
    root = WRITTEN / "v30_av1"
    rows, columns = (int(word) for word in (size + "x" + size).split("x")[:2])
    whole = list(everything(f"lerobot:{root}?camera=top"))
    small = list(everything(f"lerobot:{root}?camera=top&size={size}"))
    for (_, _, clip), (source, _, reduced) in zip(whole, small, strict=True):
        assert (source.card.height, source.card.width) == tuple(reduced.frames.shape[-2:])
        assert tuple(reduced.frames.shape[-2:]) == (rows, columns)
        means = torch.nn.functional.avg_pool2d(clip.frames, 2)
        left = (means.shape[-1] - columns) // 2
        off = (means[..., left : left + columns] - reduced.frames).abs() * 127.5
        # Rows are rounded before columns.
        assert off.max() < 1.01 and off.mean() < 0.5


def test_pictures_inside_the_table_are_read(tmp_path):
    root = a_copy(tmp_path)
    truth = np.load(WRITTEN / "v30_h264.npz")["pixels"]
    files = []
    for picture in truth:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["observation.images.top"]["dtype"] = "image"
    change_info(root, features=info["features"])
    path = root / "data/chunk-000/file-000.parquet"
    table = parquet.read_table(path, partitioning=None)
    table = table.append_column("observation.images.top", pyarrow.array(files))
    parquet.write_table(table, path, row_group_size=4)
    shutil.rmtree(root / "videos")
    found = [clip for _, _, clip in everything(f"lerobot:{root}?camera=top")]
    assert (frames_to_pixels(torch.cat([one.frames for one in found])).numpy() == truth).all()
    source = open_source(f"lerobot:{root}?camera=top&size=16", "test")
    assert source.read(0, 2, 3).frames.shape == (3, 3, 16, 16)


def test_splits_are_those_of_info_or_every_tenth(tmp_path):
    root = a_copy(tmp_path)
    change_info(root, splits={"train": "1:3", "test": "0:1"})
    assert [source.split for source, _, _ in everything(f"lerobot:{root}?camera=top")] == [
        "train", "train", "test",
    ]  # fmt: skip
    change_info(root, splits={"train": "a:3", "test": "0:1"})
    with pytest.raises(ValueError, match=r"info.json: splits must be .*'a:3'"):
        open_source(f"lerobot:{root}?camera=top", "train")
    parts = [split_of(index, 25) for index in range(25)]
    assert [i for i, part in enumerate(parts) if part == "val"] == [4, 14, 24]
    assert [i for i, part in enumerate(parts) if part == "test"] == [9, 19]
    assert [split_of(i, 3) for i in range(3)] == ["train", "val", "test"]
    assert [split_of(i, 2) for i in range(2)] == ["train", "test"] and split_of(0, 1) == "train"


@pytest.mark.parametrize("lossless", [False, True])
def test_an_export_is_read_back(tmp_path, lossless):
    data = f"lerobot:{WRITTEN / 'v30_av1'}?camera=wrist"
    export_lerobot(ExportConfig(data=data, out=str(tmp_path / "out"), lossless=lossless))
    pairs = zip(everything(data), everything(f"lerobot:{tmp_path / 'out'}"), strict=True)
    for (source, episode, clip), (copied, at, copy) in pairs:
        off = (clip.frames - copy.frames).abs() * 127.5
        assert off.max() == 0 if lossless else off.mean() < 3
        assert torch.equal(clip.actions[1:], copy.actions[1:])
        assert copied.prompt(at) == source.prompt(episode) and copied.split == source.split
        assert copied.card == source.card


def test_a_toy_world_is_exported_with_its_names_of_actions(tmp_path):
    info = export_lerobot(
        ExportConfig(data=f"lerobot:{WRITTEN / 'v21'}?camera=top", out=str(tmp_path / "a"))
    )
    assert info["splits"] == {"train": "0:1", "val": "1:2", "test": "2:3"}
    index = index_frames(tmp_path / "a/videos/observation.images.scd/chunk-000/file-000.mp4")
    assert index.num_frames == 27 and index.times is not None
    assert np.allclose(index.times * index.unit_s, np.arange(27) / 10)


def test_discrete_actions_keep_their_ids_and_names(tmp_path):
    words = ["record", "toy", "--out", str(tmp_path / "toy"), "--episodes", "3", "--frames", "5"]
    assert main(words) == 0
    assert main(["data", "export", "lerobot", str(tmp_path / "toy"), str(tmp_path / "out")]) == 0
    before, after = everything(str(tmp_path / "toy")), everything(f"lerobot:{tmp_path / 'out'}")
    for (source, _, clip), (copied, _, copy) in zip(before, after, strict=True):
        assert copied.card.conditions == source.card.conditions
        assert copied.card.action_names == source.card.action_names
        assert torch.equal(copy.actions[1:], clip.actions[1:])
    assert main(["data", "export", "lerobot", str(tmp_path / "toy"), str(tmp_path / "out")]) == 2


def test_the_command_takes_the_camera_as_a_flag(capsys):
    words = ["data", "check", f"lerobot:{WRITTEN / 'v21'}"]
    assert main([*words, "--camera", "top"]) == 0
    assert "LeRobot v2.1: 3 episodes at 10 frames/s" in capsys.readouterr().out
    assert main([*words, "--camera=front"]) == 2
    assert "there are observation.images.top, observation.images.wrist" in capsys.readouterr().err
    assert main(words) == 2


def test_an_episode_that_cannot_be_used_is_left_out_by_name(tmp_path, caplog):
    root = a_copy(tmp_path, "v21")
    (root / "videos/chunk-000/observation.images.top/episode_000002.mp4").unlink()
    with pytest.raises(ValueError, match=r"no episodes; the first .*episode_000002.mp4: no such"):
        open_source(f"lerobot:{root}?camera=top", "test")
    change_info(root, splits={"train": "0:3", "test": "0:0"})
    source = open_source(f"lerobot:{root}?camera=top", "train")
    assert source.num_episodes == 2 and "left out 1 of 3 train episodes" in caplog.text
    with pytest.raises(ValueError, match="episode_000002.mp4"):
        open_source(f"lerobot:{root}?camera=top", "train", strict=True)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("timestamp", [0.0, 0.1, 0.2, 0.3, 0.4, 0.8], "frame 5 is at 0.8000 s, where 10 frames/s"),
        ("action", [[0.0, 1.0]] * 5 + [[0.0, float("nan")]], "action or state of frame 5 is not"),
        ("episode_index", [0, 0, 0, 0, 0, 7], "has 5 rows, .* say 6"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, column, values, message):
    root = a_copy(tmp_path, "v21")
    change_table(root / "data/chunk-000/episode_000000.parquet", **{column: values})
    with pytest.raises(ValueError, match=f"episode_000000.parquet, episode 0: .*{message}"):
        open_source(f"lerobot:{root}?camera=top", "train")


def test_another_rate_than_the_videos_is_refused(tmp_path):
    root = a_copy(tmp_path, "v21")
    change_info(root, fps=20)
    change_table(root / "data/chunk-000/episode_000000.parquet", timestamp=np.arange(6) / 20)
    with pytest.raises(ValueError, match=r"mp4: has 10 frames/s, meta/info.json says 20"):
        open_source(f"lerobot:{root}?camera=top", "train")


def test_other_versions_and_folders_are_refused(tmp_path):
    root = a_copy(tmp_path)
    change_info(root, codebase_version="v1.6")
    with pytest.raises(ValueError, match=r"is of format v1.6, readable are v2.1 and v3.0"):
        Dataset(root)
    (root / "meta/info.json").write_text("{}")
    with pytest.raises(ValueError, match="info.json: needed codebase_version, fps and features"):
        Dataset(root)
    with pytest.raises(FileNotFoundError, match="is no LeRobot dataset"):
        Dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_source(f"lerobot:{tmp_path / 'none'}", "train")
    (root / "meta/info.json").write_bytes((WRITTEN / "v30_h264/meta/info.json").read_bytes())
    (root / "data/chunk-000/file-000.parquet").write_bytes(b"PAR1 not a table")
    with pytest.raises(ValueError, match=r"file-000.parquet: cannot be read as a table"):
        LeRobotSource(root, "train", LeRobotConfig(camera="top"))
    with pytest.raises(ValueError, match="size must be as 64 or 48x64"):
        LeRobotConfig(size="64*64")


FROM_HUB = """
from scd.data.source import open_source
source = open_source("lerobot:{name}?camera=top", "train")
clip = source.read(0, 0, 4)
print(source.num_episodes, clip.frames.double().sum().item(), clip.actions.tolist())
"""


def test_a_dataset_is_downloaded_from_the_hub_once(tmp_path):
    root = WRITTEN / "v30_h264"
    files = [path for path in root.rglob("*") if path.is_file()]
    with running_hub() as hub:
        for name in ("datasets/me/robot", "me/world"):
            hub.files[name] = {str(one.relative_to(root)): one.read_bytes() for one in files}
            hub.files[name]["checkpoints/large.bin"] = b"not asked for"
            hub.commits[name] = ["recorded"]
        address = hub.address
        read = on_hub(FROM_HUB.format(name="me/robot"), address, tmp_path)
        assert read.returncode == 0, read.stderr
        # A model of that name is no dataset.
        refused = on_hub(FROM_HUB.format(name="me/world"), address, tmp_path)
        assert "the hub shows no me/world to this account" in refused.stderr
    clip = (source := open_source(f"lerobot:{root}?camera=top", "train")).read(0, 0, 4)
    assert clip.actions is not None
    local = (source.num_episodes, clip.frames.double().sum().item(), clip.actions.tolist())
    assert read.stdout.split() == " ".join(map(str, local)).split()
    assert not list(tmp_path.rglob("large.bin"))
    # The hub is gone; what was downloaded is there still.
    again = on_hub(FROM_HUB.format(name="me/robot"), address, tmp_path)
    assert again.returncode == 0 and again.stdout == read.stdout
