"""HDF5 files and tars of videos: what was written is read, by keys, parts, splits and threads."""

import io
import json
import multiprocessing
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from scd.cli import main
from scd.data.clip import frames_to_pixels
from scd.data.hdf5 import ACROSS, CSGO, DOWN, Hdf5Config
from scd.data.shards import find_files
from scd.data.source import flags_to_name, open_source
from scd.data.video import write_video
from tests.layouts import moving_pictures

h5py = pytest.importorskip("h5py")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pixels_of(clip) -> np.ndarray:
    return frames_to_pixels(clip.frames).numpy()


def write_h5(path: Path, **datasets) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
    return path


def three_files(folder: Path, actions=lambda n: np.arange(20) % 3, last=True) -> list[np.ndarray]:
    """Three files of an episode each; returns their pictures."""
    made = [moving_pictures(20, 16, 24, seed) for seed in range(3)]
    for number, pixels in enumerate(made):
        stored = pixels if last else np.moveaxis(pixels, -1, 1)
        write_h5(folder / f"e{number}.h5", seen=stored, done=actions(number))
    return made


@pytest.mark.parametrize("last", [True, False])
def test_one_dataset_of_frames_is_read_either_way_round(tmp_path, last):
    made = three_files(tmp_path / "d", last=last)
    name = f"hdf5:{tmp_path / 'd'}?frames_key=seen&actions_key=done"
    for number, split in enumerate(("train", "val", "test")):
        source = open_source(name, split)
        assert source.num_episodes == 1 and source.card.conditions.num_actions == 3
        assert source.card.fps == 10
        clip = source.read(0, 5, 9)
        assert (pixels_of(clip) == made[number][5:14]).all()
        # Row 4 was done on seeing frame 4 and led to frame 5.
        assert clip.actions.tolist() == [frame % 3 for frame in range(4, 13)]
    led = open_source(f"{name}&action_rows=led-to-frame", "train").read(0, 5, 3)
    assert led.actions.tolist() == [2, 0, 1]


def test_flags_of_the_command_line_are_keys(tmp_path, capsys):
    three_files(tmp_path / "d")
    words = ["data", "check", f"hdf5:{tmp_path / 'd'}", "--frames-key", "seen"]
    assert flags_to_name([*words, "--actions-key", "done"])[2:] == [
        f"hdf5:{tmp_path / 'd'}?frames_key=seen&actions_key=done"
    ]
    assert main([*words, "--actions-key", "done"]) == 0
    printed = capsys.readouterr().out
    assert "train: 1 episodes, 20 frames" in printed and "3 files, 3 episodes" in printed
    assert "no file says its frames per second: taken as 10" in printed
    one = str(tmp_path / "d/e0.h5")
    assert main(["data", "check", f"hdf5:{one}?frames_key=seen"]) == 0


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.arange(20) % 5, {"num_actions": 5}),
        ((np.arange(20) % 5)[:, None], {"num_actions": 5}),
        (np.linspace(-1, 1, 20), {"action_dim": 1}),
        (np.linspace(-1, 1, 40).reshape(20, 2), {"action_dim": 2}),
        (np.arange(40).reshape(20, 2) % 2 == 0, {"action_dim": 2, "space": "MultiBinary"}),
        (np.arange(60).reshape(20, 3) % 4, {"action_dim": 3, "space": "MultiDiscrete"}),
        (np.arange(40).reshape(20, 2) - 3, {"action_dim": 2}),
    ],
)
def test_actions_tell_their_kind(tmp_path, values, expected):
    path = write_h5(tmp_path / "a.h5", x=moving_pictures(20, 8, 8), a=values)
    source = open_source(f"hdf5:{path}?frames_key=x&actions_key=a", "train")
    spec = source.card.conditions
    assert spec.num_actions == expected.get("num_actions", 0)
    assert spec.action_dim == expected.get("action_dim", 0)
    assert [part.space for part in spec.action_parts] == [
        expected[key] for key in ["space"] if key in expected
    ]
    actions = source.read(0, 0, 20).actions.numpy().reshape(20, -1)
    assert (actions[1:] == values.reshape(20, -1)[:-1].astype(actions.dtype)).all()


