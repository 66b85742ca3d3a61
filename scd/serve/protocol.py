"""Messages between a client and the server, version 1: dataclasses <-> JSON, and binary frames.

docs/serving.md is the page that explains them. A text message is one JSON object whose `type` names
the dataclass; a binary message, only ever from the server, is the length of a JSON header as four
little-endian bytes, the header, and the payload.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from scd.serve.client_messages import FromClient
from scd.serve.server_messages import FromServer, Header

VERSION = 1
"""Of the protocol; raised when an older client could misunderstand a message."""

CLOSE_CODES = {
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

    def __init__(self, code: str, message: str, fatal: bool = False) -> None:
        """Say what was needed and what came.

        Args:
            code: short name for machines.
            message: one sentence for people.
            fatal: whether the connection ends with it.
        """
        super().__init__(message)
        self.code, self.fatal = code, fatal


_CLIENT = TypeAdapter(Annotated[FromClient, Field(discriminator="type")])
_SERVER = TypeAdapter(Annotated[FromServer, Field(discriminator="type")])
_HEADER = TypeAdapter(Annotated[Header, Field(discriminator="type")])


def read_client(text: str | bytes) -> FromClient:
    """Read a message of a client.

    Raises:
        ProtocolError: bad_json (fatal), unknown_type, or bad_field with the field's name.
    """
    try:
        return _CLIENT.validate_json(text)
    except ValidationError as error:
        raise _refused(error) from None


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


def _refused(error: ValidationError) -> ProtocolError:
    first = error.errors(include_url=False, include_input=False, include_context=True)[0]
    kind, says = first["type"], first["msg"]
    where = ".".join(str(part) for part in first["loc"])
    if kind in ("json_invalid", "json_type") or not where and not kind.startswith("union_tag"):
        return ProtocolError("bad_message", f"a message is one JSON object: {says}", fatal=True)
    if kind.startswith("union_tag"):
        context = first.get("ctx", {})
        if "tag" not in context:
            return ProtocolError("unknown_type", "a message needs a type")
        tag, known = str(context["tag"])[:40], context["expected_tags"]
        return ProtocolError("unknown_type", f"unknown type {tag!r}; there are {known}")
    if kind == "unexpected_keyword_argument":
        return ProtocolError("unknown_field", f"no such field: {where}"[:400])
    return ProtocolError("bad_field", f"{where}: {says}"[:400])
