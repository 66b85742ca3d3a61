"""Worlds as Gymnasium environments: the library's own checker, and a rollout stepped by hand."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.seeding import np_random
from gymnasium.vector.utils import iterate

import scd
from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.data.actions import conditions_of, flat
from scd.data.spaces import ConditionSpec
from scd.engine.open import open_engine
from scd.models.build import build
from scd.models.checkpoint import World
from scd.models.config import SamplingConfig
from scd.models.shipped import Clips
from scd.streaming.environment import WorldEnv, WorldVectorEnv, pixels
from scd.streaming.rollout import Rollout
from scd.streaming.steering import nothing
from tests.streaming.test_rollout import world_of
from tests.tiny import PARTS, tiny_separable


@pytest.fixture
def world(separable_config, toy_source) -> World:
    """A world whose weights are off their zeros, so that its actions matter."""
    torch.manual_seed(0)
    model = build(separable_config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return World(
        model=model,
        autoencoder=PixelAutoencoder(PixelConfig(mean=0.0, std=0.5)),
        card=toy_source.card,
        sampling=SamplingConfig(num_steps=2),
    )


@pytest.fixture
def clips(toy_source) -> Clips:
    """Three clips of five frames of noise, with actions."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (3, 5, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Clips(frames=frames, actions=torch.randint(0, 5, (3, 5), generator=generator))


def test_the_library_finds_no_fault(world, clips):
    check_env(WorldEnv(world, max_frames=5, render_mode="rgb_array"), skip_render_check=True)
    check_env(WorldEnv(world, max_frames=5, clips=clips, num_given=3), skip_render_check=True)
    assert scd.WorldEnv is WorldEnv and scd.WorldVectorEnv is WorldVectorEnv


def test_actions_are_of_any_type_that_a_rollout_takes(world):
    one, several = WorldEnv(world), WorldVectorEnv(world, 2)
    one.reset(seed=3)
    wanted, names = one.step(2)[0], world.card.action_names
    for action in (np.uint8(2), np.array(2), torch.tensor(2, dtype=torch.int32), names[2]):
        one.reset(seed=3)
        assert (one.step(action)[0] == wanted).all()
    several.reset(seed=3)
    wanted = several.step(np.array([2, 1]))[0]
    for actions in ([2, 1], torch.tensor([2, 1], dtype=torch.uint8), [names[2], names[1]]):
        several.reset(seed=3)
        assert (several.step(actions)[0] == wanted).all()


def test_an_episode_is_a_rollout(world, clips):
    environment = WorldEnv(
        world, max_frames=3, clips=clips, num_given=4, num_steps=1, render_mode="rgb_array"
    )
    first, _ = environment.reset(seed=7)
    seed, frames, conditions = environment._start.draw(np.random.default_rng(0))
    assert frames is not None and frames.shape == (4, 3, 32, 32)
    # The same draws by the environment's own generator, begun anew.
    environment.reset(seed=7)
    generator, _ = np_random(7)
    seed, frames, conditions = environment._start.draw(generator)
    assert np.array_equal(first, pixels(frames[-1]))
    rollout = Rollout(world, seed=seed, engine=open_engine(world.model, "fast"))
    rollout.num_steps = 1
    rollout.begin(frames[None], conditions)
    for index, action in enumerate((1, 4, 2)):
        frame, reward, ended, cut, _ = environment.step(action)
        assert np.array_equal(frame, pixels(rollout.step(torch.tensor([action]))[0]))
        assert np.array_equal(environment.render(), frame)
        assert (reward, ended, cut) == (0.0, False, index == 2)


def test_rewards_and_ends_are_the_judges(world):
    seen = []

    def judge(frame, action):
        seen.append((frame.shape, int(action)))
        return 2.5, int(action) == 3

    environment = WorldEnv(world, judge=judge)
    environment.reset(seed=0)
    assert environment.step(1)[1:3] == (2.5, False)
    assert environment.step(3)[1:3] == (2.5, True)
    assert seen == [((32, 32, 3), 1), ((32, 32, 3), 3)]


