"""Small inputs of every kind that are right, and the commands that read them.

Everything is made by the commands and functions that people use; the folder of inputs is the
working directory of all of them, so that paths are short and the same everywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from scd.cli import main
from scd.convert.reference import their_name
from scd.data.manifest import Entry, write_card, write_episode, write_manifest
from scd.data.source import DataCard, open_source
from scd.data.spaces import ConditionSpec, Split
from scd.models.build import build
from scd.models.checkpoint import load_world
from scd.models.clips import Clips
from scd.models.config import (
    BlockConfig,
    DecoderConfig,
    EncoderConfig,
    FrameShape,
    SeparableConfig,
)
from scd.serving.client import Client
from scd.serving.protocol import CLOSE_CODES

SIZE, NUM_FRAMES, NUM_ACTIONS = 16, 8, 3
"""Rows and columns of a frame, frames of an episode, and actions of the clips."""

SPLITS: tuple[Split, ...] = ("train", "train", "train", "val", "val", "test")
"""Of the episodes; the second and the fourth one lie in AVI files."""

STEP = "run/step_000002"
"""The checkpoint of the run."""

MODEL = (
    "--model.shape.height 16 --model.shape.width 16 --model.block.width 16 "
    "--model.block.head-dim 16 --model.block.rotary-axes 4 6 6 --model.encoder.num-layers 1 "
    "--model.decoder.num-layers 1 --model.conditions.num-actions 3 --model.cache.window 4"
).split()
"""Flags of a model of some thousand weights."""

CPU = ("--device", "cpu", "--threads", "1")

TRAIN = (
    *"train toy --precision fp32 --batch-size 1 --num-frames 4 --log-every 1".split(),
    *"--validate-every 0 --sample-every 0 --save-every 0 --num-loader-workers 1".split(),
    *(*CPU, *MODEL, "--sampling.num-steps", "1"),
)
"""A training of a second."""

SAMPLE = (*"--context 2 --frames 2 --out sample".split(), *CPU)
EVALUATE = (
    *"--data clips --context 1 --horizon 2 --num-clips 2 --no-memory --out result.json".split(),
    *CPU,
)
PROBE = (
    *"--data clips --context 2 --num-clips 2 --num-steps 2 --measurements similarity".split(),
    *"--out probe --device cpu".split(),
)
CONVERT = "convert reference {} out --channels 3 --height 4 --width 4".split()
SERVE = (
    *"serve world --port 0 --evict-dir sessions --sessions 4 --memory-gib 0.5".split(),
    *"--device cpu --limits.messages-per-s 1e5 --limits.requests-per-s 1e5".split(),
)

MODULES = "modules.txt"
"""Names of the modules that were loaded when all inputs were made."""

SESSION = "session-of-the-fuzzer"
"""Name of the session that lies on disk."""

ENDS = {*CLOSE_CODES.values(), 1000, 1009}
"""Codes with which the server may end a connection for what was said."""


AFTER_OTHERS = ("no_session", "superseded")
"""Codes of answers to right messages that others before them have made void."""


class Wrong(Exception):
    """What came of a case is not what it should be."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Inputs of one kind."""

    needs: tuple[str, ...]
    """Files and folders that the commands read."""
    mutated: tuple[str, ...]
    """Patterns of those that change."""
    commands: tuple[tuple[str, ...], ...]
    """One of them is run."""
    share: int
    """Of the cases."""
    talk: Callable[[str], bool] | None = None
    """Speaks to the server at an address while the command runs, and tells whether it did what it
    was asked to."""


def make_inputs(folder: Path) -> None:
    """Write all inputs into an empty folder, which becomes the working directory."""
    os.chdir(folder)
    _make_clips(Path("clips"))
    _run(*TRAIN, "--data", "clips", "--out", "run", "--max-steps", "2")
    world, clips = load_world("run"), open_source("clips", "val")
    first = clips.read(0, 0, 4)
    pixels = ((first.frames + 1) * 127.5).round().to(torch.uint8)
    assert first.actions is not None
    world.clips = Clips(frames=pixels[None], actions=first.actions[None])
    world.save_pretrained("world")
    _make_release(Path("release"))
    _run(*"encode clips --autoencoder pixels --out latents --episodes-per-file 2".split(), *CPU)
    _run("sample", "world", *SAMPLE)
    _run("evaluate", "run", *EVALUATE)
    _run("probe", "run", *PROBE)
    _make_session()
    make_words()
    for path in folder.rglob("lock"):
        path.unlink()
    Path(MODULES).write_text("\n".join(sorted(sys.modules)))


def _run(*words: str) -> None:
    status = main(list(words))
    if status != 0:
        raise RuntimeError(f"scd {' '.join(words)} ended with status {status}")


