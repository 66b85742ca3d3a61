"""Dataclasses of settings to JSON and back; unknown and missing fields are refused by name."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

Config = TypeVar("Config")

Precision = Literal["fp32", "bf16"]
"""Arithmetic of the network: all 32 bit, or matrix products in bfloat16. In training the weights
stay 32 bit either way; a stream in bf16 keeps weights and memory in bfloat16 too."""

Threads = int | Literal["auto"]
"""CPU threads: a number, or one that is chosen by what is measured."""

KIND = "kind"
"""Key that names the dataclass where a field may hold one of several."""

ADDED = "added"
"""Key of a field's metadata: files that lack the field mean its default."""


def added(default: Any) -> Any:
    """Declare a field with a default that files may lack."""
    return dataclasses.field(default=default, metadata={ADDED: True})


def at_least(least: int, **values: Any) -> None:
    """Refuse values below a minimum by their names (ValueError); None is not looked at."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")


def check_threads(threads: Threads | None) -> None:
    """Refuse a number of threads below 1 (ValueError)."""
    if isinstance(threads, int) and threads < 1:
        raise ValueError(f"threads must be auto, or 1 or more, got {threads}")


def to_json(config: Any) -> dict[str, Any]:
    """Turn a dataclass of settings into plain JSON values, each dataclass with its `kind`."""
    return {KIND: type(config).__name__} | {
        field.name: _value_to_json(getattr(config, field.name))
        for field in dataclasses.fields(config)
    }


def _value_to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, (tuple, list)):
        return [_value_to_json(entry) for entry in value]
    return value


def from_json(kind: Any, values: Any, where: str = "config") -> Any:
    """Rebuild a dataclass of settings.

    Args:
        kind: the dataclass, or a union of dataclasses of which `kind` names one.
        values: what `to_json` wrote.
        where: name of the place, for errors.

    Raises:
        ValueError: an unknown or missing field, an unknown kind, a value of another type, or a
            value that the dataclass itself refuses.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: needed an object with fields, got {values!r}")
    choices = {choice.__name__: choice for choice in (get_args(kind) or (kind,))}
    name = values.get(KIND, next(iter(choices)) if len(choices) == 1 else None)
    if name not in choices:
        raise ValueError(f"{where}: {KIND} must be one of {sorted(choices)}, got {name!r}")
    chosen = choices[name]
    fields = {field.name: field for field in dataclasses.fields(chosen)}
    unknown = sorted(set(values) - set(fields) - {KIND})
    if unknown:
        raise ValueError(f"{where}: unknown fields {unknown} for {name}; known: {sorted(fields)}")
    values = {
        name: _value_to_json(entry.default)
        for name, entry in fields.items()
        if entry.metadata.get(ADDED)
    } | values
    missing = sorted(set(fields) - set(values))
    if missing:
        raise ValueError(f"{where}: missing fields {missing} for {name}")
    hints = typing.get_type_hints(chosen)
    built = {
        field: _value_from_json(hints[field], values[field], f"{where}.{field}") for field in fields
    }
    try:
        return chosen(**built)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _value_from_json(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _choice_from_json(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)
    if origin is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{where}: must be one of {list(get_args(hint))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: needed a list, got {value!r}")
        entries = get_args(hint)
        inner = [entries[0]] * len(value) if entries[-1] is Ellipsis else list(entries)
        if len(inner) != len(value):
            raise ValueError(f"{where}: needed {len(inner)} entries, got {len(value)}")
        return tuple(
            _value_from_json(one, entry, f"{where}[{index}]")
            for index, (one, entry) in enumerate(zip(inner, value, strict=True))
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}: needed {hint.__name__}, got {value!r}")
    return value


def _choice_from_json(hint: Any, value: Any, where: str) -> Any:
    if value is None and type(None) in get_args(hint):
        return None
    choices = [choice for choice in get_args(hint) if choice is not type(None)]
    if all(dataclasses.is_dataclass(choice) for choice in choices):
        return from_json(Union[tuple(choices)], value, where)  # noqa: UP007
    for choice in choices:
        try:
            return _value_from_json(choice, value, where)
        except ValueError:
            continue
    raise ValueError(f"{where}: needed one of {choices}, got {value!r}")


def differences(theirs: Any, ours: Any, where: str = "") -> list[str]:
    """List the leaves in which two JSON values differ, as "a.b: theirs, ours"."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [
            line
            for key in sorted(set(theirs) | set(ours))
            for line in differences(
                theirs.get(key, "nothing"), ours.get(key, "nothing"), f"{where}{key}."
            )
        ]
    return [] if theirs == ours else [f"{where.removesuffix('.')}: {theirs!r}, {ours!r}"]


def parse_shard(shard: str) -> tuple[int, int]:
    """Read which part of some work is this process's: "3/8" is that after 0/8, 1/8 and 2/8.

    Returns:
        Its number from 0, and how many parts there are.

    Raises:
        ValueError: no such form, or a part beyond the last.
    """
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"shard must be i/n with i in 0 .. n - 1, got {shard!r}")
    return int(number), int(count)
