"""Clients of a real server: what they see, what they are refused, that nobody disturbs others."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch
from av.error import FFmpegError
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection, serve

from scd.data.clip import Conditions, frames_to_pixels
from scd.data.spaces import ConditionSpec
from scd.engine.open import open_engine
from scd.models.build import num_parameters
from scd.serving import connection
from scd.serving.client import Client, Refused, SessionEnded
from scd.serving.codec import JpegEncoder, Packed
from scd.serving.connection import MOST_QUEUED, SendQueue
from scd.serving.messages import Evicted, FrameHeader, GuidanceChoice, ServeError
from scd.serving.protocol import unpack
from scd.serving.settings import ClientLimits
from scd.streaming.rollout import Rollout
from tests.servers import Serving, serving, tiny_clips, tiny_playable
from tests.tiny import tiny_dense

LOSSY = 40
"""Levels of 255 by which a tiny JPEG picture of noise may be off."""


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(sessions=12) as running:
        yield running


@contextmanager
def raw(server: Serving, hello: bool = True, **options: Any) -> Iterator[ClientConnection]:
    """A WebSocket that has said hello, or not."""
    url = server.url.replace("http", "ws") + "/v1/stream"
    with connect(url, proxy=None, compression=None, **options) as socket:
        if hello:
            socket.send('{"type":"hello","version":1}')
            assert json.loads(socket.recv(10))["type"] == "welcome"
        yield socket


def ask(socket: ClientConnection, **message: Any) -> dict[str, Any]:
    """Send a message; return the next text message."""
    socket.send(json.dumps(message))
    return next_text(socket)


def next_text(socket: ClientConnection) -> dict[str, Any]:
    while isinstance(data := socket.recv(20), bytes):
        pass
    return json.loads(data)


def end_of(socket: ClientConnection) -> tuple[int, str]:
    """Read to the end; return the close code and reason."""
    with pytest.raises(ConnectionClosed) as caught:
        while True:
            socket.recv(20)
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code, caught.value.rcvd.reason


def alone(actions: list[int], seed: int = 0, given: int = 0, **changes: Any) -> list[np.ndarray]:
    """Frames of a rollout of its own, as 8-bit pictures."""
    world = tiny_playable()
    rollout = Rollout(world, seed=seed, engine=open_engine(world.model, "fast"), **changes)
    clips = tiny_clips(4)
    if given:
        frames = clips.pixels(0, given)[None]
        rollout.begin(frames, Conditions(actions=clips.actions[:1, :given]))
    else:
        rollout.begin()
    return [frames_to_pixels(rollout.step(torch.tensor([one])))[0].numpy() for one in actions]


def same(received: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(received.astype(int) - wanted.astype(int)).max() <= LOSSY)


def test_a_client_steps_the_frames_of_a_rollout(server: Serving):
    actions = [1, 2, 3, 0, 2]
    with Client(server.url, quality=100) as client:
        assert client.welcome.world.actions == ("a", "b", "c", "d")
        world = client.welcome.world
        assert (world.height, world.width, world.pixel_art) == (4, 6, False)
        assert (world.title, world.trained) == ("", "")
        assert world.parameters == num_parameters(tiny_playable().model)
        state = client.create(seed=7)
        assert (state.frame, state.running, state.steps, state.seed) == (-1, False, 2, 7)
        frames = [client.step(action)[0] for action in actions]
        assert [one.header.frame for one in frames] == [0, 1, 2, 3, 4]
        assert [one.header.action for one in frames] == actions
        assert frames[0].header.decoder_ms > 0 and frames[0].header.steps == 2
        for one, wanted in zip(frames, alone(actions, seed=7), strict=True):
            assert same(one.pixels, wanted)
        assert client.state is not None and client.state.frame == 4
        client.close()
        assert client.state is None


def test_a_client_takes_numbers_of_any_type(server: Serving):
    with Client(server.url, quality=100) as client:
        client.create(seed=np.int64(7))
        wanted = [one.pixels for one in client.step(2, count=2)]
        for action in (np.uint8(2), np.array(2), torch.tensor(2)):
            client.reset(seed=torch.tensor(7))
            frames = client.step(action, count=np.int32(2))  # type: ignore[arg-type]
            assert all((one.pixels == two).all() for one, two in zip(frames, wanted, strict=True))
        for wrong in (True, "b", 1.5, np.array([True])):
            with pytest.raises(ServeError, match="action"):
                client.step(wrong)  # type: ignore[arg-type]
        client.close()


def test_h264_shows_the_same_frames(server: Serving):
    with Client(server.url, codec="h264") as client:
        announced = client.welcome.h264
        client.create(seed=7)
        frames = client.step(1, count=5)
        client.rewind(2)
        again = client.step(1, count=2)
        client.close()
    assert [one.header.key for one in frames] == [True, False, False, False, False]
    assert frames[0].header.config == announced == "avc1.42c00a"
    # The frame that is shown again after the rewind is the key frame.
    assert [one.header.frame for one in again] == [3, 4]
    for one, wanted in zip(frames + again, frames[:5] + frames[3:], strict=True):
        assert one.pixels.shape == (4, 6, 3)
        # Colour has half the resolution, and these pictures are noise.
        assert np.abs(one.pixels.mean(2) - wanted.pixels.mean(2)).mean() < 25


def test_a_clip_is_continued(server: Serving):
    with Client(server.url, quality=100) as client:
        state = client.create(start="clip", clip=0, seed=3)
        assert (state.frame, state.num_given) == (2, 3)
        shown = next(client.frames())
        assert shown.header.shown and shown.header.frame == 2 and shown.header.action is None
        clip = tiny_clips(4).frames[0, 2].movedim(0, -1).numpy()
        assert same(shown.pixels, clip)
        (frame,) = client.step(2)
        assert same(frame.pixels, alone([2], seed=3, given=3)[0])
        client.close()


def test_running_frames_come_in_order_and_obey(server: Serving):
    with Client(server.url) as client:
        client.create(seed=1)
        assert client.run().running
        client.act(3, sequence=41)
        obeyed = []
        for one in client.frames():
            obeyed.append(one.header)
            if one.header.sequence == 41 and len(obeyed) > 10:
                break
        assert [one.frame for one in obeyed] == list(range(len(obeyed)))
        assert [one.action for one in obeyed] == sorted(one.action for one in obeyed)
        assert not client.pause().running
        client.close()
    assert server.metric("scd_action_to_frame_seconds_count") >= 1


def test_a_client_that_does_not_acknowledge_gets_no_more(server: Serving):
    with raw(server) as socket, Client(server.url) as other:
        queue = server.service.limits.queue_frames
        assert ask(socket, type="create")["type"] == "state"
        assert ask(socket, type="run")["type"] == "state"
        frames = [unpack(socket.recv(20))[0] for _ in range(queue)]
        with pytest.raises(TimeoutError):
            socket.recv(0.3)
        # Meanwhile others play on.
        other.create()
        assert len(other.step(1, count=20)) == 20
        other.close()
        socket.send(json.dumps({"type": "ack", "generation": 0, "frame": frames[0].frame}))
        header, _ = unpack(socket.recv(20))
        assert isinstance(header, FrameHeader) and header.frame == queue
        assert ask(socket, type="close")["type"] == "detached"


def test_after_a_reset_no_frame_of_before_arrives(server: Serving):
    with Client(server.url) as client:
        client.create(seed=1)
        client.run()
        generation = 0
        for number, one in enumerate(client.frames()):
            assert one.header.generation == generation
            if number == 20:
                break
            if number % 4 == 3:
                state = client.restart() if number % 8 == 3 else client.reset(seed=number)
                generation += 1
                assert state.generation == generation
                client.run()
        client.close()


def test_frames_that_were_not_read_before_a_reset_are_void(server: Serving):
    before = server.metric('scd_sent_frames_total{codec="jpeg"}')
    with Client(server.url) as client:
        client.create(seed=1)
        client.run()
        while server.metric('scd_sent_frames_total{codec="jpeg"}') == before:
            time.sleep(0.01)
        client.reset(seed=2)
        first = next(client.frames()).header
        assert (first.generation, first.frame) == (1, 0)
        client.close()


def test_rewind_repeats_exactly_and_goes_elsewhere(server: Serving):
    with Client(server.url, quality=100) as client:
        client.create(seed=5)
        first = client.step(1, count=6)
        state = client.rewind(2)
        assert (state.frame, state.generation) == (2, 1)
        shown = next(client.frames())
        assert shown.header.shown and (shown.pixels == first[2].pixels).all()
        again = client.step(1, count=3)
        for one, wanted in zip(again, first[3:], strict=True):
            assert (one.pixels == wanted.pixels).all()
        client.rewind(2)
        elsewhere = client.step(3, count=3)
        assert any((a.pixels != b.pixels).any() for a, b in zip(elsewhere, first[3:], strict=True))
        with pytest.raises(Refused) as caught:
            client.rewind(100)
        assert caught.value.code == "out_of_history"
        client.close()


def test_a_fork_takes_the_connection_along(server: Serving):
    with Client(server.url, quality=100) as client, Client(server.url, quality=100) as second:
        old = client.create(seed=5).session
        first = client.step(1, count=4)
        copy = client.fork(frame=1)
        assert copy.forked_from == old != copy.session and copy.frame == 1
        again = client.step(1, count=2)
        assert all((a.pixels == b.pixels).all() for a, b in zip(again, first[2:], strict=True))
        # The session of before is free, and as it was.
        assert second.attach(old).frame == 3
        for one in (client, second):
            one.close()


def test_steps_guidance_and_seed_change_while_it_streams(server: Serving):
    with Client(server.url) as client:
        client.create()
        assert client.set(steps=4).steps == 4
        assert client.step(1)[0].header.steps == 4
        state = client.set(seed=9, guidance=GuidanceChoice(kind="context_noise", scale=1.5))
        assert (state.seed, state.guidance.scale, state.steps) == (9, 1.5, 4)
        with pytest.raises(Refused) as caught:
            client.set(guidance=GuidanceChoice(kind="conditions", scale=2.0))
        assert "reset" in str(caught.value)
        assert client.reset(guidance=GuidanceChoice(kind="conditions", scale=2.0)).generation == 1
        assert len(client.step(1)) == 1
        client.close()


def test_leaving_keeps_the_session_and_one_client_has_it(server: Serving):
    with Client(server.url) as client:
        session = client.create(seed=2).session
        client.step(1, count=3)
        with Client(server.url) as second:
            with pytest.raises(Refused) as caught:
                second.attach(session)
            assert caught.value.code == "session_busy"
        client.step(1)
    with Client(server.url) as later:
        deadline = time.monotonic() + 20
        while True:
            try:
                state = later.attach(session)
                break
            except Refused as error:
                assert error.code == "session_busy" and time.monotonic() < deadline
        assert (state.frame, state.running) == (3, False)
        later.detach()
        with pytest.raises(Refused, match="create or attach"):
            later.step(1)
        later.attach(session)
        later.close()
        with pytest.raises(Refused) as caught:
            later.attach(session)
        assert caught.value.code == "unknown_session"


def test_a_snapshot_is_restored(server: Serving):
    with Client(server.url, quality=100) as client:
        client.create(seed=2)
        client.step(1, count=3)
        data = client.snapshot()
        wanted = client.step(2, count=2)
        client.close()
        status, state = server.call("POST", "/v1/sessions/restore", data)
        assert status == 201, state
        assert state["frame"] == 2
        client.attach(state["session"])
        for one, other in zip(client.step(2, count=2), wanted, strict=True):
            assert (one.pixels == other.pixels).all()
        client.close()


@pytest.mark.parametrize(
    "message, code",
    [
        ({"type": "action", "action": 4}, "unknown_action"),
        ({"type": "action", "action": [0.5]}, "unknown_action"),
        ({"type": "step", "action": 77}, "unknown_action"),
        ({"type": "step", "count": 1000}, "bad_field"),
        ({"type": "set", "steps": 1000}, "bad_field"),
        ({"type": "rewind", "frame": 5}, "out_of_history"),
        ({"type": "fork", "frame": 5}, "out_of_history"),
        ({"type": "create"}, "has_session"),
        ({"type": "attach", "session": "x"}, "has_session"),
        ({"type": "reset", "start": "clip", "clip": 99}, "unknown_clip"),
        ({"type": "reset", "start": "clip"}, "bad_field"),
        ({"type": "reset", "upload": "x"}, "bad_field"),
        ({"type": "reset", "start": "upload", "upload": "../etc"}, "unknown_upload"),
        ({"type": "reset", "action": 1}, "bad_field"),
        ({"type": "reset", "label": 1}, "bad_field"),
        ({"type": "hello", "version": 1}, "bad_message"),
        ({"type": "dance"}, "unknown_type"),
    ],
)
def test_what_is_refused_leaves_the_session_as_it_was(
    server: Serving, message: dict[str, Any], code: str
):
    with raw(server) as socket:
        ask(socket, type="create")
        error = ask(socket, request=5, **message)
        assert (error["type"], error["code"], error["fatal"]) == ("error", code, False)
        assert error["request"] == 5 and error["message"]
        state = ask(socket, type="step")
        assert (state["frame"], state["generation"]) == (0, 0)
        ask(socket, type="close")


def test_messages_before_a_session_or_of_another_are_refused(server: Serving):
    with raw(server) as socket:
        acknowledge = {"type": "ack", "generation": 0, "frame": 0}
        for message in ({"type": "run"}, {"type": "fork"}, {"type": "close"}, acknowledge):
            assert ask(socket, **message)["code"] == "no_session"
        for session in ("x", "", "../../etc/passwd", "a" * 64):
            assert ask(socket, type="attach", session=session)["code"] == "unknown_session"


FATAL = [
    ("nonsense", "bad_message", 4000),
    ('{"type":"create"}', "bad_message", 4000),
    ('{"type":"hello"}', "bad_message", 4000),
    ('{"type":"hello","version":2}', "wrong_version", 4001),
    (b"\x00\x01", "bad_message", 4000),
]


@pytest.mark.parametrize("first, code, number", FATAL)
def test_a_bad_beginning_ends_with_a_reason(
    server: Serving, first: str | bytes, code: str, number: int
):
    with raw(server, hello=False) as socket:
        socket.send(first)
        error = next_text(socket)
        assert (error["code"], error["fatal"]) == (code, True)
        closed, reason = end_of(socket)
        assert closed == number and reason.startswith(code)


def test_messages_that_are_none_end_the_connection(server: Serving):
    for data in ("{", b"binary"):
        with raw(server) as socket:
            socket.send(data)
            assert end_of(socket)[0] == 4000
    with raw(server) as socket:
        socket.send(json.dumps({"type": "attach", "session": "x" * 70000}))
        assert end_of(socket)[0] == 1009


def test_limits_end_connections_with_their_reason():
    limits = ClientLimits(messages_per_s=20.0, max_errors=4, hello_s=0.3, max_connections=2)
    with serving(limits=limits) as server:
        with raw(server) as socket:
            with suppress(ConnectionClosed):
                for _ in range(60):
                    socket.send('{"type":"pause"}')
            closed, reason = end_of(socket)
            assert closed == 4004 and reason.startswith("too_many_errors: 5 refused messages")
        with raw(server) as socket:
            ask(socket, type="create")
            with suppress(ConnectionClosed):
                for _ in range(1000):
                    socket.send('{"type":"action","action":1}')
            assert end_of(socket)[0] == 4009
        with raw(server, hello=False) as socket:
            assert end_of(socket)[0] == 4008
        with raw(server), raw(server), raw(server, hello=False) as third:
            assert end_of(third)[0] == 4013
        assert server.metric('scd_closes_total{code="4009"}') == 1


def test_a_token_is_wanted():
    token = "0123456789abcdef-secret"
    with serving(token=token) as server:
        with Client(server.url, token=token) as client:
            assert client.create().frame == -1
        for wrong in (None, "", token[:-1], token + "x"):
            with pytest.raises(Refused) as caught:
                Client(server.url, token=wrong)
            assert (caught.value.code, caught.value.fatal) == ("unauthorised", True)
        assert server.call("GET", "/v1/world")[0] == 401
        assert server.call("GET", "/metrics")[0] == 401
        bearer = {"Authorization": f"Bearer {token}"}
        assert server.call("GET", "/v1/world", headers=bearer)[0] == 200
        assert server.call("GET", "/health")[0] == 200


def test_a_client_that_is_not_answered_leaves_nothing_open():
    has_left = threading.Event()

    def listen(connection: ServerConnection) -> None:
        for _ in connection:
            pass
        has_left.set()

    with serve(listen, "127.0.0.1", 0) as silent:
        thread = threading.Thread(target=silent.serve_forever, daemon=True)
        thread.start()
        with pytest.raises(TimeoutError):
            Client(f"http://127.0.0.1:{silent.socket.getsockname()[1]}", timeout_s=0.2)
        assert has_left.wait(20)
        silent.shutdown()
    thread.join(20)


class Broken(JpegEncoder):
    """Cannot pack a frame."""

    def __init__(self, fault: Exception) -> None:
        super().__init__()
        self.fault = fault

    def encode(self, frame: np.ndarray) -> Packed:
        """Fail."""
        raise self.fault


@pytest.mark.parametrize("fault", [FFmpegError(-1, "no such codec"), RuntimeError("no encoder")])
def test_a_fault_of_the_writer_or_the_reader_is_logged_and_said(
    server: Serving,
    fault: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def broken(*words: Any) -> JpegEncoder:
        return Broken(fault)

    def none(*words: Any) -> JpegEncoder:
        raise fault

    said = f"fault: fault of the server: {type(fault).__name__}"
    monkeypatch.setattr(connection, "make_encoder", broken)
    with raw(server) as socket:
        ask(socket, type="create")
        socket.send('{"type":"step"}')
        error = next_text(socket)
        assert (error["type"], error["code"], error["fatal"]) == ("error", "fault", True)
        assert end_of(socket) == (1011, said)
    monkeypatch.setattr(connection, "make_encoder", none)
    with raw(server, hello=False) as socket:
        socket.send('{"type":"hello","version":1}')
        assert next_text(socket)["code"] == "fault"
        assert end_of(socket) == (1011, said)
    faults = [one.exc_info[1] for one in caplog.records if one.exc_info is not None]
    assert faults == [fault, fault]


def test_pages_of_other_origins_are_refused(server: Serving):
    for origin in ("http://evil.example", "null", server.url.replace("http", "https") + "0"):
        with pytest.raises(InvalidStatus) as caught, raw(server, origin=origin):
            pass
        assert caught.value.response.status_code == 403
    with raw(server, origin=server.url):
        pass
    # A name that somebody made to stand for this machine.
    with pytest.raises(InvalidStatus) as caught:
        with raw(server, additional_headers={"Host": "evil.example"}):
            pass
    assert caught.value.response.status_code in (400, 421)


def test_a_client_that_does_not_read_fills_its_own_queue_only(server: Serving):
    async def scenario() -> tuple[str, int]:
        async def never(message: Any) -> None:
            await asyncio.Event().wait()

        socket = WebSocket({"type": "websocket"}, receive=never, send=never)  # type: ignore[arg-type]
        queue = SendQueue(server.service, socket)
        writer = asyncio.create_task(queue.run())
        number = 0
        while not queue.failed.done():
            queue.put(Evicted(session="x"))
            await asyncio.sleep(0)
            number += 1
        writer.cancel()
        return queue.failed.result().code, number

    code, number = asyncio.run(scenario())
    assert code == "too_slow" and number == MOST_QUEUED + 2


def test_too_many_sessions_are_refused():
    with serving(sessions=2) as server, Client(server.url) as first, Client(server.url) as second:
        with Client(server.url) as third:
            first.create()
            second.create()
            with pytest.raises(Refused) as caught:
                third.create()
            assert caught.value.code == "too_many_sessions"
            first.close()
            third.create()


def test_the_model_thread_dies():
    with serving() as server, raw(server) as socket, raw(server) as idle:
        ask(socket, type="create")
        ask(socket, type="run")
        assert server.call("GET", "/health")[0] == 200

        def fault(loop: Any) -> None:
            raise SystemExit("the machine has a fault")

        server.service.host.call(fault)
        closed, reason = end_of(socket)
        assert (closed, reason.split(":")[0]) == (4500, "model_stopped")
        status, health = server.call("GET", "/health")
        assert status == 503 and not health["ok"] and health["reason"]
        idle.send('{"type":"create"}')
        assert end_of(idle)[0] == 4500
        status, answer = server.call("POST", "/v1/sessions")
        assert (status, answer["error"]["code"]) == (503, "model_stopped")
        assert server.metric("scd_healthy") == 0


def test_a_server_that_stops_says_goodbye():
    with serving() as server:
        client = Client(server.url)
        client.create()
        server.server.should_exit = True
        with pytest.raises(SessionEnded, match="1012"):
            client.run()
            for _ in client.frames():
                pass


def test_a_dense_world_without_actions_is_played():
    with serving(tiny_playable(tiny_dense, conditions=ConditionSpec())) as server:
        with Client(server.url) as client:
            assert client.welcome.world.actions == () and not client.welcome.world.separable
            client.create()
            assert client.step(count=2)[1].header.action is None
            with pytest.raises(Refused) as caught:
                client.step(0)
            assert caught.value.code == "unknown_action"


def test_nobody_is_there(unused_port: int = 9):
    with pytest.raises(ConnectionError, match="no scd server answers"):
        Client(f"ws://127.0.0.1:{unused_port}")


def test_a_server_that_dies_within_the_handshake_is_not_there():
    def die() -> None:
        end, _ = listener.accept()
        end.recv(65536)
        end.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=die)
        thread.start()
        with pytest.raises(ConnectionError, match="no scd server answers.*valid HTTP response"):
            Client(f"ws://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()


def test_frames_are_counted(server: Serving):
    before = server.metric('scd_sent_frames_total{codec="jpeg"}')
    with Client(server.url) as client:
        client.create()
        client.step(1, count=3)
        client.close()
    assert server.metric('scd_sent_frames_total{codec="jpeg"}') == before + 3