def _pictures(number: int) -> np.ndarray:
    """Return a bright square that moves over grey."""
    pixels = np.full((NUM_FRAMES, SIZE, SIZE, 3), 40 + 20 * number, np.uint8)
    for frame in range(NUM_FRAMES):
        pixels[frame, 4:8, frame : frame + 4] = 250
    return pixels


def _make_clips(folder: Path) -> None:
    folder.mkdir()
    spec = ConditionSpec(num_actions=NUM_ACTIONS)
    names = tuple(f"action {number}" for number in range(NUM_ACTIONS))
    write_card(
        folder,
        DataCard(height=SIZE, width=SIZE, fps=10.0, conditions=spec, action_names=names),
    )
    entries: list[Entry] = []
    for number, split in enumerate(SPLITS):
        pixels, actions = _pictures(number), (np.arange(NUM_FRAMES) + number) % NUM_ACTIONS
        entry = write_episode(folder, f"{number:03d}", pixels, actions, 10.0, split)
        if number in (1, 3):
            (folder / entry.video).unlink()
            video = entry.video.replace(".mp4", ".avi")
            write_coded(folder / video, pixels, "mpeg4")
            values = vars(entry) | {"video": video}
            entry = Entry(**values)
        entries.append(entry)
    write_manifest(folder, entries)


def write_coded(path: Path, pixels: np.ndarray, codec: str) -> None:
    """Write a video as people have them: colour at half size, frames that look ahead."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(10))
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.max_b_frames = 2
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _make_release(folder: Path) -> None:
    """Write a state dict in the layout of the paper's release, in both formats."""
    folder.mkdir()
    torch.manual_seed(0)
    model = build(
        SeparableConfig(
            shape=FrameShape(channels=3, height=4, width=4, patch_size=2),
            block=BlockConfig(width=16, head_dim=16, rotary_axes=(4, 6, 6)),
            encoder=EncoderConfig(num_layers=1, start_frame=False),
            decoder=DecoderConfig(num_layers=1),
            conditions=ConditionSpec(num_actions=NUM_ACTIONS),
        )
    )
    state = {their_name(name): weight for name, weight in model.state_dict().items()}
    torch.save(state, folder / "weights.pt")
    save_file(state, folder / "weights.safetensors")


def _make_session() -> None:
    """Let a server put a session on disk, and give it a name that is always the same."""

    def play(url: str) -> bool:
        with Client(url) as client:
            client.create(seed=1)
            client.step(1, count=3)
            client.detach()
        return True

    serve(SERVE, play)
    (path,) = Path("sessions").glob("*.session.safetensors")
    name = path.name.partition(".")[0]
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(name.encode(), SESSION.encode()).rstrip()
    header += b" " * (-len(header) % 8)
    path.unlink()
    path.with_name(f"{SESSION}.session.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + data[8 + size :]
    )


