"""Settings to JSON and back."""

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from scd.common.config import added, at_least, from_json, refuse_non_finite, shown, to_json


@dataclass(frozen=True, kw_only=True)
class Wheel:
    size: int = 3

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be 1 or more, got {self.size}")


@dataclass(frozen=True, kw_only=True)
class Wing:
    span: float = 1.5


@dataclass(frozen=True, kw_only=True)
class Vehicle:
    name: str
    part: Wheel | Wing = field(default_factory=Wheel)
    axes: tuple[int, int] = (1, 2)
    marks: tuple[str, ...] = ()
    colour: Literal["red", "blue"] = "red"
    load: float | None = None
    fast: bool = False


FULL = Vehicle(name="kite", part=Wing(span=2.0), marks=("a", "b"), load=0.1, fast=True)


@pytest.mark.parametrize("vehicle", [FULL, Vehicle(name="cart")])
def test_round_trip_through_text_is_exact(vehicle):
    assert from_json(Vehicle, json.loads(json.dumps(to_json(vehicle)))) == vehicle


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 3}, "unknown fields.*speed"),
        ({"part": {"kind": "Wing", "span": 1.0, "feathers": 9}}, "config.part.*feathers"),
        ({"part": {"kind": "Sail"}}, "Wheel.*Wing.*Sail"),
        ({"part": {"kind": "Wheel", "size": 0}}, "config.part: size must be 1 or more, got 0"),
        ({"part": {"kind": "Wheel"}}, "missing fields.*size"),
        ({"axes": [1, 2, 3]}, "config.axes: needed 2 entries, got 3"),
        ({"axes": [1, "two"]}, r"config.axes\[1\]: needed int, got 'two'"),
        ({"colour": "green"}, "config.colour.*red.*blue.*green"),
        ({"fast": 1}, "config.fast: needed bool, got 1"),
        ({"name": 7}, "config.name: needed str, got 7"),
        ({"load": "heavy"}, "config.load: needed float, got 'heavy'"),
        ({"load": float("nan")}, "config.load: needed a finite number, got nan"),
        ({"part": {"kind": "Wheel", "size": 10**400}}, "config.part.size: needed a number of 64"),
        ({"load": -(10**400)}, "config.load: needed a number of 64 bits at most, got -1000"),
        ({"name": "a\0b"}, "config.name: needed text"),
        ({"name": "\ud800"}, "config.name: needed text"),
        ({"colour": ["red"]}, "config.colour: must be one of"),
        ({"part": {"kind": ["Wheel"]}}, "config.part: kind must be one of"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        from_json(Vehicle, to_json(FULL) | change)


def test_missing_field_is_refused_even_if_it_has_a_default():
    values = to_json(FULL)
    del values["marks"]
    with pytest.raises(ValueError, match="missing fields.*marks"):
        from_json(Vehicle, values)


def test_a_field_that_came_later_may_lack_and_any_other_not():
    @dataclass(frozen=True, kw_only=True)
    class Boat:
        length: float
        sails: int = added(1)
        wing: Wing | None = added(None)

    assert from_json(Boat, {"kind": "Boat", "length": 4.0}) == Boat(length=4.0)
    boat = Boat(length=4.0, sails=2, wing=Wing(span=3.0))
    assert from_json(Boat, json.loads(json.dumps(to_json(boat)))) == boat
    with pytest.raises(ValueError, match="missing fields.*length"):
        from_json(Boat, {"kind": "Boat", "sails": 2})


def test_whole_numbers_serve_as_floats_and_truth_values_do_not():
    assert from_json(Wing, {"kind": "Wing", "span": 2}) == Wing(span=2.0)
    with pytest.raises(ValueError, match="needed float, got True"):
        from_json(Wing, {"kind": "Wing", "span": True})


def test_something_else_than_an_object_is_refused():
    with pytest.raises(ValueError, match=r"config: needed an object.*\[1\]"):
        from_json(Vehicle, [1])


def test_a_message_shows_only_the_ends_of_a_long_value():
    with pytest.raises(ValueError, match=r"config: needed an object") as refused:
        from_json(Vehicle, [1] * 10_000)
    assert len(str(refused.value)) < 200
    long = "x" * 500 + "the end"
    assert len(shown(long)) == 80 and shown(long).endswith("the end'") and shown(7) == "7"


def test_what_is_not_finite_is_refused_by_its_place():
    refuse_non_finite(FULL)
    with pytest.raises(ValueError, match="load must be a finite number, got nan"):
        refuse_non_finite(Vehicle(name="kite", load=float("nan")))
    with pytest.raises(ValueError, match="part.span must be a finite number, got inf"):
        refuse_non_finite(Vehicle(name="kite", part=Wing(span=float("inf"))))


def test_a_number_below_its_minimum_is_refused_by_name():
    at_least(1, size=1, steps=None)
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        at_least(1, size=2, steps=0)
    with pytest.raises(ValueError, match="rate must be 0 or more, got nan"):
        at_least(0, rate=float("nan"))
