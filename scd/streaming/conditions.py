"""What steers the streams of a batch: a label or text of all their frames, actions of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from scd.data.clip import Conditions, check_conditions, held
from scd.data.source import DataCard
from scd.engine.interface import Engine
from scd.streaming.steering import Action, as_actions


@dataclass(frozen=True)
class StreamConditions:
    """The conditions of a batch of streams, from frame to frame.

    Where guidance hides them, the batch is twice as large: its unconditional branch stands first.
    """

    engine: Engine
    card: DataCard
    """Names of the actions."""
    batch: int
    """Number of streams."""
    is_hidden_too: bool
    """Whether there is a branch from which conditions are hidden."""
    lasting: Conditions
    """Labels and texts, which hold for all frames, where the engine is."""
    parts: tuple[bool, ...] = ()
    """Which parts of actions that branch hides alone; empty: it hides everything."""

    @staticmethod
    def of(
        engine: Engine,
        card: DataCard,
        batch: int,
        is_hidden_too: bool,
        lasting: Conditions,
        parts: tuple[bool, ...] = (),
    ) -> StreamConditions:
        """Keep what steers all frames of the streams.

        Raises:
            ValueError: labels or texts that do not fit, or are missing.
        """
        spec, device, dtype = engine.config.conditions, engine.device, engine.dtype
        alone = {"num_actions": 0, "action_dim": 0, "action_parts": (), "actions_per_frame": 1}
        check_conditions(replace(spec, **alone), lasting)
        text, null_text = lasting.text, lasting.null_text if is_hidden_too else None
        for name, value in (("labels", lasting.labels), ("texts", text), ("texts", null_text)):
            if value is not None and value.shape[0] != batch:
                raise ValueError(f"{batch} streams need as many {name}, got {value.shape[0]}")
        if text is not None and null_text is None and is_hidden_too:
            raise ValueError("guidance needs an embedded text to lead away from: null_text")
        placed = replace(
            lasting.to(device),
            text=None if text is None else text.to(device, dtype),
            null_text=None if null_text is None else null_text.to(device, dtype),
        )
        return StreamConditions(engine, card, batch, is_hidden_too, placed, parts)

    def with_text(self, text: Tensor, null_text: Tensor | None) -> StreamConditions:
        """Return the conditions of the same streams with another text, checked as by `of`."""
        null_text = self.lasting.null_text if null_text is None else null_text
        lasting = replace(self.lasting, text=text, null_text=null_text)
        return StreamConditions.of(
            self.engine, self.card, self.batch, self.is_hidden_too, lasting, self.parts
        )

    def repeat(self, num: int) -> StreamConditions:
        """Return the conditions of `num` futures of each stream, those of one in a row."""
        return replace(self, batch=self.batch * num, lasting=self.lasting.repeat(num))

    def of_given(self, given: Conditions) -> Conditions:
        """Return the conditions of given frames, whose actions were checked."""
        past = self.lasting.with_actions_of(given).to(self.engine.device)
        return self._with_hidden(past)

    def of_frame(self, given: Action | None) -> Conditions:
        """Return the conditions of one frame of each stream from its actions.

        Raises:
            ValueError: they do not fit.
        """
        spec = self.engine.config.conditions
        actions = as_actions(given, self.card, self.batch)
        if actions is None and not spec.has_actions:
            return self._unsteered
        if actions is not None:
            actions = held(spec, actions)[:, None]
        conditions = replace(self.lasting, actions=actions)
        check_conditions(spec, conditions, 1)
        if actions is not None and actions.shape[0] != self.batch:
            raise ValueError(f"{self.batch} streams need as many actions, got {actions.shape[0]}")
        return self._with_hidden(conditions.to(self.engine.device))

    @cached_property
    def _unsteered(self) -> Conditions:
        # One object for all frames: keys and values of a text are made anew for another one.
        return self._with_hidden(self.lasting)

    def _with_hidden(self, conditions: Conditions) -> Conditions:
        return conditions.with_null_branch(self.parts) if self.is_hidden_too else conditions
