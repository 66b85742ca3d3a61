"""Which memories fit together: the world and the engine that a snapshot was made by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from scd.common.config import differences, from_json, to_json
from scd.common.runtime import make_generator
from scd.data.clip import Conditions
from scd.engine.interface import Engine
from scd.models.checkpoint import World
from scd.models.flow import SamplingConfig
from scd.serving.errors import BadSnapshot
from scd.streaming.rollout import Rollout

NUM_VALUES = 16
"""Numbers of a frame by which two models of one shape are told apart."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A memory depends on the model and on how an engine lays it out."""

    settings: str
    """Of model and autoencoder, as JSON."""
    engine: str
    """Its kind and precision."""
    fingerprint: tuple[float, ...]
    """What the weights make of a fixed frame."""
    tolerance: float
    """Of these numbers, whose scale is 1: machines round products otherwise."""

    def refuse(self, other: Identity) -> None:
        """Refuse what another world or engine has made (BadSnapshot)."""
        if other.engine != self.engine:
            raise BadSnapshot(f"the snapshot is of engine {other.engine}, this is {self.engine}")
        if other.settings != self.settings:
            raise BadSnapshot(f"the snapshot is of another world: {_first_difference(other, self)}")
        theirs, ours = other.fingerprint, self.fingerprint
        # Written so that NaN is refused too.
        same = [abs(a - b) <= self.tolerance for a, b in zip(theirs, ours, strict=False)]
        if len(theirs) != len(ours) or not all(same):
            raise BadSnapshot("the snapshot is of a model of this shape with other weights")


def identity_of(world: World, engine: Engine) -> Identity:
    """Describe a world and its engine; runs the model for two frames."""
    settings = {"model": to_json(engine.config), "autoencoder": to_json(world.autoencoder.config)}
    dtype = str(engine.dtype).removeprefix("torch.")
    return Identity(
        settings=json.dumps(settings, sort_keys=True),
        engine=f"{type(engine).__name__} {dtype}",
        fingerprint=_fingerprint(world, engine),
        tolerance=1e-3 if engine.dtype == torch.float32 else 0.1,
    )


def read_identity(values: Any) -> Identity:
    """Read what `to_json` wrote (ValueError)."""
    return from_json(Identity, values, "world")


def _fingerprint(world: World, engine: Engine) -> tuple[float, ...]:
    """Return some numbers of the second frame of a stream, made in one step."""
    spec, generator = engine.config.conditions, make_generator(0, "fingerprint of a model")
    action = None
    if spec.has_actions:
        action = torch.zeros(1, spec.action_dim) if spec.action_dim else torch.zeros(1).long()
    labels = torch.zeros(1, dtype=torch.long) if spec.num_labels else None
    frame = 2 * torch.rand(1, 1, 3, world.card.height, world.card.width, generator=generator) - 1
    rollout = Rollout(world, SamplingConfig(num_steps=1), engine=engine)
    actions = None if action is None else action[:, None]
    rollout.begin(frame, Conditions(actions=actions, labels=labels), can_reset=False)
    rollout.step(action)
    assert rollout.newest is not None
    made = rollout.newest.float().flatten().cpu()
    places = torch.linspace(0, made.numel() - 1, NUM_VALUES).long()
    return tuple(round(value, 6) for value in made[places].tolist())


def _first_difference(theirs: Identity, ours: Identity) -> str:
    try:
        found = differences(json.loads(theirs.settings), json.loads(ours.settings))
    except (ValueError, RecursionError):
        found = []
    return found[0][:200] if found else "its settings cannot be read"
