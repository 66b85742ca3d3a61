"""Actions as people type them: by number, name, vector, keys and mouse; what cannot be is said."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

from scd.data.actions import by_part, conditions_of
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec
from scd.streaming.environment import WorldEnv, WorldVectorEnv
from scd.streaming.rollout import Rollout
from scd.streaming.steering import IDLE, as_actions, as_plan, shown_names
from tests.streaming.test_rollout import world_of
from tests.tiny import COMPOSITE, tiny_separable


def card_of(*names, is_vector=False):
    number = {"action_dim" if is_vector else "num_actions": len(names)} if names else {}
    return DataCard(
        height=4, width=6, fps=10.0, conditions=ConditionSpec(**number), action_names=names
    )


WALK = card_of("none", "forward", "turn left", "turn right")
HAND = card_of("w", "key_a", "mouse_dx", "mouse_dy", is_vector=True)


@pytest.mark.parametrize(
    "typed",
    [
        1,
        "forward",
        "Forward ",
        np.int64(1),
        np.uint8(1),
        np.array(1),
        torch.tensor(1),
        {"keys": ["w"]},
        {"keys": "W"},
        {"keys": ["ArrowUp", "up"], "mouse": (0, 0.0)},
    ],
)
def test_one_action_is_that_of_all_streams(typed):
    actions = as_actions(typed, WALK, 3)
    assert actions is not None and actions.tolist() == [1, 1, 1]
    assert not actions.is_floating_point()


@pytest.mark.parametrize(
    "typed",
    [
        [0, 3],
        (0, 3),
        ["none", "turn_right"],
        ["none", 3],
        np.array([0, 3], np.int16),
        torch.tensor([0, 3]),
        [torch.tensor(0), torch.tensor(3)],
    ],
)
def test_several_actions_are_of_each_stream(typed):
    actions = as_actions(typed, WALK, 2)
    assert actions is not None and actions.tolist() == [0, 3]


def test_keys_mean_what_names_of_actions_say():
    meant = {"a": 2, "left": 2, "ArrowRight": 3, "arrow_right": 3, "none": 0}
    for key, number in meant.items():
        actions = as_actions({"keys": [key]}, WALK, 1)
        assert actions is not None and actions.item() == number
    idle = as_actions({"keys": []}, WALK, 1)
    assert idle is not None and idle.item() == 0
    jump = as_actions({"keys": ["space"]}, card_of("walk", "jump"), 1)
    assert jump is not None and jump.item() == 1


@pytest.mark.parametrize(
    ("typed", "vector"),
    [
        ([0.0, 0, 0.5, 0], [0, 0, 0.5, 0]),
        (np.array([0, 0, 0.5, 0]), [0, 0, 0.5, 0]),
        (torch.tensor([0, 0, 0.5, 0]), [0, 0, 0.5, 0]),
        ({"keys": ["w"], "mouse": (0.5, 0)}, [1, 0, 0.5, 0]),
        ({"keys": ["w", "a"], "mouse": np.array([0, -0.25])}, [1, 1, 0, -0.25]),
        ({}, [0, 0, 0, 0]),
    ],
)
def test_a_vector_is_that_of_all_streams(typed, vector):
    actions = as_actions(typed, HAND, 2)
    assert actions is not None and actions.dtype == torch.float32
    assert actions.tolist() == [vector, vector]
    each = as_actions([vector, [0.0] * 4], HAND, 2)
    assert each is not None and each.tolist() == [vector, [0.0] * 4]
    alone = as_actions(0.5, card_of("speed", is_vector=True), 2)
    assert alone is not None and alone.tolist() == [[0.5], [0.5]]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("forwrd", r"did you mean 'forward'\? .*type step\('turn right'\) or step\(3\)"),
        ("fly", r"no action is called 'fly'\. This world is steered by one of none, forward"),
        (True, "True is no action.*type step"),
        (1.0, "1.0 is no action.*type step"),
        (np.bool_(True), "is no action"),
        (torch.tensor(True), "no truth value.*type step"),
        ([], r"\[\] is no action"),
        ([[0], [1, 2]], "is no action"),
        (["forward", "fly"], "called 'fly'"),
        ([[0, 1]], r"one for each of 1 streams, got shape \[1, 2\].*type step"),
        ({"keys": ["w", "a"]}, "mean forward and turn left, of which this world does one at a"),
        ({"keys": ["q"]}, "knows no key 'q'.*type step"),
        ({"keys": [1]}, '"keys" are names such as'),
        ({"mouse": (0.1, 0)}, "knows no mouse.*type step"),
        ({"mouse": 3}, '"mouse" is .*two numbers, got 3'),
        ({"key": ["w"]}, "got \\['key'\\] too"),
    ],
)
def test_what_ids_cannot_mean_is_refused_with_what_to_type(typed, words):
    with pytest.raises(ValueError, match=words):
        as_actions(typed, WALK, 1)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("w", r"no action is called 'w'.*4 numbers.*type step\(\[0.0, 0.0, 0.0, 0.0\]\)"),
        (
            {"keys": ["q"]},
            "no entry of this world's actions is key 'q'. Entries are called w, key_a",
        ),
        (torch.zeros(1, 1, 4), r"vectors, got shape \[1, 1, 4\]"),
        ([None], "is no action"),
    ],
)
def test_what_vectors_cannot_mean_is_refused_with_what_to_type(typed, words):
    with pytest.raises(ValueError, match=words):
        as_actions(typed, HAND, 1)


def test_a_mouse_needs_an_entry_for_it():
    with pytest.raises(ValueError, match="no mouse along x. Entries are called speed"):
        as_actions({"mouse": (0.0, 0.0)}, card_of("speed", is_vector=True), 1)
    with pytest.raises(ValueError, match="no mouse along y"):
        as_actions({"mouse": (0.5, 0.5)}, card_of("mouse_x", is_vector=True), 1)
    actions = as_actions({"mouse": (0.5, 0.0)}, card_of("mouse_x", is_vector=True), 1)
    assert actions is not None and actions.tolist() == [[0.5]]


def test_an_unsteered_world_says_so():
    assert as_actions(None, card_of(), 1) is None
    with pytest.raises(ValueError, match=r"steered by no actions: type step\(\)"):
        as_actions("forward", card_of(), 1)


def test_a_rollout_takes_what_is_typed_as_its_numbers():
    world = world_of(tiny_separable())
    by_number, by_name = Rollout(world), Rollout(world)
    for rollout in (by_number, by_name):
        rollout.begin(batch=2)
    frames = by_number.step(torch.tensor([2, 2]))
    assert torch.equal(by_name.step("a2"), frames)
    frames = by_number.step(torch.tensor([0, 3]))
    assert torch.equal(by_name.step(["a0", np.int32(3)]), frames)
    by_number.observe(frames, torch.tensor([1, 1]))
    by_name.observe(frames, 1)
    assert torch.equal(by_name.step(1), by_number.step(torch.tensor([1, 1])))
    with pytest.raises(ValueError, match="2 streams need as many actions, got 3"):
        by_name.step([0, 0, 0])
    with pytest.raises(ValueError, match=r"action ids must lie in 0 \.\. 3, got 4"):
        by_name.step(4)


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (["forward", 3, {"keys": []}], [[1, 3, 0], [1, 3, 0]]),
        ([[0, 1], ["turn left", "none"], np.uint8(3)], [[0, 2, 3], [1, 0, 3]]),
        (torch.tensor([[0, 1, 2], [3, 2, 1]], dtype=torch.uint8), [[0, 1, 2], [3, 2, 1]]),
        (np.array([[0, 1, 2], [3, 2, 1]], dtype=np.int32), [[0, 1, 2], [3, 2, 1]]),
        (np.array([0, 1, 2]), [[0, 1, 2], [0, 1, 2]]),
        (np.array(["none", "forward", "none"]), [[0, 1, 0], [0, 1, 0]]),
        ("forward", [[1, 1, 1], [1, 1, 1]]),
        (np.int64(2), [[2, 2, 2], [2, 2, 2]]),
        ({"keys": ["w"]}, [[1, 1, 1], [1, 1, 1]]),
        (torch.tensor(2), [[2, 2, 2], [2, 2, 2]]),
    ],
)
def test_actions_of_several_steps_are_typed_like_those_of_one(typed, wanted):
    steps = as_plan(typed, WALK, 2, 3)
    assert all(one is not None and one.dtype == torch.int64 for one in steps)
    assert torch.stack([one for one in steps if one is not None], 1).tolist() == wanted
    # More than are wanted are left.
    assert len(as_plan(typed, WALK, 2, 2)) == 2


def test_vectors_of_several_steps():
    plan = torch.arange(24.0).view(2, 3, 4)
    for typed in (plan, plan.numpy(), plan.unbind(1), plan.int()):
        steps = as_plan(typed, HAND, 2)
        assert torch.equal(torch.stack([one for one in steps if one is not None], 1), plan)
    (first, second) = as_plan(plan[0, :2], HAND, 2)
    assert first is not None and torch.equal(first, plan[:1, 0].expand(2, -1))
    held = as_plan({"keys": ["w"]}, HAND, 1, 2)
    assert [one.tolist() for one in held if one is not None] == [[[1, 0, 0, 0]]] * 2
    assert as_plan(None, card_of(), 1, 3) == [None] * 3


@pytest.mark.parametrize(
    ("typed", "number", "words"),
    [
        ("forward", None, "needs their number: num_steps"),
        (None, None, "needs their number: num_steps"),
        ([0, 1], 3, "3 frames need as many actions, got 2"),
        (torch.zeros(2, 2).long(), 3, "3 frames need as many actions, got 2"),
        (torch.zeros(2, 2, 2).long(), 2, r"\[streams, steps\] or \[steps\], got \[2, 2, 2\]"),
        (np.zeros((2, 2), bool), 2, "is no action"),
        (["forward", "fly"], 2, "called 'fly'"),
    ],
)
def test_plans_that_cannot_be_are_refused(typed, number, words):
    with pytest.raises(ValueError, match=words):
        as_plan(typed, WALK, 2, number)


def test_a_stream_is_generated_by_what_is_typed():
    world = world_of(tiny_separable())
    rollout = Rollout(world)
    with pytest.raises(ValueError, match="begin the stream first"):
        rollout.generate([1], 1)
    rollout.begin(batch=2)
    frames = rollout.fork().generate(torch.tensor([[0, 2, 1], [3, 2, 1]]), 3)
    assert torch.equal(rollout.fork().generate([["a0", "a3"], "a2", 1]), frames)
    assert torch.equal(rollout.generate([[0, 3], 2, 1, 0], np.int32(3)), frames)
    with pytest.raises(ValueError, match="num_steps must be 1 or more, got 0"):
        rollout.generate([1], 0)


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64])
def test_numbers_of_any_integer_type_are_numbers(kind):
    world = world_of(tiny_separable())
    plain, typed = Rollout(world, seed=3), Rollout(world, seed=kind(3))
    for rollout, one in ((plain, int), (typed, kind)):
        rollout.num_steps = one(2)
        rollout.begin(batch=one(2))
    futures = plain.fork(2, seeds=[4, 5]), typed.fork(kind(2), seeds=[kind(4), kind(5)])
    assert torch.equal(plain.step(1), typed.step(kind(1)))
    assert torch.equal(*(one.step(1) for one in futures))
    for call in (
        lambda: Rollout(world, seed=True),
        lambda: plain.begin(batch=True),
        lambda: plain.fork(True),
        lambda: plain.fork(1, seeds=[True]),
        lambda: plain.generate([1], num_steps=True),
        lambda: setattr(plain, "num_steps", True),
        lambda: WorldVectorEnv(world, True),
        lambda: WorldVectorEnv(world, 2, num_steps=True),
        lambda: WorldEnv(world, max_frames=True),
    ):
        with pytest.raises(ValueError, match="must be a whole number, got True"):
            call()


PARTS_ACTION = {
    "keys": np.array([1, 0, 0, 1], np.int8),
    "mouse": np.array([0.5, -0.25], np.float32),
    "pad": (np.array([2, 1]), np.int64(0)),
}
PARTED = DataCard(
    height=4, width=6, fps=10.0, conditions=COMPOSITE, action_names=COMPOSITE.action_names
)


def test_an_action_is_given_part_by_part():
    held = [1, 0, 0, 1, 0.5, -0.25, 2, 1, 1]
    action = {"keys": ["w", "d"], "mouse": (0.5, -0.25), "pad": ([2, 1], 0)}
    for given in (action, PARTS_ACTION, held, np.array(held), torch.tensor(held)):
        taken = as_actions(given, PARTED, 2)
        assert taken.shape == (2, 9) and taken[0].tolist() == held == taken[1].tolist()
    idle = as_actions({"keys": []}, PARTED, 1)
    assert idle.tolist() == [[0.0] * 9]
    each = as_actions([action, {"keys": "s"}], PARTED, 2)
    assert each[0].tolist() == held and each[1].tolist() == [0, 0, 1] + [0] * 6
    assert as_actions(np.array([held, held]), PARTED, 2).shape == (2, 9)


def test_keys_and_mouse_mean_entries_of_any_part():
    spaces = Dict(buttons=MultiBinary(2), look=Box(-1, 1, (2,)))
    spec = conditions_of(spaces, {"buttons": ("w", "jump"), "look": ("mouse_x", "mouse_y")})
    names = ("w", "jump", "mouse_x", "mouse_y")
    card = DataCard(height=4, width=6, fps=10.0, conditions=spec, action_names=names)
    taken = as_actions({"keys": ["w"], "mouse": (0.1, 0)}, card, 1)
    assert taken[0].tolist() == pytest.approx([1, 0, 0.1, 0])
    with pytest.raises(ValueError, match="is key 'jumq'; did you mean 'jump'"):
        as_actions({"keys": ["jumq"]}, card, 1)
    one = conditions_of(MultiBinary(2))
    card = DataCard(height=4, width=6, fps=10.0, conditions=one, action_names=("a", "b"))
    assert as_actions([1, 0], card, 3).tolist() == [[1, 0]] * 3


@pytest.mark.parametrize(
    ("space", "one", "vector"),
    [
        (Tuple([MultiBinary(2), Discrete(3)]), [[1, 0], 2], [1, 0, 2]),
        (Tuple([MultiBinary(2), MultiBinary(2)]), [[1, 0], [0, 1]], [1, 0, 0, 1]),
        (Tuple([Box(-1, 1, (1,)), Box(-1, 1, (1,))]), [[0.5], [-1]], [0.5, -1]),
        (Tuple([Tuple([MultiBinary(2), Discrete(3)]), MultiDiscrete([2, 3])]),
         [[[1, 0], 2], [1, 2]], [1, 0, 2, 1, 2]),
    ],
    ids=str,
)  # fmt: skip
def test_parts_by_place_may_be_lists_as_json_has_them(space, one, vector):
    spec = conditions_of(space)
    card = DataCard(height=4, width=6, fps=10.0, conditions=spec, action_names=spec.action_names)
    for given in (one, tuple(one), vector, [*one[:-1], np.array(one[-1])]):
        assert as_actions(given, card, 2).tolist() == [vector, vector]
    other = [0.0] * len(vector)
    idle = by_part(spec, other)
    assert as_actions([one, idle], card, 2).tolist() == [vector, other]
    assert as_actions([vector, other], card, 2).tolist() == [vector, other]
    with pytest.raises(ValueError):
        as_actions([*one, 0], card, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keys": ["q"]}, "has no key 'q'.*its keys are w, a, s, d"),
        ({"kezs": ["w"]}, "no part 'kezs'; did you mean 'keys'"),
        ("w", r"type step\({'keys': \[0, 0, 0, 0\], 'mouse': \[0.0, 0.0\]"),
        ([{"keys": ["w"]}, "w"], "needs parts by name: keys, mouse, pad, got 'w'"),
    ],
)
def test_actions_of_no_part_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        as_actions(given, PARTED, 2)


def test_names_are_shown_as_the_page_shows_them():
    assert shown_names(WALK) == ["do nothing", "forward", "turn left", "turn right"]
    assert shown_names(card_of("No-Op", "noop", "turn_left")) == [
        "No-Op",
        "do nothing",
        "turn left",
    ]
    script = Path("scd/serving/web/parts.js").read_text()
    words = re.search(r"^const IDLE = \[(.*)\];$", script, re.M)
    assert words and tuple(re.findall(r'"(\w+)"', words[1])) == IDLE
