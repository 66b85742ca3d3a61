"""Several replicas behind one address, one of them killed: the command, as it is started."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from scd.engine.open import open_engine
from scd.models.checkpoint import save_world
from scd.serving.admission import HostConfig
from scd.serving.client import Client, Refused, SessionEnded
from scd.serving.host import Host
from scd.serving.messages import Create, State, Step
from scd.serving.metrics import merged
from scd.serving.ray_app import serve_replicas
from scd.serving.settings import ServeConfig
from scd.serving.store import SUFFIX
from tests.servers import tiny_playable
from tests.serving.test_serve import alone
from tests.serving.test_serve_slow import dripping, took_s

TOKEN = "a token of this test"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
BACKUP_S, BODY_S = 0.3, 3.0
START_S = 300.0
"""Of a machine that does other things too."""

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason='ray is not installed: pip install -c constraints.txt -e ".[ray]"',
)


class Replicas:
    """A server with two replicas, as a command."""

    def __init__(self, folder: Path, *flags: str, before: str = "pass") -> None:
        run = save_world(tiny_playable(), folder / "world")
        (folder / "token").write_text(TOKEN)
        self.kept = folder / "kept"
        words = ["serve", str(run), "--port", "0", "--evict-dir", str(self.kept)]
        words += ["--token-file", str(folder / "token"), "--backup-s", str(BACKUP_S)]
        words += ["--memory-gib", "0.5", "--limits.messages-per-s", "2000", *flags]
        words += ["--limits.body-s", str(BODY_S), "--limits.head-s", "2"]
        program = f"import sys; {before}; from scd.cli import main; sys.exit(main({words!r}))"
        with (folder / "errors").open("w") as self.errors:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", program],
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
                cwd=Path(__file__).parents[2],
            )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip().rstrip("/")
        assert self.url.startswith("http://127.0.0.1:"), (folder / "errors").read_text()

    def client(self, **options: Any) -> Client:
        return Client(self.url, token=TOKEN, quality=100, timeout_s=120.0, **options)

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        shown = HEADERS if headers is None else headers
        asked = urllib.request.Request(self.url + path, data=data, method=method, headers=shown)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(asked, timeout=120) as answer:
                status, kind, data = answer.status, answer.headers["content-type"], answer.read()
        except urllib.error.HTTPError as error:
            status, kind, data = error.code, error.headers["content-type"], error.read()
        return status, json.loads(data) if kind == "application/json" else data

    def metric(self, name: str) -> dict[int, float]:
        """One number of each replica, by its process."""
        status, text = self.call("GET", "/metrics")
        assert status == 200
        found = re.findall(rf'^{name}{{replica="[^"]*-(\d+)"}} (.*)$', text.decode(), re.M)
        return {int(number): float(value) for number, value in found}

    def step(self, session: str, action: int, count: int = 1) -> list[np.ndarray]:
        """Frames without loss."""
        path = f"/v1/sessions/{session}/step?format=png"
        status, made = self.call("POST", path, {"action": action, "count": count})
        assert status == 200, made
        pictures = [base64.b64decode(frame["picture"]) for frame in made["frames"]]
        return [np.asarray(Image.open(io.BytesIO(one))) for one in pictures]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    running = Replicas(tmp_path_factory.mktemp("ray"), "--replicas", "2")
    try:
        yield running
    finally:
        running.process.poll() is None and running.stop()


def equal(made: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(made) == len(wanted)
    for one, other in zip(made, wanted, strict=True):
        assert np.array_equal(one, other)


@needs_ray
def test_sessions_are_spread_and_each_has_its_own_frames(server: Replicas):
    clients = [server.client() for _ in range(4)]
    names = []
    for seed, client in enumerate(clients):
        state = client.create(seed=seed)
        names.append(state.session)
        client.step(1, count=3)
    assert sorted(server.metric("scd_attached").values()) == [2, 2]
    # The router hears of them, and of the first copies on disk, a moment later.
    wait_for(lambda: server.call("GET", "/health", headers={})[1]["attached"] == 4)
    wait_for(lambda: server.call("GET", "/health", headers={})[1]["disk_bytes"] > 0)
    status, health = server.call("GET", "/health", headers={})
    assert (status, health["ok"], health["reason"]) == (200, True, "")
    assert (health["replicas"], health["failing"], health["sessions"]) == (2, 0, 4)
    # Of each replica, or of the folder that both share.
    alone_has = ServeConfig()
    assert health["max_sessions"] == 2 * alone_has.sessions
    assert health["max_on_disk"] == alone_has.kept_sessions
    assert health["disk_bytes"] < health["max_disk_bytes"]
    for seed, (name, client) in enumerate(zip(names, clients, strict=True)):
        # A request finds the replica that plays the session, whose client hears the frames too.
        equal(server.step(name, 2, count=2), alone([1] * 3 + [2] * 2, seed=seed)[3:])
        client.close()
        client.disconnect()


@needs_ray
def test_who_comes_back_finds_the_replica_that_plays_the_session(server: Replicas):
    before = server.metric("scd_restores_total")
    with server.client() as other, server.client() as client:
        other.create()
        name = client.create(seed=5).session
        client.step(3, count=4)
        client.disconnect()
        for index in range(4, 8):
            with server.client() as again:
                assert again.attach(name).frame == index - 1
                (frame,) = again.step(2)
                assert (frame.header.frame, frame.header.generation) == (index, 0)
        other.close()
    assert server.metric("scd_restores_total") == before
    equal(server.step(name, 1), alone([3] * 4 + [2] * 4 + [1], seed=5)[-1:])
    assert server.call("DELETE", f"/v1/sessions/{name}")[0] == 204


@needs_ray
def test_a_connection_takes_over_a_session_of_another_replica(server: Replicas):
    with server.client() as one, server.client() as two:
        names = [client.create(seed=seed).session for seed, client in enumerate((one, two))]
        assert sorted(server.metric("scd_attached").values()) == [1, 1]
        for action, client in enumerate((one, two)):
            client.step(action, count=6)
        two.detach()
        with pytest.raises(Refused) as refused:
            two.attach(names[0])
        assert refused.value.code == "session_busy"
        one.detach()
        state = two.attach(names[0])
        assert (state.session, state.frame, state.history_from) == (names[0], 5, -1)
        two.rewind(2)
        equal(server.step(names[0], 3, count=2), alone([0] * 3 + [3] * 2, seed=0)[-2:])
        assert sum(server.metric("scd_restores_total").values()) >= 1
        two.close()
    assert server.call("DELETE", f"/v1/sessions/{names[1]}")[0] == 204


@needs_ray
def test_an_upload_is_known_to_all_replicas(server: Replicas):
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (200, 30, 60)).save(file, "PNG")
    status, upload = server.call("POST", "/v1/uploads", file.getvalue())
    assert (status, upload["frames"]) == (201, 1)
    with server.client() as one, server.client() as two:
        for client in (one, two):
            state = client.create(start="upload", upload=upload["upload"])
            assert (state.frame, state.num_given) == (0, 1)
        assert sorted(server.metric("scd_attached").values()) == [1, 1]
        for client in (one, two):
            client.close()


@needs_ray
def test_strangers_and_mistakes_are_answered_as_by_one_server(server: Replicas):
    with pytest.raises(Refused) as refused:
        Client(server.url, token="another token of sixteen")
    assert (refused.value.code, refused.value.fatal) == ("unauthorised", True)
    assert server.call("GET", "/v1/world", headers={})[0] == 401
    assert server.call("GET", "/v1/world")[1]["world"]["name"] == "world"
    foreign = HEADERS | {"origin": "https://elsewhere.example"}
    status, said = server.call("POST", "/v1/sessions", {}, foreign)
    assert (status, said["error"]["code"]) == (403, "forbidden_origin")
    status, said = server.call("GET", "/v1/world", headers=HEADERS | {"host": "elsewhere.example"})
    assert (status, said["error"]["code"]) == (421, "wrong_host")
    with server.client() as client:
        with pytest.raises(Refused) as refused:
            client.attach("nobody")
        assert (refused.value.code, refused.value.fatal) == ("unknown_session", False)
        assert client.create().frame == -1
        client.close()
    status, said = server.call("GET", "/v1/sessions/nobody")
    assert (status, said["error"]["code"]) == (404, "unknown_session")
    status, said = server.call("POST", "/v1/sessions", {"surprise": 1})
    assert (status, said["error"]["code"]) == (400, "unknown_field")
    with pytest.raises(ConnectionError, match="no scd server"):
        Client(server.url + "/elsewhere", token=TOKEN)
    assert b"<html" in server.call("GET", "/", headers={})[1].lower()


@needs_ray
@pytest.mark.parametrize("path", ["/v1/sessions", "/v1/uploads", "/v1/sessions/restore"])
def test_a_body_that_comes_byte_by_byte_ends_in_time_with_a_reason(server: Replicas, path: str):
    port = int(server.url.rpartition(":")[2])
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
        slow.sendall(f"{head}Content-Length: 5000\r\n\r\n".encode())
        with dripping(slow, b"@" + bytes(7) + b" " * 500):
            assert server.call("GET", "/health", headers={})[0] == 200
            seconds, said = took_s(slow)
    assert said.startswith(b"HTTP/1.1 408") and b"did not come within 3 s" in said
    assert BODY_S - 0.5 < seconds < 4 * BODY_S
    # The replica that it was for goes on.
    assert [server.call("GET", "/v1/world")[0] for _ in range(4)] == [200] * 4
    assert server.call("GET", "/health", headers={})[1]["failing"] == 0


@needs_ray
def test_only_this_machine_reaches_ray_and_only_the_front_reaches_a_replica(server: Replicas):
    ours = [psutil.Process(server.process.pid)]
    ours += ours[0].children(recursive=True)
    numbers = {process.pid for process in ours}
    assert len(numbers) > 5
    listening = [
        one
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.pid in numbers
    ]
    open_to_all = [one for one in listening if "127.0.0.1" not in one.laddr.ip]
    # Each replica has one port of Ray Serve's own, which wants the token of this Ray.
    assert len(open_to_all) <= len(server.metric("scd_healthy"))
    answers = set()
    for one in listening:
        if one.pid in server.metric("scd_healthy") and one.laddr.ip == "127.0.0.1":
            asked = urllib.request.Request(f"http://127.0.0.1:{one.laddr.port}/health")
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=10)
            answers.add(caught.value.code)
    assert answers == {403}


@needs_ray
def test_a_session_goes_on_when_its_replica_is_killed_while_it_streams(server: Replicas):
    with server.client() as safe, server.client() as client:
        other = safe.create(seed=1).session
        safe.step(2, count=3)
        attached = server.metric("scd_frames_total")
        name = client.create(seed=8).session
        client.act(3)
        client.run(fps=30.0)
        seen = []
        began, number = time.monotonic(), 0
        with pytest.raises(SessionEnded, match="1012 a replica has ended"):
            for frame in client.frames():
                seen.append(frame.header.frame)
                if not number and time.monotonic() - began > 6 * BACKUP_S and len(seen) > 20:
                    made = server.metric("scd_frames_total")
                    number = max(made, key=lambda one: made[one] - attached[one])
                    os.kill(number, signal.SIGKILL)
        assert seen == list(range(len(seen)))
        killed = time.monotonic()
        with server.client() as again:
            state = again.attach(name)
            took_s = time.monotonic() - killed
            # The frames since the last copy are lost, and the client is told which is the newest.
            lost = seen[-1] - state.frame
            assert 0 <= lost <= 30.0 * 3 * BACKUP_S + 5, (lost, state.frame, len(seen))
            assert (state.generation, state.seed, state.action) == (0, 8, 3)
            assert state.history_from == state.frame and not state.running
            print(f"{lost} frames lost of {len(seen)}, back after {took_s:.2f} s")
            wanted = alone([3] * (state.frame + 1) + [1] * 3 + [2], seed=8)
            frames = again.step(1, count=3)
            assert [one.header.frame for one in frames] == [state.frame + one for one in (1, 2, 3)]
            equal(server.step(name, 2), wanted[-1:])
            assert number not in server.metric("scd_healthy")
            # The client of the other replica has noticed nothing.
            assert safe.step(1)[0].header.frame == 3
            equal(server.step(other, 1), alone([2] * 3 + [1] * 2, seed=1)[-1:])
            again.close()
        safe.close()
    wait_for(lambda: len(server.metric("scd_healthy")) == 2)


@needs_ray
def test_a_server_that_ends_writes_every_session(server: Replicas):
    played = {}
    clients = [server.client() for _ in range(4)]
    for seed, client in enumerate(clients):
        name = client.create(seed=seed).session
        # Young sessions, of which there may be no copy yet.
        client.step(seed, count=5)
        played[name] = [seed] * 5
    assert server.stop() == 128 + signal.SIGTERM
    for client in clients:
        with pytest.raises(SessionEnded):
            client.step()
    assert {path.name.removesuffix(SUFFIX) for path in server.kept.glob(f"*{SUFFIX}")} == set(
        played
    )
    assert not list(server.kept.glob(".host-*"))
    world = tiny_playable()
    config = HostConfig(memory_gib=0.5, evict_dir=server.kept)
    host = Host(world, open_engine(world.model, "fast"), config, report=lambda text: None)
    host.start()
    try:
        for seed, (name, actions) in enumerate(played.items()):
            (frame,) = host.ask(Step(action=1), name).result(30.0).frames
            equal([frame.pixels], alone([*actions, 1], seed=seed)[-1:])
        created = host.ask(Create()).result(30.0).message
        assert isinstance(created, State) and created.frame == -1
    finally:
        host.stop()


@needs_ray
@pytest.mark.slow
def test_replicas_start_for_many_clients_and_end_for_few_without_loss(tmp_path: Path):
    flags = ("--replicas", "1", "--max-replicas", "2", "--clients-per-replica", "2")
    hurry = "import scd.serving.ray_app as app; app.UPSCALE_S, app.DOWNSCALE_S = 1.0, 2.0"
    server = Replicas(tmp_path, *flags, before=hurry)
    try:
        (first,) = server.metric("scd_healthy")
        clients = [server.client() for _ in range(4)]
        wait_for(lambda: len(server.metric("scd_healthy")) == 2)
        began = time.monotonic()
        # Who comes now goes to the new one, which has nobody.
        with server.client() as late:
            name = late.create(seed=3).session
            seen = [frame.header.frame for frame in late.step(2, count=6)]
            late.run(fps=20.0)
            (second,) = (one for one, many in server.metric("scd_attached").items() if many)
            assert second != first
            for client in clients:
                client.disconnect()
            with pytest.raises(SessionEnded):
                for frame in late.frames():
                    seen.append(frame.header.frame)
            print(f"ended {time.monotonic() - began:.1f} s after the clients had gone")
            with server.client() as again:
                state = again.attach(name)
                # Every frame that was made is there, seen or not, and the history too.
                assert state.frame >= seen[-1] and state.history_from == -1
                assert seen == list(range(len(seen)))
                wanted = alone([2] * (state.frame + 1) + [1], seed=3)
                equal(server.step(name, 1), wanted[-1:])
                assert server.metric("scd_attached") == {first: 1}
                again.close()
    finally:
        server.stop()


@needs_ray
@pytest.mark.slow
def test_a_cluster_is_given_the_server_as_an_application(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run = save_world(tiny_playable(), tmp_path / "world")
    args = {"run": str(run), "replicas": 2, "port": port, "evict_dir": str(tmp_path / "kept")}
    program = f"""
