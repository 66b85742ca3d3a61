"""The wire protocol: messages as bytes and back, what is refused and how, and the close codes.

docs/serving.md is the page that explains it. A text message is one JSON object whose `type` names
its class; a binary message, only ever from the server, is the length of a JSON header as four
little-endian bytes, the header, and the payload.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, NotRequired, TypeVar, Union

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from scd.serving.messages import (
    SPOKEN,
    Command,
    Count,
    Error,
    FromServer,
    Header,
    Message,
    ServeError,
)

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


Said = TypeVar("Said", bound=Command)

STATUS = {
    "unauthorised": 401,
    "forbidden_origin": 403,
    "unknown_session": 404,
    "unknown_upload": 404,
    "unknown_world": 404,
    "unknown_path": 404,
    "session_busy": 409,
    "superseded": 409,
    "too_late": 408,
    "out_of_history": 409,
    "session_stopped": 410,
    "too_large": 413,
    "not_media": 415,
    "wrong_host": 421,
    "too_many_requests": 429,
    "too_many_uploads": 429,
    "fault": 500,
    "too_many_sessions": 503,
    "overloaded": 503,
    "model_stopped": 503,
}
"""HTTP status by the code of an error; others are 400."""


def error_json(error: ServeError) -> tuple[int, bytes]:
    """Return the status and the body of an answer that refuses."""
    body = {"error": {"code": error.code, "message": str(error)}}
    return STATUS.get(error.code, 400), json.dumps(body).encode()


_CLIENT: TypeAdapter[Any] = TypeAdapter(
    Annotated[Union[SPOKEN], Field(discriminator="type")]  # type: ignore  # noqa: UP007
)
_SERVER = TypeAdapter(Annotated[FromServer, Field(discriminator="type")])
_HEADER = TypeAdapter(Annotated[Header, Field(discriminator="type")])
_REQUEST = TypeAdapter(TypedDict("Request", {"request": NotRequired[Count]}))


def read_client(text: str | bytes) -> Command:
    """Read a message of a client.

    Raises:
        ServeError: bad_message (fatal), unknown_type, or unknown_field or bad_field with the
            field's name.
    """
    try:
        return _CLIENT.validate_json(text)
    except ValidationError as error:
        raise refused(error, _request(text)) from None


def read_server(text: str | bytes) -> FromServer:
    """Read a text message of the server (ServeError as `read_client`)."""
    try:
        return _SERVER.validate_json(text)
    except ValidationError as error:
        raise refused(error) from None


def read_body(kind: type[Said], text: bytes) -> Said:
    """Read the JSON body of an HTTP request as a command; no body: all defaults.

    Raises:
        ServeError: bad_message, unknown_field or bad_field.
    """
    try:
        return kind.model_validate_json(text or b"{}")
    except ValidationError as error:
        raise refused(error) from None


def write(message: Message) -> str:
    """Write any message as one JSON object."""
    return message.model_dump_json()


def pack(header: Header, payload: bytes) -> bytes:
    """Join a header and its payload to a binary message."""
    text = write(header).encode()
    return len(text).to_bytes(4, "little") + text + payload


def unpack(data: bytes) -> tuple[Header, bytes]:
    """Split a binary message.

    Raises:
        ServeError: it is cut off, or its header is not one of ours.
    """
    end = 4 + int.from_bytes(data[:4], "little")
    if len(data) < 4 or len(data) < end:
        raise ServeError("bad_message", f"needed {end} bytes of header, got {len(data)}", True)
    try:
        return _HEADER.validate_json(data[4:end]), data[end:]
    except ValidationError as error:
        raise refused(error) from None


def refusal(error: ServeError) -> Error:
    """Return an error as a message; halves of characters, which JSON cannot hold, become "?"."""
    text = str(error).encode("utf-8", "replace").decode()
    return Error(code=error.code, message=text, fatal=error.fatal, request=error.request)


def _request(text: str | bytes) -> int | None:
    """Return the number that a refused message had, if it can be read."""
    try:
        return _REQUEST.validate_json(text, strict=True).get("request")
    except ValidationError:
        return None


def refused(error: ValidationError, request: int | None = None) -> ServeError:
    """Return what a client is told of a message that fits no class, or not its class."""
    first = error.errors(include_url=False, include_input=False, include_context=True)[0]
    kind, says = first["type"], first["msg"]
    where = ".".join(str(part) for part in first["loc"])
    if kind == "start":
        code, fatal, message = "bad_field", False, says
    elif kind == "json_invalid" or (not where and not kind.startswith("union_tag")):
        code, fatal, message = "bad_message", True, f"a message is one JSON object: {says}"
    elif kind.startswith("union_tag"):
        context = first.get("ctx", {})
        tag = str(context["tag"])[:40] if "tag" in context else None
        code, fatal, message = "unknown_type", False, "a message needs a type"
        if tag is not None:
            message = f"unknown type {tag!r}; there are {context['expected_tags']}"
    elif kind == "extra_forbidden":
        code, fatal, message = "unknown_field", False, f"no such field: {where}"
    else:
        code, fatal, message = "bad_field", False, f"{where}: {says}"
    return ServeError(code, message[:400], fatal, request)
