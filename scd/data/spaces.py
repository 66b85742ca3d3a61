"""What steers a model, by kind and size, and what the parts of a collection are called.

Gymnasium's own spaces are made of it, and it of them, by `scd/data/actions.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from scd.common.config import added, within

MAX_NUMBER = 2**20
"""Largest number of actions, labels, entries or tokens, so that damaged settings are refused."""

OnError = Literal["stop", "skip"]
"""What becomes of a clip that cannot be read: an error, or another clip in its place."""

Stored = Literal["fp16", "bf16", "fp32"]
"""Arithmetic in which latents are kept."""

PartSpace = Literal["Discrete", "MultiDiscrete", "MultiBinary", "Box"]
"""The four of Gymnasium's spaces that no other is part of."""


@dataclass(frozen=True, kw_only=True)
class ActionPart:
    """A part of an action that has an embedding of its own: keys, a mouse, a stick, a choice.

    In a vector of actions it takes `size` entries: numbers of choices from 0 on, keys as 0 or 1,
    values of a box.
    """

    name: str
    """Keys of the `Dict` and places of the `Tuple` that lead to it, as in `pad/stick`, `[1]`;
    empty: the space has no other part."""
    space: PartSpace
    """Its space."""
    shape: tuple[int, ...] = ()
    """Of the part as the space has it; empty: one number."""
    choices: tuple[int, ...] = ()
    """How many choices each entry has, of `Discrete` and `MultiDiscrete`."""
    start: tuple[int, ...] = ()
    """The first choice of each entry as the space counts; empty: 0."""
    low: tuple[float | None, ...] = ()
    """Least value of each entry of a `Box`, None: no bound; empty: of none."""
    high: tuple[float | None, ...] = ()
    """Greatest value, likewise."""
    dtype: str = "float32"
    """Of the space, as NumPy calls it."""
    names: tuple[str, ...] = ()
    """Names of the entries, of `Discrete`: of the choices; empty: numbers."""

    def __post_init__(self) -> None:
        has_choices = self.space in ("Discrete", "MultiDiscrete")
        needed = {
            "choices": self.size if has_choices else 0,
            "start": self.size if has_choices and self.start else 0,
            "low": self.size if self.space == "Box" and self.low else 0,
            "high": self.size if self.space == "Box" and self.high else 0,
            "names": len(self.names) and self.num_names,
        }
        for name, count in needed.items():
            if len(getattr(self, name)) != count:
                raise ValueError(
                    f"part {self.name!r} needs {count} {name}, got {list(getattr(self, name))}"
                )
        if self.space == "Discrete" and self.shape:
            raise ValueError(f"part {self.name!r} is one number, got shape {list(self.shape)}")
        within(1, MAX_NUMBER, size=self.size, choices=min(self.choices, default=1))
        within(1, MAX_NUMBER, choices=sum(self.choices) or 1)

    @property
    def size(self) -> int:
        """Entries that it takes of a vector of actions."""
        return math.prod(self.shape)

    @property
    def num_names(self) -> int:
        return self.choices[0] if self.space == "Discrete" else self.size

    @property
    def entry_names(self) -> tuple[str, ...]:
        """What its entries are called in the card of a world."""
        if self.space == "Discrete":
            return (self.name or "action",)
        if self.names and (self.space == "MultiBinary" or not self.name):
            return self.names
        ends = self.names or tuple(str(place) for place in range(self.size))
        return tuple(f"{self.name}_{end}" if self.name else f"action {end}" for end in ends)

    @property
    def limits(self) -> list[tuple[float, float]]:
        """Least and greatest value of each entry, as a vector of actions has it."""
        if self.space == "Box":
            free = (None,) * self.size
            return [
                (-math.inf if low is None else low, math.inf if high is None else high)
                for low, high in zip(self.low or free, self.high or free, strict=True)
            ]
        return [(0.0, float(num - 1)) for num in self.choices or (2,) * self.size]


