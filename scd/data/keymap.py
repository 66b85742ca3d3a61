"""Which keys, mouse, gamepad and touch do what in a world: the map in its card, or one from names.

A control is called as browsers call keys (`KeyW`, `ArrowUp`, `Space`, `Digit1`), or it is a button
of the mouse (`Mouse0`), a button of a gamepad in the standard layout (`Pad0`), or an axis: `MouseX`
and `MouseY` (how far the mouse moves), `PadAxis0` and so on, `StickX` and `StickY` (pulling on the
picture); to the right and down is above 0. Half an axis works as a key: `StickY-` is pulling up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from scd.common.names import did_you_mean, known
from scd.data.actions import parts_of
from scd.data.spaces import ActionPart, ConditionSpec

DIRECTIONS = {
    "up": ("forward", "up", "north", "gas", "accelerate", "throttle", "jump"),
    "left": ("left", "west"),
    "down": ("back", "backward", "down", "south", "brake"),
    "right": ("right", "east"),
}
"""Words in the name of an action by which a direction's keys mean it; the first that a world
has."""

IDLE = ("none", "noop", "idle", "nothing", "stay", "wait", "still", "stop")
"""Names of the action that is done while no key is held."""

RESERVED = (
    "Comma", "Period", "Slash", "KeyF", "KeyP", "KeyR", "KeyV", "Enter", "Escape", "Tab",
    "ControlLeft", "ControlRight", "AltLeft", "AltRight", "MetaLeft", "MetaRight",
)  # fmt: skip
"""Keys of the page and of the browser, which steer nothing. The space bar is the page's only where
no map has it."""

WAYS = {
    "up": ("KeyW", "ArrowUp", "StickY-", "Pad12", "PadAxis1-"),
    "left": ("KeyA", "ArrowLeft", "StickX-", "Pad14", "PadAxis0-"),
    "down": ("KeyS", "ArrowDown", "StickY+", "Pad13", "PadAxis1+"),
    "right": ("KeyD", "ArrowRight", "StickX+", "Pad15", "PadAxis0+"),
}
"""Controls of each direction."""

LETTERS = {"w": "up", "a": "left", "s": "down", "d": "right"}

VERBS = {
    ("jump",): ("Space", "Pad0"),
    ("fire", "attack", "shoot", "hit"): ("Mouse0", "KeyX", "Pad7"),
    ("aim", "zoom"): ("Mouse2", "KeyZ", "Pad6"),
    ("use", "interact", "open", "do", "toggle"): ("KeyE", "Pad2"),
    ("run", "sprint", "speed", "shift", "walk"): ("ShiftLeft", "Pad10"),
    ("crouch", "duck", "sneak"): ("KeyC", "Pad1"),
    ("pickup", "pick", "take", "grab"): ("KeyG", "Pad3"),
    ("drop",): ("KeyQ", "Pad8"),
    ("space",): ("Space", "Pad0"),
    ("click", "lmb"): ("Mouse0", "Pad7"),
    ("rmb",): ("Mouse2", "Pad6"),
}
"""Controls of what actions are often called."""

PAIRS = (
    (("KeyA", "ArrowLeft"), ("KeyD", "ArrowRight"), ("StickX", "PadAxis0")),
    (("KeyS", "ArrowDown"), ("KeyW", "ArrowUp"), ("StickY", "PadAxis1")),
    (("KeyJ",), ("KeyL",), ("PadAxis2",)),
    (("KeyK",), ("KeyI",), ("PadAxis3",)),
    (("KeyQ",), ("KeyE",), ()),
    (("KeyZ",), ("KeyX",), ()),
)
"""Of the entries of a box in turn: keys that lower it, keys that raise it, axes."""

PEDALS = (("KeyW", "ArrowUp", "Pad7"), ("KeyS", "ArrowDown", "Pad6"), ("KeyQ",), ("KeyE",))
"""Of entries that are never below 0, in turn, as gas and brake."""

LOOKS = {"mouse", "look", "camera", "view", "aim", "yaw", "pitch"}
"""Words in the name of a box of two entries that say that a mouse moves it."""

PIXELS = 50
"""How far the mouse moves during a frame to reach the greatest value."""

CONTROL = re.compile(r"(StickX|StickY|PadAxis\d\d?)[+-]?|[A-Z][A-Za-z0-9]{0,31}")
AXIS = re.compile(r"MouseX|MouseY|StickX|StickY|PadAxis\d\d?")


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What one control does; the same control may do several things."""

    control: str
    """Key, button or axis."""
    part: str = ""
    """Part of the action that it changes, by its name; empty: the action has no other."""
    entry: int = 0
    """Entry of the part."""
    value: float = 1.0
    """What the entry is while a key is held: the number of a choice, 1, a value of a box. Of an
    axis: at full deflection, of the mouse per pixel."""

    @property
    def is_axis(self) -> bool:
        """Whether it says how far, not only whether."""
        return AXIS.fullmatch(self.control) is not None


