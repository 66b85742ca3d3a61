"""Sessions that visitors left: the next one is served, the disk keeps to its limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from scd.common.files import take_lock
from scd.models.checkpoint import save_world
from scd.serving.client import Client
from scd.serving.messages import Leave
from scd.serving.store import LOCK, OWN, SUFFIX, kept_files
from tests.servers import serving, tiny_playable
from tests.tiny_host import Client as Hearer
from tests.tiny_host import alone, done, equal, hosting, make_engine, make_world, refused, until


def disk_bytes(folder: Path) -> int:
    """Of everything in a folder, as it is at this moment."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


class Watch:
    """The most bytes that a folder ever had, as far as looks without a pause can tell."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most = folder, 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.over.wait(0.02):
            self.most = max(self.most, disk_bytes(self.folder))

    def end(self) -> int:
        self.over.set()
        self.thread.join()
        return self.most


@pytest.mark.parametrize("by", ["count", "bytes"])
def test_abandoned_sessions_lock_nobody_out(tmp_path, by):
    """The same as tools/abandoned.py does with 10,000."""
    world, said = make_world(), []
    limits = {"kept_sessions": 6} if by == "count" else {"kept_gib": 2**-10}
    num_frames = 2 if by == "count" else 12
    with hosting(world, said=said, evict_dir=tmp_path, max_sessions=2, **limits) as host:
        watch, names, waited = Watch(tmp_path), [], []
        for number in range(40):
            client, began = Hearer(host), time.monotonic()
            names.append(done(host.create(sink=client, seed=number)).session)
            waited.append(time.monotonic() - began)
            done(host.step(names[-1], 1, count=num_frames))
            # A connection that is lost.
            done(host.detach(names[-1], client))
        assert sorted(waited)[len(waited) // 2] < 1.0
        # Who comes back to one that is kept finds it as it was.
        until(lambda: host.overview().num_sessions + host.overview().num_evicted < 40)
        wanted = alone(world, make_engine(world), [1] * num_frames + [2], seed=39)[-1:]
        equal(done(host.step(names[-1], 2)), wanted)
        refused(host.look(names[0]), "unknown_session", "expired")
        until(lambda: any("to which nobody came back" in line for line in said))
        most, seen = watch.end(), host.overview()
        assert seen.num_evicted <= seen.max_evicted and most <= seen.max_evicted_bytes
        assert seen.num_expired >= 20
        if by == "count":
            assert seen.max_evicted == 6
        else:
            assert seen.max_evicted_bytes == 2**20 and most > 2**19
        assert len([line for line in said if "to which nobody" in line]) == 1


def test_too_little_room_on_disk_is_refused_at_the_start(tmp_path):
    with (
        pytest.raises(ValueError, match="may be needed for 3 sessions in memory, got kept_gib"),
        hosting(evict_dir=tmp_path, max_sessions=3, kept_gib=1e-5),
    ):
        pass


def test_a_restart_keeps_to_the_limits_and_the_newest(tmp_path):
    world = make_world()
    with hosting(world, evict_dir=tmp_path) as host:
        names = [done(host.create(seed=seed)).session for seed in range(6)]
    for age, name in enumerate(names):
        when = time.time() - 100 * age
        os.utime(tmp_path / f"{name}{SUFFIX}", (when, when))
    with hosting(world, evict_dir=tmp_path, kept_sessions=4) as host:
        assert host.overview().num_evicted == 4 and host.overview().num_expired == 2
        assert set(kept_files(tmp_path)) == set(names[:4])
    with hosting(world, evict_dir=tmp_path, kept_s=150.0) as host:
        assert set(kept_files(tmp_path)) == set(names[:2])
        # Too old while the host runs.
        os.utime(tmp_path / f"{names[1]}{SUFFIX}", (1, 1))
        host._loop.evictions.store._look()
        until(lambda: set(kept_files(tmp_path)) == {names[0]})
        assert done(host.look(names[0])).seed == 0


def test_a_session_whose_page_was_left_goes_unless_somebody_attaches_it(tmp_path):
    with hosting(evict_dir=tmp_path, left_s=0.3, idle_s=0.1) as host:
        client = Hearer(host)
        gone, back = (done(host.create(seed=seed)).session for seed in (1, 2))
        for name in (gone, back):
            done(host.attach(name, client))
            # A page that is loaded anew has said goodbye too, before its connection ends.
            done(host.say(Leave, name))
            done(host.detach(name, client))
        done(host.attach(back, client))
        until(lambda: host.overview().num_evicted == 1 and not host.overview().num_sessions)
        until(lambda: not kept_files(tmp_path).get(gone))
        time.sleep(0.5)
        assert done(host.look(back)).seed == 2
        until(lambda: host.overview().num_evicted == 1)
        # One that is on disk already.
        done(host.say(Leave, back))
        until(lambda: host.overview().num_evicted == 0)
        refused(host.look(back), "unknown_session")
        refused(host.say(Leave, back), "unknown_session")


def test_links_and_pipes_in_the_folder_are_left_alone(tmp_path):
    folder, outside = tmp_path / "kept", tmp_path / "outside"
    for one in (folder, outside / f"{OWN}x"):
        one.mkdir(parents=True)
    precious = outside / "precious"
    precious.write_text("as it was")
    (outside / f"{OWN}x" / LOCK).write_text("")
    (outside / f"{OWN}x" / f"theirs{SUFFIX}").write_text("as it was")
    (folder / f"link{SUFFIX}").symlink_to(precious)
    os.mkfifo(folder / f"pipe{SUFFIX}")
    (folder / f"{OWN}link").symlink_to(outside / f"{OWN}x")
    (folder / f"{OWN}locks").mkdir()
    (folder / f"{OWN}locks" / LOCK).symlink_to(precious)
    (folder / f"{OWN}pipe").mkdir()
    os.mkfifo(folder / f"{OWN}pipe" / LOCK)
    (folder / f".writing-gone{SUFFIX}").symlink_to(outside / "nowhere")
    with hosting(evict_dir=folder, idle_s=0.02) as host:
        name = done(host.create(seed=3)).session
        until(lambda: host.overview().num_evicted == 1)
        for other in ("link", "pipe", "theirs"):
            refused(host.look(other), "unknown_session")
        assert done(host.look(name)).seed == 3
    assert precious.read_text() == "as it was"
    assert (outside / f"{OWN}x" / f"theirs{SUFFIX}").exists()
    with pytest.raises(OSError):
        take_lock(folder / f"{OWN}locks" / LOCK)


def started(world: Path, place: Path) -> subprocess.Popen[str]:
    """A server with temporary folders in a place of ours, once it answers; its address follows."""
    words = ["serve", str(world), "--port", "0", "--memory-gib", "0.2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "scd", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(place)},
    )
    assert process.stdout is not None
    process.address = process.stdout.readline().strip()  # type: ignore[attr-defined]
    return process


def test_what_a_killed_server_left_is_cleaned_by_the_next(tmp_path):
    world = save_world(tiny_playable(), tmp_path / "world")
    place = tmp_path / "temporary"
    place.mkdir()
    left = place / "scd-sessions-of-somebody"
    left.mkdir()
    with started(world, place) as killed:
        (folder,) = set(place.glob("scd-sessions-*")) - {left}
        assert folder.stat().st_mode & 0o077 == 0
        with Client(killed.address) as client:  # type: ignore[attr-defined]
            client.create()
        killed.send_signal(signal.SIGKILL)
    assert folder.is_dir() and tempfile.gettempdir() != str(place)
    with started(world, place) as first, started(world, place) as second:
        # Gone, and neither of those that run has taken away the other's.
        folders = set(place.glob("scd-sessions-*")) - {left}
        assert folder not in folders and len(folders) == 2
        for process in (first, second):
            process.send_signal(signal.SIGTERM)
    assert set(place.glob("scd-sessions-*")) == {left}


def test_health_tells_how_full_the_store_is(tmp_path):
    with serving(evict_dir=tmp_path, sessions=2, kept_sessions=3) as server:
        for seed in range(7):
            status, state = server.call("POST", "/v1/sessions", {"seed": seed})
            assert status == 201, state
        until(lambda: server.metric("scd_evicted") == 3)
        _, health = server.call("GET", "/health")
        assert (health["sessions"], health["max_sessions"], health["attached"]) == (2, 2, 0)
        assert (health["on_disk"], health["max_on_disk"]) == (3, 3)
        assert 0 < disk_bytes(tmp_path) <= health["disk_bytes"] + 2**16
        assert health["disk_bytes"] <= health["max_disk_bytes"]
        assert server.metric("scd_expired_total") == 2


def test_goodbye_needs_no_token_and_deletes_nothing_at_once():
    token = "0123456789abcdef-secret"
    with serving(token=token, left_s=1000.0) as server, Client(server.url, token=token) as client:
        name = client.create().session
        assert server.call("POST", f"/v1/sessions/{name}/leave") == (204, b"")
        assert server.call("POST", f"/v1/sessions/{name}/restart")[0] == 401
        assert server.call("DELETE", f"/v1/sessions/{name}")[0] == 401
        assert server.call("POST", f"/v1/sessions/{'x' * 22}/leave")[0] == 404
        evil = {"Origin": "http://evil.example"}
        assert server.call("POST", f"/v1/sessions/{name}/leave", b"", evil)[0] == 403
        assert client.step(1)
