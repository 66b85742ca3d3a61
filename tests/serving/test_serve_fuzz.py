"""Random and mutated messages to a real server: answered or refused, never a crash or a hang."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from scd.data.clip import frames_to_pixels
from scd.engine.open import open_engine
from scd.serving.client import Client
from scd.serving.messages import SPOKEN, Error
from scd.serving.protocol import CLOSE_CODES, read_server, unpack, write
from scd.serving.settings import ClientLimits
from scd.streaming.rollout import Rollout
from tests.servers import Serving, serving, tiny_playable

TYPES = [kind.model_fields["type"].default for kind in SPOKEN]
NAMES = sorted({name for kind in SPOKEN for name in kind.model_fields})
ENDS = {*CLOSE_CODES.values(), 1009}
"""Codes with which the server may end a connection for what was said."""
LIMITS = ClientLimits(messages_per_s=1e6, requests_per_s=1e6, max_errors=10)
SENTINEL = 2**40
"""Number of the message by which a test sees that the server still answers."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("evicted")
    with serving(evict_dir=folder, sessions=64, limits=LIMITS) as running:
        yield running


numbers = st.integers(-2, 9) | st.integers() | st.sampled_from([2**31, 2**53, 2**53 - 1, 2**64])
values = st.recursive(
    numbers | st.none() | st.booleans() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=2)
    ),
    max_leaves=4,
)
likely = st.fixed_dictionaries(
    {"type": st.sampled_from(TYPES)},
    optional={
        "request": st.integers(0, 99),
        "action": st.integers(0, 4),
        "frame": st.integers(0, 6),
        "generation": st.integers(0, 3),
        "count": st.integers(1, 3),
        "steps": st.integers(1, 5),
        "seed": st.integers(0, 3),
        "session": st.text(max_size=5),
    },
)


@st.composite
def fitting(draw: st.DrawFn) -> dict[str, Any]:
    """A message that is mostly right: fields that its type does not have are taken out."""
    message = draw(likely)
    kind = next(
        one for one in SPOKEN
        if one.model_fields["type"].default == message["type"]
    )  # fmt: skip
    return {name: value for name, value in message.items() if name in kind.model_fields}


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A right message whose fields or characters were changed."""
    message = draw(fitting() | likely)
    for name in draw(st.lists(st.sampled_from(NAMES) | st.text(max_size=5), max_size=2)):
        message[name] = draw(values)
    text = json.dumps(message)
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, max(0, len(text) - 1)))
        text = text[:place] + draw(st.text(max_size=2)) + text[place + draw(st.integers(0, 3)) :]
    return text


anything = st.one_of(
    fitting().map(json.dumps),
    fitting().map(json.dumps),
    mutated(),
    values.map(json.dumps),
    st.text(max_size=30),
    st.binary(max_size=30),
    st.sampled_from(["x", "9", "["]).map(lambda one: one * 70_000),
    st.sampled_from(["[", '{"a":', "9"]).map(lambda one: '{"type":"run","fps":' + one * 3000),
)


def sendable(message: str | bytes) -> str | bytes:
    """Leave out half characters, which no text of a WebSocket can hold."""
    if isinstance(message, str):
        return message.encode("utf-8", "ignore").decode()
    return message


class Visitor:
    """A client of bad manners, who comes again whenever he is shown out."""

    def __init__(self, server: Serving) -> None:
        self.url = server.url.replace("http", "ws") + "/v1/stream"
        self.num_sent = self.num_ended = 0
        self.socket: ClientConnection | None = None

    def enter(self) -> ClientConnection:
        if self.socket is None:
            self.socket = connect(self.url, proxy=None, compression=None, close_timeout=1)
            self.socket.send('{"type":"hello","version":1}')
            self.socket.send('{"type":"create"}')
        return self.socket

    def say(self, message: str | bytes) -> None:
        try:
            self.enter().send(message)
            self.num_sent += 1
        except ConnectionClosed as closed:
            self.leave(closed)

    def settle(self) -> None:
        """See that what was said is answered, or ended the connection with a reason."""
        try:
            socket = self.enter()
            socket.send(json.dumps({"type": "pause", "request": SENTINEL}))
            while True:
                data = socket.recv(60)
                if isinstance(data, bytes):
                    unpack(data)
                    continue
                answer = read_server(data)
                # Half a message may have had the number too: only answers to it end the wait.
                if getattr(answer, "request", None) == SENTINEL:
                    break
            socket.send('{"type":"close"}')
            socket.close()
        except ConnectionClosed as closed:
            self.leave(closed)
        self.socket = None

    def leave(self, closed: ConnectionClosed) -> None:
        self.num_ended += 1
        self.socket = None
        assert closed.rcvd is not None, "the connection was lost"
        assert closed.rcvd.code in ENDS, closed.rcvd
        assert closed.rcvd.reason or closed.rcvd.code == 1009


def play(server: Serving, conversation: list[str | bytes]) -> Visitor:
    visitor = Visitor(server)
    for message in conversation:
        visitor.say(sendable(message))
    visitor.settle()
    return visitor


def check_others(server: Serving, client: Client, rollout: Rollout) -> None:
    """Somebody else's stream goes on as if nobody had been there."""
    assert server.call("GET", "/health")[0] == 200
    (frame,) = client.step(1)
    wanted = frames_to_pixels(rollout.step(torch.tensor([1])))[0].numpy()
    assert np.abs(frame.pixels.astype(int) - wanted).max() <= 40


