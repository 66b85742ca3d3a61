"""Wan models that actions steer besides a text: as converted, trained, and streamed."""

from dataclasses import replace

import pytest
import torch
from gymnasium import spaces

from scd.convert.settings import ConvertWanConfig
from scd.convert.wan import convert_wan
from scd.data.actions import conditions_of
from scd.data.clip import Conditions, by_latent, check_conditions, held
from scd.data.spaces import ConditionSpec
from scd.engine.open import open_engine
from scd.models.build import frame_cost, num_parameters
from scd.models.checkpoint import load_world
from scd.models.config import CacheConfig
from scd.models.cost import Load
from scd.models.wan.config import WanDecoderConfig, WanEncoderConfig
from tests.tiny import shaken
from tests.tiny_wan import (
    SHAPE,
    STEERED,
    TEXT,
    random_text,
    tiny_wan,
    tiny_wan_separable,
    wan_clips,
    write_tiny_transformer,
)

WINDOW = CacheConfig(window=4, num_sinks=1)
SPACE = spaces.Dict(keys=spaces.MultiBinary(3), stick=spaces.Box(-1, 1, (2,)))
PARTS = replace(
    conditions_of(SPACE), text_length=TEXT.text_length, text_dim=TEXT.text_dim, actions_per_frame=4
)

MODELS = {
    "dense": lambda spec=STEERED: tiny_wan(3, WINDOW, spec),
    "dense, in blocks": lambda spec=STEERED: tiny_wan(
        3, CacheConfig(window=4, num_sinks=0, rebase_sinks=False), spec, frames_per_block=2
    ),
    "separable": lambda spec=STEERED: tiny_wan_separable(
        WanEncoderConfig(num_layers=2), WanDecoderConfig(num_first=1, num_last=1), WINDOW, spec
    ),
    "separable, clean context": lambda spec=STEERED: tiny_wan_separable(
        WanEncoderConfig(num_layers=2),
        WanDecoderConfig(num_first=1, num_last=2, join="middle", context_time="clean"),
        WINDOW,
        spec,
    ),
}