def test_groups_are_episodes_and_folders_splits(tmp_path):
    pixels = [moving_pictures(6 + number, 8, 8, number) for number in range(11)]
    datasets = {f"data/demo_{n}/obs/cam": one for n, one in enumerate(pixels)}
    write_h5(tmp_path / "d/train/a.hdf5", **datasets)
    write_h5(tmp_path / "d/valid/b.hdf5", **{"data/demo_0/obs/cam": pixels[3]})
    source = open_source(f"hdf5:{tmp_path / 'd'}?frames_key=data/*/obs/cam", "train")
    # demo_10 comes after demo_9.
    assert [source.num_frames(one) for one in range(11)] == list(range(6, 17))
    assert (pixels_of(source.read(10, 2, 3)) == pixels[10][2:5]).all()
    assert source.read(0, 0, 2).actions is None and source.title(10).endswith("a.hdf5, demo_10")
    val = open_source(f"hdf5:{tmp_path / 'd'}?frames_key=data/*/obs/cam", "val")
    assert (pixels_of(val.read(0, 0, 9)) == pixels[3]).all()


def csgo_row(keys, clicks, across, down) -> np.ndarray:
    steps = [*ACROSS, *(-one for one in ACROSS[-2::-1])], [*DOWN, *(-one for one in DOWN[-2::-1])]
    row = np.zeros(51)
    for place, key in enumerate("w a s d space ctrl shift 1 2 3 r".split()):
        row[place] = key in keys
    row[11:13] = ["left" in clicks, "right" in clicks]
    row[13 + steps[0].index(across)] = 1
    row[36 + steps[1].index(down)] = 1
    return row


