"""Kill -9 at each file operation of a command, and then the same command again.

    python tools/kills.py --out runs/out/kills

A command is run once as it is, which counts its operations: files opened for writing, made,
renamed, exchanged and removed. Then, once for each of them, a process is killed right before the
operation, and the same command is run again: it must not refuse, must make to the bit what the
uninterrupted one made, and must leave nothing half written. A world that is being saved over
another one must also be whole between the kill and the second run; of sessions that leave memory
none may be gone that was said to be on disk. Exit status 1: something failed.

Measured at all of them: 320 kills of 320 operations, 0 refusals, 0 losses, 0 other results (AMD
EPYC, 2 CPU threads, torch 2.13.0+cpu, commit fb9517d).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from scd.cli import main as scd
from scd.common.files import TEMPORARY, remove_leftovers, write_file
from scd.engine.open import open_engine
from scd.models.checkpoint import load_world, save_world
from scd.serving.admission import HostConfig
from scd.serving.host import Host
from scd.serving.messages import Close, Create, Leave, Look, Show, State, Step
from scd.serving.store import OWN

MODULES = ("training.world", "training.presets", "training.distillation", "preprocessing.encode",
           "data.record", "data.toy", "sampling.sample")  # fmt: skip
"""What the commands load, loaded once for all."""

OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime",
              "ctypes.dlsym")  # fmt: skip
"""Audit events that are counted, beside files opened for writing; the last one comes before two
folders are exchanged."""

KILLED = -signal.SIGKILL

CPU = "--device cpu --threads 1"
RUN = f"{CPU} --precision fp32 --batch-size 1 --num-frames 4 --log-every 1 --validate-every 0"
RUN += " --sample-every 0 --save-every 1 --num-loader-workers 1"
TINY = "--model.block.width 16 --model.block.head-dim 16 --model.block.rotary-axes 4 6 6 "
TINY += "--model.encoder.num-layers 1 --model.decoder.num-layers 1 --sampling.num-steps 1"
SPREAD = "--objective.min-spread 0"
RECORD = "record toy --episodes 5 --frames 8 --workers 1 --out {}"


def save(seed: int) -> int:
    """Save a world over the one that is there."""
    world = load_world("teacher")
    with torch.no_grad():
        for weight in world.model.parameters():
            weight += seed
    save_world(world, "world")
    return 0


def is_whole() -> bool:
    """Tell whether the world that is being replaced can be read."""
    load_world("world")
    return True


NUM_SESSIONS, FRAMES, WAIT_S = 2, (1, 2, 4), 120.0
"""Sessions that leave memory and come back, at which lengths they leave it, and what none takes."""


class Sessions:
    """A host on the folder `kept`, and the notes of its clients in `book`: what they may rely on.

    A note is one line, which says that a session with a seed and so many frames is on disk.
    """

    def __init__(self) -> None:
        world = load_world("world")
        config = HostConfig(memory_gib=0.5, evict_dir=Path("kept"), idle_s=1e4)
        self.host = Host(world, open_engine(world.model, "fast"), config, report=print)
        self.book = os.open("book", os.O_RDWR | os.O_APPEND | os.O_CREAT)
        lines = os.read(self.book, 2**20).decode().splitlines()
        # The last one of a seed stands.
        self.notes = {
            int(seed): (name, int(length)) for seed, name, length in map(str.split, lines)
        }
        self.host.start()

    def ask(self, message: Any, name: str = "") -> Any:
        """Have a message obeyed."""
        return self.host.ask(message, name).result(WAIT_S)

    def leave_memory(self, name: str) -> None:
        """Put a session on disk."""
        until = time.monotonic() + WAIT_S
        while not self.host.call(lambda loop: loop.evictions.release(name)).result(WAIT_S):
            if time.monotonic() > until:
                raise RuntimeError("a session stays in memory")

    def play(self, seed: int, length: int) -> None:
        """Play a session to a length, put it on disk, and note that it is there."""
        name, noted = self.notes.get(seed, ("", 0))
        state = self.ask(Look() if name else Create(seed=seed), name).message
        assert isinstance(state, State)
        if state.seed != seed or state.frame + 1 < noted:
            raise RuntimeError(f"{noted} frames of seed {seed} were on disk, there is {state}")
        for frame in range(state.frame + 1, length):
            self.ask(Step(action=(seed + frame) % 2), state.session)
        self.leave_memory(state.session)
        length = max(length, state.frame + 1)
        os.write(self.book, f"{seed} {state.session} {length}\n".encode())
        self.notes[seed] = state.session, length


def evict() -> int:
    """Play sessions that leave memory and come back, and keep all of their frames."""
    sessions = Sessions()
    for length in FRAMES:
        for seed in range(NUM_SESSIONS):
            sessions.play(seed, length)
    # One whose page is left, and which is deleted.
    gone = sessions.ask(Create(seed=NUM_SESSIONS)).message.session
    sessions.leave_memory(gone)
    sessions.ask(Leave(), gone)
    sessions.ask(Close(), gone)
    Path("made").mkdir(exist_ok=True)
    remove_leftovers(Path("made"))
    for seed, (name, _) in sessions.notes.items():
        shown = sessions.ask(Show(frame=0, count=FRAMES[-1]), name).frames
        digests = [hashlib.sha256(one.pixels.tobytes()).hexdigest() for one in shown]
        write_file(Path(f"made/{seed}.txt"), "\n".join(digests))
    # Those that are in memory now are written.
    return sessions.host.stop(WAIT_S) or 0


def command(words: str) -> Callable[[], int]:
    return lambda: scd(words.split())


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is killed."""

    run: Callable[[], int]
    results: tuple[str, ...]
    """Patterns of what it makes, which must be the same to the bit."""
    between: Callable[[], bool] = lambda: True
    """What must hold after the kill."""
    stays: str = TEMPORARY * 2
    """How names of half written things begin that the next command leaves alone for an hour, since
    another process might be at them."""


