"""Wrong inputs by the thousand, put to the public commands.

    python tools/fuzz.py --seed 0 --count 2000 --out runs/out/fuzz

Small inputs of every kind that are right (fuzz_inputs.py) are made once, and have to be accepted.
Then each case changes a copy of them (fuzz_mutations.py) and runs a command that reads it, in a
process that is forked off this warm one: a traceback, a warning of Python, more than 20 s, more
than 2 GiB, another exit status than 0 and 2, a message of more than two sentences or one that does
not say which file it is about, a result that is not finite, or a file left half written is a
failure. Failed cases are kept in the folder of --out, and

    python tools/fuzz.py --seed 0 --only videos-17

makes one of them again. A case depends on the seed and its name alone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fnmatch
import gc
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import av
import torch
import tyro
from fuzz_inputs import KINDS, MODULES, Kind, Wrong, make_inputs, serve
from fuzz_mutations import mutate
from safetensors.torch import load_file

from scd.cli import main as scd
from scd.common.files import TEMPORARY

LIMIT_S, LIMIT_GIB = 20.0, 2.0
"""Seconds and memory of a case."""

MAKING_S = 300.0
"""Seconds for the inputs that are right."""

MANY = 200
"""Cases from which on every command is run on inputs that are right first, not one of a kind."""

LONGEST = 1000
"""Characters of a message."""

SAID_NO, FOUND = 3, 99
"""Exit statuses of a case: a server refused in words; a result is wrong."""


@dataclass(frozen=True, kw_only=True)
class FuzzConfig:
    """Which cases are run."""

    seed: int = 0
    """Of all cases."""
    count: int = 2000
    """Cases, dealt out to the kinds."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Kinds of inputs."""
    only: str = ""
    """One case by its name, whose output is shown. Empty: as many as `count` says."""
    out: str = ""
    """Folder for summary.json, cases.jsonl and what failed. Empty: nothing is kept."""

    def __post_init__(self) -> None:
        unknown = sorted({*self.kinds, *filter(None, [self.only.partition("-")[0]])} - set(KINDS))
        if unknown or self.count < 1:
            raise ValueError(f"needed a count above 0 and kinds of {', '.join(KINDS)}: {unknown}")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a case."""

    case: str
    """KIND-NUMBER."""
    outcome: str
    """accepted, refused or failed."""
    why: str
    """What is wrong; empty where nothing is."""
    change: str
    """What was done to the inputs."""
    command: str
    seconds: float
    peak_gib: float
    message: str
    """What the command said."""


def names(config: FuzzConfig) -> Iterator[tuple[str, int]]:
    """Deal cases out to kinds by their shares, and number those of each kind."""
    if config.only:
        kind, _, number = config.only.rpartition("-")
        yield kind, int(number)
        return
    dealt: Counter[str] = Counter()
    for _ in range(config.count):
        kind = min(config.kinds, key=lambda name: (dealt[name] + 0.5) / KINDS[name].share)
        yield kind, dealt[kind]
        dealt[kind] += 1


def run_case(inputs: Path, folder: Path, seed: int, name: str, number: int | None) -> Verdict:
    """Run one case.

    Args:
        inputs: the folder of those that are right.
        folder: of the case, which is made.
        seed: of all cases.
        name: of the kind.
        number: of the case; None: nothing is changed, and the number of the command is `seed`.
    """
    kind = KINDS[name]
    rng = random.Random(f"{seed} {name} {number}")
    folder.mkdir()
    for needed in kind.needs:
        source = inputs / needed
        copy: Callable[..., Any] = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / needed)
    command = kind.commands[seed] if number is None else rng.choice(kind.commands)
    changed, change = [], "nothing"
    if number is not None:
        candidates = _matching(folder, kind)
        # What the command names, itself or by its folder, if it names any of them.
        named = [one for one in candidates if {one, one.partition("/")[0]} & {*command}]
        changed, change = mutate(rng, folder, named or candidates)
    begun = time.monotonic()
    status, peak_gib = watched(folder, command, kind)
    seconds = time.monotonic() - begun
    said = (folder / "stderr.txt").read_text("utf-8", "replace")
    why = judge(status, said, changed) or _too_much(seconds, peak_gib) or _left(folder)
    return Verdict(
        case=name if number is None else f"{name}-{number}",
        outcome="failed" if why else "accepted" if status == 0 else "refused",
        why=why,
        change=change,
        command=f"scd {' '.join(command)}",
        seconds=round(seconds, 2),
        peak_gib=round(peak_gib, 2),
        message=said[-2000:],
    )


def _matching(folder: Path, kind: Kind) -> list[str]:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [one for one in names if any(fnmatch.fnmatch(one, each) for each in kind.mutated)]


def watched(folder: Path, command: Sequence[str], kind: Kind) -> tuple[int, float]:
    """Run a command in a forked process; return its exit status and its largest memory in GiB."""
    pid = os.fork()
    if pid == 0:
        _obey(folder, command, kind)
    end = time.monotonic() + LIMIT_S
    while True:
        ended, status, used = os.wait4(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), used.ru_maxrss / 2**20
        if time.monotonic() > end or resident_gib(pid) > LIMIT_GIB:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.004)


def resident_gib(pid: int) -> float:
    """Return the memory of a process; 0: it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def _obey(folder: Path, command: Sequence[str], kind: Kind) -> None:
    """Be the process of a case; does not return."""
    os.setsid()
    os.chdir(folder)
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    faulthandler.dump_traceback_later(LIMIT_S - 1)
    before = {path: _stamp(path) for path in Path().rglob("*")}
    status = FOUND
    try:
        if kind.talk is None:
            status = scd(command)
        else:
            status, is_right = serve(tuple(command), kind.talk)
            status = SAID_NO if status == 0 and not is_right else status
        if status == 0:
            check_results([path for path in Path().rglob("*") if _stamp(path) != before.get(path)])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except Wrong as wrong:
        print(f"WRONG {wrong}", file=sys.stderr)
        status = FOUND
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def check_results(written: Sequence[Path]) -> None:
    """Look at all that a command has written.

    Raises:
        Wrong: it cannot be read, or numbers in it are not finite.
    """
    for path in written:
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"), parse_constant=_not_finite)
        elif path.suffix == ".safetensors":
            for name, tensor in load_file(path).items():
                if not torch.isfinite(tensor.float()).all():
                    raise Wrong(f"{path}: {name} is not finite")
        elif path.suffix == ".mp4":
            with av.open(str(path)) as container:
                if next(container.decode(video=0), None) is None:
                    raise Wrong(f"{path} shows nothing")


