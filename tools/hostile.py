"""Bad manners by the hundred, against a server that this starts itself, on this machine alone.

    python tools/hostile.py --count 200 --seconds 60 --out runs/out/hostile.json

Two servers of one world are started, one of them with a token. Each attack makes `--count` requests
at most, for `--seconds` at most, while a visitor asks for the health and, before the next attack,
plays. Found is: an answer of 500 or more that does not say that the server is full, a visitor who
is not served, a health that does not answer, memory beyond what was promised, and what the server
logs as a fault of its own. `--seed` repeats it; `--attacks messages origins` runs some alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro
from fuzz_inputs import Wrong, ask, make_words, say, upload
from fuzz_mutations import mutate
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from scd.serving.client import Client, Refused

MEMORY_GIB = 0.25
"""What the servers are told that sessions may take."""

TOLERATED = 1.25
"""Largest memory beyond that of the idle server, over what sessions may take."""

OWN_GIB = 0.15
# Buffers of the network, of decoded uploads and of the allocator, which no session holds.

PATIENCE_S = 10.0
"""Within which a visitor must be served, and a health answered, whatever others do."""

TOKEN = "the-token-of-the-one-visitor"

FULL = (b"too_many", b"no_room", b"overloaded")
"""Codes with which a server may say 503: it is full, which is no fault."""

ORIGINS = (
    *("null", "x", "http://", "http://[", "https://[::1", "http://a:b", "http://a:99999999"),
    *("javascript:alert(1)", "file:///etc", "http://evil.example", "//", ":", "[", "http://\xe9"),
    *("http://user:pass@127.0.0.1", "http://127.0.0.1.evil.example", "http://" + "a" * 4000),
)
"""Origins that are none, and of pages that may not ask."""


@dataclass(frozen=True, kw_only=True)
class HostileConfig:
    """What is done, and how often."""

    seed: int = 0
    """Of all attacks."""
    count: int = 100
    """Requests, connections or messages of one attack."""
    seconds: float = 30.0
    """After which an attack ends, however many it made."""
    attacks: tuple[str, ...] = ()
    """Names of those to run; empty: all."""
    out: str = ""
    """File for what was found, as JSON; empty: it is only shown."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.attacks) - set(ATTACKS))
        if unknown or not 1 <= self.count <= 100_000 or not 0 < self.seconds <= 3600:
            raise ValueError(
                f"needed attacks of {', '.join(ATTACKS)}, a count of 1 .. 100000 and seconds up to "
                f"3600: {unknown}, {self.count}, {self.seconds}"
            )


@dataclass(kw_only=True)
class Target:
    """A server that runs."""

    url: str
    process: psutil.Process
    log: Path
    """What it says."""
    token: str | None = None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def resident_gib(self) -> float:
        # Decoders of uploads are children, and count.
        total = 0
        for one in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += one.memory_info().rss
        return total / 2**30

    def ask(self, request: bytes, wait_s: float = PATIENCE_S) -> bytes:
        """Send bytes, whatever they are, and return what comes back until nothing more does."""
        with self.connected(wait_s) as end:
            end.sendall(request)
            return received(end)

    def connected(self, wait_s: float = PATIENCE_S) -> socket.socket:
        end = socket.create_connection(("127.0.0.1", self.port), timeout=wait_s)
        end.settimeout(wait_s)
        return end


def received(end: socket.socket) -> bytes:
    """Return what comes on a connection until it ends or is silent."""
    parts = []
    with contextlib.suppress(OSError):
        while part := end.recv(65536):
            parts.append(part)
    return b"".join(parts)


@dataclass(kw_only=True)
class Attack:
    """One attack under way."""

    open: Target
    """Server without a token."""
    closed: Target
    """Server with one."""
    random: random.Random
    count: int
    seconds: float
    statuses: Counter[int] = field(default_factory=Counter)
    """Answers by status; 0: the connection ended without one."""

    def rounds(self) -> Iterator[int]:
        """Count until there were enough, or the time is over."""
        end = time.monotonic() + self.seconds
        for number in range(self.count):
            if time.monotonic() > end:
                return
            yield number

    def note(self, answer: bytes) -> int:
        """Count an answer by its status (Wrong: a fault of the server)."""
        found = re.match(rb"HTTP/1\.1 (\d{3})", answer)
        status = int(found[1]) if found else 0
        self.statuses[status] += 1
        if status >= 500 and not any(word in answer for word in FULL):
            raise Wrong(f"the server answers {answer[:300]!r}")
        return status


