"""What people type to steer a stream -> the actions of its streams, as a model takes them.

An action is an id or a vector, by number or by name; an action of the world's space, part by part;
or keys held and the mouse, where the names of the world's actions say what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scd.common.names import did_you_mean
from scd.data.actions import by_part, flat
from scd.data.clip import check_actions
from scd.data.given import as_ids
from scd.data.keymap import DIRECTIONS, IDLE
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec

Action = Tensor | np.ndarray | np.generic | int | float | str | Sequence[Any] | Mapping[str, Any]
"""Of all streams or of each: an id, a name, a vector, several of them; what the world's space has,
a dictionary or tuple of parts; or {"keys": ["w"]} and {"mouse": (0.1, 0.0)}."""

Plan = Action | Sequence[Action]
"""Actions of several steps: one for all of them, a list with those of each step, or a tensor or
array [steps], or [streams, steps], with vectors in one axis more."""

KEYS = {"w": "up", "a": "left", "s": "down", "d": "right", "space": "jump"} | {
    f"arrow{way}": way for way in DIRECTIONS
}
"""Keys with a meaning of their own."""


def as_actions(action: Action | None, card: DataCard, num_streams: int) -> Tensor | None:
    """Return what steers the next frame of each stream: ids [b], or vectors [b a].

    One action is that of all streams. Whether ids are in range, and vectors finite and of the right
    size, is checked with the model's other conditions.

    Args:
        action: as `step` takes it, or of a latent frame its actions [b k] or [b k a]; None: none.
        card: names of the actions.
        num_streams: b.

    Raises:
        ValueError: what this world does not know; says what to type.
    """
    spec = card.conditions
    if action is None or not spec.has_actions:
        if action is None or isinstance(action, Tensor):
            return action
        raise ValueError("this world is steered by no actions: type step()")
    if isinstance(action, Tensor):
        if spec.actions_per_frame > 1 and action.ndim == 1 + spec.action_axes:
            # Of each stream the actions of all frames of video that a latent frame stands for.
            return _of_type(action, card)
        return _each(_of_type(action, card), card, num_streams)
    if spec.is_composite and (parted := _by_part(action, card)) is not None:
        return _each(parted, card, num_streams)
    if isinstance(action, Mapping):
        action = _of_input(action, card)
    if isinstance(action, str):
        action = _named(action, card)
    if isinstance(action, Sequence) and any(isinstance(one, str) for one in action):
        action = [_named(one, card) if isinstance(one, str) else one for one in action]
    try:
        values = np.asarray(action)
    except ValueError as error:
        raise ValueError(f"{action!r} is no action. {what_to_type(card)}") from error
    fits = "fiu" if spec.action_dim else "iu"
    if values.dtype.kind not in fits or not values.size:
        raise ValueError(f"{action!r} is no action. {what_to_type(card)}")
    kind = np.float32 if spec.action_dim else np.int64
    return _each(torch.from_numpy(values.astype(kind)), card, num_streams)


def as_plan(
    actions: Plan | None, card: DataCard, num_streams: int, num_steps: int | None = None
) -> list[Tensor | None]:
    """Return the actions of several steps, each as `as_actions` does.

    Args:
        actions: as `Rollout.generate` takes them.
        card: names of the actions.
        num_streams: b.
        num_steps: how many; None: as many as there are actions.

    Raises:
        ValueError: too few actions, some that this world does not know, or no number of steps
            where nothing else says it.
    """
    axes = 2 if card.conditions.action_dim else 1
    if isinstance(actions, (Tensor, np.ndarray)) and actions.ndim >= axes:
        if actions.ndim > axes + 1:
            raise ValueError(
                "actions of several steps are [streams, steps] or [steps]"
                f"{', of vectors each' if axes == 2 else ''}, got {list(actions.shape)}"
            )
        by_step = actions if actions.ndim == axes else actions.swapaxes(0, 1)
        steps: list[Action | None] = list(by_step)
    elif isinstance(actions, Sequence) and not isinstance(actions, str):
        steps = list(actions)
    elif num_steps is None:
        raise ValueError("one action for all steps, or none, needs their number: num_steps")
    else:
        steps = [actions] * num_steps
    num_steps = len(steps) if num_steps is None else num_steps
    if len(steps) < num_steps:
        raise ValueError(f"{num_steps} frames need as many actions, got {len(steps)}")
    return [as_actions(one, card, num_streams) for one in steps[:num_steps]]


def nothing(spec: ConditionSpec) -> Tensor:
    """Return the action that leads to the first frame of a stream from nothing: id 0, or that of
    a vector that does least."""
    return torch.tensor(spec.idle_action) if spec.action_dim else torch.zeros((), dtype=torch.long)


def read_action(word: str, card: DataCard) -> Tensor | None:
    """Return the action of one stream, [1] or [1 a], that a word of a command line means.

    Args:
        word: a number or a name; JSON of what else `as_actions` takes, such as [0.1, 0] or
            {"keys": ["w"]}; empty: what does nothing.
        card: names of the actions.

    Returns:
        None for a world without actions.

    Raises:
        ValueError: what this world does not know; says what to type.
    """
    if not word:
        return nothing(card.conditions)[None] if card.conditions.has_actions else None
    if not card.conditions.has_actions:
        raise ValueError(f"this world is steered by no actions, got {word!r}")
    try:
        action = json.loads(word)
    except ValueError:
        action = word
    actions = as_actions(action, card, 1)
    assert actions is not None
    check_actions(card.conditions, actions)
    return actions


def what_to_type(card: DataCard) -> str:
    """Say how this world is steered, by examples."""
    spec, names = card.conditions, ", ".join(card.action_names)
    if spec.num_actions:
        place = spec.num_actions - 1
        return (
            f"This world is steered by one of {names}: type step({card.action_names[place]!r}) or "
            f"step({place})"
        )
    if spec.is_composite:
        example = by_part(spec, spec.idle_action)
        return f"This world is steered part by part ({names}): type step({example!r})"
    zeros = ", ".join(["0.0"] * spec.action_dim)
    return f"This world is steered by {spec.action_dim} numbers ({names}): type step([{zeros}])"


def _by_part(action: Action, card: DataCard) -> Tensor | None:
    """Return the vector of an action given by part, or those of several; None: it is not."""
    spec = card.conditions
    tops = {part.name.partition("/")[0] for part in spec.action_parts}
    if isinstance(action, Mapping):
        # Keys and the mouse may be entries of any part, by the names of these.
        if set(action) <= {"keys", "mouse"} and not tops & {"keys", "mouse"}:
            return None
        return torch.from_numpy(flat(spec, action))
    in_order = all(top.startswith("[") for top in tops)
    if isinstance(action, tuple) and in_order and len(action) == len(tops):
        return torch.from_numpy(flat(spec, action))
    if in_order and len(tops) > 1 and isinstance(action, list) and not _are_vectors(action, spec):
        # As JSON has a tuple; of several streams one does not fit, but each of its entries does.
        with suppress(ValueError):
            return torch.from_numpy(flat(spec, action))
        if any(isinstance(one, list) for one in action):
            return torch.from_numpy(np.stack([flat(spec, one) for one in action]))
    if isinstance(action, Sequence) and not isinstance(action, str):
        if any(isinstance(one, Mapping | tuple) for one in action):
            return torch.from_numpy(np.stack([flat(spec, one) for one in action]))
    if tops == {""} and isinstance(action, Sequence):
        if not action or any(isinstance(one, str) for one in action):
            return torch.from_numpy(flat(spec, action))
    return None


def _are_vectors(action: Sequence[Any], spec: ConditionSpec) -> bool:
    """Whether a list is a vector of actions, or one of vectors, and not one of parts."""
    several = (Sequence, np.ndarray)
    rows = action if all(isinstance(one, several) for one in action) else [action]
    return all(
        len(row) == spec.action_dim and not any(isinstance(one, several) for one in row)
        for row in rows
    )


def _of_type(actions: Tensor, card: DataCard) -> Tensor:
    """Return ids as int64, vectors as floats; floats for ids stay, and are refused as such."""
    if actions.dtype == torch.bool:
        raise ValueError(f"an action is no truth value. {what_to_type(card)}")
    actions = as_ids(actions, "actions")
    is_vector = card.conditions.action_dim and not actions.is_floating_point()
    return actions.float() if is_vector else actions


def _each(actions: Tensor, card: DataCard, num_streams: int) -> Tensor:
    """Give each stream the action that is meant for all."""
    spec = card.conditions
    if spec.num_actions:
        if actions.ndim > 1:
            raise ValueError(
                f"actions are ids, one for each of {num_streams} streams, got shape "
                f"{list(actions.shape)}. {what_to_type(card)}"
            )
        return actions.expand(num_streams) if actions.ndim == 0 else actions
    if actions.ndim == 0 and spec.action_dim == 1:
        actions = actions[None]
    if actions.ndim not in (1, 2):
        raise ValueError(
            f"actions are vectors, got shape {list(actions.shape)}. {what_to_type(card)}"
        )
    return actions.expand(num_streams, -1) if actions.ndim == 1 else actions


def shown_names(card: DataCard) -> list[str]:
    """Return the names of a world's actions as people see them: "do nothing" for the idle one."""
    return [
        "do nothing" if _plain(name) in IDLE else name.replace("_", " ")
        for name in card.action_names
    ]


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _named(name: str, card: DataCard) -> int:
    """Return the id of an action by its name."""
    if card.conditions.action_dim:
        raise ValueError(f"no action is called {name!r}. {what_to_type(card)}")
    known = [_plain(one) for one in card.action_names]
    if _plain(name) in known:
        return known.index(_plain(name))
    hint = did_you_mean(_plain(name), known) or "."
    raise ValueError(f"no action is called {name!r}{hint} {what_to_type(card)}")


