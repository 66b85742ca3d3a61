"""Layers that noisy frames skip, and layers that see their own frame only."""

import json
from dataclasses import replace

import pytest
import torch

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.bench.case import Case
from scd.common.config import from_json, to_json
from scd.data.clip import Conditions
from scd.models.build import build
from scd.models.checkpoint import World, load_world, resolve, save_world
from scd.models.config import CacheConfig, DenseConfig, LayerSkip, SamplingConfig
from scd.models.flow import CLEAN_TIME, schedule
from scd.models.kinds import ModelConfig
from scd.models.stack import skip_after
from scd.objectives.config import DenoiseConfig
from scd.streaming.rollout import Rollout
from scd.training.config import TrainConfig
from scd.training.world import train
from tests.tiny import random_clips, shaken, tiny_dense

SAMPLING = SamplingConfig(num_steps=5)
SHIFTED = SamplingConfig(num_steps=8, schedule="shifted", shift=5.0)


@pytest.mark.parametrize("sampling", [SAMPLING, SHIFTED])
@pytest.mark.parametrize("full_steps", [1, 3, 5])
def test_the_first_steps_are_whole_and_the_others_skip(full_steps, sampling):
    skip = skip_after(1, 2, full_steps, sampling)
    light = [time < skip.below for time in schedule(sampling).tolist()[:-1]]
    assert light == [False] * full_steps + [True] * (sampling.num_steps - full_steps)


def generated(world, model):
    """Three frames, and how often the middle layer ran for each."""
    rollout = Rollout(replace(world, model=model), SAMPLING)
    actions = torch.tensor([[0, 1, 2, 3, 1]])
    generator = torch.Generator().manual_seed(0)
    given = torch.rand(1, 2, 3, 32, 32, generator=generator) * 2 - 1
    rollout.begin(given, Conditions(actions=actions[:, :2]))
    calls = []
    hook = model.blocks[1].register_forward_hook(lambda *ignored: calls.append(1))
    frames = rollout.generate(actions[:, 2:], 3)
    hook.remove()
    return frames, len(calls) / 3


@pytest.fixture
def world(dense_config, toy_source) -> World:
    """A dense world of three layers for the toy world."""
    torch.manual_seed(0)
    model = shaken(build(replace(dense_config, num_layers=3)))
    return World(model, PixelAutoencoder(PixelConfig()), toy_source.card, SAMPLING)


@torch.no_grad()
def test_skipped_layers_are_not_run_and_all_steps_full_is_the_untouched_model(world):
    untouched, num_calls = generated(world, world.model)
    # One more call remembers the frame.
    assert num_calls == SAMPLING.num_steps + 1
    for full_steps in (1, 3, 5):
        skip = skip_after(1, 2, full_steps, SAMPLING)
        model = build(replace(world.model.config, skip=skip)).eval()
        model.load_state_dict(world.model.state_dict())
        frames, num_calls = generated(world, model)
        assert num_calls == full_steps + 1
        assert torch.equal(frames, untouched) == (full_steps == SAMPLING.num_steps)


