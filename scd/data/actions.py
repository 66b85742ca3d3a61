"""Actions of Gymnasium's spaces <-> what a model is given: an id, or the vector of all parts.

A space is a `Discrete`, `Box`, `MultiBinary` or `MultiDiscrete`, or a `Dict` or `Tuple` of spaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple
from jaxtyping import Float, Int

from scd.common.names import did_you_mean
from scd.data.spaces import ActionPart, ConditionSpec

NamesOfParts = Mapping[str, Sequence[str]]
"""Names of a part's entries, or of a discrete part's choices, by the name of the part."""


def conditions_of(space: Space[Any], names: NamesOfParts | None = None) -> ConditionSpec:
    """Say what steers a model whose actions are those of a space.

    Raises:
        ValueError: a kind of space that no action has, or names that do not fit.
    """
    names = names or {}
    parts = tuple(_part(name, leaf, tuple(names.get(name, ()))) for name, leaf in _leaves(space))
    unknown = sorted(set(names) - {part.name for part in parts})
    if unknown:
        raise ValueError(
            f"names were given of {unknown}, needed some of {[part.name for part in parts]}"
        )
    only = parts[0]
    if only.name == "" and only.space == "Discrete":
        plain = ConditionSpec(num_actions=only.choices[0])
        is_plain = replace(only, names=()) == _only_part(plain)
        return plain if is_plain else replace(plain, action_parts=parts)
    plain = ConditionSpec(action_dim=sum(part.size for part in parts))
    return plain if parts == (_only_part(plain),) else replace(plain, action_parts=parts)


def named(spec: ConditionSpec, names: Sequence[str]) -> ConditionSpec:
    """Return the same with a name for each entry of the vector, where an action has parts."""
    if not spec.is_composite:
        return spec
    parts, first = [], 0
    for part in spec.action_parts:
        own, first = tuple(names[first : first + part.size]), first + part.size
        # The one entry of a choice is called as its part; its names are those of the choices.
        keeps = part.entry_names == own or part.space == "Discrete"
        parts.append(part if keeps else replace(part, names=own))
    return replace(spec, action_parts=tuple(parts))


def space_of(spec: ConditionSpec) -> Space[Any]:
    """Return the space of a model's actions, equal to the one that its data were recorded in.

    Raises:
        ValueError: nothing steers it by actions.
    """
    if not spec.has_actions:
        raise ValueError("a world that no actions steer has no action space")
    leaves = {part.name: _leaf(part) for part in parts_of(spec)}
    return _grown(leaves, Dict, Tuple)


def flat(spec: ConditionSpec, action: Any) -> Int[np.ndarray, ""] | Float[np.ndarray, " a"]:
    """Turn an action of a space into what a model is given.

    Args:
        spec: of the space.
        action: as the space has it, or as JSON says it: dictionaries and lists by part. Choices
            and held keys may be named; parts that are left out do nothing.

    Raises:
        ValueError: a part that there is not, or of another shape or kind.
    """
    given = dict(_given(spec, action))
    if spec.num_actions:
        (number,) = _entries(parts_of(spec)[0], given[""])
        if not float(number).is_integer():
            raise ValueError(f"an action is a number of {spec.num_actions} choices, got {action!r}")
        return np.asarray(number, np.int64)
    idle, values, first = spec.idle_action, [], 0
    for part in parts_of(spec):
        stop = first + part.size
        values += _entries(part, given[part.name]) if part.name in given else idle[first:stop]
        first = stop
    return np.asarray(values, np.float32)


def unflat(spec: ConditionSpec, values: np.ndarray | Sequence[float] | int) -> Any:
    """Turn an id or a vector of actions back into an action of the space, which contains it."""
    return _grown(dict(_by_name(spec, values, _valued)), dict, tuple)


def by_part(spec: ConditionSpec, values: Sequence[float] | int) -> Any:
    """Return an action as JSON says it: numbers, lists and objects by the names of parts."""
    plain = _by_name(spec, values, lambda part, entries: _valued(part, entries).tolist())
    return _grown(dict(plain), dict, list)


def in_names(spec: ConditionSpec, values: Sequence[float] | int) -> Any:
    """Return an action as `by_part` does, but keys and choices that have names by these: those of
    the keys that are held, that of the choice. `flat` takes it back."""

    def leaf(part: ActionPart, entries: np.ndarray) -> Any:
        if part.names and part.space == "MultiBinary":
            held = zip(part.names, entries, strict=True)
            return [name for name, is_held in held if is_held > 0.5]
        if part.names and part.space == "Discrete":
            return part.names[round(float(entries[0]))]
        return _valued(part, entries).tolist()

    return _grown(dict(_by_name(spec, values, leaf)), dict, list)


def _by_name(
    spec: ConditionSpec,
    values: np.ndarray | Sequence[float] | int,
    leaf: Callable[..., Any],
) -> Iterator[tuple[str, Any]]:
    """Yield the name of each part, and what a function makes of its entries."""
    parts = parts_of(spec)
    if spec.num_actions:
        yield parts[0].name, leaf(parts[0], np.asarray(values).reshape(1))
        return
    ends = np.cumsum([part.size for part in parts])[:-1]
    vector = np.asarray(values, np.float32)
    for part, entries in zip(parts, np.split(vector, ends), strict=True):
        yield part.name, leaf(part, entries)


def parts_of(spec: ConditionSpec) -> tuple[ActionPart, ...]:
    """Return what an action consists of: its parts, or that it is an id, or a vector without
    bounds."""
    return spec.action_parts or (_only_part(spec),)


def _only_part(spec: ConditionSpec) -> ActionPart:
    if spec.num_actions:
        return ActionPart(name="", space="Discrete", choices=(spec.num_actions,), dtype="int64")
    return ActionPart(name="", space="Box", shape=(spec.action_dim,))


def _leaves(space: Space[Any], name: str = "") -> Iterator[tuple[str, Space[Any]]]:
    """Yield the parts of a space that no other is part of, with the names that lead to them."""
    if isinstance(space, Dict):
        for key, inner in space.spaces.items():
            if not isinstance(key, str) or not key or "/" in key or key.startswith("["):
                raise ValueError(
                    f"parts of an action need words as names, without / or [, got {key!r}"
                )
            yield from _leaves(inner, f"{name}/{key}" if name else key)
    elif isinstance(space, Tuple):
        for place, inner in enumerate(space.spaces):
            yield from _leaves(inner, f"{name}/[{place}]" if name else f"[{place}]")
    else:
        yield name, space


def _part(name: str, space: Space[Any], names: tuple[str, ...]) -> ActionPart:
    common: dict[str, Any] = {"name": name, "names": names, "dtype": str(space.dtype)}
    if isinstance(space, Discrete):
        start = (int(space.start),) if space.start else ()
        return ActionPart(space="Discrete", choices=(int(space.n),), start=start, **common)
    if isinstance(space, MultiDiscrete):
        start = tuple(int(one) for one in np.ravel(space.start))
        return ActionPart(
            space="MultiDiscrete",
            shape=space.shape,
            choices=tuple(int(num) for num in np.ravel(space.nvec)),
            start=start if any(start) else (),
            **common,
        )
    if isinstance(space, MultiBinary):
        return ActionPart(space="MultiBinary", shape=space.shape, **common)
    if isinstance(space, Box):
        low, high = _bounds(space.low), _bounds(space.high)
        return ActionPart(space="Box", shape=space.shape, low=low, high=high, **common)
    raise ValueError(
        "actions are Discrete, Box, MultiBinary, MultiDiscrete, or Dict or Tuple of these, "
        f"got {space}"
    )


def _bounds(values: np.ndarray) -> tuple[float | None, ...]:
    """Return the bounds of a box entry by entry; empty: there are none."""
    if not np.isfinite(values).any():
        return ()
    return tuple(float(one) if np.isfinite(one) else None for one in np.ravel(values))


def _leaf(part: ActionPart) -> Space[Any]:
    dtype = np.dtype(part.dtype)
    if part.space == "Discrete":
        return Discrete(part.choices[0], start=part.start[0] if part.start else 0, dtype=dtype.type)
    if part.space == "MultiDiscrete":
        choices = np.reshape(part.choices, part.shape)
        start = np.reshape(part.start, part.shape) if part.start else None
        return MultiDiscrete(choices, dtype=dtype.type, start=start)
    if part.space == "MultiBinary":
        return MultiBinary(part.shape[0] if len(part.shape) == 1 else part.shape)
    low, high = (
        np.reshape(np.array(side, np.float64), part.shape).astype(dtype)
        for side in zip(*part.limits, strict=True)
    )
    return Box(low, high, part.shape, dtype.type)


def _grown(leaves: Mapping[str, Any], by_name: type, in_order: type, name: str = "") -> Any:
    """Put leaves together to what they are parts of: `by_name` of a dictionary, `in_order` of a
    tuple."""
    if name in leaves:
        return leaves[name]
    start = f"{name}/" if name else ""
    inner = dict.fromkeys(
        key.removeprefix(start).partition("/")[0] for key in leaves if key.startswith(start)
    )
    grown = {key: _grown(leaves, by_name, in_order, start + key) for key in inner}
    return in_order(grown.values()) if _are_places(inner) else by_name(grown)


def _are_places(names: Iterable[str]) -> bool:
    """Whether names of parts are places in a tuple."""
    return all(name.startswith("[") for name in names)


def _given(spec: ConditionSpec, action: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the parts of an action that are there, by their names."""
    names = [part.name for part in parts_of(spec)]
    if name in names:
        yield name, action
        return
    start = f"{name}/" if name else ""
    inner = {one.removeprefix(start).partition("/")[0] for one in names if one.startswith(start)}
    where = f" of {name}" if name else ""
    if _are_places(inner):
        if isinstance(action, (str, Mapping)) or not hasattr(action, "__len__"):
            raise ValueError(f"an action{where} has {len(inner)} parts, got {action!r}")
        if len(action) != len(inner):
            raise ValueError(f"an action{where} has {len(inner)} parts, got {len(action)}")
        pairs = [(f"[{place}]", one) for place, one in enumerate(action)]
    elif isinstance(action, Mapping):
        pairs = [(str(key), one) for key, one in action.items()]
    else:
        raise ValueError(
            f"an action{where} needs parts by name: {', '.join(sorted(inner))}, got {action!r}"
        )
    for key, one in pairs:
        if key not in inner:
            raise ValueError(
                f"an action{where} has no part {key!r}{did_you_mean(key, inner)}; there are "
                f"{', '.join(sorted(inner))}"
            )
        yield from _given(spec, one, start + key)


