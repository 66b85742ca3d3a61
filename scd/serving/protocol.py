"""Messages between a client and the server, version 1: dataclasses <-> JSON, and binary frames.

docs/serving.md is the page that explains them. A text message is one JSON object whose `type` names
the dataclass; a binary message, only ever from the server, is the length of a JSON header as four
little-endian bytes, the header, and the payload.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from scd.serving.client_messages import Count, FromClient
from scd.serving.server_messages import FromServer, Header

VERSION = 1
"""Of the protocol; raised when an older client could misunderstand a message."""

CLOSE_CODES = {
    "too_large": 1009,
    "fault": 1011,
    "bad_message": 4000,
    "wrong_version": 4001,
    "unauthorised": 4003,
    "too_many_errors": 4004,
    "too_late": 4008,
    "too_many_messages": 4009,
    "too_slow": 4010,
    "too_many_connections": 4013,
    "model_stopped": 4500,
}
"""Codes with which a WebSocket is closed, by the code of the error that says why."""


class ProtocolError(ValueError):
    """A message or a request that cannot be obeyed."""

    def __init__(
        self, code: str, message: str, fatal: bool = False, request: int | None = None
    ) -> None:
        """Say what was needed and what came.

        Args:
            code: short name for machines.
            message: one sentence for people.
            fatal: whether the connection ends with it.
            request: number of the message that is refused, where it had one.
        """
        super().__init__(message)
        self.code, self.fatal, self.request = code, fatal, request


_CLIENT = TypeAdapter(Annotated[FromClient, Field(discriminator="type")])
_SERVER = TypeAdapter(Annotated[FromServer, Field(discriminator="type")])
_REQUEST = TypeAdapter(TypedDict("Request", {"request": NotRequired[Count]}))
_HEADER = TypeAdapter(Annotated[Header, Field(discriminator="type")])


def read_client(text: str | bytes) -> FromClient:
    """Read a message of a client.

    Raises:
        ProtocolError: bad_message (fatal), unknown_type, or unknown_field or bad_field with the
            field's name.
    """
    try:
        return _CLIENT.validate_json(text)
    except ValidationError as error:
        raise _refused(error, _request(text)) from None


def read_server(text: str | bytes) -> FromServer:
    """Read a text message of the server (ProtocolError as `read_client`)."""
    try:
        return _SERVER.validate_json(text)
    except ValidationError as error:
        raise _refused(error) from None


def write(message: Any) -> str:
    """Write any message as one JSON object."""
    return json.dumps(asdict(message), separators=(",", ":"), allow_nan=False)


def pack(header: Header, payload: bytes) -> bytes:
    """Join a header and its payload to a binary message."""
    text = write(header).encode()
    return len(text).to_bytes(4, "little") + text + payload


def unpack(data: bytes) -> tuple[Header, bytes]:
    """Split a binary message.

    Raises:
        ProtocolError: it is cut off, or its header is not one of ours.
    """
    end = 4 + int.from_bytes(data[:4], "little")
    if len(data) < 4 or len(data) < end:
        raise ProtocolError("bad_message", f"needed {end} bytes of header, got {len(data)}", True)
    try:
        return _HEADER.validate_json(data[4:end]), data[end:]
    except ValidationError as error:
        raise _refused(error) from None


def read_fields(kind: Any, text: bytes) -> Any:
    """Read the JSON body of an HTTP request as one of the dataclasses; no body: all defaults.

    Raises:
        ProtocolError: bad_message, unknown_field or bad_field.
    """
    try:
        return TypeAdapter(kind).validate_json(text or b"{}")
    except ValidationError as error:
        raise _refused(error) from None


def _request(text: str | bytes) -> int | None:
    """Return the number that a refused message had, if it can be read."""
    try:
        return _REQUEST.validate_json(text, strict=True).get("request")
    except ValidationError:
        return None


def _refused(error: ValidationError, request: int | None = None) -> ProtocolError:
    first = error.errors(include_url=False, include_input=False, include_context=True)[0]
    kind, says = first["type"], first["msg"]
    where = ".".join(str(part) for part in first["loc"])
    if kind == "json_invalid" or (not where and not kind.startswith("union_tag")):
        code, fatal, message = "bad_message", True, f"a message is one JSON object: {says}"
    elif kind.startswith("union_tag"):
        context = first.get("ctx", {})
        tag = str(context["tag"])[:40] if "tag" in context else None
        code, fatal, message = "unknown_type", False, "a message needs a type"
        if tag is not None:
            message = f"unknown type {tag!r}; there are {context['expected_tags']}"
    elif kind == "unexpected_keyword_argument":
        code, fatal, message = "unknown_field", False, f"no such field: {where}"
    else:
        code, fatal, message = "bad_field", False, f"{where}: {says}"
    return ProtocolError(code, message[:400], fatal, request)
