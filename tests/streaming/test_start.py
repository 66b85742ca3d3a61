"""Where streams begin: clips as their frames and actions, the world's own, or nothing."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, MultiBinary
from safetensors.torch import save_file

import scd
from scd.data.actions import conditions_of
from scd.data.clip import Clip, Conditions
from scd.data.folder import FolderSource
from scd.data.manifest import read_card
from scd.models.checkpoint import save_world
from scd.models.clips import CLIPS_FILE, Clips
from scd.serving.run import held_out_clips
from scd.streaming.environment import WorldEnv, WorldVectorEnv, pixels
from scd.streaming.rollout import Rollout
from tests.streaming.test_rollout import world_of
from tests.tiny import tiny_separable


@pytest.fixture
def world():
    """A world with two clips of twenty frames."""
    generator = torch.Generator().manual_seed(1)
    world = world_of(tiny_separable())
    world.clips = Clips(
        frames=torch.randint(0, 256, (2, 20, 3, 4, 6), generator=generator, dtype=torch.uint8),
        actions=torch.randint(0, 4, (2, 20), generator=generator),
    )
    return world


def begun(world, *given, seed=0, **more):
    """The next frame after a start."""
    rollout = Rollout(world, seed=seed)
    shown = rollout.begin(*given, **more)
    return shown, rollout.step(1)


def test_a_clip_is_its_frames_and_actions(world):
    clip = world.clips[1]
    shown, frame = begun(world, clip)
    assert shown.shape == (1, 20, 3, 4, 6)
    conditions = Conditions(actions=clip.actions[None])
    assert torch.equal(frame, begun(world, clip.frames[None], conditions)[1])
    both = list(world.clips)
    _, frames = begun(world, [one[:5] for one in both])
    stacked = torch.stack([one.frames[:5] for one in both])
    actions = torch.stack([one.actions[:5] for one in both])
    assert torch.equal(frames, begun(world, stacked, Conditions(actions=actions))[1])
    encoded = replace(clip, frames=world.autoencoder.encode(clip.frames[None])[0], encoded=True)
    assert torch.equal(begun(world, encoded)[1], frame)


def test_a_world_that_was_not_taught_to_begins_from_its_clips(world):
    for seed in (0, 1, 2):
        shown, frame = begun(world, seed=seed)
        wanted, same = begun(world, world.clips[seed % 2][:16], seed=seed)
        assert torch.equal(shown, wanted) and torch.equal(frame, same)
    assert begun(world, batch=3)[0].shape == (3, 16, 3, 4, 6)
    shown, frame = begun(world, from_nothing=True)
    assert shown.shape[1] == 0
    taught = replace(world, begins_from_nothing=True)
    assert torch.equal(begun(taught)[1], frame)
    bare = replace(world, own_clips=None)
    assert torch.equal(begun(bare)[1], frame)


def test_environments_begin_where_their_world_does(world):
    first, _ = WorldEnv(world).reset(seed=3)
    starts = [pixels(clip.frames[15]) for clip in world.clips]
    assert any((first == start).all() for start in starts)
    several, _ = WorldVectorEnv(world, 2).reset(seed=3)
    assert all(any((one == start).all() for start in starts) for one in several)
    taught, bare = replace(world, begins_from_nothing=True), replace(world, own_clips=None)
    from_nothing, _ = WorldEnv(taught).reset(seed=3)
    assert (from_nothing == WorldEnv(bare).reset(seed=3)[0]).all()
    assert not any((from_nothing == start).all() for start in starts)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((torch.zeros(3, 4, 6),), r"floats \[streams, frames, 3, rows, columns\].*\[None, None\]"),
        ((torch.zeros(1, 2, 3, 4, 6, dtype=torch.uint8),), r"got uint8.*by scd.pixels_to_frames\("),
        ((torch.full((1, 2, 3, 4, 6), 255.0),), r"convert them by frames / 127.5 - 1"),
        (([],), r"begin\(world.clips\[0\]\) or begin\(frames, conditions\), got list"),
        ((Clip(frames=torch.zeros(2, 3, 4, 6)),), "steered by actions, but none were given"),
        ((Clip(frames=torch.zeros(2, 3, 8, 6)),), "frames must be 4x6, got 8x6"),
    ],
)
def test_what_no_stream_can_begin_from_is_refused(world, given, words):
    with pytest.raises(ValueError, match=words):
        Rollout(world).begin(*given)


def test_a_clip_is_given_alone(world):
    with pytest.raises(ValueError, match="give it alone"):
        begun(world, world.clips[0], Conditions(actions=torch.zeros(1, 20).long()))


def test_a_rollout_takes_a_world_by_its_name_and_its_engine_too(world, tmp_path):
    folder = save_world(world, tmp_path / "world")
    plain, frame = begun(folder), begun(replace(world, own_clips=None))[1]
    torch.testing.assert_close(plain[1], frame)
    fast = Rollout(str(folder), engine="fast")
    fast.begin()
    torch.testing.assert_close(fast.step(1), frame, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="engine must be one of"):
        Rollout(world, engine="slow")
    with pytest.raises(FileNotFoundError, match="no world 'dooom'; did you mean 'doom'"):
        Rollout("dooom")
    with pytest.raises(FileNotFoundError, match="no world 'dooom'"):
        WorldEnv("dooom")


MISTYPED = """
import scd

