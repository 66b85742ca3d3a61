"""Messages as JSON and back, what is refused and how, and that the page tells all of it."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scd.serving.commands import Commands
from scd.serving.messages import (
    COMMANDS,
    SPOKEN,
    Acknowledge,
    Action,
    Beginning,
    Command,
    Create,
    Error,
    FrameHeader,
    FromServer,
    GuidanceChoice,
    Header,
    Hello,
    Limits,
    Message,
    Run,
    ServeError,
    Set,
    SnapshotHeader,
    State,
    Step,
    WorldInfo,
)
from scd.serving.protocol import (
    CLOSE_CODES,
    VERSION,
    pack,
    read_body,
    read_client,
    read_server,
    refusal,
    unpack,
    write,
)

PAGE = (Path(__file__).resolve().parents[2] / "docs/serving.md").read_text(encoding="utf-8")
CLIENT, SERVER = SPOKEN, (*get_args(FromServer), *get_args(Header))
VALUES = {
    "version": 1,
    "session": "abc",
    "action": 3,
    "frame": 7,
    "generation": 2,
}


def required(kind: type[Message]) -> dict[str, object]:
    """Values of the fields that a message must have."""
    fields = kind.model_fields.items()
    return {name: VALUES[name] for name, field in fields if field.is_required()}


@pytest.mark.parametrize("kind", CLIENT)
def test_every_message_comes_back_as_it_was(kind: type[Command]):
    message = kind(**required(kind))
    assert read_client(write(message)) == message
    # Without the fields that have defaults it is the same.
    assert read_client(json.dumps(required(kind) | {"type": message.verb})) == message


def header(**changes: object) -> FrameHeader:
    values = dict(
        session="abc", generation=1, frame=5, action=(0.5, 1.0), sequence=9, steps=4,
        encoder_ms=1.5, decoder_ms=2.5, autoencoder_ms=0.5, queued_ms=0.0, codec="h264",
        key=True, config="avc1.42c00a", width=64, height=48,
    )  # fmt: skip
    return FrameHeader(**(values | changes))


@given(payload=st.binary(max_size=300))
def test_binary_messages_come_back_as_they_were(payload: bytes):
    for one in (header(), header(action=None, config=None), SnapshotHeader(session="x", request=4)):
        assert unpack(pack(one, payload)) == (one, payload)


@given(st.binary(max_size=60))
def test_other_bytes_are_no_binary_message(data: bytes):
    with pytest.raises(ServeError):
        unpack(data)


def test_the_server_is_understood():
    state = State(
        session="s", generation=0, frame=-1, num_given=0, running=False, attached=True, fps=None,
        action=0, sequence=0, steps=4, guidance=GuidanceChoice(kind="context_noise", scale=1.5),
        seed=1, history_from=-1, kept_from=0,
    )  # fmt: skip
    assert read_server(write(state)) == state
    # A newer server may say more.
    more = json.loads(write(state)) | {"mood": "good"}
    assert read_server(json.dumps(more)) == state


@pytest.mark.parametrize(
    "text, code, fatal",
    [
        ("", "bad_message", True),
        ("{", "bad_message", True),
        ("[]", "bad_message", True),
        ("null", "bad_message", True),
        ('"hello"', "bad_message", True),
        ('{"a":' * 5000, "bad_message", True),
        ("{}", "unknown_type", False),
        ('{"type":"dance"}', "unknown_type", False),
        ('{"type":["run"]}', "unknown_type", False),
        ('{"type":"run","fps":0}', "bad_field", False),
        ('{"type":"run","fps":NaN}', "bad_field", False),
        ('{"type":"run","fps":1e999}', "bad_field", False),
        ('{"type":"run","fps":"3"}', "bad_field", False),
        ('{"type":"run","speed":3}', "unknown_field", False),
        ('{"type":"action"}', "bad_field", False),
        ('{"type":"action","action":-1}', "bad_field", False),
        ('{"type":"action","action":true}', "bad_field", False),
        ('{"type":"action","action":[]}', "bad_field", False),
        ('{"type":"action","action":9007199254740992}', "bad_field", False),
        ('{"type":"step","count":0}', "bad_field", False),
        ('{"type":"step","count":1001}', "bad_field", False),
        ('{"type":"create","start":"file"}', "bad_field", False),
        ('{"type":"create","upload":"' + "x" * 65 + '"}', "bad_field", False),
        ('{"type":"set","guidance":{"kind":"none","power":2}}', "unknown_field", False),
    ],
)
def test_what_is_refused_and_how(text: str, code: str, fatal: bool):
    with pytest.raises(ServeError) as caught:
        read_client(text)
    assert (caught.value.code, caught.value.fatal) == (code, fatal)
    assert len(str(caught.value)) < 500


def test_a_refusal_carries_the_number_of_its_message():
    with pytest.raises(ServeError) as caught:
        read_client('{"type":"run","fps":-1,"request":12}')
    assert caught.value.request == 12
    with pytest.raises(ServeError) as caught:
        read_client('{"type":"run","fps":-1,"request":"12"}')
    assert caught.value.request is None


def test_bodies_of_requests_are_read_by_the_same_rules():
    assert read_body(Create, b"") == Create()
    assert read_body(Step, b'{"count":3}') == Step(count=3)
    for body, code in (
        (b"[]", "bad_message"),
        (b"\xff", "bad_message"),
        (b'{"x":1}', "unknown_field"),
    ):
        with pytest.raises(ServeError) as caught:
            read_body(Step, body)
        assert caught.value.code == code


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(JSON | st.text(), st.sampled_from([kind.__name__ for kind in CLIENT]))
def test_any_text_is_a_message_or_a_protocol_error(value: object, name: str):
    texts = [json.dumps(value), str(value)]
    if isinstance(value, dict):
        texts.append(json.dumps(value | {"type": name.lower()}))
    for text in texts:
        try:
            message = read_client(text)
        except ServeError as error:
            assert error.code in ("bad_message", "unknown_type", "unknown_field", "bad_field")
        else:
            assert isinstance(message, CLIENT)


def test_error_texts_with_any_character_can_be_sent():
    text = write(refusal(ServeError("bad_field", "\ud800 \0 ünï")))
    assert "\0" not in text and text.encode()
    said = read_server(text)
    assert isinstance(said, Error) and said.message == "? \0 ünï"


def rows(part: str) -> dict[str, str]:
    """Rows of the table under a heading of the page: type -> the rest."""
    text = PAGE[PAGE.index(f"### {part}") :]
    end = re.search(r"^##", text[3:], re.M)
    text = text[: end.start() + 3] if end else text
    return dict(re.findall(r"^\| `(\w+)`[^|]*\|(.*)\|$", text, re.M))


@pytest.mark.parametrize("kind", [*CLIENT, *SERVER])
def test_the_page_names_every_message_and_field(kind: type[Message]):
    table = rows("From the client" if kind in CLIENT else "From the server")
    name = kind.model_fields["type"].default
    assert name in table, f"the page lacks {name}"
    # Fields of a beginning stand in a paragraph of their own.
    shared = {"type", "request", *(Beginning.model_fields if issubclass(kind, Beginning) else ())}
    missing = [
        one for one in kind.model_fields if one not in shared and f"`{one}`" not in table[name]
    ]
    assert not missing, f"the page lacks {missing} of {name}"


def test_the_page_names_all_else():
    for kind in (Limits, WorldInfo, Beginning, GuidanceChoice):
        for name in kind.model_fields:
            assert f"`{name}`" in PAGE, f"the page lacks {name} of {kind.__name__}"
    assert f"## Protocol, version {VERSION}" in PAGE
    for code, number in CLOSE_CODES.items():
        assert f"| {number} | `{code}` |" in PAGE


def test_every_message_is_obeyed_and_every_route_is_on_the_page():
    assert len({kind.model_fields["type"].default for kind in COMMANDS}) == len(COMMANDS)
    (changes,) = re.findall(r"^\| `POST /v1/sessions/ID/(set`, .*?)\|", PAGE, re.M)
    for kind in COMMANDS:
        name = kind.model_fields["type"].default
        # Hello is answered before there is anything to obey.
        assert (getattr(Commands, name, None) is None) == (kind is Hello)
        method, _, path = kind.route.replace("{session}", "ID").partition(" ")
        told = path.rpartition("/")[2] in changes or f"| `{method} {path}" in PAGE
        assert told, f"the page lacks {kind.route}"


def test_the_codes_that_reading_promises_are_those_that_it_gives():
    texts = ("{", '{"type":"dance"}', '{"type":"pause","x":1}', '{"type":"rewind","frame":-1}')
    codes = []
    for text in texts:
        with pytest.raises(ServeError) as caught:
            read_client(text)
        codes.append(caught.value.code)
    assert codes == ["bad_message", "unknown_type", "unknown_field", "bad_field"]
    promised = re.findall(r"[a-z]+_[a-z]+", (read_client.__doc__ or "").partition("Raises:")[2])
    assert promised == codes


def test_defaults_of_the_page_are_those_of_the_messages():
    assert (Hello(version=1).codec, Hello(version=1).quality) == ("jpeg", 90)
    assert (Action(action=0).sequence, Step().count, Create().seed) == (0, 1, 0)
    assert (Run().fps, Set().steps, Create().start) == (None, None, "nothing")
    assert (GuidanceChoice().kind, GuidanceChoice().scale) == ("none", 1.0)
    assert GuidanceChoice().context_noise == 0.05
    assert Acknowledge(generation=0, frame=0).request is None