KeyMap = tuple[Binding, ...]
"""What all controls of a world do."""


def check_key_map(key_map: Iterable[Binding], spec: ConditionSpec, names: Sequence[str]) -> None:
    """Refuse a map that binds what a world's actions do not have (ValueError).

    Args:
        key_map: the map.
        spec: of the actions.
        names: of the actions, as the world's card has them.
    """
    for one in key_map:
        if CONTROL.fullmatch(one.control) is None:
            raise ValueError(
                f"{one.control!r} is no control: needed a key such as KeyW, ArrowUp or Space, "
                "Mouse0, Pad0, or an axis such as MouseX, PadAxis0 or StickX"
            )
        if one.control in RESERVED:
            raise ValueError(f"{one.control} is a key of the page or the browser; bind another one")
        if not spec.has_actions:
            raise ValueError(f"{one.control} is bound, but no actions steer this world")
        parts = {part.name: part for part in parts_of(spec)}
        part = parts[known(one.part, "part of an action", parts)]
        if not 0 <= one.entry < part.size:
            there = ", ".join(_entry_names(part, names))
            raise ValueError(
                f"{one.control} is bound to entry {one.entry} of {_called(part)}, whose entries "
                f"are 0 .. {part.size - 1}: {there}"
            )
        _check_value(one, part)


def _check_value(one: Binding, part: ActionPart) -> None:
    low, high = part.limits[one.entry]
    if one.is_axis:
        if part.space != "Box":
            raise ValueError(
                f"{one.control} says how far, but {_called(part)} is {part.space}: bind keys, or "
                f"half an axis such as StickX+"
            )
        if not math.isfinite(one.value) or not one.value:
            raise ValueError(f"{one.control} needs a value that is not 0, got {one.value:g}")
    elif not low <= one.value <= high or not math.isfinite(one.value):
        raise ValueError(
            f"{one.control} gives entry {one.entry} of {_called(part)} the value {one.value:g}, "
            f"needed one in {low:g} .. {high:g}"
        )
    elif part.space != "Box" and one.value != round(one.value):
        raise ValueError(f"{one.control} gives {_called(part)} {one.value:g}: needed a number")


def _called(part: ActionPart) -> str:
    return f"part {part.name!r}" if part.name else "the action"


