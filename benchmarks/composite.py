"""Training steps with an action of several parts against those with one of four ids, in turns.

    python benchmarks/composite.py

writes docs/results/composite.json. Both models have the same blocks, clips and seed; what differs
is what steers them. Each turn takes some steps of one and as many of the other, and their ratio is
that of the CPU time of this process.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from gymnasium import spaces

from scd.common.config import to_json
from scd.common.provenance import provenance, write_json
from scd.data.actions import conditions_of
from scd.data.clip import Batch, Conditions
from scd.data.spaces import ConditionSpec
from scd.models.build import build
from scd.objectives.denoise import Denoise
from scd.training.presets import preset

PARTS = spaces.Dict(
    keys=spaces.MultiBinary(11), mouse=spaces.Box(-1, 1, (2,)), weapon=spaces.Discrete(10)
)
"""Held keys, a mouse and a choice, as of a shooter."""


@dataclass(frozen=True, kw_only=True)
class CompositeConfig:
    """How long to measure, and on what."""

    preset: str = "toy"
    """Whose model, batch and objective."""
    turns: int = 20
    """Pairs of measurements."""
    steps: int = 2
    """Training steps of a measurement."""
    out: str = "docs/results/composite.json"
    """The result."""


class Trained:
    """A model with random clips, trained some steps at a time."""

    def __init__(self, config: CompositeConfig, spec: ConditionSpec) -> None:
        run = preset(config.preset)
        torch.manual_seed(0)
        self.model = build(replace(run.model, conditions=spec))
        shape = (run.batch_size, run.num_frames)
        actions = torch.zeros(shape, dtype=torch.long)
        if spec.action_dim:
            actions = torch.tensor(spec.idle_action).repeat(*shape, 1)
        frames = torch.randn(*shape, *self.model.shape.shape)
        self.batch = Batch(frames=frames, conditions=Conditions(actions=actions), encoded=True)
        self.objective = Denoise(config=run.objective)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.generator = torch.Generator().manual_seed(0)

    def seconds(self, steps: int) -> float:
        """Return the CPU time of some steps."""
        began = time.process_time()
        for _ in range(steps):
            loss, _ = self.objective.loss(self.model, self.batch, self.generator)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.process_time() - began


def main() -> None:
    """Run from the command line."""
    config = tyro.cli(CompositeConfig, description=__doc__)
    one, other = (
        Trained(config, spec) for spec in (ConditionSpec(num_actions=4), conditions_of(PARTS))
    )
    one.seconds(2), other.seconds(2)
    ratios, taken = [], []
    for turn in range(config.turns):
        order = (one, other) if turn % 2 == 0 else (other, one)
        seconds = {id(each): each.seconds(config.steps) for each in order}
        taken.append(seconds[id(one)] / config.steps)
        ratios.append(seconds[id(other)] / seconds[id(one)])
    quarters = statistics.quantiles(ratios, n=4)
    result = {
        "ratio": quarters[1],
        "quarters": [quarters[0], quarters[2]],
        "step_cpu_s": statistics.median(taken),
        "settings": to_json(config),
        "timed": "CPU time of training steps, composite over discrete, median of turns",
    } | provenance()
    write_json(result, Path(config.out))
    low, median, high = quarters
    print(f"{median:.3f} ({low:.3f} .. {high:.3f}) of {result['step_cpu_s']:.2f} s")


if __name__ == "__main__":
    main()
