"""Train an agent inside a world: PPO of stable-baselines3 on frames that nobody ever recorded.

    pip install -c constraints.txt -e ".[rl]"
    python examples/ppo.py [WORLD]

All streams of the agent share the calls of the network. The reward is a function of the picture; by
default it is how bright the picture is, so the agent learns to look where there is light.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro

from scd.common.config import at_least
from scd.models.checkpoint import load_world
from scd.models.names import find_world
from scd.models.shipped import read_clips
from scd.streaming.environment import WorldVectorEnv

try:
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecEnv, VecMonitor
except ImportError:
    print("ppo.py: needs stable-baselines3: pip install -e '.[rl]'", file=sys.stderr)
    raise SystemExit(2) from None


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """One agent."""

    world: Annotated[str, tyro.conf.Positional] = ""
    """World or run folder with clips; empty: the shipped world of Doom."""
    steps: int = 8192
    """Frames in which the agent learns, of all streams together."""
    envs: int = 16
    """Streams side by side."""
    max_frames: int = 32
    """Frames of an episode."""
    given: int = 8
    """Frames of a clip with which an episode begins."""
    denoising_steps: int = 1
    """Per frame: an agent needs speed more than sharp edges."""
    test_episodes: int = 32
    """With which the agent is compared with actions at random, before and after."""
    seed: int = 0
    """Of all draws."""

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, envs=self.envs, test_episodes=self.test_episodes)


def brightness(frame: np.ndarray, action: Any) -> tuple[float, bool]:
    """Return the mean of a frame's pixels, 0 to 1, as its reward; no frame is the last one."""
    return float(frame.mean()) / 255, False


class Streams(VecEnv):
    """A WorldVectorEnv as stable-baselines3 wants it: an episode that ends begins at once."""

    def __init__(self, environment: WorldVectorEnv, seed: int) -> None:
        self.environment = environment
        self._seed_of_start: int | None = seed
        super().__init__(
            environment.num_envs,
            environment.single_observation_space,
            environment.single_action_space,
        )

    def reset(self) -> np.ndarray:
        frames, _ = self.environment.reset(seed=self._seed_of_start)
        self._seed_of_start = None
        return frames

    def step_async(self, actions: np.ndarray) -> None:
        self._chosen = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        frames, rewards, ended, cut, _ = self.environment.step(self._chosen)
        is_over = ended | cut
        infos: list[dict[str, Any]] = [{} for _ in is_over]
        for number in np.flatnonzero(is_over):
            infos[number]["terminal_observation"] = frames[number]
            infos[number]["TimeLimit.truncated"] = bool(cut[number] and not ended[number])
        if is_over.any():
            frames, _ = self.environment.reset(options={"reset_mask": is_over})
        return frames, rewards.astype(np.float32), is_over, infos

    def close(self) -> None:
        self.environment.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.environment, attr_name, None) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self.environment, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> Any:
        raise NotImplementedError("the streams are no environments of their own")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


def mean_reward(config: PPOConfig, environment: WorldVectorEnv, agent: PPO | None) -> float:
    """Return the mean reward of a frame over test episodes; without an agent, at random."""
    generator, rewards = np.random.default_rng(config.seed), []
    for number in range(-(-config.test_episodes // config.envs)):
        frames, _ = environment.reset(seed=config.seed + 1000 + number)
        for _ in range(config.max_frames):
            if agent is None:
                actions = generator.integers(environment.single_action_space.n, size=config.envs)
            else:
                actions, _ = agent.predict(frames, deterministic=False)
            frames, reward, *_ = environment.step(actions)
            rewards.append(reward.mean())
    return float(np.mean(rewards))


def main() -> int:
    """Train and compare; return the exit status."""
    try:
        config = tyro.cli(PPOConfig, description=__doc__)
        folder = find_world(config.world or "doom")
        environment = WorldVectorEnv(
            load_world(folder),
            config.envs,
            judge=brightness,
            max_frames=config.max_frames,
            num_steps=config.denoising_steps,
            clips=read_clips(folder),
            num_given=config.given,
        )
    except (ValueError, OSError) as error:
        print(f"ppo.py: {error}", file=sys.stderr)
        return 2
    print(f"reward of a frame: {mean_reward(config, environment, None):.3f} at random")
    streams = VecMonitor(Streams(environment, config.seed))
    agent = PPO("CnnPolicy", streams, n_steps=64, batch_size=256, seed=config.seed, device="cpu")
    began = time.perf_counter()
    agent.learn(config.steps)
    rate = agent.num_timesteps / (time.perf_counter() - began)
    print(f"learned in {agent.num_timesteps} frames, {rate:.0f} a second")
    print(f"reward of a frame: {mean_reward(config, environment, agent):.3f} as learned")
    return 0


if __name__ == "__main__":
    sys.exit(main())