def test_several_streams_are_those_of_one_each_and_begin_anew_by_themselves(world):
    def judge(frame, action):
        return float(action), int(action) == 4

    environment = WorldVectorEnv(world, 3, judge=judge, max_frames=3)
    first, _ = environment.reset(seed=5)
    generator, _ = np_random(5)
    rollouts = []
    for _ in range(3):
        seed, _, _ = environment._start.draw(generator)
        rollouts.append(Rollout(world, seed=seed, engine=open_engine(world.model, "fast")))
        rollouts[-1].begin()
    close(first, stepped(rollouts, (0, 0, 0)))
    frames, rewards, ended, cut, _ = environment.step(np.array([1, 4, 2]))
    close(frames, stepped(rollouts, (1, 4, 2)))
    assert rewards.tolist() == [1, 4, 2] and ended.tolist() == [False, True, False]
    # The second begins anew, unjudged; the others go on.
    frames, rewards, ended, cut, _ = environment.step(np.array([1, 4, 2]))
    rollouts[1].seed, _, _ = environment._start.draw(generator)
    rollouts[1].begin()
    close(frames, stepped(rollouts, (1, 0, 2)))
    assert rewards.tolist() == [1, 0, 2] and not ended.any() and not cut.any()
    _, _, _, cut, _ = environment.step(np.array([0, 0, 0]))
    assert cut.tolist() == [True, False, True]
    _, _, _, cut, _ = environment.step(np.array([0, 0, 0]))
    assert not cut.any()


def stepped(rollouts: list[Rollout], actions: tuple[int, ...]) -> list[torch.Tensor]:
    """Step each stream by itself."""
    pairs = zip(rollouts, actions, strict=True)
    return [rollout.step(torch.tensor([action]))[0] for rollout, action in pairs]


def close(frames: np.ndarray, alone: list[torch.Tensor]) -> None:
    """Shared calls differ in rounding: one grey level at most."""
    wanted = np.stack([pixels(frame) for frame in alone]).astype(int)
    assert np.abs(frames.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("begins", ["nothing", "clips"])
def test_a_state_is_gone_back_to_exactly(world, clips, begins):
    """Frames, rewards, ends and the starts that are drawn later, as often as wanted."""
    clips = clips if begins == "clips" else None
    environment = WorldVectorEnv(
        world,
        3,
        judge=lambda frame, action: (float(frame.mean()), int(action) == 4),
        max_frames=3,
        clips=clips,
        num_given=3,
    )
    environment.reset(seed=5)
    environment.step(np.array([1, 4, 2]))
    state = environment.get_state()
    plan = np.array([[1, 0, 2], [3, 4, 4], [0, 1, 2], [2, 2, 0], [4, 3, 1]])
    first = [environment.step(actions)[:4] for actions in plan]
    assert any(ended.any() for _, _, ended, _ in first) and any(cut.any() for *_, cut in first)
    for _ in range(2):
        environment.set_state(state)
        again = [environment.step(actions)[:4] for actions in plan]
        for before, after in zip(first, again, strict=True):
            assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))
        # What happens in between leaves the state alone.
        environment.step(plan[0])
        environment.reset(seed=6)
    environment.set_state(state)
    other = environment.step(np.array([2, 0, 3]))[0]
    assert not np.array_equal(other[0], first[0][0][0])


def test_some_streams_can_begin_anew_while_others_stay(world):
    environment = WorldVectorEnv(world, 3, max_frames=3)
    environment.reset(seed=5)
    before = environment.step(np.array([1, 4, 2]))[0]
    state, actions = environment.get_state(), np.array([3, 3, 3])
    alone = environment.step(actions)[0]
    environment.set_state(state)
    mask = np.array([False, True, False])
    begun, _ = environment.reset(options={"reset_mask": mask})
    assert np.array_equal(begun[~mask], before[~mask])
    assert not np.array_equal(begun[1], before[1])
    frames = environment.step(actions)[0]
    assert np.abs(frames[~mask].astype(int) - alone[~mask]).max() <= 1
    *_, cut, _ = environment.step(actions)
    assert cut.tolist() == [True, False, True]