def _of_input(given: Mapping[str, Any], card: DataCard) -> int | list[float]:
    """Return the action that held keys and the mouse mean, where names of actions say so."""
    unknown = sorted(str(name) for name in set(given) - {"keys", "mouse"})
    if unknown:
        raise ValueError(f'needed {{"keys": [...], "mouse": (x, y)}}, got {unknown} too')
    keys = given.get("keys", ())
    keys = [keys] if isinstance(keys, str) else list(keys)
    if not all(isinstance(key, str) for key in keys):
        raise ValueError(f'"keys" are names such as "w" or "left", got {keys!r}')
    held = [_plain(key) for key in keys]
    mouse = given.get("mouse")
    if card.conditions.action_dim:
        return _vector(held, mouse, card)
    if mouse is not None and any(_pair(mouse)):
        raise ValueError(f"this world knows no mouse. {what_to_type(card)}")
    return _held_action(held, card)


def _pair(mouse: Any) -> tuple[float, float]:
    """Read how far the mouse moved, to the right and down."""
    try:
        right, down = (float(value) for value in mouse)
    except (TypeError, ValueError) as error:
        raise ValueError(f'"mouse" is (to the right, down), two numbers, got {mouse!r}') from error
    return right, down


def _held_action(held: list[str], card: DataCard) -> int:
    """Return the one action that keys mean together."""
    known = [_plain(one) for one in card.action_names]
    if not held:
        idle = [place for place, name in enumerate(known) if name in IDLE]
        if not idle:
            raise ValueError(f"this world has no action for no key. {what_to_type(card)}")
        return idle[0]
    meant = {key: _meaning(key, known) for key in held}
    strange = [key for key, place in meant.items() if place is None]
    if strange:
        raise ValueError(f"this world knows no key {strange[0]!r}. {what_to_type(card)}")
    places = sorted({place for place in meant.values() if place is not None})
    if len(places) > 1:
        raise ValueError(
            f"keys {', '.join(held)} mean {' and '.join(card.action_names[one] for one in places)},"
            f" of which this world does one at a time. {what_to_type(card)}"
        )
    return places[0]


