"""Worlds of a text, and of a text and keys, over a real server: prompts, video, going back."""

import base64
import io
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from scd.data.clip import Conditions, frames_to_pixels
from scd.models.build import build
from scd.serving.client import Client, Refused
from scd.serving.tensors import read_head
from scd.streaming.rollout import Rollout
from scd.streaming.texts import WorldTexts
from tests.servers import serving
from tests.tiny import shaken
from tests.tiny_text_world import KINDS, TEXT, text_world
from tests.tiny_wan_vae import write_tiny_parts

KEYS = replace(TEXT, num_actions=3, actions_per_frame=4)
ROUNDED = 3e-4
"""Mean difference of a picture's bytes up to which it is the same."""

GUIDED = {"kind": "conditions", "scale": 2.0}

DOG, SNOW = "the red dog runs", "snow at night"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield write_tiny_parts(folder)


def world_of(source, conditions):
    world = text_world("separable", source)
    torch.manual_seed(0)
    model = shaken(build(replace(KINDS["separable"], conditions=conditions)))
    names = tuple("abc"[: conditions.num_actions])
    card = replace(world.card, conditions=conditions, action_names=names)
    return replace(world, model=model, card=card)


@pytest.fixture(scope="module")
def keys(source):
    world = world_of(source, KEYS)
    with serving(world) as served:
        yield world, served


def alone(world, prompt, actions, seed, switch=None):
    """Pictures of the same stream without a server; switch: (frame, prompt, recompute)."""
    texts, rollout = WorldTexts(world), Rollout(world, seed=seed, engine="fast")
    rollout.begin(conditions=Conditions(text=texts.embed(prompt)))
    made = []
    for index, action in enumerate(actions):
        if switch is not None and index == switch[0]:
            rollout.change_text(texts.embed(switch[1]), recompute=switch[2])
        frames = rollout.step_video(action)[0]
        made.append(frames_to_pixels(frames).numpy())
    return made


def ask(served, verb, session="", **fields):
    """Say something over HTTP; return the answer."""
    path = f"/v1/sessions/{session}/{verb}" if session else "/v1/sessions"
    status, told = served.call("POST", path, fields)
    assert status in (200, 201), told
    return told


def step(served, session, *actions):
    """Make frames; return the pictures of each, and the headers of all."""
    made, headers = [], []
    for action in actions:
        told = ask(served, "step?format=png", session, action=action)
        made.append(np.stack([pixels_of(one["picture"]) for one in told["frames"]]))
        headers += told["frames"]
    return made, headers


def pixels_of(picture):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))


def same(found, wanted):
    """Whether pictures are the same, but for a byte here and there that is rounded otherwise."""
    pairs = list(zip(found, wanted, strict=True))
    assert all(one.shape == two.shape for one, two in pairs)
    return all(np.abs(one.astype(int) - two).mean() < ROUNDED for one, two in pairs)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_session_shows_its_prompt_and_obeys_its_keys(keys, recompute):
    world, served = keys
    actions = [0, 2, 1, 1]
    session = ask(served, "create", prompt=DOG, seed=3)["session"]
    found, headers = step(served, session, *actions[:2])
    told = ask(served, "set", session, prompt=SNOW, recompute=recompute)
    assert told["prompt"] == SNOW
    assert (told["history_from"] == 1) == recompute and told["kept_from"] == 0
    found += step(served, session, *actions[2:])[0]
    numbers = [(one["frame"], one["picture_index"], one["num_pictures"]) for one in headers]
    assert numbers == [(0, 0, 1), *((1, place, 4) for place in range(4))]
    assert same(found, alone(world, DOG, actions, 3, (2, SNOW, recompute)))
    assert not same(found, alone(world, DOG, actions, 3))
    assert not same(found, alone(world, DOG, actions, 3, (2, SNOW, not recompute)))
    # The newest picture of an earlier frame is the one that was seen.
    _, shown = served.call("GET", f"/v1/sessions/{session}/frames/1")
    near = np.asarray(Image.open(io.BytesIO(shown))).astype(int) - found[1][-1]
    assert np.abs(near).mean() < 8


