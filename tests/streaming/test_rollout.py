"""A stream: repeatable, forkable, the same as its parts, steered, and no longer than its window."""

import time
from dataclasses import replace

import pytest
import torch

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.common.memory import OutOfMemory
from scd.data.clip import Conditions
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec
from scd.engine.open import open_engine
from scd.models.checkpoint import World
from scd.models.config import CacheConfig, Guidance, SamplingConfig
from scd.models.flow import schedule, solve
from scd.streaming.noise import frame_noise, step_noise
from scd.streaming.rollout import Rollout
from tests.tiny import SHAPE, tiny_dense, tiny_separable


def world_of(model):
    spec = model.config.conditions
    return World(
        model=model,
        autoencoder=PixelAutoencoder(PixelConfig(mean=0.1, std=0.5)),
        card=DataCard(
            height=SHAPE.height,
            width=SHAPE.width,
            fps=10.0,
            conditions=spec,
            action_names=tuple(f"a{index}" for index in range(spec.num_actions or spec.action_dim)),
        ),
        sampling=SamplingConfig(num_steps=2),
    )


@pytest.fixture(params=[tiny_separable, tiny_dense])
def world(request):
    return world_of(request.param())


def given(num_frames=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.rand(2, num_frames, 3, 4, 6, generator=generator) * 2 - 1
    actions = torch.randint(4, (2, num_frames), generator=generator)
    return frames, Conditions(actions=actions)


ACTIONS = torch.tensor([[1, 2, 3, 0, 1], [0, 3, 2, 1, 2]])


def play(rollout, num_frames=5):
    return rollout.generate(ACTIONS, num_frames)


def test_the_same_seed_is_the_same_stream(world):
    streams = []
    for seed in (0, 0, 1):
        rollout = Rollout(world, seed=seed)
        rollout.begin(*given())
        streams.append(play(rollout))
        assert rollout.num_frames == 8
    assert streams[0].shape == (2, 5, 3, 4, 6)
    assert streams[0].abs().max() <= 1
    assert torch.equal(streams[0], streams[1]) and not torch.equal(streams[0], streams[2])


FEW = {
    "euler": SamplingConfig(num_steps=2),
    "renoise": SamplingConfig(
        num_steps=3, solver="renoise", schedule="listed", times=(1.0, 0.8, 0.4)
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("solver", list(FEW))
def test_a_step_is_context_then_solver_then_observe(world, solver):
    frames, conditions = given()
    world = replace(world, sampling=FEW[solver])
    rollout = Rollout(world, seed=3)
    rollout.begin(frames, conditions)
    streamed = play(rollout, 2)

    model, autoencoder = world.model, world.autoencoder
    state = model.begin(autoencoder.encode(frames), conditions)
    for index in range(2):
        now = Conditions(actions=ACTIONS[:, index : index + 1])
        context = model.context(state, now)
        noise = frame_noise(3, 3 + index, "frame", (2, 3, 4, 6))
        fresh = step_noise(3, 3 + index, 2, (2, 3, 4, 6)) if solver == "renoise" else None
        latent = solve(
            lambda x, t, context=context: model.velocity(context, x, torch.full((2,), t)),
            noise,
            schedule(world.sampling).tolist(),
            world.sampling.solver,
            fresh,
        )
        torch.testing.assert_close(
            streamed[:, index], autoencoder.decode(latent[:, None])[:, 0], atol=1e-5, rtol=0
        )
        model.observe(state, latent, now)


def test_fewer_steps_meet_the_first_of_the_same_noise():
    # 15 numbers: draws of such a size are where one long draw would differ from several.
    shape = (1, 3, 5, 1)
    many = step_noise(7, 4, 5, shape)
    assert many.flatten(1).unique(dim=0).shape[0] == 5
    for number in (1, 3):
        assert torch.equal(step_noise(7, 4, number, shape), many[:number])
    for seed, frame in ((8, 4), (7, 5)):
        assert not torch.equal(step_noise(seed, frame, 5, shape), many)
    assert not torch.equal(frame_noise(7, 4, "frame", shape), many[0])


@pytest.mark.parametrize("kind", ["none", "conditions"])
def test_few_steps_repeat_fork_and_follow_the_seed(world, kind):
    guidance = Guidance(kind=kind, scale=1.0 if kind == "none" else 1.5)
    streams = []
    for seed in (0, 0, 1):
        rollout = Rollout(world, FEW["renoise"], guidance, seed)
        rollout.begin(*given())
        first = rollout.generate(ACTIONS[:, :2], 2)
        twin = rollout.fork()
        rest = rollout.generate(ACTIONS[:, 2:], 3)
        assert torch.equal(twin.generate(ACTIONS[:, 2:], 3), rest)
        streams.append(torch.cat([first, rest], dim=1))
    assert torch.equal(streams[0], streams[1]) and not torch.equal(streams[0], streams[2])


def test_reset_goes_back_and_fork_goes_on(world):
    rollout = Rollout(world)
    rollout.begin(*given())
    first = play(rollout)
    rollout.reset()
    assert rollout.num_frames == 3
    assert torch.equal(play(rollout, 2), first[:, :2])
    twin = rollout.fork()
    rest = ACTIONS[:, 2:]
    assert torch.equal(twin.generate(rest, 3), first[:, 2:])
    assert torch.equal(rollout.generate(rest, 3), first[:, 2:])


@pytest.mark.parametrize("make", [tiny_separable, tiny_dense])
@pytest.mark.parametrize("engine", ["plain", "fast"])
@pytest.mark.parametrize("kind", ["none", "conditions", "context_noise"])
def test_futures_in_one_batch_are_forks_stepped_alone(make, engine, kind):
    if kind == "context_noise" and make is tiny_dense:
        pytest.skip("a dense model has no context")
    # The window is full before the fork, and its sink is moved after it.
    world = world_of(make(cache=CacheConfig(window=4, num_sinks=1, rebase_sinks=True)))
    guidance = Guidance(kind=kind, scale=1.0 if kind == "none" else 1.5)
    rollout = Rollout(
        world, FEW["renoise"], guidance, seed=3, engine=open_engine(world.model, engine)
    )
    rollout.begin(*given())
    rollout.generate(ACTIONS[:, :3], 3)
    futures = rollout.fork(3)
    assert futures.batch == 6 and futures.num_frames == rollout.num_frames == 6
    assert futures.seeds[0] == 3 and len(set(futures.seeds)) == 3
    plans = torch.randint(4, (6, 4), generator=torch.Generator().manual_seed(4))
    frames = futures.generate(plans, 4)
    for number, seed in enumerate(futures.seeds):
        alone = rollout.fork()
        alone.seed = seed
        expected = alone.generate(plans[number::3], 4)
        torch.testing.assert_close(frames[number::3], expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(futures.newest[number::3], alone.newest, atol=4e-5, rtol=0)
    assert rollout.num_frames == 6 and rollout.seed == 3


def test_noise_of_futures_is_chosen(world):
    rollout = Rollout(world, FEW["renoise"], seed=3)
    rollout.begin(given()[0][:1], Conditions(actions=given()[1].actions[:1]))
    action = ACTIONS[:1, 0]
    expected = rollout.fork().step(action)
    same = rollout.fork(3, seeds=[3, 3, 3]).step(action.repeat(3))
    torch.testing.assert_close(same, expected.repeat(3, 1, 1, 1), atol=1e-5, rtol=0)
    own = rollout.fork(3).step(action.repeat(3))
    torch.testing.assert_close(own[:1], expected, atol=1e-5, rtol=0)
    distances = [(own[i] - own[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(distances) > 1e-3
    # Futures of futures: two of each, whose first ones go on as before.
    futures = rollout.fork(3)
    further = futures.fork(2)
    assert further.seeds[::2] == futures.seeds and len(set(further.seeds)) == 6
    torch.testing.assert_close(further.step(action.repeat(6))[::2], own, atol=1e-5, rtol=0)
    # Begun anew, it is a batch like any other.
    futures.begin(*given())
    assert futures.batch == 2 and futures.seeds == (3,)
    futures.reset()


def test_futures_that_cannot_be_are_refused(world):
    rollout = Rollout(world)
    with pytest.raises(ValueError, match="begin the stream first"):
        rollout.fork(2)
    rollout.begin(*given())
    for arguments, words in (
        ((0,), "num_futures must be 1 or more, got 0"),
        ((3, [1, 2]), "3 futures need as many seeds, got 2"),
        ((None, [1]), "whose number was not given"),
    ):
        with pytest.raises(ValueError, match=words):
            rollout.fork(*arguments)
    with pytest.raises(OutOfMemory, match="a memory of 16 frames for each of 2000000000 streams"):
        rollout.fork(10**9)
    futures = rollout.fork(2)
    with pytest.raises(ValueError, match="4 streams need as many actions, got 2"):
        futures.step(ACTIONS[:, 0])
    with pytest.raises(ValueError, match="fork their stream again"):
        futures.reset()


def test_beginning_with_frames_is_observing_them(world):
    frames, conditions = given()
    at_once, one_by_one = Rollout(world), Rollout(world)
    at_once.begin(frames, conditions)
    one_by_one.begin(frames[:, :1], conditions.frames(0, 1))
    for index in (1, 2):
        one_by_one.observe(frames[:, index], conditions.actions[:, index])
    torch.testing.assert_close(play(at_once), play(one_by_one), atol=1e-5, rtol=0)


def test_a_stream_begins_from_nothing(world):
    rollout = Rollout(world)
    rollout.begin(batch=2)
    assert play(rollout).isfinite().all()


def test_actions_steer(world):
    streams = []
    for action in (0, 1):
        rollout = Rollout(world)
        rollout.begin(*given())
        streams.append(rollout.step(torch.tensor([action, action])))
    assert not torch.allclose(*streams)


def test_steps_can_change_while_it_runs(world):
    rollout = Rollout(world)
    rollout.begin(*given())
    calls = []
    velocity = world.model.velocity
    world.model.velocity = lambda *inputs: calls.append(1) or velocity(*inputs)
    for num_steps in (1, 5):
        calls.clear()
        rollout.num_steps = num_steps
        rollout.step(ACTIONS[:, 0])
        assert len(calls) == num_steps


@pytest.mark.parametrize("kind", ["conditions", "context_noise"])
def test_guidance_of_scale_1_changes_nothing_and_more_does(kind):
    world = world_of(tiny_separable())
    streams = []
    for guidance in (None, Guidance(kind=kind, scale=1.0), Guidance(kind=kind, scale=3.0)):
        rollout = Rollout(world, guidance=guidance)
        rollout.begin(*given())
        streams.append(play(rollout, 3))
    torch.testing.assert_close(streams[0], streams[1], atol=1e-4, rtol=0)
    assert (streams[0] - streams[2]).abs().max() > 1e-3


def test_an_interrupted_step_can_be_taken_again(world):
    rollout, undisturbed = Rollout(world), Rollout(world)
    for one in (rollout, undisturbed):
        one.begin(*given())
    velocity = world.model.velocity

    def interrupt(*inputs):
        raise KeyboardInterrupt

    world.model.velocity = interrupt
    with pytest.raises(KeyboardInterrupt):
        rollout.step(ACTIONS[:, 1])
    world.model.velocity = velocity
    assert torch.equal(play(rollout), play(undisturbed))


@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_after_a_dropped_draft_another_action_can_be_observed(world, kind):
    frames, engine = given()[0], open_engine(world.model, kind)
    rollout, undisturbed = Rollout(world, engine=engine), Rollout(world, engine=engine)
    for one in (rollout, undisturbed):
        one.begin(*given())
    rollout.draft(ACTIONS[:, 1])
    for one in (rollout, undisturbed):
        one.observe(frames[:, 0], ACTIONS[:, 0])
    assert torch.equal(play(rollout), play(undisturbed))


def test_guidance_by_labels():
    world = world_of(tiny_separable(conditions=ConditionSpec(num_labels=3)))
    rollout = Rollout(world, guidance=Guidance(kind="conditions", scale=2.0))
    rollout.begin(given()[0], Conditions(labels=torch.tensor([0, 2])))
    assert rollout.step().shape == (2, 3, 4, 6)
    with pytest.raises(ValueError, match="1 streams need as many labels, got 2"):
        rollout.begin(None, Conditions(labels=torch.tensor([0, 2])))


@pytest.mark.parametrize("make", [tiny_separable, tiny_dense])
def test_a_long_stream_keeps_its_memory(make):
    world = world_of(make(cache=CacheConfig(window=4, num_sinks=1)))
    rollout = Rollout(world, SamplingConfig(num_steps=1))
    rollout.begin(*given())
    storage = rollout._state.cache.keys.data_ptr()
    for index in range(40):
        frame = rollout.step(ACTIONS[:, index % 5])
    assert frame.isfinite().all()
    assert rollout._state.cache.keys.data_ptr() == storage
    assert rollout._state.cache.num_frames == 4


def test_timing_covers_the_step(world):
    rollout = Rollout(world)
    rollout.begin(*given())
    began = time.perf_counter()
    rollout.step(ACTIONS[:, 0])
    took = time.perf_counter() - began
    timing = rollout.timing
    assert min(timing.encoder_s, timing.decoder_s, timing.autoencoder_s) > 0
    assert 0.3 * took < timing.total_s <= took


def test_wrong_use_is_refused(world):
    rollout = Rollout(world)
    with pytest.raises(ValueError, match="begin the stream first"):
        rollout.step(ACTIONS[:, 0])
    with pytest.raises(ValueError, match="frames must be 4x6, got 8x6"):
        rollout.begin(torch.zeros(1, 2, 3, 8, 6), Conditions(actions=torch.zeros(1, 2).long()))
    with pytest.raises(ValueError, match="3 frames need 3 actions"):
        rollout.begin(given()[0], Conditions(actions=ACTIONS[:, :2]))
    rollout.begin(*given())
    with pytest.raises(ValueError, match="action ids must lie in 0 .. 3"):
        rollout.step(torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="2 streams need as many actions"):
        rollout.step(torch.tensor([0]))
    with pytest.raises(ValueError, match="none were given"):
        rollout.step()
    with pytest.raises(ValueError, match="frames must be 4x6, got 8x6"):
        rollout.observe(torch.zeros(2, 3, 8, 6), ACTIONS[:, 0])
    assert rollout.step(ACTIONS[:, 0]).shape == (2, 3, 4, 6)
    with pytest.raises(ValueError, match="has no effect"):
        Guidance(scale=2.0)


def test_frames_of_an_unsteered_stream_are_counted():
    rollout = Rollout(world_of(tiny_separable(conditions=ConditionSpec())))
    rollout.begin(given()[0])
    with pytest.raises(ValueError, match="2 streams need as many frames, got 1"):
        rollout.observe(torch.zeros(1, 3, 4, 6))


def test_guidance_a_model_cannot_give_is_refused():
    with pytest.raises(ValueError, match="needs a separable model"):
        Rollout(world_of(tiny_dense()), guidance=Guidance(kind="context_noise", scale=1.5))
    unsteered = world_of(tiny_separable(conditions=ConditionSpec()))
    with pytest.raises(ValueError, match="needs a model with actions, labels or text"):
        Rollout(unsteered, guidance=Guidance(kind="conditions", scale=1.5))


def test_a_smaller_window_can_be_asked_for(world):
    rollout = Rollout(world, window=2)
    rollout.begin(*given())
    play(rollout)
    assert rollout._state.cache.config == replace(world.model.config.cache, window=2)


@pytest.mark.gpu
def test_overlapped_frames_are_the_same_frames(world):
    frames, conditions = given()
    world.model.cuda()
    stepped, generated = Rollout(world, seed=3), Rollout(world, seed=3)
    for rollout in (stepped, generated):
        rollout.begin(frames, conditions)
    one_by_one = torch.stack([stepped.step(ACTIONS[:, index]) for index in range(5)], dim=1)
    torch.testing.assert_close(generated.generate(ACTIONS, 5), one_by_one, atol=1e-5, rtol=0)