def _meaning(key: str, known: Sequence[str]) -> int | None:
    """Return the number of the action that a key means; None: of none."""
    if key in known:
        return known.index(key)
    way = KEYS.get(key.replace("_", ""), key)
    words = DIRECTIONS.get(way, (way,))
    for matches in (lambda name: name in words, lambda name: bool({*name.split("_")} & {*words})):
        found = [place for place, name in enumerate(known) if matches(name)]
        if found:
            return found[0]
    return None


def _vector(held: list[str], mouse: Any, card: DataCard) -> list[float]:
    """Fill the entries of a vector that bear the names of keys and of the mouse's axes."""
    known = [_plain(one).removeprefix("key_") for one in card.action_names]
    values = list(card.conditions.idle_action)
    for key in held:
        if key not in known:
            hint = did_you_mean(key, known) or "."
            raise ValueError(
                f"no entry of this world's actions is key {key!r}{hint} {_entries(card)}"
            )
        values[known.index(key)] = 1.0
    if mouse is not None:
        for axis, moved in zip("xy", _pair(mouse), strict=True):
            names = [f"mouse_{axis}", f"mouse_d{axis}", f"mouse{axis}"]
            places = [place for place, name in enumerate(known) if name in names]
            if places:
                values[places[0]] = moved
            elif moved or not any(name.startswith("mouse") for name in known):
                raise ValueError(f"this world knows no mouse along {axis}. {_entries(card)}")
    return values


def _entries(card: DataCard) -> str:
    return f"Entries are called {', '.join(card.action_names)}. {what_to_type(card)}"