def visit_often(server: Serving, max_examples: int, fewest: int) -> int:
    """Have visitors talk at random; return how many messages they said."""
    total = 0
    world = tiny_playable()
    rollout = Rollout(world, seed=3, engine=open_engine(world.model, "fast"))
    rollout.begin()

    @settings(max_examples=max_examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(anything, min_size=fewest, max_size=12))
    def converse(conversation: list[str | bytes]) -> None:
        nonlocal total
        total += play(server, conversation).num_sent

    with Client(server.url, quality=100) as client:
        client.create(seed=3)
        check_others(server, client, rollout)
        converse()
        check_others(server, client, rollout)
        client.close()
    assert server.service.host.overview().num_faults == 0
    assert server.metric('scd_errors_total{code="fault"}') == 0
    return total


def test_random_and_mutated_messages(server: Serving):
    assert visit_often(server, max_examples=25, fewest=4) >= 75


@pytest.mark.slow
def test_ten_thousand_random_and_mutated_messages(server: Serving):
    total = 0
    while total < 10_000:
        total += visit_often(server, max_examples=500, fewest=8)


def test_every_message_out_of_its_order(server: Serving):
    visitor = Visitor(server)
    for kind in SPOKEN:
        values = {"version": 1, "session": "x", "action": 0, "frame": 0, "generation": 0}
        required = [name for name, field in kind.model_fields.items() if field.is_required()]
        fields = {name: values[name] for name in required}
        visitor.say(write(kind(**fields)))
    visitor.settle()


def test_messages_at_once_are_answered_in_order(server: Serving):
    visitor = Visitor(server)
    socket = visitor.enter()
    for number in range(30):
        socket.send(json.dumps({"type": "set", "steps": 1 + number % 4, "request": number}))
    answers = []
    while len(answers) < 30:
        data = socket.recv(30)
        message = read_server(data) if isinstance(data, str) else None
        if getattr(message, "request", None) is not None:
            assert not isinstance(message, Error)
            answers.append((message.request, message.steps))  # type: ignore[union-attr]
    assert answers == [(number, 1 + number % 4) for number in range(30)]
    visitor.settle()


@settings(max_examples=30, deadline=None)
@given(
    method=st.sampled_from(["GET", "POST", "DELETE", "PUT"]),
    path=st.sampled_from(["sessions", "sessions/x", "sessions/x/step", "sessions/restore", "world"])
    | st.text(max_size=12),
    body=st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode()),
)
def test_random_requests(server: Serving, method: str, path: str, body: bytes):
    path = "/v1/" + quote(path.encode("utf-8", "ignore"))
    status, answer = server.call(method, path, body if method != "GET" else None)
    # A session that was left may be put on disk only after some seconds.
    assert status < 500 or answer["error"]["code"] == "too_many_sessions", answer
    if status == 201:
        server.call("DELETE", f"/v1/sessions/{answer['session']}")


def test_no_path_of_a_client_is_looked_up(server: Serving, tmp_path: Path):
    (tmp_path / "secret.js").write_text("secret")
    for path in (f"/{tmp_path}/secret.js", "/..%2frun.py", "/%2e%2e/app.py", "//etc/passwd"):
        assert server.call("GET", path)[0] == 404
