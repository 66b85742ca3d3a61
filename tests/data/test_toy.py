"""The toy world: repeatable, smooth, steered, and with shapes that go out of sight and return."""

import math

import numpy as np
import pytest
import torch

from scd.data.toy import MAX_FRAMES, MOVER_COLOURS, NUM_MOVERS, SPEEDS, ToyWorld


def test_an_episode_is_a_function_of_seed_split_and_number():
    first = ToyWorld(32, "train", seed=1).read(4, 100, 8)
    again = ToyWorld(32, "train", seed=1).read(4, 100, 8)
    assert torch.equal(first.frames, again.frames) and torch.equal(first.actions, again.actions)
    for other in (
        ToyWorld(32, "train", seed=1).read(5, 100, 8),
        ToyWorld(32, "train", seed=2).read(4, 100, 8),
        ToyWorld(32, "val", seed=1).read(4, 100, 8),
        ToyWorld(32, "test", seed=1).read(4, 100, 8),
    ):
        assert not torch.equal(first.frames, other.frames)


@pytest.mark.parametrize("size", [32, 64])
def test_frames_have_the_promised_form(size):
    world = ToyWorld(size, "val")
    clip = world.read(0, MAX_FRAMES - 5, 5)
    assert clip.frames.shape == (5, 3, size, size) and clip.frames.dtype == torch.float32
    assert clip.frames.min() >= -1 and clip.frames.max() <= 1
    assert clip.actions.dtype == torch.int64
    assert world.card.action_names[0] == "none"
    assert world.num_frames(7) == MAX_FRAMES


def test_both_sizes_show_one_world():
    small, large = ToyWorld(32, "test").state(9, 20), ToyWorld(64, "test").state(9, 20)
    np.testing.assert_allclose(large.positions, 2 * small.positions, rtol=1e-5)
    np.testing.assert_array_equal(large.actions, small.actions)
    np.testing.assert_allclose(large.visible, small.visible, atol=0.15)
    assert large.occluder == tuple(2 * edge for edge in small.occluder)


def test_movers_keep_their_speed_and_turn_only_at_walls():
    state = ToyWorld(32, "train").state(0, 300)
    steps = np.diff(state.positions[:, :NUM_MOVERS], axis=0)  # [t-1 movers 2]
    assert np.abs(steps).max() <= SPEEDS[1] + 1e-4
    speeds = np.median(np.abs(steps), axis=0)
    assert speeds.min() >= SPEEDS[0] - 1e-4
    turns = np.abs(np.abs(steps) - speeds) > 1e-3
    near_wall = np.minimum(state.positions, 32 - state.positions)[1:, :NUM_MOVERS] < 2 + 4.5 + 1.2
    assert turns.any() and near_wall[turns].all()


def test_shapes_go_out_of_sight_and_come_back():
    world = ToyWorld(32, "train")
    returned = 0
    for episode in range(8):
        visible = world.state(episode, 256).visible[:, :NUM_MOVERS]
        for track in visible.T:
            hidden = np.flatnonzero(track < 0.02)
            returned += bool(len(hidden) and (track[hidden[0] :] > 0.9).any())
    assert returned >= 16  # of 24


def test_what_the_state_says_can_be_seen_in_the_picture():
    world = ToyWorld(64, "val")
    state, clip = world.state(3, 200), world.read(3, 0, 200)
    seen = hidden = 0
    for shape in range(NUM_MOVERS):
        colour = torch.from_numpy(state.colours[shape])[:, None, None]
        found = ((clip.frames - colour).abs().amax(1) < 0.02).sum((1, 2))  # [t]
        for frame in range(200):
            if state.visible[frame, shape] == 1:
                assert found[frame] >= 20
                seen += 1
            if state.visible[frame, shape] == 0:
                assert found[frame] == 0
                hidden += 1
    assert seen > 50 and hidden > 5
    assert {tuple(colour) for colour in state.colours[:NUM_MOVERS]} <= {
        tuple(np.float32(colour) * 2 - 1) for colour in MOVER_COLOURS
    }


def test_the_policy_repeats_itself_and_uses_every_action():
    actions = ToyWorld(32, "train").state(1, 2000).actions
    assert set(actions) == set(range(5))
    assert 0.78 < np.mean(actions[1:] == actions[:-1]) < 0.9  # 0.8 + 0.2 / 5 expected


def test_there_is_enough_motion_to_predict():
    world = ToyWorld(32, "val")
    frames = [world.read(episode, 0, 40).frames for episode in range(24)]

    def repeat_last(horizon: int) -> float:
        errors = [((clip[horizon:] - clip[:-horizon]) ** 2).mean() for clip in frames]
        return 10 * math.log10(4 / float(torch.stack(errors).mean()))

    assert 21 < repeat_last(1) < 23.5
    assert 16 < repeat_last(4) < 18.5
    assert 15 < repeat_last(8) < 17.5


def test_what_does_not_exist_is_refused():
    world = ToyWorld(32, "val")
    with pytest.raises(ValueError, match="episodes are"):
        world.read(world.num_episodes, 0, 4)
    for start, num_frames in ((-1, 4), (0, 0), (MAX_FRAMES - 3, 4)):
        with pytest.raises(ValueError, match="were asked for"):
            world.read(0, start, num_frames)
    with pytest.raises(ValueError, match="0 .. 4"):
        world.play(0, np.array([0, 5]))
    with pytest.raises(ValueError, match="seed"):
        ToyWorld(32, "val", seed=-1)