def write_csgo(path: Path, num_frames: int = 12) -> tuple[np.ndarray, list[tuple]]:
    pixels = np.random.default_rng(0).integers(0, 255, (num_frames, 15, 28, 3), np.uint8)
    moves = [(0, 0), (2, -2), (-1000, 200), (1000, 0)]
    done = [
        (["w", "shift"] if n % 2 else ["r"], ["left"] if n % 3 else [], *moves[n % 4])
        for n in range(num_frames)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for number, one in enumerate(done):
            # Stored with blue before red.
            file[f"frame_{number}_x"] = pixels[number, ..., ::-1]
            file[f"frame_{number}_y"] = csgo_row(*one)
            file[f"frame_{number}_xaux"] = np.zeros(54)
            file[f"frame_{number}_helperarr"] = np.zeros(2)
    return pixels, done


def test_counter_strike_has_keys_clicks_and_a_mouse(tmp_path):
    pixels, done = write_csgo(tmp_path / "c/hdf5_dm_july2021_1.hdf5")
    source = open_source(f"hdf5:{tmp_path / 'c'}?layout=csgo", "train")
    assert source.card.fps == 16 and source.card.conditions == CSGO
    clip = source.read(0, 3, 8)
    assert (pixels_of(clip) == pixels[3:11]).all()
    mouse = CSGO.action_parts[2:]
    for row, (keys, clicks, across, down) in zip(clip.actions.tolist(), done[2:10], strict=True):
        held = {name for name, value in zip(CSGO.action_names, row, strict=True) if value}
        assert held - {"mouse/x", "mouse/y"} == {*keys, *clicks}
        steps = [part.names[int(row[13 + at])] for at, part in enumerate(mouse)]
        assert steps == [str(across), str(down)]
    # Nothing held and the mouse at rest is what does least.
    idle = source.card.conditions.idle_action
    assert not any(idle) and [part.names[0] for part in mouse] == ["0", "0"]
    small = open_source(f"hdf5:{tmp_path / 'c'}?layout=csgo&size=8x12&fps=8", "train")
    assert small.read(0, 0, 6).frames.shape == (6, 3, 8, 12) and small.card.fps == 8
    # Of two actions the latest, as both are equally frequent; choices are never averaged.
    assert torch.equal(small.read(0, 1, 4).actions, source.read(0, 0, 12).actions[2:10:2])


def read_all(name: str) -> list[np.ndarray]:
    source = open_source(name, "train")
    return [pixels_of(source.read(0, start, 5)) for start in range(8)]


def test_threads_and_forks_read_the_same(tmp_path):
    pixels, _ = write_csgo(tmp_path / "c/a.hdf5")
    name = f"hdf5:{tmp_path / 'c'}?layout=csgo"
    source = open_source(name, "train")
    starts = [start % 8 for start in range(200)]
    with ThreadPoolExecutor(8) as pool:
        clips = list(pool.map(lambda start: pixels_of(source.read(0, start, 5)), starts))
    assert all((clip == pixels[at : at + 5]).all() for at, clip in zip(starts, clips, strict=True))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for found in pool.map(read_all, [name, name]):
            assert all((one == pixels[at : at + 5]).all() for at, one in enumerate(found))


def refused(tmp_path, name: str, words: str, split="train") -> None:
    with pytest.raises((ValueError, OSError), match=words):
        open_source(f"hdf5:{tmp_path}/{name}", split, strict=True)


def test_what_does_not_fit_is_named(tmp_path):
    frames = moving_pictures(6, 8, 8)
    write_h5(tmp_path / "a.h5", x=frames, a=np.arange(6) % 2)
    refused(tmp_path, "a.h5", "needed --frames-key NAME.*there are a, x")
    refused(tmp_path, "a.h5?frames_key=y", "has no dataset 'y'; there are a, x")
    refused(tmp_path, "a.h5?frames_key=x&actions_key=b", "has no dataset 'b'; there are a, x")
    refused(tmp_path, "a.h5?frames_key=x/*/y", "has no dataset")
    refused(tmp_path, "a.h5?frames_key=a", r"frames must be 8-bit .* got int64 \[6\]")
    refused(tmp_path, "a.h5?frames_key=x_{}", "has no dataset 'x_{}'")
    refused(tmp_path, "a.h5?frames_key=x&layout=csgo", "layout csgo says the keys")
    refused(tmp_path, "a.h5?layout=csgo", "has no dataset 'frame_{}_x'; there are a, x")
    write_h5(tmp_path / "b.h5", x=frames, a=np.arange(4), n=np.array([0, 1, np.nan, 0, 0, 0.0]))
    refused(tmp_path, "b.h5?frames_key=x&actions_key=a", "6 frames need as many actions, got 4")
    refused(tmp_path, "b.h5?frames_key=x&actions_key=n", "action of frame 2 is not finite")
    refused(tmp_path, "b.h5?frames_key=x&actions_key=x", "actions must be numbers")
    refused(tmp_path, "c.h5?frames_key=x", "c.h5: no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "empty?frames_key=x", "holds no files that end in .hdf5, .h5")
    whole = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "d.h5").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "d.h5?frames_key=x", "d.h5: cannot be read as HDF5")
    write_csgo(tmp_path / "e.h5")
    with h5py.File(tmp_path / "e.h5", "r+") as file:
        file["frame_3_y"][20] += 1
    refused(tmp_path, "e.h5?layout=csgo", "the mouse of frame 3 is not one step of 23")
    with h5py.File(tmp_path / "e.h5", "r+") as file:
        del file["frame_3_x"]
    refused(tmp_path, "e.h5?layout=csgo", "has no frame_3_x, though there are some up to 11")
    with pytest.raises(ValueError, match="actions_key has more"):
        Hdf5Config(frames_key="a", actions_key="*/b")


def test_files_that_differ_are_left_out_by_name(tmp_path, caplog, capsys):
    for number in range(12):
        write_h5(tmp_path / f"d/e{number:02d}.h5", x=moving_pictures(6, 8, 8), a=np.arange(6) % 2)
    write_h5(tmp_path / "d/e00.h5", x=moving_pictures(6, 10, 8), a=np.arange(6) % 2)
    (tmp_path / "d/e01.h5").write_bytes(b"torn")
    write_h5(tmp_path / "d/e02.h5", x=moving_pictures(6, 8, 8), a=np.zeros((6, 3)))
    name = f"hdf5:{tmp_path / 'd'}?frames_key=x&actions_key=a"
    assert open_source(name, "train").num_episodes == 7
    assert "left out 3 of 10 train episodes" in caplog.text
    assert main(["data", "check", name]) == 0
    printed = capsys.readouterr().out
    assert "note     cannot be read: " in printed and "e01.h5: cannot be read as HDF5" in printed
    # With a size, pictures of all sizes are brought to it.
    assert open_source(f"{name}&size=8", "train").num_episodes == 8


