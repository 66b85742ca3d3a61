"""What a measurement of the probe is made of, and how all are found.

A measurement is one module of scd/probing/measurements/ that defines MEASUREMENT. It is then one of
`scd probe --measurements`, in probe.json and on the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from markupsafe import Markup

from scd.probing.plan import Plan
from scd.probing.settings import PACKAGE, measurement_names
from scd.probing.subject import Progress

DIGITS = 6
"""Digits after the point: more would say nothing, and matrices are long."""

ASIDE = ("pictures", "seconds", "left_out")
"""Keys of a part that do not go into probe.json as they are."""

Entries = dict[str, Any]
"""Plain JSON values by key of probe.json. "pictures" holds what the plots alone need; "left_out",
alone, says why a model does not allow the measurement."""

Parts = Mapping[str, Mapping[str, Any]]
"""What was measured, by name of the measurement."""


def as_measured(part: Mapping[str, Any]) -> Entries:
    return {key: value for key, value in part.items() if key not in ASIDE}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measurement, from a plan to a section of the page."""

    measure: Callable[[Plan, Progress], Entries]
    """What it returns is kept in a file and not measured again."""
    section: Callable[[Mapping[str, Any], Mapping[str, Any]], Markup]
    """From probe.json and its own "pictures" to the section of the page."""
    place: int
    """Sections stand on the page in the order of this number."""
    cards: Callable[[Mapping[str, Any]], Sequence[tuple[str, str]]] = lambda result: ()
    """From probe.json to numbers at the top of the page, each with its words."""
    conclude: Callable[[Plan, Parts], Entries] | None = None
    """From the parts of all measurements to probe.json; None: its own part as it is."""


def find_measurements() -> dict[str, Measurement]:
    return {name: import_module(f"{PACKAGE}.{name}").MEASUREMENT for name in measurement_names()}


def by_layer(numbers: Sequence[int], names: Sequence[str], **values: Any) -> list[Entries]:
    """Return an object for each layer: its number from 1, its name, its row of each array."""
    return [
        {"layer": number, "name": names[number - 1]}
        | {key: plain(rows[place]) for key, rows in values.items()}
        for place, number in enumerate(numbers)
    ]


def plain(values: Any) -> Any:
    return np.round(np.asarray(values, np.float64), DIGITS).tolist()
