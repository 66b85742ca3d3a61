"""The HTTP API of a real server, what it refuses, and the page's files."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from inspect import signature
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from websockets.exceptions import InvalidStatus

from scd.cli import main
from scd.data.clip import frames_to_pixels
from scd.engine.open import open_engine
from scd.models.checkpoint import World, save_world
from scd.models.shipped import CLIPS_FILE
from scd.serving import run
from scd.serving.access import Bucket, Buckets
from scd.serving.admission import Counted
from scd.serving.client import Client, Refused
from scd.serving.http_api import PAGE, read_page
from scd.serving.messages import Create, ServeError, State
from scd.serving.ray_app import serve_replicas
from scd.serving.run import held_out_clips, listening, open_service, what_is_kept
from scd.serving.service import answer, as_error
from scd.serving.settings import ClientLimits, ServeConfig, is_loopback, read_token
from scd.streaming.rollout import Rollout
from tests.servers import Serving, serving, tiny_playable
from tests.serving.test_serve_memory import uncollected
from tests.tiny_host import until


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(sessions=12) as running:
        yield running


def picture(height: int = 8, width: int = 12, level: int = 200) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def created(server: Serving, **beginning: Any) -> str:
    status, state = server.call("POST", "/v1/sessions", beginning)
    assert status == 201, state
    return state["session"]


def pixels(frame: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(frame["picture"]))))


def test_steps_are_the_frames_of_a_rollout_bit_by_bit(server: Serving):
    session = created(server, seed=4)
    world = tiny_playable()
    rollout = Rollout(world, seed=4, engine=open_engine(world.model, "fast"))
    rollout.begin()
    for action in (1, 3, 0):
        status, answer = server.call(
            "POST", f"/v1/sessions/{session}/step?format=png", {"action": action}
        )
        assert status == 200 and answer["state"]["frame"] == answer["frames"][0]["frame"]
        wanted = frames_to_pixels(rollout.step(torch.tensor([action])))[0].numpy()
        difference = pixels(answer["frames"][0]).astype(int) - wanted
        assert np.abs(difference).max() <= 1
    assert server.call("DELETE", f"/v1/sessions/{session}") == (204, b"")
    assert server.call("GET", f"/v1/sessions/{session}")[0] == 404


def test_the_life_of_a_session(server: Serving):
    session = created(server, seed=4)
    path = f"/v1/sessions/{session}"
    _, first = server.call("POST", f"{path}/step?format=png", {"action": 1, "count": 5})
    assert [frame["frame"] for frame in first["frames"]] == [0, 1, 2, 3, 4]
    status, data = server.call("POST", f"{path}/snapshot")
    assert status == 200 and isinstance(data, bytes)
    status, fork = server.call("POST", f"{path}/fork", {"frame": 2})
    assert (status, fork["forked_from"], fork["frame"]) == (201, session, 2)
    assert server.call("POST", f"{path}/rewind", {"frame": 2})[1]["generation"] == 1
    for again in (session, fork["session"]):
        _, second = server.call(
            "POST", f"/v1/sessions/{again}/step?format=png", {"action": 1, "count": 2}
        )
        for one, wanted in zip(second["frames"], first["frames"][3:], strict=True):
            assert (pixels(one) == pixels(wanted)).all()
    status, restored = server.call("POST", "/v1/sessions/restore", data)
    assert (status, restored["frame"]) == (201, 4)
    assert server.call("POST", f"{path}/restart")[1]["frame"] == -1
    assert server.call("POST", f"{path}/reset", {"start": "clip", "clip": 1})[1]["frame"] == 2
    assert server.call("POST", f"{path}/set", {"steps": 3})[1]["steps"] == 3
    for one in (session, fork["session"], restored["session"]):
        assert server.call("DELETE", f"/v1/sessions/{one}")[0] == 204


def test_uploads_begin_and_join_streams(server: Serving):
    status, upload = server.call("POST", "/v1/uploads", picture())
    assert (status, upload["frames"]) == (201, 1)
    session = created(server, start="upload", upload=upload["upload"], action=2)
    status, state = server.call("GET", f"/v1/sessions/{session}")
    assert (state["frame"], state["num_given"]) == (0, 1)
    status, shown = server.call("GET", f"/v1/sessions/{session}/frames/0")
    assert status == 200
    assert abs(np.asarray(Image.open(io.BytesIO(shown))).mean() - 200) < 5
    fields = {"upload": upload["upload"], "action": 1}
    status, state = server.call("POST", f"/v1/sessions/{session}/observe", fields)
    assert (status, state["frame"]) == (200, 1)
    server.call("DELETE", f"/v1/sessions/{session}")


def test_the_history_as_a_video(server: Serving):
    session = created(server)
    assert server.call("GET", f"/v1/sessions/{session}/video")[0] == 409
    server.call("POST", f"/v1/sessions/{session}/step", {"count": 20})
    status, data = server.call("GET", f"/v1/sessions/{session}/video")
    assert status == 200
    with av.open(io.BytesIO(data)) as opened:
        frames = [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]
    assert len(frames) == 20 and min(frames[0].shape[:2]) >= 256
    server.call("DELETE", f"/v1/sessions/{session}")


@pytest.mark.parametrize(
    "method, path, body, status, code",
    [
        ("GET", "/v1/sessions/none", None, 404, "unknown_session"),
        ("GET", "/v1/sessions/..%2F..%2Fetc", None, 404, "unknown_"),
        ("GET", "/v1/nothing", None, 404, "unknown_path"),
        ("PUT", "/v1/sessions", b"{}", 405, "unknown_path"),
        ("POST", "/v1/sessions", b"[", 400, "bad_message"),
        ("POST", "/v1/sessions", {"x": 1}, 400, "unknown_field"),
        ("POST", "/v1/sessions", {"seed": -1}, 400, "bad_field"),
        ("POST", "/v1/sessions", {"start": "clip", "clip": 7}, 400, "unknown_clip"),
        ("POST", "/v1/sessions", {"start": "upload", "upload": "x"}, 404, "unknown_upload"),
        ("POST", "/v1/sessions", b" " * 70000, 413, "too_large"),
        ("POST", "/v1/sessions/restore", b"nothing", 400, "bad_snapshot"),
        ("POST", "/v1/uploads", b"nothing", 415, "not_media"),
        ("POST", "/v1/uploads", picture(64, 64)[:80], 400, "damaged"),
        ("POST", "/v1/uploads", b"", 415, "not_media"),
        ("GET", "/secret.txt", None, 404, "unknown_path"),
        ("GET", "/../run.py", None, 404, "unknown_path"),
    ],
)
def test_refusals(server: Serving, method: str, path: str, body: Any, status: int, code: str):
    got, answer = server.call(method, path, body)
    assert got == status, answer
    assert answer["error"]["code"].startswith(code) and answer["error"]["message"]


def test_large_bodies_are_not_read_to_their_end():
    limits = ClientLimits(max_upload_bytes=1000, max_snapshot_bytes=1000, requests_per_s=5.0)
    with serving(limits=limits) as server:
        for path in ("/v1/uploads", "/v1/sessions/restore"):
            status, answer = server.call("POST", path, bytes(5000))
            assert (status, answer["error"]["code"]) == (413, "too_large")
        statuses = [server.call("GET", "/v1/world")[0] for _ in range(40)]
        assert statuses[0] == 200 and statuses[-1] == 429


def test_files_beyond_the_memory_for_them_are_refused_as_they_come():
    with uncollected(), serving(memory_gib=0.1) as server:
        under_way = server.service.host.under_way
        session = server.call("POST", "/v1/sessions", {})[1]["session"]
        server.call("POST", f"/v1/sessions/{session}/step", {"count": 3})
        file = server.call("POST", f"/v1/sessions/{session}/snapshot")[1]
        assert isinstance(file, bytes)
        status, answer = server.call("POST", "/v1/sessions/restore", file)
        assert status == 201 and answer["frame"] == 2
        until(lambda: under_way.held == 0)
        for budget, code in ((len(file) + 50, "overloaded"), (99, "too_large")):
            under_way.budget = budget
            with_others = Counted(under_way, 99)
            status, answer = server.call("POST", "/v1/sessions/restore", file)
            assert (status, answer["error"]["code"]) == (503 if code == "overloaded" else 413, code)
            del with_others
            until(lambda: under_way.held == 0)
        # What is no snapshot is refused once its head has come, whatever is said to follow.
        under_way.budget = 2**30
        head = bytes(8) + bytes(100)
        answered = early_answer(server, len(head) + 10**7, head)
        assert b"400" in answered and b"bad_snapshot" in answered
        until(lambda: under_way.held == 0)


def early_answer(server: Serving, size: int, begin: bytes) -> bytes:
    """Announce a snapshot of some bytes, send the first ones, and return what comes then."""
    place = urlsplit(server.url)
    assert place.hostname and place.port
    with socket.create_connection((place.hostname, place.port), 30) as raw:
        words = f"POST /v1/sessions/restore HTTP/1.1\r\nHost: {place.netloc}\r\n"
        raw.sendall(f"{words}Content-Length: {size}\r\n\r\n".encode() + begin)
        raw.settimeout(30)
        answered = b""
        while not answered.endswith(b"}}") and (part := raw.recv(65536)):
            answered += part
        return answered


def test_other_origins_may_read_nothing_and_change_nothing(server: Serving):
    evil = {"Origin": "http://evil.example"}
    assert server.call("POST", "/v1/sessions", {}, evil)[0] == 403
    assert server.call("DELETE", "/v1/sessions/x", None, evil)[0] == 403
    assert server.call("GET", "/v1/world", None, {"Host": "evil.example"})[0] == 421
    assert server.call("GET", "/v1/world", None, {"Host": "localhost:99"})[0] == 200
    own = {"Origin": server.url}
    session = server.call("POST", "/v1/sessions", {}, own)[1]["session"]
    assert server.call("DELETE", f"/v1/sessions/{session}", None, own)[0] == 204


def test_the_page_is_there_and_shut_in(server: Serving):
    opener = build_opener(ProxyHandler({}))
    with opener.open(server.url + "/", timeout=30) as answer:
        headers, page = answer.headers, answer.read()
    assert headers["content-type"].startswith("text/html") and b"<canvas" in page
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    files = read_page(PAGE)
    for name, (kind, data) in files.items():
        with opener.open(f"{server.url}/{name}", timeout=30) as answer:
            assert answer.read() == data and answer.headers["content-type"] == kind
    assert "index.html" in files


def test_health_and_metrics(server: Serving):
    status, health = server.call("GET", "/health")
    assert status == 200 and health["ok"]
    status, text = server.call("GET", "/metrics")
    names = {line.split("{")[0].split(" ")[0] for line in text.decode().splitlines()}
    assert {"scd_healthy", "scd_sessions", "scd_connections", "scd_frames_total"} <= names
    assert server.metric("scd_healthy") == 1


def test_a_bucket_fills_steadily():
    now = [0.0]
    bucket = Bucket(2.0, 4.0, lambda: now[0])
    assert [bucket.take() for _ in range(6)] == [True] * 4 + [False] * 2
    now[0] = 1.0
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    now[0] = 100.0
    assert sum(bucket.take() for _ in range(10)) == 4
    buckets = Buckets(1.0, 1.0, lambda: now[0])
    assert [buckets.take(one) for one in "aabab"] == [True, False, True, False, False]


def test_who_may_reach_the_server():
    assert all(is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "[::1]"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "10.0.0.1", "::", "example.org"))
    with pytest.raises(ValueError, match="--allow-remote"):
        ServeConfig(host="0.0.0.0")
    with pytest.raises(ValueError, match="--token"):
        ServeConfig(host="0.0.0.0", allow_remote=True)
    assert not ServeConfig(host="0.0.0.0", allow_remote=True, token="x" * 20).is_local


@pytest.mark.parametrize(
    "settings",
    [
        {"port": 70000},
        {"sessions": 0},
        {"max_fps": 0.0},
        {"engine": "slow"},
        {"token": "x", "token_file": "y"},
        {"origins": ("example.org",)},
        {"tls_cert": "x"},
        {"memory_gib": -1.0},
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any]):
    with pytest.raises(ValueError):
        ServeConfig(**settings)
    with pytest.raises(ValueError):
        ClientLimits(hello_s=0.0)


def test_tokens_come_from_a_file(tmp_path: Path):
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    assert read_token(ServeConfig(token_file=str(path))) == "0123456789abcdef"
    assert read_token(ServeConfig()) is None
    for short in ("", "short", "ü" * 20):
        path.write_text(short)
        with pytest.raises(ValueError, match="16 or more"):
            read_token(ServeConfig(token_file=str(path)))


def test_a_port_in_use_is_one_line(run: str, capsys: pytest.CaptureFixture[str]):
    with listening(ServeConfig(port=0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", run, "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"port {port} of 127.0.0.1 is in use" in said
    assert main(["serve", "nowhere", "--port", "0"]) == 2
    assert main(["serve", run, "--host", "no.such.host.invalid", "--allow-remote",
                 "--token", "x" * 20]) == 2  # fmt: skip


def test_held_out_clips_of_a_dataset(folder: str, tiny_world: World):
    clips = held_out_clips(folder, tiny_world)
    assert clips.frames.shape == (3, 16, 3, 32, 32) and clips.actions.shape == (3, 16)
    with pytest.raises(ValueError, match="32x32"):
        held_out_clips(folder, tiny_playable())


def test_the_worlds_own_clips_may_be_longer_than_uploads(tmp_path: Path):
    world = save_world(tiny_playable(), tmp_path / "world")
    generator = torch.Generator().manual_seed(0)
    clips = {
        "frames": torch.randint(0, 256, (1, 16, 3, 4, 6), generator=generator, dtype=torch.uint8),
        "actions": torch.zeros(1, 16, dtype=torch.long),
    }
    save_file(clips, world / CLIPS_FILE)
    limits = ClientLimits(max_upload_frames=8)
    service = open_service(ServeConfig(run=str(world), limits=limits, memory_gib=0.2), None)
    service.host.start()
    try:
        answer = service.ask(Create(start="clip", clip=0)).result(60)
        assert isinstance(answer.message, State) and answer.message.num_given == 16
    finally:
        service.host.stop()


def test_addresses_are_printed_at_once():
    for function in (run.serve, run.run_server, run.run_app, serve_replicas):
        assert signature(function).parameters["on_ready"].default is run.say


def test_the_command_serves_and_stops_at_a_signal(tmp_path: Path):
    world = save_world(tiny_playable(), tmp_path / "world")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = tmp_path / "kept"
    words = [str(world), "--port", str(port), "--evict-dir", str(kept), "--memory-gib", "0.2"]
    command = [sys.executable, "-m", "scd", "serve", *words]
    # As most machines have it: what is printed waits in a pipe until it is flushed.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        silent = threading.Timer(300, process.kill)
        silent.start()
        line = process.stdout.readline()
        silent.cancel()
        assert f"http://127.0.0.1:{port}/" in line
        with Client(f"http://127.0.0.1:{port}") as client:
            session = client.create(seed=1).session
            wanted = client.step(1, count=4)
            client.rewind(1)
            process.terminate()
            said = process.stderr.read()
            assert process.wait(60) == 143, said
    assert said.count("\n") == 1 and f"stopped by SIGTERM; sessions in {kept}: 1" in said
    assert kept.is_dir() and any(kept.iterdir())
    # The next server has the session as it was.
    with serving(tiny_playable(), evict_dir=kept) as server, Client(server.url) as client:
        assert client.attach(session).frame == 1
        again = client.step(1, count=2)
        assert all((a.pixels == b.pixels).all() for a, b in zip(again, wanted[2:], strict=True))


def said_to(server: Serving, *parts: bytes, end: bool = True) -> bytes:
    """Send bytes as they are and return what comes back; `end`: nothing more is sent."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
        if not end:
            return b""
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "x", "http://a b", "\x85"])
def test_an_origin_that_is_no_url_is_refused(server: Serving, origin: str):
    evil = {"Origin": origin}
    status, answer = server.call("POST", "/v1/sessions", {}, evil)
    assert (status, answer["error"]["code"]) == (403, "forbidden_origin")
    with pytest.raises(ValueError, match="an origin is scheme://host"):
        ServeConfig(origins=(origin,))


