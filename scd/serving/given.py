"""Numbers and actions in messages: the forms in which they are given, and no others."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, JsonValue, Tag

SAFE = 2**53 - 1
"""Largest integer of a message: the largest that JavaScript counts to without a gap."""

Count = Annotated[int, Field(ge=0, le=SAFE)]
"""A whole number from 0 on."""
ActionValue = Count | Annotated[tuple[float, ...], Field(min_length=1, max_length=1024)]
"""An action: its number in the world's list, or a vector where the world wants vectors."""


def _form(given: Any) -> str | None:
    """Return how an action is given: by a number, a vector, or by parts; None: in no such way."""
    if isinstance(given, (list, tuple)):
        return "vector" if all(isinstance(one, (int, float)) for one in given) else "places"
    if isinstance(given, dict):
        return "parts"
    return "number" if isinstance(given, (int, float)) else None


GivenAction = Annotated[
    Annotated[Count, Tag("number")]
    | Annotated[tuple[float, ...], Field(min_length=1, max_length=1024), Tag("vector")]
    | Annotated[dict[str, JsonValue], Tag("parts")]
    | Annotated[tuple[JsonValue, ...], Field(max_length=1024), Tag("places")],
    Discriminator(
        _form,
        custom_error_type="action_form",
        custom_error_message="needed a number, a list of numbers, or parts by name or place",
    ),
]
"""The same from a client, who may also give the parts of an action by their names or places."""