def test_going_back_and_forking_keep_what_the_decoder_remembers(keys):
    world, served = keys
    actions = [0, 2, 1, 1]
    wanted = alone(world, DOG, actions, 5, (1, SNOW, False))
    session = ask(served, "create", prompt=DOG, seed=5)["session"]
    step(served, session, actions[0])
    ask(served, "set", session, prompt=SNOW)
    found, _ = step(served, session, *actions[1:])
    assert same(found, wanted[1:])
    state = ask(served, "rewind", session, frame=1)
    assert state["frame"] == 1 and state["prompt"] == SNOW
    assert same(step(served, session, actions[2])[0], wanted[2:3])
    forked = ask(served, "fork", session, frame=2)
    assert forked["prompt"] == SNOW
    assert same(step(served, forked["session"], actions[3])[0], wanted[3:])
    again = ask(served, "restart", session)
    assert again["frame"] == -1 and again["prompt"] == SNOW


def file_of(served, session):
    """A snapshot of a session."""
    status, file = served.call("POST", f"/v1/sessions/{session}/snapshot")
    assert status == 200
    return file


def restored(served, file):
    """The state of a session that goes on from a file."""
    status, state = served.call("POST", "/v1/sessions/restore", file)
    assert status == 201, state
    return state


@pytest.mark.parametrize("num_frames", [0, 1, 4])
def test_a_snapshot_has_what_the_decoder_remembers(keys, num_frames):
    """At the first frames, where it remembers less, and with two prompts in its history."""
    world, served = keys
    actions, switch = [0, 2, 1, 1, 2, 0], min(num_frames, 2)
    session = ask(served, "create", prompt=DOG, seed=7)["session"]
    step(served, session, *actions[:switch])
    ask(served, "set", session, prompt=SNOW)
    step(served, session, *actions[switch:num_frames])
    file, rest = file_of(served, session), actions[num_frames:]
    state = restored(served, file)
    twin = state["session"]
    assert (state["frame"], state["prompt"]) == (num_frames - 1, SNOW) and twin != session
    wanted = alone(world, DOG, actions, 7, (switch, SNOW, False))
    assert same(step(served, twin, *rest)[0], wanted[num_frames:])
    if num_frames == 4:
        # Back to where only the first prompt had been seen; and what was seen then.
        ask(served, "rewind", twin, frame=1)
        assert same(step(served, twin, *actions[2:])[0], wanted[2:])
        _, shown = served.call("GET", f"/v1/sessions/{twin}/frames/1")
        near = np.asarray(Image.open(io.BytesIO(shown))).astype(int) - wanted[1][-1]
        assert np.abs(near).mean() < 8
    # Frames in the window are seen anew there, as here.
    found, again = [], restored(served, file)["session"]
    for name in (session, again):
        ask(served, "set", name, prompt=DOG, recompute=True)
        found.append(step(served, name, *rest)[0])
    for name in (session, twin, again):
        served.call("DELETE", f"/v1/sessions/{name}")
    assert same(*found) and not same(found[0], wanted[num_frames:])