import sys
from scd.serving.ray_app import build, ray_running
from scd.serving.settings import ServeConfig
with ray_running(ServeConfig(replicas=3)):
    from ray import serve
    serve.run(build({args | {"memory_gib": 0.5}!r}), route_prefix=None)
    print("ready", flush=True)
    sys.stdin.readline()
    serve.shutdown()
"""
    words = [sys.executable, "-c", program]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as cluster:
        assert cluster.stdin and cluster.stdout and cluster.stdout.readline() == "ready\n"
        try:
            with Client(f"http://127.0.0.1:{port}", timeout_s=60.0) as client:
                name = client.create(seed=4).session
                assert client.step(1, count=3)[-1].header.frame == 2
        finally:
            cluster.stdin.write("\n")
            cluster.stdin.flush()
            assert cluster.wait(120) == 0
    assert [path.name for path in (tmp_path / "kept").glob(f"*{SUFFIX}")] == [f"{name}{SUFFIX}"]


def wait_for(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + START_S
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.5)


def test_settings_that_no_replicas_can_have():
    for changes, message in (
        ({"replicas": 0}, "replicas must be 1 or more, got 0"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas must be 3 or more"),
        ({"max_replicas": 2}, "need replicas"),
        ({"ray_address": "auto"}, "need replicas"),
        ({"replicas": 2, "ray_address": "auto"}, "needs an evict_dir"),
        ({"backup_s": 0.0}, "backup_s must be"),
        ({"clients_per_replica": 0.0}, "clients_per_replica must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ServeConfig(**changes)


def test_without_ray_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ValueError, match=r'needs ray, which is not installed: pip install .*-e "\.\[ray'
    ):
        serve_replicas(ServeConfig(replicas=2))


@needs_ray
def test_a_port_in_use_and_a_missing_world_are_said_before_ray_starts(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 is in use"):
            serve_replicas(ServeConfig(replicas=2, port=port))
    with pytest.raises(OSError, match="there is no"):
        serve_replicas(ServeConfig(replicas=2, run=str(tmp_path / "nothing")))


def test_numbers_of_several_servers_are_told_apart():
    one = '# HELP scd_a What.\n# TYPE scd_a counter\nscd_a_total{code="x y"} 1.0\n'
    two = "# HELP scd_a What.\n# TYPE scd_a counter\nscd_a_total 2.0\n# HELP scd_b B.\nscd_b 3.0\n"
    assert merged([("p", one), ("q", two)]).decode().splitlines() == [
        "# HELP scd_a What.",
        "# TYPE scd_a counter",
        'scd_a_total{replica="p",code="x y"} 1.0',
        'scd_a_total{replica="q"} 2.0',
        "# HELP scd_b B.",
        'scd_b{replica="q"} 3.0',
    ]
