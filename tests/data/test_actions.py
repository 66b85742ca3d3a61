"""Actions of Gymnasium's spaces, there and back, said in JSON, and refused outside their space."""

import json

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple

from scd.common.config import from_json, to_json
from scd.data.actions import by_part, conditions_of, flat, in_names, named, space_of, unflat
from scd.data.clip import check_actions
from scd.data.spaces import ActionPart, ConditionSpec
from tests.tiny import COMPOSITE, PARTS

SPACES = [
    Discrete(4),
    Discrete(5, start=3),
    Discrete(3, dtype=np.int32),
    Box(-np.inf, np.inf, (2,)),
    Box(-1, 1, (3,)),
    Box(np.array([-1, 0, -np.inf], np.float32), np.array([1, np.inf, 4], np.float32)),
    Box(-0.1, 0.1, (2, 2), np.float64),
    Box(0, 255, (2, 2), np.uint8),
    MultiBinary(5),
    MultiBinary((2, 3)),
    MultiDiscrete([3, 4, 2]),
    MultiDiscrete([3, 4], start=[1, -2]),
    MultiDiscrete(np.array([[2, 3], [4, 5]])),
    PARTS,
    Dict(one=Discrete(3)),
    Tuple([Discrete(2), Dict(a=Box(-2.5, 2.5, (1,), np.float64), b=Tuple([MultiBinary(2)]))]),
    Dict(pad=Dict(stick=Box(-1, 1, (2,)), buttons=MultiBinary(3)), hat=Discrete(9)),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_space_and_its_actions_come_back(space):
    spec = conditions_of(space)
    assert from_json(ConditionSpec, json.loads(json.dumps(to_json(spec)))) == spec
    again = space_of(spec)
    assert again == space
    space.seed(0)
    for _ in range(50):
        action = space.sample()
        values = flat(spec, action)
        check_actions(spec, torch.from_numpy(np.asarray(values))[None, None])
        back = unflat(spec, values)
        assert again.contains(back)
        np.testing.assert_array_equal(flat(spec, back), values)
        said = json.loads(json.dumps(by_part(spec, values.tolist())))
        np.testing.assert_array_equal(flat(spec, said), values)
    if not spec.num_actions:
        assert again.contains(unflat(spec, spec.idle_action))
        assert len(values) == spec.action_dim


def test_an_action_is_said_by_the_names_of_its_keys_and_choices():
    vector = [1.0, 0.0, 0.0, 1.0, 0.5, -0.25, 2.0, 1.0, 1.0]
    said = {"keys": ["w", "d"], "mouse": [0.5, -0.25], "pad": [[2, 1], 0]}
    assert in_names(COMPOSITE, vector) == said
    assert flat(COMPOSITE, said).tolist() == vector
    assert in_names(COMPOSITE, COMPOSITE.idle_action)["keys"] == []
    names = {"weapon": ("fist", "bow", "axe")}
    choice = conditions_of(Dict(weapon=Discrete(3), keys=MultiBinary(2)), names)
    assert in_names(choice, [2.0, 0.0, 1.0]) == {"keys": [0, 1], "weapon": "axe"}
    assert in_names(conditions_of(Tuple([Discrete(2), Box(-1, 1, (2,))])), [1.0, 0.5, 0.0]) == [
        1, [0.5, 0]]  # fmt: skip


def test_plain_spaces_are_as_they_were():
    assert conditions_of(Discrete(4)) == ConditionSpec(num_actions=4)
    assert conditions_of(Box(-np.inf, np.inf, (2,))) == ConditionSpec(action_dim=2)
    assert not conditions_of(Box(-1, 1, (2,))).is_composite
    assert not conditions_of(Discrete(4, start=1)).is_composite
    assert conditions_of(MultiBinary(2)).is_composite and COMPOSITE.is_composite


def test_entries_have_names():
    assert COMPOSITE.action_names == (
        "w", "a", "s", "d", "mouse_x", "mouse_y", "pad/[0]_0", "pad/[0]_1", "pad/[1]"
    )  # fmt: skip
    again = named(conditions_of(MultiBinary(2)), ("jump", "run"))
    assert again.action_parts[0].names == ("jump", "run")
    assert flat(again, ["run"]).tolist() == [0, 1] and flat(again, []).tolist() == [0, 0]


def test_parts_may_be_named_or_left_out():
    pad = (np.array([2, 1]), 0)
    held = flat(COMPOSITE, {"keys": ["w", "d"], "mouse": (0.5, -0.25), "pad": pad})
    assert held.tolist() == [1, 0, 0, 1, 0.5, -0.25, 2, 1, 1]
    assert flat(COMPOSITE, {"keys": "a"}).tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0]
    choice = conditions_of(Dict(weapon=Discrete(3)), {"weapon": ("fist", "bow", "axe")})
    assert flat(choice, {"weapon": "axe"}).tolist() == [2]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({"kays": [0, 0, 0, 0]}, "no part 'kays'; did you mean 'keys'.*there are keys, mouse, pad"),
        ({"keys": ["q"]}, "part 'keys' of an action has no key 'q'.*its keys are w, a, s, d"),
        ({"keys": [1, 0]}, r"part 'keys' .* needs numbers of shape \[4\], got \[1, 0\]"),
        ({"mouse": "left"}, "part 'mouse' of an action knows no 'left'"),
        ({"mouse": None}, "part 'mouse' of an action needs numbers"),
        ({"pad": ([1, 1],)}, "an action of pad has 2 parts, got 1"),
        ({"pad": {"dial": 1}}, "an action of pad has 2 parts, got {'dial': 1}"),
        (7, "an action needs parts by name: keys, mouse, pad, got 7"),
    ],
)
def test_actions_of_another_form_are_refused(action, message):
    with pytest.raises(ValueError, match=message):
        flat(COMPOSITE, action)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        (0, 0.5, "'w' is a whole number in 0 .. 1, got 0.5"),
        (1, 2, "'a' is a whole number in 0 .. 1, got 2"),
        (4, -1.5, "'mouse_x' is a number in -1 .. 1, got -1.5"),
        (6, 3, r"'pad/\[0\]_0' is a whole number in 0 .. 2, got 3"),
        (8, -1, "whole number in 0 .. 2, got -1"),
        (5, np.nan, "finite"),
    ],
)
def test_actions_outside_their_space_are_refused(entry, value, message):
    actions = torch.tensor(COMPOSITE.idle_action).repeat(2, 3, 1)
    check_actions(COMPOSITE, actions)
    actions[1, 2, entry] = value
    with pytest.raises(ValueError, match=message):
        check_actions(COMPOSITE, actions)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: conditions_of(Text(3)), "or Dict or Tuple of these, got Text"),
        (lambda: conditions_of(Dict({"a/b": Discrete(2)})), "words as names, without"),
        (lambda: conditions_of(PARTS, {"mice": ("x", "y")}), r"names were given of \['mice'\]"),
        (lambda: conditions_of(PARTS, {"mouse": ("x",)}), "'mouse' needs 2 names"),
        (lambda: ActionPart(name="a", space="Discrete"), "needs 1 choices"),
        (lambda: ActionPart(name="a", space="Discrete", choices=(0,)), "choices must be 1"),
        (lambda: ActionPart(name="a", space="Box", shape=(2,), low=(0.0,)), "needs 2 low"),
        (lambda: ConditionSpec(action_dim=3, action_parts=COMPOSITE.action_parts), "'action_dim'"),
        (lambda: ConditionSpec(action_dim=2, action_parts=(
            ActionPart(name="a", space="Box", shape=(1,)),) * 2), "names of their own"),
        (lambda: space_of(ConditionSpec(num_labels=2)), "no action space"),
    ],
)  # fmt: skip
def test_what_is_no_space_of_actions_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
