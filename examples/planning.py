"""Plan inside a world: which actions lead to a picture? By random shooting, and by cross-entropy.

    python examples/planning.py [WORLD]

begins a stream from the first frames of a clip. The target is the picture that some actions lead
to, of which the planners see the picture alone. Both imagine as many futures, 64 in one batch, and
look only at how far the last frame of each is from the target. What they found is then played with
noise that they never met, beside the actions that led there, and actions at random.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch import Tensor
from torch.nn import functional

from scd.common.config import at_least
from scd.common.runtime import make_generator
from scd.data.clip import Conditions
from scd.engine.open import open_engine
from scd.models.checkpoint import load_world
from scd.models.names import find_world
from scd.models.shipped import read_clips
from scd.streaming.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class PlanningConfig:
    """One target, two planners."""

    world: Annotated[str, tyro.conf.Positional] = ""
    """World or run folder with clips; empty: the shipped world of Doom."""
    clip: int = 3
    """Which clip the stream begins from."""
    given: int = 12
    """Frames of it that the stream is given."""
    actions: tuple[str, ...] = ("left", "left", "left", "left", "forward", "forward")
    """That lead to the target, by the names that the world has for them."""
    futures: int = 64
    """Imagined at once."""
    rounds: int = 4
    """How often that many are imagined."""
    seed: int = 0
    """Of all draws."""

    def __post_init__(self) -> None:
        at_least(1, given=self.given, actions=len(self.actions), futures=self.futures)
        at_least(1, rounds=self.rounds)
        at_least(0, clip=self.clip)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Where a stream stands, where it should go, and what it can do."""

    rollout: Rollout
    """The stream; planners only fork it."""
    target: Tensor
    """Picture to reach [3 h w]."""
    hidden: Tensor
    """Ids of the actions that led there [t]; planners only know how many."""
    num_actions: int
    """Ids from 0."""

    def distances(self, plans: Tensor, seeds: list[int] | None = None) -> Tensor:
        """Imagine plans [n t]; return how far the last frame of each is from the target."""
        futures = self.rollout.fork(len(plans), seeds)
        frames = futures.generate(plans, plans.shape[1])
        return (frames[:, -1] - self.target).square().mean(dim=(1, 2, 3)).sqrt()


def pose(config: PlanningConfig) -> Problem:
    """Begin the stream.

    Raises:
        ValueError: the world has no clips, no such clip, none so long, or no such actions.
        OSError: there is no such world.
    """
    folder = find_world(config.world or "doom")
    world, clips = load_world(folder), read_clips(folder)
    if clips is None or not world.card.conditions.num_actions:
        raise ValueError(f"{folder}: needed a world with clips, steered by actions by id")
    number, length = clips.frames.shape[:2]
    if config.clip >= number or config.given > length:
        raise ValueError(f"there are {number} clips of {length} frames, from 0 on")
    names = list(world.card.action_names)
    if not set(config.actions) <= set(names):
        raise ValueError(f"actions must be of {names}, got {list(config.actions)}")
    hidden = torch.tensor([names.index(name) for name in config.actions])
    rollout = Rollout(world, seed=config.seed, engine=open_engine(world.model, "fast"))
    past = Conditions(actions=clips.actions[config.clip, : config.given][None])
    rollout.begin(clips.pixels(config.clip, config.given)[None], past, can_reset=False)
    target = rollout.fork().generate(hidden[None], len(hidden))[0, -1]
    # The planners' futures meet other noise than the target did.
    rollout.seed = config.seed + 1
    return Problem(rollout=rollout, target=target, hidden=hidden, num_actions=len(names))


def random_plans(problem: Problem, number: int, keep: float, generator: torch.Generator) -> Tensor:
    """Draw plans [n t] in which an action is kept with probability `keep` from frame to frame."""
    size = (number, len(problem.hidden))
    drawn = torch.randint(problem.num_actions, size, generator=generator)
    is_kept = torch.rand(size, generator=generator) < keep
    for frame in range(1, size[1]):
        drawn[:, frame] = torch.where(is_kept[:, frame], drawn[:, frame - 1], drawn[:, frame])
    return drawn


def random_shooting(problem: Problem, config: PlanningConfig, generator: torch.Generator) -> Tensor:
    """Imagine plans at random; return the best one [t]."""
    best, least = problem.hidden * 0, float("inf")
    for _ in range(config.rounds):
        plans = random_plans(problem, config.futures, 0.7, generator)
        distances = problem.distances(plans)
        if distances.min() < least:
            best, least = plans[distances.argmin()], float(distances.min())
    return best


def cross_entropy(problem: Problem, config: PlanningConfig, generator: torch.Generator) -> Tensor:
    """Move a distribution over the action of each frame towards the best plans; return its mode.

    Source: the cross-entropy method, with a share of the distribution before, so that no action is
    given up for good by one round.
    """
    num_elites = max(1, config.futures // 8)
    plans = random_plans(problem, config.futures, 0.7, generator)
    probabilities = torch.full((len(problem.hidden), problem.num_actions), 1 / problem.num_actions)
    for _ in range(config.rounds):
        distances = problem.distances(plans)
        elites = plans[distances.argsort()[:num_elites]]
        counts = functional.one_hot(elites, problem.num_actions).float().mean(0)
        probabilities = 0.8 * counts + 0.2 * probabilities
        plans = torch.multinomial(probabilities, config.futures, True, generator=generator).t()
    return probabilities.argmax(-1)


def main() -> int:
    """Plan and report; return the exit status."""
    try:
        config = tyro.cli(PlanningConfig, description=__doc__)
        problem = pose(config)
    except (ValueError, OSError) as error:
        print(f"planning.py: {error}", file=sys.stderr)
        return 2
    names = problem.rollout.world.card.action_names
    planners: dict[str, Callable[[Problem, PlanningConfig, torch.Generator], Tensor]] = {
        "random shooting": random_shooting,
        "cross-entropy": cross_entropy,
    }
    plans = {"the hidden ones": problem.hidden}
    imagined = config.futures * config.rounds * len(problem.hidden)
    for name, plan in planners.items():
        began = time.perf_counter()
        plans[name] = plan(problem, config, make_generator(config.seed, name))
        rate = imagined / (time.perf_counter() - began)
        print(f"{name}: {imagined} imagined frames, {rate:.0f} a second")
    # Noise that no planner met.
    seeds = list(range(config.seed + 1000, config.seed + 1000 + config.futures))
    anything = random_plans(problem, config.futures, 0.7, make_generator(config.seed, "anything"))
    print(f"{'distance':>9}  actions")
    print(f"{problem.distances(anything, seeds).mean():9.3f}  at random")
    for name, plan in plans.items():
        distance = problem.distances(plan.repeat(config.futures, 1), seeds).mean()
        print(f"{distance:9.3f}  {name}: {' '.join(names[action] for action in plan.tolist())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