def read_key_map(words: Sequence[str], spec: ConditionSpec, names: Sequence[str]) -> KeyMap:
    """Read a map such as `KeyW=forward KeyA=steering:-1 MouseX=mouse_x:0.02`.

    Args:
        words: each CONTROL=NAME or CONTROL=NAME:VALUE, NAME of a choice, a key or an entry.
        spec: of the actions.
        names: of the actions.

    Raises:
        ValueError: a name that these actions do not have; says those there are.
    """
    targets = {name: (part, entry, value) for part, entry, value, name in _targets(spec, names)}
    bindings = []
    for word in words:
        control, equals, target = word.partition("=")
        if not equals:
            raise ValueError(f"a key map needs CONTROL=NAME or CONTROL=NAME:VALUE, got {word!r}")
        name, value = target, ""
        if target not in targets:
            name, _, value = target.rpartition(":")
            name, value = (name, value) if name in targets else (target, "")
        if name not in targets:
            raise ValueError(
                f"{word}: the actions have no {name!r}{did_you_mean(name, targets)}; there are "
                f"{', '.join(targets)}"
            )
        part, entry, usual = targets[name]
        try:
            amount = float(value or usual)
        except ValueError:
            raise ValueError(f"{word}: needed a number after the colon, got {value!r}") from None
        bindings.append(Binding(control=control, part=part, entry=entry, value=amount))
    check_key_map(bindings, spec, names)
    return tuple(bindings)


def _targets(spec: ConditionSpec, names: Sequence[str]) -> Iterator[tuple[str, int, float, str]]:
    """Yield what can be bound: part, entry, value, name."""
    for part in parts_of(spec) if spec.has_actions else ():
        if part.space == "Discrete":
            for number, name in enumerate(_choice_names(part, names)):
                yield part.name, 0, float(number), name
        else:
            for entry, name in enumerate(_entry_names(part, names)):
                yield part.name, entry, 1.0 if part.space != "Box" else _ends(part, entry)[1], name


def _choice_names(part: ActionPart, names: Sequence[str]) -> Sequence[str]:
    given = part.names or (() if part.name else names)
    return given or tuple(f"{part.name} {number}".strip() for number in range(part.choices[0]))


def _entry_names(part: ActionPart, names: Sequence[str]) -> Sequence[str]:
    return part.entry_names if part.name or part.names or not names else names


def _ends(part: ActionPart, entry: int) -> tuple[float, float]:
    """Return the least and greatest value that keys give an entry of a box: -1 and 1 where it has
    no bounds."""
    low, high = part.limits[entry]
    return (low if math.isfinite(low) else min(-1.0, high)), (
        high if math.isfinite(high) else max(1.0, low)
    )


def derive_key_map(spec: ConditionSpec, names: Sequence[str]) -> KeyMap:
    """Make a map from the names of actions: WASD, arrows, stick and gamepad for directions, keys
    that games often have for what else has a name, digits for the rest.

    Each control does one thing; parts that a mouse moves come first.
    """
    if not spec.has_actions:
        return ()
    parts = parts_of(spec)
    looks = [part for part in parts if _looks(part, names)]
    found: dict[str, Binding] = {}
    for part in [*looks, *(part for part in parts if part not in looks)]:
        if part in looks:
            wanted = _look(part)
        elif part.space == "Box":
            wanted = _box(part)
        else:
            wanted = _choices(part, names, bool(looks))
        for one in wanted:
            axis = one.control.rstrip("+-")
            if found.keys().isdisjoint(
                {one.control, axis, f"{axis}-", f"{axis}+"} if one.is_axis else {one.control, axis}
            ):
                found[one.control] = one
    digits = (f"Digit{digit}" for digit in range(1, 10) if f"Digit{digit}" not in found)
    for part in parts:
        if part.space == "Box":
            continue
        bound = {(one.entry, one.value) for one in found.values() if one.part == part.name}
        for entry, value, name in _items(part, names):
            # Of the one choice that a world has, each has the digit of its place.
            if spec.num_actions or ((entry, value) not in bound and _plain(name) not in IDLE):
                digit = next(digits, None)
                if digit is not None:
                    found[digit] = Binding(control=digit, part=part.name, entry=entry, value=value)
    return tuple(found.values())


def _looks(part: ActionPart, names: Sequence[str]) -> bool:
    words = " ".join((part.name, *_entry_names(part, names))).lower()
    return (
        part.space == "Box" and part.size == 2 and not LOOKS.isdisjoint(re.split(r"[\W_]+", words))
    )