rollout = scd.Rollout("doom")
rollout.begin()
for call in (
    lambda: scd.load(3),
    lambda: scd.Rollout(None),
    lambda: scd.WorldEnv(b"doom"),
    lambda: rollout.begin("doom"),
    lambda: rollout.begin(3),
    lambda: rollout.step(object()),
    lambda: rollout.step({1, 2}),
    lambda: scd.write_video(3, "a.mp4"),
    lambda: scd.write_video(["a"], "a.mp4"),
    lambda: scd.Rollout("doom", seed=1.0),
    lambda: rollout.begin(batch="2"),
    lambda: rollout.fork(2.0),
    lambda: scd.WorldEnv("doom", max_frames="9"),
):
    try:
        call()
    except ValueError as error:
        print(error)
    else:
        raise SystemExit("taken")
"""


def test_what_is_of_another_type_is_refused_with_what_to_type():
    # In a process of its own: here the annotations would be enforced before.
    run = subprocess.run([sys.executable, "-c", MISTYPED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr + run.stdout
    lines = run.stdout.splitlines()
    assert all("a world is named by a text or a path" in line for line in lines[:3])
    assert all("begin(world.clips[0])" in line for line in lines[3:5])
    assert all("type step('right')" in line for line in lines[5:7])
    assert all("a video needs frames" in line for line in lines[7:9])
    assert all("must be a whole number, got" in line for line in lines[9:])
    assert len(lines) == 13


MADE = """
import {first}
import {second}
environment = gymnasium.make("scd/Doom-v0", max_frames=2)
frame, _ = environment.reset(seed=0)
assert frame.shape == (64, 64, 3) and frame.dtype == "uint8", frame
assert [environment.step(1)[3] for _ in range(2)] == [False, True]
assert gymnasium.make("scd/World-v0", world="doom").unwrapped.action_space.n == 4
several = gymnasium.make_vec("scd/Doom-v0", num_envs=2)
assert isinstance(several.unwrapped, scd.WorldVectorEnv)
assert several.reset(seed=0)[0].shape == (2, 64, 64, 3)
"""


@pytest.mark.parametrize("order", [("scd", "gymnasium"), ("gymnasium", "scd")])
def test_gymnasium_makes_worlds_by_name_whichever_is_imported_first(order):
    code = MADE.format(first=order[0], second=order[1])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_example_of_the_first_hour_runs(tmp_path, request):
    example = request.config.rootpath / "examples" / "first_hour.py"
    code = f"import runpy, sys; sys.path.insert(0, {str(example.parent.parent)!r}); "
    code += f"names = runpy.run_path({str(example)!r}); print(names['frame'].shape)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "(64, 64, 3)\n"
    assert (tmp_path / "first_hour.mp4").stat().st_size > 10_000
    lines = [line for line in example.read_text().splitlines() if line and line[0] not in '"p']
    assert len(lines) <= 15
    assert scd.load("doom").clips[0].frames.shape == (48, 3, 64, 64)


def test_clips_of_vectors_begin_streams_as_ids_do(tmp_path):
    """From clips of one's own loop to a saved world, its environment and its server."""
    space = Dict({"keys": MultiBinary(2), "mouse": Box(-1.0, 1.0, (2,))})
    noise, spec = np.random.default_rng(0), conditions_of(space)
    clips = scd.ClipWriter(tmp_path / "own", space, fps=10)
    for _ in range(3):
        frames = noise.integers(0, 256, (9, 4, 6, 3), np.uint8)
        clips.write(frames, [space.sample() for _ in range(9)])
    world = replace(world_of(tiny_separable(conditions=spec)), card=read_card(clips.folder))
    world.clips = held_out_clips(str(clips.folder), world)
    assert world.clips.frames.shape == (1, 9, 3, 4, 6) and world.clips.actions.shape == (1, 9, 4)
    written = FolderSource(clips.folder, "val").read(0, 0, 9)
    world.save_pretrained(tmp_path / "world")
    kept = scd.load(tmp_path / "world").clips[0]
    assert torch.equal(kept.actions, written.actions) and torch.equal(kept.frames, written.frames)
    rollout, other = Rollout(world, seed=0), Rollout(world, seed=0)
    # Its only clip, as a world begins that was not taught to begin from nothing.
    assert torch.equal(rollout.begin(), other.begin(written))
    action = space.sample()
    assert torch.equal(rollout.step(action), other.step(action))
    env = WorldEnv(world, clips=world.clips)
    assert env.action_space == space and env.reset(seed=1)[0].shape == (4, 6, 3)
    pixels, damaged = world.clips.frames.contiguous(), torch.full_like(world.clips.actions, 3.0)
    save_file({"frames": pixels, "actions": damaged}, tmp_path / "world" / CLIPS_FILE)
    with pytest.raises(ValueError, match="holds no clips.*keys_0"):
        _ = scd.load(tmp_path / "world").clips