def write_tar(path: Path, episodes, video="mp4") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, pixels, said, *text in episodes:
            file = path.parent / f"one.{video}"
            write_video(file, pixels, 20.0, lossless=True)
            tar.add(file, f"{name}.{video}")
            file.unlink()
            for ending, data in [("json", said), ("txt", text[0] if text else None)]:
                if data is not None:
                    data = (data if isinstance(data, str) else json.dumps(data)).encode()
                    info = tarfile.TarInfo(f"{name}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def test_tars_are_read_in_place(tmp_path):
    made = [moving_pictures(20 + n, 16, 24, n) for n in range(12)]
    for shard in range(3):
        episodes = [
            (
                f"a,b/{n:03d}",
                made[n],
                {"actions": [f % 4 for f in range(20 + n)], "prompt": f"p{n}"},
            )
            for n in range(4 * shard, 4 * shard + 4)
        ]
        write_tar(tmp_path / f"d/x-{shard:02d}.tar", episodes)
    before = sorted(tmp_path.rglob("*.tar*"))
    for name in (f"wds:{tmp_path / 'd'}", f"wds:{tmp_path / 'd'}/x-{{00..02}}.tar"):
        source = open_source(name, "train")
        assert source.num_episodes == 10 and source.card.fps == 20
        assert source.card.conditions.num_actions == 4
        clip = source.read(9, 7, 11)
        assert (pixels_of(clip) == made[11][7:18]).all() and source.prompt(9) == "p11"
        assert clip.actions.tolist() == [f % 4 for f in range(6, 17)]
        assert source.title(9).endswith("x-02.tar, a,b/011.mp4")
    starts = [start % 15 for start in range(60)]
    with ThreadPoolExecutor(4) as pool:
        clips = list(pool.map(lambda start: pixels_of(source.read(0, start, 5)), starts))
    assert all((one == made[0][at : at + 5]).all() for at, one in zip(starts, clips, strict=True))
    assert sorted(tmp_path.rglob("*.tar*")) == before
    half = open_source(f"wds:{tmp_path / 'd'}?fps=10&size=8", "val")
    assert half.read(0, 0, 5).frames.shape == (5, 3, 8, 8)
    assert find_files(tmp_path / "d/x-{01..02}.tar", ()) == before[1:]


def test_tars_that_do_not_fit_are_named(tmp_path, capsys):
    pixels = moving_pictures(6, 16, 16)
    write_tar(tmp_path / "a.tar", [("e", pixels, {"actions": [0, 1]})])
    with pytest.raises(ValueError, match="a.tar, e.json: 6 frames need as many actions, got 2"):
        open_source(f"wds:{tmp_path / 'a.tar'}", "train")
    for said, words in [
        ("{", "is no JSON"),
        ("[1]", "needed an object with actions"),
        ({"actions": [1, [2]]}, "actions must be a list of numbers, or of lists"),
        ('{"actions": [0, 1, NaN, 0, 0, 1]}', "action of frame 2 is not finite"),
        ({"fps": "ten"}, "fps must be a number"),
        ({"label": -1}, "label must be a number from 0 on"),
    ]:
        write_tar(tmp_path / "b.tar", [("e", pixels, said)])
        with pytest.raises(ValueError, match=words):
            open_source(f"wds:{tmp_path / 'b.tar'}", "train")
    write_tar(tmp_path / "c.tar", [("e", pixels, None, "words\n"), ("f", pixels, {"label": 2})])
    assert open_source(f"wds:{tmp_path / 'c.tar'}", "train").prompt(0) == "words"
    whole = (tmp_path / "c.tar").read_bytes()
    (tmp_path / "d.tar").write_bytes(whole[:1500])
    (tmp_path / "e.tar").write_bytes(b"no tar at all" * 100)
    for name in ("d", "e"):
        with pytest.raises(ValueError, match=f"{name}.tar: cannot be read as a tar"):
            open_source(f"wds:{tmp_path / name}.tar", "train")
    assert main(["data", "check", f"wds:{tmp_path}"]) == 2
    printed = capsys.readouterr().out
    assert "d.tar: cannot be read as a tar" in printed and "a.tar, e.json: 6 frames" in printed
    assert main(["data", "check", f"wds:{tmp_path / 'e.tar'}"]) == 2
    with pytest.raises(FileNotFoundError, match=r"x-0.tar: no such file, of .*x-\{0..3\}.tar"):
        open_source(f"wds:{tmp_path}/x-{{0..3}}.tar", "train")