STEPS = ("run/last", "run/step_*/*.safetensors", "run/step_*/config.json", "run/step_*/*.pt")
CASES: dict[str, Case] = {
    "train": Case(
        run=command(f"train toy --data clips --out run --max-steps 3 {RUN} {TINY}"), results=STEPS
    ),
    "distill": Case(
        run=command(f"distill teacher --data clips --out run --max-steps 2 {RUN} {SPREAD}"),
        results=STEPS,
    ),
    "encode": Case(
        run=command("encode clips --autoencoder pixels --out latents --device cpu"),
        results=("latents/*",),
    ),
    "record": Case(
        run=command(RECORD.format("made")),
        results=("made/videos/*", "made/actions/*", "made/*.json*"),
    ),
    "save": Case(run=lambda: save(1), results=("world/*",), between=is_whole),
    "evict": Case(run=evict, results=("made/*",), stays=f"{TEMPORARY}{OWN}"),
}


@dataclass(frozen=True, kw_only=True)
class KillsConfig:
    """Which places are tried."""

    cases: tuple[str, ...] = tuple(CASES)
    """What is killed."""
    every: int = 1
    """Every so many operations one is tried."""
    out: str = ""
    """Folder for a file of each case, from which the same command goes on; empty: none."""


def in_child(work: Callable[[], Any], folder: Path, kill_at: int = 0) -> tuple[int, int]:
    """Do something in a forked process, in a folder.

    Args:
        work: returns an exit status, or whether all is well.
        kill_at: operation, from 1, right before which the process kills itself; 0: none.

    Returns:
        Its exit status, and the operations that it did.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status, count = 99, [0]
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        here = os.getcwd()

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if not _is_operation(event, arguments, here):
                return
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            found = work()
            status = int(not found) if isinstance(found, bool) else found
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(writer, str(count[0]).encode())
            os._exit(status)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(status), int(said or 0)


def _is_operation(event: str, arguments: tuple[Any, ...], here: str) -> bool:
    if event == "ctypes.dlsym":
        return arguments[1] == "renameat2"
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes or isinstance(path, int) or path is None:
            return False
    elif event not in OPERATIONS:
        return False
    return os.path.abspath(os.fsdecode(arguments[0])).startswith(f"{here}{os.sep}")


def results_of(folder: Path, case: Case) -> dict[str, str]:
    """Return the digest of each file that a case makes."""
    files = sorted({path for pattern in case.results for path in folder.glob(pattern)})
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and path.name != "lock"
    }


def make_inputs(folder: Path) -> None:
    """Write clips, a teacher and a world into an empty folder (RuntimeError: it went wrong)."""
    teacher = f"train toy --data clips --out teacher --max-steps 1 {RUN} {TINY}"
    for work in (command(RECORD.format("clips")), command(teacher), lambda: save(0)):
        status, _ = in_child(work, folder)
        if status:
            raise RuntimeError((folder / "log.txt").read_text("utf-8"))


def try_place(inputs: Path, place: Path, case: Case, at: int, wanted: dict[str, str]) -> str:
    """Kill at an operation and run again; return what is wrong, or nothing."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(inputs, place)
    status, _ = in_child(case.run, place, at)
    if status != KILLED:
        return f"was not killed: {status}"
    if in_child(case.between, place)[0]:
        return f"lost: {_said(place)}"
    status, _ = in_child(case.run, place)
    if status:
        return f"refused with status {status}: {_said(place)}"
    # An old checkpoint that was about to be removed may still be there.
    other = sorted(set(wanted.items()) - set(results_of(place, case).items()))
    if other:
        return f"other results: {other[:3]}"
    left = [
        str(path.relative_to(place))
        for path in place.rglob(f"{TEMPORARY}*")
        if not path.name.startswith(case.stays)
    ]
    return f"left behind: {left[:3]}" if left else ""


