"""Which memories fit together: the world and the engine that a snapshot was made by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from scd.checkpoint import World
from scd.clip import Conditions
from scd.config import differences, from_json, to_json
from scd.engine.interface import Engine
from scd.runtime import make_generator
from scd.serve.errors import BadSnapshot

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
        gaps = [abs(a - b) for a, b in zip(other.fingerprint, self.fingerprint, strict=False)]
        # Written so that NaN is refused too.
        if len(gaps) != len(other.fingerprint) or not all(gap <= self.tolerance for gap in gaps):
            raise BadSnapshot("the snapshot is of a model of this shape with other weights")


def identity_of(world: World, engine: Engine) -> Identity:
    """Describe a world and its engine; runs the model for two frames."""
    settings = {"model": to_json(engine.config), "autoencoder": to_json(world.autoencoder.config)}
    dtype = str(engine.dtype).removeprefix("torch.")
    return Identity(
        settings=json.dumps(settings, sort_keys=True),
        engine=f"{type(engine).__name__} {dtype}",
        fingerprint=_fingerprint(engine),
        tolerance=1e-3 if engine.dtype == torch.float32 else 0.1,
    )


def read_identity(values: Any) -> Identity:
    """Read what `to_json` wrote (ValueError)."""
    return from_json(Identity, values, "world")


@torch.no_grad()
def _fingerprint(engine: Engine) -> tuple[float, ...]:
    spec, generator = engine.config.conditions, make_generator(0, "fingerprint of a model")
    actions = None
    if spec.has_actions:
        entries = (spec.action_dim,) if spec.action_dim else ()
        actions = torch.zeros(1, 2, *entries, dtype=torch.float32 if entries else torch.long)
    labels = torch.zeros(1, dtype=torch.long) if spec.num_labels else None
    conditions = Conditions(actions=actions, labels=labels).to(engine.device)
    size = (2, 1, *engine.shape.shape)
    frame, noise = torch.randn(size, generator=generator).to(engine.device, engine.dtype)
    state = engine.begin(frame[:, None], conditions.frames(0, 1))
    context = engine.context(state, conditions.frames(1, 2))
    made = engine.denoise(context, noise, [1.0, 0.0]).float().flatten().cpu()
    places = torch.linspace(0, made.numel() - 1, NUM_VALUES).long()
    return tuple(round(value, 6) for value in made[places].tolist())


def _first_difference(theirs: Identity, ours: Identity) -> str:
    try:
        found = differences(json.loads(theirs.settings), json.loads(ours.settings))
    except (ValueError, RecursionError):
        found = []
    return found[0][:200] if found else "its settings cannot be read"