def make_words() -> None:
    """Write what clients say and send."""
    said: list[dict[str, Any]] = [
        {"type": "hello", "version": 1, "codec": "jpeg", "quality": 90},
        {"type": "create", "seed": 3, "start": "clip", "clip": 0, "steps": 1},
        {"type": "step", "action": 1, "count": 2, "request": 4},
        {"type": "set", "steps": 2, "guidance": {"kind": "none", "scale": 1.0}, "seed": 9},
        {"type": "rewind", "frame": 3},
        {"type": "fork", "frame": 3, "seed": 5},
        {"type": "snapshot", "request": 5},
        {"type": "action", "action": 2, "sequence": 8},
        {"type": "reset", "seed": 2, "start": "nothing"},
        {"type": "ack", "generation": 1, "frame": 1},
        {"type": "run", "fps": 5.0},
        {"type": "pause"},
        {"type": "restart"},
        {"type": "close"},
    ]
    asked: list[dict[str, Any]] = [
        {"method": "GET", "path": "/v1/world"},
        {"method": "POST", "path": "/v1/sessions", "body": {"seed": 1, "steps": 1}},
        {"method": "POST", "path": "/v1/sessions/ID/step?format=png", "body": {"action": 1}},
        {"method": "POST", "path": "/v1/sessions/ID/set", "body": {"steps": 2, "seed": 4}},
        {"method": "POST", "path": "/v1/sessions/ID/rewind", "body": {"frame": 0}},
        {"method": "POST", "path": "/v1/sessions/ID/fork", "body": {"frame": 0, "seed": 2}},
        {"method": "GET", "path": "/v1/sessions/ID/frames/0"},
        {"method": "GET", "path": "/v1/sessions/ID/video"},
        {"method": "DELETE", "path": "/v1/sessions/ID"},
    ]
    for name, lines in (("said", said), ("asked", asked)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_coded(Path("upload.mp4"), _pictures(1), "libx264")
    Image.fromarray(_pictures(2)[0]).save("upload.png")


# A server, and those who speak to it.


def serve(words: tuple[str, ...], talk: Callable[[str], bool]) -> tuple[int, bool]:
    """Serve until somebody has spoken; return the exit status, and what `talk` returned.

    The command's output must go to a file, `stdout.txt`.

    Raises:
        Wrong: `talk` found something.
    """
    found: list[Any] = []

    def speak() -> None:
        try:
            found.append(talk(_address()))
        except BaseException as error:
            found.append(error)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    status = main(list(words))
    if not found:
        # The command has ended by itself.
        return status, False
    if isinstance(found[0], BaseException):
        raise Wrong(f"{type(found[0]).__name__}: {found[0]}") from found[0]
    return (0 if status == 128 + signal.SIGTERM else status), found[0]


def _address() -> str:
    while True:
        with contextlib.suppress(OSError):
            if found := re.search(r"http://\S+", Path("stdout.txt").read_text()):
                return found[0].rstrip("/")
        time.sleep(0.005)


def call(url: str, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Make a request; return status and body."""
    request = urllib.request.Request(url + path, data=body, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=15) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def _well(url: str) -> None:
    """See that the server is as it was: nothing broke, and others can play."""
    status, _ = call(url, "GET", "/health")
    _, metrics = call(url, "GET", "/metrics")
    if status != 200 or re.search(rb'code="fault"} [^0]', metrics):
        raise Wrong(f"health {status}, {re.findall(rb'.*fault.*', metrics)}")
    with Client(url, timeout_s=15) as client:
        client.create(seed=2)
        if len(client.step(1, count=2)) != 2:
            raise Wrong("another client is given no frames")
        client.close()


def _restore(url: str) -> bool:
    """Attach the session on disk, and send its file."""
    path = Path("sessions") / f"{SESSION}.session.safetensors"
    data = path.read_bytes() if path.is_file() else b""
    is_there = True
    with Client(url, timeout_s=15) as client:
        try:
            client.attach(SESSION)
            client.step(1)
            client.detach()
        except ValueError as error:
            _check_words(str(error))
            is_there = False
    status, answer = call(url, "POST", "/v1/sessions/restore", data)
    _check_answer(status, answer)
    _well(url)
    return is_there and status == 201


def upload(url: str) -> bool:
    """Begin streams with what was uploaded."""
    is_right = True
    for path in (Path("upload.mp4"), Path("upload.png")):
        data = path.read_bytes() if path.is_file() else b""
        status, answer = call(url, "POST", "/v1/uploads", data)
        _check_answer(status, answer)
        is_right &= status == 201
        if status == 201:
            body = json.dumps({"start": "upload", "upload": json.loads(answer)["upload"]}).encode()
            begun, answer = call(url, "POST", "/v1/sessions", body)
            if begun != 201:
                raise Wrong(f"no stream of an upload: {begun} {answer[:200]!r}")
    _well(url)
    return is_right


def say(url: str) -> bool:
    """Say what stands in a file, line by line, and hear the answers."""
    is_right = True
    lines = _lines("said.jsonl")
    address = url.replace("http", "ws") + "/v1/stream"
    with connect(address, proxy=None, compression=None, close_timeout=1, max_size=None) as socket:
        try:
            for line in lines:
                try:
                    socket.send(line.decode("utf-8"))
                except UnicodeDecodeError:
                    socket.send(line)
            socket.send('{"type": "pause", "request": 1234567}')
            while True:
                data = socket.recv(15)
                if isinstance(data, str):
                    answer = json.loads(data)
                    is_right &= answer.get("code") in (None, *AFTER_OTHERS)
                    if answer["type"] == "error":
                        _check_words(answer["message"])
                    if answer.get("request") == 1234567:
                        break
        except ConnectionClosed as closed:
            is_right = False
            code = None if closed.rcvd is None else closed.rcvd.code
            if code not in ENDS:
                raise Wrong(f"the connection ended by {closed}") from closed
    _well(url)
    return is_right


def ask(url: str) -> bool:
    """Make the requests that stand in a file."""
    is_right, session = True, "none"
    for line in _lines("asked.jsonl"):
        try:
            values = json.loads(line)
            method, path = str(values["method"]), str(values["path"])
            body = values.get("body")
            data = None if body is None else json.dumps(body).encode("utf-8", "replace")
            path = urllib.request.quote(path.replace("ID", session), safe="/?=&")
        except (ValueError, TypeError, LookupError, RecursionError, AttributeError):
            # What is no request is sent as the body of one.
            method, path, data = "POST", "/v1/sessions", line
        if method not in ("GET", "POST", "DELETE", "PUT", "get"):
            method = "PATCH"
        status, answer = call(url, method, f"/{path.lstrip('/')}", data)
        _check_answer(status, answer)
        is_right &= status < 400
        if status == 201 and session == "none":
            session = json.loads(answer)["session"]
    _well(url)
    return is_right


def _lines(name: str) -> list[bytes]:
    path = Path(name)
    return path.read_bytes().splitlines() if path.is_file() else []


def _check_answer(status: int, answer: bytes) -> None:
    if status >= 500 and b"too_many_sessions" not in answer:
        raise Wrong(f"the server answers {status} {answer[:200]!r}")
    if 400 <= status < 500:
        try:
            _check_words(json.loads(answer)["error"]["message"])
        except (ValueError, LookupError) as error:
            raise Wrong(f"a refusal that is none of ours: {status} {answer[:200]!r}") from error


def _check_words(message: str) -> None:
    if "Traceback" in message or not message.strip() or len(message) > 600:
        raise Wrong(f"words that help nobody: {message[:300]!r}")


DECODE = ("data", "check", "clips", "--decode")
GO_ON = (*TRAIN, "--data", "clips", "--out", "run", "--max-steps", "3")
LEARN = (*TRAIN, "--data", "clips", "--out", "new", "--max-steps", "1")

KINDS: dict[str, Kind] = {
    "worlds": Kind(
        needs=("world",),
        mutated=("world/config.json", "world/*.safetensors", "world/README.md"),
        commands=(("sample", "world", *SAMPLE),),
        share=5,
    ),
    "runs": Kind(
        needs=("run", "clips"),
        mutated=("run/config.json", "run/last", "run/log.jsonl", f"{STEP}/*"),
        commands=(
            GO_ON,
            GO_ON,
            ("sample", "run", "--data", "clips", *SAMPLE),
            ("sample", "run", "--data", "clips", "--weights", "raw", *SAMPLE),
            ("evaluate", "run", *EVALUATE),
            ("probe", "run", *PROBE),
        ),
        share=5,
    ),
    "manifests": Kind(
        needs=("clips",),
        mutated=("clips/dataset.json", "clips/manifest.jsonl"),
        commands=(
            DECODE,
            DECODE,
            LEARN,
            ("encode", "clips", "--autoencoder", "pixels", "--out", "new", *CPU),
        ),
        share=5,
    ),
    "actions": Kind(
        needs=("clips",),
        mutated=("clips/actions/*",),
        commands=(DECODE, DECODE, DECODE, LEARN),
        share=3,
    ),
    "videos": Kind(
        needs=("clips",),
        mutated=("clips/videos/*",),
        commands=(DECODE, DECODE, DECODE, LEARN),
        share=5,
    ),
    "weights": Kind(
        needs=("release",),
        mutated=("release/*",),
        commands=tuple(
            tuple(word.format(f"release/weights.{end}") for word in CONVERT)
            for end in ("pt", "safetensors")
        ),
        share=4,
    ),
    "latents": Kind(
        needs=("latents",),
        mutated=("latents/*",),
        commands=(
            ("data", "check", "latents", "--decode"),
            ("data", "check", "latents", "--decode"),
            (*TRAIN, "--data", "latents", "--out", "new", "--max-steps", "1"),
        ),
        share=3,
    ),
    "results": Kind(
        needs=("world", "run", "clips", "sample", "result.json", "probe"),
        mutated=("sample/sample.json", "result.json", "probe/*.json"),
        commands=(
            ("sample", "world", *SAMPLE),
            ("sample", "world", *SAMPLE),
            ("evaluate", "run", *EVALUATE),
            ("evaluate", "run", *EVALUATE),
            ("probe", "run", *PROBE),
        ),
        share=3,
    ),
    "sessions": Kind(
        needs=("world", "sessions"),
        mutated=("sessions/*",),
        commands=(SERVE,),
        talk=_restore,
        share=3,
    ),
    "messages": Kind(
        needs=("world", "said.jsonl"),
        mutated=("said.jsonl",),
        commands=(SERVE,),
        talk=say,
        share=4,
    ),
    "requests": Kind(
        needs=("world", "asked.jsonl"),
        mutated=("asked.jsonl",),
        commands=(SERVE,),
        talk=ask,
        share=2,
    ),
    "uploads": Kind(
        needs=("world", "upload.mp4", "upload.png"),
        mutated=("upload.*",),
        commands=(SERVE,),
        talk=upload,
        share=1,
    ),
}
"""All kinds by name."""