def _entries(part: ActionPart, value: Any) -> list[float]:
    """Return the entries of a part, as a vector of actions has them."""
    called = f"part {part.name!r} of an action" if part.name else "an action"
    if part.space == "MultiBinary" and not _is_numbers(value):
        return _held(part, value, called)
    if isinstance(value, str):
        return _place(part, value, called)
    return _numbers(part, value, called)


def _is_numbers(value: Any) -> bool:
    """Whether keys are given as numbers: not by a name, some names, or none of them."""
    if isinstance(value, str):
        return False
    return not isinstance(value, Sequence) or not (
        len(value) == 0 or any(isinstance(one, str) for one in value)
    )


def _held(part: ActionPart, value: Any, called: str) -> list[float]:
    """Return which keys are held, of their names."""
    held = [value] if isinstance(value, str) else list(value)
    for key in held:
        if key not in part.names:
            known = ", ".join(part.names) or "numbers without names"
            hint = did_you_mean(str(key), part.names)
            raise ValueError(f"{called} has no key {key!r}{hint}; its keys are {known}")
    return [float(name in held) for name in part.names] if held else [0.0] * part.size


def _place(part: ActionPart, value: str, called: str) -> list[float]:
    """Return the number of a choice, of its name."""
    if part.space != "Discrete" or value not in part.names:
        hint = did_you_mean(value, part.names)
        raise ValueError(f"{called} knows no {value!r}{hint}; there are {', '.join(part.names)}")
    return [float(part.names.index(value))]


def _numbers(part: ActionPart, value: Any, called: str) -> list[float]:
    try:
        entries = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{called} needs numbers, got {value!r}") from error
    if entries.dtype.kind not in "fiub" or entries.size != part.size:
        shape = list(part.shape) or "one number"
        raise ValueError(f"{called} needs numbers of shape {shape}, got {value!r}")
    found = entries.astype(np.float64).ravel()
    return (found - np.asarray(part.start or 0)).tolist()


def _valued(part: ActionPart, entries: np.ndarray) -> Any:
    """Return a part as its space has it."""
    dtype = np.dtype(part.dtype)
    if part.space == "Box":
        low, high = (np.array(side) for side in zip(*part.limits, strict=True))
        bounded = np.clip(entries.astype(np.float64), low, high)
        bounded = bounded if dtype.kind == "f" else bounded.round()
        return bounded.astype(dtype).reshape(part.shape)
    whole = np.asarray(entries).round().astype(np.int64) + np.asarray(part.start or 0)
    if part.space == "Discrete":
        return dtype.type(whole[0])
    return whole.astype(dtype).reshape(part.shape)
