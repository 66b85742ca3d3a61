"""Clips: actions stand beside the frames that they led to, values keep their range."""

import numpy as np
import pytest
import torch

from scd.data.clip import (
    Batch,
    Clip,
    Conditions,
    check_conditions,
    frames_to_pixels,
    pixels_to_frames,
)
from scd.data.spaces import ConditionSpec
from scd.data.toy import AGENT_RADIUS, AGENT_STEP, MOVES, UNITS, WALL, ToyWorld


def test_a_frame_is_the_effect_of_the_action_with_its_number():
    world = ToyWorld(32, "train")
    actions = world.state(3, 40).actions
    states = world.state(3, 40)
    agent = states.positions[:, states.agent]
    walked = np.clip(
        agent[:-1] + AGENT_STEP * MOVES[actions[1:]],
        WALL + AGENT_RADIUS,
        UNITS - WALL - AGENT_RADIUS,
    )
    np.testing.assert_allclose(agent[1:], walked, atol=1e-5)
    assert np.abs(agent[1:] - agent[:-1]).max() == AGENT_STEP


def test_another_action_changes_the_frame_with_its_number_first():
    world = ToyWorld(32, "train")
    actions = np.zeros(12, np.int64)
    still = world.play(5, actions).frames
    for step in (0, 4, 11):
        changed = actions.copy()
        changed[step] = 3 if world.state(5, 1).positions[0, 3, 0] > 16 else 4
        moved = world.play(5, changed).frames
        differs = [bool((a != b).any()) for a, b in zip(still, moved, strict=True)]
        assert differs == [frame >= step for frame in range(12)]


def test_read_carries_the_actions_of_its_frames():
    world = ToyWorld(32, "train")
    whole, part = world.read(2, 0, 30), world.read(2, 11, 9)
    assert torch.equal(part.frames, whole.frames[11:20])
    assert torch.equal(part.actions, whole.actions[11:20])
    again = world.play(2, whole.actions.numpy())
    assert torch.equal(again.frames, whole.frames)
    assert torch.equal(whole[11:20].frames, part.frames)
    assert len(whole[11:20]) == 9


def test_pixels_survive_the_way_to_frames_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    frames = pixels_to_frames(pixels)
    assert frames.min() == -1 and frames.max() == 1 and frames.shape == (1, 3, 16, 16)
    assert torch.equal(frames_to_pixels(frames), pixels)
    assert torch.equal(frames_to_pixels(frames * 3), frames_to_pixels((frames * 3).clamp(-1, 1)))


def clip(num_frames: int = 4, actions: torch.Tensor | None = None, label: int | None = None):
    return Clip(frames=torch.zeros(num_frames, 3, 8, 8), actions=actions, label=label)


def test_batch_stacks_clips_of_one_kind():
    batch = Batch.of([clip(actions=torch.arange(4), label=i) for i in range(3)])
    assert batch.frames.shape == (3, 4, 3, 8, 8)
    assert batch.conditions.actions.shape == (3, 4)
    assert batch.conditions.labels.tolist() == [0, 1, 2]
    assert batch.conditions.frames(1, 3).actions.tolist() == [[1, 2]] * 3
    with pytest.raises(ValueError, match="one shape"):
        Batch.of([clip(4), clip(5)])
    with pytest.raises(ValueError, match="some have none"):
        Batch.of([clip(actions=torch.arange(4)), clip()])


@pytest.mark.parametrize(
    ("spec", "conditions", "message"),
    [
        (ConditionSpec(num_actions=3), Conditions(), "none were given"),
        (ConditionSpec(), Conditions(actions=torch.zeros(1, 4).long()), "without actions"),
        (ConditionSpec(num_actions=3), Conditions(actions=torch.full((1, 4), 3)), "0 .. 2"),
        (ConditionSpec(num_actions=3), Conditions(actions=-torch.ones(1, 4).long()), "0 .. 2"),
        (ConditionSpec(num_actions=3), Conditions(actions=torch.zeros(1, 3).long()), "4 frames"),
        (ConditionSpec(num_actions=3), Conditions(actions=torch.zeros(1, 4, 2)), "integers"),
        (ConditionSpec(action_dim=2), Conditions(actions=torch.zeros(1, 4, 3)), "2 entries"),
        (ConditionSpec(action_dim=2), Conditions(actions=torch.full((1, 4, 2), torch.nan)), "NaN"),
        (ConditionSpec(num_labels=2), Conditions(), "not given"),
        (ConditionSpec(num_labels=2), Conditions(labels=torch.tensor([2])), "0 .. 1"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(spec, conditions, message):
    with pytest.raises(ValueError, match=message):
        check_conditions(spec, conditions, num_frames=4)


def test_conditions_that_fit_are_accepted():
    check_conditions(
        ConditionSpec(num_actions=3), Conditions(actions=torch.tensor([[0, 1, 2, 2]])), 4
    )
    check_conditions(ConditionSpec(action_dim=2), Conditions(actions=torch.zeros(1, 4, 2)), 4)
    check_conditions(ConditionSpec(num_labels=2), Conditions(labels=torch.tensor([1])), 4)
    with pytest.raises(ValueError, match="either discrete or continuous"):
        ConditionSpec(num_actions=2, action_dim=2)
