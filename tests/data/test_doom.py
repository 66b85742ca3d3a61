"""Doom: recordings repeat bit for bit, go on after an interruption, and align with actions."""

import dataclasses
import hashlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from scd.data import doom
from scd.data.folder import FolderSource
from scd.data.record import record

has_doom = importlib.util.find_spec("vizdoom") is not None
needs_doom = pytest.mark.skipif(not has_doom, reason="ViZDoom is not installed")


def settings(folder, **changes) -> doom.DoomRecording:
    given = doom.DoomRecording(
        out=str(folder), episodes=3, frames=40, size=32, val_fraction=0.3, test_fraction=0.3,
        workers=1,
    )  # fmt: skip
    return dataclasses.replace(given, **changes)


def files(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    if not has_doom:
        pytest.skip("ViZDoom is not installed")
    return record(settings(tmp_path_factory.mktemp("doom") / "one"))


def test_recordings_are_equal_whatever_the_number_of_workers(recorded, tmp_path):
    other = record(settings(tmp_path / "other", workers=2))
    assert files(recorded) == files(other)
    assert len(files(recorded)) == 3 + 2 * 3  # manifest, settings, lock
    third = record(settings(tmp_path / "third", episodes=1, seed=1))
    assert files(third)["videos/000000.mp4"] != files(recorded)["videos/000000.mp4"]


def test_an_interrupted_recording_goes_on(recorded, tmp_path):
    folder = record(settings(tmp_path / "part", episodes=1))
    first = folder / "videos/000000.mp4"
    written = first.stat().st_mtime_ns
    with open(folder / "manifest.jsonl", "a") as file:
        file.write('{"video": "videos/0000')  # the process died while it wrote this line
    record(settings(folder))
    assert files(folder) == files(recorded)
    assert first.stat().st_mtime_ns == written


def test_another_recording_is_never_overwritten(recorded, tmp_path):
    before = files(recorded)
    for change in ({"seed": 5}, {"frames": 41}, {"tics": 3}, {"scenario": "map01"}):
        with pytest.raises(FileExistsError, match="other settings"):
            record(settings(recorded, **change))
    with pytest.raises(FileExistsError, match="3 episodes already, asked for: 2"):
        record(settings(recorded, episodes=2))
    assert files(recorded) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else than a recording to continue"):
        record(settings(tmp_path))


def test_the_folder_holds_what_the_card_says(recorded):
    splits = [FolderSource(recorded, split, strict=True) for split in ("train", "val", "test")]
    assert [source.num_episodes for source in splits] == [1, 1, 1]
    card = splits[0].card
    assert (card.height, card.width, card.fps) == (32, 32, 17.5)
    assert card.action_names == ("none", "forward", "left", "right")
    clip = splits[1].read(0, 30, 10)
    assert clip.frames.shape == (10, 3, 32, 32) and clip.actions.shape == (10,)


@needs_doom
def test_a_frame_shows_the_effect_of_its_own_action():
    with doom.DoomGame("my_way_home", 32, 2) as game:
        played = [game.play(0, episode, 200) for episode in range(4)]
    assert {action for one in played for action in one.actions.tolist()} == {0, 1, 2, 3}
    assert np.mean([one.actions == 1 for one in played]) > 0.35
    stood, turned = [], []
    for one in played:
        change = np.abs(np.diff(one.pixels.astype(float), axis=0)).mean((1, 2, 3))
        for frame in range(2, 200):
            before, action = one.actions[frame - 1], one.actions[frame]
            if before == 0:
                (stood if action == 0 else turned if action >= 2 else []).append(change[frame - 1])
    # After standing, the very frame that carries the turn shows it.
    assert len(stood) > 5 and len(turned) > 2
    assert np.mean(turned) > 1.5 * np.mean(stood)


@needs_doom
@pytest.mark.parametrize("scenario", ["my_way_home", "map01"])
def test_episodes_do_not_depend_on_what_was_played_before(scenario):
    with doom.DoomGame(scenario, 64, 2) as game:
        later = [game.play(3, episode, 20) for episode in (1, 0)]
    with doom.DoomGame(scenario, 64, 2) as game:
        first = game.play(3, 0, 20)
    np.testing.assert_array_equal(later[1].pixels, first.pixels)
    np.testing.assert_array_equal(later[1].actions, first.actions)
    assert first.pixels.std() > 10
    assert not np.array_equal(later[0].pixels, later[1].pixels)


@needs_doom
def test_the_doom_maze_is_the_one_that_the_page_describes():
    page = Path(__file__).resolve().parents[2] / "docs/datasets.md"
    with doom.DoomGame("my_way_home", 128, 2) as game:
        played = game.play(0, 0, 300)
    content = played.pixels.tobytes() + played.actions.tobytes()
    assert hashlib.blake2b(content, digest_size=16).hexdigest() in page.read_text("utf-8")


def test_shrinking_averages_whole_blocks_of_the_middle():
    picture = np.zeros((6, 8, 3), np.uint8)
    picture[:, :1] = picture[:, 7:] = 255  # outside of the middle square
    picture[:2, 1:3] = 100
    picture[2, 1] = 90
    small = doom.shrink(picture, 3)
    assert small[0, 0].tolist() == [100] * 3 and small[1, 0].tolist() == [23] * 3
    assert small.sum() == 3 * 123


def test_missing_vizdoom_is_said_with_the_way_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[doom\]"'):
        record(settings(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("episodes", 0), ("frames", 0), ("tics", 0), ("seed", -1), ("workers", 0),
     ("val_fraction", 0.9)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        settings("unused", **{field: value})
