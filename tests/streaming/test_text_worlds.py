"""Worlds of a text, and of a text and actions, as games: seen anew, shared, and as environments."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scd.data.clip import Conditions, frames_to_pixels
from scd.engine.open import open_engine
from scd.models.build import build
from scd.models.config import CacheConfig, Guidance
from scd.models.flow import with_num_steps
from scd.streaming.environment import WorldEnv, WorldVectorEnv
from scd.streaming.rollout import Rollout
from scd.streaming.sessions import Streams
from scd.streaming.texts import WorldTexts
from tests.tiny import shaken
from tests.tiny_text_world import KINDS, TEXT, text_world
from tests.tiny_wan_vae import write_tiny_parts

KEYS = replace(TEXT, num_actions=3, actions_per_frame=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield write_tiny_parts(folder)


def world_of(source, kind="separable", conditions=TEXT, cache=None):
    world = text_world(kind, source)
    config = replace(KINDS[kind], conditions=conditions, cache=cache or KINDS[kind].cache)
    torch.manual_seed(0)
    names = tuple("abc"[: conditions.num_actions])
    card = replace(world.card, conditions=conditions, action_names=names)
    return replace(world, model=shaken(build(config)), card=card)


def texts(batch=1, seed=0):
    return torch.randn(batch, 16, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("engine", ["plain", "fast"])
@pytest.mark.parametrize(
    ("kind", "conditions", "num_sinks"),
    [("separable", KEYS, 0), ("dense", TEXT, 0), ("blocks", KEYS, 0), ("separable", TEXT, 1)],
)
@torch.no_grad()
def test_a_window_seen_anew_is_that_of_a_stream_under_the_new_text(
    source, engine, kind, conditions, num_sinks
):
    window = 6 if kind == "blocks" else 3
    cache = CacheConfig(window=window, num_sinks=num_sinks, rebase_sinks=num_sinks > 0)
    world = world_of(source, kind, conditions, cache)
    steps = [None] * 5 if not conditions.has_actions else [0, 2, 1, 1, 2]
    guidance = Guidance(kind="conditions", scale=1.5)
    one = Rollout(world, guidance=guidance, seed=4, engine=engine)
    told = {"null_text": texts(2, 9)}
    one.begin(conditions=Conditions(text=texts(2, 1), **told), batch=2)
    latents = []
    for action in steps:
        one.step_video(action)
        latents.append(one.newest if one.newest.ndim == 5 else one.newest[:, None])
    twin = one.fork()
    twin.change_text(texts(2, 2))
    one.change_text(texts(2, 2), recompute=True)
    # By the calls that begin a stream: the frames in the window, under the new text alone.
    num = window // one.block_size
    seen = torch.cat([*latents[:num_sinks], *latents[len(steps) - num + num_sinks :]], dim=1)
    led = [*steps[:num_sinks], *steps[len(steps) - num + num_sinks :]]
    other = Rollout(world, guidance=guidance, seed=4, engine=engine)
    actions = None
    if conditions.has_actions:
        each = torch.tensor(led)[:, None].expand(-1, 4).repeat_interleave(one.block_size, 0)
        actions = each.expand(2, -1, -1)
    other.begin(conditions=Conditions(text=texts(2, 2), actions=actions, **told), latents=seen)
    other.num_frames = one.num_frames
    action = None if actions is None else 1
    made = one.fork(2).step_latents(action), one.step_latents(action), other.step_latents(action)
    torch.testing.assert_close(made[1], made[2], atol=2e-5, rtol=0)
    torch.testing.assert_close(made[0][::2], made[1], atol=2e-5, rtol=0)
    assert not torch.allclose(twin.step_latents(action), made[1], atol=1e-3)


def test_a_replayed_stream_decodes_as_the_one_that_made_the_frames(source):
    world = world_of(source)
    one = Rollout(world, seed=1)
    one.begin(conditions=Conditions(text=texts()))
    twin = one.fork()
    for _ in range(2):
        one.step_video()
        twin.replay(one.newest)
    assert torch.equal(one.step_video(), twin.step_video())


def test_streams_that_share_calls_are_those_of_rollouts(source):
    world = world_of(source, conditions=KEYS)
    engine = open_engine(world.model, "fast")
    streams = Streams(world, engine, max_rows=4)
    told = [Conditions(text=texts(seed=number)) for number in range(2)]
    open_ones = [streams.open(conditions=one, seed=7 + at) for at, one in enumerate(told)]
    made = {one: [] for one in open_ones}
    for action in (0, 2, 1):
        for place, one in enumerate(open_ones):
            streams.request(one, torch.tensor((action + place) % 3))
        while streams.is_busy:
            for ended in streams.tick():
                made[ended.session].append(ended.frames)
    for place, one in enumerate(open_ones):
        alone = Rollout(world, seed=7 + place, engine=engine)
        alone.begin(conditions=told[place])
        frames = [alone.step_video((action + place) % 3)[0] for action in (0, 2, 1)]
        assert [len(frame) for frame in made[one]] == [1, 4, 4]
        torch.testing.assert_close(torch.cat(made[one]), torch.cat(frames), atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="makes blocks of 3"):
        Streams(world_of(source, "blocks"))


def test_an_environment_of_keys_and_a_prompt(source, caplog):
    world = world_of(source, conditions=KEYS)
    env = WorldEnv(world, prompt="the red dog runs", num_steps=2)
    assert env.action_space.n == 3
    first, told = env.reset(seed=3)
    assert first.shape == (16, 32, 3) and told == {}
    frame, _, _, _, told = env.step(1)
    assert told["frames"].shape == (4, 16, 32, 3) and np.array_equal(told["frames"][-1], frame)
    again, _ = env.reset(seed=3)
    assert np.array_equal(again, first) and np.array_equal(env.step(1)[0], frame)
    env.reset(seed=3, options={"prompt": "snow at night"})
    assert not np.array_equal(env.step(1)[0], frame) and env.prompt == "snow at night"
    env.change_prompt("a blue ball", recompute=True)
    assert env.step(2)[0].std() > 0
    with pytest.raises(ValueError, match="must have words"):
        env.change_prompt(" ")
    env.change_prompt("the red dog runs " * 20)
    assert "its last 65 are cut off" in caplog.messages[-1]


def test_environments_of_keys_and_prompts_are_those_of_one(source):
    world, prompts = world_of(source, conditions=KEYS), ["the red dog runs", "snow at night"]
    env = WorldVectorEnv(world, 2, prompt=prompts, num_steps=2, max_frames=3)
    first, _ = env.reset(seed=3)
    assert first.shape == (2, 16, 32, 3) and env.single_action_space.n == 3
    # A stream of its own, with the seed that was drawn, makes the same frames.
    seeds = [session.rollout.seed for session in env._sessions]
    texts, made = WorldTexts(world), []
    for seed, prompt in zip(seeds, prompts, strict=True):
        rollout = Rollout(world, with_num_steps(world.sampling, 2), seed=seed, engine="fast")
        rollout.begin(conditions=Conditions(text=texts.embed(prompt)))
        made.append([frames_to_pixels(rollout.step_video(one)[0]).numpy() for one in (0, 1)])
    frames, _, _, _, told = env.step([1, 1])
    for number in range(2):
        close = np.abs(made[number][1].astype(int) - told["frames"][number])
        assert close.shape == (4, 16, 32, 3) and close.max() <= 1
        assert np.array_equal(told["frames"][number][-1], frames[number])
    state = env.get_state()
    env.change_prompt("a blue ball", recompute=True)
    other = env.step([1, 2])[0]
    env.set_state(state)
    assert env.prompts == tuple(prompts) and not np.array_equal(env.step([1, 2])[0], other)
    env.step([1, 1])
    assert env.step([1, 1])[4]["frames"][0].shape == (1, 16, 32, 3)
    env.reset(seed=3, options={"prompt": "snow at night"})
    assert env.prompts == ("snow at night",) * 2
    for wrong in (["snow"], 3, ["snow", 1]):
        with pytest.raises(ValueError, match="2 environments take a prompt"):
            env.reset(options={"prompt": wrong})
    with pytest.raises(ValueError, match="a text steers this world"):
        WorldVectorEnv(world, 2).reset()


def test_environments_whose_actions_are_prompts(source):
    world = world_of(source, "dense")
    one, other = (WorldVectorEnv(world, 2, num_steps=2, prompt="the red dog") for _ in range(2))
    assert np.array_equal(one.reset(seed=1)[0], other.reset(seed=1)[0])
    assert one.single_action_space.contains("a blue ball")
    left, right = one.step(["", "snow at night"])[0], other.step("")[0]
    assert np.array_equal(left[0], right[0]) and not np.array_equal(left[1], right[1])
    assert one.prompts == ("the red dog", "snow at night")
    one.step(("", ""))
    assert one.prompts == ("the red dog", "snow at night")
    with pytest.raises(ValueError, match="must have words"):
        one.step([" ", ""])


def test_an_environment_whose_actions_are_prompts(source):
    env = WorldEnv(world_of(source, "dense"), num_steps=2)
    assert env.action_space.contains("the red dog") and env.action_space.contains("")
    with pytest.raises(ValueError, match="prompt="):
        env.reset(seed=1)
    env.reset(seed=1, options={"prompt": "the red dog"})
    held = env.step("")[0]
    env.reset(seed=1)
    assert np.array_equal(env.step("")[0], held)
    env.reset(seed=1)
    assert not np.array_equal(env.step("snow at night")[0], held) and env.prompt == "snow at night"
    with pytest.raises(ValueError, match="is its prompt"):
        env.step(1)


def test_a_world_without_a_text_encoder_is_refused(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        WorldTexts(world_of(tmp_path))
    nowhere = world_of("")
    with pytest.raises(ValueError, match="does not say where its text encoder lies"):
        WorldTexts(nowhere)