def steered(spec, batch, num_frames, seed=0):
    """Conditions of clips of latent frames."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch, num_frames, spec.actions_per_frame
    if spec.num_actions:
        actions = torch.randint(spec.num_actions, shape, generator=generator)
    else:
        keys = torch.randint(2, (*shape, 3), generator=generator).float()
        actions = torch.cat([keys, 2 * torch.rand(*shape, 2, generator=generator) - 1], -1)
    return Conditions(actions=actions, text=random_text(batch, seed))


@pytest.mark.parametrize("split", ["dense", "2,1+1"])
def test_a_converted_world_makes_the_video_of_its_text_until_it_is_trained(tmp_path, split):
    wan = str(write_tiny_transformer(tmp_path / "wan", num_layers=3))
    common = {"model": wan, "split": split, "height": 32, "width": 48, "text_length": 8}
    text = load_world(convert_wan(ConvertWanConfig(out=str(tmp_path / "text"), **common)))
    world = load_world(
        convert_wan(ConvertWanConfig(out=str(tmp_path / "steered"), actions="3", **common))
    )
    assert world.card.conditions == world.model.config.conditions == STEERED
    assert world.card.action_names == ("action 0", "action 1", "action 2")
    clean, noisy, time, conditions, noise = wan_clips(num_frames=4)
    more = {} if split == "dense" else {"noise": noise[:, :, :4]}
    told = steered(STEERED, 2, 4)
    given = clean[:, :4], noisy[:, :, :4], time[:, :, :4]
    expected = text.model(*given, replace(told, actions=None), **more)
    assert torch.equal(world.model(*given, told, **more), expected)
    hidden = replace(told, null_actions=torch.ones(2, 4, dtype=torch.bool))
    assert torch.equal(world.model(*given, hidden, **more), expected)
    # Weights of actions are those that training can move.
    moved = shaken(world.model)
    assert not torch.allclose(moved(*given, told, **more), moved(*given, hidden, **more))


@pytest.mark.parametrize("spec", [STEERED, PARTS], ids=["ids", "parts"])
@pytest.mark.parametrize("name", ["dense", "separable"])
def test_a_frame_sees_all_its_actions_and_none_of_later_ones(name, spec):
    model = MODELS[name](spec)
    clean, noisy, time, _, noise = wan_clips(num_frames=4)
    told = steered(spec, 2, 4)
    check_conditions(spec, told, 4)
    more = {} if name == "dense" else {"noise": noise}
    before = model(clean, noisy, time, told, **more)
    for frame in range(4):
        for place in range(4):
            actions = told.actions.clone()
            now = actions[:, frame, place]
            actions[:, frame, place] = (now + 1) % 3 if spec.num_actions else 1 - now
            after = model(clean, noisy, time, replace(told, actions=actions), **more)
            changed = (after - before).abs().amax(dim=(0, 1, 3, 4, 5)) > 0
            assert changed[frame] and not changed[:frame].any(), (frame, place)


def stream(engine, spec, guided=False, num_frames=5):
    """Frames that feed on each other, after two given ones."""
    generator = torch.Generator().manual_seed(1)
    size = engine.config.frames_per_block
    shape = (2, size, *SHAPE.shape) if size > 1 else (2, *SHAPE.shape)
    told = steered(spec, 2, 2 + num_frames)
    told = replace(told, null_text=random_text(2, seed=9))
    told = told.with_null_branch() if guided else told
    twice = (lambda x: torch.cat([x, x])) if guided else (lambda x: x)
    clean = torch.randn(2, 2, *SHAPE.shape, generator=generator)
    state = engine.begin(twice(clean), told, 4 if guided else 2)
    frames = []
    for index in range(num_frames):
        first = 2 + index
        # Of a block all frames are held to one action, or each has its own.
        now = told.frames(first, first + 1)
        noise = torch.randn(shape, generator=generator)
        reads = twice(noise) if engine.encoder_noise != "none" else None
        context = engine.context(state, now, reads)
        frame = engine.denoise(context, noise, [1.0, 0.6, 0.0], scale=1.5 if guided else None)
        at = torch.full((4 if guided else 2,), 0.4)
        frames += [frame, engine.velocity(context, twice(noise), at)]
        engine.observe(state, twice(frame), now)
    return torch.cat([frame.flatten() for frame in frames])


@pytest.mark.parametrize("name", MODELS)
def test_the_fast_engine_is_steered_as_the_plain_one(name):
    for spec, guided in ((STEERED, True), (PARTS, False)):
        model = MODELS[name](spec)
        plain = stream(open_engine(model), spec, guided)
        fast = stream(open_engine(model, "fast"), spec, guided)
        assert plain.std() > 0.3
        torch.testing.assert_close(fast, plain, atol=2e-5, rtol=0)


def test_streams_of_several_users_share_a_pass_with_actions_of_their_own():
    engine = open_engine(MODELS["separable, clean context"](), "fast")
    told = [steered(STEERED, 1, 1, seed) for seed in range(2)]
    noises = list(torch.randn(2, 1, *SHAPE.shape, generator=torch.Generator().manual_seed(0)))
    states = [engine.begin(None, each, 1) for each in told]
    together = engine.contexts(states, told, noises)
    for state, each, noise, context in zip(states, told, noises, together, strict=True):
        alone = engine.context(state, each, noise)
        torch.testing.assert_close(context.tokens, alone.tokens)
        torch.testing.assert_close(context.steering, alone.steering)


def test_actions_of_video_become_those_of_latent_frames():
    ids = torch.arange(11) % 3
    found = by_latent(STEERED, ids)
    assert found.tolist() == [[0] * 4, [1, 2, 0, 1], [2, 0, 1, 2]]
    assert torch.equal(by_latent(STEERED, ids[None])[0], found)
    vectors = torch.rand(2, 9, 5)
    assert by_latent(PARTS, vectors).shape == (2, 3, 4, 5)
    assert torch.equal(by_latent(PARTS, vectors)[:, 1:].flatten(1, 2), vectors[:, 1:])
    assert held(STEERED, torch.tensor([1, 2])).tolist() == [[1] * 4, [2] * 4]
    assert torch.equal(held(STEERED, found), found)


@pytest.mark.parametrize("spec", [STEERED, PARTS], ids=["ids", "parts"])
@pytest.mark.parametrize("name", ["dense", "separable"])
def test_the_formula_counts_the_weights_of_actions(name, spec):
    model = MODELS[name](spec)
    cost = frame_cost(model.config, Load(num_context_frames=4))
    assert cost.weight_bytes == 4 * num_parameters(model)


def test_actions_that_do_not_fit_are_refused(tmp_path):
    told = steered(STEERED, 2, 3)
    with pytest.raises(ValueError, match=r"4 actions, of each frame of video .* \[2, 3\]"):
        check_conditions(STEERED, replace(told, actions=told.actions[..., 0]), 3)
    model = MODELS["dense"]()
    with pytest.raises(ValueError, match="steered by actions, but none were given"):
        model.begin(torch.zeros(2, 1, *SHAPE.shape), replace(told, actions=None))
    with pytest.raises(ValueError, match="there are no actions"):
        ConditionSpec(actions_per_frame=4)
    wan = str(write_tiny_transformer(tmp_path / "wan", num_layers=3))
    common = {"model": wan, "out": str(tmp_path / "world"), "split": "dense"}
    with pytest.raises(ValueError, match="toy:none|size"):
        convert_wan(ConvertWanConfig(actions="toy:none", **common))
    with pytest.raises(FileNotFoundError):
        convert_wan(ConvertWanConfig(actions=str(tmp_path / "nowhere"), **common))
    with pytest.raises(ValueError, match="has no actions: --actions names clips"):
        convert_wan(ConvertWanConfig(actions="0", **common))
