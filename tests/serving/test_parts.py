"""Actions by part through a real server: what a client may give, what frames say, refusals."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import replace

import numpy as np
import pytest

from scd.common.config import from_json
from scd.data.keymap import Binding
from scd.data.spaces import ConditionSpec
from scd.serving.client import Client, Refused
from scd.serving.messages import ServeError
from tests.servers import serving, tiny_playable
from tests.tiny import COMPOSITE, PARTS, tiny_separable

VECTOR = (1.0, 0.0, 0.0, 1.0, 0.5, -0.25, 2.0, 1.0, 1.0)
GIVEN = [
    {"keys": ["w", "d"], "mouse": [0.5, -0.25], "pad": [[2, 1], 0]},
    {"keys": np.array([1, 0, 0, 1], np.int8), "mouse": np.array([0.5, -0.25], np.float32),
     "pad": (np.array([2, 1]), np.int64(0))},
    VECTOR,
    np.array(VECTOR),
]  # fmt: skip
"""The same action, in every form that a client may give it."""


def world_of(conditions=COMPOSITE, **changes):
    world = tiny_playable(tiny_separable, conditions=conditions)
    return replace(world, card=replace(world.card, **changes))


def test_frames_say_the_parts_that_led_to_them_in_whatever_form_they_were_given():
    with serving(world_of()) as server, Client(server.url) as client:
        pixels = []
        for given in GIVEN:
            client.create(seed=3) if client.state is None else client.reset(seed=3)
            (frame,) = client.step(given)
            assert frame.header.action == VECTOR
            assert frame.header.parts == GIVEN[0]
            pixels.append(frame.pixels)
        assert all((one == pixels[0]).all() for one in pixels)
        # What the space draws is an action; a held one leads to the frames that come.
        PARTS.seed(0)
        for _ in range(3):
            client.step(PARTS.sample())
        client.act(GIVEN[1], sequence=7)
        client.run()
        frame = next(one for one in client.frames() if one.header.sequence == 7)
        assert frame.header.action == VECTOR


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"keys": ["q"]}, "no key 'q'; its keys are w, a, s, d"),
        ({"mouse": [0.5]}, "'mouse' of an action needs numbers of shape"),
        ({"feet": 1}, "no part 'feet'; there are keys, mouse, pad"),
        ((1.0, 0.0), "needed 9 entries, got 2"),
        (2, "a vector of 9 numbers, or its parts: keys, mouse, pad"),
        ("forward", "action: needed a number, a list of numbers, or parts by name or place"),
        ({"mouse": [float("nan"), 0.0]}, "needs numbers of shape"),
    ],
)
def test_an_action_of_another_form_is_refused_and_the_stream_goes_on(given, told):
    with serving(world_of()) as server, Client(server.url) as client:
        client.create()
        with pytest.raises(ServeError, match=told) as caught:
            client.step(given)
        assert caught.value.code in ("unknown_action", "bad_field") and not caught.value.fatal
        assert len(client.step(GIVEN[0])) == 1


def test_parts_of_a_world_without_any_are_refused():
    with serving() as server, Client(server.url) as client:
        client.create()
        with pytest.raises(Refused, match="is a number from 0 to 3, got parts"):
            client.step({"keys": ["w"]})
        assert client.step(1)[0].header.parts is None


def test_a_world_tells_its_key_map_over_both_ways():
    own = (Binding(control="KeyQ", part="keys", entry=3), Binding(control="MouseX", part="mouse"))
    with serving(world_of(key_map=own)) as server, Client(server.url) as client:
        told = client.welcome.world.key_map
        assert tuple(from_json(Binding, one) for one in told) == own
        with urllib.request.urlopen(f"{server.url}/v1/world", timeout=30) as answer:
            assert tuple(json.load(answer)["world"]["key_map"]) == told
    forward = world_of(ConditionSpec(num_actions=2), action_names=("none", "forward"))
    with serving(forward) as server, Client(server.url) as client:
        controls = {one["control"]: one["value"] for one in client.welcome.world.key_map}
        assert controls["KeyW"] == controls["ArrowUp"] == 1.0
