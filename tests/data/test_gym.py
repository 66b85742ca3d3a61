"""Gymnasium: recorded pictures, actions, rewards and ends are the environment's own."""

import dataclasses
import importlib.util
import json
import sys

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image

from scd.cli import main
from scd.data.clip import frames_to_pixels
from scd.data.folder import FolderSource
from scd.data.gym import GymRecording
from scd.data.keymap import Binding
from scd.data.manifest import read_card, read_manifest
from scd.data.record import record
from tests import drawn_env
from tests.drawn_env import ACTION, EPISODE, STEPS

needs_gym = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("Box2D", "ale_py", "minigrid", "crafter"))),
    reason="the extra gym is not installed",
)


def settings(folder, env="Drawn-v0", **changes) -> GymRecording:
    given = GymRecording(
        out=str(folder), env=env, register=("tests.drawn_env",), episodes=4, frames=30, size=(0,),
        workers=1,
    )  # fmt: skip
    return dataclasses.replace(given, **changes)


def files(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def episodes_of(folder):
    """Yield each episode: its line, its pictures, its actions."""
    for split in ("train", "val", "test"):
        entries = [entry for entry in read_manifest(folder) if entry.split == split]
        if not entries:
            continue
        source = FolderSource(folder, split, strict=True)
        for number, entry in enumerate(entries):
            clip = source.read(number, 0, source.num_frames(number))
            yield entry, frames_to_pixels(clip.frames).numpy(), clip.actions.numpy()


@pytest.mark.parametrize("frames_from", ["render", "observation"])
@pytest.mark.parametrize("ends", ["terminated", "truncated"])
def test_a_clip_holds_one_episode_to_its_end(tmp_path, ends, frames_from):
    folder = record(settings(tmp_path / "a", make=(f"ends={ends}",), frames_from=frames_from))
    seeds = set()
    for entry, pictures, actions in episodes_of(folder):
        assert 5 <= entry.num_frames <= 14
        # Every step of one episode, from the first, and each shows its own action.
        assert pictures[:, STEPS, 0, 0].tolist() == list(range(1, entry.num_frames + 1))
        assert pictures[:, ACTION, 0, 0].tolist() == ((actions + 2) * 10).tolist()
        assert len(set(pictures[:, EPISODE, 0, 0].tolist())) == 1
        assert list(entry.rewards) == [0.5 * step for step in range(1, entry.num_frames + 1)]
        assert (entry.terminated, entry.truncated) == (ends == "terminated", ends == "truncated")
        seeds.add(int(pictures[0, EPISODE, 0, 0]))
    assert len(seeds) == 4
    card = read_card(folder)
    assert (card.height, card.width, card.fps, card.key_map) == (6, 8, 12, ())
    assert card.conditions.num_actions == 4 and card.action_names[3] == "action 3"


def test_a_recording_stops_what_does_not_end_and_skips_frames(tmp_path):
    how = {"make": ("ends=never",), "frames": 7, "frame_skip": 3, "warmup": (9,)}
    folder = record(settings(tmp_path / "a", names=("a", "b", "c", "d"), **how))
    begins = set()
    for entry, pictures, _ in episodes_of(folder):
        assert entry.num_frames == 7 and not entry.terminated and not entry.truncated
        first = int(pictures[0, STEPS, 0, 0])
        assert pictures[:, STEPS, 0, 0].tolist() == [first + 3 * frame for frame in range(7)]
        assert entry.rewards[0] == pytest.approx(0.5 * (3 * first - 3))
        begins.add(first)
    assert len(begins) > 1 and max(begins) <= 27 and not any(first % 3 for first in begins)
    assert read_card(folder).action_names == ("a", "b", "c", "d")
    assert read_card(folder).fps == 4


def test_the_warmup_has_a_least_length_and_pictures_are_cropped(tmp_path):
    how = {"make": ("ends=never",), "frames": 3, "warmup": (5, 9)}
    whole = record(settings(tmp_path / "a", **how))
    part = record(settings(tmp_path / "b", crop=(1, 2, 4, 5), **how))
    begins = {int(pictures[0, STEPS, 0, 0]) for _, pictures, _ in episodes_of(whole)}
    assert len(begins) > 1 and min(begins) >= 6 and max(begins) <= 9
    for (_, pictures, _), (_, cropped, _) in zip(
        episodes_of(whole), episodes_of(part), strict=True
    ):
        assert (cropped == pictures[:, 1:5, 2:7]).all()


def test_recordings_are_equal_whatever_the_number_of_workers_and_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    whole = record(settings(tmp_path / "whole"))
    assert files(record(settings(tmp_path / "side", workers=2))) == files(whole)
    part = record(settings(tmp_path / "part", episodes=2))
    first = (part / "videos/000000.mp4").stat().st_mtime_ns
    with open(part / "manifest.jsonl", "a") as file:
        file.write('{"video": "videos/0000')
    record(settings(part))
    assert files(part) == files(whole)
    assert (part / "videos/000000.mp4").stat().st_mtime_ns == first
    for change in ({"policy": "random"}, {"make": ("ends=never",)}, {"size": (6, 8)}):
        with pytest.raises(FileExistsError, match="other settings"):
            record(settings(part, **change))
    assert files(part) == files(whole)


def test_policies(tmp_path):
    taken = {}
    for policy in ("random", "sticky"):
        folder = tmp_path / policy
        record(settings(folder, make=("ends=never",), policy=policy, frames=200))
        all_actions = np.stack([actions for _, _, actions in episodes_of(folder)])
        assert set(all_actions.flat) == {0, 1, 2, 3}
        taken[policy] = (all_actions[:, 1:] == all_actions[:, :-1]).mean()
    # The same by chance one time in four; or kept nine times in ten, and one in four of the others.
    assert taken["random"] == pytest.approx(0.25, abs=0.06)
    assert taken["sticky"] == pytest.approx(0.925, abs=0.03)
    mine = tmp_path / "mine.py"
    head = "def play(observation, space, generator):\n    return "
    mine.write_text(head + "int(observation[0, 0, 0]) % 4 + 2\n")
    how = {"policy": f"{mine}:play", "frames_from": "observation"}
    folder = record(settings(tmp_path / "own", **how))
    for _, pictures, actions in episodes_of(folder):
        before = pictures[:, STEPS, 0, 0] - 1
        assert actions.tolist() == (before % 4).tolist()
    mine.write_text(head + "3\n")
    with pytest.raises(FileExistsError, match="policy_digest"):
        record(settings(folder, **how))


def test_a_recording_carries_a_key_map(tmp_path):
    folder = record(settings(tmp_path / "a", episodes=2, frames=3, keys=("Space=action 2",)))
    assert read_card(folder).keys == (Binding(control="Space", value=2.0),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "Drawm-v0"}, r"no environment 'Drawm-v0'; did you mean 'Drawn-v0'"),
        ({"env": "Drawn-v7"}, r"'Drawn-v7'; did you mean 'Drawn-v0'"),
        ({"env": "Blind-v0"}, "needs the render mode rgb_array, got none.*--frames-from observat"),
        ({"env": "Shown-v0"}, "needs the render mode rgb_array, got human."),
        ({"make": ("grows=True",)}, "first picture was 6 x 8 and now one is 7 x 8"),
        ({"make": ("observes=dictionary",), "frames_from": "observation"},
         "got a dictionary of picture.*--frames-from render"),
        ({"make": ("colour=1",)}, "cannot be made so: .*colour"),
        ({"register": ("no_such_package",)}, "needs the package no_such_package: pip install"),
        ({"policy": "drawn_env.py:idle"}, "there is none at drawn_env.py"),
        ({"policy": f"{__file__}:setings"}, "no function 'setings'; did you mean 'settings'"),
        ({"crop": (1, 0, 6, 8)}, "pictures are 6 x 8, which have no crop"),
        ({"keys": ("Space=action 9",)}, "Space=action 9: the actions have no 'action 9'.*action 3"),
        ({"names": ("a", "b")}, "needs 4 names of actions, got 2: a, b"),
        ({"warmup": (1000,), "frames": 1}, "none of 100 episodes lasted its warmup"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_is_said(tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        record(settings(tmp_path / "none", **changes))
    assert not list((tmp_path / "none").rglob("*.mp4"))


def test_an_action_outside_the_space_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r":wild returned 99, no action of Discrete\(4, start=2\)"):
        record(settings(tmp_path / "none", policy=f"{drawn_env.__file__}:wild"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", (1, 2, 3)), ("size", (-1,)), ("size", (4, 0)), ("stickiness", 1.0), ("warmup", (-1,)),
     ("warmup", (5, 2)), ("crop", (0, 0, 4)), ("crop", (0, 0, 0, 4)),
     ("frame_skip", 0), ("policy", "clever"), ("make", ("continuous",)), ("fps", -1.0)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        settings("unused", **{field: value})


def test_the_command_takes_the_name_first(tmp_path, capsys):
    flags = "--register tests.drawn_env --episodes 2 --frames 4 --size 4 --seed 3 --workers 1"
    words = ["record", "gym", "Drawn-v0", *flags.split(), "--out", str(tmp_path / "a")]
    assert main([*words, "--frames", "observation"]) == 0
    saved = json.loads((tmp_path / "a/dataset.json").read_text())
    assert saved["recording"]["frames_from"] == "observation"
    assert (saved["height"], saved["width"], saved["recording"]["frames"]) == (4, 4, 4)
    assert main(["record", "gym", "Drown-v0", *words[3:]]) == 2
    assert "did you mean 'Drawn-v0'" in capsys.readouterr().err


def played_by_hand(name, seed, actions, shape, observes=False, **how):
    """Play recorded actions again without our code: pictures, rewards."""
    env = gymnasium.make(name, render_mode=None if observes else "rgb_array", **how)
    generator = np.random.default_rng((seed, 0, 0))
    env.reset(seed=int(generator.integers(2**31)))
    pictures, rewards = [], []
    for action in actions:
        observation, reward, *_ = env.step(action)
        picture = observation if observes else env.render()
        pictures.append(
            np.asarray(Image.fromarray(picture).resize(shape[::-1], Image.Resampling.BOX))
        )
        rewards.append(float(reward))
    env.close()
    return np.stack(pictures), rewards


REAL = [
    ("CarRacing-v3", ("continuous=False",), "observation", 50, "right"),
    ("CarRacing-v3", (), "observation", 50, "steer"),
    ("ALE/Breakout-v5", (), "render", 15, "fire"),
    ("MiniGrid-DoorKey-6x6-v0", (), "render", 10, "toggle"),
    ("CrafterReward-v1", (), "render", 5, "place_stone"),
]


@needs_gym
@pytest.mark.parametrize(("name", "make", "frames_from", "fps", "action"), REAL)
def test_real_environments(tmp_path, name, make, frames_from, fps, action):
    how = {"make": make, "frames_from": frames_from, "register": (), "size": (48, 64)}
    folder = record(settings(tmp_path / "a", name, episodes=2, frames=25, **how))
    card = read_card(folder)
    assert (card.height, card.width, card.fps) == (48, 64, fps) and action in card.action_names
    entry, pictures, actions = next(episodes_of(folder))
    assert torch.as_tensor(actions).is_floating_point() == (action == "steer")
    arguments = {"continuous": False} if make else {}
    again, rewards = played_by_hand(
        name, 0, actions, (48, 64), frames_from == "observation", **arguments
    )
    np.testing.assert_array_equal(pictures, again)
    assert list(entry.rewards) == rewards
    assert pictures.std() > 10
    # Episodes do not depend on what was played before them.
    other = settings(tmp_path / "b", name, episodes=2, frames=25, **how)
    played = other.play("train", 1)
    other.close()
    _, second, _ = list(episodes_of(folder))[1]
    np.testing.assert_array_equal(played.pixels, second)


@needs_gym
def test_a_crafter_of_chosen_actions_whose_player_keeps_items(tmp_path):
    make = ("size=(36,36)", "area=(16,16)", "actions=('do','place_stone')", "items={'stone':9}")
    given = settings(
        tmp_path / "a", "CrafterNoReward-v1", episodes=1, frames=40, make=make, register=(),
        frames_from="observation", crop=(0, 0, 28, 36), pixel_art=True, names=("dig", "place"),
    )  # fmt: skip
    card = read_card(record(given))
    assert card.pixel_art and card.action_names == ("dig", "place")
    _, pictures, actions = next(episodes_of(tmp_path / "a"))
    # Chosen actions are the game's own, and in the game as it is nobody has a stone to put down.
    ids = [(5, 7)[action] for action in actions.tolist()]
    plain, _ = played_by_hand(
        "CrafterNoReward-v1", 0, ids, (36, 36), True, size=(36, 36), area=(16, 16)
    )
    plain = plain[:, :28]  # below is what the player has
    first = ids.index(7)
    np.testing.assert_array_equal(pictures[:first], plain[:first])
    assert np.abs(pictures[first:].astype(int) - plain[first:]).max() > 30
    for wrong in ("actions=('do','fly')", "items={'gold':1}"):
        with pytest.raises(ValueError, match=r"Crafter's (actions|items) are .*; got (fly|gold)"):
            record(dataclasses.replace(given, out=str(tmp_path / "b"), make=(wrong,)))