def request(
    method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> bytes:
    """Return the bytes of a request after which the connection ends."""
    fields = {"Host": "127.0.0.1", "Connection": "close"} | (headers or {})
    if body is not None:
        fields = {"Content-Length": str(len(body))} | fields
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


# What is done. Each knows one kind of bad manners.


def messages(attack: Attack) -> None:
    """Say what is nearly right on a WebSocket."""
    _put_wrongly(attack, "said.jsonl", say)


def requests(attack: Attack) -> None:
    """Make requests that are nearly right."""
    _put_wrongly(attack, "asked.jsonl", ask)


def uploads(attack: Attack) -> None:
    """Upload what is nearly a video and a picture, and begin streams with it."""
    _put_wrongly(attack, "upload.*", upload)


def _put_wrongly(attack: Attack, pattern: str, put: Callable[[str], bool]) -> None:
    """Change files of words as the fuzzer does, and put them to the server as it does."""
    for _ in attack.rounds():
        with tempfile.TemporaryDirectory() as place:
            before = Path.cwd()
            os.chdir(place)
            try:
                make_words()
                names = sorted(path.name for path in Path().glob(pattern))
                _, words = mutate(attack.random, Path(), names)
                try:
                    put(attack.open.url)
                    attack.statuses[200] += 1
                except Refused as refused:
                    # Others' sessions fill it, which is no fault; visitors have more patience.
                    if refused.code != "too_many_sessions":
                        raise Wrong(f"{refused}, after {words}") from refused
                    attack.statuses[503] += 1
                except Wrong as wrong:
                    raise Wrong(f"{wrong}, after {words}") from wrong
            finally:
                os.chdir(before)


def origins(attack: Attack) -> None:
    """Ask as a page of another address, or of none."""
    for number in attack.rounds():
        headers = {"Origin": ORIGINS[number % len(ORIGINS)]}
        if number % 3 == 0:
            key = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"}
            headers |= {"Connection": "Upgrade", "Upgrade": "websocket", **key}
        asked = request("POST", "/v1/sessions", headers, b"{}")
        if number % 3 == 0:
            asked = request("GET", "/v1/stream", headers)
        status = attack.note(attack.open.ask(asked, 2.0))
        # Nothing but requests that change something: a browser hides the answers to others.
        if status in (101, 201):
            raise Wrong(f"the origin {headers['Origin']!r:.80} was let in: {status}")


def guesses(attack: Attack) -> None:
    """Guess the token, by requests and by WebSockets."""
    for number in attack.rounds():
        guess = TOKEN[: attack.random.randrange(len(TOKEN))] + "x" * attack.random.randrange(1, 9)
        if number % 4:
            headers = {"Authorization": f"Bearer {guess}"}
            status = attack.note(attack.closed.ask(request("GET", "/v1/world", headers)))
            if status == 200:
                raise Wrong(f"a guess was let in: {guess}")
            continue
        with contextlib.suppress(WebSocketException, OSError):
            address = f"ws://127.0.0.1:{attack.closed.port}/v1/stream"
            with connect(address, proxy=None, open_timeout=PATIENCE_S, close_timeout=1) as end:
                end.send(json.dumps({"type": "hello", "version": 1, "token": guess}))
                if b"welcome" in str(end.recv(PATIENCE_S)).encode():
                    raise Wrong(f"a guess was welcomed: {guess}")


def abandoned(attack: Attack) -> None:
    """Make sessions and never come back."""
    for number in attack.rounds():
        if number % 2:
            body = json.dumps({"seed": number}).encode()
            attack.note(attack.open.ask(request("POST", "/v1/sessions", {}, body)))
            continue
        address = f"ws://127.0.0.1:{attack.open.port}/v1/stream"
        with contextlib.suppress(WebSocketException, OSError):
            with connect(address, proxy=None, open_timeout=PATIENCE_S, close_timeout=1) as end:
                end.send('{"type":"hello","version":1}')
                end.send(json.dumps({"type": "create", "seed": number}))
                # Without a word, as when a machine goes to sleep.
                end.socket.shutdown(socket.SHUT_RDWR)


def oversized(attack: Attack) -> None:
    """Announce and send bodies, heads and messages beyond every limit."""
    zeros = bytes(2**20)
    for number in attack.rounds():
        kind = number % 5
        if kind == 0:
            headers = {"Content-Length": str(2 ** attack.random.randrange(30, 70))}
            path = attack.random.choice(("/v1/uploads", "/v1/sessions/restore", "/v1/sessions"))
            attack.note(attack.open.ask(request("POST", path, headers), 3.0))
        elif kind == 1:
            # Chunks without an end: nobody said how many.
            with attack.open.connected() as end, contextlib.suppress(OSError):
                end.sendall(request("POST", "/v1/uploads", {"Transfer-Encoding": "chunked"}))
                for _ in range(64):
                    end.sendall(b"100000\r\n" + zeros + b"\r\n")
                attack.note(received(end))
        elif kind == 2:
            attack.note(attack.open.ask(request("POST", "/v1/sessions", {}, zeros), 3.0))
        elif kind == 3:
            attack.note(attack.open.ask(request("GET", "/" + "a" * 10**5), 3.0))
        else:
            address = f"ws://127.0.0.1:{attack.open.port}/v1/stream"
            with contextlib.suppress(WebSocketException, OSError):
                with connect(address, proxy=None, close_timeout=1) as end:
                    end.send("x" * 2**20)
                    end.recv(3.0)


def odd_files(attack: Attack) -> None:
    """Upload what is no video, and send snapshots that are none."""
    width = (60_000).to_bytes(4, "big")
    head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    files = (
        *(b"", b"\0", b"words", bytes(4096), os.urandom(4096), b"GIF89a" + b"\xff" * 400),
        head + width + width + b"\x08\x02\0\0\0" + bytes(64),
        b"\xff\xd8\xff\xe0" + bytes(64),
        b"\0\0\0\x20ftypisom" + bytes(2048),
        b"PK\x03\x04" + bytes(512),
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n",
        b"ffconcat version 1.0\nfile '/etc/hostname'\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        (2**63 - 1).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
    )
    for number in attack.rounds():
        path = ("/v1/uploads", "/v1/sessions/restore")[number // len(files) % 2]
        answer = attack.open.ask(request("POST", path, {}, files[number % len(files)]))
        if attack.note(answer) in (200, 201):
            raise Wrong(f"{path} took {files[number % len(files)][:40]!r}")


def slow(attack: Attack) -> None:
    """Be silent, or say heads and bodies byte by byte, on many connections at once."""
    heads = request("GET", "/v1/world")
    body = request("POST", "/v1/sessions", {"Content-Length": "1000"})
    ends: list[tuple[socket.socket, bytes]] = []
    try:
        for number in range(min(attack.count, 400)):
            ends.append((attack.open.connected(2.0), (b"", heads, body)[number % 3]))
        for place in attack.rounds():
            for end, said in ends:
                with contextlib.suppress(OSError):
                    if place < len(said):
                        end.sendall(said[place : place + 1])
            time.sleep(min(0.2, attack.seconds / 20))
            answer_health(attack.open)
            attack.statuses[200] += 1
    finally:
        for end, _ in ends:
            end.close()


ATTACKS: dict[str, Callable[[Attack], None]] = {
    one.__name__: one
    for one in (
        *(origins, guesses, oversized, odd_files, requests, messages, uploads, slow),
        abandoned,
    )
}
"""All by name, in the order in which they run."""


# Those who judge.


def answer_health(target: Target) -> float:
    """Ask for the health; return the seconds that it took (Wrong: it does not answer)."""
    begun = time.monotonic()
    try:
        answer = target.ask(request("GET", "/health"))
    except OSError as error:
        raise Wrong(f"health does not answer: {error}") from error
    if not answer.startswith(b"HTTP/1.1 200"):
        raise Wrong(f"health answers {answer[:200]!r}")
    return time.monotonic() - begun


def visit(target: Target) -> float:
    """Play as anybody would; return the seconds until the first frame.

    Who is told that the server is full asks again for PATIENCE_S seconds.

    Raises:
        Wrong: there is no frame within them.
    """
    begun, said = time.monotonic(), ""
    while time.monotonic() - begun < PATIENCE_S:
        try:
            with Client(target.url, token=target.token, timeout_s=PATIENCE_S) as client:
                client.create(seed=1)
                (frame,) = client.step(1)
                client.close()
        except (ValueError, OSError, WebSocketException) as error:
            said = f"{type(error).__name__}: {error}"
            time.sleep(0.1)
            continue
        if frame.pixels.dtype != np.uint8 or frame.pixels.ndim != 3:
            raise Wrong(f"a frame of {frame.pixels.dtype} {frame.pixels.shape}")
        return time.monotonic() - begun
    raise Wrong(f"a visitor is not served within {PATIENCE_S:.0f} s: {said}")


class Watch:
    """Looks at the servers while an attack runs: their health, and their memory."""

    def __init__(self, targets: tuple[Target, ...]) -> None:
        self._targets = targets
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.slowest_s = self.peak_gib = 0.0
        self.found: list[str] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(2 * PATIENCE_S)

    def _look(self) -> None:
        while not self._end.wait(0.2):
            for target in self._targets:
                try:
                    self.slowest_s = max(self.slowest_s, answer_health(target))
                except Wrong as wrong:
                    self.found.append(str(wrong))
                self.peak_gib = max(self.peak_gib, target.resident_gib)


@contextlib.contextmanager
def serving(place: Path, tokens: tuple[str | None, ...]) -> Iterator[list[Target]]:
    """Serve the world that comes with the package, in a process of its own for each token."""
    begun: list[tuple[subprocess.Popen[bytes], Path]] = []
    try:
        for number, token in enumerate(tokens):
            begun.append(_started(place / str(number), token))
        yield [
            Target(url=_address(*one), process=psutil.Process(one[0].pid), log=one[1], token=token)
            for one, token in zip(begun, tokens, strict=True)
        ]
        for process, _ in begun:
            process.send_signal(signal.SIGTERM)
        for process, log in begun:
            if process.wait(60) != 128 + signal.SIGTERM:
                raise RuntimeError(f"a server ended with {process.returncode}: {log.read_text()}")
    finally:
        for process, _ in begun:
            process.kill()
            process.wait()


def _started(folder: Path, token: str | None) -> tuple[subprocess.Popen[bytes], Path]:
    folder.mkdir()
    words = [sys.executable, "-m", "scd", "serve", "--port", "0", "--device", "cpu"]
    words += ["--sessions", "4", "--memory-gib", str(MEMORY_GIB), "--evict-dir", str(folder / "s")]
    # An attack is not one address's share of a server: its rate is not what is looked at.
    words += ["--limits.requests-per-s", "1e5", "--limits.messages-per-s", "1e5"]
    words += ["--token", token] if token else []
    log = folder / "log.txt"
    with log.open("wb") as file:
        return subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT), log


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"http://[\d.]+:\d+", log.read_text("utf-8", "replace")):
            return found[0]
        time.sleep(0.02)
    raise RuntimeError(f"the server did not start: {log.read_text('utf-8', 'replace')[-500:]}")