@dataclass(frozen=True, kw_only=True)
class ConditionSpec:
    """What steers a model: discrete or continuous actions, class labels, a text, or nothing."""

    num_actions: int = 0
    """Number of discrete actions; ids are 0 .. num_actions - 1. 0: no discrete actions."""
    action_dim: int = 0
    """Entries of a continuous action vector. 0: no continuous actions."""
    num_labels: int = 0
    """Number of class labels of a whole clip; ids are 0 .. num_labels - 1. 0: no labels."""
    text_length: int = added(0)
    """Tokens of an embedded text, those that fill it up included. 0: no text."""
    text_dim: int = added(0)
    """Entries of an embedded token of the text. 0: no text."""
    action_parts: tuple[ActionPart, ...] = added(())
    """What an action consists of, in the order of the entries of its vector. Empty: `num_actions`
    or `action_dim` say all."""
    actions_per_frame: int = added(1)
    """Actions of each frame: of a latent frame, those of the frames of video that it stands for.
    The first one stands for one frame, whose action counts as often."""

    def __post_init__(self) -> None:
        within(
            0,
            MAX_NUMBER,
            num_actions=self.num_actions,
            action_dim=self.action_dim,
            num_labels=self.num_labels,
            text_length=self.text_length,
            text_dim=self.text_dim,
        )
        within(1, MAX_NUMBER, actions_per_frame=self.actions_per_frame)
        if self.actions_per_frame > 1 and not self.has_actions:
            raise ValueError(
                f"there are no actions, of which actions_per_frame={self.actions_per_frame} would "
                "say how many a frame has"
            )
        if bool(self.text_length) != bool(self.text_dim):
            raise ValueError(
                "a text needs both a length and a dimension: "
                f"got text_length={self.text_length} and text_dim={self.text_dim}"
            )
        if self.num_actions and self.action_dim:
            raise ValueError(
                "actions are either discrete or continuous: "
                f"got num_actions={self.num_actions} and action_dim={self.action_dim}"
            )
        if self.action_parts:
            self._check_parts()

    def _check_parts(self) -> None:
        names = [part.name for part in self.action_parts]
        if len(set(names)) < len(names) or ("" in names and len(names) > 1):
            raise ValueError(f"the parts of an action need names of their own, got {names}")
        first = self.action_parts[0]
        if names == [""] and first.space == "Discrete":
            needed = {"num_actions": first.choices[0], "action_dim": 0}
        else:
            size = sum(part.size for part in self.action_parts)
            needed = {"num_actions": 0, "action_dim": size}
        came = {name: getattr(self, name) for name in needed}
        if came != needed:
            raise ValueError(f"the parts of an action need {needed}, got {came}")

    @property
    def is_composite(self) -> bool:
        """Whether an action has parts with embeddings of their own: more than an id or a vector."""
        return bool(self.action_parts) and not (
            self.action_parts[0].name == "" and self.action_parts[0].space in ("Discrete", "Box")
        )

    @property
    def counts(self) -> tuple[bool, ...]:
        """Of each entry of a vector of parts, whether it is the number of a choice, or a key."""
        return tuple(part.space != "Box" for part in self.action_parts for _ in range(part.size))

    @property
    def idle_action(self) -> tuple[float, ...]:
        """The vector of actions that does least: choice 0, no key, of a box the value next to 0."""
        if not self.action_parts:
            return (0.0,) * self.action_dim
        return tuple(
            min(max(0.0, low), high) for part in self.action_parts for low, high in part.limits
        )

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of actions as far as its parts say them: of ids, else of entries of the vector."""
        if self.num_actions and self.action_parts:
            return self.action_parts[0].names
        return tuple(name for part in self.action_parts for name in part.entry_names)

    @property
    def has_actions(self) -> bool:
        return bool(self.num_actions or self.action_dim)

    @property
    def action_axes(self) -> int:
        """Axes of the actions of one frame: of its actions, where it has several, and of a
        vector."""
        return (self.actions_per_frame > 1) + bool(self.action_dim)

    @property
    def of_actions(self) -> ConditionSpec:
        """The actions of a frame of video, and nothing else that steers."""
        return replace(self, num_labels=0, text_length=0, text_dim=0, actions_per_frame=1)

    @property
    def has_text(self) -> bool:
        return bool(self.text_length)

    @property
    def is_steered(self) -> bool:
        """Whether there is anything that guidance could hide."""
        return self.has_actions or bool(self.num_labels) or self.has_text


Split = Literal["train", "val", "test"]
"""Part of a collection; episodes of one part never appear in another."""