def test_a_client_that_leaves_within_its_body_is_no_fault(
    server: Serving, caplog: pytest.LogCaptureFixture
):
    head = b"POST /v1/sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{"
    before = server.metric('scd_errors_total{code="client_left"}')
    said_to(server, head, end=False)
    until(lambda: server.metric('scd_errors_total{code="client_left"}') == before + 1)
    assert not caplog.records


def test_paths_of_the_server_are_for_its_log_alone(caplog: pytest.LogCaptureFixture):
    said = as_error(OSError(28, "No space left on device", "/srv/secret/place"))
    assert (said.code, str(said)) == ("fault", "fault of the server: No space left on device")
    assert "/srv/secret/place" in caplog.text
    refusal = as_error(ValueError("x: must be 1"), 7)
    assert (refusal.code, refusal.request) == ("bad_request", 7)


def test_who_gives_up_waiting_leaves_no_complaint():
    future: Future[int] = Future()
    complaints: list[Any] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        waiting = asyncio.create_task(answer(future))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        del waiting
        future.set_exception(ServeError("model_stopped", "the server is stopping"))
        for _ in range(3):
            await asyncio.sleep(0.01)
            gc.collect()

    asyncio.run(scenario())
    assert not complaints


def test_guesses_of_a_token_are_slowed_over_websockets_too():
    limits = ClientLimits(requests_per_s=2.0)
    with serving(token="0123456789abcdef-secret", limits=limits) as server:
        codes = set()
        for _ in range(12):
            try:
                Client(server.url, token="0123456789abcdef-guess")
            except Refused as refused:
                codes.add(refused.code)
            except ConnectionError as refused:
                assert isinstance(refused.__cause__, InvalidStatus)
                codes.add(refused.__cause__.response.status_code)
        assert codes == {"unauthorised", 429}
        assert server.call("GET", "/health")[0] == 200


def test_what_is_said_of_sessions_is_what_lies_there(tmp_path: Path):
    config = ServeConfig(evict_dir=str(tmp_path))
    assert what_is_kept(ServeConfig()) == ""
    assert what_is_kept(config, 2) == f"; sessions in {tmp_path}: 0, lost: 2"
    assert what_is_kept(config, None).endswith(": 0, others were not written within 30 s")
    (tmp_path / "some.session.safetensors").write_bytes(b"")
    assert what_is_kept(config) == f"; sessions in {tmp_path}: 1"