def run_attack(config: HostileConfig, name: str, open: Target, closed: Target) -> dict[str, Any]:
    """Run one attack; return what came of it, and under `found` what is wrong."""
    attack = Attack(
        open=open,
        closed=closed,
        random=random.Random(f"{config.seed} {name}"),
        count=config.count,
        seconds=config.seconds,
    )
    found: list[str] = []
    begun, served_s = time.monotonic(), 0.0
    with Watch((open, closed)) as watch:
        try:
            ATTACKS[name](attack)
        except (Wrong, OSError) as wrong:
            found.append(f"{type(wrong).__name__}: {wrong}")
    seconds = time.monotonic() - begun
    for target in (open, closed):
        try:
            served_s = max(served_s, visit(target))
        except Wrong as wrong:
            found.append(str(wrong))
    return {
        "attack": name,
        "made": attack.statuses.total(),
        "statuses": {str(status): count for status, count in sorted(attack.statuses.items())},
        "seconds": round(seconds, 1),
        "health_s": round(watch.slowest_s, 2),
        "visitor_s": round(served_s, 2),
        "peak_gib": round(watch.peak_gib, 2),
        "found": found + watch.found[:3],
    }


def faults_of(target: Target) -> list[str]:
    """Return what a server says is its own fault."""
    said = target.log.read_text("utf-8", "replace")
    words = ("Traceback (most recent call last)", "a fault of the server", "was never retrieved")
    return [f"the server says {word!r}: {said[-400:]}" for word in words if word in said]