def _not_finite(constant: str) -> float:
    raise Wrong(f"a result is {constant}")


def judge(status: int, said: str, changed: Sequence[str]) -> str:
    """Return what is wrong with how a command ended; empty if nothing is.

    Args:
        status: its exit status.
        said: its standard error.
        changed: files that were changed.
    """
    if "Traceback (most recent call last)" in said:
        return f"traceback: {said.strip().splitlines()[-1]}"
    if found := re.search(r"^.*: \w*Warning: .*$", said, re.MULTILINE):
        return f"warning: {found[0]}"
    if status in (0, SAID_NO):
        return ""
    if status != 2:
        return f"status {status}: {said.strip()[-200:]}"
    before, _, message = said.rpartition("scd: ")
    message = message.strip()
    if not message or (before and not before.endswith("\n")):
        return "no message"
    if "\n" in message:
        return f"a message of several lines: {message!r:.100}"
    if len(message) > LONGEST:
        return f"a message of {len(message)} characters: {message:.100}"
    if len(re.findall(r"[.!?] +[A-Z]", message)) > 1:
        return f"more than two sentences: {message:.100}"
    known = {part for path in changed for part in Path(path).parts} | {"must be finite"}
    if changed and not any(re.search(rf"(^|\W){re.escape(one)}($|\W)", message) for one in known):
        return f"does not name what it is about: {message:.160}"
    return ""


def _too_much(seconds: float, peak_gib: float) -> str:
    if seconds > LIMIT_S:
        return f"took {seconds:.0f} s"
    return f"took {peak_gib:.1f} GiB" if peak_gib > LIMIT_GIB else ""


def _left(folder: Path) -> str:
    left = [path.name for path in folder.rglob(f"*{TEMPORARY}*")]
    return f"left behind: {left[:3]}" if left else ""


