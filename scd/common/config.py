"""Dataclasses of settings to JSON and back; unknown and missing fields are refused by name."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

Config = TypeVar("Config")

Precision = Literal["fp32", "bf16"]
"""Arithmetic of the network: all 32 bit, or matrix products in bfloat16. In training the weights
stay 32 bit either way; a stream in bf16 keeps weights and memory in bfloat16 too."""

PrecisionChoice = Literal["auto", "fp32", "bf16"]
"""A precision, or auto: bf16 where the device has instructions for it, else fp32."""

StreamPrecision = Literal["fp32", "bf16", "int8", "fp8"]
"""Arithmetic of a stream: a precision, or int8 or fp8: weights of the blocks of a Wan model, and
keys and values of its past, in 8 bits, all else in bfloat16; products of whole numbers (CPUs) or of
floating-point ones (GPUs)."""

IN_8_BITS = ("int8", "fp8")
"""Precisions that only Wan models have, by the fast engine."""

StreamPrecisionChoice = Literal["auto", "fp32", "bf16", "int8", "fp8"]
"""The same, or auto: bf16 where the device has instructions for it, else fp32."""

Threads = int | Literal["auto"]
"""CPU threads: a number, or one that is chosen by what is measured."""

KIND = "kind"
"""Key that names the dataclass where a field may hold one of several."""

ADDED, UNWRITTEN = "added", "unwritten"
"""Keys of a field's metadata: files that lack the field mean its default; and the default is not
written either."""

LARGEST = 2**63 - 1
"""Number above which no setting lies: tensors and files count in 64 bits."""

MAX_SIZE = 2**16
"""Largest width, number of channels or rows, ... of a model: above what any has, and small enough
that a damaged file is refused before anything of its size is made."""

MAX_LAYERS = 1000
"""Largest number of blocks of a model, for the same reason."""

MAX_STEPS = 10_000
"""Largest number of denoising steps of a frame: ten times what any schedule is defined for."""

LONGEST = 80
"""Characters of a value that a message shows."""


def added(default: Any, unwritten: bool = False) -> Any:
    """Declare a field with a default that files may lack.

    Args:
        default: of the field.
        unwritten: leave it out of what is written while it has its default, so that this equals
            what was written, and is compared, before there was the field.
    """
    return dataclasses.field(default=default, metadata={ADDED: True, UNWRITTEN: unwritten})


def within(least: int | float, most: int | float, **values: Any) -> None:
    """Refuse values outside a range, or not finite, by their names (ValueError)."""
    for name, value in values.items():
        if not least <= value <= most:
            bound = f"{most} at most" if value > most else f"{least} or more"
            raise ValueError(f"{name} must be {bound}, got {shown(value)}")


def at_least(least: int, **values: Any) -> None:
    """Refuse values below a minimum by their names (ValueError); None is not looked at."""
    for name, value in values.items():
        # Written so that NaN is refused too.
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be {least} or more, got {value}")


def refuse_non_finite(settings: Any, where: str = "") -> None:
    """Refuse NaN and infinity anywhere in settings, by the name of the field (ValueError)."""
    if dataclasses.is_dataclass(settings):
        for field in dataclasses.fields(settings):
            refuse_non_finite(getattr(settings, field.name), f"{where}.{field.name}".strip("."))
    elif isinstance(settings, (tuple, list)):
        for value in settings:
            refuse_non_finite(value, where)
    elif isinstance(settings, float) and not math.isfinite(settings):
        raise ValueError(f"{where} must be a finite number, got {settings}")


def check_threads(threads: Threads | None) -> None:
    """Refuse a number of threads below 1 (ValueError)."""
    if isinstance(threads, int) and threads < 1:
        raise ValueError(f"threads must be auto, or 1 or more, got {threads}")


def shown(value: Any) -> str:
    """Return a value as a message shows it: beginning and end, if it is long."""
    text, end = repr(value), LONGEST // 3
    # Paths differ at their ends.
    return text if len(text) <= LONGEST else f"{text[: LONGEST - end - 5]} ... {text[-end:]}"


def to_json(config: Any) -> dict[str, Any]:
    """Turn a dataclass of settings into plain JSON values, each dataclass with its `kind`."""
    values = [(field, getattr(config, field.name)) for field in dataclasses.fields(config)]
    return {KIND: type(config).__name__} | {
        field.name: _value_to_json(value)
        for field, value in values
        if not (field.metadata.get(UNWRITTEN) and value == field.default)
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
        raise ValueError(f"{where}: needed an object with fields, got {shown(values)}")
    choices = {choice.__name__: choice for choice in (get_args(kind) or (kind,))}
    name = values.get(KIND, next(iter(choices)) if len(choices) == 1 else None)
    if not isinstance(name, str) or name not in choices:
        raise ValueError(f"{where}: {KIND} must be one of {sorted(choices)}, got {shown(name)}")
    chosen = choices[name]
    fields = {field.name: field for field in dataclasses.fields(chosen)}
    unknown = sorted(set(values) - set(fields) - {KIND})
    if unknown:
        raise ValueError(
            f"{where}: unknown fields {shown(unknown)} for {name}; known: {sorted(fields)}"
        )
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
        # By type too: True would be 1.
        if not any(value == one and type(value) is type(one) for one in get_args(hint)):
            raise ValueError(f"{where}: must be one of {list(get_args(hint))}, got {shown(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: needed a list, got {shown(value)}")
        entries = get_args(hint)
        inner = [entries[0]] * len(value) if entries[-1] is Ellipsis else list(entries)
        if len(inner) != len(value):
            raise ValueError(f"{where}: needed {len(inner)} entries, got {len(value)}")
        return tuple(
            _value_from_json(one, entry, f"{where}[{index}]")
            for index, (one, entry) in enumerate(zip(inner, value, strict=True))
        )
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole and abs(value) > LARGEST:
        raise ValueError(f"{where}: needed a number of 64 bits at most, got {shown(value)}")
    if hint is float and is_whole:
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}: needed {hint.__name__}, got {shown(value)}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{where}: needed a finite number, got {value}")
    if isinstance(value, str) and not is_text(value):
        raise ValueError(f"{where}: needed text, got {shown(value)}")
    return value


def is_text(value: str) -> bool:
    """Tell whether a text can be written and be part of a path: no half characters, no NUL."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _choice_from_json(hint: Any, value: Any, where: str) -> Any:
    if value is None and type(None) in get_args(hint):
        return None
    choices = [choice for choice in get_args(hint) if choice is not type(None)]
    if all(dataclasses.is_dataclass(choice) for choice in choices):
        return from_json(Union[tuple(choices)], value, where)  # noqa: UP007
    if len(choices) == 1:
        return _value_from_json(choices[0], value, where)
    for choice in choices:
        try:
            return _value_from_json(choice, value, where)
        except ValueError:
            continue
    names = [getattr(choice, "__name__", str(choice)) for choice in choices]
    raise ValueError(f"{where}: needed one of {names}, got {shown(value)}")


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
    return [] if theirs == ours else [f"{where.removesuffix('.')}: {shown(theirs)}, {shown(ours)}"]


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