def test_a_snapshot_goes_to_another_server_that_never_heard_its_prompt(keys, source, tmp_path):
    world, served = keys
    session = ask(served, "create", prompt=DOG, seed=4, guidance=GUIDED)["session"]
    first, _ = step(served, session, 0, 1)
    file = file_of(served, session)
    wanted, _ = step(served, session, 2)
    # The same world from where else it was copied to.
    copied = shutil.copytree(source, tmp_path / "copied")
    with serving(world_of(copied, KEYS)) as other:
        twin = restored(other, file)["session"]
        assert same(step(other, twin, 2)[0], wanted)
        assert ask(other, "restart", twin)["prompt"] == DOG
        assert same(step(other, twin, 0, 1)[0], first)
        for change, said in (
            ({"texts": None}, "texts must be"),
            ({"pictures": None}, "pictures must be"),
            ({"live.kept.decoder.0": torch.zeros(1, 2, 3)}, "decoder.0 must be"),
            ({"live.kept.actions": None}, "kept.actions must be"),
        ):
            tensors = {**load(bytes(file)), **change}
            kept = {name: one for name, one in tensors.items() if one is not None}
            damaged = save(kept, dict(read_head(file).texts))
            status, told = other.call("POST", "/v1/sessions/restore", damaged)
            assert (status, told["error"]["code"]) == (400, "bad_snapshot")
            assert said in told["error"]["message"]


def test_a_running_session_sends_each_picture_and_keeps_the_pace_of_video(keys):
    _, served = keys
    with Client(served.url) as client:
        told = client.welcome.world
        assert told.takes_prompt and told.pictures_per_frame == 4
        assert told.actions == ("a", "b", "c") and "conditions" in told.guidance
        assert client.create(prompt=DOG).prompt == DOG
        client.run(fps=60.0)
        came = [frame.header for frame, _ in zip(client.frames(), range(9), strict=False)]
        assert [one.picture_index for one in came] == [0, 0, 1, 2, 3, 0, 1, 2, 3]
        client.pause()
        client.close()


def test_guidance_hides_text_and_keys(keys):
    _, served = keys
    with Client(served.url) as client:
        client.create(prompt=DOG, seed=1)
        plain = client.step(1)[-1].pixels
        client.reset(prompt=DOG, seed=1, guidance={"kind": "conditions", "scale": 3.0})
        guided = client.step(1)[-1].pixels
        assert np.abs(plain.astype(int) - guided).mean() > 1
        client.close()


def test_what_does_not_fit_is_refused(keys):
    _, served = keys
    with Client(served.url) as client:
        for fields, said in (
            ({}, "prompt: this world wants one"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": "  "}, "must have words"),
        ):
            with pytest.raises(ValueError, match=said):
                client.create(**fields)
        client.create(prompt=DOG)
        with pytest.raises(ValueError, match="recompute: goes with a prompt"):
            client.set(recompute=True)
        client.step(0)
        assert client.step(0)[-1].header.frame == 1
        client.close()
    with serving() as plain, Client(plain.url) as client:
        with pytest.raises(Refused, match="no text steers this world"):
            client.create(prompt=DOG)
        client.create()
        with pytest.raises(Refused, match="no text steers this world"):
            client.set(prompt=DOG)


def test_what_is_cut_of_a_long_prompt_is_said(keys):
    _, served = keys
    long = "the red dog runs " * 20
    with Client(served.url) as client:
        assert client.create(prompt=DOG).prompt_cut is None
        told = client.set(prompt=long)
        assert told.prompt == long and "cut off" in told.prompt_cut
        assert client.restart().prompt_cut == client.fork().prompt_cut == told.prompt_cut
        assert client.set(prompt=SNOW).prompt_cut is None
        assert "cut off" in client.reset(prompt=long).prompt_cut
        client.close()


def test_a_world_of_a_text_alone_has_a_prompt_of_its_own(source):
    world = world_of(source, TEXT)
    with serving(world, prompt=SNOW) as served:
        status, made = served.call("POST", "/v1/sessions", {"seed": 2})
        assert status == 201 and made["prompt"] == SNOW
        session = made["session"]
        status, told = served.call("POST", f"/v1/sessions/{session}/step", {"count": 2})
        assert status == 200 and [one["num_pictures"] for one in told["frames"]] == [1, 4, 4, 4, 4]
        status, told = served.call("POST", f"/v1/sessions/{session}/set", {"prompt": DOG})
        assert status == 200 and told["prompt"] == DOG