def in_a_child(work: Callable[[], object], log: Path) -> None:
    """Do something in a forked process, so that this one stays without threads (RuntimeError)."""
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(log / "stdout.txt", os.O_WRONLY | os.O_CREAT), 1)
            faulthandler.dump_traceback_later(MAKING_S, exit=True)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the inputs that are right could not be made")


def fuzz(config: FuzzConfig, place: Path) -> dict[str, Any]:
    """Run cases in a folder and return the summary.

    Raises:
        RuntimeError: an input that nobody changed is refused, so that nothing can be found.
    """
    inputs, begun = place / "inputs", time.monotonic()
    inputs.mkdir()
    in_a_child(lambda: make_inputs(inputs), inputs)
    warm(inputs / MODULES)
    if not config.only:
        _check_inputs(config, inputs, place)
    prepared_s, verdicts = time.monotonic() - begun, []
    for name, number in names(config):
        folder = place / f"{name}-{number}"
        verdict = run_case(inputs, folder, config.seed, name, number)
        verdicts.append(verdict)
        _keep(config, verdict, folder)
        if verdict.outcome == "failed":
            print(f"{verdict.case}: {verdict.why}\n    {verdict.change}\n    {verdict.command}")
            print(
                f"    python tools/fuzz.py --seed {config.seed} --only {verdict.case}", flush=True
            )
        if config.only:
            print(json.dumps(asdict(verdict), indent=2))
        shutil.rmtree(folder)
    return summary(config, verdicts, prepared_s, time.monotonic() - begun)


def _keep(config: FuzzConfig, verdict: Verdict, folder: Path) -> None:
    """Write down what came of a case, and keep the folder of one that failed."""
    if not config.out:
        return
    with (Path(config.out) / "cases.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(verdict)) + "\n")
    if verdict.outcome == "failed":
        kept = Path(config.out) / verdict.case
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept, symlinks=True)


def warm(modules: Path) -> None:
    """Load what the commands have loaded that made the inputs, once for all cases."""
    for name in modules.read_text("utf-8").split():
        # Some stand for what is no module.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    # What is there is there for good: forked processes need not look through it.
    gc.freeze()


def _check_inputs(config: FuzzConfig, inputs: Path, place: Path) -> None:
    for name in config.kinds:
        commands = KINDS[name].commands
        numbers = sorted(commands.index(command) for command in set(commands))
        for number in numbers if config.count >= MANY else numbers[:1]:
            folder = place / f"{name}-as-it-is-{number}"
            verdict = run_case(inputs, folder, number, name, None)
            if verdict.outcome != "accepted":
                raise RuntimeError(f"an input that is right is {verdict}")
            shutil.rmtree(folder)


def summary(
    config: FuzzConfig, verdicts: Sequence[Verdict], prepared_s: float, total_s: float
) -> dict[str, Any]:
    """Count outcomes by kind, and name what failed."""
    kinds: dict[str, dict[str, int]] = {}
    for verdict in verdicts:
        counts = kinds.setdefault(
            verdict.case.partition("-")[0], {"accepted": 0, "refused": 0, "failed": 0}
        )
        counts[verdict.outcome] += 1
    return {
        "seed": config.seed,
        "cases": len(verdicts),
        "kinds": kinds,
        "prepared_s": round(prepared_s, 1),
        "total_s": round(total_s, 1),
        "cases_per_minute": round(60 * len(verdicts) / max(total_s - prepared_s, 1e-9)),
        "slowest_s": max(verdict.seconds for verdict in verdicts),
        "peak_gib": max(verdict.peak_gib for verdict in verdicts),
        "failed": [asdict(verdict) for verdict in verdicts if verdict.outcome == "failed"],
    }


def main(arguments: Sequence[str]) -> int:
    """Run; exit status 1: something failed."""
    config = tyro.cli(FuzzConfig, args=list(arguments))
    config = replace(config, out=str(Path(config.out).absolute()) if config.out else "")
    torch.set_num_threads(1)
    if config.out:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        (Path(config.out) / "cases.jsonl").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="scd-fuzz-") as place:
        found = fuzz(config, Path(place).resolve())
    if config.out:
        (Path(config.out) / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    num_failed = len(found["failed"])
    print(json.dumps({**found, "failed": num_failed}, indent=2))
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