def _look(part: ActionPart) -> Iterator[Binding]:
    """Mouse, right stick, arrows and the picture for a part that turns a view."""
    keys = (("ArrowLeft", "ArrowRight"), ("ArrowUp", "ArrowDown"))
    for entry, axis in enumerate("XY"):
        low, high = _ends(part, entry)
        value = high or low
        common = {"part": part.name, "entry": entry}
        yield Binding(control=f"Mouse{axis}", value=value / PIXELS, **common)
        yield Binding(control=f"Stick{axis}", value=value, **common)
        yield Binding(control=f"PadAxis{2 + entry}", value=value, **common)
        for control, end in zip(keys[entry], (low, high), strict=True):
            yield Binding(control=control, value=end, **common)


def _box(part: ActionPart) -> Iterator[Binding]:
    pairs, pedals = iter(PAIRS), iter(PEDALS)
    for entry in range(part.size):
        low, high = _ends(part, entry)
        common = {"part": part.name, "entry": entry}
        if low >= 0:
            for control in next(pedals, ()):
                yield Binding(control=control, value=high, **common)
            continue
        lowers, raises, axes = next(pairs, ((), (), ()))
        yield from (Binding(control=one, value=low, **common) for one in lowers)
        yield from (Binding(control=one, value=high, **common) for one in raises)
        for axis in axes:
            # Up is below 0 on a stick, and above it for whoever drives or walks.
            sign = -1 if axis in ("StickY", "PadAxis1", "PadAxis3") else 1
            yield Binding(control=axis, value=sign * (high or -low), **common)


def _items(part: ActionPart, names: Sequence[str]) -> list[tuple[int, float, str]]:
    """Return what keys can do in a part: entry, value, name."""
    if part.space == "Discrete":
        return [(0, float(one), name) for one, name in enumerate(_choice_names(part, names))]
    if part.space == "MultiBinary":
        return [(entry, 1.0, name) for entry, name in enumerate(_entry_names(part, names))]
    return [
        (entry, float(choice), f"{name} {choice}")
        for entry, name in enumerate(_entry_names(part, names))
        for choice in range(1, part.choices[entry])
    ]


def _plain(name: str) -> str:
    return re.sub(r"[\s-]", "_", name.lower()).removeprefix("key_")


def _choices(part: ActionPart, names: Sequence[str], has_mouse: bool) -> Iterator[Binding]:
    """Keys for the choices of a part, or for its keys, by their names."""
    items = _items(part, names)
    plain = [_plain(name) for _, _, name in items]
    ways = _ways(plain)
    for place, (entry, value, _) in enumerate(items):
        for control in _controls(plain[place], ways.get(place), has_mouse):
            yield Binding(control=control, part=part.name, entry=entry, value=value)


def _ways(plain: list[str]) -> dict[int, str]:
    """Return which names are directions: exactly, else by a word in them; each way once."""
    found: dict[int, str] = {}
    if {"w", "s"} <= {*plain}:
        return {place: LETTERS[name] for place, name in enumerate(plain) if name in LETTERS}
    for way, words in DIRECTIONS.items():
        places = [place for place in range(len(plain)) if place not in found]
        exact = [place for word in words for place in places if plain[place] == word]
        near = [place for place in places if not {*words}.isdisjoint(plain[place].split("_"))]
        for place in (exact or near)[:1]:
            found[place] = way
    return found


def _controls(name: str, way: str | None, has_mouse: bool) -> tuple[str, ...]:
    if way is not None:
        return WAYS[way]
    if len(name) == 1 and name.isalnum() and name.isascii():
        code = f"Digit{name}" if name.isdigit() else f"Key{name.upper()}"
        return () if code in RESERVED else (code,)
    if name in IDLE:
        return ()
    words = {*name.split("_")}
    found = next((controls for verbs, controls in VERBS.items() if words & {*verbs}), ())
    # Without a look by the mouse, its button on the picture is for pulling.
    return tuple(one for one in found if has_mouse or not one.startswith("Mouse"))
