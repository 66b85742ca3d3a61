"""Key maps: from the names of actions, from words, in cards, and refused where they do not fit."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from scd import serving
from scd.common.config import from_json, to_json
from scd.data import keymap
from scd.data.actions import conditions_of
from scd.data.keymap import Binding, derive_key_map, read_key_map
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec
from tests.tiny import COMPOSITE

NAMES = COMPOSITE.action_names


def does(key_map, control):
    """Return part, entry and value of what a control does; None: nothing."""
    found = [(one.part, one.entry, one.value) for one in key_map if one.control == control]
    assert len(found) <= 1, control
    return found[0] if found else None


def made_of(space, names=None):
    spec = conditions_of(space, names)
    return derive_key_map(spec, spec.action_names)


def test_choices_have_the_keys_of_their_names_and_the_digits_of_their_places():
    names = ("none", "up", "turn_left", "jump", "fire")
    key_map = derive_key_map(ConditionSpec(num_actions=5), names)
    for control in ("KeyW", "ArrowUp", "StickY-", "Pad12", "PadAxis1-", "Digit2"):
        assert does(key_map, control) == ("", 0, 1.0)
    assert does(key_map, "KeyA") == ("", 0, 2.0) and does(key_map, "KeyS") is None
    assert does(key_map, "Space") == does(key_map, "Digit4") == ("", 0, 3.0)
    assert does(key_map, "KeyX") == ("", 0, 4.0) and does(key_map, "Mouse0") is None


def test_a_car_is_driven_by_the_keys_of_directions():
    names = ("nothing", "right", "left", "gas", "brake")
    key_map = derive_key_map(ConditionSpec(num_actions=5), names)
    for key, arrow, action in zip("DAWS", ("Right", "Left", "Up", "Down"), names[1:], strict=True):
        wanted = ("", 0, float(names.index(action)))
        assert does(key_map, f"Key{key}") == does(key_map, f"Arrow{arrow}") == wanted


def test_keys_and_a_mouse_share_the_controls():
    key_map = derive_key_map(COMPOSITE, NAMES)
    for entry, letter in enumerate("WASD"):
        assert does(key_map, f"Key{letter}") == ("keys", entry, 1.0)
    assert does(key_map, "MouseX") == ("mouse", 0, 0.02)
    assert does(key_map, "StickY") == does(key_map, "PadAxis3") == ("mouse", 1, 1.0)
    assert does(key_map, "ArrowUp") == ("mouse", 1, -1.0)
    # An axis that looks is none that walks.
    assert does(key_map, "StickY-") is None and does(key_map, "PadAxis1-") == ("keys", 0, 1.0)
    assert does(key_map, "Digit2") == ("pad/[0]", 0, 2.0)
    assert does(key_map, "Digit4") == ("pad/[1]", 0, 0.0)


def test_boxes_have_pairs_of_keys_and_pedals():
    wheel = spaces.Box(np.array([-2, 0, 0], np.float32), np.array([2, 1, 0.5], np.float32))
    key_map = made_of(wheel, {"": ("steering", "gas", "brake")})
    assert does(key_map, "KeyA") == ("", 0, -2.0) and does(key_map, "PadAxis0") == ("", 0, 2.0)
    assert does(key_map, "KeyW") == does(key_map, "Pad7") == ("", 1, 1.0)
    assert does(key_map, "KeyS") == ("", 2, 0.5)
    # Where there are no bounds, keys give 1; a stick pushed up raises.
    key_map = derive_key_map(ConditionSpec(action_dim=9), tuple("abcdefghi"))
    assert does(key_map, "KeyS") == ("", 1, -1.0) and does(key_map, "StickY") == ("", 1, -1.0)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(30),
        spaces.MultiDiscrete([3, 9]),
        spaces.MultiBinary((2, 9)),
        spaces.Box(0, 255, (2, 2), np.uint8),
        spaces.Dict(camera=spaces.Box(-180, 180, (2,)), jump=spaces.Discrete(2)),
    ],
    ids=str,
)
def test_a_map_of_any_space_fits_it_and_comes_back(space):
    spec = conditions_of(space)
    num = spec.num_actions or spec.action_dim
    names = spec.action_names or tuple(f"action {number}" for number in range(num))
    card = DataCard(height=8, width=8, fps=10.0, conditions=spec, action_names=names)
    assert card.key_map == () and len(card.keys) > 3
    own = replace(card, key_map=card.keys)
    assert from_json(DataCard, json.loads(json.dumps(to_json(own)))) == own
    # Cards of before have none.
    old = {key: value for key, value in to_json(card).items() if key != "key_map"}
    assert from_json(DataCard, old) == card


def test_a_map_is_read_from_words():
    words = ["KeyQ=w", "PadAxis0+=d", "MouseX=mouse_x:-0.1", "KeyG=mouse_y"]
    assert read_key_map(words, COMPOSITE, NAMES) == (
        Binding(control="KeyQ", part="keys", entry=0),
        Binding(control="PadAxis0+", part="keys", entry=3),
        Binding(control="MouseX", part="mouse", entry=0, value=-0.1),
        Binding(control="KeyG", part="mouse", entry=1, value=1.0),
    )
    (one,) = read_key_map(["Space=jump"], ConditionSpec(num_actions=2), ("none", "jump"))
    assert one == Binding(control="Space", value=1.0)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("KeyQ", "CONTROL=NAME"),
        ("KeyQ=ww", "have no 'ww'; did you mean 'w'.; there are w, a, s, d, mouse_x, mouse_y"),
        ("KeyQ=w:x", "a number after the colon, got 'x'"),
        ("KeyQ=w:2", "'keys' the value 2, needed one in 0 .. 1"),
        ("KeyQ=mouse_x:1.5", "needed one in -1 .. 1"),
        ("KeyR=w", "KeyR is a key of the page"),
        ("q=w", "'q' is no control: needed a key such as KeyW"),
        ("MouseX=w", "'keys' is MultiBinary: bind keys"),
        ("MouseX=mouse_x:nan", "a value that is not 0"),
    ],
)
def test_words_that_do_not_fit_are_refused(word, told):
    with pytest.raises(ValueError, match=told):
        read_key_map([word], COMPOSITE, NAMES)


@pytest.mark.parametrize(
    ("binding", "told"),
    [
        ({"part": "kays"}, "unknown part of an action 'kays'; did you mean 'keys'."),
        ({"part": "keys", "entry": 4}, "entry 4 of part 'keys', whose entries are 0 .. 3: w, a"),
        ({"part": "keys", "value": 0.5}, "'keys' 0.5: needed a number"),
    ],
)
def test_a_card_binds_only_what_its_actions_have(binding, told):
    key_map = (Binding(control="KeyQ", **binding),)
    with pytest.raises(ValueError, match=told):
        DataCard(height=8, width=8, fps=1.0, conditions=COMPOSITE, action_names=NAMES,
                 key_map=key_map)  # fmt: skip
    with pytest.raises(ValueError, match="no actions steer this world"):
        DataCard(height=8, width=8, fps=1.0, conditions=ConditionSpec(), action_names=(),
                 key_map=key_map)  # fmt: skip


@pytest.mark.parametrize("name", ["RESERVED", "IDLE"])
def test_the_page_has_the_same_words(name):
    folder = Path(serving.__file__).parent / "web"
    scripts = "".join((folder / one).read_text() for one in ("keymap.js", "parts.js"))
    found = re.search(rf"const {name} = \[([^\]]*)\]", scripts)
    assert found is not None
    assert re.findall(r'"(\w+)"', found[1]) == list(getattr(keymap, name))