def hostile(config: HostileConfig) -> dict[str, Any]:
    """Run the attacks and return what came of them."""
    results, found = [], []
    place = Path(tempfile.mkdtemp(prefix="scd-hostile-"))
    try:
        with serving(place, (None, TOKEN)) as (open, closed):
            visit(open), visit(closed)
            idle_gib = max(open.resident_gib, closed.resident_gib)
            limit_gib = idle_gib + TOLERATED * MEMORY_GIB + OWN_GIB
            for name in config.attacks or tuple(ATTACKS):
                result = run_attack(config, name, open, closed)
                if result["peak_gib"] > limit_gib:
                    result["found"].append(
                        f"{result['peak_gib']} GiB resident, {limit_gib:.2f} promised"
                    )
                print(json.dumps(result), flush=True)
                results.append(result)
        for target in (open, closed):
            found += faults_of(target)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {
        "seed": config.seed,
        "idle_gib": round(idle_gib, 2),
        "limit_gib": round(limit_gib, 2),
        "attacks": results,
        "found": [one for result in results for one in result["found"]] + found,
    }


def main(arguments: list[str]) -> int:
    """Run; exit status 1: something was found."""
    config = tyro.cli(HostileConfig, args=arguments)
    done = hostile(config)
    if config.out:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out).write_text(json.dumps(done, indent=2) + "\n")
    print(json.dumps({key: value for key, value in done.items() if key != "attacks"}, indent=2))
    return int(bool(done["found"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