def _said(place: Path) -> str:
    lines = (place / "log.txt").read_text("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""


def try_case(name: str, every: int, folder: Path, kept: Path | None) -> dict[str, Any]:
    """Kill a case at its operations and return what came of it.

    Args:
        name: of the case.
        every: so many operations one is tried.
        folder: with the inputs.
        kept: file of what was found before, and is found now; None: there is none.
    """
    case, place, began = CASES[name], folder / name, time.monotonic()
    shutil.copytree(folder / "inputs", place)
    status, number = in_child(case.run, place)
    if status or not number:
        raise RuntimeError(f"{name} ended with status {status}: {_said(place)}")
    wanted = results_of(place, case)
    found: dict[str, Any] = {"operations": number, "killed": [], "failed": []}
    if kept is not None and kept.is_file():
        before = json.loads(kept.read_text("utf-8"))
        found = before if before["operations"] == number else found
    for at in sorted({*range(1, number + 1, every)} - {*found["killed"]}):
        why = try_place(folder / "inputs", place, case, at, wanted)
        found["killed"].append(at)
        if why:
            found["failed"].append({"operation": at, "why": why})
            print(f"{name} killed at operation {at} of {number}: {why}", flush=True)
        if kept is not None:
            write_file(kept, json.dumps(found))
    seconds, killed = time.monotonic() - began, len(found["killed"])
    print(f"{name}: {number} operations, killed at {killed}, {seconds:.1f} s", flush=True)
    return found


def main(arguments: Sequence[str]) -> int:
    """Run; exit status 1: something failed."""
    config = tyro.cli(KillsConfig, args=list(arguments))
    torch.set_num_threads(1)
    for module in MODULES:
        importlib.import_module(f"scd.{module}")
    with tempfile.TemporaryDirectory(prefix="scd-kills-") as place:
        folder = Path(place).resolve()
        (folder / "inputs").mkdir()
        make_inputs(folder / "inputs")
        kept = Path(config.out).absolute() if config.out else None
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)
        found = [
            try_case(name, config.every, folder, kept and kept / f"{name}.json")
            for name in config.cases
        ]
    killed, failed = sum(len(one["killed"]) for one in found), [one["failed"] for one in found]
    operations = sum(one["operations"] for one in found)
    print(f"killed at {killed} of {operations} operations, {sum(map(len, failed))} failed")
    return int(any(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