def test_states_and_masks_of_something_else_are_refused(world):
    environment, other = WorldVectorEnv(world, 2), WorldVectorEnv(world, 2)
    with pytest.raises(ValueError, match="reset the environments first"):
        environment.get_state()
    with pytest.raises(ValueError, match="reset all environments first"):
        environment.reset(options={"reset_mask": np.array([True, False])})
    environment.reset(seed=0)
    other.reset(seed=0)
    with pytest.raises(ValueError, match="of these environments, got one of others"):
        environment.set_state(other.get_state())
    with pytest.raises(ValueError, match="needed what get_state returned, got dict"):
        environment.set_state({})
    for mask in (np.array([True]), np.array([1, 0])):
        with pytest.raises(ValueError, match="reset_mask must be 2 Booleans"):
            environment.reset(options={"reset_mask": mask})


def test_what_cannot_be_an_environment_is_refused(world, clips):
    for settings, words in (
        ({"max_frames": 0}, "max_frames must be 1 or more"),
        ({"render_mode": "human"}, "render_mode must be"),
        ({"clips": clips, "num_given": 6}, r"num_given must be 1 \.\. 5"),
    ):
        with pytest.raises(ValueError, match=words):
            WorldEnv(world, **settings)
    environment = WorldEnv(world)
    with pytest.raises(ValueError, match="reset the environment first"):
        environment.step(0)
    environment.reset(seed=0)
    with pytest.raises(ValueError, match=r"action ids must lie in 0 \.\. 4, got 5"):
        environment.step(5)
    for wrong in (True, np.bool_(True), torch.tensor(True), 1.0, "fly"):
        with pytest.raises(ValueError, match="type step"):
            environment.step(wrong)
    with pytest.raises(ValueError, match="num_envs must be 1 or more"):
        WorldVectorEnv(world, 0)
    several = WorldVectorEnv(world, 2)
    with pytest.raises(ValueError, match="reset the environments first"):
        several.step(np.array([0, 0]))
    several.reset(seed=0)
    with pytest.raises(ValueError, match=r"action ids must lie in 0 \.\. 4, got 0 \.\. 9"):
        several.step(np.array([0, 9]))
    for wrong in (np.array([True, False]), np.array([0.0, 1.0])):
        with pytest.raises(ValueError, match="type step"):
            several.step(wrong)
    with pytest.raises(ValueError, match="2 environments need as many actions, got 3"):
        several.step([0, 1, 2])
    silent = World(
        model=world.model,
        autoencoder=world.autoencoder,
        card=type(world.card)(
            height=32, width=32, fps=10.0, conditions=ConditionSpec(), action_names=()
        ),
        sampling=world.sampling,
    )
    with pytest.raises(ValueError, match="steered by actions or by a text"):
        WorldEnv(silent)


@pytest.mark.parametrize("space", [PARTS, Box(0.5, 2, (2,)), Discrete(3, start=1)], ids=str)
def test_the_action_space_is_that_of_the_data(space):
    world = world_of(tiny_separable(conditions=conditions_of(space)))
    environment = WorldEnv(world, max_frames=4)
    assert environment.action_space == space
    check_env(WorldEnv(world, max_frames=5), skip_render_check=True)
    space.seed(0)
    actions = [space.sample() for _ in range(3)]
    frames = [environment.reset(seed=5)[0], *(environment.step(one)[0] for one in actions)]
    # By hand: the plain engine, and what the model is given.
    rollout = Rollout(world)
    rollout.seed = int(np_random(5)[0].integers(2**31))
    rollout.begin(can_reset=False, from_nothing=True)
    spec = world.card.conditions
    taken = [nothing(spec), *(torch.as_tensor(flat(spec, one)) for one in actions)]
    byhand = [pixels(rollout.step(one[None])[0]) for one in taken]
    assert np.abs(np.stack(frames).astype(int) - np.stack(byhand)).max() <= 1
    several = WorldVectorEnv(world, 2, max_frames=4)
    assert several.single_action_space == space
    several.reset(seed=0)
    batched = several.action_space.sample()
    shown = several.step(batched)[0]
    each = list(iterate(several.action_space, batched))
    assert all(space.contains(one) for one in each) and not np.array_equal(*shown)
    outside = {"keys": np.full(4, 7, np.int8)} if isinstance(space, Dict) else 9
    with pytest.raises(ValueError, match="action"):
        environment.step(outside)