@pytest.mark.parametrize("time", [0.2, 0.8])
@torch.no_grad()
def test_clean_frames_skip_nothing_among_noisy_ones_as_in_a_stream(time):
    model = tiny_dense(skip=LayerSkip(first=1, stop=2, below=0.5))
    clean, noisy, _, conditions = random_clips(model)
    noisy, past = noisy[:, :, 3:4], clean[:, None, :3].expand(-1, noisy.shape[1], -1, -1, -1, -1)
    times = noisy.new_full(noisy.shape[:2], time)
    given = noisy.new_full(past.shape[:3], CLEAN_TIME)
    conditions = conditions.frames(0, 4)
    frames, mixed_times = torch.cat([past, noisy], 2), torch.cat([given, times[..., None]], 2)
    mixed = model(None, frames, mixed_times, conditions)
    state = model.begin(clean[:, :3], conditions.frames(0, 3))
    context = model.context(state, conditions.frames(3, 4))
    alone = model.velocity(context, noisy[:, 0, 0], times[:, 0])
    torch.testing.assert_close(mixed[:, 0, 3], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_diagonal", [0, 1])
@torch.no_grad()
def test_a_diagonal_layer_does_not_change_when_the_past_does(num_diagonal):
    """What the last layer makes of the same tokens, whatever is remembered."""
    model = tiny_dense(num_diagonal=num_diagonal)
    clean, noisy, time, conditions = random_clips(model)
    tokens = torch.randn(2, 1, model.shape.num_tokens, 32, generator=torch.manual_seed(0))
    made = []
    model.blocks[2].register_forward_pre_hook(lambda block, given: (tokens, *given[1:]))
    model.blocks[2].register_forward_hook(lambda block, given, output: made.append(output))
    for past in (clean[:, :3], clean[:, :3] + 1):
        state = model.begin(past, conditions.frames(0, 3))
        context = model.context(state, conditions.frames(3, 4))
        model.velocity(context, noisy[:, 0, 3], time[:, 0, 3])
    assert torch.equal(made[-2], made[-1]) == bool(num_diagonal)


@torch.no_grad()
def test_a_diagonal_model_remembers_less():
    whole, short = tiny_dense(), tiny_dense(num_diagonal=2)
    conditions = Conditions(actions=torch.zeros(1, 1, dtype=torch.long))
    clean = torch.zeros(1, 1, *whole.shape.shape)
    sizes = [model.begin(clean, conditions).cache.num_bytes for model in (whole, short)]
    assert sizes[0] == 3 * sizes[1]


@pytest.mark.parametrize(
    "config",
    [
        DenseConfig(skip=LayerSkip(first=1, stop=3, below=0.5)),
        DenseConfig(num_diagonal=2),
        DenseConfig(skip=LayerSkip(first=0, stop=1, below=1.0), num_diagonal=5),
    ],
)
def test_settings_survive_text(config):
    assert from_json(ModelConfig, json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_diagonal": 3}, "num_diagonal must leave one of 3 layers that sees the past, got 3"),
        ({"num_diagonal": -1}, "num_diagonal must leave"),
        ({"skip": (2, 4, 0.5)}, r"some of 0 \.\. 2, not all, got 2 \.\. 3"),
        ({"skip": (0, 3, 0.5)}, r"not all, got 0 \.\. 2"),
        ({"skip": (2, 2, 0.5)}, "first=2, stop=2"),
        ({"skip": (-1, 2, 0.5)}, "first=-1, stop=2"),
        ({"skip": (1, 2, 0.0)}, r"below must lie in \(0, 1\], got 0.0"),
        ({"skip": (1, 2, 1.5)}, r"below must lie in \(0, 1\], got 1.5"),
    ],
)
def test_layers_that_are_not_there_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        if "skip" in settings:
            first, stop, below = settings["skip"]
            settings = {"skip": LayerSkip(first=first, stop=stop, below=below)}
        DenseConfig(num_layers=3, **settings)


@pytest.mark.parametrize("full_steps", [0, 6])
def test_steps_that_are_not_there_are_refused(full_steps):
    with pytest.raises(ValueError, match=rf"1 \.\. 5, the steps of a frame, got {full_steps}"):
        skip_after(1, 2, full_steps, SAMPLING)


def train_config(tmp_path, **settings) -> TrainConfig:
    return TrainConfig(
        out=str(tmp_path / "run"),
        max_steps=2,
        num_frames=4,
        validate_every=0,
        sample_every=0,
        save_every=0,
        device="cpu",
        sampling=SAMPLING,
        objective=DenoiseConfig(context_noise=0.0),
        **settings,
    )


def test_a_trained_model_takes_the_settings_on_and_keeps_them(world, tmp_path):
    """Weights of the untouched world, other layers that are skipped or diagonal."""
    initial = str(save_world(world, tmp_path / "world"))
    config = replace(
        world.model.config,
        cache=CacheConfig(window=4),
        skip=skip_after(1, 2, 2, SAMPLING),
        num_diagonal=1,
    )
    run = train(train_config(tmp_path, model=config, initial=initial))
    assert load_world(run).model.config == config


def test_the_benchmark_counts_the_steps_that_skip(world, tmp_path):
    """By the times of the world's own schedule, which spends most of its steps near noise."""
    model = build(replace(world.model.config, skip=LayerSkip(first=1, stop=2, below=0.5)))
    skipping = replace(world, model=model, sampling=SHIFTED)
    folder = str(save_world(skipping, tmp_path / "world"))
    case = Case(model=folder, context=4, steps=8)
    assert case.num_calls == 8 and sum(time < 0.5 for time in case.call_times) == 1
    cost = case.cost()
    saved = cost.flops(8, [1.0] * 8) - cost.flops(case.num_calls, case.call_times)
    assert saved == cost.light_flops > 0


def test_a_world_from_before_there_were_the_settings_loads(world, tmp_path):
    folder = save_world(world, tmp_path / "world")
    path = resolve(folder) / "config.json"
    settings = json.loads(path.read_text())
    del settings["model"]["skip"], settings["model"]["num_diagonal"]
    path.write_text(json.dumps(settings))
    assert load_world(folder).model.config == world.model.config
